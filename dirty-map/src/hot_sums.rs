//! What is known in memory of the checksums of hot extents, which their pages on disk do not say
//! yet.
//!
//! An extent that becomes hot begins with what is known of all its blocks ([`Base`]); each write
//! then says of its own blocks what their checksums are. When the extent cools, both together
//! make its page ([`HotSums::page`]).
//!
//! Memory is bounded. Extents with few changed blocks have them in one table, those with many a
//! page of their own. When the cap is reached, an extent forgets all that is known of it: its
//! blocks have no checksums then until they are written or scrubbed. That is never wrong, and
//! less protected.

use crate::hash::NumberHasher;
use crate::sums::{SUM_PAGE_BYTES, Sum, SumPage};
use crate::units::{BLOCK_BYTES, BLOCKS_PER_EXTENT, Block, Extent};
use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasherDefault;
use std::ops::Range;
use std::time::Duration;

/// What a changed block takes in the table, which may have just doubled.
const ENTRY_BYTES: usize = 40;
/// Changed blocks of an extent from which a page is smaller than entries.
const ENTRIES_MAX: u16 = 96;
/// What an extent with a page of its own takes.
const PAGE_BYTES: usize = SUM_PAGE_BYTES + size_of::<[u64; WORDS]>();
const WORDS: usize = 16;
/// Ends a list of entries.
const NOWHERE: u16 = u16::MAX;

/// What is known of the blocks that nobody has written since their extent became hot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// The extent was cool: what its page on disk says.
    Stored,
    /// The extent was unwritten or discarded and has been zeroed.
    Zeroes,
    /// The extent was hot at the start: a page on disk may be older than a block.
    Doubtful,
}

/// What is known of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// Its checksum.
    Sum(Sum),
    /// What the extent's page on disk says is right.
    Stored,
    /// Nothing.
    Nothing,
}

/// A changed block of an extent without a page of its own.
#[derive(Clone, Copy, Debug)]
struct Entry {
    sum: Option<Sum>,
    /// The extent's next changed block, counted from the extent's start.
    next: u16,
}

/// The changed blocks of an extent that has many.
#[derive(Debug)]
struct Changed {
    sums: SumPage,
    which: [u64; WORDS],
}

impl Changed {
    fn set(&mut self, block: Block, sum: Option<Sum>) {
        let (word, bit) = place(block);
        self.which[word] |= bit;
        self.sums.set(block, sum);
    }

    /// `None` when the block has not changed.
    fn get(&self, block: Block) -> Option<Option<Sum>> {
        let (word, bit) = place(block);
        (self.which[word] & bit != 0).then(|| self.sums.get(block))
    }
}

#[derive(Debug)]
enum Blocks {
    /// In the table; the first one and how many.
    Few {
        first: u16,
        count: u16,
    },
    Many(Box<Changed>),
    /// Memory was short.
    Forgotten,
}

#[derive(Debug)]
struct Own {
    base: Base,
    blocks: Blocks,
    /// Something is to be written to the page on disk.
    wanted: bool,
    /// Tells this time of being hot from an earlier or later one.
    number: u64,
}

/// The checksums of all hot extents, as far as they are not on disk.
#[derive(Debug)]
pub struct HotSums {
    extents: HashMap<Extent, Own, BuildHasherDefault<NumberHasher>>,
    table: HashMap<Block, Entry, BuildHasherDefault<NumberHasher>>,
    pages: usize,
    cap_bytes: usize,
    /// Whole blocks of the device; a last one that is short is not known to be of zeroes.
    whole_blocks: u64,
    size_bytes: u64,
    numbers: u64,
    /// When extents that stay hot are to be stored, by the number of their time.
    due: VecDeque<(Duration, Extent, u64)>,
}

impl HotSums {
    /// Nothing is hot on a device of `size_bytes`; at most `cap_bytes` are taken.
    #[must_use]
    pub fn new(cap_bytes: usize, size_bytes: u64) -> Self {
        Self {
            extents: HashMap::default(),
            table: HashMap::default(),
            pages: 0,
            cap_bytes,
            whole_blocks: size_bytes / BLOCK_BYTES,
            size_bytes,
            numbers: 0,
            due: VecDeque::new(),
        }
    }

    /// An extent becomes hot, unless it is; if it stays so, it is to be stored at `due`.
    pub fn begin(&mut self, extent: Extent, base: Base, due: Duration) {
        if self.extents.contains_key(&extent) {
            return;
        }
        self.numbers += 1;
        let own = Own {
            base,
            blocks: Blocks::Few {
                first: NOWHERE,
                count: 0,
            },
            wanted: base != Base::Stored,
            number: self.numbers,
        };
        self.extents.insert(extent, own);
        self.due.push_back((due, extent, self.numbers));
    }

    /// An extent is not hot any more, or its content is gone: all is forgotten.
    pub fn end(&mut self, extent: Extent) {
        self.drop_blocks(extent);
        self.extents.remove(&extent);
    }

    /// Says what the checksum of `block` is, `None` when it is not known, since it was written or
    /// looked at. Its extent must be hot.
    pub fn set(&mut self, block: Block, sum: Option<Sum>) {
        let extent = block.extent();
        let room = self.memory_bytes() + ENTRY_BYTES <= self.cap_bytes;
        let Some(own) = self.extents.get_mut(&extent) else {
            unreachable!("{extent:?} is not hot")
        };
        own.wanted = true;
        let (first, count) = match &mut own.blocks {
            Blocks::Forgotten => return,
            Blocks::Many(changed) => return changed.set(block, sum),
            Blocks::Few { first, count } => (first, count),
        };
        if let Some(entry) = self.table.get_mut(&block) {
            entry.sum = sum;
        } else if *count >= ENTRIES_MAX {
            if self.promote(extent) {
                self.set(block, sum);
            }
        } else if room {
            let next = std::mem::replace(first, within(block));
            *count += 1;
            self.table.insert(block, Entry { sum, next });
        } else {
            self.forget(extent);
        }
    }

    /// Makes room for the checksums of `blocks` of one hot extent at once, before they are set.
    pub fn expect(&mut self, blocks: &Range<u64>) {
        let extent = Block(blocks.start).extent();
        let few = matches!(
            self.extents.get(&extent).map(|own| &own.blocks),
            Some(Blocks::Few { .. })
        );
        if few && blocks.end - blocks.start >= u64::from(ENTRIES_MAX) / 4 {
            self.promote(extent);
        }
    }

    /// What is known of `block`.
    #[must_use]
    pub fn get(&self, block: Block) -> Known {
        let Some(own) = self.extents.get(&block.extent()) else {
            return Known::Stored;
        };
        let changed = match &own.blocks {
            Blocks::Forgotten => return Known::Nothing,
            Blocks::Few { count: 0, .. } => None,
            Blocks::Few { .. } => self.table.get(&block).map(|entry| entry.sum),
            Blocks::Many(changed) => changed.get(block),
        };
        match (changed, own.base) {
            (Some(sum), _) => sum.map_or(Known::Nothing, Known::Sum),
            (None, Base::Stored) => Known::Stored,
            (None, Base::Zeroes) if block.0 < self.whole_blocks => {
                Known::Sum(Sum::of_zeroes(block))
            }
            (None, Base::Zeroes | Base::Doubtful) => Known::Nothing,
        }
    }

    /// Whether the page of `extent` has to be written before the extent is cool.
    #[must_use]
    pub fn is_wanted(&self, extent: Extent) -> bool {
        self.extents.get(&extent).is_some_and(|own| own.wanted)
    }

    /// Has the page of a hot extent written anew though nothing in it has changed.
    pub fn want(&mut self, extent: Extent) {
        if let Some(own) = self.extents.get_mut(&extent) {
            own.wanted = true;
        }
    }

    /// Whether the page of `extent` cannot be made without what is stored.
    #[must_use]
    pub fn needs_stored(&self, extent: Extent) -> bool {
        let Some(own) = self.extents.get(&extent) else {
            return true;
        };
        match &own.blocks {
            Blocks::Forgotten => false,
            Blocks::Many(changed) if changed.which == [u64::MAX; WORDS] => false,
            _ => own.base == Base::Stored,
        }
    }

    /// The page of an extent that is about to cool; `stored` is the one on disk.
    #[must_use]
    pub fn page(&self, extent: Extent, stored: Option<&SumPage>) -> SumPage {
        let mut page = match self.extents.get(&extent) {
            Some(own) if matches!(own.blocks, Blocks::Forgotten) => return SumPage::unknown(),
            Some(Own {
                base: Base::Zeroes, ..
            }) => SumPage::zeroes(extent, self.size_bytes),
            Some(Own {
                base: Base::Doubtful,
                ..
            }) => SumPage::unknown(),
            _ => stored.cloned().unwrap_or_else(SumPage::unknown),
        };
        self.for_each_changed(extent, |block, sum| page.set(block, sum));
        page
    }

    /// The page of an extent that stays hot: `stored` with the checksums of changed blocks that
    /// are not `left` out; only what is known replaces what the page says.
    #[must_use]
    pub fn page_of_hot(
        &self,
        extent: Extent,
        stored: Option<&SumPage>,
        left: impl Fn(Block) -> bool,
    ) -> SumPage {
        let mut page = stored.cloned().unwrap_or_else(SumPage::unknown);
        let zeroes = self
            .extents
            .get(&extent)
            .is_some_and(|own| own.base == Base::Zeroes);
        if zeroes {
            for block in extent.blocks().map(Block).filter(|&block| !left(block)) {
                if let Known::Sum(sum) = self.get(block) {
                    page.set(block, Some(sum));
                }
            }
            return page;
        }
        self.for_each_changed(extent, |block, sum| {
            if sum.is_some() && !left(block) {
                page.set(block, sum);
            }
        });
        page
    }

    /// Hot extents that are to be stored at `now`, at most `max`; those that stay hot come again
    /// at `again`.
    pub fn take_due(&mut self, now: Duration, again: Duration, max: usize) -> Vec<Extent> {
        let mut taken = Vec::new();
        while taken.len() < max {
            let Some((_, extent, number)) = self.due.pop_front_if(|(due, ..)| *due <= now) else {
                break;
            };
            let own = self.extents.get(&extent);
            if let Some(own) = own.filter(|own| own.number == number) {
                self.due.push_back((again, extent, number));
                if own.wanted {
                    taken.push(extent);
                }
            }
        }
        taken
    }

    /// Bytes taken by what is bounded.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.table.len() * ENTRY_BYTES + self.pages * PAGE_BYTES
    }

    fn for_each_changed(&self, extent: Extent, mut visit: impl FnMut(Block, Option<Sum>)) {
        let start = extent.blocks().start;
        match self.extents.get(&extent).map(|own| &own.blocks) {
            Some(Blocks::Few { first, .. }) => {
                let mut at = *first;
                while at != NOWHERE {
                    let block = Block(start + u64::from(at));
                    let Some(entry) = self.table.get(&block) else {
                        unreachable!("{block:?} is in the list of its extent")
                    };
                    visit(block, entry.sum);
                    at = entry.next;
                }
            }
            Some(Blocks::Many(changed)) => {
                for block in extent.blocks().map(Block) {
                    if let Some(sum) = changed.get(block) {
                        visit(block, sum);
                    }
                }
            }
            Some(Blocks::Forgotten) | None => {}
        }
    }

    /// Gives an extent a page of its own; `false` when memory is short.
    fn promote(&mut self, extent: Extent) -> bool {
        let Some(Blocks::Few { count, .. }) = self.extents.get(&extent).map(|own| &own.blocks)
        else {
            return true;
        };
        let others = self.table.len() - usize::from(*count);
        if others * ENTRY_BYTES + (self.pages + 1) * PAGE_BYTES > self.cap_bytes {
            self.forget(extent);
            return false;
        }
        let mut changed = Box::new(Changed {
            sums: SumPage::unknown(),
            which: [0; WORDS],
        });
        self.for_each_changed(extent, |block, sum| changed.set(block, sum));
        self.drop_blocks(extent);
        self.pages += 1;
        if let Some(own) = self.extents.get_mut(&extent) {
            own.blocks = Blocks::Many(changed);
        }
        true
    }

    fn forget(&mut self, extent: Extent) {
        self.drop_blocks(extent);
        if let Some(own) = self.extents.get_mut(&extent) {
            own.blocks = Blocks::Forgotten;
        }
    }

    /// Gives back the memory of an extent's changed blocks.
    fn drop_blocks(&mut self, extent: Extent) {
        let Some(own) = self.extents.get_mut(&extent) else {
            return;
        };
        let none = Blocks::Few {
            first: NOWHERE,
            count: 0,
        };
        match std::mem::replace(&mut own.blocks, none) {
            Blocks::Few { mut first, .. } => {
                while first != NOWHERE {
                    let block = Block(extent.blocks().start + u64::from(first));
                    first = self
                        .table
                        .remove(&block)
                        .map_or(NOWHERE, |entry| entry.next);
                }
            }
            Blocks::Many(_) => self.pages -= 1,
            Blocks::Forgotten => {}
        }
    }
}

/// A block's place in its extent.
fn within(block: Block) -> u16 {
    u16::try_from(block.0 % BLOCKS_PER_EXTENT).unwrap_or(NOWHERE)
}

/// A block's word and bit in a mask of its extent.
fn place(block: Block) -> (usize, u64) {
    let at = within(block);
    (usize::from(at / 64), 1 << (at % 64))
}

#[cfg(test)]
#[path = "hot_sums_tests.rs"]
mod tests;
