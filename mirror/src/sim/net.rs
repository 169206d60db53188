//! A simulated network: byte streams between processes, as bad as TCP may be.
//!
//! # What it does
//!
//! - What is sent arrives in order, after a delay of its own, in pieces cut anywhere; only so much is
//!   under way at once. A delay is mostly a few turns of the machine, sometimes milliseconds, seldom
//!   seconds.
//! - A process that ends closes its connections: what it has sent still arrives, later on, and then
//!   the end.
//! - [`Path::cut`]: both ends of all connections learn of it, each after what is left of what was
//!   under way: any part of it from the front.
//! - [`Path::stall`]: nothing arrives any more, in one direction or both, and nobody learns of it. New
//!   connections get no answer. After [`Path::heal`] everything arrives, late. An end gives up by itself
//!   when its other end has been out of reach for its patience, and tells nobody.
//! - [`Path::vanish`]: a machine is gone from one moment to the next. Nothing of it arrives any more,
//!   and the other ends give up after their patience.
//!
//! # States of an end
//!
//! ```text
//!  open ──shut down here, or dropped──► closed   what was sent arrives there, then the end
//!    │ ──the end arrives──────────────► closed
//!    └──patience is over──────────────► closed   a part of what was sent may arrive there
//! ```

use super::{Group, SimHost, World};
use crate::host::Host as _;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// Most bytes under way and arrived in one direction.
const CAPACITY: usize = 256 << 10;
/// How long an end waits for the other one, unless told otherwise.
const PATIENCE: Duration = Duration::from_secs(25);
/// How often others have a turn, at the most, before something arrives.
const TURNS: u64 = 12;

/// One of the two ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Who connected.
    Client,
    /// Who was connected to.
    Server,
}

/// From one end to the other.
#[derive(Default)]
struct Direction {
    under_way: VecDeque<u8>,
    here: VecDeque<u8>,
    /// Nothing is sent any more: after what is under way comes the end.
    finished: bool,
    /// The end has arrived.
    ended: bool,
    /// A task carries what is under way.
    carried: bool,
    /// Its machine is gone: not even the end arrives.
    gone: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Direction {
    fn wake(&mut self) {
        let wakers = [self.reader.take(), self.writer.take()];
        wakers.into_iter().flatten().for_each(Waker::wake);
    }
}

struct Connection {
    world: Weak<World>,
    path: Rc<Path>,
    /// From the client, and from the server.
    directions: [RefCell<Direction>; 2],
    /// How long the client waits for the server, and the other way round.
    patience: [Cell<Duration>; 2],
}

impl Connection {
    /// What `side` sends.
    fn out(&self, side: Side) -> &RefCell<Direction> {
        &self.directions[side as usize]
    }

    /// What `side` receives.
    fn incoming(&self, side: Side) -> &RefCell<Direction> {
        &self.directions[1 - side as usize]
    }

    /// Has a task carry what is under way, and the end after it.
    fn carry(self: &Rc<Self>, side: Side) {
        let Some(world) = self.world.upgrade() else {
            return;
        };
        let mut direction = self.out(side).borrow_mut();
        let something = !direction.under_way.is_empty() || direction.finished;
        let over = direction.carried || direction.ended || direction.gone;
        if over || !something || self.path.stalls(side) {
            return;
        }
        direction.carried = true;
        let connection = Rc::clone(self);
        world.spawn_in(Group::NOBODY, async move { connection.arrive(side).await });
    }

    async fn arrive(self: Rc<Self>, side: Side) {
        loop {
            let Some(world) = self.world.upgrade() else {
                return;
            };
            delay(&world).await;
            let mut direction = self.out(side).borrow_mut();
            if self.path.stalls(side) || direction.gone {
                direction.carried = false;
                return;
            }
            let len = direction.under_way.len();
            let part = match world.choose(|rng| rng.below(4)) {
                0 if len > 0 => 1 + world.choose(|rng| rng.index(len)),
                _ => len,
            };
            let Direction {
                under_way, here, ..
            } = &mut *direction;
            here.extend(under_way.drain(..part));
            let over = direction.under_way.is_empty();
            direction.ended |= over && direction.finished;
            let ended = direction.ended;
            direction.carried = !over;
            direction.wake();
            drop(direction);
            if ended {
                // Nobody takes what the other way brings any more.
                self.incoming(side).borrow_mut().wake();
                self.out(other(side)).borrow_mut().finished = true;
                self.carry(other(side));
            }
            if over {
                return;
            }
        }
    }

    /// Of what is under way, any part from the front is left, and then comes the end.
    fn tear(self: &Rc<Self>, side: Side) {
        if let Some(world) = self.world.upgrade() {
            let mut direction = self.out(side).borrow_mut();
            let left = world.choose(|rng| rng.index(direction.under_way.len() + 1));
            direction.under_way.truncate(left);
            direction.finished = true;
        }
        self.carry(side);
    }

    /// This end learns that there is no connection any more, and the other one need not.
    fn give_up(self: &Rc<Self>, side: Side) {
        let mut incoming = self.incoming(side).borrow_mut();
        incoming.under_way.clear();
        (incoming.finished, incoming.ended) = (true, true);
        incoming.wake();
        drop(incoming);
        self.tear(side);
        self.out(side).borrow_mut().wake();
    }

    /// Whether this end knows that there is no connection any more.
    fn is_closed(&self, side: Side) -> bool {
        self.incoming(side).borrow().ended
    }

    /// Gives up when the other end is out of reach for too long, or is `gone`.
    fn watch(self: &Rc<Self>, side: Side, gone: bool) {
        let Some(world) = self.world.upgrade() else {
            return;
        };
        let (connection, episode) = (Rc::downgrade(self), self.path.episode.get());
        let extra = world.choose(|rng| Duration::from_millis(rng.below(5000)));
        let patience = self.patience[side as usize].get() + extra;
        world.clone().spawn_in(Group::NOBODY, async move {
            SimHost(world).sleep(patience).await;
            if let Some(connection) = connection.upgrade()
                && (gone || connection.path.episode.get() == episode)
                && !connection.is_closed(side)
            {
                connection.give_up(side);
            }
        });
    }
}

fn other(side: Side) -> Side {
    match side {
        Side::Client => Side::Server,
        Side::Server => Side::Client,
    }
}

/// So long is something under way.
async fn delay(world: &Rc<World>) {
    let host = SimHost(Rc::clone(world));
    let pause = match world.choose(|rng| rng.below(400)) {
        0 => world.choose(|rng| rng.below(3000)),
        1..12 => world.choose(|rng| rng.below(20)),
        _ => 0,
    };
    if pause > 0 {
        host.sleep(Duration::from_millis(pause)).await;
    }
    super::turns(world.choose(|rng| rng.below(TURNS))).await;
}

/// A way between two machines, which all connections through it share.
pub struct Path {
    world: Weak<World>,
    connections: RefCell<Vec<Weak<Connection>>>,
    /// What the client's side sends does not arrive; what the server's side sends.
    stalled: [Cell<bool>; 2],
    /// Grows with each change of the above.
    episode: Cell<u64>,
}

impl Path {
    /// A way on which everything arrives.
    #[must_use]
    pub fn new(world: &Rc<World>) -> Rc<Self> {
        Rc::new(Self {
            world: Rc::downgrade(world),
            connections: RefCell::default(),
            stalled: [Cell::new(false), Cell::new(false)],
            episode: Cell::new(0),
        })
    }

    /// Whether what this side sends does not arrive.
    fn stalls(&self, side: Side) -> bool {
        self.stalled[side as usize].get()
    }

    /// Whether nothing arrives in one direction or both.
    #[must_use]
    pub fn is_stalled(&self) -> bool {
        self.stalled.iter().any(Cell::get)
    }

    /// A new connection: the client's end and the server's.
    #[must_use]
    pub fn connect(self: &Rc<Self>) -> (SimStream, SimStream) {
        let connection = Rc::new(Connection {
            world: self.world.clone(),
            path: Rc::clone(self),
            directions: [RefCell::default(), RefCell::default()],
            patience: [Cell::new(PATIENCE), Cell::new(PATIENCE)],
        });
        let mut connections = self.connections.borrow_mut();
        connections.retain(|it| it.strong_count() > 0);
        connections.push(Rc::downgrade(&connection));
        let end = |side| SimStream(Rc::new(End(Rc::clone(&connection), side)));
        (end(Side::Client), end(Side::Server))
    }

    fn all(&self) -> Vec<Rc<Connection>> {
        let connections = self.connections.borrow();
        connections.iter().filter_map(Weak::upgrade).collect()
    }

    /// All connections are cut, and both ends learn of it.
    pub fn cut(&self) {
        for connection in self.all() {
            connection.tear(Side::Client);
            connection.tear(Side::Server);
        }
    }

    /// From now on nothing of what these sides send arrives.
    pub fn stall(&self, sides: &[Side]) {
        self.episode.set(self.episode.get() + 1);
        for side in sides {
            self.stalled[*side as usize].set(true);
        }
        for connection in self.all() {
            connection.watch(Side::Client, false);
            connection.watch(Side::Server, false);
        }
    }

    /// Everything arrives again, and what was under way does too.
    pub fn heal(&self) {
        self.episode.set(self.episode.get() + 1);
        self.stalled.iter().for_each(|it| it.set(false));
        for connection in self.all() {
            connection.carry(Side::Client);
            connection.carry(Side::Server);
        }
    }

    /// The machine at these ends of all connections is gone; its processes are ended after this.
    pub fn vanish(&self, side: Side) {
        for connection in self.all() {
            {
                let mut out = connection.out(side).borrow_mut();
                out.under_way.clear();
                (out.finished, out.gone) = (true, true);
            }
            let mut incoming = connection.incoming(side).borrow_mut();
            (incoming.finished, incoming.ended) = (false, true);
            drop(incoming);
            connection.watch(other(side), true);
        }
    }
}

struct End(Rc<Connection>, Side);

impl Drop for End {
    fn drop(&mut self) {
        close(&self.0, self.1);
    }
}

/// What was sent arrives still.
fn close(connection: &Rc<Connection>, side: Side) {
    connection.out(side).borrow_mut().finished = true;
    connection.carry(side);
    let mut incoming = connection.incoming(side).borrow_mut();
    incoming.under_way.clear();
    (incoming.finished, incoming.ended) = (true, true);
    incoming.wake();
    drop(incoming);
    connection.out(side).borrow_mut().wake();
}

/// One end of a connection; clones are the same end. It is closed when the last one is dropped.
#[derive(Clone)]
pub struct SimStream(Rc<End>);

impl SimStream {
    /// Gives the bytes that have arrived, at least one, to `take`, which says how many it has taken;
    /// none at the end.
    pub fn poll_receive(
        &self,
        context: &mut Context<'_>,
        take: impl FnOnce(&[u8]) -> usize,
    ) -> Poll<usize> {
        let End(connection, side) = &*self.0;
        let mut incoming = connection.incoming(*side).borrow_mut();
        if incoming.here.is_empty() {
            if incoming.ended {
                return Poll::Ready(0);
            }
            incoming.reader = Some(context.waker().clone());
            return Poll::Pending;
        }
        let taken = take(incoming.here.make_contiguous());
        incoming.here.drain(..taken);
        if let Some(writer) = incoming.writer.take() {
            writer.wake();
        }
        Poll::Ready(taken)
    }

    /// Sends as many of the bytes as there is room for, at least one; none when this end is closed.
    pub fn poll_send(&self, context: &mut Context<'_>, bytes: &[u8]) -> Poll<Option<usize>> {
        let End(connection, side) = &*self.0;
        let mut out = connection.out(*side).borrow_mut();
        if out.finished {
            return Poll::Ready(None);
        }
        let room = CAPACITY.saturating_sub(out.under_way.len() + out.here.len());
        if room == 0 {
            out.writer = Some(context.waker().clone());
            return Poll::Pending;
        }
        let sent = room.min(bytes.len());
        out.under_way.extend(&bytes[..sent]);
        drop(out);
        connection.carry(*side);
        Poll::Ready(Some(sent))
    }

    /// Sends no more, if `sends`; receives no more, if `receives`.
    pub fn shut_down(&self, sends: bool, receives: bool) {
        let End(connection, side) = &*self.0;
        if sends {
            let mut out = connection.out(*side).borrow_mut();
            out.finished = true;
            out.wake();
            drop(out);
            connection.carry(*side);
        }
        if receives {
            let mut incoming = connection.incoming(*side).borrow_mut();
            incoming.under_way.clear();
            incoming.ended = true;
            incoming.wake();
        }
    }

    /// How long this end waits for the other one while that is out of reach.
    pub fn set_patience(&self, patience: Duration) {
        let End(connection, side) = &*self.0;
        connection.patience[*side as usize].set(patience);
    }
}
