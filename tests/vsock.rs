//! Sockets between host and guest. tests/common/vsock_peer.rs and tests/host/vsock.c are the two halves.

use crate::common::{Run, example, on_host};

/// Returns a path at which any host that runs vireo can create sockets.
fn path(test: &str) -> String {
    format!("/tmp/vireo-test-{}-{test}.vsock", std::process::id())
}

fn sockets(script: &str, path: &str) -> Run {
    let run = Run::new("bzImage-cloud", script).with_program("vsock").args(&["--vsock", &format!("cid=3,path={path}")]);
    run.cmdline("console=ttyS0 quiet vireo.modules=virtio_mmio,vmw_vsock_virtio_transport")
}

fn gone(path: &str) {
    assert_eq!(on_host(&["test", "-e", path]).end().code(), 1, "the socket's file is still there");
}

/// Ten mebibytes in each direction simultaneously, beside connections that are full in both directions. The full
/// connections alone use no processor time.
#[test]
fn both_ways() {
    let script = "
vsock echo 1 &
vsock listen 2 sha256sum &
vsock listen 3 yes &
vsock listen 4 sleep 1000 &
read go
vsock connect 2 81 seq 1000000 2320000 || echo failed
vsock connect 2 99 true
vsock connect 5 81 true
read end";
    let path = path("bulk");
    let mut guest = sockets(script, &path).start();
    for port in 1..=4 {
        guest.wait_for(&format!("listening {port}"));
    }
    let peer = on_host(&[&example("vsock-peer"), &path, "bulk"]);
    peer.wait_for("at rest");
    guest.send(b"go\n");
    let peer = peer.end();
    assert_eq!(peer.code(), 0, "{peer}");
    assert_eq!((peer.fact("refused"), peer.fact("pings"), peer.fact("stuffed")), ("0", "50", "true"), "{peer}");
    assert_eq!((peer.fact("to the guest"), peer.fact("from the guest")), ("true", "true"), "{peer}");
    assert_eq!((peer.fact("at rest"), peer.fact("late")), ("true", "true"), "{peer}");
    guest.send(b"end\n");
    let ended = guest.end().success();
    assert_eq!(ended.stdout.matches("vsock: connect: Connection reset by peer").count(), 2, "{ended}");
    assert!(!ended.stdout.contains("failed"), "{ended}");
    gone(&path);
}

/// Hundreds of simultaneous connections in each direction; and a driver that is unloaded and loaded again.
#[test]
fn many_connections_and_another_driver() {
    let script = "
vsock echo 1 &
read go
vsock many 2 82 $COUNT
read reload
kill $!
rmmod vmw_vsock_virtio_transport && modprobe vmw_vsock_virtio_transport
vsock echo 5 &
read end";
    let path = path("many");
    let mut guest = sockets(&script.replace("$COUNT", "300"), &path).start();
    guest.wait_for("listening 1");
    let peer = on_host(&[&example("vsock-peer"), &path, "many", "300"]);
    peer.wait_for("serving");
    guest.send(b"go\n");
    let peer = peer.end();
    assert_eq!(peer.code(), 0, "{peer}");
    assert_eq!((peer.fact("served"), peer.fact("clients")), ("300", "300"), "{peer}");
    guest.send(b"reload\n");
    guest.wait_for("listening 5");
    let peer = on_host(&[&example("vsock-peer"), &path, "ping", "5"]).end();
    assert!(peer.code() == 0 && peer.stdout.contains("answered"), "{peer}");
    guest.send(b"end\n");
    let ended = guest.end().success();
    assert_eq!(ended.fact("answers"), "300", "{ended}");
    gone(&path);
}
