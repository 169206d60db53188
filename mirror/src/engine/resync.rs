//! Copying missed blocks to a resyncing member.
//!
//! The member has joined: it takes every new write already. Missed runs are read from an
//! in-sync member, equalised first where they must be, and written to it, up to 1 MiB at a
//! time and several at once, each under its range lock from the read to the end of the write
//! (R4). Runs that are all zero are zeroed instead of copied and counted apart. Blocks of
//! extents that read as zeroes need nothing at all.
//!
//! Requests of the foreground go first: what is copied is paced by their latency (`pace.rs`), with
//! a floor so that a resync always ends.
//!
//! Copied blocks stay missed until the pages of their extents' checksums have been copied too and
//! a flush of the member has made both durable; then their bits are cleared and committed, which
//! is also what a restart resumes from. When no bit is
//! left, the gate closes, and if that is still so, a round makes the member in-sync.

use super::settle::Look;
use super::sums::STEP;
use super::{Mirror, PIECE_BYTES, Receiver, Running, front, length};
use crate::control::ResyncStatus;
use crate::host::{Buffer, Disk, DiskRequest, Errno, Host, Span};
use crate::pace::Pacer;
use crate::records;
use dirty_map::{BLOCK_BYTES, Block, Extent};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

/// Copies under way at once.
const LANES: usize = 4;
/// Blocks copied between two flushes of the member.
const BATCH_BLOCKS: u64 = (256 << 20) / BLOCK_BYTES;
/// A resync that moved nothing for this long is reported as stalled.
const STALLED_AFTER: Duration = Duration::from_secs(10);

/// The lanes' shared state.
struct Batch {
    /// Where the next missed run is looked for.
    cursor: Cell<u64>,
    /// Blocks copied and not yet cleared.
    copied: RefCell<Vec<Range<u64>>>,
    blocks: Cell<u64>,
    lanes: Cell<usize>,
    pacer: Rc<RefCell<Pacer>>,
    failed: Cell<Option<Errno>>,
}

impl Batch {
    fn note_copied(&self, blocks: Range<u64>) {
        self.blocks
            .set(self.blocks.get() + blocks.end - blocks.start);
        self.copied.borrow_mut().push(blocks);
    }
}

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// Slots whose member is resyncing.
    pub(super) fn resyncing(&self) -> Vec<u8> {
        let slots = self.slots.borrow();
        (0..)
            .zip(slots.iter())
            .filter(|(_, s)| s.running == Running::Resyncing)
            .map(|(i, _)| i)
            .collect()
    }

    fn resync_target(&self, slot: u8) -> Option<Receiver<D>> {
        self.view()
            .receivers
            .iter()
            .find(|r| r.slot == slot && !r.in_sync)
            .cloned()
    }

    /// Brings the member in `slot` up to date; ends when it is in-sync or lost.
    pub(super) async fn run_resync(self: Rc<Self>, slot: u8) {
        let begun = self.host.now();
        let mut last_move = begun;
        let pacer = Rc::new(RefCell::new(Pacer::new(self.options.resync_limits, begun)));
        if self.is_idle() {
            pacer.borrow_mut().begin_idle(begun);
        }
        self.sample(&pacer);
        while self.resync_target(slot).is_some() && !self.stopping.get() {
            let moved = self.resync_batch(slot, &pacer).await;
            self.note_progress(slot, begun);
            match moved {
                Ok(0) if self.finish_resync(slot).await => break,
                // Not recorded, or a bit was set again: not at once, a disk may be failing.
                Ok(0) => self.host.sleep(super::cool::TICK).await,
                Ok(_) => last_move = self.host.now(),
                Err(errno) => {
                    if self.host.now().saturating_sub(last_move) > STALLED_AFTER {
                        self.update_resync(slot, |status| {
                            status.stalled =
                                Some(format!("nothing could be copied lately: {errno}"));
                        });
                    }
                    self.host.sleep(super::cool::TICK).await;
                }
            }
        }
        self.end_sampling(&pacer);
        self.maps.borrow_mut().set_copying(slot, false);
        self.note_progress(slot, begun);
        let status = self
            .resync
            .borrow_mut()
            .take_if(|status| status.slot == slot);
        if let Some(status) = status {
            *self.last_resync.borrow_mut() = Some(status);
        }
        self.changed.wake_all();
    }

    /// Copies up to [`BATCH_BLOCKS`] missed blocks, makes them durable on the member and clears
    /// their bits. Returns how many were cleared.
    async fn resync_batch(
        self: &Rc<Self>,
        slot: u8,
        pacer: &Rc<RefCell<Pacer>>,
    ) -> Result<u64, Errno> {
        let batch = Rc::new(Batch {
            cursor: Cell::new(0),
            copied: RefCell::new(Vec::new()),
            blocks: Cell::new(0),
            lanes: Cell::new(LANES),
            pacer: pacer.clone(),
            failed: Cell::new(None),
        });
        let Some(target) = self.resync_target(slot) else {
            return Err(Errno::NO_DEVICE);
        };
        self.maps.borrow_mut().set_copying(slot, true);
        for _ in 0..LANES {
            let batch = batch.clone();
            self.spawn(|mirror| async move {
                mirror.run_lane(slot, &batch).await;
                batch.lanes.set(batch.lanes.get() - 1);
                mirror.changed.wake_all();
            });
        }
        self.changed
            .until(|| (batch.lanes.get() == 0).then_some(()))
            .await;
        let copied = batch.copied.take();
        match self.copy_pages_of(&copied, &target).await {
            Ok(()) => {}
            Err(errno @ (Errno::SHUTDOWN | Errno::NO_DEVICE)) => return Err(errno),
            Err(errno) => {
                self.begin_loss(slot, &format!("a write during resync failed: {errno}"));
                return Err(errno);
            }
        }
        let _pass = self.gate.enter().await;
        if !copied.is_empty() {
            if let Err(errno) = self.to_one(&target, DiskRequest::Flush).await {
                self.begin_loss(slot, &format!("a flush during resync failed: {errno}"));
                return Err(errno);
            }
            let same = |now: Receiver<D>| Rc::ptr_eq(&now.disk, &target.disk);
            if !self.resync_target(slot).is_some_and(same) {
                return Err(Errno::NO_DEVICE);
            }
            {
                let mut maps = self.maps.borrow_mut();
                for blocks in copied {
                    maps.unmiss_copied(slot, blocks);
                }
                maps.queue_missed(slot);
            }
            self.commit().await?;
        }
        match batch.failed.get() {
            Some(errno) => Err(errno),
            None => Ok(batch.blocks.get()),
        }
    }

    /// Copies the checksums of the extents that `copied` is of, as far as they are on disk.
    async fn copy_pages_of(
        &self,
        copied: &[Range<u64>],
        target: &Receiver<D>,
    ) -> Result<(), Errno> {
        let extents: BTreeSet<Extent> = {
            let maps = self.maps.borrow();
            let extents = copied.iter().map(|blocks| Block(blocks.start).extent());
            extents.filter(|&extent| maps.is_written(extent)).collect()
        };
        let extents: Vec<Extent> = extents.into_iter().collect();
        for step in extents.chunks(STEP) {
            let _pass = self.gate.enter().await;
            if self.stopping.get() {
                return Err(Errno::SHUTDOWN);
            }
            self.bring_pages(step, target).await?;
        }
        Ok(())
    }

    /// One lane: takes runs from the shared cursor until the batch is full or done.
    async fn run_lane(self: &Rc<Self>, slot: u8, batch: &Batch) {
        // Most lanes of a small resync find nothing.
        let mut buffer: Option<H::Buffer> = None;
        while batch.blocks.get() < BATCH_BLOCKS && self.resync_target(slot).is_some() {
            let next = {
                let maps = self.maps.borrow();
                let max = PIECE_BYTES as u64 / BLOCK_BYTES;
                maps.missed[usize::from(slot)]
                    .map
                    .next_run(batch.cursor.get(), max)
            };
            let Some(run) = next.filter(|_| !self.stopping.get()) else {
                return;
            };
            let extent = Block(run.start).extent();
            let run = run.start..run.end.min(extent.blocks().end);
            batch.cursor.set(run.end);
            if !self.admitted(slot, &run, batch).await {
                return;
            }
            let pass = self.gate.enter().await;
            let usable = buffer.take().filter(|buffer| !buffer.in_use());
            let buffer = buffer.insert(usable.unwrap_or_else(|| self.host.allocate(PIECE_BYTES)));
            let copied = self.copy_run(slot, extent, &run, buffer, batch).await;
            drop(pass);
            batch.pacer.borrow_mut().finished();
            if let Err(errno) = copied {
                batch.failed.set(Some(errno));
            }
        }
    }

    /// Waits until a run may be copied; `false` when it is too late.
    async fn admitted(&self, slot: u8, run: &Range<u64>, batch: &Batch) -> bool {
        let bytes = (run.end - run.start) * BLOCK_BYTES;
        while self.resync_target(slot).is_some() && !self.stopping.get() {
            let admitted = batch.pacer.borrow_mut().admit(self.host.now(), bytes);
            match admitted {
                Ok(()) => return true,
                Err(wait) => self.host.sleep(wait).await,
            }
        }
        false
    }

    /// Copies one run of missed blocks within one extent.
    async fn copy_run(
        self: &Rc<Self>,
        slot: u8,
        extent: Extent,
        run: &Range<u64>,
        buffer: &H::Buffer,
        batch: &Batch,
    ) -> Result<(), Errno> {
        let range = self.block_bytes(run);
        if range.is_empty() || !self.maps.borrow().is_written(extent) {
            // Reads as zeroes whatever the disk holds, and is zeroed before its next use, on
            // this member too, because it receives.
            batch.note_copied(run.clone());
            return Ok(());
        }
        let _lock = self.locks.lock(range.clone()).await;
        let Some(target) = self.resync_target(slot) else {
            return Err(Errno::NO_DEVICE);
        };
        if !self.maps.borrow().is_written(extent) {
            batch.note_copied(run.clone());
            return Ok(());
        }
        let own = front(buffer, length(range.end - range.start));
        match self.read_settled(&range, own.clone(), Look::RESYNC).await {
            Ok(moved) => {
                let span = moved.unwrap_or(own);
                self.write_copy(&target, range, span).await?;
                batch.note_copied(run.clone());
                Ok(())
            }
            Err(_) => self.copy_singly(&target, run, batch).await,
        }
    }

    /// Copies the blocks of a run of which not all can be read, each for itself.
    async fn copy_singly(
        self: &Rc<Self>,
        target: &Receiver<D>,
        run: &Range<u64>,
        batch: &Batch,
    ) -> Result<(), Errno> {
        let mut failed = Ok(());
        for block in run.clone() {
            let range = self.block_bytes(&(block..block + 1));
            if range.is_empty() {
                continue;
            }
            let own = self.fresh_span(length(range.end - range.start));
            let copied = match self.read_settled(&range, own.clone(), Look::RESYNC).await {
                Ok(moved) => self.write_copy(target, range, moved.unwrap_or(own)).await,
                Err(errno) => self.resync_damaged(target, Block(block), errno).await,
            };
            match copied {
                Ok(()) => batch.note_copied(block..block + 1),
                Err(errno) => failed = failed.and(Err(errno)),
            }
        }
        failed
    }

    /// Writes what was read of `range` to the resyncing member, under the caller's lock.
    async fn write_copy(
        &self,
        target: &Receiver<D>,
        range: Range<u64>,
        span: Span<H::Buffer>,
    ) -> Result<(), Errno> {
        let slot = target.slot;
        let all_zero = span.read(is_zero);
        let offset = self.data_offset + range.start;
        let bytes = range.end - range.start;
        let result = if all_zero {
            let lacking = self.zero_on_each(std::slice::from_ref(target), range).await;
            lacking[usize::from(slot)].map_or(Ok(()), Err)
        } else {
            let write = DiskRequest::Write {
                offset,
                span,
                fua: false,
            };
            self.to_one(target, write).await
        };
        if let Err(errno) = result {
            self.begin_loss(slot, &format!("a write during resync failed: {errno}"));
            return Err(errno);
        }
        self.update_resync(slot, |status| {
            let counter = if all_zero {
                &mut status.zeroed_bytes
            } else {
                &mut status.copied_bytes
            };
            *counter += bytes;
            status.stalled = None;
        });
        Ok(())
    }

    /// With the gate closed: if nothing is missed any more, a round makes the member in-sync.
    async fn finish_resync(&self, slot: u8) -> bool {
        let _closed = self.gate.close().await;
        let turn = self.membership.enter().await;
        if self.resync_target(slot).is_none() {
            return true;
        }
        if self.attempt.borrow().is_some() {
            // The losing task follows it up; trying by turns, the two would fill the history.
            return false;
        }
        if !self.maps.borrow().missed[usize::from(slot)].map.is_clear() {
            return false;
        }
        let round = self.round_inside(|config| {
            // Not when it is lost in this round, which is tried again then: its own superblock
            // may still say that the resync goes on.
            if self.resync_target(slot).is_some() {
                records::resynced(config, slot);
            }
        });
        if round.await.is_err() || self.resync_target(slot).is_none() {
            return false;
        }
        {
            let mut slots = self.slots.borrow_mut();
            slots[usize::from(slot)].running = Running::InSync;
            slots[usize::from(slot)].reason = None;
        }
        self.refresh_view();
        drop(turn);
        self.update_resync(slot, |status| status.finished = true);
        tracing::info!("member {} (slot {slot}) is in-sync", self.path_of(slot));
        true
    }

    fn note_progress(&self, slot: u8, begun: Duration) {
        let missed = self.maps.borrow().missed[usize::from(slot)].map.count();
        let elapsed = self.host.now().saturating_sub(begun).as_millis();
        self.update_resync(slot, |status| {
            status.remaining_bytes = missed * BLOCK_BYTES;
            status.elapsed_ms = u64::try_from(elapsed).unwrap_or(u64::MAX);
        });
    }

    fn update_resync(&self, slot: u8, update: impl FnOnce(&mut ResyncStatus)) {
        if let Some(status) = self.resync.borrow_mut().as_mut().filter(|s| s.slot == slot) {
            update(status);
        }
    }

    /// Everything written is missed by `slot` from now on: what a full resync copies.
    pub(super) fn miss_all_written(&self, slot: u8) {
        let mut maps = self.maps.borrow_mut();
        let mut from = Extent(0);
        while let Some(extent) = maps.states.next_written(from) {
            maps.miss(slot, extent.blocks());
            from = Extent(extent.0 + 1);
        }
    }
}

/// Whether every byte is zero.
fn is_zero(bytes: &[u8]) -> bool {
    // In pieces that the compiler turns into wide operations, ending at the first difference.
    bytes
        .chunks(64)
        .all(|piece| piece.iter().fold(0, |seen, &byte| seen | byte) == 0)
}
