//! `mirrorctl create NAME --member PATH --member PATH`: makes a new mirror, offline.
//!
//! Every member is opened exclusively and looked at before the first byte is written to any of
//! them. What is written, and in which order, is planned by `mirror::create`: maps on all
//! members, then their superblocks, so that a creation cut off in the middle leaves no mirror.
//! Image files that do not exist are made, sparse, and removed again when creation fails.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use mirror::create::{
    CreateError, CreatePlan, CreateRequest, MEMBERS, MemberPlan, NewMember, plan,
};
use mirror::layout::{Layout, MEMBER_BYTES_MIN, MIRROR_BYTES_MAX};

use super::{path_text, random};
use crate::failure::{Exit, Failure, words};
use crate::medium::{Access, Medium, identity, is_address};
use crate::run_dir::check_name;
use crate::{Context, client, output, probe, size};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Name of the new mirror
    name: String,
    /// A device, an image file or an NBD export; give it two to eight times
    #[arg(long = "member", value_name = "PATH|ADDRESS", required = true)]
    members: Vec<PathBuf>,
    /// Size of the device; needed to make image files [default: the largest that fits]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    size: Option<u64>,
    /// Smallest unit of I/O [default: the largest of the members']
    #[arg(long, value_name = "BYTES", value_parser = parse_logical_block)]
    logical_block: Option<u32>,
    /// Keep no checksums of blocks: nothing tells then which copy is right when two differ
    #[arg(long)]
    no_checksums: bool,
    /// Overwrite filesystems and other mirrors' members
    #[arg(long)]
    force: bool,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
}

fn parse_logical_block(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" | "4K" | "4k" => Ok(4096),
        _ => Err(format!(
            "'{text}' is no logical block: it is 512 or 4096 bytes"
        )),
    }
}

/// A member-to-be.
#[derive(Debug)]
enum Place {
    /// It exists and is held exclusively.
    Open(Medium),
    /// An image file that does not exist yet.
    New(PathBuf),
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    check_name(&args.name)?;
    check_members(&args.members)?;
    if client::is_running(&context.run_dir, &args.name)? {
        return Err(Failure::busy(format!(
            "A mirror named {} is already running: choose another name, or stop it first.",
            args.name
        )));
    }
    let places = open_all(args)?;
    refuse_foreign(args, &places)?;
    let draft = planned(&request(args, &places, None)?)?;
    if args.dry_run {
        return output::done(context.json, &sentence(args, &draft, "would be created"));
    }
    let mut made = MadeFiles(Vec::new());
    let media = make_files(places, draft.member_bytes, &mut made)?;
    let zeroed: Vec<bool> = media.iter().map(Medium::zero_cheaply).collect();
    let places: Vec<Place> = media.into_iter().map(Place::Open).collect();
    let plan = planned(&request(args, &places, Some(&zeroed))?)?;
    write(&plan, &places)?;
    made.0.clear();
    if context.run_dir.path().is_dir() || context.run_dir.ensure().is_ok() {
        let paths = plan
            .members
            .iter()
            .map(|member| PathBuf::from(&member.path));
        context
            .run_dir
            .set_hints(&args.name, &paths.collect::<Vec<_>>());
    }
    report(args, context, &plan, &zeroed)
}

fn check_members(members: &[PathBuf]) -> Result<(), Failure> {
    if !MEMBERS.contains(&members.len()) {
        let error = CreateError::Members(members.len());
        return Err(Failure::usage(format!(
            "{}.",
            output::capital(&error.to_string())
        )));
    }
    for (index, path) in members.iter().enumerate() {
        super::refuse_long_address(&path_text(path)?)?;
        let same = |other: &&PathBuf| {
            *other == path || identity(path).is_some_and(|id| identity(other) == Some(id))
        };
        if let Some(twin) = members[..index].iter().find(same) {
            return Err(Failure::usage(format!(
                "{} and {} are one and the same device or file: every member needs its own.",
                twin.display(),
                path.display()
            )));
        }
    }
    Ok(())
}

fn open_all(args: &Args) -> Result<Vec<Place>, Failure> {
    let open = |path: &PathBuf| {
        if is_address(path) || path.exists() {
            return Ok(Place::Open(Medium::open(path, Access::Exclusive)?));
        }
        let absolute = crate::medium::absolute(path)?;
        let parent = absolute.parent().unwrap_or(Path::new("/"));
        let dangling = path.symlink_metadata().is_ok();
        if dangling || parent.starts_with("/dev") || !parent.is_dir() {
            return Err(Failure::not_found(format!(
                "{} does not exist, and it cannot be made there as an image file.",
                path.display()
            )));
        }
        if args.size.is_none() {
            return Err(Failure::usage(format!(
                "{} does not exist. To make it as an image file, give the size of the mirror \
                 with --size.",
                path.display()
            )));
        }
        Ok(Place::New(absolute))
    };
    args.members.iter().map(open).collect()
}

fn refuse_foreign(args: &Args, places: &[Place]) -> Result<(), Failure> {
    let mut all = Vec::new();
    for place in places {
        let Place::Open(medium) = place else { continue };
        let findings = medium.signatures()?;
        if !findings.is_empty() {
            let found = probe::describe(&findings);
            all.push(format!("{} holds {found}", medium.path().display()));
        }
    }
    if all.is_empty() {
        return Ok(());
    }
    let found = all.join("; ");
    if args.force {
        output::note(&format!("{found}. Because of --force that is destroyed."));
        return Ok(());
    }
    Err(Failure::refused(format!(
        "{found}. Creating mirror {} would destroy that: use other devices, or --force if it is \
         not needed.",
        args.name
    )))
}

/// What the planner is asked. `zeroed` is known only after the members have been opened.
fn request(
    args: &Args,
    places: &[Place],
    zeroed: Option<&[bool]>,
) -> Result<CreateRequest, Failure> {
    let future_bytes = args
        .size
        .filter(|size| *size <= MIRROR_BYTES_MAX)
        .map_or(0, image_bytes);
    let member = |(index, place): (usize, &Place)| {
        let (path, size_bytes, logical_block_bytes) = match place {
            Place::Open(medium) => (
                medium.path(),
                medium.size_bytes(),
                medium.logical_block_bytes(),
            ),
            Place::New(path) => (path.as_path(), future_bytes, 512),
        };
        Ok(NewMember {
            path: path_text(path)?,
            size_bytes,
            logical_block_bytes,
            zeroed: zeroed.is_some_and(|all| all.get(index) == Some(&true)),
        })
    };
    Ok(CreateRequest {
        checksums: !args.no_checksums,
        name: args.name.clone(),
        members: places
            .iter()
            .enumerate()
            .map(member)
            .collect::<Result<_, Failure>>()?,
        size_bytes: args.size,
        logical_block_bytes: args.logical_block,
        random: (0..places.len() + 2)
            .map(|_| random())
            .collect::<Result<_, _>>()?,
        now_secs: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs()),
    })
}

/// Length of an image file for a mirror of `size` bytes.
fn image_bytes(size: u64) -> u64 {
    let bytes = Layout::for_size(size).member_bytes();
    bytes.max(MEMBER_BYTES_MIN).next_multiple_of(4096)
}

fn planned(request: &CreateRequest) -> Result<CreatePlan, Failure> {
    plan(request).map_err(|e| Failure::usage(format!("{}.", output::capital(&e.to_string()))))
}

/// Files made by this command, removed when it does not come to its end.
#[derive(Debug)]
struct MadeFiles(Vec<PathBuf>);

impl Drop for MadeFiles {
    fn drop(&mut self) {
        for path in &self.0 {
            drop(std::fs::remove_file(path));
        }
    }
}

fn make_files(
    places: Vec<Place>,
    member_bytes: u64,
    made: &mut MadeFiles,
) -> Result<Vec<Medium>, Failure> {
    let mut media = Vec::new();
    for place in places {
        let medium = match place {
            Place::Open(medium) => medium,
            Place::New(path) => {
                let bytes = member_bytes.max(MEMBER_BYTES_MIN).next_multiple_of(4096);
                let file = File::create_new(&path).map_err(|e| cannot_make(&path, bytes, &e))?;
                made.0.push(path.clone());
                file.set_len(bytes)
                    .map_err(|e| cannot_make(&path, bytes, &e))?;
                drop(file);
                Medium::open(&path, Access::Exclusive)?
            }
        };
        media.push(medium);
    }
    Ok(media)
}

fn cannot_make(path: &Path, bytes: u64, error: &std::io::Error) -> Failure {
    Failure::new(
        Exit::of_io(error),
        format!(
            "The image file {} of {bytes} bytes cannot be made: {}. Choose another place or a \
             smaller --size.",
            path.display(),
            words(error)
        ),
    )
}

fn write(plan: &CreatePlan, places: &[Place]) -> Result<(), Failure> {
    let pairs = || {
        let media = places.iter().filter_map(|place| match place {
            Place::Open(medium) => Some(medium),
            Place::New(_) => None,
        });
        plan.members.iter().zip(media)
    };
    for (member, medium) in pairs() {
        // What --force allows to be destroyed must not be found again beside the mirror.
        medium.wipe_marks()?;
        for (offset, bytes) in &member.maps {
            medium.write(*offset, bytes)?;
        }
        medium.sync()?;
    }
    for (member, medium) in pairs() {
        for (offset, bytes) in &member.superblocks {
            medium.write(*offset, bytes)?;
        }
        medium.sync()?;
    }
    for (member, medium) in pairs() {
        refuse_twin(member, medium)?;
    }
    Ok(())
}

/// Two addresses may lead to one disk, or an address to a disk of this machine. Only what has
/// been written tells.
fn refuse_twin(member: &MemberPlan, medium: &Medium) -> Result<(), Failure> {
    let (copy_a, copy_b) = medium.superblock_bytes()?;
    let wrote = |copy: &Vec<u8>| member.superblocks.iter().any(|(_, bytes)| bytes == copy);
    if wrote(&copy_a) && wrote(&copy_b) {
        return Ok(());
    }
    Err(Failure::refused(format!(
        "{} does not hold what was written to it: another of the members named leads to the same \
         disk. Nothing was created, and that disk now holds a superblock of no use: 'mirrorctl \
         destroy' it.",
        medium.path().display()
    )))
}

fn sentence(args: &Args, plan: &CreatePlan, verb: &str) -> String {
    let paths: Vec<&str> = plan.members.iter().map(|m| m.path.as_str()).collect();
    format!(
        "mirror {} {verb}: {} on {} members ({})",
        args.name,
        size::human(plan.size_bytes),
        plan.members.len(),
        paths.join(", ")
    )
}

fn report(
    args: &Args,
    context: &Context,
    plan: &CreatePlan,
    zeroed: &[bool],
) -> Result<(), Failure> {
    if !context.json {
        output::line(&sentence(args, plan, "created"));
        return Ok(());
    }
    let members: Vec<_> = plan
        .members
        .iter()
        .zip(zeroed)
        .map(|(member, zeroed)| serde_json::json!({ "path": member.path, "zeroed": zeroed }))
        .collect();
    output::json(&serde_json::json!({
        "name": args.name,
        "uuid": plan.mirror,
        "size-bytes": plan.size_bytes,
        "data-offset": plan.data_offset,
        "members": members,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_file_is_as_long_as_its_layout_needs() {
        for size in [4096, 1 << 20, 1 << 30, (1 << 30) + 512, 12 << 40] {
            let bytes = image_bytes(size);
            assert!(bytes >= Layout::for_size(size).member_bytes());
            assert!(bytes >= MEMBER_BYTES_MIN);
            assert_eq!(bytes % 4096, 0);
        }
    }
}
