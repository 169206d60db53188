//! What scrubs have done and found, as it is kept in the mirror itself.
//!
//! Pure: no I/O, no clock. The engine writes the sectors that [`ScrubLog::take_dirty`] names to
//! the members with its map commits, and loads them at the start; each is the payload of a map
//! sector of the kind `Scrub`. Any payload can be loaded (R17): a sector that is damaged or was
//! never written loses only what it held, and one of zeroes holds nothing. All of it takes at most
//! [`PLACES`] findings and a few hundred bytes in memory.
//!
//! # Sectors
//!
//! Little-endian; what is not named is zero and is ignored when read.
//!
//! **Sector 0**, choices and totals since the mirror was made:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 1 | 1 when the operator has paused scrubbing |
//! | 2 | 2 | days from the begin of one pass to that of the next, plus one; 0 when not said; 1 means only by command |
//! | 4 | 4 | most MiB a second that a member is read with; 0 when not said |
//! | 8 | 8 | number of the pass that began last |
//! | 16 | 8 | passes that came to their end |
//! | 24 | 8 | bytes that passes read from members |
//! | 32 | 8 | blocks that passes checked |
//! | 40 | 5 x 8 | blocks found, by what was found, in the order of [`What`] |
//! | 80 | 5 x 8 | blocks found, by what was done, in the order of [`Done`] |
//! | 120 | 3 x 8 | blocks found, by who found them, in the order of [`FoundBy`] |
//! | 144 | 8 | damaged blocks whose findings had to make room for newer ones |
//! | 152 | 8 | the members that this pass began with, as one number; 0 before the first |
//!
//! **Sector 1**, the pass under way:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 1 | 1 when there is one |
//! | 1 | 1 | flags: bit 0 it only checks, bit 1 it has gone on from the device's begin |
//! | 2 | 2 | how many ranges of extents are still to be visited again, at most 48 |
//! | 4 | 4 | extent at which it began |
//! | 8 | 4 | extent at which it goes on |
//! | 16 | 8 | its number, counted from 1 |
//! | 24 | 8 | when it began, in seconds since 1970 |
//! | 32 | 8 | milliseconds it has worked |
//! | 40 | 7 x 8 | extents checked, blocks checked, bytes read from members, findings, blocks repaired, blocks damaged, extents left out |
//! | 96 | 48 x 8 | the ranges: first extent, the one after the last (4 bytes each) |
//!
//! **Sector 2**, the passes that ended last, the newest first, 7 x 64 bytes:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | its number, counted from 1; 0 for none |
//! | 8 | 8 | when it began, in seconds since 1970 |
//! | 16 | 8 | when it ended, in seconds since 1970 |
//! | 24 | 8 | bytes read from members |
//! | 32 | 8 | findings |
//! | 40 | 8 | blocks repaired |
//! | 48 | 8 | blocks damaged |
//! | 56 | 4 | extents left out because they were hot each time |
//! | 60 | 1 | how it ended: 1 complete, 2 cancelled |
//! | 61 | 1 | 1 when it only checked |
//!
//! **Sectors 3 to 127**, findings, 15 x 32 bytes each:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | number, counted from 1, not after 2^62; parts of one finding share it; 0 for none |
//! | 8 | 8 | when, in seconds since 1970 |
//! | 16 | 8 | first block |
//! | 24 | 4 | blocks |
//! | 28 | 1 | slot of the member; 255 when it is about all of them |
//! | 29 | 1 | what was found: 1 unreadable, 2 checksum failed, 3 copies differ, 4 checksum stale, 5 page of checksums unreadable |
//! | 30 | 1 | what was done: 1 rewritten, 2 checksum mended, 3 nothing, damaged, 4 nothing, the pass only checked, 5 the member was failed, 6 it was damaged, and has been written again since |
//! | 31 | 1 | who found it: 1 scrub, 2 read, 3 resync |

mod findings;
mod format;

use crate::layout::{SCRUB_PAGES, SECTORS_PER_PAGE};
use dirty_map::{Extent, PAYLOAD_BYTES};
pub use findings::{Done, Finding, FoundBy, PLACES, What};
use findings::{Findings, PER_SECTOR};
use std::collections::BTreeSet;
use std::ops::Range;

/// Sectors of the log.
pub const SECTORS: u32 = 128;
/// Passes that are remembered after their end.
pub const PASSES_KEPT: usize = 7;
/// Ranges of extents to be visited again that survive a restart.
pub const LEFT_RANGES_MAX: usize = 48;
const _: () = assert!(SECTORS as u64 == SCRUB_PAGES * SECTORS_PER_PAGE);

const CHOICES_AND_TOTALS: u32 = 0;
const PASS: u32 = 1;
const PASSES: u32 = 2;
const FINDINGS: u32 = 3;

/// What the operator has chosen by command; it outlives the daemon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Choices {
    /// Nothing is scrubbed until `resume`.
    pub paused: bool,
    /// Days from the begin of one pass to that of the next; 0: only by command. None: not said.
    pub days: Option<u16>,
    /// Most MiB a second that a member is read with. None: not said.
    pub ceiling_mib: Option<u32>,
}

/// What happened since the mirror was made. Blocks are counted as often as something was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Number of the pass that began last.
    pub passes_begun: u64,
    /// Passes that came to their end.
    pub passes_complete: u64,
    /// Bytes that passes read from members.
    pub member_bytes: u64,
    /// Blocks that passes checked.
    pub blocks: u64,
    /// Blocks found, by [`What`].
    pub what: [u64; 5],
    /// Blocks found, by [`Done`] at that time (so never [`Done::WrittenAgain`]).
    pub done: [u64; 5],
    /// Blocks found, by [`FoundBy`].
    pub by: [u64; 3],
    /// Damaged blocks whose findings had to make room for newer ones.
    pub forgotten: u64,
    /// The members that this pass began with, as one number; 0 before the first.
    pub members: u64,
}

impl Totals {
    /// Blocks of which `what` was found.
    #[must_use]
    pub fn found(&self, what: What) -> u64 {
        self.what[what.place()]
    }

    /// Blocks with which `done` was done when they were found.
    #[must_use]
    pub fn did(&self, done: Done) -> u64 {
        self.done.get(done.place()).copied().unwrap_or(0)
    }

    /// Blocks that `by` found.
    #[must_use]
    pub fn found_by(&self, by: FoundBy) -> u64 {
        self.by[by.place()]
    }
}

/// What a pass has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassCounts {
    /// Extents checked.
    pub extents: u64,
    /// Blocks checked.
    pub blocks: u64,
    /// Bytes read from members.
    pub member_bytes: u64,
    /// Findings.
    pub findings: u64,
    /// Blocks repaired.
    pub repaired: u64,
    /// Blocks damaged.
    pub damaged: u64,
    /// Extents that were hot each time they were visited.
    pub left_out: u64,
}

/// The pass under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pass {
    /// Its number, counted from 1.
    pub number: u64,
    /// When it began, in seconds since 1970.
    pub began_secs: u64,
    /// Milliseconds it has worked.
    pub worked_ms: u64,
    /// It repairs nothing.
    pub check_only: bool,
    /// Where it began.
    pub start: Extent,
    /// Where it goes on.
    pub cursor: Extent,
    /// It has reached the device's end and gone on from its begin.
    pub wrapped: bool,
    /// Extents to visit again. What is written is at most [`LEFT_RANGES_MAX`] ranges that cover
    /// them and as little else as possible.
    pub left: Vec<Range<u32>>,
    /// What it has done.
    pub counts: PassCounts,
}

/// How a pass ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It has seen everything.
    Complete,
    /// The operator ended it.
    Cancelled,
}

/// A pass that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndedPass {
    /// Its number, counted from 1.
    pub number: u64,
    /// When it began, in seconds since 1970.
    pub began_secs: u64,
    /// When it ended, in seconds since 1970.
    pub ended_secs: u64,
    /// Bytes read from members.
    pub member_bytes: u64,
    /// Findings.
    pub findings: u64,
    /// Blocks repaired.
    pub repaired: u64,
    /// Blocks damaged.
    pub damaged: u64,
    /// Extents that were hot each time they were visited.
    pub left_out: u32,
    /// How it ended.
    pub ending: Ending,
    /// It repaired nothing.
    pub check_only: bool,
}

/// The log. See the module documentation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubLog {
    choices: Choices,
    totals: Totals,
    pass: Option<Pass>,
    /// The newest first.
    passes: Vec<EndedPass>,
    findings: Findings,
    dirty: BTreeSet<u32>,
}

impl ScrubLog {
    /// The log of a mirror of which nothing has been scrubbed.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The operator's choices.
    #[must_use]
    pub fn choices(&self) -> Choices {
        self.choices
    }

    /// Changes the operator's choices.
    pub fn choose(&mut self, choices: Choices) {
        if self.choices != choices {
            self.choices = choices;
            self.dirty.insert(CHOICES_AND_TOTALS);
        }
    }

    /// What happened since the mirror was made; of the pass under way, up to the last
    /// [`ScrubLog::note_pass`].
    #[must_use]
    pub fn totals(&self) -> &Totals {
        &self.totals
    }

    /// The pass under way, as it was noted last.
    #[must_use]
    pub fn pass(&self) -> Option<&Pass> {
        self.pass.as_ref()
    }

    /// The passes that ended last, the newest first.
    #[must_use]
    pub fn passes(&self) -> &[EndedPass] {
        &self.passes
    }

    /// A pass begins at `start`, in place of one that may be under way.
    pub fn begin_pass(
        &mut self,
        now_secs: u64,
        start: Extent,
        check_only: bool,
        members: u64,
    ) -> &Pass {
        let number = self.totals.passes_begun.saturating_add(1);
        (self.totals.passes_begun, self.totals.members) = (number, members);
        self.dirty.extend([CHOICES_AND_TOTALS, PASS]);
        self.pass.insert(Pass {
            number,
            began_secs: now_secs,
            worked_ms: 0,
            check_only,
            start,
            cursor: start,
            wrapped: false,
            left: Vec::new(),
            counts: PassCounts::default(),
        })
    }

    /// How far the pass under way has come. Adds to the totals what came since the last time.
    pub fn note_pass(&mut self, pass: Pass) {
        let before = match &self.pass {
            Some(before) if before.number == pass.number => before.counts,
            _ => PassCounts::default(),
        };
        let now = pass.counts;
        let add = |total: &mut u64, now: u64, before: u64| {
            *total = total.saturating_add(now.saturating_sub(before));
        };
        add(&mut self.totals.blocks, now.blocks, before.blocks);
        add(
            &mut self.totals.member_bytes,
            now.member_bytes,
            before.member_bytes,
        );
        self.pass = Some(pass);
        self.dirty.extend([CHOICES_AND_TOTALS, PASS]);
    }

    /// The pass under way is over, as it was noted last.
    pub fn end_pass(&mut self, now_secs: u64, ending: Ending) {
        let Some(pass) = self.pass.take() else { return };
        if ending == Ending::Complete {
            self.totals.passes_complete = self.totals.passes_complete.saturating_add(1);
        }
        let ended = EndedPass {
            number: pass.number,
            began_secs: pass.began_secs,
            ended_secs: now_secs,
            member_bytes: pass.counts.member_bytes,
            findings: pass.counts.findings,
            repaired: pass.counts.repaired,
            damaged: pass.counts.damaged,
            left_out: u32::try_from(pass.counts.left_out).unwrap_or(u32::MAX),
            ending,
            check_only: pass.check_only,
        };
        self.passes.insert(0, ended);
        self.passes.truncate(PASSES_KEPT);
        self.dirty.extend([CHOICES_AND_TOTALS, PASS, PASSES]);
    }

    /// Adds a finding. It becomes part of an earlier one when the two differ only in that their
    /// blocks follow each other, and nothing is added when damage, or what a check-only pass
    /// found, is already known.
    pub fn add(&mut self, finding: &Finding) {
        let changes = self.findings.add(finding);
        self.took(&changes);
        let what = finding.what.place();
        for (counts, place) in [
            (&mut self.totals.what[..], what),
            (&mut self.totals.done[..], finding.done.place()),
            (&mut self.totals.by[..], finding.by.place()),
        ] {
            if let Some(count) = counts.get_mut(place) {
                *count = count.saturating_add(changes.blocks);
            }
        }
    }

    /// The findings that are kept, the oldest first.
    #[must_use]
    pub fn findings(&self) -> Vec<&Finding> {
        self.findings.in_order()
    }

    /// Blocks that are damaged as far as the findings say it: runs in order, without overlap.
    ///
    /// A block may have been written again shortly before a crash that took the note of it
    /// ([`ScrubLog::cleared`]) along: ask its checksum before believing this. And the findings
    /// of very many runs do not all fit ([`Totals::forgotten`]).
    #[must_use]
    pub fn damaged_runs(&self) -> Vec<Range<u64>> {
        self.findings.damaged_runs()
    }

    /// `blocks` have been written again, or turned out to be right: they are not damaged any
    /// more. Costs nothing while no damage is known.
    pub fn cleared(&mut self, blocks: &Range<u64>) {
        let changes = self.findings.cleared(blocks);
        self.took(&changes);
    }

    fn took(&mut self, changes: &findings::Changes) {
        let sectors = changes.places.iter().map(|place| sector_of(*place));
        self.dirty.extend(sectors);
        self.totals.forgotten = self.totals.forgotten.saturating_add(changes.forgotten);
        if changes.blocks > 0 || changes.forgotten > 0 {
            self.dirty.insert(CHOICES_AND_TOTALS);
        }
    }

    /// Sectors whose payload has changed since they were last taken here, in order.
    pub fn take_dirty(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.dirty).into_iter().collect()
    }

    /// Whether any sector's payload has changed.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// A sector that was taken could not be written, or is to be written for another reason.
    pub fn mark_dirty(&mut self, sector: u32) {
        if sector < SECTORS {
            self.dirty.insert(sector);
        }
    }

    /// The payload of sector `sector`.
    pub fn payload(&self, sector: u32, out: &mut [u8; PAYLOAD_BYTES]) {
        out.fill(0);
        match sector {
            CHOICES_AND_TOTALS => format::encode_totals(&self.choices, &self.totals, out),
            PASS => {
                if let Some(pass) = &self.pass {
                    format::encode_pass(pass, out);
                }
            }
            PASSES => format::encode_passes(&self.passes, out),
            _ => self.findings.encode(first_place(sector), out),
        }
    }

    /// Takes what a sector's payload says in place of what was known of it. A sector that does
    /// not exist is ignored.
    pub fn load(&mut self, sector: u32, payload: &[u8; PAYLOAD_BYTES]) {
        match sector {
            CHOICES_AND_TOTALS => (self.choices, self.totals) = format::decode_totals(payload),
            PASS => self.pass = format::decode_pass(payload),
            PASSES => self.passes = format::decode_passes(payload),
            _ if sector < SECTORS => self.findings.decode(first_place(sector), payload),
            _ => {}
        }
    }
}

/// The first place for a finding in a sector.
fn first_place(sector: u32) -> usize {
    usize::try_from(sector.saturating_sub(FINDINGS)).unwrap_or(usize::MAX) * PER_SECTOR
}

/// The sector of a place.
fn sector_of(place: usize) -> u32 {
    FINDINGS + u32::try_from(place / PER_SECTOR).unwrap_or(SECTORS)
}

/// At most `max` ranges in order that cover `ranges` and as little else as possible; `max` is at
/// least 1.
#[must_use]
pub fn coarsened(mut ranges: Vec<Range<u32>>, max: usize) -> Vec<Range<u32>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u32>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    if joined.len() <= max {
        return joined;
    }
    // The narrowest gaps are closed.
    let mut gaps: Vec<(u32, usize)> = (1..)
        .zip(joined.windows(2))
        .map(|(at, pair)| (pair[1].start - pair[0].end, at))
        .collect();
    gaps.sort_unstable();
    let closed: BTreeSet<usize> = gaps[..joined.len() - max].iter().map(|gap| gap.1).collect();
    let mut kept: Vec<Range<u32>> = Vec::new();
    for (at, range) in joined.into_iter().enumerate() {
        match kept.last_mut() {
            Some(last) if closed.contains(&at) => last.end = range.end,
            _ => kept.push(range),
        }
    }
    kept
}

#[cfg(test)]
#[path = "scrub_log_tests.rs"]
mod tests;
