//! Latencies in a fixed array, and their p99 with the interval in which it lies.

use std::time::Duration;

/// Latencies are counted in units of 2^7 ns: a bucket is then at most a 32nd wide from 4 us on.
const UNIT_BITS: u32 = 7;
/// Buckets for each doubling.
const PER_OCTAVE: u64 = 32;
const OCTAVE_BITS: u32 = PER_OCTAVE.trailing_zeros();
/// The last octave ends at 2^36 units, which are more than two hours.
const OCTAVES: usize = 32;
const BUCKETS: usize = OCTAVES * 32;
const _: () = assert!(PER_OCTAVE == 32);

/// A quantile of what the samples were drawn from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Quantile {
    /// It is hardly less.
    pub(super) low: Duration,
    /// The estimate.
    pub(super) likely: Duration,
    /// It is hardly more.
    pub(super) high: Duration,
}

/// Counts of latencies.
#[derive(Clone, Debug)]
pub(super) struct Histogram {
    buckets: [u32; BUCKETS],
    count: u32,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: [0; BUCKETS],
            count: 0,
        }
    }
}

impl Histogram {
    /// Counts a latency.
    pub(super) fn add(&mut self, latency: Duration) {
        let bucket = &mut self.buckets[bucket_of(latency)];
        // More samples than this say nothing new.
        if self.count < u32::MAX {
            *bucket += 1;
            self.count += 1;
        }
    }

    /// Samples.
    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// Forgets all samples.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Counts the samples of `other` as well.
    pub(super) fn absorb(&mut self, other: &Self) {
        for (bucket, more) in self.buckets.iter_mut().zip(&other.buckets) {
            let room = u32::MAX - self.count;
            *bucket += more.min(&room);
            self.count += more.min(&room);
        }
    }

    /// Forgets every other sample.
    pub(super) fn halve(&mut self) {
        for bucket in &mut self.buckets {
            *bucket /= 2;
        }
        self.count = self.buckets.iter().sum();
    }

    /// The 99th percentile; none without samples.
    pub(super) fn p99(&self) -> Option<Quantile> {
        if self.count == 0 {
            return None;
        }
        // How many of n samples lie below the true quantile varies by sqrt(n x 0.99 x 0.01).
        let rank = f64::from(self.count) * 0.99;
        let spread = 1.5 * (rank * 0.01).sqrt();
        Some(Quantile {
            low: self.at(rank - spread),
            likely: self.at(rank),
            high: self.at(rank + spread),
        })
    }

    /// The latency that `rank` samples are below, by interpolation in its bucket.
    fn at(&self, rank: f64) -> Duration {
        let mut below = 0.0;
        let mut last = 0;
        for (index, &count) in self.buckets.iter().enumerate().filter(|(_, c)| **c > 0) {
            let count = f64::from(count);
            if below + count >= rank {
                let (start, width) = bounds(index);
                let part = ((rank - below) / count).clamp(0.0, 1.0);
                return start + width.mul_f64(part);
            }
            below += count;
            last = index;
        }
        let (start, width) = bounds(last);
        start + width
    }
}

fn bucket_of(latency: Duration) -> usize {
    let units = u64::try_from(latency.as_nanos() >> UNIT_BITS).unwrap_or(u64::MAX);
    let bucket = if units < PER_OCTAVE {
        units
    } else {
        let octave = u64::from(units.ilog2() - OCTAVE_BITS);
        (octave + 1) * PER_OCTAVE + (units >> octave) % PER_OCTAVE
    };
    usize::try_from(bucket).map_or(BUCKETS - 1, |bucket| bucket.min(BUCKETS - 1))
}

/// Where a bucket begins, and its width.
fn bounds(bucket: usize) -> (Duration, Duration) {
    let index = bucket as u64;
    let octave = (index / PER_OCTAVE).saturating_sub(1);
    let in_octave = if index < PER_OCTAVE {
        index
    } else {
        index % PER_OCTAVE + PER_OCTAVE
    };
    let units = |units: u64| Duration::from_nanos((units << octave) << UNIT_BITS);
    (units(in_octave), units(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_latency_lies_in_its_bucket() {
        let mut nanos = 1;
        while nanos < 1 << 43 {
            for latency in [nanos - 1, nanos, nanos + nanos / 3].map(Duration::from_nanos) {
                let (start, width) = bounds(bucket_of(latency));
                assert!(
                    start <= latency && latency < start + width,
                    "{latency:?}: {start:?} + {width:?}"
                );
                let small = Duration::from_nanos(1 << UNIT_BITS);
                assert!(
                    width == small || width * 31 <= latency,
                    "{latency:?}: {width:?}"
                );
            }
            nanos *= 2;
        }
        assert_eq!(bucket_of(Duration::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_of_known_samples() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.p99(), None);
        for micros in 1..=10_000 {
            histogram.add(Duration::from_micros(micros));
        }
        let is = |found: Duration, want: u64| {
            let found = u64::try_from(found.as_micros()).unwrap_or(0);
            found.abs_diff(want) <= 5
        };
        let all = histogram.p99();
        assert!(
            all.is_some_and(|q| is(q.low, 9890) && is(q.likely, 9900) && is(q.high, 9910)),
            "{all:?}"
        );
        histogram.halve();
        assert!((4700..=5000).contains(&histogram.count()));
        let half = histogram.p99();
        assert!(half.is_some_and(|q| is(q.likely, 9900)), "{half:?}");
        histogram.clear();
        assert_eq!(histogram.count(), 0);
        histogram.add(Duration::from_millis(3));
        let one = histogram.p99();
        let near = |found: Duration| found.as_micros().abs_diff(3000) < 100;
        assert!(one.is_some_and(|q| near(q.low) && near(q.high)), "{one:?}");
    }
}
