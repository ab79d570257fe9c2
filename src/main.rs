//! The `vireo` command.

use std::process::ExitCode;

use clap::Parser;
use vireo::cli::doctor;

#[derive(Parser)]
#[command(version)]
enum Command {
    Doctor(doctor::DoctorArgs),
}

fn main() -> ExitCode {
    let Command::Doctor(args) = Command::parse();
    match doctor::run(&args) {
        Ok(code) => code.into(),
        Err(error) => {
            eprintln!("vireo: cannot print the report: {error}");
            ExitCode::from(125)
        }
    }
}
