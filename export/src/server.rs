//! One exported disk: its sessions, who of them may write, and the end of it all.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::Shutdown;
use std::rc::Rc;
use std::time::Duration;

use mirror::host::Errno;
use mirror::superblock::{COPY_A_OFFSET, COPY_BYTES};
use peer::claim::{self, Claim, Fence};
use peer::server::admission::{Admission, Answer, SessionId};
use peer::server::{Export, Verdict};
use peer::tls::Acceptor;
use peer::wire::EXPORT_READ_ONLY;
use tokio::sync::Notify;

use crate::io::{Store, Stream};
use crate::memory::Memory;
use crate::session::Session;
use crate::tasks::{Step, Tasks, begin, within};

/// Most sessions at once.
pub(crate) const SESSIONS_MAX: usize = 16;
/// How long a new connection waits for the place of one that was cut for it.
const PLACE_PATIENCE: Duration = Duration::from_secs(1);
/// How long a stop waits for clients that do not take their replies.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// Who may write without a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unclaimed {
    /// Nobody: such sessions read.
    Read,
    /// One session at a time, from its first write on; the one before is cut and drained.
    Write,
}

/// Why a session may not write; a sentence.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Denied {
    /// Another session, which lives, may.
    #[error("{0}")]
    InUse(String),
    /// Anything else.
    #[error("{0}")]
    Refused(String),
}

impl From<String> for Denied {
    fn from(why: String) -> Self {
        Self::Refused(why)
    }
}

impl From<Denied> for Verdict {
    fn from(denied: Denied) -> Self {
        match denied {
            Denied::InUse(why) => Self::InUse(why),
            Denied::Refused(why) => Self::Refused(why),
        }
    }
}

/// A session that was cut never becomes the writer: it must not take the right back from the one
/// for which it was cut.
fn refuse_cut<S: Stream>(session: &Session<S>) -> Result<(), Denied> {
    if session.is_cut() {
        return Err("the session has been cut".to_owned().into());
    }
    Ok(())
}

/// One exported disk.
pub struct Server<T, D, S> {
    pub(crate) tasks: T,
    pub(crate) store: D,
    /// As a writer sees it.
    export: Export,
    unclaimed: Unclaimed,
    instance: u128,
    acceptor: Option<Acceptor>,
    /// See [`Fence::turn`].
    turn: Cell<u64>,
    /// Whose turn it is; none when it is that of a client without a claim.
    owner: Cell<Option<u128>>,
    admission: RefCell<Admission>,
    sessions: RefCell<BTreeMap<SessionId, Rc<Session<S>>>>,
    last_session: Cell<SessionId>,
    stopping: Cell<bool>,
    /// Flushes of the disk that have failed, whoever asked for them.
    flush_failures: Cell<u64>,
    /// Flushes that have not ended, those included whose asker is gone.
    flushes: Cell<usize>,
    /// Notified when the right to write, or the number of sessions, has changed.
    changed: Notify,
    say: Box<dyn Fn(&str)>,
}

impl<T: Tasks, D: Store, S: Stream> Server<T, D, S> {
    /// A server of `export`, as a writer sees it; `say` gets a line for a person now and then.
    pub fn new(
        (tasks, store): (T, D),
        export: Export,
        (unclaimed, instance): (Unclaimed, u128),
        acceptor: Option<Acceptor>,
        say: Box<dyn Fn(&str)>,
    ) -> Rc<Self> {
        Rc::new(Self {
            tasks,
            store,
            export,
            unclaimed,
            instance,
            acceptor,
            turn: Cell::new(0),
            owner: Cell::new(None),
            admission: RefCell::default(),
            sessions: RefCell::default(),
            last_session: Cell::new(0),
            stopping: Cell::new(false),
            flush_failures: Cell::new(0),
            flushes: Cell::new(0),
            changed: Notify::new(),
            say,
        })
    }

    /// The export as a session sees it that has not claimed.
    pub(crate) fn unclaimed_export(&self) -> Export {
        let mut export = self.export.clone();
        if self.unclaimed == Unclaimed::Read {
            export.flags |= EXPORT_READ_ONLY;
        }
        export
    }

    /// What there is to begin TLS with, where all clients have to.
    pub(crate) fn acceptor(&self) -> Option<Acceptor> {
        self.acceptor.clone()
    }

    /// The export as the writer sees it.
    pub(crate) fn writers_export(&self) -> Export {
        self.export.clone()
    }

    /// What clients are told of it.
    pub(crate) fn fence(&self) -> Fence {
        Fence {
            instance: self.instance,
            turn: self.turn.get(),
            keeps_order: true,
        }
    }

    /// Serves a client until it leaves, in a task of its own. When all places are taken, the
    /// session goes that has been silent for longest and neither writes nor waits to.
    pub async fn open(self: &Rc<Self>, stream: S, from: String) {
        if self.sessions.borrow().len() >= SESSIONS_MAX {
            self.cut_a_silent_session();
            let place = self.until(|it| it.len() < SESSIONS_MAX);
            let place = within(&self.tasks, PLACE_PATIENCE, place);
            if place.await.is_none() {
                let taken = format!("no place for {from}: {SESSIONS_MAX} sessions are open");
                return self.say(&taken);
            }
        }
        if self.stopping.get() {
            return;
        }
        let id = self.last_session.get() + 1;
        self.last_session.set(id);
        let session = Session::new(id, stream, from, self.tasks.now());
        self.sessions.borrow_mut().insert(id, Rc::clone(&session));
        let server = Rc::clone(self);
        self.tasks.spawn(async move {
            session.serve(&server).await;
            server.sessions.borrow_mut().remove(&id);
            server.changed.notify_waiters();
        });
    }

    /// Waits until the sessions are as wanted.
    async fn until(&self, wanted: impl Fn(&BTreeMap<SessionId, Rc<Session<S>>>) -> bool) {
        loop {
            let changed = self.changed.notified();
            if wanted(&self.sessions.borrow()) {
                return;
            }
            changed.await;
        }
    }

    fn cut_a_silent_session(&self) {
        let sessions = self.sessions.borrow();
        let admission = self.admission.borrow();
        // One that was cut may be unable to end: its read hangs at the disk.
        let idle = sessions
            .values()
            .filter(|it| !it.is_cut() && !admission.concerns(it.id()));
        // Who has shown no certificate where one is wanted makes room first.
        if let Some(session) = idle.min_by_key(|it| (it.is_secured(), it.heard())) {
            self.say(&format!(
                "{session} was silent for longest and makes room for another"
            ));
            session.cut();
        }
    }

    /// Decides on a claim. When it is granted no other session's request is under way, none will
    /// begin, and what the older ones wrote is durable.
    pub(crate) async fn claim(
        self: &Rc<Self>,
        session: &Session<S>,
        claim: &Claim,
    ) -> Result<(), Denied> {
        if self.export.flags & EXPORT_READ_ONLY != 0 {
            return Err("the disk is exported read-only".to_owned().into());
        }
        let may_cut = |other: &Session<S>| claim.take_over || other.owner() == Some(claim.owner);
        self.take(session, Some(claim), may_cut).await
    }

    /// Lets a session that has not claimed write, where that is allowed.
    pub(crate) async fn let_unclaimed_write(
        self: &Rc<Self>,
        session: &Session<S>,
    ) -> Result<(), Denied> {
        // Who has claimed does not lose the disk to a client that knows no claims.
        let may_cut = |other: &Session<S>| other.owner().is_none();
        self.take(session, None, may_cut).await
    }

    /// Makes the session the writer, or leaves it without the right and without a place in the
    /// queue: also when it had one.
    async fn take(
        self: &Rc<Self>,
        session: &Session<S>,
        claim: Option<&Claim>,
        may_cut: impl Fn(&Session<S>) -> bool,
    ) -> Result<(), Denied> {
        let taken = self.try_to_take(session, claim, may_cut).await;
        if taken.is_err() {
            self.leave(session.id());
            return taken;
        }
        if claim.is_none_or(|claim| claim.resumes.is_none()) {
            self.turn.set(self.turn.get() + 1);
        }
        self.owner.set(claim.map(|claim| claim.owner));
        self.tasks.witness(Step::Granted(session.id()));
        taken
    }

    async fn try_to_take(
        self: &Rc<Self>,
        session: &Session<S>,
        claim: Option<&Claim>,
        may_cut: impl Fn(&Session<S>) -> bool,
    ) -> Result<(), Denied> {
        // Who has no right to the disk costs nobody a session.
        self.judge(claim).await?;
        self.admit(session, may_cut).await?;
        // One that fails has to be known of before anything is said of the turn.
        self.until_no_flush().await;
        refuse_cut(session)?;
        // A client without FUA writes and then flushes; it may have been cut in between. What the
        // next one decides by must not vanish with this machine's power afterwards.
        let flushed = self.flush().await;
        flushed.map_err(|errno| format!("the disk does not flush: {errno}"))?;
        self.judge(claim).await?;
        refuse_cut(session)
    }

    /// Decides by the turn, or by the superblock on the disk. A member of a mirror is written to
    /// by claims only.
    async fn judge(&self, claim: Option<&Claim>) -> Result<(), String> {
        const COPIES: usize = 2 * COPY_BYTES;
        if let Some((owner, turn)) = claim.and_then(|it| Some((it.owner, it.resumes?))) {
            return if self.owner.get() == Some(owner) && self.turn.get() == turn {
                Ok(())
            } else {
                let why =
                    "what it resumes is over: the export was claimed since, or a flush failed";
                Err(why.to_owned())
            };
        }
        if self.export.size_bytes < COPY_A_OFFSET + COPIES as u64 {
            return Ok(());
        }
        let (read, memory) = self.store.read(COPY_A_OFFSET, Memory::zeroed(COPIES)).await;
        read.map_err(|errno| format!("the disk's superblock cannot be read: {errno}"))?;
        let (copy_a, copy_b) = memory.data().split_at(COPY_BYTES);
        let judged = match claim {
            Some(claim) => claim::judge(claim, copy_a, copy_b),
            None => claim::judge_unclaimed(copy_a, copy_b),
        };
        judged.map_err(|refusal| refusal.to_string())
    }

    /// Flushes the disk, and counts a failure: a disk says of it once, to whoever asks first, and
    /// everybody whose writes it concerns has to hear of it.
    pub(crate) async fn flush(self: &Rc<Self>) -> Result<(), Errno> {
        let server = Rc::clone(self);
        self.flushes.set(self.flushes.get() + 1);
        // Whoever asked may be gone before the disk has answered.
        let flushing = begin(&self.tasks, async move {
            let flushed = server.store.flush().await;
            server.flushes.set(server.flushes.get() - 1);
            if flushed.is_err() {
                server.flush_failures.set(server.flush_failures.get() + 1);
                server.turn.set(server.turn.get() + 1);
                server.say("a flush of the disk has failed: what was written to it may be lost");
            }
            server.changed.notify_waiters();
            flushed
        });
        flushing.await.unwrap_or(Err(Errno::IO))
    }

    async fn until_no_flush(&self) {
        loop {
            let changed = self.changed.notified();
            if self.flushes.get() == 0 {
                return;
            }
            changed.await;
        }
    }

    /// How many flushes have failed.
    pub(crate) fn flush_failures(&self) -> u64 {
        self.flush_failures.get()
    }

    /// Waits until the session may write; older ones that may be cut are. When it is refused or
    /// given up, [`Server::leave`] has to follow.
    async fn admit(
        &self,
        session: &Session<S>,
        may_cut: impl Fn(&Session<S>) -> bool,
    ) -> Result<(), Denied> {
        let id = session.id();
        loop {
            let changed = self.changed.notified();
            refuse_cut(session)?;
            if let Some(holder) = self.holder().filter(|holder| holder.id() != id)
                && !may_cut(&holder)
            {
                return Err(Denied::InUse(format!(
                    "the export is in use by {holder}; end that first, or start with --take-over"
                )));
            }
            let answer = self.admission.borrow_mut().ask(id);
            match answer {
                Answer::Granted => {
                    // Who waits behind it has to look at who it is.
                    self.changed.notify_waiters();
                    return Ok(());
                }
                Answer::Wait { cut: Some(other) } => {
                    let other = self.sessions.borrow().get(&other).cloned();
                    if let Some(other) = other {
                        self.say(&format!("{other} is cut: {session} takes over"));
                        other.cut();
                    }
                }
                Answer::Wait { cut: None } => changed.await,
            }
        }
    }

    fn holder(&self) -> Option<Rc<Session<S>>> {
        let holder = self.admission.borrow().holder()?;
        self.sessions.borrow().get(&holder).cloned()
    }

    /// Whether the session may begin a request that changes the disk; if so,
    /// [`Server::change_ended`] follows it.
    pub(crate) fn change_begins(&self, session: SessionId) -> bool {
        let begins = self.admission.borrow_mut().begin(session);
        if begins {
            self.tasks.witness(Step::Begins(session));
        }
        begins
    }

    /// Such a request has ended.
    pub(crate) fn change_ended(&self) {
        self.admission.borrow_mut().end();
        self.changed.notify_waiters();
    }

    /// The session begins no request any more.
    pub(crate) fn leave(&self, session: SessionId) {
        self.admission.borrow_mut().leave(session);
        self.changed.notify_waiters();
    }

    pub(crate) fn may_write_unclaimed(&self) -> bool {
        self.unclaimed == Unclaimed::Write
    }

    pub(crate) fn say(&self, line: &str) {
        (self.say)(line);
    }

    /// Takes no more requests, and returns when those under way have ended and all is durable.
    ///
    /// # Errors
    ///
    /// When the last flush failed.
    pub async fn stop(self: &Rc<Self>) -> Result<(), Errno> {
        self.stopping.set(true);
        self.shutdown_all(Shutdown::Read);
        let empty = within(&self.tasks, STOP_PATIENCE, self.until(BTreeMap::is_empty));
        if empty.await.is_none() {
            // Clients that do not take their replies.
            self.shutdown_all(Shutdown::Both);
            self.until(BTreeMap::is_empty).await;
        }
        self.flush().await
    }

    fn shutdown_all(&self, how: Shutdown) {
        for session in self.sessions.borrow().values() {
            session.shutdown(how);
        }
    }
}
