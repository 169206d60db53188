//! `mirrorctl promote NAME [PATH...]`: starts a mirror here that another host has served.
//!
//! Without the other host's member nothing can show that it is gone, but one thing: that it has
//! handed the mirror over (`mirrorctl demote` there). Everything else is the operator's word,
//! `--force`, and why goes into the superblocks, to be read when the hosts meet again
//! (`mirrorctl resolve`). When every member can be read, this is `mirrorctl start`.

use std::path::PathBuf;

use super::start;
use crate::Context;
use crate::failure::Failure;
use crate::run_dir::check_name;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The mirror
    name: String,
    /// Its members that can be reached from here; found by a scan when none is given
    paths: Vec<PathBuf>,
    #[command(flatten)]
    options: start::Options,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    check_name(&args.name)?;
    args.options.refuse_force_without_reason()?;
    let members = start::candidates(&args.name, &args.paths, &[], context)?;
    start::launch(
        context,
        &args.name,
        &members,
        &args.options,
        start::Verb::Promote,
    )
}
