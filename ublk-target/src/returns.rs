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
//! * A network that comes and goes costs no more than so many returns a minute (`--returns`), each of
//!   which is a round with the gate closed and a resync.
//!
//! Tried is after [`FIRST`], then after twice as long each time, up to [`LONGEST`].

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use mirror::control::ErrorKind;

use crate::daemon::Daemon;
use crate::member;
use crate::ring;

/// How often it is looked who is away.
const EVERY: Duration = Duration::from_millis(500);
/// Until the first try, once a member is seen to be away.
const FIRST: Duration = Duration::from_secs(1);
/// Between tries at the most.
const LONGEST: Duration = Duration::from_secs(30);
/// Within which returns are counted.
const WINDOW: Duration = Duration::from_secs(60);

/// When to try again.
#[derive(Debug, Default)]
struct Tries {
    /// When the last returns were, as many as are allowed in a window.
    returns: VecDeque<Duration>,
    /// The next try is due then; none while the member is in service.
    due: Option<Duration>,
    /// Between this try and the next.
    pause: Duration,
    /// The operator has to decide.
    given_up: bool,
}

/// What is to be done about a member that is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
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

    fn turn(&mut self, now: Duration, most: usize) -> Turn {
        if self.given_up {
            return Turn::Wait;
        }
        let Some(due) = self.due else {
            self.pause = FIRST;
            self.due = Some(now + FIRST);
            return Turn::Wait;
        };
        if now < due {
            return Turn::Wait;
        }
        while self.returns.len() >= most {
            let over = self.returns.front().map_or(now, |first| *first + WINDOW);
            if now < over {
                self.due = Some(over);
                return Turn::HeldBack(over - now);
            }
            self.returns.pop_front();
        }
        self.pause = (self.pause * 2).min(LONGEST);
        self.due = Some(now + self.pause);
        Turn::Try
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
            }
        }
        for path in away.into_iter().filter(|it| daemon.peers.is_cut_off(it)) {
            let tries = all.entry(path.clone()).or_default();
            match tries.turn(ring::now(), most) {
                Turn::Wait => {}
                Turn::HeldBack(time) => tracing::warn!(
                    "{path} has come back {most} times within a minute; it may again in {} s",
                    time.as_secs()
                ),
                Turn::Try => match bring_back(&daemon, &path).await {
                    Ok(()) => tries.returns.push_back(ring::now()),
                    Err(Failed::ForNow(why)) => {
                        // Also when there was a connection already.
                        daemon.peers.was_absent(&path);
                        tracing::debug!("{path} does not return yet: {why}");
                    }
                    Err(Failed::ForGood(why)) => {
                        tracing::warn!("{path} does not return by itself: {why}");
                        tries.given_up = true;
                    }
                },
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

async fn bring_back(daemon: &Rc<Daemon>, path: &str) -> Result<(), Failed> {
    let claimant = daemon.peers.claimant(path, false);
    let owned = path.to_owned();
    let opening = daemon.ring.blocking(move || member::open(&owned, claimant));
    let opened = opening.await.map_err(|error| {
        if error.is_absence() || error.may_pass() {
            Failed::ForNow(error.to_string())
        } else {
            Failed::ForGood(error.to_string())
        }
    })?;
    if let Some(why) = opened.unfinished_session() {
        return Err(Failed::ForGood(why));
    }
    if !opened.is_fenced() {
        return Err(Failed::ForGood("its server is none of ours".to_owned()));
    }
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
        for now in 0..200 {
            if tries.turn(secs(now), 3) == Turn::Try {
                tried.push(now);
            }
        }
        assert_eq!(tried, [1, 3, 7, 15, 31, 61, 91, 121, 151, 181]);
        tries.in_service();
        assert_eq!(tries.turn(secs(200), 3), Turn::Wait);
        assert_eq!(tries.turn(secs(201), 3), Turn::Try);
    }

    #[test]
    fn a_network_that_comes_and_goes_brings_a_member_back_so_often_a_minute() {
        let mut tries = Tries::default();
        let mut back = Vec::new();
        for now in 0..150 {
            match tries.turn(secs(now), 3) {
                Turn::Try => {
                    back.push(now);
                    tries.returns.push_back(secs(now));
                    // And is lost again at once.
                    tries.in_service();
                }
                Turn::HeldBack(time) => {
                    assert_eq!(secs(now) + time, secs(back[back.len() - 3] + 60))
                }
                Turn::Wait => {}
            }
        }
        assert_eq!(back, [1, 3, 5, 61, 63, 65, 121, 123, 125]);
    }

    #[test]
    fn what_the_operator_has_to_decide_is_not_tried_again() {
        let mut tries = Tries {
            given_up: true,
            ..Tries::default()
        };
        assert!((0..100).all(|now| tries.turn(secs(now), 3) == Turn::Wait));
        tries.in_service();
        assert!((100..103).any(|now| tries.turn(secs(now), 3) == Turn::Try));
    }
}
