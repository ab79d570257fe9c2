//! Folders of the host in the guest. What a file system should do is what ext4 does: the same calls are made on both
//! (tests/host/fs-check.c), and must come out the same.

mod common;

use common::Run;

/// Modules of the guest.
const CMDLINE: &str = "console=ttyS0 quiet vireo.modules=virtio_mmio,virtio_blk,virtiofs";

/// Makes the folder on the host's scratch disk, as 9p and tmpfs lack much, and runs vireo.
const ON_SCRATCH: &str = r#"
dir=/run/scratch/shares.$$
mkdir -p $dir/one
trap 'rm -rf $dir' EXIT
cd $dir
"$@"
"#;

fn part<'a>(text: &'a str, from: &str, to: &str) -> Vec<&'a str> {
    text.lines().skip_while(|line| *line != from).skip(1).take_while(|line| *line != to).collect()
}

/// The same calls on the share and on ext4.
#[test]
fn calls_come_out_as_on_ext4() {
    let script = "
mke2fs -q /dev/vda 65536
mount -t ext4 /dev/vda /tmp
mount -t virtiofs share0 /mnt
for dir in /tmp /mnt; do
    mkdir $dir/check
    echo begin $dir
    fs-check $dir/check
    echo end $dir
done
umount /mnt";
    let run = Run::new("bzImage-cloud", script).with_program("fs-check").cmdline(CMDLINE).through(ON_SCRATCH);
    let disk = run.path("disk");
    std::fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    let ended = run.args(&["--disk", &disk, "--share", "one"]).run_to_end().success();
    let (ext4, share) = (part(&ended.stdout, "begin /tmp", "end /tmp"), part(&ended.stdout, "begin /mnt", "end /mnt"));
    assert_eq!(ext4.last(), Some(&"== end"), "{ended}");
    let differences: Vec<_> = ext4.iter().zip(&share).filter(|(a, b)| a != b).collect();
    assert!(differences.is_empty() && ext4.len() == share.len(), "{differences:#?}");
}
