//! Another connection in the place of one that has broken.
//!
//! ```text
//!      broken               within the deadline
//! Up ─────────► Broken ──────────────────────────► Up, asked again what was not answered
//!                 │ the deadline has passed, or no server is there
//!                 ▼          the very server, and nobody else has had the right to write
//!               Down ────────────────────────────► Up, nothing is asked again
//!                 │ another has had it, the disk is let go of
//!                 ▼
//!               Ended
//! ```
//!
//! While it is down all that is asked fails, as on a disk that has errors: a mirror that has another
//! in-sync member loses this one then, and lets go of it. The last one in-sync is lost by no error
//! (R8), and serves again without anybody's help. What failed is never asked again, and has ended when
//! the server admits another connection (R13).

use std::rc::Rc;
use std::time::Duration;

use super::{GIVEN_UP, Link, Net, QUIET, Reopened};

/// Between attempts to connect again: at first, and at last.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const IDLE_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(1);

impl<N: Net> Link<N> {
    /// Whether another connection may go on in this one's place.
    pub(super) fn may_go_on(&self) -> bool {
        let state = self.state.borrow();
        !self.ways.is_empty() && !state.ended && !state.leaving && state.orphans == 0
    }

    /// Gives a connection up that owes an answer and says nothing, when there is another way, unless
    /// its server answers who asks anew on the same way: then its disk is slow. With each in a row
    /// that is given up so the next one gets twice the time.
    pub(super) async fn watch(self: Rc<Self>) {
        let wire = Rc::clone(&self.wire.borrow());
        let (mut replies, mut heard) = (self.replies.get(), self.net.now());
        let is_past = || {
            let replaced = !Rc::ptr_eq(&wire, &self.wire.borrow());
            replaced || self.going_on.get() || self.state.borrow().is_over()
        };
        loop {
            self.net.sleep_until(self.net.now() + QUIET / 4).await;
            if is_past() {
                return;
            }
            if self.replies.get() != replies {
                self.quiet.set(QUIET);
            }
            if self.in_flight.get() == 0 || self.replies.get() != replies {
                (replies, heard) = (self.replies.get(), self.net.now());
            } else if self.net.now() > heard + self.quiet.get() && self.may_go_on() {
                let way = Rc::clone(&self.ways[self.way.get()]);
                let silent = !self.net.answers(&way).await;
                if is_past() {
                    // It is not about the connection that there is now.
                    return;
                }
                if !silent {
                    heard = self.net.now();
                }
                if !silent || self.replies.get() != replies || !self.may_go_on() {
                    continue;
                }
                self.quiet.set(self.quiet.get() * 2);
                self.way.set((self.way.get() + 1) % self.ways.len());
                return self.break_off("no answer, and there is another way");
            }
        }
    }

    /// Tries all ways until another connection is up, or it is clear that none can go on in this
    /// one's place.
    pub(super) async fn go_on(self: Rc<Self>) {
        self.going_on.set(true);
        self.find_another().await;
        self.going_on.set(false);
    }

    async fn find_another(self: &Rc<Self>) {
        let begun = self.net.now();
        let mut pause = FIRST_PAUSE;
        if begun < self.since.get() + LAST_PAUSE {
            // One that broke soon may be followed by another such.
            self.net.sleep_until(begun + IDLE_PAUSE).await;
        }
        loop {
            let (mut nobody, mut last) = (true, String::new());
            let first = self.way.get();
            for step in 0..self.ways.len() {
                let at = (first + step) % self.ways.len();
                let way = Rc::clone(&self.ways[at]);
                if !self.may_go_on() {
                    return self.end(GIVEN_UP);
                }
                let reopened = self.net.reopen(&way).await;
                if !self.may_go_on() {
                    return self.end(GIVEN_UP);
                }
                match reopened {
                    Reopened::Up(opened) if opened.export == self.export => {
                        self.way.set(at);
                        self.wire.replace(Rc::new(opened.wire));
                        return self.ask_again(&opened.address, self.net.now() - begun);
                    }
                    Reopened::Up(_) => return self.end("the export has changed"),
                    Reopened::Never(why) => return self.end(&why),
                    Reopened::Nobody(why) => last = why,
                    Reopened::NotNow(why) => (nobody, last) = (false, why),
                }
            }
            if nobody || self.net.now() >= begun + self.deadline {
                self.is_down(&last);
            }
            self.net.sleep_until(self.net.now() + pause).await;
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    /// Nobody waits any longer. Whoever has another member goes on with that, and this link ends with
    /// its disk; who has none is served again when another connection is up.
    fn is_down(&self, why: &str) {
        {
            let mut state = self.state.borrow_mut();
            if std::mem::replace(&mut state.down, true) {
                return;
            }
        }
        tracing::warn!("{} cannot be reached: {why}", self.address);
        self.give_up();
    }

    /// Goes on with a new connection.
    fn ask_again(self: &Rc<Self>, through: &str, after: Duration) {
        let parts = self.state.borrow_mut().take_parts();
        let asked = parts.len();
        {
            let mut state = self.state.borrow_mut();
            if parts.iter().any(|part| state.is_refused(part)) {
                drop(state);
                self.fail(parts);
                return self.end("what its server has refused must not be asked again");
            }
            state.broken = false;
            if std::mem::take(&mut state.down) {
                state.up_again = Some(self.net.now());
            }
            parts.into_iter().for_each(|part| state.send(part));
        }
        let after = after.as_millis();
        tracing::info!(
            "{} is connected again through {through} after {after} ms; requests asked again: {asked}",
            self.address
        );
        self.begin();
    }
}
