//! The command line: flags are named as qemu-img names them where they mean the same, and exit
//! codes are its codes. The format of an image comes from `-f` or the file's suffix, never from
//! its content.

mod bench;
mod check;
mod commit;
mod common;
mod compare;
mod convert;
mod create;
mod info;
mod map;
mod resize;
mod size;
mod snapshot;
mod stream;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Disk images: look at them, make them, turn one into another.
///
/// The format of an image comes from -f or from the file's suffix, never from its content.
#[derive(Parser)]
#[command(name = "platter", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Info(info::Info),
    Map(map::Map),
    Check(check::Check),
    Create(create::Create),
    Convert(convert::Convert),
    Compare(compare::Compare),
    Resize(resize::Resize),
    Snapshot(snapshot::Snapshot),
    Commit(commit::Commit),
    Bench(bench::Bench),
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    crate::made::watch_signals();
    let result = match Args::parse().command {
        Command::Info(command) => command.run(),
        Command::Map(command) => command.run(),
        Command::Check(command) => command.run(),
        Command::Create(command) => command.run(),
        Command::Convert(command) => command.run(),
        Command::Compare(command) => command.run(),
        Command::Resize(command) => command.run(),
        Command::Snapshot(command) => command.run(),
        Command::Commit(command) => command.run(),
        Command::Bench(command) => command.run(),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            eprintln!("platter: {}", failure.message);
            ExitCode::from(failure.code)
        }
    }
}
