//! Sets of blocks of one extent, a bit a block, of which so many may exist.

use crate::units::BLOCKS_PER_EXTENT;
use std::ops::Range;

pub(crate) const WORDS: usize = 16;

/// A bit for each block of an extent, the first one lowest in the first word.
pub type BlockMask = [u64; WORDS];
pub(crate) const MASK_BYTES: usize = size_of::<BlockMask>();

/// A set of blocks of one extent: none, all, or a mask in the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mask(u32);

pub(crate) const NONE: Mask = Mask(u32::MAX);
pub(crate) const ALL: Mask = Mask(u32::MAX - 1);

/// The masks of single blocks.
#[derive(Debug)]
pub(crate) struct Pool {
    masks: Vec<BlockMask>,
    free: Vec<u32>,
    /// How many masks there may be.
    pub(crate) cap: usize,
}

impl Pool {
    /// A pool whose masks take `bytes` at most.
    pub(crate) fn new(bytes: usize) -> Self {
        Self {
            masks: Vec::new(),
            free: Vec::new(),
            cap: bytes / MASK_BYTES,
        }
    }

    /// Bytes that the masks take, those that are free included.
    pub(crate) fn bytes(&self) -> usize {
        self.masks.len() * MASK_BYTES
    }

    /// A mask with every word `word`, unless memory is short.
    pub(crate) fn take(&mut self, word: u64) -> Option<Mask> {
        if let Some(index) = self.free.pop() {
            self.masks[at(index)] = [word; WORDS];
            return Some(Mask(index));
        }
        if self.masks.len() >= self.cap {
            return None;
        }
        self.masks.push([word; WORDS]);
        u32::try_from(self.masks.len() - 1).ok().map(Mask)
    }

    pub(crate) fn give(&mut self, mask: Mask) {
        if mask != NONE && mask != ALL {
            self.free.push(mask.0);
        }
    }

    pub(crate) fn words(&self, mask: Mask) -> BlockMask {
        match mask {
            NONE => [0; WORDS],
            ALL => [u64::MAX; WORDS],
            Mask(index) => self.masks[at(index)],
        }
    }

    pub(crate) fn word(&self, mask: Mask, index: usize) -> u64 {
        match mask {
            NONE => 0,
            ALL => u64::MAX,
            Mask(at_index) => self.masks[at(at_index)][index],
        }
    }

    pub(crate) fn count(&self, mask: Mask) -> u64 {
        self.words(mask)
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    pub(crate) fn add(&mut self, mask: &mut Mask, range: &Range<u64>) {
        if range.is_empty() || *mask == ALL {
            return;
        }
        if range.end - range.start == BLOCKS_PER_EXTENT {
            self.give(std::mem::replace(mask, ALL));
            return;
        }
        if *mask == NONE {
            *mask = self.take(0).unwrap_or(ALL);
        }
        if *mask != ALL {
            let words = &mut self.masks[at(mask.0)];
            for_words(range, |index, bits| words[index] |= bits);
        }
    }

    /// Takes blocks out; a mask that stands for its extent as a whole keeps them when there is
    /// no memory to be exact.
    pub(crate) fn take_out(&mut self, mask: &mut Mask, range: &Range<u64>) {
        if range.end - range.start == BLOCKS_PER_EXTENT {
            self.give(std::mem::replace(mask, NONE));
            return;
        }
        if *mask == ALL {
            *mask = self.take(u64::MAX).unwrap_or(ALL);
        }
        if *mask != ALL && *mask != NONE {
            let words = &mut self.masks[at(mask.0)];
            for_words(range, |index, bits| words[index] &= !bits);
            if words.iter().all(|&word| word == 0) {
                self.give(std::mem::replace(mask, NONE));
            }
        }
    }

    /// Moves everything from `other` into `mask`.
    pub(crate) fn absorb(&mut self, mask: &mut Mask, other: &mut Mask) {
        let other = std::mem::replace(other, NONE);
        if *mask == NONE || other == ALL {
            self.give(std::mem::replace(mask, other));
            return;
        }
        if *mask != ALL && other != NONE {
            let more = self.words(other);
            for (word, more) in self.masks[at(mask.0)].iter_mut().zip(more) {
                *word |= more;
            }
        }
        self.give(other);
    }

    pub(crate) fn touches(&self, mask: Mask, range: &Range<u64>) -> bool {
        let mut found = false;
        match mask {
            NONE => {}
            ALL => found = !range.is_empty(),
            Mask(index) => {
                let words = &self.masks[at(index)];
                for_words(range, |index, bits| found |= words[index] & bits != 0);
            }
        }
        found
    }
}

/// Masks are counted in 32 bits.
pub(crate) fn at(index: u32) -> usize {
    usize::try_from(index).unwrap_or(usize::MAX)
}

/// Calls `visit` with each word that `range` (bits of one extent) touches and its mask.
pub(crate) fn for_words(range: &Range<u64>, mut visit: impl FnMut(usize, u64)) {
    let mut at = range.start;
    while at < range.end {
        let stop = range.end.min((at / 64 + 1) * 64);
        let mask = (u64::MAX >> (64 - (stop - at))) << (at % 64);
        visit(usize::try_from(at / 64).unwrap_or(0), mask);
        at = stop;
    }
}

/// Calls `visit` with each run of set bits in the sixteen words.
pub(crate) fn for_runs(word: impl Fn(usize) -> u64, mut visit: impl FnMut(Range<u64>)) {
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
