//! The `vireo` command: parse, dispatch, print what went wrong, exit with the code that tells it.

use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    vireo::cli::main(Instant::now())
}
