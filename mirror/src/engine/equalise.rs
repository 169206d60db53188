//! Making copies equal after an unclean stop (R5).
//!
//! At a start after an unclean stop every block of every hot extent is *un-equalised*: a write
//! may have reached some members and not others. Before such a block is read, all in-sync
//! copies are read under the range lock, one is chosen and written to every in-sync member with
//! FUA, and only then the read is answered. So two reads never disagree, even when the source
//! dies between them. A background task does the same for the blocks that nobody reads.
//!
//! The chosen copy is the one that fits a checksum: the one in memory, where there is one, else
//! that of any in-sync member's page, which is of some content that the block has had. When
//! none fits, or two different ones do, it is that of the in-sync member with the lowest slot
//! that can read the block. From then on the block has a known checksum.
//!
//! After an unclean stop it is written also to those that hold the same, the source and an only
//! member among them. What a read shows may be in a cache that no flush will empty: a disk says once
//! that a flush has failed, and a daemon that was killed before it recorded the loss took that along.
//! Copies that look equal would differ at the next power cut. (An only member that takes no writes any
//! more is read as it is.)
//!
//! Blocks are un-equalised in a run, too, when every member refused a write of them (they may all be
//! full). Those are flushed and compared, and only what differs is written.

use super::copies::Copies;
use super::write::Flushing;
use super::{Mirror, length};
use crate::host::{Disk, DiskRequest, Errno, Host};
use crate::layout::SLOTS_MAX;
use dirty_map::{BLOCK_BYTES, Block, Known, Sum, blocks_covering};
use std::ops::Range;
use std::rc::Rc;

/// Which copy of a block is taken.
struct Choice {
    block: Block,
    /// The member that holds it, by its index among the copies.
    source: usize,
    /// Members that hold the same, a bit each.
    equal: u16,
    /// Its checksum, where checksums are kept.
    sum: Option<Sum>,
}

/// Blocks that are read and written in one step.
const STEP_BLOCKS: u64 = 256;

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// Equalises whatever of `range` needs it. The caller is inside the gate.
    pub(super) async fn equalise_for_read(&self, range: &Range<u64>) -> Result<(), Errno> {
        let blocks = blocks_covering(range.start, range.end - range.start);
        if !self.maps.borrow().hot.is_unequalised(blocks.clone()) {
            return Ok(());
        }
        let result = self.equalise(blocks.clone()).await;
        self.unless_alone(blocks, result)
    }

    /// [`Mirror::equalise_for_read`] for a caller that holds the lock of these blocks.
    pub(super) async fn equalise_for_read_locked(&self, blocks: Range<u64>) -> Result<(), Errno> {
        let result = self.equalise_locked(blocks.clone()).await;
        self.unless_alone(blocks, result)
    }

    /// What the only in-sync member has is answered, and copied to others, also when it takes
    /// neither flushes nor writes any more: there is nobody with whom it could disagree. Which of
    /// its contents a block has is not known, so that no checksum is about it.
    fn unless_alone(&self, blocks: Range<u64>, result: Result<(), Errno>) -> Result<(), Errno> {
        if result.is_err() && self.is_alone() {
            let maps = self.maps.borrow();
            let unequal: Vec<u64> = blocks
                .filter(|&block| maps.hot.is_unequalised(block..block + 1))
                .collect();
            drop(maps);
            self.record_equal(unequal.into_iter().map(|block| (Block(block), None)));
            return Ok(());
        }
        result
    }

    /// The background task: goes on whenever there is something un-equalised.
    pub(super) async fn run_equalise(self: Rc<Self>) {
        let mut from = None;
        loop {
            let next = self.maps.borrow().hot.next_unequalised(from);
            let Some(run) = next.filter(|_| !self.stopping.get()) else {
                from = None;
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
            // What cannot be read holds up nothing that comes after it.
            from = Some(piece.end);
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
        let _lock = self.locks.lock(self.block_bytes(&blocks)).await;
        self.equalise_locked(blocks).await
    }

    /// [`Mirror::equalise`] for a caller that holds the lock.
    pub(super) async fn equalise_locked(&self, blocks: Range<u64>) -> Result<(), Errno> {
        if !self.maps.borrow().hot.is_unequalised(blocks.clone()) {
            return Ok(());
        }
        let range = self.block_bytes(&blocks);
        if !self.is_hot(&range) {
            // After a discard that could not be recorded (R1).
            self.heat(&range).await?;
        }
        let failures = self.flush_failures.get();
        let (failed, mut done) = self.equalise_steps(&blocks).await?;
        if self.flush_failures.get() != failures {
            // Meanwhile a flush that failed everywhere has dropped what it covered, also of what is
            // written here, and of what was equal and was left alone.
            return Err(Errno::IO);
        }
        if failed.is_ok() {
            // Taken out of the mask all at once, when all is equal: it may stand for the extent as
            // a whole.
            done = vec![blocks];
        }
        let mut maps = self.maps.borrow_mut();
        for blocks in done {
            maps.inherited.clear(blocks.clone());
            maps.hot.clear_unequalised(blocks);
        }
        failed
    }

    /// Makes the copies of `blocks` equal, as far as that can be: the first error, and the blocks
    /// that are equal.
    ///
    /// # Errors
    ///
    /// When caches that have to be flushed first cannot be.
    async fn equalise_steps(
        &self,
        blocks: &Range<u64>,
    ) -> Result<(Result<(), Errno>, Vec<Range<u64>>), Errno> {
        let (mut at, mut failed, mut done) = (blocks.start, Ok(()), Vec::new());
        let mut flushed = false;
        while let Some((step, anew)) = self.next_step(at..blocks.end) {
            at = step.end;
            if !anew && !flushed {
                // They hold in caches what a write has left that every member refused.
                self.flush_in_turn(Flushing::Step).await?;
                flushed = true;
            }
            let range = self.block_bytes(&step);
            if range.is_empty() {
                continue;
            }
            if let Err(errno) = self.equalise_step(&range, anew).await {
                failed = failed.and(Err(errno));
                if !anew {
                    self.flush_in_turn(Flushing::Step).await?;
                }
                // Each block for itself: what cannot be read stays alone with it.
                for block in step {
                    let range = self.block_bytes(&(block..block + 1));
                    if range.is_empty() {
                        continue;
                    }
                    if self.equalise_block(block, &range, anew).await.is_ok() {
                        done.push(block..block + 1);
                    }
                }
            } else {
                done.push(step);
            }
        }
        Ok((failed, done))
    }

    /// The first un-equalised blocks of these, and whether they are written anew wherever they are the
    /// same. Those that are equal are left alone: a write that is refused may stay in a cache, where
    /// nothing would make it durable before the extent cools.
    fn next_step(&self, blocks: Range<u64>) -> Option<(Range<u64>, bool)> {
        let maps = self.maps.borrow();
        let is_unequal = |block: &u64| maps.hot.is_unequalised(*block..block + 1);
        let is_anew = |block: u64| {
            let one = block..block + 1;
            maps.inherited.any_in(one.clone()) || maps.suspect.any_in(one)
        };
        let first = blocks.clone().find(is_unequal)?;
        let anew = is_anew(first);
        let limit = blocks.end.min(first + STEP_BLOCKS);
        let end = (first..limit).find(|block| !is_unequal(block) || is_anew(*block) != anew);
        Some((first..end.unwrap_or(limit), anew))
    }

    /// [`Mirror::equalise_step`] of one block. What an only member cannot read holds up nothing: there
    /// is no content that could be another one later. After a failed flush it does (R7).
    async fn equalise_block(
        &self,
        block: u64,
        range: &Range<u64>,
        anew: bool,
    ) -> Result<(), Errno> {
        let result = self.equalise_step(range, anew).await;
        let suspect = self.maps.borrow().suspect.any_in(block..block + 1);
        if result.is_err() && !suspect && self.is_alone() && self.is_bad(range).await {
            self.record_equal([(Block(block), None)].into_iter());
            return Ok(());
        }
        result
    }

    /// Whether the only in-sync member cannot read this, and answers otherwise: one that is away for
    /// a while has lost nothing.
    async fn is_bad(&self, range: &Range<u64>) -> bool {
        let view = self.view();
        let Some(only) = view.receivers.iter().find(|r| r.in_sync) else {
            return false;
        };
        let read = async |offset: u64, len: u64| {
            let span = self.fresh_span(length(len));
            self.to_one(only, DiskRequest::Read { offset, span }).await
        };
        let offset = self.data_offset + range.start;
        read(0, BLOCK_BYTES).await.is_ok()
            && read(offset, range.end - range.start)
                .await
                .is_err_and(|errno| errno != Errno::TIMED_OUT)
            && read(0, BLOCK_BYTES).await.is_ok()
    }

    /// Whether there is one in-sync member, durably.
    fn is_alone(&self) -> bool {
        self.in_sync_members() < 2 && self.losses_pending.get() == 0
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

    /// Makes the copies of a range equal; with `anew` they are all written.
    async fn equalise_step(&self, range: &Range<u64>, anew: bool) -> Result<(), Errno> {
        let view = self.view();
        let blocks = blocks_covering(range.start, range.end - range.start);
        let copies = self.read_copies(range).await;
        let choices = self.choose(&copies).await.ok_or_else(|| {
            tracing::debug!("blocks {blocks:?} cannot be read on any in-sync member");
            copies.error.unwrap_or(Errno::IO)
        })?;
        // A disk without FUA writes and then flushes: another flush may fail in between and take the
        // blocks along.
        self.begin_repair(range);
        let mut lacking = [None; SLOTS_MAX];
        for (member, receiver) in copies.members.iter().enumerate() {
            if !self.stalls.is_in_sync(receiver.slot) {
                // Lost over the read.
                continue;
            }
            let written = self.write_chosen(&copies, &choices, member, anew).await;
            if written == Err(Errno::TIMED_OUT) {
                // At once: what it has is on its way still (R13), whatever the others say.
                self.begin_loss(receiver.slot, "a write got no answer within the deadline");
            }
            lacking[usize::from(receiver.slot)] = written.err();
        }
        let judged = self.judge_lacking(&view, &lacking, "equalising after an unclean stop");
        self.end_repair(range);
        judged?;
        self.record_equal(choices.iter().map(|choice| (choice.block, choice.sum)));
        self.losses_effective().await
    }

    /// Records what the checksums of equal blocks are.
    fn record_equal(&self, sums: impl Iterator<Item = (Block, Option<Sum>)>) {
        if !self.sums.are_kept() {
            return;
        }
        let mut maps = self.maps.borrow_mut();
        for (block, sum) in sums {
            maps.sums.set(block, sum);
        }
    }

    /// Chooses a copy of each block; `None` when there is a block that no member can read.
    async fn choose(&self, copies: &Copies<D>) -> Option<Vec<Choice>> {
        let kept = self.sums.are_kept();
        // Of an only member's block it is not known which of its contents it has.
        let known = kept && copies.members.len() > 1;
        let mut differ = false;
        copies.for_each_block(|_, contents| {
            let mut readable = contents.iter().flatten();
            let first = readable.next();
            differ |= readable.any(|other| Some(other) != first);
        });
        let stored = if differ && kept {
            self.stored_pages(Block(copies.range.start / BLOCK_BYTES).extent())
                .await
        } else {
            [const { None }; SLOTS_MAX]
        };
        let (mut choices, mut all) = (Vec::new(), true);
        copies.for_each_block(|block, contents| {
            let fits = |content: &[u8]| {
                let sum = Sum::of(block, content);
                match self.maps.borrow().sums.get(block) {
                    Known::Sum(known) => known == sum,
                    Known::Stored | Known::Nothing => {
                        let mut pages = stored.iter().flatten();
                        pages.any(|page| page.get(block) == Some(sum))
                    }
                }
            };
            let readable = || contents.iter().enumerate().filter(|(_, c)| c.is_some());
            let Some((first, content)) = readable().next() else {
                all = false;
                return;
            };
            let mut source = first;
            if kept && readable().any(|(_, other)| other != content) {
                let mut fitting = readable().filter(|(_, c)| c.is_some_and(fits));
                if let Some((one, chosen)) = fitting.next()
                    && fitting.all(|(_, other)| other == chosen)
                {
                    source = one;
                }
            }
            let has = contents.iter().map(|copy| *copy == contents[source]);
            let equal = (0..)
                .zip(has)
                .fold(0, |all, (at, has)| all | u16::from(has) << at);
            let content = contents[source].unwrap_or_default();
            choices.push(Choice {
                block,
                source,
                equal,
                sum: known.then(|| Sum::of(block, content)),
            });
        });
        all.then_some(choices)
    }

    /// Writes to one member, durably, the chosen copies, neighbours of one source together: of all
    /// blocks, or of those that it holds differently.
    async fn write_chosen(
        &self,
        copies: &Copies<D>,
        choices: &[Choice],
        member: usize,
        all: bool,
    ) -> Result<(), Errno> {
        let mut at = 0;
        let wanted = |choice: &Choice| all || choice.equal >> member & 1 == 0;
        for run in choices.chunk_by(|a, b| a.source == b.source && wanted(a) == wanted(b)) {
            let (first, place) = (&run[0], at..at + run.len());
            at = place.end;
            if !wanted(first) {
                continue;
            }
            let Some(span) = copies.span(first.source, &place) else {
                return Err(Errno::IO);
            };
            let write = DiskRequest::Write {
                offset: self.data_offset + first.block.0 * BLOCK_BYTES,
                span,
                fua: true,
            };
            self.to_one(&copies.members[member], write).await?;
        }
        Ok(())
    }
}
