//! The NBD front end: serves a mirror on a unix socket, and on TCP where asked.
//!
//! # What it promises
//!
//! - Every request is answered exactly once, with the engine's error (R9); a connection that
//!   breaks loses its answers but none of its requests.
//! - Memory is bounded: at most [`MAX_CONNECTIONS`] connections, and for each
//!   [`MAX_REQUESTS`] requests under way whose data is at most [`MAX_REQUEST_BYTES`] together.
//! - FLUSH covers what any connection was answered before it, so that clients may use several
//!   connections (CAN_MULTI_CONN).
//!
//! # Shape of a connection
//!
//! ```text
//! socket ─► reader ─► workers (engine calls) ─► replies ─► sender ─► socket
//!             ▲                                               │
//!             └────────── room for more requests ◄────────────┘
//! ```
//!
//! The reader takes many requests out of one receive; the sender puts all replies that are
//! ready into one send, with the data of reads straight from the buffers that the disks filled.
//! Workers are made when first needed and then reused, so that a request allocates no task.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::{Rc, Weak};
use std::time::Duration;

use mirror::host::{Errno, Span};
use peer::server::{self as proto, Command, Export, MAX_PAYLOAD_BYTES, REQUEST_BYTES, Request};

use crate::batch::Batch;
use crate::daemon::Engine;
use crate::ring::{self, Ring};
use crate::stream::{Inbox, StreamError, send_all};
use crate::sys::{IoBuffer, Prepared};
use peer::signal::Signal;

/// Most connections at once.
pub(crate) const MAX_CONNECTIONS: usize = 16;
/// Most requests under way on one connection.
const MAX_REQUESTS: usize = 128;
/// Most bytes of data under way on one connection; a single longer request is still served.
const MAX_REQUEST_BYTES: usize = MAX_PAYLOAD_BYTES as usize;
/// Bytes that one receive may bring.
const INBOX_BYTES: usize = 256 << 10;
/// A client that has not finished its handshake by then is cut off.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// A listening socket.
pub(crate) struct Listener {
    /// Non-blocking.
    pub(crate) fd: Rc<OwnedFd>,
    /// Whether it is TCP.
    pub(crate) tcp: bool,
}

/// The NBD server of one mirror.
pub(crate) struct NbdServer {
    engine: Rc<Engine>,
    ring: Rc<Ring>,
    export: Export,
    connections: RefCell<Vec<Weak<Connection>>>,
    open: Cell<usize>,
    stopping: Cell<bool>,
    drained: Signal,
}

impl NbdServer {
    /// A server for `engine` under the mirror's `name`.
    pub(crate) fn new(ring: &Rc<Ring>, engine: &Rc<Engine>, name: &str) -> Rc<Self> {
        let export = Export {
            name: name.to_owned(),
            size_bytes: engine.size_bytes(),
            block_bytes: engine.logical_block_bytes(),
            payload_bytes_max: MAX_PAYLOAD_BYTES,
            flags: proto::EVERYTHING,
        };
        Rc::new(Self {
            engine: Rc::clone(engine),
            ring: Rc::clone(ring),
            export,
            connections: RefCell::default(),
            open: Cell::new(0),
            stopping: Cell::new(false),
            drained: Signal::default(),
        })
    }

    /// Accepts connections on `listener` until the server stops.
    pub(crate) fn listen(self: &Rc<Self>, listener: Listener) {
        let server = Rc::clone(self);
        self.ring.spawn(async move {
            while !server.stopping.get() {
                server
                    .ring
                    .submit(Prepared::poll_readable(&listener.fd), None)
                    .await;
                let flags = rustix::net::SocketFlags::CLOEXEC;
                let Ok(fd) = rustix::net::accept_with(listener.fd.as_fd(), flags) else {
                    continue;
                };
                if server.stopping.get() || server.open.get() >= MAX_CONNECTIONS {
                    tracing::warn!("refused an NBD connection: {} are open", server.open.get());
                    continue;
                }
                if listener.tcp {
                    // Both only matter for speed and for noticing dead clients.
                    let _ = rustix::net::sockopt::set_tcp_nodelay(&fd, true);
                    let _ = rustix::net::sockopt::set_socket_keepalive(&fd, true);
                }
                server.accept(fd);
            }
        });
    }

    fn accept(self: &Rc<Self>, fd: OwnedFd) {
        let connection = Connection::new(self, fd);
        let mut connections = self.connections.borrow_mut();
        connections.retain(|known| known.strong_count() > 0);
        connections.push(Rc::downgrade(&connection));
        self.open.set(self.open.get() + 1);
        let server = Rc::clone(self);
        self.ring.spawn(async move {
            if let Err(error) = connection.serve().await {
                tracing::info!("an NBD connection ended: {error}");
            }
            server.open.set(server.open.get() - 1);
            server.drained.notify();
        });
    }

    /// Connections that are open.
    pub(crate) fn open_connections(&self) -> usize {
        self.open.get()
    }

    /// Takes no more requests and returns when those under way have been answered.
    pub(crate) async fn stop(&self) {
        self.stopping.set(true);
        for connection in self.connections.borrow().iter().filter_map(Weak::upgrade) {
            // The reader then sees the end of the stream; replies still go out.
            let _ = rustix::net::shutdown(connection.fd.as_fd(), rustix::net::Shutdown::Read);
        }
        let cut_off = self.ring.sleep_until(ring::now() + HANDSHAKE_LIMIT);
        let server_connections = self.connections.borrow().clone();
        self.ring.spawn(async move {
            cut_off.await;
            for connection in server_connections.iter().filter_map(Weak::upgrade) {
                // A client that takes no replies must not hold up the stop.
                let _ = rustix::net::shutdown(connection.fd.as_fd(), rustix::net::Shutdown::Both);
            }
        });
        while self.open.get() > 0 {
            self.drained.wait().await;
        }
    }
}

/// A request with its data.
struct Job {
    request: Request,
    buffer: Option<IoBuffer>,
}

/// A finished request.
struct Reply {
    cookie: u64,
    error: u32,
    /// Bytes counted against the connection's limit.
    charged: usize,
    payload: Option<Span<IoBuffer>>,
}

/// A task that performs one request at a time.
struct Worker {
    job: RefCell<Option<Job>>,
    signal: Signal,
}

struct Connection {
    server: Rc<NbdServer>,
    fd: Rc<OwnedFd>,
    negotiated: Cell<bool>,
    idle: RefCell<Vec<Rc<Worker>>>,
    workers: Cell<usize>,
    /// Requests taken in whose reply has not been sent.
    requests: Cell<usize>,
    request_bytes: Cell<usize>,
    replies: RefCell<VecDeque<Reply>>,
    reply_ready: Signal,
    room: Signal,
    /// The reader has ended: no request follows.
    closed: Cell<bool>,
    /// Sending failed: replies are dropped.
    broken: Cell<bool>,
}

impl Connection {
    fn new(server: &Rc<NbdServer>, fd: OwnedFd) -> Rc<Self> {
        Rc::new(Self {
            server: Rc::clone(server),
            fd: Rc::new(fd),
            negotiated: Cell::new(false),
            idle: RefCell::default(),
            workers: Cell::new(0),
            requests: Cell::new(0),
            request_bytes: Cell::new(0),
            replies: RefCell::default(),
            reply_ready: Signal::default(),
            room: Signal::default(),
            closed: Cell::new(false),
            broken: Cell::new(false),
        })
    }

    async fn serve(self: &Rc<Self>) -> Result<(), StreamError> {
        let mut inbox = Inbox::new(&self.server.ring, &self.fd, INBOX_BYTES);
        self.limit_handshake();
        let mut desk = self.server.export.clone();
        if !proto::negotiate(&mut inbox, &mut desk).await? {
            return Ok(());
        }
        self.negotiated.set(true);
        let connection = Rc::clone(self);
        let sender_done = Rc::new(Signal::default());
        let done = Rc::clone(&sender_done);
        self.server.ring.spawn(async move {
            connection.send_replies().await;
            done.notify();
        });
        let read = self.read_requests(&mut inbox).await;
        self.closed.set(true);
        self.reply_ready.notify();
        sender_done.wait().await;
        // Idle workers hold the connection; an absent job tells them to end.
        for worker in self.idle.take() {
            worker.signal.notify();
        }
        read
    }

    /// Cuts off a client that connects and then says nothing.
    fn limit_handshake(self: &Rc<Self>) {
        let weak = Rc::downgrade(self);
        let limit = self.server.ring.sleep_until(ring::now() + HANDSHAKE_LIMIT);
        self.server.ring.spawn(async move {
            limit.await;
            if let Some(connection) = weak.upgrade().filter(|it| !it.negotiated.get()) {
                let _ = rustix::net::shutdown(connection.fd.as_fd(), rustix::net::Shutdown::Both);
            }
        });
    }

    /// Takes requests in until the client leaves.
    async fn read_requests(self: &Rc<Self>, inbox: &mut Inbox) -> Result<(), StreamError> {
        loop {
            let Some(header) = inbox.array_or_end::<REQUEST_BYTES>().await? else {
                return Ok(());
            };
            let request = proto::request(&header)?;
            if request.command == Command::Disconnect {
                return Ok(());
            }
            let refusal = proto::refusal(&request, &self.server.export);
            let len = proto::payload_bytes(&request, &self.server.export);
            self.wait_for_room(len).await;
            self.requests.set(self.requests.get() + 1);
            self.request_bytes.set(self.request_bytes.get() + len);
            let buffer = (len > 0).then(|| IoBuffer::recycled(len.next_power_of_two()));
            if let (Command::Write, Some(buffer)) = (request.command, &buffer) {
                inbox
                    .fill(buffer, len)
                    .await
                    .inspect_err(|_| self.forget_request(len))?;
            }
            match refusal {
                Some(error) => self.reply(&request, error, None),
                None => self.dispatch(Job { request, buffer }),
            }
            if self.broken.get() {
                return Ok(());
            }
        }
    }

    async fn wait_for_room(&self, len: usize) {
        while self.requests.get() >= MAX_REQUESTS
            || (self.requests.get() > 0 && self.request_bytes.get() + len > MAX_REQUEST_BYTES)
        {
            self.room.wait().await;
        }
    }

    /// A request whose data never came in full is not answered.
    fn forget_request(&self, len: usize) {
        self.requests.set(self.requests.get() - 1);
        self.request_bytes.set(self.request_bytes.get() - len);
    }

    fn dispatch(self: &Rc<Self>, job: Job) {
        let idle = self.idle.borrow_mut().pop();
        if let Some(worker) = idle {
            worker.job.replace(Some(job));
            worker.signal.notify();
            return;
        }
        self.workers.set(self.workers.get() + 1);
        let worker = Rc::new(Worker {
            job: RefCell::new(Some(job)),
            signal: Signal::default(),
        });
        let connection = Rc::clone(self);
        self.server
            .ring
            .spawn(async move { connection.work(worker).await });
    }

    async fn work(self: Rc<Self>, worker: Rc<Worker>) {
        loop {
            let job = worker.job.take();
            let Some(Job { request, buffer }) = job else {
                self.workers.set(self.workers.get() - 1);
                return;
            };
            let (error, payload) = match perform(&self.server.engine, &request, buffer).await {
                Ok(payload) => (0, payload),
                Err(errno) => (proto::wire_error(errno.0), None),
            };
            self.reply(&request, error, payload);
            self.idle.borrow_mut().push(Rc::clone(&worker));
            worker.signal.wait().await;
        }
    }

    fn reply(&self, request: &Request, error: u32, payload: Option<Span<IoBuffer>>) {
        let charged = proto::payload_bytes(request, &self.server.export);
        let reply = Reply {
            cookie: request.cookie,
            error,
            charged,
            payload,
        };
        self.replies.borrow_mut().push_back(reply);
        self.reply_ready.notify();
    }

    /// Sends replies until the reader has ended and everything is answered.
    async fn send_replies(&self) {
        loop {
            let (batch, requests, bytes) = self.gather();
            if requests == 0 {
                if self.closed.get() && self.requests.get() == 0 {
                    return;
                }
                self.reply_ready.wait().await;
                continue;
            }
            if !self.broken.get()
                && let Err(error) = send_all(&self.server.ring, &self.fd, Rc::new(batch)).await
            {
                tracing::info!("an NBD client takes no more replies: {error}");
                self.broken.set(true);
                // Ends the reader, too.
                let _ = rustix::net::shutdown(self.fd.as_fd(), rustix::net::Shutdown::Both);
            }
            self.requests.set(self.requests.get() - requests);
            self.request_bytes.set(self.request_bytes.get() - bytes);
            self.room.notify();
        }
    }

    /// Puts the replies that are ready into one batch; also returns how many requests and how
    /// many bytes of room they give back.
    fn gather(&self) -> (Batch, usize, usize) {
        let mut batch = Batch::default();
        let (mut requests, mut bytes) = (0, 0);
        let mut replies = self.replies.borrow_mut();
        while batch.has_room()
            && let Some(reply) = replies.pop_front()
        {
            batch.push_bytes(&proto::reply_header(reply.cookie, reply.error));
            if let Some(span) = &reply.payload {
                batch.push_span(span);
            }
            requests += 1;
            bytes += reply.charged;
        }
        (batch, requests, bytes)
    }
}

/// Performs a request; returns the data of a read.
async fn perform(
    engine: &Rc<Engine>,
    request: &Request,
    buffer: Option<IoBuffer>,
) -> Result<Option<Span<IoBuffer>>, Errno> {
    let (offset, len) = (request.offset, u64::from(request.len));
    let span = buffer.map(|buffer| Span {
        buffer,
        start: 0,
        len: request.len as usize,
    });
    match (request.command, span) {
        (Command::Read, Some(span)) => return engine.read(offset, span).await.map(Some),
        (Command::Write, Some(span)) => engine.write(offset, span, request.fua).await,
        (Command::Flush, _) => engine.flush().await,
        (Command::Trim, _) => match engine.discard(offset, len).await {
            Ok(()) if request.fua => engine.flush().await,
            other => other,
        },
        (Command::WriteZeroes, _) => engine.write_zeroes(offset, len, request.fua).await,
        _ => Err(Errno::INVALID),
    }
    .map(|()| None)
}
