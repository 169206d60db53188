//! The disk on tokio-uring, and what its sockets are set to.
//!
//! The disk is used with direct I/O: what has completed has reached the device, and a flush is a
//! flush. All of it goes through the one open file description that holds the disk exclusively
//! (`O_EXCL`, or flock on a file), and there is no other. A request in the kernel keeps its
//! description, and with it the lock, alive: when this process is killed, whoever opens the disk
//! next is told that it is in use until the last of its requests, the ghosts, is over (R13). A
//! second description would have no lock, and its requests would outlive the one that has.
//!
//! The ring's writes take no flags: a write with FUA is a write, and then a flush.

use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _};
use std::time::Duration;

use mirror::host::Errno;
use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use rustix::net::sockopt;
use tokio_uring::buf::BoundedBuf as _;

use crate::OpenError;
use crate::io::Store;
use crate::memory::Memory;

/// An idle connection is asked after so long whether its other end is still there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
/// Between two such questions.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// Unanswered questions after which the connection is dead.
const KEEPALIVE_PROBES: u32 = 3;
/// After so long without an acknowledgement of what was sent it is dead as well, in milliseconds.
const UNACKNOWLEDGED_MS: u32 = 30_000;

/// An opened disk, not bound to a ring yet.
pub(crate) struct Opened {
    file: File,
    pub(crate) size_bytes: u64,
    pub(crate) block_bytes: u32,
    /// Whether zeroes and discards cost next to nothing.
    pub(crate) cheap_zeroes: bool,
    zeroes: FallocateFlags,
    /// What a write is that ends early.
    short_write: Errno,
}

/// Makes `held` fit for direct I/O. The descriptor that is used is another one of the same
/// description, so that either keeps the disk held.
pub(crate) fn open(held: &File, read_only: bool) -> Result<Opened, OpenError> {
    let file = held.try_clone()?;
    let flags = rustix::fs::fcntl_getfl(&file).map_err(io::Error::from)?;
    rustix::fs::fcntl_setfl(&file, flags | OFlags::DIRECT).map_err(|errno| match errno {
        rustix::io::Errno::INVAL => OpenError::NoDirectIo,
        errno => OpenError::Failed(errno.into()),
    })?;
    let meta = file.metadata()?;
    let is_device = meta.file_type().is_block_device();
    let end = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(io::Error::from)?;
    let block_bytes = if is_device {
        rustix::fs::ioctl_blksszget(&file).map_err(io::Error::from)?
    } else {
        file_block_bytes(&file)
    };
    if block_bytes > 4096 || !block_bytes.is_power_of_two() {
        return Err(OpenError::SectorTooLarge(block_bytes));
    }
    let size_bytes = end - end % u64::from(block_bytes);
    if size_bytes == 0 {
        return Err(OpenError::Empty);
    }
    let keep_size = FallocateFlags::KEEP_SIZE;
    let (cheap_zeroes, zeroes) = if is_device {
        (device_zeroes(meta.rdev()), FallocateFlags::ZERO_RANGE)
    } else {
        let punch = FallocateFlags::PUNCH_HOLE;
        // Asked beyond the end of the file, where there is nothing to lose.
        let beyond = end.next_multiple_of(4096);
        let works = rustix::fs::fallocate(&file, punch | keep_size, beyond, 4096).is_ok();
        (works, punch)
    };
    Ok(Opened {
        file,
        size_bytes,
        block_bytes: block_bytes.max(512),
        cheap_zeroes: cheap_zeroes && !read_only,
        zeroes: zeroes | keep_size,
        short_write: if is_device {
            Errno::IO
        } else {
            Errno::NO_SPACE
        },
    })
}

/// The unit of direct I/O on a file, found by trying: not every file system tells.
fn file_block_bytes(file: &File) -> u32 {
    let mut probe = Memory::zeroed(512);
    let works = file.read_at(probe.data_mut(), 0).is_ok();
    if works { 512 } else { 4096 }
}

/// Whether a block device zeroes by itself, as sysfs says.
fn device_zeroes(device: u64) -> bool {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    // A partition has no queue of its own; its parent directory is the disk.
    let limit = ["queue", "../queue"].iter().find_map(|queue| {
        let file = format!("/sys/dev/block/{major}:{minor}/{queue}/write_zeroes_max_bytes");
        std::fs::read_to_string(file).ok()
    });
    limit.is_some_and(|text| text.trim().parse().is_ok_and(|bytes: u64| bytes > 0))
}

/// An opened disk on the ring of this thread.
pub(crate) struct UringStore {
    file: tokio_uring::fs::File,
    zeroes: FallocateFlags,
    short_write: Errno,
}

impl UringStore {
    pub(crate) fn new(opened: Opened) -> Self {
        Self {
            file: tokio_uring::fs::File::from_std(opened.file),
            zeroes: opened.zeroes,
            short_write: opened.short_write,
        }
    }

    async fn fallocate(&self, offset: u64, len: u64, mode: FallocateFlags) -> Result<(), Errno> {
        let mode = mode.bits().cast_signed();
        self.file.fallocate(offset, len, mode).await.map_err(errno)
    }
}

fn errno(error: io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::IO, Errno)
}

impl Store for UringStore {
    async fn read(&self, offset: u64, memory: Memory) -> (Result<(), Errno>, Memory) {
        let len = memory.len();
        let (vector, part, window) = memory.take_apart(0);
        let (result, slice) = self.file.read_at(vector.slice(part), offset).await;
        let result = match result {
            Ok(read) if read == len => Ok(()),
            Ok(_) => Err(Errno::IO),
            Err(error) => Err(errno(error)),
        };
        (result, Memory::put_together(slice.into_inner(), window))
    }

    async fn write(&self, offset: u64, memory: Memory) -> Result<(), Errno> {
        let len = memory.len();
        let (vector, part, _) = memory.take_apart(0);
        let (result, _) = self
            .file
            .write_at(vector.slice(part), offset)
            .submit()
            .await;
        match result {
            Ok(written) if written == len => Ok(()),
            Ok(_) => Err(self.short_write),
            Err(error) => Err(errno(error)),
        }
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.file.sync_data().await.map_err(errno)
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.fallocate(offset, len, self.zeroes).await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        self.fallocate(offset, len, punch).await
    }
}

/// Sets what the accepted sockets inherit: small replies are sent at once, and a host that is
/// gone is noticed.
pub(crate) fn tune(listener: &TcpListener) -> io::Result<()> {
    let fd = listener.as_fd();
    sockopt::set_tcp_nodelay(fd, true)?;
    sockopt::set_socket_keepalive(fd, true)?;
    sockopt::set_tcp_keepidle(fd, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(fd, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(fd, KEEPALIVE_PROBES)?;
    sockopt::set_tcp_user_timeout(fd, UNACKNOWLEDGED_MS)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rustix::fs::{FlockOperation, flock};

    #[test]
    fn what_does_the_io_holds_the_disk() {
        // Beside this program there is a file system with direct I/O.
        let own = std::env::current_exe().unwrap();
        let path = own.with_file_name(format!("export-held-{}", std::process::id()));
        let file = || File::options().read(true).write(true).open(&path).unwrap();
        let can_lock = || flock(file(), FlockOperation::NonBlockingLockExclusive).is_ok();
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let held = file();
        flock(&held, FlockOperation::NonBlockingLockExclusive).unwrap();
        let opened = open(&held, false).unwrap();
        drop(held);
        assert!(!can_lock(), "the descriptor that does the I/O has no lock");
        let flags = rustix::fs::fcntl_getfl(&opened.file).unwrap();
        assert!(flags.contains(OFlags::DIRECT));
        tokio_uring::start(async {
            let store = UringStore::new(opened);
            let mut memory = Memory::zeroed(4096);
            memory.data_mut().fill(7);
            store.write(8192, memory).await.unwrap();
            store.flush().await.unwrap();
            let (read, memory) = store.read(8192, Memory::zeroed(4096)).await;
            read.unwrap();
            assert_eq!(memory.data(), [7; 4096]);
            assert!(!can_lock(), "it is held for as long as it is used");
            store.file.close().await.unwrap();
        });
        flock(file(), FlockOperation::LockExclusive).unwrap();
        std::fs::remove_file(path).unwrap();
    }
}
