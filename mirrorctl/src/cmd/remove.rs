//! `mirrorctl remove NAME MEMBER`: lets go of a member's device.

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
    /// Also take out a member that is in-sync
    #[arg(long)]
    force: bool,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    let request = Request::Remove {
        member: member_ref(&args.member)?,
        force: args.force,
    };
    let message = client::command(&context.run_dir, &args.name, &request)?;
    output::done(context.json, &message)
}
