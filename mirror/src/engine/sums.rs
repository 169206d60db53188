//! Checksums of blocks: their way from a write to the members' tables, and back for a look.
//!
//! # Promise
//!
//! While an extent is cool, its page on every in-sync member says of each block the checksum of
//! what a write last put there, or that it is not known. A page on a member may be damaged like
//! anything else on a disk; it never vouches for older content.
//!
//! # How that is kept
//!
//! - While an extent is hot its pages on disk mean nothing; what is known is in memory
//!   ([`dirty_map::HotSums`]). No page is read or written on a write's way.
//! - An extent cools in this order: missed bits durable, then its page durable on every receiving
//!   member, then the commit that calls it cool ([`super::cool`]). A member that does not take the
//!   page is lost before that commit.
//! - Every member's page is made from its own one on disk and what has changed, so that a damaged
//!   entry stays on the member that has it. A page that cannot be read is made from another
//!   member's.
//! - An extent that begins anew (unwritten or discarded before) has the checksums of zeroes,
//!   whatever its page says.
//! - After an unclean stop nothing is known of hot extents but what equalising finds; their pages
//!   on disk are asked only where copies differ. What a page said before a block was written can
//!   then choose that block's older content, which was legal to read until a flush.
//! - An extent that stays hot has what is settled of it stored once a minute, so that its page is
//!   not old when it is asked (R5). Blocks that are still to be equalised keep their judge.
//! - A member that returns has old pages where it lacks blocks, and where its own map calls an
//!   extent hot: one that has cooled without it since. The latter it gets before its maps (they
//!   would call the extent cool), the former before the last of an extent's missed bits is cleared
//!   (R4). A page that is changed for any other reason while a member is absent sets a missed bit.

use super::heat::extents;
use super::wait::{RangeGuard, RangeLocks, WaitList, side_by_side};
use super::write::intersect;
use super::{FanOut, Mirror, PIECE_BYTES, Receiver, View, front, length, member_io};
use crate::host::{Buffer, Disk, DiskRequest, Errno, Host, Span};
use crate::layout::{PAGE_BYTES, RegionKind, SLOTS_MAX};
use dirty_map::{Block, Extent, Known, SUM_PAGE_BYTES, Sum, SumPage, blocks_covering};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

/// What members have stored of one extent, by slot; `None` where it cannot be read.
pub(super) type Pages = [Option<SumPage>; SLOTS_MAX];

/// Pages that one step reads and writes.
pub(super) const STEP: usize = 64;
/// An extent that stays hot is stored as often as this.
pub(super) const STORED_EVERY: Duration = Duration::from_secs(60);
/// Extents that stay hot and are stored in one tick.
const STORED_AT_ONCE: usize = 1024;
/// Most pages copied to a member in one piece.
const COPIED: usize = PIECE_BYTES / SUM_PAGE_BYTES;

/// What the running mirror needs for checksums besides its maps.
pub(super) struct SumIo<B> {
    /// Where the checksum table begins on each member; `None` when none is kept.
    table_offset: Option<u64>,
    /// By extent: one at a time reads or writes the pages of an extent on disk.
    locks: RangeLocks,
    /// Extents whose page is being read for a look.
    loading: RefCell<BTreeSet<Extent>>,
    /// Extents whose page no member could read when it was asked last.
    unreadable: RefCell<BTreeSet<Extent>>,
    loaded: WaitList,
    /// One for each slot, while nobody uses it.
    buffers: RefCell<[Option<B>; SLOTS_MAX]>,
    /// Pages stored for extents that stayed hot.
    stored_hot: Cell<u64>,
}

impl<B: Buffer> SumIo<B> {
    pub(super) fn new(config: &crate::superblock::Superblock) -> Self {
        let region = config.layout.find(RegionKind::Checksums, 0);
        Self {
            table_offset: region.filter(|_| config.checksums).map(|r| r.copy_a),
            locks: RangeLocks::default(),
            loading: RefCell::default(),
            unreadable: RefCell::default(),
            loaded: WaitList::default(),
            buffers: RefCell::new([const { None }; SLOTS_MAX]),
            stored_hot: Cell::new(0),
        }
    }

    /// Whether checksums are kept.
    pub(super) fn are_kept(&self) -> bool {
        self.table_offset.is_some()
    }

    /// The turn at the pages of extents, which must be in order.
    async fn turn(&self, extents: &[Extent]) -> RangeGuard<'_> {
        let number = |extent: Option<&Extent>| extent.map_or(0, |extent| u64::from(extent.0));
        self.locks
            .lock(number(extents.first())..number(extents.last()) + 1)
            .await
    }
}

/// Why pages are written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Store {
    /// Their extents are about to be called cool.
    ToCool,
    /// Their extents stay hot.
    StayHot,
}

/// The parts of a member's page in a buffer of pages.
fn page_in<B: Buffer>(buffer: &B, at: usize) -> SumPage {
    let span = Span {
        buffer: buffer.clone(),
        start: at * SUM_PAGE_BYTES,
        len: SUM_PAGE_BYTES,
    };
    span.read(|bytes| {
        bytes
            .first_chunk()
            .map_or_else(SumPage::unknown, SumPage::decode)
    })
}

fn put_page<B: Buffer>(buffer: &B, at: usize, page: &SumPage) {
    let span = Span {
        buffer: buffer.clone(),
        start: at * SUM_PAGE_BYTES,
        len: SUM_PAGE_BYTES,
    };
    span.fill(|bytes| {
        if let Some(bytes) = bytes.first_chunk_mut() {
            page.encode(bytes);
        }
    });
}

/// Runs of extents that follow each other: first index and count.
fn runs(extents: &[Extent]) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    extents.chunk_by(|a, b| a.0 + 1 == b.0).map(move |run| {
        let first = at;
        at += run.len();
        (first, run.len())
    })
}

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// Where the page of `extent` lies on a member.
    fn page_at(&self, extent: Extent) -> u64 {
        self.sums.table_offset.unwrap_or(0) + u64::from(extent.0) * PAGE_BYTES
    }

    /// The checksum of `block`, as far as no disk has to be asked.
    pub(super) fn sum_at_hand(&self, block: Block) -> Option<Sum> {
        let mut maps = self.maps.borrow_mut();
        match maps.sums.get(block) {
            Known::Sum(sum) => Some(sum),
            Known::Stored => maps.pages.get(block.extent())?.get(block),
            Known::Nothing => None,
        }
    }

    /// Whether every whole block of `range`, which `span` holds, has the checksum that is known
    /// for it.
    pub(super) async fn fits(self: &Rc<Self>, range: &Range<u64>, span: &Span<H::Buffer>) -> bool {
        for extent in extents(range) {
            let part = intersect(range, &self.extent_bytes(extent));
            self.page_at_hand(extent).await;
            // Without a wait from here on, or the page might have gone again.
            let start = length(part.start - range.start);
            let len = length(part.end - part.start);
            if !self.part_fits(&part, &span.slice(start, len)) {
                return false;
            }
        }
        true
    }

    fn part_fits(&self, range: &Range<u64>, span: &Span<H::Buffer>) -> bool {
        span.read(|bytes| {
            blocks_covering(range.start, range.end - range.start).all(|block| {
                let own = self.block_bytes(&(block..block + 1));
                if own.start < range.start || own.end > range.end {
                    return true;
                }
                let content =
                    &bytes[length(own.start - range.start)..length(own.end - range.start)];
                let block = Block(block);
                let sum = self.sum_at_hand(block);
                sum.is_none_or(|sum| Sum::of(block, content) == sum)
            })
        })
    }

    /// Whether the page of `extent` on disk says something that is not held.
    fn lacks_page(&self, extent: Extent) -> bool {
        let maps = self.maps.borrow();
        !maps.pages.contains(extent) && maps.sums.needs_stored(extent)
    }

    /// Begins to read the pages that say something of `range` and are not at hand.
    pub(super) fn want_pages(self: &Rc<Self>, range: &Range<u64>) {
        for extent in extents(range) {
            self.want_page(extent);
        }
    }

    fn want_page(self: &Rc<Self>, extent: Extent) {
        if self.lacks_page(extent) && self.sums.loading.borrow_mut().insert(extent) {
            self.sums.unreadable.borrow_mut().remove(&extent);
            self.spawn(|mirror| async move { mirror.load_page(extent).await });
        }
    }

    /// Waits until the page of `extent` is held, is not needed, or could not be read; `false`
    /// for the last.
    pub(super) async fn page_at_hand(self: &Rc<Self>, extent: Extent) -> bool {
        // It may make room for others before this looks.
        while self.lacks_page(extent) {
            self.want_page(extent);
            let loading = &self.sums.loading;
            let loaded = || (!loading.borrow().contains(&extent)).then_some(());
            self.sums.loaded.until(loaded).await;
            if self.sums.unreadable.borrow().contains(&extent) {
                return false;
            }
        }
        true
    }

    async fn load_page(&self, extent: Extent) {
        let turn = self.sums.turn(&[extent]).await;
        match self.any_stored_page(extent).await {
            Some(page) => self.maps.borrow_mut().pages.put(extent, page),
            None => _ = self.sums.unreadable.borrow_mut().insert(extent),
        }
        drop(turn);
        self.sums.loading.borrow_mut().remove(&extent);
        self.sums.loaded.wake_all();
    }

    /// What the in-sync members have stored of `extent`.
    pub(super) async fn stored_pages(&self, extent: Extent) -> Pages {
        let mut pages = Pages::default();
        if !self.sums.are_kept() {
            return pages;
        }
        let _turn = self.sums.turn(&[extent]).await;
        let view = self.view();
        let in_sync = view.receivers.iter().filter(|r| r.in_sync);
        let reads = in_sync.map(async |r| (r.slot, self.stored_page(extent, r).await));
        for (slot, page) in side_by_side(reads).await {
            pages[usize::from(slot)] = page;
        }
        pages
    }

    /// What the first in-sync member that can read it has stored of `extent`.
    async fn any_stored_page(&self, extent: Extent) -> Option<SumPage> {
        for receiver in self.view().receivers.iter().filter(|r| r.in_sync) {
            let page = self.stored_page(extent, receiver).await;
            if page.is_some() {
                return page;
            }
        }
        None
    }

    /// What one member has stored of `extent`; `None` when it cannot be read.
    async fn stored_page(&self, extent: Extent, receiver: &Receiver<D>) -> Option<SumPage> {
        let buffer = self.host.allocate_unzeroed(SUM_PAGE_BYTES);
        let read = DiskRequest::Read {
            offset: self.page_at(extent),
            span: front(&buffer, SUM_PAGE_BYTES),
        };
        match self.to_one(receiver, read).await {
            Ok(()) => return Some(page_in(&buffer, 0)),
            Err(Errno::TIMED_OUT) => {
                self.begin_loss(receiver.slot, "a read got no answer within the deadline");
            }
            Err(errno) => tracing::warn!(
                "the checksums of extent {} on slot {} cannot be read: {errno}",
                extent.0,
                receiver.slot
            ),
        }
        None
    }

    /// Writes the pages of hot extents, in order, durably on every receiving member. Returns those
    /// whose page no in-sync member takes: one bad place must not hold up all others.
    pub(super) async fn store_pages(&self, extents: &[Extent], store: Store) -> Vec<Extent> {
        let mut failed = Vec::new();
        if !self.sums.are_kept() {
            return failed;
        }
        for step in extents.chunks(STEP) {
            if self.store_in_turn(step, store).await.is_ok() {
                continue;
            }
            for extent in step {
                if let Err(errno) = self.store_in_turn(&[*extent], store).await {
                    let extent = *extent;
                    tracing::warn!("the checksums of {extent:?} cannot be stored: {errno}");
                    failed.push(extent);
                }
            }
        }
        failed
    }

    async fn store_in_turn(&self, step: &[Extent], store: Store) -> Result<(), Errno> {
        let _turn = self.sums.turn(step).await;
        let buffers = self.take_buffers();
        let stored = self.store_step(step, store, &buffers).await;
        self.sums.buffers.replace(buffers.map(Some));
        stored
    }

    fn take_buffers(&self) -> [H::Buffer; SLOTS_MAX] {
        // A stalled, lost member may still hold its buffer (R6).
        let kept = self.sums.buffers.take();
        let bytes = STEP * SUM_PAGE_BYTES;
        kept.map(|kept| {
            kept.filter(|buffer| !buffer.in_use())
                .unwrap_or_else(|| self.host.allocate(bytes))
        })
    }

    async fn store_step(
        &self,
        step: &[Extent],
        store: Store,
        buffers: &[H::Buffer; SLOTS_MAX],
    ) -> Result<(), Errno> {
        let view = self.view();
        let stored = self.read_for_store(&view, step, store, buffers).await;
        // Without those that have stalled over it.
        let view = self.view();
        self.make_pages(&view, step, store, &stored, buffers);
        let mut under_way = Vec::new();
        for (first, count) in runs(step) {
            let span = |slot: u8| Span {
                buffer: buffers[usize::from(slot)].clone(),
                start: first * SUM_PAGE_BYTES,
                len: count * SUM_PAGE_BYTES,
            };
            under_way.push(self.to_receivers(&view, |receiver| DiskRequest::Write {
                offset: self.page_at(step[first]),
                span: span(receiver.slot),
                fua: true,
            }));
        }
        let mut lacking = [None; SLOTS_MAX];
        for fan_out in under_way {
            let outcomes = fan_out.await;
            self.lose_stalled(&outcomes, "storing checksums");
            for outcome in outcomes.iter() {
                if let Err(errno) = outcome.result {
                    lacking[usize::from(outcome.slot)] = Some(errno);
                }
            }
        }
        self.judge_lacking(&view, &lacking, "storing checksums")
    }

    /// Reads the stored pages that the new ones go on from into the members' buffers; says which
    /// could be read.
    async fn read_for_store(
        &self,
        view: &View<D>,
        step: &[Extent],
        store: Store,
        buffers: &[H::Buffer; SLOTS_MAX],
    ) -> [[bool; STEP]; SLOTS_MAX] {
        let mut readable = [[false; STEP]; SLOTS_MAX];
        let needed = |extent: &Extent| {
            store == Store::StayHot || self.maps.borrow().sums.needs_stored(*extent)
        };
        let mut under_way: Vec<(usize, usize, FanOut<'_, D::Op>)> = Vec::new();
        for (first, count) in runs(step) {
            if !step[first..first + count].iter().any(needed) {
                continue;
            }
            let fan_out = self.to_receivers(view, |receiver| DiskRequest::Read {
                offset: self.page_at(step[first]),
                span: Span {
                    buffer: buffers[usize::from(receiver.slot)].clone(),
                    start: first * SUM_PAGE_BYTES,
                    len: count * SUM_PAGE_BYTES,
                },
            });
            under_way.push((first, count, fan_out));
        }
        let mut broken = Vec::new();
        for (first, count, fan_out) in under_way {
            let outcomes = fan_out.await;
            self.lose_stalled(&outcomes, "reading checksums");
            for outcome in outcomes.iter() {
                let slot = usize::from(outcome.slot);
                readable[slot][first..first + count].fill(outcome.result.is_ok());
                let alone = outcome.result.is_err() && outcome.result != Err(Errno::TIMED_OUT);
                if alone && count > 1 {
                    broken.push((outcome.slot, first..first + count));
                }
            }
        }
        // A run that cannot be read as a whole is read page by page.
        for (slot, places) in broken {
            let Some(receiver) = view.receivers.iter().find(|r| r.slot == slot) else {
                continue;
            };
            for at in places {
                let read = DiskRequest::Read {
                    offset: self.page_at(step[at]),
                    span: Span {
                        buffer: buffers[usize::from(slot)].clone(),
                        start: at * SUM_PAGE_BYTES,
                        len: SUM_PAGE_BYTES,
                    },
                };
                let result = self.to_one(receiver, read).await;
                readable[usize::from(slot)][at] = result.is_ok();
                if result == Err(Errno::TIMED_OUT) {
                    self.begin_loss(slot, "a read got no answer within the deadline");
                    break;
                }
            }
        }
        readable
    }

    /// Makes the new pages in the members' buffers, from what is known at this moment.
    fn make_pages(
        &self,
        view: &View<D>,
        step: &[Extent],
        store: Store,
        readable: &[[bool; STEP]; SLOTS_MAX],
        buffers: &[H::Buffer; SLOTS_MAX],
    ) {
        let in_flight = self.blocks_in_flight();
        let mut maps = self.maps.borrow_mut();
        let maps = &mut *maps;
        for (at, &extent) in step.iter().enumerate() {
            let page_of = |r: &Receiver<D>| {
                let slot = usize::from(r.slot);
                readable[slot][at].then(|| page_in(&buffers[slot], at))
            };
            let mut in_sync = view.receivers.iter().filter(|r| r.in_sync);
            let other = in_sync.find_map(page_of);
            let unsettled = maps.hot.unsettled(extent);
            let left = |block: Block| {
                let bit = block.0 % dirty_map::BLOCKS_PER_EXTENT;
                let word = unsettled[length(bit / 64)];
                word >> (bit % 64) & 1 != 0 || in_flight.iter().any(|run| run.contains(&block.0))
            };
            maps.pages.forget(extent);
            for receiver in &view.receivers {
                let own = page_of(receiver);
                let stored = own.as_ref().or(other.as_ref());
                let page = match store {
                    Store::ToCool => maps.sums.page(extent, stored),
                    Store::StayHot => maps.sums.page_of_hot(extent, stored, left),
                };
                put_page(&buffers[usize::from(receiver.slot)], at, &page);
                if receiver.in_sync && store == Store::ToCool {
                    maps.pages.put(extent, page);
                }
            }
        }
    }

    fn blocks_in_flight(&self) -> Vec<Range<u64>> {
        let mut blocks = Vec::new();
        self.locks.for_each_issued(|range| {
            blocks.push(blocks_covering(range.start, range.end - range.start));
        });
        blocks
    }

    /// Stores what is settled of extents that have been hot for a while, once a tick. The caller
    /// is inside the gate.
    pub(super) async fn store_hot(&self) {
        let _turn = self.cooling.enter().await;
        let now = self.coarse_now.get();
        let mut due = {
            let mut maps = self.maps.borrow_mut();
            let due = maps.sums.take_due(now, now + STORED_EVERY, STORED_AT_ONCE);
            due.into_iter()
                .filter(|&extent| maps.hot.contains(extent))
                .collect::<Vec<_>>()
        };
        due.sort_unstable();
        let count = self.sums.stored_hot.get() + due.len() as u64;
        self.sums.stored_hot.set(count);
        let failed = self.store_pages(&due, Store::StayHot).await;
        tracing::debug!("stored {} pages of hot extents, not {failed:?}", due.len());
    }

    /// Copies the pages of `extents`, in order, to a device that does not receive yet; not durable
    /// until it is flushed.
    ///
    /// # Errors
    ///
    /// That of the device.
    pub(super) async fn copy_pages(&self, extents: &[Extent], to: &D) -> Result<(), Errno> {
        if !self.sums.are_kept() {
            return Ok(());
        }
        for run in extents.chunk_by(|a, b| a.0 + 1 == b.0) {
            for part in run.chunks(COPIED) {
                // Nobody waits for the device: what is stored meanwhile is copied again.
                let turn = self.sums.turn(part).await;
                let pages = self.read_run(part).await;
                drop(turn);
                let mut bytes = vec![0; length(part.len() as u64 * PAGE_BYTES)];
                pages.read(|from| bytes.copy_from_slice(from));
                member_io::write_bytes(&*self.host, to, self.page_at(part[0]), &bytes).await?;
            }
        }
        Ok(())
    }

    /// Copies the pages of `extents`, in order and not more than a step, to a resyncing member; not
    /// durable until it is flushed.
    ///
    /// # Errors
    ///
    /// That of the member, or `NO_DEVICE` when it receives no more.
    pub(super) async fn bring_pages(
        &self,
        extents: &[Extent],
        target: &Receiver<D>,
    ) -> Result<(), Errno> {
        if !self.sums.are_kept() || extents.is_empty() {
            return Ok(());
        }
        let _turn = self.sums.turn(extents).await;
        let mut pages = Vec::new();
        for run in extents.chunk_by(|a, b| a.0 + 1 == b.0) {
            pages.push((run[0], self.read_run(run).await));
        }
        let same = |r: &Receiver<D>| Rc::ptr_eq(&r.disk, &target.disk);
        if !self.view().receivers.iter().any(same) {
            return Err(Errno::NO_DEVICE);
        }
        let mut under_way = Vec::new();
        for (first, span) in pages {
            let mut fan_out = FanOut::new(&self.stalls);
            let offset = self.page_at(first);
            let fua = false;
            let write = DiskRequest::Write { offset, span, fua };
            fan_out.push(target.slot, false, target.disk.submit(write));
            under_way.push(fan_out);
        }
        let mut result = Ok(());
        for fan_out in under_way {
            let outcomes = fan_out.await;
            let failed = outcomes.iter().find_map(|outcome| outcome.result.err());
            result = result.and(failed.map_or(Ok(()), Err));
        }
        result
    }

    /// The pages of a run of extents as an in-sync member has them; nothing is known of what none
    /// can read.
    async fn read_run(&self, run: &[Extent]) -> Span<H::Buffer> {
        let len = length(run.len() as u64 * PAGE_BYTES);
        let view = self.view();
        for receiver in view.receivers.iter().filter(|r| r.in_sync) {
            let span = self.fresh_span(len);
            let read = DiskRequest::Read {
                offset: self.page_at(run[0]),
                span: span.clone(),
            };
            match self.to_one(receiver, read).await {
                Ok(()) => return span,
                Err(Errno::TIMED_OUT) => {
                    self.begin_loss(receiver.slot, "a read got no answer within the deadline");
                }
                Err(_) => {}
            }
        }
        let span = self.fresh_span(len);
        for (at, &extent) in run.iter().enumerate() {
            if let Some(page) = self.any_stored_page(extent).await {
                put_page(&span.buffer, at, &page);
            }
        }
        span
    }
}
