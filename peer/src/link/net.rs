//! What a link runs on: a clock, tasks, memory, and connections.
//!
//! The daemon's is its ring, with sockets; the simulator's is a seeded network. Nothing here is
//! dispatched at run time: a link is compiled for each of the two.

use std::future::Future;
use std::time::Duration;

use mirror::host::Buffer;

use super::reopen::{Opened, Reopened};

/// What a task of a connection ends with.
#[derive(Debug)]
pub enum Trouble {
    /// The connection has failed.
    Broken(String),
    /// The other end is not to be understood.
    Nonsense(String),
}

/// A part of a buffer that a connection uses: until it is dropped, the buffer is in use (R6).
pub trait Lend: 'static {
    /// Another hold on memory that is lent for reading.
    #[must_use]
    fn again(&self) -> Self;
}

/// What is sent together.
pub trait Batch<L>: Default + 'static {
    /// Whether one more header with its data fits in.
    fn has_room(&self) -> bool;

    /// Whether there is nothing to send.
    fn is_empty(&self) -> bool;

    /// Appends bytes, which are copied.
    fn push_bytes(&mut self, bytes: &[u8]);

    /// Appends memory, which is not copied.
    fn push_lend(&mut self, lend: L);
}

/// Bytes received and not yet taken.
#[allow(
    async_fn_in_trait,
    reason = "a connection stays on the thread that uses it"
)]
pub trait Inbox<L>: 'static {
    /// The next `N` bytes, or none when the stream ends before the first of them.
    async fn array_or_end<const N: usize>(&mut self) -> Result<Option<[u8; N]>, Trouble>;

    /// Fills memory that is lent for that with the next bytes.
    async fn fill_lent(&mut self, target: &L) -> Result<(), Trouble>;
}

/// What a link runs on.
#[allow(
    async_fn_in_trait,
    reason = "a connection stays on the thread that uses it"
)]
pub trait Net: Sized + 'static {
    /// The memory of operations.
    type Buffer: Buffer;
    /// A part of it that a connection uses.
    type Lend: Lend;
    /// What is sent together.
    type Batch: Batch<Self::Lend>;
    /// What is received.
    type Inbox: Inbox<Self::Lend>;
    /// A connection in transmission.
    type Wire: 'static;
    /// A way to the server of a connection.
    type Way: 'static;

    /// Time since an arbitrary start.
    fn now(&self) -> Duration;

    /// Completes when it is that late.
    fn sleep_until(&self, at: Duration) -> impl Future<Output = ()>;

    /// Runs a task beside the caller, on the same thread.
    fn spawn(&self, task: impl Future<Output = ()> + 'static);

    /// Lends that part of a buffer, to be written into.
    fn lend_to_writer(buffer: &Self::Buffer, start: usize, len: usize) -> Self::Lend;

    /// Lends that part of a buffer, to be read.
    fn lend_to_reader(buffer: &Self::Buffer, start: usize, len: usize) -> Self::Lend;

    /// A connection is about to be used. One whose other end acknowledges nothing that was sent for
    /// `silent` is to fail, where that can be had.
    fn begin(&self, wire: &Self::Wire, silent: Duration);

    /// What comes on a connection, up to `capacity` bytes at once.
    fn inbox(&self, wire: &Self::Wire, capacity: usize) -> Self::Inbox;

    /// Sends the whole batch.
    async fn send(&self, wire: &Self::Wire, batch: Self::Batch) -> Result<(), Trouble>;

    /// Says that nothing follows, if that can be said at once.
    fn say_last(&self, wire: &Self::Wire, farewell: &[u8]);

    /// Ends both directions of a connection: whatever is under way on it completes.
    fn shut_down(&self, wire: &Self::Wire);

    /// Whether the server answers on that way: its disk may be all that is slow.
    async fn answers(&self, way: &Self::Way) -> bool;

    /// Tries to go on, on that way, where the connection of a link broke.
    async fn reopen(&self, way: &Self::Way) -> Reopened<Opened<Self::Wire>>;
}
