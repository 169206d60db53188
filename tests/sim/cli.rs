//! `cargo sim`: plays random histories of the mirror on simulated disks and looks for a wrong
//! answer.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::cast_possible_truncation
)]
// The tests (main.rs) are made of the same files: each of the two leaves something unused.
#![allow(dead_code)]

mod client;
mod invariants;
mod machine;
mod oracle;
mod peer_host;
mod peer_net;
mod peer_play;
mod peer_server;
mod play;
mod rot;
mod runner;
mod script;
mod sums;

use clap::Parser;
use runner::{Failure, Totals, replay, run, run_one, shrink};
use std::collections::VecDeque;
use std::io::Write;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Plays random histories of the mirror on simulated disks: clients, faults, an operator,
/// crashes. The production engine runs unchanged; an oracle judges every read.
#[derive(Parser)]
#[command(name = "cargo sim")]
struct Arguments {
    /// Plays this seed alone, with a trace, and cuts it down if it fails
    #[arg(long, conflicts_with_all = ["histories", "minutes"])]
    seed: Option<u64>,
    /// How many histories
    #[arg(long, default_value_t = 10_000)]
    histories: u64,
    /// Goes on for so many minutes instead
    #[arg(long)]
    minutes: Option<u64>,
    /// The first seed
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Threads [default: one a processor]
    #[arg(long)]
    threads: Option<usize>,
    /// Lines of the trace that are shown, the last ones
    #[arg(long, default_value_t = 60)]
    lines: usize,
    /// Seconds for cutting down a history that fails
    #[arg(long, default_value_t = 120)]
    shrink_seconds: u64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // What went wrong is told once, at the end.
    std::panic::set_hook(Box::new(|_| {}));
    let failure = match arguments.seed {
        Some(seed) => {
            let (result, trace) = traced(arguments.lines, || run_one(seed));
            print_trace(&trace);
            match result {
                Ok(played) => {
                    println!("seed {seed}: {played:?}");
                    None
                }
                Err(failure) => Some(failure),
            }
        }
        None => many(&arguments),
    };
    match failure {
        None => ExitCode::SUCCESS,
        Some(failure) => {
            let time = Duration::from_secs(arguments.shrink_seconds);
            explain(&failure, time, arguments.lines);
            ExitCode::FAILURE
        }
    }
}

fn many(arguments: &Arguments) -> Option<Failure> {
    let threads = arguments
        .threads
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let time = arguments.minutes.map(|m| Duration::from_secs(m * 60));
    let count = if time.is_some() {
        u64::MAX / 2
    } else {
        arguments.histories
    };
    let (begun, told) = (Instant::now(), Mutex::new(Instant::now()));
    let progress = |totals: &Totals| {
        let mut told = told.lock().unwrap();
        if told.elapsed() > Duration::from_secs(10) {
            *told = Instant::now();
            eprintln!(
                "{:>8} histories, {} s",
                totals.histories,
                begun.elapsed().as_secs()
            );
        }
    };
    let seeds = arguments.first..arguments.first + count;
    let (totals, failure) = run(seeds, threads, time, progress);
    let played = totals.played;
    println!(
        "{} histories (the shortest of {} operations), {} requests, {} actions and faults, {} crashes, {} steps, {} s on {threads} threads: {}",
        totals.histories,
        totals.shortest,
        played.requests,
        played.actions,
        played.crashes,
        played.steps,
        begun.elapsed().as_secs(),
        if failure.is_some() {
            "FAILED"
        } else {
            "no violation"
        }
    );
    let rot = played.rot;
    println!(
        "{} blocks scrubbed; of {} copies that rotted silently {} were mended or written over, and {} put right by the harness where nothing could tell",
        rot.scrubbed, rot.rotted, rot.gone, rot.undone
    );
    let peers = played.peers;
    println!(
        "{} histories with a peer member: {} starts of its server, {} claims granted, {} connections that went on where one broke",
        peers.histories, peers.starts, peers.claims, peers.went_on
    );
    failure
}

fn explain(failure: &Failure, time: Duration, lines: usize) {
    println!("FAILED: seed {}: {}", failure.seed, failure.message);
    println!("cutting it down, for up to {} s", time.as_secs());
    let (script, message) = shrink(failure, time);
    let (_, trace) = traced(lines, || replay(&script));
    println!(
        "\n{} of {} operations are left:\n{script}",
        script.len(),
        failure.script.len()
    );
    print_trace(&trace);
    println!("{message}");
}

/// The last lines that were logged, and how many at most.
#[derive(Clone)]
struct Trace(Arc<Mutex<VecDeque<String>>>, usize);

impl Write for Trace {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut lines = self.0.lock().unwrap();
        lines.push_back(String::from_utf8_lossy(bytes).into_owned());
        if lines.len() > self.1 {
            lines.pop_front();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn traced<T>(lines: usize, run: impl FnOnce() -> T) -> (T, Trace) {
    let trace = Trace(Arc::default(), lines);
    let writer = trace.clone();
    let subscriber = tracing_subscriber::fmt()
        .without_time()
        .with_target(false)
        .with_ansi(false)
        .with_max_level(tracing::Level::TRACE)
        .with_writer(move || writer.clone())
        .finish();
    let result = tracing::subscriber::with_default(subscriber, run);
    (result, trace)
}

fn print_trace(trace: &Trace) {
    for line in trace.0.lock().unwrap().iter() {
        print!("  {line}");
    }
}
