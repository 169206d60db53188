//! Start, life and stop of the daemon.
//!
//! ```text
//! claim the run directory ─► open members ─► engine starts ─► front end is up ─► ready
//!                                                                   │
//!        exit ◄─ control answers ◄─ engine stops ◄─ front end drained ◄─ SIGTERM, stop
//! ```
//!
//! The front end drains before the engine stops, so that no request meets a stopped engine.

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use mirror::control::{ErrorKind, MemberRef, MemberState};
use mirror::engine::SUM_CACHE_BYTES_DEFAULT;
use mirror::pace::Limits;
use mirror::{Candidate, ControlError, Mirror, StartOptions};
use peer::Claimant;
use scrubber::{Scrubber, Settings};

use crate::cli::{Args, CheckReads, FrontKind};
use crate::control;
use crate::front_nbd::{Listener, NbdServer};
use crate::front_ublk::{self, UblkFront, users};
use crate::host::RingHost;
use crate::log;
use crate::member::{self, MemberDisk, OpenError, Opened};
use crate::peer_disk::{Peers, one_form};
use crate::ready::{Failure, Ready};
use crate::returns;
use crate::ring::{self, Ring};
use crate::rundir::{RunDir, listen_tcp, listen_unix};
use crate::surroundings;
use crate::sys::{self, Prepared};
use peer::signal::Signal;

/// The engine over this machine's ring, its disks and its peers.
pub(crate) type Engine = Mirror<RingHost, MemberDisk>;

/// Submissions that fit into one turn; more only cost another system call.
const RING_ENTRIES: u32 = 2048;
/// A daemon that was killed lets go of its members when its last I/O has ended.
const BUSY_PATIENCE: Duration = Duration::from_secs(5);
/// A server may notice only so late that the session of a daemon that was killed is over: when
/// the disk is slow, or the host is gone.
const PEER_PATIENCE: Duration = Duration::from_secs(35);
/// Control clients get their answers before the process exits, but not for ever.
const FAREWELL: Duration = Duration::from_secs(2);
/// Who lets go of the device within this time does not keep it from being stopped: a client
/// that has just left, and what looks at a device whenever a writer has closed it (udev).
const USER_PATIENCE: Duration = Duration::from_secs(2);
const USER_RECHECK: Duration = Duration::from_millis(100);
/// So many users are named in a refusal.
const USERS_NAMED: usize = 3;

/// How applications reach the mirror.
pub(crate) enum Front {
    /// The NBD server.
    Nbd(Rc<NbdServer>),
    /// The block device.
    Ublk(Rc<UblkFront>),
}

/// The running daemon, as its tasks see it.
pub(crate) struct Daemon {
    /// The thread's reactor.
    pub(crate) ring: Rc<Ring>,
    /// The mirror.
    pub(crate) engine: Rc<Engine>,
    /// What scrubs it.
    pub(crate) scrubber: Rc<Scrubber<Rc<Engine>>>,
    /// What applications open.
    pub(crate) device: String,
    /// Control commands under way.
    pub(crate) commands: Cell<usize>,
    /// Notified whenever one has been answered.
    pub(crate) command_ended: Signal,
    /// The connections to peer members.
    pub(crate) peers: Rc<Peers>,
    /// A member that has not answered for so long is lost.
    pub(crate) deadline: Duration,
    front: Front,
    name: String,
    stop_asked: Rc<Signal>,
    /// Who is to go on without the others once the mirror has stopped.
    successor: Cell<Option<u8>>,
    /// Who was told so.
    handed_over: Cell<Option<u8>>,
    outcome: RefCell<Option<Result<String, ControlError>>>,
    outcome_waiters: RefCell<Vec<Rc<Signal>>>,
}

impl Daemon {
    /// Stops the mirror for an operator; returns when it has stopped.
    pub(crate) async fn stop_on_request(
        self: &Rc<Self>,
        force: bool,
        hand_over: Option<&MemberRef>,
    ) -> Result<String, ControlError> {
        let successor = hand_over.map(|member| self.may_take_over(member));
        let successor = successor.transpose()?;
        if !force {
            self.refuse_while_used().await?;
        }
        if successor.is_some() {
            self.successor.set(successor);
        }
        let waiter = Rc::new(Signal::default());
        self.outcome_waiters.borrow_mut().push(Rc::clone(&waiter));
        self.stop_asked.notify();
        loop {
            if let Some(outcome) = self.outcome.borrow().clone() {
                let message = format!("mirror {} {}", self.name, outcome?);
                if successor.is_some() && successor != self.handed_over.get() {
                    let message = format!(
                        "{message}, and not handed over: a stop was under way already; start it \
                         again and demote, or promote there with --force"
                    );
                    return Err(ControlError {
                        kind: ErrorKind::Failed,
                        message,
                    });
                }
                return Ok(message);
            }
            waiter.wait().await;
        }
    }

    /// The slot of a member that may go on alone; nobody keeps other hosts from an unfenced one.
    fn may_take_over(&self, member: &MemberRef) -> Result<u8, ControlError> {
        let slot = self.engine.may_take_over(member)?;
        let path = self.engine.path_of(slot);
        if peer::is_address(&path) && !self.peers.is_fenced(&path) {
            let message = format!(
                "the server of {path} cannot keep other writers away, so nothing can be promised to \
                 its host; stop the mirror (`mirrorctl stop`), and promote it there with --force"
            );
            return Err(ControlError {
                kind: ErrorKind::Refused,
                message,
            });
        }
        Ok(slot)
    }

    /// An error that names the users of the device, when there are some that stay.
    async fn refuse_while_used(&self) -> Result<(), ControlError> {
        let give_up = ring::now() + USER_PATIENCE;
        loop {
            let users = self.users().await;
            if users.is_empty() {
                return Ok(());
            }
            if ring::now() >= give_up {
                return Err(in_use(&self.device, &users));
            }
            self.ring.sleep_until(ring::now() + USER_RECHECK).await;
        }
    }

    /// Who uses the device, as parts of a sentence.
    async fn users(&self) -> Vec<String> {
        match &self.front {
            Front::Nbd(server) => match server.open_connections() {
                0 => Vec::new(),
                1 => vec!["an NBD client is connected".to_owned()],
                count => vec![format!("{count} NBD connections are open")],
            },
            Front::Ublk(front) => {
                let path = front.path().to_owned();
                let look = move || users::of_block_device(&path, std::process::id());
                self.ring.blocking(look).await
            }
        }
    }

    fn finish(&self, outcome: Result<String, ControlError>) {
        self.outcome.replace(Some(outcome));
        for waiter in self.outcome_waiters.borrow().iter() {
            waiter.notify();
        }
    }

    /// One line for a person.
    fn up_message(&self) -> String {
        let status = self.engine.status();
        let in_sync = status
            .members
            .iter()
            .filter(|it| it.state == MemberState::InSync)
            .count();
        format!(
            "mirror {} started on {} ({in_sync} of {} members in-sync)",
            self.name,
            self.device,
            status.members.len()
        )
    }
}

/// The refusal to stop a device that is in use; names a few of its users.
fn in_use(device: &str, users: &[String]) -> ControlError {
    let mut named = users[..users.len().min(USERS_NAMED)].join(", ");
    if users.len() > USERS_NAMED {
        named.push_str(&format!(" and {} more", users.len() - USERS_NAMED));
    }
    let message = format!(
        "{device} is in use: {named}; unmount it, close it or disconnect first, or use --force"
    );
    ControlError {
        kind: ErrorKind::Busy,
        message,
    }
}

/// Runs the daemon until it is stopped.
pub(crate) fn run(args: &Args, ready: &Ready) -> Result<(), Failure> {
    let run_dir = RunDir::claim(&args.run_dir, &args.name)?;
    surroundings::leave_mount_namespace(&args.members);
    let signals = sys::take_signals().map_err(|error| {
        Failure::failed(format!(
            "cannot take SIGTERM through a descriptor ({error})"
        ))
    })?;
    match args.front {
        FrontKind::Ublk => {
            surroundings::require_io_flusher()?;
            surroundings::lock_memory()?;
            surroundings::be_spared_when_memory_is_short();
        }
        FrontKind::Nbd => {
            if let Err(error) = surroundings::become_io_flusher() {
                tracing::info!("goes on without PR_SET_IO_FLUSHER ({error}): NBD only");
            }
        }
    }
    log::start();
    let control_path = run_dir.path("sock");
    let control = listen_unix(&control_path)?;
    let nbd_path = args
        .nbd_socket
        .clone()
        .unwrap_or_else(|| run_dir.path("nbd"));
    let paths = Paths {
        nbd: nbd_path.clone(),
        ublk_note: run_dir.path("ublk"),
    };
    let result = run_with_sockets(args, ready, signals, control, &paths);
    let _ = std::fs::remove_file(&control_path);
    if args.front == FrontKind::Nbd {
        let _ = std::fs::remove_file(&nbd_path);
    }
    result
}

/// Files of the front ends.
struct Paths {
    nbd: PathBuf,
    ublk_note: PathBuf,
}

fn run_with_sockets(
    args: &Args,
    ready: &Ready,
    signals: OwnedFd,
    control: Rc<OwnedFd>,
    paths: &Paths,
) -> Result<(), Failure> {
    let ring = Ring::new(RING_ENTRIES).map_err(Failure::failed)?;
    let stop_asked = Rc::new(Signal::default());
    watch_signals(&ring, signals, &stop_asked);
    let peers = Rc::new(Peers::with_paths(args.paths.clone()));
    let starting = start_engine(args.clone(), Rc::clone(&ring), Rc::clone(&peers));
    let engine = ring.block_on(starting).map_err(broken)??;
    if sys::memory_lock_refused() {
        tracing::warn!("the kernel refused to lock I/O buffers in RAM (see ulimit -l)");
    }
    let life = Life {
        args,
        ready,
        control,
        ring: &ring,
        engine: &engine,
        peers: &peers,
        stop_asked: &stop_asked,
    };
    let served = match args.front {
        FrontKind::Nbd => serve_nbd(&life, &paths.nbd),
        FrontKind::Ublk => serve_ublk(&life, &paths.ublk_note),
    };
    let daemon = match served {
        Ok(daemon) => daemon,
        Err(failure) => {
            // The front end did not come up: leave the members as a clean stop does.
            let stopping = stop_engine(&engine, &ring, &peers, None);
            if let Err(error) = ring.block_on(stopping).map_err(broken)? {
                tracing::error!("the mirror did not stop cleanly: {}", error.message);
            }
            return Err(failure);
        }
    };
    let scrubber = Rc::clone(&daemon.scrubber);
    ring.block_on(async move { scrubber.stop().await })
        .map_err(broken)?;
    daemon.handed_over.set(daemon.successor.get());
    let stopping = stop_engine(&engine, &ring, &peers, daemon.successor.get());
    let outcome = ring.block_on(stopping).map_err(broken)?;
    daemon.finish(outcome.clone());
    ring.block_on(farewell(Rc::clone(&daemon)))
        .map_err(broken)?;
    match outcome {
        Ok(_) => Ok(()),
        Err(error) => Err(Failure::new(error.kind, error.message)),
    }
}

/// What the front ends need to come up and to go down.
struct Life<'a> {
    args: &'a Args,
    ready: &'a Ready,
    control: Rc<OwnedFd>,
    ring: &'a Rc<Ring>,
    engine: &'a Rc<Engine>,
    peers: &'a Rc<Peers>,
    stop_asked: &'a Rc<Signal>,
}

impl Life<'_> {
    /// The front end is up: answer commands and say so.
    fn up(&self, front: Front, device: String) -> Rc<Daemon> {
        let settings = Settings {
            days: self.args.scrub_days,
            ceiling_mib: self.args.scrub_ceiling,
        };
        let scrubber = Scrubber::new(Rc::clone(self.engine), settings);
        self.ring.spawn(Rc::clone(&scrubber).run());
        let daemon = Rc::new(Daemon {
            scrubber,
            ring: Rc::clone(self.ring),
            engine: Rc::clone(self.engine),
            device,
            commands: Cell::new(0),
            command_ended: Signal::default(),
            peers: Rc::clone(self.peers),
            deadline: self.args.deadline(),
            front,
            name: self.args.name.clone(),
            stop_asked: Rc::clone(self.stop_asked),
            successor: Cell::new(None),
            handed_over: Cell::new(None),
            outcome: RefCell::new(None),
            outcome_waiters: RefCell::default(),
        });
        control::serve(&daemon, Rc::clone(&self.control));
        if self.args.returns > 0 {
            let most = usize::from(self.args.returns);
            self.ring.spawn(returns::run(Rc::clone(&daemon), most));
        }
        let message = daemon.up_message();
        tracing::info!("{message}");
        self.ready.up(&daemon.device, &message);
        daemon
    }
}

fn serve_nbd(life: &Life<'_>, path: &Path) -> Result<Rc<Daemon>, Failure> {
    let unix = listen_unix(path)?;
    let server = NbdServer::new(life.ring, life.engine, &life.args.name);
    let tcp = life.args.nbd_tcp.map(listen_tcp).transpose()?;
    server.listen(Listener {
        fd: unix,
        tcp: false,
    });
    if let Some(fd) = tcp {
        server.listen(Listener { fd, tcp: true });
    }
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let device = format!("nbd+unix:///{}?socket={}", life.args.name, path.display());
    let daemon = life.up(Front::Nbd(Rc::clone(&server)), device);
    let stop_asked = Rc::clone(life.stop_asked);
    let serving = async move {
        stop_asked.wait().await;
        tracing::info!("stopping");
        server.stop().await;
    };
    life.ring.block_on(serving).map_err(broken)?;
    Ok(daemon)
}

fn serve_ublk(life: &Life<'_>, note: &Path) -> Result<Rc<Daemon>, Failure> {
    let daemon = RefCell::new(None);
    front_ublk::serve(
        life.ring,
        life.engine,
        life.args.queue_depth,
        note,
        life.stop_asked,
        |front: Rc<UblkFront>| {
            let device = front.path().to_owned();
            daemon.replace(Some(life.up(Front::Ublk(front), device)));
        },
    )?;
    daemon
        .into_inner()
        .ok_or_else(|| Failure::failed("the block device ended before it was up"))
}

fn broken(error: std::io::Error) -> Failure {
    Failure::failed(format!("io_uring failed ({error})"))
}

fn watch_signals(ring: &Rc<Ring>, signals: OwnedFd, stop_asked: &Rc<Signal>) {
    let (ring_of_task, stop_asked) = (Rc::clone(ring), Rc::clone(stop_asked));
    ring.spawn(async move {
        let fd = Rc::new(signals);
        loop {
            ring_of_task
                .submit(Prepared::poll_readable(&fd), None)
                .await;
            let mut info = [0_u8; 128];
            if rustix::io::read(fd.as_fd(), &mut info).is_ok() {
                tracing::info!("asked to end by a signal");
                stop_asked.notify();
            }
        }
    });
}

async fn start_engine(args: Args, ring: Rc<Ring>, peers: Rc<Peers>) -> Result<Rc<Engine>, Failure> {
    let (deadline, mut candidates) = (args.deadline(), Vec::new());
    // The engine decides whether the mirror may start without these (R15).
    let mut missing = Vec::new();
    let mut kind = ErrorKind::NotFound;
    for path in args.members.iter().map(|path| one_form(path)) {
        let claimant = peers.claimant(&path, args.take_over);
        match open_member(&ring, &path, claimant).await {
            Ok(opened) => match opened.unfinished_session() {
                Some(why) if !args.peer_sessions_over => {
                    tracing::warn!("{why}");
                    missing.push(why);
                    kind = ErrorKind::Refused;
                }
                _ => candidates.push(Candidate {
                    path,
                    disk: opened.bind(&ring, deadline, &peers),
                }),
            },
            Err(error) if error.is_absence() => {
                tracing::warn!("{error}");
                peers.set_cut_off(&path, true);
                missing.push(error.to_string());
                if error.may_pass() && kind == ErrorKind::NotFound {
                    kind = ErrorKind::Busy;
                }
            }
            Err(error) => return Err(Failure::new(error.kind(), error)),
        }
    }
    if candidates.is_empty() {
        return Err(Failure::new(kind, missing.join("; ")));
    }
    refuse_unfenced(&args, candidates.iter().map(|it| it.path.as_str()), &peers)?;
    let options = StartOptions {
        name: args.name.clone(),
        force: args.force,
        reason: args.reason.clone().unwrap_or_default(),
        promote: args.promote,
        write_intent: !args.no_intent_unsafe_for_benchmarks,
        deadline,
        hot_budget: args.hot_budget,
        hot_memory_bytes: args
            .hot_memory
            .map_or(mirror::engine::HOT_CAP_BYTES, |mib| usize::from(mib) << 20),
        error_budget: args.error_budget,
        resync_limits: Limits {
            floor: u64::from(args.resync_floor) << 20,
            ceiling: args
                .resync_ceiling
                .map_or(u64::MAX, |mib| u64::from(mib) << 20),
            ..Limits::RESYNC
        },
        check_reads: args.check_reads == CheckReads::Always,
        sum_cache_bytes: args
            .checksum_cache
            .map_or(SUM_CACHE_BYTES_DEFAULT, |mib| usize::from(mib) << 20),
    };
    let host = Rc::new(RingHost::new(&ring));
    Mirror::start(host, candidates, options)
        .await
        .map_err(|error| {
            let mut message = error.to_string();
            for sentence in &missing {
                message.push_str("; ");
                message.push_str(sentence);
            }
            Failure::new(error.kind(), message)
        })
}

/// A host that is promoted must not meet another one at the same member.
fn refuse_unfenced<'a>(
    args: &Args,
    mut paths: impl Iterator<Item = &'a str>,
    peers: &Peers,
) -> Result<(), Failure> {
    let promoted = args.promote && !args.force;
    let unfenced = |path: &&str| promoted && peer::is_address(path) && !peers.is_fenced(path);
    match paths.find(unfenced) {
        None => Ok(()),
        Some(path) => Err(Failure::new(
            ErrorKind::Refused,
            format!(
                "the server of {path} cannot keep other hosts from writing, so nothing shows that \
                 the one before has ended; see that it has, and promote with --force"
            ),
        )),
    }
}

/// Opens a member; waits a little while a dead daemon still holds it (R13).
async fn open_member(ring: &Rc<Ring>, path: &str, claimant: Claimant) -> Result<Opened, OpenError> {
    let give_up = ring::now()
        + if peer::is_address(path) {
            PEER_PATIENCE
        } else {
            BUSY_PATIENCE
        };
    loop {
        let owned = path.to_owned();
        match ring.blocking(move || member::open(&owned, claimant)).await {
            Err(error) if error.may_pass() && ring::now() < give_up => {
                ring.sleep_until(ring::now() + Duration::from_millis(100))
                    .await;
            }
            other => return other,
        }
    }
}

/// Stops the engine, and lets go of its peers: who is told that the mirror has stopped can start it
/// on another host.
fn stop_engine(
    engine: &Rc<Engine>,
    ring: &Rc<Ring>,
    peers: &Rc<Peers>,
    successor: Option<u8>,
) -> impl Future<Output = Result<String, ControlError>> + use<> {
    let (engine, ring, peers) = (Rc::clone(engine), Rc::clone(ring), Rc::clone(peers));
    async move {
        let outcome = match successor {
            Some(slot) => engine.hand_over(slot).await,
            None => engine.stop().await.map(|()| "stopped".to_owned()),
        };
        peers.leave(&ring).await;
        outcome
    }
}

/// Lets the control clients read their answers.
async fn farewell(daemon: Rc<Daemon>) {
    let patience = Rc::new(Cell::new(true));
    let (limit, ended) = (
        daemon.ring.sleep_until(ring::now() + FAREWELL),
        Rc::clone(&daemon),
    );
    let over = Rc::clone(&patience);
    daemon.ring.spawn(async move {
        limit.await;
        over.set(false);
        ended.command_ended.notify();
    });
    while daemon.commands.get() > 0 && patience.get() {
        daemon.command_ended.wait().await;
    }
}

#[cfg(test)]
mod tests {
    use super::in_use;

    #[test]
    fn a_refusal_names_a_few_users() {
        for (count, want) in [
            (1, "/dev/x is in use: u0; "),
            (3, "/dev/x is in use: u0, u1, u2; "),
            (5, "/dev/x is in use: u0, u1, u2 and 2 more; "),
        ] {
            let users: Vec<String> = (0..count).map(|n| format!("u{n}")).collect();
            let message = in_use("/dev/x", &users).message;
            assert!(message.starts_with(want), "{message}");
            assert!(message.contains("--force"), "{message}");
        }
    }
}
