//! `mirrorctl examine PATH`: everything a member's superblock says, and which copy said it.
//!
//! It opens nothing exclusively, so it works on the members of a running mirror; their
//! superblocks may then change under it.

use std::path::PathBuf;

use mirror::layout::RegionKind;
use mirror::superblock::{Epoch, LastStop, SlotRecord, Superblock, SuperblockError};
use serde::Serialize;

use crate::cmd::slot_state;
use crate::failure::Failure;
use crate::medium::{Access, Medium};
use crate::size::human;
use crate::when::moment;
use crate::{Context, output, probe};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A device, image file or export (ADDRESS)
    path: PathBuf,
}

/// The document that `--json` prints. Fields are only ever added.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Document {
    path: String,
    /// `a` or `b`: the newer valid copy, A when they are equal.
    copy_used: &'static str,
    /// What is to say about each copy: `valid`, or why it is not.
    copy_a: String,
    copy_b: String,
    copies_differ: bool,
    mirror_name: String,
    mirror_uuid: String,
    member_uuid: String,
    slot: u8,
    size_bytes: u64,
    logical_block_bytes: u32,
    data_offset: u64,
    event_count: u64,
    write_count: u64,
    epoch: EpochDocument,
    history: Vec<EpochDocument>,
    last_stop: &'static str,
    flush_failed: bool,
    forced: bool,
    /// May be promoted without the others.
    handed_over: bool,
    epoch_secs: u64,
    /// When a start was last forced, 0 when never, and why.
    forced_secs: u64,
    forced_reason: String,
    checksums: bool,
    resync_cursor: u64,
    created_secs: u64,
    updated_secs: u64,
    slots: Vec<SlotDocument>,
    regions: Vec<RegionDocument>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct EpochDocument {
    id: String,
    ordinal: u32,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct SlotDocument {
    slot: usize,
    state: &'static str,
    member_uuid: Option<String>,
    address: String,
    zeroed: bool,
    full_resync: bool,
    base: StampDocument,
    loss: Option<LossDocument>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct LossDocument {
    epoch: String,
    position: StampDocument,
    block_exact: bool,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct StampDocument {
    ordinal: u32,
    sequence: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct RegionDocument {
    kind: &'static str,
    slot: u8,
    copy_a: u64,
    copy_b: u64,
    len: u64,
    extents: u64,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    let medium = Medium::open(&args.path, Access::Look)?;
    let (copy_a, copy_b) = medium.superblock_bytes()?;
    let shown = args.path.display();
    let superblock = match Superblock::load(&copy_a, &copy_b) {
        Ok(loaded) => loaded.superblock,
        Err(SuperblockError::NotAMember) => {
            let found = probe::describe(&medium.signatures()?);
            return Err(Failure::not_found(format!(
                "{shown} is not a member of a mirror; it holds {found}."
            )));
        }
        Err(error) => return Err(Failure::failed(format!("{shown} is unusable: {error}."))),
    };
    let document = document(shown.to_string(), &superblock, [&copy_a, &copy_b]);
    if context.json {
        return output::json(&document);
    }
    output::raw(&text(&document));
    Ok(())
}

fn document(path: String, superblock: &Superblock, copies: [&[u8]; 2]) -> Document {
    let decoded = copies.map(Superblock::decode);
    let say = |copy: &Result<Superblock, SuperblockError>| match copy {
        Ok(valid) => format!("valid, write count {}", valid.write_count),
        Err(SuperblockError::NotAMember) => "holds no superblock".to_owned(),
        Err(SuperblockError::Damaged(why)) => format!("damaged: {why}"),
        Err(SuperblockError::TooNew(why)) => format!("of a newer version: {why}"),
    };
    let is_a = decoded[0].as_ref() == Ok(superblock);
    Document {
        path,
        copy_used: if is_a { "a" } else { "b" },
        copy_a: say(&decoded[0]),
        copy_b: say(&decoded[1]),
        copies_differ: decoded[0] != decoded[1],
        mirror_name: superblock.name.clone(),
        mirror_uuid: superblock.mirror.to_string(),
        member_uuid: superblock.member.to_string(),
        slot: superblock.own_slot,
        size_bytes: superblock.layout.size_bytes,
        logical_block_bytes: superblock.logical_block_bytes,
        data_offset: superblock.layout.data_offset,
        event_count: superblock.event_count,
        write_count: superblock.write_count,
        epoch: epoch(&superblock.epoch),
        history: superblock.history.iter().map(epoch).collect(),
        last_stop: match superblock.last_stop {
            LastStop::Clean => "clean",
            LastStop::Unclean => "unclean",
        },
        flush_failed: superblock.flush_failed,
        forced: superblock.forced,
        handed_over: superblock.handed_over,
        epoch_secs: superblock.epoch_secs,
        forced_secs: superblock.forced_secs,
        forced_reason: superblock.forced_reason.clone(),
        checksums: superblock.checksums,
        resync_cursor: superblock.resync_cursor,
        created_secs: superblock.created_secs,
        updated_secs: superblock.updated_secs,
        slots: superblock.slots.iter().enumerate().map(slot).collect(),
        regions: regions(superblock),
    }
}

fn epoch(epoch: &Epoch) -> EpochDocument {
    EpochDocument {
        id: format!("{:032x}", epoch.id),
        ordinal: epoch.ordinal,
    }
}

fn slot((slot, record): (usize, &SlotRecord)) -> SlotDocument {
    SlotDocument {
        slot,
        state: slot_state(record.state),
        member_uuid: record.member.map(|uuid| uuid.to_string()),
        address: record.address.clone(),
        zeroed: record.zeroed,
        full_resync: record.full,
        base: StampDocument {
            ordinal: record.base.ordinal,
            sequence: record.base.sequence,
        },
        loss: record.loss.map(|loss| LossDocument {
            epoch: format!("{:032x}", loss.epoch),
            position: StampDocument {
                ordinal: loss.position.ordinal,
                sequence: loss.position.sequence,
            },
            block_exact: loss.block_exact,
        }),
    }
}

fn regions(superblock: &Superblock) -> Vec<RegionDocument> {
    let each = superblock
        .layout
        .regions
        .iter()
        .map(|region| RegionDocument {
            kind: match region.kind {
                RegionKind::Position => "position",
                RegionKind::State => "state",
                RegionKind::Summary => "summary",
                RegionKind::Missed => "missed",
                RegionKind::Checksums => "checksums",
                RegionKind::Scrub => "scrub",
            },
            slot: region.slot,
            copy_a: region.copy_a,
            copy_b: region.copy_b,
            len: region.len,
            extents: region.extents,
        });
    each.collect()
}

/// `yes` or `no`.
fn yes(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}

fn last_forced(document: &Document) -> String {
    match (document.forced_secs, document.forced_reason.as_str()) {
        (0, _) => "never".to_owned(),
        (secs, "") => moment(secs),
        (secs, reason) => format!("{}: {reason}", moment(secs)),
    }
}

/// What is said once, by name.
fn facts(document: &Document) -> Vec<Vec<String>> {
    let facts = [
        (
            "mirror",
            format!("{} (uuid {})", document.mirror_name, document.mirror_uuid),
        ),
        (
            "member",
            format!("slot {} (uuid {})", document.slot, document.member_uuid),
        ),
        (
            "device size",
            format!(
                "{} ({} bytes)",
                human(document.size_bytes),
                document.size_bytes
            ),
        ),
        (
            "logical block",
            format!("{} bytes", document.logical_block_bytes),
        ),
        ("data offset", format!("{} bytes", document.data_offset)),
        ("event count", document.event_count.to_string()),
        (
            "epoch",
            format!("{} ({})", document.epoch.id, document.epoch.ordinal),
        ),
        ("last stop", document.last_stop.to_owned()),
        ("flush failed", yes(document.flush_failed).to_owned()),
        ("epoch forced", yes(document.forced).to_owned()),
        ("last forced", last_forced(document)),
        ("handed over", yes(document.handed_over).to_owned()),
        ("checksums", yes(document.checksums).to_owned()),
        ("resync cursor", format!("{} bytes", document.resync_cursor)),
        (
            "created, updated",
            format!(
                "{} s, {} s after 1970",
                document.created_secs, document.updated_secs
            ),
        ),
        ("copy A", document.copy_a.clone()),
        ("copy B", document.copy_b.clone()),
        (
            "copy used",
            format!(
                "{}{}",
                document.copy_used.to_uppercase(),
                if document.copies_differ {
                    "; the copies differ and are made equal at the next start"
                } else {
                    ""
                }
            ),
        ),
    ];
    facts
        .into_iter()
        .map(|(name, value)| vec![name.to_owned(), value])
        .collect()
}

fn text(document: &Document) -> String {
    let mut text = format!("{} is a member of a mirror\n", document.path);
    text.push_str(&output::table(&facts(document)));
    text.push_str("slots, as this member saw them\n");
    text.push_str(&output::table(&slot_rows(&document.slots)));
    if !document.history.is_empty() {
        text.push_str("earlier epochs, newest first\n");
        let rows = document.history.iter();
        let rows = rows.map(|epoch| vec![epoch.id.clone(), format!("({})", epoch.ordinal)]);
        text.push_str(&output::table(&rows.collect::<Vec<_>>()));
    }
    text.push_str("regions, in bytes\n");
    text.push_str(&output::table(&region_rows(&document.regions)));
    text
}

fn slot_rows(slots: &[SlotDocument]) -> Vec<Vec<String>> {
    let head = [
        "slot", "state", "member", "zeroed", "base", "lost at", "path",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for slot in slots {
        let stamp = |stamp: &StampDocument| format!("{}/{}", stamp.ordinal, stamp.sequence);
        let lost = slot.loss.as_ref().map(|loss| {
            let exact = if loss.block_exact {
                ", block-exact"
            } else {
                ""
            };
            format!("{}{exact}", stamp(&loss.position))
        });
        rows.push(vec![
            slot.slot.to_string(),
            slot.state.to_owned(),
            slot.member_uuid.clone().unwrap_or_else(|| "-".to_owned()),
            yes(slot.zeroed).to_owned(),
            stamp(&slot.base),
            lost.unwrap_or_else(|| "-".to_owned()),
            slot.address.clone(),
        ]);
    }
    rows
}

fn region_rows(regions: &[RegionDocument]) -> Vec<Vec<String>> {
    let head = ["kind", "slot", "copy A", "copy B", "length", "extents"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for region in regions {
        rows.push(vec![
            region.kind.to_owned(),
            region.slot.to_string(),
            region.copy_a.to_string(),
            region.copy_b.to_string(),
            region.len.to_string(),
            region.extents.to_string(),
        ]);
    }
    rows
}
