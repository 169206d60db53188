//! A missed map: the blocks that one absent or resyncing member lacks.
//!
//! Three levels. A page is 32768 bits, a node 512 pages (64 GiB of device); a page or node
//! that is all clear or all set is one word. So uniform parts take no memory, and finding and
//! counting cost what is set.

use crate::sector::PAYLOAD_BYTES;
use std::ops::Range;

/// Missed bits in a map sector.
pub const MISSED_PER_SECTOR: u64 = PAYLOAD_BYTES as u64 * 8;

const WORDS_PER_PAGE: usize = 512;
const BITS_PER_PAGE: u64 = WORDS_PER_PAGE as u64 * 64;
const PAGES_PER_NODE: usize = 512;
const BITS_PER_NODE: u64 = BITS_PER_PAGE * PAGES_PER_NODE as u64;
const WORDS_PER_SECTOR: u64 = PAYLOAD_BYTES as u64 / 8;

#[derive(Clone, Debug)]
enum Page {
    Clear,
    Set,
    Mixed {
        words: Box<[u64; WORDS_PER_PAGE]>,
        count: u32,
    },
}

#[derive(Clone, Debug)]
enum Node {
    Clear,
    Set,
    Mixed {
        pages: Box<[Page; PAGES_PER_NODE]>,
        count: u64,
    },
}

/// One bit a block.
#[derive(Clone, Debug)]
pub struct MissedMap {
    blocks: u64,
    nodes: Vec<Node>,
    count: u64,
}

impl MissedMap {
    /// Nothing missed, for a device of `blocks` blocks.
    #[must_use]
    pub fn new(blocks: u64) -> Self {
        Self {
            blocks,
            nodes: vec![Node::Clear; small(blocks.div_ceil(BITS_PER_NODE))],
            count: 0,
        }
    }

    /// Missed blocks.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether nothing is missed.
    #[must_use]
    pub fn is_clear(&self) -> bool {
        self.count == 0
    }

    /// Marks blocks as missed; returns how many were not before. Blocks beyond the device are
    /// ignored.
    pub fn set(&mut self, blocks: Range<u64>) -> u64 {
        let changed = self.change(blocks, true);
        self.count += changed;
        changed
    }

    /// Marks blocks as not missed; returns how many were before.
    pub fn clear(&mut self, blocks: Range<u64>) -> u64 {
        if self.count == 0 {
            return 0;
        }
        let changed = self.change(blocks, false);
        self.count -= changed;
        changed
    }

    /// Nothing is missed any more.
    pub fn clear_all(&mut self) {
        self.nodes.fill(Node::Clear);
        self.count = 0;
    }

    /// Everything is missed.
    pub fn set_all(&mut self) {
        self.set(0..self.blocks);
    }

    /// Whether `block` is missed.
    #[must_use]
    pub fn contains(&self, block: u64) -> bool {
        block < self.blocks && self.word(block / 64) >> (block % 64) & 1 != 0
    }

    /// Whether any of `blocks` is missed.
    #[must_use]
    pub fn any_in(&self, blocks: Range<u64>) -> bool {
        self.find(blocks.start..blocks.end, true).is_some()
    }

    /// How many of `blocks` are missed.
    #[must_use]
    pub fn count_in(&self, blocks: Range<u64>) -> u64 {
        let mut total = 0;
        let mut at = blocks.start;
        while let Some(run) = self.next_run(at, blocks.end.saturating_sub(at)) {
            if run.start >= blocks.end {
                break;
            }
            total += run.end.min(blocks.end) - run.start;
            at = run.end;
        }
        total
    }

    /// The first run of missed blocks at or after `from`, cut at `max` blocks.
    #[must_use]
    pub fn next_run(&self, from: u64, max: u64) -> Option<Range<u64>> {
        let start = self.find(from..self.blocks, true)?;
        let cut = start.saturating_add(max).min(self.blocks);
        Some(start..self.find(start..cut, false).unwrap_or(cut))
    }

    /// Map sectors that it takes.
    #[must_use]
    pub fn sectors(&self) -> u32 {
        u32::try_from(self.blocks.div_ceil(MISSED_PER_SECTOR)).unwrap_or(u32::MAX)
    }

    /// The payload of sector `sector`; blocks beyond the device are zero.
    pub fn write_payload(&self, sector: u32, out: &mut [u8; PAYLOAD_BYTES]) {
        let first = u64::from(sector) * WORDS_PER_SECTOR;
        for (at, bytes) in (first..).zip(out.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&(self.word(at) & self.valid(at)).to_le_bytes());
        }
    }

    /// Takes the bits of sector `sector`; those beyond the device are ignored.
    pub fn load_payload(&mut self, sector: u32, payload: &[u8; PAYLOAD_BYTES]) {
        let first = u64::from(sector) * WORDS_PER_SECTOR;
        for (at, bytes) in (first..).zip(payload.chunks_exact(8)) {
            let valid = self.valid(at);
            if valid == 0 {
                return;
            }
            let mut word = [0; 8];
            word.copy_from_slice(bytes);
            self.load_word(at, u64::from_le_bytes(word) & valid, valid);
        }
    }

    /// Marks every block of sector `sector` as missed.
    pub fn set_sector(&mut self, sector: u32) {
        let first = u64::from(sector) * MISSED_PER_SECTOR;
        self.set(first..first + MISSED_PER_SECTOR);
    }

    /// Bytes of memory in use.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        let mixed_nodes = self.nodes.iter().filter_map(|node| match node {
            Node::Mixed { pages, .. } => Some(&**pages),
            _ => None,
        });
        let pages = |pages: &[Page; PAGES_PER_NODE]| {
            let mixed = pages
                .iter()
                .filter(|page| matches!(page, Page::Mixed { .. }))
                .count();
            size_of::<[Page; PAGES_PER_NODE]>() + mixed * WORDS_PER_PAGE * 8
        };
        self.nodes.capacity() * size_of::<Node>() + mixed_nodes.map(pages).sum::<usize>()
    }

    fn change(&mut self, blocks: Range<u64>, value: bool) -> u64 {
        let end = blocks.end.min(self.blocks);
        let mut at = blocks.start;
        let mut changed = 0;
        while at < end {
            let node = at / BITS_PER_NODE;
            let start = node * BITS_PER_NODE;
            let stop = end.min(start + BITS_PER_NODE);
            let size = (self.blocks - start).min(BITS_PER_NODE);
            changed += self.nodes[small(node)].change(at - start..stop - start, value, size);
            at = stop;
        }
        changed
    }

    /// Gives the blocks of word `at` the bits `new`; `valid` are those that exist.
    fn load_word(&mut self, at: u64, new: u64, valid: u64) {
        let old = self.word(at) & valid;
        if old == new {
            return;
        }
        let start = at * 64;
        if new == 0 {
            self.clear(start..start + 64);
        } else if new == valid {
            self.set(start..start + 64);
        } else {
            let node = start / BITS_PER_NODE;
            let size = (self.blocks - node * BITS_PER_NODE).min(BITS_PER_NODE);
            self.nodes[small(node)].flip(start % BITS_PER_NODE, old ^ new, size);
            self.count = self.count - u64::from(old.count_ones()) + u64::from(new.count_ones());
        }
    }

    /// The first of `blocks` whose bit is `value`.
    fn find(&self, blocks: Range<u64>, value: bool) -> Option<u64> {
        let end = blocks.end.min(self.blocks);
        let mut at = blocks.start;
        while at < end {
            let node = at / BITS_PER_NODE;
            let start = node * BITS_PER_NODE;
            if let Some(found) = self.nodes[small(node)].find(at - start, value) {
                return Some(start + found).filter(|&found| found < end);
            }
            at = start + BITS_PER_NODE;
        }
        None
    }

    fn word(&self, at: u64) -> u64 {
        let bit = at * 64;
        match self.nodes.get(small(bit / BITS_PER_NODE)) {
            None | Some(Node::Clear) => 0,
            Some(Node::Set) => u64::MAX,
            Some(Node::Mixed { pages, .. }) => {
                match &pages[small(bit % BITS_PER_NODE / BITS_PER_PAGE)] {
                    Page::Clear => 0,
                    Page::Set => u64::MAX,
                    Page::Mixed { words, .. } => words[small(bit % BITS_PER_PAGE / 64)],
                }
            }
        }
    }

    /// The bits of word `at` that stand for blocks of the device.
    fn valid(&self, at: u64) -> u64 {
        match self.blocks.saturating_sub(at * 64) {
            0 => 0,
            left if left >= 64 => u64::MAX,
            left => (1 << left) - 1,
        }
    }
}

impl Node {
    /// Changes bits `range` of a node of `size` bits; returns how many changed.
    fn change(&mut self, range: Range<u64>, value: bool, size: u64) -> u64 {
        let count = match self {
            Self::Clear => 0,
            Self::Set => size,
            Self::Mixed { count, .. } => *count,
        };
        if range.start == 0 && range.end == size {
            *self = if value { Self::Set } else { Self::Clear };
            return if value { size - count } else { count };
        }
        if (value && count == size) || (!value && count == 0) {
            return 0;
        }
        let (pages, count) = self.make_mixed(size);
        let mut changed = 0;
        let mut at = range.start;
        while at < range.end {
            let page = at / BITS_PER_PAGE;
            let start = page * BITS_PER_PAGE;
            let stop = range.end.min(start + BITS_PER_PAGE);
            let page_size = (size - start).min(BITS_PER_PAGE);
            changed += pages[small(page)].change(at - start..stop - start, value, page_size);
            at = stop;
        }
        let now = if value {
            *count + changed
        } else {
            *count - changed
        };
        self.settle(now, size);
        changed
    }

    /// Turns over the bits `flips` of the word at bit `at`.
    fn flip(&mut self, at: u64, flips: u64, size: u64) {
        let (pages, count) = self.make_mixed(size);
        let start = at / BITS_PER_PAGE * BITS_PER_PAGE;
        let page = &mut pages[small(at / BITS_PER_PAGE)];
        let (cleared, set) = page.flip(at - start, flips, (size - start).min(BITS_PER_PAGE));
        let now = *count - u64::from(cleared) + u64::from(set);
        self.settle(now, size);
    }

    fn make_mixed(&mut self, size: u64) -> (&mut [Page; PAGES_PER_NODE], &mut u64) {
        let (page, uniform) = match self {
            Self::Set => (Page::Set, size),
            _ => (Page::Clear, 0),
        };
        if !matches!(self, Self::Mixed { .. }) {
            *self = Self::Mixed {
                pages: Box::new(std::array::from_fn(|_| page.clone())),
                count: uniform,
            };
        }
        match self {
            Self::Mixed { pages, count } => (pages, count),
            _ => unreachable!("made mixed above"),
        }
    }

    /// Takes the new count, and becomes uniform when it says so.
    fn settle(&mut self, now: u64, size: u64) {
        if now == 0 {
            *self = Self::Clear;
        } else if now == size {
            *self = Self::Set;
        } else if let Self::Mixed { count, .. } = self {
            *count = now;
        }
    }

    fn find(&self, from: u64, value: bool) -> Option<u64> {
        match self {
            Self::Clear => (!value).then_some(from),
            Self::Set => value.then_some(from),
            Self::Mixed { pages, .. } => {
                let mut at = from;
                while at < BITS_PER_NODE {
                    let page = at / BITS_PER_PAGE;
                    let start = page * BITS_PER_PAGE;
                    if let Some(found) = pages[small(page)].find(at - start, value) {
                        return Some(start + found);
                    }
                    at = start + BITS_PER_PAGE;
                }
                None
            }
        }
    }
}

impl Page {
    fn change(&mut self, range: Range<u64>, value: bool, size: u64) -> u64 {
        let size = u32::try_from(size).unwrap_or(u32::MAX);
        let count = match self {
            Self::Clear => 0,
            Self::Set => size,
            Self::Mixed { count, .. } => *count,
        };
        if (value && count == size) || (!value && count == 0) {
            return 0;
        }
        let (words, count) = self.make_mixed(size);
        let mut changed = 0;
        let mut at = range.start;
        while at < range.end {
            let stop = range.end.min((at / 64 + 1) * 64);
            let mask = (u64::MAX >> (64 - (stop - at))) << (at % 64);
            let word = &mut words[small(at / 64)];
            let flips = if value { mask & !*word } else { mask & *word };
            *word ^= flips;
            changed += flips.count_ones();
            at = stop;
        }
        let now = if value {
            *count + changed
        } else {
            *count - changed
        };
        self.settle(now, size);
        u64::from(changed)
    }

    /// Turns over the bits `flips` of the word at bit `at`; returns how many became clear and
    /// how many set.
    fn flip(&mut self, at: u64, flips: u64, size: u64) -> (u32, u32) {
        let size = u32::try_from(size).unwrap_or(u32::MAX);
        let (words, count) = self.make_mixed(size);
        let word = &mut words[small(at / 64)];
        let changed = ((*word & flips).count_ones(), (!*word & flips).count_ones());
        *word ^= flips;
        let now = *count - changed.0 + changed.1;
        self.settle(now, size);
        changed
    }

    fn make_mixed(&mut self, size: u32) -> (&mut [u64; WORDS_PER_PAGE], &mut u32) {
        let (word, uniform) = match self {
            Self::Set => (u64::MAX, size),
            _ => (0, 0),
        };
        if !matches!(self, Self::Mixed { .. }) {
            *self = Self::Mixed {
                words: Box::new([word; WORDS_PER_PAGE]),
                count: uniform,
            };
        }
        match self {
            Self::Mixed { words, count } => (words, count),
            _ => unreachable!("made mixed above"),
        }
    }

    /// Takes the new count, and becomes uniform when it says so.
    fn settle(&mut self, now: u32, size: u32) {
        if now == 0 {
            *self = Self::Clear;
        } else if now == size {
            *self = Self::Set;
        } else if let Self::Mixed { count, .. } = self {
            *count = now;
        }
    }

    fn find(&self, from: u64, value: bool) -> Option<u64> {
        match self {
            Self::Clear => (!value).then_some(from),
            Self::Set => value.then_some(from),
            Self::Mixed { words, .. } => {
                let flip = if value { 0 } else { u64::MAX };
                let first = small(from / 64);
                let mut mask = u64::MAX << (from % 64);
                for (at, word) in (first as u64..).zip(&words[first..]) {
                    let hits = (word ^ flip) & mask;
                    if hits != 0 {
                        return Some(at * 64 + u64::from(hits.trailing_zeros()));
                    }
                    mask = u64::MAX;
                }
                None
            }
        }
    }
}

/// Indexes here are bounded by the number of nodes, pages or words.
fn small(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
#[path = "missed_tests.rs"]
mod levels;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use bitvec::prelude::{BitVec, Lsb0};
    use proptest::prelude::*;

    const TIB: u64 = 1 << 28;

    #[test]
    fn uniform_maps_take_no_memory() {
        for tib in [1, 16, 256] {
            let mut map = MissedMap::new(tib * TIB);
            let empty = map.memory_bytes();
            assert!(empty < 1024 * small(tib), "{empty}");
            map.set_all();
            assert_eq!((map.count(), map.memory_bytes()), (tib * TIB, empty));
            assert_eq!(map.next_run(5, u64::MAX), Some(5..tib * TIB));
            map.clear(tib * TIB / 2..tib * TIB / 2 + 1);
            assert!(map.memory_bytes() < empty + 32768);
            map.clear_all();
            assert_eq!(map.memory_bytes(), empty);
        }
    }

    #[test]
    fn random_bits_everywhere_take_33_mib_a_tib() {
        let mut map = MissedMap::new(TIB);
        for block in (0..TIB).step_by(2048) {
            map.set(block..block + 1);
        }
        assert!(map.memory_bytes() <= 33 << 20, "{}", map.memory_bytes());
    }

    #[test]
    fn an_odd_last_page_becomes_uniform() {
        let mut map = MissedMap::new(BITS_PER_NODE + 1000);
        map.set(BITS_PER_NODE..BITS_PER_NODE + 999);
        map.set(0..BITS_PER_NODE + 5000);
        assert_eq!(map.count(), BITS_PER_NODE + 1000);
        assert_eq!(
            map.memory_bytes(),
            MissedMap::new(BITS_PER_NODE + 1000).memory_bytes()
        );
        assert_eq!(map.next_run(0, u64::MAX), Some(0..BITS_PER_NODE + 1000));
        assert_eq!(map.next_run(BITS_PER_NODE + 1000, 1), None);
    }

    #[test]
    fn bits_beyond_the_device_are_ignored() {
        for blocks in [1, 63, 64, 70, 3839, 3841] {
            let mut map = MissedMap::new(blocks);
            for sector in 0..map.sectors() {
                map.load_payload(sector, &[0xfe; PAYLOAD_BYTES]);
            }
            let want = (0..blocks).filter(|block| block % 8 != 0).count() as u64;
            assert_eq!(map.count(), want, "{blocks} blocks");
            assert_eq!(map.count_in(0..blocks), want, "{blocks} blocks");
            map.set_all();
            assert_eq!(map.count(), blocks);
            map.load_payload(0, &[0; PAYLOAD_BYTES]);
            assert_eq!(map.count(), blocks.saturating_sub(MISSED_PER_SECTOR));
        }
    }

    proptest! {
        #[test]
        fn agrees_with_a_bit_vector(
            blocks in 1u64..200_000,
            changes in proptest::collection::vec((any::<u64>(), 0u64..70_000, any::<bool>()), 0..60),
        ) {
            let mut map = MissedMap::new(blocks);
            let mut plain: BitVec<u64, Lsb0> = BitVec::repeat(false, small(blocks));
            for (start, len, value) in changes {
                let start = start % blocks;
                let end = (start + len).min(blocks);
                let part = &mut plain[small(start)..small(end)];
                let have = part.count_ones() as u64;
                part.fill(value);
                if value {
                    prop_assert_eq!(map.set(start..start + len), end - start - have);
                } else {
                    prop_assert_eq!(map.clear(start..start + len), have);
                }
            }
            prop_assert_eq!(map.count(), plain.count_ones() as u64);
            prop_assert_eq!(map.count_in(blocks / 3..blocks), plain[small(blocks / 3)..].count_ones() as u64);
            let mut copy = MissedMap::new(blocks);
            for sector in 0..map.sectors() {
                let mut payload = [0; PAYLOAD_BYTES];
                map.write_payload(sector, &mut payload);
                copy.load_payload(sector, &payload);
            }
            // A load replaces what the sector's blocks were, whatever that was.
            let mut over = MissedMap::new(blocks);
            over.set(blocks / 4..blocks);
            over.clear(blocks / 2..blocks / 2 + 100);
            for sector in 0..map.sectors() {
                let mut payload = [0xff; PAYLOAD_BYTES];
                map.write_payload(sector, &mut payload);
                over.load_payload(sector, &payload);
            }
            prop_assert_eq!(over.count(), plain.count_ones() as u64);
            prop_assert_eq!(over.memory_bytes(), copy.memory_bytes());
            for block in (0..blocks + 70).step_by(61) {
                let want = plain.get(small(block)).is_some_and(|bit| *bit);
                prop_assert_eq!(map.contains(block), want);
                let some = plain.iter().skip(small(block)).take(90).any(|bit| *bit);
                prop_assert_eq!(map.any_in(block..block + 90), some);
            }
            for map in [&map, &copy, &over] {
                let mut rebuilt: BitVec<u64, Lsb0> = BitVec::repeat(false, small(blocks));
                let mut from = 0;
                while let Some(run) = map.next_run(from, 777) {
                    prop_assert!(run.start >= from && run.end - run.start <= 777);
                    rebuilt[small(run.start)..small(run.end)].fill(true);
                    from = run.end;
                }
                prop_assert!(rebuilt == plain);
            }
        }
    }
}
