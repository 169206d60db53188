//! A second look at blocks: which copy is right, and making the others so.
//!
//! Reads that do not fit a checksum, copies that cannot be read, and the scrubber all come here.
//! Under the range lock, so that a write on its way is never taken for damage: every in-sync
//! member's copy and checksum of each block is read, [`judge`] says what is right, and
//!
//! 1. copies that are not are rewritten with FUA and read back (a repair is a write: the extent
//!    is hot first, R1; the lock is held from the read to the end of the write, R4). A member
//!    that fails this is lost, unless it is the last in-sync one (R8).
//! 2. checksums that are not are recorded like a write's, after the copies: the pages follow when
//!    the extent cools, and absent members will lack them (R4);
//! 3. a block with no copy that is provably right is *damaged*: nothing of it is overwritten, and
//!    it reads as an error until it is written anew. Its checksum stays and says so after a
//!    restart too.
//!
//! What was found and done goes to the [scrub log](crate::scrub_log).

use super::check::Checked;
use super::copies::Copies;
use super::heat::extents;
use super::outcome::{Report, Settled, is_mend};
use super::sums::Pages;
use super::write::intersect;
use super::{Mirror, Receiver, length};
use crate::host::{Disk, DiskRequest, Errno, Host, Span};
use crate::scrub_log::{Done, FoundBy, What};
use crate::verdict::{BlockVerdict, Held, Mend, Proof, judge};
use dirty_map::{BLOCK_BYTES, Block, Known, Sum, blocks_covering};
use std::ops::Range;
use std::rc::Rc;

/// Blocks that may all be unreadable on every member at once, and still be looked at sector by
/// sector.
const COMPOSED_MAX: usize = 4;

/// Who looks, and whether anything is written.
#[derive(Clone, Copy)]
pub(super) struct Look {
    pub(super) by: FoundBy,
    pub(super) repair: bool,
}

impl Look {
    /// For an application that reads.
    pub(super) const READ: Self = Self {
        by: FoundBy::Read,
        repair: true,
    };
    /// For a resync that copies.
    pub(super) const RESYNC: Self = Self {
        by: FoundBy::Resync,
        repair: true,
    };
}

/// Checksums of some blocks: from memory, else from the members' pages. Of one moment: an extent
/// may cool while its page is being read.
pub(super) struct Sums {
    first: u64,
    known: Vec<Known>,
    stored: Rc<Pages>,
}

impl Sums {
    /// What a member's checksum of `block` is.
    pub(super) fn on(&self, slot: u8, block: Block) -> Option<Sum> {
        match self.known[length(block.0 - self.first)] {
            Known::Sum(sum) => Some(sum),
            Known::Stored => self.stored[usize::from(slot)].as_ref()?.get(block),
            Known::Nothing => None,
        }
    }
}

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// Reads `range`, whole blocks of one extent, as it is right. The caller holds its lock.
    ///
    /// # Errors
    ///
    /// When there is no right copy of a block.
    pub(super) async fn read_settled(
        self: &Rc<Self>,
        range: &Range<u64>,
        span: Span<H::Buffer>,
        look: Look,
    ) -> Result<Option<Span<H::Buffer>>, Errno> {
        let blocks = blocks_covering(range.start, range.end - range.start);
        self.equalise_for_read_locked(blocks.clone()).await?;
        match self.read_written(range, span.clone(), true).await {
            Err(Errno::CHECKSUM) => {}
            result => return result,
        }
        // Into a buffer that nothing else may have.
        let own = self.fresh_span(span.len);
        let settled = self.settle(&blocks, look).await?;
        settled.content_into(&own)?;
        Ok(Some(own))
    }

    /// Reads a range anew after a read that did not fit: no write comes between.
    pub(super) async fn read_again(
        self: &Rc<Self>,
        range: &Range<u64>,
    ) -> Result<Span<H::Buffer>, Errno> {
        let _lock = self.locks.lock(range.clone()).await;
        let whole = self.fresh_span(length(range.end - range.start));
        for extent in extents(range) {
            let part = intersect(range, &self.extent_bytes(extent));
            let len = length(part.end - part.start);
            let within = whole.slice(length(part.start - range.start), len);
            if !self.maps.borrow().is_written(extent) {
                within.fill(|bytes| bytes.fill(0));
                continue;
            }
            let own = self.fresh_span(len);
            let read = self
                .read_settled(&part, own.clone(), Look::READ)
                .await?
                .unwrap_or(own);
            read.read(|from| within.fill(|to| to.copy_from_slice(from)));
        }
        Ok(whole)
    }

    /// A copy could not be read: a second look at the range, in steps.
    pub(super) async fn repair(self: Rc<Self>, range: Range<u64>) {
        let _pass = self.gate.enter().await;
        for extent in extents(&range) {
            let part = intersect(&range, &self.extent_bytes(extent));
            let blocks = blocks_covering(part.start, part.end - part.start);
            let _lock = self.locks.lock(self.block_bytes(&blocks)).await;
            if self.stopping.get() || self.write_blocked.get() {
                return;
            }
            if !self.maps.borrow().is_written(extent) {
                continue;
            }
            let settled = match self.equalise_locked(blocks.clone()).await {
                Ok(()) => self.settle(&blocks, Look::READ).await.map(drop),
                Err(errno) => Err(errno),
            };
            if let Err(errno) = settled {
                tracing::warn!("blocks {blocks:?} could not be repaired: {errno}");
                return;
            }
        }
    }

    /// The second look at `blocks` of one extent, which the caller has locked and equalised.
    ///
    /// # Errors
    ///
    /// When no member can read anything of it, or a member was lost over a repair and that could
    /// not be recorded: a crash would let it answer again.
    pub(super) async fn settle(
        self: &Rc<Self>,
        blocks: &Range<u64>,
        look: Look,
    ) -> Result<Settled<D>, Errno> {
        let range = self.block_bytes(blocks);
        let copies = self.read_copies(&range).await;
        let sums = self.sums_of(&copies).await;
        let composed = self.compose_unreadable(&copies).await;
        if copies.nothing_readable() && !composed.iter().any(Option::is_some) {
            // No block is at fault for what all share (R8).
            return Err(copies.error.unwrap_or(Errno::IO));
        }
        let verdicts = self.judge_all(&copies, &sums, &composed);
        let pages_missing = self.unreadable_pages(&copies, &sums);
        let wanted = !pages_missing.is_empty() || verdicts.iter().any(is_mend);
        // Nothing is written after a stop, or when nothing can be (R2).
        let look = Look {
            repair: look.repair
                && !self.stopping.get()
                && !self.write_blocked.get()
                && (!wanted || self.heat(&range).await.is_ok()),
            ..look
        };
        let mut settled = Settled {
            checked: Checked {
                blocks: verdicts.len() as u64,
                member_bytes: copies.bytes_read(),
                ..Checked::default()
            },
            copies,
            composed,
            verdicts,
        };
        let mut report = Report::new(look, self.host.wall_clock_secs());
        if look.repair && wanted {
            self.begin_repair(&range);
            self.mend_all(&settled, &mut report).await;
            self.end_repair(&range);
        }
        for at in 0..settled.verdicts.len() {
            self.note_verdict(&settled, at, &mut report);
        }
        for slot in pages_missing {
            self.note_page(slot, blocks, &mut report);
        }
        // Whatever is held of it may be what did not fit.
        let extent = Block(blocks.start).extent();
        self.maps.borrow_mut().pages.forget(extent);
        for finding in &report.findings {
            tracing::warn!("{finding:?}");
            self.maps.borrow_mut().log.add(finding);
        }
        settled.checked.add(report.checked);
        self.losses_effective().await?;
        Ok(settled)
    }

    /// In flight like any write, or its extents might cool under it (R3).
    pub(super) fn begin_repair(&self, range: &Range<u64>) {
        let mut maps = self.maps.borrow_mut();
        let now = self.coarse_now.get();
        for extent in extents(range) {
            maps.hot.begin_write(extent, now);
        }
    }

    /// The rewritten blocks join the unflushed set like any write's.
    pub(super) fn end_repair(&self, range: &Range<u64>) {
        let mut maps = self.maps.borrow_mut();
        let now = self.coarse_now.get();
        let blocks = blocks_covering(range.start, range.end - range.start);
        for extent in extents(range) {
            maps.hot
                .end_write(extent, intersect(&blocks, &extent.blocks()), now);
        }
    }

    /// The checksums of what `copies` are of: from memory, else from the pages, which are read.
    pub(super) async fn sums_of(&self, copies: &Copies<D>) -> Sums {
        let mut sums = self.sums_with(copies, Rc::default());
        if sums.known.contains(&Known::Stored) {
            let extent = Block(sums.first).extent();
            sums.stored = Rc::new(self.stored_pages(extent).await);
        }
        sums
    }

    /// The checksums of what `copies` are of: from memory, else from `stored`, the extent's pages.
    pub(super) fn sums_with(&self, copies: &Copies<D>, stored: Rc<Pages>) -> Sums {
        let maps = self.maps.borrow();
        let kept = self.sums.are_kept();
        let known = |block| match kept {
            true => maps.sums.get(block),
            false => Known::Nothing,
        };
        Sums {
            first: copies.range.start / BLOCK_BYTES,
            known: copies.blocks().map(known).collect(),
            stored,
        }
    }

    /// Members whose page of checksums was wanted and could not be read.
    pub(super) fn unreadable_pages(&self, copies: &Copies<D>, sums: &Sums) -> Vec<u8> {
        let wanted = sums.stored.iter().any(Option::is_some);
        let unreadable = |r: &&Receiver<D>| {
            sums.stored[usize::from(r.slot)].is_none() && self.stalls.is_in_sync(r.slot)
        };
        let members = copies.members.iter().filter(|_| wanted);
        members.filter(unreadable).map(|r| r.slot).collect()
    }

    /// What to think of each block. `composed` is what could be put together, from sectors of
    /// several members, of blocks that none can read as a whole.
    pub(super) fn judge_all(
        &self,
        copies: &Copies<D>,
        sums: &Sums,
        composed: &[Option<Span<H::Buffer>>],
    ) -> Vec<BlockVerdict> {
        let mut verdicts = Vec::new();
        copies.for_each_block(|block, contents| {
            let members = copies.members.iter().zip(contents);
            let held: Vec<Held<'_>> = members
                .map(|(member, content)| Held {
                    content: *content,
                    sum: sums.on(member.slot, block),
                })
                .collect();
            let at = verdicts.len();
            let more = composed.get(at).and_then(Option::as_ref);
            let verdict = match more {
                None => judge(block, &held),
                Some(span) => span.read(|bytes| {
                    let more = Held {
                        content: Some(bytes),
                        sum: None,
                    };
                    let all: Vec<_> = held.iter().copied().chain([more]).collect();
                    judge(block, &all)
                }),
            };
            verdicts.push(match verdict {
                // There is no checksum to fill in.
                BlockVerdict::Mend(mend) if !self.sums.are_kept() && mend.rewrite.is_empty() => {
                    BlockVerdict::Fine
                }
                verdict => verdict,
            });
        });
        verdicts
    }

    /// Of a few blocks that no member can read as a whole, what can be read sector by sector.
    async fn compose_unreadable(
        self: &Rc<Self>,
        copies: &Copies<D>,
    ) -> Vec<Option<Span<H::Buffer>>> {
        let mut nowhere = Vec::new();
        copies.for_each_block(|block, contents| {
            nowhere.push((block, contents.iter().all(Option::is_none)));
        });
        let mut composed = Vec::with_capacity(nowhere.len());
        let few = nowhere.iter().filter(|(_, unreadable)| *unreadable).count() <= COMPOSED_MAX;
        for (Block(block), unreadable) in nowhere {
            let mut content = None;
            if unreadable && few {
                let range = self.block_bytes(&(block..block + 1));
                let own = self.fresh_span(length(range.end - range.start));
                let read = self.read_unchecked(&range, own.clone()).await;
                content = read.ok().map(|moved| moved.unwrap_or(own));
            }
            composed.push(content);
        }
        composed
    }

    /// Rewrites copies, then records checksums.
    async fn mend_all(&self, settled: &Settled<D>, report: &mut Report) {
        let (copies, verdicts) = (&settled.copies, &settled.verdicts);
        let mut at = 0;
        while at < verdicts.len() {
            let BlockVerdict::Mend(mend) = &verdicts[at] else {
                at += 1;
                continue;
            };
            let alike = |v: &&BlockVerdict| {
                matches!(v, BlockVerdict::Mend(m)
                    if (m.source, m.rewrite) == (mend.source, mend.rewrite))
            };
            let mut run = at..at + verdicts[at..].iter().take_while(alike).count();
            let source = if mend.source < copies.members.len() {
                copies.span(mend.source, &run)
            } else {
                run.end = at + 1;
                settled.composed[at].clone()
            };
            let offset = copies.range.start + at as u64 * BLOCK_BYTES;
            let first = offset / BLOCK_BYTES;
            let blocks = first..first + (run.end - run.start) as u64;
            for member in mend.rewrite.iter().filter(|&m| m < copies.members.len()) {
                if let Some(source) = &source {
                    let target = &copies.members[member];
                    let what = what_is_wrong(copies, member, at, mend);
                    self.rewrite_one(target, offset, source, (&blocks, what), report)
                        .await;
                }
            }
            at = run.end;
        }
        self.record_mended(copies, verdicts);
    }

    /// Rewrites some blocks on one member, and says so.
    async fn rewrite_one(
        &self,
        target: &Receiver<D>,
        offset: u64,
        source: &Span<H::Buffer>,
        (blocks, what): (&Range<u64>, What),
        report: &mut Report,
    ) {
        let (slot, count) = (target.slot, blocks.end - blocks.start);
        if self.rewrite(target, offset, source).await {
            self.slots.borrow_mut()[usize::from(slot)].repaired_blocks += count;
            self.spend(slot, count);
            return;
        }
        report.failed.push((slot, blocks.clone()));
        let done = if self.stalls.is_in_sync(slot) {
            Done::Damaged
        } else {
            // When it comes back, the blocks are copied whether they have changed or not.
            self.maps.borrow_mut().miss(slot, blocks.clone());
            Done::MemberFailed
        };
        report.add(Some(slot), blocks.clone(), what, done);
    }

    /// Writes `source` to one member and reads it back; one that fails is lost.
    pub(super) async fn rewrite(
        &self,
        target: &Receiver<D>,
        offset: u64,
        source: &Span<H::Buffer>,
    ) -> bool {
        let offset = self.data_offset + offset;
        let same = |r: &Receiver<D>| r.in_sync && Rc::ptr_eq(&r.disk, &target.disk);
        if !self.view().receivers.iter().any(same) {
            return false;
        }
        let write = DiskRequest::Write {
            offset,
            span: source.clone(),
            fua: true,
        };
        let back = self.fresh_span(source.len);
        let read = DiskRequest::Read {
            offset,
            span: back.clone(),
        };
        let result = match self.to_one(target, write).await {
            Ok(()) => self.to_one(target, read).await,
            failed => failed,
        };
        let problem = match result {
            Ok(()) if source.read(|want| back.read(|have| want == have)) => return true,
            Ok(()) => "what was rewritten reads back as something else".to_owned(),
            Err(errno) => format!("rewriting a bad block failed: {errno}"),
        };
        self.begin_loss(target.slot, &problem);
        false
    }

    /// Records the checksums of what is right now.
    fn record_mended(&self, copies: &Copies<D>, verdicts: &[BlockVerdict]) {
        if !self.sums.are_kept() {
            return;
        }
        let view = self.view();
        let mut maps = self.maps.borrow_mut();
        let maps = &mut *maps;
        for (block, verdict) in copies.blocks().zip(verdicts) {
            let BlockVerdict::Mend(mend) = verdict else {
                continue;
            };
            let known =
                mend.stale.is_empty() && !mend.unknown.iter().any(|m| m < copies.members.len());
            if known {
                continue;
            }
            maps.sums.set(block, Some(mend.sum));
            for &slot in &view.absent {
                maps.miss(slot, block.0..block.0 + 1);
            }
        }
    }

    /// Writes down what was found of one block and what was done about it.
    fn note_verdict(&self, settled: &Settled<D>, at: usize, report: &mut Report) {
        let (copies, verdict) = (&settled.copies, &settled.verdicts[at]);
        let block = copies.range.start / BLOCK_BYTES + at as u64;
        let blocks = block..block + 1;
        match verdict {
            BlockVerdict::Fine => {
                let mut maps = self.maps.borrow_mut();
                maps.log.cleared(&blocks);
                maps.damaged.clear(blocks);
            }
            BlockVerdict::Mend(mend) => self.note_mend(copies, at, mend, report),
            BlockVerdict::Damaged | BlockVerdict::Undecidable => {
                let mut readable = false;
                copies.for_each_block(|b, contents| {
                    readable |= b.0 == block && contents.iter().any(Option::is_some);
                });
                let what = match verdict {
                    _ if !readable => What::Unreadable,
                    BlockVerdict::Damaged => What::ChecksumFailed,
                    _ => What::CopiesDiffer,
                };
                // Without a table nothing would ever clear it but a write.
                let marks = readable && self.sums.are_kept();
                if marks {
                    self.maps.borrow_mut().damaged.set(blocks.clone());
                }
                report.add(None, blocks, what, Done::Damaged);
                report.checked.damaged += 1;
            }
        }
    }

    fn note_mend(&self, copies: &Copies<D>, at: usize, mend: &Mend, report: &mut Report) {
        let block = copies.range.start / BLOCK_BYTES + at as u64;
        let blocks = block..block + 1;
        let (before, repair) = (report.checked.findings, report.look.repair);
        let mut mended = repair;
        let done = |done| if repair { done } else { Done::CheckOnly };
        for member in mend.rewrite.iter() {
            let Some(receiver) = copies.members.get(member) else {
                continue;
            };
            if report.has_failed(receiver.slot, block) {
                mended = false;
                continue;
            }
            let what = what_is_wrong(copies, member, at, mend);
            let slot = Some(receiver.slot);
            report.add(slot, blocks.clone(), what, done(Done::Rewritten));
        }
        for member in mend.stale.iter() {
            let slot = copies.members.get(member).map(|r| r.slot);
            let what = What::ChecksumStale;
            report.add(slot, blocks.clone(), what, done(Done::ChecksumMended));
        }
        if repair && report.checked.findings > before {
            report.checked.repaired += 1;
        }
        if mended {
            let mut maps = self.maps.borrow_mut();
            maps.log.cleared(&blocks);
            maps.damaged.clear(blocks);
        }
    }

    /// A page of checksums could not be read: it is made anew when its extent cools.
    fn note_page(&self, slot: u8, blocks: &Range<u64>, report: &mut Report) {
        let done = if report.look.repair {
            let extent = Block(blocks.start).extent();
            self.maps.borrow_mut().sums.want(extent);
            Done::ChecksumMended
        } else {
            Done::CheckOnly
        };
        report.add(Some(slot), blocks.clone(), What::PageUnreadable, done);
    }
}

/// What a member's copy of a block has that is to be rewritten.
fn what_is_wrong<D: Disk>(copies: &Copies<D>, member: usize, at: usize, mend: &Mend) -> What {
    match copies.readable_at(member, at) {
        false => What::Unreadable,
        true if mend.proof == Proof::Checksum => What::ChecksumFailed,
        true => What::CopiesDiffer,
    }
}
