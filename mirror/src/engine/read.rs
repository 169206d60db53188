//! The read path.
//!
//! Unwritten and discarded extents read as zeroes (R11). Everything else is read from one
//! in-sync member: the one with the least in flight. Blocks that may differ between members are
//! equalised first (R5). When a member cannot read, another one answers, and the bad copy is
//! rewritten under the range lock and read back. When none of them can read all of a range, its
//! halves are read each for itself, down to single sectors: what is bad on one member is good on
//! another.

use super::fan_out::Limited;
use super::heat::extents;
use super::write::intersect;
use super::{Mirror, front, length};
use crate::host::{Buffer, Disk, DiskRequest, Errno, Host, Span};
use dirty_map::{BLOCK_BYTES, blocks_covering};
use std::ops::Range;
use std::rc::Rc;

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// Reads into `span` from `offset` and returns the span that holds the bytes: the caller's,
    /// or another one of the same length when a stalled member still holds the caller's (R6).
    ///
    /// # Errors
    ///
    /// `INVALID` or `NO_SPACE` for a range that does not fit the device, otherwise the last
    /// member's error.
    pub async fn read(
        self: &Rc<Self>,
        offset: u64,
        span: Span<H::Buffer>,
    ) -> Result<Span<H::Buffer>, Errno> {
        let range = self.check(offset, span.len as u64)?;
        self.count(|counts| {
            counts.reads += 1;
            counts.read_bytes += span.len as u64;
        });
        if range.is_empty() {
            return Ok(span);
        }
        let _pass = self.gate.enter().await;
        let plain = {
            let maps = self.maps.borrow();
            extents(&range).all(|extent| maps.is_written(extent))
                && !maps
                    .hot
                    .is_unequalised(blocks_covering(range.start, range.end - range.start))
        };
        let result = if plain {
            self.read_written(&range, span.clone())
                .await
                .map(|moved| moved.unwrap_or(span))
        } else {
            self.read_mixed(&range, span).await
        };
        self.answer(result)
    }

    /// Reads a range of which parts may be unwritten or un-equalised.
    async fn read_mixed(
        self: &Rc<Self>,
        range: &Range<u64>,
        span: Span<H::Buffer>,
    ) -> Result<Span<H::Buffer>, Errno> {
        let mut span = span;
        loop {
            if let Some(zeroes) = self.read_parts(range, &span).await? {
                for (within, len) in zeroes {
                    span.slice(within, len).fill(|bytes| bytes.fill(0));
                }
                return Ok(span);
            }
            // A stalled member, lost by now, has or had the buffer: once more into another.
            span = self.fresh_span(span.len);
        }
    }

    /// Fills the written parts of `span` and returns the others (start, length); `None` when a
    /// part could only be read into another buffer.
    async fn read_parts(
        self: &Rc<Self>,
        range: &Range<u64>,
        span: &Span<H::Buffer>,
    ) -> Result<Option<Vec<(usize, usize)>>, Errno> {
        let mut zeroes = Vec::new();
        for extent in extents(range) {
            let part = intersect(range, &self.extent_bytes(extent));
            let within = length(part.start - range.start);
            let len = length(part.end - part.start);
            if self.maps.borrow().is_written(extent) {
                self.equalise_for_read(&part).await?;
            }
            // Asked again: a discard may have come while this waited.
            if !self.maps.borrow().is_written(extent) {
                zeroes.push((within, len));
                continue;
            }
            let moved = self.read_written(&part, span.slice(within, len)).await?;
            if moved.is_some() {
                return Ok(None);
            }
        }
        Ok(Some(zeroes))
    }

    fn fresh_span(&self, len: usize) -> Span<H::Buffer> {
        front(
            &self
                .host
                .allocate(len.next_multiple_of(length(BLOCK_BYTES))),
            len,
        )
    }

    /// Reads a range of written, equal extents, failing over. `None` when the bytes are in
    /// `span`; else the span they are in.
    ///
    /// Counts as a read under way from its first step, which follows the caller's look at the
    /// extents' states without a wait: a discard destroys nothing before the read has ended.
    pub(super) async fn read_written(
        self: &Rc<Self>,
        range: &Range<u64>,
        span: Span<H::Buffer>,
    ) -> Result<Option<Span<H::Buffer>>, Errno> {
        let _reading = self.reads.begin();
        match self.read_whole(range, span.clone(), None).await {
            Err(errno) if self.in_sync_members() > 1 => {
                self.read_in_halves(range, span, errno).await
            }
            result => result,
        }
    }

    /// Reads a range of which no member can read all.
    async fn read_in_halves(
        self: &Rc<Self>,
        range: &Range<u64>,
        mut span: Span<H::Buffer>,
        errno: Errno,
    ) -> Result<Option<Span<H::Buffer>>, Errno> {
        let mut moved = false;
        let mut left = vec![(range.clone(), errno)];
        while let Some((part, errno)) = left.pop() {
            for half in self.halves(&part).ok_or(errno)? {
                let within = length(half.start - range.start);
                let piece = span.slice(within, length(half.end - half.start));
                let read = if span.buffer.in_use() {
                    Err(Errno::TIMED_OUT)
                } else {
                    self.read_whole(&half, piece, None).await
                };
                match read {
                    Ok(None) => {}
                    Err(errno) if !span.buffer.in_use() => left.push((half, errno)),
                    Ok(Some(_)) | Err(_) => {
                        // A stalled member, lost by now, has the buffer (R6): all of it again,
                        // into another one.
                        (span, moved) = (self.fresh_span(span.len), true);
                        left = vec![(range.clone(), Errno::IO)];
                        break;
                    }
                }
            }
        }
        Ok(moved.then_some(span))
    }

    /// The halves of a range, whole sectors each; `None` for a single sector.
    fn halves(&self, range: &Range<u64>) -> Option<[Range<u64>; 2]> {
        let sector = u64::from(self.logical_block_bytes);
        let sectors = (range.end - range.start) / sector;
        let middle = range.start + sectors / 2 * sector;
        (sectors > 1).then_some([range.start..middle, middle..range.end])
    }

    fn in_sync_members(&self) -> usize {
        self.view().receivers.iter().filter(|r| r.in_sync).count()
    }

    /// Reads a range from one member, the best that is not `except`; from another one when that
    /// fails. `None` when the bytes are in `span`; else the span they are in.
    async fn read_whole(
        self: &Rc<Self>,
        range: &Range<u64>,
        span: Span<H::Buffer>,
        except: Option<u8>,
    ) -> Result<Option<Span<H::Buffer>>, Errno> {
        let (mut span, mut moved) = (span, false);
        let mut failed: Vec<u8> = Vec::new();
        let mut last_error = Errno::IO;
        loop {
            let view = self.view();
            let candidates = view
                .receivers
                .iter()
                .filter(|r| r.in_sync && Some(r.slot) != except && !failed.contains(&r.slot));
            let Some(member) = candidates.min_by_key(|r| r.disk.in_flight()) else {
                return Err(last_error);
            };
            let offset = self.data_offset + range.start;
            let request = DiskRequest::Read {
                offset,
                span: span.clone(),
            };
            // A stall is noticed only while another member could answer instead.
            let alone = view.receivers.iter().filter(|r| r.in_sync).count() == 1;
            let op = member.disk.submit(request);
            let result = if alone {
                op.await
            } else {
                Limited::new(&self.stalls, op).await
            };
            match result {
                Ok(()) => {
                    for slot in failed {
                        self.spawn_repair(slot, range.clone());
                    }
                    return Ok(moved.then_some(span));
                }
                Err(Errno::TIMED_OUT) if !alone => {
                    self.begin_loss(member.slot, "a read got no answer within the deadline");
                    span = self.fresh_span(span.len);
                    moved = true;
                }
                Err(errno) => {
                    last_error = errno;
                    failed.push(member.slot);
                    self.slots.borrow_mut()[usize::from(member.slot)].read_errors += 1;
                }
            }
        }
    }

    fn spawn_repair(self: &Rc<Self>, slot: u8, range: Range<u64>) {
        self.spawn(|mirror| async move { mirror.repair(slot, range).await });
    }

    /// Rewrites a copy that could not be read, from one that can, and reads it back. A repair
    /// is a write: the extents are hot first (R1) and the range lock is held from the read to
    /// the end of the write (R4).
    async fn repair(self: Rc<Self>, slot: u8, range: Range<u64>) {
        let blocks = blocks_covering(range.start, range.end - range.start);
        let range = self.block_bytes(&blocks);
        let _pass = self.gate.enter().await;
        let mut at = range.start;
        while at < range.end {
            let piece = at..(at + super::PIECE_BYTES as u64).min(range.end);
            at = piece.end;
            let lock = self.locks.lock(piece.clone()).await;
            if self.stopping.get() || self.write_blocked.get() {
                return;
            }
            if extents(&piece).any(|extent| !self.maps.borrow().is_written(extent)) {
                continue;
            }
            if self.heat(&piece).await.is_err() {
                return;
            }
            self.begin_repair(&piece);
            lock.set_issued(true);
            let repaired = self.rewrite_copy(slot, &piece).await;
            self.end_repair(&piece);
            drop(lock);
            match repaired {
                Ok(true) => {
                    let count = blocks_covering(piece.start, piece.end - piece.start);
                    let mut slots = self.slots.borrow_mut();
                    slots[usize::from(slot)].repaired_blocks += count.end - count.start;
                }
                Ok(false) => return,
                Err(errno) => {
                    self.begin_loss(slot, &format!("rewriting a bad sector failed: {errno}"));
                    return;
                }
            }
        }
    }

    /// In flight like any write, or its extents might cool under it (R3).
    fn begin_repair(&self, range: &Range<u64>) {
        let mut maps = self.maps.borrow_mut();
        let now = self.coarse_now.get();
        for extent in extents(range) {
            maps.hot.begin_write(extent, now);
        }
    }

    /// The rewritten blocks join the unflushed set like any write's.
    fn end_repair(&self, range: &Range<u64>) {
        let mut maps = self.maps.borrow_mut();
        let now = self.coarse_now.get();
        let blocks = blocks_covering(range.start, range.end - range.start);
        for extent in extents(range) {
            maps.hot
                .end_write(extent, intersect(&blocks, &extent.blocks()), now);
        }
    }

    /// Copies `range` onto the in-sync member in `slot` from others, as far as they can read
    /// it. `Ok(false)` when nothing could be copied.
    async fn rewrite_copy(self: &Rc<Self>, slot: u8, range: &Range<u64>) -> Result<bool, Errno> {
        let mut copied = false;
        let mut left = vec![range.clone()];
        while let Some(part) = left.pop() {
            let own = self.fresh_span(length(part.end - part.start));
            let span = match self.read_whole(&part, own.clone(), Some(slot)).await {
                Ok(moved) => moved.unwrap_or(own),
                Err(_) if self.in_sync_members() > 1 => {
                    left.extend(self.halves(&part).into_iter().flatten());
                    continue;
                }
                Err(_) => return Ok(copied),
            };
            let view = self.view();
            let mut in_sync = view.receivers.iter().filter(|r| r.in_sync);
            let Some(target) = in_sync.find(|r| r.slot == slot) else {
                return Ok(false);
            };
            let offset = self.data_offset + part.start;
            let write = DiskRequest::Write {
                offset,
                span: span.clone(),
                fua: true,
            };
            self.to_one(target, write).await?;
            self.to_one(target, DiskRequest::Read { offset, span })
                .await?;
            copied = true;
        }
        Ok(copied)
    }
}
