//! Making copies equal after an unclean stop (R5).
//!
//! At a start after an unclean stop every block of every hot extent is *un-equalised*: a write
//! may have reached some members and not others. Before such a block is read, all in-sync
//! copies are compared under the range lock; where they differ, the chosen source (the in-sync
//! member with the lowest slot that can read the block) is written to the others with FUA, and
//! only then the read is answered. So two reads never disagree, even when the source dies
//! between them. A background task does the same for the blocks that nobody reads.
//!
//! A block that a failed flush covered is *suspect*: its copies look equal, and at the next power
//! cut one disk may have it and the other not. Such a block is written to every in-sync member,
//! the source included, equal or not.
//!
//! Checksums as the arbiter belong to a later version of the format's use; their place is
//! reserved.

use super::{Mirror, Receiver, front, length};
use crate::host::{Disk, DiskRequest, Errno, Host, Span};
use dirty_map::{BLOCK_BYTES, Block, blocks_covering};
use std::ops::Range;
use std::rc::Rc;

/// Blocks that are compared in one step.
const STEP_BLOCKS: u64 = 64;

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// Equalises whatever of `range` needs it. The caller is inside the gate.
    pub(super) async fn equalise_for_read(&self, range: &Range<u64>) -> Result<(), Errno> {
        let blocks = blocks_covering(range.start, range.end - range.start);
        if !self.maps.borrow().hot.is_unequalised(blocks.clone()) {
            return Ok(());
        }
        self.equalise(blocks).await
    }

    /// The background task: ends when nothing is un-equalised any more, and begins again when
    /// a write fails on every member.
    pub(super) async fn run_equalise(self: Rc<Self>) {
        loop {
            let next = self.maps.borrow().hot.next_unequalised(None);
            let Some(run) = next.filter(|_| !self.stopping.get()) else {
                self.host.sleep(super::cool::TICK).await;
                continue;
            };
            // A whole extent at once: its mask may stand for the extent as a whole, of which
            // no part can be taken out when memory for masks is short.
            let extent = Block(run.start).extent().blocks();
            let piece = if run == extent {
                run
            } else {
                run.start..run.end.min(run.start + STEP_BLOCKS)
            };
            let pass = self.gate.enter().await;
            let result = self.equalise(piece).await;
            drop(pass);
            if let Err(errno) = result {
                tracing::warn!(
                    "equalising failed on every in-sync member: {errno}; it is tried again"
                );
                self.host.sleep(super::cool::TICK).await;
            }
        }
    }

    /// Makes all in-sync copies of `blocks` (of one extent) equal, in steps under one lock.
    async fn equalise(&self, blocks: Range<u64>) -> Result<(), Errno> {
        let range = self.block_bytes(&blocks);
        let _lock = self.locks.lock(range.clone()).await;
        if !self.is_hot(&range) {
            // After a discard that could not be recorded (R1).
            self.heat(&range).await?;
        }
        let mut at = blocks.start;
        while at < blocks.end {
            let step = at..(at + STEP_BLOCKS).min(blocks.end);
            at = step.end;
            let range = self.block_bytes(&step);
            if !range.is_empty() && self.maps.borrow().hot.is_unequalised(step) {
                self.equalise_step(&range).await?;
            }
        }
        self.maps.borrow_mut().hot.clear_unequalised(blocks);
        Ok(())
    }

    /// Writes every suspect block anew on all in-sync members.
    ///
    /// # Errors
    ///
    /// When none of them takes it.
    pub(super) async fn rewrite_suspects(&self) -> Result<(), Errno> {
        let mut from = 0;
        loop {
            let next = self.maps.borrow().suspect.next_run(from, STEP_BLOCKS);
            let Some(run) = next else {
                return Ok(());
            };
            let extent = Block(run.start).extent().blocks();
            from = run.end.min(extent.end);
            self.equalise(run.start..from).await?;
        }
    }

    async fn equalise_step(&self, range: &Range<u64>) -> Result<(), Errno> {
        let view = self.view();
        let in_sync: Vec<Receiver<D>> = view
            .receivers
            .iter()
            .filter(|r| r.in_sync)
            .cloned()
            .collect();
        let blocks = blocks_covering(range.start, range.end - range.start);
        let suspect = self.maps.borrow().suspect.any_in(blocks);
        if in_sync.len() < 2 && !suspect {
            return Ok(());
        }
        let copies = self.read_copies(&in_sync, range).await;
        let source = copies.iter().find_map(|copy| copy.as_ref().ok()).cloned();
        let Some(source) = source else {
            return Err(copies
                .into_iter()
                .find_map(Result::err)
                .unwrap_or(Errno::IO));
        };
        let mut lacking = [None; crate::layout::SLOTS_MAX];
        for (receiver, copy) in in_sync.iter().zip(&copies) {
            let copy = copy.as_ref().ok().filter(|_| !suspect);
            let written = self.write_differing(receiver, copy, &source, range);
            lacking[usize::from(receiver.slot)] = written.await.err();
        }
        self.judge_lacking(&view, &lacking, "equalising after an unclean stop")?;
        self.losses_effective().await
    }

    /// Reads `range` from each member into a buffer of its own.
    async fn read_copies(
        &self,
        members: &[Receiver<D>],
        range: &Range<u64>,
    ) -> Vec<Result<Span<H::Buffer>, Errno>> {
        let len = length(range.end - range.start);
        let mut copies = Vec::with_capacity(members.len());
        for member in members {
            let buffer = self
                .host
                .allocate(len.next_multiple_of(length(BLOCK_BYTES)));
            let span = front(&buffer, len);
            let offset = self.data_offset + range.start;
            let read = self
                .to_one(
                    member,
                    DiskRequest::Read {
                        offset,
                        span: span.clone(),
                    },
                )
                .await;
            copies.push(read.map(|()| span));
        }
        copies
    }

    /// Writes the blocks of `source` that differ from `copy` (all, when there is none) to one
    /// member, durably.
    async fn write_differing(
        &self,
        receiver: &Receiver<D>,
        copy: Option<&Span<H::Buffer>>,
        source: &Span<H::Buffer>,
        range: &Range<u64>,
    ) -> Result<(), Errno> {
        let block = length(BLOCK_BYTES);
        let mut at = 0;
        while at < source.len {
            let len = block.min(source.len - at);
            let piece = source.slice(at, len);
            let equal = copy.is_some_and(|copy| {
                copy.slice(at, len)
                    .read(|have| piece.read(|want| have == want))
            });
            if !equal {
                let offset = self.data_offset + range.start + at as u64;
                let write = DiskRequest::Write {
                    offset,
                    span: piece,
                    fua: true,
                };
                self.to_one(receiver, write).await?;
            }
            at += len;
        }
        Ok(())
    }
}
