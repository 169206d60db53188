//! `mirrorctl destroy NAME|PATH...`: wipes the superblocks of a stopped mirror's members.
//!
//! The data is left where it is, but nothing says any more what it belongs to. All members are
//! opened exclusively and looked at before the first one is wiped.

use std::path::{Path, PathBuf};

use mirror::create::wipe_ranges;
use mirror::superblock::{LastStop, Superblock, SuperblockError};

use crate::failure::Failure;
use crate::medium::{Access, Medium};
use crate::run_dir::check_name;
use crate::{Context, client, output, probe, scan};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A mirror's name, or paths of members
    #[arg(required = true, value_name = "NAME|PATH")]
    targets: Vec<String>,
    /// Look for the members of NAME on this device or in this directory (may be repeated)
    #[arg(long, value_name = "DIR|DEVICE")]
    scan: Vec<PathBuf>,
    /// Also wipe damaged superblocks, and where something else lies beside the superblock
    #[arg(long)]
    force: bool,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
}

/// A member that is about to be none.
struct Doomed {
    medium: Medium,
    what: String,
    name: Option<String>,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    let mut doomed: Vec<Doomed> = Vec::new();
    for target in &args.targets {
        for path in paths_of(target, args, context)? {
            let known = |d: &Doomed| {
                d.medium.path() == path
                    || crate::medium::identity(d.medium.path()) == crate::medium::identity(&path)
            };
            if !doomed.iter().any(known) {
                doomed.push(examine(&path, args.force)?);
            }
        }
    }
    let list: Vec<String> = doomed
        .iter()
        .map(|d| format!("{} ({})", d.medium.path().display(), d.what))
        .collect();
    if args.dry_run {
        let message = format!("would wipe the superblocks of {}", list.join(", "));
        return output::done(context.json, &message);
    }
    for one in &doomed {
        for (offset, len) in wipe_ranges() {
            let len = usize::try_from(len)
                .map_err(|_| Failure::failed("The range to wipe is too long for this machine."))?;
            one.medium.write(offset, &vec![0; len])?;
        }
        one.medium.sync()?;
    }
    for name in doomed.iter().filter_map(|d| d.name.as_deref()) {
        if !client::is_running(&context.run_dir, name)? {
            context.run_dir.forget_hints(name);
        }
    }
    let message = format!("wiped the superblocks of {}", list.join(", "));
    output::done(context.json, &message)
}

/// What a target means: a path when it has a slash or exists, else a mirror's name.
fn paths_of(target: &str, args: &Args, context: &Context) -> Result<Vec<PathBuf>, Failure> {
    let path = Path::new(target);
    if target.contains('/') || (path.exists() && args.scan.is_empty()) {
        return Ok(vec![path.to_owned()]);
    }
    check_name(target)?;
    if client::is_running(&context.run_dir, target)? {
        return Err(Failure::busy(format!(
            "Mirror {target} is running. Stop it first with 'mirrorctl stop {target}'."
        )));
    }
    let mirror = scan::named(&context.run_dir, target, &args.scan)?;
    for absent in absent_slots(&mirror) {
        output::note(&format!(
            "The member of slot {absent} of mirror {target} was not found and keeps its \
             superblock."
        ));
    }
    Ok(mirror.paths())
}

/// Slots that have a member which was not found.
fn absent_slots(mirror: &scan::FoundMirror) -> Vec<usize> {
    let newest = mirror
        .members
        .iter()
        .max_by_key(|member| member.superblock.event_count);
    let slots = newest.map_or(&[][..], |member| member.superblock.slots.as_slice());
    let found = |uuid| mirror.members.iter().any(|m| m.superblock.member == uuid);
    let absent = slots.iter().enumerate().filter_map(|(slot, record)| {
        let uuid = record.member?;
        (!found(uuid)).then_some(slot)
    });
    absent.collect()
}

fn examine(path: &Path, force: bool) -> Result<Doomed, Failure> {
    let medium = Medium::open(path, Access::Exclusive)?;
    let shown = path.display();
    let (what, name, last_stop) = match medium.superblock()? {
        Ok(loaded) => {
            let superblock = loaded.superblock;
            let what = member(&superblock);
            (what, Some(superblock.name), Some(superblock.last_stop))
        }
        Err(SuperblockError::NotAMember) => {
            let found = probe::describe(&medium.signatures()?);
            return Err(Failure::not_found(format!(
                "{shown} is not a member of a mirror; it holds {found}. Nothing was wiped."
            )));
        }
        Err(error) if force => (format!("a member: {error}"), None, None),
        Err(error) => {
            return Err(Failure::refused(format!(
                "{shown} is a member of a mirror, but of which cannot be told: {error}. \
                 Nothing was wiped; --force wipes it all the same."
            )));
        }
    };
    if let (Some(last_stop), true, false) = (last_stop, medium.is_export(), force)
        && last_stop == LastStop::Unclean
    {
        return Err(Failure::refused(format!(
            "{shown} is {what}, and that mirror was not stopped while it had this member: it may \
             be running with it now, which cannot be told over the network. Nothing was wiped; \
             --force wipes the superblock all the same."
        )));
    }
    // At its end a member holds what applications wrote, which is not a reason to refuse.
    let mut others = medium.signatures()?;
    others.retain(|finding| !finding.is_mirror && !finding.at_end);
    if !others.is_empty() && !force {
        return Err(Failure::refused(format!(
            "{shown} is {what}, but it also holds {}: it may have been put to another use since. \
             Nothing was wiped; --force wipes the superblock all the same.",
            probe::describe(&others)
        )));
    }
    Ok(Doomed { medium, what, name })
}

fn member(superblock: &Superblock) -> String {
    format!(
        "slot {} of mirror {}, uuid {}",
        superblock.own_slot, superblock.name, superblock.mirror
    )
}
