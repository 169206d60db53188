#![allow(clippy::unwrap_used)]
use super::*;
use crate::create::first_superblock;
use proptest::prelude::*;

pub(crate) fn sample() -> Superblock {
    let mut slots = vec![SlotRecord::empty(); 3];
    for (slot, record) in slots.iter_mut().enumerate().take(2) {
        record.member = Some(Uuid::from_u128(0x100 + slot as u128));
        record.state = SlotState::InSync;
        record.address = format!("/dev/sd{slot}");
        record.zeroed = slot == 0;
    }
    slots[1].state = SlotState::Faulty;
    slots[1].loss = Some(Loss {
        epoch: 77,
        position: Stamp {
            ordinal: 3,
            sequence: 900,
        },
        block_exact: true,
    });
    slots[1].base = Stamp {
        ordinal: 2,
        sequence: 500,
    };
    let (mirror, layout) = (Uuid::from_u128(0xabcd), Layout::for_size(1 << 30));
    Superblock {
        member: Uuid::from_u128(0x100),
        write_count: 12,
        event_count: 5,
        history: vec![Epoch { id: 77, ordinal: 3 }, Epoch { id: 1, ordinal: 0 }],
        last_stop: LastStop::Unclean,
        flush_failed: true,
        resync_cursor: 4096,
        created_secs: 1,
        updated_secs: 2,
        ..first_superblock(mirror, "data", layout, Epoch { id: 78, ordinal: 4 }, slots)
    }
}

fn reseal(bytes: &mut [u8]) {
    bytes[CRC_AT..CRC_AT + 4].fill(0);
    let crc = crc32fast::hash(bytes);
    bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn round_trip() {
    let mut superblock = sample();
    for instance in [None, Some(u128::MAX - 1)] {
        superblock.server_instance = instance;
        let bytes = superblock.encode();
        assert_eq!(Superblock::decode(&bytes).unwrap(), superblock);
        assert_eq!(
            bytes[INSTANCE_AT..INSTANCE_AT + 16],
            instance.unwrap_or(0).to_le_bytes()
        );
    }
}

#[test]
fn what_is_said_of_forced_starts_and_of_handing_over_is_kept() {
    let mut superblock = sample();
    superblock.handed_over = true;
    superblock.epoch_secs = 7;
    superblock.forced_secs = 9;
    // A character that would be cut in two goes as a whole.
    superblock.forced_reason = "x".repeat(REASON_BYTES_MAX - 1) + "\u{e9}";
    let mut bytes = superblock.encode();
    assert_eq!(bytes[191], 0b101);
    superblock.forced_reason.pop();
    assert_eq!(Superblock::decode(&bytes).unwrap(), superblock);
    // It is for display: what is no text costs nobody a superblock.
    bytes[REASON_AT] = 0xff;
    reseal(&mut bytes);
    let decoded = Superblock::decode(&bytes).unwrap();
    assert_eq!(decoded.forced_reason, "");
}

#[test]
fn golden_image() {
    // The format on disk does not change by accident: the checksum of a fixed superblock, and of
    // one as they were before there were checksums of blocks.
    let mut superblock = sample();
    let hash = |superblock: &Superblock| crc32fast::hash(&superblock.encode()[16..]);
    assert_eq!(hash(&superblock), 392_632_367);
    superblock.checksums = false;
    let regions = &mut superblock.layout.regions;
    regions.retain(|region| region.kind != RegionKind::Scrub);
    assert_eq!(hash(&superblock), 3_813_562_534);
}

#[test]
fn every_flipped_bit_is_noticed() {
    let good = sample().encode();
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(Superblock::decode(&bad).is_err(), "bit {bit}");
    }
}

#[test]
fn the_newer_valid_copy_wins() {
    let old = sample();
    let mut new = old.clone();
    new.write_count += 1;
    new.event_count += 1;
    new.begin_epoch(99);
    let (old_bytes, new_bytes) = (old.encode(), new.encode());
    let torn = [&new_bytes[..512], &old_bytes[512..]].concat();
    let blank = vec![0; COPY_BYTES];
    type Case<'a> = (&'a [u8], &'a [u8], Option<&'a Superblock>, bool);
    let cases: [Case<'_>; 7] = [
        (&new_bytes, &new_bytes, Some(&new), false),
        (&new_bytes, &old_bytes, Some(&new), true),
        (&old_bytes, &new_bytes, Some(&new), true),
        (&torn, &old_bytes, Some(&old), true),
        (&new_bytes, &torn, Some(&new), true),
        (&torn, &torn, None, false),
        (&blank, &blank, None, false),
    ];
    for (index, (a, b, want, mending)) in cases.into_iter().enumerate() {
        match (Superblock::load(a, b), want) {
            (Ok(loaded), Some(want)) => {
                assert_eq!(&loaded.superblock, want, "case {index}");
                assert_eq!(loaded.needs_mending, mending, "case {index}");
            }
            (Err(_), None) => {}
            (got, want) => panic!("case {index}: {got:?} instead of {want:?}"),
        }
    }
    assert_eq!(
        Superblock::load(&blank, &blank),
        Err(SuperblockError::NotAMember)
    );
    assert!(matches!(
        Superblock::load(&blank, &torn),
        Err(SuperblockError::Damaged(_))
    ));
}

#[test]
fn unknown_features_refuse() {
    for at in [24, 32] {
        let mut bytes = sample().encode();
        bytes[at] |= 2;
        reseal(&mut bytes);
        assert!(matches!(
            Superblock::decode(&bytes),
            Err(SuperblockError::TooNew(_))
        ));
    }
    let mut bytes = sample().encode();
    bytes[16] = 1;
    reseal(&mut bytes);
    assert!(
        Superblock::decode(&bytes).is_ok(),
        "compatible features are ignored"
    );
}

#[test]
fn counters_that_the_next_update_would_wrap_are_damage() {
    for at in [136, 160] {
        for (count, sound) in [(COUNT_MAX, true), (COUNT_MAX + 1, false), (u64::MAX, false)] {
            let mut bytes = sample().encode();
            put(&mut bytes, at, count.to_le_bytes());
            reseal(&mut bytes);
            let decoded = Superblock::decode(&bytes);
            assert_eq!(decoded.is_ok(), sound, "{count} at {at}");
        }
    }
}

proptest! {
    #[test]
    fn decoding_never_panics(bytes in proptest::collection::vec(any::<u8>(), COPY_BYTES)) {
        let mut bytes = bytes;
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[24..40].fill(0);
        reseal(&mut bytes);
        let _ = Superblock::decode(&bytes);
    }

    #[test]
    fn decoding_damaged_fields_never_panics(at in 16usize..END, value: u8) {
        let mut bytes = sample().encode();
        bytes[at] = value;
        reseal(&mut bytes);
        let _ = Superblock::decode(&bytes);
    }
}

#[test]
fn checksums_are_a_read_only_compatible_feature() {
    let mut superblock = sample();
    assert_eq!(superblock.encode()[24..32], [1, 0, 0, 0, 0, 0, 0, 0]);
    superblock.checksums = false;
    assert_eq!(superblock.encode()[24..32], [0; 8]);
    let again = Superblock::decode(&superblock.encode()).unwrap();
    assert!(!again.checksums);
}

#[test]
fn a_mirror_without_a_scrub_log_is_sound() {
    let mut superblock = sample();
    let regions = &mut superblock.layout.regions;
    regions.retain(|region| region.kind != RegionKind::Scrub);
    let again = Superblock::decode(&superblock.encode());
    assert_eq!(again, Ok(superblock));
}

#[test]
fn limits_are_inside() {
    let decoded = |change: &dyn Fn(&mut Superblock)| {
        let mut superblock = sample();
        change(&mut superblock);
        let decoded = Superblock::decode(&superblock.encode());
        if let Ok(decoded) = &decoded {
            assert_eq!(*decoded, superblock);
        }
        decoded.is_ok()
    };
    let sized = |size: u64| {
        decoded(&|superblock: &mut Superblock| superblock.layout = Layout::for_size(size))
    };
    assert!(sized(MIRROR_BYTES_MAX) && !sized(MIRROR_BYTES_MAX + 4096));
    assert!(sized(1 << 30) && !sized((1 << 30) + 256) && !sized(0));
    assert!(decoded(&|superblock| {
        superblock.history = (0..48)
            .map(|id| Epoch {
                id,
                ordinal: 60 - u32::try_from(id).unwrap(),
            })
            .collect();
    }));
    // Every flag alone.
    for flag in 0..8 {
        assert!(decoded(&|superblock| {
            let slot = &mut superblock.slots[1];
            (slot.zeroed, slot.full) = (flag & 1 != 0, flag & 2 != 0);
            slot.loss.as_mut().unwrap().block_exact = flag & 4 != 0;
            (superblock.forced, superblock.flush_failed) = (flag & 1 != 0, flag & 2 != 0);
        }));
    }
}

#[test]
fn unknown_features_of_either_kind_refuse() {
    for at in [24, 32] {
        let mut bytes = sample().encode();
        bytes[at] |= 4;
        reseal(&mut bytes);
        let refused = Superblock::decode(&bytes);
        assert!(matches!(refused, Err(SuperblockError::TooNew(_))), "{at}");
    }
}

#[test]
fn of_two_copies_of_one_count_the_first_one_counts() {
    let (first, mut second) = (sample(), sample());
    second.event_count += 1;
    let loaded = Superblock::load(&first.encode(), &second.encode()).unwrap();
    assert!(loaded.needs_mending && loaded.superblock == first);
}

#[test]
fn map_sectors_are_tied_to_the_mirrors_uuid() {
    let mut superblock = sample();
    superblock.mirror = Uuid::from_bytes(*b"\x01\x02\x03\x04567890123456");
    assert_eq!(superblock.tag(), 0x0403_0201);
}

#[test]
fn slot_numbers_that_make_no_sense_are_damage() {
    // Three slots, of which the member's own is the first one.
    for (at, value, sound) in [
        (188, 2, true),
        (188, 3, false),
        (189, 0, false),
        (189, 10, false),
    ] {
        let mut bytes = sample().encode();
        bytes[at] = value;
        reseal(&mut bytes);
        let decoded = Superblock::decode(&bytes);
        assert_eq!(decoded.is_ok(), sound, "{value} at {at}");
    }
}
