//! A first look at members behind the network by the checksums of their blocks, so that a scrub
//! moves those and not the data.
//!
//! Members of this machine are read, or one of the others where there is none; the others say what
//! the CRC32 of each block is ([`Disk::sums`]). A block is as it should be when every copy that was
//! read is the same, every CRC32 is of just that, and it fits the checksum that each member has
//! stored. Where not all of them answer, everything is read at once; whatever is not so gets the
//! second look, for which everything is read: nothing is ever repaired, chosen or called right for a
//! reader by a checksum that came from elsewhere. What is missed by it: a copy behind the network
//! that differs and has the same CRC32, one in four billion of those that do.

use super::Mirror;
use super::check::FirstLook;
use super::copies::Copies;
use super::length;
use super::settle::Sums;
use super::sums::Pages;
use crate::host::{Disk, Host};
use dirty_map::{BLOCK_BYTES, Block, Sum};
use std::ops::Range;
use std::rc::Rc;

/// What a member behind the network said: its slot, and the CRC32 of each block.
type Said = (u8, Vec<u32>);

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// Looks at a piece without its lock. When checksums are not to be had, all copies have to be
    /// read: so many bytes have been read in vain then.
    pub(super) async fn look_by_sums(
        &self,
        piece: &Range<u64>,
        pages: &Rc<Pages>,
    ) -> Result<FirstLook, u64> {
        let bytes = piece.end - piece.start;
        let view = self.view();
        let in_sync = || view.receivers.iter().filter(|r| r.in_sync);
        let page_missing = in_sync().any(|r| pages[usize::from(r.slot)].is_none());
        if !bytes.is_multiple_of(BLOCK_BYTES) || pages.iter().any(Option::is_some) && page_missing {
            return Err(0);
        }
        let count = length(bytes / BLOCK_BYTES);
        let is_local = |disk: &D| !disk.geometry().behind_network;
        let no_local = !in_sync().any(|r| is_local(&r.disk));
        let (mut read, mut asked) = (Vec::new(), Vec::new());
        for member in in_sync() {
            let alone = no_local && read.is_empty();
            let to_be_read = alone || is_local(&member.disk);
            let offset = self.data_offset + piece.start;
            match (!to_be_read).then(|| member.disk.sums(offset, count)) {
                Some(Some(sums)) => asked.push((member.slot, sums)),
                _ => read.push(member.clone()),
            }
        }
        if asked.is_empty() {
            return Err(0);
        }
        // They compute while these are read.
        let copies = self.read_some_copies(read, piece).await.ok_or(0_u64)?;
        let mut said = Vec::with_capacity(asked.len());
        for (slot, sums) in asked {
            let crcs = sums.await.filter(|crcs| crcs.len() == count);
            said.push((slot, crcs.ok_or_else(|| copies.bytes_read())?));
        }
        Ok(FirstLook {
            member_bytes: copies.bytes_read() + bytes * said.len() as u64,
            fine: self.judge_by_sums(&copies, &said, pages),
            all_doubtful: false,
        })
    }

    fn judge_by_sums(&self, copies: &Copies<D>, said: &[Said], pages: &Rc<Pages>) -> Vec<bool> {
        let stored = self.sums_with(copies, Rc::clone(pages));
        let mut fine = Vec::new();
        copies.for_each_block(|block, contents| {
            let crcs = said.iter().map(|(_, crcs)| crcs[fine.len()]);
            let right = self.right_by_sums(block, contents, crcs);
            let slots = copies.members.iter().map(|member| member.slot);
            let mut slots = slots.chain(said.iter().map(|(slot, _)| *slot));
            fine.push(right.is_some_and(|sum| self.is_stored(&stored, &mut slots, block, sum)));
        });
        fine
    }

    /// The checksum of a block that all copies agree on.
    fn right_by_sums(
        &self,
        block: Block,
        contents: &[Option<&[u8]>],
        mut crcs: impl Iterator<Item = u32>,
    ) -> Option<Sum> {
        let (first, others) = contents.split_first()?;
        let sum = Sum::of(block, (*first)?);
        let equal = others.iter().all(|other| other == first);
        (equal && crcs.all(|crc| Sum::of_crc(block, crc) == sum)).then_some(sum)
    }

    /// Whether each of the members has stored this checksum, if any are kept.
    fn is_stored(
        &self,
        stored: &Sums,
        slots: &mut impl Iterator<Item = u8>,
        block: Block,
        sum: Sum,
    ) -> bool {
        !self.sums.are_kept() || slots.all(|slot| stored.on(slot, block) == Some(sum))
    }
}
