//! Buffered receiving from and complete sending to a stream socket on the ring, through TLS where
//! the connection to a peer has it.

use std::cell::RefCell;
use std::ops::Range;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::rc::Rc;

use mirror::host::{Buffer as _, Errno};
use peer::server::{Peer, ProtocolError};
use peer::tls::{Opened, Tls, TlsError};
use rustix::net::SendFlags;

use crate::batch::Batch;
use crate::ring::Ring;
use crate::sys::{IoBuffer, Lend, Prepared};

/// TLS of a connection, which its receiver and its sender share.
type Layer = Rc<RefCell<Tls>>;

/// Bytes that are sealed at once: what is sent is copied then, and what is received too.
const SEALED_BYTES: usize = 256 << 10;

/// What ends a stream.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    /// The peer closed in the middle of something.
    #[error("the other end closed the connection in the middle of a message")]
    Closed,
    /// The socket failed.
    #[error("the socket failed: {0}")]
    Socket(#[from] Errno),
    /// What came makes no sense.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// TLS failed under way.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Bytes received and not yet taken.
pub(crate) struct Inbox {
    ring: Rc<Ring>,
    fd: Rc<OwnedFd>,
    buffer: IoBuffer,
    start: usize,
    end: usize,
    sealed: Option<Sealed>,
}

/// What was received and not opened.
struct Sealed {
    tls: Layer,
    buffer: IoBuffer,
    start: usize,
    end: usize,
}

impl Inbox {
    /// An inbox that asks the socket for up to `capacity` bytes at once.
    pub(crate) fn new(ring: &Rc<Ring>, fd: &Rc<OwnedFd>, capacity: usize) -> Self {
        let buffer = IoBuffer::recycled(capacity);
        Self {
            ring: Rc::clone(ring),
            fd: Rc::clone(fd),
            buffer,
            start: 0,
            end: 0,
            sealed: None,
        }
    }

    /// Receives more; false at the end of the stream.
    async fn receive(&mut self) -> Result<bool, StreamError> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start > 0 {
            let (start, end) = (self.start, self.end);
            self.buffer.fill(|bytes| bytes.copy_within(start..end, 0));
            (self.start, self.end) = (0, end - start);
        }
        if let Some(sealed) = &mut self.sealed {
            let into = self.end..self.buffer.len();
            let opened = sealed
                .open(&self.ring, &self.fd, &self.buffer, into)
                .await?;
            self.end += opened;
            return Ok(opened > 0);
        }
        let lend = self
            .buffer
            .lend_to_writer(self.end, self.buffer.len() - self.end);
        let received = self
            .ring
            .submit(Prepared::receive(&self.fd, lend, false), None);
        let received = received.bytes().await?;
        self.end += received;
        Ok(received > 0)
    }

    /// The next `N` bytes, or none when the stream ends before the first of them.
    pub(crate) async fn array_or_end<const N: usize>(
        &mut self,
    ) -> Result<Option<[u8; N]>, StreamError> {
        while self.end - self.start < N {
            if !self.receive().await? {
                return if self.start == self.end {
                    Ok(None)
                } else {
                    Err(StreamError::Closed)
                };
            }
        }
        let mut array = [0; N];
        self.buffer
            .read(|bytes| array.copy_from_slice(&bytes[self.start..self.start + N]));
        self.start += N;
        Ok(Some(array))
    }

    /// Moves bytes that are here into `to`; returns how many.
    fn drain(&mut self, to: &mut [u8]) -> usize {
        let len = to.len().min(self.end - self.start);
        self.buffer
            .read(|bytes| to[..len].copy_from_slice(&bytes[self.start..self.start + len]));
        self.start += len;
        len
    }

    /// The same into memory that has been lent, from its byte `at` on.
    fn drain_into(&mut self, target: &Lend, at: usize) -> usize {
        let len = (target.len() - at).min(self.end - self.start);
        self.buffer
            .read(|bytes| target.write(at, &bytes[self.start..self.start + len]));
        self.start += len;
        len
    }

    /// Fills the first `len` bytes of `target`: what is here is copied, the rest is received
    /// in place.
    pub(crate) async fn fill(&mut self, target: &IoBuffer, len: usize) -> Result<(), StreamError> {
        let mut done = target.fill(|bytes| self.drain(&mut bytes[..len]));
        while self.sealed.is_some() && done < len {
            if !self.receive().await? {
                return Err(StreamError::Closed);
            }
            done += target.fill(|bytes| self.drain(&mut bytes[done..len]));
        }
        while done < len {
            let lend = target.lend_to_writer(done, len - done);
            let received = self
                .ring
                .submit(Prepared::receive(&self.fd, lend, true), None);
            let received = received.bytes().await?;
            if received == 0 {
                return Err(StreamError::Closed);
            }
            done += received;
        }
        Ok(())
    }

    /// Fills memory that has been lent, in the same way. Only this may write there meanwhile.
    pub(crate) async fn fill_lent(&mut self, target: &Lend) -> Result<(), StreamError> {
        let len = target.len();
        let mut done = self.drain_into(target, 0);
        while self.sealed.is_some() && done < len {
            if !self.receive().await? {
                return Err(StreamError::Closed);
            }
            done += self.drain_into(target, done);
        }
        while done < len {
            let receive = Prepared::receive(&self.fd, target.rest(done), true);
            let received = self.ring.submit(receive, None).bytes().await?;
            if received == 0 {
                return Err(StreamError::Closed);
            }
            done += received;
        }
        Ok(())
    }

    /// The bytes up to the next newline, which is taken but not returned; an error when there
    /// is none within the inbox's capacity.
    pub(crate) async fn line(&mut self) -> Result<Vec<u8>, StreamError> {
        loop {
            let (start, end) = (self.start, self.end);
            let line = self.buffer.read(|bytes| {
                let here = &bytes[start..end];
                here.iter()
                    .position(|byte| *byte == b'\n')
                    .map(|len| here[..len].to_vec())
            });
            if let Some(line) = line {
                self.start += line.len() + 1;
                return Ok(line);
            }
            let full = end - start == self.buffer.len();
            if full || !self.receive().await? {
                return Err(StreamError::Closed);
            }
        }
    }
}

impl Sealed {
    /// Puts plain text into that part of `buffer`, receiving where nothing is here; 0 at the end.
    async fn open(
        &mut self,
        ring: &Rc<Ring>,
        fd: &Rc<OwnedFd>,
        buffer: &IoBuffer,
        part: Range<usize>,
    ) -> Result<usize, StreamError> {
        loop {
            let (start, end) = (self.start, self.end);
            let (opened, left) = self.buffer.read(|sealed| {
                let mut sealed = &sealed[start..end];
                let mut tls = self.tls.borrow_mut();
                let opened = buffer.fill(|bytes| tls.open(&mut sealed, &mut bytes[part.clone()]));
                (opened, sealed.len())
            });
            self.start = end - left;
            match opened? {
                Opened::Plain(len) => return Ok(len),
                Opened::End => return Ok(0),
                Opened::More => {}
            }
            let lend = self.buffer.lend_to_writer(0, self.buffer.len());
            let received = ring.submit(Prepared::receive(fd, lend, false), None);
            (self.start, self.end) = (0, received.bytes().await?);
            if self.end == 0 {
                return Ok(0);
            }
        }
    }
}

impl Peer for Inbox {
    type Error = StreamError;

    async fn array<const N: usize>(&mut self) -> Result<[u8; N], StreamError> {
        self.array_or_end().await?.ok_or(StreamError::Closed)
    }

    async fn take(&mut self, len: usize) -> Result<Vec<u8>, StreamError> {
        let mut taken = vec![0; len];
        let mut done = 0;
        loop {
            done += self.drain(&mut taken[done..]);
            if done == len {
                return Ok(taken);
            }
            if !self.receive().await? {
                return Err(StreamError::Closed);
            }
        }
    }

    async fn skip(&mut self, len: usize) -> Result<(), StreamError> {
        let mut left = len;
        loop {
            let here = left.min(self.end - self.start);
            self.start += here;
            left -= here;
            if left == 0 {
                return Ok(());
            }
            if !self.receive().await? {
                return Err(StreamError::Closed);
            }
        }
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), StreamError> {
        let mut batch = Batch::default();
        batch.push_bytes(bytes);
        send_all(&self.ring, &self.fd, Rc::new(batch)).await
    }

    /// No server of the daemon's has TLS ([`peer::server::Desk::has_tls`]).
    async fn secure(&mut self) -> Result<(), StreamError> {
        Err(StreamError::Closed)
    }
}

/// Sends the whole batch.
pub(crate) async fn send_all(
    ring: &Rc<Ring>,
    fd: &Rc<OwnedFd>,
    batch: Rc<Batch>,
) -> Result<(), StreamError> {
    let mut sent = 0;
    while sent < batch.bytes() {
        sent += ring
            .submit(Prepared::send(fd, &batch, sent), None)
            .bytes()
            .await?;
    }
    Ok(())
}

/// A socket to a peer, and TLS on it where there is.
pub(crate) struct Wire {
    fd: Rc<OwnedFd>,
    tls: Option<Layer>,
}

impl Wire {
    pub(crate) fn new(fd: OwnedFd, tls: Option<Tls>) -> Self {
        Self {
            fd: Rc::new(fd),
            tls: tls.map(|tls| Rc::new(RefCell::new(tls))),
        }
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// An inbox that asks the socket for up to `capacity` bytes at once.
    pub(crate) fn inbox(&self, ring: &Rc<Ring>, capacity: usize) -> Inbox {
        let sealed = self.tls.as_ref().map(|tls| Sealed {
            tls: Rc::clone(tls),
            buffer: IoBuffer::recycled(capacity),
            start: 0,
            end: 0,
        });
        Inbox {
            sealed,
            ..Inbox::new(ring, &self.fd, capacity)
        }
    }

    /// Sends the whole batch; with TLS in pieces, sealed one after the other.
    pub(crate) async fn send(&self, ring: &Rc<Ring>, batch: Batch) -> Result<(), StreamError> {
        let Some(tls) = &self.tls else {
            return send_all(ring, &self.fd, Rc::new(batch)).await;
        };
        let (mut at, len) = (0, batch.bytes());
        while at < len {
            let end = len.min(at + SEALED_BYTES);
            let mut out = Vec::with_capacity(end - at + (end - at) / 32 + 4096);
            let mut sealed = Ok(());
            batch.read(at..end, |plain| {
                if sealed.is_ok() {
                    sealed = tls.borrow_mut().seal(plain, &mut out);
                }
            });
            sealed?;
            let mut piece = Batch::default();
            piece.take(out);
            send_all(ring, &self.fd, Rc::new(piece)).await?;
            at = end;
        }
        Ok(())
    }

    /// Says that nothing follows, if that can be said at once.
    pub(crate) fn say_last(&self, farewell: &[u8]) {
        let mut words = farewell.to_vec();
        if let Some(tls) = &self.tls {
            words.clear();
            let mut tls = tls.borrow_mut();
            let _ = tls.seal(farewell, &mut words);
            tls.farewell(&mut words);
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let _ = rustix::net::send(&self.fd, &words, flags);
    }
}
