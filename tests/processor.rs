//! The processor and the clocks that a Linux guest finds, with kvmclock and without.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::common::{Ended, Run};

const SCRIPT: &str = r#"
echo "clock: $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
echo "date: $(date -u +%s)"
sleep 1
echo "uptime: $(cut -d ' ' -f 1 /proc/uptime)"
echo "tsc: $(dmesg | grep -i 'tsc:' | tr '\n' ';')"
echo "timer: $(dmesg | grep -ic 'pm-timer\|acpi_pm')"
echo "name: $(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1)"
echo "flags: $(grep -m 1 ^flags /proc/cpuinfo)"
"#;

fn boots(kernel: &str, args: &[&str], cmdline: &str) -> Ended {
    let cmdline = format!("console=ttyS0 quiet vireo.modules=none {cmdline}");
    let ended = Run::new(kernel, SCRIPT).cmdline(&cmdline).args(args).run_to_end();
    // Without ACPI the guest cannot power off.
    if args.contains(&"off") { ended.expect(0, "halted") } else { ended.success() }
}

/// Each way to run without kvmclock. A guest that does not learn its TSC's frequency from its command line measures it
/// by the 8254 alone.
#[test]
fn guests_without_kvmclock_find_a_timer() {
    for (kernel, args, cmdline) in [
        ("bzImage-cloud", &["--cpus", "1"][..], "nopv no-kvmclock"),
        ("bzImage-cloud", &["--cpus", "2"], "no-kvmclock"),
        ("bzImage-full", &["--cpus", "1"], "nopv"),
        ("bzImage-cloud", &["--cpu", "-kvmclock"], ""),
        ("bzImage-cloud", &["--acpi", "off"], "nopv"),
    ] {
        let ended = boots(kernel, args, cmdline);
        assert_ne!(ended.fact("clock"), "kvm-clock", "{ended}");
        assert!(ended.fact("uptime").parse::<f64>().unwrap() > 1.0, "{ended}");
        println!("{kernel} {args:?} {cmdline}: {} {}", ended.fact("clock"), ended.fact("tsc"));
    }
}

#[test]
fn a_guest_with_kvmclock_loses_no_time_with_the_others() {
    let ended = boots("bzImage-cloud", &[], "");
    assert_eq!((ended.fact("clock"), ended.fact("timer")), ("kvm-clock", "0"), "{ended}");
    let date: i64 = ended.fact("date").parse().unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
    assert!((now - date).abs() < 24 * 3600, "{ended}");
    assert!(!ended.fact("name").is_empty(), "{ended}");
    assert!(!ended.fact("name").contains('/'), "Linux made the name from family and model: {ended}");
}

#[test]
fn a_removed_feature_takes_others_with_it() {
    for (removed, gone) in
        [("-xsave", &["xsave", "avx", "avx2", "fma", "f16c", "pku"][..]), ("-avx", &["avx", "avx2", "fma"])]
    {
        let ended = boots("bzImage-cloud", &["--cpu", removed], "");
        let flags: Vec<&str> = ended.fact("flags").split_whitespace().collect();
        assert!(flags.contains(&"sse2"), "{ended}");
        for name in gone {
            assert!(!flags.contains(name), "{removed}: {name}: {ended}");
        }
    }
}
