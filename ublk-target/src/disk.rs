//! Members in this machine: block devices and regular files, through io_uring.
//!
//! # What it promises
//!
//! - A member is opened exclusively (`O_EXCL` on a block device, `flock` on a file), so that
//!   two daemons cannot write to it at once (R13), and with `O_DIRECT`, so that what has
//!   completed has reached the device and FLUSH means what it says.
//! - An operation completes in full or fails: a short transfer is `EIO`, but `ENOSPC` where a
//!   file is written, because the kernel answers a write that fills the file system with what
//!   still found room, and a failing disk below with an error. Nothing is retried: once its
//!   completion has arrived, an operation's buffer may be another's.
//! - FUA is FUA (`RWF_DSYNC`), a flush is a flush (`fdatasync`); neither is left out.
//!
//! # How zeroes and discards are done
//!
//! | | regular file | block device |
//! |---|---|---|
//! | write zeroes | punch hole, keep size | zero range, keep size, where the device can |
//! | discard | punch hole, keep size | discard command (6.12), else punch hole |
//!
//! Where the device cannot, [`Geometry::cheap_zeroes`] says so, and write-zeroes answers
//! `EOPNOTSUPP` rather than moving data behind the engine's back.
//!
//! The discard command is left to a thread that may block. The kernel would first try it without,
//! and a device that must block, as most of device-mapper's, answers that with `EOPNOTSUPP`.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use mirror::control::ErrorKind;
use mirror::host::{Buffer as _, Disk, DiskRequest, Errno, Geometry};
use rustix::fs::{FileType, FlockOperation, Mode, OFlags, SeekFrom, Stat};

use crate::ring::{Completion, Ring};
use crate::sys::{IoBuffer, Prepared};

/// Why a member could not be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    /// There is no such path.
    #[error("{path} does not exist; check the path, or leave the member out to start degraded")]
    Missing {
        /// The member's path.
        path: String,
    },
    /// Something else holds it.
    #[error(
        "{path} is in use: it is mounted, held by another daemon or part of another device; \
         release it first"
    )]
    Busy {
        /// The member's path.
        path: String,
    },
    /// It cannot be written.
    #[error("{path} is read-only; make it writable (blockdev --setrw, chmod) and try again")]
    ReadOnly {
        /// The member's path.
        path: String,
    },
    /// Neither a block device nor a regular file.
    #[error("{path} is neither a block device nor a regular file")]
    WrongType {
        /// The member's path.
        path: String,
    },
    /// Nothing in it.
    #[error("{path} is empty; `mirrorctl create` with --size makes a new image file")]
    Empty {
        /// The member's path.
        path: String,
    },
    /// The file system below has no direct I/O.
    #[error(
        "the file system of {path} refuses direct I/O (O_DIRECT), without which completed writes \
         are not on the disk; put the image on ext4, XFS or btrfs"
    )]
    NoDirectIo {
        /// The member's path.
        path: String,
    },
    /// Sectors larger than a block.
    #[error("{path} has {bytes}-byte sectors; at most 4096 can be used")]
    SectorTooLarge {
        /// The member's path.
        path: String,
        /// Its logical sector size.
        bytes: u32,
    },
    /// Any other answer of the kernel.
    #[error("cannot open {path}: {source}")]
    Failed {
        /// The member's path.
        path: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl OpenError {
    /// Class of the failure for the control protocol.
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Missing { .. } => ErrorKind::NotFound,
            Self::Busy { .. } => ErrorKind::Busy,
            Self::ReadOnly { .. }
            | Self::WrongType { .. }
            | Self::Empty { .. }
            | Self::NoDirectIo { .. }
            | Self::SectorTooLarge { .. } => ErrorKind::Refused,
            Self::Failed { .. } => ErrorKind::Failed,
        }
    }
}

/// How a device discards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DiscardWay {
    None,
    PunchHole,
    Command,
}

/// An opened device that is not bound to a ring yet. Opening may block, so that it happens on
/// any thread.
#[derive(Debug)]
pub(crate) struct OpenedDisk {
    fd: OwnedFd,
    geometry: Geometry,
    zeroes: i32,
    discard: DiscardWay,
    /// What a write is that ends early.
    short_write: Errno,
}

/// Opens the member at `path` for itself alone.
pub(crate) fn open(path: &str) -> Result<OpenedDisk, OpenError> {
    let failed = |errno: rustix::io::Errno| OpenError::Failed {
        path: path.to_owned(),
        source: io::Error::from(errno),
    };
    let (fd, stat, kind) = open_alone(path)?;
    let end = rustix::fs::seek(&fd, SeekFrom::End(0)).map_err(failed)?;
    let block = if kind == FileType::BlockDevice {
        rustix::fs::ioctl_blksszget(&fd).map_err(failed)?
    } else {
        file_block_bytes(fd.as_fd())
    };
    if block > 4096 || !block.is_power_of_two() {
        return Err(OpenError::SectorTooLarge {
            path: path.to_owned(),
            bytes: block,
        });
    }
    let size_bytes = end - end % u64::from(block);
    if size_bytes == 0 {
        return Err(OpenError::Empty {
            path: path.to_owned(),
        });
    }
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (cheap_zeroes, discard, zeroes) = if kind == FileType::BlockDevice {
        let (cheap, discard) = queue_limits(stat.st_rdev);
        (
            cheap,
            discard,
            libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        )
    } else if holes_supported(fd.as_fd(), end) {
        (true, DiscardWay::PunchHole, punch)
    } else {
        (false, DiscardWay::None, punch)
    };
    let geometry = Geometry {
        behind_network: false,
        server_instance: None,
        keeps_order: false,
        size_bytes,
        logical_block_bytes: block.max(512),
        cheap_zeroes,
        discard: discard != DiscardWay::None,
    };
    let short_write = match kind {
        FileType::RegularFile => Errno::NO_SPACE,
        _ => Errno::IO,
    };
    Ok(OpenedDisk {
        fd,
        geometry,
        zeroes,
        discard,
        short_write,
    })
}

/// Opens a block device or a regular file so that nobody else can, and says which it is.
fn open_alone(path: &str) -> Result<(OwnedFd, Stat, FileType), OpenError> {
    let stat = rustix::fs::stat(path).map_err(|errno| open_error(path, errno))?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    let mut flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::DIRECT;
    match kind {
        FileType::BlockDevice => flags |= OFlags::EXCL,
        FileType::RegularFile => {}
        _ => {
            return Err(OpenError::WrongType {
                path: path.to_owned(),
            });
        }
    }
    let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| match errno {
        rustix::io::Errno::INVAL => OpenError::NoDirectIo {
            path: path.to_owned(),
        },
        errno => open_error(path, errno),
    })?;
    // The path may have been replaced between the two calls.
    let stat = rustix::fs::fstat(&fd).map_err(|errno| OpenError::Failed {
        path: path.to_owned(),
        source: io::Error::from(errno),
    })?;
    if FileType::from_raw_mode(stat.st_mode) != kind {
        return Err(OpenError::WrongType {
            path: path.to_owned(),
        });
    }
    if kind == FileType::RegularFile {
        rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive)
            .map_err(|errno| open_error(path, errno))?;
    }
    Ok((fd, stat, kind))
}

fn open_error(path: &str, errno: rustix::io::Errno) -> OpenError {
    use rustix::io::Errno;
    let path = path.to_owned();
    match errno {
        Errno::NOENT | Errno::NXIO | Errno::NODEV => OpenError::Missing { path },
        Errno::BUSY | Errno::AGAIN => OpenError::Busy { path },
        Errno::ROFS | Errno::ACCESS | Errno::PERM => OpenError::ReadOnly { path },
        errno => OpenError::Failed {
            path,
            source: io::Error::from(errno),
        },
    }
}

/// The unit of direct I/O on a file, found by trying: not every file system tells.
fn file_block_bytes(fd: BorrowedFd<'_>) -> u32 {
    let probe = IoBuffer::recycled(4096);
    let works = probe.fill(|bytes| rustix::io::pread(fd, &mut bytes[..512], 0).is_ok());
    if works { 512 } else { 4096 }
}

/// Whether the file system punches holes. Asked beyond the end of the file, where there is
/// nothing to lose.
fn holes_supported(fd: BorrowedFd<'_>, end: u64) -> bool {
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    let start = end.next_multiple_of(4096);
    rustix::fs::fallocate(fd, flags, start, 4096).is_ok()
}

/// Reads from sysfs whether a block device zeroes by itself, and how it discards.
fn queue_limits(device: rustix::fs::Dev) -> (bool, DiscardWay) {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let limit = |name: &str| -> u64 {
        // A partition has no queue of its own; its parent directory is the disk.
        ["queue", "../queue"]
            .iter()
            .find_map(|queue| {
                std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/{queue}/{name}"))
                    .ok()
            })
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0)
    };
    let zeroes = limit("write_zeroes_max_bytes") > 0;
    let discard = if limit("discard_max_bytes") == 0 {
        DiscardWay::None
    } else if kernel_at_least(6, 12) {
        DiscardWay::Command
    } else if zeroes {
        DiscardWay::PunchHole
    } else {
        DiscardWay::None
    };
    (zeroes, discard)
}

fn kernel_at_least(major: u32, minor: u32) -> bool {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let mut numbers = release
        .split(['.', '-'])
        .map(|part| part.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (major, minor)
}

/// A member in this machine.
pub(crate) struct LocalDisk {
    ring: Rc<Ring>,
    fd: Rc<OwnedFd>,
    geometry: Geometry,
    zeroes: i32,
    discard: DiscardWay,
    /// What a write is that ends early.
    short_write: Errno,
    in_flight: Rc<Cell<usize>>,
}

impl LocalDisk {
    /// Binds an opened device to the ring that does its I/O.
    pub(crate) fn new(ring: &Rc<Ring>, opened: OpenedDisk) -> Self {
        Self {
            ring: Rc::clone(ring),
            fd: Rc::new(opened.fd),
            geometry: opened.geometry,
            zeroes: opened.zeroes,
            discard: opened.discard,
            short_write: opened.short_write,
            in_flight: Rc::new(Cell::new(0)),
        }
    }
}

impl Disk for LocalDisk {
    type Buffer = IoBuffer;
    type Op = DiskOp;

    fn submit(&self, request: DiskRequest<IoBuffer>) -> DiskOp {
        let mut short = Errno::IO;
        let (prepared, expected) = match request {
            DiskRequest::Read { offset, span } => {
                let lend = span.buffer.lend_to_writer(span.start, span.len);
                (Prepared::read(&self.fd, offset, lend), span.len)
            }
            DiskRequest::Write { offset, span, fua } => {
                short = self.short_write;
                let lend = span.buffer.lend_to_reader(span.start, span.len);
                (Prepared::write(&self.fd, offset, lend, fua), span.len)
            }
            DiskRequest::Flush => (Prepared::sync(&self.fd), 0),
            DiskRequest::WriteZeroes { offset, len } => {
                if !self.geometry.cheap_zeroes {
                    return DiskOp::Refused(Errno::NOT_SUPPORTED);
                }
                (Prepared::fallocate(&self.fd, self.zeroes, offset, len), 0)
            }
            DiskRequest::Discard { offset, len } => match self.discard {
                DiscardWay::None => return DiskOp::Refused(Errno::NOT_SUPPORTED),
                DiscardWay::Command => (Prepared::discard(&self.fd, offset, len), 0),
                DiscardWay::PunchHole => {
                    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                    (Prepared::fallocate(&self.fd, mode, offset, len), 0)
                }
            },
        };
        DiskOp::Running {
            completion: self.ring.submit(prepared, Some(&self.in_flight)),
            expected,
            short,
        }
    }

    fn in_flight(&self) -> usize {
        self.in_flight.get()
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }
}

/// A running operation on a [`LocalDisk`].
pub(crate) enum DiskOp {
    /// The device has it.
    Running {
        /// The operation.
        completion: Completion,
        /// The result that means success.
        expected: usize,
        /// The failure that a smaller result is.
        short: Errno,
    },
    /// The device cannot do it.
    Refused(Errno),
}

impl Future for DiskOp {
    type Output = Result<(), Errno>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let (completion, expected, short) = match &mut *self {
            Self::Running {
                completion,
                expected,
                short,
            } => (completion, *expected, *short),
            Self::Refused(errno) => return Poll::Ready(Err(*errno)),
        };
        Pin::new(completion)
            .poll(cx)
            .map(|result| match usize::try_from(result) {
                Ok(transferred) if transferred == expected => Ok(()),
                Ok(_) => Err(short),
                Err(_) => Err(said_by_the_disk(-result)),
            })
    }
}

/// A failure as the kernel has it. That it has waited for the disk long enough is an answer, and
/// none that has failed to come.
fn said_by_the_disk(errno: i32) -> Errno {
    match Errno(errno) {
        Errno::TIMED_OUT => Errno::IO,
        errno => errno,
    }
}

#[cfg(test)]
mod tests;
