//! Where each thing lies on a member.
//!
//! Every member of a mirror has the same layout, so that one byte of the device is at the same
//! offset on each. The superblock carries the result as a table of regions; nothing computes
//! an offset from a formula after creation, so that a later version may lay out new members
//! differently.
//!
//! ```text
//! 0            4 KiB  left untouched
//! 4 KiB        4 KiB  superblock copy A
//! 8 KiB        4 KiB  superblock copy B
//! 12 KiB       4 KiB  position page, copy A
//! 16 KiB       4 KiB  position page, copy B
//! then                extent-state map, copy A, copy B
//! then, for each of 9 slots: summary of its missed map, copy A, copy B
//! then, for each of 9 slots: missed map, copy A, copy B
//! then                checksum table, one 4 KiB page an extent
//! then                scrub log, copy A, copy B
//! data_offset         the device's bytes; 1 MiB aligned
//! ```
//!
//! Maps are written in *pages* of 4 KiB, each of eight self-describing 512-byte sectors (see
//! the crate `dirty-map`): a page is the unit of a commit, so that members with 4 KiB logical
//! blocks work, and a sector is the unit that may tear.

use dirty_map::{
    BLOCK_BYTES, EXTENT_BYTES, MISSED_PER_SECTOR, STATES_PER_SECTOR, SUMMARY_PER_SECTOR,
};

/// Bytes of a map page, the unit in which maps are written.
pub const PAGE_BYTES: u64 = 4096;
/// Map sectors in a page.
pub const SECTORS_PER_PAGE: u64 = 8;
/// Pages of the scrub log.
pub const SCRUB_PAGES: u64 = 16;
/// Slots for which maps are reserved: eight, and one for a replacement under way.
pub const SLOTS_MAX: usize = 9;
/// Alignment of the data area.
pub const DATA_ALIGNMENT_BYTES: u64 = 1 << 20;
/// The smallest device that can be a member.
pub const MEMBER_BYTES_MIN: u64 = 16 << 20;
/// The largest mirror.
pub const MIRROR_BYTES_MAX: u64 = 1 << 50;

/// What a region holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RegionKind {
    /// The position page.
    Position,
    /// The extent-state map.
    State,
    /// Which pages of a slot's missed map have been written since the map began.
    Summary,
    /// A slot's missed map.
    Missed,
    /// Checksums of blocks.
    Checksums,
    /// What scrubs have done and found; absent on mirrors made before there were any.
    Scrub,
}

/// One region. Both copies have the same length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// What it holds.
    pub kind: RegionKind,
    /// Whose map it is; 0 where the kind has no slot.
    pub slot: u8,
    /// Where copy A begins, in bytes from the member's start.
    pub copy_a: u64,
    /// Where copy B begins; equal to `copy_a` where there is only one copy.
    pub copy_b: u64,
    /// Length of a copy in bytes, a multiple of 4 KiB.
    pub len: u64,
    /// Extents that it covers.
    pub extents: u64,
}

/// The regions of a member and where its data begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// All regions.
    pub regions: Vec<Region>,
    /// First byte of the device's data on the member.
    pub data_offset: u64,
    /// Size of the device in bytes.
    pub size_bytes: u64,
}

/// Pages needed for `entries` entries at `per_sector` entries a sector.
fn pages_for(entries: u64, per_sector: u64) -> u64 {
    entries
        .div_ceil(per_sector)
        .div_ceil(SECTORS_PER_PAGE)
        .max(1)
}

/// Extents of a device of `size_bytes`; the last one may be partial.
#[must_use]
pub fn extents_of(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(EXTENT_BYTES)
}

/// Pages of the missed map of a device of `size_bytes`.
#[must_use]
pub fn missed_pages_of(size_bytes: u64) -> u64 {
    let blocks = extents_of(size_bytes) * (EXTENT_BYTES / BLOCK_BYTES);
    pages_for(blocks, MISSED_PER_SECTOR)
}

impl Layout {
    /// The layout for a device of `size_bytes`.
    #[must_use]
    pub fn for_size(size_bytes: u64) -> Self {
        let extents = extents_of(size_bytes);
        let state = pages_for(extents, STATES_PER_SECTOR) * PAGE_BYTES;
        let missed_pages = missed_pages_of(size_bytes);
        let summary = pages_for(missed_pages, SUMMARY_PER_SECTOR) * PAGE_BYTES;
        let mut next = 12 << 10;
        let mut regions = Vec::new();
        let mut add = |kind, slot, len: u64, copies: u64| {
            let copy_b = if copies == 2 { next + len } else { next };
            regions.push(Region {
                kind,
                slot,
                copy_a: next,
                copy_b,
                len,
                extents,
            });
            next += len * copies;
        };
        add(RegionKind::Position, 0, PAGE_BYTES, 2);
        add(RegionKind::State, 0, state, 2);
        for slot in 0..SLOTS_MAX {
            add(RegionKind::Summary, narrow(slot), summary, 2);
        }
        for slot in 0..SLOTS_MAX {
            add(
                RegionKind::Missed,
                narrow(slot),
                missed_pages * PAGE_BYTES,
                2,
            );
        }
        add(RegionKind::Checksums, 0, extents * PAGE_BYTES, 1);
        add(RegionKind::Scrub, 0, SCRUB_PAGES * PAGE_BYTES, 2);
        let data_offset = next.next_multiple_of(DATA_ALIGNMENT_BYTES);
        Self {
            regions,
            data_offset,
            size_bytes,
        }
    }

    /// The largest device, a multiple of 4 KiB, that fits on a member of `member_bytes`; `None`
    /// when there is no room for a single block.
    #[must_use]
    pub fn largest_size_on(member_bytes: u64) -> Option<u64> {
        let (mut low, mut high) = (0, member_bytes / BLOCK_BYTES);
        while low < high {
            let middle = (low + high).div_ceil(2);
            let size = middle * BLOCK_BYTES;
            if Self::for_size(size).member_bytes() <= member_bytes {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        (low > 0).then_some(low * BLOCK_BYTES)
    }

    /// Bytes that a member needs for this layout.
    #[must_use]
    pub fn member_bytes(&self) -> u64 {
        self.data_offset + self.size_bytes
    }

    /// The region of `kind` for `slot`, if there is one.
    #[must_use]
    pub fn find(&self, kind: RegionKind, slot: u8) -> Option<&Region> {
        self.regions
            .iter()
            .find(|r| r.kind == kind && r.slot == slot)
    }

    /// Whether the regions lie in the member without touching each other, the superblocks or
    /// the data area; a superblock whose table does not is not believed (R17).
    #[must_use]
    pub fn is_sound(&self) -> bool {
        if self.data_offset > MIRROR_BYTES_MAX {
            return false;
        }
        let mut spans = vec![(0, 12 << 10)];
        for region in &self.regions {
            let copies = if region.copy_a == region.copy_b { 1 } else { 2 };
            for start in [region.copy_a, region.copy_b].into_iter().take(copies) {
                let Some(end) = start.checked_add(region.len) else {
                    return false;
                };
                if start % PAGE_BYTES != 0 || region.len % PAGE_BYTES != 0 || region.len == 0 {
                    return false;
                }
                spans.push((start, end));
            }
        }
        spans.sort_unstable();
        spans.windows(2).all(|pair| pair[0].1 <= pair[1].0)
            && spans.last().is_some_and(|last| last.1 <= self.data_offset)
            && self.holds_what_the_size_needs()
    }

    fn holds_what_the_size_needs(&self) -> bool {
        let needed = Self::for_size(self.size_bytes);
        needed.regions.iter().all(|want| {
            let have = self.find(want.kind, want.slot);
            have.map_or(want.kind == RegionKind::Scrub, |have| {
                (want.len..=want.len * 2).contains(&have.len)
                    && (have.copy_a != have.copy_b) == (want.copy_a != want.copy_b)
            })
        })
    }
}

/// A slot number as the formats store it.
fn narrow(slot: usize) -> u8 {
    u8::try_from(slot).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn layouts_of_all_sizes_are_sound_and_fit() {
        for size in [
            4096,
            1 << 20,
            15 << 20,
            1 << 30,
            (12 << 40) + 4096,
            256 << 40,
        ] {
            let layout = Layout::for_size(size);
            assert!(layout.is_sound(), "size {size}");
            assert_eq!(layout.data_offset % DATA_ALIGNMENT_BYTES, 0);
        }
    }

    #[test]
    fn the_smallest_member_holds_a_useful_device() {
        let size = Layout::largest_size_on(MEMBER_BYTES_MIN).unwrap();
        assert!(size >= 14 << 20, "{size}");
        assert!(Layout::for_size(size).member_bytes() <= MEMBER_BYTES_MIN);
        assert!(Layout::for_size(size + 4096).member_bytes() > MEMBER_BYTES_MIN);
        assert_eq!(Layout::largest_size_on(1 << 20), None);
    }

    #[test]
    fn overlapping_or_short_regions_are_unsound() {
        let good = Layout::for_size(1 << 30);
        let mut overlap = good.clone();
        overlap.regions[1].copy_b = overlap.regions[1].copy_a;
        assert!(!overlap.is_sound(), "a lost second copy");
        let mut short = good.clone();
        short.regions[1].len = 0;
        assert!(!short.is_sound());
        let mut wraps = good.clone();
        wraps.regions[3].copy_a = u64::MAX - 4095;
        assert!(!wraps.is_sound());
        let mut into_data = good;
        into_data.data_offset = 1 << 20;
        into_data.regions.last_mut().unwrap().len = 1 << 40;
        assert!(!into_data.is_sound());
    }

    #[test]
    fn tables_at_the_limits_of_what_is_sound() {
        let good = || {
            let mut layout = Layout::for_size(1 << 30);
            layout.data_offset += 4 << 20;
            layout
        };
        let with = |change: &dyn Fn(&mut Layout)| {
            let mut layout = good();
            change(&mut layout);
            layout.is_sound()
        };
        assert!(good().is_sound());
        assert!(with(&|layout| layout.data_offset = MIRROR_BYTES_MAX));
        assert!(!with(&|layout| layout.data_offset = MIRROR_BYTES_MAX + 4096));
        // The last region may move and grow, in whole pages and to twice what is needed.
        let last = |layout: &mut Layout, by: u64, len: u64| {
            let region = layout.regions.last_mut().unwrap();
            let (copy_a, old) = (region.copy_a + by, region.len);
            region.len = if len == 0 { old } else { len };
            (region.copy_a, region.copy_b) = (copy_a, copy_a + region.len.next_multiple_of(4096));
        };
        let len = SCRUB_PAGES * PAGE_BYTES;
        assert!(with(&|layout| last(layout, 4096, 0)));
        assert!(!with(&|layout| last(layout, 512, 0)), "off the pages");
        assert!(!with(&|layout| last(layout, 0, len + 512)), "half a page");
        assert!(with(&|layout| last(layout, 0, len + 4096)));
        assert!(with(&|layout| last(layout, 0, 2 * len)));
        assert!(!with(&|layout| last(layout, 0, 2 * len + 4096)));
        assert!(!with(&|layout| last(layout, 0, len - 4096)));
    }
}
