//! What cannot be said in safe Rust: memory shared with the kernel, submission entries that
//! point into it, and signal masks.
//!
//! This is the crate's only file with unsafe code, and everything it offers is safe to call.
//!
//! # Who may touch a buffer when
//!
//! An [`IoBuffer`] counts three kinds of users and refuses a combination that would be a data
//! race:
//!
//! | user | counted in | may run beside |
//! |---|---|---|
//! | a device that reads the memory (a disk write) | `device_reads` | other reads of both kinds |
//! | a device that writes the memory (a disk read) | `device_writes` | other devices only |
//! | Rust code in `read` or `fill` | `lent` | `read`: device reads; `fill`: nobody |
//!
//! A violation is a defect of ours and panics before the memory is touched.
//!
//! # What keeps memory alive under the kernel
//!
//! A [`Prepared`] entry owns everything that its submission entry points to. Pushing it turns
//! that into an [`InFlight`], which gives the resources back only through
//! [`InFlight::complete`]. Dropped otherwise it leaks them on purpose: memory that is never
//! freed is safe, memory freed under a device is not (R6).

#![allow(unsafe_code)]

mod entries;
mod pool;

use std::cell::Cell;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::{self, NonNull};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

use io_uring::{IoUring, opcode, squeue, types};
use mirror::host::Buffer;
use rustix::mm::{MapFlags, ProtFlags};

use crate::batch::Batch;

static LOCK_REFUSED: AtomicBool = AtomicBool::new(false);

/// One anonymous mapping, unmapped when dropped.
struct Mapping {
    address: NonNull<u8>,
    len: usize,
}

impl Mapping {
    fn new(len: usize) -> io::Result<Self> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::POPULATE;
        // SAFETY: an anonymous mapping at an address the kernel chooses overlaps nothing.
        let address = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), len, prot, flags)? };
        // SAFETY: the range was mapped by the line above and belongs to nobody else.
        if unsafe { rustix::mm::mlock(address, len) }.is_err() {
            LOCK_REFUSED.store(true, Ordering::Relaxed);
        }
        let address = NonNull::new(address.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { address, len })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped in `new`, and a mapping is only dropped when no buffer,
        // and so neither Rust code nor a device, refers to it.
        let unmapped = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping: {unmapped:?}");
    }
}

/// Whether the kernel refused to lock I/O memory in RAM (RLIMIT_MEMLOCK without privilege).
pub(crate) fn memory_lock_refused() -> bool {
    LOCK_REFUSED.load(Ordering::Relaxed)
}

struct Region {
    /// Always present until the region is dropped.
    mapping: Option<Mapping>,
    address: NonNull<u8>,
    len: usize,
    device_reads: Cell<u32>,
    device_writes: Cell<u32>,
    /// Rust borrows: positive counts shared ones, -1 is an exclusive one.
    lent: Cell<i32>,
    /// Its number among the ring's registered buffers.
    registered: Cell<Option<u16>>,
}

impl Drop for Region {
    fn drop(&mut self) {
        if let Some(mapping) = self.mapping.take() {
            pool::put(mapping);
        }
    }
}

/// Page-aligned, locked memory for I/O, shared by reference count within one thread.
#[derive(Clone)]
pub(crate) struct IoBuffer(Rc<Region>);

impl std::fmt::Debug for IoBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoBuffer")
            .field("len", &self.0.len)
            .field("in_use", &self.in_use())
            .finish()
    }
}

impl IoBuffer {
    /// Zeroed memory of `len` bytes, rounded up to whole pages.
    pub(crate) fn zeroed(len: usize) -> Self {
        let (buffer, fresh) = Self::allocate(len);
        if !fresh {
            buffer.fill(|bytes| bytes.fill(0));
        }
        buffer
    }

    /// Memory of `len` bytes whose content is left over from earlier I/O of this process. Only
    /// for buffers that are filled in full before anything is read from them.
    pub(crate) fn recycled(len: usize) -> Self {
        Self::allocate(len).0
    }

    fn allocate(len: usize) -> (Self, bool) {
        let len = len.max(1).next_multiple_of(4096);
        let pooled = pool::take(len);
        let fresh = pooled.is_none();
        // Out of address space or memory: the daemon cannot go on, as with any allocation.
        let mapping = pooled.unwrap_or_else(|| match Mapping::new(len) {
            Ok(mapping) => mapping,
            Err(error) => panic!("cannot map {len} bytes for I/O: {error}"),
        });
        let region = Region {
            address: mapping.address,
            len,
            mapping: Some(mapping),
            device_reads: Cell::new(0),
            device_writes: Cell::new(0),
            lent: Cell::new(0),
            registered: Cell::new(None),
        };
        (Self(Rc::new(region)), fresh)
    }

    /// Whether both are the same memory.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }

    /// Whether a device may still change the bytes.
    pub(crate) fn being_written(&self) -> bool {
        self.0.device_writes.get() != 0
    }

    /// Lends `len` bytes from `start` to a device that writes into them.
    pub(crate) fn lend_to_writer(&self, start: usize, len: usize) -> Lend {
        assert_eq!(
            self.0.lent.get(),
            0,
            "a device would write into memory that Rust code uses"
        );
        self.0.device_writes.set(self.0.device_writes.get() + 1);
        Lend::new(self, start, len, true)
    }

    /// Lends `len` bytes from `start` to a device that reads them.
    pub(crate) fn lend_to_reader(&self, start: usize, len: usize) -> Lend {
        assert!(
            self.0.lent.get() >= 0,
            "a device would read memory that Rust code changes"
        );
        self.0.device_reads.set(self.0.device_reads.get() + 1);
        Lend::new(self, start, len, false)
    }
}

/// Has the kernel look the pages of these buffers up once rather than for each operation.
/// Called once for a ring. Where the kernel refuses, everything works without.
pub(crate) fn register_buffers(ring: &IoUring, buffers: &[IoBuffer]) -> io::Result<()> {
    let vector = |buffer: &IoBuffer| libc::iovec {
        iov_base: buffer.0.address.as_ptr().cast(),
        iov_len: buffer.0.len,
    };
    let vectors: Vec<libc::iovec> = buffers.iter().map(vector).collect();
    // SAFETY: the ring holds references to the pages themselves, so that an operation on a
    // registered buffer never reaches memory that was unmapped and given away. A number is only
    // used for the region that it was given to here, and goes with it.
    unsafe { ring.submitter().register_buffers(&vectors)? };
    for (index, buffer) in (0..).zip(buffers) {
        buffer.0.registered.set(Some(index));
    }
    Ok(())
}

/// Restores the borrow count also when the closure panics.
struct Borrowed<'a>(&'a Cell<i32>, i32);

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        self.0.set(self.1);
    }
}

impl Buffer for IoBuffer {
    fn len(&self) -> usize {
        self.0.len
    }

    fn read<R>(&self, f: impl FnOnce(&[u8]) -> R) -> R {
        let lent = self.0.lent.get();
        assert!(lent >= 0, "a buffer is read while it is being filled");
        assert_eq!(
            self.0.device_writes.get(),
            0,
            "a buffer is read while a device fills it"
        );
        self.0.lent.set(lent + 1);
        // Nested borrows end in the opposite order, so putting back the old count is right.
        let _borrowed = Borrowed(&self.0.lent, lent);
        // SAFETY: the region is mapped and initialised (anonymous memory is zero) for `len`
        // bytes and lives as long as `self`. No device writes into it and no exclusive borrow
        // exists (asserted), and none can begin while `lent` is positive.
        f(unsafe { std::slice::from_raw_parts(self.0.address.as_ptr(), self.0.len) })
    }

    fn fill<R>(&self, f: impl FnOnce(&mut [u8]) -> R) -> R {
        assert!(!self.in_use(), "a buffer is filled while a device uses it");
        assert_eq!(
            self.0.lent.get(),
            0,
            "a buffer is filled while it is borrowed"
        );
        self.0.lent.set(-1);
        let _borrowed = Borrowed(&self.0.lent, 0);
        // SAFETY: as in `read`; the borrow is the only one (asserted), no device uses the
        // memory, and both stay so while `lent` is -1.
        f(unsafe { std::slice::from_raw_parts_mut(self.0.address.as_ptr(), self.0.len) })
    }

    fn in_use(&self) -> bool {
        self.0.device_reads.get() != 0 || self.0.device_writes.get() != 0
    }
}

/// A part of a buffer that a device uses. Ends when dropped: only after the device is done.
pub(crate) struct Lend {
    buffer: IoBuffer,
    start: usize,
    len: u32,
    to_writer: bool,
}

impl Lend {
    fn new(buffer: &IoBuffer, start: usize, len: usize, to_writer: bool) -> Self {
        let end = start.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= buffer.0.len),
            "lend {start}+{len} is out of bounds"
        );
        let Ok(len) = u32::try_from(len) else {
            panic!("one operation of {len} bytes")
        };
        Self {
            buffer: buffer.clone(),
            start,
            len,
            to_writer,
        }
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len as usize
    }

    /// Another hold on memory lent for reading.
    pub(crate) fn again(&self) -> Self {
        assert!(!self.to_writer, "memory that is written goes to one alone");
        self.buffer.lend_to_reader(self.start, self.len())
    }

    /// Another hold on the part from byte `skip` on.
    pub(crate) fn rest(&self, skip: usize) -> Self {
        assert!(
            self.to_writer,
            "memory lent for reading is lent for writing"
        );
        let len = self.len().saturating_sub(skip);
        self.buffer.lend_to_writer(self.start + skip, len)
    }

    /// Reads the part, which is lent for reading.
    pub(crate) fn read<T>(&self, f: impl FnOnce(&[u8]) -> T) -> T {
        assert!(!self.to_writer, "memory is read that something writes");
        // SAFETY: the part lies within the region (asserted in `new`). It is lent for reading, as to a
        // device: while that lasts nobody writes to it, Rust code cannot (asserted in `fill`), and a
        // device only to other parts.
        f(unsafe { std::slice::from_raw_parts(self.address(), self.len()) })
    }

    /// Writes into the part, as the device would that it was lent to.
    pub(crate) fn write(&self, at: usize, bytes: &[u8]) {
        assert!(self.to_writer, "a write into memory lent for reading");
        let end = at.checked_add(bytes.len());
        assert!(
            end.is_some_and(|end| end <= self.len()),
            "a write beyond what was lent"
        );
        // SAFETY: the range lies within the part (asserted), which lies within the region
        // (asserted in `new`). No Rust code refers to the region: none did when it was lent to
        // a writer, and none can begin before this lend has ended (asserted in `read` and
        // `fill`); `bytes` therefore lie elsewhere.
        unsafe {
            let target = self.address().add(at);
            ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len());
        }
    }

    /// Where the part begins, as the kernel is told.
    pub(crate) fn address(&self) -> *mut u8 {
        // SAFETY: `start` lies within the region (asserted in `new`).
        unsafe { self.buffer.0.address.as_ptr().add(self.start) }
    }
}

impl Drop for Lend {
    fn drop(&mut self) {
        let region = &self.buffer.0;
        let count = if self.to_writer {
            &region.device_writes
        } else {
            &region.device_reads
        };
        count.set(count.get() - 1);
    }
}

/// Memory that a command of another library hands to the kernel. Unlike a [`Lend`] it is
/// leaked when dropped without [`KernelLend::returned`].
pub(crate) struct KernelLend(InFlight);

impl KernelLend {
    /// Lends the whole buffer: the kernel may write into it or read from it.
    pub(crate) fn new(buffer: &IoBuffer) -> Self {
        let lend = buffer.lend_to_writer(0, buffer.len());
        Self(InFlight(Some(Keep::Memory {
            _lend: lend,
            _fd: None,
        })))
    }

    /// The address to tell the kernel.
    pub(crate) fn address(&self) -> *const u8 {
        match &self.0.0 {
            Some(Keep::Memory { _lend: lend, .. }) => lend.address(),
            _ => ptr::null(),
        }
    }

    /// The kernel has answered the command and no longer uses the memory.
    pub(crate) fn returned(self) {
        self.0.complete();
    }
}

/// A batch with the structures through which the kernel finds its parts.
struct Message {
    _batch: Rc<Batch>,
    _vectors: Vec<libc::iovec>,
    header: libc::msghdr,
}

/// What a running operation refers to.
enum Keep {
    Memory {
        _lend: Lend,
        _fd: Option<Rc<OwnedFd>>,
    },
    Message {
        _message: Box<Message>,
        _fd: Rc<OwnedFd>,
    },
    File {
        _fd: Rc<OwnedFd>,
    },
    Deadline {
        _deadline: Box<types::Timespec>,
    },
}

/// A submission entry together with all that it points to.
pub(crate) struct Prepared {
    entry: squeue::Entry,
    keep: Keep,
}

fn fd_of(fd: &Rc<OwnedFd>) -> types::Fd {
    types::Fd(fd.as_raw_fd())
}

impl Prepared {
    /// A block device's discard command (BLOCK_URING_CMD_DISCARD, Linux 6.12), free to block.
    pub(crate) fn discard(fd: &Rc<OwnedFd>, offset: u64, len: u64) -> Self {
        const BLOCK_URING_CMD_DISCARD: u32 = 0x1200;
        let mut command = [0_u8; 16];
        command[..8].copy_from_slice(&len.to_ne_bytes());
        let mut entry = opcode::UringCmd16::new(fd_of(fd), BLOCK_URING_CMD_DISCARD)
            .cmd(command)
            .build();
        // SAFETY: an entry is the kernel's 64-byte `io_uring_sqe`, plain data in which every
        // bit pattern is valid (the crate asserts the size); byte 16 begins its `addr`.
        let raw = unsafe { &mut *(&raw mut entry).cast::<[u8; 64]>() };
        raw[16..24].copy_from_slice(&offset.to_ne_bytes());
        Self {
            entry: entry.flags(squeue::Flags::ASYNC),
            keep: Keep::File { _fd: Rc::clone(fd) },
        }
    }

    /// Sends a batch from byte `skip` on.
    pub(crate) fn send(fd: &Rc<OwnedFd>, batch: &Rc<Batch>, skip: usize) -> Self {
        let mut vectors = batch.vectors(skip);
        // SAFETY: `msghdr` is plain data for which all zeroes is a valid value.
        let mut header: libc::msghdr = unsafe { mem::zeroed() };
        header.msg_iov = vectors.as_mut_ptr();
        header.msg_iovlen = vectors.len();
        let message = Box::new(Message {
            _batch: Rc::clone(batch),
            _vectors: vectors,
            header,
        });
        let flags = (libc::MSG_NOSIGNAL | libc::MSG_WAITALL).cast_unsigned();
        let entry = opcode::SendMsg::new(fd_of(fd), &raw const message.header)
            .flags(flags)
            .build();
        Self {
            entry,
            keep: Keep::Message {
                _message: message,
                _fd: Rc::clone(fd),
            },
        }
    }

    /// Puts the entry into the submission queue under `user_data`; a full one is submitted first.
    pub(crate) fn push(self, ring: &mut IoUring, user_data: u64) -> InFlight {
        let entry = self.entry.user_data(user_data);
        // SAFETY: all that the entry points to is owned by `keep`, has a stable address (its
        // own mapping, a Box or a Vec's heap block that nobody changes) and is given up only
        // by `InFlight::complete`, which is called when the completion has arrived.
        while unsafe { ring.submission().push(&entry) }.is_err() {
            if let Err(error) = ring.submit() {
                let later = [Some(libc::EINTR), Some(libc::EBUSY), Some(libc::EAGAIN)];
                assert!(later.contains(&error.raw_os_error()), "io_uring: {error}");
            }
        }
        InFlight(Some(self.keep))
    }
}

/// Resources of an operation that the kernel has not answered.
pub(crate) struct InFlight(Option<Keep>);

impl InFlight {
    /// The completion has arrived: the kernel no longer uses the resources.
    pub(crate) fn complete(mut self) {
        drop(self.0.take());
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if let Some(keep) = self.0.take() {
            mem::forget(keep);
        }
    }
}

/// Blocks SIGTERM and SIGINT in this thread and those it starts, and returns a descriptor that
/// becomes readable when one arrives. SIGPIPE is ignored.
pub(crate) fn take_signals() -> io::Result<OwnedFd> {
    // SAFETY: `sigset_t` is plain data that sigemptyset initialises before it is used, and the
    // calls take pointers to this live local only.
    unsafe {
        let mut set: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::sigaddset(&raw mut set, libc::SIGINT);
        if libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        let fd: RawFd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Takes over a descriptor that the parent process left open for us by number.
pub(crate) fn inherited_fd(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: fcntl with F_GETFD only looks the number up.
    let known = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if number <= 2 || known < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the descriptor is open, and the caller of this process passed it for this use
    // alone; it is taken before this process opens any descriptor of its own.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Gives the calling thread, and those it starts later, a mount namespace of their own.
pub(crate) fn unshare_mounts() -> rustix::io::Result<()> {
    // SAFETY: only the view of the file system changes; descriptors stay what they were, which
    // is what makes other kinds of unsharing unsafe.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
}

#[cfg(test)]
mod tests;
