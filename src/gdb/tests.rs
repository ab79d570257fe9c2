//! Tests of the stub with a simulated machine.

use std::fmt::Write;

use super::testing::{Client, Stub, VIRTUAL};
use super::{Address, Guest, Server};
use crate::kvm::debug::{Access, Cause, Hardware};

/// Returns the bytes at a guest-virtual address as the client sees them.
fn memory(client: &mut Client, addr: u64, len: u64) -> String {
    client.ask(&format!("m{addr:x},{len:x}"))
}

#[test]
fn breakpoints_are_planted_hidden_and_taken_away() {
    let stub = Stub::new(2);
    stub.fake.ram().write(0x2000, &[0x10, 0x20, 0x30]).unwrap();
    let mut client = stub.attach();
    let addr = VIRTUAL + 0x2001;
    assert_eq!(client.ask(&format!("Z0,{addr:x},1")), "OK");
    assert_eq!(client.ask(&format!("Z0,{addr:x},1")), "OK", "twice is once");
    assert_eq!(stub.fake.byte(0x2001), 0xCC);
    assert_eq!(memory(&mut client, addr - 1, 3), "102030");
    assert_eq!(client.ask(&format!("M{addr:x},1:99")), "OK");
    assert_eq!((stub.fake.byte(0x2001), memory(&mut client, addr, 1)), (0xCC, "99".into()));
    // An unmapped address, and a breakpoint that was never set.
    assert_eq!(client.ask(&format!("Z0,{:x},1", VIRTUAL + 0x1000)), "E0e");
    assert_eq!(client.ask(&format!("z0,{:x},1", addr + 1)), "E16");

    client.send("vCont;c");
    stub.fake.wait("a resumed guest", |state| state.running.len() == 2);
    assert!(stub.fake.look(|state| state.controls.iter().all(|c| c.breakpoints.contains(&addr) && !c.step)));
    stub.fake.trap(1, Cause::Breakpoint);
    assert_eq!(client.packet().unwrap(), "T05thread:02;swbreak:;");
    assert!(stub.fake.look(|state| state.running.is_empty()), "one stops, all stop");

    assert_eq!(client.ask(&format!("z0,{addr:x},1")), "OK");
    assert_eq!(stub.fake.byte(0x2001), 0x99);
    assert_eq!(client.ask(&format!("Z0,{addr:x},1")), "OK");
    // The guest itself has overwritten the breakpoint.
    stub.fake.ram().write(0x2001, &[0x77]).unwrap();
    assert_eq!(client.ask(&format!("z0,{addr:x},1")), "OK");
    assert_eq!(stub.fake.byte(0x2001), 0x77);
}

#[test]
fn whoever_leaves_leaves_nothing_behind() {
    for vanish in [false, true] {
        let stub = Stub::new(2);
        let mut client = stub.attach();
        let addr = VIRTUAL + 0x2000;
        assert_eq!(client.ask(&format!("Z0,{addr:x},1")), "OK");
        assert_eq!(client.ask(&format!("Z1,{addr:x},1")), "OK");
        client.send("vCont;c");
        stub.fake.wait("a resumed guest", |state| state.running.len() == 2);
        stub.fake.trap(0, Cause::Breakpoint);
        assert!(client.packet().is_some());
        if vanish {
            drop(client);
        } else {
            assert_eq!(client.ask("D"), "OK");
        }
        let clean = |state: &super::testing::State| state.controls.iter().all(|c| *c == Default::default());
        stub.fake.wait("a guest that goes on", |state| state.running.len() == 2 && clean(state));
        assert_eq!(stub.fake.byte(0x2000), 0);
        // The next client can attach.
        stub.attach();
    }
}

#[test]
fn debug_registers_are_four_and_take_what_the_processor_takes() {
    let stub = Stub::new(2);
    let mut client = stub.attach();
    for i in 0..3 {
        assert_eq!(client.ask(&format!("Z1,{:x},1", 0x1000 + i)), "OK");
    }
    assert_eq!(client.ask("Z3,2000,8"), "E16", "reads alone cannot be watched");
    assert_eq!(client.ask("Z2,2001,8"), "E16", "not aligned");
    assert_eq!(client.ask("Z2,2000,10"), "E16", "too long");
    assert_eq!(client.ask("Z2,2000,8"), "OK");
    assert_eq!(client.ask("Z2,2000,8"), "OK", "twice is once");
    assert_eq!(client.ask("Z4,3000,4"), "E16", "a fifth");
    assert_eq!(client.ask("z1,1000,1"), "OK");
    assert_eq!(client.ask("z1,1000,1"), "E16");
    assert_eq!(client.ask("Z4,3000,4"), "OK");

    client.send("vCont;c");
    stub.fake.wait("a resumed guest", |state| state.running.len() == 2);
    let any = Hardware { addr: 0x3000, len: 4, access: Access::Any };
    let write = Hardware { addr: 0x2000, len: 8, access: Access::Write };
    assert_eq!(stub.fake.look(|state| state.controls[1].hardware[0]), Some(any));
    // The second hit came while all vCPUs were about to stop, and is reported when the client continues the guest.
    stub.fake.traps(&[(0, Cause::Hardware(write)), (1, Cause::Hardware(any))]);
    let mut told = vec![client.packet().unwrap(), client.ask("vCont;c")];
    told.sort();
    assert_eq!(told, ["T05thread:01;watch:2000;", "T05thread:02;awatch:3000;"]);
    assert!(stub.fake.look(|state| state.running.is_empty()));
    client.send("vCont;c");
    stub.fake.wait("a resumed guest", |state| state.running.len() == 2);
}

#[test]
fn one_steps_while_the_others_run_or_stay() {
    let stub = Stub::new(3);
    let mut client = stub.attach();
    assert_eq!(client.ask("vCont?"), "vCont;c;C;s;S");
    client.send("vCont;s:2");
    stub.fake.wait("a step", |state| state.running.iter().eq(&[1]));
    assert_eq!(stub.fake.look(|state| state.controls.iter().map(|c| c.step).collect::<Vec<_>>()), [false, true, false]);
    stub.fake.trap(1, Cause::Step);
    assert_eq!(client.packet().unwrap(), "T05thread:02;");
    client.send("vCont;s:3;c");
    stub.fake.wait("a step", |state| state.running.len() == 3);
    assert_eq!(stub.fake.look(|state| state.controls.iter().map(|c| c.step).collect::<Vec<_>>()), [false, false, true]);
    client.raw(b"\x03");
    assert_eq!(client.packet().unwrap(), "T02thread:02;");
    assert!(stub.fake.look(|state| state.running.is_empty()));
    client.send("vCont;c");
    stub.fake.wait("a resumed guest", |state| state.running.len() == 3);
    assert!(stub.fake.look(|state| state.controls.iter().all(|c| !c.step)));
}

#[test]
fn threads_have_registers_of_their_own_that_can_be_written() {
    let stub = Stub::new(2);
    let mut client = stub.attach();
    assert_eq!(client.ask("qfThreadInfo"), "m01,02");
    assert_eq!(client.ask("T2"), "OK");
    assert_eq!(client.ask("T3"), "E01");
    for (thread, rip) in [(1, VIRTUAL), (2, VIRTUAL + 0x1000)] {
        assert_eq!(client.ask(&format!("Hg{thread}")), "OK");
        let all = client.ask("g");
        let hex = rip.to_le_bytes().iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        });
        assert_eq!(all[16 * 16..][..16], hex);
        assert_eq!(client.ask(&format!("G{}{}", "1122334455667788", &all[16..])), "OK");
        assert_eq!(client.ask(&format!("G{}", &all[2..])), "E16");
    }
    assert_eq!(stub.fake.look(|state| state.registers[1].general.rax), 0x8877_6655_4433_2211);
    assert_eq!(client.ask("Hg3"), "OK", "told when it is used");
    assert_eq!(client.ask("g"), "E03");
}

#[test]
fn memory_that_is_not_there_is_an_error_and_the_rest_is_read() {
    let stub = Stub::new(1);
    let mut client = stub.attach();
    stub.fake.ram().write(0xFFE, &[1, 2]).unwrap();
    // The next page is not mapped.
    assert_eq!(memory(&mut client, VIRTUAL + 0xFFE, 4), "0102");
    assert_eq!(memory(&mut client, VIRTUAL + 0x1000, 4), "E0e");
    assert_eq!(memory(&mut client, u64::MAX, 1), "E0e");
    assert_eq!(memory(&mut client, u64::MAX - 1, 0x100), "E0e");
    // A write is done completely or not at all.
    assert_eq!(client.ask(&format!("M{:x},4:09090909", VIRTUAL + 0xFFE)), "E0e");
    assert_eq!(memory(&mut client, VIRTUAL + 0xFFE, 2), "0102");
    let monitor = |client: &mut Client, command: &str| {
        let hex = command.bytes().fold(String::from("qRcmd,"), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        });
        let answer = client.ask(&hex);
        assert_eq!(client.packet().unwrap(), "OK");
        let digits = answer.as_bytes()[1..].chunks(2).map(|hex| str::from_utf8(hex).unwrap());
        String::from_utf8(digits.map(|hex| u8::from_str_radix(hex, 16).unwrap()).collect()).unwrap()
    };
    assert_eq!(monitor(&mut client, "phys 0xffe 2"), "0xffe: 01 02\n");
    assert_eq!(monitor(&mut client, &format!("translate {VIRTUAL:#x}")), "0x0\n");
    assert_eq!(monitor(&mut client, "translate 0"), "not mapped\n");
    assert_eq!(monitor(&mut client, "phys 0xffffffffffffffff 1024"), "not all RAM\n");
    assert!(monitor(&mut client, "nonsense").starts_with("monitor translate ADDR"));
}

#[test]
fn the_end_is_told_to_who_waits_for_it() {
    let mut stub = Stub::new(1);
    let mut client = stub.attach();
    client.send("vCont;c");
    stub.fake.wait("a resumed guest", |state| state.running.len() == 1);
    stub.finish(70);
    assert_eq!(client.packet().unwrap(), "W46");
    let mut stub = Stub::new(1);
    let mut client = stub.attach();
    stub.finish(0);
    assert_eq!(client.packet(), None);
}

#[test]
fn kill_ends_the_guest_and_a_second_client_is_sent_away() {
    let stub = Stub::new(1);
    let mut client = stub.attach();
    assert_eq!(stub.connect().packet(), None);
    assert_eq!(client.ask("?"), "T05thread:01;");
    client.send("k");
    stub.fake.wait("the end", |state| state.killed);
    assert!(stub.fake.look(|state| state.running.is_empty()), "a killed guest does not go on");
}

#[test]
fn clients_that_break_the_protocol_are_cut_off_and_the_guest_goes_on() {
    let longest = [b"$".to_vec(), vec![b'a'; 1 << 20]].concat();
    for bytes in [
        &longest[..],
        b"$m0,ffffffffffffffff#00",
        b"$vCont;s:63#00$$$$####",
        b"\xFF\x00\x80$Z9,,,#23+++---\x03\x03\x03",
        b"$G#47",
        b"$qXfer:features:read:target.xml:ffffffffffffffff,ffffffffffffffff#00",
    ] {
        let stub = Stub::new(2);
        let mut client = stub.connect();
        client.raw(bytes);
        drop(client);
        stub.fake.wait("a guest that goes on", |state| state.pauses > 0 && state.running.len() == 2);
        stub.attach();
    }
    // A request for all memory in one packet.
    let stub = Stub::new(1);
    // No two consecutive bytes are equal, because a run would be sent as one byte and a count.
    let data: Vec<u8> = (0..0xFE000u32).map(|n| (n * 37) as u8).collect();
    stub.fake.ram().write(0x2000, &data).unwrap();
    let mut client = stub.attach();
    client.send(&format!("m{:x},fe000", VIRTUAL + 0x2000));
    while client.packet().is_some() {}
    stub.fake.wait("a guest that goes on", |state| state.running.len() == 1);
    // Random packets.
    let mut seed = 1u64;
    let mut random = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize
    };
    let words = [
        "m",
        "M",
        "Z0",
        "z0",
        "Z2",
        "vCont;",
        "s",
        "c",
        ":",
        ",",
        ";",
        "ffffffffffffffff",
        "0",
        "1",
        "g",
        "G",
        "H",
        "qRcmd,",
        "-1",
        "#",
        "$",
        "X",
        "p",
        "T",
        "qXfer:features:read:",
        "}",
        "*",
    ];
    for _ in 0..300 {
        let mut client = stub.connect();
        for _ in 0..random() % 4 {
            let packet: String = (0..random() % 8).map(|_| words[random() % words.len()]).collect();
            client.send(&packet);
        }
    }
    stub.attach();
}

#[test]
fn addresses() {
    assert_eq!("1234".parse(), Ok(Address::Port(1234)));
    assert_eq!("unix:/run/vm.gdb".parse(), Ok(Address::Unix("/run/vm.gdb".into())));
    for bad in ["", "unix:", "65536", "-1", "host:1234", "/run/vm.gdb"] {
        assert!(bad.parse::<Address>().is_err(), "{bad}");
    }
}

#[test]
fn a_socket_is_its_owners_and_goes_with_the_stub() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("gdb");
    let server = Server::open(&Address::Unix(path.clone())).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(Server::open(&Address::Unix(path.clone())).is_err());
    drop(server);
    assert!(!path.exists());
    let server = Server::open(&Address::Port(0)).unwrap();
    let port: u16 = server.target().trim_start_matches(':').parse().unwrap();
    let taken = Server::open(&Address::Port(port)).err().unwrap().to_string();
    assert_eq!(taken, format!("gdb: cannot listen on port {port} of 127.0.0.1"));
}
