//! Going on with another connection, when that is allowed.

use std::rc::Rc;
use std::time::Duration;

use super::{FIRST_PAUSE, GIVEN_UP, IDLE_PAUSE, LAST_PAUSE, Link, Net, Reopened};

impl<N: Net> Link<N> {
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
            for step in 0..self.ways.len() {
                let at = (self.way.get() + step) % self.ways.len();
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
                return self.end(&last);
            }
            self.net.sleep_until(self.net.now() + pause).await;
            pause = (pause * 2).min(LAST_PAUSE);
        }
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
