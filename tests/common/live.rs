//! A machine that takes requests while it runs, as there is no other way to reach a [`Controller`] from a shell.
//!
//! `live CONFIG` runs the machine that a JSON file describes. Each line of its standard input is a request, which it
//! answers with one line: `balloon SIZE`, `memory [SIZE]`, `grow DISK SIZE`, `link CARD up|down`, `stats`, `hints
//! [start|end]`, `pause`, `resume`. (So the guest's console must be elsewhere.)

use std::error::Error;
use std::io;
use std::thread;
use std::time::Instant;

use vireo::config::MachineConfig;
use vireo::control::Controller;
use vireo::machine::Machine;
use vireo::machine::mailbox::Mailbox;
use vireo::machine::run::RunOptions;
use vireo::options::Size;

fn answer(controller: &Controller, request: &str) -> Result<String, Box<dyn Error>> {
    Ok(match request.split_once(' ').unwrap_or((request, "")) {
        ("balloon", size) => {
            controller.set_balloon(size.parse::<Size>()?.0)?;
            format!("balloon: {size}")
        }
        ("memory", "") => format!("memory: {}", serde_json::to_string(&controller.memory_status()?)?),
        ("memory", size) => {
            controller.request_memory(size.parse::<Size>()?.0)?;
            format!("memory: {size}")
        }
        ("grow", arguments) => {
            let (disk, size) = arguments.split_once(' ').ok_or("usage: grow DISK SIZE")?;
            controller.resize_disk(disk, size.parse::<Size>()?.0)?;
            format!("grown: {disk} to {size}")
        }
        ("link", arguments) => {
            let (card, state) = arguments.split_once(' ').ok_or("usage: link CARD up|down")?;
            controller.set_link(card, state == "up")?;
            format!("link: {card} {state}")
        }
        ("stats", "") => format!("stats: {}", serde_json::to_string(&controller.balloon_stats()?)?),
        ("hints", "start") => controller.start_hints().map(|()| "hints: started".to_string())?,
        ("hints", "end") => controller.end_hints().map(|()| "hints: ended".to_string())?,
        ("hints", "") => {
            let hints = controller.free_hints()?;
            let bytes: u64 = hints.ranges.iter().map(|range| range.end - range.start).sum();
            format!("hints: {bytes} bytes in {} ranges, complete: {}", hints.ranges.len(), hints.complete)
        }
        ("pause", "") => format!("paused: {}", controller.pause()),
        ("resume", "") => format!("resumed: {}", controller.resume()),
        _ => return Err(format!("'{request}' is not a request").into()),
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("usage: live CONFIG")?;
    let config: MachineConfig = serde_json::from_str(&std::fs::read_to_string(path)?)?;
    let mut machine = Machine::new(config, None, Instant::now())?;
    machine.load()?;
    let mailbox = Mailbox::new()?;
    let controller = Controller::new(mailbox.clone());
    thread::spawn(move || {
        for request in io::stdin().lines().map_while(Result::ok) {
            println!("{}", answer(&controller, &request).unwrap_or_else(|e| format!("refused: {e}")));
        }
    });
    let ended = machine.run(RunOptions::default(), mailbox)?;
    println!("{}", ended.outcome.sentence());
    Ok(())
}
