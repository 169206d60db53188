//! A stream socket with limits of time, and TLS on it where that is wanted.

use std::io::{self, Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::ops::Range;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use crate::address::Place;
use crate::tls::{Opened, Tls, TlsError};

/// An idle connection is asked after so long whether its other end is still there. A host that knows
/// nothing of it any more says so, and who only waits for an answer would never hear of that.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(1);
/// Between two such questions.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
/// Unanswered questions after which the connection is dead.
const KEEPALIVE_PROBES: u32 = 24;

/// Bytes that are received at once where there is TLS.
const SEALED_BYTES: usize = 32 << 10;

/// Why nothing more comes of a stream.
#[derive(Debug)]
pub(crate) enum Broken {
    Io(io::Error),
    Tls(TlsError),
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<TlsError> for Broken {
    fn from(error: TlsError) -> Self {
        Self::Tls(error)
    }
}

impl From<Broken> for io::Error {
    fn from(broken: Broken) -> Self {
        match broken {
            Broken::Io(error) => error,
            Broken::Tls(error) => Self::other(error),
        }
    }
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    fn connect(place: &Place, give_up: Instant) -> io::Result<Self> {
        match place {
            Place::Tcp { host, port } => {
                let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
                let addresses = (host.as_str(), *port).to_socket_addrs()?;
                let mut to_try = u32::try_from(addresses.len()).unwrap_or(u32::MAX);
                for address in addresses {
                    // One that swallows everything leaves time for the others.
                    let share = (left(give_up)? / to_try).max(Duration::from_millis(1));
                    to_try -= 1;
                    match TcpStream::connect_timeout(&address, share) {
                        Ok(stream) => {
                            keep_alive(&stream)?;
                            return Ok(Self::Tcp(stream));
                        }
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
            Place::Unix { socket } => Ok(Self::Unix(connect_unix(socket)?)),
        }
    }

    fn set_limits(&self, limit: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => {
                stream.set_read_timeout(limit)?;
                stream.set_write_timeout(limit)
            }
            Self::Unix(stream) => {
                stream.set_read_timeout(limit)?;
                stream.set_write_timeout(limit)
            }
        }
    }

    /// Receives at least one byte.
    fn receive_some(&mut self, bytes: &mut [u8], give_up: Instant) -> io::Result<usize> {
        loop {
            self.set_limits(Some(left(give_up)?))?;
            let received = match self {
                Self::Tcp(stream) => stream.read(bytes),
                Self::Unix(stream) => stream.read(bytes),
            };
            match received {
                Ok(0) => return Err(closed()),
                Err(error) if is_transient(&error) => {}
                other => return other,
            }
        }
    }

    fn send(&mut self, bytes: &[u8], give_up: Instant) -> io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            self.set_limits(Some(left(give_up)?))?;
            let sent = match self {
                Self::Tcp(stream) => stream.write(&bytes[done..]),
                Self::Unix(stream) => stream.write(&bytes[done..]),
            };
            match sent {
                Ok(sent) => done += sent,
                Err(error) if is_transient(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// TLS, and what was received and not opened.
#[derive(Debug)]
struct Layer {
    tls: Tls,
    sealed: Box<[u8]>,
    here: Range<usize>,
}

/// A connection to a server, with TLS from [`Stream::secure`] on.
#[derive(Debug)]
pub(crate) struct Stream {
    socket: Socket,
    layer: Option<Layer>,
}

impl Stream {
    pub(crate) fn connect(place: &Place, give_up: Instant) -> io::Result<Self> {
        Ok(Self {
            socket: Socket::connect(place, give_up)?,
            layer: None,
        })
    }

    /// Begins TLS; returns when both sides have accepted each other, as far as this one can tell.
    pub(crate) fn secure(&mut self, tls: Tls, give_up: Instant) -> Result<(), Broken> {
        let mut layer = Layer {
            tls,
            sealed: vec![0; SEALED_BYTES].into(),
            here: 0..0,
        };
        let mut words = Vec::new();
        layer.tls.own_words(&mut words);
        self.socket.send(&words, give_up)?;
        while layer.tls.is_handshaking() {
            let received = self.socket.receive_some(&mut layer.sealed, give_up)?;
            let mut sealed = &layer.sealed[..received];
            // Nothing is sent before it was asked for, so that there is no plain text yet.
            let opened = layer.tls.open(&mut sealed, &mut [0; 1]);
            layer.here = received - sealed.len()..received;
            words.clear();
            layer.tls.own_words(&mut words);
            let sent = self.socket.send(&words, give_up);
            match opened? {
                Opened::More => sent?,
                Opened::Plain(_) | Opened::End => return Err(closed().into()),
            }
        }
        self.layer = Some(layer);
        Ok(())
    }

    pub(crate) fn receive(&mut self, bytes: &mut [u8], give_up: Instant) -> Result<(), Broken> {
        let mut done = 0;
        while done < bytes.len() {
            let into = &mut bytes[done..];
            let Some(layer) = &mut self.layer else {
                done += self.socket.receive_some(into, give_up)?;
                continue;
            };
            let mut sealed = &layer.sealed[layer.here.clone()];
            let opened = layer.tls.open(&mut sealed, into);
            layer.here.start = layer.here.end - sealed.len();
            match opened? {
                Opened::Plain(len) => done += len,
                Opened::More => {
                    let received = self.socket.receive_some(&mut layer.sealed, give_up);
                    layer.here = 0..received.map_err(without_farewell)?;
                }
                Opened::End => return Err(closed().into()),
            }
        }
        Ok(())
    }

    pub(crate) fn send(&mut self, bytes: &[u8], give_up: Instant) -> Result<(), Broken> {
        let Some(layer) = &mut self.layer else {
            return Ok(self.socket.send(bytes, give_up)?);
        };
        let mut sealed = Vec::with_capacity(bytes.len() + 256);
        layer.tls.seal(bytes, &mut sealed)?;
        Ok(self.socket.send(&sealed, give_up)?)
    }

    /// Another descriptor of the socket, without limits of time, and the TLS on it.
    pub(crate) fn hand_over(&mut self) -> io::Result<(OwnedFd, Option<Tls>)> {
        self.socket.set_limits(None)?;
        let fd = match &self.socket {
            Socket::Tcp(stream) => stream.as_fd().try_clone_to_owned()?,
            Socket::Unix(stream) => stream.as_fd().try_clone_to_owned()?,
        };
        let tls = self.layer.take().map(|mut layer| {
            layer.tls.keep(&layer.sealed[layer.here]);
            layer.tls
        });
        Ok((fd, tls))
    }
}

/// The end of a connection that TLS had not announced is not its server's word.
fn without_farewell(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        return io::Error::new(io::ErrorKind::ConnectionAborted, error);
    }
    error
}

fn closed() -> io::Error {
    let why = "its server closed the connection";
    io::Error::new(io::ErrorKind::UnexpectedEof, why)
}

/// Whether to look at the clock and try again.
fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

/// What is left until `give_up`; an error when that is nothing.
pub(crate) fn left(give_up: Instant) -> io::Result<Duration> {
    let left = give_up.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(left)
}

/// Without a wait: a server that accepts nobody leaves its queue full.
fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&fd, &address).map_err(|errno| match errno {
        rustix::io::Errno::AGAIN => io::ErrorKind::TimedOut.into(),
        errno => io::Error::from(errno),
    })?;
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Small requests are sent at once, and a host that is gone is noticed.
fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)?;
    Ok(())
}
