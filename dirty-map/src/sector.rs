//! The map sector; its byte table stands in the crate's documentation.

/// Bytes of a map sector.
pub const SECTOR_BYTES: usize = 512;
/// Bytes of its payload.
pub const PAYLOAD_BYTES: usize = 480;
/// Highest sequence that is believed: commits count up by one and never get here, and from one
/// near the end of the numbers the next would be lower.
const SEQUENCE_MAX: u64 = 1 << 62;
const HEADER_BYTES: usize = 32;
const MAGIC: u16 = 0x4d55;
const _: () = assert!(HEADER_BYTES + PAYLOAD_BYTES == SECTOR_BYTES);

/// Which map a sector belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Extent states.
    State = 1,
    /// Summary of a missed map.
    Summary = 2,
    /// A missed map.
    Missed = 3,
    /// Says how far a member's copy has come, nothing else.
    Position = 4,
    /// What scrubs have done and found.
    Scrub = 5,
}

/// Where a sector belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// Its map.
    pub kind: Kind,
    /// The slot whose map it is; 0 for kinds without one.
    pub slot: u8,
    /// Its index in the map.
    pub index: u32,
}

/// When a sector was written: later ones are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp {
    /// Ordinal of the epoch.
    pub ordinal: u32,
    /// Number of the commit; never falls from one epoch to the next.
    pub sequence: u64,
}

/// Why bytes are not the sector that was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SectorError {
    /// All zero: never written.
    #[error("the map sector was never written")]
    Blank,
    /// Not a map sector.
    #[error("it is no map sector")]
    BadMagic,
    /// The checksum does not fit, or the sequence makes no sense.
    #[error("the map sector is damaged")]
    Damaged,
    /// A sound sector from elsewhere on this mirror.
    #[error("the map sector belongs elsewhere")]
    Misplaced,
    /// A sound sector of another mirror.
    #[error("the map sector belongs to another mirror")]
    Foreign,
}

/// The bytes of a sector.
#[must_use]
pub fn encode(
    address: Address,
    tag: u32,
    stamp: Stamp,
    payload: &[u8; PAYLOAD_BYTES],
) -> [u8; SECTOR_BYTES] {
    let mut out = [0; SECTOR_BYTES];
    out[4..6].copy_from_slice(&MAGIC.to_le_bytes());
    out[6] = address.kind as u8;
    out[7] = address.slot;
    out[8..12].copy_from_slice(&address.index.to_le_bytes());
    out[12..16].copy_from_slice(&tag.to_le_bytes());
    out[16..20].copy_from_slice(&stamp.ordinal.to_le_bytes());
    out[24..32].copy_from_slice(&stamp.sequence.to_le_bytes());
    out[HEADER_BYTES..].copy_from_slice(payload);
    let crc = crc32fast::hash(&out[4..]);
    out[..4].copy_from_slice(&crc.to_le_bytes());
    out
}

/// Checks a sector and lends its payload.
///
/// # Errors
///
/// When the bytes are not a sound sector of this mirror at this address.
pub fn decode(
    bytes: &[u8; SECTOR_BYTES],
    expected: Address,
    tag: u32,
) -> Result<(Stamp, &[u8; PAYLOAD_BYTES]), SectorError> {
    let u32_at =
        |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    if bytes[4..6] != MAGIC.to_le_bytes() {
        let blank = bytes.iter().all(|&byte| byte == 0);
        return Err(if blank {
            SectorError::Blank
        } else {
            SectorError::BadMagic
        });
    }
    if crc32fast::hash(&bytes[4..]) != u32_at(0) {
        return Err(SectorError::Damaged);
    }
    if u32_at(12) != tag {
        return Err(SectorError::Foreign);
    }
    let here = (expected.kind as u8, expected.slot, expected.index);
    if (bytes[6], bytes[7], u32_at(8)) != here {
        return Err(SectorError::Misplaced);
    }
    let sequence = u64::from(u32_at(24)) | u64::from(u32_at(28)) << 32;
    if sequence > SEQUENCE_MAX {
        return Err(SectorError::Damaged);
    }
    let stamp = Stamp {
        ordinal: u32_at(16),
        sequence,
    };
    let payload = bytes.last_chunk().ok_or(SectorError::Damaged)?;
    Ok((stamp, payload))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    const AT: Address = Address {
        kind: Kind::Missed,
        slot: 3,
        index: 70_000,
    };
    const STAMP: Stamp = Stamp {
        ordinal: 4,
        sequence: 1 << 40 | 7,
    };

    fn sample() -> [u8; SECTOR_BYTES] {
        let mut payload = [0; PAYLOAD_BYTES];
        payload[17] = 0x81;
        encode(AT, 0xfeed, STAMP, &payload)
    }

    #[test]
    fn round_trip() {
        let bytes = sample();
        let (stamp, payload) = decode(&bytes, AT, 0xfeed).unwrap();
        assert_eq!((stamp, payload[17], payload[18]), (STAMP, 0x81, 0));
    }

    #[test]
    fn golden_header() {
        let bytes = sample();
        assert_eq!(bytes[4..12], [0x55, 0x4d, 3, 3, 0x70, 0x11, 1, 0]);
        assert_eq!(bytes[24..32], [7, 0, 0, 0, 0, 1, 0, 0]);
    }

    #[test]
    fn what_does_not_belong_is_named() {
        let bytes = sample();
        assert_eq!(decode(&bytes, AT, 1), Err(SectorError::Foreign));
        assert_eq!(
            decode(&bytes, Address { index: 1, ..AT }, 0xfeed),
            Err(SectorError::Misplaced)
        );
        assert_eq!(
            decode(&bytes, Address { slot: 1, ..AT }, 0xfeed),
            Err(SectorError::Misplaced)
        );
        assert_eq!(
            decode(&[0; SECTOR_BYTES], AT, 0xfeed),
            Err(SectorError::Blank)
        );
        assert_eq!(
            decode(&[1; SECTOR_BYTES], AT, 0xfeed),
            Err(SectorError::BadMagic)
        );
    }

    #[test]
    fn a_sequence_that_the_next_commit_would_wrap_is_damage() {
        for (sequence, sound) in [(SEQUENCE_MAX, true), (u64::MAX, false)] {
            let stamp = Stamp { sequence, ..STAMP };
            let bytes = encode(AT, 1, stamp, &[0; PAYLOAD_BYTES]);
            assert_eq!(decode(&bytes, AT, 1).is_ok(), sound, "{sequence}");
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        for bit in 0..SECTOR_BYTES * 8 {
            let mut bytes = sample();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&bytes, AT, 0xfeed).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_torn_sector_is_noticed() {
        let (old, new) = (
            encode(AT, 1, STAMP, &[0; PAYLOAD_BYTES]),
            encode(AT, 1, STAMP, &[7; PAYLOAD_BYTES]),
        );
        for cut in 1..SECTOR_BYTES {
            let mut torn = old;
            torn[..cut].copy_from_slice(&new[..cut]);
            assert!(
                torn == new || torn == old || decode(&torn, AT, 1).is_err(),
                "cut at {cut}"
            );
        }
    }

    proptest! {
        #[test]
        fn decoding_never_panics(bytes in proptest::collection::vec(any::<u8>(), SECTOR_BYTES)) {
            let mut bytes: [u8; SECTOR_BYTES] = bytes.try_into().unwrap();
            let _ = decode(&bytes, AT, 0xfeed);
            bytes[4..6].copy_from_slice(&MAGIC.to_le_bytes());
            let crc = crc32fast::hash(&bytes[4..]);
            bytes[..4].copy_from_slice(&crc.to_le_bytes());
            let _ = decode(&bytes, AT, 0xfeed);
        }
    }
}
