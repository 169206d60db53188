//! `mirrorctl clear-flush-error NAME`: lets FLUSH and FUA work again after flushes failed on
//! every member.
//!
//! Blocks written before the failed flush may be lost although they were answered; the caller
//! was told by EIO. Clearing says that this is known and dealt with.

use mirror::control::Request;

use crate::failure::Failure;
use crate::{Context, client, output};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The mirror
    name: String,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    let message = client::command(&context.run_dir, &args.name, &Request::ClearFlushError)?;
    output::done(context.json, &message)
}
