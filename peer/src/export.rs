//! What a server says of an export, and what follows from it for a member.
//!
//! | the server | then |
//! |---|---|
//! | offers no FLUSH, or is read-only | refused: a member is written, and FLUSH is a promise (R7) |
//! | offers no FUA | a FUA write is a write and then a flush |
//! | offers no WRITE_ZEROES or no TRIM | the member has no cheap zeroes, or no discard |
//! | has requests of more than 4096 bytes at least | refused: superblocks and maps are smaller |
//! | limits payloads | longer requests are cut, at multiples of the preferred size |

use crate::wire::{
    EXPORT_FLUSH, EXPORT_FUA, EXPORT_HAS_FLAGS, EXPORT_READ_ONLY, EXPORT_TRIM, EXPORT_WRITE_ZEROES,
};

/// The largest smallest request that a member may have, in bytes.
const MINIMUM_MAX: u32 = 4096;

/// Limits of requests, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of it; a power of two.
    pub minimum: u32,
    /// What the server is quick with; a power of two.
    pub preferred: u32,
    /// Longest payload.
    pub maximum: u32,
}

impl BlockSizes {
    /// What holds when a server says nothing (by the protocol).
    pub const DEFAULT: Self = Self {
        minimum: 1,
        preferred: 4096,
        maximum: 32 << 20,
    };

    /// Whether the protocol allows such sizes.
    #[must_use]
    pub fn are_legal(&self) -> bool {
        self.minimum.is_power_of_two()
            && self.minimum <= 64 << 10
            && self.preferred.is_power_of_two()
            && self.preferred >= self.minimum
            && self.maximum >= self.preferred
            && (self.maximum == u32::MAX || self.maximum.is_multiple_of(self.minimum))
    }
}

/// An export, as its server describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    /// Size in bytes.
    pub size_bytes: u64,
    /// Transmission flags.
    pub flags: u16,
    /// Limits of requests.
    pub blocks: BlockSizes,
}

/// Why an export cannot hold a member; a part of a sentence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// It cannot be written.
    #[error("its server exports it read-only; a member must be writable")]
    ReadOnly,
    /// It promises nothing about durability.
    #[error("its server offers no FLUSH, without which nothing written is certain to last")]
    NoFlush,
    /// Sectors larger than a block.
    #[error("its server takes no requests of less than {0} bytes; at most 4096 can be used")]
    MinimumTooLarge(u32),
    /// Payloads smaller than a block.
    #[error("its server takes no requests of more than {0} bytes; at least 4096 are needed")]
    MaximumTooSmall(u32),
    /// Nothing in it.
    #[error("it is empty")]
    Empty,
}

impl Export {
    fn offers(&self, flag: u16) -> bool {
        self.flags & EXPORT_HAS_FLAGS != 0 && self.flags & flag != 0
    }

    /// Whether FUA is offered.
    #[must_use]
    pub fn has_fua(&self) -> bool {
        self.offers(EXPORT_FUA)
    }

    /// Whether WRITE_ZEROES is offered.
    #[must_use]
    pub fn has_write_zeroes(&self) -> bool {
        self.offers(EXPORT_WRITE_ZEROES)
    }

    /// Whether TRIM is offered.
    #[must_use]
    pub fn has_trim(&self) -> bool {
        self.offers(EXPORT_TRIM)
    }

    /// Smallest unit of I/O in bytes, 512 or more.
    #[must_use]
    pub fn logical_block_bytes(&self) -> u32 {
        self.blocks.minimum.max(512)
    }

    /// Size in whole logical blocks, in bytes.
    #[must_use]
    pub fn usable_bytes(&self) -> u64 {
        self.size_bytes - self.size_bytes % u64::from(self.logical_block_bytes())
    }

    /// Whether a member can live on it.
    ///
    /// # Errors
    ///
    /// The reason why not.
    pub fn check(&self) -> Result<(), Unusable> {
        if self.offers(EXPORT_READ_ONLY) {
            return Err(Unusable::ReadOnly);
        }
        if !self.offers(EXPORT_FLUSH) {
            return Err(Unusable::NoFlush);
        }
        if self.blocks.minimum > MINIMUM_MAX {
            return Err(Unusable::MinimumTooLarge(self.blocks.minimum));
        }
        if self.blocks.maximum < 4096 {
            return Err(Unusable::MaximumTooSmall(self.blocks.maximum));
        }
        if self.usable_bytes() == 0 {
            return Err(Unusable::Empty);
        }
        Ok(())
    }

    /// Cuts a range into requests that the server takes.
    #[must_use]
    pub fn pieces(&self, offset: u64, len: u64) -> Pieces {
        Pieces {
            offset,
            end: offset.saturating_add(len),
            preferred: u64::from(self.blocks.preferred),
            maximum: u64::from(self.blocks.maximum),
        }
    }
}

/// A part of a longer request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub len: u32,
}

/// The parts of a longer request, in order and without gaps.
#[derive(Clone, Debug)]
pub struct Pieces {
    offset: u64,
    end: u64,
    preferred: u64,
    maximum: u64,
}

impl Iterator for Pieces {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        if self.offset >= self.end {
            return None;
        }
        let furthest = self.offset.saturating_add(self.maximum);
        let end = if furthest >= self.end {
            self.end
        } else {
            // A cut where the server is quick; the largest payload spans one at least.
            furthest - furthest % self.preferred
        };
        let piece = Piece {
            offset: self.offset,
            len: u32::try_from(end - self.offset).unwrap_or(u32::MAX),
        };
        self.offset = end;
        Some(piece)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: Export = Export {
        size_bytes: 1 << 20,
        flags: EXPORT_HAS_FLAGS | EXPORT_FLUSH,
        blocks: BlockSizes::DEFAULT,
    };

    #[test]
    fn what_cannot_hold_a_member_is_refused() {
        assert_eq!(GOOD.check(), Ok(()));
        let flags = |flags| Export { flags, ..GOOD };
        assert_eq!(flags(EXPORT_FLUSH).check(), Err(Unusable::NoFlush));
        assert_eq!(flags(EXPORT_HAS_FLAGS).check(), Err(Unusable::NoFlush));
        let read_only = flags(GOOD.flags | EXPORT_READ_ONLY);
        assert_eq!(read_only.check(), Err(Unusable::ReadOnly));
        let blocks = |minimum, preferred, maximum| Export {
            blocks: BlockSizes {
                minimum,
                preferred,
                maximum,
            },
            ..GOOD
        };
        assert_eq!(
            blocks(8192, 8192, 8192).check(),
            Err(Unusable::MinimumTooLarge(8192))
        );
        assert_eq!(
            blocks(512, 512, 2048).check(),
            Err(Unusable::MaximumTooSmall(2048))
        );
        assert_eq!(blocks(4096, 4096, 4096).check(), Ok(()));
        assert_eq!(blocks(4096, 4096, 4096).logical_block_bytes(), 4096);
        let size = |size_bytes| Export { size_bytes, ..GOOD };
        assert_eq!(size(511).check(), Err(Unusable::Empty));
        assert_eq!(size(1025).usable_bytes(), 1024);
    }

    #[test]
    fn only_what_is_offered_is_used() {
        let none = (GOOD.has_fua(), GOOD.has_write_zeroes(), GOOD.has_trim());
        assert_eq!(none, (false, false, false));
        let flags = GOOD.flags | EXPORT_FUA | EXPORT_WRITE_ZEROES | EXPORT_TRIM;
        let all = Export { flags, ..GOOD };
        let all = (all.has_fua(), all.has_write_zeroes(), all.has_trim());
        assert_eq!(all, (true, true, true));
    }

    #[test]
    fn long_requests_are_cut_where_the_server_is_quick() {
        let export = Export {
            blocks: BlockSizes {
                minimum: 512,
                preferred: 4096,
                maximum: 10 << 10,
            },
            ..GOOD
        };
        let cuts: Vec<_> = export
            .pieces(512, 20 << 10)
            .map(|piece| (piece.offset, piece.len))
            .collect();
        assert_eq!(cuts, [(512, 7680), (8192, 8192), (16384, 4608)]);
        assert_eq!(export.pieces(0, 0).next(), None);
    }

    proptest! {
        #[test]
        fn pieces_cover_the_range_within_the_limits(
            minimum in 0u32..13, preferred in 0u32..10, maximum in 1u64..64,
            offset in 0u64..1 << 40, len in 1u64..1 << 16,
        ) {
            let minimum = 1 << minimum;
            let preferred = minimum << preferred;
            let blocks = BlockSizes {
                minimum,
                preferred,
                maximum: u32::try_from(u64::from(preferred) + maximum * u64::from(minimum)).unwrap(),
            };
            prop_assert!(blocks.are_legal());
            let (offset, len) = (offset * u64::from(minimum), len * u64::from(minimum));
            let mut at = offset;
            for piece in (Export { blocks, ..GOOD }).pieces(offset, len).take(100_000) {
                prop_assert_eq!(piece.offset, at);
                prop_assert!(piece.len > 0 && piece.len <= blocks.maximum);
                prop_assert_eq!(piece.len % blocks.minimum, 0);
                at += u64::from(piece.len);
            }
            prop_assert_eq!(at, offset + len);
        }
    }
}
