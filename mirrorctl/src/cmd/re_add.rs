//! `mirrorctl re-add NAME PATH`: brings a former member back.
//!
//! The daemon decides whether a delta is possible and says why when it is not; a full resync
//! overwrites everything on the member and is done only with `--full`.

use std::path::PathBuf;

use mirror::control::Request;

use super::path_text;
use crate::failure::Failure;
use crate::medium::{Access, Medium};
use crate::{Context, client, output};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The mirror
    name: String,
    /// The member's device, image file or export (ADDRESS)
    path: PathBuf,
    /// Accept a full resync where a delta is not possible
    #[arg(long)]
    full: bool,
    /// It has gone on by itself, and gives up what it has changed (split brain)
    #[arg(long)]
    discard_changes: bool,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    let path = path_text(&args.path)?;
    let status = client::status(&context.run_dir, &args.name)?;
    // The daemon would say less about a path that is not there.
    let superblock = Medium::open(&args.path, Access::Look)?.superblock()?;
    if let Ok(loaded) = superblock
        && loaded.superblock.mirror.to_string() != status.uuid
    {
        return Err(Failure::refused(format!(
            "{path} is a member of another mirror, {} (uuid {}), not of {}. To give it up there \
             and use it here, 'mirrorctl add --force' it.",
            loaded.superblock.name, loaded.superblock.mirror, args.name
        )));
    }
    let request = Request::ReAdd {
        path: path.clone(),
        full: args.full,
        discard_changes: args.discard_changes,
        dry_run: args.dry_run,
    };
    let message = client::command(&context.run_dir, &args.name, &request)?;
    if !args.dry_run {
        context.run_dir.add_hint(&args.name, path.as_ref());
    }
    output::done(context.json, &message)
}
