//! create, examine and destroy on image files: what they refuse, what they leave alone and
//! what they write.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stderr)]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;

use common::Dir;
use serde_json::Value;

const MIB: u64 = 1 << 20;

fn created(dir: &Dir, name: &str, size: &str) -> (String, String) {
    let (a, b) = (dir.arg(&format!("{name}.a")), dir.arg(&format!("{name}.b")));
    dir.run(&[
        "create", name, "--member", &a, "--member", &b, "--size", size,
    ])
    .ok();
    (a, b)
}

/// Writes into a file and closes it again.
fn put(path: &str, offset: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

fn head(path: &str) -> Vec<u8> {
    let mut bytes = vec![0; 64 << 10];
    File::open(path)
        .unwrap()
        .read_exact_at(&mut bytes, 0)
        .unwrap();
    bytes
}

#[test]
fn create_makes_sparse_files_that_examine_understands() {
    let dir = Dir::new();
    let (a, b) = created(&dir, "data", "1G");
    let one = dir.run(&["examine", &a, "--json"]).ok().json();
    let two = dir.run(&["--json", "examine", &b]).ok().json();
    for (document, slot) in [(&one, 0), (&two, 1)] {
        assert_eq!(document["mirror-name"], "data");
        assert_eq!(document["slot"], slot);
        assert_eq!(document["size-bytes"], 1 << 30);
        assert_eq!(document["copy-used"], "a");
        assert_eq!(document["copies-differ"], false);
        assert_eq!(document["last-stop"], "clean");
        assert_eq!(document["slots"][1]["state"], "in-sync");
        assert_eq!(document["slots"][0]["zeroed"], true);
    }
    assert_eq!(one["mirror-uuid"], two["mirror-uuid"]);
    assert_ne!(one["member-uuid"], two["member-uuid"]);
    let meta = fs::metadata(&a).unwrap();
    assert!(meta.len() > 1 << 30);
    assert!(meta.blocks() * 512 < 4 * MIB, "{} blocks", meta.blocks());
    let text = dir.run(&["examine", &a]).ok().stdout;
    assert!(text.contains("slot 0 (uuid"), "{text}");
    assert!(text.contains("1.0 GiB (1073741824 bytes)"), "{text}");
}

#[test]
fn a_mirror_of_12_tib_is_created_at_once() {
    let dir = Dir::new();
    let (a, _) = created(&dir, "big", "12T");
    assert_eq!(
        dir.run(&["examine", &a, "--json"]).ok().json()["size-bytes"],
        12_u64 << 40
    );
}

#[test]
fn existing_images_become_members_as_large_as_fits() {
    let dir = Dir::new();
    let a = dir.image("a", 32 * MIB, 20 * MIB, b"left over");
    let b = dir.image("b", 40 * MIB, 0, b"");
    let made = dir.run(&["--json", "create", "m", "--member", &a, "--member", &b]);
    let size = made.ok().json()["size-bytes"].as_u64().unwrap();
    assert!((30 * MIB..32 * MIB).contains(&size), "{size}");
    assert_eq!(fs::metadata(&a).unwrap().len(), 32 * MIB);
    assert_eq!(fs::metadata(&b).unwrap().len(), 40 * MIB);
}

/// What was on an image before is gone when it is said to be zeroed.
#[test]
fn a_member_marked_zeroed_reads_as_zeroes() {
    let dir = Dir::new();
    let a = dir.image("a", 32 * MIB, 20 * MIB, b"left over");
    let b = dir.image("b", 32 * MIB, 31 * MIB, b"left over");
    let made = dir.run(&["--json", "create", "m", "--member", &a, "--member", &b]);
    let made = made.ok().json();
    let data = usize::try_from(made["data-offset"].as_u64().unwrap()).unwrap();
    for member in made["members"].as_array().unwrap() {
        let bytes = fs::read(member["path"].as_str().unwrap()).unwrap();
        let zero = bytes[data..].iter().all(|byte| *byte == 0);
        assert_eq!(member["zeroed"], Value::Bool(zero), "{member}");
    }
}

#[test]
fn a_dry_run_writes_nothing() {
    let dir = Dir::new();
    let a = dir.image("a", 32 * MIB, 20 * MIB, b"left over");
    let before = fs::read(&a).unwrap();
    let b = dir.arg("b");
    let args = [
        "create",
        "m",
        "--member",
        &a,
        "--member",
        &b,
        "--size",
        "16M",
        "--dry-run",
    ];
    let ran = dir.run(&args).ok();
    assert!(ran.stdout.contains("would be created: 16.0 MiB"), "{ran:?}");
    assert_eq!(fs::read(&a).unwrap(), before);
    assert!(!dir.path("b").exists());
    let (a, _) = created(&dir, "m", "16M");
    let before = head(&a);
    let ran = dir.run(&["destroy", "--dry-run", &a]).ok();
    assert!(ran.stdout.contains("would wipe"), "{ran:?}");
    assert_eq!(head(&a), before);
}

#[test]
fn foreign_content_is_refused_by_name_and_survives() {
    let dir = Dir::new();
    let good = dir.image("good", 32 * MIB, 0, b"");
    let rows: [(u64, &[u8], &str); 4] = [
        (0, b"XFSB", "an XFS filesystem (at byte 0)"),
        (
            0x438,
            &[0x53, 0xef],
            "an ext2, ext3 or ext4 filesystem (at byte 1080)",
        ),
        (0, b"LUKS\xba\xbe", "a LUKS encrypted volume"),
        (32 * MIB - 512, b"EFI PART", "a GPT partition table"),
    ];
    for (offset, bytes, what) in rows {
        let foreign = dir.image("foreign", 32 * MIB, offset, bytes);
        let before = fs::read(&foreign).unwrap();
        let args = ["create", "m", "--member", &good, "--member", &foreign];
        let ran = dir.run(&args).fails(3, what);
        assert!(ran.stderr.contains(&foreign) && ran.stderr.contains("--force"));
        assert_eq!(fs::read(&foreign).unwrap(), before);
        assert!(head(&good).iter().all(|byte| *byte == 0), "{what}");
        dir.run(&[&args[..], &["--force", "--dry-run"]].concat())
            .ok();
        assert_eq!(fs::read(&foreign).unwrap(), before);
    }
    let foreign = dir.arg("foreign");
    dir.run(&[
        "create", "m", "--force", "--member", &good, "--member", &foreign,
    ])
    .ok();
    dir.run(&["examine", &foreign]).ok();
}

/// What real tools write is recognised, where the machine has them.
#[test]
fn content_made_by_real_tools_is_recognised() {
    let dir = Dir::new();
    let good = dir.image("good", 512 * MIB, 0, b"");
    let tools: [(&[&str], &str); 4] = [
        (&["mkfs.ext4", "-q", "-F"], "ext4"),
        (&["mkfs.xfs", "-q", "-f"], "XFS"),
        (&["mkswap", "-q"], "swap"),
        (&["mkfs.vfat"], "FAT"),
    ];
    let mut tried = 0;
    for (tool, what) in tools {
        let foreign = dir.image("foreign", 512 * MIB, 0, b"");
        let mut command = Command::new(tool[0]);
        command
            .args(&tool[1..])
            .arg(&foreign)
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        let ran = common::output(&mut command);
        let Ok(ran) = ran else {
            eprintln!(
                "{} is not installed: its mark is tested by the table only",
                tool[0]
            );
            continue;
        };
        assert!(ran.status.success(), "{ran:?}");
        tried += 1;
        dir.run(&["create", "m", "--member", &good, "--member", &foreign])
            .fails(3, what);
    }
    assert!(tried > 0, "none of the tools is installed");
}

#[test]
fn a_member_of_another_mirror_is_refused() {
    let dir = Dir::new();
    let (a, _) = created(&dir, "first", "16M");
    let good = dir.image("good", 32 * MIB, 0, b"");
    let before = head(&a);
    dir.run(&["create", "second", "--member", &good, "--member", &a])
        .fails(3, "a member (slot 0) of mirror first");
    assert_eq!(head(&a), before);
}

#[test]
fn a_locked_image_is_refused_even_by_force() {
    let dir = Dir::new();
    let (a, _) = created(&dir, "m", "16M");
    let good = dir.image("good", 32 * MIB, 0, b"");
    let holder = File::open(&a).unwrap();
    holder.lock().unwrap();
    let before = head(&a);
    let create = ["create", "n", "--force", "--member", &good, "--member", &a];
    dir.run(&create).fails(5, "is in use");
    dir.run(&["destroy", "--force", &a]).fails(5, "is in use");
    assert_eq!(head(&a), before);
    assert!(head(&good).iter().all(|byte| *byte == 0));
    holder.unlock().unwrap();
    dir.run(&create).ok();
}

#[test]
fn an_image_that_somebody_writes_to_is_refused_even_by_force() {
    let dir = Dir::new();
    let a = dir.image("a", 32 * MIB, 0, b"");
    let b = dir.image("b", 32 * MIB, 0, b"");
    let create = ["create", "m", "--force", "--member", &a, "--member", &b];
    let reader = File::open(&a).unwrap();
    dir.run(&[&create[..], &["--dry-run"]].concat()).ok();
    drop(reader);
    let writer = File::options().write(true).open(&a).unwrap();
    let ran = dir.run(&create).fails(5, "has it open for writing");
    let own = format!("process {} ", std::process::id());
    assert!(ran.stderr.contains(&own), "{ran:?}");
    assert!(head(&b).iter().all(|byte| *byte == 0));
    drop(writer);
    dir.run(&create).ok();
}

#[test]
fn one_damaged_copy_is_shown_and_two_refuse() {
    let dir = Dir::new();
    let (a, _) = created(&dir, "m", "16M");
    put(&a, 4096 + 200, &[0xff]);
    let document = dir.run(&["examine", &a, "--json"]).ok().json();
    assert_eq!(document["copy-used"], "b");
    assert_eq!(document["copies-differ"], true);
    assert!(document["copy-a"].as_str().unwrap().starts_with("damaged"));
    put(&a, 8192 + 200, &[0xff]);
    let ran = dir.run(&["examine", &a]).fails(1, "damaged");
    assert!(ran.stderr.contains(&a));
    dir.run(&["destroy", &a]).fails(3, "--force wipes it");
    dir.run(&["destroy", "--force", &a]).ok();
    dir.run(&["examine", &a]).fails(4, "is not a member");
}

#[test]
fn destroy_by_name_finds_the_members_and_wipes_only_superblocks() {
    let dir = Dir::new();
    let (a, b) = created(&dir, "m", "16M");
    let (other, _) = created(&dir, "other", "16M");
    let maps = head(&a)[12 << 10..].to_vec();
    let here = dir.arg("");
    let ran = dir.run(&["destroy", "m", "--scan", &here]).ok();
    assert!(
        ran.stdout.contains(&a) && ran.stdout.contains(&b),
        "{ran:?}"
    );
    for path in [&a, &b] {
        dir.run(&["examine", path]).fails(4, "is not a member");
    }
    assert_eq!(head(&a)[12 << 10..], maps);
    dir.run(&["examine", &other]).ok();
    dir.run(&["destroy", "m", "--scan", &here])
        .fails(4, "named m");
}

#[test]
fn destroy_says_which_members_it_did_not_find() {
    let dir = Dir::new();
    let (a, b) = created(&dir, "m", "16M");
    fs::remove_file(&b).unwrap();
    let ran = dir.run(&["destroy", "m"]).ok();
    assert!(ran.stdout.contains(&a), "{ran:?}");
    assert!(
        ran.stderr.contains("slot 1 of mirror m was not found"),
        "{ran:?}"
    );
}

#[test]
fn a_disk_put_to_another_use_is_not_destroyed_unasked() {
    let dir = Dir::new();
    let (a, b) = created(&dir, "m", "16M");
    put(&a, 0, b"XFSB");
    let before = (head(&a), head(&b));
    dir.run(&["destroy", &a, &b]).fails(3, "an XFS filesystem");
    assert_eq!(
        (head(&a), head(&b)),
        before,
        "all are looked at before one is wiped"
    );
    dir.run(&["destroy", "--force", &a, &b]).ok();
    assert!(head(&a).starts_with(b"XFSB"));
}

#[test]
fn files_made_for_a_failed_creation_are_removed() {
    let dir = Dir::new();
    let a = dir.arg("a");
    fs::create_dir(dir.path("sub")).unwrap();
    let long = dir.arg(&format!("sub/{}", "x".repeat(300)));
    let ran = dir.run(&[
        "create", "m", "--member", &a, "--member", &long, "--size", "16M",
    ]);
    assert_ne!(ran.code, Some(0));
    assert!(ran.stderr.contains("cannot be made"), "{ran:?}");
    assert!(!dir.path("a").exists());
}
