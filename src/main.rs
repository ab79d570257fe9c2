//! The `vireo` command: parses the arguments, dispatches, prints what went wrong and exits with the matching code.

use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    vireo::cli::main(Instant::now())
}
