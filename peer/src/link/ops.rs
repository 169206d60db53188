//! What is outstanding on a link: operations, the requests that they are cut into, and those that
//! wait to be sent.

use std::collections::VecDeque;
use std::task::Waker;

use mirror::host::Errno;
use mirror::order::{Order, Turn};

use super::net::Lend;
use crate::session::{Ask, Session};
use crate::wire::REQUEST_BYTES;

/// A part of an operation that waits for a reply.
pub(super) struct Part<L> {
    pub(super) op: u32,
    pub(super) ask: Ask,
    /// Where a read's data go.
    pub(super) into: Option<L>,
    /// A write's data, which may have to be sent again.
    pub(super) data: Option<L>,
    /// How many were asked before it: what is asked again is asked in this order.
    number: u64,
    /// Of a barrier its number, of a change its ticket.
    pub(super) place: u64,
}

/// A request that waits to be sent.
pub(super) struct Outgoing<L> {
    pub(super) header: [u8; REQUEST_BYTES],
    pub(super) data: Option<L>,
}

pub(super) enum Op {
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

/// What is outstanding, and what has become of the connection.
pub(super) struct State<L> {
    pub(super) session: Session<Part<L>>,
    pub(super) queue: VecDeque<Outgoing<L>>,
    pub(super) ops: Vec<Op>,
    free: Vec<u32>,
    /// Whose reply was begun when the connection broke.
    pub(super) unanswered: Option<Part<L>>,
    asked: u64,
    /// The book of barriers that the server keeps as well.
    pub(super) order: Order,
    pub(super) orphans: usize,
    /// There was one at some time.
    pub(super) gave_up: bool,
    /// The connection has failed: another one may go on in its place.
    pub(super) broken: bool,
    /// Its server is expected to close it.
    pub(super) leaving: bool,
    /// Nothing is sent or asked any more.
    pub(super) ended: bool,
}

impl<L> Default for State<L> {
    fn default() -> Self {
        Self {
            session: Session::default(),
            queue: VecDeque::new(),
            ops: Vec::new(),
            free: Vec::new(),
            unanswered: None,
            asked: 0,
            order: Order::default(),
            orphans: 0,
            gave_up: false,
            broken: false,
            leaving: false,
            ended: false,
        }
    }
}

impl<L: Lend> State<L> {
    pub(super) fn begin(&mut self, then_flush: bool) -> u32 {
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

    pub(super) fn ask(&mut self, op: u32, ask: &Ask, into: Option<L>, data: Option<L>) {
        if let Op::Running { left, .. } = &mut self.ops[op as usize] {
            *left += 1;
        }
        let place = if ask.barrier {
            self.order.barrier_begins()
        } else {
            self.order.ticket()
        };
        self.asked += 1;
        self.send(Part {
            op,
            ask: *ask,
            into,
            data,
            number: self.asked,
            place,
        });
    }

    pub(super) fn send(&mut self, part: Part<L>) {
        let (ask, data) = (part.ask, part.data.as_ref().map(Lend::again));
        let header = self.session.ask(&ask, part);
        self.queue.push_back(Outgoing { header, data });
    }

    /// Takes all parts that have no reply, in the order in which they were asked: a barrier comes
    /// before what has to wait for it.
    pub(super) fn take_parts(&mut self) -> Vec<Part<L>> {
        self.queue.clear();
        let begun = self.unanswered.take();
        let mut parts: Vec<Part<L>> = begun.into_iter().chain(self.session.give_up()).collect();
        parts.sort_unstable_by_key(|part| part.number);
        parts
    }

    /// Whether the server has refused that part, and only its reply is lost.
    pub(super) fn is_refused(&self, part: &Part<L>) -> bool {
        let waits = part.ask.kind.changes() && !part.ask.barrier;
        waits && self.order.turn(part.place) == Turn::Refused
    }

    /// Nothing more will be sent on the connection there is.
    pub(super) fn is_over(&self) -> bool {
        self.ended || self.broken
    }

    pub(super) fn release(&mut self, op: u32) {
        self.ops[op as usize] = Op::Free;
        self.free.push(op);
    }
}
