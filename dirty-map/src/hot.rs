//! What is known in memory of hot extents: writes in flight, the unflushed set U, and the
//! blocks that an unclean stop left un-equalised.
//!
//! U has two parts. Blocks written since the last flush began are *unflushed*; when a flush
//! begins they move to *flushing*, and leave when it has completed everywhere. A loss makes
//! both parts, and what is un-equalised, missed by the lost member.
//!
//! Memory is bounded: masks of single blocks come from a pool; when the cap is reached, a mask
//! stands for its whole extent. That is always safe (more is copied, equalised or
//! flushed than needed) and never wrong.
//!
//! Extents are found again for cooling without looking at all of them: each write second has a
//! bucket, and only extents in buckets that have become old enough are looked at. An extent is put
//! into one when it becomes hot; one that was written since is moved to a later bucket when it is
//! looked at, so that it takes one place however often it is written.

use crate::hash::NumberHasher;
use crate::masks::{BlockMask, Mask, NONE, Pool, WORDS, for_runs};
use crate::units::{Block, Extent};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::BuildHasherDefault;
use std::ops::Range;
use std::time::Duration;

/// Bytes that the state of hot extents may take, unless told otherwise.
pub const HOT_CAP_BYTES: usize = 256 << 20;

/// What a hot extent takes besides masks: its entry in a table that may have just doubled, and
/// its places in a bucket and among the ripe.
const ENTRY_BYTES: usize = 104;

#[derive(Debug)]
struct Entry {
    last_write: Time,
    in_flight: u32,
    unflushed: Mask,
    flushing: Mask,
    unequalised: Mask,
}

/// A time in milliseconds: a third of a [`Duration`]'s size.
type Time = u64;

fn millis(time: Duration) -> Time {
    Time::try_from(time.as_millis()).unwrap_or(Time::MAX)
}

impl Entry {
    fn may_cool(&self, now: Time, quiet: Time) -> bool {
        self.in_flight == 0
            && [self.unequalised, self.unflushed, self.flushing] == [NONE; 3]
            && self.last_write.saturating_add(quiet) <= now
    }
}

/// The state of all hot extents. Times are given by the caller and must not go back.
#[derive(Debug)]
pub struct HotExtents {
    entries: HashMap<Extent, Entry, BuildHasherDefault<NumberHasher>>,
    pool: Pool,
    /// Extents that got unflushed blocks since the last flush began; may name one twice.
    written: Vec<Extent>,
    /// Extents with blocks under the flush that runs.
    flushing: Vec<Extent>,
    unequalised: BTreeSet<Extent>,
    unequalised_blocks: u64,
    /// Extents by the time of a write; only the entry's own time counts.
    buckets: VecDeque<(Time, Vec<Extent>)>,
    /// Extents out of old buckets that have not cooled yet, with the time of their last write.
    ripe: Vec<(Time, Extent)>,
    cap_bytes: usize,
}

impl HotExtents {
    /// No hot extents; their state may take `cap_bytes`: half for masks, half for the rest.
    #[must_use]
    pub fn new(cap_bytes: usize) -> Self {
        Self {
            entries: HashMap::default(),
            pool: Pool::new(cap_bytes / 2),
            written: Vec::new(),
            flushing: Vec::new(),
            unequalised: BTreeSet::new(),
            unequalised_blocks: 0,
            buckets: VecDeque::new(),
            ripe: Vec::new(),
            cap_bytes,
        }
    }

    /// Number of hot extents.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no extent is hot.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether `extent` is hot.
    #[must_use]
    pub fn contains(&self, extent: Extent) -> bool {
        self.entries.contains_key(&extent)
    }

    /// An extent became hot.
    pub fn insert(&mut self, extent: Extent, now: Duration) {
        let entry = Entry {
            last_write: millis(now),
            in_flight: 0,
            unflushed: NONE,
            flushing: NONE,
            unequalised: NONE,
        };
        let before = self.entries.insert(extent, entry);
        assert!(before.is_none(), "{extent:?} is hot already");
        self.enter_bucket(extent, millis(now));
    }

    /// An extent is not hot any more; whatever was known of its blocks is forgotten.
    ///
    /// # Panics
    ///
    /// When it is not hot or a write in it is in flight.
    pub fn remove(&mut self, extent: Extent) {
        let entry = self.entries.remove(&extent);
        assert!(entry.is_some(), "{extent:?} is not hot");
        if let Some(entry) = entry {
            assert_eq!(entry.in_flight, 0, "{extent:?} has writes in flight");
            self.unequalised_blocks -= self.pool.count(entry.unequalised);
            self.unequalised.remove(&extent);
            for mask in [entry.unflushed, entry.flushing, entry.unequalised] {
                self.pool.give(mask);
            }
        }
    }

    /// A write in a hot extent begins.
    pub fn begin_write(&mut self, extent: Extent, now: Duration) {
        let entry = self.entry(extent);
        entry.in_flight += 1;
        entry.last_write = millis(now);
    }

    /// A write has ended on all receiving members: its blocks (numbers on the device) are
    /// unflushed.
    pub fn end_write(&mut self, extent: Extent, blocks: Range<u64>, now: Duration) {
        let (blocks, now) = (within(extent, &blocks), millis(now));
        let first = {
            let Self { entries, pool, .. } = self;
            let Some(entry) = entries.get_mut(&extent) else {
                unreachable!("{extent:?} cannot cool with a write in flight")
            };
            entry.in_flight -= 1;
            let first = entry.unflushed == NONE && !blocks.is_empty();
            pool.add(&mut entry.unflushed, &blocks);
            entry.last_write = now;
            first
        };
        if first {
            self.written.push(extent);
        }
    }

    /// A flush begins: what is unflushed is under it now.
    pub fn begin_flush(&mut self) {
        for extent in std::mem::take(&mut self.written) {
            let Some(entry) = self.entries.get_mut(&extent) else {
                continue;
            };
            self.pool.absorb(&mut entry.flushing, &mut entry.unflushed);
            self.flushing.push(extent);
        }
    }

    /// The flush has ended; unless it succeeded, its blocks are unflushed again.
    pub fn end_flush(&mut self, succeeded: bool) {
        for extent in std::mem::take(&mut self.flushing) {
            let Some(entry) = self.entries.get_mut(&extent) else {
                continue;
            };
            if succeeded {
                self.pool.give(std::mem::replace(&mut entry.flushing, NONE));
            } else {
                self.pool.absorb(&mut entry.unflushed, &mut entry.flushing);
                self.written.push(extent);
            }
        }
    }

    /// Blocks (numbers on the device) may differ between members.
    pub fn set_unequalised(&mut self, extent: Extent, blocks: Range<u64>) {
        let blocks = within(extent, &blocks);
        if blocks.is_empty() {
            return;
        }
        let Self { entries, pool, .. } = self;
        let Some(entry) = entries.get_mut(&extent) else {
            unreachable!("{extent:?} is not hot")
        };
        let before = pool.count(entry.unequalised);
        pool.add(&mut entry.unequalised, &blocks);
        self.unequalised_blocks += pool.count(entry.unequalised) - before;
        self.unequalised.insert(extent);
    }

    /// All blocks of an extent may differ between members.
    pub fn set_unequalised_all(&mut self, extent: Extent) {
        self.set_unequalised(extent, extent.blocks());
    }

    /// Blocks (numbers on the device, of any extents) are equal on all in-sync members.
    pub fn clear_unequalised(&mut self, blocks: Range<u64>) {
        if blocks.is_empty() || self.unequalised_blocks == 0 {
            return;
        }
        for number in Block(blocks.start).extent().0..=Block(blocks.end - 1).extent().0 {
            let extent = Extent(number);
            let Some(entry) = self.entries.get_mut(&extent) else {
                continue;
            };
            let before = self.pool.count(entry.unequalised);
            self.pool
                .take_out(&mut entry.unequalised, &within(extent, &blocks));
            self.unequalised_blocks -= before - self.pool.count(entry.unequalised);
            if entry.unequalised == NONE {
                self.unequalised.remove(&extent);
            }
        }
    }

    /// Whether any of `blocks` may differ between members.
    #[must_use]
    pub fn is_unequalised(&self, blocks: Range<u64>) -> bool {
        if blocks.is_empty() || self.unequalised_blocks == 0 {
            return false;
        }
        let extents = Block(blocks.start).extent().0..=Block(blocks.end - 1).extent().0;
        extents.map(Extent).any(|extent| {
            let entry = self.entries.get(&extent);
            entry.is_some_and(|e| self.pool.touches(e.unequalised, &within(extent, &blocks)))
        })
    }

    /// The blocks of a hot extent, a bit each, that are unflushed, under a flush, or may differ
    /// between members.
    #[must_use]
    pub fn unsettled(&self, extent: Extent) -> BlockMask {
        let Some(entry) = self.entries.get(&extent) else {
            return [0; WORDS];
        };
        let masks = [entry.unflushed, entry.flushing, entry.unequalised];
        std::array::from_fn(|word| {
            let words = masks.iter().map(|&mask| self.pool.word(mask, word));
            words.fold(0, |all, word| all | word)
        })
    }

    /// The blocks of `mask`, as [`HotExtents::unsettled`] gave it before the extent was taken out,
    /// are unflushed, and may differ between members.
    pub fn unsettle(&mut self, extent: Extent, mask: &BlockMask, now: Duration) {
        let first = extent.blocks().start;
        for_runs(
            |word| mask[word],
            |run| {
                let blocks = first + run.start..first + run.end;
                self.set_unequalised(extent, blocks.clone());
                self.begin_write(extent, now);
                self.end_write(extent, blocks, now);
            },
        );
    }

    /// The first run of blocks within one extent, at or after block `from`, that may differ.
    #[must_use]
    pub fn next_unequalised(&self, from: Option<u64>) -> Option<Range<u64>> {
        let from = from.unwrap_or(0);
        self.unequalised
            .range(Block(from).extent()..)
            .find_map(|&extent| {
                let words = self.pool.words(self.entries.get(&extent)?.unequalised);
                let mut found = None;
                let start = from.saturating_sub(extent.blocks().start);
                for_runs(
                    |at| words[at],
                    |run| {
                        if found.is_none() && run.end > start {
                            found = Some(run.start.max(start)..run.end);
                        }
                    },
                );
                found.map(|run| extent.blocks().start + run.start..extent.blocks().start + run.end)
            })
    }

    /// How many blocks may differ between members.
    #[must_use]
    pub fn unequalised_blocks(&self) -> u64 {
        self.unequalised_blocks
    }

    /// Calls `visit` with each run of blocks that is unflushed, under a flush, or
    /// un-equalised: what a member that is lost now may lack besides what is in flight.
    pub fn for_each_unsafe(&self, mut visit: impl FnMut(Extent, Range<u64>)) {
        let listed: BTreeSet<Extent> = self
            .written
            .iter()
            .chain(&self.flushing)
            .chain(&self.unequalised)
            .copied()
            .collect();
        for extent in listed {
            let Some(entry) = self.entries.get(&extent) else {
                continue;
            };
            let masks = [entry.unflushed, entry.flushing, entry.unequalised];
            let word = |at| {
                masks
                    .iter()
                    .fold(0, |word, &mask| word | self.pool.word(mask, at))
            };
            let first = extent.blocks().start;
            for_runs(word, |run| {
                visit(extent, first + run.start..first + run.end)
            });
        }
    }

    /// A flush failed on every in-sync member: everything in U may differ now.
    pub fn unflushed_to_unequalised(&mut self) {
        let mut runs = Vec::new();
        self.for_each_unsafe(|extent, run| runs.push((extent, run)));
        for (extent, run) in runs {
            self.set_unequalised(extent, run);
        }
    }

    /// Extents, the longest quiet first and at most `max`, that had no write for `quiet` and
    /// have nothing in flight, in U, or un-equalised: those that may cool (R3).
    pub fn coolable(&mut self, now: Duration, quiet: Duration, max: usize) -> Vec<Extent> {
        let (now, quiet) = (millis(now), millis(quiet));
        self.ripen(now, quiet);
        let entries = &self.entries;
        let may = |extent: &Extent| entries.get(extent).is_some_and(|e| e.may_cool(now, quiet));
        let ripe = self.ripe.iter().map(|&(_, extent)| extent);
        ripe.filter(may).take(max).collect()
    }

    /// Whether nothing but time speaks against cooling `extent`.
    #[must_use]
    pub fn is_coolable(&self, extent: Extent) -> bool {
        self.entries
            .get(&extent)
            .is_some_and(|entry| entry.may_cool(Time::MAX, 0))
    }

    /// Whether any block was written since the last flush began.
    #[must_use]
    pub fn is_unflushed(&self) -> bool {
        !self.written.is_empty()
    }

    /// Bytes in use, rounded up; at most the cap while [`HotExtents::is_full`] is heeded.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.pool.bytes() + self.entries.len() * ENTRY_BYTES
    }

    /// Whether extents must cool before more become hot, or the cap will not hold.
    #[must_use]
    pub fn is_full(&self) -> bool {
        (self.entries.len() + 1) * ENTRY_BYTES > self.cap_bytes / 2
    }

    /// Moves extents out of buckets that are old enough; those written since go to a newer one.
    fn ripen(&mut self, now: Time, quiet: Time) {
        let Self {
            entries,
            ripe,
            buckets,
            ..
        } = self;
        let is_old = |bucket: &mut (Time, Vec<Extent>)| bucket.0.saturating_add(quiet) <= now;
        while let Some((time, extents)) = buckets.pop_front_if(is_old) {
            ripe.extend(extents.into_iter().map(|extent| (time, extent)));
        }
        let mut later = Vec::new();
        ripe.retain_mut(|(time, extent)| {
            let Some(entry) = entries.get(extent) else {
                return false;
            };
            *time = entry.last_write;
            let stays = time.saturating_add(quiet) <= now;
            if !stays {
                later.push((*time, *extent));
            }
            stays
        });
        // One that cooled and became hot again is there twice.
        ripe.sort_unstable();
        ripe.dedup();
        later.sort_unstable();
        later.dedup();
        for (time, extent) in later {
            match buckets.binary_search_by_key(&time, |bucket| bucket.0) {
                Ok(at) => buckets[at].1.push(extent),
                Err(at) => buckets.insert(at, (time, vec![extent])),
            }
        }
    }

    fn enter_bucket(&mut self, extent: Extent, now: Time) {
        match self.buckets.back_mut() {
            Some((time, extents)) if *time == now => extents.push(extent),
            _ => self.buckets.push_back((now, vec![extent])),
        }
    }

    fn entry(&mut self, extent: Extent) -> &mut Entry {
        match self.entries.get_mut(&extent) {
            Some(entry) => entry,
            None => unreachable!("{extent:?} is not hot"),
        }
    }
}

/// The part of `blocks` (numbers on the device) that lies in `extent`, counted from its start.
fn within(extent: Extent, blocks: &Range<u64>) -> Range<u64> {
    let own = extent.blocks();
    let start = blocks.start.max(own.start);
    let end = blocks.end.min(own.end).max(start);
    start - own.start..end - own.start
}

#[cfg(test)]
#[path = "hot_tests.rs"]
mod tests;
