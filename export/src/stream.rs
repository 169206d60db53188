//! A client's socket on the ring of this thread, and TLS on it where the client has begun that.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::Shutdown;
use std::ops::Range;
use std::rc::Rc;

use peer::tls::{Opened, Tls, TlsError};
use tokio_uring::buf::BoundedBuf as _;
use tokio_uring::net::{TcpStream, UnixStream};

use crate::io::Stream;
use crate::memory::Memory;

/// Bytes that are received at once where there is TLS.
const SEALED_BYTES: usize = 64 << 10;
/// Bytes that are sealed at once.
const PLAIN_BYTES: usize = 256 << 10;

/// A client's socket.
pub(crate) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    async fn receive(&self, memory: Memory, from: usize) -> (io::Result<usize>, Memory) {
        let (vector, part, window) = memory.take_apart(from);
        let slice = vector.slice(part);
        let (result, slice) = match self {
            Self::Tcp(stream) => stream.read(slice).await,
            Self::Unix(stream) => stream.read(slice).await,
        };
        (result, Memory::put_together(slice.into_inner(), window))
    }

    async fn send(&self, bytes: Vec<u8>, part: Range<usize>) -> (io::Result<usize>, Vec<u8>) {
        let slice = bytes.slice(part);
        let (result, slice) = match self {
            Self::Tcp(stream) => stream.write(slice).submit().await,
            Self::Unix(stream) => stream.write(slice).submit().await,
        };
        (result, slice.into_inner())
    }

    /// Sends all of it; returns the vector, empty.
    async fn send_all(&self, mut bytes: Vec<u8>) -> (io::Result<()>, Vec<u8>) {
        let mut sent = 0;
        while sent < bytes.len() {
            let part = sent..bytes.len();
            let (result, back) = self.send(bytes, part).await;
            bytes = back;
            match result {
                Ok(0) => return (Err(io::ErrorKind::WriteZero.into()), bytes),
                Ok(more) => sent += more,
                Err(error) => return (Err(error), bytes),
            }
        }
        bytes.clear();
        (Ok(()), bytes)
    }
}

/// TLS on a socket. One task receives and one sends; neither holds it over a wait.
struct Layer {
    tls: RefCell<Tls>,
    /// What was received and not opened; taken while it is lent to the socket.
    sealed: RefCell<Option<Memory>>,
    here: Cell<(usize, usize)>,
    /// What is sent next; taken while it is.
    out: Cell<Vec<u8>>,
}

impl Layer {
    fn new(tls: Tls) -> Self {
        Self {
            tls: RefCell::new(tls),
            sealed: RefCell::new(Some(Memory::zeroed(SEALED_BYTES))),
            here: Cell::new((0, 0)),
            out: Cell::default(),
        }
    }

    /// Opens what is here, and says what the protocol itself wants sent for that.
    fn open(&self, into: &mut [u8], words: &mut Vec<u8>) -> Result<Opened, TlsError> {
        let mut tls = self.tls.borrow_mut();
        let shakes = tls.is_handshaking();
        let (start, end) = self.here.get();
        let sealed = self.sealed.borrow();
        let mut sealed = sealed.as_ref().map_or(&[][..], |it| &it.data()[start..end]);
        let opened = tls.open(&mut sealed, into);
        self.here.set((end - sealed.len(), end));
        if shakes {
            // Later on it goes with what is sent next: the socket has one sender, and this one must
            // not wait for a client.
            tls.own_words(words);
        }
        opened
    }

    async fn receive(&self, socket: &Socket, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut words = Vec::new();
            let opened = self.open(into, &mut words);
            let (sent, _) = socket.send_all(words).await;
            match opened.map_err(io::Error::other)? {
                Opened::Plain(len) => return Ok(len),
                Opened::End => return Ok(0),
                Opened::More => sent?,
            }
            let Some(memory) = self.sealed.take() else {
                return Err(io::ErrorKind::ResourceBusy.into());
            };
            let (received, memory) = socket.receive(memory, 0).await;
            self.sealed.replace(Some(memory));
            match received? {
                0 => return Ok(0),
                received => self.here.set((0, received)),
            }
        }
    }

    async fn send(&self, socket: &Socket, plain: &[u8]) -> io::Result<usize> {
        let plain = &plain[..plain.len().min(PLAIN_BYTES)];
        let mut out = self.out.take();
        let sealed = self.tls.borrow_mut().seal(plain, &mut out);
        sealed.map_err(io::Error::other)?;
        let (result, out) = socket.send_all(out).await;
        self.out.set(out);
        result.map(|()| plain.len())
    }
}

/// A client's socket, through TLS from the moment on that it is given one.
pub(crate) struct UringStream {
    socket: Socket,
    layer: RefCell<Option<Rc<Layer>>>,
}

impl UringStream {
    pub(crate) fn new(socket: Socket) -> Self {
        Self {
            socket,
            layer: RefCell::default(),
        }
    }

    fn layer(&self) -> Option<Rc<Layer>> {
        self.layer.borrow().clone()
    }
}

impl Stream for UringStream {
    async fn receive(&self, mut memory: Memory, from: usize) -> (io::Result<usize>, Memory) {
        let Some(layer) = self.layer() else {
            return self.socket.receive(memory, from).await;
        };
        let received = layer.receive(&self.socket, &mut memory.data_mut()[from..]);
        (received.await, memory)
    }

    async fn send(&self, bytes: Vec<u8>, part: Range<usize>) -> (io::Result<usize>, Vec<u8>) {
        let Some(layer) = self.layer() else {
            return self.socket.send(bytes, part).await;
        };
        (layer.send(&self.socket, &bytes[part]).await, bytes)
    }

    fn is_secured(&self) -> bool {
        let layer = self.layer.borrow();
        layer
            .as_ref()
            .is_some_and(|it| !it.tls.borrow().is_handshaking())
    }

    fn secure(&self, tls: Tls) {
        self.layer.replace(Some(Rc::new(Layer::new(tls))));
    }

    fn shutdown(&self, how: Shutdown) {
        // It may be over already.
        let _ = match &self.socket {
            Socket::Tcp(stream) => stream.shutdown(how),
            Socket::Unix(stream) => stream.shutdown(how),
        };
    }
}
