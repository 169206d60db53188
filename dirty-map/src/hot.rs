//! What is known in memory of hot extents: writes in flight, the unflushed set U, and the
//! blocks that an unclean stop left un-equalised.
//!
//! U has two parts. Blocks written since the last flush began are *unflushed*; when a flush
//! begins they move to *flushing*, and leave when it has completed everywhere. A loss makes
//! both parts, and what is un-equalised, missed by the lost member.
//!
//! Memory is bounded: masks of single blocks come from a pool; when the pool's cap is reached,
//! a mask stands for its whole extent. That is always safe (more is copied, equalised or
//! flushed than needed) and never wrong.
//!
//! Extents are found again for cooling without looking at all of them: each write second has a
//! bucket, and only extents in buckets that have become old enough are looked at.

use crate::units::{BLOCKS_PER_EXTENT, Block, Extent};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;
use std::time::Duration;

/// Bytes that the state of hot extents may take, unless told otherwise.
pub const HOT_CAP_BYTES: usize = 256 << 20;

const WORDS: usize = 16;
const MASK_BYTES: usize = WORDS * 8;
/// An extent's entry with its share of the table and of the buckets.
const ENTRY_BYTES: usize = 160;

type Words = Box<[u64; WORDS]>;

/// A set of blocks of one extent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Mask {
    #[default]
    None,
    Some(Words),
    All,
}

/// Masks that are free, and how many may be made.
#[derive(Debug)]
struct Pool {
    free: Vec<Words>,
    made: usize,
    cap: usize,
}

impl Pool {
    fn take(&mut self) -> Option<Words> {
        if let Some(mut words) = self.free.pop() {
            words.fill(0);
            return Some(words);
        }
        if self.made >= self.cap {
            return None;
        }
        self.made += 1;
        Some(Box::new([0; WORDS]))
    }

    fn give(&mut self, mask: Mask) {
        if let Mask::Some(words) = mask {
            self.free.push(words);
        }
    }
}

/// Calls `visit` with each word that `range` (bits of one extent) touches and its mask.
fn for_words(range: &Range<u64>, mut visit: impl FnMut(usize, u64)) {
    let mut at = range.start;
    while at < range.end {
        let stop = range.end.min((at / 64 + 1) * 64);
        let mask = (u64::MAX >> (64 - (stop - at))) << (at % 64);
        visit(usize::try_from(at / 64).unwrap_or(0), mask);
        at = stop;
    }
}

impl Mask {
    fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }

    fn count(&self) -> u64 {
        match self {
            Self::None => 0,
            Self::Some(words) => words.iter().map(|word| u64::from(word.count_ones())).sum(),
            Self::All => BLOCKS_PER_EXTENT,
        }
    }

    fn add(&mut self, range: &Range<u64>, pool: &mut Pool) {
        if range.is_empty() || matches!(self, Self::All) {
            return;
        }
        if range.end - range.start == BLOCKS_PER_EXTENT {
            pool.give(std::mem::replace(self, Self::All));
            return;
        }
        if self.is_none() {
            *self = pool.take().map_or(Self::All, Self::Some);
        }
        if let Self::Some(words) = self {
            for_words(range, |at, mask| words[at] |= mask);
        }
    }

    /// Takes blocks out; a mask that stands for its extent as a whole keeps them when there is
    /// no memory to be exact.
    fn take_out(&mut self, range: &Range<u64>, pool: &mut Pool) {
        if range.end - range.start == BLOCKS_PER_EXTENT {
            pool.give(std::mem::take(self));
            return;
        }
        if matches!(self, Self::All)
            && let Some(mut words) = pool.take()
        {
            words.fill(u64::MAX);
            *self = Self::Some(words);
        }
        if let Self::Some(words) = self {
            for_words(range, |at, mask| words[at] &= !mask);
            if words.iter().all(|&word| word == 0) {
                pool.give(std::mem::take(self));
            }
        }
    }

    /// Moves everything from `other` into this mask.
    fn absorb(&mut self, other: &mut Self, pool: &mut Pool) {
        match (&mut *self, std::mem::take(other)) {
            (_, Self::None) | (Self::All, Self::All) => {}
            (Self::All, other) => pool.give(other),
            (Self::None, other) => *self = other,
            (Self::Some(_), Self::All) => pool.give(std::mem::replace(self, Self::All)),
            (Self::Some(words), Self::Some(more)) => {
                for (word, more) in words.iter_mut().zip(more.iter()) {
                    *word |= more;
                }
                pool.give(Self::Some(more));
            }
        }
    }

    fn touches(&self, range: &Range<u64>) -> bool {
        let mut found = false;
        match self {
            Self::None => {}
            Self::All => found = !range.is_empty(),
            Self::Some(words) => for_words(range, |at, mask| found |= words[at] & mask != 0),
        }
        found
    }

    fn word(&self, at: usize) -> u64 {
        match self {
            Self::None => 0,
            Self::All => u64::MAX,
            Self::Some(words) => words[at],
        }
    }
}

/// Spreads consecutive extent numbers over a table.
#[derive(Clone, Copy, Debug, Default)]
struct ExtentHasher(u64);

impl Hasher for ExtentHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u32(u32::from(byte));
        }
    }
    fn write_u32(&mut self, number: u32) {
        let mixed = (self.0 ^ u64::from(number)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ mixed >> 29;
    }
}

#[derive(Debug, Default)]
struct Entry {
    in_flight: u32,
    last_write: Duration,
    unflushed: Mask,
    flushing: Mask,
    unequalised: Mask,
}

impl Entry {
    fn is_quiet(&self, now: Duration, quiet: Duration) -> bool {
        self.in_flight == 0
            && self.unequalised.is_none()
            && self.last_write.saturating_add(quiet) <= now
    }

    fn is_flushed(&self) -> bool {
        self.unflushed.is_none() && self.flushing.is_none()
    }
}

/// The state of all hot extents. Times are given by the caller and must not go back.
#[derive(Debug)]
pub struct HotExtents {
    entries: HashMap<Extent, Entry, BuildHasherDefault<ExtentHasher>>,
    pool: Pool,
    /// Extents that got unflushed blocks since the last flush began; may name one twice.
    written: Vec<Extent>,
    /// Extents with blocks under the flush that runs.
    flushing: Vec<Extent>,
    unequalised: BTreeSet<Extent>,
    unequalised_blocks: u64,
    /// Extents by the time of a write; only the entry's own time counts.
    buckets: VecDeque<(Duration, Vec<Extent>)>,
    /// Extents out of old buckets that have not cooled yet, with the time of their last write.
    ripe: BTreeSet<(Duration, Extent)>,
}

impl HotExtents {
    /// No hot extents; their masks may take `cap_bytes`.
    #[must_use]
    pub fn new(cap_bytes: usize) -> Self {
        Self {
            entries: HashMap::default(),
            pool: Pool {
                free: Vec::new(),
                made: 0,
                cap: cap_bytes / MASK_BYTES,
            },
            written: Vec::new(),
            flushing: Vec::new(),
            unequalised: BTreeSet::new(),
            unequalised_blocks: 0,
            buckets: VecDeque::new(),
            ripe: BTreeSet::new(),
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
            last_write: now,
            ..Entry::default()
        };
        let before = self.entries.insert(extent, entry);
        assert!(before.is_none(), "{extent:?} is hot already");
        self.enter_bucket(extent, now);
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
            self.unequalised_blocks -= entry.unequalised.count();
            self.unequalised.remove(&extent);
            for mask in [entry.unflushed, entry.flushing, entry.unequalised] {
                self.pool.give(mask);
            }
        }
    }

    /// A write in a hot extent begins.
    pub fn begin_write(&mut self, extent: Extent, now: Duration) {
        let moved = {
            let entry = self.entry(extent);
            entry.in_flight += 1;
            std::mem::replace(&mut entry.last_write, now) != now
        };
        if moved {
            self.enter_bucket(extent, now);
        }
    }

    /// A write has ended on all receiving members: its blocks (numbers on the device) are
    /// unflushed.
    pub fn end_write(&mut self, extent: Extent, blocks: Range<u64>, now: Duration) {
        let blocks = within(extent, &blocks);
        let (moved, first) = {
            let Self { entries, pool, .. } = self;
            let Some(entry) = entries.get_mut(&extent) else {
                unreachable!("{extent:?} cannot cool with a write in flight")
            };
            entry.in_flight -= 1;
            let first = entry.unflushed.is_none() && !blocks.is_empty();
            entry.unflushed.add(&blocks, pool);
            (std::mem::replace(&mut entry.last_write, now) != now, first)
        };
        if first {
            self.written.push(extent);
        }
        if moved {
            self.enter_bucket(extent, now);
        }
    }

    /// A flush begins: what is unflushed is under it now.
    pub fn begin_flush(&mut self) {
        for extent in std::mem::take(&mut self.written) {
            let Some(entry) = self.entries.get_mut(&extent) else {
                continue;
            };
            entry.flushing.absorb(&mut entry.unflushed, &mut self.pool);
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
                self.pool.give(std::mem::take(&mut entry.flushing));
            } else {
                entry.unflushed.absorb(&mut entry.flushing, &mut self.pool);
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
        let before = entry.unequalised.count();
        entry.unequalised.add(&blocks, pool);
        self.unequalised_blocks += entry.unequalised.count() - before;
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
            let before = entry.unequalised.count();
            entry
                .unequalised
                .take_out(&within(extent, &blocks), &mut self.pool);
            self.unequalised_blocks -= before - entry.unequalised.count();
            if entry.unequalised.is_none() {
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
            entry.is_some_and(|e| e.unequalised.touches(&within(extent, &blocks)))
        })
    }

    /// The first run of blocks within one extent, at or after block `from`, that may differ.
    #[must_use]
    pub fn next_unequalised(&self, from: Option<u64>) -> Option<Range<u64>> {
        let from = from.unwrap_or(0);
        self.unequalised
            .range(Block(from).extent()..)
            .find_map(|&extent| {
                let mask = &self.entries.get(&extent)?.unequalised;
                let mut found = None;
                let start = from.saturating_sub(extent.blocks().start);
                for_runs(
                    |at| mask.word(at),
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
            let word = |at| {
                entry.unflushed.word(at) | entry.flushing.word(at) | entry.unequalised.word(at)
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
        self.ripen(now, quiet);
        let entries = &self.entries;
        let may = |extent: &Extent| {
            entries
                .get(extent)
                .is_some_and(|e| e.is_quiet(now, quiet) && e.is_flushed())
        };
        self.ripe
            .iter()
            .map(|&(_, extent)| extent)
            .filter(may)
            .take(max)
            .collect()
    }

    /// Whether any block was written since the last flush began.
    #[must_use]
    pub fn is_unflushed(&self) -> bool {
        !self.written.is_empty()
    }

    /// Upper bound of the bytes in use.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.pool.made * MASK_BYTES + self.entries.len() * ENTRY_BYTES
    }

    /// Moves extents out of buckets that are old enough; those written since stay with their
    /// newer bucket.
    fn ripen(&mut self, now: Duration, quiet: Duration) {
        let Self {
            entries,
            ripe,
            buckets,
            ..
        } = self;
        let is_old = |bucket: &mut (Duration, Vec<Extent>)| bucket.0.saturating_add(quiet) <= now;
        while let Some((time, extents)) = buckets.pop_front_if(is_old) {
            ripe.extend(extents.into_iter().map(|extent| (time, extent)));
        }
        ripe.retain(|(time, extent)| entries.get(extent).is_some_and(|e| e.last_write == *time));
    }

    fn enter_bucket(&mut self, extent: Extent, now: Duration) {
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

/// Calls `visit` with each run of set bits in the sixteen words.
fn for_runs(word: impl Fn(usize) -> u64, mut visit: impl FnMut(Range<u64>)) {
    let mut open: Option<u64> = None;
    for (at, base) in (0..WORDS).zip((0_u64..).step_by(64)) {
        let bits = word(at);
        let uniform = if open.is_some() { u64::MAX } else { 0 };
        if bits == uniform {
            continue;
        }
        for bit in 0..64 {
            let set = bits >> bit & 1 != 0;
            match open {
                None if set => open = Some(base + bit),
                Some(start) if !set => {
                    visit(start..base + bit);
                    open = None;
                }
                _ => {}
            }
        }
    }
    if let Some(start) = open {
        visit(start..BLOCKS_PER_EXTENT);
    }
}

#[cfg(test)]
#[path = "hot_tests.rs"]
mod tests;
