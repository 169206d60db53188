//! Moments and times as people read them.

/// A moment given in seconds since 1970: `2026-11-27 09:21:20 UTC`.
pub(crate) fn moment(secs: u64) -> String {
    let (year, month, day) = date(secs / 86_400);
    let second = secs % 86_400;
    format!(
        "{year}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

/// Year, month and day of the Gregorian calendar, by days since 1970-01-01.
fn date(days: u64) -> (u64, u64, u64) {
    // Years begin in March, so that a leap day is the last of its year; 0000-03-01 is day 0.
    let days = days + 719_468;
    let (era, in_era) = (days / 146_097, days % 146_097);
    let year = (in_era - in_era / 1460 + in_era / 36_524 - in_era / 146_096) / 365;
    let in_year = in_era - (365 * year + year / 4 - year / 100);
    let month = (5 * in_year + 2) / 153;
    let day = in_year - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    (era * 400 + year + carry, month, day)
}

/// A time in its two largest units: `3 d 4 h`, `12 min`, `9 s`.
pub(crate) fn time(secs: u64) -> String {
    let units = [(86_400, "d"), (3600, "h"), (60, "min"), (1, "s")];
    let first = units.iter().position(|(length, _)| secs >= *length);
    let Some(first) = first else {
        return "0 s".to_owned();
    };
    let mut text = format!("{} {}", secs / units[first].0, units[first].1);
    // Seconds beside minutes are too much.
    if let Some((length, name)) = units.get(first + 1).filter(|(length, _)| *length > 1) {
        let rest = secs % units[first].0 / length;
        if rest > 0 {
            text.push_str(&format!(" {rest} {name}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_those_of_the_calendar() {
        for (secs, want) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (951_868_800, "2000-03-01 00:00:00 UTC"),
            (1_795_771_280, "2026-11-27 09:21:20 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(moment(secs), want);
        }
        assert!(moment(u64::MAX).ends_with(" UTC"));
    }

    #[test]
    fn times_have_two_units_at_most() {
        for (secs, want) in [
            (0, "0 s"),
            (59, "59 s"),
            (61, "1 min"),
            (3600, "1 h"),
            (3660, "1 h 1 min"),
            (86_400 * 3 + 4 * 3600 + 59, "3 d 4 h"),
            (86_400 * 14, "14 d"),
        ] {
            assert_eq!(time(secs), want);
        }
    }
}
