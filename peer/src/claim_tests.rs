#![allow(clippy::unwrap_used)]
use super::*;
use mirror::create::first_superblock;
use mirror::layout::Layout;
use mirror::superblock::{COPY_BYTES, Epoch, SlotRecord};
use proptest::prelude::*;
use uuid::Uuid;

/// A copy of the superblock of a member at `epoch`, after `history`.
pub(crate) fn disk(mirror: u128, epoch: u128, history: &[u128]) -> Vec<u8> {
    let mut slots = vec![SlotRecord::empty(); 3];
    slots[0].member = Some(Uuid::from_u128(7));
    slots[0].state = mirror::superblock::SlotState::InSync;
    let ordinal = |back: usize| u32::try_from(history.len() - back).unwrap();
    let past = history.iter().zip(1..).map(|(id, back)| Epoch {
        id: *id,
        ordinal: ordinal(back),
    });
    let (mirror, layout) = (Uuid::from_u128(mirror), Layout::for_size(1 << 30));
    let epoch = Epoch {
        id: epoch,
        ordinal: ordinal(0),
    };
    Superblock {
        member: Uuid::from_u128(7),
        history: past.collect(),
        ..first_superblock(mirror, "data", layout, epoch, slots)
    }
    .encode()
}

fn claim(seen: Option<(u128, u128, &[u128])>) -> Claim {
    Claim {
        owner: 1,
        take_over: false,
        resumes: None,
        seen: seen.map(|(mirror, epoch, history)| Seen {
            mirror: Uuid::from_u128(mirror).into_bytes(),
            epoch,
            history: history.to_vec(),
        }),
    }
}

/// How a claim is judged on a disk whose copies are the same.
fn on(copy: &[u8], seen: Option<(u128, u128, &[u128])>) -> Result<(), Refusal> {
    judge(&claim(seen), copy, copy)
}

#[test]
fn who_is_as_new_as_the_disk_or_newer_is_let_in() {
    let copy = disk(9, 30, &[20, 10]);
    assert_eq!(on(&copy, Some((9, 30, &[20, 10]))), Ok(()));
    assert_eq!(on(&copy, Some((9, 50, &[40, 30, 20]))), Ok(()));
}

#[test]
fn who_is_older_or_from_elsewhere_is_refused() {
    let copy = disk(9, 30, &[20, 10]);
    let older = on(&copy, Some((9, 20, &[10])));
    assert!(matches!(older, Err(Refusal::Older { .. })), "{older:?}");
    let other = on(&copy, Some((9, 31, &[20, 10])));
    assert!(matches!(other, Err(Refusal::Diverged { .. })), "{other:?}");
    let mirror = on(&copy, Some((8, 30, &[20, 10])));
    assert_eq!(mirror, Err(Refusal::OtherMirror("data".into())));
    assert_eq!(on(&copy, None), Err(Refusal::Unseen("data".into())));
}

#[test]
fn what_is_no_member_is_anybodys() {
    for copy in [vec![0; COPY_BYTES], Vec::new(), {
        let mut damaged = disk(9, 30, &[20]);
        damaged[100] ^= 1;
        damaged
    }] {
        assert_eq!(on(&copy, None), Ok(()));
        assert_eq!(on(&copy, Some((9, 10, &[]))), Ok(()));
    }
}

#[test]
fn one_good_copy_decides_and_a_newer_format_is_refused() {
    let (old, new) = (disk(9, 20, &[10]), disk(9, 30, &[20, 10]));
    let older = claim(Some((9, 20, &[10])));
    assert!(judge(&older, &new, &[]).is_err());
    assert!(judge(&older, &[], &new).is_err());
    assert_eq!(judge(&older, &old, &[]), Ok(()));
    let mut unknown = new;
    unknown[8] = 99;
    unknown[12..16].fill(0);
    let crc = crc32fast::hash(&unknown);
    unknown[12..16].copy_from_slice(&crc.to_le_bytes());
    let refused = on(&unknown, Some((9, 30, &[])));
    assert!(matches!(refused, Err(Refusal::TooNew(_))), "{refused:?}");
}

#[test]
fn a_claim_is_encoded_as_its_table_says() {
    assert_eq!(encode("m", None), b"\0\0\0\x01m\0");
    let mut want = b"\0\0\0\x01m\x01\x01".to_vec();
    want.extend(5_u128.to_be_bytes());
    want.push(1);
    for number in [9_u128, 30] {
        want.extend(number.to_be_bytes());
    }
    want.push(1);
    want.extend(20_u128.to_be_bytes());
    let taking = Claim {
        owner: 5,
        take_over: true,
        ..claim(Some((9, 30, &[20])))
    };
    assert_eq!(encode("m", Some(&taking)), want);
    let mut want = b"\0\0\0\x01m\x01\x02".to_vec();
    want.extend(5_u128.to_be_bytes());
    want.extend(6_u64.to_be_bytes());
    want.push(0);
    let resuming = Claim {
        owner: 5,
        resumes: Some(6),
        ..claim(None)
    };
    assert_eq!(encode("m", Some(&resuming)), want);
    // Both at once make no sense.
    want[6] = 3;
    assert_eq!(decode(&want), None);
    let fence = Fence {
        instance: 7,
        turn: 8,
        keeps_order: true,
    };
    let bytes = [&7_u128.to_be_bytes()[..], &8_u64.to_be_bytes(), &[1]].concat();
    assert_eq!(fence.encode()[..], bytes);
    assert_eq!(Fence::decode(&fence.encode()), fence);
}

#[test]
fn a_sentence_fits_into_what_a_client_shows() {
    let copy = disk(9, 30, &[20]);
    for seen in [
        None,
        Some((8, 1, &[][..])),
        Some((9, 20, &[])),
        Some((9, 1, &[])),
    ] {
        let sentence = on(&copy, seen).unwrap_err().to_string();
        assert!(sentence.len() <= 200, "{sentence}");
    }
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(
        name in "\\PC{0,20}", owner: u128, (take_over, resumes) in prop_oneof![
            any::<bool>().prop_map(|take_over| (take_over, None)),
            any::<u64>().prop_map(|turn| (false, Some(turn))),
        ],
        seen in prop::option::of((any::<[u8; 16]>(), any::<u128>(),
                                  prop::collection::vec(any::<u128>(), 0..=HISTORY_MAX))),
    ) {
        let seen = seen.map(|(mirror, epoch, history)| Seen { mirror, epoch, history });
        let claim = Claim { owner, take_over, resumes, seen };
        let question = encode(&name, None);
        prop_assert_eq!(decode(&question), Some((name.as_bytes(), None)));
        let data = encode(&name, Some(&claim));
        prop_assert_eq!(decode(&data), Some((name.as_bytes(), Some(claim))));
        for cut in 0..data.len() {
            prop_assert_eq!(decode(&data[..cut]), None);
        }
    }

    #[test]
    fn any_bytes_are_decoded_or_refused(data in prop::collection::vec(any::<u8>(), 0..128)) {
        if let Some((name, claim)) = decode(&data) {
            let name = String::from_utf8_lossy(name);
            let again = encode(&name, claim.as_ref());
            prop_assert!(matches!(name, std::borrow::Cow::Owned(_)) || again == data);
        }
    }
}
