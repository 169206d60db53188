//! Buffered receiving from a socket, and complete sending to it.

use std::io;
use std::ops::Range;
use std::rc::Rc;

use peer::server::{Peer, ProtocolError};
use peer::tls::{Acceptor, TlsError};

use crate::io::Stream;
use crate::memory::Memory;

/// Bytes that one receive may bring.
pub(crate) const INBOX_BYTES: usize = 64 << 10;

/// What ends a connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Ended {
    /// The client closed in the middle of something.
    #[error("the client closed the connection in the middle of a message")]
    Closed,
    /// The socket failed.
    #[error("the socket failed: {0}")]
    Socket(#[from] io::Error),
    /// What came makes no sense.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// The client is not who may connect, or nobody can tell.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Bytes received and not yet taken.
pub(crate) struct Inbox<S> {
    stream: Rc<S>,
    /// Where there is TLS.
    acceptor: Option<Acceptor>,
    /// Taken while it is lent to the socket.
    memory: Option<Memory>,
    here: Range<usize>,
}

impl<S: Stream> Inbox<S> {
    pub(crate) fn new(stream: &Rc<S>, acceptor: Option<Acceptor>) -> Self {
        Self {
            stream: Rc::clone(stream),
            acceptor,
            memory: Some(Memory::zeroed(INBOX_BYTES)),
            here: 0..0,
        }
    }

    /// Receives more; false at the end of the stream.
    async fn more(&mut self) -> Result<bool, Ended> {
        let mut memory = self.memory.take().ok_or(Ended::Closed)?;
        memory.data_mut().copy_within(self.here.clone(), 0);
        self.here = 0..self.here.len();
        let (received, memory) = self.stream.receive(memory, self.here.end).await;
        self.memory = Some(memory);
        let received = received?;
        self.here.end += received;
        Ok(received > 0)
    }

    /// Moves bytes that are here into `to`; returns how many.
    fn drain(&mut self, to: &mut [u8]) -> usize {
        let len = to.len().min(self.here.len());
        let data = self.memory.as_ref().map_or(&[][..], Memory::data);
        to[..len].copy_from_slice(&data[self.here.start..self.here.start + len]);
        self.here.start += len;
        len
    }

    /// The next `N` bytes, or none when the stream ends before the first of them.
    pub(crate) async fn array_or_end<const N: usize>(&mut self) -> Result<Option<[u8; N]>, Ended> {
        while self.here.len() < N {
            if !self.more().await? {
                return if self.here.is_empty() {
                    Ok(None)
                } else {
                    Err(Ended::Closed)
                };
            }
        }
        let mut array = [0; N];
        self.drain(&mut array);
        Ok(Some(array))
    }

    /// Fills all of the memory: what is here is copied, the rest is received in place.
    pub(crate) async fn fill(&mut self, mut memory: Memory) -> Result<Memory, Ended> {
        let mut done = self.drain(memory.data_mut());
        while done < memory.len() {
            let (received, back) = self.stream.receive(memory, done).await;
            memory = back;
            match received? {
                0 => return Err(Ended::Closed),
                received => done += received,
            }
        }
        Ok(memory)
    }
}

impl<S: Stream> Peer for Inbox<S> {
    type Error = Ended;

    async fn array<const N: usize>(&mut self) -> Result<[u8; N], Ended> {
        self.array_or_end().await?.ok_or(Ended::Closed)
    }

    async fn take(&mut self, len: usize) -> Result<Vec<u8>, Ended> {
        let mut taken = vec![0; len];
        let mut done = 0;
        loop {
            done += self.drain(&mut taken[done..]);
            if done == len {
                return Ok(taken);
            }
            if !self.more().await? {
                return Err(Ended::Closed);
            }
        }
    }

    async fn skip(&mut self, len: usize) -> Result<(), Ended> {
        let mut left = len;
        loop {
            let here = left.min(self.here.len());
            self.here.start += here;
            left -= here;
            if left == 0 {
                return Ok(());
            }
            if !self.more().await? {
                return Err(Ended::Closed);
            }
        }
    }

    async fn secure(&mut self) -> Result<(), Ended> {
        if !self.here.is_empty() {
            return Err(ProtocolError::BeforeTls.into());
        }
        let acceptor = self.acceptor.as_ref().ok_or(Ended::Closed)?;
        self.stream.secure(acceptor.accept()?);
        Ok(())
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), Ended> {
        let len = bytes.len();
        send_all(&*self.stream, bytes.to_vec(), 0..len).await
    }
}

/// Sends that part of the vector.
pub(crate) async fn send_all<S: Stream>(
    stream: &S,
    bytes: Vec<u8>,
    part: Range<usize>,
) -> Result<(), Ended> {
    let (mut bytes, mut part) = (bytes, part);
    while !part.is_empty() {
        let (sent, back) = stream.send(bytes, part.clone()).await;
        bytes = back;
        match sent? {
            0 => return Err(Ended::Closed),
            sent => part.start += sent,
        }
    }
    Ok(())
}
