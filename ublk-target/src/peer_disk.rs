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
//!   outstanding operation fails with [`peer::link::GONE`], and every later one at once. Nothing is sent
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
//! All of that is a link's ([`peer::link`], with the states), which the simulator runs on a network of
//! its own; here are its sockets and its memory (`net.rs`), what is looked at before a connection is
//! used (`opened.rs`), and what the daemon knows of its peers (`peers.rs`).

mod net;
mod opened;
mod peers;
mod sums;

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use mirror::host::{Disk, DiskRequest, Geometry, SumsOp};
use peer::link::{Link, LinkOp};

use self::net::RingNet;
pub(crate) use self::opened::OpenedPeer;
pub(crate) use self::peers::{Peers, Turn, one_form};
use self::sums::Sums;
use crate::ring::Ring;
use crate::sys::IoBuffer;

/// A running operation on a [`PeerDisk`]. Dropping it leaves an orphan.
pub(crate) type PeerOp = LinkOp<RingNet>;

/// A member behind the network, what to tell when its connection has failed, and where checksums of
/// its blocks can be asked for, if its server is one of ours.
pub(crate) struct PeerDisk(Rc<Link<RingNet>>, Rc<Cell<bool>>, Option<Rc<Sums>>);

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
        let link = Link::new(
            RingNet(Rc::clone(ring)),
            RingNet::bind(opened),
            ways,
            deadline,
        );
        peers.add(&link);
        Self(link, cut_off, sums)
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
        self.0.submit(request)
    }

    fn submit_barrier(&self, request: DiskRequest<IoBuffer>) -> PeerOp {
        self.0.submit_barrier(request)
    }

    fn in_flight(&self) -> usize {
        self.0.in_flight()
    }

    fn sums(&self, offset: u64, blocks: usize) -> Option<SumsOp> {
        self.2.as_ref()?.ask(offset, blocks)
    }

    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }
}

#[cfg(test)]
#[path = "peer_disk/tests.rs"]
mod tests;
