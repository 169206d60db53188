//! Blocks that a resync finds without a right copy among the in-sync members.
//!
//! The resync must end, and nothing may look right because of it: a block whose copies are all
//! equal and whose checksums are not would count as one whose checksums are old (`verdict.rs`).
//! So what is wrong is not copied. The resyncing member keeps what it has, unless that is the same;
//! its copy of the checksums then says on every member that the block is damaged.
//!
//! And it may have the right copy: then that one is the source.

use super::copies::Copies;
use super::{Mirror, Receiver, length};
use crate::host::{Disk, DiskRequest, Errno, Host, Span};
use crate::scrub_log::{Done, Finding, FoundBy, What};
use crate::verdict::BlockVerdict;
use dirty_map::{BLOCK_BYTES, Block, Sum};
use std::rc::Rc;

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// Settles what `target` holds of a block that the in-sync members cannot give (for `errno`).
    /// The caller holds its lock.
    ///
    /// # Errors
    ///
    /// `errno` when it is not certain that it is this block: it is tried again. Else that of
    /// `target`.
    pub(super) async fn resync_damaged(
        self: &Rc<Self>,
        target: &Receiver<D>,
        block: Block,
        errno: Errno,
    ) -> Result<(), Errno> {
        let blocks = block.0..block.0 + 1;
        let range = self.block_bytes(&blocks);
        if self.maps.borrow().hot.is_unequalised(blocks) {
            return Err(errno);
        }
        let copies = self.read_copies(&range).await;
        let sums = self.sums_of(&copies).await;
        let verdict = self.judge_all(&copies, &sums, &[]);
        let damaged =
            |v: &BlockVerdict| matches!(v, BlockVerdict::Damaged | BlockVerdict::Undecidable);
        // That the members answer for the checksums shows that the fault is not all of theirs.
        let stored = self.stored_pages(block.extent()).await;
        let answers = stored.iter().any(Option::is_some);
        let members = copies.members.iter();
        let known: Vec<Sum> = members.filter_map(|r| sums.on(r.slot, block)).collect();
        if !answers || !verdict.iter().all(damaged) {
            return Err(errno);
        }
        let own = self.fresh_span(length(range.end - range.start));
        let offset = self.data_offset + range.start;
        let read = DiskRequest::Read {
            offset,
            span: own.clone(),
        };
        let answer = self.to_one(target, read).await;
        if answer == Err(Errno::TIMED_OUT) {
            self.begin_loss(target.slot, "a read got no answer within the deadline");
            return answer;
        }
        let own = answer.ok().map(|()| own);
        let fits =
            |span: &Span<H::Buffer>| span.read(|content| known.contains(&Sum::of(block, content)));
        if let Some(own) = own.as_ref().filter(|own| fits(own)) {
            return self.copy_back(&copies, own).await;
        }
        if copies.nothing_readable() {
            // The disk may read it yet.
            return Err(errno);
        }
        self.leave_damaged(target, &copies, own).await
    }

    /// The resyncing member alone has the right copy: it goes to the in-sync ones, as a repair.
    async fn copy_back(
        self: &Rc<Self>,
        copies: &Copies<D>,
        right: &Span<H::Buffer>,
    ) -> Result<(), Errno> {
        let range = &copies.range;
        let block = range.start / BLOCK_BYTES;
        self.heat(range).await?;
        self.begin_repair(range);
        let view = self.view();
        let mut all = true;
        for receiver in view.receivers.iter().filter(|r| r.in_sync) {
            let rewritten = self.rewrite(receiver, range.start, right).await;
            let done = match rewritten {
                true => Done::Rewritten,
                false if self.stalls.is_in_sync(receiver.slot) => Done::Damaged,
                false => Done::MemberFailed,
            };
            all &= done != Done::Damaged;
            let members = &mut copies.members.iter().enumerate();
            let readable =
                members.any(|(at, m)| m.slot == receiver.slot && copies.readable_at(at, 0));
            let what = match readable {
                true => What::ChecksumFailed,
                false => What::Unreadable,
            };
            self.note_resync(Some(receiver.slot), block, what, done);
        }
        self.end_repair(range);
        if !all {
            return Err(Errno::IO);
        }
        let mut maps = self.maps.borrow_mut();
        maps.log.cleared(&(block..block + 1));
        maps.damaged.clear(block..block + 1);
        Ok(())
    }

    /// Sees to it that the resyncing member's copy is another than each in-sync member's.
    async fn leave_damaged(
        self: &Rc<Self>,
        target: &Receiver<D>,
        copies: &Copies<D>,
        own: Option<Span<H::Buffer>>,
    ) -> Result<(), Errno> {
        let range = &copies.range;
        let block = range.start / BLOCK_BYTES;
        let mut same = own.is_none();
        copies.for_each_block(|_, contents| {
            if let Some(own) = &own {
                same |= own.read(|own| contents.contains(&Some(own)));
            }
        });
        if same {
            // Nothing that a member holds: the first one's copy, inverted.
            let span = self.fresh_span(length(range.end - range.start));
            copies.for_each_block(|_, contents| {
                let first = contents.iter().flatten().next().copied();
                span.fill(|out| {
                    for (at, byte) in out.iter_mut().enumerate() {
                        *byte = !first.map_or(0, |content| content[at]);
                    }
                });
            });
            let write = DiskRequest::Write {
                offset: self.data_offset + range.start,
                span,
                fua: false,
            };
            if let Err(errno) = self.to_one(target, write).await {
                let reason = format!("a write during resync failed: {errno}");
                self.begin_loss(target.slot, &reason);
                return Err(errno);
            }
        }
        self.note_resync(None, block, What::ChecksumFailed, Done::Damaged);
        Ok(())
    }

    fn note_resync(&self, slot: Option<u8>, block: u64, what: What, done: Done) {
        let finding = Finding {
            when_secs: self.host.wall_clock_secs(),
            slot,
            blocks: block..block + 1,
            what,
            done,
            by: FoundBy::Resync,
        };
        tracing::warn!("{finding:?}");
        self.maps.borrow_mut().log.add(&finding);
    }
}
