//! Other flavours of the kernels in tests/kernels.rs; `make soak` runs these tests.

mod common;

common::kernels::kernels! {
    full_5_10 "full-5.10"
    full_6_1 "full"
    full_6_12 "full-6.12"
    full_of_sid "full-sid"
    realtime_6_1 "rt"
    realtime_6_12 "rt-6.12"
    realtime_of_sid "rt-sid"
}
