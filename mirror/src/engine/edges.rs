//! Blocks that are written in part.
//!
//! The checksum of a block is of all of it, so the rest is read before a part of it is written.
//! The write holds the lock of the whole block from before that: two writes to parts of one block
//! take turns. What is read has to fit the checksum it has had; where no copy is right any more,
//! the block keeps its old checksum, so that what is left of it stays known to be wrong. Where nobody
//! can read it now the write is refused: its checksum would be forgotten, and a copy that has rotted
//! would pass for a right one later.

use super::settle::Look;
use super::{Mirror, length};
use crate::host::{Disk, Errno, Host, Span};
use dirty_map::{BLOCK_BYTES, Block, Sum, blocks_covering};
use std::ops::Range;
use std::rc::Rc;

/// The content, from before a write, of the blocks at its ends that it covers in part.
pub(super) struct Edges<B> {
    blocks: [Option<(u64, Edge<B>)>; 2],
}

/// Blocks of a write whose checksums are computed before it is sent: 128 KiB.
const EARLY: usize = 32;

/// Checksums of the first blocks of a write.
pub(super) struct NewSums([Option<Sum>; EARLY]);

enum Edge<B> {
    /// All of the block.
    Content(Span<B>),
    /// No copy of it is right.
    Damaged,
    /// What it holds cannot be checked: its checksum cannot be read.
    Unchecked,
}

impl<B> Edges<B> {
    fn none() -> Self {
        Self {
            blocks: [None, None],
        }
    }

    fn of(&self, block: u64) -> Option<&Edge<B>> {
        let mut edges = self.blocks.iter().flatten();
        edges.find_map(|(at, edge)| (*at == block).then_some(edge))
    }
}

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// What a write to `range` locks: with checksums the whole of each block.
    pub(super) fn whole_blocks(&self, range: &Range<u64>) -> Range<u64> {
        if !self.sums.are_kept() || range.is_empty() {
            return range.clone();
        }
        self.block_bytes(&blocks_covering(range.start, range.end - range.start))
    }

    /// Reads what a write to `range` leaves of its first and its last block. The caller holds
    /// the lock of [`Mirror::whole_blocks`].
    ///
    /// # Errors
    ///
    /// When the copies could not be made equal first, or nobody can read the rest of a block.
    pub(super) async fn read_edges(
        self: &Rc<Self>,
        range: &Range<u64>,
    ) -> Result<Edges<H::Buffer>, Errno> {
        let mut edges = Edges::none();
        if self.whole_blocks(range) == *range {
            return Ok(edges);
        }
        let blocks = blocks_covering(range.start, range.end - range.start);
        let last = blocks.end - 1;
        let ends = [
            Some(blocks.start),
            Some(last).filter(|&at| at != blocks.start),
        ];
        for (place, block) in edges.blocks.iter_mut().zip(ends) {
            let Some(block) = block else { continue };
            let own = self.block_bytes(&(block..block + 1));
            if own.start < range.start || own.end > range.end {
                *place = Some((block, self.read_edge(&own).await?));
            }
        }
        Ok(edges)
    }

    async fn read_edge(self: &Rc<Self>, own: &Range<u64>) -> Result<Edge<H::Buffer>, Errno> {
        let span = self.fresh_span(length(own.end - own.start));
        let block = Block(own.start / BLOCK_BYTES);
        if !self.maps.borrow().is_written(block.extent()) {
            // Zeroed before the write, if it holds anything else.
            span.fill(|bytes| bytes.fill(0));
            return Ok(Edge::Content(span));
        }
        let read = self.read_settled(own, span.clone(), Look::READ).await;
        if !self.page_at_hand(block.extent()).await {
            // What was read has not been checked.
            return Ok(Edge::Unchecked);
        }
        match read {
            Ok(moved) => Ok(Edge::Content(moved.unwrap_or(span))),
            // As any write would, the write goes on, and finds out about its own part.
            Err(_) if self.maps.borrow().damaged.any_in(block.0..block.0 + 1) => Ok(Edge::Damaged),
            Err(errno) => Err(errno),
        }
    }

    /// The checksums that blocks of `range` will have with `data`, as many as there is room for.
    /// Before they are sent: the data has just come, and is in the processor's cache.
    pub(super) fn new_sums(
        &self,
        range: &Range<u64>,
        data: &Span<H::Buffer>,
        edges: &Edges<H::Buffer>,
    ) -> NewSums {
        let mut sums = [None; EARLY];
        if self.sums.are_kept() {
            let blocks = blocks_covering(range.start, range.end - range.start);
            data.read(|bytes| {
                for (sum, number) in sums.iter_mut().zip(blocks) {
                    *sum = self.sum_in(range, bytes, edges, number);
                }
            });
        }
        NewSums(sums)
    }

    /// Records the checksums of the blocks of `range`, which every in-sync member has just taken
    /// from `data`.
    pub(super) fn record_sums(
        &self,
        range: &Range<u64>,
        data: &Span<H::Buffer>,
        edges: &Edges<H::Buffer>,
        early: &NewSums,
    ) {
        if !self.sums.are_kept() {
            return;
        }
        let mut maps = self.maps.borrow_mut();
        for extent in super::heat::extents(range) {
            let part = super::write::intersect(range, &self.extent_bytes(extent));
            maps.sums
                .expect(&blocks_covering(part.start, part.end - part.start));
        }
        data.read(|bytes| {
            let blocks = blocks_covering(range.start, range.end - range.start);
            for (at, number) in blocks.enumerate() {
                if matches!(edges.of(number), Some(Edge::Damaged)) {
                    continue;
                }
                let sum = early.0.get(at).copied();
                let sum = sum.unwrap_or_else(|| self.sum_in(range, bytes, edges, number));
                maps.sums.set(Block(number), sum);
            }
        });
    }

    /// The checksum that a block will have when `bytes` are written to `range`, if it is known
    /// what else it holds.
    fn sum_in(
        &self,
        range: &Range<u64>,
        bytes: &[u8],
        edges: &Edges<H::Buffer>,
        number: u64,
    ) -> Option<Sum> {
        let (own, block) = (self.block_bytes(&(number..number + 1)), Block(number));
        let (start, end) = (own.start.max(range.start), own.end.min(range.end));
        let new = &bytes[length(start - range.start)..length(end - range.start)];
        match edges.of(number) {
            None => Some(Sum::of(block, new)),
            Some(Edge::Content(old)) => Some(old.read(|old| {
                let head = &old[..length(start - own.start)];
                let tail = &old[length(end - own.start)..];
                Sum::of_parts(block, [head, new, tail])
            })),
            Some(Edge::Unchecked | Edge::Damaged) => None,
        }
    }
}
