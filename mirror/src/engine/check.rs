//! Checking an extent for the scrubber.
//!
//! All in-sync members' copies are read, or asked for checksums where that saves their way
//! (`by_sums.rs`), and held against their checksums and each other, without
//! a lock: nobody waits for what is as it should be. Whatever looks wrong, because it is or only
//! because a write came between, gets a second look under the range lock (`settle.rs`). So does all
//! of an extent that is hot, a part at a time, if it is not to be left.

use super::settle::Look;
use super::sums::Pages;
use super::{Mirror, PIECE_BYTES, length};
use crate::host::{Disk, Errno, Host};
use crate::scrub_log::{FoundBy, ScrubLog};
use crate::verdict::BlockVerdict;
use dirty_map::{BLOCK_BYTES, EXTENT_BYTES, Extent, blocks_covering};
use std::cell::Ref;
use std::ops::Range;
use std::rc::Rc;

/// How an extent is checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckOptions {
    /// What is wrong is repaired.
    pub repair: bool,
    /// Each member is asked for all of it in one request: twice as fast on some disks, but nothing
    /// for a time in which others use them.
    pub at_once: bool,
    /// One that is hot is checked too; writes to it wait for a part at a time.
    pub hot_too: bool,
}

/// What one look at an extent has shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// The extent was written lately; nothing, or not all of it, was looked at.
    pub skipped_hot: bool,
    /// Why some of it could not be checked, if it could not.
    pub failed: Option<Errno>,
    /// Blocks that were checked.
    pub blocks: u64,
    /// Bytes read from members.
    pub member_bytes: u64,
    /// Things that were not as they should be.
    pub findings: u64,
    /// Blocks of which a copy or a checksum was made right.
    pub repaired: u64,
    /// Blocks of which no copy is right.
    pub damaged: u64,
}

/// What a look without the lock has shown.
pub(super) struct FirstLook {
    /// Of each block whether it is as it should be.
    pub(super) fine: Vec<bool>,
    /// Bytes read from members.
    pub(super) member_bytes: u64,
    /// All of it needs a second look.
    pub(super) all_doubtful: bool,
}

impl Checked {
    pub(super) fn add(&mut self, other: Self) {
        self.skipped_hot |= other.skipped_hot;
        self.failed = self.failed.or(other.failed);
        self.blocks += other.blocks;
        self.member_bytes += other.member_bytes;
        self.findings += other.findings;
        self.repaired += other.repaired;
        self.damaged += other.damaged;
    }
}

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// Checks all of an extent; a part that could not be checked does not keep it from the others.
    ///
    /// # Errors
    ///
    /// When the mirror stops.
    pub async fn check_extent(
        self: &Rc<Self>,
        extent: Extent,
        how: CheckOptions,
    ) -> Result<Checked, Errno> {
        let look = Look {
            by: FoundBy::Scrub,
            repair: how.repair,
        };
        let mut checked = Checked::default();
        // Once for all pieces. Older than what is read after them: then they do not fit, and
        // whatever does not gets a second look.
        let pages = {
            let _pass = self.gate.enter().await;
            if self.stopping.get() {
                return Err(Errno::IO);
            }
            // Later it may be hot by a repair, or be looked at as well.
            let hot = self.maps.borrow().hot.contains(extent);
            if hot && !how.hot_too {
                checked.skipped_hot = true;
                return Ok(checked);
            }
            if hot {
                None
            } else {
                Some(Rc::new(self.stored_pages(extent).await))
            }
        };
        let all = self.extent_bytes(extent);
        let step = if how.at_once && pages.is_some() {
            EXTENT_BYTES
        } else {
            PIECE_BYTES as u64
        };
        let mut at = all.start;
        while at < all.end {
            let piece = at..(at + step).min(all.end);
            at = piece.end;
            match self.check_piece(extent, piece, pages.clone(), look).await {
                Ok(found) => checked.add(found),
                Err(errno) if self.stopping.get() => return Err(errno),
                Err(errno) => checked.failed = Some(errno),
            }
        }
        Ok(checked)
    }

    /// What scrubs and reads have done and found.
    pub fn scrub_log(&self) -> Ref<'_, ScrubLog> {
        Ref::map(self.maps.borrow(), |maps| &maps.log)
    }

    /// Changes the log; what has changed is written with the next tick's commit.
    pub fn with_scrub_log<R>(&self, change: impl FnOnce(&mut ScrubLog) -> R) -> R {
        change(&mut self.maps.borrow_mut().log)
    }

    /// The first extent, from `from` on, that has been written.
    pub fn next_written(&self, from: Extent) -> Option<Extent> {
        self.maps.borrow().states.next_written(from)
    }

    /// Extents of the device.
    pub fn extents(&self) -> u32 {
        self.maps.borrow().states.len()
    }

    /// Checks a part of an extent: with `pages` without its lock first, and what is doubtful then
    /// with it; without them, at most [`PIECE_BYTES`], with the lock at once.
    async fn check_piece(
        self: &Rc<Self>,
        extent: Extent,
        piece: Range<u64>,
        pages: Option<Rc<Pages>>,
        look: Look,
    ) -> Result<Checked, Errno> {
        let _pass = self.gate.enter().await;
        if self.stopping.get() {
            return Err(Errno::IO);
        }
        if !self.maps.borrow().is_written(extent) {
            return Ok(Checked::default());
        }
        let Some(pages) = pages else {
            return self.second_look(extent, &piece, look).await;
        };
        let (mut checked, doubtful) = self.first_look(&piece, pages).await?;
        for part in doubtful {
            match self.second_look(extent, &part, look).await {
                Ok(found) => checked.add(Checked { blocks: 0, ..found }),
                Err(errno) => checked.failed = Some(errno),
            }
        }
        Ok(checked)
    }

    /// Looks at a part under its lock, and at all that is wrong there.
    async fn second_look(
        self: &Rc<Self>,
        extent: Extent,
        part: &Range<u64>,
        look: Look,
    ) -> Result<Checked, Errno> {
        let _lock = self.locks.lock(part.clone()).await;
        if self.stopping.get() || self.write_blocked.get() {
            return Err(Errno::IO);
        }
        if !self.maps.borrow().is_written(extent) {
            return Ok(Checked::default());
        }
        let blocks = blocks_covering(part.start, part.end - part.start);
        self.equalise_locked(blocks.clone()).await?;
        Ok(self.settle(&blocks, look).await?.checked)
    }

    /// Looks at a piece without its lock, so that nobody waits for what is as it should be. Returns
    /// the parts, of at most [`PIECE_BYTES`], that need a second look.
    async fn first_look(
        self: &Rc<Self>,
        piece: &Range<u64>,
        pages: Rc<Pages>,
    ) -> Result<(Checked, Vec<Range<u64>>), Errno> {
        let look = match self.look_by_sums(piece, &pages).await {
            Ok(look) => look,
            Err(_) if self.stopping.get() => return Err(Errno::IO),
            Err(in_vain) => {
                let mut look = self.look_at_all(piece, pages).await?;
                look.member_bytes += in_vain;
                look
            }
        };
        let checked = Checked {
            blocks: look.fine.len() as u64,
            member_bytes: look.member_bytes,
            ..Checked::default()
        };
        let mut doubtful = Vec::new();
        for (number, fine) in (0..).zip(look.fine.chunks(PIECE_BYTES / length(BLOCK_BYTES))) {
            let start = piece.start + number * PIECE_BYTES as u64;
            let part = start..(start + PIECE_BYTES as u64).min(piece.end);
            let blocks = blocks_covering(part.start, part.end - part.start);
            let fine = fine.iter().all(|fine| *fine);
            // What was damaged may have become right.
            if look.all_doubtful || !fine || self.is_called_damaged(&blocks) {
                doubtful.push(part);
            }
        }
        Ok((checked, doubtful))
    }

    /// Reads a piece from every in-sync member.
    async fn look_at_all(
        self: &Rc<Self>,
        piece: &Range<u64>,
        pages: Rc<Pages>,
    ) -> Result<FirstLook, Errno> {
        let copies = self.read_copies(piece).await;
        if copies.nothing_readable() {
            return Err(copies.error.unwrap_or(Errno::IO));
        }
        let sums = self.sums_with(&copies, pages);
        let verdicts = self.judge_all(&copies, &sums, &[]);
        let fine = verdicts.iter().map(|v| *v == BlockVerdict::Fine);
        Ok(FirstLook {
            fine: fine.collect(),
            member_bytes: copies.bytes_read(),
            all_doubtful: !self.unreadable_pages(&copies, &sums).is_empty(),
        })
    }

    /// Whether something is known of damage to any of `blocks`.
    fn is_called_damaged(&self, blocks: &Range<u64>) -> bool {
        let maps = self.maps.borrow();
        let overlaps = |run: &Range<u64>| run.start < blocks.end && blocks.start < run.end;
        maps.damaged.any_in(blocks.clone()) || maps.log.damaged_runs().iter().any(overlaps)
    }
}
