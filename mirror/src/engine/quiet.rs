//! How long an extent has to be quiet before it cools.
//!
//! Ten seconds, as long as that is worth its while: an extent that cools costs a page of checksums
//! and a commit, and one that is written again soon after costs another commit first, for which the
//! write waits. When most of those that cool come back within a minute or two, cooling is futile,
//! and the time doubles, up to a minute; when few do, it halves again. What it costs to have more
//! extents hot is memory, which has its cap, and more to compare after a crash.
//!
//! Extents that have cooled lately are two sets of a bit each: those of this turn, which takes a
//! minute, and of the one before.

use dirty_map::Extent;
use std::time::Duration;

const SHORTEST: Duration = Duration::from_secs(10);
/// Until then an extent's checksums are stored though it is hot (R5).
const LONGEST: Duration = Duration::from_secs(60);
const TURN: Duration = Duration::from_secs(60);
/// Fewer than half of this in a second cost nothing.
const CROWD: u64 = 64;

/// The quiet time, and what it depends on.
pub(super) struct Quiet {
    time: Duration,
    /// Cooled in this turn, and in the one before.
    lately: [Vec<u64>; 2],
    turned: Duration,
    /// Since the last tick.
    cooled: u64,
    came_back: u64,
}

impl Quiet {
    /// For a device of so many extents.
    pub(super) fn new(extents: u64) -> Self {
        let words = usize::try_from(extents.div_ceil(64)).unwrap_or(usize::MAX);
        Self {
            time: SHORTEST,
            lately: [vec![0; words], vec![0; words]],
            turned: Duration::ZERO,
            cooled: 0,
            came_back: 0,
        }
    }

    /// How long an extent has to be quiet now.
    pub(super) fn time(&self) -> Duration {
        self.time
    }

    /// An extent has cooled.
    pub(super) fn has_cooled(&mut self, extent: Extent) {
        self.cooled += 1;
        let (word, bit) = place(extent);
        if let Some(word) = self.lately[0].get_mut(word) {
            *word |= bit;
        }
    }

    /// A cool extent is hot again.
    pub(super) fn is_back(&mut self, extent: Extent) {
        let (word, bit) = place(extent);
        let lately = |turn: &Vec<u64>| turn.get(word).is_some_and(|word| word & bit != 0);
        self.came_back += u64::from(self.lately.iter().any(lately));
    }

    /// A second has passed.
    pub(super) fn tick(&mut self, now: Duration) {
        let crowd = self.cooled.max(CROWD);
        if self.came_back * 2 > crowd {
            self.time = (self.time * 2).min(LONGEST);
        } else if self.came_back * 8 < crowd {
            self.time = (self.time / 2).max(SHORTEST);
        }
        (self.cooled, self.came_back) = (0, 0);
        if now >= self.turned + TURN {
            self.turned = now;
            self.lately.swap(0, 1);
            self.lately[0].fill(0);
        }
    }
}

fn place(extent: Extent) -> (usize, u64) {
    let number = u64::from(extent.0);
    let word = usize::try_from(number / 64).unwrap_or(usize::MAX);
    (word, 1 << (number % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays seconds in which so many extents cool, of which so many come back at once.
    fn play(quiet: &mut Quiet, now: &mut u64, seconds: u64, cooled: u32, back: u32) -> u64 {
        for _ in 0..seconds {
            (0..cooled).for_each(|extent| quiet.has_cooled(Extent(extent)));
            (0..back).for_each(|extent| quiet.is_back(Extent(extent)));
            *now += 1;
            quiet.tick(Duration::from_secs(*now));
        }
        quiet.time().as_secs()
    }

    #[test]
    fn extents_that_come_back_stay_hot_for_longer() {
        let (quiet, now) = (&mut Quiet::new(10_000), &mut 0);
        assert_eq!(play(quiet, now, 20, 0, 0), 10);
        assert_eq!(play(quiet, now, 20, 5000, 500), 10, "few come back");
        assert_eq!(
            play(quiet, now, 20, 30, 30),
            10,
            "a few extents are nothing"
        );
        assert_eq!(play(quiet, now, 1, 1000, 900), 20);
        assert_eq!(play(quiet, now, 1, 1000, 300), 20, "neither many nor few");
        assert_eq!(play(quiet, now, 20, 1000, 900), 60);
        // Hardly any cools now, and those come back.
        assert_eq!(play(quiet, now, 100, 50, 50), 60);
        assert_eq!(play(quiet, now, 1, 5000, 0), 30, "the load has ended");
        assert_eq!(play(quiet, now, 20, 0, 0), 10);
    }

    #[test]
    fn what_comes_back_after_minutes_was_right_to_cool() {
        let (quiet, now) = (&mut Quiet::new(10_000), &mut 0);
        play(quiet, now, 1, 1000, 0);
        assert_eq!(play(quiet, now, 60, 0, 0), 10);
        assert_eq!(play(quiet, now, 1, 0, 1000), 20, "within two minutes");
        assert_eq!(play(quiet, now, 121, 0, 0), 10);
        assert_eq!(play(quiet, now, 1, 0, 1000), 10);
        // Beyond the device there is nothing to know.
        quiet.has_cooled(Extent(u32::MAX));
        quiet.is_back(Extent(u32::MAX));
    }
}
