//! The maps in memory and their pages on the members.
//!
//! All receiving members hold the same maps, so there is one state map and one missed map a
//! slot in memory, and a set of pages that differ from what is durable. A page image is always
//! made from memory, so writing a page early writes nothing wrong: a hot bit or a missed bit
//! too many costs copying, never data.
//!
//! The pages of one copy follow each other in a region of the member; a page holds
//! [`SECTORS_PER_PAGE`] sectors.

use super::StartOptions;
use super::quiet::Quiet;
use crate::bytes::put;
use crate::layout::{PAGE_BYTES, RegionKind, SECTORS_PER_PAGE, SLOTS_MAX, extents_of};
use crate::scrub_log::{self, ScrubLog};
use crate::superblock::Superblock;
use dirty_map::{
    Address, BLOCKS_PER_EXTENT, Extent, ExtentState, HotExtents, HotSums, Kind, MISSED_PER_SECTOR,
    MissedMap, PAYLOAD_BYTES, SECTOR_BYTES, STATES_PER_SECTOR, SUMMARY_PER_SECTOR, Stamp, StateMap,
    SumCache, Summary, encode,
};
use std::collections::{BTreeSet, HashSet};
use std::ops::Range;
use std::time::Duration;

/// Where the payload of a position sector names an epoch (byte table: dirty-map/src/lib.rs).
pub(super) const EFFECTIVE_AT: usize = 0;
/// Where it names a sequence.
pub(super) const COMPLETED_AT: usize = 16;
/// Missed blocks in a page of a missed map.
const MISSED_PER_PAGE: u64 = MISSED_PER_SECTOR * SECTORS_PER_PAGE;

/// Names a page of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Page {
    /// Which map.
    pub(super) kind: RegionKind,
    /// Whose missed map; 0 for other kinds.
    pub(super) slot: u8,
    /// Which page of it.
    pub(super) index: u32,
}

impl Page {
    /// The position page.
    pub(super) const POSITION: Self = Self {
        kind: RegionKind::Position,
        slot: 0,
        index: 0,
    };
}

/// One slot's missed map with its summary.
pub(super) struct Missed {
    /// The blocks that the slot's member lacks.
    pub(super) map: MissedMap,
    /// Pages of the map that count on disk.
    pub(super) summary: Summary,
    /// Bits set since the running batch of copies began: a copy made before does not clear
    /// them (R4).
    pub(super) since_copied: MissedMap,
    /// Whether copies are under way, so that bits set meanwhile have to be told apart.
    pub(super) copying: bool,
    /// Pages whose bits in memory differ from what is durable.
    pub(super) changed: BTreeSet<u32>,
}

/// All maps of a mirror.
pub(super) struct Maps {
    /// Extent states.
    pub(super) states: StateMap,
    /// One for each slot.
    pub(super) missed: Vec<Missed>,
    /// Extents that are durably hot, with their unflushed sets.
    pub(super) hot: HotExtents,
    /// How long extents stay hot.
    pub(super) quiet: Quiet,
    /// Extents on their way from hot to cool: no longer in `hot`, still hot on disk.
    pub(super) cooling: HashSet<Extent>,
    /// Extents in `hot`, or for which there was no room in it, that the disks may call otherwise
    /// after a commit that failed: they are recorded before the next write (R1).
    pub(super) unrecorded: HashSet<Extent>,
    /// Extents being zeroed and made hot by some write.
    pub(super) preparing: HashSet<Extent>,
    /// Checksums of hot extents.
    pub(super) sums: HotSums,
    /// Pages of the checksum table, as an in-sync member has them.
    pub(super) pages: SumCache,
    /// Blocks of which no copy is provably right: they read as an error until written anew.
    pub(super) damaged: MissedMap,
    /// What scrubs have done and found.
    pub(super) log: ScrubLog,
    /// Extents that have cooled while a member is joining, if one is.
    pub(super) cooled: Option<BTreeSet<Extent>>,
    /// Blocks that an unclean stop left un-equalised, of whose flushes nothing is known.
    pub(super) inherited: MissedMap,
    /// Blocks whose flush failed everywhere and that were not written anew (R7).
    pub(super) suspect: MissedMap,
    /// Pages to commit.
    pub(super) dirty: BTreeSet<Page>,
    /// Stamp of the last commit begun.
    pub(super) stamp: Stamp,
    /// The newest epoch known to be effective, for the position page (R10); 0 for none.
    pub(super) effective: u128,
    /// The newest sequence that all receiving members hold for certain, also those whose loss is
    /// not recorded yet: a member that lacks it is an older copy (R16).
    pub(super) completed: u64,
    tag: u32,
}

impl Maps {
    pub(super) fn new(config: &Superblock, options: &StartOptions) -> Self {
        let (layout, slots) = (&config.layout, config.slots.len());
        let hot_memory_bytes = if config.checksums {
            options.hot_memory_bytes / 2
        } else {
            options.hot_memory_bytes
        };
        let extents = u32::try_from(extents_of(layout.size_bytes)).unwrap_or(u32::MAX);
        let blocks = u64::from(extents) * BLOCKS_PER_EXTENT;
        let missed = |_| Missed {
            map: MissedMap::new(blocks),
            since_copied: MissedMap::new(blocks),
            copying: false,
            summary: Summary::new(narrow(blocks.div_ceil(MISSED_PER_PAGE))),
            changed: BTreeSet::new(),
        };
        Self {
            states: StateMap::new(extents),
            missed: (0..slots.min(SLOTS_MAX)).map(missed).collect(),
            hot: HotExtents::new(hot_memory_bytes),
            quiet: Quiet::new(extents.into()),
            cooling: HashSet::new(),
            unrecorded: HashSet::new(),
            preparing: HashSet::new(),
            sums: HotSums::new(options.hot_memory_bytes / 2, layout.size_bytes),
            pages: SumCache::new(options.sum_cache_bytes),
            damaged: MissedMap::new(blocks),
            log: ScrubLog::new(),
            cooled: None,
            inherited: MissedMap::new(blocks),
            suspect: MissedMap::new(blocks),
            dirty: BTreeSet::new(),
            stamp: Stamp {
                ordinal: 0,
                sequence: 0,
            },
            effective: 0,
            completed: 0,
            tag: config.tag(),
        }
    }

    /// Changes an extent's state and has its page committed next.
    pub(super) fn set_state(&mut self, extent: Extent, state: ExtentState) {
        match (self.states.get(extent), state) {
            (ExtentState::Hot, ExtentState::Cool) => self.quiet.has_cooled(extent),
            (ExtentState::Cool, ExtentState::Hot) => self.quiet.is_back(extent),
            _ => {}
        }
        self.states.force(extent, state);
        let page = u64::from(extent.0) / (STATES_PER_SECTOR * SECTORS_PER_PAGE);
        self.dirty.insert(Page {
            kind: RegionKind::State,
            slot: 0,
            index: narrow(page),
        });
    }

    /// Sets missed bits of a slot, in memory until its changed pages are committed.
    pub(super) fn miss(&mut self, slot: u8, blocks: Range<u64>) {
        let missed = &mut self.missed[usize::from(slot)];
        if missed.copying {
            missed.since_copied.set(blocks.clone());
        }
        if missed.map.set(blocks.clone()) > 0 {
            note_pages(missed, &blocks);
        }
    }

    /// A batch of copies begins, or the last one is over.
    pub(super) fn set_copying(&mut self, slot: u8, copying: bool) {
        let missed = &mut self.missed[usize::from(slot)];
        missed.copying = copying;
        missed.since_copied.clear_all();
    }

    /// Clears the missed bits of blocks that were copied, in memory; those set again since the
    /// batch began stay.
    pub(super) fn unmiss_copied(&mut self, slot: u8, blocks: Range<u64>) {
        let missed = &mut self.missed[usize::from(slot)];
        let mut at = blocks.start;
        while at < blocks.end {
            let again = missed.since_copied.next_run(at, blocks.end - at);
            let again = again
                .filter(|run| run.start < blocks.end)
                .unwrap_or(blocks.end..blocks.end);
            let part = at..again.start;
            if !part.is_empty() && missed.map.clear(part.clone()) > 0 {
                note_pages(missed, &part);
            }
            at = again.end;
        }
    }

    /// Has the changed pages of a slot's missed map committed next.
    pub(super) fn queue_missed(&mut self, slot: u8) {
        let missed = &mut self.missed[usize::from(slot)];
        for index in std::mem::take(&mut missed.changed) {
            if !missed.summary.get(index) {
                missed.summary.set(index);
                let page = index / narrow(SUMMARY_PER_SECTOR * SECTORS_PER_PAGE);
                self.dirty.insert(Page {
                    kind: RegionKind::Summary,
                    slot,
                    index: page,
                });
            }
            self.dirty.insert(Page {
                kind: RegionKind::Missed,
                slot,
                index,
            });
        }
    }

    /// Begins a slot's missed map anew: nothing on disk counts until it is queued again.
    /// Everything still set in memory is queued with the next [`Maps::queue_missed`].
    pub(super) fn restart_missed(&mut self, slot: u8) {
        let missed = &mut self.missed[usize::from(slot)];
        missed.summary.clear_all();
        missed.changed.clear();
        let mut from = 0;
        while let Some(run) = missed.map.next_run(from, u64::MAX) {
            note_pages(missed, &run);
            from = run.end;
        }
        for index in 0..pages_of(u64::from(missed.summary.sectors())) {
            self.dirty.insert(Page {
                kind: RegionKind::Summary,
                slot,
                index,
            });
        }
    }

    /// Has the changed pages of the scrub log committed next; whether there are any.
    pub(super) fn queue_log(&mut self) -> bool {
        let changed = self.log.take_dirty();
        for &sector in &changed {
            self.dirty.insert(Page {
                kind: RegionKind::Scrub,
                slot: 0,
                index: sector / narrow(SECTORS_PER_PAGE),
            });
        }
        !changed.is_empty()
    }

    /// Writes the image of a page.
    pub(super) fn encode_page(&self, page: Page, stamp: Stamp, out: &mut [u8]) {
        let mut payload = [0; PAYLOAD_BYTES];
        let first = page.index * narrow(SECTORS_PER_PAGE);
        for (index, sector) in (first..).zip(out.chunks_exact_mut(SECTOR_BYTES)) {
            payload.fill(0);
            let missed = self.missed.get(usize::from(page.slot));
            match (page.kind, missed) {
                (RegionKind::State, _) if index < self.states.sectors() => {
                    self.states.write_payload(index, &mut payload);
                }
                (RegionKind::Missed, Some(m)) if index < m.map.sectors() => {
                    m.map.write_payload(index, &mut payload);
                }
                (RegionKind::Summary, Some(m)) if index < m.summary.sectors() => {
                    m.summary.write_payload(index, &mut payload);
                }
                (RegionKind::Scrub, _) if index < scrub_log::SECTORS => {
                    self.log.payload(index, &mut payload);
                }
                (RegionKind::Position, _) => {
                    put(&mut payload, EFFECTIVE_AT, self.effective.to_le_bytes());
                    put(&mut payload, COMPLETED_AT, self.completed.to_le_bytes());
                }
                _ => {}
            }
            let address = Address {
                kind: sector_kind(page.kind),
                slot: page.slot,
                index,
            };
            sector.copy_from_slice(&encode(address, self.tag, stamp, &payload));
        }
    }

    /// Whether `extent` is durably hot.
    pub(super) fn is_hot(&self, extent: Extent) -> bool {
        self.hot.contains(extent)
            && (self.unrecorded.is_empty() || !self.unrecorded.contains(&extent))
    }

    /// An extent of which the commit that was to make it hot failed, if it came so far. It cools
    /// like others, or its checksums would not be believed after the next start.
    pub(super) fn keep_unrecorded(&mut self, extent: Extent, now: Duration) {
        let begun = self.states.get(extent) == ExtentState::Hot && !self.hot.contains(extent);
        if begun {
            self.unrecorded.insert(extent);
        }
        if begun && !self.hot.is_full() {
            self.hot.insert(extent, now);
        }
    }

    /// Whether every extent in `extents` is durably hot.
    pub(super) fn all_hot(&self, mut extents: impl Iterator<Item = Extent>) -> bool {
        extents.all(|extent| self.is_hot(extent))
    }

    /// Whether reads of `extent` are answered from the disks.
    pub(super) fn is_written(&self, extent: Extent) -> bool {
        matches!(
            self.states.get(extent),
            ExtentState::Cool | ExtentState::Hot
        )
    }
}

/// The kind in a sector's header.
pub(super) fn sector_kind(kind: RegionKind) -> Kind {
    match kind {
        RegionKind::State => Kind::State,
        RegionKind::Summary => Kind::Summary,
        RegionKind::Missed => Kind::Missed,
        RegionKind::Scrub => Kind::Scrub,
        RegionKind::Position | RegionKind::Checksums => Kind::Position,
    }
}

/// Offset of a page in a copy of its region.
pub(super) fn page_offset(index: u32) -> u64 {
    u64::from(index) * PAGE_BYTES
}

/// Pages that hold `sectors` sectors.
pub(super) fn pages_of(sectors: u64) -> u32 {
    narrow(sectors.div_ceil(SECTORS_PER_PAGE))
}

fn note_pages(missed: &mut Missed, blocks: &Range<u64>) {
    let last = (blocks.end - 1) / MISSED_PER_PAGE;
    for index in blocks.start / MISSED_PER_PAGE..=last {
        missed.changed.insert(narrow(index));
    }
}

/// Page and sector numbers fit 32 bits for every size that a superblock may name.
fn narrow(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
