//! Connecting to an export, and a client that waits for each answer.
//!
//! `mirrorctl` reads and writes superblocks with it; the daemon only connects with it, and takes
//! the socket over with [`Client::into_parts`]. Connecting and each request have a limit of time
//! as a whole, so that a server that says nothing, or one byte now and then, holds up nobody.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use mirror::superblock::{COPY_A_OFFSET, COPY_B_OFFSET, COPY_BYTES};

use crate::address::{Address, Place};
use crate::claim::{Claim, Fence, Seen};
use crate::connect_error::ConnectError;
use crate::export::Export;
use crate::handshake::{Handshake, REPLY_BYTES_MAX};
use crate::session::{Ask, Kind, Session, farewell};
use crate::stream::{Broken, Stream, left};
use crate::tls::{self, Tls};
use crate::wire::REPLY_BYTES;

/// Limit for connecting and the handshake together.
pub const CONNECT_PATIENCE: Duration = Duration::from_secs(10);
/// Limit for one request.
const REQUEST_PATIENCE: Duration = Duration::from_secs(30);
/// Who wants to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claimant {
    /// Random; its older sessions are superseded.
    pub owner: u128,
    /// Whether sessions of others that live are, too.
    pub take_over: bool,
}

/// A connection to an export, one request at a time.
#[derive(Debug)]
pub struct Client {
    stream: Stream,
    address: Address,
    export: Export,
    fence: Option<Fence>,
    session: Session<()>,
    /// The stream is out of step: nothing more is asked.
    broken: bool,
}

impl Client {
    /// Connects, and takes only what can hold a member.
    ///
    /// # Errors
    ///
    /// When the server cannot be reached within [`CONNECT_PATIENCE`], refuses, or its export is
    /// not fit for a member.
    pub fn connect(address: &Address) -> Result<Self, ConnectError> {
        Self::look(address, CONNECT_PATIENCE)?.fit()
    }

    /// The same, and where the server knows claims as its one writer. What can be read before
    /// that, to make the claim, is not relied on. A server that hangs up on an option which it
    /// does not know is connected to once more, without it.
    ///
    /// # Errors
    ///
    /// Likewise, and when the server refuses the claim.
    pub fn claim(address: &Address, claimant: Claimant) -> Result<Self, ConnectError> {
        let mut asked = match Self::ask(address, CONNECT_PATIENCE) {
            Err(error) if error.is_hang_up() => return Self::connect(address),
            other => other?,
        };
        if asked.fence.is_none() {
            return asked.fit();
        }
        let claim = Claim {
            owner: claimant.owner,
            take_over: claimant.take_over,
            resumes: None,
            seen: asked.seen(),
        };
        drop(asked);
        let claiming = Handshake::asking(&address.export, Some(claim));
        Self::shake(address, claiming, CONNECT_PATIENCE)?.fit()
    }

    /// Connects within `patience`, to read, and asks whether the server knows claims.
    ///
    /// # Errors
    ///
    /// When the server cannot be reached or refuses.
    pub fn ask(address: &Address, patience: Duration) -> Result<Self, ConnectError> {
        let question = Handshake::asking(&address.export, None);
        Self::shake(address, question, patience)
    }

    /// Connects within `patience` to go on where another connection broke: `turn` is its
    /// [`Fence::turn`].
    ///
    /// # Errors
    ///
    /// As [`Client::claim`]; the server refuses when that turn is over.
    pub fn resume(
        address: &Address,
        owner: u128,
        turn: u64,
        patience: Duration,
    ) -> Result<Self, ConnectError> {
        let claim = Claim {
            owner,
            take_over: false,
            resumes: Some(turn),
            seen: None,
        };
        let claiming = Handshake::asking(&address.export, Some(claim));
        Self::shake(address, claiming, patience)?.fit()
    }

    /// Connects within `patience` to ask for checksums of blocks, by what [`Client::into_parts`]
    /// gives: this client itself does not understand the replies that have been agreed on.
    ///
    /// # Errors
    ///
    /// When the server cannot be reached, refuses, or has no checksums.
    pub fn for_sums(address: &Address, patience: Duration) -> Result<Self, ConnectError> {
        Self::shake(address, Handshake::for_sums(&address.export), patience)
    }

    /// What lies on the disk at this moment. A copy that cannot be read, or is not there, says
    /// nothing.
    fn seen(&mut self) -> Option<Seen> {
        let mut copies = [[0; COPY_BYTES]; 2];
        for (copy, offset) in copies.iter_mut().zip([COPY_A_OFFSET, COPY_B_OFFSET]) {
            if self.read_at(copy, offset).is_err() {
                copy.fill(0);
            }
        }
        Seen::on(&copies[0], &copies[1])
    }

    fn fit(self) -> Result<Self, ConnectError> {
        match self.export.check() {
            Ok(()) => Ok(self),
            Err(source) => Err(ConnectError::Unusable {
                address: self.address.clone(),
                source,
            }),
        }
    }

    /// Connects within `patience` to whatever is exported, to look at it.
    ///
    /// # Errors
    ///
    /// When the server cannot be reached or refuses.
    pub fn look(address: &Address, patience: Duration) -> Result<Self, ConnectError> {
        Self::shake(address, Handshake::new(&address.export), patience)
    }

    fn shake(
        address: &Address,
        mut handshake: Handshake,
        patience: Duration,
    ) -> Result<Self, ConnectError> {
        let give_up = Instant::now() + patience;
        let trouble = |source: Broken| match source {
            Broken::Tls(source) => ConnectError::Tls {
                address: address.clone(),
                source: Box::new(source),
            },
            Broken::Io(source) if source.kind() == io::ErrorKind::TimedOut => {
                ConnectError::NoAnswer {
                    address: address.clone(),
                    seconds: patience.as_secs(),
                }
            }
            Broken::Io(source) => ConnectError::Unreachable {
                address: address.clone(),
                source,
            },
        };
        let mut tls = tls(address).map_err(|source| trouble(source.into()))?;
        if tls.is_some() {
            handshake = handshake.with_tls();
        }
        let connected = Stream::connect(&address.place, give_up);
        let mut stream = connected.map_err(|source| trouble(source.into()))?;
        let mut bytes = [0; REPLY_BYTES_MAX];
        loop {
            if handshake.wants_tls() {
                if let Some(tls) = tls.take() {
                    stream.secure(tls, give_up).map_err(trouble)?;
                }
                let out = handshake.secured();
                stream.send(&out, give_up).map_err(trouble)?;
            }
            if handshake.wants() == 0 {
                break;
            }
            let bytes = &mut bytes[..handshake.wants()];
            stream.receive(bytes, give_up).map_err(trouble)?;
            let refused = |source| ConnectError::Handshake {
                address: address.clone(),
                source,
            };
            let out = handshake.feed(bytes).map_err(refused)?;
            stream.send(&out, give_up).map_err(trouble)?;
        }
        let Some(export) = handshake.export() else {
            unreachable!("a handshake that is over has an export")
        };
        Ok(Self {
            stream,
            address: address.clone(),
            export,
            fence: handshake.fence(),
            session: Session::default(),
            broken: false,
        })
    }

    /// What a server says of itself that has ended all older sessions and admits no other writer;
    /// none where that is not known.
    #[must_use]
    pub fn fence(&self) -> Option<Fence> {
        self.fence
    }

    /// What the server offers.
    #[must_use]
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// Where it is.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The socket, blocking and without limits of time, with nothing outstanding on it, and its
    /// TLS if it has one.
    ///
    /// # Errors
    ///
    /// When the connection has failed.
    pub fn into_parts(mut self) -> io::Result<(OwnedFd, Option<Tls>, Export)> {
        if self.broken {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        // The other descriptor goes without a farewell.
        self.broken = true;
        let (fd, tls) = self.stream.hand_over()?;
        Ok((fd, tls, self.export))
    }

    /// Reads at any offset; what the server's smallest request takes beyond is thrown away.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` beyond the export's end, otherwise the server's or the connection's.
    pub fn read_at(&mut self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let len = bytes.len() as u64;
        let unit = u64::from(self.export.logical_block_bytes());
        let end = offset.checked_add(len);
        let end = end.filter(|end| *end <= self.export.usable_bytes());
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        let first = offset - offset % unit;
        if first == offset && end.is_multiple_of(unit) {
            return self.read_aligned(bytes, offset);
        }
        let mut whole = vec![0; length(end.next_multiple_of(unit) - first)?];
        self.read_aligned(&mut whole, first)?;
        let skip = length(offset - first)?;
        bytes.copy_from_slice(&whole[skip..skip + bytes.len()]);
        Ok(())
    }

    fn read_aligned(&mut self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let mut rest = bytes;
        for piece in self.export.pieces(offset, rest.len() as u64) {
            let (part, after) = rest.split_at_mut(piece.len as usize);
            rest = after;
            let ask = Ask {
                kind: Kind::Read,
                fua: false,
                barrier: false,
                offset: piece.offset,
                len: piece.len,
            };
            self.exchange(&ask, &[], part)?;
        }
        Ok(())
    }

    /// Writes whole logical blocks; durable after [`Client::flush`].
    ///
    /// # Errors
    ///
    /// `InvalidInput` for a part of a block, otherwise the server's or the connection's.
    pub fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let unit = u64::from(self.export.logical_block_bytes());
        if !offset.is_multiple_of(unit) || !(bytes.len() as u64).is_multiple_of(unit) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut rest = bytes;
        for piece in self.export.pieces(offset, bytes.len() as u64) {
            let (part, after) = rest.split_at(piece.len as usize);
            rest = after;
            let ask = Ask {
                kind: Kind::Write,
                fua: false,
                barrier: false,
                offset: piece.offset,
                len: piece.len,
            };
            self.exchange(&ask, part, &mut [])?;
        }
        Ok(())
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    ///
    /// The server's or the connection's.
    pub fn flush(&mut self) -> io::Result<()> {
        self.exchange(&Ask::FLUSH, &[], &mut [])
    }

    /// Makes all of the export read as zeroes, where the server does that by itself and within
    /// `budget`.
    ///
    /// # Errors
    ///
    /// `Unsupported` where it does not, `TimedOut` when the budget is used up, otherwise the
    /// server's or the connection's.
    pub fn zero_all(&mut self, budget: Duration) -> io::Result<()> {
        if !self.export.has_write_zeroes() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let give_up = Instant::now() + budget;
        for piece in self.export.pieces(0, self.export.usable_bytes()) {
            left(give_up)?;
            let ask = Ask {
                kind: Kind::WriteZeroes,
                fua: false,
                barrier: false,
                offset: piece.offset,
                len: piece.len,
            };
            self.exchange(&ask, &[], &mut [])?;
        }
        self.flush()
    }

    fn exchange(&mut self, ask: &Ask, out: &[u8], into: &mut [u8]) -> io::Result<()> {
        if self.broken {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        // Any way out of here but an answer leaves the stream out of step.
        self.broken = true;
        let give_up = Instant::now() + REQUEST_PATIENCE;
        let header = self.session.ask(ask, ());
        self.stream.send(&header, give_up)?;
        self.stream.send(out, give_up)?;
        let mut reply = [0; REPLY_BYTES];
        self.stream.receive(&mut reply, give_up)?;
        let answer = self.session.answered(&reply).map_err(io::Error::other)?;
        if answer.error.is_none() {
            self.stream.receive(into, give_up)?;
        }
        self.broken = false;
        match answer.error {
            None => Ok(()),
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if !self.broken {
            let soon = Instant::now() + Duration::from_millis(100);
            // Only a courtesy: a server notices the end of the stream as well.
            let _ = self.stream.send(&farewell(), soon);
        }
    }
}

/// The client's side of TLS where the address asks for it.
fn tls(address: &Address) -> Result<Option<Tls>, tls::TlsError> {
    match (&address.tls, &address.place) {
        (Some(folder), Place::Tcp { host, .. }) => tls::client(folder, host).map(Some),
        _ => Ok(None),
    }
}

fn length(bytes: u64) -> io::Result<usize> {
    usize::try_from(bytes).map_err(io::Error::other)
}

#[cfg(test)]
#[path = "blocking_tests.rs"]
mod tests;
