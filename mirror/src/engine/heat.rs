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

use super::sums::STORED_EVERY;
use super::write::Flushing;
use super::{FanOut, Mirror, PIECE_BYTES, Receiver, View, front, length};
use crate::host::{Disk, DiskRequest, Errno, Host};
use crate::layout::SLOTS_MAX;
use dirty_map::{Base, Extent, ExtentState};
use std::ops::Range;
use std::rc::Rc;
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
                    .filter(|&extent| !maps.is_hot(extent))
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
                    if result.is_err() {
                        maps.keep_unrecorded(*extent, self.coarse_now.get());
                        continue;
                    }
                    maps.unrecorded.remove(extent);
                    if !maps.hot.contains(*extent) {
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
                let before = maps.states.get(extent);
                let base = match before {
                    ExtentState::Unwritten | ExtentState::Discarded => Base::Zeroes,
                    ExtentState::Cool => Base::Stored,
                    // It has begun before a commit that failed: what is known stays.
                    ExtentState::Hot => Base::Doubtful,
                };
                maps.sums
                    .begin(extent, base, self.coarse_now.get() + STORED_EVERY);
                match before {
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
        self.commit_intent(cold).await
    }

    /// Zeroes the data area of unwritten and discarded extents on every receiving member that
    /// is not known to be zero there, and flushes.
    async fn zero_unused(&self, view: &View<D>, cold: &[Extent]) -> Result<(), Errno> {
        let (mut zeroed_any, failures) = (false, self.flush_failures.get());
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
        self.flush_zeroes(failures).await
    }

    /// Makes zeroes durable that were written since `failures` was read: a flush that failed
    /// everywhere meanwhile may have dropped them, and one more would not say so.
    pub(super) async fn flush_zeroes(&self, failures: u64) -> Result<(), Errno> {
        self.flush_in_turn(Flushing::Step).await?;
        if self.flush_failures.get() == failures {
            Ok(())
        } else {
            Err(Errno::IO)
        }
    }

    /// Makes `range` of the device read as zeroes on several members at once; the error of
    /// each that does not. One that stalls is lost here: while it counted as in-sync, its late
    /// zeroes could strike a later write (R13). One that is lost gets nothing more.
    pub(super) async fn zero_on_each(
        &self,
        targets: &[Receiver<D>],
        range: Range<u64>,
    ) -> [Option<Errno>; SLOTS_MAX] {
        let mut lacking = [None; SLOTS_MAX];
        let (offset, len) = (self.data_offset + range.start, range.end - range.start);
        let (by_itself, mut by_writing): (Vec<_>, Vec<_>) = targets
            .iter()
            .partition(|target| target.geometry.cheap_zeroes);
        let zeroes = || DiskRequest::WriteZeroes { offset, len };
        self.zero_step(&by_itself, zeroes, &mut lacking).await;
        for target in by_itself {
            let lacks = &mut lacking[usize::from(target.slot)];
            if lacks
                .take_if(|errno| *errno == Errno::NOT_SUPPORTED)
                .is_some()
            {
                by_writing.push(target);
            }
        }
        let mut at = range.start;
        while at < range.end {
            let bytes = length((range.end - at).min(PIECE_BYTES as u64));
            let write = || DiskRequest::Write {
                offset: self.data_offset + at,
                span: front(&self.zeroes, bytes),
                fua: false,
            };
            self.zero_step(&by_writing, write, &mut lacking).await;
            at += bytes as u64;
        }
        lacking
    }

    /// One request to those of `targets` that lack nothing yet and still receive.
    async fn zero_step(
        &self,
        targets: &[&Receiver<D>],
        request: impl Fn() -> DiskRequest<H::Buffer>,
        lacking: &mut [Option<Errno>; SLOTS_MAX],
    ) {
        let view = self.view();
        let mut fan_out = FanOut::new(&self.stalls);
        for target in targets {
            let same = |r: &Receiver<D>| Rc::ptr_eq(&r.disk, &target.disk);
            let lacks = &mut lacking[usize::from(target.slot)];
            if lacks.is_none() && view.receivers.iter().any(same) {
                fan_out.push(target.slot, target.in_sync, target.disk.submit(request()));
            } else {
                *lacks = lacks.or(Some(Errno::NO_DEVICE));
            }
        }
        let outcomes = fan_out.await;
        self.lose_stalled(&outcomes, "zeroing an extent");
        for outcome in outcomes.iter() {
            lacking[usize::from(outcome.slot)] = outcome.result.err();
        }
    }
}

/// The extents that `range` touches.
pub(super) fn extents(range: &Range<u64>) -> impl Iterator<Item = Extent> + Clone + use<> {
    let last = range.end.saturating_sub(1) / dirty_map::EXTENT_BYTES;
    let first = range.start / dirty_map::EXTENT_BYTES;
    let number = |n: u64| Extent(u32::try_from(n).unwrap_or(u32::MAX));
    (first..=last).map(number)
}
