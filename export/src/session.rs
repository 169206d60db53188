//! One session: its handshake, its requests, its replies.
//!
//! ```text
//! socket ─► reader ─► a task for each request (disk) ─► replies ─► sender ─► socket
//!             ▲                                                       │
//!             └──────────────── room for more requests ◄──────────────┘
//! ```
//!
//! The room is that of requests whose replies have not been sent: a client that takes no replies
//! is not read from, and costs what is stated in [`crate`] and no more.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::net::Shutdown;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use mirror::host::Errno;
use mirror::order::{Order, Ticket, Turn};
use peer::claim::Claim;
use peer::server::admission::SessionId;
use peer::server::contexts::Agreed;
use peer::server::{
    self as proto, Command, Desk, Export, Peer as _, REQUEST_BYTES, Rank, Request, Verdict,
};
use peer::structured::Head;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::inbox::{Ended, Inbox, send_all};
use crate::io::{Store, Stream};
use crate::memory::Memory;
use crate::server::Server;
use crate::sums::sums;
use crate::tasks::{Tasks, begin, within};

/// Longest read or write in bytes, announced to clients; also the data that one session may have
/// under way.
pub const PAYLOAD_BYTES_MAX: u32 = 4 << 20;
/// Most requests under way in one session.
const REQUESTS_MAX: u32 = 128;
/// The handshake's limit of time, the wait for an older session's requests included.
pub(crate) const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// The part of it until TLS is there, where it is wanted.
const TLS_LIMIT: Duration = Duration::from_secs(3);
/// In these units the data under way are counted.
const UNIT_BYTES: u32 = 1024;

/// What has to be given back when a reply has been sent.
struct Room {
    _request: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
}

/// What a request has to do with the order of its session.
#[derive(Clone, Copy)]
enum Part {
    /// It is the barrier of this number.
    Barrier(u64),
    /// It is behind some.
    Behind(Ticket),
    /// Nothing.
    None,
}

struct Reply {
    head: Head,
    data: Option<Memory>,
    room: Room,
}

/// One client's session.
pub(crate) struct Session<S> {
    id: SessionId,
    from: String,
    stream: Rc<S>,
    /// The owner of its claim.
    owner: Cell<Option<u128>>,
    heard: Cell<Duration>,
    is_cut: Cell<bool>,
    /// It may write, or has been allowed to.
    writes: Cell<bool>,
    /// Failed flushes that concern nobody in it, or that it has been told of.
    failures_seen: Cell<u64>,
    /// A person has been told that it may not write.
    told: Cell<bool>,
    /// How its requests are answered.
    agreed: Cell<Agreed>,
    /// Its barriers, and what waits for one to end.
    order: RefCell<Order>,
    barrier_ended: Notify,
    requests: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    replies: RefCell<VecDeque<Reply>>,
    /// No reply will be added.
    complete: Cell<bool>,
    ready: Notify,
}

impl<S> fmt::Display for Session<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "session {} ({})", self.id, self.from)
    }
}

impl<S: Stream> Session<S> {
    pub(crate) fn new(id: SessionId, stream: S, from: String, now: Duration) -> Rc<Self> {
        Rc::new(Self {
            id,
            from,
            stream: Rc::new(stream),
            owner: Cell::new(None),
            heard: Cell::new(now),
            is_cut: Cell::new(false),
            writes: Cell::new(false),
            failures_seen: Cell::new(0),
            told: Cell::new(false),
            agreed: Cell::default(),
            order: RefCell::default(),
            barrier_ended: Notify::new(),
            requests: Arc::new(Semaphore::new(REQUESTS_MAX as usize)),
            bytes: Arc::new(Semaphore::new((PAYLOAD_BYTES_MAX / UNIT_BYTES) as usize)),
            replies: RefCell::default(),
            complete: Cell::new(false),
            ready: Notify::new(),
        })
    }

    pub(crate) fn id(&self) -> SessionId {
        self.id
    }

    /// Who has claimed through it.
    pub(crate) fn owner(&self) -> Option<u128> {
        self.owner.get()
    }

    /// When it last asked for something.
    pub(crate) fn heard(&self) -> Duration {
        self.heard.get()
    }

    pub(crate) fn shutdown(&self, how: Shutdown) {
        self.stream.shutdown(how);
    }

    pub(crate) fn is_cut(&self) -> bool {
        self.is_cut.get()
    }

    /// It is the writer now; what failed before is not about its writes.
    fn becomes_writer<T: Tasks, D: Store>(&self, server: &Server<T, D, S>) {
        self.failures_seen.set(server.flush_failures());
        self.writes.set(true);
    }

    /// Whether its client has shown a certificate that is accepted.
    pub(crate) fn is_secured(&self) -> bool {
        self.stream.is_secured()
    }

    /// Ends it: nothing more is received, sent, or begun.
    pub(crate) fn cut(&self) {
        self.is_cut.set(true);
        self.stream.shutdown(Shutdown::Both);
    }

    /// Serves the client; returns when it has left and all its requests have ended.
    pub(crate) async fn serve<T: Tasks, D: Store>(self: &Rc<Self>, server: &Rc<Server<T, D, S>>) {
        let ended = self.converse(server).await;
        server.leave(self.id);
        self.stream.shutdown(Shutdown::Both);
        if let Err(why) = ended
            && !self.is_cut.get()
        {
            server.say(&format!("{self} ended: {why}"));
        }
    }

    async fn converse<T: Tasks, D: Store>(
        self: &Rc<Self>,
        server: &Rc<Server<T, D, S>>,
    ) -> Result<(), Ended> {
        let mut inbox = Inbox::new(&self.stream, server.acceptor());
        let mut desk = ClaimDesk {
            server,
            session: self,
            export: server.unclaimed_export(),
            agreed: Agreed::default(),
        };
        let negotiation = proto::negotiate(&mut inbox, &mut desk);
        let negotiation = within(&server.tasks, HANDSHAKE_LIMIT, negotiation);
        let wants_tls = server.acceptor().is_some();
        // In a fixed order: the simulator repeats its runs.
        let negotiated = tokio::select! {
            biased;
            negotiated = negotiation => negotiated,
            () = self.stays_unsecured(&server.tasks), if wants_tls => None,
        };
        match negotiated {
            Some(Ok(true)) => {}
            Some(Ok(false)) => return Ok(()),
            Some(Err(why)) => return Err(why),
            None => {
                self.stream.shutdown(Shutdown::Both);
                let why = "its handshake took too long";
                return Err(std::io::Error::other(why).into());
            }
        }
        self.agreed.set(desk.agreed);
        let export = desk.export;
        let sender = begin(&server.tasks, Rc::clone(self).send_replies());
        let read = self.read_requests(server, &mut inbox, &export).await;
        // The next writer waits for requests and not for this client to take its replies.
        server.leave(self.id);
        // Requests hold room until they have ended and their replies are gone.
        let _ = self.requests.acquire_many(REQUESTS_MAX).await;
        self.complete.set(true);
        self.ready.notify_one();
        let _ = sender.await;
        read
    }

    /// Returns when the time is up in which a client has to show its certificate, unless it has.
    async fn stays_unsecured(&self, tasks: &impl Tasks) {
        tasks.sleep(TLS_LIMIT).await;
        if self.is_secured() {
            std::future::pending::<()>().await;
        }
    }

    async fn read_requests<T: Tasks, D: Store>(
        self: &Rc<Self>,
        server: &Rc<Server<T, D, S>>,
        inbox: &mut Inbox<S>,
        export: &Export,
    ) -> Result<(), Ended> {
        while let Some(header) = inbox.array_or_end::<REQUEST_BYTES>().await? {
            // What was received before it was cut must not make it the writer again.
            if self.is_cut.get() {
                return Ok(());
            }
            self.heard.set(server.tasks.now());
            let request = proto::request(&header)?;
            if request.command == Command::Disconnect {
                return Ok(());
            }
            let (mut refusal, len) = match self.payload(&request, export) {
                Ok(len) => (None, len),
                Err(error) => (Some(error), 0),
            };
            if refusal.is_none() && request.command.changes() {
                refusal = self.refuse_to_write(server).await;
            }
            let len = if refusal.is_none() { len } else { 0 };
            let room = self.room(len).await;
            let mut memory = (len > 0).then(|| Memory::zeroed(len as usize));
            if request.command == Command::Write {
                match memory.take() {
                    Some(empty) => memory = Some(inbox.fill(empty).await?),
                    None => inbox.skip(request.len as usize).await?,
                }
            }
            if let Some(error) = refusal {
                self.has_ended(self.part(&request), false);
                self.reply(&request, error, None, room);
                continue;
            }
            // A writer's flush counts: whether it fails has to be known before another one writes.
            let flushes = request.command == Command::Flush && self.writes.get();
            let changes = request.command.changes() || flushes;
            if self.is_cut.get() || changes && !server.change_begins(self.id) {
                return Ok(());
            }
            // From here to its end it counts, whatever becomes of this session.
            let part = self.part(&request);
            let (session, server) = (Rc::clone(self), Rc::clone(server));
            let tasks = Rc::clone(&server);
            tasks.tasks.spawn(async move {
                let performed = session.in_order(part, session.perform(&server, &request, memory));
                let (result, data) = performed.await;
                if changes {
                    server.change_ended();
                }
                let error = result.err().map_or(0, |errno| proto::wire_error(errno.0));
                session.reply(&request, error, data, room);
            });
        }
        Ok(())
    }

    /// A request's part in the order, as they are received.
    fn part(&self, request: &Request) -> Part {
        let mut order = self.order.borrow_mut();
        match request.rank {
            Rank::Barrier { first } => Part::Barrier(order.barrier_begins(first)),
            Rank::Behind => Part::Behind(order.ticket()),
            Rank::Any => Part::None,
        }
    }

    /// Enters the end of a barrier, and lets those behind it look.
    fn has_ended(&self, part: Part, well: bool) {
        if let Part::Barrier(number) = part {
            self.order.borrow_mut().barrier_ended(number, well);
            self.barrier_ended.notify_waiters();
        }
    }

    /// Lets what is behind barriers wait for them, and refuses it when one of them has failed.
    async fn in_order(
        &self,
        part: Part,
        performance: impl Future<Output = (Result<(), Errno>, Option<Memory>)>,
    ) -> (Result<(), Errno>, Option<Memory>) {
        if let Part::Behind(ticket) = part {
            loop {
                let moved = self.barrier_ended.notified();
                let turn = self.order.borrow().turn(ticket);
                match turn {
                    Turn::Now => break,
                    Turn::Wait => moved.await,
                    Turn::Refused => return (Err(Errno::IO), None),
                }
            }
        }
        let performed = performance.await;
        self.has_ended(part, performed.0.is_ok());
        performed
    }

    /// Bytes of memory that a request takes, or the error that it is answered with at once.
    fn payload(&self, request: &Request, export: &Export) -> Result<u32, u32> {
        if let Command::BlockStatus { one } = request.command {
            return self.agreed.get().sums_of(request, one, export);
        }
        match proto::refusal(request, export) {
            Some(error) => Err(error),
            None if matches!(request.command, Command::Read | Command::Write) => Ok(request.len),
            None => Ok(0),
        }
    }

    /// Makes a session without a claim the writer at its first write, or says why not.
    async fn refuse_to_write<T: Tasks, D: Store>(
        &self,
        server: &Rc<Server<T, D, S>>,
    ) -> Option<u32> {
        if self.writes.get() {
            return None;
        }
        if !server.may_write_unclaimed() {
            return Some(proto::EPERM);
        }
        if let Err(why) = server.let_unclaimed_write(self).await {
            // Once: who goes on trying must not fill the log.
            if !self.told.replace(true) {
                server.say(&format!("{self} may not write: {why}"));
            }
            return Some(proto::EPERM);
        }
        self.becomes_writer(server);
        None
    }

    /// Waits until the session may have so many more bytes under way.
    async fn room(&self, len: u32) -> Room {
        let requests = Arc::clone(&self.requests).acquire_owned().await;
        let units = len.min(PAYLOAD_BYTES_MAX).div_ceil(UNIT_BYTES);
        let bytes = Arc::clone(&self.bytes).acquire_many_owned(units).await;
        match (requests, bytes) {
            (Ok(request), Ok(bytes)) => Room {
                _request: request,
                _bytes: bytes,
            },
            _ => unreachable!("nobody closes these semaphores"),
        }
    }

    fn reply(&self, request: &Request, error: u32, data: Option<Memory>, room: Room) {
        let data = data.filter(|_| error == 0);
        let len = data.as_ref().map_or(0, Memory::len);
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        let head = self.agreed.get().head(request, error, len);
        let reply = Reply { head, data, room };
        self.replies.borrow_mut().push_back(reply);
        self.ready.notify_one();
    }

    /// Performs a request; returns the data of a read.
    async fn perform<T: Tasks, D: Store>(
        &self,
        server: &Rc<Server<T, D, S>>,
        request: &Request,
        memory: Option<Memory>,
    ) -> (Result<(), Errno>, Option<Memory>) {
        let (store, seen) = (&server.store, self.failures_seen.get());
        let (offset, len) = (request.offset, u64::from(request.len));
        let done = match (request.command, memory) {
            (Command::Read, Some(memory)) => {
                let (result, memory) = store.read(offset, memory).await;
                return (result, Some(memory));
            }
            (Command::BlockStatus { .. }, Some(memory)) => {
                let (result, memory) = sums(store, offset, memory).await;
                return (result, Some(memory));
            }
            (Command::Write, Some(memory)) => store.write(offset, memory).await,
            (Command::Flush, _) => Ok(()),
            (Command::Trim, _) => store.discard(offset, len).await,
            (Command::WriteZeroes, _) => store.write_zeroes(offset, len).await,
            _ => Err(Errno::INVALID),
        };
        // Who has written nothing has nothing to flush, and must not be the one to whom the disk
        // says, once, that a flush failed.
        let durable = request.command == Command::Flush || request.fua;
        if done.is_err() || !durable || !self.writes.get() {
            return (done, None);
        }
        let flushed = server.flush().await;
        // Also when this flush succeeded: one that failed since the session was last told has lost
        // writes which this one was to make durable. (R7)
        let failures = server.flush_failures();
        let result = if failures == seen {
            flushed
        } else {
            Err(Errno::IO)
        };
        self.failures_seen.set(failures);
        (result, None)
    }

    async fn send_replies(self: Rc<Self>) {
        loop {
            let ready: VecDeque<Reply> = self.replies.take();
            if ready.is_empty() {
                if self.complete.get() {
                    return;
                }
                self.ready.notified().await;
            } else if !self.is_cut.get() && self.send(ready).await.is_err() {
                // The reader ends as well; what is left of the replies goes nowhere.
                self.cut();
            }
        }
    }

    /// Sends replies, those without data together.
    async fn send(&self, ready: VecDeque<Reply>) -> Result<(), Ended> {
        let mut heads = Vec::new();
        let mut rooms = Vec::new();
        for reply in ready {
            let Some(data) = reply.data else {
                heads.extend_from_slice(reply.head.bytes());
                rooms.push(reply.room);
                continue;
            };
            let (vector, part) = data.with_head(&reply.head);
            send_all(&*self.stream, vector, part).await?;
        }
        let len = heads.len();
        send_all(&*self.stream, heads, 0..len).await
    }
}

/// Answers a client's claims.
struct ClaimDesk<'a, T, D, S> {
    server: &'a Rc<Server<T, D, S>>,
    session: &'a Rc<Session<S>>,
    export: Export,
    agreed: Agreed,
}

impl<T: Tasks, D: Store, S: Stream> Desk for ClaimDesk<'_, T, D, S> {
    fn export(&self) -> &Export {
        &self.export
    }

    fn has_tls(&self) -> bool {
        self.server.acceptor().is_some()
    }

    fn agreed(&mut self) -> Option<&mut Agreed> {
        Some(&mut self.agreed)
    }

    async fn claim(&mut self, claim: Option<Claim>) -> Verdict {
        let (server, session) = (self.server, self.session);
        let Some(claim) = claim else {
            return Verdict::Granted(server.fence());
        };
        session.owner.set(Some(claim.owner));
        match server.claim(session, &claim).await {
            Ok(()) => {
                session.becomes_writer(server);
                self.export = server.writers_export();
                server.say(&format!("{session} writes now"));
                Verdict::Granted(server.fence())
            }
            Err(why) => {
                // A claim before this one, of the same session, is gone with it.
                session.owner.set(None);
                session.writes.set(false);
                self.export = server.unclaimed_export();
                server.say(&format!("{session} is refused: {why}"));
                why.into()
            }
        }
    }
}
