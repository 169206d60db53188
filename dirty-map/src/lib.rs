//! What differs between the members of a mirror, and what may: extent states, missed maps, the
//! unflushed set, and the sectors in which maps lie on disk.
//!
//! Pure logic: no I/O, no clock, no tasks. The crate `mirror` decides when a map changes and
//! brings changed sectors to the members.
//!
//! | type | what it says | memory |
//! |---|---|---|
//! | [`StateMap`] | each extent's state, 2 bits | at most 64 KiB a TiB; uniform parts none |
//! | [`MissedMap`] | the blocks that one absent member lacks, 1 bit | at most 33 MiB a TiB; uniform parts none |
//! | [`Summary`] | which pages of a missed map count on disk | 1 bit for 120 MiB of device |
//! | [`SumPage`] | the checksums of an extent's blocks | 4 KiB |
//! | [`HotSums`] | checksums of hot extents that are not on disk yet | at most the given cap, and some 100 bytes a hot extent |
//! | [`SumCache`] | pages of checksums read or written lately | at most the given cap |
//! | [`HotExtents`] | what is in flight, unflushed and un-equalised in hot extents | at most the given cap |
//!
//! # A map sector
//!
//! A map on disk is an array of sectors of 512 bytes; each describes itself, so that a torn
//! page is a mixture of whole old and whole new sectors. Little-endian.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | CRC32 of bytes 4 to 511 |
//! | 4 | 2 | magic `0x4d55` |
//! | 6 | 1 | kind: 1 states, 2 summary, 3 missed, 4 position, 5 scrub |
//! | 7 | 1 | slot whose map it is; 0 for kinds without one |
//! | 8 | 4 | index of the sector in its map |
//! | 12 | 4 | tag: the first four bytes of the mirror's uuid |
//! | 16 | 4 | ordinal of the epoch in which it was written |
//! | 20 | 4 | zero |
//! | 24 | 8 | sequence of the commit that wrote it |
//! | 32 | 480 | payload |
//!
//! The payload holds 1920 extent states (2 bits each, lowest bits first), or 3840 missed bits,
//! or 3840 summary bits. That of a position sector begins with the newest epoch that was known to
//! be effective when it was written (16 bytes, zero for none) and the sequence of the newest commit
//! that every receiving member was known to hold then (8 bytes, zero for none); the rest is zero.
//!
//! # A page of checksums
//!
//! Of each extent a member has one page of 4096 bytes, in a table of its own beside the maps: for
//! each of the extent's 1024 blocks four bytes, little-endian. They are the CRC32 of the block's
//! number on the device (8 bytes) followed by its content; zero when it is not known (a CRC32 of
//! zero is stored as `0xffffffff`). The device's last block may be short, and is summed as it is.
//! A page may tear at 512 bytes, between entries. It says something only while its extent is cool;
//! of a hot extent each entry is one that the block has had.
#![forbid(unsafe_code)]

mod hash;
mod hot;
mod hot_sums;
mod masks;
mod missed;
mod sector;
mod state;
mod sum_cache;
mod summary;
mod sums;
mod units;

pub use hot::{HOT_CAP_BYTES, HotExtents};
pub use hot_sums::{Base, HotSums, Known};
pub use masks::BlockMask;
pub use missed::{MISSED_PER_SECTOR, MissedMap};
pub use sector::{Address, Kind, PAYLOAD_BYTES, SECTOR_BYTES, SectorError, Stamp, decode, encode};
pub use state::{ExtentState, STATES_PER_SECTOR, StateMap};
pub use sum_cache::SumCache;
pub use summary::{SUMMARY_PER_SECTOR, Summary};
pub use sums::{SUM_PAGE_BYTES, Sum, SumPage};
pub use units::{
    BLOCK_BYTES, BLOCKS_PER_EXTENT, Block, EXTENT_BYTES, Extent, blocks_covering, blocks_within,
};
