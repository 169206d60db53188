//! Sizes as people write and read them.
//!
//! `K`, `M`, `G`, `T`, `P` and `KiB`, `MiB`, ... are powers of 1024; `KB`, `MB`, ... are powers
//! of 1000, as coreutils read them. One decimal point is allowed (`1.5G`) as long as the result
//! is a whole number of bytes. Sizes are printed in powers of 1024 with one decimal, rounded
//! down, so that a size shown is never larger than the size there is.

/// Letters of the powers, in order.
const LETTERS: &[u8] = b"KMGTPE";

/// Reads a size in bytes; the error is a sentence.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let wrong = || {
        format!(
            "'{text}' is not a size: write a number of bytes, or one with a unit such as 512M, 10G or 1.5T"
        )
    };
    let text = text.trim();
    let digits_end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits_end);
    let factor = factor_of(unit.trim_start()).ok_or_else(wrong)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.len() > 18 || (number.contains('.') && fraction.is_empty()) {
        return Err(wrong());
    }
    let too_large =
        || format!("'{text}' is too large for a size: the largest is 16 EiB less one byte");
    let whole: u128 = whole.parse().map_err(|_| wrong())?;
    let scale = 10_u128.pow(u32::try_from(fraction.len()).map_err(|_| wrong())?);
    let fraction: u128 = if fraction.is_empty() {
        0
    } else {
        fraction.parse().map_err(|_| wrong())?
    };
    let scaled = whole
        .checked_mul(scale)
        .and_then(|w| w.checked_add(fraction))
        .and_then(|w| w.checked_mul(u128::from(factor)))
        .ok_or_else(too_large)?;
    if scaled % scale != 0 {
        return Err(format!(
            "'{text}' is not a whole number of bytes: write fewer decimals"
        ));
    }
    u64::try_from(scaled / scale).map_err(|_| too_large())
}

/// The factor of a unit; `None` when it is not one.
fn factor_of(unit: &str) -> Option<u64> {
    let unit = unit.to_ascii_uppercase();
    let (letter, base) = match unit.as_bytes() {
        [] | [b'B'] => return Some(1),
        [letter] | [letter, b'I', b'B'] => (*letter, 1024_u64),
        [letter, b'B'] => (*letter, 1000),
        _ => return None,
    };
    let power = LETTERS.iter().position(|l| *l == letter)? + 1;
    base.checked_pow(u32::try_from(power).ok()?)
}

/// A size for a person: `0 B`, `4.0 KiB`, `3.9 MiB`, `1.0 GiB`.
pub(crate) fn human(bytes: u64) -> String {
    let mut unit = 1_u64;
    let mut letter = None;
    for l in LETTERS {
        match unit.checked_mul(1024) {
            Some(next) if bytes >= next => {
                unit = next;
                letter = Some(char::from(*l));
            }
            _ => break,
        }
    }
    match letter {
        None => format!("{bytes} B"),
        Some(letter) => {
            let tenths = u128::from(bytes) * 10 / u128::from(unit);
            format!("{}.{} {letter}iB", tenths / 10, tenths % 10)
        }
    }
}

/// A time for a person: `0.2 s`, `3 min 5 s`, `2 h 10 min`.
pub(crate) fn human_millis(millis: u64) -> String {
    let seconds = millis / 1000;
    match seconds {
        0..60 => format!("{seconds}.{} s", millis % 1000 / 100),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, want) in [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("1K", 1 << 10),
            ("1k", 1 << 10),
            ("64MiB", 64 << 20),
            ("10G", 10 << 30),
            ("10 GiB", 10 << 30),
            ("10GB", 10_000_000_000),
            ("1kB", 1000),
            ("1.5G", 3 << 29),
            ("0.5K", 512),
            ("12T", 12 << 40),
            ("1P", 1 << 50),
            ("15E", 15 << 60),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse(text), Ok(want), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused_by_name() {
        for text in [
            "",
            "G",
            "-1",
            "+1",
            "ten",
            "1X",
            "1Gb1",
            "1..5G",
            "1.G",
            ".5G",
            "1 0G",
            "0x10",
            "1e9",
            "16E",
            "18446744073709551616",
            "99999999999999999999999999999999999999999999G",
            "0.3K",
            "1.0000000000000000000G",
            "٣",
        ] {
            let message = parse(text).unwrap_err();
            assert!(message.contains(&format!("'{text}'")), "{text}: {message}");
        }
    }

    #[test]
    fn sizes_are_shown() {
        for (bytes, want) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (4_096_000, "3.9 MiB"),
            (1 << 30, "1.0 GiB"),
            ((1 << 30) - 1, "1023.9 MiB"),
            (12 << 40, "12.0 TiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(human(bytes), want);
        }
    }

    #[test]
    fn times_are_shown() {
        for (millis, want) in [
            (0, "0.0 s"),
            (230, "0.2 s"),
            (59_999, "59.9 s"),
            (185_000, "3 min 5 s"),
            (7_800_000, "2 h 10 min"),
        ] {
            assert_eq!(human_millis(millis), want);
        }
    }
}
