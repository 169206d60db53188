//! Who may write: one session, and the next only after this one's last request has ended (R13).
//!
//! ```text
//!  Free ──ask──► Held ──another asks, or it leaves──► Draining ──its last request ends──► Free
//!                                                                                           │
//!                        Held by the first in the queue ◄──────────asks again───────────────┘
//! ```
//!
//! What it promises, in whatever order it is called:
//!
//! - [`Admission::begin`] says yes to one session at a time, and to no session while a request
//!   that another one began has not ended.
//! - A session that has been cut never begins a request again, until it is granted anew.
//! - Whoever asks is granted in the end, in the order of asking, if all requests end: nobody who
//!   holds the right can keep it from the next.
//!
//! Only requests that change the disk count. It does no I/O: who calls it shuts the cut session's
//! socket, and asks again.

use std::collections::VecDeque;

/// Names a session within one server; never used twice.
pub type SessionId = u64;

/// The answer to a session that asks to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It may.
    Granted,
    /// Not before older requests have ended.
    Wait {
        /// The session that is to be cut now, and each is named once; after that ask again, at
        /// once. Without one, ask again when something has changed.
        cut: Option<SessionId>,
    },
}

#[derive(Clone, Copy, Debug)]
struct Writer {
    session: SessionId,
    cut: bool,
    running: usize,
}

/// The right to write to one disk.
#[derive(Clone, Debug, Default)]
pub struct Admission {
    writer: Option<Writer>,
    queue: VecDeque<SessionId>,
}

impl Admission {
    /// A session asks to write; asked again it keeps its place.
    pub fn ask(&mut self, session: SessionId) -> Answer {
        if self.holder() == Some(session) {
            return Answer::Granted;
        }
        if !self.queue.contains(&session) {
            self.queue.push_back(session);
        }
        if let Some(writer) = &mut self.writer
            && !writer.cut
        {
            writer.cut = true;
            let cut = Some(writer.session);
            self.settle();
            return Answer::Wait { cut };
        }
        if self.writer.is_some() || self.queue.front() != Some(&session) {
            return Answer::Wait { cut: None };
        }
        self.queue.pop_front();
        self.writer = Some(Writer {
            session,
            cut: false,
            running: 0,
        });
        Answer::Granted
    }

    /// Whether the session may begin a request that changes the disk. If so, [`Admission::end`]
    /// has to follow when the disk has answered it, whatever has become of the session.
    #[must_use]
    pub fn begin(&mut self, session: SessionId) -> bool {
        match &mut self.writer {
            Some(writer) if writer.session == session && !writer.cut => {
                writer.running += 1;
                true
            }
            _ => false,
        }
    }

    /// A request that was begun has ended.
    pub fn end(&mut self) {
        if let Some(writer) = &mut self.writer {
            writer.running = writer.running.saturating_sub(1);
        }
        self.settle();
    }

    /// The session is over, or does not want to write any more.
    pub fn leave(&mut self, session: SessionId) {
        self.queue.retain(|waiting| *waiting != session);
        if let Some(writer) = &mut self.writer
            && writer.session == session
        {
            writer.cut = true;
        }
        self.settle();
    }

    /// The session that may write.
    #[must_use]
    pub fn holder(&self) -> Option<SessionId> {
        let writer = self.writer.filter(|writer| !writer.cut);
        writer.map(|writer| writer.session)
    }

    /// Whether the session may write or waits to.
    #[must_use]
    pub fn concerns(&self, session: SessionId) -> bool {
        self.holder() == Some(session) || self.queue.contains(&session)
    }

    /// Requests that have begun and not ended.
    #[must_use]
    pub fn running(&self) -> usize {
        self.writer.map_or(0, |writer| writer.running)
    }

    fn settle(&mut self) {
        if self.writer.is_some_and(|it| it.cut && it.running == 0) {
            self.writer = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_writer_is_cut_and_drained_before_the_next() {
        let mut admission = Admission::default();
        assert_eq!(admission.ask(1), Answer::Granted);
        assert!(admission.begin(1) && admission.begin(1));
        assert_eq!(admission.ask(2), Answer::Wait { cut: Some(1) });
        assert!(!admission.begin(1), "it has been cut");
        assert_eq!(admission.ask(2), Answer::Wait { cut: None });
        admission.end();
        assert_eq!(admission.ask(2), Answer::Wait { cut: None });
        assert!(!admission.begin(2), "one is still running");
        admission.end();
        assert_eq!(admission.ask(2), Answer::Granted);
        assert!(admission.begin(2) && !admission.begin(1));
    }

    #[test]
    fn a_writer_that_leaves_is_drained_as_well() {
        let mut admission = Admission::default();
        assert_eq!(admission.ask(1), Answer::Granted);
        assert!(admission.begin(1));
        admission.leave(1);
        assert_eq!(admission.holder(), None);
        assert_eq!(admission.ask(2), Answer::Wait { cut: None });
        admission.end();
        assert_eq!(admission.running(), 0);
        assert_eq!(admission.ask(2), Answer::Granted);
    }

    #[test]
    fn who_gives_up_waiting_holds_up_nobody() {
        let mut admission = Admission::default();
        assert_eq!(admission.ask(1), Answer::Granted);
        assert!(admission.begin(1));
        assert_eq!(admission.ask(2), Answer::Wait { cut: Some(1) });
        assert_eq!(admission.ask(3), Answer::Wait { cut: None });
        admission.leave(2);
        admission.end();
        assert_eq!(admission.ask(3), Answer::Granted);
    }

    #[test]
    fn a_writer_with_nothing_under_way_is_cut_all_the_same() {
        let mut admission = Admission::default();
        assert_eq!(admission.ask(1), Answer::Granted);
        assert_eq!(admission.ask(2), Answer::Wait { cut: Some(1) });
        assert!(!admission.begin(1));
        assert_eq!(admission.ask(2), Answer::Granted);
    }

    proptest! {
        /// Against the list of requests that are under way.
        #[test]
        fn requests_under_way_are_one_sessions(
            steps in prop::collection::vec((0u8..4, 0u64..4), 0..200)
        ) {
            let mut admission = Admission::default();
            let (mut under_way, mut cut) = (Vec::new(), Vec::new());
            for (action, session) in steps {
                match action {
                    0 => match admission.ask(session) {
                        Answer::Granted => cut.retain(|it| *it != session),
                        Answer::Wait { cut: Some(other) } => {
                            prop_assert!(other != session && !cut.contains(&other));
                            cut.push(other);
                        }
                        Answer::Wait { cut: None } => {}
                    },
                    1 => if admission.begin(session) {
                        prop_assert!(!cut.contains(&session), "a cut session begins");
                        prop_assert!(under_way.iter().all(|it| *it == session), "two at once");
                        under_way.push(session);
                    },
                    2 => if under_way.pop().is_some() {
                        admission.end();
                    },
                    _ => admission.leave(session),
                }
                prop_assert_eq!(admission.running(), under_way.len());
            }
            // Nothing is left that would keep anybody out.
            for _ in under_way {
                admission.end();
            }
            for session in 0..4 {
                admission.leave(session);
            }
            prop_assert_eq!(admission.ask(9), Answer::Granted);
        }
    }
}
