//! Members behind the network that come back by themselves when it does.
//!
//! # What it promises
//!
//! * Only a member of our own server comes back so, and only when it is its connection that was
//!   lost (or its server was not there when the mirror was started): not one that the operator has
//!   taken out, nor one whose disk has failed. A server of others cannot say that its older sessions
//!   are over (R13): there `mirrorctl re-add` is the operator's word that they are.
//! * It comes back by delta or not at all (R16). What only the operator may decide is said in the
//!   log, and not tried again until they have.
//! * Nobody's session ends by it: what the member says of itself is read first, without a claim, and
//!   a member that somebody else has gone on with is left to them.
//! * A network that comes and goes costs no more than so many joins a minute (`--returns`), and ten
//!   times as many an hour. Each is a round with the gate closed, a resync, and two of the epochs that
//!   a superblock remembers. One that fails counts as well.
//!
//! Tried is after [`FIRST`], then after twice as long each time, up to [`LONGEST`].

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use mirror::control::ErrorKind;
use peer::Address;

use crate::daemon::Daemon;
use crate::member;
use crate::peer_disk::OpenedPeer;
use crate::ring;

/// How often it is looked who is away.
const EVERY: Duration = Duration::from_millis(500);
/// Until the first try, once a member is seen to be away.
const FIRST: Duration = Duration::from_secs(1);
/// Between tries at the most.
const LONGEST: Duration = Duration::from_secs(30);
/// Within which so many joins are allowed.
const WINDOW: Duration = Duration::from_secs(60);
/// Within which [`LONG_SHARE`] times as many are.
const LONG_WINDOW: Duration = Duration::from_secs(3600);
const LONG_SHARE: usize = 10;

/// When to try again.
#[derive(Debug, Default)]
struct Tries {
    /// When joins began, within the last hour.
    joins: VecDeque<Duration>,
    /// The next try is due then; none while the member is in service.
    due: Option<Duration>,
    /// Between this try and the next.
    pause: Duration,
    /// The operator has to decide.
    given_up: bool,
}

/// What is to be done about a member that is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Wait,
    Try,
    /// It has come back as often as it may; until then.
    HeldBack(Duration),
}

impl Tries {
    /// The member is in service.
    fn in_service(&mut self) {
        self.due = None;
        self.given_up = false;
    }

    fn next(&mut self, now: Duration, most: usize) -> Next {
        if self.given_up {
            return Next::Wait;
        }
        let Some(due) = self.due else {
            self.pause = FIRST;
            self.due = Some(now + FIRST);
            return Next::Wait;
        };
        if now < due {
            return Next::Wait;
        }
        let free = self.free_at(WINDOW, most);
        let free = free.max(self.free_at(LONG_WINDOW, most * LONG_SHARE));
        if now < free {
            self.due = Some(free);
            return Next::HeldBack(free - now);
        }
        Next::Try
    }

    /// From when on there are fewer than `most` joins in a window.
    fn free_at(&self, window: Duration, most: usize) -> Duration {
        let last = self.joins.len().checked_sub(most);
        let last = last.and_then(|at| self.joins.get(at));
        last.map_or(Duration::ZERO, |at| *at + window)
    }

    fn join_begins(&mut self, now: Duration) {
        self.joins.push_back(now);
        while self.joins.front().is_some_and(|at| *at + LONG_WINDOW < now) {
            self.joins.pop_front();
        }
    }

    /// A try is over.
    fn tried(&mut self, now: Duration) {
        self.pause = (self.pause * 2).min(LONGEST);
        self.due = Some(now + self.pause);
    }
}

/// Brings members back for as long as the daemon lives, each at most `most` times a minute.
pub(crate) async fn run(daemon: Rc<Daemon>, most: usize) {
    let mut all: HashMap<String, Tries> = HashMap::new();
    loop {
        daemon.ring.sleep_until(ring::now() + EVERY).await;
        let away = daemon.engine.may_return();
        for (path, tries) in &mut all {
            if !away.contains(path) {
                tries.in_service();
                daemon.peers.set_cut_off(path, false);
            }
        }
        let cut_off = |path: &String| peer::is_address(path) && daemon.peers.is_cut_off(path);
        for path in away.into_iter().filter(cut_off) {
            let tries = all.entry(path.clone()).or_default();
            match tries.next(ring::now(), most) {
                Next::Wait => {}
                Next::HeldBack(time) => tracing::warn!(
                    "{path} has come back too often ({most} times a minute, {} an hour); it may \
                     again in {} s",
                    most * LONG_SHARE,
                    time.as_secs()
                ),
                Next::Try => {
                    match bring_back(&daemon, &path, tries).await {
                        Ok(()) => {}
                        Err(Failed::ForNow(why)) => {
                            tracing::debug!("{path} does not return yet: {why}");
                        }
                        Err(Failed::ForGood(why)) => {
                            tracing::warn!("{path} does not return by itself: {why}");
                            tries.given_up = true;
                        }
                    }
                    tries.tried(ring::now());
                }
            }
        }
    }
}

/// Why a member does not return.
enum Failed {
    /// It may a little later.
    ForNow(String),
    /// Only the operator may bring it back.
    ForGood(String),
}

async fn bring_back(daemon: &Rc<Daemon>, path: &str, tries: &mut Tries) -> Result<(), Failed> {
    let for_now = |why: &dyn ToString| Failed::ForNow(why.to_string());
    let address: Address = path
        .parse()
        .map_err(|error: peer::AddressError| Failed::ForGood(error.to_string()))?;
    let _turn = daemon.peers.turn(&daemon.ring, path).await;
    let looking = daemon.ring.try_blocking(move || OpenedPeer::look(&address));
    let says = looking.map_err(|e| for_now(&e))?.await;
    if !daemon.engine.is_past(&says.map_err(|e| for_now(&e))?) {
        let why = "somebody else has gone on with it, or it belongs to another mirror";
        return Err(Failed::ForGood(why.to_owned()));
    }
    let (claimant, owned) = (daemon.peers.claimant(path, false), path.to_owned());
    let opening = daemon
        .ring
        .try_blocking(move || member::open(&owned, claimant));
    let opened = opening.map_err(|e| for_now(&e))?.await;
    let opened = opened.map_err(|e| for_now(&e))?;
    if let Some(why) = opened.unfinished_session() {
        return Err(Failed::ForGood(why));
    }
    if !opened.is_fenced() {
        return Err(Failed::ForGood("its server is none of ours".to_owned()));
    }
    tries.join_begins(ring::now());
    let disk = opened.bind(&daemon.ring, daemon.deadline, &daemon.peers);
    let back = daemon.engine.return_by_itself(path.to_owned(), disk).await;
    back.map(|_| ()).map_err(|error| match error.kind {
        ErrorKind::Refused | ErrorKind::Usage => Failed::ForGood(error.message),
        _ => Failed::ForNow(error.message),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    #[test]
    fn tries_are_further_and_further_apart() {
        let mut tries = Tries::default();
        let mut tried = Vec::new();
        for now in (0..200).map(secs) {
            if tries.next(now, 3) == Next::Try {
                tried.push(now.as_secs());
                tries.tried(now);
            }
        }
        assert_eq!(tried, [1, 3, 7, 15, 31, 61, 91, 121, 151, 181]);
        tries.in_service();
        assert_eq!(tries.next(secs(200), 3), Next::Wait);
        assert_eq!(tries.next(secs(201), 3), Next::Try);
    }

    /// When it joins, if it is lost again at once each time.
    fn joins(most: usize, until: u64) -> Vec<u64> {
        let mut tries = Tries::default();
        let mut joins = Vec::new();
        for now in (0..until).map(secs) {
            if tries.next(now, most) == Next::Try {
                tries.join_begins(now);
                joins.push(now.as_secs());
                tries.tried(now);
                tries.in_service();
            }
        }
        joins
    }

    #[test]
    fn a_network_that_comes_and_goes_is_held_back_by_the_minute_and_by_the_hour() {
        assert_eq!(joins(3, 150), [1, 3, 5, 61, 63, 65, 121, 123, 125]);
        let within = |joins: &[u64], at: u64| {
            let hour = joins.iter().filter(|join| (at..at + 3600).contains(*join));
            hour.count()
        };
        let joins = joins(2, 3 * 3600);
        assert!(
            joins.iter().all(|at| within(&joins, *at) <= 20),
            "{joins:?}"
        );
        assert!(joins.len() >= 60, "{joins:?}");
    }

    #[test]
    fn a_join_that_takes_long_and_fails_is_followed_by_a_pause() {
        let mut tries = Tries::default();
        tries.next(secs(0), 3);
        assert_eq!(tries.next(secs(1), 3), Next::Try);
        tries.tried(secs(40));
        assert_eq!(tries.next(secs(41), 3), Next::Wait);
        assert_eq!(tries.next(secs(42), 3), Next::Try);
    }

    #[test]
    fn what_the_operator_has_to_decide_is_not_tried_again() {
        let mut tries = Tries {
            given_up: true,
            ..Tries::default()
        };
        assert!((0..100).all(|now| tries.next(secs(now), 3) == Next::Wait));
        tries.in_service();
        assert!((100..103).any(|now| tries.next(secs(now), 3) == Next::Try));
    }
}
