//! What the process asks of the kernel before it serves I/O.

use std::io;

use rustix::mm::MlockAllFlags;
use rustix::mount::{MountPropagationFlags, UnmountFlags};

use crate::ready::Failure;
use crate::sys;

/// Closes what the parent process left open above standard error, but for `ready`: whoever
/// waits for the end of a pipe would otherwise wait for the end of the daemon. For a daemon that
/// runs in the background, before it opens any descriptor of its own.
pub(crate) fn close_inherited(ready: i32) {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else {
        return;
    };
    // Listed in full first: the list is read through a descriptor too, which is gone then.
    let numbers: Vec<i32> = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    for number in numbers {
        if number != ready {
            // The standard three are refused, and so is what is closed already.
            drop(sys::inherited_fd(number));
        }
    }
}

/// Gives the process a mount namespace of its own, so that it neither keeps a filesystem of
/// its own device alive nor locks up with it at exit. Without privilege this is not possible,
/// and matters less: then there is no block device of ours to mount.
///
/// File systems on ublk devices are let go of at once, except those that hold one of `members`:
/// where nothing propagates between namespaces, we would otherwise keep mounted what the
/// operator unmounts, such as the file system on the device that a dead daemon left.
pub(crate) fn leave_mount_namespace(members: &[String]) {
    let left = sys::unshare_mounts().and_then(|()| {
        // Mounts and unmounts come in from outside and none go out: a member's file system
        // that is mounted later can be reached, and one that is unmounted is not held.
        let inward = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", inward)
    });
    if let Err(errno) = left {
        tracing::info!(
            "goes on in the mount namespace it was started in ({})",
            io::Error::from(errno)
        );
        return;
    }
    let members: Vec<_> = members
        .iter()
        .filter_map(|path| std::fs::canonicalize(path).ok())
        .collect();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for point in ublk_mount_points(&mounts) {
        if members.iter().any(|member| member.starts_with(&point)) {
            continue;
        }
        if let Err(errno) = rustix::mount::unmount(&point, UnmountFlags::DETACH) {
            let error = io::Error::from(errno);
            tracing::warn!("keeps {point} mounted for itself until it ends ({error})");
        }
    }
}

/// Where file systems on ublk devices are mounted, as `/proc/self/mountinfo` tells.
fn ublk_mount_points(mounts: &str) -> Vec<String> {
    let mut points = Vec::new();
    for line in mounts.lines() {
        // Optional fields make the left part's length vary; " - " ends it.
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let on_ublk = right
            .split(' ')
            .nth(1)
            .is_some_and(|source| source.starts_with("/dev/ublkb"));
        if let (true, Some(point)) = (on_ublk, left.split(' ').nth(4)) {
            // The characters that the kernel writes as octal numbers.
            let escapes = [
                ("\\040", " "),
                ("\\011", "\t"),
                ("\\012", "\n"),
                ("\\134", "\\"),
            ];
            let plain = escapes
                .iter()
                .fold(point.to_owned(), |it, (from, to)| it.replace(from, to));
            points.push(plain);
        }
    }
    points
}

/// Marks the calling thread as one that block devices wait for: its memory allocations never
/// wait for writeback, which could be waiting for us. Read back, because a refusal would only
/// show as a deadlock under memory pressure.
pub(crate) fn become_io_flusher() -> io::Result<()> {
    rustix::process::configure_io_flusher_behavior(true)?;
    if rustix::process::is_io_flusher()? {
        Ok(())
    } else {
        Err(io::Error::other(
            "the kernel accepted PR_SET_IO_FLUSHER but does not report it",
        ))
    }
}

/// [`become_io_flusher`] where a refusal is fatal.
pub(crate) fn require_io_flusher() -> Result<(), Failure> {
    become_io_flusher().map_err(|error| {
        Failure::failed(format!(
            "the kernel refused PR_SET_IO_FLUSHER ({error}), without which the device could \
             deadlock when memory is short; run the daemon as root or with CAP_SYS_RESOURCE"
        ))
    })
}

/// Locks the process's memory: a daemon that is paged out to its own device never comes back.
pub(crate) fn lock_memory() -> Result<(), Failure> {
    // What is there now is read in at once: the code for a member's loss is first run when a disk
    // hangs, which may be the one with the program on it. What comes later is locked when it is
    // first used, because most of a thread's stack never is.
    let later = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    let locked =
        rustix::mm::mlockall(MlockAllFlags::CURRENT).and_then(|()| rustix::mm::mlockall(later));
    locked.map_err(|errno| {
        Failure::failed(format!(
            "the kernel refused to lock the daemon's memory ({}); run it as root, with \
             CAP_IPC_LOCK or with an unlimited memory limit (ulimit -l)",
            io::Error::from(errno)
        ))
    })
}

/// Keeps the kernel from killing the daemon when memory runs out: with its locked buffers it looks
/// like a good choice, but every process that waits for the device would hang instead.
pub(crate) fn be_spared_when_memory_is_short() {
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        tracing::warn!("may be killed when memory is short (oom_score_adj: {error})");
    }
}

#[cfg(test)]
mod tests {
    use super::ublk_mount_points;

    #[test]
    fn only_file_systems_on_ublk_devices_are_found() {
        let mounts = "22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n\
            40 22 259:0 / /mnt/a\\040b rw - ext4 /dev/ublkb0 rw\n\
            41 22 259:1 / /mnt/c rw shared:7 master:2 - xfs /dev/ublkb12 rw\n\
            42 22 0:5 / /dev rw - devtmpfs devtmpfs rw\n\
            broken line";
        assert_eq!(ublk_mount_points(mounts), ["/mnt/a b", "/mnt/c"]);
        assert!(ublk_mount_points("").is_empty());
    }
}
