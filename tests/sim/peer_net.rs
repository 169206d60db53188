//! The client's link on the simulated network: what the daemon has on its ring.

use crate::peer_host::{PeerHost, Way, within};
use mirror::host::{DiskRequest, Errno, Geometry, Host as _};
use mirror::sim::net::SimStream;
use mirror::sim::{OnItsWay, Remote, RemoteOp, SimBuffer, SimHost, SimLend, World};
use peer::claim::Fence;
use peer::link::net::{self, Net, Trouble};
use peer::link::{Link, LinkOp, Opened, Reopened};
use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// A part of a simulated buffer.
pub(crate) struct Lent(SimLend);

impl net::Lend for Lent {
    fn again(&self) -> Self {
        Self(self.0.again())
    }
}

enum Part {
    Bytes(Vec<u8>),
    Memory(SimLend),
}

impl Part {
    fn read<R>(&self, f: impl FnOnce(&[u8]) -> R) -> R {
        match self {
            Self::Bytes(bytes) => f(bytes),
            Self::Memory(lend) => lend.read(f),
        }
    }
}

/// Parts, sent one after the other.
#[derive(Default)]
pub(crate) struct SimBatch(Vec<Part>);

impl net::Batch<Lent> for SimBatch {
    fn has_room(&self) -> bool {
        self.0.len() < 64
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn push_bytes(&mut self, bytes: &[u8]) {
        self.0.push(Part::Bytes(bytes.to_vec()));
    }

    fn push_lend(&mut self, lend: Lent) {
        self.0.push(Part::Memory(lend.0));
    }
}

/// Bytes that have been received.
pub(crate) struct SimInbox {
    stream: SimStream,
    here: Vec<u8>,
    capacity: usize,
}

fn closed() -> Trouble {
    Trouble::Broken("the connection has ended".to_owned())
}

impl net::Inbox<Lent> for SimInbox {
    async fn array_or_end<const N: usize>(&mut self) -> Result<Option<[u8; N]>, Trouble> {
        while self.here.len() < N {
            let (room, here) = (self.capacity - self.here.len(), &mut self.here);
            let received = poll_fn(|context| {
                self.stream.poll_receive(context, |bytes| {
                    let taken = bytes.len().min(room);
                    here.extend_from_slice(&bytes[..taken]);
                    taken
                })
            });
            if received.await == 0 {
                let between = self.here.is_empty();
                return if between { Ok(None) } else { Err(closed()) };
            }
        }
        let mut array = [0; N];
        array.copy_from_slice(&self.here[..N]);
        self.here.drain(..N);
        Ok(Some(array))
    }

    async fn fill_lent(&mut self, target: &Lent) -> Result<(), Trouble> {
        let mut done = self.here.len().min(target.0.len());
        target.0.write(0, &self.here[..done]);
        self.here.drain(..done);
        while done < target.0.len() {
            let received = poll_fn(|context| {
                self.stream.poll_receive(context, |bytes| {
                    let taken = bytes.len().min(target.0.len() - done);
                    target.0.write(done, &bytes[..taken]);
                    taken
                })
            });
            match received.await {
                0 => return Err(closed()),
                received => done += received,
            }
        }
        Ok(())
    }
}

/// A connection, and what its server has said.
pub(crate) struct Wire {
    pub(crate) stream: SimStream,
    pub(crate) fence: Option<Fence>,
}

/// What is known of a link beside it.
pub(crate) struct Record {
    pub(crate) host: Rc<PeerHost>,
    pub(crate) fence: Fence,
    /// Connections that it has used.
    wires: Cell<u32>,
    /// An operation was given up on it.
    gave_up: Cell<bool>,
}

/// What a link runs on.
pub(crate) struct SimNet {
    world: Rc<World>,
    record: Rc<Record>,
}

impl Net for SimNet {
    type Buffer = SimBuffer;
    type Lend = Lent;
    type Batch = SimBatch;
    type Inbox = SimInbox;
    type Wire = Wire;
    type Way = Way;

    fn now(&self) -> Duration {
        SimHost(self.world.clone()).now()
    }

    fn sleep_until(&self, at: Duration) -> impl Future<Output = ()> {
        SimHost(self.world.clone()).sleep(at.saturating_sub(self.now()))
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.world.spawn_task(task);
    }

    fn lend_to_writer(buffer: &SimBuffer, start: usize, len: usize) -> Lent {
        Lent(SimLend::new(buffer, start, len, true))
    }

    fn lend_to_reader(buffer: &SimBuffer, start: usize, len: usize) -> Lent {
        Lent(SimLend::new(buffer, start, len, false))
    }

    /// Another connection goes on only after nothing was given up, and at the same server.
    fn begin(&self, wire: &Wire, silent: Duration) {
        let record = &self.record;
        record.wires.set(record.wires.get() + 1);
        if record.wires.get() > 1 {
            record.host.counts.reconnected();
            assert!(
                !record.gave_up.get(),
                "R13: a connection goes on though an operation was given up"
            );
        }
        assert_eq!(
            wire.fence.map(|fence| fence.instance),
            Some(record.fence.instance),
            "R14: a connection goes on at another instance of the server"
        );
        wire.stream.set_patience(silent);
    }

    fn inbox(&self, wire: &Wire, capacity: usize) -> SimInbox {
        SimInbox {
            stream: wire.stream.clone(),
            here: Vec::new(),
            capacity,
        }
    }

    async fn send(&self, wire: &Wire, batch: SimBatch) -> Result<(), Trouble> {
        for part in &batch.0 {
            let (len, mut at) = (part.read(<[u8]>::len), 0);
            while at < len {
                let sent = poll_fn(|context| {
                    part.read(|bytes| wire.stream.poll_send(context, &bytes[at..]))
                });
                at += sent.await.ok_or_else(closed)?;
            }
        }
        Ok(())
    }

    fn say_last(&self, wire: &Wire, farewell: &[u8]) {
        let mut context = Context::from_waker(Waker::noop());
        let _ = wire.stream.poll_send(&mut context, farewell);
    }

    fn shut_down(&self, wire: &Wire) {
        wire.stream.shut_down(true, true);
    }

    async fn answers(&self, way: &Way) -> bool {
        let asked = way.ask().await;
        Reopened::<()>::is_met(asked, self.record.fence)
    }

    async fn reopen(&self, way: &Way) -> Reopened<Opened<Wire>> {
        let (ask, resume) = (
            async || way.ask().await,
            async || way.resume(self.record.fence.turn).await,
        );
        Reopened::through(self.record.fence, ask, resume, |opened| opened.fence).await
    }
}

/// A link as the simulated disk's way through the network.
pub(crate) struct SimPeer {
    link: Rc<Link<SimNet>>,
    record: Rc<Record>,
}

impl SimPeer {
    /// Begins to use a connection that was opened; it goes on through all ways of its host.
    pub(crate) fn new(
        host: &Rc<PeerHost>,
        opened: Opened<Wire>,
        owner: u128,
        deadline: Duration,
    ) -> Option<Rc<Self>> {
        let record = Rc::new(Record {
            host: Rc::clone(host),
            fence: opened.fence?,
            wires: Cell::new(0),
            gave_up: Cell::new(false),
        });
        let net = SimNet {
            world: Rc::clone(&host.world),
            record: Rc::clone(&record),
        };
        let link = Link::new(net, opened, host.ways(owner, deadline), deadline);
        Some(Rc::new(Self { link, record }))
    }

    pub(crate) fn link(&self) -> &Rc<Link<SimNet>> {
        &self.link
    }
}

impl Drop for SimPeer {
    fn drop(&mut self) {
        self.link.say_farewell();
        self.link.end("it is not needed any more");
    }
}

impl Remote for SimPeer {
    fn submit(&self, request: DiskRequest<SimBuffer>, barrier: bool) -> RemoteOp {
        tracing::trace!("link: {}", words(&request));
        let comes = match &request {
            DiskRequest::Write { offset, span, .. } => Some((*offset, span.len as u64)),
            DiskRequest::WriteZeroes { offset, len } | DiskRequest::Discard { offset, len } => {
                Some((*offset, *len))
            }
            DiskRequest::Read { .. } | DiskRequest::Flush => None,
        };
        let disk = self.record.host.disk();
        Box::pin(PeerOp {
            comes: comes.map(|(offset, len)| disk.expect(offset, len)),
            op: Some(if barrier {
                self.link.submit_barrier(request)
            } else {
                self.link.submit(request)
            }),
            link: Rc::clone(&self.link),
            record: Rc::clone(&self.record),
        })
    }

    fn in_flight(&self) -> usize {
        self.link.in_flight()
    }

    fn geometry(&self) -> Geometry {
        self.link.geometry()
    }
}

/// A request in a few words.
fn words(request: &DiskRequest<SimBuffer>) -> String {
    match request {
        DiskRequest::Read { offset, span } => format!("read of {} at {offset}", span.len),
        DiskRequest::Write { offset, span, fua } => {
            format!("write of {} at {offset}, fua {fua}", span.len)
        }
        DiskRequest::Flush => "flush".to_owned(),
        DiskRequest::WriteZeroes { offset, len } => format!("zeroes of {len} at {offset}"),
        DiskRequest::Discard { offset, len } => format!("discard of {len} at {offset}"),
    }
}

/// An operation; it is noted when it is given up.
struct PeerOp {
    comes: Option<OnItsWay>,
    op: Option<LinkOp<SimNet>>,
    link: Rc<Link<SimNet>>,
    record: Rc<Record>,
}

impl Future for PeerOp {
    type Output = Result<(), Errno>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(op) = &mut self.op else {
            panic!("an operation is polled after its end")
        };
        let polled = Pin::new(op).poll(context);
        if let Poll::Ready(Err(error)) = polled {
            tracing::trace!("link: {error}");
        }
        if polled.is_ready() {
            self.comes = None;
        }
        polled
    }
}

impl Drop for PeerOp {
    fn drop(&mut self) {
        drop(self.op.take());
        if self.link.has_given_up() {
            self.record.gave_up.set(true);
        }
    }
}

/// Waits until nothing is outstanding on these links, for a while; says whether it is so.
pub(crate) async fn until_idle(world: &Rc<World>, links: &[Rc<Link<SimNet>>]) -> bool {
    let host = SimHost(world.clone());
    let idle = async {
        while links.iter().any(|link| link.in_flight() > 0) {
            host.sleep(Duration::from_millis(10)).await;
        }
    };
    within(world, Duration::from_secs(5), idle).await.is_some()
}
