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
//!   again and nobody connects anew: the member returns by the operator's order, and each return is
//!   a loss and a return (R14). An ordinary server cannot be asked to end the old session first
//!   (R13).
//! - One of ours has done so before it admits the new one: a member whose session such a server
//!   granted is called *fenced*. When its connection breaks, but not when it brings nonsense, another
//!   one goes on in its place, for as long as the deadline: if the server is the same one, and nobody
//!   else had the right to write meanwhile, and no flush failed, then all that was answered is as it
//!   was, and what was not answered is asked again. (What was asked before has ended: the server has
//!   seen to that. It did then what it is asked now, or nothing.) There may be several ways to a
//!   server: then a connection that owes an answer and says nothing is given up as well. An
//!   operation that was given up must not be asked again, later ones may be to the same blocks:
//!   with the first orphan such a connection has failed. After the deadline all that is outstanding
//!   fails, and all that follows, until such a connection is up after all (`link/going_on.rs`).
//! - After an unclean end of a session a start uses a peer only if the server that it meets is the
//!   very one that served that session, and has ended it: each copy of a superblock names the
//!   instance through which it was written. For any other server, one of ours that was restarted
//!   included, it takes the operator's word: what counts is the server that served the session, and
//!   the one that is met may be another, on the same disk (R13).
//! - An operation whose future was dropped, an orphan, goes on. The data of its read go into its
//!   own buffer, which stays in use until its reply has come in full, or until the connection is
//!   dead and neither reader nor sender has anything under way in the kernel (R6). Only then
//!   outstanding operations fail.
//! - Without FUA, a FUA write is a write and then a flush (R7). Without WRITE_ZEROES or TRIM
//!   those answer `EOPNOTSUPP`.
//!
//! A scrub asks a server of ours for checksums of blocks, on another connection (`sums.rs`).
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

mod link;
mod opened;
mod peers;
mod sums;

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use mirror::host::{Disk, DiskRequest, Errno, Geometry, Span, SumsOp};
use peer::{Ask, Kind, Rank};

use self::link::Link;
pub(crate) use self::opened::OpenedPeer;
pub(crate) use self::peers::{Peers, Turn, one_form};
use self::sums::Sums;
use crate::ring::Ring;
use crate::stream::StreamError;
use crate::sys::{IoBuffer, Lend};

/// What every operation answers when the connection has failed (ECONNRESET).
pub(crate) const GONE: Errno = Errno(104);

/// What a task of a connection ends with.
enum Trouble {
    /// The connection has failed.
    Broken(String),
    /// The other end is not to be understood.
    Nonsense(String),
}

impl From<StreamError> for Trouble {
    fn from(error: StreamError) -> Self {
        match error {
            // Who tampers with a connection can end it: another one is as safe.
            StreamError::Closed | StreamError::Socket(_) | StreamError::Tls(_) => {
                Self::Broken(error.to_string())
            }
            StreamError::Protocol(_) => Self::Nonsense(error.to_string()),
        }
    }
}

/// A member behind the network, what to tell when its connection has failed, and where checksums of
/// its blocks can be asked for, if its server is one of ours.
pub(crate) struct PeerDisk(Rc<Link>, Rc<Cell<bool>>, Option<Rc<Sums>>);

impl PeerDisk {
    /// Binds a connection to the ring that does its I/O. `deadline` is when the engine gives an
    /// operation up: a host that has been silent for longer is gone.
    pub(crate) fn new(
        ring: &Rc<Ring>,
        opened: OpenedPeer,
        deadline: Duration,
        peers: &Peers,
    ) -> Self {
        let ways = peers.ways_to(&opened, deadline);
        let cut_off = peers.cut_off(&opened.address);
        let sums = peers.sums_of(ring, &opened, deadline);
        let link = Link::new(ring, opened, ways, deadline);
        peers.add(&link);
        Self(link, cut_off, sums)
    }

    /// Asks the server; `barrier` only where it keeps order.
    fn ask(&self, request: DiskRequest<IoBuffer>, barrier: bool) -> PeerOp {
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
        if len == 0 && kind != Kind::Flush {
            return PeerOp::Over(Ok(()));
        }
        let flush = (kind == Kind::Flush).then_some((Ask::FLUSH, None, None));
        let pieces = export.pieces(offset, len).map(|piece| {
            let ask = Ask {
                kind,
                fua: fua && export.has_fua(),
                rank: Rank::Any,
                offset: piece.offset,
                len: piece.len,
            };
            let (into, data) = lends(kind, span.as_ref(), piece.offset - offset, piece.len);
            (ask, into, data)
        });
        let then_flush = fua && !export.has_fua();
        let op = match link.submit(then_flush, barrier, flush.into_iter().chain(pieces)) {
            Ok(op) => op,
            Err(errno) => return PeerOp::Over(Err(errno)),
        };
        PeerOp::Running {
            link: Some(Rc::clone(link)),
            op,
        }
    }
}

impl Drop for PeerDisk {
    fn drop(&mut self) {
        // Whoever has failed otherwise has a connection still.
        if self.0.has_failed() {
            self.1.set(true);
        }
        if let Some(sums) = &self.2 {
            sums.end();
        }
        self.0.say_farewell();
        self.0.end("it is not needed any more");
    }
}

impl Disk for PeerDisk {
    type Buffer = IoBuffer;
    type Op = PeerOp;

    fn submit(&self, request: DiskRequest<IoBuffer>) -> PeerOp {
        self.ask(request, false)
    }

    fn submit_barrier(&self, request: DiskRequest<IoBuffer>) -> PeerOp {
        self.ask(request, self.geometry().keeps_order)
    }

    fn in_flight(&self) -> usize {
        self.0.in_flight.get()
    }

    fn sums(&self, offset: u64, blocks: usize) -> Option<SumsOp> {
        self.2.as_ref()?.ask(offset, blocks)
    }

    fn geometry(&self) -> Geometry {
        let export = &self.0.export;
        Geometry {
            size_bytes: export.usable_bytes(),
            logical_block_bytes: export.logical_block_bytes(),
            cheap_zeroes: export.has_write_zeroes(),
            discard: export.has_trim(),
            behind_network: true,
            server_instance: self.0.fence.map(|it| it.instance),
            // A write is a barrier by itself, or not at all.
            keeps_order: self.0.fence.is_some_and(|it| it.keeps_order) && export.has_fua(),
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
        let result = link.poll(op, cx);
        if result.is_ready() {
            *taken = None;
        }
        result
    }
}

impl Drop for PeerOp {
    fn drop(&mut self) {
        let Self::Running { link, op } = self else {
            return;
        };
        if let Some(link) = link.take() {
            link.abandon(*op);
        }
    }
}

#[cfg(test)]
#[path = "peer_disk/tests.rs"]
mod tests;
