//! A machine behind the network: a disk, and the process of our export server that exports it.
//!
//! The server is the production one; its disk is a [`SimDisk`], its sockets are streams of the
//! simulated network, and its tasks are a group of the simulated machine's. What no server may do is
//! looked at beside it (`peer_server.rs`).
//!
//! ```text
//!  Down ──start──► Waiting for the disk ──nobody's requests are under way there──► Up
//!   ▲                       │ killed                                                │
//!   └───────────────────────┴────────────── killed, or its machine loses its power ─┘
//! ```
//!
//! A server that is killed leaves its requests with the disk, and the next one, of another instance,
//! waits for them: the disk is held exclusively (R13).

use crate::machine::{DEADLINE, SimMirror};
use crate::peer_net::{SimNet, SimPeer, Wire, until_idle};
use crate::peer_server::{Exported, ServerDisk, ServerStream, ServerTasks};
use export::{PAYLOAD_BYTES_MAX, Server, Unclaimed};
use mirror::ControlError;
use mirror::control::{MemberState, MemberStatus};
use mirror::host::{Disk as _, Host as _};
use mirror::sim::net::{Path, Side, SimStream};
use mirror::sim::{Group, SimDisk, SimHost, World};
use mirror::superblock::{COPY_A_OFFSET, COPY_B_OFFSET, COPY_BYTES};
use peer::claim::{Claim, Fence, Seen};
use peer::link::{Link, Opened, Unfinished};
use peer::server::Export;
use peer::wire::{
    EXPORT_FLUSH, EXPORT_FUA, EXPORT_HAS_FLAGS, EXPORT_TRIM, EXPORT_WRITE_ZEROES, REPLY_BYTES,
};
use peer::{Address, Ask, ConnectError, Handshake, Kind, Rank, Session};
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::task::Poll;
use std::time::Duration;

/// Limit for connecting and the handshake together.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);
/// The same, until the server has answered, where there is another way.
const WAY_PATIENCE: Duration = Duration::from_secs(1);

/// The result of a future, or none after `patience`.
pub(crate) async fn within<T>(
    world: &Rc<World>,
    patience: Duration,
    future: impl Future<Output = T>,
) -> Option<T> {
    let (mut future, mut late) = (pin!(future), SimHost(world.clone()).sleep(patience));
    poll_fn(|context| {
        if let Poll::Ready(result) = future.as_mut().poll(context) {
            return Poll::Ready(Some(result));
        }
        std::pin::Pin::new(&mut late).poll(context).map(|()| None)
    })
    .await
}

type SimServer = Server<ServerTasks, ServerDisk, ServerStream>;

struct Process {
    group: Group,
    instance: u128,
    /// None as long as it waits for the disk.
    server: Option<Rc<SimServer>>,
}

/// What has happened to a machine behind the network.
#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) starts: Cell<u64>,
    pub(crate) opened: Cell<u64>,
    pub(crate) reconnects: Cell<u64>,
}

impl Counts {
    pub(crate) fn reconnected(&self) {
        self.reconnects.set(self.reconnects.get() + 1);
    }
}

/// A machine behind the network.
pub(crate) struct PeerHost {
    pub(crate) world: Rc<World>,
    disk: RefCell<SimDisk>,
    /// Ways to it; a daemon is told of all.
    pub(crate) paths: Vec<Rc<Path>>,
    process: RefCell<Option<Process>>,
    /// In whose name the daemon claims; another one in each of its lives.
    pub(crate) owner: Cell<u128>,
    links: RefCell<Vec<Weak<Link<SimNet>>>>,
    pub(crate) counts: Counts,
}

/// A way to a machine, in the name of an owner.
pub(crate) struct Way {
    host: Rc<PeerHost>,
    path: usize,
    owner: u128,
    /// How long one question may take.
    patience: Duration,
}

fn address() -> Address {
    "nbd://peer/m".parse().unwrap()
}

fn unreachable(kind: io::ErrorKind) -> ConnectError {
    ConnectError::Unreachable {
        address: address(),
        source: kind.into(),
    }
}

impl PeerHost {
    /// A machine with this disk, and its server, which will be up soon.
    pub(crate) fn new(world: &Rc<World>, disk: &SimDisk, paths: usize) -> Rc<Self> {
        let host = Rc::new(Self {
            world: Rc::clone(world),
            disk: RefCell::new(disk.reopen()),
            paths: (0..paths).map(|_| Path::new(world)).collect(),
            process: RefCell::default(),
            owner: Cell::new(1),
            links: RefCell::default(),
            counts: Counts::default(),
        });
        host.start();
        host
    }

    /// Its disk.
    pub(crate) fn disk(&self) -> SimDisk {
        self.disk.borrow().clone()
    }

    /// Whether this is its disk.
    pub(crate) fn has(&self, disk: &SimDisk) -> bool {
        self.disk.borrow().is_same(disk)
    }

    /// Starts the server, unless it has been: it waits until the disk is nobody else's.
    pub(crate) fn start(self: &Rc<Self>) {
        if self.process.borrow().is_some() {
            return;
        }
        let host = SimHost(self.world.clone());
        let (group, instance) = (self.world.new_group(), host.random());
        self.counts.starts.set(self.counts.starts.get() + 1);
        self.process.replace(Some(Process {
            group,
            instance,
            server: None,
        }));
        let this = Rc::clone(self);
        self.world.spawn_in(group, async move {
            let disk = this.disk.borrow().reopen();
            this.disk.replace(disk.clone());
            while disk.in_flight() > 0 {
                host.sleep(Duration::from_millis(10)).await;
            }
            let server = this.server(disk, instance);
            if let Some(process) = &mut *this.process.borrow_mut() {
                process.server = Some(server);
            }
        });
    }

    fn server(&self, disk: SimDisk, instance: u128) -> Rc<SimServer> {
        let geometry = disk.geometry();
        let mut flags = EXPORT_HAS_FLAGS | EXPORT_FLUSH | EXPORT_FUA;
        if geometry.cheap_zeroes {
            flags |= EXPORT_TRIM | EXPORT_WRITE_ZEROES;
        }
        let export = Export {
            name: "m".to_owned(),
            size_bytes: geometry.size_bytes,
            block_bytes: 512,
            payload_bytes_max: PAYLOAD_BYTES_MAX,
            flags,
        };
        let exported = Exported::new(disk);
        let tasks = ServerTasks(self.world.clone(), exported.clone());
        let store = ServerDisk(self.world.clone(), exported);
        let say = Box::new(|line: &str| tracing::trace!("server: {line}"));
        let rights = (Unclaimed::Read, instance);
        Server::new((tasks, store), export, rights, None, say)
    }

    /// The server is killed; what its disk has of it goes on there.
    pub(crate) fn kill(&self) {
        let process = self.process.take();
        if let Some(process) = process {
            self.world.end_group(process.group);
        }
    }

    /// The machine loses its power, but nothing is done to the disk here.
    pub(crate) fn lose_power(&self) {
        self.paths.iter().for_each(|path| path.vanish(Side::Server));
        self.kill();
    }

    /// Another disk in the place of its own, while the server is down.
    pub(crate) fn put_disk(&self, disk: &SimDisk) {
        self.disk.replace(disk.reopen());
    }

    /// Starts the server after so long.
    pub(crate) fn start_after(self: &Rc<Self>, delay: Duration) {
        let this = Rc::clone(self);
        let late = SimHost(self.world.clone()).sleep(delay);
        self.world.spawn_in(Group::NOBODY, async move {
            late.await;
            this.start();
        });
    }

    /// A connection to the server, as far as there is one to be had on that way.
    async fn connect(&self, path: usize) -> Result<SimStream, ConnectError> {
        let host = SimHost(self.world.clone());
        host.sleep(Duration::from_micros(100)).await;
        while self.paths[path].is_stalled() {
            host.sleep(Duration::from_millis(100)).await;
        }
        let process = self.process.borrow();
        let up = process
            .as_ref()
            .and_then(|it| Some((it.group, it.server.clone()?)));
        let Some((group, server)) = up else {
            return Err(unreachable(io::ErrorKind::ConnectionRefused));
        };
        let (client, theirs) = self.paths[path].connect();
        self.world.spawn_in(group, async move {
            let from = "the other machine".to_owned();
            server.open(ServerStream(theirs), from).await;
        });
        Ok(client)
    }

    async fn shake(
        &self,
        path: usize,
        mut handshake: Handshake,
        patience: Duration,
    ) -> Result<Opened<Wire>, ConnectError> {
        let shaking = async {
            let stream = self.connect(path).await?;
            while handshake.wants() > 0 {
                let bytes = receive(&stream, handshake.wants()).await?;
                let out = handshake.feed(&bytes);
                let refused = |source| ConnectError::Handshake {
                    address: address(),
                    source,
                };
                send(&stream, &out.map_err(refused)?).await?;
            }
            Ok(stream)
        };
        let shaken = within(&self.world, patience, shaking).await;
        let stream = shaken.unwrap_or(Err(ConnectError::NoAnswer {
            address: address(),
            seconds: patience.as_secs(),
        }))?;
        let fence = handshake.fence();
        Ok(Opened {
            wire: Wire { stream, fence },
            export: handshake.export().unwrap(),
            address: address().to_string(),
            fence,
        })
    }

    /// Claims the export as the daemon does, and says whether what an older session has sent may
    /// still be on its way.
    pub(crate) async fn claim(
        &self,
        owner: u128,
        take_over: bool,
    ) -> Result<(Opened<Wire>, Option<Unfinished>), ConnectError> {
        // The first one is its own address.
        let path = 0;
        let question = Handshake::asking("m", None);
        let asked = self.shake(path, question, CONNECT_PATIENCE).await?;
        let (copies, _) = superblocks(&asked.wire.stream).await;
        drop(asked);
        let claim = Claim {
            owner,
            take_over,
            resumes: None,
            seen: Seen::on(&copies[0], &copies[1]),
        };
        let claiming = Handshake::asking("m", Some(claim));
        let opened = self.shake(path, claiming, CONNECT_PATIENCE).await?;
        let (copies, readable) = superblocks(&opened.wire.stream).await;
        let unfinished = Unfinished::of(&copies, readable, opened.fence);
        self.counts.opened.set(self.counts.opened.get() + 1);
        Ok((opened, unfinished))
    }

    /// The disk for the engine, through the network: as the daemon opens it, and after it the operator
    /// has said that older sessions are over, which they are where the server is up.
    pub(crate) async fn open(
        self: &Rc<Self>,
        take_over: bool,
        deadline: Duration,
    ) -> Result<SimDisk, ConnectError> {
        self.sever().await;
        let (disk, link) = self.open_as(self.owner.get(), take_over, deadline).await?;
        self.links.borrow_mut().push(link);
        Ok(disk)
    }

    /// The same in the name of any owner, who may be another host.
    pub(crate) async fn open_as(
        self: &Rc<Self>,
        owner: u128,
        take_over: bool,
        deadline: Duration,
    ) -> Result<(SimDisk, Weak<Link<SimNet>>), ConnectError> {
        let (opened, unfinished) = self.claim(owner, take_over).await?;
        tracing::trace!("the peer is claimed, unfinished: {unfinished:?}");
        let peer = SimPeer::new(self, opened, owner, deadline);
        let peer = peer.ok_or_else(|| unreachable(io::ErrorKind::Unsupported))?;
        let link = Rc::downgrade(peer.link());
        Ok((self.disk.borrow().through(peer), link))
    }

    /// The same at a start, where a dead daemon's session may have to be waited for, or the operator
    /// has it taken over.
    pub(crate) async fn open_at_start(self: &Rc<Self>) -> Option<SimDisk> {
        let host = SimHost(self.world.clone());
        self.heal();
        self.start();
        self.owner.set(host.random());
        let take_over = self.world.choose(|rng| rng.one_in(2));
        for _ in 0..60 {
            match self.open(take_over, DEADLINE).await {
                Ok(disk) => return Some(disk),
                Err(error) => tracing::trace!("at the start: {error}"),
            }
            host.sleep(Duration::from_secs(1)).await;
        }
        None
    }

    /// The same when the operator brings the member back. One that is in service does not lose its
    /// session to a command given by mistake: it is claimed by a stranger.
    pub(crate) async fn open_for_operator(
        self: &Rc<Self>,
        mirror: &SimMirror,
        path: &str,
    ) -> Result<SimDisk, ControlError> {
        // Others are coming back by themselves.
        let host = SimHost(self.world.clone());
        host.sleep(Duration::from_secs(2)).await;
        let receiving = |state| matches!(state, MemberState::InSync | MemberState::Resyncing);
        let members = mirror.status().members;
        let serves = |m: &MemberStatus| m.path == path && receiving(m.state);
        let opened = if members.iter().any(serves) {
            let stranger = SimHost(self.world.clone()).random();
            let claimed = self.claim(stranger, false).await;
            claimed.and(Err(unreachable(io::ErrorKind::Unsupported)))
        } else {
            self.open(false, DEADLINE).await
        };
        opened.map_err(|error| ControlError {
            kind: error.kind(),
            message: error.to_string(),
        })
    }

    /// Nothing is in the way any more.
    pub(crate) fn heal(&self) {
        self.paths.iter().for_each(|path| path.heal());
    }

    fn links(&self) -> Vec<Rc<Link<SimNet>>> {
        let mut links = self.links.borrow_mut();
        links.retain(|link| link.strong_count() > 0);
        links.iter().filter_map(Weak::upgrade).collect()
    }

    /// Lets go of connections that owe answers. Only for a member that is out of service.
    pub(crate) async fn sever(&self) {
        let links = self.links();
        for link in links.iter().filter(|link| link.in_flight() > 0) {
            link.end("the operator lets go of it");
        }
        until_idle(&self.world, &links).await;
    }

    /// The daemon ends its sessions; returns when the server has closed them.
    pub(crate) async fn leave(&self) {
        let links = self.links();
        links.iter().for_each(|link| link.leave());
        let host = SimHost(self.world.clone());
        let closed = async {
            while !links.iter().all(|link| link.is_closed()) {
                host.sleep(Duration::from_millis(1)).await;
            }
        };
        within(&self.world, Duration::from_secs(2), closed).await;
    }

    /// Ways on which a connection can go on. No try takes longer than `deadline`.
    pub(crate) fn ways(self: &Rc<Self>, owner: u128, deadline: Duration) -> Vec<Way> {
        let patience = if self.paths.len() > 1 {
            WAY_PATIENCE
        } else {
            CONNECT_PATIENCE
        };
        let way = |path| Way {
            host: Rc::clone(self),
            path,
            owner,
            patience: patience.min(deadline),
        };
        (0..self.paths.len()).map(way).collect()
    }

    /// The instance of the server that runs or is being started.
    pub(crate) fn instance(&self) -> Option<u128> {
        self.process.borrow().as_ref().map(|it| it.instance)
    }
}

impl Way {
    /// What the server says of itself.
    pub(crate) async fn ask(&self) -> Result<Option<Fence>, ConnectError> {
        let question = Handshake::asking("m", None);
        let asked = self.host.shake(self.path, question, self.patience);
        let asked = asked.await?;
        Ok(asked.fence)
    }

    /// Claims to go on in that turn.
    pub(crate) async fn resume(&self, turn: u64) -> Result<Opened<Wire>, ConnectError> {
        let claim = Claim {
            owner: self.owner,
            take_over: false,
            resumes: Some(turn),
            seen: None,
        };
        let claiming = Handshake::asking("m", Some(claim));
        self.host.shake(self.path, claiming, CONNECT_PATIENCE).await
    }
}

async fn receive(stream: &SimStream, len: usize) -> Result<Vec<u8>, ConnectError> {
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let received = poll_fn(|context| {
            stream.poll_receive(context, |here| {
                let taken = here.len().min(len - bytes.len());
                bytes.extend_from_slice(&here[..taken]);
                taken
            })
        });
        if received.await == 0 {
            return Err(unreachable(io::ErrorKind::UnexpectedEof));
        }
    }
    Ok(bytes)
}

async fn send(stream: &SimStream, bytes: &[u8]) -> Result<(), ConnectError> {
    let mut at = 0;
    while at < bytes.len() {
        let sent = poll_fn(|context| stream.poll_send(context, &bytes[at..])).await;
        at += sent.ok_or_else(|| unreachable(io::ErrorKind::BrokenPipe))?;
    }
    Ok(())
}

/// The copies of the superblock, and whether both could be read.
async fn superblocks(stream: &SimStream) -> ([[u8; COPY_BYTES]; 2], bool) {
    let mut copies = [[0; COPY_BYTES]; 2];
    let mut session = Session::default();
    for (copy, offset) in copies.iter_mut().zip([COPY_A_OFFSET, COPY_B_OFFSET]) {
        let ask = Ask {
            kind: Kind::Read,
            fua: false,
            rank: Rank::Any,
            offset,
            len: COPY_BYTES as u32,
        };
        let reading = async {
            send(stream, &session.ask(&ask, ())).await.ok()?;
            let header: [u8; REPLY_BYTES] =
                receive(stream, REPLY_BYTES).await.ok()?.try_into().ok()?;
            let answer = session.answered(&header).ok()?;
            let bytes = receive(stream, answer.data_bytes as usize).await.ok()?;
            answer.error.is_none().then_some(bytes)
        };
        match reading.await {
            Some(bytes) => copy.copy_from_slice(&bytes),
            None => return (copies, false),
        }
    }
    (copies, true)
}
