//! `mirrorctl check PATH...`: verifies the members of a stopped mirror without changing them.

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
    /// How many findings are listed; the rest is counted
    #[arg(long, value_name = "N", default_value_t = inspection::LISTED)]
    findings: usize,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    let request = Request {
        paths: &args.paths,
        mode: Mode::Check,
        force: false,
        limit: args.findings,
    };
    inspection::run(&request, context)
}
