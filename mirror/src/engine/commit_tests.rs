use super::*;
use crate::layout::RegionKind;

fn page(kind: RegionKind, slot: u8, index: u32) -> Page {
    Page { kind, slot, index }
}

#[test]
fn pages_that_follow_each_other_are_one_run() {
    let missed = |slot, index| page(RegionKind::Missed, slot, index);
    assert_eq!(runs(&[]), []);
    assert_eq!(runs(&[missed(1, 7)]), [(0, 1)]);
    let pages = [
        Page::POSITION,
        // Next in number, of another kind.
        page(RegionKind::State, 0, 1),
        page(RegionKind::State, 0, 2),
        page(RegionKind::State, 0, 3),
        // A gap, then one of the same number again.
        page(RegionKind::State, 0, 5),
        missed(0, 6),
        missed(0, 7),
        // Of another slot.
        missed(1, 8),
        missed(1, 9),
        missed(1, 9),
    ];
    let expected = [(0, 1), (1, 3), (4, 1), (5, 2), (7, 2), (9, 1)];
    assert_eq!(runs(&pages), expected);
}
