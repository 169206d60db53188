#![allow(clippy::unwrap_used)]
use super::*;
use proptest::prelude::*;

fn finding(blocks: Range<u64>, done: Done) -> Finding {
    Finding {
        when_secs: 1_800_000_000,
        slot: Some(1),
        blocks,
        what: What::ChecksumFailed,
        done,
        by: FoundBy::Scrub,
    }
}

/// What another daemon would know of `log`.
fn reloaded(log: &ScrubLog) -> ScrubLog {
    let mut again = ScrubLog::new();
    for sector in 0..SECTORS {
        let mut payload = [0xa5; PAYLOAD_BYTES];
        log.payload(sector, &mut payload);
        again.load(sector, &payload);
    }
    again
}

fn blocks_of(log: &ScrubLog) -> Vec<(Range<u64>, Done)> {
    log.findings()
        .iter()
        .map(|finding| (finding.blocks.clone(), finding.done))
        .collect()
}

#[test]
fn a_finding_at_its_place() {
    let mut log = ScrubLog::new();
    log.add(&Finding {
        when_secs: 0x0102_0304,
        slot: None,
        blocks: 0x0a0b..0x0a0e,
        what: What::CopiesDiffer,
        done: Done::Damaged,
        by: FoundBy::Read,
    });
    let mut payload = [9; PAYLOAD_BYTES];
    log.payload(3, &mut payload);
    let mut want = [0; PAYLOAD_BYTES];
    want[0] = 1;
    want[8..12].copy_from_slice(&[4, 3, 2, 1]);
    want[16..18].copy_from_slice(&[0x0b, 0x0a]);
    want[24] = 3;
    want[28..32].copy_from_slice(&[255, 3, 3, 2]);
    assert_eq!(payload, want);
    log.payload(0, &mut payload);
    assert_eq!(payload[40 + 2 * 8], 3, "copies differ");
    assert_eq!(payload[80 + 2 * 8], 3, "damaged");
    assert_eq!(payload[120 + 8], 3, "found by a read");
    assert_eq!(payload.iter().filter(|byte| **byte != 0).count(), 3);
    assert_eq!(log.take_dirty(), [0, 3]);
}

#[test]
fn a_pass_at_its_place() {
    let mut log = ScrubLog::new();
    log.begin_pass(1_800_000_000, Extent(7), true, 77);
    let mut pass = log.pass().unwrap().clone();
    pass.cursor = Extent(3);
    pass.wrapped = true;
    pass.left = vec![9..11, 1..2];
    pass.counts.left_out = 5;
    log.note_pass(pass);
    let mut payload = [9; PAYLOAD_BYTES];
    log.payload(0, &mut payload);
    assert_eq!(payload[152..], *[&[77][..], &[0; 327]].concat(), "members");
    log.payload(1, &mut payload);
    assert_eq!(payload[..12], [1, 3, 2, 0, 7, 0, 0, 0, 3, 0, 0, 0]);
    assert_eq!(payload[16], 1, "number");
    assert_eq!(payload[88], 5, "left out");
    assert_eq!(
        payload[96..112],
        [1, 0, 0, 0, 2, 0, 0, 0, 9, 0, 0, 0, 11, 0, 0, 0]
    );
    assert_eq!(payload[112..], [0; 368]);
}

#[test]
fn what_is_logged_is_there_after_a_restart() {
    let mut log = ScrubLog::new();
    let choices = Choices {
        paused: true,
        days: Some(0),
        ceiling_mib: Some(120),
    };
    log.choose(choices);
    for number in 1..=9 {
        log.begin_pass(number * 100, Extent(5), number == 9, 1);
        let mut pass = log.pass().unwrap().clone();
        pass.counts.member_bytes = 1000 * number;
        pass.counts.blocks = number;
        pass.left = vec![4..6, 8..9];
        log.note_pass(pass.clone());
        pass.counts.blocks += 1;
        log.note_pass(pass);
        let ending = if number == 9 {
            Ending::Cancelled
        } else {
            Ending::Complete
        };
        log.end_pass(number * 100 + 7, ending);
    }
    log.begin_pass(1234, Extent(1), false, 1);
    log.add(&finding(5..6, Done::Rewritten));
    assert_eq!(log.take_dirty(), [0, 1, 2, 3]);
    assert!(!log.is_dirty());
    let again = reloaded(&log);
    assert_eq!(again, log);
    assert_eq!(again.choices(), choices);
    assert_eq!(again.passes().len(), PASSES_KEPT);
    assert_eq!(again.passes()[0].number, 9);
    assert_eq!(again.passes()[0].ending, Ending::Cancelled);
    assert!(again.passes()[0].check_only);
    assert_eq!(again.passes()[6].number, 3);
    assert_eq!(again.pass().unwrap().number, 10);
    assert_eq!(again.totals().passes_complete, 8);
    assert_eq!(again.totals().member_bytes, 45_000);
    assert_eq!(again.totals().blocks, 45 + 9);
    assert_eq!(again.totals().found(What::ChecksumFailed), 1);
    assert_eq!(again.totals().did(Done::Rewritten), 1);
    assert_eq!(again.totals().did(Done::WrittenAgain), 0);
}

#[test]
fn blocks_that_follow_each_other_are_one_finding() {
    let mut log = ScrubLog::new();
    for block in [11, 10, 13, 12] {
        log.add(&finding(block..block + 1, Done::Rewritten));
    }
    assert_eq!(
        blocks_of(&log),
        [(13..14, Done::Rewritten), (10..13, Done::Rewritten)],
        "what closes a gap joins one side"
    );
    let mut log = ScrubLog::new();
    log.add(&finding(10..11, Done::Rewritten));
    for other in [
        Finding {
            slot: Some(0),
            ..finding(11..12, Done::Rewritten)
        },
        Finding {
            what: What::Unreadable,
            ..finding(11..12, Done::Rewritten)
        },
        Finding {
            by: FoundBy::Read,
            ..finding(11..12, Done::Rewritten)
        },
        finding(11..12, Done::MemberFailed),
        Finding {
            when_secs: 1_800_003_601,
            ..finding(11..12, Done::Rewritten)
        },
    ] {
        log.add(&other);
    }
    assert_eq!(log.findings().len(), 6, "these are others");
    log.add(&finding(10..11, Done::Rewritten));
    assert_eq!(log.findings().len(), 7, "each repair is one");
    log.add(&finding(20..20, Done::Rewritten));
    assert_eq!(log.findings().len(), 7, "no blocks are no finding");
}

#[test]
fn damage_found_again_is_nothing_new() {
    let mut log = ScrubLog::new();
    log.add(&finding(10..20, Done::Damaged));
    log.take_dirty();
    log.add(&Finding {
        when_secs: 1_900_000_000,
        by: FoundBy::Read,
        ..finding(12..13, Done::Damaged)
    });
    assert_eq!(log.take_dirty(), [0; 0]);
    assert_eq!(log.totals().did(Done::Damaged), 10);
    log.add(&Finding {
        when_secs: 1_900_000_000,
        ..finding(15..25, Done::Damaged)
    });
    assert_eq!(blocks_of(&log), [(10..25, Done::Damaged)]);
    assert_eq!(log.findings()[0].when_secs, 1_800_000_000);
    assert_eq!(log.totals().did(Done::Damaged), 15);
    log.cleared(&(10..25));
    log.add(&finding(12..13, Done::Damaged));
    assert_eq!(
        log.damaged_runs(),
        vec![12..13],
        "written, and damaged again"
    );
}

#[test]
fn damage_ends_when_the_block_is_written_again() {
    let mut log = ScrubLog::new();
    log.add(&finding(10..20, Done::Damaged));
    log.add(&Finding {
        slot: None,
        ..finding(18..30, Done::Damaged)
    });
    log.add(&finding(40..41, Done::Damaged));
    assert_eq!(log.damaged_runs(), vec![10..30, 40..41]);
    log.cleared(&(0..10));
    log.cleared(&(30..40));
    assert_eq!(log.damaged_runs(), vec![10..30, 40..41]);
    log.cleared(&(12..13));
    assert_eq!(log.damaged_runs(), vec![10..12, 13..30, 40..41]);
    log.cleared(&(13..29));
    assert_eq!(log.damaged_runs(), vec![10..12, 29..30, 40..41]);
    assert_eq!(reloaded(&log).damaged_runs(), log.damaged_runs());
    let again: u64 = blocks_of(&log)
        .iter()
        .filter(|(_, done)| *done == Done::WrittenAgain)
        .map(|(blocks, _)| blocks.end - blocks.start)
        .sum();
    assert_eq!(again, 8 + 11, "10 to 20 without two, 18 to 30 without one");
    log.cleared(&(0..100));
    assert!(log.damaged_runs().is_empty());
    log.take_dirty();
    log.cleared(&(0..100));
    assert!(!log.is_dirty());
    assert_eq!(log.totals().did(Done::Damaged), 10 + 12 + 1, "it was found");
}

#[test]
fn one_block_after_the_other_does_not_fill_the_log() {
    let mut log = ScrubLog::new();
    log.add(&finding(0..1000, Done::Damaged));
    for block in 0..1000 {
        log.cleared(&(block..block + 1));
    }
    assert_eq!(blocks_of(&log), [(0..1000, Done::WrittenAgain)]);
}

#[test]
fn the_newest_are_kept_and_damage_before_all_else() {
    let mut log = ScrubLog::new();
    let places = PLACES as u64;
    log.add(&finding(7..8, Done::Damaged));
    for number in 0..2 * places {
        log.add(&finding(10 * number..10 * number + 1, Done::Rewritten));
    }
    let kept = blocks_of(&log);
    assert_eq!(kept.len(), PLACES);
    assert_eq!(kept[0], (7..8, Done::Damaged));
    assert_eq!(kept[1].0.start, 10 * (places + 1));
    assert_eq!(kept[PLACES - 1].0.start, 10 * (2 * places - 1));
    assert_eq!(log.totals().forgotten, 0);
    for number in 0..places {
        log.add(&finding(10 * number + 1..10 * number + 3, Done::Damaged));
    }
    assert_eq!(log.damaged_runs().len(), PLACES, "nothing else is left");
    assert_eq!(log.totals().forgotten, 1, "the one block of the oldest");
    assert_eq!(reloaded(&log), {
        log.take_dirty();
        log
    });
}

#[test]
fn a_damaged_sector_loses_what_it_held() {
    let mut log = ScrubLog::new();
    log.choose(Choices {
        days: Some(3),
        ..Choices::default()
    });
    log.begin_pass(1, Extent(0), false, 1);
    for number in 0..40 {
        log.add(&finding(number * 2..number * 2 + 1, Done::Rewritten));
    }
    log.load(4, &[0; PAYLOAD_BYTES]);
    assert_eq!(log.findings().len(), 25);
    assert_eq!(log.choices().days, Some(3));
    assert!(log.pass().is_some());
    log.load(SECTORS, &[1; PAYLOAD_BYTES]);
    log.load(u32::MAX, &[1; PAYLOAD_BYTES]);
    assert_eq!(log.findings().len(), 25);
}

#[test]
fn numbers_at_their_end_are_still_kept() {
    let mut log = ScrubLog::new();
    let mut payload = [0; PAYLOAD_BYTES];
    payload[7] = 0x40; // number 2^62
    payload[24] = 1;
    payload[29..32].copy_from_slice(&[1, 1, 1]);
    log.load(3, &payload);
    log.add(&finding(50..60, Done::Rewritten));
    assert_eq!(reloaded(&log).findings().len(), 2);
}

#[test]
fn what_cannot_be_is_not_believed() {
    let mut good = [0; PAYLOAD_BYTES];
    good[0] = 9; // number
    good[20] = 0x3f; // the first block, 255 before the last that a mirror can have
    good[19] = 0xff;
    good[18] = 0xff;
    good[17] = 0xff;
    good[16] = 0x01;
    good[24] = 255;
    good[29..32].copy_from_slice(&[1, 1, 1]);
    let mut log = ScrubLog::new();
    log.load(3, &good);
    assert_eq!(log.findings()[0].blocks.end, 1 << 38);
    for (at, byte, why) in [
        (0, 0, "no number"),
        (7, 0x41, "a number after the last"),
        (16, 2, "beyond the largest mirror"),
        (24, 0, "no blocks"),
        (29, 6, "what"),
        (30, 7, "done"),
        (31, 4, "by"),
        (31, 0, "by nobody"),
    ] {
        let mut payload = good;
        payload[at] = byte;
        log.load(3, &payload);
        assert_eq!(log.findings().len(), 0, "{why}");
    }
    let mut pass = [0; PAYLOAD_BYTES];
    pass[0] = 1;
    log.load(1, &pass);
    assert_eq!(log.pass(), None, "without a number");
    pass[16] = 1;
    log.load(1, &pass);
    assert!(log.pass().is_some());
    pass[0] = 2;
    log.load(1, &pass);
    assert_eq!(log.pass(), None);
}

#[test]
fn ranges_are_made_fewer_by_closing_the_narrowest_gaps() {
    let ranges = vec![50..60, 0..1, 3..4, 3..3, 10..12, 11..13, 13..14];
    let exact = coarsened(ranges.clone(), 9);
    assert_eq!(exact, [0..1, 3..4, 10..14, 50..60]);
    assert_eq!(coarsened(ranges.clone(), 3), [0..4, 10..14, 50..60]);
    assert_eq!(coarsened(ranges.clone(), 2), [0..14, 50..60]);
    assert_eq!(
        coarsened(ranges, 1),
        std::iter::once(0..60).collect::<Vec<_>>()
    );
}

/// Payloads of bytes, many of which are small numbers, so that some of them mean something.
fn any_payload() -> impl Strategy<Value = [u8; PAYLOAD_BYTES]> {
    let byte = prop_oneof![Just(0_u8), Just(1), 0..8_u8, any::<u8>()];
    proptest::collection::vec(byte, PAYLOAD_BYTES).prop_map(|bytes| bytes.try_into().unwrap())
}

fn any_finding() -> impl Strategy<Value = Finding> {
    let kinds = (0..5_usize, 0..5_usize, 0..3_usize);
    (0..3_u8, 0..200_u64, 1..20_u64, kinds).prop_map(|(slot, start, blocks, kinds)| Finding {
        when_secs: 1_800_000_000 + start,
        slot: (slot < 2).then_some(slot),
        blocks: start..start + blocks,
        what: What::ALL[kinds.0],
        done: Done::ALL[kinds.1],
        by: FoundBy::ALL[kinds.2],
    })
}

proptest! {
    #[test]
    fn any_bytes_can_be_loaded_and_what_they_say_stays(
        sectors in proptest::collection::vec((0..6_u32, any_payload()), 1..6),
        more in proptest::collection::vec(any_finding(), 0..4),
    ) {
        let mut log = ScrubLog::new();
        for (sector, payload) in &sectors {
            log.load(*sector, payload);
        }
        prop_assert_eq!(&reloaded(&log), &log);
        for finding in &more {
            log.add(finding);
            log.cleared(&(0..50));
        }
        log.begin_pass(1, Extent(1), false, 1);
        log.end_pass(2, Ending::Complete);
        log.take_dirty();
        prop_assert_eq!(&reloaded(&log), &log);
    }

    #[test]
    fn damage_is_what_was_found_and_not_written_since(
        steps in proptest::collection::vec(
            prop_oneof![
                3 => any_finding().prop_map(Ok),
                1 => (0..200_u64, 1..60_u64).prop_map(|(at, len)| Err(at..at + len)),
            ],
            0..60,
        ),
    ) {
        let mut log = ScrubLog::new();
        let mut damaged = std::collections::BTreeSet::new();
        let mut stored = reloaded(&log);
        for step in steps {
            match step {
                Ok(finding) => {
                    log.add(&finding);
                    if finding.done == Done::Damaged {
                        damaged.extend(finding.blocks.clone());
                    }
                }
                Err(blocks) => {
                    log.cleared(&blocks);
                    damaged.retain(|block| !blocks.contains(block));
                }
            }
            // Writing what is dirty is enough.
            for sector in log.take_dirty() {
                let mut payload = [0; PAYLOAD_BYTES];
                log.payload(sector, &mut payload);
                stored.load(sector, &payload);
            }
            prop_assert_eq!(&stored, &log);
        }
        let runs = log.damaged_runs();
        prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
        let in_runs: std::collections::BTreeSet<u64> = runs.into_iter().flatten().collect();
        prop_assert_eq!(in_runs, damaged);
    }
}

/// What was only seen, then mended, and is there again is news; what is only seen again is not.
#[test]
fn damage_after_a_repair_is_news() {
    let mut log = ScrubLog::new();
    for (done, count) in [
        (Done::CheckOnly, 1),
        (Done::CheckOnly, 1),
        (Done::Rewritten, 2),
        (Done::CheckOnly, 3),
        (Done::CheckOnly, 3),
    ] {
        log.add(&finding(7..8, done));
        assert_eq!(log.findings().len(), count, "{done:?}");
    }
}
