//! Blocks and extents, and how byte ranges map onto them.

use std::ops::Range;

/// Bytes of a block, the unit of missed bits and of checksums.
pub const BLOCK_BYTES: u64 = 4096;
/// Bytes of an extent, the unit of write intent.
pub const EXTENT_BYTES: u64 = 4 << 20;
/// Blocks of an extent.
pub const BLOCKS_PER_EXTENT: u64 = EXTENT_BYTES / BLOCK_BYTES;

/// Number of an extent, counted from the start of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent(pub u32);

impl Extent {
    /// The extent's blocks, by their number on the device.
    #[must_use]
    pub fn blocks(self) -> Range<u64> {
        let first = u64::from(self.0) * BLOCKS_PER_EXTENT;
        first..first + BLOCKS_PER_EXTENT
    }

    /// The extent's first byte.
    #[must_use]
    pub fn start_bytes(self) -> u64 {
        u64::from(self.0) * EXTENT_BYTES
    }
}

/// Number of a block, counted from the start of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Block(pub u64);

impl Block {
    /// The extent that the block is part of.
    #[must_use]
    pub fn extent(self) -> Extent {
        Extent(u32::try_from(self.0 / BLOCKS_PER_EXTENT).unwrap_or(u32::MAX))
    }
}

/// The blocks that a range of bytes touches.
#[must_use]
pub fn blocks_covering(offset: u64, len: u64) -> Range<u64> {
    let first = offset / BLOCK_BYTES;
    if len == 0 {
        return first..first;
    }
    first..(offset + len).div_ceil(BLOCK_BYTES)
}

/// The blocks that lie wholly in a range of bytes.
#[must_use]
pub fn blocks_within(offset: u64, len: u64) -> Range<u64> {
    let first = offset.div_ceil(BLOCK_BYTES);
    first..((offset + len) / BLOCK_BYTES).max(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_round_outwards_and_inwards() {
        let cases = [
            (0, 0, 0..0, 0..0),
            (4096, 0, 1..1, 1..1),
            (0, 512, 0..1, 0..0),
            (512, 4096, 0..2, 1..1),
            (0, 4096, 0..1, 0..1),
            (1, 8191, 0..2, 1..2),
            (4095, 4098, 0..3, 1..2),
        ];
        for (offset, len, covering, within) in cases {
            assert_eq!(blocks_covering(offset, len), covering, "{offset}+{len}");
            let got = blocks_within(offset, len);
            assert!(
                got == within || (got.is_empty() && within.is_empty()),
                "{offset}+{len}: {got:?}"
            );
        }
        assert_eq!(Block(1023).extent(), Extent(0));
        assert_eq!(Block(1024).extent(), Extent(1));
        assert_eq!(Extent(2).blocks(), 2048..3072);
    }
}
