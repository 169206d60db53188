//! Who uses a block device or an image file, for the sentence that refuses it.
//!
//! The kernel decides by the exclusive open; this finds out why it said no, and who got in
//! without asking for the device alone. What cannot be read is left out.

use std::fs;
use std::path::{Path, PathBuf};

use crate::medium::{Identity, identity};

/// Where sysfs is mounted.
pub(crate) const SYSFS: &str = "/sys";

/// A block device's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Numbers {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

/// Everything found that uses the block device or one of its partitions, as parts of a
/// sentence.
pub(crate) fn of_block_device(numbers: Numbers) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let mut found = Vec::new();
    for (device, name) in with_partitions(numbers) {
        found.extend(
            mounted_at(&mounts, device)
                .into_iter()
                .map(|place| format!("{name} is mounted at {place}")),
        );
        if is_swap(&swaps, &name) {
            found.push(format!("{name} is swapped to"));
        }
        for holder in holders(Path::new(SYSFS), device) {
            found.push(format!("{name} is part of /dev/{holder}"));
        }
    }
    found
}

/// The loop devices that show this file.
pub(crate) fn of_file(path: &Path) -> Vec<String> {
    let Ok(wanted) = fs::canonicalize(path) else {
        return Vec::new();
    };
    let Ok(entries) = fs::read_dir("/sys/block") else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let backing = fs::read_to_string(entry.path().join("loop/backing_file"));
        if backing.is_ok_and(|file| Path::new(file.trim_end()) == wanted) {
            let name = entry.file_name();
            found.push(format!("it is the file behind /dev/{}", name.display()));
        }
    }
    found
}

/// The processes that have the device or file with this identity open for writing, this one
/// aside. Most programs open a device without asking for it alone (dd, qemu), and the kernel
/// then lets another opener in. Without privilege only one's own processes are seen.
pub(crate) fn writers(wanted: &Identity) -> Vec<String> {
    let own = std::process::id().to_string();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut found = Vec::new();
    for process in processes {
        let pid = process.file_name();
        let is_pid = pid
            .to_str()
            .is_some_and(|pid| pid.bytes().all(|b| b.is_ascii_digit()) && pid != own);
        if is_pid && has_open_for_writing(&process.path(), wanted) {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            found.push(format!(
                "process {} ({}) has it open for writing",
                pid.display(),
                name.trim_end()
            ));
        }
    }
    found
}

fn has_open_for_writing(process: &Path, wanted: &Identity) -> bool {
    let descriptors = fs::read_dir(process.join("fd"));
    descriptors.into_iter().flatten().flatten().any(|entry| {
        let info = || fs::read_to_string(process.join("fdinfo").join(entry.file_name()));
        identity(&entry.path()).as_ref() == Some(wanted)
            && info().is_ok_and(|text| opened_to_write(&text))
    })
}

/// Whether the access mode in the text of an fdinfo file allows writing.
fn opened_to_write(fdinfo: &str) -> bool {
    let flags = fdinfo
        .lines()
        .find_map(|line| line.strip_prefix("flags:"))
        .and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
    flags.is_some_and(|flags| matches!(flags & 3, 1 | 2))
}

/// Whether the kernel says that the block device is read-only; opening it for writing may
/// succeed all the same.
pub(crate) fn is_read_only(numbers: Numbers) -> bool {
    let text = fs::read_to_string(sysfs_dir(numbers).join("ro"));
    text.is_ok_and(|text| text.trim() == "1")
}

/// The device and its partitions, each with its path under /dev.
fn with_partitions(numbers: Numbers) -> Vec<(Numbers, String)> {
    let dir = sysfs_dir(numbers);
    let mut all = Vec::new();
    if let Some(name) = kernel_name(&dir) {
        all.push((numbers, name));
    }
    for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
        let part = entry.path();
        if part.join("partition").exists()
            && let Ok(text) = fs::read_to_string(part.join("dev"))
            && let Some(part_numbers) = parse_numbers(text.trim())
        {
            all.push((
                part_numbers,
                format!("/dev/{}", entry.file_name().display()),
            ));
        }
    }
    all
}

fn sysfs_dir(numbers: Numbers) -> PathBuf {
    block_dir(Path::new(SYSFS), numbers)
}

fn block_dir(sysfs: &Path, numbers: Numbers) -> PathBuf {
    sysfs.join(format!("dev/block/{}:{}", numbers.major, numbers.minor))
}

fn kernel_name(dir: &Path) -> Option<String> {
    let target = fs::canonicalize(dir).ok()?;
    Some(format!("/dev/{}", target.file_name()?.to_str()?))
}

/// Names of the devices that are built on this one (dm, md, LVM, multipath, crypt, bcache), in
/// order. `sysfs` is where sysfs is mounted.
pub(crate) fn holders(sysfs: &Path, device: Numbers) -> Vec<String> {
    let entries = fs::read_dir(block_dir(sysfs, device).join("holders"));
    let names = entries.into_iter().flatten().flatten();
    let mut holders: Vec<String> = names
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    holders.sort_unstable();
    holders
}

fn parse_numbers(text: &str) -> Option<Numbers> {
    let (major, minor) = text.split_once(':')?;
    Some(Numbers {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
    })
}

/// Mount points of a device, from the text of a mountinfo file.
fn mounted_at(mountinfo: &str, device: Numbers) -> Vec<String> {
    let mut places = Vec::new();
    for line in mountinfo.lines() {
        let mut fields = line.split(' ');
        let numbers = fields.nth(2).and_then(parse_numbers);
        if numbers == Some(device)
            && let Some(place) = fields.nth(1)
        {
            places.push(place.replace("\\040", " "));
        }
    }
    places
}

fn is_swap(swaps: &str, path: &str) -> bool {
    let lines = swaps.lines().skip(1);
    lines
        .filter_map(|line| line.split_whitespace().next())
        .any(|swap| swap == path)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const MOUNTINFO: &str = "\
22 1 8:2 / / rw,relatime shared:1 - ext4 /dev/sda2 rw
36 22 8:17 / /srv/my\\040data rw - xfs /dev/sdb1 rw
40 22 8:17 /sub /mnt rw - xfs /dev/sdb1 rw
nonsense
";

    #[test]
    fn mount_points_are_found_by_device_number() {
        let device = |major, minor| Numbers { major, minor };
        assert_eq!(mounted_at(MOUNTINFO, device(8, 2)), ["/"]);
        assert_eq!(
            mounted_at(MOUNTINFO, device(8, 17)),
            ["/srv/my data", "/mnt"]
        );
        assert!(mounted_at(MOUNTINFO, device(8, 1)).is_empty());
    }

    #[test]
    fn holders_are_read_from_sysfs() {
        let name = format!("mirrorctl-holders-{}", std::process::id());
        let sysfs = std::env::temp_dir().join(name);
        let block = sysfs.join("dev/block");
        // The disk under a dm device, its upper device, a disk of two logical volumes, a whole
        // disk of which only a partition is held, and a device without the directory.
        for dir in [
            "8:0/holders/dm-0",
            "253:0/holders",
            "8:16/holders/dm-2",
            "8:16/holders/dm-1",
            "8:32/holders",
            "8:32/sdc1/holders/md0",
            "8:33/holders/md0",
            "7:0/queue",
        ] {
            fs::create_dir_all(block.join(dir)).unwrap();
        }
        for (major, minor, want) in [
            (8, 0, &["dm-0"][..]),
            (253, 0, &[]),
            (8, 16, &["dm-1", "dm-2"]),
            (8, 32, &[]),
            (8, 33, &["md0"]),
            (7, 0, &[]),
            (9, 9, &[]),
        ] {
            let got = holders(&sysfs, Numbers { major, minor });
            assert_eq!(got, want, "{major}:{minor}");
        }
        fs::remove_dir_all(sysfs).unwrap();
    }

    #[test]
    fn swaps_are_found_by_path() {
        let swaps = "Filename Type Size Used Priority\n/dev/sda3 partition 1 0 -2\n";
        assert!(is_swap(swaps, "/dev/sda3"));
        assert!(!is_swap(swaps, "/dev/sda"));
        assert!(!is_swap(swaps, "Filename"));
    }

    #[test]
    fn access_modes_are_read() {
        for (text, want) in [
            ("pos:\t0\nflags:\t0100000\nmnt_id:\t1\n", false),
            ("pos:\t0\nflags:\t0100001\n", true),
            ("pos:\t0\nflags:\t02140002\n", true),
            ("pos:\t0\nflags:\t010000000\n", false),
            ("pos:\t0\n", false),
            ("flags:\t9\n", false),
        ] {
            assert_eq!(opened_to_write(text), want, "{text}");
        }
    }

    #[test]
    fn numbers_are_read() {
        assert_eq!(
            parse_numbers("259:3"),
            Some(Numbers {
                major: 259,
                minor: 3
            })
        );
        assert_eq!(parse_numbers("259"), None);
    }
}
