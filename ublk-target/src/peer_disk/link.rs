//! One connection to a peer after another: what is outstanding, and the two tasks that send and
//! receive. What it promises stands in the parent module.

mod going_on;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use mirror::host::Errno;
use mirror::order::{Order, Ticket};
use peer::claim::Fence;
use peer::wire::{REPLY_BYTES, REQUEST_BYTES};
use peer::{Ask, Export, Rank, Session};
use rustix::net::{Shutdown, sockopt};

use super::GONE;
use super::Trouble;
use super::opened::{OpenedPeer, Way};
use crate::batch::Batch;
use crate::ring::{self, Ring};
use crate::signal::Signal;
use crate::stream::{Inbox, Wire};
use crate::sys::Lend;

/// How long an answer may take at first where there is another way.
const QUIET: Duration = Duration::from_secs(1);
/// Why a link that has broken goes on no more.
const GIVEN_UP: &str = "it has broken, and an operation was given up";
/// Bytes that one receive may bring.
const INBOX_BYTES: usize = 64 << 10;

/// A part of an operation that waits for a reply.
struct Part {
    op: u32,
    ask: Ask,
    /// Where a read's data go.
    into: Option<Lend>,
    /// A write's data, which may have to be sent again.
    data: Option<Lend>,
    /// How many were asked before it: what is asked again is asked in this order.
    number: u64,
    order: InOrder,
}

/// What a part has to do with barriers.
#[derive(Clone, Copy)]
enum InOrder {
    Barrier,
    /// It is behind some.
    Behind(Ticket),
    Any,
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
        /// The barriers that its requests are.
        barriers: Range<u64>,
    },
    Done(Result<(), Errno>, Range<u64>),
}

#[derive(Default)]
struct State {
    session: Session<Part>,
    queue: VecDeque<Outgoing>,
    ops: Vec<Op>,
    free: Vec<u32>,
    /// Whose reply was begun when the connection broke.
    unanswered: Option<Part>,
    asked: u64,
    /// The book of barriers that the server keeps as well.
    order: Order,
    orphans: usize,
    /// There was one at some time.
    gave_up: bool,
    /// The connection has failed: another one may go on in its place.
    broken: bool,
    /// So long ago that nobody waits any more: all that is asked fails, until there is another one.
    down: bool,
    /// When it came up after it had been down.
    up_again: Option<Duration>,
    /// Its server is expected to close it.
    leaving: bool,
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

    fn ask(
        &mut self,
        op: u32,
        mut ask: Ask,
        into: Option<Lend>,
        data: Option<Lend>,
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

    fn send(&mut self, part: Part) {
        let (ask, data) = (part.ask, part.data.as_ref().map(Lend::again));
        let header = self.session.ask(&ask, part);
        self.queue.push_back(Outgoing { header, data });
    }

    /// Takes all parts that have no reply, in the order in which they were asked: a barrier comes
    /// before what has to wait for it.
    fn take_parts(&mut self) -> Vec<Part> {
        self.queue.clear();
        let begun = self.unanswered.take();
        let mut parts: Vec<Part> = begun.into_iter().chain(self.session.give_up()).collect();
        parts.sort_unstable_by_key(|part| part.number);
        parts
    }

    /// Whether the server refuses that part, or will: a barrier before it has failed.
    fn is_refused(&self, part: &Part) -> bool {
        match part.order {
            InOrder::Behind(ticket) => self.order.has_failed(ticket),
            InOrder::Barrier | InOrder::Any => false,
        }
    }

    /// Nobody relies any more on what has no result yet.
    fn barriers_over(&mut self, barriers: Range<u64>, well: bool) {
        for number in barriers {
            self.order.barrier_ended(number, well);
        }
    }

    /// Nothing more will be sent on the connection there is.
    fn is_over(&self) -> bool {
        self.ended || self.broken
    }

    fn release(&mut self, op: u32) {
        self.ops[op as usize] = Op::Free;
        self.free.push(op);
    }
}

/// A connection, and those that go on in its place; shared by the disk, its operations and the two
/// tasks.
pub(crate) struct Link {
    ring: Rc<Ring>,
    wire: RefCell<Rc<Wire>>,
    pub(super) address: String,
    pub(super) export: Export,
    /// Of a server that admits one writer.
    pub(super) fence: Option<Fence>,
    /// Ways to its server, and the one that is in use.
    ways: Vec<Way>,
    way: Cell<usize>,
    /// Whether another connection is sought.
    going_on: Cell<bool>,
    /// Replies that have come, and how long the next one may take before another way is tried.
    replies: Cell<u64>,
    quiet: Cell<Duration>,
    /// When this connection came up.
    since: Cell<Duration>,
    /// How long another connection may take to come up; twice that, and a silent host is gone.
    deadline: Duration,
    state: RefCell<State>,
    to_send: Signal,
    /// Of reader and sender, those that may have something under way in the kernel.
    tasks: Cell<u8>,
    pub(super) in_flight: Cell<usize>,
}

impl Link {
    /// Binds a connection to the ring that does its I/O.
    pub(super) fn new(
        ring: &Rc<Ring>,
        opened: OpenedPeer,
        ways: Vec<Way>,
        deadline: Duration,
    ) -> Rc<Self> {
        let link = Rc::new(Self {
            ring: Rc::clone(ring),
            wire: RefCell::new(Rc::new(Wire::new(opened.fd, opened.tls))),
            address: opened.address,
            export: opened.export,
            fence: opened.fence,
            ways,
            way: Cell::new(0),
            going_on: Cell::new(false),
            replies: Cell::new(0),
            quiet: Cell::new(QUIET),
            since: Cell::new(ring::now()),
            deadline,
            state: RefCell::default(),
            to_send: Signal::default(),
            tasks: Cell::new(0),
            in_flight: Cell::new(0),
        });
        link.begin();
        link
    }

    /// Begins an operation of these requests, each with the memory that its data go to or come
    /// from; `then_flush` adds a flush after the last reply. Each may be a barrier.
    pub(super) fn submit(
        &self,
        then_flush: bool,
        barrier: bool,
        requests: impl Iterator<Item = (Ask, Option<Lend>, Option<Lend>)>,
    ) -> Result<u32, Errno> {
        let mut state = self.state.borrow_mut();
        if state.ended || state.down {
            return Err(GONE);
        }
        let mut requests = requests.peekable();
        let changes = requests.peek().is_some_and(|(ask, ..)| ask.kind.changes());
        if changes && !barrier && state.order.refuses() {
            return Err(Errno::IO);
        }
        let op = state.begin(then_flush);
        for (ask, into, data) in requests {
            state.ask(op, ask, into, data, barrier);
        }
        self.in_flight.set(self.in_flight.get() + 1);
        self.to_send.notify();
        Ok(op)
    }

    /// The result of an operation, which takes it.
    pub(super) fn poll(&self, op: u32, cx: &mut Context<'_>) -> Poll<Result<(), Errno>> {
        let mut state = self.state.borrow_mut();
        match &mut state.ops[op as usize] {
            Op::Running { waker, .. } => {
                match waker {
                    Some(waker) => waker.clone_from(cx.waker()),
                    None => *waker = Some(cx.waker().clone()),
                }
                Poll::Pending
            }
            Op::Done(result, barriers) => {
                let (result, barriers) = (*result, barriers.clone());
                state.barriers_over(barriers, result.is_ok());
                state.release(op);
                Poll::Ready(result)
            }
            Op::Free => panic!("an operation's place was taken from it"),
        }
    }

    /// Nobody waits for an operation any more: it becomes an orphan unless it is over.
    pub(super) fn abandon(&self, op: u32) {
        let mut state = self.state.borrow_mut();
        match &mut state.ops[op as usize] {
            Op::Running {
                orphaned, waker, ..
            } => {
                *orphaned = true;
                *waker = None;
                state.orphans += 1;
                state.gave_up = true;
            }
            Op::Done(result, barriers) => {
                let (result, barriers) = (*result, barriers.clone());
                state.barriers_over(barriers, result.is_ok());
                return state.release(op);
            }
            Op::Free => return state.release(op),
        }
        let broken = state.broken;
        drop(state);
        if broken {
            self.end(GIVEN_UP);
        }
    }

    /// Ends the session, and says so where it can be said: then its server closes it.
    pub(super) fn leave(&self) {
        self.say_farewell();
        self.state.borrow_mut().leaving = true;
        if self.in_flight.get() > 0 || self.state.borrow().broken {
            self.end("the daemon ends");
        }
    }

    /// Whether it has ended, or something failed because it was down, or it has ever owed an answer
    /// for longer than anybody waited.
    pub(super) fn has_failed(&self) -> bool {
        let state = self.state.borrow();
        // What failed then may not have been judged yet.
        let lately = |up: Duration| ring::now() < up + self.deadline * 2;
        state.ended || state.down || state.gave_up || state.up_again.is_some_and(lately)
    }

    /// Whether nothing of it is left, a connection that is tried included.
    pub(super) fn is_closed(&self) -> bool {
        self.tasks.get() == 0 && !self.going_on.get()
    }

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
            barriers,
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
                state.ask(op, Ask::FLUSH, None, None, false);
                self.to_send.notify();
                return;
            }
            *result = Err(GONE);
        }
        let (result, orphaned, waker) = (*result, *orphaned, waker.take());
        let barriers = barriers.clone();
        self.in_flight.set(self.in_flight.get() - 1);
        if orphaned {
            state.orphans -= 1;
            state.barriers_over(barriers, result.is_ok());
            state.release(op);
        } else {
            state.ops[op as usize] = Op::Done(result, barriers);
        }
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Tells the server that nothing follows. Only a courtesy, but one that it answers by closing:
    /// it notices the end of the stream as well.
    pub(super) fn say_farewell(&self) {
        if !self.state.borrow().is_over() && self.in_flight.get() == 0 {
            self.wire.borrow().say_last(&peer::session::farewell());
        }
    }

    /// Ends the connection for good. Outstanding operations fail when both tasks have seen it.
    pub(super) fn end(&self, why: &str) {
        if std::mem::replace(&mut self.state.borrow_mut().ended, true) {
            return;
        }
        if self.in_flight.get() > 0 {
            tracing::warn!("the connection to {} has ended: {why}", self.address);
        } else {
            tracing::info!("the connection to {} has ended: {why}", self.address);
        }
        self.shut_down();
        if self.tasks.get() == 0 {
            self.give_up();
        }
    }

    /// Makes what is under way in the kernel complete.
    fn shut_down(&self) {
        let _ = rustix::net::shutdown(self.wire.borrow().as_fd(), Shutdown::Both);
        self.to_send.notify();
    }

    /// Nothing more comes of this connection.
    fn break_off(&self, why: &str) {
        if !std::mem::replace(&mut self.state.borrow_mut().broken, true) {
            tracing::warn!("the connection to {} has broken: {why}", self.address);
        }
        self.shut_down();
    }

    /// A task has nothing under way in the kernel any more.
    fn task_over(self: &Rc<Self>, trouble: &Trouble) {
        match trouble {
            Trouble::Broken(why) if self.may_go_on() => self.break_off(why),
            Trouble::Broken(why) | Trouble::Nonsense(why) => self.end(why),
        }
        self.tasks.set(self.tasks.get() - 1);
        if self.tasks.get() > 0 {
            return;
        }
        if self.state.borrow().ended {
            self.give_up();
        } else {
            self.ring.spawn(Rc::clone(self).go_on());
        }
    }

    /// Every outstanding operation fails.
    fn give_up(&self) {
        let parts = self.state.borrow_mut().take_parts();
        self.fail(parts);
    }

    fn fail(&self, parts: Vec<Part>) {
        for part in parts {
            let Part { op, into, data, .. } = part;
            drop((into, data));
            self.answered(op, Err(GONE));
        }
    }

    /// Begins to use the connection there is.
    fn begin(self: &Rc<Self>) {
        let silent = u32::try_from((self.deadline * 2).as_millis()).unwrap_or(u32::MAX);
        // Unix sockets have no such thing; a TCP connection is as good without, only slower to
        // be given up.
        let _ = sockopt::set_tcp_user_timeout(self.wire.borrow().as_fd(), silent);
        self.tasks.set(2);
        self.since.set(ring::now());
        self.to_send.notify();
        self.ring.spawn(Rc::clone(self).send_requests());
        self.ring.spawn(Rc::clone(self).receive_replies());
        if self.ways.len() > 1 {
            self.ring.spawn(Rc::clone(self).watch());
        }
    }

    async fn send_requests(self: Rc<Self>) {
        let wire = Rc::clone(&self.wire.borrow());
        let trouble = loop {
            if self.state.borrow().is_over() {
                break Trouble::Broken(String::new());
            }
            let batch = self.gather();
            if batch.bytes() == 0 {
                self.to_send.wait().await;
            } else if let Err(error) = wire.send(&self.ring, batch).await {
                break error.into();
            }
        };
        self.task_over(&trouble);
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
        let wire = Rc::clone(&self.wire.borrow());
        let mut inbox = wire.inbox(&self.ring, INBOX_BYTES);
        let trouble = loop {
            match inbox.array_or_end::<REPLY_BYTES>().await {
                Ok(Some(header)) => {
                    if let Err(trouble) = self.take_reply(&mut inbox, &header).await {
                        break trouble;
                    }
                }
                Ok(None) => break Trouble::Broken("its server closed it".to_owned()),
                Err(error) => break error.into(),
            }
        };
        self.task_over(&trouble);
    }

    async fn take_reply(
        &self,
        inbox: &mut Inbox,
        header: &[u8; REPLY_BYTES],
    ) -> Result<(), Trouble> {
        let answer = self.state.borrow_mut().session.answered(header);
        let answer = answer.map_err(|error| Trouble::Nonsense(error.to_string()))?;
        let part = answer.token;
        let result = answer.error.map_or(Ok(()), |errno| Err(known(errno)));
        if let (Ok(()), Some(target)) = (result, &part.into)
            && let Err(error) = inbox.fill_lent(target).await
        {
            self.state.borrow_mut().unanswered = Some(part);
            return Err(error.into());
        }
        if matches!(part.order, InOrder::Barrier) && result.is_err() {
            self.state.borrow_mut().order.barrier_failed();
        }
        let Part { op, into, data, .. } = part;
        drop((into, data));
        self.replies.set(self.replies.get() + 1);
        self.answered(op, result);
        Ok(())
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
