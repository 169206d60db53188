//! Submission entries that are made without unsafe code.

#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use io_uring::{opcode, types};

use super::{Keep, Lend, Prepared, fd_of};

impl Prepared {
    /// Reads from `offset` into `lend`.
    pub(crate) fn read(fd: &Rc<OwnedFd>, offset: u64, lend: Lend) -> Self {
        assert!(
            lend.to_writer,
            "a read into memory that was lent for reading"
        );
        let (fd_number, address, len) = (fd_of(fd), lend.address(), lend.len);
        let entry = match lend.buffer.0.registered.get() {
            Some(index) => opcode::ReadFixed::new(fd_number, address, len, index)
                .offset(offset)
                .build(),
            None => opcode::Read::new(fd_number, address, len)
                .offset(offset)
                .build(),
        };
        Self {
            entry,
            keep: Keep::Memory {
                _lend: lend,
                _fd: Some(Rc::clone(fd)),
            },
        }
    }

    /// Writes `lend` to `offset`; with `fua` it completes when the bytes are durable.
    pub(crate) fn write(fd: &Rc<OwnedFd>, offset: u64, lend: Lend, fua: bool) -> Self {
        let flags = if fua { libc::RWF_DSYNC } else { 0 };
        let (fd_number, address, len) = (fd_of(fd), lend.address().cast_const(), lend.len);
        let entry = match lend.buffer.0.registered.get() {
            Some(index) => opcode::WriteFixed::new(fd_number, address, len, index)
                .offset(offset)
                .rw_flags(flags)
                .build(),
            None => opcode::Write::new(fd_number, address, len)
                .offset(offset)
                .rw_flags(flags)
                .build(),
        };
        Self {
            entry,
            keep: Keep::Memory {
                _lend: lend,
                _fd: Some(Rc::clone(fd)),
            },
        }
    }

    /// fdatasync.
    pub(crate) fn sync(fd: &Rc<OwnedFd>) -> Self {
        let entry = opcode::Fsync::new(fd_of(fd))
            .flags(types::FsyncFlags::DATASYNC)
            .build();
        Self {
            entry,
            keep: Keep::File { _fd: Rc::clone(fd) },
        }
    }

    /// fallocate with `mode`.
    pub(crate) fn fallocate(fd: &Rc<OwnedFd>, mode: i32, offset: u64, len: u64) -> Self {
        let entry = opcode::Fallocate::new(fd_of(fd), len)
            .offset(offset)
            .mode(mode)
            .build();
        Self {
            entry,
            keep: Keep::File { _fd: Rc::clone(fd) },
        }
    }

    /// Receives from a socket into `lend`.
    pub(crate) fn receive(fd: &Rc<OwnedFd>, lend: Lend, all: bool) -> Self {
        assert!(
            lend.to_writer,
            "a receive into memory that was lent for reading"
        );
        let flags = if all { libc::MSG_WAITALL } else { 0 };
        let entry = opcode::Recv::new(fd_of(fd), lend.address(), lend.len)
            .flags(flags)
            .build();
        Self {
            entry,
            keep: Keep::Memory {
                _lend: lend,
                _fd: Some(Rc::clone(fd)),
            },
        }
    }

    /// Completes when `fd` has something to read.
    pub(crate) fn poll_readable(fd: &Rc<OwnedFd>) -> Self {
        let flags = u32::from(libc::POLLIN.cast_unsigned());
        let entry = opcode::PollAdd::new(fd_of(fd), flags).build();
        Self {
            entry,
            keep: Keep::File { _fd: Rc::clone(fd) },
        }
    }

    /// Completes when the clock that counts from boot, suspended time included, reaches
    /// `deadline`.
    pub(crate) fn timeout(deadline: Duration) -> Self {
        let deadline = Box::new(types::Timespec::from(deadline));
        let entry = opcode::Timeout::new(&raw const *deadline)
            .flags(types::TimeoutFlags::ABS | types::TimeoutFlags::BOOTTIME)
            .build();
        Self {
            entry,
            keep: Keep::Deadline {
                _deadline: deadline,
            },
        }
    }
}
