//! Progress: a bar for a person, and of a resync lines for a log.

use std::time::{Duration, Instant};

use mirror::control::{ResyncKind, ResyncStatus, Status};

use crate::output;
use crate::size::{human, human_millis};

/// Characters of the bar.
const BAR_WIDTH: u64 = 30;
/// How often a line is printed where no bar can be drawn.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// How often a bar is drawn anew where something happens all the time.
const REDRAW_EVERY: Duration = Duration::from_millis(100);

/// Draws progress.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: bool,
    drawn: bool,
    last_line: Option<Instant>,
}

impl Progress {
    /// Draws a bar when a person is looking, lines otherwise.
    pub(crate) fn new() -> Self {
        Self {
            bar: output::is_terminal(),
            drawn: false,
            last_line: None,
        }
    }

    /// Shows how far the resync of `status` has come.
    pub(crate) fn show(&mut self, status: &Status) {
        let Some(resync) = &status.resync else { return };
        if self.bar {
            output::raw(&format!("\r\x1b[K{}", bar(resync)));
            self.drawn = true;
        } else if self
            .last_line
            .is_none_or(|last| last.elapsed() >= LINE_EVERY)
        {
            output::line(&sentence(resync));
            self.last_line = Some(Instant::now());
        }
    }

    /// Draws nothing.
    pub(crate) fn quiet() -> Self {
        Self {
            bar: false,
            ..Self::new()
        }
    }

    /// Shows to a person how much of `total` bytes is done.
    pub(crate) fn share(&mut self, what: &str, done: u64, total: u64) {
        let due = |last: Instant| last.elapsed() >= REDRAW_EVERY;
        if self.bar && self.last_line.is_none_or(due) {
            output::raw(&format!("\r\x1b[K{}", share_bar(what, done, total)));
            self.drawn = true;
            self.last_line = Some(Instant::now());
        }
    }

    /// Takes the bar away.
    pub(crate) fn end(&mut self) {
        if std::mem::take(&mut self.drawn) {
            output::raw("\r\x1b[K");
        }
    }
}

/// The kind in words.
pub(crate) fn kind(kind: ResyncKind) -> &'static str {
    match kind {
        ResyncKind::Delta => "delta",
        ResyncKind::Full => "full",
    }
}

/// Tenths of a percent that are done.
fn per_mille(resync: &ResyncStatus) -> u64 {
    let done = u128::from(resync.copied_bytes) + u128::from(resync.zeroed_bytes);
    let total = done + u128::from(resync.remaining_bytes);
    let share = (done * 1000).checked_div(total).unwrap_or(1000);
    u64::try_from(share).unwrap_or(1000)
}

/// Milliseconds that the rest will take at the speed so far.
fn left_millis(resync: &ResyncStatus) -> Option<u64> {
    let done = u128::from(resync.copied_bytes) + u128::from(resync.zeroed_bytes);
    let left = u128::from(resync.remaining_bytes) * u128::from(resync.elapsed_ms);
    u64::try_from(left.checked_div(done)?).ok()
}

/// A bar of which so many tenths of a percent are filled.
fn filled(share: u64) -> String {
    let filled = share * BAR_WIDTH / 1000;
    (0..BAR_WIDTH)
        .map(|at| if at < filled { '#' } else { '.' })
        .collect()
}

fn bar(resync: &ResyncStatus) -> String {
    let share = per_mille(resync);
    let bar = filled(share);
    format!("slot {} [{bar}] {}", resync.slot, tail(resync, share))
}

fn share_bar(what: &str, done: u64, total: u64) -> String {
    let share = u128::from(done) * 1000 / u128::from(total.max(1));
    let share = u64::try_from(share).unwrap_or(1000).min(1000);
    format!(
        "[{}] {}.{} %, {} {what}",
        filled(share),
        share / 10,
        share % 10,
        human(done)
    )
}

/// The resync under way as a sentence.
pub(crate) fn sentence(resync: &ResyncStatus) -> String {
    format!(
        "{} resync of slot {}: {}",
        kind(resync.kind),
        resync.slot,
        tail(resync, per_mille(resync))
    )
}

fn tail(resync: &ResyncStatus, share: u64) -> String {
    let mut text = format!(
        "{}.{} %, {} left",
        share / 10,
        share % 10,
        human(resync.remaining_bytes)
    );
    match (&resync.stalled, left_millis(resync)) {
        (Some(why), _) => text.push_str(&format!(", stalled: {why}")),
        (None, Some(millis)) => text.push_str(&format!(", about {} to go", human_millis(millis))),
        (None, None) => {}
    }
    text
}

/// What a resync that has ended did: `copied 3.9 MiB (zeroed 0 B) of 1.0 GiB in 0.2 s`.
pub(crate) fn summary(resync: &ResyncStatus, size_bytes: u64) -> String {
    format!(
        "copied {} (zeroed {}) of {} in {}",
        human(resync.copied_bytes),
        human(resync.zeroed_bytes),
        human(size_bytes),
        human_millis(resync.elapsed_ms)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resync(copied: u64, zeroed: u64, remaining: u64) -> ResyncStatus {
        ResyncStatus {
            slot: 1,
            kind: ResyncKind::Delta,
            reason: "It was away.".into(),
            finished: remaining == 0,
            copied_bytes: copied,
            zeroed_bytes: zeroed,
            remaining_bytes: remaining,
            elapsed_ms: 230,
            stalled: None,
        }
    }

    #[test]
    fn the_end_is_told_in_one_line() {
        assert_eq!(
            summary(&resync(4_096_000, 0, 0), 1 << 30),
            "copied 3.9 MiB (zeroed 0 B) of 1.0 GiB in 0.2 s"
        );
    }

    #[test]
    fn shares_are_right_at_the_ends_and_for_huge_numbers() {
        assert_eq!(per_mille(&resync(0, 0, 0)), 1000);
        assert_eq!(per_mille(&resync(0, 0, 9)), 0);
        assert_eq!(per_mille(&resync(1, 1, 2)), 500);
        assert_eq!(per_mille(&resync(u64::MAX, 0, 0)), 1000);
        assert_eq!(left_millis(&resync(0, 0, 5)), None);
        assert_eq!(left_millis(&resync(10, 0, 10)), Some(230));
    }

    #[test]
    fn a_share_of_bytes_is_drawn() {
        assert_eq!(
            share_bar("checked", 3 << 20, 12 << 20),
            "[#######.......................] 25.0 %, 3.0 MiB checked"
        );
        assert!(share_bar("checked", 9, 8).contains("] 100.0 %"));
        assert!(share_bar("checked", 0, 0).contains("] 0.0 %"));
        assert!(share_bar("checked", u64::MAX, u64::MAX).contains("] 100.0 %"));
    }

    #[test]
    fn a_bar_is_as_full_as_the_share() {
        assert_eq!(
            bar(&resync(512 << 10, 0, 512 << 10)),
            "slot 1 [###############...............] 50.0 %, 512.0 KiB left, about 0.2 s to go"
        );
        let mut stalled = resync(0, 0, 4096);
        stalled.stalled = Some("slot 1 does not answer".into());
        assert_eq!(
            sentence(&stalled),
            "delta resync of slot 1: 0.0 %, 4.0 KiB left, stalled: slot 1 does not answer"
        );
    }
}
