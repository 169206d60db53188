//! Runs many histories on all processors, and cuts down one that fails.

use crate::play::{Played, play_script, play_seed};
use crate::script::{Author, Script};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A history that fails.
pub(crate) struct Failure {
    pub(crate) seed: u64,
    pub(crate) script: Script,
    pub(crate) message: String,
}

/// What was run.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    pub(crate) histories: u64,
    pub(crate) played: Played,
    /// Requests and actions of the shortest history.
    pub(crate) shortest: u64,
}

impl Totals {
    fn add(&mut self, one: Played) {
        let operations = one.requests + one.actions;
        self.shortest = if self.histories == 0 {
            operations
        } else {
            self.shortest.min(operations)
        };
        self.histories += 1;
        self.played.requests += one.requests;
        self.played.actions += one.actions;
        self.played.crashes += one.crashes;
        self.played.steps += one.steps;
        self.played.rot.add(one.rot);
        self.played.peers.add(one.peers);
    }
}

/// Why a play ended early, in its own words.
fn reason(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().cloned();
    text.or_else(|| {
        payload
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
    })
    .unwrap_or_else(|| "a panic without words".to_owned())
}

/// Plays one seed.
pub(crate) fn run_one(seed: u64) -> Result<Played, Failure> {
    let (_, mut script) = Author::new(seed);
    let played = catch_unwind(AssertUnwindSafe(|| play_seed(seed, &mut script)));
    played.map_err(|payload| Failure {
        seed,
        script,
        message: reason(&*payload),
    })
}

/// Plays the seeds, or as many as there is time for, on `threads` threads; stops at the first
/// failure. `progress` hears of every history.
pub(crate) fn run(
    seeds: Range<u64>,
    threads: usize,
    time: Option<Duration>,
    progress: impl Fn(&Totals) + Sync,
) -> (Totals, Option<Failure>) {
    let (next, begun) = (AtomicU64::new(seeds.start), Instant::now());
    let result: Mutex<(Totals, Option<Failure>)> = Mutex::default();
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            let late = time.is_some_and(|time| begun.elapsed() > time);
            if seed >= seeds.end || late {
                return;
            }
            let one = run_one(seed);
            let mut result = result.lock().unwrap();
            match one {
                Ok(played) => {
                    result.0.add(played);
                    progress(&result.0);
                }
                Err(failure) => {
                    next.store(seeds.end, Ordering::Relaxed);
                    // Of several the lowest seed, so that the answer repeats.
                    if result
                        .1
                        .as_ref()
                        .is_none_or(|other| failure.seed < other.seed)
                    {
                        result.1 = Some(failure);
                    }
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
    result.into_inner().unwrap()
}

/// Plays a complete script; what went wrong, if anything did.
pub(crate) fn replay(script: &Script) -> Result<Played, String> {
    catch_unwind(AssertUnwindSafe(|| play_script(script))).map_err(|payload| reason(&*payload))
}

/// Takes things out of a failing script for as long as it still fails in some interleaving.
pub(crate) fn shrink(failure: &Failure, time: Duration) -> (Script, String) {
    const SCHEDULES: u64 = 4;
    let begun = Instant::now();
    let mut smallest = (failure.script.clone(), failure.message.clone());
    'again: loop {
        for candidate in smallest.0.smaller() {
            for schedule in std::iter::once(candidate.schedule).chain(0..SCHEDULES) {
                if begun.elapsed() > time {
                    return smallest;
                }
                let candidate = Script {
                    schedule,
                    ..candidate.clone()
                };
                if let Err(message) = replay(&candidate) {
                    smallest = (candidate, message);
                    continue 'again;
                }
            }
        }
        return smallest;
    }
}
