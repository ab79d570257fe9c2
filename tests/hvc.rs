//! The virtio console and its ports under a stock driver: no byte is lost or invented in either direction.

use std::fs::{self, File};
use std::process::Command;

use crate::common::{Run, example, on_host, on_terminal, scratch};

fn md5(bytes: &[u8]) -> String {
    let dir = scratch();
    let file = dir.path().join("bytes");
    fs::write(&file, bytes).unwrap();
    let sum = Command::new("md5sum").stdin(File::open(file).unwrap()).output().unwrap().stdout;
    String::from_utf8(sum).unwrap().split_whitespace().next().unwrap().to_string()
}

/// Returns every byte value, in an order that reveals a loss.
fn bytes(len: u32) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8 ^ (i >> 8) as u8 ^ (i >> 16) as u8).collect()
}

fn hvc(script: &str) -> Run {
    Run::new("bzImage-cloud", script).cmdline("console=hvc0 quiet").args(&["--console", "stdio"])
}

/// A console on the standard streams takes a flood of input and delivers output, and vireo reports how the guest ended.
#[test]
fn on_the_standard_streams() {
    // Without Ctrl-O, which is SysRq here.
    let input: Vec<u8> = bytes(200_000).into_iter().filter(|byte| *byte != 0x0F).collect();
    let script = format!(
        "stty raw -echo -opost\necho ready\nhead -c {} >/in\necho \"sum: $(md5sum </in | cut -d ' ' -f 1)\"
echo BEGIN; seq 1000000 1002000; echo END\nstty sane",
        input.len()
    );
    let mut guest = hvc(&script).start();
    guest.wait_for("ready");
    guest.send(&input);
    guest.close_input();
    // hvc writes 16 bytes at a time, so the output is not a flood.
    let ended = guest.end().success();
    assert_eq!(ended.fact("sum"), md5(&input), "{ended}");
    let (_, printed) = ended.stdout.split_once("BEGIN\n").unwrap();
    let (printed, _) = printed.split_once("END\n").unwrap();
    let expected: String = (1_000_000..=1_002_000).map(|n| format!("{n}\n")).collect();
    assert!(printed == expected, "got {} bytes instead of {}", printed.len(), expected.len());
}

/// Script that makes the guest find its ports: `port NAME` prints a port's device.
const PORTS: &str = r#"modprobe virtio_console
names() { cat /sys/class/virtio-ports/*/name; }
for n in $(seq 100); do [ "$(names 2>/dev/null | wc -l)" = $PORTS ] && break; sleep 0.1; done
port() { echo /dev/$(grep -lx $1 /sys/class/virtio-ports/*/name | cut -d / -f 5); }
sum() { md5sum | cut -d ' ' -f 1; }
echo "names: $(names | tr '\n' ' ')"
"#;

/// Some MiB pass through a port to and from a file, and through a port on a socket and one on FIFOs in both directions.
#[test]
fn ports_carry_data_both_ways() {
    let input = bytes(3_000_000);
    let script = format!(
        r#"PORTS=3; {PORTS}
dd if=/dev/urandom of=/out bs=64k count=64 2>/dev/null
# opened once: Linux discards received data when a port is closed
exec 3<>$(port log)
cat /out >&3
echo "out: $(sum </out)"
echo "from: $(head -c {len} <&3 | sum)"
exec 3>&-
# the port reads as empty while nothing is connected at the other end
exec 3<$(port agent)
until head -c {len} <&3 >/in; [ -s /in ]; do sleep 0.1; done
exec 3<&-
echo "in: $(sum </in)"
cat /out >$(port agent)
echo "pipe: $(head -c {len} $(port pipe) | sum)"
cat /out >$(port pipe)"#,
        len = input.len()
    );
    let run = Run::new("bzImage-cloud", &script);
    // The run's own folder is removed with the run.
    let kept = scratch();
    let path = |name: &str| kept.path().join(name).display().to_string();
    let (file, from) = (path("log"), path("from"));
    fs::write(&from, &input).unwrap();
    let beside = |name: &str| format!("/tmp/vireo-hvc-{}.{name}", std::process::id());
    let (socket, pipe) = (beside("socket"), beside("pipe"));
    let log = format!("log,to=file:{file},from={from}");
    let (agent, fifos) = (format!("name=agent,to=socket:{socket}"), format!("pipe,to=pipe:{pipe}"));
    let ports = ["--console-port", &log, "--console-port", &agent, "--console-port", &fifos];
    let guest = run.args(&ports).start();
    guest.wait_for("names: ");
    let read = on_host(&["md5sum", &format!("{pipe}.out")]);
    let write = on_host(&["cp", &from, &format!("{pipe}.in")]);
    let mut talk = on_host(&[&example("talk"), &socket]);
    talk.wait_for("talking");
    talk.send(&input);
    let ended = guest.end().success();
    assert_eq!(ended.fact("names").trim(), "log agent pipe", "{ended}");
    for fact in ["from", "in", "pipe"] {
        assert_eq!(ended.fact(fact), md5(&input), "{fact} {ended}");
    }
    // Data that the emulated host writes is not immediately visible outside.
    let written = on_host(&["md5sum", &file]).end().stdout;
    for sum in [written, read.end().stdout] {
        assert_eq!(sum.split_whitespace().next(), Some(ended.fact("out")), "{ended}");
    }
    assert_eq!(write.end().code(), 0);
    let said = talk.end().bytes;
    let said = said.strip_prefix(b"talking\n").unwrap();
    assert_eq!((said.len(), &*md5(said)), (4 << 20, ended.fact("out")), "{ended}");
    let left = on_host(&["sh", "-c", "ls /tmp | grep vireo-hvc", "sh"]).end();
    assert_eq!(left.stdout, "", "FIFOs or a socket were left behind");
}

/// The guest learns the terminal's size, also when it changes; and vireo handles Ctrl-A X.
#[test]
fn on_a_terminal_that_changes_its_size() {
    let script = "echo \"size $(stty size).\"
until [ \"$(stty size)\" = '40 100' ]; do sleep 0.2; done
echo it grew\nsleep 1000";
    let run = hvc(script);
    let go = run.path("go");
    let wrapper = format!(
        "stty rows 33 cols 77
(while [ ! -e '{go}' ]; do sleep 0.2; done; stty rows 40 cols 100) <\"$(tty)\" &
\"$@\"; echo \"code: $?\""
    );
    let mut guest = run.through(&wrapper).start_on_terminal(on_terminal);
    guest.wait_for("size 33 77.");
    fs::write(&go, "").unwrap();
    guest.wait_for("it grew");
    guest.send(b"\x01x");
    assert_eq!(guest.end().fact("code"), "0");
}
