//! What the engine needs from its surroundings: disks, memory, time, randomness and tasks.
//!
//! The engine never talks to the operating system. A daemon gives it an implementation of
//! [`Host`] and [`Disk`] over one io_uring; the simulator gives it another over a seeded
//! model. The same futures run on both, so what the simulator proves holds for production.
//!
//! # Who owns a buffer
//!
//! A [`Span`] handed to [`Disk::submit`] belongs to that operation until the device has
//! completed it, **also when the returned future is dropped** (rule R6): a disk keeps a clone
//! of the buffer until then. Dropping the future neither cancels the operation nor frees the
//! buffer; it only means that nobody waits. The operation is then an *orphan*, counted in
//! [`Disk::in_flight`].

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

/// An error number as Linux defines it, positive (`5` is EIO).
///
/// It is the only form in which a disk reports failure and the only form in which a caller of
/// the mirror sees one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl Errno {
    /// Input/output error.
    pub const IO: Self = Self(5);
    /// Bad address range or alignment.
    pub const INVALID: Self = Self(22);
    /// Beyond the end of the device.
    pub const NO_SPACE: Self = Self(28);
    /// What was read does not fit its checksum (`EILSEQ`, as the kernel's block layer has it).
    pub const CHECKSUM: Self = Self(84);
    /// The device does not offer this operation.
    pub const NOT_SUPPORTED: Self = Self(95);
    /// No answer within the deadline: the engine's word, which no [`Disk`] uses.
    pub const TIMED_OUT: Self = Self(110);
    /// The device is gone.
    pub const NO_DEVICE: Self = Self(19);
    /// The mirror is stopping.
    pub const SHUTDOWN: Self = Self(108);
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", std::io::Error::from_raw_os_error(self.0))
    }
}

impl std::error::Error for Errno {}

/// Memory that member I/O can use: aligned to 4 KiB, fixed in place, shared by reference count.
pub trait Buffer: Clone + 'static {
    /// Length in bytes.
    fn len(&self) -> usize;

    /// Whether the buffer holds no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Lends the bytes for reading. Panics while a device may be writing into the buffer:
    /// that is a defect of ours.
    fn read<R>(&self, f: impl FnOnce(&[u8]) -> R) -> R;

    /// Lends the bytes for writing. Panics while any device operation uses the buffer.
    fn fill<R>(&self, f: impl FnOnce(&mut [u8]) -> R) -> R;

    /// Whether a device operation still uses the buffer. True after a request was answered
    /// means that an orphan holds it: the owner must go on with another buffer (R6).
    fn in_use(&self) -> bool;
}

/// A part of a buffer.
#[derive(Clone, Debug)]
pub struct Span<B> {
    /// The whole buffer.
    pub buffer: B,
    /// First byte of the part.
    pub start: usize,
    /// Length of the part in bytes.
    pub len: usize,
}

impl<B: Buffer> Span<B> {
    /// The whole of `buffer`.
    pub fn whole(buffer: B) -> Self {
        let len = buffer.len();
        Self {
            buffer,
            start: 0,
            len,
        }
    }

    /// The part of this span that begins `start` bytes into it and is `len` bytes long.
    ///
    /// # Panics
    ///
    /// When the part does not lie within the span.
    pub fn slice(&self, start: usize, len: usize) -> Self {
        assert!(
            start + len <= self.len,
            "slice {start}+{len} of a span of {}",
            self.len
        );
        Self {
            buffer: self.buffer.clone(),
            start: self.start + start,
            len,
        }
    }

    /// Lends the part for reading.
    pub fn read<R>(&self, f: impl FnOnce(&[u8]) -> R) -> R {
        self.buffer
            .read(|bytes| f(&bytes[self.start..self.start + self.len]))
    }

    /// Lends the part for writing.
    pub fn fill<R>(&self, f: impl FnOnce(&mut [u8]) -> R) -> R {
        self.buffer
            .fill(|bytes| f(&mut bytes[self.start..self.start + self.len]))
    }
}

/// One operation on a member. Offsets and lengths are in bytes from the member's start and
/// multiples of its logical block.
#[derive(Clone, Debug)]
pub enum DiskRequest<B> {
    /// Fill the span from the device.
    Read {
        /// First byte on the device.
        offset: u64,
        /// Where the bytes go.
        span: Span<B>,
    },
    /// Write the span to the device.
    Write {
        /// First byte on the device.
        offset: u64,
        /// What to write.
        span: Span<B>,
        /// Complete only when the bytes are durable (forced unit access).
        fua: bool,
    },
    /// Make everything completed so far durable.
    Flush,
    /// Make the range read as zeroes; exact, unlike discard.
    WriteZeroes {
        /// First byte on the device.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Tell the device that the range's content is not needed. Advisory.
    Discard {
        /// First byte on the device.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// Facts about a member's device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Capacity in bytes.
    pub size_bytes: u64,
    /// Smallest unit of I/O in bytes (512 or 4096).
    pub logical_block_bytes: u32,
    /// Whether [`DiskRequest::WriteZeroes`] is done by the device rather than by moving data.
    pub cheap_zeroes: bool,
    /// Whether [`DiskRequest::Discard`] does anything.
    pub discard: bool,
    /// Whether each operation travels: reads go to members of this machine while there are any.
    pub behind_network: bool,
    /// Of a disk behind an export server that admits one writer: the server's instance.
    pub server_instance: Option<u128>,
    /// Whether it keeps the order of [`Disk::submit_barrier`].
    pub keeps_order: bool,
}

/// One member's device.
///
/// An operation either completes in full or fails: a disk turns a short transfer into an
/// error. A disk never retries on its own (R13).
pub trait Disk: 'static {
    /// The memory its operations use.
    type Buffer: Buffer;
    /// A running operation. Dropping it leaves an orphan, see the module documentation.
    type Op: Future<Output = Result<(), Errno>> + Unpin;

    /// Queues the operation. It reaches the device at the latest when the calling task next
    /// waits; several queued together share one system call.
    fn submit(&self, request: DiskRequest<Self::Buffer>) -> Self::Op;

    /// [`Disk::submit`] of a durable write. Where [`Geometry::keeps_order`], what is submitted later
    /// and changes the disk begins when it has ended, and is refused when it has failed
    /// ([`order`](crate::order)); elsewhere it is a write like others.
    fn submit_barrier(&self, request: DiskRequest<Self::Buffer>) -> Self::Op {
        self.submit(request)
    }

    /// Operations that the device still owes, orphans included.
    fn in_flight(&self) -> usize;

    /// Facts about the device, read when it was opened.
    fn geometry(&self) -> Geometry;

    /// Begins to ask for the CRC32 of each of so many blocks of 4096 bytes from `offset` on, a
    /// multiple of that, where they need not be read for it. None when they cannot be asked for
    /// now. Once begun it ends by itself, soon, whatever happens; it owes nothing to
    /// [`Disk::in_flight`].
    fn sums(&self, offset: u64, blocks: usize) -> Option<SumsOp> {
        let _ = (offset, blocks);
        None
    }
}

/// A running question for the checksums of blocks: just as many as were asked for, or none when
/// they are not to be had. They say what was there at some moment since the question.
pub type SumsOp = Pin<Box<dyn Future<Output = Option<Vec<u32>>>>>;

/// Time, randomness, memory and tasks.
pub trait Host: 'static {
    /// The memory it allocates.
    type Buffer: Buffer;
    /// A running delay.
    type Sleep: Future<Output = ()> + Unpin;

    /// Time since an arbitrary start; never goes back and stands still in no state.
    fn now(&self) -> Duration;

    /// Seconds since 1970, for display only: nothing is ever decided by it (R10).
    fn wall_clock_secs(&self) -> u64;

    /// Completes after `delay`.
    fn sleep(&self, delay: Duration) -> Self::Sleep;

    /// Unpredictable bits for identities.
    fn random(&self) -> u128;

    /// Runs `task` beside the caller on the same thread.
    fn spawn(&self, task: Pin<Box<dyn Future<Output = ()>>>);

    /// Zeroed memory of `len` bytes (a multiple of 4 KiB) for member I/O, locked in RAM.
    fn allocate(&self, len: usize) -> Self::Buffer;

    /// [`Host::allocate`] with whatever content: for what is read into in full before anything
    /// looks at it. Zeroing costs as much as reading from a fast disk.
    fn allocate_unzeroed(&self, len: usize) -> Self::Buffer {
        self.allocate(len)
    }
}
