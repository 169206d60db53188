//! `mirrorctl add NAME PATH`: puts a new disk into an empty slot.

use std::path::PathBuf;

use mirror::control::Request;

use super::path_text;
use crate::failure::Failure;
use crate::medium::{Access, Medium};
use crate::{Context, client, output, probe};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The mirror
    name: String,
    /// The new device, image file or export (ADDRESS); what it holds is lost
    path: PathBuf,
    /// Overwrite a filesystem or another mirror's member
    #[arg(long)]
    force: bool,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    let path = path_text(&args.path)?;
    super::refuse_long_address(&path)?;
    let status = client::status(&context.run_dir, &args.name)?;
    let held = status.members.iter().find(|m| m.path == path && m.attached);
    if let Some(member) = held {
        return Err(Failure::busy(format!(
            "{path} is already in use by mirror {} as slot {}.",
            args.name, member.slot
        )));
    }
    // Opened exclusively and closed again: the daemon opens it itself.
    let findings = Medium::open(&args.path, Access::Exclusive)?.signatures()?;
    if !findings.is_empty() {
        let found = probe::describe(&findings);
        if !args.force {
            return Err(Failure::refused(format!(
                "{path} holds {found}. Adding it to mirror {} would destroy that: use another \
                 device, or --force if it is not needed. A former member comes back with \
                 'mirrorctl re-add'.",
                args.name
            )));
        }
        output::note(&format!("{path} holds {found}; that will be destroyed."));
    }
    let request = Request::Add {
        path: path.clone(),
        force: args.force,
        dry_run: args.dry_run,
    };
    let message = client::command(&context.run_dir, &args.name, &request)?;
    if !args.dry_run {
        context.run_dir.add_hint(&args.name, path.as_ref());
    }
    output::done(context.json, &message)
}
