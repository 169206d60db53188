//! Searches over image files, with a table in sysfs's place.
#![allow(clippy::unwrap_used)]
use super::*;

use std::fs::File;
use std::os::unix::fs::FileExt;

use mirror::create::{CreateRequest, NewMember, plan};

/// A directory with the members of a mirror in it, one an image file, named by their slots.
fn images(test: &str, members: u8) -> (PathBuf, Vec<PathBuf>) {
    let name = format!("mirrorctl-scan-{}-{test}", std::process::id());
    let dir = std::env::temp_dir().join(name);
    std::fs::create_dir_all(&dir).unwrap();
    let paths: Vec<PathBuf> = (0..members)
        .map(|slot| dir.join(slot.to_string()))
        .collect();
    let request = CreateRequest {
        name: "data".to_owned(),
        members: paths
            .iter()
            .map(|path| NewMember {
                path: path.display().to_string(),
                size_bytes: 64 << 20,
                logical_block_bytes: 512,
                zeroed: true,
            })
            .collect(),
        size_bytes: Some(16 << 20),
        logical_block_bytes: None,
        checksums: true,
        random: (1..=u128::from(members) + 2).collect(),
        now_secs: 0,
    };
    for member in plan(&request).unwrap().members {
        let file = File::create(&member.path).unwrap();
        file.set_len(64 << 20).unwrap();
        for (offset, bytes) in member.maps.iter().chain(&member.superblocks) {
            file.write_all_at(bytes, *offset).unwrap();
        }
    }
    (dir, paths)
}

fn paths_of(found: &[Found]) -> Vec<PathBuf> {
    found.iter().map(|found| found.path.clone()).collect()
}

#[test]
fn devices_are_read_from_the_kernels_list() {
    let text = "major minor  #blocks  name\n\n   8        0  1024 sda\n   8        1  1023 \
                sda1\n 259        0  99 ublkb0\n  11        0  10 sr0\n   7        0  0 loop0\n   \
                7        1  5 loop1\n";
    assert_eq!(
        devices_in(text),
        ["/dev/sda", "/dev/sda1", "/dev/loop1"].map(PathBuf::from)
    );
}

#[test]
fn the_disk_under_another_device_gives_way_to_it() {
    let (dir, paths) = images("held", 2);
    let [first, second] = <[PathBuf; 2]>::try_from(paths).unwrap();
    // What dm-0 shows is what the disk under it holds.
    let upper = dir.join("dm-0");
    std::fs::copy(&second, &upper).unwrap();
    for (held, places, want, left_out) in [
        (None, vec![&first, &second], vec![&first, &second], false),
        (
            Some(&second),
            vec![&first, &second, &upper],
            vec![&first, &upper],
            false,
        ),
        (
            Some(&second),
            vec![&upper, &second, &first],
            vec![&upper, &first],
            false,
        ),
        // The upper device is not there, or shows something else.
        (Some(&second), vec![&first, &second], vec![&first], true),
    ] {
        let holders = |path: &Path| match held {
            Some(held) if held == path => vec!["dm-0".to_owned()],
            _ => Vec::new(),
        };
        let places: Vec<PathBuf> = places.into_iter().cloned().collect();
        let search = search(&places, holders).unwrap();
        let want: Vec<PathBuf> = want.into_iter().cloned().collect();
        assert_eq!(paths_of(&search.found), want, "{places:?}");
        let sentences = search.left_out();
        assert_eq!(!sentences.is_empty(), left_out, "{sentences:?}");
        for sentence in sentences {
            assert!(
                sentence.contains(&second.display().to_string()),
                "{sentence}"
            );
            assert!(sentence.contains("/dev/dm-0"), "{sentence}");
        }
    }
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_mirror_is_complete_with_each_member_once() {
    let (dir, paths) = images("complete", 3);
    let copy = dir.join("copy");
    std::fs::copy(&paths[2], &copy).unwrap();
    let (a, b, c) = (&paths[0], &paths[1], &paths[2]);
    for (places, want) in [
        (vec![a, b, c], true),
        (vec![a, b, c, &copy], false),
        (vec![a, b], false),
        (vec![a, c, &copy], false),
    ] {
        let places: Vec<PathBuf> = places.into_iter().cloned().collect();
        let found = search(&places, |_| Vec::new()).unwrap().found;
        let mirror = only_named(found, "data").unwrap();
        assert_eq!(mirror.is_complete(), want, "{places:?}");
    }
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn where_it_was_last_seen_comes_first() {
    let (dir, paths) = images("hints", 2);
    let run_dir = RunDir::new(&dir.join("run")).unwrap();
    run_dir.ensure().unwrap();
    run_dir.set_hints("data", &paths);
    // A place that is no block device: only the hint leads there.
    assert_eq!(named(&run_dir, "data", &[]).unwrap().paths(), paths);
    assert_eq!(run_dir.all_hints(), paths);
    // A hint is not trusted: what lies there now decides.
    std::fs::write(&paths[0], b"").unwrap();
    std::fs::write(&paths[1], b"").unwrap();
    assert!(named(&run_dir, "data", &[]).is_err());
    std::fs::remove_dir_all(dir).unwrap();
}
