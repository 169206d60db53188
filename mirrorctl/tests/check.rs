//! check on image files: whatever was damaged is found, named and given the right exit code, and
//! nothing is written.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
#[path = "common/members.rs"]
mod members;

use common::{Dir, Ran, programs};
use dirty_map::{Block, Extent, ExtentState, Kind, PAYLOAD_BYTES, Sum};
use members::{COOL_BLOCKS, LAST, Members, SIZE, content};
use mirror::layout::RegionKind;
use serde_json::{Value, json};
use std::fs::{self, File};

fn made(count: usize) -> (Dir, Members) {
    let dir = Dir::new();
    let members = Members::new(&dir.path(""), count, true);
    (dir, members)
}

fn paths(members: &Members) -> Vec<&str> {
    members
        .paths
        .iter()
        .map(|path| path.to_str().unwrap())
        .collect()
}

/// Runs check on all members, which changes nothing.
fn check(dir: &Dir, members: &Members) -> Ran {
    let before = members.everything();
    let ran = dir.run(&[&["check"], &paths(members)[..]].concat());
    assert!(members.everything() == before, "check has written: {ran:?}");
    ran
}

/// The document, which the exit code fits.
fn document(dir: &Dir, members: &Members) -> Value {
    let ran = dir.run(&[&["--json", "check"], &paths(members)[..]].concat());
    let document = ran.json();
    assert_eq!(
        Some(document["exit-code"].as_i64().unwrap()),
        ran.code.map(i64::from)
    );
    document
}

/// Each finding as kind, slot, offset and number of bytes.
fn found(document: &Value) -> Vec<Value> {
    let each = document["findings"].as_array().unwrap().iter();
    each.map(|f| json!([f["kind"], f["slot"], f["offset"], f["bytes"]]))
        .collect()
}

#[test]
fn sound_members_are_clean_and_the_document_says_what_was_looked_at() {
    for (count, checksums) in [(2, true), (3, true), (2, false)] {
        let dir = Dir::new();
        let members = Members::new(&dir.path(""), count, checksums);
        let ran = check(&dir, &members).ok();
        assert!(ran.stdout.contains("nothing is wrong"), "{ran:?}");
        assert!(!ran.stdout.contains('\x1b'), "{ran:?}");
        let document = document(&dir, &members);
        assert_eq!(document["command"], "check");
        assert_eq!(document["mirror"]["name"], "m");
        assert_eq!(document["mirror"]["size-bytes"], SIZE);
        assert_eq!(document["mirror"]["checksums"], checksums);
        assert_eq!(document["mirror"]["last-stop"], "clean");
        assert_eq!(document["members"].as_array().unwrap().len(), count);
        assert_eq!(document["members"][1]["verdict"], "in-sync");
        assert_eq!(document["members"][1]["slot"], 1);
        assert_eq!(
            document["extents"],
            json!({"cool": 3, "hot": 1, "unwritten": 1, "discarded": 1})
        );
        let blocks = json!({
            "checked": COOL_BLOCKS,
            "without-checksum": 0,
            "filled-in": 0,
            "hot-compared": 1024,
            "hot-differing": 0,
        });
        assert_eq!(document["blocks"], blocks);
        for empty in ["findings", "not-given"] {
            assert_eq!(document[empty], json!([]), "{empty}");
        }
        assert_eq!(document["counts"], json!({}));
        assert_eq!(document["start-refused"], Value::Null);
    }
}

#[test]
fn a_changed_byte_is_found_on_each_member_and_in_each_place() {
    for member in [0, 1] {
        // The first block, one in the middle, the one before a piece ends, and the short one.
        for (block, len) in [(0, 4096), (4 * 1024 + 77, 4096), (255, 4096), (LAST, 512)] {
            let (dir, members) = made(2);
            members.flip(member, block, len - 1);
            let ran = check(&dir, &members).fails(10, "has a good copy");
            let line = format!(
                "(slot {member}): {len} bytes at byte {} of the device: does not fit its checksum; \
                 the copy of slot {} fits a checksum",
                block * 4096,
                1 - member
            );
            assert!(ran.stdout.contains(&line), "no '{line}' in {ran:?}");
            let document = document(&dir, &members);
            let want = json!(["checksum-failed", member, block * 4096, len]);
            assert_eq!(found(&document), [want]);
            assert_eq!(document["findings"][0]["outcome"], "found");
            assert_eq!(document["counts"], json!({"checksum-failed": 1}));
        }
    }
}

#[test]
fn damage_on_both_members_is_told_apart_by_place() {
    let (dir, members) = made(2);
    members.flip(0, 5, 0);
    members.flip(1, 6, 0);
    let document = document(&dir, &members);
    let want = [
        json!(["checksum-failed", 0, 5 * 4096, 4096]),
        json!(["checksum-failed", 1, 6 * 4096, 4096]),
    ];
    assert_eq!(found(&document), want);
    assert_eq!(document["exit-code"], 10);
    members.flip(1, 5, 1);
    let ran = check(&dir, &members).fails(13, "no copy is provably right");
    let line = "4096 bytes at byte 20480 of the device: damaged, no copy is provably right (slot 0 \
                does not fit its checksum, slot 1 does not fit its checksum)";
    assert!(ran.stdout.contains(line), "{ran:?}");
}

#[test]
fn a_misdirected_write_is_found_where_it_went() {
    for member in [0, 1] {
        let (dir, members) = made(2);
        members.write_block(member, 4 * 1024 + 9, &content(9));
        let document = document(&dir, &members);
        let want = json!(["checksum-failed", member, (4 * 1024 + 9) * 4096, 4096]);
        assert_eq!(found(&document), [want]);
        // Both members: the address in the checksum tells, though the copies agree.
        members.write_block(1 - member, 4 * 1024 + 9, &content(9));
        let ran = check(&dir, &members);
        assert!(ran.stdout.contains("all copies agree"), "{ran:?}");
    }
}

#[test]
fn checksums_that_are_wrong_are_told_from_copies_that_are() {
    let (dir, members) = made(2);
    let region = members.page_at(Extent(4));
    members.put(1, region, &[0xa5; 4096]);
    let document = document(&dir, &members);
    let want = json!(["checksum-stale", 1, 16 << 20, 4 << 20]);
    assert_eq!(found(&document), [want]);
    assert_eq!(document["exit-code"], 10);
}

#[test]
fn a_stale_page_and_a_changed_block_under_it_are_both_found() {
    let (dir, members) = made(2);
    // Slot 1's page is older than a write that both members hold.
    let new = vec![7; 4096];
    for member in [0, 1] {
        members.write_block(member, 30, &new);
    }
    members.put_sum(0, 30, Some(Sum::of(Block(30), &new)));
    assert_eq!(
        found(&document(&dir, &members)),
        [json!(["checksum-stale", 1, 30 * 4096, 4096])]
    );
    // Its copy is older as well: it fits its checksum, and so does the new one.
    members.write_block(1, 30, &content(30));
    assert_eq!(
        found(&document(&dir, &members)),
        [json!(["damaged", null, 30 * 4096, 4096])]
    );
}

#[test]
fn of_three_members_most_decide() {
    let (dir, members) = made(3);
    let other = vec![7; 4096];
    members.write_block(1, 30, &other);
    members.put_sum(1, 30, Some(Sum::of(Block(30), &other)));
    let document = document(&dir, &members);
    assert_eq!(
        found(&document),
        [json!(["copies-differ", 1, 30 * 4096, 4096])]
    );
    let what = document["findings"][0]["what"].as_str().unwrap();
    assert!(what.contains("most members hold"), "{what}");
}

#[test]
fn blocks_without_checksums_are_counted_and_compared() {
    let (dir, members) = made(2);
    for member in [0, 1] {
        members.put_sum(member, 8, None);
        members.put_sum(member, 9, None);
    }
    let clean = document(&dir, &members);
    assert_eq!(clean["exit-code"], 0);
    assert_eq!(clean["blocks"]["without-checksum"], 2);
    members.flip(1, 9, 9);
    let document = document(&dir, &members);
    assert_eq!(
        found(&document),
        [json!(["undecidable", null, 9 * 4096, 4096])]
    );
    assert_eq!(document["exit-code"], 13);
}

#[test]
fn without_a_checksum_table_copies_are_compared() {
    let dir = Dir::new();
    let members = Members::new(&dir.path(""), 2, false);
    members.flip(1, 4 * 1024, 0);
    let document = document(&dir, &members);
    assert_eq!(
        found(&document),
        [json!(["undecidable", null, 16 << 20, 4096])]
    );
}

#[test]
fn hot_extents_may_differ_and_what_is_not_written_is_not_read() {
    let (dir, members) = made(2);
    members.unclean();
    members.flip(1, 1024, 0);
    members.flip(0, 1025, 0);
    members.flip(0, 2 * 1024, 0); // unwritten
    members.flip(0, 3 * 1024, 0); // discarded
    let ran = check(&dir, &members).ok();
    assert!(
        ran.stdout.contains("the next start makes them equal"),
        "{ran:?}"
    );
    assert!(
        ran.stdout
            .contains("1024 of hot extents compared, 2 differ"),
        "{ran:?}"
    );
    let document = document(&dir, &members);
    assert_eq!(
        found(&document),
        [json!(["hot-differs", null, 4 << 20, 8192])]
    );
    assert_eq!(document["findings"][0]["class"], "expected");
    assert_eq!(document["mirror"]["last-stop"], "unclean");
}

#[test]
fn superblock_copies_are_found_damaged_or_older() {
    let (dir, members) = made(2);
    for (copy, offset) in [("A", 4096), ("B", 8192)] {
        members.put(1, offset + 200, &[0xff]);
        let ran = check(&dir, &members).fails(10, "");
        let line = format!("(slot 1): copy {copy} of its superblock is damaged");
        assert!(ran.stdout.contains(&line), "{ran:?}");
        members.edit(1, |_| {});
    }
    // Cut off between the two copies: nothing is damaged.
    let mut newer = members.superblock(0);
    newer.write_count += 1;
    members.put(0, 4096, &newer.encode());
    let ran = check(&dir, &members).ok();
    assert!(
        ran.stdout
            .contains("(slot 0): copy B of its superblock is older"),
        "{ran:?}"
    );
    // Both on one member: the rest is checked.
    members.put(1, 4096 + 200, &[0xff]);
    members.put(1, 8192 + 200, &[0xff]);
    let document = document(&dir, &members);
    assert_eq!(document["members"][1]["verdict"], "unusable");
    assert_eq!(document["exit-code"], 12);
    assert_eq!(document["blocks"]["checked"], COOL_BLOCKS);
    assert_eq!(document["not-given"][0]["slot"], 1);
    // On all of them.
    members.put(0, 4096 + 200, &[0xff]);
    members.put(0, 8192 + 200, &[0xff]);
    check(&dir, &members).fails(12, "no good copy");
}

#[test]
fn map_sectors_are_found_damaged_in_one_copy_or_in_all() {
    for kind in [RegionKind::Position, RegionKind::State, RegionKind::Summary] {
        let (dir, members) = made(2);
        members.put(0, members.map_at(kind, 0, 1) + 100, &[0xff; 8]);
        let ran = check(&dir, &members).fails(10, "has a good copy");
        let line = "sector 0 damaged or unreadable";
        assert!(
            ran.stdout.contains("(slot 0): copy B of the"),
            "{kind:?}: {ran:?}"
        );
        assert!(ran.stdout.contains(line), "{kind:?}: {ran:?}");
    }
    let (dir, members) = made(2);
    let at = [0, 1].map(|copy| members.map_at(RegionKind::State, 0, copy));
    members.put(0, at[0], &[0xff; 512]);
    members.put(0, at[1], &[0xff; 512]);
    let document = document(&dir, &members);
    assert_eq!(document["counts"], json!({"map": 2}));
    assert_eq!(document["exit-code"], 10, "the other member has it");
    assert_eq!(document["extents"]["cool"], 3);
    members.put(1, at[0], &[0xff; 512]);
    members.put(1, at[1], &[0xff; 512]);
    let ran = check(&dir, &members).fails(12, "no good copy");
    assert!(ran.stdout.contains("a start is refused"), "{ran:?}");
    assert!(ran.stdout.contains("0 cool, 6 hot"), "{ran:?}");
}

#[test]
fn the_newest_state_counts_and_older_copies_are_expected_after_an_unclean_stop() {
    let (dir, members) = made(2);
    let mut states = members::STATES;
    states[0] = ExtentState::Hot;
    members.put_states_copy(0, 0, 3, &states);
    check(&dir, &members).fails(10, "");
    members.unclean();
    let ran = check(&dir, &members).ok();
    assert!(ran.stdout.contains("extents: 2 cool, 2 hot"), "{ran:?}");
    assert!(
        ran.stdout
            .contains("(slot 1): copy A of the extent-state map: sector 0 older"),
        "{ran:?}"
    );
    assert!(
        ran.stdout
            .contains("(slot 0): copy B of the extent-state map: sector 0 older"),
        "{ran:?}"
    );
}

/// So a join leaves them.
#[test]
fn the_same_states_with_another_stamp_are_no_finding() {
    let (dir, members) = made(2);
    members.put_states(1, 9, &members::STATES);
    let ran = check(&dir, &members).ok();
    assert!(ran.stdout.contains("nothing is wrong"), "{ran:?}");
}

#[test]
fn missed_maps_count_while_their_slot_is_away() {
    let (dir, members) = made(3);
    let mut summary = [0; PAYLOAD_BYTES];
    summary[0] = 1;
    for member in [0, 1] {
        for copy in [0, 1] {
            let at = members.map_at(RegionKind::Summary, 2, copy);
            members.put(
                member,
                at,
                &members.sector(Kind::Summary, 2, 0, 3, &summary),
            );
            let at = members.map_at(RegionKind::Missed, 2, copy);
            for index in 0..8 {
                let sector = members.sector(Kind::Missed, 2, index, 3, &[0; PAYLOAD_BYTES]);
                members.put(member, at + u64::from(index) * 512, &sector);
            }
        }
    }
    // For as long as the slot is in-sync its missed map says nothing; damage is told all the same.
    members.put(1, members.map_at(RegionKind::Missed, 2, 0), &[0; 4096]);
    check(&dir, &members).ok();
    members.lose(2);
    let ran = check(&dir, &members).fails(10, "");
    let line = "(slot 1): copy A of slot 2's missed map: 8 sectors (the first is 0) older";
    assert!(ran.stdout.contains(line), "{ran:?}");
    for member in [0, 1] {
        for copy in [0, 1] {
            members.put(
                member,
                members.map_at(RegionKind::Missed, 2, copy) + 5,
                &[1],
            );
        }
    }
    let ran = check(&dir, &members).fails(12, "");
    assert!(
        ran.stdout
            .contains("the next start takes all its blocks as missed"),
        "{ran:?}"
    );
}

#[test]
fn a_member_that_was_lost_is_not_compared() {
    let (dir, members) = made(3);
    members.lose(2);
    members.flip(2, 3, 3);
    let document = document(&dir, &members);
    assert_eq!(document["exit-code"], 0, "{document}");
    assert_eq!(document["members"][2]["verdict"], "delta");
    fs::remove_file(&members.paths[2]).unwrap();
    let two = [&["check"], &paths(&members)[..2]].concat();
    let ran = dir.run(&two).ok();
    assert!(
        ran.stdout.contains("slot 2, faulty and last seen as"),
        "{ran:?}"
    );
}

#[test]
fn a_member_that_is_missing_or_cut_off_is_named() {
    let (dir, members) = made(2);
    members.flip(0, 3, 3);
    let one = dir.run(&["check", paths(&members)[0]]);
    let one = one.fails(13, "");
    assert!(one.stdout.contains("a start would be refused"), "{one:?}");
    members.flip(0, 3, 3);
    let one = dir
        .run(&["check", paths(&members)[0]])
        .fails(11, "Give all of them");
    assert!(
        one.stdout.contains("slot 1, in-sync and last seen as"),
        "{one:?}"
    );
    members.cut_off(1, 20 << 20);
    let ran = check(&dir, &members).fails(11, "");
    assert!(ran.stdout.contains("it has been cut off"), "{ran:?}");
}

#[test]
fn what_is_no_member_or_of_another_mirror_is_refused() {
    let (dir, members) = made(2);
    let paths = paths(&members);
    let other = dir.image("other", 32 << 20, 0, b"XFSB");
    dir.run(&["check", paths[0], &other])
        .fails(4, "it holds an XFS filesystem");
    dir.run(&["check", &dir.arg("none")])
        .fails(4, "no such file");
    dir.run(&["check", &dir.arg("")])
        .fails(2, "neither a block device nor a regular file");
    dir.run(&["check"]).fails(2, "PATH");
    dir.run(&["check", paths[0], paths[0]])
        .fails(2, "given twice");
    let (a, b) = (dir.arg("n.a"), dir.arg("n.b"));
    dir.run(&[
        "create", "n", "--member", &a, "--member", &b, "--size", "16M",
    ])
    .ok();
    dir.run(&["check", paths[0], &a])
        .fails(3, "different mirrors");
    let tiny = dir.image("tiny", 100, 0, b"x");
    dir.run(&["check", &tiny]).fails(4, "is not a member");
}

#[test]
fn what_is_in_use_is_refused_and_a_read_only_file_is_read() {
    let (dir, members) = made(2);
    let paths = paths(&members);
    let all = ["check", paths[0], paths[1]];
    // As a daemon holds it.
    let holder = File::open(&members.paths[1]).unwrap();
    holder.lock().unwrap();
    dir.run(&all).fails(5, "is in use");
    holder.unlock().unwrap();
    // As two checks at once hold it.
    holder.lock_shared().unwrap();
    dir.run(&all).ok();
    drop(holder);
    let writer = File::options().write(true).open(&members.paths[0]).unwrap();
    dir.run(&all).fails(5, "has it open for writing");
    drop(writer);
    for path in &members.paths {
        let mut permissions = fs::metadata(path).unwrap().permissions();
        permissions.set_readonly(true);
        fs::set_permissions(path, permissions).unwrap();
    }
    dir.run(&all).ok();
}

#[test]
fn the_list_is_bounded_and_the_rest_is_counted() {
    let (dir, members) = made(2);
    for block in (0..200).step_by(2) {
        members.flip(0, block, 0);
    }
    let args = [&["check", "--findings", "3"], &paths(&members)[..]].concat();
    let ran = dir.run(&args).fails(10, "");
    assert_eq!(ran.stdout.matches("does not fit its checksum").count(), 3);
    assert!(ran.stdout.contains("and 97 more findings"), "{ran:?}");
    assert!(ran.stdout.contains("found: checksum-failed 100"), "{ran:?}");
}

#[test]
fn the_help_documents_codes_and_fields() {
    let dir = Dir::new();
    let help = dir.run(&["check", "--help"]).ok().stdout;
    let members = Members::new(&dir.path(""), 2, true);
    for field in document(&dir, &members).as_object().unwrap().keys() {
        assert!(help.contains(field), "{field} is not documented");
    }
    for code in ["10", "11", "12", "13"] {
        assert!(help.contains(&format!("\n  {code}  ")), "{code}");
    }
}
