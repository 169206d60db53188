//! When a pass is due, and how fast it has to be to end in time. Pure.
//!
//! The wall clock decides: the time that the daemon was not there counts. All that a wrong clock
//! does is a pass at another time.

use dirty_map::EXTENT_BYTES;
use mirror::scrub_log::EndedPass;

/// Days from the begin of one pass to that of the next, unless told otherwise.
pub const DAYS_DEFAULT: u16 = 14;
const DAY_SECS: u64 = 24 * 3600;
/// The part of its time in which a pass that is late has to end.
const LATE_PART: u64 = 20;

/// When the next pass begins, in seconds since 1970; none when only by command. Passes that only
/// checked do not count.
pub(crate) fn next_at(days: u16, passes: &[EndedPass]) -> Option<u64> {
    if days == 0 {
        return None;
    }
    let last = passes.iter().find(|pass| !pass.check_only);
    let after = u64::from(days) * DAY_SECS;
    Some(last.map_or(0, |last| last.began_secs.saturating_add(after)))
}

/// Bytes a second of each member with which `extents_left` end in time.
pub(crate) fn floor(days: u16, began_secs: u64, now_secs: u64, extents_left: u64) -> u64 {
    let days = if days == 0 { DAYS_DEFAULT } else { days };
    let time = u64::from(days) * DAY_SECS;
    let used = now_secs.saturating_sub(began_secs);
    let left = time.saturating_sub(used).max(time / LATE_PART);
    extents_left.saturating_mul(EXTENT_BYTES).div_ceil(left)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mirror::scrub_log::Ending;

    fn pass(began_secs: u64, check_only: bool) -> EndedPass {
        EndedPass {
            number: 1,
            began_secs,
            ended_secs: began_secs + 5,
            member_bytes: 0,
            findings: 0,
            repaired: 0,
            damaged: 0,
            left_out: 0,
            ending: Ending::Complete,
            check_only,
        }
    }

    #[test]
    fn passes_begin_a_set_time_after_each_other() {
        assert_eq!(next_at(14, &[]), Some(0), "at once");
        assert_eq!(next_at(0, &[]), None);
        assert_eq!(next_at(0, &[pass(9, false)]), None);
        let passes = [pass(5000, true), pass(1000, false), pass(0, false)];
        assert_eq!(next_at(1, &passes), Some(1000 + 86400));
        assert_eq!(next_at(1, &passes[..1]), Some(0), "a check repairs nothing");
    }

    #[test]
    fn a_pass_ends_in_its_time() {
        let tebibyte = (1 << 40) / EXTENT_BYTES;
        let whole = floor(14, 1000, 1000, tebibyte);
        assert_eq!(whole, (1_u64 << 40).div_ceil(14 * 86400));
        // Half of it in half the time is the same.
        let half = floor(14, 1000, 1000 + 7 * 86400, tebibyte / 2);
        assert!(whole.abs_diff(half) <= 1, "{whole}, {half}");
        let late = floor(14, 1000, 1000 + 20 * 86400, tebibyte);
        assert!(late >= 19 * whole && late <= 21 * whole, "{late}");
        assert_eq!(
            floor(0, 0, 0, tebibyte),
            whole,
            "by command: the usual time"
        );
        assert_eq!(
            floor(14, 5000, 1000, tebibyte),
            whole,
            "a clock that went back"
        );
        assert_eq!(floor(14, 0, 0, 0), 0);
    }
}
