//! Members of a stopped mirror, made byte by byte: some extents cool, some hot, with data and
//! checksums, and the means to damage them.
#![allow(dead_code, clippy::unwrap_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use dirty_map::{
    Address, Block, Extent, ExtentState, Kind, PAYLOAD_BYTES, SUM_PAGE_BYTES, Stamp, StateMap, Sum,
    SumPage, encode,
};
use mirror::create::{CreateRequest, NewMember, copies, plan};
use mirror::layout::{Layout, RegionKind};
use mirror::superblock::{LastStop, SlotState, Superblock};

// A process that is being started holds what its parent has open for writing, and what somebody
// writes to is refused: the two are kept apart.
use super::programs;

/// Size of the device: five whole extents and one that ends with a short block.
pub(crate) const SIZE: u64 = (21 << 20) + 4096 + 512;
/// The extents' states, in order.
pub(crate) const STATES: [ExtentState; 6] = [
    ExtentState::Cool,
    ExtentState::Hot,
    ExtentState::Unwritten,
    ExtentState::Discarded,
    ExtentState::Cool,
    ExtentState::Cool,
];
/// Blocks of the cool extents.
pub(crate) const COOL_BLOCKS: u64 = 1024 + 1024 + 258;
/// The short block.
pub(crate) const LAST: u64 = SIZE / 4096;

/// Members in files.
pub(crate) struct Members {
    pub(crate) paths: Vec<PathBuf>,
    pub(crate) layout: Layout,
    pub(crate) tag: u32,
}

/// What a block holds.
pub(crate) fn content(block: u64) -> Vec<u8> {
    let len = (SIZE - block * 4096).min(4096);
    let mut state = block.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(usize::try_from(len).unwrap());
    bytes
}

impl Members {
    /// A mirror that was stopped cleanly but for its hot extent.
    pub(crate) fn new(dir: &Path, count: usize, checksums: bool) -> Self {
        let paths: Vec<PathBuf> = (0..count).map(|at| dir.join(format!("m{at}"))).collect();
        let member_bytes = Layout::for_size(SIZE).member_bytes();
        let new = |path: &PathBuf| NewMember {
            path: path.to_str().unwrap().to_owned(),
            size_bytes: member_bytes,
            logical_block_bytes: 512,
            zeroed: true,
        };
        let request = CreateRequest {
            name: "m".to_owned(),
            members: paths.iter().map(new).collect(),
            size_bytes: Some(SIZE),
            logical_block_bytes: None,
            checksums,
            random: (1..20).map(|at| at << 64 | at).collect(),
            now_secs: 0,
        };
        let made = plan(&request).unwrap();
        for (path, member) in paths.iter().zip(&made.members) {
            let _alone = programs();
            let file = File::create(path).unwrap();
            file.set_len(member_bytes).unwrap();
            for (offset, bytes) in member.maps.iter().chain(&member.superblocks) {
                file.write_all_at(bytes, *offset).unwrap();
            }
        }
        let mut members = Self {
            paths,
            layout: Layout::for_size(SIZE),
            tag: 0,
        };
        members.tag = members.superblock(0).tag();
        for member in 0..count {
            members.put_states(member, 2, &STATES);
            for extent in (0..)
                .zip(STATES)
                .filter(|(_, state)| *state != ExtentState::Unwritten)
            {
                members.fill(member, Extent(extent.0), checksums);
            }
        }
        members
    }

    fn fill(&self, member: usize, extent: Extent, checksums: bool) {
        let blocks = extent.blocks();
        let mut page = SumPage::unknown();
        for block in blocks.start..blocks.end.min(LAST + 1) {
            self.write_block(member, block, &content(block));
            page.set(Block(block), Some(Sum::of(Block(block), &content(block))));
        }
        if checksums {
            self.put_page(member, extent, &page);
        }
    }

    /// Overwrites bytes of a member.
    pub(crate) fn put(&self, member: usize, offset: u64, bytes: &[u8]) {
        let _alone = programs();
        let file = File::options()
            .write(true)
            .open(&self.paths[member])
            .unwrap();
        file.write_all_at(bytes, offset).unwrap();
    }

    /// Cuts a member off.
    pub(crate) fn cut_off(&self, member: usize, len: u64) {
        let _alone = programs();
        let file = File::options().write(true).open(&self.paths[member]);
        file.unwrap().set_len(len).unwrap();
    }

    /// Bytes of a member.
    pub(crate) fn get(&self, member: usize, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let file = File::open(&self.paths[member]).unwrap();
        file.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    /// All of a member.
    pub(crate) fn all(&self, member: usize) -> Vec<u8> {
        std::fs::read(&self.paths[member]).unwrap()
    }

    /// All members.
    pub(crate) fn everything(&self) -> Vec<Vec<u8>> {
        (0..self.paths.len())
            .map(|member| self.all(member))
            .collect()
    }

    /// Where a block lies on a member.
    pub(crate) fn block_at(&self, block: u64) -> u64 {
        self.layout.data_offset + block * 4096
    }

    /// Overwrites a block.
    pub(crate) fn write_block(&self, member: usize, block: u64, bytes: &[u8]) {
        self.put(member, self.block_at(block), bytes);
    }

    /// Changes one byte of a block.
    pub(crate) fn flip(&self, member: usize, block: u64, byte: u64) {
        let at = self.block_at(block) + byte;
        let before = self.get(member, at, 1)[0];
        self.put(member, at, &[before ^ 0x10]);
    }

    /// Where the page of an extent's checksums lies.
    pub(crate) fn page_at(&self, extent: Extent) -> u64 {
        let region = self.layout.find(RegionKind::Checksums, 0).unwrap();
        region.copy_a + u64::from(extent.0) * 4096
    }

    /// The stored checksums of an extent.
    pub(crate) fn page(&self, member: usize, extent: Extent) -> SumPage {
        let bytes = self.get(member, self.page_at(extent), SUM_PAGE_BYTES);
        SumPage::decode(&bytes.try_into().unwrap())
    }

    /// Stores checksums.
    pub(crate) fn put_page(&self, member: usize, extent: Extent, page: &SumPage) {
        let mut bytes = [0; SUM_PAGE_BYTES];
        page.encode(&mut bytes);
        self.put(member, self.page_at(extent), &bytes);
    }

    /// Stores one checksum.
    pub(crate) fn put_sum(&self, member: usize, block: u64, sum: Option<Sum>) {
        let extent = Block(block).extent();
        let mut page = self.page(member, extent);
        page.set(Block(block), sum);
        self.put_page(member, extent, &page);
    }

    /// Where a copy of a map begins.
    pub(crate) fn map_at(&self, kind: RegionKind, slot: u8, copy: usize) -> u64 {
        let region = self.layout.find(kind, slot).unwrap();
        [region.copy_a, region.copy_b][copy]
    }

    /// Writes both copies of the extent-state map's first sector.
    pub(crate) fn put_states(&self, member: usize, sequence: u64, states: &[ExtentState]) {
        for copy in [0, 1] {
            self.put_states_copy(member, copy, sequence, states);
        }
    }

    /// Writes one copy of it.
    pub(crate) fn put_states_copy(
        &self,
        member: usize,
        copy: usize,
        sequence: u64,
        states: &[ExtentState],
    ) {
        let mut map = StateMap::new(6);
        for (extent, &state) in (0..).zip(states) {
            map.force(Extent(extent), state);
        }
        let mut payload = [0; PAYLOAD_BYTES];
        map.write_payload(0, &mut payload);
        let at = self.map_at(RegionKind::State, 0, copy);
        self.put(
            member,
            at,
            &self.sector(Kind::State, 0, 0, sequence, &payload),
        );
    }

    /// A map sector.
    pub(crate) fn sector(
        &self,
        kind: Kind,
        slot: u8,
        index: u32,
        sequence: u64,
        payload: &[u8; PAYLOAD_BYTES],
    ) -> [u8; 512] {
        let stamp = Stamp {
            ordinal: 0,
            sequence,
        };
        encode(Address { kind, slot, index }, self.tag, stamp, payload)
    }

    /// A member's superblock.
    pub(crate) fn superblock(&self, member: usize) -> Superblock {
        let copy = |offset| self.get(member, offset, 4096);
        Superblock::load(&copy(4096), &copy(8192))
            .unwrap()
            .superblock
    }

    /// Changes a member's superblock in both copies.
    pub(crate) fn edit(&self, member: usize, change: impl FnOnce(&mut Superblock)) {
        let mut superblock = self.superblock(member);
        change(&mut superblock);
        for (offset, bytes) in copies(&superblock) {
            self.put(member, offset, &bytes);
        }
    }

    /// The mirror was not stopped cleanly.
    pub(crate) fn unclean(&self) {
        for member in 0..self.paths.len() {
            self.edit(member, |superblock| {
                superblock.last_stop = LastStop::Unclean
            });
        }
    }

    /// The member in `slot` was lost, as the others have it.
    pub(crate) fn lose(&self, slot: usize) {
        for member in (0..self.paths.len()).filter(|&member| member != slot) {
            self.edit(member, |superblock| {
                let epoch = superblock.epoch.id;
                let record = &mut superblock.slots[slot];
                record.state = SlotState::Faulty;
                record.loss = Some(mirror::superblock::Loss {
                    epoch,
                    position: Stamp {
                        ordinal: 0,
                        sequence: 2,
                    },
                    block_exact: true,
                });
                superblock.event_count += 1;
                superblock.begin_epoch(77);
            });
        }
    }
}
