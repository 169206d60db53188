//! The state of a mirror as a person reads it.
#![allow(clippy::unwrap_used)]
use super::*;

const DOCUMENT: &str = r#"{
  "name": "data", "uuid": "0192", "state": "resyncing", "size-bytes": 1073741824,
  "logical-block-bytes": 512, "device": "/dev/ublkb0", "daemon-pid": 42, "event-count": 3,
  "epoch": "00", "write-intent": true, "flush-error": false,
  "members": [
    {"slot": 0, "path": "/a.img", "uuid": "u0", "state": "in-sync", "reason": null,
     "missed-bytes": 0, "attached": true, "orphans": 0, "read-errors": 2, "repaired-blocks": 2},
    {"slot": 1, "path": "/b.img", "uuid": "u1", "state": "resyncing", "reason": "It was away.",
     "missed-bytes": 4096000, "attached": true, "orphans": 0, "read-errors": 0,
     "repaired-blocks": 0, "unfenced": true}
  ],
  "extents": {"unwritten": 200, "cool": 50, "hot": 6, "discarded": 0, "hot-budget": 64,
              "unequalised-blocks": 0},
  "resync": {"slot": 1, "kind": "delta", "reason": "Its position is known.", "finished": false,
             "copied-bytes": 1024, "zeroed-bytes": 0, "remaining-bytes": 3072,
             "elapsed-ms": 100, "stalled": null},
  "last-resync": null,
  "io": {"reads": 1, "read-bytes": 4096, "writes": 2, "written-bytes": 8192, "flushes": 1,
         "discards": 0, "errors": 0, "map-commits": 3, "extents-zeroed": 0},
  "a-field-of-a-later-version": true
}"#;

#[test]
fn a_resyncing_mirror_as_text() {
    let status: Status = serde_json::from_str(DOCUMENT).unwrap();
    assert_eq!(
        text(&status),
        "\
mirror data: resyncing, 1.0 GiB on /dev/ublkb0
  uuid 0192, event count 3, daemon process 42, logical block 512 bytes
  slot  state      missed   path
  0     in-sync    -        /a.img  2 read errors; 2 blocks repaired
  1     resyncing  3.9 MiB  /b.img  unfenced; It was away.
  extents: 56 written (6 hot of a budget of 64, 50 cool), 200 unwritten, 0 discarded
  delta resync of slot 1: 25.0 %, 3.0 KiB left, about 0.3 s to go
    Its position is known.
  1 reads (4.0 KiB), 2 writes (8.0 KiB), 1 flushes, 0 discards, 0 errors, 3 map commits
"
    );
}

#[test]
fn a_peer_is_fenced_or_is_not() {
    let mut status: Status = serde_json::from_str(DOCUMENT).unwrap();
    status.members[0].path = "nbd://h/m".to_owned();
    let said = text(&status);
    assert!(said.contains("nbd://h/m  fenced; 2 read errors"), "{said}");
    status.members[0].unfenced = true;
    let said = text(&status);
    assert!(
        said.contains("nbd://h/m  unfenced; 2 read errors"),
        "{said}"
    );
    status.members[0].scrub_reads_all = true;
    let said = text(&status);
    assert!(
        said.contains("nbd://h/m  unfenced; scrub reads all; 2 read errors"),
        "{said}"
    );
}

#[test]
fn what_endangers_data_is_said() {
    let mut status: Status = serde_json::from_str(DOCUMENT).unwrap();
    status.write_intent = false;
    status.flush_error = true;
    status.extents.unequalised_blocks = 7;
    status.members[1].uuid = None;
    status.members[1].path.clear();
    let text = text(&status);
    for want in [
        "NO WRITE INTENT",
        "mirrorctl clear-flush-error data",
        "7 blocks (28.0 KiB) still to be equalised",
        "  1     empty ",
    ] {
        assert!(text.contains(want), "{want} is not in:\n{text}");
    }
}

#[test]
fn troubles_are_said_when_there_are_any_and_only_then() {
    let sound: Status = serde_json::from_str(DOCUMENT).unwrap();
    let quiet = text(&sound);
    type Case<'a> = (fn(&mut Status), &'a [&'a str]);
    let cases: [Case<'_>; 3] = [
        (
            |status| status.state = MirrorState::WriteBlocked,
            &[
                "mirror data: write-blocked, ",
                "WRITES ANSWER EIO",
                "stop and start",
            ],
        ),
        (
            |status| status.flush_error = true,
            &["FLUSH ANSWERS EIO", "'mirrorctl clear-flush-error data'"],
        ),
        (
            |status| status.extents.hot = 65,
            &[
                "115 written (65 hot of a budget of 64",
                "exceeded by 1",
                "--hot-budget",
            ],
        ),
    ];
    for (change, wanted) in cases {
        let mut status = sound.clone();
        change(&mut status);
        let text = text(&status);
        for want in wanted {
            assert!(text.contains(want), "{want} is not in:\n{text}");
            assert!(!quiet.contains(want), "{want} is in:\n{quiet}");
        }
    }
    let mut full = sound.clone();
    full.extents.hot = full.extents.hot_budget;
    assert!(!text(&full).contains("exceeded"), "a full budget is kept");
}
