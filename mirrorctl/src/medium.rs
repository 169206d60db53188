//! Devices and image files that are or become members.
//!
//! A medium is opened in one of three ways: to look at it, which disturbs nobody; exclusively,
//! which the kernel grants to one opener only: `O_EXCL` on a block device (nobody has it
//! mounted, nobody else opened it exclusively), a lock on a file; and to read it while nobody
//! writes, which needs no right to write (`O_EXCL` again, a shared lock on a file). Somebody who
//! writes to it without such a claim is looked for as well, as far as privileges reach. Nothing
//! is ever written through a medium that was not opened exclusively, and no option gets around
//! that.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use mirror::superblock::{
    COPY_A_OFFSET, COPY_B_OFFSET, COPY_BYTES, Loaded, Superblock, SuperblockError,
};
use rustix::fs::{FallocateFlags, FlockOperation, SeekFrom};

use crate::failure::{Exit, Failure, words};
use crate::probe::users::{self, Numbers};
use crate::probe::{self, Finding};

/// What a medium is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A block device.
    BlockDevice,
    /// An image file.
    File,
}

/// How a medium is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// To read, beside anybody else.
    Look,
    /// To read while nobody writes.
    Undisturbed,
    /// To read and write, alone.
    Exclusive,
}

/// An open device or image file.
#[derive(Debug)]
pub(crate) struct Medium {
    path: PathBuf,
    file: File,
    kind: Kind,
    size_bytes: u64,
    logical_block_bytes: u32,
}

/// Identity of a medium, whatever path led to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Identity {
    /// Device number.
    BlockDevice(u64),
    /// Filesystem and inode.
    File(u64, u64),
}

/// The identity of what lies at `path`; `None` when it cannot be told.
pub(crate) fn identity(path: &Path) -> Option<Identity> {
    let meta = std::fs::metadata(path).ok()?;
    if meta.file_type().is_block_device() {
        Some(Identity::BlockDevice(meta.rdev()))
    } else {
        Some(Identity::File(meta.dev(), meta.ino()))
    }
}

/// Names of the devices that are built on the block device at `path`; none for a file.
pub(crate) fn holders(path: &Path) -> Vec<String> {
    match std::fs::metadata(path) {
        Ok(meta) if meta.file_type().is_block_device() => {
            users::holders(Path::new(users::SYSFS), numbers(&meta))
        }
        _ => Vec::new(),
    }
}

/// The path as the daemon, which has another working directory, can use it. Links are kept:
/// a name under /dev/disk/by-id outlives the node behind it.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|e| {
        Failure::usage(format!(
            "'{}' is not a path: {}.",
            path.display(),
            words(&e)
        ))
    })
}

impl Medium {
    /// Opens the device or file at `path`.
    pub(crate) fn open(path: &Path, access: Access) -> Result<Self, Failure> {
        let cannot = |e: &io::Error| {
            Failure::new(
                Exit::of_io(e),
                format!("{} cannot be opened: {}.", path.display(), words(e)),
            )
        };
        let meta = std::fs::metadata(path).map_err(|e| cannot(&e))?;
        let kind = if meta.file_type().is_block_device() {
            Kind::BlockDevice
        } else if meta.is_file() {
            Kind::File
        } else {
            return Err(Failure::usage(format!(
                "{} is neither a block device nor a regular file, so it cannot hold a member.",
                path.display()
            )));
        };
        let mut options = OpenOptions::new();
        options.read(true).write(access == Access::Exclusive);
        if kind == Kind::BlockDevice && access != Access::Look {
            options.custom_flags(rustix::fs::OFlags::EXCL.bits().cast_signed());
        }
        let file = options.open(path);
        let file = file.map_err(|e| match e.kind() {
            io::ErrorKind::ResourceBusy => busy(path, device_users(&meta)),
            io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
                Failure::failed(format!(
                    "{} cannot be opened for writing: {}. A member must be writable.",
                    path.display(),
                    words(&e)
                ))
            }
            _ => cannot(&e),
        })?;
        if access != Access::Look {
            match kind {
                Kind::File => claim_file(path, &file, access)?,
                Kind::BlockDevice if access == Access::Exclusive => refuse_read_only(path, &meta)?,
                Kind::BlockDevice => {}
            }
            refuse_writers(path)?;
        }
        Self::measure(path, file, kind).map_err(|e| cannot(&e))
    }

    fn measure(path: &Path, file: File, kind: Kind) -> io::Result<Self> {
        let (size_bytes, logical_block_bytes) = match kind {
            Kind::File => (file.metadata()?.len(), 512),
            Kind::BlockDevice => (
                rustix::fs::seek(&file, SeekFrom::End(0))?,
                rustix::fs::ioctl_blksszget(&file)?,
            ),
        };
        Ok(Self {
            path: path.to_owned(),
            file,
            kind,
            size_bytes,
            logical_block_bytes,
        })
    }

    /// The path it was opened by.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The open device or file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Capacity in bytes.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Smallest unit of I/O in bytes.
    pub(crate) fn logical_block_bytes(&self) -> u32 {
        self.logical_block_bytes
    }

    /// What is known of its content.
    pub(crate) fn signatures(&self) -> Result<Vec<Finding>, Failure> {
        probe::signatures(&self.file, self.size_bytes).map_err(|e| self.unreadable(&e))
    }

    /// The bytes of both superblock copies; zeroes where the medium is too small for them.
    pub(crate) fn superblock_bytes(&self) -> Result<(Vec<u8>, Vec<u8>), Failure> {
        Ok((self.copy_at(COPY_A_OFFSET)?, self.copy_at(COPY_B_OFFSET)?))
    }

    /// Its superblock. The outer error is that of reading, the inner that of decoding.
    pub(crate) fn superblock(&self) -> Result<Result<Loaded, SuperblockError>, Failure> {
        let (copy_a, copy_b) = self.superblock_bytes()?;
        Ok(Superblock::load(&copy_a, &copy_b))
    }

    fn copy_at(&self, offset: u64) -> Result<Vec<u8>, Failure> {
        let mut bytes = vec![0; COPY_BYTES];
        match self.file.read_exact_at(&mut bytes, offset) {
            Ok(()) => Ok(bytes),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(vec![0; COPY_BYTES]),
            Err(e) => Err(self.unreadable(&e)),
        }
    }

    fn unreadable(&self, error: &io::Error) -> Failure {
        Failure::failed(format!(
            "{} cannot be read: {}. Check the device with its maker's tools and the kernel's log.",
            self.path.display(),
            words(error)
        ))
    }

    /// Writes bytes; they are durable after [`Medium::sync`].
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
        self.file.write_all_at(bytes, offset).map_err(|e| {
            Failure::failed(format!(
                "Writing {} bytes at byte {offset} of {} failed: {}.",
                bytes.len(),
                self.path.display(),
                words(&e)
            ))
        })
    }

    /// Makes everything written durable.
    pub(crate) fn sync(&self) -> Result<(), Failure> {
        self.file.sync_all().map_err(|e| {
            Failure::failed(format!(
                "{} did not make durable what was written to it: {}.",
                self.path.display(),
                words(&e)
            ))
        })
    }

    /// Overwrites the marks of everything known that lies on it, a mirror's superblock aside,
    /// so that nothing takes it for what it was: a mirror's own areas need not cover them, and
    /// zeroing the medium may not be possible. Each kind is reported once at a time, so this
    /// looks again until nothing is found.
    pub(crate) fn wipe_marks(&self) -> Result<(), Failure> {
        const ROUNDS_MAX: usize = 512;
        const BLOCK_BYTES: u64 = 4096;
        for _ in 0..ROUNDS_MAX {
            let mut findings = self.signatures()?;
            findings.retain(|finding| !finding.is_mirror);
            if findings.is_empty() {
                return Ok(());
            }
            for finding in findings {
                let start = finding.offset / BLOCK_BYTES * BLOCK_BYTES;
                let len = BLOCK_BYTES.min(self.size_bytes - start);
                let zeroes = vec![0; usize::try_from(len).unwrap_or(0)];
                self.write(start, &zeroes)?;
            }
        }
        Err(Failure::failed(format!(
            "{} still shows what it held after its marks were overwritten {ROUNDS_MAX} times. \
             Wipe it with 'wipefs --all' first.",
            self.path.display()
        )))
    }

    /// Makes the whole medium read as zeroes when that costs next to nothing, and says whether
    /// it does now. A file's data is given back to its filesystem; a device is asked to zero
    /// without moving data, in steps, and given up on when it is slow.
    pub(crate) fn zero_cheaply(&self) -> bool {
        match self.kind {
            Kind::File => self.zero_file().is_ok(),
            Kind::BlockDevice => self.zero_device().is_ok(),
        }
    }

    fn zero_file(&self) -> io::Result<()> {
        self.file.sync_all()?;
        let fd = self.file.as_fd();
        let mut from = 0;
        loop {
            let start = match rustix::fs::seek(fd, SeekFrom::Data(from)) {
                Ok(start) => start,
                // No data after this place: the rest is a hole.
                Err(rustix::io::Errno::NXIO) => break,
                Err(e) => return Err(e.into()),
            };
            let end = rustix::fs::seek(fd, SeekFrom::Hole(start))?;
            punch(fd, start, end - start)?;
            from = end;
        }
        self.file.sync_all()
    }

    fn zero_device(&self) -> io::Result<()> {
        const STEP_BYTES: u64 = 1 << 30;
        const BUDGET: std::time::Duration = std::time::Duration::from_millis(500);
        let began = std::time::Instant::now();
        let mut from = 0;
        while from < self.size_bytes {
            let len = STEP_BYTES.min(self.size_bytes - from);
            punch(self.file.as_fd(), from, len)?;
            from += len;
            if began.elapsed() > BUDGET && from < self.size_bytes {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        self.file.sync_all()
    }
}

/// On a block device the kernel turns this into a write-zeroes that is never done by writing
/// buffers: it fails where the device has no cheaper way.
fn punch(fd: impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(fd, flags, offset, len)?)
}

fn numbers(meta: &std::fs::Metadata) -> Numbers {
    Numbers {
        major: rustix::fs::major(meta.rdev()),
        minor: rustix::fs::minor(meta.rdev()),
    }
}

fn device_users(meta: &std::fs::Metadata) -> Vec<String> {
    users::of_block_device(numbers(meta))
}

fn refuse_read_only(path: &Path, meta: &std::fs::Metadata) -> Result<(), Failure> {
    if users::is_read_only(numbers(meta)) {
        return Err(Failure::failed(format!(
            "{} is read-only. A member must be writable: see 'blockdev --setrw', or the device's \
             write protection.",
            path.display()
        )));
    }
    Ok(())
}

/// Refuses what somebody writes to without having asked for it alone.
fn refuse_writers(path: &Path) -> Result<(), Failure> {
    let writers = identity(path).map(users::writers).unwrap_or_default();
    if writers.is_empty() {
        return Ok(());
    }
    Err(busy(path, writers))
}

/// Takes the locks by which a daemon (flock) and others such as qemu (record locks) hold an
/// image file.
fn claim_file(path: &Path, file: &File, access: Access) -> Result<(), Failure> {
    let lock = if access == Access::Exclusive {
        FlockOperation::NonBlockingLockExclusive
    } else {
        FlockOperation::NonBlockingLockShared
    };
    let shown_by = users::of_file(path);
    if !shown_by.is_empty() {
        return Err(busy(path, shown_by));
    }
    let flock = rustix::fs::flock(file, lock);
    let record = flock.and_then(|()| rustix::fs::fcntl_lock(file, lock));
    match record {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::ACCESS) => Err(busy(
            path,
            vec!["another process holds a lock on it".to_owned()],
        )),
        Err(e) => Err(Failure::failed(format!(
            "{} cannot be locked: {}. Its filesystem must support file locks.",
            path.display(),
            words(&e.into())
        ))),
    }
}

fn busy(path: &Path, users: Vec<String>) -> Failure {
    let why = if users.is_empty() {
        "another process has it open".to_owned()
    } else {
        users.join(", ")
    };
    Failure::busy(format!(
        "{} is in use: {why}. Stop what uses it first; --force does not get around this.",
        path.display()
    ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_mark_is_wiped_and_the_rest_is_kept() {
        const SIZE: u64 = 1 << 20;
        let path = std::env::temp_dir().join(format!("mirrorctl-marks-{}", std::process::id()));
        let file = File::create(&path).unwrap();
        file.write_all_at(&vec![0xab; 1 << 20], 0).unwrap();
        // ext4, GPT with its copy at the end (one kind, two places), md 1.0 and swap.
        for (offset, mark) in [
            (0x438, &[0x53, 0xef][..]),
            (512, b"EFI PART"),
            (SIZE - 512, b"EFI PART"),
            (SIZE - 8192, &[0xfc, 0x4e, 0x2b, 0xa9]),
            (4086, b"SWAPSPACE2"),
        ] {
            file.write_all_at(mark, offset).unwrap();
        }
        drop(file);
        let medium = Medium::open(&path, Access::Exclusive).unwrap();
        assert!(medium.signatures().unwrap().len() >= 3);
        medium.wipe_marks().unwrap();
        assert_eq!(medium.signatures().unwrap(), []);
        let bytes = std::fs::read(&path).unwrap();
        let kept = bytes.iter().filter(|byte| **byte == 0xab).count();
        // Three blocks of 4 KiB held marks.
        assert_eq!(kept, (1 << 20) - 3 * 4096);
        std::fs::remove_file(path).unwrap();
    }
}
