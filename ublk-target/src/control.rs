//! The control socket: one request a connection, as [`mirror::control`] defines it.
//!
//! Only root and the daemon's own user are served (SO_PEERCRED), whatever the mode of the
//! socket file. What may block, such as opening a device, happens on a thread of its own, so
//! that an operator's command never stops the data path.

use std::cell::Cell;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use mirror::ControlError;
use mirror::control::{
    ErrorKind, MAX_REQUEST_BYTES, MemberRef, MemberState, MemberStatus, Reply, Request, Status,
    from_line, to_line,
};
use mirror::engine::Return;
use scrubber::Start;

use crate::batch::Batch;
use crate::daemon::Daemon;
use crate::member::{self, MemberDisk};
use crate::peer_disk::{Peers, Turn, one_form};
use crate::ring;
use crate::stream::{Inbox, StreamError, send_all};
use crate::sys::Prepared;

/// Most commands at once.
const MAX_CONNECTIONS: usize = 32;
/// A client that has not sent its request by then is cut off.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// Serves `listener` for as long as the daemon lives.
pub(crate) fn serve(daemon: &Rc<Daemon>, listener: Rc<OwnedFd>) {
    let daemon = Rc::clone(daemon);
    let ring = Rc::clone(&daemon.ring);
    ring.spawn(async move {
        loop {
            daemon
                .ring
                .submit(Prepared::poll_readable(&listener), None)
                .await;
            let flags = rustix::net::SocketFlags::CLOEXEC;
            let Ok(fd) = rustix::net::accept_with(listener.as_fd(), flags) else {
                continue;
            };
            if daemon.commands.get() >= MAX_CONNECTIONS {
                continue;
            }
            let open = OpenCommand::new(&daemon);
            let daemon = Rc::clone(&daemon);
            let ring = Rc::clone(&daemon.ring);
            ring.spawn(async move {
                if let Err(error) = handle(&daemon, Rc::new(fd)).await {
                    tracing::info!("a control connection ended: {error}");
                }
                drop(open);
            });
        }
    });
}

/// Counts a command until it has been answered.
struct OpenCommand(Rc<Daemon>);

impl OpenCommand {
    fn new(daemon: &Rc<Daemon>) -> Self {
        add(&daemon.commands, 1);
        Self(Rc::clone(daemon))
    }
}

impl Drop for OpenCommand {
    fn drop(&mut self) {
        self.0.commands.set(self.0.commands.get() - 1);
        self.0.command_ended.notify();
    }
}

fn add(counter: &Cell<usize>, count: usize) {
    counter.set(counter.get() + count);
}

async fn handle(daemon: &Rc<Daemon>, fd: Rc<OwnedFd>) -> Result<(), StreamError> {
    let refused = peer_refused(&fd);
    let reply = match refused {
        Some(reply) => reply,
        None => {
            let cut_off = Rc::downgrade(&fd);
            let limit = daemon.ring.sleep_until(ring::now() + REQUEST_LIMIT);
            daemon.ring.spawn(async move {
                limit.await;
                // Ends only the receiving side: a long command is still answered.
                if let Some(fd) = cut_off.upgrade() {
                    let _ = rustix::net::shutdown(fd.as_fd(), rustix::net::Shutdown::Read);
                }
            });
            let mut inbox = Inbox::new(&daemon.ring, &fd, MAX_REQUEST_BYTES);
            let Some([first]) = inbox.array_or_end::<1>().await? else {
                tracing::debug!("a control connection ended without a request");
                return Ok(());
            };
            let mut line = vec![first];
            // A first newline is a request by itself, an empty one.
            if first != b'\n' {
                line.extend(inbox.line().await?);
            }
            match from_line::<Request>(&line) {
                Ok(request) => answer(daemon, in_one_form(request)).await,
                Err(error) => Reply::Error {
                    message: format!("the daemon does not understand the request ({error})"),
                    kind: ErrorKind::Usage,
                },
            }
        }
    };
    let line = to_line(&reply).unwrap_or_default();
    let mut batch = Batch::default();
    batch.push_bytes(&line);
    send_all(&daemon.ring, &fd, Rc::new(batch)).await
}

/// Refuses everybody but root and the daemon's own user.
fn peer_refused(fd: &Rc<OwnedFd>) -> Option<Reply> {
    let own = rustix::process::geteuid();
    let allowed = rustix::net::sockopt::socket_peercred(fd.as_fd())
        .is_ok_and(|peer| peer.uid == rustix::process::Uid::ROOT || peer.uid == own);
    (!allowed).then(|| Reply::Error {
        message: "only root and the user the daemon runs as may control it".to_owned(),
        kind: ErrorKind::Refused,
    })
}

/// The request with addresses as the engine knows them: two forms of one address are one member.
fn in_one_form(mut request: Request) -> Request {
    match &mut request {
        Request::ReAdd { path, .. }
        | Request::Add { path, .. }
        | Request::Fail {
            member: MemberRef::Path(path),
        }
        | Request::Remove {
            member: MemberRef::Path(path),
            ..
        }
        | Request::Stop {
            hand_over: Some(MemberRef::Path(path)),
            ..
        } => *path = one_form(path),
        _ => {}
    }
    request
}

/// The state of the mirror, with what only the daemon knows.
fn status(daemon: &Daemon) -> Status {
    let mut status = daemon.engine.status();
    status.device = Some(daemon.device.clone());
    status.daemon_pid = std::process::id();
    status.scrub = Some(Box::new(daemon.scrubber.status()));
    for member in &mut status.members {
        let path = &member.path;
        let is_peer = peer::is_address(path);
        let in_sync = member.state == MemberState::InSync;
        member.unfenced = is_peer && !daemon.peers.is_fenced(path);
        member.scrub_reads_all = is_peer && in_sync && !daemon.peers.has_sums(path);
    }
    status
}

async fn answer(daemon: &Rc<Daemon>, request: Request) -> Reply {
    let engine = &daemon.engine;
    let result = match request {
        Request::Status => return Reply::Status(Box::new(status(daemon))),
        Request::Fail { member } => engine.fail(&member).await,
        Request::Remove { member, force } => remove(daemon, &member, force).await,
        Request::ReAdd {
            path,
            full,
            discard_changes,
            dry_run,
        } => match open(daemon, &path).await {
            Ok((disk, _turn)) => {
                let how = Return {
                    full,
                    discard_changes,
                    dry_run,
                };
                engine.re_add(path, disk, how).await
            }
            Err(refused) => Err(refused),
        },
        Request::Add {
            path,
            force,
            dry_run,
        } => match open(daemon, &path).await {
            Ok((disk, _turn)) => engine.add(path, disk, force, dry_run).await,
            Err(refused) => Err(refused),
        },
        Request::ScrubStart {
            check_only,
            once,
            days,
            ceiling_mib,
        } => daemon.scrubber.start(Start {
            check_only,
            once,
            days,
            ceiling_mib,
        }),
        Request::ScrubPause => Ok(daemon.scrubber.pause()),
        Request::ScrubResume => Ok(daemon.scrubber.resume()),
        Request::ScrubCancel => daemon.scrubber.cancel(),
        Request::ScrubStatus => return Reply::ScrubStatus(Box::new(daemon.scrubber.status())),
        Request::ScrubReport => return scrub_report(daemon),
        Request::ScrubMap { cells } => {
            let map = daemon.scrubber.map(engine.size_bytes(), cells).await;
            return Reply::ScrubMap(map);
        }
        Request::ClearFlushError => engine.clear_flush_error().await,
        Request::Stop { force, hand_over } => {
            daemon.stop_on_request(force, hand_over.as_ref()).await
        }
    };
    match result {
        Ok(message) => Reply::Done { message },
        Err(ControlError { kind, message }) => Reply::Error { message, kind },
    }
}

fn scrub_report(daemon: &Rc<Daemon>) -> Reply {
    let members = daemon.engine.status().members;
    let path = |slot: u8| {
        let member = members.iter().find(|member| member.slot == slot);
        member.map(|member| member.path.clone())
    };
    let mut report = daemon.scrubber.report(path);
    report.device = Some(daemon.device.clone());
    Reply::ScrubReport(report)
}

/// Lets go of a member's device. A peer that owes answers for good is let go of by ending the
/// connection, which nothing else would do while its server only hangs.
async fn remove(
    daemon: &Rc<Daemon>,
    member: &MemberRef,
    force: bool,
) -> Result<String, ControlError> {
    let removed = daemon.engine.remove(member, force).await;
    let Err(busy) = removed else {
        return removed;
    };
    let members = daemon.engine.status().members;
    let path = members.iter().find(|it| match member {
        MemberRef::Slot(slot) => it.slot == *slot,
        MemberRef::Path(path) => it.path == *path,
    });
    match path {
        Some(it) if busy.kind == ErrorKind::Busy && it.orphans > 0 => {
            if daemon.peers.sever(&daemon.ring, &it.path).await {
                return daemon.engine.remove(member, force).await;
            }
            Err(busy)
        }
        _ => Err(busy),
    }
}

async fn open(daemon: &Rc<Daemon>, path: &str) -> Result<(MemberDisk, Turn), ControlError> {
    let turn = daemon.peers.turn(&daemon.ring, path).await;
    let path = path.to_owned();
    // A command given by mistake must not take the export from the member that is served by it.
    let receiving = |state| matches!(state, MemberState::InSync | MemberState::Resyncing);
    let serves = |it: &MemberStatus| it.path == path && it.attached && receiving(it.state);
    let claimant = if daemon.engine.status().members.iter().any(serves) {
        Peers::stranger()
    } else {
        daemon.peers.claimant(&path, false)
    };
    let opening = daemon.ring.blocking(move || member::open(&path, claimant));
    match opening.await {
        Ok(opened) => {
            let disk = opened.bind(&daemon.ring, daemon.deadline, &daemon.peers);
            Ok((disk, turn))
        }
        Err(error) => Err(ControlError {
            kind: error.kind(),
            message: error.to_string(),
        }),
    }
}
