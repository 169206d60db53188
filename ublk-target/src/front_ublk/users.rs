//! Who uses the mirror's block device, for the refusal to stop it.
//!
//! The kernel says only whether somebody holds the device exclusively, as a mount does. Most
//! programs open a device without asking for it alone, so the descriptors and the mounts of all
//! processes are looked through as well, in every mount namespace. A partition of the device
//! counts as the device.
//!
//! It finds what `/proc` and `/sys` show to the daemon: without root, the daemon's own user's
//! processes. It keeps nobody out: who opens the device after the look is met by the stop.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, StatxFlags};

/// Major and minor number of a device.
type Numbers = (u32, u32);

/// The device or one of its partitions.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    numbers: Numbers,
    /// Its node.
    path: String,
}

/// Everybody but the process `own` who uses the block device, as parts of a sentence.
///
/// Blocks while the device answers: not for the mirror's own thread.
pub(crate) fn of_block_device(path: &str, own: u32) -> Vec<String> {
    let Some((_, numbers)) = device_at(Path::new(path)) else {
        return Vec::new();
    };
    let (proc, sys) = (Path::new("/proc"), Path::new("/sys"));
    let parts = parts(sys, path, numbers);
    let mut users = mounts(proc, &parts, own);
    users.extend(kernel_users(proc, sys, &parts));
    users.extend(openers(proc, FileType::BlockDevice, &parts, own));
    if users.is_empty() && is_held(path) {
        users.push("mounted or opened exclusively".to_owned());
    }
    users
}

/// Whether a mounted filesystem, swap or another device holds the block device.
fn is_held(path: &str) -> bool {
    let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
    let opened: rustix::io::Result<OwnedFd> = rustix::fs::open(path, flags, Mode::empty());
    opened.is_err_and(|errno| errno == rustix::io::Errno::BUSY)
}

/// Kind and numbers of what lies at `path`. Asks no remote or FUSE filesystem, which may not
/// answer: a device's numbers do not change.
fn device_at(path: &Path) -> Option<(FileType, Numbers)> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let stat = rustix::fs::statx(CWD, path, flags, StatxFlags::TYPE).ok()?;
    let kind = FileType::from_raw_mode(stat.stx_mode.into());
    Some((kind, (stat.stx_rdev_major, stat.stx_rdev_minor)))
}

/// The device and its partitions.
fn parts(sys: &Path, path: &str, numbers: Numbers) -> Vec<Part> {
    let mut parts = vec![Part {
        numbers,
        path: path.to_owned(),
    }];
    for entry in entries(&sys_dir(sys, numbers)) {
        let dir = entry.path();
        if dir.join("partition").exists()
            && let Some(numbers) = fs::read_to_string(dir.join("dev"))
                .ok()
                .and_then(|text| parse_numbers(text.trim()))
        {
            parts.push(Part {
                numbers,
                path: format!("/dev/{}", entry.file_name().display()),
            });
        }
    }
    parts
}

fn sys_dir(sys: &Path, (major, minor): Numbers) -> std::path::PathBuf {
    sys.join(format!("dev/block/{major}:{minor}"))
}

fn parse_numbers(text: &str) -> Option<Numbers> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn entries(dir: &Path) -> impl Iterator<Item = fs::DirEntry> {
    fs::read_dir(dir).into_iter().flatten().flatten()
}

/// The processes but `own`, in order.
fn processes(proc: &Path, own: u32) -> Vec<u32> {
    let numbers = entries(proc).filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut all: Vec<u32> = numbers.filter(|pid| *pid != own).collect();
    all.sort_unstable();
    all
}

/// Where the device is mounted, in any mount namespace in which a process lives.
fn mounts(proc: &Path, parts: &[Part], own: u32) -> Vec<String> {
    let mut namespaces = BTreeSet::new();
    let mut places = BTreeSet::new();
    for pid in processes(proc, own) {
        let dir = proc.join(pid.to_string());
        // One that cannot be told may be a namespace of its own.
        let known = fs::read_link(dir.join("ns/mnt")).is_ok_and(|it| !namespaces.insert(it));
        if known {
            continue;
        }
        let text = fs::read_to_string(dir.join("mountinfo")).unwrap_or_default();
        places.extend(text.lines().filter_map(|line| mounted_at(line, parts)));
    }
    places
        .into_iter()
        .map(|place| format!("mounted at {place}"))
        .collect()
}

/// The mount point in a line of mountinfo, when it is a mount of one of the parts. Some
/// filesystems (btrfs) have a device number of their own there and tell their disk as source.
fn mounted_at(line: &str, parts: &[Part]) -> Option<String> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(2);
    let numbers = parse_numbers(left.next()?)?;
    let place = left.nth(1)?;
    let source = right.split(' ').nth(1)?;
    let is_it = |part: &Part| part.numbers == numbers || part.path == source;
    parts.iter().any(is_it).then(|| {
        // The characters that the kernel writes as octal numbers, the backslash last.
        place
            .replace("\\040", " ")
            .replace("\\011", "\t")
            .replace("\\012", "\n")
            .replace("\\134", "\\")
    })
}

/// Users inside the kernel that no process stands for.
fn kernel_users(proc: &Path, sys: &Path, parts: &[Part]) -> Vec<String> {
    let swaps = fs::read_to_string(proc.join("swaps")).unwrap_or_default();
    let mut found = Vec::new();
    for part in parts {
        for holder in entries(&sys_dir(sys, part.numbers).join("holders")) {
            found.push(format!("part of /dev/{}", holder.file_name().display()));
        }
        let mut swapped = swaps
            .lines()
            .filter_map(|line| line.split_whitespace().next());
        if swapped.any(|path| path == part.path) {
            found.push("swapped to".to_owned());
        }
    }
    for entry in entries(&sys.join("block")) {
        let backing = fs::read_to_string(entry.path().join("loop/backing_file"));
        if backing.is_ok_and(|file| parts.iter().any(|part| part.path == file.trim_end())) {
            found.push(format!("shown by /dev/{}", entry.file_name().display()));
        }
    }
    found
}

/// The processes but `own` that have one of the parts open.
fn openers(proc: &Path, kind: FileType, parts: &[Part], own: u32) -> Vec<String> {
    let is_it = |path: &Path| {
        device_at(path).is_some_and(|(found, numbers)| {
            found == kind && parts.iter().any(|part| part.numbers == numbers)
        })
    };
    let mut found = Vec::new();
    for pid in processes(proc, own) {
        let dir = proc.join(pid.to_string());
        if entries(&dir.join("fd")).any(|entry| is_it(&entry.path())) {
            let name = fs::read_to_string(dir.join("comm")).unwrap_or_default();
            found.push(format!("open in process {pid} ({})", name.trim_end()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    use rustix::fs::FileType;

    use super::{Part, kernel_users, mounts, of_block_device, openers, parts};

    fn part(major: u32, minor: u32, path: &str) -> Part {
        Part {
            numbers: (major, minor),
            path: path.to_owned(),
        }
    }

    /// A directory with these files in it.
    fn tree(test: &str, files: &[(&str, &str)]) -> PathBuf {
        let root = std::env::temp_dir().join(format!("ublk-users-{}-{test}", std::process::id()));
        fs::create_dir_all(&root).unwrap();
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn mounts_are_found_in_every_namespace_but_our_own() {
        let root = tree(
            "mounts",
            &[
                (
                    "10/mountinfo",
                    "40 22 259:0 / /mnt/a\\040b rw shared:7 - ext4 /dev/ublkb0 rw\n\
                     41 22 8:1 / / rw - ext4 /dev/sda1 rw\nbroken line\n",
                ),
                ("11/mountinfo", "40 22 259:0 / /same rw - ext4 x rw\n"),
                ("12/mountinfo", "50 22 259:1 / /part rw - xfs x rw\n"),
                (
                    "13/mountinfo",
                    "60 22 0:44 / /b rw - btrfs /dev/ublkb0 rw\n",
                ),
                ("14/mountinfo", "60 22 259:0 / /ours rw - ext4 x rw\n"),
                ("self/mountinfo", "60 22 259:0 / /self rw - ext4 x rw\n"),
            ],
        );
        for (pid, namespace) in [(10, "mnt:[1]"), (11, "mnt:[1]"), (12, "mnt:[2]")] {
            let dir = root.join(pid.to_string()).join("ns");
            fs::create_dir(&dir).unwrap();
            symlink(namespace, dir.join("mnt")).unwrap();
        }
        let device = [part(259, 0, "/dev/ublkb0"), part(259, 1, "/dev/ublkb0p1")];
        let want = ["mounted at /b", "mounted at /mnt/a b", "mounted at /part"];
        assert_eq!(mounts(&root, &device, 14), want);
        assert!(mounts(&root, &[part(7, 0, "/dev/loop0")], 14).is_empty());
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn users_inside_the_kernel_are_found() {
        let root = tree(
            "kernel",
            &[
                ("dev/block/259:0/holders/dm-3", ""),
                ("dev/block/259:0/ublkb0p1/partition", "1\n"),
                ("dev/block/259:0/ublkb0p1/dev", "259:1\n"),
                ("dev/block/259:0/queue/dev", "9:9\n"),
                ("block/loop4/loop/backing_file", "/dev/ublkb0p1\n"),
                ("block/loop5/loop/backing_file", "/dev/ublkb1\n"),
                ("swaps", "Filename Type\n/dev/ublkb0p1 partition 1 0 -2\n"),
            ],
        );
        let device = parts(&root, "/dev/ublkb0", (259, 0));
        assert_eq!(
            device,
            [part(259, 0, "/dev/ublkb0"), part(259, 1, "/dev/ublkb0p1")]
        );
        assert_eq!(
            kernel_users(&root, &root, &device),
            ["part of /dev/dm-3", "swapped to", "shown by /dev/loop4"]
        );
        assert!(kernel_users(&root, &root, &[part(1, 1, "/dev/x")]).is_empty());
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_plain_open_is_found_and_named() {
        let root = tree("open", &[("20/comm", "dd\n"), ("21/comm", "cat\n")]);
        for (pid, target) in [(20, "/dev/null"), (21, "/dev/zero"), (22, "/dev/null")] {
            let dir = root.join(pid.to_string()).join("fd");
            fs::create_dir_all(&dir).unwrap();
            symlink(target, dir.join("0")).unwrap();
            symlink("socket:[1]", dir.join("1")).unwrap();
        }
        let null = [part(1, 3, "/dev/null")];
        let kind = FileType::CharacterDevice;
        assert_eq!(openers(&root, kind, &null, 22), ["open in process 20 (dd)"]);
        // The block device of that number is another one.
        assert!(openers(&root, FileType::BlockDevice, &null, 22).is_empty());
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn what_does_not_exist_is_used_by_nobody() {
        assert!(of_block_device("/dev/no-such-device", 0).is_empty());
    }
}
