//! What a member has changed by itself, from its own maps: it gives that up, and gets what is here
//! instead. Which of its maps tell that is decided in [`crate::split`].

use super::Mirror;
use super::member_io::{read_pages, read_region};
use crate::host::{Disk, Host};
use crate::layout::{RegionKind, SECTORS_PER_PAGE, missed_pages_of};
use crate::superblock::Superblock;
use dirty_map::{BLOCKS_PER_EXTENT, Block, MissedMap, PAYLOAD_BYTES, Summary};
use std::ops::Range;

/// Pages of a missed map that are read at once.
const PAGES: usize = 64;

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// Adds to the missed map of a member what its maps of `slots` name. What cannot be read there
    /// counts as changed. Durable with the next commit.
    pub(super) async fn miss_what_it_changed(&self, disk: &D, member: &Superblock, slots: &[u8]) {
        for &slot in slots {
            let changed = self.changed_map(disk, member, slot).await;
            let mut from = 0;
            while let Some(run) = changed.next_run(from, u64::MAX) {
                from = run.end;
                self.miss_written(member.own_slot, run);
            }
        }
    }

    /// Blocks of extents that are not in use here read as zeroes whatever a member holds.
    fn miss_written(&self, slot: u8, run: Range<u64>) {
        let mut maps = self.maps.borrow_mut();
        let mut at = run.start;
        while at < run.end {
            let extent = Block(at).extent();
            let end = extent.blocks().end.min(run.end);
            if maps.is_written(extent) {
                maps.miss(slot, at..end);
            }
            at = end;
        }
    }

    /// A missed map as a member has it on its disk.
    async fn changed_map(&self, disk: &D, member: &Superblock, slot: u8) -> MissedMap {
        let extents = u64::from(self.maps.borrow().states.len());
        let blocks = extents * BLOCKS_PER_EXTENT;
        let mut changed = MissedMap::new(blocks);
        let find = |kind| member.layout.find(kind, slot);
        let (Some(summary), Some(missed)) = (find(RegionKind::Summary), find(RegionKind::Missed))
        else {
            changed.set_all();
            return changed;
        };
        let image = read_region(&*self.host, disk, member, summary).await;
        let pages = u32::try_from(missed_pages_of(self.size_bytes)).unwrap_or(u32::MAX);
        let mut used = Summary::new(pages);
        for (sector, content) in (0..used.sectors()).zip(&image.sectors) {
            let payload = content
                .as_ref()
                .and_then(|(_, payload)| payload.as_slice().try_into().ok());
            used.load_payload(sector, payload.unwrap_or(&[0xff; PAYLOAD_BYTES]));
        }
        let used: Vec<u32> = used.iter().collect();
        for part in used
            .chunk_by(|a, b| a + 1 == *b)
            .flat_map(|run| run.chunks(PAGES))
        {
            let first = u64::from(part[0]);
            let range = first..first + part.len() as u64;
            let image = read_pages(&*self.host, disk, member, missed, range).await;
            let first = u32::try_from(first * SECTORS_PER_PAGE).unwrap_or(u32::MAX);
            for (sector, content) in (first..changed.sectors()).zip(&image.sectors) {
                match content
                    .as_ref()
                    .and_then(|(_, payload)| payload.as_slice().try_into().ok())
                {
                    Some(payload) => changed.load_payload(sector, payload),
                    None => changed.set_sector(sector),
                }
            }
        }
        changed
    }
}
