//! How fast background work may go without hurting the foreground.
//!
//! Pure: no clock, no tasks. Whoever does the work asks [`Pacer::admit`] before each piece, says
//! when it is done ([`Pacer::finished`]), and tells the latency of foreground requests
//! ([`Pacer::foreground`]).
//!
//! # What it promises
//!
//! * The foreground's p99 while the work goes on is at most [`Limits::limit_permille`] of its p99
//!   without, as far as the samples can tell.
//! * [`Limits::floor`] is kept whatever the latency, so that the work ends; over
//!   [`Limits::ceiling`] it never goes.
//! * Without foreground requests for [`IDLE_AFTER`] the work goes at the ceiling. Where that turns
//!   out to have been short, it waits longer the next time, up to [`IDLE_AFTER_MAX`].
//!
//! # How
//!
//! ```text
//!          ┌────────────── no request for a while ──────────────► Idle: the ceiling
//!          │                                                        │ a request
//!  ┌► Working: the rate ──► Draining: nothing new ──► Resting ◄─────┘ (drains first)
//!  └───────────────── is the rate too high? ─────────────┘
//! ```
//!
//! What the p99 would be without the work is only known by stopping: of ten parts of the time
//! nine are for work and one is a rest, in turn and in short periods, so that a changing load
//! changes both alike. A request counts for the period in which it began. After each rest the two
//! p99s are compared as intervals in which they lie by the number of samples: when those cannot be
//! told apart, samples are added until they can, or until there are [`ENOUGH`]. A rate that is
//! too high is cut in proportion to the excess; one that is surely not is doubled up to where it
//! was cut last, and then grows by a sixteenth of that.

mod histogram;

use histogram::{Histogram, Quantile};
use std::ops::Range;
use std::time::Duration;

/// Without a foreground request for so long there is none to hurt.
pub const IDLE_AFTER: Duration = Duration::from_secs(1);
/// The same where requests come in with pauses between them.
pub const IDLE_AFTER_MAX: Duration = Duration::from_secs(32);
/// Samples with and without the work below which nothing is decided.
pub const FEWEST: u32 = 200;
/// Samples with the work below which the rate is not raised.
pub const FEWEST_TO_RAISE: u32 = 1000;
/// Samples with the work that have to be enough.
pub const ENOUGH: u32 = 16000;
/// Samples without the work beyond which older ones are forgotten.
const REMEMBERED: u32 = 20_000;
/// Requests under way together have much the same latency: of those that end within a p99 of each
/// other, or this, one is a sample.
const SPACING_MAX: Duration = Duration::from_millis(50);

/// An idle time that ended sooner was none.
const SHORT_IDLE: Duration = Duration::from_secs(10);
/// An idle time that lasted longer ends the suspicion.
const LONG_IDLE: Duration = Duration::from_secs(60);
const REST_MIN: Duration = Duration::from_millis(100);
const REST_MAX: Duration = Duration::from_secs(1);
/// Periods of work for one of rest.
const WORK_PARTS: u32 = 9;
/// Whoever waits asks again after so long at the latest: things may have changed.
const WAIT_MAX: Duration = Duration::from_millis(100);
/// How often to look whether what is under way has ended.
const DRAIN_RECHECK: Duration = Duration::from_millis(5);
/// Time that was not used for work and can be made up for at the rate.
const CREDIT: Duration = Duration::from_millis(20);
/// The same at the floor: a few rests.
const FLOOR_CREDIT: Duration = Duration::from_secs(4);
/// Where the rate begins unless the floor is higher, in bytes a second.
const RATE_START: u64 = 1 << 20;
/// The least that a rate grows by, in bytes a second.
const STEP_MIN: u64 = 256 << 10;
const NANOS: u128 = 1_000_000_000;

/// What a pacer has to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The foreground's p99 with the work over that without, in thousandths; more than 1000.
    pub limit_permille: u32,
    /// Bytes a second that are kept whatever the latency; not more than the ceiling counts.
    pub floor: u64,
    /// Most bytes a second.
    pub ceiling: u64,
}

impl Limits {
    /// For a scrub: at most 10 % worse. Its floor follows from the time it may take.
    pub const SCRUB: Self = Self {
        limit_permille: 1100,
        floor: 0,
        ceiling: u64::MAX,
    };
    /// For a resync, which restores redundancy: at most twice, and at least 10 MiB a second.
    pub const RESYNC: Self = Self {
        limit_permille: 2000,
        floor: 10 << 20,
        ceiling: u64::MAX,
    };
}

/// What the present time is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// There is no foreground since then.
    Idle(Duration),
    /// Work goes on until then.
    Working(Duration),
    /// Nothing new begins; what is under way ends, or it has taken too long by then.
    Draining(Duration),
    /// There is no work until then.
    Resting(Duration),
}

/// The controller. See the module documentation.
#[derive(Clone, Debug)]
pub struct Pacer {
    limits: Limits,
    phase: Phase,
    /// Bytes a second while there is a foreground; not below the floor.
    rate: u64,
    /// Where the rate was cut last: up to here it doubles.
    cut_at: u64,
    /// Bytes admitted ahead of the rate, times a second's nanoseconds; negative: behind it.
    ahead: i128,
    /// Until when `ahead` has been brought down.
    settled: Duration,
    /// None when there has been none for long enough at the begin.
    last_foreground: Option<Duration>,
    idle_after: Duration,
    /// The last period of work; open while it lasts.
    working: Range<Duration>,
    /// The part of the last rest in which nothing of the work was left; open while it lasts.
    resting: Range<Duration>,
    /// Latencies with the work at the present rate.
    with: Histogram,
    /// Latencies without it since the rate was judged last, and before.
    without: Histogram,
    without_before: Histogram,
    /// When a sample was counted last, and how long none is counted after one.
    sampled: Duration,
    spacing: Duration,
    /// Bytes admitted in periods of work since the rate was judged last, and their length.
    moved: u64,
    worked: Duration,
    under_way: u32,
    ratio_permille: Option<u32>,
}

impl Pacer {
    /// A pacer that begins at `now` and knows nothing of the foreground yet.
    #[must_use]
    pub fn new(limits: Limits, now: Duration) -> Self {
        let mut pacer = Self {
            limits,
            phase: Phase::Draining(now + REST_MIN),
            rate: RATE_START,
            cut_at: u64::MAX,
            ahead: 0,
            settled: now,
            last_foreground: Some(now),
            idle_after: IDLE_AFTER,
            working: now..now,
            resting: now..now,
            with: Histogram::default(),
            without: Histogram::default(),
            without_before: Histogram::default(),
            sampled: now,
            spacing: Duration::ZERO,
            moved: 0,
            worked: Duration::ZERO,
            under_way: 0,
            ratio_permille: None,
        };
        pacer.set_limits(limits);
        pacer
    }

    /// There has been no foreground request for [`IDLE_AFTER`]: the work begins at the ceiling.
    pub fn begin_idle(&mut self, now: Duration) {
        (self.phase, self.last_foreground) = (Phase::Idle(now), None);
    }

    /// Other limits from now on.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = Limits {
            limit_permille: limits.limit_permille.max(1001),
            floor: limits.floor.min(limits.ceiling),
            ceiling: limits.ceiling.max(1),
        };
        self.bound_rate();
    }

    /// What has to be kept.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Bytes a second at which the work may go on at present.
    #[must_use]
    pub fn rate(&self) -> u64 {
        if self.is_idle() {
            self.limits.ceiling
        } else {
            self.rate
        }
    }

    /// Whether there is no foreground at present.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        matches!(self.phase, Phase::Idle(_))
    }

    /// The p99 with the work over that without, in thousandths, when it was compared last.
    #[must_use]
    pub fn ratio_permille(&self) -> Option<u32> {
        self.ratio_permille
    }

    /// A foreground request has ended at `now`, `latency` after it began.
    pub fn foreground(&mut self, now: Duration, latency: Duration) {
        self.last_foreground = self.last_foreground.max(Some(now));
        if now.saturating_sub(self.sampled) < self.spacing {
            return;
        }
        self.sampled = now;
        let began = now.saturating_sub(latency);
        if self.working.contains(&began) {
            self.with.add(latency);
        } else if self.resting.contains(&began) {
            self.without.add(latency);
        }
    }

    /// Whether a piece of `bytes` may begin at `now`. If so it counts as begun, and
    /// [`Pacer::finished`] has to follow.
    ///
    /// # Errors
    ///
    /// How long to wait before asking again, when it may not.
    pub fn admit(&mut self, now: Duration, bytes: u64) -> Result<(), Duration> {
        self.settle(now);
        self.turn(now);
        let wait = match self.phase {
            Phase::Draining(_) => DRAIN_RECHECK,
            Phase::Resting(until) => until.saturating_sub(now),
            Phase::Idle(_) | Phase::Working(_) if self.time_ahead() > Duration::ZERO => {
                self.time_ahead()
            }
            Phase::Idle(_) | Phase::Working(_) => {
                self.ahead += byte_nanos(bytes);
                self.moved = self.moved.saturating_add(bytes);
                self.under_way += 1;
                return Ok(());
            }
        };
        Err(wait.clamp(Duration::from_micros(100), WAIT_MAX))
    }

    /// How long the rate takes for what was admitted ahead of it.
    fn time_ahead(&self) -> Duration {
        let ahead = u128::try_from(self.ahead).unwrap_or(0);
        let nanos = ahead / u128::from(self.rate().max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// A piece that was admitted has ended, in whatever way.
    pub fn finished(&mut self) {
        self.under_way = self.under_way.saturating_sub(1);
    }

    /// Brings `ahead` down by the time that has passed.
    fn settle(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.settled).as_nanos();
        self.settled = self.settled.max(now);
        let floor = self.limits.floor;
        let speed = match self.phase {
            Phase::Idle(_) | Phase::Working(_) => self.rate(),
            Phase::Draining(_) | Phase::Resting(_) => floor,
        };
        let paid = u128::from(speed).saturating_mul(passed);
        let most = (u128::from(self.rate()).saturating_mul(CREDIT.as_nanos()))
            .max(u128::from(floor).saturating_mul(FLOOR_CREDIT.as_nanos()));
        let bound = |amount: u128| i128::try_from(amount).unwrap_or(i128::MAX);
        self.ahead = self
            .ahead
            .saturating_sub(bound(paid))
            .max(bound(most).saturating_neg());
    }

    /// Goes on to the next phase if it is time.
    fn turn(&mut self, now: Duration) {
        let quiet = self
            .last_foreground
            .is_none_or(|last| now.saturating_sub(last) >= self.idle_after);
        match self.phase {
            Phase::Idle(since) if !quiet => {
                self.judge_idle_time(now.saturating_sub(since));
                self.drain(now);
            }
            Phase::Idle(_) => {}
            _ if quiet => {
                self.close_periods(now);
                self.phase = Phase::Idle(now);
            }
            Phase::Working(until) if now >= until => {
                self.worked += now.saturating_sub(self.working.start);
                self.drain(now);
            }
            Phase::Draining(_) if self.under_way == 0 => {
                let rest = self.rest();
                // What was queued behind the work ends first.
                let clean = now + rest / 4;
                self.resting = clean..Duration::MAX;
                self.phase = Phase::Resting(clean + rest);
            }
            Phase::Draining(until) if now >= until => self.work(now),
            Phase::Resting(until) if now >= until => {
                self.close_periods(now);
                self.judge();
                self.work(now);
            }
            Phase::Working(_) | Phase::Draining(_) | Phase::Resting(_) => {}
        }
    }

    fn work(&mut self, now: Duration) {
        let rest = self.rest();
        self.close_periods(now);
        self.working = now..Duration::MAX;
        self.phase = Phase::Working(now + (rest + rest / 4) * WORK_PARTS);
    }

    fn drain(&mut self, now: Duration) {
        self.close_periods(now);
        self.phase = Phase::Draining(now + self.rest() * 4);
    }

    fn close_periods(&mut self, now: Duration) {
        self.working.end = self.working.end.min(now);
        self.resting.end = self.resting.end.min(now);
    }

    /// Length of a rest: long enough that few requests reach beyond it.
    fn rest(&self) -> Duration {
        // The spacing is the p99 without work.
        (self.spacing * 20).clamp(REST_MIN, REST_MAX)
    }

    fn judge_idle_time(&mut self, lasted: Duration) {
        if lasted < SHORT_IDLE {
            self.idle_after = (self.idle_after * 2).min(IDLE_AFTER_MAX);
        } else if lasted >= LONG_IDLE {
            self.idle_after = IDLE_AFTER;
        }
    }

    /// Compares the two p99s and changes the rate, if there are samples enough.
    fn judge(&mut self) {
        let Some(without) = self.p99_without() else {
            return;
        };
        self.spacing = without.likely.min(SPACING_MAX);
        let Some(with) = self.with.p99().filter(|_| self.with.count() >= FEWEST) else {
            return;
        };
        let limit = self.limits.limit_permille;
        let ratio = permille(with.likely, without.likely);
        self.ratio_permille = Some(ratio);
        match verdict(with, without, limit) {
            Some(Verdict::TooHigh) => self.cut(ratio.max(limit + 1)),
            // Too much is worse than too little, so it takes more to go up.
            Some(Verdict::Fine) if self.with.count() < FEWEST_TO_RAISE => return,
            Some(Verdict::Fine) => self.raise(),
            None if self.with.count() < ENOUGH => return,
            None if ratio > limit => self.cut(ratio),
            None => {}
        }
        self.with.clear();
        self.without_before.absorb(&self.without);
        self.without.clear();
        if self.without_before.count() > REMEMBERED {
            self.without_before.halve();
        }
        self.moved = 0;
        self.worked = Duration::ZERO;
    }

    /// The p99 without the work, from all that is known of the present load.
    fn p99_without(&mut self) -> Option<Quantile> {
        let now = self.without.p99();
        if let (Some(now), Some(before)) = (now, self.without_before.p99())
            && self.without.count() >= FEWEST
            && (now.low > before.high || now.high < before.low)
        {
            // It is another load.
            self.without_before.clear();
        }
        let mut all = self.without_before.clone();
        all.absorb(&self.without);
        all.p99().filter(|_| all.count() >= FEWEST)
    }

    fn cut(&mut self, ratio: u32) {
        let allowed = u64::from(self.limits.limit_permille - 1000);
        let excess = u64::from(ratio - 1000);
        let factor = (allowed * 1000 / excess).clamp(400, 900);
        let cut = u128::from(self.rate) * u128::from(factor) / 1000;
        self.rate = u64::try_from(cut).unwrap_or(u64::MAX);
        self.bound_rate();
        self.cut_at = self.rate.max(STEP_MIN);
    }

    fn raise(&mut self) {
        // More than the work can use says nothing about what it would do.
        let used = u128::from(self.moved) * NANOS;
        if used < u128::from(self.rate) * self.worked.as_nanos() / 2 {
            return;
        }
        self.rate = if self.rate < self.cut_at {
            self.rate.max(STEP_MIN).saturating_mul(2).min(self.cut_at)
        } else {
            self.rate.saturating_add((self.cut_at / 8).max(STEP_MIN))
        };
        self.bound_rate();
    }

    fn bound_rate(&mut self) {
        self.rate = self.rate.clamp(self.limits.floor, self.limits.ceiling);
    }
}

enum Verdict {
    TooHigh,
    Fine,
}

/// What the samples can tell; none when it may be either.
fn verdict(with: Quantile, without: Quantile, limit: u32) -> Option<Verdict> {
    if permille(with.low, without.high) > limit {
        Some(Verdict::TooHigh)
    } else if permille(with.high, without.low) < limit {
        Some(Verdict::Fine)
    } else {
        None
    }
}

/// `with` over `without` in thousandths.
fn permille(with: Duration, without: Duration) -> u32 {
    let ratio = with.as_nanos().saturating_mul(1000) / without.as_nanos().max(1);
    u32::try_from(ratio).unwrap_or(u32::MAX)
}

fn byte_nanos(bytes: u64) -> i128 {
    i128::from(bytes) * i128::try_from(NANOS).unwrap_or(i128::MAX)
}

#[cfg(test)]
#[path = "pace_tests.rs"]
mod tests;
