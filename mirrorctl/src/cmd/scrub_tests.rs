#![allow(clippy::unwrap_used)]
use super::*;
use mirror::control::{
    ScrubBy, ScrubClass, ScrubDone, ScrubFinding, ScrubMap, ScrubReport, ScrubRun, ScrubWhat,
};

const THEN: u64 = 1_795_771_280;
const GIB: u64 = 1 << 30;

fn pass(number: u64) -> ScrubPass {
    ScrubPass {
        number,
        check_only: false,
        began_secs: THEN,
        ended_secs: None,
        ending: None,
        checked_bytes: Some(10 * GIB),
        written_bytes: Some(40 * GIB),
        left_secs: Some(7300),
        member_bytes: 20 * GIB,
        findings: 3,
        repaired_blocks: 2,
        damaged_blocks: 1,
        left_out_extents: 0,
    }
}

fn over(number: u64) -> ScrubPass {
    ScrubPass {
        ended_secs: Some(THEN + 3700),
        ending: Some(ScrubEnding::Complete),
        left_out_extents: 4,
        ..pass(number)
    }
}

fn sample() -> ScrubStatus {
    ScrubStatus {
        state: ScrubState::Running,
        pass: Some(pass(8)),
        next_at_secs: None,
        days: 14,
        ceiling_mib: Some(200),
        allowed_bytes: Some(90 << 20),
        floor_bytes: 1 << 20,
        p99_permille: Some(1043),
        kept: true,
        error_budget: "64/24".to_owned(),
        damaged_blocks: 1,
        totals: ScrubTotals {
            passes: 7,
            member_bytes: 140 * GIB,
            checked_blocks: 99,
            checksum_failed_blocks: 5,
            rewritten_blocks: 4,
            damaged_blocks: 1,
            ..ScrubTotals::default()
        },
        passes: vec![over(7)],
    }
}

#[test]
fn a_pass_under_way_says_how_far_it_is() {
    let text = text("m", &sample());
    for want in [
        "mirror m, scrub: pass 8: 25.0 % of 40.0 GiB, about 2 h 1 min to go; 4 blocks repaired \
         since creation; DAMAGED BLOCKS: 1, of which no copy is known to be right; see 'mirrorctl \
         scrub report'\n",
        "  pass 8 began 2026-11-27 09:21:20 UTC: 3 findings, 2 blocks repaired, 1 damaged\n",
        "  goes at up to 90.0 MiB/s of each member, at least 1.0 MiB/s to end in time; p99 of \
         requests with / without: 1.04\n",
        "  a pass every 14 days, at most 200 MiB/s of each member\n",
        "  error budget of each member (blocks rewritten / hours): 64/24\n",
        "  since creation: 7 passes, 140.0 GiB read from members, 99 blocks checked\n",
        "    found, in blocks: 5 that failed their checksum\n",
        "    done, in blocks: 4 rewritten from a good copy, 1 damaged\n",
        "2026-11-27 09:21:20 UTC  1 h 1 min  20.0 GiB  3         2         1        4 extents \
         COULD NOT BE CHECKED\n",
    ] {
        assert!(text.contains(want), "{want:?} is not in:\n{text}");
    }
    assert!(!text.contains("outlives"), "{text}");
}

#[test]
fn what_goes_on_is_one_line() {
    let mut status = sample();
    status.damaged_blocks = 0;
    status.totals = ScrubTotals::default();
    status.state = ScrubState::Paused;
    assert_eq!(line(&status), "paused; pass 8: 25.0 % of 40.0 GiB");
    status.pass = None;
    assert_eq!(line(&status), "paused");
    status.state = ScrubState::Idle;
    assert_eq!(
        line(&status),
        "last pass ended 2026-11-27 10:23:00 UTC, 3 findings, 4 extents COULD NOT BE CHECKED"
    );
    status.passes[0].ending = Some(ScrubEnding::Cancelled);
    assert!(line(&status).contains("was cancelled"));
    status.passes.clear();
    assert_eq!(line(&status), "never; only by command");
    status.next_at_secs = Some(0);
    assert_eq!(line(&status), "no pass yet");
    assert!(plan(&status).contains("when something is written"));
    status.kept = false;
    assert!(text("m", &status).contains("nothing of this outlives the daemon"));
}

#[test]
fn shares_are_right_at_their_ends() {
    let of = |checked, written| {
        share(&ScrubPass {
            checked_bytes: checked,
            written_bytes: written,
            ..pass(1)
        })
    };
    assert_eq!(of(Some(0), Some(0)), "100.0 % of 0 B");
    assert_eq!(of(Some(9 * GIB), Some(GIB)), "100.0 % of 1.0 GiB");
    assert_eq!(of(Some(u64::MAX), Some(u64::MAX)), "100.0 % of 15.9 EiB");
    assert_eq!(of(None, Some(GIB)), "0.0 % of 1.0 GiB");
}

fn found(done: ScrubDone, slot: Option<u8>) -> ScrubFinding {
    ScrubFinding {
        when_secs: THEN,
        slot,
        path: slot.map(|slot| format!("/dev/sd{slot}")),
        offset: 4096 * 1234,
        len: 8192,
        what: ScrubWhat::ChecksumFailed,
        done,
        by: ScrubBy::Scrub,
    }
}

#[test]
fn a_report_says_where_the_damage_is() {
    let mut report = ScrubReport {
        device: Some("/dev/ublkb3".to_owned()),
        findings: vec![found(ScrubDone::Rewritten, Some(1))],
        forgotten_blocks: 0,
    };
    let text = report::text("m", &report);
    assert!(
        text.contains(
            "  2026-11-27 09:21:20 UTC  slot 1 (/dev/sd1)  5054464  8.0 KiB  checksum failed  \
             rewritten  scrub\n"
        ),
        "{text}"
    );
    assert!(!text.contains("debugfs"), "{text}");
    report.findings.push(found(ScrubDone::Damaged, None));
    report.forgotten_blocks = 7;
    let text = report::text("m", &report);
    assert!(text.contains("  all  "), "{text}");
    assert!(
        text.contains("debugfs -R \"icheck 1234\" /dev/ublkb3"),
        "{text}"
    );
    assert!(text.contains("-c \"daddr 9872\""), "{text}");
    assert!(text.contains("7 damaged blocks are not listed"), "{text}");
    report.device = Some("nbd+unix:///m?socket=/run/m.nbd".to_owned());
    let text = report::text("m", &report);
    assert!(text.contains("icheck 1234\" /dev/nbd0,"), "{text}");
    assert!(text.contains("attach it"), "{text}");
    report.findings.clear();
    assert_eq!(report::text("m", &report), "mirror m: nothing was found\n");
}

fn sample_map() -> ScrubMap {
    let run = |class, cells| ScrubRun { class, cells };
    ScrubMap {
        size_bytes: 100 * GIB,
        cell_bytes: GIB,
        runs: vec![
            run(ScrubClass::Written, 62),
            run(ScrubClass::Hot, 4),
            run(ScrubClass::Missed, 1),
            run(ScrubClass::Repaired, 1),
            run(ScrubClass::Damaged, 1),
            run(ScrubClass::Unwritten, 31),
        ],
    }
}

#[test]
fn a_map_fits_a_terminal_and_needs_no_colour() {
    let text = map::text("m", &sample_map(), false);
    let lines: Vec<&str> = text.lines().collect();
    assert!(
        lines.iter().all(|line| line.chars().count() <= 80),
        "{text}"
    );
    assert_eq!(lines[1], format!("       0 B {}▒▒", "░".repeat(62)));
    assert_eq!(lines[2], format!("  64.0 GiB ▒▒▓+X{}", "·".repeat(31)));
    assert_eq!(lines[4], "        62 ░ written");
    assert_eq!(lines.len(), 3 + 6);
    let painted = map::text("m", &sample_map(), true);
    assert!(painted.contains("\x1b[1;31mX\x1b[0m"), "{painted}");
}

#[test]
fn a_picture_is_whole_and_not_larger_than_it_may_be() {
    let picture = svg::picture("m", &sample_map());
    assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"));
    assert!(picture.contains("<title>Map of mirror m</title>"));
    // The whole cells, and one of each in the legend.
    for (colour, rects) in [("#d62839", 2), ("#f0b429", 2), ("#e9ecef", 3)] {
        let count = picture
            .matches(&format!("height=\"9\" fill=\"{colour}\""))
            .count();
        assert_eq!(count, rects, "{colour}");
    }
    // Whatever a daemon sends.
    let mut huge = sample_map();
    huge.runs[0].cells = u32::MAX;
    huge.cell_bytes = u64::MAX;
    assert!(svg::picture("m", &huge).len() < 200_000);
    assert!(map::text("m", &huge, false).lines().count() <= 80);
    huge.runs.clear();
    assert!(svg::picture("m", &huge).contains("</svg>"));
}
