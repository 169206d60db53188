//! The checksum tables of a mirror's members, read from the disks and held against their data.

use crate::machine::{Machine, superblock_on};
use dirty_map::{
    Address, BLOCK_BYTES, Block, Extent, ExtentState, Kind, SUM_PAGE_BYTES, StateMap, Sum, SumPage,
};
use mirror::layout::RegionKind;
use mirror::sim::SimDisk;
use mirror::superblock::{SlotState, Superblock};

/// What a member's own map says of its extents, from the newer copy of each sector.
pub(crate) fn states_on(disk: &SimDisk, superblock: &Superblock) -> StateMap {
    let region = *superblock.layout.find(RegionKind::State, 0).unwrap();
    let mut map = StateMap::new(superblock.layout.size_bytes.div_ceil(4 << 20) as u32);
    for index in 0..map.sectors() {
        let address = Address {
            kind: Kind::State,
            slot: 0,
            index,
        };
        let copies = [region.copy_a, region.copy_b].map(|copy| {
            let mut bytes = [0; 512];
            disk.read_now(copy + u64::from(index) * 512, &mut bytes);
            bytes
        });
        let decoded = copies
            .iter()
            .filter_map(|bytes| dirty_map::decode(bytes, address, superblock.tag()).ok());
        let newest = decoded.max_by_key(|(stamp, _)| *stamp);
        map.load_payload(index, newest.unwrap().1);
    }
    map
}

/// Where the page of `extent` lies.
pub(crate) fn page_offset(superblock: &Superblock, extent: Extent) -> u64 {
    let table = superblock.layout.find(RegionKind::Checksums, 0).unwrap();
    table.copy_a + u64::from(extent.0) * SUM_PAGE_BYTES as u64
}

/// The page of `extent` on a disk.
pub(crate) fn page_on(disk: &SimDisk, superblock: &Superblock, extent: Extent) -> SumPage {
    let mut bytes = [0; SUM_PAGE_BYTES];
    disk.read_now(page_offset(superblock, extent), &mut bytes);
    SumPage::decode(&bytes)
}

/// What the tables said.
#[derive(Debug, Default)]
pub(crate) struct Tables {
    /// Checksums of blocks in cool extents, on all in-sync members.
    pub(crate) known: u64,
    /// Blocks in cool extents without one.
    pub(crate) unknown: u64,
}

/// Checks, on each in-sync member, every known checksum of a cool extent against the block.
pub(crate) fn check(machine: &Machine, what: &str) -> Tables {
    let mut tables = Tables::default();
    let superblocks = machine.disks.iter().filter_map(superblock_on);
    let Some(newest) = superblocks.max_by_key(|superblock| superblock.event_count) else {
        return tables;
    };
    if !newest.checksums {
        return tables;
    }
    for disk in &machine.disks {
        let Some(own) = superblock_on(disk) else {
            continue;
        };
        let slot = usize::from(own.own_slot);
        let record = &newest.slots[slot];
        if record.member != Some(own.member) || record.state != SlotState::InSync {
            continue;
        }
        let states = states_on(disk, &own);
        for extent in (0..states.len()).map(Extent) {
            if states.get(extent) != ExtentState::Cool {
                continue;
            }
            let page = page_on(disk, &own, extent);
            for block in extent.blocks().map(Block) {
                let Some(sum) = page.get(block) else {
                    tables.unknown += 1;
                    continue;
                };
                tables.known += 1;
                let mut content = [0; BLOCK_BYTES as usize];
                disk.read_now(machine.data_offset + block.0 * BLOCK_BYTES, &mut content);
                assert!(
                    Sum::of(block, &content) == sum,
                    "{what}: the checksum of {block:?} in slot {slot} is another's"
                );
            }
        }
    }
    tables
}
