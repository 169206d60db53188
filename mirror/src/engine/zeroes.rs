//! Discard and write-zeroes (R11).
//!
//! Whole extents become *discarded*, durably on every receiving member, before the discard
//! reaches any disk; from then on they read as zeroes whatever the disks hold, and are zeroed
//! again before use. For write-zeroes that is exact and as cheap.
//!
//! Parts of extents: a discard ignores them (it is advisory), write-zeroes goes through the
//! write path with zeroes as its data.

use super::fan_out::FanOut;
use super::heat::extents;
use super::sums::STORED_EVERY;
use super::write::intersect;
use super::{Mirror, PIECE_BYTES, front, length};
use crate::host::{Disk, DiskRequest, Errno, Host};
use dirty_map::{Base, BlockMask, Extent, ExtentState};
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

/// An operation of which an error is as good as a success.
struct AnyAnswer<Op>(Op);

impl<Op: Future<Output = Result<(), Errno>> + Unpin> Future for AnyAnswer<Op> {
    type Output = Result<(), Errno>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context).map(|_| Ok(()))
    }
}

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// Forgets the content of the whole extents in the range; they read as zeroes afterwards.
    /// What is smaller than an extent is ignored.
    ///
    /// # Errors
    ///
    /// `INVALID` or `NO_SPACE` for a range that does not fit the device; `IO` when it could not
    /// be recorded on any in-sync member.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let range = self.check(offset, len)?;
        self.count(|counts| counts.discards += 1);
        let _timed = self.timed();
        let _pass = self.gate.enter().await;
        let (_, whole, _) = self.split(&range);
        self.answer(self.discard_extents(whole).await)
    }

    /// Makes the range read as zeroes; with `fua`, durably.
    ///
    /// # Errors
    ///
    /// As [`Mirror::write`].
    pub async fn write_zeroes(
        self: &Rc<Self>,
        offset: u64,
        len: u64,
        fua: bool,
    ) -> Result<(), Errno> {
        let range = self.check(offset, len)?;
        self.count(|counts| counts.discards += 1);
        let _timed = self.timed();
        let (head, whole, tail) = self.split(&range);
        let mut result = self.zero_part(head, fua).await;
        if result.is_ok() {
            let _pass = self.gate.enter().await;
            result = self.discard_extents(whole).await;
        }
        if result.is_ok() {
            result = self.zero_part(tail, fua).await;
        }
        self.answer(result)
    }

    /// Splits a range into the part before the first whole extent, the whole extents, and the
    /// part after. The device's last extent is whole when the range reaches the device's end.
    fn split(&self, range: &Range<u64>) -> (Range<u64>, Range<u64>, Range<u64>) {
        let extent = dirty_map::EXTENT_BYTES;
        let start = range.start.next_multiple_of(extent).min(range.end);
        let aligned = range.end - range.end % extent;
        let end = if range.end == self.size_bytes {
            range.end
        } else {
            aligned
        };
        if start >= end {
            return (range.clone(), start..start, range.end..range.end);
        }
        (range.start..start, start..end, end..range.end)
    }

    async fn discard_extents(&self, whole: Range<u64>) -> Result<(), Errno> {
        if whole.is_empty() {
            return Ok(());
        }
        let _lock = self.locks.lock(whole.clone()).await;
        if self.write_blocked.get() || self.stopping.get() {
            return Err(Errno::IO);
        }
        let written: Vec<Extent> = {
            let maps = self.maps.borrow();
            extents(&whole).filter(|&e| maps.is_written(e)).collect()
        };
        if written.is_empty() {
            return Ok(());
        }
        // Of each what is to be flushed or equalised still.
        let mut unsettled = Vec::with_capacity(written.len());
        let failures = self.flush_failures.get();
        {
            let mut maps = self.maps.borrow_mut();
            for &extent in &written {
                unsettled.push(maps.hot.unsettled(extent));
                // Nothing of it is in flight: the range lock covers whole extents.
                if maps.hot.contains(extent) {
                    maps.hot.remove(extent);
                }
                maps.cooling.remove(&extent);
                maps.unrecorded.remove(&extent);
                maps.set_state(extent, ExtentState::Discarded);
            }
        }
        if let Err(errno) = self.commit().await {
            let dropped = self.flush_failures.get() != failures;
            for (extent, unsettled) in written.iter().zip(&unsettled) {
                self.take_back(*extent, unsettled, dropped);
            }
            return Err(errno);
        }
        self.forget_sums(&written);
        // A read that began before may still be on its way to what the discard destroys.
        self.reads.drained().await;
        self.discard_on_members(&written).await;
        self.losses_effective().await
    }

    /// Their content is gone, and what was known of it.
    fn forget_sums(&self, discarded: &[Extent]) {
        let mut maps = self.maps.borrow_mut();
        for &extent in discarded {
            maps.sums.end(extent);
            maps.pages.forget(extent);
            maps.log.cleared(&extent.blocks());
            maps.damaged.clear(extent.blocks());
        }
    }

    /// The discard of an extent is not durable: it holds its data still. Which blocks of
    /// `unsettled` were unflushed and which unequal is not told apart: they are both, and suspect
    /// if a flush has `dropped` what was in caches. The others stay as they were, with the
    /// checksums that are known of them.
    fn take_back(&self, extent: Extent, unsettled: &BlockMask, dropped: bool) {
        let view = self.view();
        let resyncing = view.receivers.iter().filter(|r| !r.in_sync).map(|r| r.slot);
        let lacking = view.absent.iter().copied().chain(resyncing);
        let mut maps = self.maps.borrow_mut();
        let now = self.coarse_now.get();
        maps.set_state(extent, ExtentState::Hot);
        for slot in lacking {
            maps.miss(slot, extent.blocks());
        }
        maps.hot.insert(extent, now);
        maps.sums.begin(extent, Base::Stored, now + STORED_EVERY);
        maps.unrecorded.insert(extent);
        maps.hot.unsettle(extent, unsettled, now);
        if dropped {
            maps.hot.set_unequalised_all(extent);
            maps.suspect.set(extent.blocks());
        }
    }

    /// Tells the disks, advisory: an error loses nobody, a stall does that not all share.
    async fn discard_on_members(&self, written: &[Extent]) {
        for &extent in written {
            let range = self.extent_bytes(extent);
            let (offset, len) = (self.data_offset + range.start, range.end - range.start);
            let mut discards = FanOut::new(&self.stalls);
            let view = self.view();
            for receiver in view.receivers.iter().filter(|r| r.geometry.discard) {
                let discard = receiver.disk.submit(DiskRequest::Discard { offset, len });
                discards.push(receiver.slot, receiver.in_sync, AnyAnswer(discard));
            }
            let outcomes = discards.await;
            self.lose_stalled(&outcomes, "a discard");
        }
    }

    /// Writes zeroes over part of an extent, or parts of two; what reads as zeroes already is
    /// left alone.
    async fn zero_part(self: &Rc<Self>, range: Range<u64>, fua: bool) -> Result<(), Errno> {
        let mut at = range.start;
        while at < range.end {
            let Some(extent) = extents(&(at..at + 1)).next() else {
                break;
            };
            let within = intersect(&(at..range.end), &self.extent_bytes(extent));
            let piece = at..within.end.min(at + PIECE_BYTES as u64);
            at = piece.end;
            let _pass = self.gate.enter().await;
            let lock = self.locks.lock(self.whole_blocks(&piece)).await;
            // Under the lock: a discard of the extent is over, and durable, or has not begun.
            if !self.maps.borrow().is_written(extent) {
                continue;
            }
            let span = front(&self.zeroes, length(piece.end - piece.start));
            self.write_locked(&lock, &piece, &span, fua).await?;
        }
        Ok(())
    }
}
