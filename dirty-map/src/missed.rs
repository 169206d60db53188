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
        self.next_run(block, 1)
            .is_some_and(|run| run.start == block)
    }

    /// Whether any of `blocks` is missed.
    #[must_use]
    pub fn any_in(&self, blocks: Range<u64>) -> bool {
        self.find(blocks.start, true)
            .is_some_and(|found| found < blocks.end)
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
        let start = self.find(from, true)?;
        let end = self.find(start, false).unwrap_or(self.blocks);
        Some(start..end.min(start.saturating_add(max)))
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
        let first = u64::from(sector) * MISSED_PER_SECTOR;
        self.clear(first..first + MISSED_PER_SECTOR);
        for (at, bytes) in (first..).step_by(64).zip(payload.chunks_exact(8)) {
            let mut word = [0; 8];
            word.copy_from_slice(bytes);
            let mut left = u64::from_le_bytes(word);
            while left != 0 {
                let start = left.trailing_zeros();
                let len = (!(left >> start)).trailing_zeros();
                self.set(at + u64::from(start)..at + u64::from(start + len));
                left &= u64::MAX.checked_shl(start + len).unwrap_or(0);
            }
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
            Node::Mixed { pages, .. } => Some(pages),
            _ => None,
        });
        let pages = |pages: &Box<[Page; PAGES_PER_NODE]>| {
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

    /// The first block at or after `from` whose bit is `value`.
    fn find(&self, from: u64, value: bool) -> Option<u64> {
        let mut at = from;
        while at < self.blocks {
            let node = at / BITS_PER_NODE;
            let start = node * BITS_PER_NODE;
            if let Some(found) = self.nodes[small(node)].find(at - start, value) {
                return Some(start + found).filter(|&found| found < self.blocks);
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
        if !matches!(self, Self::Mixed { .. }) {
            let page = if count == 0 { Page::Clear } else { Page::Set };
            *self = Self::Mixed {
                pages: Box::new(std::array::from_fn(|_| page.clone())),
                count,
            };
        }
        let Self::Mixed { pages, count } = self else {
            return 0;
        };
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
        *count = if value {
            *count + changed
        } else {
            *count - changed
        };
        if *count == 0 {
            *self = Self::Clear;
        } else if *count == size {
            *self = Self::Set;
        }
        changed
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
        if !matches!(self, Self::Mixed { .. }) {
            let word = if count == 0 { 0 } else { u64::MAX };
            *self = Self::Mixed {
                words: Box::new([word; WORDS_PER_PAGE]),
                count,
            };
        }
        let Self::Mixed { words, count } = self else {
            return 0;
        };
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
        *count = if value {
            *count + changed
        } else {
            *count - changed
        };
        if *count == 0 {
            *self = Self::Clear;
        } else if *count == size {
            *self = Self::Set;
        }
        u64::from(changed)
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
            for map in [&map, &copy] {
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
