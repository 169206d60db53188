//! Devices, image files and exports that are or become members.
//!
//! A medium is opened in one of three ways: to look at it, which disturbs nobody; exclusively,
//! which the kernel grants to one opener only: `O_EXCL` on a block device (nobody has it
//! mounted, nobody else opened it exclusively), a lock on a file; and to read it while nobody
//! writes, which needs no right to write (`O_EXCL` again, a shared lock on a file). Somebody who
//! writes to it without such a claim is looked for as well, as far as privileges reach. Nothing
//! is ever written through a medium that was not opened exclusively, and no option gets around
//! that.
//!
//! Over NBD that takes a server of ours, which admits one writer and refuses a second one. At any
//! other, whoever connects to an export gets it, whoever else has it, and what holds the disk on
//! the server's machine cannot be seen from here. What an export holds is looked at all the same,
//! and a client that would be the second one at a server that takes one at a time is told so.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use mirror::superblock::{
    COPY_A_OFFSET, COPY_B_OFFSET, COPY_BYTES, Loaded, Superblock, SuperblockError,
};
use peer::blocking::CONNECT_PATIENCE;
use peer::{Address, Claimant, Client};
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

/// How long zeroing a whole medium may take and still be cheap.
const ZEROING_BUDGET: Duration = Duration::from_millis(500);

/// An open device, image file or export.
#[derive(Debug)]
pub(crate) struct Medium {
    path: PathBuf,
    device: Device,
    size_bytes: u64,
    logical_block_bytes: u32,
}

#[derive(Debug)]
enum Device {
    Local(File, Kind),
    /// Members are read by several threads at once, a connection by one of them.
    Peer(Box<Mutex<Client>>),
}

/// Identity of a medium, whatever path led to it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Identity {
    /// Device number.
    BlockDevice(u64),
    /// Filesystem and inode.
    File(u64, u64),
    /// An address in its one form; several may lead to one export.
    Export(String),
}

/// The client, for one request. Where a thread panicked in the middle of one, nobody knows what
/// the connection brings next.
fn locked(client: &Mutex<Client>) -> io::Result<MutexGuard<'_, Client>> {
    let lost = |_| io::Error::other("the connection was left in the middle of a request");
    client.lock().map_err(lost)
}

/// Whether a member's path is the address of an export.
pub(crate) fn is_address(path: &Path) -> bool {
    path.to_str().is_some_and(peer::is_address)
}

/// The address in a path that is one.
fn address(path: &Path) -> Result<Address, Failure> {
    let text = path.to_string_lossy();
    text.parse()
        .map_err(|e: peer::AddressError| Failure::usage(format!("{e}.")))
}

/// Refuses an export where only the disk itself will do.
pub(crate) fn needs_the_disk(path: &Path) -> Failure {
    Failure::usage(format!(
        "{} is an NBD export: run this where its disk is.",
        path.display()
    ))
}

/// The identity of what lies at `path`; `None` when it cannot be told.
pub(crate) fn identity(path: &Path) -> Option<Identity> {
    if is_address(path) {
        return Some(Identity::Export(address(path).ok()?.to_string()));
    }
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
/// a name under /dev/disk/by-id outlives the node behind it. An address comes in its one form.
pub(crate) fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    if is_address(path) {
        return Ok(address(path)?.to_string().into());
    }
    std::path::absolute(path).map_err(|e| {
        Failure::usage(format!(
            "'{}' is not a path: {}.",
            path.display(),
            words(&e)
        ))
    })
}

impl Medium {
    /// Opens the device or file at `path`, or connects to the export there.
    pub(crate) fn open(path: &Path, access: Access) -> Result<Self, Failure> {
        if is_address(path) {
            return Self::connect(path, access);
        }
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

    fn connect(path: &Path, access: Access) -> Result<Self, Failure> {
        let address = address(path)?;
        let client = match access {
            Access::Look => Client::look(&address, CONNECT_PATIENCE),
            Access::Undisturbed => return Err(needs_the_disk(path)),
            Access::Exclusive => {
                // Another owner each time: two addresses may lead to one disk.
                let owner = crate::cmd::random()?;
                let take_over = false;
                Client::claim(&address, Claimant { owner, take_over })
            }
        };
        let client = client.map_err(|e| Failure::new(Exit::from(e.kind()), format!("{e}.")))?;
        Ok(Self {
            path: path.to_owned(),
            size_bytes: client.export().usable_bytes(),
            logical_block_bytes: client.export().logical_block_bytes(),
            device: Device::Peer(Box::new(Mutex::new(client))),
        })
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
            device: Device::Local(file, kind),
            size_bytes,
            logical_block_bytes,
        })
    }

    /// The path it was opened by.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is an export.
    pub(crate) fn is_export(&self) -> bool {
        matches!(self.device, Device::Peer(_))
    }

    /// The open device or file; an export has none.
    pub(crate) fn file(&self) -> Option<&File> {
        match &self.device {
            Device::Local(file, _) => Some(file),
            Device::Peer(_) => None,
        }
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
        let read = |bytes: &mut [u8], offset| self.read(bytes, offset);
        probe::signatures(&read, self.size_bytes).map_err(|e| self.unreadable(&e))
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

    /// Fills `bytes` from `offset` on.
    pub(crate) fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        match &self.device {
            Device::Local(file, _) => file.read_exact_at(bytes, offset),
            Device::Peer(client) => locked(client).and_then(|mut c| c.read_at(bytes, offset)),
        }
    }

    fn copy_at(&self, offset: u64) -> Result<Vec<u8>, Failure> {
        let mut bytes = vec![0; COPY_BYTES];
        match self.read(&mut bytes, offset) {
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
        let written = match &self.device {
            Device::Local(file, _) => file.write_all_at(bytes, offset),
            Device::Peer(client) => locked(client).and_then(|mut c| c.write_at(bytes, offset)),
        };
        written.map_err(|e| {
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
        let durable = match &self.device {
            Device::Local(file, _) => file.sync_all(),
            Device::Peer(client) => locked(client).and_then(|mut c| c.flush()),
        };
        durable.map_err(|e| {
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
        let zeroed = match &self.device {
            Device::Local(file, Kind::File) => zero_file(file),
            Device::Local(file, Kind::BlockDevice) => zero_device(file, self.size_bytes),
            Device::Peer(client) => locked(client).and_then(|mut c| c.zero_all(ZEROING_BUDGET)),
        };
        zeroed.is_ok()
    }
}

fn zero_file(file: &File) -> io::Result<()> {
    file.sync_all()?;
    let fd = file.as_fd();
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
    file.sync_all()
}

fn zero_device(file: &File, size_bytes: u64) -> io::Result<()> {
    const STEP_BYTES: u64 = 1 << 30;
    let began = Instant::now();
    let mut from = 0;
    while from < size_bytes {
        let len = STEP_BYTES.min(size_bytes - from);
        punch(file.as_fd(), from, len)?;
        from += len;
        if began.elapsed() > ZEROING_BUDGET && from < size_bytes {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
    file.sync_all()
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
    let writers = identity(path)
        .map(|id| users::writers(&id))
        .unwrap_or_default();
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
