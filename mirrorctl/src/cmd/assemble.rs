//! `mirrorctl assemble --scan [DIR|DEVICE ...]`: finds all mirrors and starts each.
//!
//! A mirror that already runs is left alone. One that cannot be started does not keep the
//! others from starting; the command then ends with the lowest of their exit codes.

use std::path::PathBuf;

use super::start;
use crate::failure::Failure;
use crate::{Context, client, output, scan};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Look for members; without this nothing is started
    #[arg(long, required = true)]
    scan: bool,
    /// Devices and directories to look at [default: where members were last seen, and all block
    /// devices]
    places: Vec<PathBuf>,
    #[command(flatten)]
    options: start::Options,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    let places = match args.places.as_slice() {
        [] => {
            let mut places = context.run_dir.all_hints();
            places.extend(scan::all_block_devices()?);
            places
        }
        places => places.to_vec(),
    };
    let found = scan::mirrors(scan::members(&places)?);
    if found.is_empty() {
        return Err(Failure::not_found(
            "No member of any mirror was found. Name the devices or directories to look at; \
             'mirrorctl examine PATH' says what a path holds.",
        ));
    }
    let shared = args.options.nbd_tcp.is_some() || args.options.nbd_socket.is_some();
    if shared && found.len() > 1 {
        return Err(Failure::usage(format!(
            "{} mirrors were found and they cannot share one NBD address: leave --nbd-tcp and \
             --nbd-socket out, or start them one by one.",
            found.len()
        )));
    }
    let mut failures: Vec<Failure> = Vec::new();
    for mirror in &found {
        let same = |other: &&scan::FoundMirror| other.name == mirror.name;
        let result = if found.iter().filter(same).count() > 1 {
            Err(Failure::refused(format!(
                "Another mirror has the name {} too (this one has uuid {}): start the one you \
                 mean with 'mirrorctl start {} PATH...'.",
                mirror.name, mirror.uuid, mirror.name
            )))
        } else if client::served(&context.run_dir, &mirror.name)?.is_some() {
            output::note(&format!("Mirror {} is already running.", mirror.name));
            Ok(())
        } else {
            start::start(context, &mirror.name, &mirror.paths(), &args.options)
        };
        if let Err(failure) = result {
            failures.push(failure);
        }
    }
    let Some(last) = failures.pop() else {
        return Ok(());
    };
    for failure in &failures {
        output::failure(failure);
    }
    let lowest = failures.iter().map(|f| f.exit).min().unwrap_or(last.exit);
    Err(Failure::new(lowest.min(last.exit), last.message))
}
