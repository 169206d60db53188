use super::*;

fn wanted_after(used: &[u32]) -> Option<u32> {
    let mut ahead = ZeroAhead::default();
    for &extent in used {
        ahead.wanted = None;
        ahead.used(Extent(extent));
    }
    ahead.wanted.map(|extent| extent.0)
}

#[test]
fn a_writer_who_goes_on_is_sequential() {
    assert_eq!(wanted_after(&[]), None);
    assert_eq!(wanted_after(&[0]), None);
    assert_eq!(wanted_after(&[0, 1]), Some(2));
    assert_eq!(wanted_after(&[7, 8, 9]), Some(10));
    assert_eq!(wanted_after(&[7, 6]), None);
    assert_eq!(wanted_after(&[7, 9]), None);
    assert_eq!(wanted_after(&[7, 7]), None);
    // Of several writers the last few are remembered.
    assert_eq!(wanted_after(&[10, 20, 30, 40, 11]), Some(12));
    assert_eq!(wanted_after(&[10, 20, 30, 40, 50, 11]), None);
    assert_eq!(wanted_after(&[10, 20, 30, 40, 41, 31]), Some(32));
    assert_eq!(wanted_after(&[u32::MAX - 1, u32::MAX]), None);
    assert_eq!(wanted_after(&[u32::MAX, 0]), None);
}

#[test]
fn what_is_used_or_of_another_member_is_not_ahead() {
    let mut ahead = ZeroAhead::default();
    for slot in [0, 8] {
        ahead.ahead[slot].extend([Extent(3), Extent(4)]);
    }
    ahead.ahead[1].insert(Extent(3));
    let holds = |ahead: &ZeroAhead, extent| -> Vec<u8> {
        (0..9)
            .filter(|&slot| ahead.contains(slot, Extent(extent)))
            .collect()
    };
    assert_eq!(holds(&ahead, 3), [0, 1, 8]);
    assert_eq!(holds(&ahead, 5), [0; 0]);
    ahead.used(Extent(3));
    assert_eq!(holds(&ahead, 3), [0; 0]);
    assert_eq!(holds(&ahead, 4), [0, 8]);
    (ahead.cursor, ahead.done) = (17, true);
    ahead.forget(8);
    assert_eq!(holds(&ahead, 4), [0]);
    // The new member lacks all of them.
    assert_eq!((ahead.cursor, ahead.done), (0, false));
}
