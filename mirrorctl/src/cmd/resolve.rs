//! `mirrorctl resolve NAME [PATH...]`: the end of a split brain.
//!
//! Two sides of a mirror were both written without the other. Without `--keep` this shows both:
//! since when each was alone, how much it has changed, who forced it and why. With `--keep` that
//! side is started (or runs already), and every other member given gives its changes up: it gets
//! the blocks that either side has changed, and is a member like before. `--save` first copies what
//! it has changed to a file.

use std::path::{Path, PathBuf};

use mirror::assemble::short_epoch;
use mirror::control::{MemberState, Request, Status};
use mirror::split;
use mirror::superblock::{LastStop, SlotState, Superblock};
use serde::Serialize;

use super::{path_text, slot_state, start, wait};
use crate::failure::Failure;
use crate::medium::{self, Access, Medium, identity};
use crate::run_dir::check_name;
use crate::size::human;
use crate::when::moment;
use crate::{Context, apart, client, output, scan};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The mirror
    name: String,
    /// Its members, of both sides; found by a scan when none is given
    paths: Vec<PathBuf>,
    /// A member of the side to keep (may be repeated)
    #[arg(long, value_name = "PATH")]
    keep: Vec<PathBuf>,
    /// Copy what the other side has changed to this new file first, sparse, each block at its place
    #[arg(long, value_name = "FILE", requires = "keep")]
    save: Option<PathBuf>,
    /// Accept a full resync where what differs cannot be told
    #[arg(long, requires = "keep")]
    full: bool,
    #[command(flatten)]
    options: start::Options,
}

/// A member, as `--json` prints it. Fields are only ever added.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Side {
    path: String,
    slot: u8,
    epoch: String,
    /// When its epoch began; seconds since 1970.
    epoch_secs: u64,
    updated_secs: u64,
    last_stop: &'static str,
    /// Bytes that it has changed by itself, at most, without what it has discarded; none when that is
    /// not on record.
    changed_bytes: Option<u64>,
    /// When a start was last forced, 0 when never.
    forced_secs: u64,
    forced_reason: String,
    /// What it says of every slot.
    slots: Vec<&'static str>,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    check_name(&args.name)?;
    let paths = members(args, context)?;
    if args.keep.is_empty() {
        return show(args, context, &paths);
    }
    let mut keep = Vec::new();
    for path in &args.keep {
        keep.push(medium::absolute(path)?);
    }
    let status = match client::served(&context.run_dir, &args.name)? {
        Some(status) => status,
        None => {
            start::start(context, &args.name, &keep, &args.options)?;
            client::status(&context.run_dir, &args.name)?
        }
    };
    for path in &keep {
        if !serves(&status, path) {
            return Err(Failure::refused(format!(
                "Mirror {} is running, and {} is no in-sync member of it. To keep that side, stop \
                 the mirror first; to keep the one that runs, say --keep {}.",
                args.name,
                path.display(),
                in_sync(&status).next().unwrap_or("PATH")
            )));
        }
    }
    let others: Vec<&PathBuf> = paths.iter().filter(|path| !serves(&status, path)).collect();
    if others.is_empty() {
        return Err(Failure::usage(format!(
            "Every member of mirror {} that was given or found is on the side to keep: name the \
             others.",
            args.name
        )));
    }
    if args.save.is_some() && others.len() > 1 {
        return Err(Failure::usage(
            "--save takes the changes of one member: name only one beside those to keep.",
        ));
    }
    for (at, path) in others.iter().enumerate() {
        give_up(args, context, path)?;
        if at + 1 < others.len() {
            // One resync at a time.
            wait::until_back(context, &args.name, &path_text(path)?)?;
        }
    }
    Ok(())
}

/// The members to look at.
fn members(args: &Args, context: &Context) -> Result<Vec<PathBuf>, Failure> {
    let mut paths = Vec::new();
    for path in args.paths.iter().chain(&args.keep) {
        let path = medium::absolute(path)?;
        if !paths.contains(&path) {
            paths.push(path);
        }
    }
    if args.paths.is_empty() {
        for path in scan::named(&context.run_dir, &args.name, &[])?.paths() {
            if !paths.iter().any(|known| is_same(known, &path)) {
                paths.push(path);
            }
        }
    }
    Ok(paths)
}

fn is_same(one: &Path, other: &Path) -> bool {
    let known = |path: &Path| {
        (!medium::is_address(path))
            .then(|| identity(path))
            .flatten()
    };
    one == other || known(one).is_some_and(|it| known(other) == Some(it))
}

fn in_sync(status: &Status) -> impl Iterator<Item = &str> {
    let members = status.members.iter();
    members
        .filter(|member| member.state == MemberState::InSync)
        .map(|member| member.path.as_str())
}

fn serves(status: &Status, path: &Path) -> bool {
    in_sync(status).any(|served| is_same(Path::new(served), path))
}

/// A member's superblock, which has to be of the mirror of that name.
fn superblock(name: &str, medium: &Medium) -> Result<Superblock, Failure> {
    let shown = medium.path().display();
    let loaded = medium
        .superblock()?
        .map_err(|error| Failure::failed(format!("{shown} cannot be looked at: {error}.")))?;
    if loaded.superblock.name != name {
        return Err(Failure::refused(format!(
            "{shown} is a member of the mirror {}, not of {name}.",
            loaded.superblock.name
        )));
    }
    Ok(loaded.superblock)
}

fn show(args: &Args, context: &Context, paths: &[PathBuf]) -> Result<(), Failure> {
    let mut members = Vec::new();
    for path in paths {
        let medium = Medium::open(path, Access::Look)?;
        let superblock = superblock(&args.name, &medium)?;
        members.push((medium, superblock));
    }
    let are_apart = |one: &Superblock, other: &Superblock| {
        !one.descends_from(other.epoch.id) && !other.descends_from(one.epoch.id)
    };
    let mut sides = Vec::new();
    let mut parted = false;
    for (medium, own) in &members {
        let others = members.iter().map(|(_, superblock)| superblock);
        let others: Vec<_> = others.filter(|other| are_apart(own, other)).collect();
        parted |= !others.is_empty();
        sides.push(side(medium, own, &others));
    }
    if context.json {
        return output::json(&sides);
    }
    output::raw(&text(&args.name, &sides, parted));
    Ok(())
}

/// What is to be said of a member that is on another side than `others`.
fn side(medium: &Medium, superblock: &Superblock, others: &[&Superblock]) -> Side {
    let on_record = |other: &&Superblock| {
        split::loss_on_record(superblock, other.own_slot, other.member).is_some()
    };
    let known = others.iter().all(on_record);
    let changed = || apart::changed_by(medium, superblock).count() * dirty_map::BLOCK_BYTES;
    Side {
        path: medium.path().display().to_string(),
        slot: superblock.own_slot,
        epoch: short_epoch(superblock.epoch.id),
        epoch_secs: superblock.epoch_secs,
        updated_secs: superblock.updated_secs,
        last_stop: match superblock.last_stop {
            LastStop::Clean => "clean",
            LastStop::Unclean => "unclean",
        },
        changed_bytes: known.then(changed),
        forced_secs: superblock.forced_secs,
        forced_reason: superblock.forced_reason.clone(),
        slots: superblock
            .slots
            .iter()
            .filter(|slot| slot.state != SlotState::Empty)
            .map(|slot| slot_state(slot.state))
            .collect(),
    }
}

fn text(name: &str, sides: &[Side], parted: bool) -> String {
    let mut text = if parted {
        format!("mirror {name}: split brain\n")
    } else {
        format!("mirror {name}: no split brain among these members; 'mirrorctl start' decides\n")
    };
    let head = [
        "slot",
        "path",
        "epoch",
        "since",
        "changed",
        "last stop",
        "slots",
        "forced",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for side in sides {
        let forced = match side.forced_secs {
            0 => "-".to_owned(),
            secs if side.forced_reason.is_empty() => moment(secs),
            secs => format!("{}: {}", moment(secs), side.forced_reason),
        };
        rows.push(vec![
            side.slot.to_string(),
            side.path.clone(),
            side.epoch.clone(),
            moment(side.epoch_secs),
            side.changed_bytes.map_or("unknown".to_owned(), human),
            side.last_stop.to_owned(),
            side.slots.join(" "),
            forced,
        ]);
    }
    text.push_str(&output::table(&rows));
    if parted {
        text.push_str(&format!(
            "Keep one side with 'mirrorctl resolve {name} --keep PATH'; the others lose what they \
             have changed, which --save FILE copies to a file first.\n"
        ));
    }
    text
}

/// A member gives up what it has changed by itself.
fn give_up(args: &Args, context: &Context, path: &Path) -> Result<(), Failure> {
    let ask = |full, dry_run| {
        let request = Request::ReAdd {
            path: path_text(path)?,
            full,
            discard_changes: true,
            dry_run,
        };
        client::command(&context.run_dir, &args.name, &request)
    };
    if let Some(file) = &args.save {
        let delta = ask(false, true);
        if !args.full {
            delta.clone()?;
        }
        let access = if medium::is_address(path) {
            Access::Look
        } else {
            Access::Undisturbed
        };
        let medium = Medium::open(path, access)?;
        let superblock = superblock(&args.name, &medium)?;
        let (wanted, what) = match delta {
            Ok(_) => (apart::changed_by(&medium, &superblock), "that were changed"),
            // What it has changed cannot be told from the rest.
            Err(_) => (apart::written_on(&medium, &superblock), "that are in use"),
        };
        let unreadable = apart::save(&medium, &superblock, &wanted, file)?;
        if !context.json {
            let (bytes, shown) = (wanted.count() * dirty_map::BLOCK_BYTES, file.display());
            let path = path.display();
            output::line(&format!("{} of {path} {what} are in {shown}", human(bytes)));
        }
        if unreadable > 0 {
            return Err(Failure::failed(format!(
                "{unreadable} blocks of {} could not be read and are holes in {}. Nothing \
                 was given up; leave --save out to go on without them.",
                path.display(),
                file.display()
            )));
        }
    }
    let message = ask(args.full, false)?;
    context.run_dir.add_hint(&args.name, path);
    output::done(context.json, &message)
}

#[cfg(test)]
#[path = "resolve_tests.rs"]
mod tests;
