//! One exported disk: its sessions, who of them may write, and the end of it all.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::Shutdown;
use std::rc::Rc;
use std::time::Duration;

use mirror::superblock::{COPY_A_OFFSET, COPY_BYTES};
use peer::claim::{self, Claim};
use peer::server::Export;
use peer::server::admission::{Admission, Answer, SessionId};
use peer::wire::EXPORT_READ_ONLY;
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::io::{Store, Stream};
use crate::memory::Memory;
use crate::session::Session;

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

/// One exported disk.
pub(crate) struct Server<D, S> {
    pub(crate) store: D,
    /// As a writer sees it.
    export: Export,
    unclaimed: Unclaimed,
    instance: u128,
    admission: RefCell<Admission>,
    sessions: RefCell<BTreeMap<SessionId, Rc<Session<S>>>>,
    last_session: Cell<SessionId>,
    stopping: Cell<bool>,
    /// Notified when the right to write, or the number of sessions, has changed.
    changed: Notify,
    say: Box<dyn Fn(&str)>,
}

impl<D: Store, S: Stream> Server<D, S> {
    /// A server of `export`, as a writer sees it; `say` gets a line for a person now and then.
    pub(crate) fn new(
        store: D,
        export: Export,
        unclaimed: Unclaimed,
        instance: u128,
        say: Box<dyn Fn(&str)>,
    ) -> Rc<Self> {
        Rc::new(Self {
            store,
            export,
            unclaimed,
            instance,
            admission: RefCell::default(),
            sessions: RefCell::default(),
            last_session: Cell::new(0),
            stopping: Cell::new(false),
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

    /// The export as the writer sees it.
    pub(crate) fn writers_export(&self) -> Export {
        self.export.clone()
    }

    /// Random at each start.
    pub(crate) fn instance(&self) -> u128 {
        self.instance
    }

    /// Serves a client until it leaves, in a task of its own. When all places are taken, the
    /// session goes that has been silent for longest and neither writes nor waits to.
    pub(crate) async fn open(self: &Rc<Self>, stream: S, from: String) {
        if self.sessions.borrow().len() >= SESSIONS_MAX {
            self.cut_a_silent_session();
            let place = timeout(PLACE_PATIENCE, self.until(|it| it.len() < SESSIONS_MAX));
            if place.await.is_err() {
                let taken = format!("no place for {from}: {SESSIONS_MAX} sessions are open");
                return self.say(&taken);
            }
        }
        if self.stopping.get() {
            return;
        }
        let id = self.last_session.get() + 1;
        self.last_session.set(id);
        let session = Session::new(id, stream, from);
        self.sessions.borrow_mut().insert(id, Rc::clone(&session));
        let server = Rc::clone(self);
        tokio::task::spawn_local(async move {
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
        let idle = sessions.values().filter(|it| !admission.concerns(it.id()));
        if let Some(session) = idle.min_by_key(|it| it.heard()) {
            self.say(&format!(
                "{session} was silent for longest and makes room for another"
            ));
            session.cut();
        }
    }

    /// Decides on a claim. When it is granted no other session's request is under way, none will
    /// begin, and what the older ones wrote is durable.
    pub(crate) async fn claim(&self, session: &Session<S>, claim: &Claim) -> Result<(), String> {
        if self.export.flags & EXPORT_READ_ONLY != 0 {
            return Err("the disk is exported read-only".to_owned());
        }
        // Who has no right to the disk costs nobody a session.
        self.judge(claim).await?;
        self.admit(session, |other| {
            claim.take_over || other.owner() == Some(claim.owner)
        })
        .await?;
        let granted = self.settle(claim).await;
        if granted.is_err() {
            self.leave(session.id());
        }
        granted
    }

    /// What follows the last request of the session before.
    async fn settle(&self, claim: &Claim) -> Result<(), String> {
        // A client without FUA writes and then flushes; it may have been cut in between. What the
        // next one decides by must not vanish with this machine's power afterwards.
        let flushed = self.store.flush().await;
        flushed.map_err(|errno| format!("the disk does not flush: {errno}"))?;
        self.judge(claim).await
    }

    async fn judge(&self, claim: &Claim) -> Result<(), String> {
        const COPIES: usize = 2 * COPY_BYTES;
        if self.export.size_bytes < COPY_A_OFFSET + COPIES as u64 {
            return Ok(());
        }
        let (read, memory) = self.store.read(COPY_A_OFFSET, Memory::zeroed(COPIES)).await;
        read.map_err(|errno| format!("the disk's superblock cannot be read: {errno}"))?;
        let (copy_a, copy_b) = memory.data().split_at(COPY_BYTES);
        claim::judge(claim, copy_a, copy_b).map_err(|refusal| refusal.to_string())
    }

    /// Lets a session that has not claimed write, where that is allowed.
    pub(crate) async fn let_unclaimed_write(&self, session: &Session<S>) -> Result<(), String> {
        // Who has claimed does not lose the disk to a client that knows no claims.
        self.admit(session, |other| other.owner().is_none()).await?;
        let flushed = self.store.flush().await;
        flushed.map_err(|errno| {
            self.leave(session.id());
            format!("the disk does not flush: {errno}")
        })
    }

    /// Waits until the session may write; older ones that may be cut are. When it is refused or
    /// given up, [`Server::leave`] has to follow.
    async fn admit(
        &self,
        session: &Session<S>,
        may_cut: impl Fn(&Session<S>) -> bool,
    ) -> Result<(), String> {
        let id = session.id();
        loop {
            let changed = self.changed.notified();
            if let Some(holder) = self.holder().filter(|holder| holder.id() != id)
                && !may_cut(&holder)
            {
                self.leave(id);
                return Err(format!(
                    "the export is in use by {holder}; end that first, or take over with \
                     --peer-sessions-over"
                ));
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
        self.admission.borrow_mut().begin(session)
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
    pub(crate) async fn stop(&self) -> Result<(), mirror::host::Errno> {
        self.stopping.set(true);
        self.shutdown_all(Shutdown::Read);
        if timeout(STOP_PATIENCE, self.until(BTreeMap::is_empty))
            .await
            .is_err()
        {
            // Clients that do not take their replies.
            self.shutdown_all(Shutdown::Both);
            self.until(BTreeMap::is_empty).await;
        }
        self.store.flush().await
    }

    fn shutdown_all(&self, how: Shutdown) {
        for session in self.sessions.borrow().values() {
            session.shutdown(how);
        }
    }
}
