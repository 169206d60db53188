//! Error budgets: how often a member may need a block rewritten before it is failed.
//!
//! A disk that loses blocks tends to lose more. Failing it while the others are whole costs a
//! resync; waiting until it dies may cost the blocks that another member loses meanwhile. Pure
//! counting: the engine says what was rewritten, by scrubs and by reads alike, and fails the
//! member, never the last in-sync one. Counts begin anew with each start of the daemon and each
//! return of a member.

use crate::layout::SLOTS_MAX;
use std::collections::VecDeque;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Most blocks and hours that can be asked for.
const NUMBER_MAX: u32 = 1_000_000;
/// The window moves in so many steps; what is counted expires up to one step late.
const STEPS: u32 = 64;

/// How many blocks of a member may be rewritten within how much time. Written `N/HOURS`, or
/// `unlimited`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorBudget {
    /// A member over this is failed.
    Limited {
        /// Blocks.
        blocks: u32,
        /// Hours.
        hours: u32,
    },
    /// No member is failed for this.
    Unlimited,
}

impl Default for ErrorBudget {
    fn default() -> Self {
        Self::Limited {
            blocks: 64,
            hours: 24,
        }
    }
}

impl fmt::Display for ErrorBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Limited { blocks, hours } => write!(f, "{blocks}/{hours}"),
            Self::Unlimited => f.write_str("unlimited"),
        }
    }
}

/// A text that is no budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write BLOCKS/HOURS, for example 64/24 (hours from 1, both up to 1000000), or unlimited")]
pub struct NoBudget;

impl FromStr for ErrorBudget {
    type Err = NoBudget;

    fn from_str(text: &str) -> Result<Self, NoBudget> {
        if text == "unlimited" {
            return Ok(Self::Unlimited);
        }
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            let number = text.parse().ok().filter(|n| digits && *n <= NUMBER_MAX);
            number.ok_or(NoBudget)
        };
        let (blocks, hours) = text.split_once('/').ok_or(NoBudget)?;
        let (blocks, hours) = (number(blocks)?, number(hours)?);
        if hours == 0 {
            return Err(NoBudget);
        }
        Ok(Self::Limited { blocks, hours })
    }
}

/// What has been rewritten on each member.
#[derive(Clone, Debug)]
pub struct ErrorBudgets {
    budget: ErrorBudget,
    slots: [Rewrites; SLOTS_MAX],
}

impl ErrorBudgets {
    /// Nothing has been rewritten yet.
    #[must_use]
    pub fn new(budget: ErrorBudget) -> Self {
        Self {
            budget,
            slots: Default::default(),
        }
    }

    /// The budget of each member.
    #[must_use]
    pub fn budget(&self) -> ErrorBudget {
        self.budget
    }

    /// Counts `blocks` rewritten at `now` on the member in `slot`. When that is more than its
    /// budget, the reason for failing it, as a sentence without a full stop.
    pub fn rewrote(&mut self, slot: u8, blocks: u64, now: Duration) -> Option<String> {
        let ErrorBudget::Limited {
            blocks: allowed,
            hours,
        } = self.budget
        else {
            return None;
        };
        let rewrites = self.slots.get_mut(usize::from(slot))?;
        let count = rewrites.add(blocks, now, window(hours));
        (count > u64::from(allowed)).then(|| {
            format!(
                "{count} of its blocks had to be rewritten within {hours} h, more than its error \
                 budget of {allowed}"
            )
        })
    }

    /// Blocks of the member in `slot` that count at `now`.
    pub fn used(&mut self, slot: u8, now: Duration) -> u64 {
        let ErrorBudget::Limited { hours, .. } = self.budget else {
            return 0;
        };
        let rewrites = self.slots.get_mut(usize::from(slot));
        rewrites.map_or(0, |rewrites| rewrites.add(0, now, window(hours)))
    }

    /// Another member, or the same one anew, is in `slot`.
    pub fn begin_anew(&mut self, slot: u8) {
        if let Some(rewrites) = self.slots.get_mut(usize::from(slot)) {
            *rewrites = Rewrites::default();
        }
    }
}

fn window(hours: u32) -> Duration {
    Duration::from_secs(u64::from(hours) * 3600)
}

/// Blocks rewritten lately, by step of the window; at most [`STEPS`] + 1 entries.
#[derive(Clone, Debug, Default)]
struct Rewrites(VecDeque<(u128, u64)>);

impl Rewrites {
    /// Counts `blocks` and returns how many there are in the window that ends `now`.
    fn add(&mut self, blocks: u64, now: Duration, window: Duration) -> u64 {
        let length = (window / STEPS).as_nanos().max(1);
        let step = now.as_nanos() / length;
        while let Some((oldest, _)) = self.0.front()
            && oldest + u128::from(STEPS) < step
        {
            self.0.pop_front();
        }
        match self.0.back_mut() {
            // A clock does not go back; if it did, what it says would count as now.
            Some((newest, count)) if *newest >= step => *count = count.saturating_add(blocks),
            _ if blocks > 0 => self.0.push_back((step, blocks)),
            _ => {}
        }
        let counts = self.0.iter().map(|(_, count)| *count);
        counts.fold(0, u64::saturating_add)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn budgets_are_written_as_they_are_read() {
        for text in ["64/24", "0/1", "1000000/1000000", "unlimited"] {
            assert_eq!(text.parse::<ErrorBudget>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "64",
            "64/",
            "/24",
            "64/0",
            "-1/24",
            "+1/24",
            "64/24/1",
            "1000001/1",
            "none",
        ] {
            assert_eq!(text.parse::<ErrorBudget>(), Err(NoBudget), "{text}");
        }
        assert_eq!(ErrorBudget::default().to_string(), "64/24");
    }

    #[test]
    fn a_member_over_its_budget_is_named_and_no_other() {
        let mut budgets = ErrorBudgets::new(ErrorBudget::default());
        assert_eq!(budgets.rewrote(0, 64, HOUR), None);
        assert_eq!(budgets.rewrote(1, 1, HOUR), None);
        let why = budgets.rewrote(0, 2, 2 * HOUR).unwrap();
        assert_eq!(
            why,
            "66 of its blocks had to be rewritten within 24 h, more than its error budget of 64"
        );
        assert_eq!(budgets.used(0, 2 * HOUR), 66);
        budgets.begin_anew(0);
        assert_eq!(budgets.used(0, 2 * HOUR), 0);
        assert_eq!(budgets.rewrote(0, 64, 2 * HOUR), None);
        assert_eq!(budgets.used(1, 2 * HOUR), 1);
        assert_eq!(budgets.rewrote(200, u64::MAX, HOUR), None, "no such slot");
    }

    #[test]
    fn what_is_older_than_the_window_does_not_count() {
        let mut budgets = ErrorBudgets::new(ErrorBudget::default());
        budgets.rewrote(3, 40, HOUR);
        budgets.rewrote(3, 20, 12 * HOUR);
        assert_eq!(budgets.used(3, 24 * HOUR), 60);
        assert_eq!(budgets.used(3, 25 * HOUR + HOUR / 2), 20);
        assert_eq!(budgets.used(3, 37 * HOUR), 0);
    }

    #[test]
    fn without_a_limit_nobody_is_failed() {
        let mut budgets = ErrorBudgets::new(ErrorBudget::Unlimited);
        assert_eq!(budgets.rewrote(0, u64::MAX, HOUR), None);
        assert_eq!(budgets.used(0, HOUR), 0);
    }

    proptest! {
        #[test]
        fn nothing_in_the_window_is_missed_and_little_is_kept(
            events in proptest::collection::vec((0..10_000_u64, 0..9_u64), 0..300),
        ) {
            let mut rewrites = Rewrites::default();
            let mut now = Duration::ZERO;
            let mut all = Vec::new();
            for (pause, blocks) in events {
                now += Duration::from_secs(pause);
                all.push((now, blocks));
                let count = rewrites.add(blocks, now, 24 * HOUR);
                let since = |length: Duration| -> u64 {
                    let within = |(when, _): &&(Duration, u64)| now - *when <= length;
                    all.iter().filter(within).map(|(_, blocks)| blocks).sum()
                };
                prop_assert!(count >= since(24 * HOUR));
                prop_assert!(count <= since(24 * HOUR + 24 * HOUR / STEPS));
                prop_assert!(rewrites.0.len() <= STEPS as usize + 1);
            }
        }
    }
}
