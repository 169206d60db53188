//! The read path.
//!
//! Unwritten and discarded extents read as zeroes (R11). Everything else is read from one
//! in-sync member: one of this machine if there is one, and of those the one with the least in
//! flight. Blocks that may differ between members are equalised first (R5). When a member cannot
//! read, another one answers, and the bad copy gets a second look (`settle.rs`). When none of them
//! can read all of a range, its halves are read each for itself, down to single sectors: what is bad on one member is good on another.
//!
//! What was read has to fit the checksums that are at hand, the page of an extent being read
//! beside the data if it is not there. Where it does not fit, because a copy is bad or only
//! because a write came between, the blocks get a second look and are read again under the range
//! lock. So checks are of whole blocks: a read of a part reads all of the block.

use super::heat::extents;
use super::write::intersect;
use super::{Mirror, length};
use crate::host::{Buffer, Disk, DiskRequest, Errno, Host, Span};
use dirty_map::blocks_covering;
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
        let _timed = self.timed();
        let _pass = self.gate.enter().await;
        let check = self.options.check_reads;
        let whole = self.checked_range(&range);
        if whole == range {
            return self.answer(self.read_range(&range, span, check).await);
        }
        let all = self.fresh_span(length(whole.end - whole.start));
        let read = self.read_range(&whole, all, check).await;
        let blocks = blocks_covering(whole.start, whole.end - whole.start);
        let result = match read {
            Ok(read) => Ok(read.slice(length(range.start - whole.start), span.len)),
            Err(errno) if self.maps.borrow().damaged.any_in(blocks) => Err(errno),
            // A sector beside those that were asked for may be all that cannot be read.
            Err(_) => self.read_range(&range, span, false).await,
        };
        self.answer(result)
    }

    /// What has to be read for `range` to be checked.
    fn checked_range(&self, range: &Range<u64>) -> Range<u64> {
        if self.options.check_reads {
            self.whole_blocks(range)
        } else {
            range.clone()
        }
    }

    async fn read_range(
        self: &Rc<Self>,
        range: &Range<u64>,
        span: Span<H::Buffer>,
        check: bool,
    ) -> Result<Span<H::Buffer>, Errno> {
        let plain = {
            let maps = self.maps.borrow();
            extents(range).all(|extent| maps.is_written(extent))
                && !maps
                    .hot
                    .is_unequalised(blocks_covering(range.start, range.end - range.start))
        };
        let result = if plain {
            self.read_written(range, span.clone(), check)
                .await
                .map(|moved| moved.unwrap_or(span))
        } else {
            self.read_mixed(range, span, check).await
        };
        match result {
            Err(Errno::CHECKSUM) => match self.read_again(&self.whole_blocks(range)).await {
                // No copy fits.
                Err(Errno::CHECKSUM) => Err(Errno::IO),
                Ok(all) => {
                    let whole = self.whole_blocks(range);
                    let start = length(range.start - whole.start);
                    Ok(all.slice(start, length(range.end - range.start)))
                }
                failed => failed,
            },
            result => result,
        }
    }

    /// Reads a range of which parts may be unwritten or un-equalised.
    async fn read_mixed(
        self: &Rc<Self>,
        range: &Range<u64>,
        span: Span<H::Buffer>,
        check: bool,
    ) -> Result<Span<H::Buffer>, Errno> {
        let mut span = span;
        loop {
            if let Some(zeroes) = self.read_parts(range, &span, check).await? {
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
        check: bool,
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
            let read = self.read_written(&part, span.slice(within, len), check);
            let moved = read.await?;
            if moved.is_some() {
                return Ok(None);
            }
        }
        Ok(Some(zeroes))
    }

    /// Reads a range of written, equal extents, failing over. `None` when the bytes are in
    /// `span`; else the span they are in. `CHECKSUM` when they are damaged or, with `check`, do
    /// not fit.
    ///
    /// Counts as a read under way from its first step, which follows the caller's look at the
    /// extents' states without a wait: a discard destroys nothing before the read has ended.
    pub(super) async fn read_written(
        self: &Rc<Self>,
        range: &Range<u64>,
        span: Span<H::Buffer>,
        check: bool,
    ) -> Result<Option<Span<H::Buffer>>, Errno> {
        let _reading = self.reads.begin();
        let blocks = blocks_covering(range.start, range.end - range.start);
        if self.maps.borrow().damaged.any_in(blocks) {
            // Another copy may have come back.
            return Err(Errno::CHECKSUM);
        }
        let check = check && self.sums.are_kept();
        if check {
            self.want_pages(range);
        }
        let moved = self.read_unchecked(range, span.clone()).await?;
        if check && !self.fits(range, moved.as_ref().unwrap_or(&span)).await {
            return Err(Errno::CHECKSUM);
        }
        Ok(moved)
    }

    /// [`Mirror::read_written`] of whatever the members hold.
    pub(super) async fn read_unchecked(
        self: &Rc<Self>,
        range: &Range<u64>,
        span: Span<H::Buffer>,
    ) -> Result<Option<Span<H::Buffer>>, Errno> {
        match self.read_whole(range, span.clone()).await {
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
                    self.read_whole(&half, piece).await
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

    pub(super) fn in_sync_members(&self) -> usize {
        self.view().receivers.iter().filter(|r| r.in_sync).count()
    }

    /// Reads a range from the best member; from another one when that fails. `None` when the bytes
    /// are in `span`; else the span they are in.
    async fn read_whole(
        self: &Rc<Self>,
        range: &Range<u64>,
        span: Span<H::Buffer>,
    ) -> Result<Option<Span<H::Buffer>>, Errno> {
        let (mut span, mut moved) = (span, false);
        let mut failed: Vec<u8> = Vec::new();
        let mut last_error = Errno::IO;
        loop {
            let view = self.view();
            let candidates = view
                .receivers
                .iter()
                .filter(|r| r.in_sync && !failed.contains(&r.slot));
            let Some(member) =
                candidates.min_by_key(|r| (r.geometry.behind_network, r.disk.in_flight()))
            else {
                return Err(last_error);
            };
            let offset = self.data_offset + range.start;
            let request = DiskRequest::Read {
                offset,
                span: span.clone(),
            };
            match self.read_from(member, request).await {
                Ok(()) => {
                    if !failed.is_empty() {
                        let range = range.clone();
                        self.spawn(|mirror| mirror.repair(range));
                    }
                    return Ok(moved.then_some(span));
                }
                Err(Errno::TIMED_OUT) => {
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
}
