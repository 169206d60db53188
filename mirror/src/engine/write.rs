//! The write path, and flush.
//!
//! ```text
//!  range lock; parts of blocks: read the rest for the checksum          (edges.rs)
//!                   ▼
//!             extents hot? ─no─► zero, group commit ─┐            (R1, R11; heat.rs)
//!                   │yes                             │
//!                   ▼                                ▼
//!  checksums; in flight; missed bits of absent slots ◄──────────┘   (R4; edges.rs)
//!                   ▼
//!  every receiving member at once, from one buffer                  (R6)
//!                   ▼
//!  all outcomes in, or the deadline: judge                          (R8)
//!                   ▼
//!  blocks join the unflushed set, their checksums are recorded; unlock   (sums.rs)
//!                   ▼
//!  a loss pending? wait until it is effective                       (R2)
//!                   ▼
//!  answer
//! ```

use super::fan_out::Outcomes;
use super::heat::extents;
use super::wait::{RangeGuard, WaitList};
use super::{Mirror, View};
use crate::host::{Disk, DiskRequest, Errno, Host, Span};
use dirty_map::{blocks_covering, blocks_within};
use std::cell::Cell;
use std::ops::Range;
use std::rc::Rc;

/// Flushes share: all that wait while one runs are served by the next one.
#[derive(Default)]
pub(super) struct Flushes {
    running: Cell<bool>,
    requested: Cell<u64>,
    served: Cell<u64>,
    /// Requests up to this one were told that the flush failed.
    failed_up_to: Cell<u64>,
    waiting: WaitList,
}

/// What a flush is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Flushing {
    /// Somebody is told that what was written is durable, which is refused after a flush that
    /// failed everywhere.
    Promised,
    /// A step of the engine's.
    Step,
}

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// Writes `span` at `offset`; with `fua`, durably. Returns when every in-sync member has
    /// it, or has durably been declared lost.
    ///
    /// # Errors
    ///
    /// `INVALID` or `NO_SPACE` for a range that does not fit the device, otherwise the members'
    /// common error.
    pub async fn write(
        self: &Rc<Self>,
        offset: u64,
        span: Span<H::Buffer>,
        fua: bool,
    ) -> Result<(), Errno> {
        let range = self.check(offset, span.len as u64)?;
        self.count(|counts| {
            counts.writes += 1;
            counts.written_bytes += span.len as u64;
        });
        if range.is_empty() {
            return Ok(());
        }
        let _timed = self.timed();
        let _pass = self.gate.enter().await;
        let lock = self.locks.lock(self.whole_blocks(&range)).await;
        self.answer(self.write_locked(&lock, &range, &span, fua).await)
    }

    /// Writes `data` to `range` for a caller that is inside the gate and holds the lock of its
    /// whole blocks.
    pub(super) async fn write_locked(
        self: &Rc<Self>,
        lock: &RangeGuard<'_>,
        range: &Range<u64>,
        data: &Span<H::Buffer>,
        fua: bool,
    ) -> Result<(), Errno> {
        self.refuse_unsafe(fua)?;
        let edges = self.read_edges(range).await?;
        if !self.is_hot(range) {
            self.heat(range).await?;
        }
        let sums = self.new_sums(range, data, &edges);
        let (view, failures) = (self.view(), self.flush_failures.get());
        self.begin_write(&view, range);
        lock.set_issued(true);
        let request = |_: &_| DiskRequest::Write {
            offset: self.data_offset + range.start,
            span: data.clone(),
            fua,
        };
        let outcomes = self.to_receivers(&view, request).await;
        let result = self.judge_write(range, &outcomes);
        self.end_write(range, result.is_ok(), failures);
        if result.is_ok() {
            self.record_sums(range, data, &edges, &sums);
        }
        lock.set_issued(false);
        self.losses_effective().await?;
        result
    }

    /// Turns away what must not be begun: writes after a loss that could not be recorded (R2),
    /// and FUA after a flush that failed everywhere (R7).
    fn refuse_unsafe(&self, durable: bool) -> Result<(), Errno> {
        let flush_failed = durable && self.config.borrow().flush_failed;
        if self.write_blocked.get() || flush_failed || self.stopping.get() {
            return Err(Errno::IO);
        }
        Ok(())
    }

    /// Counts the write in its extents and sets the missed bits of absent slots (R4).
    fn begin_write(&self, view: &View<D>, range: &Range<u64>) {
        let mut maps = self.maps.borrow_mut();
        let now = self.coarse_now.get();
        for extent in extents(range) {
            maps.hot.begin_write(extent, now);
        }
        for &slot in &view.absent {
            maps.miss(slot, blocks_covering(range.start, range.end - range.start));
        }
        self.wrote_since_tick.set(true);
    }

    /// Decides what the outcomes mean (R8): all well; some members are lost; or nobody is and
    /// the caller gets the error.
    fn judge_write(&self, range: &Range<u64>, outcomes: &Outcomes) -> Result<(), Errno> {
        if outcomes.all_ok() {
            return Ok(());
        }
        let blocks = blocks_covering(range.start, range.end - range.start);
        if let Some(errno) = outcomes.common_error(&self.stalls) {
            let mut maps = self.maps.borrow_mut();
            // The copies may differ now: equalised before they are read (R5), and copied again
            // to a resyncing member whatever its own outcome was.
            for extent in extents(range) {
                let part = intersect(&blocks, &extent.blocks());
                maps.hot.set_unequalised(extent, part);
            }
            for outcome in outcomes.iter().filter(|outcome| !outcome.in_sync) {
                maps.miss(outcome.slot, blocks.clone());
            }
            drop(maps);
            self.lose_stalled(outcomes, "a write");
            return Err(errno);
        }
        for outcome in outcomes.iter() {
            if let Err(errno) = outcome.result {
                self.begin_loss(outcome.slot, &format!("a write failed: {errno}"));
            }
        }
        Ok(())
    }

    /// The blocks leave flight and join the unflushed set before the range lock opens. A flush
    /// that failed everywhere since they were issued (`failures` had been counted then) may have
    /// dropped them from caches that had them already: they are suspect like what it covered.
    fn end_write(&self, range: &Range<u64>, written: bool, failures: u64) {
        let mut maps = self.maps.borrow_mut();
        let maps = &mut *maps;
        let now = self.coarse_now.get();
        let len = range.end - range.start;
        let blocks = blocks_covering(range.start, len);
        for extent in extents(range) {
            maps.hot
                .end_write(extent, intersect(&blocks, &extent.blocks()), now);
        }
        if written {
            let blocks = blocks_within(range.start, len);
            maps.log.cleared(&blocks);
            maps.damaged.clear(blocks);
        }
        if self.flush_failures.get() != failures {
            for extent in extents(range) {
                let part = intersect(&blocks, &extent.blocks());
                maps.hot.set_unequalised(extent, part);
            }
            for slot in self.resyncing() {
                maps.miss(slot, blocks.clone());
            }
            maps.suspect.set(blocks);
            return;
        }
        if written && maps.hot.unequalised_blocks() > 0 {
            // Whole blocks that every in-sync member has just taken are equal again.
            maps.hot.clear_unequalised(blocks_within(range.start, len));
        }
        if written && !maps.suspect.is_clear() {
            maps.suspect.clear(blocks_within(range.start, len));
        }
    }

    /// Waits until every judged loss is effective (R2).
    ///
    /// # Errors
    ///
    /// When a loss cannot be made durable on the last survivor.
    pub(super) async fn losses_effective(&self) -> Result<(), Errno> {
        if self.losses_pending.get() == 0 {
            return Ok(());
        }
        let settled = || match (self.losses_pending.get(), self.write_blocked.get()) {
            (0, _) => Some(Ok(())),
            (_, true) => Some(Err(Errno::IO)),
            _ => None,
        };
        self.changed.until(settled).await
    }

    /// Makes every write answered before the call durable on every receiving member (R7).
    ///
    /// # Errors
    ///
    /// `IO` when the flush failed on every in-sync member, now or earlier.
    pub async fn flush(&self) -> Result<(), Errno> {
        self.count(|counts| counts.flushes += 1);
        let _timed = self.timed();
        let _pass = self.gate.enter().await;
        self.answer(self.flush_inside().await)
    }

    /// [`Mirror::flush`] for callers that are inside the gate already.
    pub(super) async fn flush_inside(&self) -> Result<(), Errno> {
        self.settle_suspects().await;
        self.refuse_unsafe(true)?;
        self.flush_in_turn(Flushing::Promised).await
    }

    /// A flush that shares with all that wait beside it.
    pub(super) async fn flush_in_turn(&self, flushing: Flushing) -> Result<(), Errno> {
        let flushes = &self.flushes;
        let ticket = flushes.requested.get() + 1;
        flushes.requested.set(ticket);
        loop {
            let turn = || (flushes.served.get() >= ticket || !flushes.running.get()).then_some(());
            flushes.waiting.until(turn).await;
            if flushes.served.get() >= ticket {
                let failed = flushes.failed_up_to.get() >= ticket;
                return if failed { Err(Errno::IO) } else { Ok(()) };
            }
            // A flush that failed everywhere while this one waited has emptied the caches.
            self.refuse_unsafe(flushing == Flushing::Promised)?;
            flushes.running.set(true);
            let serves = flushes.requested.get();
            let result = self.flush_members().await;
            if result.is_err() {
                flushes.failed_up_to.set(serves);
            }
            flushes.served.set(serves);
            flushes.running.set(false);
            flushes.waiting.wake_all();
        }
    }

    /// One flush of all receiving members.
    async fn flush_members(&self) -> Result<(), Errno> {
        self.maps.borrow_mut().hot.begin_flush();
        let view = self.view();
        let outcomes = self.to_receivers(&view, |_| DiskRequest::Flush).await;
        if let Some(errno) = outcomes.common_error(&self.stalls) {
            self.flush_failed_everywhere(errno).await;
            return Err(Errno::IO);
        }
        for outcome in outcomes.iter() {
            if let Err(errno) = outcome.result {
                // Before the flush ends: its blocks are what this member may lack.
                self.begin_loss(outcome.slot, &format!("a flush failed: {errno}"));
            }
        }
        self.maps.borrow_mut().hot.end_flush(true);
        self.losses_effective().await
    }

    /// A flush failed on every in-sync member: nobody is dropped, and from now on, across
    /// restarts, durability is refused until the blocks are written anew (R7).
    async fn flush_failed_everywhere(&self, errno: Errno) {
        tracing::error!(
            "a flush failed on every in-sync member ({errno}); FLUSH and FUA answer EIO"
        );
        self.flush_failures.set(self.flush_failures.get() + 1);
        {
            let mut maps = self.maps.borrow_mut();
            let maps = &mut *maps;
            maps.hot.end_flush(false);
            let resyncing = self.resyncing();
            let mut unsafe_runs = Vec::new();
            maps.hot
                .for_each_unsafe(|_, blocks| unsafe_runs.push(blocks));
            for blocks in unsafe_runs {
                // A resyncing member may have kept what the in-sync ones have dropped.
                for &slot in &resyncing {
                    maps.miss(slot, blocks.clone());
                }
                maps.suspect.set(blocks);
            }
            maps.hot.unflushed_to_unequalised();
        }
        self.flush_failed_here.set(true);
        // Recorded before it is answered; the losing task tries again when that fails.
        self.flush_unrecorded.set(true);
        self.changed.wake_all();
        let settled = || !self.flush_unrecorded.get() || self.write_blocked.get();
        self.changed.until(|| settled().then_some(())).await;
    }

    /// Lifts the refusal when every suspect block has been written anew.
    async fn settle_suspects(&self) {
        let lifted = {
            let maps = self.maps.borrow();
            self.config.borrow().flush_failed
                && self.flush_failed_here.get()
                && maps.suspect.is_clear()
                // The losing task follows up a round that failed; not by turns with it.
                && self.attempt.borrow().is_none()
        };
        if lifted
            && self
                .round(|config| config.flush_failed = false)
                .await
                .is_ok()
        {
            tracing::warn!(
                "every block of the failed flush has been written anew; FLUSH works again"
            );
        }
    }

    /// Counts errors on their way to the caller.
    pub(super) fn answer<T>(&self, result: Result<T, Errno>) -> Result<T, Errno> {
        if result.is_err() {
            self.count(|counts| counts.errors += 1);
        }
        result
    }
}

/// The blocks that two ranges share.
pub(super) fn intersect(a: &Range<u64>, b: &Range<u64>) -> Range<u64> {
    a.start.max(b.start)..a.end.min(b.end).max(a.start.max(b.start))
}
