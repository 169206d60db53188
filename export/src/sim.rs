//! A disk and sockets in memory, for tests: requests end when the test lets them.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::ops::Range;
use std::rc::Rc;

use mirror::host::Errno;
use peer::tls::Tls;
use tokio::sync::Notify;

use crate::io::{Store, Stream};
use crate::memory::Memory;

/// A disk in memory. While it is held, writes wait; reads and flushes likewise.
#[derive(Clone)]
pub(crate) struct SimStore(Rc<Inner>);

struct Inner {
    bytes: RefCell<Vec<u8>>,
    held: Cell<bool>,
    reads_held: Cell<bool>,
    flushes_held: Cell<bool>,
    released: Notify,
    /// Reads of it fail.
    bad: Cell<Option<usize>>,
    /// Reads that have begun and not ended.
    reading: Cell<usize>,
    /// Writes that have begun and not ended.
    writing: Cell<usize>,
    flushes: Cell<usize>,
    /// The next flush to begin will take long, and one does.
    delay_next: Cell<bool>,
    delayed: Cell<bool>,
    /// So many flushes are going to fail.
    flush_failures: Cell<usize>,
}

impl SimStore {
    pub(crate) fn new(size: usize) -> Self {
        Self(Rc::new(Inner {
            bytes: RefCell::new(vec![0; size]),
            held: Cell::new(false),
            reads_held: Cell::new(false),
            flushes_held: Cell::new(false),
            released: Notify::new(),
            bad: Cell::new(None),
            reading: Cell::new(0),
            writing: Cell::new(0),
            flushes: Cell::new(0),
            delay_next: Cell::new(false),
            delayed: Cell::new(false),
            flush_failures: Cell::new(0),
        }))
    }

    pub(crate) fn put(&self, offset: usize, bytes: &[u8]) {
        self.0.bytes.borrow_mut()[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn get(&self, offset: usize, len: usize) -> Vec<u8> {
        self.0.bytes.borrow()[offset..offset + len].to_vec()
    }

    /// Lets writes wait, or go on.
    pub(crate) fn hold(&self, held: bool) {
        self.0.held.set(held);
        self.0.released.notify_waiters();
    }

    pub(crate) fn writing(&self) -> usize {
        self.0.writing.get()
    }

    pub(crate) fn reading(&self) -> usize {
        self.0.reading.get()
    }

    /// This byte cannot be read, or all can.
    pub(crate) fn spoil(&self, bad: Option<usize>) {
        self.0.bad.set(bad);
    }

    pub(crate) fn flushes(&self) -> usize {
        self.0.flushes.get()
    }

    pub(crate) fn fail_flushes(&self) {
        self.0.flush_failures.set(usize::MAX);
    }

    /// The next flush to end fails, and no other: a disk says it once.
    pub(crate) fn fail_one_flush(&self) {
        self.0.flush_failures.set(1);
    }

    /// The next flush to begin takes until [`SimStore::fail_delayed_flush`], and then fails; others
    /// that begin after it do not wait for it.
    pub(crate) fn delay_next_flush(&self) {
        self.0.delay_next.set(true);
    }

    pub(crate) fn fail_delayed_flush(&self) {
        self.0.delayed.set(false);
        self.0.released.notify_waiters();
    }

    pub(crate) fn hold_reads(&self, held: bool) {
        self.0.reads_held.set(held);
        self.0.released.notify_waiters();
    }

    pub(crate) fn hold_flushes(&self, held: bool) {
        self.0.flushes_held.set(held);
        self.0.released.notify_waiters();
    }

    async fn wait_while(&self, held: impl Fn(&Inner) -> bool) {
        loop {
            let released = self.0.released.notified();
            if !held(&self.0) {
                return;
            }
            released.await;
        }
    }

    async fn change(&self, offset: u64, bytes: &[u8]) {
        let inner = &self.0;
        inner.writing.set(inner.writing.get() + 1);
        self.wait_while(|it| it.held.get()).await;
        self.put(usize::try_from(offset).unwrap_or(usize::MAX), bytes);
        inner.writing.set(inner.writing.get() - 1);
    }
}

impl Store for SimStore {
    async fn read(&self, offset: u64, mut memory: Memory) -> (Result<(), Errno>, Memory) {
        let reading = &self.0.reading;
        reading.set(reading.get() + 1);
        self.wait_while(|it| it.reads_held.get()).await;
        reading.set(reading.get() - 1);
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        let mut bad = self.0.bad.get().into_iter();
        if bad.any(|bad| (offset..offset + memory.len()).contains(&bad)) {
            return (Err(Errno::IO), memory);
        }
        let bytes = self.get(offset, memory.len());
        memory.data_mut().copy_from_slice(&bytes);
        (Ok(()), memory)
    }

    async fn write(&self, offset: u64, memory: Memory) -> Result<(), Errno> {
        self.change(offset, memory.data()).await;
        Ok(())
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.0.flushes.set(self.0.flushes.get() + 1);
        if self.0.delay_next.take() {
            self.0.delayed.set(true);
            self.wait_while(|it| it.delayed.get()).await;
            return Err(Errno::IO);
        }
        self.wait_while(|it| it.flushes_held.get()).await;
        let failures = self.0.flush_failures.get();
        self.0.flush_failures.set(failures.saturating_sub(1));
        if failures == 0 {
            Ok(())
        } else {
            Err(Errno::IO)
        }
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let zeroes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        self.change(offset, &zeroes).await;
        Ok(())
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.write_zeroes(offset, len).await
    }
}

/// Bytes on their way in one direction.
struct Pipe {
    bytes: RefCell<VecDeque<u8>>,
    closed: Cell<bool>,
    changed: Notify,
    /// Bytes that fit in before the other end takes some.
    capacity: usize,
}

impl Pipe {
    fn new(capacity: usize) -> Rc<Self> {
        Rc::new(Self {
            bytes: RefCell::default(),
            closed: Cell::new(false),
            changed: Notify::new(),
            capacity,
        })
    }

    fn close(&self) {
        self.closed.set(true);
        self.changed.notify_waiters();
    }

    async fn put(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let changed = self.changed.notified();
            if self.closed.get() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let room = self.capacity - self.bytes.borrow().len();
            if room > 0 {
                let fits = bytes.len().min(room);
                self.bytes.borrow_mut().extend(&bytes[..fits]);
                self.changed.notify_waiters();
                return Ok(fits);
            }
            changed.await;
        }
    }

    async fn take(&self, into: &mut [u8]) -> usize {
        loop {
            let changed = self.changed.notified();
            let here = self.bytes.borrow().len().min(into.len());
            if here > 0 {
                let mut bytes = self.bytes.borrow_mut();
                for (to, byte) in into.iter_mut().zip(bytes.drain(..here)) {
                    *to = byte;
                }
                self.changed.notify_waiters();
                return here;
            }
            if self.closed.get() {
                return 0;
            }
            changed.await;
        }
    }
}

/// One end of a connection.
#[derive(Clone)]
pub(crate) struct SimStream {
    incoming: Rc<Pipe>,
    outgoing: Rc<Pipe>,
}

/// The two ends of a connection that holds so many bytes in each direction.
pub(crate) fn connection(capacity: usize) -> (SimStream, SimStream) {
    let (there, back) = (Pipe::new(capacity), Pipe::new(capacity));
    let client = SimStream {
        incoming: Rc::clone(&back),
        outgoing: Rc::clone(&there),
    };
    let server = SimStream {
        incoming: there,
        outgoing: back,
    };
    (client, server)
}

impl SimStream {
    /// Sends all of it; false when the other end is gone.
    pub(crate) async fn say(&self, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.outgoing.put(rest).await {
                Ok(sent) => rest = &rest[sent..],
                Err(_) => return false,
            }
        }
        true
    }

    /// The next so many bytes; none when the connection ends before.
    pub(crate) async fn hear(&self, len: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; len];
        let mut done = 0;
        while done < len {
            match self.incoming.take(&mut bytes[done..]).await {
                0 => return None,
                taken => done += taken,
            }
        }
        Some(bytes)
    }

    /// Closes it.
    pub(crate) fn close(&self) {
        self.shutdown(Shutdown::Both);
    }
}

impl Stream for SimStream {
    async fn receive(&self, mut memory: Memory, from: usize) -> (io::Result<usize>, Memory) {
        let taken = self.incoming.take(&mut memory.data_mut()[from..]).await;
        (Ok(taken), memory)
    }

    async fn send(&self, bytes: Vec<u8>, part: Range<usize>) -> (io::Result<usize>, Vec<u8>) {
        let sent = self.outgoing.put(&bytes[part]).await;
        (sent, bytes)
    }

    fn is_secured(&self) -> bool {
        false
    }

    fn secure(&self, _: Tls) {
        unreachable!("no test here has certificates")
    }

    fn shutdown(&self, how: Shutdown) {
        if how != Shutdown::Write {
            self.incoming.close();
        }
        if how != Shutdown::Read {
            self.outgoing.close();
        }
    }
}
