//! One connection to a peer after another: what is outstanding, and the two tasks that send and
//! receive.
//!
//! ```text
//! submit ─► queue ─► sender ─► connection ─► server ─► connection ─► reader ─► operation's waker
//!             │    many requests in one send              many replies in one receive
//! ```
//!
//! It runs on whatever is a [`Net`]: the daemon's ring and its sockets, or the simulator's network.
//!
//! # What it promises
//!
//! - When a connection brings nonsense, or breaks and no other one may go on in its place, every
//!   outstanding operation fails with [`GONE`], and every later one at once. Nothing is sent again
//!   then.
//! - Another connection goes on where one broke (the states below) only if the server says that it
//!   is the same instance and that it is the same turn ([`crate::claim::Fence`]): then all that was
//!   answered is as it was, nobody else has written, and what was asked before has ended. What was
//!   not answered is asked again, in the order in which it was asked first: a barrier comes before what
//!   has to wait for it. After the deadline all that is outstanding fails, and all that follows, until
//!   such a connection is up after all (`link/going_on.rs`).
//! - Both sides keep the book of barriers ([`mirror::order`]). A change behind one that is known to have
//!   failed is refused here, and a connection on which one was refused is not gone on from: the new
//!   session's book is empty.
//! - An operation that was given up is not asked again: later ones may be to the same blocks (R13).
//!   With the first orphan a connection that has broken, or breaks, has failed.
//! - Operations fail or are asked again only when neither reader nor sender has anything under way
//!   on the old connection; until then the memory that they were lent stays in use (R6).
//! - Where there are several ways to the server, a connection that owes an answer and says nothing
//!   is given up for another way, unless its server answers who asks anew on the same way.
//!
//! # States of a link
//!
//! ```text
//!             ┌─────────── up: what has no answer is asked again ──────────┐
//!             ▼                                                            │
//!   new ──► Up ──broken, no orphans, a fence──► Broken ──both tasks over──► going on; Down when late
//!             │                                   │                        │
//!             │ nonsense, orphans, no fence,      │ an operation is        │ never,
//!             │ not needed any more               │ given up               │ or one is given up
//!             └──────────────► Ended ◄────────────┴────────────────────────┘
//! ```
//!
//! While it is Down all that is asked fails (`link/going_on.rs`).
//!
//! # States of an operation
//!
//! ```text
//!   submit ─► Running ──last reply, or end──► Done ──poll──► Free
//!                │ future dropped              │ future dropped
//!                ▼                             ▼
//!             orphaned ──last reply, or end──► Free
//! ```

mod disk;
mod going_on;
pub mod net;
mod ops;
pub mod reopen;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use mirror::host::Errno;

pub use self::disk::LinkOp;
pub use self::net::{Net, Trouble};
pub use self::reopen::{Opened, Reopened, Unfinished};

use self::net::{Batch as _, Inbox as _};
use self::ops::{InOrder, Op, Part, State};
use crate::claim::Fence;
use crate::export::Export;
use crate::session::{self, Ask};
use crate::signal::Signal;
use crate::wire::REPLY_BYTES;

/// What every operation answers when the connection has failed (ECONNRESET).
pub const GONE: Errno = Errno(104);

/// How long an answer may take at first where there is another way.
const QUIET: Duration = Duration::from_secs(1);
/// Why a link that has broken goes on no more.
const GIVEN_UP: &str = "it has broken, and an operation was given up";
/// Bytes that one receive may bring.
const INBOX_BYTES: usize = 64 << 10;

/// A connection, and those that go on in its place; shared by the disk, its operations and the two
/// tasks.
pub struct Link<N: Net> {
    net: N,
    wire: RefCell<Rc<N::Wire>>,
    address: String,
    export: Export,
    /// Of a server that admits one writer.
    fence: Option<Fence>,
    /// Ways to its server, and the one that is in use.
    ways: Vec<Rc<N::Way>>,
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
    state: RefCell<State<N::Lend>>,
    to_send: Signal,
    /// Of reader and sender, those that may have something under way on the connection.
    tasks: Cell<u8>,
    in_flight: Cell<usize>,
}

impl<N: Net> Link<N> {
    /// Begins to use a connection. Another one may go on in its place on any of these ways, within
    /// `deadline`, which is when the engine gives an operation up: a host that has been silent for
    /// twice as long is gone.
    pub fn new(net: N, opened: Opened<N::Wire>, ways: Vec<N::Way>, deadline: Duration) -> Rc<Self> {
        let since = Cell::new(net.now());
        let link = Rc::new(Self {
            net,
            wire: RefCell::new(Rc::new(opened.wire)),
            address: opened.address,
            export: opened.export,
            fence: opened.fence,
            ways: ways.into_iter().map(Rc::new).collect(),
            way: Cell::new(0),
            going_on: Cell::new(false),
            replies: Cell::new(0),
            quiet: Cell::new(QUIET),
            since,
            deadline,
            state: RefCell::default(),
            to_send: Signal::default(),
            tasks: Cell::new(0),
            in_flight: Cell::new(0),
        });
        link.begin();
        link
    }

    /// Where it leads to.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What is exported there.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// Of a server that admits one writer.
    pub fn fence(&self) -> Option<Fence> {
        self.fence
    }

    /// Operations without a result, orphans included.
    pub fn in_flight(&self) -> usize {
        self.in_flight.get()
    }

    /// Begins an operation of these requests, each with the memory that its data go to or come
    /// from; `then_flush` adds a flush after the last reply. Each may be a barrier.
    fn begin_op(
        &self,
        then_flush: bool,
        barrier: bool,
        requests: impl Iterator<Item = (Ask, Option<N::Lend>, Option<N::Lend>)>,
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
    fn poll(&self, op: u32, cx: &mut Context<'_>) -> Poll<Result<(), Errno>> {
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
    fn abandon(&self, op: u32) {
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
    pub fn leave(&self) {
        self.say_farewell();
        self.state.borrow_mut().leaving = true;
        if self.in_flight.get() > 0 || self.state.borrow().broken {
            self.end("the daemon ends");
        }
    }

    /// Whether it has ended, or something failed because it was down, or it has ever owed an answer
    /// for longer than anybody waited.
    pub fn has_failed(&self) -> bool {
        let state = self.state.borrow();
        // What failed then may not have been judged yet.
        let lately = |up: Duration| self.net.now() < up + self.deadline * 2;
        state.ended || state.down || state.gave_up || state.up_again.is_some_and(lately)
    }

    /// Whether an operation was ever given up before its answer was there.
    pub fn has_given_up(&self) -> bool {
        self.state.borrow().gave_up
    }

    /// Whether nothing of it is left, a connection that is tried included.
    pub fn is_closed(&self) -> bool {
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
    pub fn say_farewell(&self) {
        if !self.state.borrow().is_over() && self.in_flight.get() == 0 {
            let wire = Rc::clone(&self.wire.borrow());
            self.net.say_last(&wire, &session::farewell());
        }
    }

    /// Ends the connection for good. Outstanding operations fail when both tasks have seen it.
    pub fn end(&self, why: &str) {
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

    /// Makes what is under way on the connection complete.
    fn shut_down(&self) {
        let wire = Rc::clone(&self.wire.borrow());
        self.net.shut_down(&wire);
        self.to_send.notify();
    }

    /// Nothing more comes of this connection.
    fn break_off(&self, why: &str) {
        if !std::mem::replace(&mut self.state.borrow_mut().broken, true) {
            tracing::warn!("the connection to {} has broken: {why}", self.address);
        }
        self.shut_down();
    }

    /// A task has nothing under way on the connection any more.
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
            self.net.spawn(Rc::clone(self).go_on());
        }
    }

    /// Every outstanding operation fails.
    fn give_up(&self) {
        let parts = self.state.borrow_mut().take_parts();
        self.fail(parts);
    }

    fn fail(&self, parts: Vec<Part<N::Lend>>) {
        for part in parts {
            let Part { op, into, data, .. } = part;
            drop((into, data));
            self.answered(op, Err(GONE));
        }
    }

    /// Begins to use the connection there is.
    fn begin(self: &Rc<Self>) {
        let silent = self.deadline * 2;
        let wire = Rc::clone(&self.wire.borrow());
        self.net.begin(&wire, silent);
        self.tasks.set(2);
        self.since.set(self.net.now());
        self.to_send.notify();
        self.net.spawn(Rc::clone(self).send_requests());
        self.net.spawn(Rc::clone(self).receive_replies());
        if self.ways.len() > 1 {
            self.net.spawn(Rc::clone(self).watch());
        }
    }

    async fn send_requests(self: Rc<Self>) {
        let wire = Rc::clone(&self.wire.borrow());
        let trouble = loop {
            if self.state.borrow().is_over() {
                break Trouble::Broken(String::new());
            }
            let batch = self.gather();
            if batch.is_empty() {
                self.to_send.wait().await;
            } else if let Err(trouble) = self.net.send(&wire, batch).await {
                break trouble;
            }
        };
        self.task_over(&trouble);
    }

    /// The requests that wait, as far as they fit into one system call.
    fn gather(&self) -> N::Batch {
        let mut batch = N::Batch::default();
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
        let mut inbox = self.net.inbox(&wire, INBOX_BYTES);
        let trouble = loop {
            match inbox.array_or_end::<REPLY_BYTES>().await {
                Ok(Some(header)) => {
                    if let Err(trouble) = self.take_reply(&mut inbox, &header).await {
                        break trouble;
                    }
                }
                Ok(None) => break Trouble::Broken("its server closed it".to_owned()),
                Err(trouble) => break trouble,
            }
        };
        self.task_over(&trouble);
    }

    async fn take_reply(
        &self,
        inbox: &mut N::Inbox,
        header: &[u8; REPLY_BYTES],
    ) -> Result<(), Trouble> {
        let answer = self.state.borrow_mut().session.answered(header);
        let answer = answer.map_err(|error| Trouble::Nonsense(error.to_string()))?;
        let part = answer.token;
        let result = answer.error.map_or(Ok(()), |errno| Err(known(errno)));
        if let (Ok(()), Some(target)) = (result, &part.into)
            && let Err(trouble) = inbox.fill_lent(target).await
        {
            self.state.borrow_mut().unanswered = Some(part);
            return Err(trouble);
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
