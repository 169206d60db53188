//! Members behind the network: an NBD export, over one connection on the device's ring.
//!
//! ```text
//! submit ─► queue ─► sender ─► socket ─► server ─► socket ─► reader ─► operation's waker
//!             │    many requests in one send           many replies in one receive
//! ```
//!
//! # What it promises
//!
//! - A write goes from the caller's buffer to the socket, and a read's data to the caller's buffer:
//!   what comes in the same receive as a reply is copied once, the rest is received in place.
//! - When the connection fails in any way (an error, its end, a reply that makes no sense), every
//!   outstanding operation fails with [`GONE`], and every later one at once. Nothing is sent
//!   again and nobody connects anew: the member returns by the operator's order. An ordinary
//!   server cannot be asked to end the old session first (R13). One of ours has done so before it
//!   admits the new one: a member whose session such a server granted is called *fenced*. Each
//!   return is a loss and a return (R14).
//! - After an unclean end of a session a start takes the operator's word for every peer, fenced or
//!   not: what counts is the server that served the session which ended so, and the one that is met
//!   now may be another, on the same disk. To do without, the superblock would have to remember the
//!   instance that granted the session; the instance met at a start is compared with nothing (R14).
//! - An operation whose future was dropped, an orphan, goes on. The data of its read go into its
//!   own buffer, which stays in use until its reply has come in full, or until the connection is
//!   dead and neither reader nor sender has anything under way in the kernel (R6). Only then
//!   outstanding operations fail.
//! - Without FUA, a FUA write is a write and then a flush (R7). Without WRITE_ZEROES or TRIM
//!   those answer `EOPNOTSUPP`.
//!
//! It has no deadline: a server that says nothing leaves its operations outstanding, the engine
//! loses the member for it, and [`Peers::sever`] lets go of the connection.
//!
//! # States of an operation
//!
//! ```text
//!   submit ─► Running ──last reply, or end──► Done ──poll──► Free
//!                │ future dropped              │ future dropped
//!                ▼                             ▼
//!             orphaned ──last reply, or end──► Free
//! ```

mod peers;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use mirror::host::{Disk, DiskRequest, Errno, Geometry, Span};
use mirror::superblock::{COPY_A_OFFSET, COPY_B_OFFSET, COPY_BYTES, LastStop, Superblock};
use peer::wire::{REPLY_BYTES, REQUEST_BYTES};
use peer::{Address, Ask, Claimant, Client, Export, Kind, Session};
use rustix::net::{SendFlags, Shutdown, sockopt};

pub(crate) use self::peers::Peers;
use crate::batch::Batch;
use crate::ring::Ring;
use crate::signal::Signal;
use crate::stream::{Inbox, StreamError, send_all};
use crate::sys::{IoBuffer, Lend};

/// What every operation answers when the connection has failed (ECONNRESET).
pub(crate) const GONE: Errno = Errno(104);
/// Bytes that one receive may bring.
const INBOX_BYTES: usize = 64 << 10;

/// A connection that is not bound to a ring yet. Connecting may block, so that it happens on
/// any thread.
#[derive(Debug)]
pub(crate) struct OpenedPeer {
    fd: OwnedFd,
    export: Export,
    address: String,
    unclean: bool,
    /// Its server admits one writer: only to be shown.
    fenced: bool,
}

impl OpenedPeer {
    /// Connects to an export, as its one writer where that can be had, and looks at its
    /// superblock.
    pub(crate) fn open(address: &Address, claimant: Claimant) -> Result<Self, peer::ConnectError> {
        let mut client = Client::claim(address, claimant)?;
        let fenced = client.fence().is_some();
        let broken = |source: io::Error| peer::ConnectError::Unreachable {
            address: address.clone(),
            source,
        };
        let mut copies = [[0; COPY_BYTES]; 2];
        for (copy, offset) in copies.iter_mut().zip([COPY_A_OFFSET, COPY_B_OFFSET]) {
            // One that cannot be read, or is not there, is the engine's to judge.
            let read = client.read_at(copy, offset);
            tracing::debug!("{address}: superblock at byte {offset}: {read:?}");
        }
        let loaded = Superblock::load(&copies[0], &copies[1]);
        let unclean = loaded.is_ok_and(|it| it.superblock.last_stop == LastStop::Unclean);
        let (fd, export) = client.into_parts().map_err(broken)?;
        Ok(Self {
            fd,
            export,
            address: address.to_string(),
            unclean,
            fenced,
        })
    }

    /// Why it must not be used without the operator's word (R13), if so.
    pub(crate) fn unfinished_session(&self) -> Option<String> {
        self.unclean.then(|| {
            format!(
                "{} is left out: the last session with it did not end cleanly, and its server \
                 may still be writing what that brought; when the server has been restarted \
                 since, or has surely ended that session, start with --peer-sessions-over",
                self.address
            )
        })
    }
}

/// A part of an operation that waits for a reply.
struct Part {
    op: u32,
    /// Where a read's data go.
    into: Option<Lend>,
}

/// A request that waits to be sent.
struct Outgoing {
    header: [u8; REQUEST_BYTES],
    data: Option<Lend>,
}

enum Op {
    Free,
    Running {
        /// Requests without a reply.
        left: u32,
        result: Result<(), Errno>,
        /// A flush follows the last reply.
        then_flush: bool,
        orphaned: bool,
        waker: Option<Waker>,
    },
    Done(Result<(), Errno>),
}

#[derive(Default)]
struct State {
    session: Session<Part>,
    queue: VecDeque<Outgoing>,
    ops: Vec<Op>,
    free: Vec<u32>,
    /// Nothing is sent or asked any more.
    ended: bool,
}

impl State {
    fn begin(&mut self, then_flush: bool) -> u32 {
        let op = Op::Running {
            left: 0,
            result: Ok(()),
            then_flush,
            orphaned: false,
            waker: None,
        };
        if let Some(key) = self.free.pop() {
            self.ops[key as usize] = op;
            return key;
        }
        let Ok(key) = u32::try_from(self.ops.len()) else {
            panic!("four thousand million operations at once")
        };
        self.ops.push(op);
        key
    }

    fn ask(&mut self, op: u32, ask: &Ask, into: Option<Lend>, data: Option<Lend>) {
        if let Op::Running { left, .. } = &mut self.ops[op as usize] {
            *left += 1;
        }
        let header = self.session.ask(ask, Part { op, into });
        self.queue.push_back(Outgoing { header, data });
    }

    fn release(&mut self, op: u32) {
        self.ops[op as usize] = Op::Free;
        self.free.push(op);
    }
}

/// One connection, shared by the disk, its operations and its two tasks.
pub(crate) struct Link {
    ring: Rc<Ring>,
    fd: Rc<OwnedFd>,
    address: String,
    export: Export,
    state: RefCell<State>,
    to_send: Signal,
    /// Of reader and sender, those that may have something under way in the kernel.
    tasks: Cell<u8>,
    in_flight: Cell<usize>,
}

impl Link {
    /// One reply of an operation is in, or will never be.
    fn answered(&self, op: u32, answer: Result<(), Errno>) {
        let mut state = self.state.borrow_mut();
        let ended = state.ended;
        let Op::Running {
            left,
            result,
            then_flush,
            orphaned,
            waker,
        } = &mut state.ops[op as usize]
        else {
            return;
        };
        *left -= 1;
        *result = result.and(answer);
        if *left > 0 {
            return;
        }
        if std::mem::take(then_flush) && result.is_ok() {
            if !ended {
                state.ask(op, &Ask::FLUSH, None, None);
                self.to_send.notify();
                return;
            }
            *result = Err(GONE);
        }
        let (result, orphaned, waker) = (*result, *orphaned, waker.take());
        self.in_flight.set(self.in_flight.get() - 1);
        if orphaned {
            state.release(op);
        } else {
            state.ops[op as usize] = Op::Done(result);
        }
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Tells the server that nothing follows. Only a courtesy, but one that it answers by closing:
    /// it notices the end of the stream as well.
    fn say_farewell(&self) {
        if !self.state.borrow().ended && self.in_flight.get() == 0 {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let _ = rustix::net::send(self.fd.as_fd(), &peer::session::farewell(), flags);
        }
    }

    /// Ends the connection. Outstanding operations fail when both tasks have seen it.
    fn end(&self, why: &str) {
        if std::mem::replace(&mut self.state.borrow_mut().ended, true) {
            return;
        }
        if self.in_flight.get() > 0 {
            tracing::warn!("the connection to {} has ended: {why}", self.address);
        } else {
            tracing::info!("the connection to {} has ended: {why}", self.address);
        }
        // Makes what is under way in the kernel complete.
        let _ = rustix::net::shutdown(self.fd.as_fd(), Shutdown::Both);
        self.to_send.notify();
    }

    /// A task has nothing under way in the kernel any more.
    fn task_over(&self, why: &str) {
        self.end(why);
        self.tasks.set(self.tasks.get() - 1);
        if self.tasks.get() > 0 {
            return;
        }
        let (lost, unsent) = {
            let mut state = self.state.borrow_mut();
            let lost: Vec<Part> = state.session.give_up().collect();
            (lost, std::mem::take(&mut state.queue))
        };
        drop(unsent);
        for Part { op, into } in lost {
            drop(into);
            self.answered(op, Err(GONE));
        }
    }

    async fn send_requests(self: Rc<Self>) {
        let why = loop {
            let batch = self.gather();
            if self.state.borrow().ended {
                break String::new();
            }
            if batch.bytes() == 0 {
                self.to_send.wait().await;
            } else if let Err(error) = send_all(&self.ring, &self.fd, Rc::new(batch)).await {
                break error.to_string();
            }
        };
        self.task_over(&why);
    }

    /// The requests that wait, as far as they fit into one system call.
    fn gather(&self) -> Batch {
        let mut batch = Batch::default();
        let mut state = self.state.borrow_mut();
        while batch.has_room()
            && let Some(outgoing) = state.queue.pop_front()
        {
            batch.push_bytes(&outgoing.header);
            if let Some(data) = outgoing.data {
                batch.push_lend(data);
            }
        }
        batch
    }

    async fn receive_replies(self: Rc<Self>) {
        let mut inbox = Inbox::new(&self.ring, &self.fd, INBOX_BYTES);
        let why = loop {
            match inbox.array_or_end::<REPLY_BYTES>().await {
                Ok(Some(header)) => {
                    if let Err(why) = self.take_reply(&mut inbox, &header).await {
                        break why;
                    }
                }
                Ok(None) => break "its server closed it".to_owned(),
                Err(error) => break error.to_string(),
            }
        };
        self.task_over(&why);
    }

    async fn take_reply(
        &self,
        inbox: &mut Inbox,
        header: &[u8; REPLY_BYTES],
    ) -> Result<(), String> {
        let answer = self.state.borrow_mut().session.answered(header);
        let answer = answer.map_err(|error| error.to_string())?;
        let Part { op, into } = answer.token;
        let mut result = Ok(());
        let mut filled: Result<(), StreamError> = Ok(());
        match (answer.error, &into) {
            (Some(errno), _) => result = Err(known(errno)),
            (None, Some(target)) => filled = inbox.fill_lent(target).await,
            (None, None) => {}
        }
        drop(into);
        if filled.is_err() {
            result = Err(GONE);
        }
        self.answered(op, result);
        filled.map_err(|error| error.to_string())
    }
}

/// What a server's error means to the engine: what the server cannot do or has no room for, or
/// else that it failed.
fn known(errno: i32) -> Errno {
    match Errno(errno) {
        errno @ (Errno::NO_SPACE | Errno::NOT_SUPPORTED) => errno,
        _ => Errno::IO,
    }
}

/// A member behind the network.
pub(crate) struct PeerDisk(Rc<Link>);

impl PeerDisk {
    /// Binds a connection to the ring that does its I/O. `deadline` is when the engine gives an
    /// operation up: a host that has been silent for longer is gone.
    pub(crate) fn new(
        ring: &Rc<Ring>,
        opened: OpenedPeer,
        deadline: Duration,
        peers: &Peers,
    ) -> Self {
        let fenced = opened.fenced;
        let link = Rc::new(Link {
            ring: Rc::clone(ring),
            fd: Rc::new(opened.fd),
            address: opened.address,
            export: opened.export,
            state: RefCell::default(),
            to_send: Signal::default(),
            tasks: Cell::new(2),
            in_flight: Cell::new(0),
        });
        let silent = u32::try_from((deadline * 2).as_millis()).unwrap_or(u32::MAX);
        // Unix sockets have no such thing; a TCP connection is as good without, only slower to
        // be given up.
        let _ = sockopt::set_tcp_user_timeout(link.fd.as_fd(), silent);
        ring.spawn(Rc::clone(&link).send_requests());
        ring.spawn(Rc::clone(&link).receive_replies());
        peers.add(&link, fenced);
        Self(link)
    }
}

impl Drop for PeerDisk {
    fn drop(&mut self) {
        self.0.say_farewell();
        self.0.end("it is not needed any more");
    }
}

impl Disk for PeerDisk {
    type Buffer = IoBuffer;
    type Op = PeerOp;

    fn submit(&self, request: DiskRequest<IoBuffer>) -> PeerOp {
        let link = &self.0;
        let export = &link.export;
        let (kind, offset, len, fua, span) = match request {
            DiskRequest::Read { offset, span } => {
                (Kind::Read, offset, span.len as u64, false, Some(span))
            }
            DiskRequest::Write { offset, span, fua } => {
                (Kind::Write, offset, span.len as u64, fua, Some(span))
            }
            DiskRequest::Flush => (Kind::Flush, 0, 0, false, None),
            DiskRequest::WriteZeroes { offset, len } if export.has_write_zeroes() => {
                (Kind::WriteZeroes, offset, len, false, None)
            }
            DiskRequest::Discard { offset, len } if export.has_trim() => {
                (Kind::Trim, offset, len, false, None)
            }
            DiskRequest::WriteZeroes { .. } | DiskRequest::Discard { .. } => {
                return PeerOp::Over(Err(Errno::NOT_SUPPORTED));
            }
        };
        let mut state = link.state.borrow_mut();
        if state.ended {
            return PeerOp::Over(Err(GONE));
        }
        if len == 0 && kind != Kind::Flush {
            return PeerOp::Over(Ok(()));
        }
        let op = state.begin(fua && !export.has_fua());
        if kind == Kind::Flush {
            state.ask(op, &Ask::FLUSH, None, None);
        }
        for piece in export.pieces(offset, len) {
            let ask = Ask {
                kind,
                fua: fua && export.has_fua(),
                offset: piece.offset,
                len: piece.len,
            };
            let (into, data) = lends(kind, span.as_ref(), piece.offset - offset, piece.len);
            state.ask(op, &ask, into, data);
        }
        link.in_flight.set(link.in_flight.get() + 1);
        link.to_send.notify();
        PeerOp::Running {
            link: Some(Rc::clone(link)),
            op,
        }
    }

    fn in_flight(&self) -> usize {
        self.0.in_flight.get()
    }

    fn geometry(&self) -> Geometry {
        let export = &self.0.export;
        Geometry {
            size_bytes: export.usable_bytes(),
            logical_block_bytes: export.logical_block_bytes(),
            cheap_zeroes: export.has_write_zeroes(),
            discard: export.has_trim(),
        }
    }
}

/// Lends the part of a span that a piece covers: to be written by a read, to be read by a write.
fn lends(
    kind: Kind,
    span: Option<&Span<IoBuffer>>,
    skip: u64,
    len: u32,
) -> (Option<Lend>, Option<Lend>) {
    let Some(span) = span else {
        return (None, None);
    };
    let start = span.start + usize::try_from(skip).unwrap_or(usize::MAX);
    if kind == Kind::Read {
        (Some(span.buffer.lend_to_writer(start, len as usize)), None)
    } else {
        (None, Some(span.buffer.lend_to_reader(start, len as usize)))
    }
}

/// A running operation on a [`PeerDisk`]. Dropping it leaves an orphan.
pub(crate) enum PeerOp {
    /// The server has it, or will.
    Running {
        /// Taken when the result has been delivered.
        link: Option<Rc<Link>>,
        /// Its place.
        op: u32,
    },
    /// It never went to the server.
    Over(Result<(), Errno>),
}

impl Future for PeerOp {
    type Output = Result<(), Errno>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let (taken, op) = match &mut *self {
            Self::Running { link, op } => (link, *op),
            Self::Over(result) => return Poll::Ready(*result),
        };
        let Some(link) = taken.as_ref() else {
            panic!("an operation is polled after its end")
        };
        let mut state = link.state.borrow_mut();
        match &mut state.ops[op as usize] {
            Op::Running { waker, .. } => {
                match waker {
                    Some(waker) => waker.clone_from(cx.waker()),
                    None => *waker = Some(cx.waker().clone()),
                }
                Poll::Pending
            }
            Op::Done(result) => {
                let result = *result;
                state.release(op);
                drop(state);
                *taken = None;
                Poll::Ready(result)
            }
            Op::Free => panic!("an operation's place was taken from it"),
        }
    }
}

impl Drop for PeerOp {
    fn drop(&mut self) {
        let Self::Running { link, op } = self else {
            return;
        };
        let Some(link) = link.take() else { return };
        let mut state = link.state.borrow_mut();
        match &mut state.ops[*op as usize] {
            Op::Running {
                orphaned, waker, ..
            } => {
                *orphaned = true;
                *waker = None;
            }
            _ => state.release(*op),
        }
    }
}

#[cfg(test)]
#[path = "peer_disk/tests.rs"]
mod tests;
