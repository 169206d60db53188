//! A second connection to the server of a peer member, on which nothing but checksums of blocks is
//! asked for: a scrub of that member then moves them and not the data.
//!
//! ```text
//!          first question               connected
//! Down ───────────────────► Connecting ───────────► Up ─┐ nothing asked for a minute
//!  ▲ a minute after a failure   │ failed               │ failed, errors, or no answer in time
//!  └────────────────────────────┴───────────────────────┘
//! ```
//!
//! # What it promises
//!
//! - It claims nothing and writes nothing: no session ends by it, and the writer's connection
//!   ([`peer::link`]) knows nothing of it. It lends no memory, so that nothing of it can be an orphan.
//! - Only the very server that serves the writer's session is believed: any other one may have
//!   another disk. Others, those without checksums, errors, and what makes no sense all mean that
//!   checksums are not to be had; the engine then reads.
//! - Nobody waits for longer than two seconds for an answer, connecting included. A question without
//!   one ends the connection, and after each failure nothing is asked for a minute.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future as _, poll_fn};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use mirror::SumsOp;
use peer::claim::Fence;
use peer::server::Peer as _;
use peer::structured::{Brings, decode_chunk, decode_sums};
use peer::tls::Tls;
use peer::wire::{CHUNK_BYTES, REQUEST_BYTES, SUM_BLOCK_BYTES, SUMS_MAX};
use peer::{Address, Ask, Client, Kind, Rank, Session};
use rustix::net::Shutdown;

use crate::batch::Batch;
use crate::ring::{self, Ring};
use crate::stream::{Inbox, StreamError, Wire};
use peer::signal::Signal;

/// After a failure nothing is tried for so long; a connection that is not used ends as soon.
const MINUTE: Duration = Duration::from_secs(60);
/// Longest wait for an answer: whoever asks holds up others meanwhile, and can read instead.
const PATIENCE: Duration = Duration::from_secs(2);
/// Most questions without an answer.
const QUESTIONS_MAX: usize = 64;
/// After so many answers in a row without checksums it is of no use for a while.
const REFUSALS_MAX: u32 = 8;
/// Bytes that one receive may bring.
const INBOX_BYTES: usize = 16 << 10;

/// Connects, or says why not. May block.
pub(super) type Connect = Arc<dyn Fn() -> Result<(OwnedFd, Option<Tls>), String> + Send + Sync>;

/// Connects on the first of these addresses behind which the server of that instance exports so many
/// bytes.
pub(super) fn connect_to(
    addresses: Vec<Address>,
    wanted: Fence,
    size_bytes: u64,
    patience: Duration,
) -> Connect {
    Arc::new(move || {
        let mut why = String::new();
        for address in &addresses {
            match Client::for_sums(address, patience) {
                Err(error) => why = error.to_string(),
                Ok(client)
                    if client.fence().map(|it| it.instance) == Some(wanted.instance)
                        && client.export().size_bytes == size_bytes =>
                {
                    return client
                        .into_parts()
                        .map(|(fd, tls, _)| (fd, tls))
                        .map_err(|e| e.to_string());
                }
                Ok(_) => why = format!("{address} leads to another server"),
            }
        }
        Err(why)
    })
}

/// What came of a question, or will.
#[derive(Default)]
struct Answer {
    blocks: usize,
    /// None as long as there is none.
    sums: Cell<Option<Option<Vec<u32>>>>,
    waker: RefCell<Option<Waker>>,
}

impl Answer {
    fn is(&self, sums: Option<Vec<u32>>) {
        self.sums.set(Some(sums));
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

/// A connection that is up.
struct Connection {
    wire: Wire,
    to_send: Signal,
    over: Cell<bool>,
}

#[derive(Default)]
struct State {
    connection: Option<Rc<Connection>>,
    connecting: bool,
    session: Session<Rc<Answer>>,
    queue: VecDeque<[u8; REQUEST_BYTES]>,
    /// Nothing is tried before.
    not_before: Duration,
    /// When something was asked for last.
    asked: Duration,
    /// Answers without checksums since the last one with.
    refusals: u32,
    ended: bool,
}

/// The connection, or none, and the questions that wait.
pub(super) struct Sums {
    ring: Rc<Ring>,
    address: String,
    connect: Connect,
    deadline: Duration,
    state: RefCell<State>,
}

impl Sums {
    /// Nothing is connected before the first question. It is answered within `deadline`.
    pub(super) fn new(
        ring: &Rc<Ring>,
        address: &str,
        connect: Connect,
        deadline: Duration,
    ) -> Rc<Self> {
        Rc::new(Self {
            ring: Rc::clone(ring),
            address: address.to_owned(),
            connect,
            deadline,
            state: RefCell::default(),
        })
    }

    /// Asks for the CRC32 of each of so many blocks from `offset` on; none when they are not to be
    /// had now.
    pub(super) fn ask(self: &Rc<Self>, offset: u64, blocks: usize) -> Option<SumsOp> {
        let count = u32::try_from(blocks).ok()?;
        if !(1..=SUMS_MAX).contains(&count) {
            return None;
        }
        let ask = Ask {
            kind: Kind::Sums,
            fua: false,
            rank: Rank::Any,
            offset,
            len: count * SUM_BLOCK_BYTES,
        };
        let mut state = self.state.borrow_mut();
        let now = ring::now();
        if state.ended || state.session.outstanding() >= QUESTIONS_MAX {
            return None;
        }
        let connection = state.connection.clone();
        if connection.is_none() && now < state.not_before {
            return None;
        }
        state.asked = now;
        if connection.is_none() && !state.connecting {
            state.connecting = true;
            self.ring.spawn(Rc::clone(self).begin());
        }
        let answer = Rc::new(Answer {
            blocks,
            ..Answer::default()
        });
        let header = state.session.ask(&ask, Rc::clone(&answer));
        state.queue.push_back(header);
        drop(state);
        if let Some(connection) = connection {
            connection.to_send.notify();
        }
        Some(Rc::clone(self).answer(answer))
    }

    fn answer(self: Rc<Self>, answer: Rc<Answer>) -> SumsOp {
        let mut timer = self
            .ring
            .sleep_until(ring::now() + self.deadline.min(PATIENCE));
        Box::pin(poll_fn(move |cx| {
            if let Some(sums) = answer.sums.take() {
                return Poll::Ready(sums);
            }
            if Pin::new(&mut timer).poll(cx).is_ready() {
                self.fail("no answer in time");
                return Poll::Ready(None);
            }
            answer.waker.replace(Some(cx.waker().clone()));
            Poll::Pending
        }))
    }

    /// Whether checksums are to be had now, as far as is known without asking.
    pub(super) fn are_to_be_had(&self) -> bool {
        let state = self.state.borrow();
        !state.ended && (state.connection.is_some() || ring::now() >= state.not_before)
    }

    /// Nothing more is asked.
    pub(super) fn end(&self) {
        self.state.borrow_mut().ended = true;
        self.close();
    }

    /// It is of no use for a while.
    fn fail(&self, why: &str) {
        tracing::info!("no checksums of blocks from {}: {why}", self.address);
        self.state.borrow_mut().not_before = ring::now() + MINUTE;
        self.close();
    }

    /// Closes what there is; questions that wait are answered without checksums.
    fn close(&self) {
        let waiting: Vec<_> = {
            let mut state = self.state.borrow_mut();
            if let Some(connection) = state.connection.take() {
                connection.over.set(true);
                // What is under way in the kernel completes by it.
                let _ = rustix::net::shutdown(connection.wire.as_fd(), Shutdown::Both);
                connection.to_send.notify();
            }
            state.queue.clear();
            state.session.give_up().collect()
        };
        for answer in waiting {
            answer.is(None);
        }
    }

    async fn begin(self: Rc<Self>) {
        let connect = Arc::clone(&self.connect);
        let connected = match self.ring.try_blocking(move || connect()) {
            Ok(connecting) => connecting.await,
            Err(error) => Err(format!("no thread is to be had: {error}")),
        };
        let mut state = self.state.borrow_mut();
        state.connecting = false;
        if state.ended {
            return;
        }
        let wire = match connected {
            Ok((fd, tls)) => Wire::new(fd, tls),
            Err(why) => {
                drop(state);
                return self.fail(&why);
            }
        };
        let connection = Rc::new(Connection {
            wire,
            to_send: Signal::default(),
            over: Cell::new(false),
        });
        state.connection = Some(Rc::clone(&connection));
        self.ring
            .spawn(Rc::clone(&self).send_all(Rc::clone(&connection)));
        self.ring
            .spawn(Rc::clone(&self).receive_all(Rc::clone(&connection)));
        self.ring.spawn(Rc::clone(&self).watch(connection));
    }

    /// Closes a connection that nobody uses: a server has few places.
    async fn watch(self: Rc<Self>, connection: Rc<Connection>) {
        loop {
            let idle_at = self.state.borrow().asked + MINUTE;
            let soonest = ring::now() + PATIENCE;
            self.ring.sleep_until(idle_at.max(soonest)).await;
            if connection.over.get() {
                return;
            }
            let idle = self.state.borrow().session.outstanding() == 0;
            if idle && ring::now() >= self.state.borrow().asked + MINUTE {
                return self.close();
            }
        }
    }

    async fn send_all(self: Rc<Self>, connection: Rc<Connection>) {
        while !connection.over.get() {
            let mut batch = Batch::default();
            for header in self.state.borrow_mut().queue.drain(..) {
                batch.push_bytes(&header);
            }
            if batch.bytes() == 0 {
                connection.to_send.wait().await;
                continue;
            }
            let sent = connection.wire.send(&self.ring, batch).await;
            if let Err(error) = sent
                && !connection.over.get()
            {
                return self.fail(&error.to_string());
            }
        }
    }

    async fn receive_all(self: Rc<Self>, connection: Rc<Connection>) {
        let mut inbox = connection.wire.inbox(&self.ring, INBOX_BYTES);
        loop {
            let why = match self.receive(&mut inbox).await {
                // What it was asked on another connection means nothing here.
                _ if connection.over.get() => return,
                Ok(Some((cookie, sums))) => match self.take(cookie, sums) {
                    Ok(()) => continue,
                    Err(why) => why.to_owned(),
                },
                Ok(None) => "its server makes no sense, or has closed the connection".to_owned(),
                Err(error) => error.to_string(),
            };
            return self.fail(&why);
        }
    }

    /// The next answer: the cookie, and the payload with checksums if it has any.
    async fn receive(
        &self,
        inbox: &mut Inbox,
    ) -> Result<Option<(u64, Option<Vec<u8>>)>, StreamError> {
        let Some(header) = inbox.array_or_end::<CHUNK_BYTES>().await? else {
            return Ok(None);
        };
        let Some(chunk) = decode_chunk(&header) else {
            return Ok(None);
        };
        let payload = inbox.take(chunk.len as usize).await?;
        let sums = chunk.brings == Brings::Sums;
        Ok(Some((chunk.cookie, sums.then_some(payload))))
    }

    fn take(&self, cookie: u64, payload: Option<Vec<u8>>) -> Result<(), &'static str> {
        let taken = self.state.borrow_mut().session.take(cookie);
        let (_, answer) = taken.ok_or("its server answered what was not asked")?;
        let sums = payload.map(|payload| decode_sums(&payload, answer.blocks));
        let nonsense = sums == Some(None);
        let refused = sums.is_none();
        answer.is(sums.flatten());
        let mut state = self.state.borrow_mut();
        state.refusals = if refused { state.refusals + 1 } else { 0 };
        if state.refusals >= REFUSALS_MAX {
            state.refusals = 0;
            return Err("its server answers with errors");
        }
        if nonsense {
            return Err("its server answered with checksums of other blocks");
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "sums_tests.rs"]
mod tests;
