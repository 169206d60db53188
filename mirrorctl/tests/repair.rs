//! repair on image files: what has a good copy is healed bit for bit, what has none is left
//! alone, and a check afterwards finds only that.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
#[path = "common/members.rs"]
mod members;

use common::{Dir, Ran, programs};
use dirty_map::{Block, Extent, ExtentState, Sum, SumPage};
use members::{COOL_BLOCKS, LAST, Members, content};
use mirror::layout::RegionKind;
use serde_json::{Value, json};
use std::fs::{self, File};

fn made(count: usize) -> (Dir, Members) {
    let dir = Dir::new();
    let members = Members::new(&dir.path(""), count, true);
    (dir, members)
}

fn run(dir: &Dir, words: &[&str], members: &Members) -> Ran {
    let paths = members.paths.iter().map(|path| path.to_str().unwrap());
    let args: Vec<&str> = words.iter().copied().chain(paths).collect();
    dir.run(&args)
}

/// Where members differ from what they were, in bytes.
fn differences(members: &Members, before: &[Vec<u8>]) -> Vec<(usize, usize)> {
    let after = members.everything();
    let mut found = Vec::new();
    for (member, (before, after)) in before.iter().zip(&after).enumerate() {
        assert_eq!(before.len(), after.len());
        let each = before.iter().zip(after).enumerate();
        found.extend(
            each.filter(|(_, (a, b))| a != b)
                .map(|(at, _)| (member, at)),
        );
    }
    found
}

/// Damages sound members; a dry run changes nothing and says the same as the repair, which makes
/// every byte what it was; a check finds nothing more.
fn healed(count: usize, damage: impl Fn(&Members)) -> Value {
    let (dir, members) = made(count);
    let before = members.everything();
    damage(&members);
    let damaged = members.everything();
    assert!(damaged != before, "nothing was damaged");
    let dry = run(&dir, &["repair", "--json", "--dry-run"], &members)
        .ok()
        .json();
    assert!(members.everything() == damaged, "a dry run has written");
    let done = run(&dir, &["repair", "--json"], &members).ok().json();
    assert_eq!(differences(&members, &before), []);
    assert_eq!(dry["mended"], done["mended"]);
    assert!(done["mended"].as_u64().unwrap() > 0, "{done}");
    let outcomes = |document: &Value, want: &str| {
        let findings = document["findings"].as_array().unwrap().clone();
        assert!(findings.iter().all(|f| f["outcome"] == want), "{document}");
        findings.len()
    };
    assert_eq!(outcomes(&dry, "would-mend"), outcomes(&done, "mended"));
    let after = run(&dir, &["check", "--json"], &members).ok().json();
    assert_eq!(after["findings"], json!([]));
    done
}

#[test]
fn a_changed_byte_is_healed_on_each_member_and_in_each_place() {
    for member in [0, 1] {
        for block in [0, 255, 4 * 1024 + 77, 5 * 1024, LAST] {
            let done = healed(2, |members| members.flip(member, block, 17));
            assert_eq!(done["counts"], json!({"checksum-failed": 1}));
            assert_eq!(done["findings"][0]["slot"], member);
        }
    }
}

#[test]
fn many_blocks_on_all_members_are_healed_from_whichever_is_right() {
    let done = healed(3, |members| {
        for block in (0..1024).chain(4 * 1024..4 * 1024 + 300) {
            let right = usize::try_from(block % 3).unwrap();
            for member in (0..3).filter(|&member| member != right) {
                members.flip(member, block, block % 4096);
            }
        }
    });
    assert_eq!(done["counts"], json!({"checksum-failed": 2 * 1324}));
}

#[test]
fn a_misdirected_write_is_healed() {
    for member in [0, 1] {
        healed(2, |members| {
            members.write_block(member, 4 * 1024 + 9, &content(9))
        });
    }
}

#[test]
fn a_lost_page_of_checksums_is_made_anew() {
    for garbage in [0xa5, 0] {
        let (dir, members) = made(2);
        let before = members.everything();
        members.put(1, members.page_at(Extent(4)), &[garbage; 4096]);
        run(&dir, &["repair"], &members).ok();
        assert_eq!(differences(&members, &before), []);
    }
    // Of both members, and the last extent, which ends with a short block.
    let (dir, members) = made(2);
    let before = members.everything();
    for member in [0, 1] {
        members.put(member, members.page_at(Extent(5)), &[7; 4096]);
    }
    let done = run(&dir, &["repair", "--json"], &members).ok().json();
    assert_eq!(done["counts"], json!({"checksum-stale": 2 * 258}));
    // What stands in the page for blocks that the device does not have is nobody's business.
    let blocks = 4 * 258;
    let start = usize::try_from(members.page_at(Extent(5))).unwrap();
    let beyond = start + blocks..start + 4096;
    let differences = differences(&members, &before);
    assert!(
        differences.iter().all(|(_, at)| beyond.contains(at)),
        "{differences:?}"
    );
    run(&dir, &["check"], &members).ok();
}

#[test]
fn checksums_that_are_not_known_are_filled_in() {
    let (dir, members) = made(2);
    let before = members.everything();
    for member in [0, 1] {
        for extent in [0, 4, 5] {
            members.put_page(member, Extent(extent), &SumPage::unknown());
        }
    }
    let found = run(&dir, &["check", "--json"], &members).ok().json();
    assert_eq!(found["blocks"]["without-checksum"], COOL_BLOCKS);
    let done = run(&dir, &["--json", "repair"], &members).ok().json();
    assert_eq!(done["blocks"]["filled-in"], COOL_BLOCKS);
    assert_eq!(differences(&members, &before), []);
    let found = run(&dir, &["check", "--json"], &members).ok().json();
    assert_eq!(found["blocks"]["without-checksum"], 0);
}

#[test]
fn stale_checksums_follow_the_copies() {
    let (dir, members) = made(2);
    let new = vec![7; 4096];
    let sum = Some(Sum::of(Block(30), &new));
    for member in [0, 1] {
        members.write_block(member, 30, &new);
    }
    members.put_sum(0, 30, sum);
    run(&dir, &["repair"], &members).ok();
    assert_eq!(members.page(1, Extent(0)).get(Block(30)), sum);
    // On neither: the copies agree, and stand.
    let newer = vec![8; 4096];
    for member in [0, 1] {
        members.write_block(member, 30, &newer);
    }
    let done = run(&dir, &["repair", "--json"], &members).ok().json();
    assert_eq!(done["counts"], json!({"checksum-stale": 2}));
    for member in [0, 1] {
        let sum = Some(Sum::of(Block(30), &newer));
        assert_eq!(members.page(member, Extent(0)).get(Block(30)), sum);
    }
    run(&dir, &["check"], &members).ok();
}

#[test]
fn a_stale_copy_with_a_stale_page_follows_most_of_three() {
    healed(3, |members| {
        let other = vec![7; 4096];
        members.write_block(2, 30, &other);
        members.put_sum(2, 30, Some(Sum::of(Block(30), &other)));
    });
}

#[test]
fn damaged_blocks_are_never_written_to_and_the_rest_is_healed() {
    let (dir, members) = made(2);
    let before = members.everything();
    for member in [0, 1] {
        members.flip(member, 5, member as u64);
        members.put_sum(member, 9, None);
    }
    members.flip(1, 9, 0);
    let damaged = members.everything();
    members.flip(0, 6, 0);
    members.flip(1, 7, 0);
    let done = run(&dir, &["repair"], &members).fails(13, "no copy is provably right");
    assert!(
        done.stdout
            .contains("left: nothing is overwritten without proof"),
        "{done:?}"
    );
    assert!(done.stdout.contains("2 mended, 2 left"), "{done:?}");
    assert_eq!(differences(&members, &damaged), []);
    let left = run(&dir, &["check", "--json"], &members)
        .fails(13, "")
        .json();
    assert_eq!(left["counts"], json!({"damaged": 1, "undecidable": 1}));
    assert!(differences(&members, &before).len() > 3);
}

#[test]
fn superblock_copies_are_made_equal_from_the_newer_one() {
    for member in [0, 1] {
        for offset in [4096, 8192] {
            let done = healed(2, |members| {
                members.put(member, offset + 200, &[0xff; 3000])
            });
            assert_eq!(done["counts"], json!({"superblock": 1}));
        }
    }
    let (dir, members) = made(2);
    let mut newer = members.superblock(0);
    newer.write_count += 1;
    for (newer_at, older_at) in [(4096, 8192), (8192, 4096)] {
        newer.write_count += 1;
        members.put(0, newer_at, &newer.encode());
        run(&dir, &["repair"], &members).ok();
        assert_eq!(members.get(0, older_at, 4096), newer.encode());
    }
    // Both copies: that member is left, the other is mended.
    members.put(1, 4096 + 200, &[0xff]);
    members.put(1, 8192 + 200, &[0xff]);
    members.put(0, 4096 + 200, &[0xff]);
    let all = members.everything();
    run(&dir, &["repair"], &members).fails(3, "Nothing was repaired");
    assert_eq!(differences(&members, &all), []);
    let done = run(&dir, &["repair", "--force"], &members).fails(12, "");
    assert!(
        done.stdout.contains("left: the member is left as it is"),
        "{done:?}"
    );
    assert_eq!(members.get(0, 4096, 4096), newer.encode());
    assert_eq!(members.all(1), all[1]);
}

#[test]
fn map_sectors_are_mended_from_the_other_copy_or_member() {
    for kind in [RegionKind::Position, RegionKind::State, RegionKind::Summary] {
        for copy in [0, 1] {
            let done = healed(2, |members| {
                members.put(1, members.map_at(kind, 0, copy) + 5 * 512 + 9, &[0xff; 600]);
            });
            assert_eq!(done["counts"], json!({"map": 1}));
        }
    }
    healed(2, |members| {
        for copy in [0, 1] {
            members.put(1, members.map_at(RegionKind::State, 0, copy), &[0xff; 4096]);
        }
    });
    // Nowhere: it stays as it is, and so do all blocks.
    let (dir, members) = made(2);
    for member in [0, 1] {
        for copy in [0, 1] {
            members.put(
                member,
                members.map_at(RegionKind::State, 0, copy),
                &[0xff; 512],
            );
        }
    }
    members.flip(0, 3, 3);
    let before = members.everything();
    let done = run(&dir, &["repair"], &members).fails(12, "no good copy");
    assert!(
        done.stdout.contains("left: there is no good copy"),
        "{done:?}"
    );
    assert_eq!(differences(&members, &before), []);
}

#[test]
fn the_newest_map_sector_is_copied_with_its_stamp() {
    let (dir, members) = made(2);
    let mut states = members::STATES;
    states[0] = ExtentState::Hot;
    members.put_states_copy(0, 0, 3, &states);
    members.unclean();
    // Of an extent that is hot nothing is written, whatever its checksums say.
    members.flip(1, 3, 3);
    let data = usize::try_from(members.layout.data_offset).unwrap();
    let before = members.everything();
    let done = run(&dir, &["repair"], &members).ok();
    let newest = members.get(0, members.map_at(RegionKind::State, 0, 0), 512);
    for member in [0, 1] {
        for copy in [0, 1] {
            let at = members.map_at(RegionKind::State, 0, copy);
            assert_eq!(members.get(member, at, 512), newest, "{member} {copy}");
        }
        assert_eq!(members.all(member)[data..], before[member][data..]);
    }
    assert!(done.stdout.contains("the next start does that"), "{done:?}");
    assert!(done.stdout.contains("map 3"), "{done:?}");
}

#[test]
fn without_an_in_sync_member_nothing_is_repaired_unless_forced() {
    let (dir, members) = made(3);
    let before = members.everything();
    members.flip(0, 3, 3);
    members.put_sum(0, 8, None);
    members.put_sum(1, 8, None);
    let damaged = members.everything();
    let two: Vec<&str> = members.paths[..2]
        .iter()
        .map(|path| path.to_str().unwrap())
        .collect();
    for words in [&["repair"][..], &["repair", "--dry-run"]] {
        let ran = dir
            .run(&[words, &two].concat())
            .fails(3, "Nothing was repaired: ");
        assert!(ran.stderr.contains("the member in slot 2"), "{ran:?}");
        assert_eq!(differences(&members, &damaged), []);
    }
    let ran = dir
        .run(&[&["repair", "--force"], &two[..]].concat())
        .fails(11, "");
    assert!(ran.stdout.contains("1 mended, 1 left"), "{ran:?}");
    // No checksum is invented while the third may hold something else.
    assert_eq!(members.page(0, Extent(0)).get(Block(8)), None);
    members.put_sum(0, 8, Some(Sum::of(Block(8), &content(8))));
    members.put_sum(1, 8, Some(Sum::of(Block(8), &content(8))));
    assert_eq!(differences(&members, &before), []);
}

#[test]
fn a_lost_member_and_unwritten_extents_are_not_written_to() {
    let (dir, members) = made(3);
    members.lose(2);
    members.flip(2, 3, 3);
    members.flip(0, 2 * 1024, 0);
    members.flip(0, 3 * 1024, 0);
    members.flip(1, 1024, 0);
    let before = members.everything();
    run(&dir, &["repair"], &members).ok();
    assert_eq!(differences(&members, &before), []);
    // Its metadata is mended from itself.
    members.put(2, 8192 + 200, &[0xff]);
    members.put(2, members.map_at(RegionKind::State, 0, 1), &[0xff; 512]);
    run(&dir, &["repair"], &members).ok();
    assert_eq!(differences(&members, &before), []);
}

#[test]
fn what_is_in_use_or_cannot_be_written_is_refused() {
    let (dir, members) = made(2);
    members.flip(0, 3, 3);
    let before = members.everything();
    let holder = File::open(&members.paths[1]).unwrap();
    holder.lock_shared().unwrap();
    for words in [&["repair"][..], &["repair", "--force"]] {
        run(&dir, words, &members).fails(5, "is in use");
    }
    drop(holder);
    assert_eq!(differences(&members, &before), []);
    run(&dir, &["repair"], &members).ok();
    fs::remove_file(&members.paths[1]).unwrap();
    run(&dir, &["repair"], &members).fails(4, "no such file");
}

/// What a running mirror has let go of is not open: its daemon is asked.
#[test]
fn a_member_of_a_running_mirror_is_refused() {
    let (dir, members) = made(2);
    fs::create_dir(dir.path("run")).unwrap();
    let socket = std::os::unix::net::UnixListener::bind(dir.path("run/m.sock")).unwrap();
    for words in ["check", "repair"] {
        let ran = run(&dir, &[words], &members).fails(5, "is running");
        assert!(ran.stderr.contains("'mirrorctl stop m'"), "{ran:?}");
    }
    drop(socket);
    run(&dir, &["check"], &members).ok();
}
