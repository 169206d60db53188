//! The order of a pass: once around, then what was hot, or could not be checked, again: some rounds
//! for what has cooled meanwhile, and a last one for the rest as it is. Pure.

use dirty_map::Extent;
use mirror::engine::{CheckOptions, Checked};
use mirror::scrub_log::{Pass, coarsened};
use std::ops::Range;
use std::time::Duration;

/// Ranges of extents to be visited again that are kept; more are joined, with what lies between.
pub(crate) const RANGES_MAX: usize = 1024;
/// How often what was hot is visited again before it is checked hot or not.
pub(crate) const ROUNDS: u32 = 4;

/// What a lane is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Check this extent.
    Extent(Extent),
    /// Look again later: it depends on what others are checking.
    Later,
    /// Wait until hot extents may have cooled, then call [`Sweep::again`].
    Cooling,
    /// The pass is over.
    Over,
}

/// A pass as it goes on.
#[derive(Clone, Debug)]
pub(crate) struct Sweep {
    pass: Pass,
    extents: u32,
    /// It has been around.
    around: bool,
    under_way: Vec<Extent>,
    /// To be visited in this round; the rest of them is in the pass.
    round: Vec<Range<u32>>,
    rounds: u32,
    /// One lane waits for the others.
    cooling: bool,
    over: bool,
}

impl Sweep {
    /// Goes on with `pass` over a device of `extents`.
    pub(crate) fn new(pass: Pass, extents: u32) -> Self {
        Self {
            pass,
            extents,
            around: false,
            under_way: Vec::new(),
            round: Vec::new(),
            rounds: 0,
            cooling: false,
            over: false,
        }
    }

    /// The pass as far as it has come.
    pub(crate) fn pass(&self) -> &Pass {
        &self.pass
    }

    /// Whether nothing is left to do.
    pub(crate) fn is_over(&self) -> bool {
        self.over
    }

    /// What to do next. An extent counts as under way until [`Sweep::checked`] or
    /// [`Sweep::left`].
    pub(crate) fn next(&mut self, next_written: impl Fn(Extent) -> Option<Extent>) -> Next {
        if self.over {
            return Next::Over;
        }
        let found = self
            .next_around(&next_written)
            .or_else(|| self.next_in_round(&next_written));
        if let Some(extent) = found {
            self.under_way.push(extent);
            return Next::Extent(extent);
        }
        if !self.under_way.is_empty() || self.cooling {
            return Next::Later;
        }
        if self.pass.left.is_empty() || self.hot_too() {
            self.pass.counts.left_out = count(&self.pass.left, &next_written);
            self.over = true;
            return Next::Over;
        }
        self.cooling = true;
        Next::Cooling
    }

    /// What was left is visited again.
    pub(crate) fn again(&mut self) {
        self.cooling = false;
        self.rounds += 1;
        self.round = std::mem::take(&mut self.pass.left);
    }

    /// Whether hot extents are checked as well: nothing is gained by more waiting.
    pub(crate) fn hot_too(&self) -> bool {
        self.rounds > ROUNDS
    }

    /// How extents are checked now.
    pub(crate) fn how(&self) -> CheckOptions {
        CheckOptions {
            repair: !self.pass.check_only,
            hot_too: self.hot_too(),
            at_once: false,
        }
    }

    fn next_around(&mut self, next_written: impl Fn(Extent) -> Option<Extent>) -> Option<Extent> {
        while !self.around {
            let end = if self.pass.wrapped {
                self.pass.start.0
            } else {
                self.extents
            };
            let found = next_written(self.pass.cursor).filter(|extent| extent.0 < end);
            if let Some(extent) = found {
                self.pass.cursor = Extent(extent.0 + 1);
                return Some(extent);
            }
            self.pass.cursor = Extent(end);
            if self.pass.wrapped || self.pass.start.0 == 0 {
                self.around = true;
            } else {
                self.pass.wrapped = true;
                self.pass.cursor = Extent(0);
            }
        }
        None
    }

    fn next_in_round(&mut self, next_written: impl Fn(Extent) -> Option<Extent>) -> Option<Extent> {
        while let Some(range) = self.round.first_mut() {
            let found = next_written(Extent(range.start)).filter(|extent| extent.0 < range.end);
            if let Some(extent) = found {
                range.start = extent.0 + 1;
                return Some(extent);
            }
            self.round.remove(0);
        }
        None
    }

    /// An extent has been checked, or what could be of it; then it is to be visited again.
    pub(crate) fn checked(&mut self, extent: Extent, checked: &Checked) {
        if checked.failed.is_some() {
            self.left(extent);
        }
        self.under_way.retain(|under_way| *under_way != extent);
        let counts = &mut self.pass.counts;
        if checked.failed.is_none() {
            counts.extents += 1;
            counts.blocks += checked.blocks;
        }
        counts.member_bytes += checked.member_bytes;
        counts.findings += checked.findings;
        counts.repaired += checked.repaired;
        counts.damaged += checked.damaged;
    }

    /// An extent has not been checked and is to be visited again.
    pub(crate) fn left(&mut self, extent: Extent) {
        self.under_way.retain(|under_way| *under_way != extent);
        add(&mut self.pass.left, extent);
    }

    /// The pass as it has to go on after a restart, having worked for `worked` longer.
    pub(crate) fn noted(&mut self, worked: Duration) -> Pass {
        let millis = u64::try_from(worked.as_millis()).unwrap_or(u64::MAX);
        self.pass.worked_ms = self.pass.worked_ms.saturating_add(millis);
        let mut pass = self.pass.clone();
        pass.left.extend(self.round.iter().cloned());
        for extent in &self.under_way {
            pass.left.push(extent.0..extent.0 + 1);
        }
        pass.left = coarsened(pass.left, RANGES_MAX);
        pass
    }
}

/// Adds an extent to ranges, of which there are not more than [`RANGES_MAX`] afterwards.
fn add(ranges: &mut Vec<Range<u32>>, extent: Extent) {
    // Almost always they come in order.
    match ranges.last_mut() {
        Some(last) if last.end == extent.0 => last.end += 1,
        Some(last) if last.contains(&extent.0) => {}
        _ => ranges.push(extent.0..extent.0 + 1),
    }
    if ranges.len() > RANGES_MAX {
        *ranges = coarsened(std::mem::take(ranges), RANGES_MAX);
        if ranges.len() == RANGES_MAX {
            // So that this is not needed for each one that follows.
            *ranges = coarsened(std::mem::take(ranges), RANGES_MAX * 3 / 4);
        }
    }
}

/// How many extents of `ranges` are written.
fn count(ranges: &[Range<u32>], next_written: impl Fn(Extent) -> Option<Extent>) -> u64 {
    let mut count = 0;
    for range in ranges {
        let mut from = range.start;
        while let Some(extent) = next_written(Extent(from)).filter(|extent| extent.0 < range.end) {
            count += 1;
            from = extent.0 + 1;
        }
    }
    count
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use mirror::scrub_log::PassCounts;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn pass(start: u32) -> Pass {
        Pass {
            number: 1,
            began_secs: 0,
            worked_ms: 0,
            check_only: false,
            start: Extent(start),
            cursor: Extent(start),
            wrapped: false,
            left: Vec::new(),
            counts: PassCounts::default(),
        }
    }

    proptest! {
        #[test]
        fn whatever_is_written_is_checked_or_counted(
            start in 0..5000_u32,
            every in 1..7_u32,
            hot in proptest::collection::btree_set(0..5000_u32, 0..20),
            cools in 0..8_u32,
            failing in proptest::collection::btree_set(0..5000_u32, 0..5),
            restarts in proptest::collection::btree_set(0..4000_usize, 0..4),
        ) {
            let extents = 5000;
            let is_written = |number: u32| number.is_multiple_of(every);
            let next_written = |from: Extent| {
                (from.0..extents).find(|number| is_written(*number)).map(Extent)
            };
            let mut sweep = Sweep::new(pass(start), extents);
            let (mut seen, mut steps, mut rounds) = (BTreeSet::new(), 0, 0);
            loop {
                steps += 1;
                if restarts.contains(&steps) {
                    sweep = Sweep::new(sweep.noted(Duration::ZERO), extents);
                }
                match sweep.next(next_written) {
                    Next::Extent(extent) if failing.contains(&extent.0) => {
                        let failed = Some(mirror::Errno::IO);
                        sweep.checked(extent, &Checked { failed, ..Checked::default() });
                    }
                    Next::Extent(extent)
                        if hot.contains(&extent.0) && rounds < cools && !sweep.hot_too() =>
                    {
                        sweep.left(extent);
                    }
                    Next::Extent(extent) => {
                        sweep.checked(extent, &Checked::default());
                        seen.insert(extent.0);
                    }
                    Next::Cooling => {
                        sweep.again();
                        rounds += 1;
                    }
                    Next::Later => panic!("nothing is under way"),
                    Next::Over => break,
                }
            }
            let want: BTreeSet<u32> = (0..extents).filter(|number| is_written(*number)).collect();
            let missing: BTreeSet<u32> = want.difference(&seen).copied().collect();
            prop_assert_eq!(sweep.pass().counts.left_out, missing.len() as u64);
            prop_assert!(missing.is_subset(&failing));
            prop_assert!(seen.is_subset(&want));
        }
    }

    #[test]
    fn very_many_hot_extents_take_a_bounded_memory() {
        let mut ranges = Vec::new();
        for number in 0..100_000 {
            add(&mut ranges, Extent(number * 3));
            assert!(ranges.len() <= RANGES_MAX);
        }
        let covered = |extent: u32| ranges.iter().any(|range| range.contains(&extent));
        assert!((0..100_000).step_by(997).all(|number| covered(number * 3)));
    }
}
