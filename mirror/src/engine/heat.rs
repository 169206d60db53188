//! Making extents hot before a write (R1), and usable before that (R11).
//!
//! An extent that is *unwritten* or *discarded* reads as zeroes whatever its disks hold. Before
//! its first write its data area is zeroed on every receiving member and flushed; only then a
//! commit makes it hot. A crash before the commit leaves it reading as zeroes; a crash after it
//! finds zeroes on the disks. For each slot that was not zeroed here, all its blocks become
//! missed.
//!
//! A member whose data area was all zero when it joined is spared the zeroing, but only for
//! extents that never left *unwritten*.

use super::{Mirror, Receiver, View};
use crate::host::{Disk, DiskRequest, Errno, Host};
use crate::layout::SLOTS_MAX;
use dirty_map::{Extent, ExtentState};
use std::future::{Future as _, poll_fn};
use std::ops::Range;
use std::task::Poll;
use std::time::Duration;

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// Whether every extent of `range` is durably hot: the fast path of a write.
    pub(super) fn is_hot(&self, range: &Range<u64>) -> bool {
        self.maps.borrow().all_hot(extents(range))
    }

    /// Makes every extent of `range` durably hot on every receiving member. The caller must
    /// begin its write before it awaits anything else, or an extent may cool again.
    ///
    /// # Errors
    ///
    /// When the intent could not be recorded on any in-sync member.
    pub(super) async fn heat(&self, range: &Range<u64>) -> Result<(), Errno> {
        let mut made_room = false;
        loop {
            self.rewarm_cooling(range);
            let cold: Vec<Extent> = {
                let maps = self.maps.borrow();
                extents(range)
                    .filter(|&extent| !maps.hot.contains(extent))
                    .collect()
            };
            if cold.is_empty() {
                return Ok(());
            }
            let busy = |extent| self.maps.borrow().preparing.contains(extent);
            if cold.iter().any(busy) {
                let settled = || (!cold.iter().any(busy)).then_some(());
                self.prepared.until(settled).await;
                continue;
            }
            if self.maps.borrow().hot.is_full() && !made_room {
                // Best effort, and everything above is looked at again afterwards.
                made_room = true;
                let room = self.make_room().await;
                tracing::debug!("the memory for hot extents is full: {room:?}");
                continue;
            }
            self.maps.borrow_mut().preparing.extend(&cold);
            let result = self.prepare(&cold).await;
            {
                let mut maps = self.maps.borrow_mut();
                for extent in &cold {
                    maps.preparing.remove(extent);
                    if result.is_ok() && !maps.hot.contains(*extent) {
                        maps.hot.insert(*extent, self.coarse_now.get());
                    }
                }
            }
            self.prepared.wake_all();
            // Once more: another extent of the range may have cooled meanwhile.
            result?;
        }
    }

    /// Cools whatever can be, quiet or not, so that the memory for hot extents keeps its cap.
    /// Extents with requests under way stay, so this may free nothing; the cap then gives way
    /// by as many extents as there are requests.
    async fn make_room(&self) -> Result<(), Errno> {
        self.flush_inside().await?;
        let now = self.coarse_now.get();
        let oldest = self
            .maps
            .borrow_mut()
            .hot
            .coolable(now, Duration::ZERO, super::cool::BATCH);
        self.cool(oldest).await
    }

    /// An extent on its way to cool is still hot on disk: it just stays hot.
    fn rewarm_cooling(&self, range: &Range<u64>) {
        let mut maps = self.maps.borrow_mut();
        if maps.cooling.is_empty() {
            return;
        }
        for extent in extents(range) {
            if maps.cooling.remove(&extent) {
                maps.hot.insert(extent, self.coarse_now.get());
            }
        }
    }

    /// Zeroes the extents that need it, then commits all of them as hot.
    async fn prepare(&self, cold: &[Extent]) -> Result<(), Errno> {
        self.zero_unused(&self.view(), cold).await?;
        // The view after the zeroing: a member lost meanwhile counts as not zeroed.
        let view = self.view();
        let intent = self.options.write_intent;
        {
            let mut maps = self.maps.borrow_mut();
            for &extent in cold {
                if !maps.is_written(extent) {
                    for &slot in &view.absent {
                        maps.miss(slot, extent.blocks());
                    }
                    self.ahead.borrow_mut().used(extent);
                }
                match maps.states.get(extent) {
                    // A commit that failed may have left it hot in memory only.
                    _ if intent => maps.set_state(extent, ExtentState::Hot),
                    ExtentState::Hot => {}
                    _ => drop(maps.states.force(extent, ExtentState::Hot)),
                }
            }
        }
        self.ahead_wanted.wake_all();
        if !intent {
            // Unsafe, for benchmarks only: what the intent costs is measured against this.
            return Ok(());
        }
        self.commit().await
    }

    /// Zeroes the data area of unwritten and discarded extents on every receiving member that
    /// is not known to be zero there, and flushes.
    async fn zero_unused(&self, view: &View<D>, cold: &[Extent]) -> Result<(), Errno> {
        let mut zeroed_any = false;
        for &extent in cold {
            let state = self.maps.borrow().states.get(extent);
            let never_used = match state {
                ExtentState::Unwritten => true,
                ExtentState::Discarded => false,
                ExtentState::Cool | ExtentState::Hot => continue,
            };
            let targets: Vec<Receiver<D>> = {
                let (config, ahead) = (self.config.borrow(), self.ahead.borrow());
                let spared = |r: &Receiver<D>| {
                    let zeroed = config.slots[usize::from(r.slot)].zeroed;
                    never_used && (zeroed || ahead.contains(r.slot, extent))
                };
                view.receivers
                    .iter()
                    .filter(|r| !spared(r))
                    .cloned()
                    .collect()
            };
            if targets.is_empty() {
                continue;
            }
            let lacking = self.zero_on_each(&targets, self.extent_bytes(extent)).await;
            self.judge_lacking(view, &lacking, "zeroing an extent before its first use")?;
            zeroed_any = true;
            self.count(|counts| counts.extents_zeroed += 1);
        }
        if !zeroed_any {
            return Ok(());
        }
        let view = self.view();
        let outcomes = self.to_receivers(&view, |_| DiskRequest::Flush).await;
        let mut lacking = [None; SLOTS_MAX];
        for outcome in outcomes.iter() {
            lacking[usize::from(outcome.slot)] = outcome.result.err();
        }
        self.judge_lacking(&view, &lacking, "the flush after zeroing an extent")
    }

    /// Makes `range` of the device read as zeroes on several members at once; the error of
    /// each that does not.
    pub(super) async fn zero_on_each(
        &self,
        targets: &[Receiver<D>],
        range: Range<u64>,
    ) -> [Option<Errno>; SLOTS_MAX] {
        let zero = |target| Box::pin(self.zero_on(target, range.clone()));
        let mut running: Vec<_> = targets.iter().map(|t| (t.slot, zero(t))).collect();
        let mut lacking = [None; SLOTS_MAX];
        poll_fn(|context| {
            running.retain_mut(|(slot, zeroing)| match zeroing.as_mut().poll(context) {
                Poll::Ready(result) => {
                    lacking[usize::from(*slot)] = result.err();
                    false
                }
                Poll::Pending => true,
            });
            if running.is_empty() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
        lacking
    }

    /// Makes `range` of the device read as zeroes on one member.
    pub(super) async fn zero_on(
        &self,
        receiver: &Receiver<D>,
        range: Range<u64>,
    ) -> Result<(), Errno> {
        let offset = self.data_offset + range.start;
        let len = range.end - range.start;
        if receiver.geometry.cheap_zeroes {
            match self
                .to_one(receiver, DiskRequest::WriteZeroes { offset, len })
                .await
            {
                Err(Errno::NOT_SUPPORTED) => {}
                result => return result,
            }
        }
        let mut at = range.start;
        while at < range.end {
            let len = super::length((range.end - at).min(super::PIECE_BYTES as u64));
            let span = super::front(&self.zeroes, len);
            let offset = self.data_offset + at;
            self.to_one(
                receiver,
                DiskRequest::Write {
                    offset,
                    span,
                    fua: false,
                },
            )
            .await?;
            at += len as u64;
        }
        Ok(())
    }
}

/// The extents that `range` touches.
pub(super) fn extents(range: &Range<u64>) -> impl Iterator<Item = Extent> + Clone + use<> {
    let last = range.end.saturating_sub(1) / dirty_map::EXTENT_BYTES;
    let first = range.start / dirty_map::EXTENT_BYTES;
    let number = |n: u64| Extent(u32::try_from(n).unwrap_or(u32::MAX));
    (first..=last).map(number)
}
