//! The kernels in use today: Debian's from 11 to sid, each booted with its modules and each through `vireo exec`.

crate::common::kernels::kernels! {
    linux_5_10 "cloud-5.10"
    linux_6_1 "cloud"
    linux_6_12 "cloud-6.12"
    linux_of_sid "cloud-sid"
}
