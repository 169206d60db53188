//! Findings: which are kept, how they join, and which blocks are damaged.

use super::format;
use crate::layout::MIRROR_BYTES_MAX;
use dirty_map::{BLOCK_BYTES, PAYLOAD_BYTES};
use std::ops::Range;

/// Findings in a sector.
pub(super) const PER_SECTOR: usize = PAYLOAD_BYTES / format::FINDING_BYTES;
/// Findings that are kept.
pub const PLACES: usize = PER_SECTOR * 125;
const _: () = assert!(PER_SECTOR * format::FINDING_BYTES == PAYLOAD_BYTES);
const _: () = assert!(PLACES / PER_SECTOR + 3 == super::SECTORS as usize);

/// Blocks of the largest mirror.
pub(super) const BLOCKS_MAX: u64 = MIRROR_BYTES_MAX / BLOCK_BYTES;
/// The highest number of a finding.
pub(super) const NUMBER_MAX: u64 = 1 << 62;
/// What was repaired within so many seconds of each other may be one finding.
const JOIN_SECS: u64 = 3600;

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The member did not return the block.
    Unreadable,
    /// The member's copy does not fit the block's checksum.
    ChecksumFailed,
    /// The members' copies differ, and no checksum is known.
    CopiesDiffer,
    /// All copies agree, and the stored checksum is another's.
    ChecksumStale,
    /// The page with the extent's checksums could not be read.
    PageUnreadable,
}

/// What was done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// The block was written anew from a good copy.
    Rewritten,
    /// The checksum was written anew.
    ChecksumMended,
    /// Nothing: there is no good copy. The block reads as an error until it is written.
    Damaged,
    /// Nothing: the pass only checked.
    CheckOnly,
    /// The member was failed.
    MemberFailed,
    /// It was damaged, and has been written again since.
    WrittenAgain,
}

/// Who found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FoundBy {
    /// A scrub.
    Scrub,
    /// A read of an application.
    Read,
    /// A resync.
    Resync,
}

impl What {
    /// All, in the order of their codes.
    pub const ALL: [Self; 5] = [
        Self::Unreadable,
        Self::ChecksumFailed,
        Self::CopiesDiffer,
        Self::ChecksumStale,
        Self::PageUnreadable,
    ];

    pub(super) fn place(self) -> usize {
        self as usize
    }
}

impl Done {
    /// All, in the order of their codes.
    pub const ALL: [Self; 6] = [
        Self::Rewritten,
        Self::ChecksumMended,
        Self::Damaged,
        Self::CheckOnly,
        Self::MemberFailed,
        Self::WrittenAgain,
    ];

    pub(super) fn place(self) -> usize {
        self as usize
    }

    /// Whether it describes how things are rather than what happened, so that finding it again
    /// is nothing new.
    fn stands(self) -> bool {
        matches!(self, Self::Damaged | Self::CheckOnly)
    }
}

impl FoundBy {
    /// All, in the order of their codes.
    pub const ALL: [Self; 3] = [Self::Scrub, Self::Read, Self::Resync];

    pub(super) fn place(self) -> usize {
        self as usize
    }
}

/// Something that was not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// When it was first found, in seconds since 1970.
    pub when_secs: u64,
    /// The member it is about; none when it is about all of them.
    pub slot: Option<u8>,
    /// The blocks, by their number on the device.
    pub blocks: Range<u64>,
    /// What was found.
    pub what: What,
    /// What was done.
    pub done: Done,
    /// Who found it.
    pub by: FoundBy,
}

impl Finding {
    /// Whether the two say the same of other blocks.
    fn is_like(&self, other: &Self) -> bool {
        (self.slot, self.what, self.done, self.by) == (other.slot, other.what, other.done, other.by)
    }

    /// Whether `other` says nothing that this does not.
    fn says(&self, other: &Self) -> bool {
        self.done.stands()
            && (self.slot, self.what, self.done) == (other.slot, other.what, other.done)
            && self.blocks.start <= other.blocks.start
            && other.blocks.end <= self.blocks.end
    }

    /// Whether `other`, newer, can become part of this.
    fn goes_on_with(&self, other: &Self) -> bool {
        let (own, its) = (&self.blocks, &other.blocks);
        let beside = own.end == its.start || its.end == own.start;
        let over = own.start < its.end && its.start < own.end;
        let fits = if self.done.stands() {
            beside || over
        } else {
            beside && self.when_secs.abs_diff(other.when_secs) <= JOIN_SECS
        };
        let blocks = own.end.max(its.end) - own.start.min(its.start);
        fits && self.is_like(other) && blocks <= u64::from(u32::MAX)
    }
}

/// A finding in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    /// Says which is newer; parts of one finding share it.
    pub(super) number: u64,
    pub(super) finding: Finding,
}

/// What became of an addition.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// Places that changed.
    pub(super) places: Vec<usize>,
    /// Blocks of which something new is said.
    pub(super) blocks: u64,
    /// Damaged blocks that had to make room.
    pub(super) forgotten: u64,
}

/// The findings that are kept: the newest, but damage that still stands before all else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Findings {
    places: Vec<Option<Kept>>,
    /// How many say of damage that it still stands.
    standing: usize,
}

impl Default for Findings {
    fn default() -> Self {
        Self {
            places: vec![None; PLACES],
            standing: 0,
        }
    }
}

impl Findings {
    /// Whether something was done later about blocks of what had only been seen.
    fn is_mended(&self, seen: &Kept) -> bool {
        let own = &seen.finding;
        let since = |later: &Kept| {
            let its = &later.finding;
            let over = own.blocks.start < its.blocks.end && its.blocks.start < own.blocks.end;
            later.number > seen.number && !its.done.stands() && its.slot == own.slot && over
        };
        own.done == Done::CheckOnly && self.kept().any(since)
    }

    /// Adds a finding.
    pub(super) fn add(&mut self, finding: &Finding) -> Changes {
        let mut changes = Changes::default();
        let end = finding.blocks.end.min(BLOCKS_MAX);
        let mut start = finding.blocks.start;
        while start < end {
            let part = Finding {
                blocks: start..end.min(start + u64::from(u32::MAX)),
                ..finding.clone()
            };
            start = part.blocks.end;
            let says = |kept: &Kept| kept.finding.says(&part) && !self.is_mended(kept);
            if !self.kept().any(says) {
                let newest = self.kept().map(|kept| kept.number).max().unwrap_or(0);
                self.put(newest.saturating_add(1).min(NUMBER_MAX), part, &mut changes);
            }
        }
        changes
    }

    /// `blocks` are not damaged any more.
    pub(super) fn cleared(&mut self, blocks: &Range<u64>) -> Changes {
        let mut changes = Changes::default();
        if self.standing == 0 || blocks.is_empty() {
            return changes;
        }
        for place in 0..PLACES {
            let Some(kept) = &self.places[place] else {
                continue;
            };
            let own = kept.finding.blocks.clone();
            let over = own.start.max(blocks.start)..own.end.min(blocks.end);
            if kept.finding.done != Done::Damaged || over.is_empty() {
                continue;
            }
            let (number, finding) = (kept.number, kept.finding.clone());
            self.set(place, None, &mut changes);
            let part = |blocks, done| Finding {
                blocks,
                done,
                ..finding.clone()
            };
            for part in [
                part(own.start..over.start, Done::Damaged),
                part(over.end..own.end, Done::Damaged),
                part(over, Done::WrittenAgain),
            ] {
                if !part.blocks.is_empty() {
                    self.put(number, part, &mut changes);
                }
            }
        }
        // It is no news about any block.
        changes.blocks = 0;
        changes
    }

    /// Puts a finding into its place: into one that it goes on with, or an empty one, or in
    /// place of the oldest.
    fn put(&mut self, number: u64, finding: Finding, changes: &mut Changes) {
        let joined = self.places.iter().position(|kept| {
            kept.as_ref()
                .is_some_and(|kept| kept.finding.goes_on_with(&finding) && !self.is_mended(kept))
        });
        if let Some(place) = joined
            && let Some(kept) = self.places[place].take()
        {
            let own = kept.finding.blocks.clone();
            let blocks = own.start.min(finding.blocks.start)..own.end.max(finding.blocks.end);
            changes.blocks += (blocks.end - blocks.start) - (own.end - own.start);
            let finding = Finding {
                blocks,
                when_secs: kept.finding.when_secs.min(finding.when_secs),
                ..finding
            };
            let number = number.max(kept.number);
            self.places[place] = Some(Kept { number, finding });
            changes.places.push(place);
            return;
        }
        changes.blocks += finding.blocks.end - finding.blocks.start;
        let place = self.place_for_new();
        if let Some(Kept { finding: old, .. }) = &self.places[place]
            && old.done == Done::Damaged
        {
            changes.forgotten += old.blocks.end - old.blocks.start;
        }
        self.set(place, Some(Kept { number, finding }), changes);
    }

    fn place_for_new(&self) -> usize {
        let rank = |kept: &Option<Kept>| {
            let kept = kept.as_ref();
            let standing = kept.is_some_and(|kept| kept.finding.done == Done::Damaged);
            (standing, kept.map_or(0, |kept| kept.number))
        };
        let ranked = self.places.iter().enumerate();
        ranked
            .min_by_key(|(_, kept)| rank(kept))
            .map_or(0, |(place, _)| place)
    }

    fn set(&mut self, place: usize, kept: Option<Kept>, changes: &mut Changes) {
        self.places[place] = kept;
        changes.places.push(place);
        self.count_standing();
    }

    fn count_standing(&mut self) {
        let standing = |kept: &&Kept| kept.finding.done == Done::Damaged;
        self.standing = self.kept().filter(standing).count();
    }

    fn kept(&self) -> impl Iterator<Item = &Kept> {
        self.places.iter().flatten()
    }

    /// All, the oldest first.
    pub(super) fn in_order(&self) -> Vec<&Finding> {
        let mut kept: Vec<&Kept> = self.kept().collect();
        kept.sort_by_key(|kept| (kept.number, kept.finding.blocks.start));
        kept.into_iter().map(|kept| &kept.finding).collect()
    }

    /// What still stands, in order and without overlap.
    pub(super) fn damaged_runs(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = self
            .kept()
            .filter(|kept| kept.finding.done == Done::Damaged)
            .map(|kept| kept.finding.blocks.clone())
            .collect();
        runs.sort_unstable_by_key(|run| run.start);
        runs.dedup_by(|run, before| {
            let touches = run.start <= before.end;
            if touches {
                before.end = before.end.max(run.end);
            }
            touches
        });
        runs
    }

    /// The payload of the sector whose first place is `first`; zeroes when there is none.
    pub(super) fn encode(&self, first: usize, out: &mut [u8; PAYLOAD_BYTES]) {
        let places = self.places.get(first..).unwrap_or_default();
        for (kept, out) in places
            .iter()
            .zip(out.chunks_exact_mut(format::FINDING_BYTES))
        {
            if let Some(kept) = kept {
                format::encode_finding(kept, out);
            }
        }
    }

    /// Takes the payload of the sector whose first place is `first`.
    pub(super) fn decode(&mut self, first: usize, payload: &[u8; PAYLOAD_BYTES]) {
        let places = self.places.get_mut(first..).unwrap_or_default();
        for (kept, bytes) in places
            .iter_mut()
            .zip(payload.chunks_exact(format::FINDING_BYTES))
        {
            *kept = format::decode_finding(bytes);
        }
        self.count_standing();
    }
}
