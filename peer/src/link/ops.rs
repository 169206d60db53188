//! What is outstanding on a link: operations, the requests that they are cut into, and those that
//! wait to be sent.

use std::collections::VecDeque;
use std::ops::Range;
use std::task::Waker;
use std::time::Duration;

use mirror::host::Errno;
use mirror::order::{Order, Ticket};

use super::net::Lend;
use crate::session::{Ask, Rank, Session};
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
    pub(super) order: InOrder,
}

/// What a part has to do with barriers.
#[derive(Clone, Copy)]
pub(super) enum InOrder {
    Barrier,
    /// It is behind some.
    Behind(Ticket),
    Any,
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
        /// The barriers that its requests are.
        barriers: Range<u64>,
    },
    Done(Result<(), Errno>, Range<u64>),
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
    /// So long ago that nobody waits any more: all that is asked fails, until there is another one.
    pub(super) down: bool,
    /// When it came up after it had been down.
    pub(super) up_again: Option<Duration>,
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
            down: false,
            up_again: None,
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
            barriers: 0..0,
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

    pub(super) fn ask(
        &mut self,
        op: u32,
        mut ask: Ask,
        into: Option<L>,
        data: Option<L>,
        barrier: bool,
    ) {
        let Op::Running { left, barriers, .. } = &mut self.ops[op as usize] else {
            return;
        };
        *left += 1;
        let open = self.order.is_open();
        let order = if barrier {
            ask.rank = Rank::Barrier { first: !open };
            let number = self.order.barrier_begins(!open);
            if barriers.is_empty() {
                barriers.start = number;
            }
            barriers.end = number + 1;
            InOrder::Barrier
        } else if open && ask.kind.changes() {
            ask.rank = Rank::Behind;
            InOrder::Behind(self.order.ticket())
        } else {
            InOrder::Any
        };
        self.asked += 1;
        self.send(Part {
            op,
            ask,
            into,
            data,
            number: self.asked,
            order,
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

    /// Whether the server refuses that part, or will: a barrier before it has failed.
    pub(super) fn is_refused(&self, part: &Part<L>) -> bool {
        match part.order {
            InOrder::Behind(ticket) => self.order.has_failed(ticket),
            InOrder::Barrier | InOrder::Any => false,
        }
    }

    /// Nobody relies any more on what has no result yet.
    pub(super) fn barriers_over(&mut self, barriers: Range<u64>, well: bool) {
        for number in barriers {
            self.order.barrier_ended(number, well);
        }
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
