//! What comes of a second look at blocks: the right content, and what is written down.

use super::check::Checked;
use super::copies::Copies;
use super::length;
use super::settle::Look;
use crate::host::{Disk, Errno, Span};
use crate::scrub_log::{Done, Finding, What};
use crate::verdict::BlockVerdict;
use dirty_map::BLOCK_BYTES;
use std::ops::Range;

/// What a second look has shown.
pub(super) struct Settled<D: Disk> {
    pub(super) checked: Checked,
    pub(super) copies: Copies<D>,
    /// What could be put together, from sectors of several members, of blocks that none can read
    /// as a whole.
    pub(super) composed: Vec<Option<Span<D::Buffer>>>,
    pub(super) verdicts: Vec<BlockVerdict>,
}

impl<D: Disk> Settled<D> {
    /// The right content of the block with index `at`.
    fn content(&self, at: usize) -> Option<Span<D::Buffer>> {
        let member = match &self.verdicts[at] {
            BlockVerdict::Mend(mend) => mend.source,
            BlockVerdict::Fine => 0,
            BlockVerdict::Damaged | BlockVerdict::Undecidable => return None,
        };
        if member >= self.copies.members.len() {
            return self.composed[at].clone();
        }
        self.copies.span(member, &(at..at + 1))
    }

    /// Copies what is right into `span`.
    ///
    /// # Errors
    ///
    /// `IO` when there is a block of which no copy is.
    pub(super) fn content_into(&self, span: &Span<D::Buffer>) -> Result<(), Errno> {
        for at in 0..self.verdicts.len() {
            let content = self.content(at).ok_or(Errno::IO)?;
            let to = span.slice(at * length(BLOCK_BYTES), content.len);
            content.read(|from| to.fill(|to| to.copy_from_slice(from)));
        }
        Ok(())
    }
}

pub(super) fn is_mend(verdict: &BlockVerdict) -> bool {
    matches!(verdict, BlockVerdict::Mend(_))
}

/// What is written down of a look.
pub(super) struct Report {
    pub(super) checked: Checked,
    pub(super) findings: Vec<Finding>,
    /// Rewrites that failed: the slot and the blocks.
    pub(super) failed: Vec<(u8, Range<u64>)>,
    now_secs: u64,
    pub(super) look: Look,
}

impl Report {
    pub(super) fn new(look: Look, now_secs: u64) -> Self {
        Self {
            checked: Checked::default(),
            findings: Vec::new(),
            failed: Vec::new(),
            now_secs,
            look,
        }
    }

    /// Whether the rewrite of a block on a member has failed.
    pub(super) fn has_failed(&self, slot: u8, block: u64) -> bool {
        let mut failed = self.failed.iter();
        failed.any(|(at, blocks)| *at == slot && blocks.contains(&block))
    }

    pub(super) fn add(&mut self, slot: Option<u8>, blocks: Range<u64>, what: What, done: Done) {
        self.checked.findings += 1;
        let goes_on = |f: &&mut Finding| {
            (f.slot, f.what, f.done, f.blocks.end) == (slot, what, done, blocks.start)
        };
        if let Some(before) = self.findings.iter_mut().rev().find(goes_on) {
            before.blocks.end = blocks.end;
            return;
        }
        self.findings.push(Finding {
            when_secs: self.now_secs,
            slot,
            blocks,
            what,
            done,
            by: self.look.by,
        });
    }
}
