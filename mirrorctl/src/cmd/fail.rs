//! `mirrorctl fail NAME MEMBER`: takes a member out of service as faulty.

use mirror::control::Request;

use super::member_ref;
use crate::failure::Failure;
use crate::{Context, client, output};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The mirror
    name: String,
    /// Slot number or path of the member
    member: String,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    let member = member_ref(&args.member)?;
    let message = client::command(&context.run_dir, &args.name, &Request::Fail { member })?;
    output::done(context.json, &message)
}
