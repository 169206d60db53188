//! The scrubber: passes over a mirror's written extents, when they begin and how fast they go.
//!
//! What is wrong with an extent, and which copy is right, the engine finds out and mends; this
//! crate decides which extent is next. It knows the mirror as a [`Subject`].
//!
//! | module | holds |
//! |---|---|
//! | `sweep` | the order of a pass: once around, then what was hot again |
//! | `schedule` | when a pass is due, and how fast it has to be to end in time |
//! | `documents` | what an operator sees |
//! | `engine` | the engine's mirror as a [`Subject`] |
//! | `wait` | waiting for a while, or for news |
//!
//! # A pass
//!
//! ```text
//! start ─► … ─► end of the device ─► 0 ─► … ─► start ─► hot ones again, up to 4 times ─► over
//!   │ extents that are not written are passed over; hot ones are left for later
//! ```
//!
//! The first pass over a member starts anywhere: members of one make and age are not read in the
//! same order, and what is pulled and added again and again is scrubbed everywhere. Eight lanes
//! check one extent each, so that disks read while another lane computes. How far the pass has
//! come is kept in the mirror itself ([`mirror::scrub_log::ScrubLog`]), every few seconds or GiB; a
//! restart goes on from there.
//!
//! [`Scrubber::run`] is the task; the other methods are an operator's commands. They change what is
//! asked for and return at once.
#![forbid(unsafe_code)]

mod documents;
mod engine;
mod schedule;
mod sweep;
#[cfg(test)]
mod tests;
mod wait;

use dirty_map::{EXTENT_BYTES, Extent};
use mirror::control::ErrorKind;
use mirror::engine::{CheckOptions, Checked, ExtentLook};
use mirror::pace::{Limits, Pacer};
use mirror::scrub_log::{Choices, Ending, Pass, ScrubLog};
use mirror::{ControlError, Errno, Host};
pub use schedule::DAYS_DEFAULT;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;
use sweep::{Next, Sweep};
use wait::News;

/// Extents checked at once: while some compute or wait for their page of checksums, the others keep
/// the disks busy. Each takes its size in memory for every member.
const LANES: usize = 8;
/// How far a pass has come is kept this often,
const NOTED_EVERY: Duration = Duration::from_secs(5);
/// or after so many bytes of the device.
const NOTED_BYTES: u64 = 1 << 30;
/// How often to look whether a pass is due.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// How long to wait before hot extents are visited again: they cool after ten seconds.
const COOLING: Duration = Duration::from_secs(15);
/// How long to wait after a check that failed.
const AFTER_ERROR: Duration = Duration::from_secs(1);
/// Where checking an extent takes less, the next may be read in one request a member.
const QUICK: Duration = Duration::from_millis(500);
/// After how many hot extents that are left others have a turn.
const HOT_AT_A_TIME: u32 = 1024;
/// How often a lane that has nothing to do looks at the others.
const LANE_RECHECK: Duration = Duration::from_millis(50);

/// A mirror, as the scrubber sees it.
pub trait Subject: 'static {
    /// Time, randomness and tasks.
    type Host: Host;

    /// Its surroundings.
    fn host(&self) -> &Self::Host;

    /// Extents of the device.
    fn extents(&self) -> u32;

    /// The first written extent from `from` on.
    fn next_written(&self, from: Extent) -> Option<Extent>;

    /// How many are written.
    fn written(&self) -> u64;

    /// What an extent looks like.
    fn look(&self, extent: Extent) -> ExtentLook;

    /// Checks an extent.
    ///
    /// # Errors
    ///
    /// When it could not be checked.
    fn check(
        &self,
        extent: Extent,
        how: CheckOptions,
    ) -> impl Future<Output = Result<Checked, Errno>>;

    /// Lends the log. What is changed there becomes durable with one of the next map commits.
    fn log<R>(&self, lent: impl FnOnce(&mut ScrubLog) -> R) -> R;

    /// Whether the log is kept across restarts.
    fn log_is_kept(&self) -> bool;

    /// The budget of errors that a member may have, as text.
    fn error_budget(&self) -> String;

    /// The in-sync members as one number: another one when there is another member. Not 0.
    fn members(&self) -> u64;

    /// Whether there have been no foreground requests for a while.
    fn is_idle(&self) -> bool;

    /// The latencies of foreground requests go to `pacer` from now on, or no longer.
    fn sample(&self, pacer: &Rc<RefCell<Pacer>>, on: bool);
}

/// What the operator chose when the daemon was started; a command overrides it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Days from the begin of one pass to that of the next; 0: only by command.
    pub days: Option<u16>,
    /// Most MiB a second that a member is read with.
    pub ceiling_mib: Option<u32>,
}

/// What `start` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// Repair nothing.
    pub check_only: bool,
    /// No further pass begins by itself.
    pub once: bool,
    /// Days from the begin of one pass to that of the next, from now on.
    pub days: Option<u16>,
    /// Most MiB a second that a member is read with, from now on; 0: as much as it gives.
    pub ceiling_mib: Option<u32>,
}

/// The scrubber of one mirror. See the crate's documentation.
pub struct Scrubber<S: Subject> {
    subject: S,
    settings: Settings,
    pacer: Rc<RefCell<Pacer>>,
    sweep: RefCell<Option<Sweep>>,
    /// A pass is to begin: whether it only checks.
    wanted: Cell<Option<bool>>,
    cancelled: Cell<bool>,
    stopping: Cell<bool>,
    running: Cell<bool>,
    /// Lanes that still work.
    lanes: Cell<usize>,
    news: News,
    /// The extent checked last was read quickly.
    quick: Cell<bool>,
    noted: Cell<Duration>,
    bytes_since_noted: Cell<u64>,
}

impl<S: Subject> Scrubber<S> {
    /// A scrubber of `subject`; [`Scrubber::run`] has to be run as a task.
    pub fn new(subject: S, settings: Settings) -> Rc<Self> {
        let now = subject.host().now();
        Rc::new(Self {
            subject,
            settings,
            pacer: Rc::new(RefCell::new(Pacer::new(Limits::SCRUB, now))),
            sweep: RefCell::new(None),
            wanted: Cell::new(None),
            cancelled: Cell::new(false),
            stopping: Cell::new(false),
            running: Cell::new(false),
            lanes: Cell::new(0),
            news: News::default(),
            quick: Cell::new(false),
            noted: Cell::new(now),
            bytes_since_noted: Cell::new(0),
        })
    }

    /// Scrubs until [`Scrubber::stop`].
    pub async fn run(self: Rc<Self>) {
        self.running.set(true);
        while !self.stopping.get() {
            if self.paused() || !self.has_work() {
                self.wait(LOOK_EVERY).await;
                continue;
            }
            self.scrub().await;
        }
        self.running.set(false);
        self.news.tell();
    }

    /// Ends the task, with the pass noted; the next start goes on with it. Call before the mirror
    /// stops.
    pub async fn stop(&self) {
        self.stopping.set(true);
        self.news.tell();
        while self.running.get() {
            self.wait(LOOK_EVERY).await;
        }
    }

    /// Begins a pass, or says why not.
    ///
    /// # Errors
    ///
    /// When a pass of the other kind is under way; nothing is changed then.
    pub fn start(&self, start: Start) -> Result<String, ControlError> {
        let under_way = self.subject.log(|log| log.pass().cloned());
        if let Some(pass) = under_way
            .as_ref()
            .filter(|it| it.check_only != start.check_only)
        {
            return Err(ControlError {
                kind: ErrorKind::Busy,
                message: format!(
                    "pass {} is under way, and it {}; end it with 'mirrorctl scrub cancel' first",
                    pass.number,
                    if pass.check_only {
                        "only checks"
                    } else {
                        "repairs"
                    }
                ),
            });
        }
        self.subject.log(|log| {
            let mut choices = log.choices();
            choices.paused = false;
            choices.days = start.days.or(choices.days);
            if start.once {
                choices.days = Some(0);
            }
            choices.ceiling_mib = start.ceiling_mib.or(choices.ceiling_mib);
            log.choose(choices);
        });
        self.limit();
        self.news.tell();
        let later = if start.once {
            "; from now on none begins by itself ('mirrorctl scrub start --days N' changes that)"
        } else {
            ""
        };
        if let Some(pass) = under_way {
            return Ok(format!("pass {} is under way{later}", pass.number));
        }
        self.wanted.set(Some(start.check_only));
        let extents = self.subject.written();
        let kind = if start.check_only {
            "a check-only pass"
        } else {
            "a pass"
        };
        Ok(format!(
            "{kind} over {extents} written extents begins{later}"
        ))
    }

    /// Nothing is scrubbed until `resume`, also after a restart.
    pub fn pause(&self) -> String {
        self.set_paused(true);
        "scrubbing is paused; go on with 'mirrorctl scrub resume'".to_owned()
    }

    /// Goes on.
    pub fn resume(&self) -> String {
        self.set_paused(false);
        "scrubbing goes on".to_owned()
    }

    fn set_paused(&self, paused: bool) {
        self.subject.log(|log| {
            let choices = log.choices();
            log.choose(Choices { paused, ..choices });
        });
        self.news.tell();
    }

    /// Ends the pass under way; the next begins at its usual time.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn cancel(&self) -> Result<String, ControlError> {
        let wanted = self.wanted.take().is_some();
        let Some(number) = self.subject.log(|log| log.pass().map(|pass| pass.number)) else {
            return if wanted {
                Ok("the pass does not begin".to_owned())
            } else {
                Err(ControlError {
                    kind: ErrorKind::NotFound,
                    message: "no pass is under way".to_owned(),
                })
            };
        };
        if self.sweep.borrow().is_some() {
            // The lanes see it at their next extent and the task ends the pass.
            self.cancelled.set(true);
        } else {
            self.end_pass(Ending::Cancelled);
        }
        self.news.tell();
        Ok(format!("pass {number} is cancelled"))
    }

    /// Whether a pass is under way or has to begin; begins it.
    fn has_work(&self) -> bool {
        if self.subject.log(|log| log.pass().is_some()) {
            return true;
        }
        let check_only = match self.wanted.take() {
            Some(check_only) => check_only,
            None if self.is_due() => false,
            None => return false,
        };
        self.begin(check_only);
        true
    }

    fn is_due(&self) -> bool {
        // There is nothing to look for on a mirror that nobody has written to.
        let days = self.days();
        self.subject.written() > 0
            && self.subject.log(|log| {
                schedule::next_at(days, log.passes()).is_some_and(|at| self.wall_clock() >= at)
            })
    }

    fn begin(&self, check_only: bool) {
        let now = self.wall_clock();
        let extents = u128::from(self.subject.extents().max(1));
        let anywhere = self.subject.host().random() % extents;
        let members = self.subject.members();
        let number = self.subject.log(|log| {
            let start = if log.totals().members != members {
                u32::try_from(anywhere).unwrap_or(0)
            } else {
                0
            };
            log.begin_pass(now, Extent(start), check_only, members)
                .number
        });
        tracing::info!("scrub pass {number} begins");
    }

    /// Goes on with the pass under way until it is over, paused, cancelled or left at a stop.
    async fn scrub(self: &Rc<Self>) {
        let Some(pass) = self.subject.log(|log| log.pass().cloned()) else {
            return;
        };
        self.sweep
            .replace(Some(Sweep::new(pass, self.subject.extents())));
        self.noted.set(self.now());
        self.pacer.replace(Pacer::new(Limits::SCRUB, self.now()));
        if self.subject.is_idle() {
            self.pacer.borrow_mut().begin_idle(self.now());
        }
        self.limit();
        self.subject.sample(&self.pacer, true);
        self.lanes.set(LANES);
        for _ in 0..LANES {
            let own = self.clone();
            self.subject
                .host()
                .spawn(Box::pin(async move { own.lane().await }));
        }
        while self.lanes.get() > 0 {
            self.wait(LOOK_EVERY).await;
        }
        self.subject.sample(&self.pacer, false);
        self.note();
        let over = self.sweep.take().is_some_and(|sweep| sweep.is_over());
        if self.cancelled.take() {
            self.end_pass(Ending::Cancelled);
        } else if over {
            self.end_pass(Ending::Complete);
        }
    }

    /// Checks one extent after the other.
    async fn lane(&self) {
        self.check_extents().await;
        self.lanes.set(self.lanes.get() - 1);
        self.news.tell();
    }

    async fn check_extents(&self) {
        let mut left_hot = 0_u32;
        while !self.is_interrupted() {
            let next = self.with_sweep(|sweep| sweep.next(|from| self.subject.next_written(from)));
            match next {
                Some(Next::Extent(extent)) if self.is_left_hot(extent) => {
                    // Costs nothing, so it is no measure of the pace; but others want to run.
                    self.with_sweep(|sweep| sweep.left(extent));
                    left_hot = left_hot.wrapping_add(1);
                    if left_hot.is_multiple_of(HOT_AT_A_TIME) {
                        self.wait(LANE_RECHECK).await;
                    }
                }
                Some(Next::Extent(extent)) => self.check(extent).await,
                Some(Next::Later) => self.wait(LANE_RECHECK).await,
                Some(Next::Cooling) => self.cooled().await,
                Some(Next::Over) | None => return,
            }
        }
    }

    /// Whether an extent is hot and has still a chance to cool before the pass ends.
    fn is_left_hot(&self, extent: Extent) -> bool {
        let in_the_end = self.with_sweep(|sweep| sweep.hot_too()).unwrap_or(false);
        !in_the_end && self.subject.look(extent) == ExtentLook::Hot
    }

    async fn check(&self, extent: Extent) {
        loop {
            let admitted = self.pacer.borrow_mut().admit(self.now(), EXTENT_BYTES);
            let Err(wait) = admitted else { break };
            self.wait(wait).await;
            if self.is_interrupted() {
                self.with_sweep(|sweep| sweep.left(extent));
                return;
            }
        }
        let how = CheckOptions {
            // On a slow link all lanes' requests for whole extents might together take a deadline.
            at_once: self.quick.get() && self.pacer.borrow().is_idle(),
            ..self.with_sweep(|sweep| sweep.how()).unwrap_or_default()
        };
        let began = self.now();
        let result = self.subject.check(extent, how).await;
        if !result.is_ok_and(|checked| checked.skipped_hot) {
            self.quick.set(self.now().saturating_sub(began) < QUICK);
        }
        self.pacer.borrow_mut().finished();
        match result {
            Ok(checked) if checked.skipped_hot => self.with_sweep(|sweep| sweep.left(extent)),
            Ok(checked) => self.with_sweep(|sweep| sweep.checked(extent, &checked)),
            Err(_) => self.with_sweep(|sweep| sweep.left(extent)),
        };
        let failed = result.map_or_else(Some, |checked| checked.failed);
        if let Some(errno) = failed {
            tracing::warn!("extent {} could not be checked: {errno}", extent.0);
            self.wait(AFTER_ERROR).await;
        }
        let bytes = self.bytes_since_noted.get() + EXTENT_BYTES;
        self.bytes_since_noted.set(bytes);
        let since = self.now().saturating_sub(self.noted.get());
        if bytes >= NOTED_BYTES || since >= NOTED_EVERY {
            self.note();
            self.limit();
        }
    }

    /// Waits until hot extents may have cooled.
    async fn cooled(&self) {
        let until = self.now() + COOLING;
        while !self.is_interrupted() && self.now() < until {
            let left = until.saturating_sub(self.now());
            self.wait(left).await;
        }
        if !self.is_interrupted() {
            self.with_sweep(Sweep::again);
        }
    }

    fn with_sweep<R>(&self, with: impl FnOnce(&mut Sweep) -> R) -> Option<R> {
        self.sweep.borrow_mut().as_mut().map(with)
    }

    fn is_interrupted(&self) -> bool {
        self.stopping.get() || self.cancelled.get() || self.paused()
    }

    fn paused(&self) -> bool {
        self.subject.log(|log| log.choices().paused)
    }

    /// Writes down how far the pass has come.
    fn note(&self) {
        let now = self.now();
        let worked = now.saturating_sub(self.noted.replace(now));
        self.bytes_since_noted.set(0);
        let noted = self.with_sweep(|sweep| sweep.noted(worked));
        if let Some(pass) = noted {
            self.subject.log(|log| log.note_pass(pass));
        }
    }

    fn end_pass(&self, ending: Ending) {
        let now = self.wall_clock();
        let ended = self.subject.log(|log| {
            log.end_pass(now, ending);
            log.passes().first().copied()
        });
        if let Some(pass) = ended {
            let how = match ending {
                Ending::Complete => "is complete",
                Ending::Cancelled => "was cancelled",
            };
            tracing::info!(
                "scrub pass {} {how}: {} findings, {} blocks repaired, {} damaged, {} extents \
                 left out because they were hot",
                pass.number,
                pass.findings,
                pass.repaired,
                pass.damaged,
                pass.left_out
            );
        }
    }

    /// Tells the pacer what it has to keep.
    fn limit(&self) {
        let pass = self.with_sweep(|sweep| sweep.pass().clone());
        let floor = pass.map_or(0, |pass| self.floor(&pass));
        let mib = self.ceiling_mib().filter(|mib| *mib > 0);
        let ceiling = mib.map_or(u64::MAX, |mib| u64::from(mib) << 20);
        self.pacer.borrow_mut().set_limits(Limits {
            floor,
            ceiling,
            ..Limits::SCRUB
        });
    }

    fn floor(&self, pass: &Pass) -> u64 {
        let left = self.subject.written().saturating_sub(pass.counts.extents);
        schedule::floor(self.days(), pass.began_secs, self.wall_clock(), left)
    }

    fn days(&self) -> u16 {
        let chosen = self.subject.log(|log| log.choices().days);
        chosen.or(self.settings.days).unwrap_or(DAYS_DEFAULT)
    }

    fn ceiling_mib(&self) -> Option<u32> {
        let chosen = self.subject.log(|log| log.choices().ceiling_mib);
        chosen.or(self.settings.ceiling_mib)
    }

    async fn wait(&self, delay: Duration) {
        self.news.within(self.subject.host().sleep(delay)).await;
    }

    fn now(&self) -> Duration {
        self.subject.host().now()
    }

    fn wall_clock(&self) -> u64 {
        self.subject.host().wall_clock_secs()
    }
}
