#![allow(clippy::unwrap_used)]
use super::*;

fn side(slot: u8, forced_secs: u64, forced_reason: &str) -> Side {
    Side {
        path: format!("/dev/{slot}"),
        slot,
        epoch: "0badcafe".into(),
        epoch_secs: 1_700_000_000,
        updated_secs: 0,
        last_stop: "clean",
        changed_bytes: (slot == 0).then_some(8 << 20),
        forced_secs,
        forced_reason: forced_reason.into(),
        slots: vec!["in-sync", "missing"],
    }
}

#[test]
fn both_sides_are_shown_with_who_forced_them_and_why() {
    let sides = [side(0, 0, ""), side(1, 1_700_000_001, "host A burnt")];
    let text = text("m", &sides, true);
    for part in [
        "split brain",
        "/dev/0",
        "/dev/1",
        "2023-11-14 22:13:20 UTC",
        "8.0 MiB",
        "unknown",
        "2023-11-14 22:13:21 UTC: host A burnt",
        "--keep PATH",
        "--save FILE",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
}

#[test]
fn members_of_one_history_are_no_split_brain() {
    let text = text("m", &[side(0, 7, "")], false);
    assert!(text.contains("no split brain") && !text.contains("--keep"));
}
