//! `mirrorctl repair PATH...`: mends the members of a stopped mirror where a good copy is there.

use std::path::PathBuf;

use crate::Context;
use crate::cmd::inspection;
use crate::failure::Failure;
use crate::offline::{Mode, Request};

#[derive(Debug, clap::Args)]
#[command(after_long_help = inspection::HELP)]
pub(crate) struct Args {
    /// The members' devices or image files, all of one mirror
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
    /// Repair although a member that the mirror names in-sync is not given
    #[arg(long)]
    force: bool,
    /// How many findings are listed; the rest is counted
    #[arg(long, value_name = "N", default_value_t = inspection::LISTED)]
    findings: usize,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    let mode = if args.dry_run {
        Mode::DryRun
    } else {
        Mode::Repair
    };
    let request = Request {
        paths: &args.paths,
        mode,
        force: args.force,
        limit: args.findings,
    };
    inspection::run(&request, context)
}
