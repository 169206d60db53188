//! `ublk-mirror`, the daemon: one process serves one mirror as `/dev/ublkbN` or over NBD.
//!
//! | module | holds |
//! |---|---|
//! | `sys` | memory shared with the kernel and all unsafe code |
//! | `ring` | the reactor: one io_uring, timers, tasks |
//! | `host`, `member`, `disk`, `peer_disk` | the engine's traits over the ring; members are local or peers |
//! | `stream`, `batch` | sockets on the ring |
//! | `front_nbd` | the NBD front end |
//! | `front_ublk` | the ublk front end; hides libublk |
//! | `control` | the control socket |
//! | `daemon` | start, life and stop |
//! | `log` | lines to standard error, by a thread of their own |
//! | `rundir`, `ready`, `surroundings` | locks and sockets; the start's report; process settings |
//!
//! One thread owns the mirror: engine, members and front end run on it as tasks on one ring.
//! Other threads only do what may block (opening devices, ublk control commands, the log).

mod batch;
mod cli;
mod control;
mod daemon;
mod disk;
mod executor;
mod front_nbd;
mod front_ublk;
mod host;
mod log;
mod member;
mod peer_disk;
mod ready;
mod returns;
mod ring;
mod rundir;
mod stream;
mod surroundings;
mod sys;

use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

fn main() -> ExitCode {
    let args = cli::Args::parse();
    // libublk reports every step at the level of information.
    let levels = Targets::new()
        .with_default(LevelFilter::INFO)
        .with_target("libublk", LevelFilter::WARN);
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(|| log::Lines)
        .with_target(false);
    tracing_subscriber::registry()
        .with(lines.with_ansi(false).with_filter(levels))
        .init();
    // Taken before this process opens any descriptor of its own, so that the number is the
    // parent's.
    let ready = match ready::Ready::inherit(args.ready_fd) {
        Ok(ready) => ready,
        Err(error) => {
            tracing::error!("{error:#}");
            return ExitCode::from(2);
        }
    };
    if let Some(number) = args.ready_fd {
        surroundings::close_inherited(number);
    }
    let code = match daemon::run(&args, &ready) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            tracing::error!("{}", failure.message);
            ready.failed(&failure);
            ExitCode::FAILURE
        }
    };
    log::flush();
    code
}
