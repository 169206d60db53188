//! What a member has changed while it went on without others, from its own maps.
//!
//! Its missed maps for the slots that it has lost name the blocks, and of extents that it calls
//! hot all blocks count. What cannot be read counts as changed. Whether that is all it has changed
//! since it parted from somebody is not decided here (`mirror::split`). Nothing is written to it.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use dirty_map::{
    Address, BLOCK_BYTES, BLOCKS_PER_EXTENT, Extent, ExtentState, MissedMap, PAYLOAD_BYTES,
    SECTOR_BYTES, Stamp, StateMap, Summary, decode,
};
use mirror::layout::{
    PAGE_BYTES, Region, RegionKind, SECTORS_PER_PAGE, extents_of, missed_pages_of,
};
use mirror::superblock::{SlotState, Superblock};

use crate::failure::{Failure, words};
use crate::medium::Medium;
use crate::offline::{CHUNK_PAGES, chunks, load_states, narrow, sector_kind};

/// Blocks that are copied at once.
const CHUNK_BLOCKS: u64 = 256;

/// The newest sound content of a sector; `None` when neither copy is sound.
type Content = Option<[u8; PAYLOAD_BYTES]>;

/// The blocks that a member has changed since it lost any of those that it lacks, as far as they
/// hold anything: what it has discarded reads as zeroes.
pub(crate) fn changed_by(medium: &Medium, superblock: &Superblock) -> MissedMap {
    let reader = Reader { medium, superblock };
    let states = reader.states();
    let mut changed = extents_that(&states, |state| state == ExtentState::Hot);
    let lost = (0..).zip(&superblock.slots).filter(|(_, record)| {
        matches!(
            record.state,
            SlotState::Stale | SlotState::Faulty | SlotState::Missing
        )
    });
    for (slot, _) in lost.filter(|(slot, _)| *slot != superblock.own_slot) {
        let missed = reader.missed(slot, blocks(&states));
        let mut at = 0;
        while let Some(run) = missed.next_run(at, u64::MAX) {
            at = run.end;
            changed.set(run);
        }
    }
    for extent in (0..states.len()).map(Extent) {
        if !is_written(states.get(extent)) {
            changed.clear(extent.blocks());
        }
    }
    changed
}

/// All blocks of extents that hold anything.
pub(crate) fn written_on(medium: &Medium, superblock: &Superblock) -> MissedMap {
    extents_that(&Reader { medium, superblock }.states(), is_written)
}

fn is_written(state: ExtentState) -> bool {
    matches!(state, ExtentState::Cool | ExtentState::Hot)
}

fn blocks(states: &StateMap) -> u64 {
    u64::from(states.len()) * BLOCKS_PER_EXTENT
}

fn extents_that(states: &StateMap, wanted: impl Fn(ExtentState) -> bool) -> MissedMap {
    let mut found = MissedMap::new(blocks(states));
    for extent in (0..states.len()).map(Extent) {
        if wanted(states.get(extent)) {
            found.set(extent.blocks());
        }
    }
    found
}

/// Reads a member's maps.
struct Reader<'a> {
    medium: &'a Medium,
    superblock: &'a Superblock,
}

impl Reader<'_> {
    fn states(&self) -> StateMap {
        let extents = extents_of(self.superblock.layout.size_bytes);
        let mut states = StateMap::new(narrow(extents));
        self.region(RegionKind::State, 0, |sector, payload| {
            load_states(&mut states, sector, payload.as_ref());
        });
        states
    }

    /// Shows every sector of a map.
    fn region(&self, kind: RegionKind, slot: u8, mut visit: impl FnMut(u32, Content)) {
        let Some(region) = self.superblock.layout.find(kind, slot) else {
            return;
        };
        for pages in chunks(region) {
            self.part(region, pages, &mut visit);
        }
    }

    fn missed(&self, slot: u8, blocks: u64) -> MissedMap {
        let mut missed = MissedMap::new(blocks);
        let layout = &self.superblock.layout;
        let mut used = Summary::new(narrow(missed_pages_of(layout.size_bytes)));
        self.region(RegionKind::Summary, slot, |sector, payload| {
            if sector < used.sectors() {
                used.load_payload(sector, &payload.unwrap_or([0xff; PAYLOAD_BYTES]));
            }
        });
        let Some(region) = layout.find(RegionKind::Missed, slot) else {
            missed.set_all();
            return missed;
        };
        let used: Vec<u32> = used.iter().collect();
        let chunk = usize::try_from(CHUNK_PAGES).unwrap_or(1);
        for run in used.chunk_by(|a, b| a + 1 == *b) {
            for part in run.chunks(chunk) {
                let first = u64::from(part[0]);
                let pages = first..first + part.len() as u64;
                self.part(region, pages, &mut |sector, payload| match payload {
                    _ if sector >= missed.sectors() => {}
                    Some(payload) => missed.load_payload(sector, &payload),
                    None => missed.set_sector(sector),
                });
            }
        }
        missed
    }

    /// Shows the sectors of some pages.
    fn part(&self, region: &Region, pages: Range<u64>, visit: &mut impl FnMut(u32, Content)) {
        let len = usize::try_from((pages.end - pages.start) * PAGE_BYTES).unwrap_or(0);
        let copies = [region.copy_a, region.copy_b].map(|copy| {
            let mut bytes = vec![0; len];
            let read = self
                .medium
                .read(&mut bytes, copy + pages.start * PAGE_BYTES);
            if read.is_err() {
                // Which page it is that cannot be read is not worth a second look.
                bytes.fill(0);
            }
            bytes
        });
        let first = narrow(pages.start * SECTORS_PER_PAGE);
        let (copy_a, _) = copies[0].as_chunks::<SECTOR_BYTES>();
        let (copy_b, _) = copies[1].as_chunks::<SECTOR_BYTES>();
        for (sector, (a, b)) in (first..).zip(copy_a.iter().zip(copy_b)) {
            let address = Address {
                kind: sector_kind(region.kind),
                slot: region.slot,
                index: sector,
            };
            let tag = self.superblock.tag();
            let sound = [a, b].map(|bytes| decode(bytes, address, tag).ok());
            let newest = sound
                .iter()
                .flatten()
                .max_by_key(|(stamp, _): &&(Stamp, _)| *stamp);
            visit(sector, newest.map(|(_, payload)| **payload));
        }
    }
}

/// Copies blocks of a member into a new file of the device's size, each at its place in the
/// device; the rest are holes. Returns how many blocks could not be read, and are holes too.
pub(crate) fn save(
    medium: &Medium,
    superblock: &Superblock,
    wanted: &MissedMap,
    path: &Path,
) -> Result<u64, Failure> {
    let failed = |e: &io::Error| {
        Failure::failed(format!(
            "{} cannot be written: {}. Nothing was changed on the member.",
            path.display(),
            words(e)
        ))
    };
    let size_bytes = superblock.layout.size_bytes;
    let file = OpenOptions::new().write(true).create_new(true).open(path);
    let file = file.map_err(|e| match e.kind() {
        io::ErrorKind::AlreadyExists => Failure::refused(format!(
            "{} is there already and is not written over: give --save a new name.",
            path.display()
        )),
        _ => failed(&e),
    })?;
    file.set_len(size_bytes).map_err(|e| failed(&e))?;
    let mut unreadable = 0;
    let mut from = 0;
    while let Some(run) = wanted.next_run(from, CHUNK_BLOCKS) {
        from = run.end;
        unreadable += copy(medium, superblock, &file, run).map_err(|e| failed(&e))?;
    }
    file.sync_all().map_err(|e| failed(&e))?;
    Ok(unreadable)
}

/// Copies a run of blocks, block by block where the whole cannot be read.
fn copy(medium: &Medium, superblock: &Superblock, file: &File, run: Range<u64>) -> io::Result<u64> {
    let layout = &superblock.layout;
    let start = run.start * BLOCK_BYTES;
    let end = (run.end * BLOCK_BYTES).min(layout.size_bytes);
    if start >= end {
        return Ok(0);
    }
    let mut bytes = vec![0; usize::try_from(end - start).unwrap_or(0)];
    if medium.read(&mut bytes, layout.data_offset + start).is_ok() {
        file.write_all_at(&bytes, start)?;
        return Ok(0);
    }
    if run.end - run.start == 1 {
        return Ok(1);
    }
    let mut unreadable = 0;
    for block in run {
        unreadable += copy(medium, superblock, file, block..block + 1)?;
    }
    Ok(unreadable)
}
