//! `mirrorctl`: creates, starts, watches and repairs mirrors.
//!
//! It is the only command a person types. It holds no state and decides nothing about who is
//! in-sync: what is running is asked of the mirror's daemon over its control socket
//! ([`client`]), what is stopped is read from the members' superblocks ([`scan`]), and those
//! two are the only sources. One file under `cmd/` is one command.
//!
//! # What it promises
//!
//! * A command that writes to a disk first says what it found there ([`probe`]), refuses what
//!   may be somebody's data unless `--force` is given, and never writes to a disk that is in
//!   use ([`medium`]).
//! * Every failure is a sentence that says what is wrong and what to do, and one of the exit
//!   codes that `--help` lists ([`failure`]).
//! * `--json` prints the documents of `mirror::control`, whose fields are only ever added to.
//!
//! It serves no I/O (but for `export`, which lends a disk to another host, in the foreground), does
//! not stay in the background and keeps no configuration file.
#![forbid(unsafe_code)]

mod apart;
mod client;
mod cmd;
mod daemon;
mod failure;
mod medium;
mod offline;
mod output;
mod probe;
mod progress;
mod run_dir;
mod scan;
mod size;
mod when;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use failure::Failure;
use run_dir::RunDir;

/// Creates, starts, watches and repairs mirrors.
#[derive(Debug, Parser)]
#[command(name = "mirrorctl", version, after_help = failure::EXIT_CODES, propagate_version = true)]
#[command(arg_required_else_help = true)]
struct Cli {
    /// Where control sockets and logs are.
    #[arg(long, global = true, value_name = "DIR", env = "UBLK_MIRROR_RUN_DIR")]
    #[arg(default_value = run_dir::DEFAULT)]
    run_dir: PathBuf,

    /// Print JSON instead of text.
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    command: cmd::Command,
}

/// What every command is given.
#[derive(Debug)]
struct Context {
    /// The run directory.
    run_dir: RunDir,
    /// Whether to print JSON.
    json: bool,
}

fn run(cli: Cli) -> Result<(), Failure> {
    let context = Context {
        run_dir: RunDir::new(&cli.run_dir)?,
        json: cli.json,
    };
    cli.command.run(&context)
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::failure(&failure);
            ExitCode::from(failure.exit.code())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
