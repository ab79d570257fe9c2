//! AVX: guests that use it keep its registers across pauses, and `--cpu -avx` removes it together with everything that
//! depends on it.

use std::fs;

use crate::common::{Live, Run, scratch, until};

/// Two programs that share a processor hold values in their YMM registers while the machine is paused and resumed.
#[test]
fn registers_survive_pauses() {
    // The test grows a disk to notify the guest of the end of the pauses.
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
        // Both programs have begun another round since the last pause.
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

/// Without AVX, the features that share its encoding or its registers are gone too, and its instructions are undefined.
#[test]
fn taken_away_with_what_needs_it() {
    let script = r#"
echo "flags: $(sed -n 's/^flags[^:]*: //p' /proc/cpuinfo)"
avx 1 1; echo "status: $?"
"#;
    let run = |args: &[&str]| Run::new("bzImage-cloud", script).with_program("avx").args(args).run_to_end().success();
    let with = run(&[]);
    let has = |flags: &str, flag: &str| flags.split_whitespace().any(|f| f == flag);
    assert!(has(with.fact("flags"), "avx") && has(with.fact("flags"), "avx2"), "{with}");
    let without = run(&["--cpu", "-avx"]);
    let needs_avx =
        |flag: &str| flag.starts_with("avx") || ["fma", "fma4", "f16c", "xop", "vaes", "vpclmulqdq"].contains(&flag);
    let left: Vec<&str> = without.fact("flags").split_whitespace().filter(|flag| needs_avx(flag)).collect();
    assert!(left.is_empty() && has(without.fact("flags"), "xsave"), "{left:?}: {without}");
    assert_eq!(without.fact("status"), "132", "SIGILL: {without}");
}
