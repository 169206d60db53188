//! What a server does its I/O through: a disk and sockets. The ring has one implementation
//! (`uring.rs`), the tests have another that runs in memory and waits where it is told to, and the
//! simulator a third.

use std::io;
use std::net::Shutdown;
use std::ops::Range;

use mirror::host::Errno;
use peer::tls::Tls;

use crate::memory::Memory;

/// The disk that is exported. Ranges lie within it and are multiples of its logical block.
///
/// An operation that has been polled once goes on when its future is dropped: whoever must know
/// when it has ended has to await it.
#[allow(
    async_fn_in_trait,
    reason = "a disk stays on the thread that serves it"
)]
pub trait Store: 'static {
    /// Reads as many bytes as the memory has.
    async fn read(&self, offset: u64, memory: Memory) -> (Result<(), Errno>, Memory);

    /// Writes all of the memory; it is durable after a flush that begins later.
    async fn write(&self, offset: u64, memory: Memory) -> Result<(), Errno>;

    /// Makes durable what has been written. That it failed is said once, as the kernel does.
    async fn flush(&self) -> Result<(), Errno>;

    /// Makes a range read as zeroes.
    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Errno>;

    /// Gives a range's space back.
    async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno>;
}

/// One client's socket.
#[allow(
    async_fn_in_trait,
    reason = "a connection stays on the thread that serves it"
)]
pub trait Stream: 'static {
    /// Receives into the memory's data from byte `from` on, at least one byte; 0 at the end.
    async fn receive(&self, memory: Memory, from: usize) -> (io::Result<usize>, Memory);

    /// Sends that part of the vector; returns how much of it has gone, and the vector.
    async fn send(&self, bytes: Vec<u8>, part: Range<usize>) -> (io::Result<usize>, Vec<u8>);

    /// What is received and sent from now on goes through TLS.
    fn secure(&self, tls: Tls);

    /// Whether there is TLS, and the client's certificate is accepted.
    fn is_secured(&self) -> bool;

    /// Ends one direction or both; what waits on them ends.
    fn shutdown(&self, how: Shutdown);
}
