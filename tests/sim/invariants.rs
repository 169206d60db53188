//! The rules as code, looked at beside the engine: at every operation that a disk is given or
//! completes, at every answer, and at every start.
//!
//! | rule | where |
//! |---|---|
//! | R1 | [`Rules::r1_intent_first`] |
//! | R2 | [`Rules::r2_loss_before_answer`] |
//! | R3 | [`Rules::r3_equal_when_cool`] |
//! | R4 | [`Rules::r4_copied_before_cleared`] |
//! | R5 | the oracle (`oracle.rs`): two reads never disagree; and `compare_members` |
//! | R6, R13 | [`Rules::r6_r13_one_change_at_a_time`]; the simulated buffers panic when one is used twice |
//! | R7 | [`Rules::r7_flushed`]; the oracle after each power cut |
//! | R8 | [`Rules::r8_somebody_is_in_sync`] |
//! | R9 | the player (`play.rs`): nothing stands still |
//! | R10 | `mirror/src/histories.rs`, every history; [`Rules::r10_one_meaning`] |
//! | R11 | [`Rules::r11_zeroed_before_use`]; the oracle, on disks full of garbage |
//! | R12 | [`Rules::r12_hot_means_missed`] |
//! | R14 | [`Rules::r14_a_return_is_an_epoch`] |
//! | R15 | [`Rules::r15_no_start_on_what_may_be_old`] |
//! | R16 | the player's `OlderImage`, and `mirror/src/histories.rs` |
//! | R17 | the fuzz targets; here whatever a power cut tears |

use crate::machine::superblock_on;
use crate::oracle::version_of;
use crate::rot::Rotten;
use dirty_map::{
    Address, Extent, ExtentState, Kind, SECTOR_BYTES, STATES_PER_SECTOR, Stamp, StateMap,
};
use mirror::control::{MemberState, Status};
use mirror::layout::{Layout, RegionKind};
use mirror::sim::{Observer, SimBuffer, SimDisk};
use mirror::superblock::{COPY_A_OFFSET, COPY_B_OFFSET, COPY_BYTES, SlotState, Superblock};
use mirror::{DiskRequest, Span};
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

const EXTENT_BYTES: u64 = 4 << 20;
/// What is compared of an extent: where the oracle watches every sector.
const WATCHED_BYTES: u64 = 640 * 512;
const BLOCK_BYTES: u64 = 4096;
/// Larger maps are not read at a start: what they held before is not known.
const MAP_BYTES_MAX: u64 = 16 << 20;
/// Cleared bits of one map sector that are looked at.
const CLEARED_MAX: usize = 64;

/// Whether each byte is zero.
fn all_zero(bytes: &[u8]) -> bool {
    // Each byte equals the next: the comparison of a library is faster than a loop.
    bytes.first() == Some(&0) && bytes[1..] == bytes[..bytes.len() - 1]
}

/// What a member's superblock and maps said last.
struct Known {
    disk: SimDisk,
    superblock: Option<Superblock>,
    states: Vec<ExtentState>,
    /// Newest sector seen of each map, by map, slot and index.
    sectors: HashMap<(u8, u8, u32), (Stamp, Vec<u8>)>,
}

/// A map sector that was not known: map, slot, index, payload before and now.
type News = (RegionKind, u8, u32, Option<Vec<u8>>, Vec<u8>);

/// Watches the disks of one machine.
pub(crate) struct Rules {
    known: RefCell<Vec<Known>>,
    /// What superblocks have said, by event count.
    said: RefCell<HashMap<u64, Superblock>>,
    layout: Layout,
    tag: u32,
    /// Blocks of which a copy has changed behind the mirror's back are not compared.
    rotten: Rc<Rotten>,
}

/// A moment from which on a flush promises what was cached before.
pub(crate) struct BeforeFlush(Vec<(SimDisk, u64)>);

impl Rules {
    /// Watches `disks`, at least one of which holds a superblock.
    pub(crate) fn watching(disks: &[SimDisk], rotten: Rc<Rotten>) -> Option<Rc<Self>> {
        let superblock = disks.iter().find_map(superblock_on)?;
        let rules = Rc::new(Self {
            known: RefCell::default(),
            said: RefCell::default(),
            layout: superblock.layout.clone(),
            tag: superblock.tag(),
            rotten,
        });
        for disk in disks {
            rules.clone().watch(disk);
        }
        Some(rules)
    }

    /// Watches one more disk, or one that was opened anew.
    pub(crate) fn watch(self: Rc<Self>, disk: &SimDisk) {
        self.forget(disk);
        let extents = self.layout.size_bytes.div_ceil(EXTENT_BYTES);
        let mut known = Known {
            disk: disk.clone(),
            superblock: superblock_on(disk),
            states: vec![ExtentState::Unwritten; extents as usize],
            sectors: HashMap::new(),
        };
        for region in &self.layout.regions {
            let maps = [RegionKind::State, RegionKind::Missed];
            if maps.contains(&region.kind) && region.len <= MAP_BYTES_MAX {
                for copy in [region.copy_a, region.copy_b] {
                    let mut bytes = vec![0; region.len as usize];
                    disk.read_now(copy, &mut bytes);
                    drop(self.learn(&mut known, copy, &bytes));
                }
            }
        }
        let damaged = |index: &usize| {
            let sector = *index as u64 / STATES_PER_SECTOR;
            let key = (Kind::State as u8, 0, sector as u32);
            known.superblock.is_some() && !known.sectors.contains_key(&key)
        };
        let damaged: Vec<usize> = (0..known.states.len()).filter(damaged).collect();
        for extent in damaged {
            // Perhaps written: a start by force treats it so.
            known.states[extent] = ExtentState::Cool;
        }
        self.known.borrow_mut().push(known);
        disk.observe(Some(self));
    }

    /// Watches nothing any more. The disks and this hold each other until then.
    pub(crate) fn end(&self) {
        for known in self.known.take() {
            known.disk.observe(None);
        }
    }

    /// Watches a disk no more: another one has its place.
    pub(crate) fn forget(&self, disk: &SimDisk) {
        disk.observe(None);
        self.known
            .borrow_mut()
            .retain(|known| !known.disk.is_same(disk));
    }

    /// Map sectors in `bytes` at `offset` that are newer than what was known: address, payload
    /// before, payload now.
    fn learn(&self, known: &mut Known, offset: u64, bytes: &[u8]) -> Vec<News> {
        let mut news = Vec::new();
        let region = self.layout.regions.iter().find_map(|region| {
            let mut copies = [region.copy_a, region.copy_b].into_iter();
            let start = copies.find(|start| (*start..start + region.len).contains(&offset))?;
            Some((region, start))
        });
        let Some((region, start)) = region else {
            return news;
        };
        // Those beyond hold nothing of the mirror.
        let blocks = self.layout.size_bytes / BLOCK_BYTES;
        let extents = self.layout.size_bytes.div_ceil(EXTENT_BYTES);
        let (kind, used) = match region.kind {
            RegionKind::State => (Kind::State, extents.div_ceil(STATES_PER_SECTOR)),
            RegionKind::Missed => (Kind::Missed, blocks.div_ceil(dirty_map::MISSED_PER_SECTOR)),
            RegionKind::Summary
            | RegionKind::Position
            | RegionKind::Checksums
            | RegionKind::Scrub => return news,
        };
        let indices = (offset - start) / 512..used;
        for (index, sector) in indices.zip(bytes.as_chunks::<SECTOR_BYTES>().0) {
            let address = Address {
                kind,
                slot: region.slot,
                index: index as u32,
            };
            let Ok((stamp, payload)) = dirty_map::decode(sector, address, self.tag) else {
                continue;
            };
            let key = (kind as u8, region.slot, address.index);
            let before = known.sectors.get(&key);
            if before.is_some_and(|(old, _)| *old > stamp) {
                continue;
            }
            let before = known.sectors.insert(key, (stamp, payload.to_vec()));
            let before = before.map(|(_, payload)| payload);
            news.push((
                region.kind,
                region.slot,
                address.index,
                before,
                payload.to_vec(),
            ));
            if kind == Kind::State {
                let mut map = StateMap::new(known.states.len() as u32);
                map.load_payload(address.index, payload);
                let first = index as usize * STATES_PER_SECTOR as usize;
                let states = known.states[first..].iter_mut();
                let of_sector = states.take(STATES_PER_SECTOR as usize);
                for (extent, state) in (first as u32..).zip(of_sector) {
                    *state = map.get(Extent(extent));
                }
            }
        }
        news
    }

    /// The extents whose states lie in this part of a member.
    fn extents_in(&self, offset: u64, len: u64) -> std::ops::Range<usize> {
        let regions = self.layout.regions.iter();
        let mut states = regions.filter(|region| region.kind == RegionKind::State);
        let within = |start: u64, bytes: u64| (start..start + bytes).contains(&offset);
        let start = states.find_map(|region| {
            let mut copies = [region.copy_a, region.copy_b].into_iter();
            copies.find(|start| within(*start, region.len))
        });
        let extents = self.layout.size_bytes.div_ceil(EXTENT_BYTES);
        let extent = |at: u64| (at / 512 * STATES_PER_SECTOR).min(extents) as usize;
        start.map_or(0..0, |start| {
            extent(offset - start)..extent(offset - start + len)
        })
    }

    /// The newest configuration that any of the disks holds: events count within one line of
    /// epochs only.
    fn newest(known: &[Known]) -> Option<&Superblock> {
        let superblocks = known.iter().filter_map(|known| known.superblock.as_ref());
        superblocks.clone().max_by_key(|superblock| {
            let behind = superblocks
                .clone()
                .filter(|other| superblock.descends_from(other.epoch.id));
            (behind.count(), superblock.event_count)
        })
    }

    /// The watched member in `slot` of `config`, if its power has not gone.
    fn member<'a>(known: &'a [Known], config: &Superblock, slot: usize) -> Option<&'a Known> {
        let uuid = config.slots.get(slot)?.member?;
        known.iter().find(|known| {
            let own = known.superblock.as_ref();
            own.is_some_and(|own| own.member == uuid) && !known.disk.is_dead()
        })
    }

    /// The watched members that the newest configuration calls in-sync.
    fn in_sync(known: &[Known]) -> Vec<&Known> {
        let Some(config) = Self::newest(known) else {
            return Vec::new();
        };
        let slots = config.slots.iter().enumerate();
        slots
            .filter(|(_, slot)| slot.state == SlotState::InSync)
            .filter_map(|(slot, _)| Self::member(known, config, slot))
            .collect()
    }

    /// What a power cut leaves of the watched part of an extent, if that is certain.
    fn settled(&self, disk: &SimDisk, extent: usize) -> Option<Vec<u8>> {
        let begin = extent as u64 * EXTENT_BYTES;
        let len = WATCHED_BYTES.min(self.layout.size_bytes - begin);
        disk.settled(self.layout.data_offset + begin, len)
    }

    /// R1: an in-sync member's own map says durably that an extent is hot before data reaches
    /// it. Zeroes may come first: that is how an extent becomes usable.
    fn r1_intent_first(&self, known: &Known, offset: u64, span: &Span<SimBuffer>) {
        let in_sync = known.superblock.as_ref().is_some_and(|superblock| {
            let own = superblock.slots.get(usize::from(superblock.own_slot));
            own.is_some_and(|own| own.state == SlotState::InSync)
        });
        if !in_sync {
            return;
        }
        let first = (offset - self.layout.data_offset) / EXTENT_BYTES;
        let last = (offset - self.layout.data_offset + span.len as u64 - 1) / EXTENT_BYTES;
        for extent in first..=last {
            let hot = known.states[extent as usize] == ExtentState::Hot;
            let zero = || span.read(all_zero);
            assert!(
                hot || zero(),
                "R1: data for extent {extent}, which is not hot"
            );
        }
    }

    /// R2: when a write is answered well, every member that its superblocks call in-sync has it.
    pub(crate) fn r2_loss_before_answer(&self, sector: u64, version: u64) {
        let known = self.known.borrow();
        if self.rotten.concerns(sector * 512, 512) {
            return;
        }
        for member in Self::in_sync(&known) {
            let mut bytes = [0; 512];
            let at = self.layout.data_offset + sector * 512;
            member.disk.read_now(at, &mut bytes);
            // A later change may have overtaken it: zeroes, or a version with a higher number.
            let found = version_of(sector, &bytes);
            assert!(
                found.is_some_and(|found| found == 0 || found >= version),
                "R2: write {version} of sector {sector} is answered, and a member in-sync holds {found:?}"
            );
        }
    }

    /// R3: the copies of an extent that becomes cool are durable and equal.
    fn r3_equal_when_cool(&self, known: &[Known], extent: usize) {
        let mut first: Option<Vec<u8>> = None;
        for member in Self::in_sync(known) {
            let mut found = self.settled(&member.disk, extent);
            for (block, bytes) in (0..).zip(found.iter_mut().flat_map(|f| f.chunks_mut(4096))) {
                let at = extent as u64 * EXTENT_BYTES + block * BLOCK_BYTES;
                if self.rotten.concerns(at, BLOCK_BYTES) {
                    bytes.fill(0);
                }
            }
            assert!(
                found.is_some(),
                "R3: extent {extent} is cool and not durable"
            );
            if let (Some(first), Some(found)) = (&first, &found) {
                assert!(
                    first == found,
                    "R3: extent {extent} is cool and its copies differ"
                );
            }
            first = first.or(found);
        }
    }

    /// R4: the missed bit of a block is cleared when the copy is durable.
    fn r4_copied_before_cleared(&self, known: &[Known], source: &Known, slot: u8, block: u64) {
        // A former member whose maps are being overwritten may still say how things were long ago.
        let Some(superblock) = Self::newest(known) else {
            return;
        };
        let beyond_the_end = (block + 1) * BLOCK_BYTES > self.layout.size_bytes;
        if beyond_the_end || self.rotten.concerns(block * BLOCK_BYTES, BLOCK_BYTES) {
            return;
        }
        let resyncing = superblock.slots[usize::from(slot)].state == SlotState::Resyncing;
        let extent = block * BLOCK_BYTES / EXTENT_BYTES;
        let state = source.states.get(extent as usize);
        let used = matches!(state, Some(ExtentState::Hot | ExtentState::Cool));
        if !resyncing || !used {
            return;
        }
        let Some(target) = Self::member(known, superblock, usize::from(slot)) else {
            return;
        };
        let at = self.layout.data_offset + block * BLOCK_BYTES;
        let sources = Self::in_sync(known);
        // The next version may be on its way already, to any of them (seed 2078).
        let expects = |disk: &SimDisk| disk.expects(at, BLOCK_BYTES);
        if expects(&target.disk) || sources.iter().any(|known| expects(&known.disk)) {
            return;
        }
        let Some(have) = target.disk.settled(at, BLOCK_BYTES) else {
            return;
        };
        // One of them may be failing, and its loss not be recorded yet: any one that fits will do.
        let copies = sources
            .iter()
            .map(|known| known.disk.settled(at, BLOCK_BYTES));
        let Some(wanted) = copies.collect::<Option<Vec<_>>>() else {
            return;
        };
        assert!(
            wanted.is_empty() || wanted.contains(&have),
            "R4: block {block} is not missed by slot {slot} any more, which begins with {:?} and not {:?}",
            &have[..16],
            wanted.iter().map(|copy| &copy[..16]).collect::<Vec<_>>()
        );
    }

    /// R6 and R13: a range has one change under way at a time on each disk.
    fn r6_r13_one_change_at_a_time(disk: &SimDisk, offset: u64, len: u64) {
        assert!(
            !disk.is_under_way(offset, len),
            "R6, R13: {len} bytes at {offset} are being changed already"
        );
    }

    /// A flush begins.
    pub(crate) fn before_flush(&self) -> BeforeFlush {
        let known = self.known.borrow();
        let number = |known: &&Known| (known.disk.clone(), known.disk.next_number());
        BeforeFlush(Self::in_sync(&known).iter().map(number).collect())
    }

    /// R7: when it is answered well, every in-sync member has flushed.
    pub(crate) fn r7_flushed(&self, before: &BeforeFlush) {
        let known = self.known.borrow();
        for member in Self::in_sync(&known) {
            let begun = before.0.iter().find(|(disk, _)| disk.is_same(&member.disk));
            if let Some((disk, number)) = begun {
                assert!(
                    disk.is_flushed(self.layout.data_offset, *number),
                    "R7: a flush is answered, and a member in-sync has not flushed"
                );
            }
        }
    }

    /// R8: no superblock calls nobody in-sync.
    fn r8_somebody_is_in_sync(superblock: &Superblock) {
        let mut states = superblock.slots.iter().map(|slot| slot.state);
        assert!(
            states.any(|state| state == SlotState::InSync),
            "R8: a superblock calls nobody in-sync"
        );
    }

    /// Of the two copies of a superblock the newer one is the one that was written last: a crash
    /// between the two must not bring the other one back.
    fn newer_than_the_other_copy(disk: &SimDisk, offset: u64, superblock: &Superblock) {
        let mut other = [0; COPY_BYTES];
        disk.read_now(COPY_A_OFFSET + COPY_B_OFFSET - offset, &mut other);
        if let Ok(other) = Superblock::decode(&other) {
            assert!(
                other == *superblock || other.write_count < superblock.write_count,
                "a superblock of write count {} is written beside one of {}",
                superblock.write_count,
                other.write_count
            );
        }
    }

    /// R10: two superblocks of one event count say the same of all members.
    fn r10_one_meaning(&self, superblock: &Superblock) {
        let own = superblock.own_record();
        if own.state == SlotState::Stale || own.full {
            // Perhaps marked by itself: as an older copy, or as one that gets a full resync.
            return;
        }
        let mut said = self.said.borrow_mut();
        let before = said.entry(superblock.event_count);
        let before = before.or_insert_with(|| superblock.clone());
        let same = before.epoch == superblock.epoch
            && before.slots == superblock.slots
            && before.flush_failed == superblock.flush_failed
            && before.last_stop == superblock.last_stop;
        assert!(
            same,
            "R10: two superblocks at event {} differ: {:?}, {:?}",
            superblock.event_count, before.slots, superblock.slots
        );
    }

    /// R11: the data of an extent that becomes usable is zero, durably.
    fn r11_zeroed_before_use(&self, known: &[Known], disk: &SimDisk, extent: usize) {
        if !Self::in_sync(known)
            .iter()
            .any(|member| member.disk.is_same(disk))
        {
            return;
        }
        let found = self.settled(disk, extent);
        let zero = found.is_some_and(|bytes| all_zero(&bytes));
        assert!(
            zero,
            "R11: extent {extent} becomes hot and is not durably zero"
        );
    }

    /// R12: after a start every block of every hot extent is missed for absent members.
    pub(crate) fn r12_hot_means_missed(status: &Status) {
        for member in &status.members {
            let away = !matches!(member.state, MemberState::InSync | MemberState::Resyncing);
            if member.uuid.is_some() && away {
                assert!(
                    member.missed_bytes >= status.extents.hot * EXTENT_BYTES,
                    "R12: slot {} has fewer missed blocks than the hot extents hold",
                    member.slot
                );
            }
        }
    }

    /// R14: a member's return begins an epoch.
    pub(crate) fn r14_a_return_is_an_epoch(before: &Status, after: &Status) {
        assert_ne!(before.epoch, after.epoch, "R14: a return in the same epoch");
    }

    /// R15: whom the newest superblock present calls in-sync has been there.
    pub(crate) fn r15_no_start_on_what_may_be_old(disks: &[SimDisk]) {
        let present: Vec<Superblock> = disks.iter().filter_map(superblock_on).collect();
        let newest = present
            .iter()
            .max_by_key(|superblock| superblock.event_count);
        for slot in newest.into_iter().flat_map(|newest| &newest.slots) {
            if slot.state == SlotState::InSync {
                assert!(
                    present.iter().any(|own| Some(own.member) == slot.member),
                    "R15: started without a member that the newest superblock calls in-sync"
                );
            }
        }
    }
}

impl Observer for Rules {
    fn submitted(&self, disk: &SimDisk, request: &DiskRequest<SimBuffer>) {
        let all = self.known.borrow();
        let Some(known) = all.iter().find(|known| known.disk.is_same(disk)) else {
            return;
        };
        match request {
            DiskRequest::Write { offset, span, .. } => {
                Self::r6_r13_one_change_at_a_time(disk, *offset, span.len as u64);
                if *offset >= self.layout.data_offset {
                    self.r1_intent_first(known, *offset, span);
                }
            }
            DiskRequest::WriteZeroes { offset, len } | DiskRequest::Discard { offset, len } => {
                Self::r6_r13_one_change_at_a_time(disk, *offset, *len);
            }
            DiskRequest::Read { .. } | DiskRequest::Flush => {}
        }
    }

    fn completed(&self, disk: &SimDisk, request: &DiskRequest<SimBuffer>) {
        let DiskRequest::Write { offset, span, .. } = request else {
            return;
        };
        if *offset >= self.layout.data_offset {
            return;
        }
        let mut all = self.known.borrow_mut();
        let Some(at) = all.iter().position(|known| known.disk.is_same(disk)) else {
            return;
        };
        if [COPY_A_OFFSET, COPY_B_OFFSET].contains(offset) {
            let superblock = span.read(|bytes| Superblock::decode(bytes).ok());
            superblock.iter().for_each(Self::r8_somebody_is_in_sync);
            superblock
                .iter()
                .for_each(|superblock| Self::newer_than_the_other_copy(disk, *offset, superblock));
            superblock
                .iter()
                .for_each(|superblock| self.r10_one_meaning(superblock));
            all[at].superblock = superblock;
            return;
        }
        let covered = self.extents_in(*offset, span.len as u64);
        let before = all[at].states[covered.clone()].to_vec();
        let news = span.read(|bytes| self.learn(&mut all[at], *offset, bytes));
        let now = all[at].states[covered.clone()].to_vec();
        for (extent, (before, now)) in covered.zip(before.into_iter().zip(now)) {
            match (before, now) {
                (ExtentState::Hot, ExtentState::Cool) => self.r3_equal_when_cool(&all, extent),
                // A discarded one may come back with its data: a discard that failed.
                (ExtentState::Unwritten, ExtentState::Hot) => {
                    self.r11_zeroed_before_use(&all, disk, extent);
                }
                _ => {}
            }
        }
        for (kind, slot, index, before, now) in news {
            let Some(before) = before.filter(|_| kind == RegionKind::Missed) else {
                continue;
            };
            let first = u64::from(index) * dirty_map::MISSED_PER_SECTOR;
            let bytes = (0_u64..).zip(before.iter().zip(&now));
            let cleared = bytes.filter(|(_, (before, now))| *before & !*now != 0);
            let bits = cleared.flat_map(|(byte, (before, now))| {
                let gone = before & !now;
                let bits = (0..8).filter(move |bit| gone >> bit & 1 == 1);
                bits.map(move |bit| first + byte * 8 + bit)
            });
            for block in bits.take(CLEARED_MAX) {
                self.r4_copied_before_cleared(&all, &all[at], slot, block);
            }
        }
    }
}
