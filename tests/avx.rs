//! AVX: guests that use it keep its registers.

use std::fs;

use crate::common::{Live, Run, scratch, until};

/// Two programs that share a processor hold values in their YMM registers, while the machine is paused and resumed.
#[test]
fn registers_survive_pauses() {
    // The end of the pauses is told by the size of a disk.
    let script = r#"
avx 1 & first=$!
avx 2 & second=$!
size=$(cat /sys/block/vda/size)
while [ "$(cat /sys/block/vda/size)" = "$size" ]; do sleep 0.1; done
kill -USR1 $first $second
wait $first; echo "first: $?"
wait $second; echo "second: $?"
"#;
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (console, disk) = (path("console"), path("disk"));
    fs::write(&disk, [0; 4096]).unwrap();
    let run = Run::new("bzImage-cloud", script).with_program("avx");
    let mut live = Live::start(run.args(&["--disk", &disk, "--serial", &format!("file:{console}")]));
    let said = || String::from_utf8_lossy(&fs::read(&console).unwrap_or_default()).into_owned();
    let rounds = |said: &str, seed: u32| said.matches(&format!("avx {seed}: round ")).count();
    for _ in 0..10 {
        // Each has begun another round since the last pause.
        let before = said();
        until("another round of both", said, |said| {
            said.contains("changed") || [1, 2].iter().all(|&seed| rounds(said, seed) > rounds(&before, seed))
        });
        assert_eq!((live.ask("pause"), live.ask("resume")), ("paused: true".into(), "resumed: true".into()));
    }
    assert_eq!(live.ask("grow disk0 1M"), "grown: disk0 to 1M");
    let told = until("both ends", said, |said| said.contains("second: "));
    assert!(told.contains("first: 0") && told.contains("second: 0"), "{told}");
    live.end();
}
