//! What simulated disks hold: runs of sectors, so that zeroing or discarding an extent of 8,192
//! sectors is one step.

use super::{Rng, SECTOR, SimBuffer};
use crate::host::DiskRequest;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

/// Bytes of a run of sectors.
#[derive(Clone, Debug)]
pub(super) enum Content {
    /// The same byte throughout.
    Fill(u8),
    /// What follows the first `skip` bytes.
    Bytes { bytes: Rc<[u8]>, skip: usize },
}

impl Content {
    /// The content `bytes`, as a fill if it is one.
    pub(super) fn of(bytes: &[u8]) -> Self {
        match bytes.first() {
            // Each byte equals the next: the comparison of a library is faster than a loop.
            Some(first) if bytes[1..] == bytes[..bytes.len() - 1] => Self::Fill(*first),
            _ => Self::Bytes {
                bytes: bytes.into(),
                skip: 0,
            },
        }
    }

    /// What follows the first `sectors`.
    fn after(&self, sectors: u64) -> Self {
        match self {
            Self::Fill(byte) => Self::Fill(*byte),
            Self::Bytes { bytes, skip } => Self::Bytes {
                bytes: bytes.clone(),
                skip: skip + len(sectors),
            },
        }
    }

    fn copy_to(&self, out: &mut [u8]) {
        match self {
            Self::Fill(byte) => out.fill(*byte),
            Self::Bytes { bytes, skip } => out.copy_from_slice(&bytes[*skip..*skip + out.len()]),
        }
    }
}

/// Bytes of so many sectors, which a test has in memory.
fn len(sectors: u64) -> usize {
    usize::try_from(sectors * SECTOR).unwrap_or(usize::MAX)
}

/// The sectors of `len` bytes at `offset`.
pub(super) fn sectors(offset: u64, len: u64) -> Range<u64> {
    offset / SECTOR..(offset + len) / SECTOR
}

/// All, nothing, or a part.
pub(super) fn some_of(sectors: &Range<u64>, rng: &mut Rng) -> Range<u64> {
    let len = sectors.end - sectors.start;
    match rng.below(4) {
        0 => sectors.clone(),
        1 => 0..0,
        2 => sectors.start..sectors.start + rng.below(len),
        _ => sectors.start + rng.below(len)..sectors.end,
    }
}

/// A run of sectors and what it holds.
#[derive(Clone, Debug)]
pub(super) struct Run {
    pub(super) sectors: Range<u64>,
    pub(super) content: Content,
}

impl Run {
    /// The part of it that lies in `sectors`.
    pub(super) fn part(&self, sectors: &Range<u64>) -> Option<Self> {
        let start = self.sectors.start.max(sectors.start);
        let end = self.sectors.end.min(sectors.end);
        (start < end).then(|| Self {
            sectors: start..end,
            content: self.content.after(start - self.sectors.start),
        })
    }

    /// Removes `sectors` from `runs`, which may overlap each other; their order stays.
    pub(super) fn subtract(runs: &mut Vec<(u64, Self)>, sectors: &Range<u64>) {
        if !runs.iter().any(|(_, run)| run.part(sectors).is_some()) {
            return;
        }
        let around = [0..sectors.start, sectors.end..u64::MAX];
        *runs = runs
            .iter()
            .flat_map(|(number, run)| {
                around
                    .iter()
                    .filter_map(|side| Some((*number, run.part(side)?)))
            })
            .collect();
    }
}

/// Runs that do not overlap, by their first sector.
#[derive(Clone, Default)]
pub(super) struct Sectors(BTreeMap<u64, Run>);

impl Sectors {
    /// Replaces what the run's sectors hold.
    pub(super) fn put(&mut self, run: Run) {
        let Range { start, end } = run.sectors;
        let reaches_in = self.0.range(..start).next_back();
        let begin_before = reaches_in.filter(|(_, before)| before.sectors.end > start);
        let mut struck: Vec<u64> = begin_before.map(|(&first, _)| first).into_iter().collect();
        struck.extend(self.0.range(start..end).map(|(&first, _)| first));
        for first in struck {
            let Some(old) = self.0.remove(&first) else {
                continue;
            };
            let sides = [0..start, end..u64::MAX];
            for left in sides.iter().filter_map(|side| old.part(side)) {
                self.0.insert(left.sectors.start, left);
            }
        }
        self.0.insert(start, run);
    }

    /// Fills `out` with what the sectors from `first` on hold; the rest of it stays.
    pub(super) fn read(&self, first: u64, out: &mut [u8]) {
        let wanted = first..first + out.len() as u64 / SECTOR;
        let before = self.0.range(..first).next_back();
        for run in before.into_iter().chain(self.0.range(wanted.clone())) {
            if let Some(part) = run.1.part(&wanted) {
                let at = len(part.sectors.start - first);
                let bytes = len(part.sectors.end - part.sectors.start);
                part.content.copy_to(&mut out[at..at + bytes]);
            }
        }
    }

    /// A hash of what all sectors hold, however the runs are cut.
    pub(super) fn digest(&self) -> u64 {
        let mix = |hash: u64, word: u64| {
            (hash.rotate_left(29) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        };
        // Neighbours with one byte throughout count as one run.
        let (mut hash, mut filled) = (0, (0..0, 0));
        let mut fill = |hash: u64, sectors: Range<u64>, byte: u8| {
            let (before, same) = filled.clone();
            if before.end == sectors.start && same == byte {
                filled.0.end = sectors.end;
                return hash;
            }
            filled = (sectors, byte);
            mix(mix(mix(hash, before.start), before.end), u64::from(same))
        };
        let mut sector_bytes = [0; 512];
        for run in self.0.values() {
            if let Content::Fill(byte) = run.content {
                hash = fill(hash, run.sectors.clone(), byte);
                continue;
            }
            for sector in run.sectors.clone() {
                if let Some(one) = run.part(&(sector..sector + 1)) {
                    one.content.copy_to(&mut sector_bytes);
                }
                if sector_bytes.iter().all(|byte| *byte == sector_bytes[0]) {
                    hash = fill(hash, sector..sector + 1, sector_bytes[0]);
                    continue;
                }
                hash = mix(hash, sector);
                for word in sector_bytes.as_chunks::<8>().0 {
                    hash = mix(hash, u64::from_le_bytes(*word));
                }
            }
        }
        fill(hash, u64::MAX..u64::MAX, 0)
    }
}

/// What a discarded sector reads as.
const DISCARDED: u8 = 0xd5;

/// What a request changes on the disk.
pub(super) fn written_by(request: &DiskRequest<SimBuffer>) -> Option<Run> {
    match request {
        DiskRequest::Write { offset, span, .. } => {
            let bytes = span.start..span.start + span.len;
            Some(Run {
                sectors: sectors(*offset, span.len as u64),
                content: span.buffer.device_read(bytes, Content::of),
            })
        }
        DiskRequest::WriteZeroes { offset, len } => Some(Run {
            sectors: sectors(*offset, *len),
            content: Content::Fill(0),
        }),
        DiskRequest::Discard { offset, len } => Some(Run {
            sectors: sectors(*offset, *len),
            content: Content::Fill(DISCARDED),
        }),
        DiskRequest::Read { .. } | DiskRequest::Flush => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Many puts give what a flat array gives, and the digest knows the content alone.
    #[test]
    fn as_an_array() {
        const COUNT: u64 = 40;
        for seed in 0..200 {
            let mut rng = Rng::new(seed);
            let (mut runs, mut flat) = (Sectors::default(), vec![0_u8; len(COUNT)]);
            runs.put(Run {
                sectors: 0..COUNT,
                content: Content::Fill(0),
            });
            for _ in 0..30 {
                let start = rng.below(COUNT);
                let sectors = start..start + 1 + rng.below(COUNT - start);
                let bytes: Vec<u8> = match rng.below(3) {
                    0 => vec![7; len(sectors.end - sectors.start)],
                    _ => (0..sectors.end - sectors.start)
                        .flat_map(|_| [rng.bits().to_le_bytes()[0]; 512])
                        .collect(),
                };
                flat[len(sectors.start)..len(sectors.end)].copy_from_slice(&bytes);
                let content = Content::of(&bytes);
                runs.put(Run { sectors, content });
                let first = rng.below(COUNT);
                let mut out = vec![0; len(1 + rng.below(COUNT - first))];
                runs.read(first, &mut out);
                assert_eq!(out, flat[len(first)..len(first) + out.len()]);
            }
            let mut single = Sectors::default();
            for (sector, bytes) in (0..).zip(flat.chunks(512)) {
                single.put(Run {
                    sectors: sector..sector + 1,
                    content: Content::of(bytes),
                });
            }
            assert_eq!(runs.digest(), single.digest(), "seed {seed}");
        }
    }

    #[test]
    fn subtracting_leaves_both_sides() {
        let run = Run {
            sectors: 10..20,
            content: Content::of(&(0..10_u8).flat_map(|n| [n; 512]).collect::<Vec<_>>()),
        };
        let mut runs = vec![(1, run)];
        Run::subtract(&mut runs, &(12..15));
        let left: Vec<_> = runs.iter().map(|(_, run)| run.sectors.clone()).collect();
        assert_eq!(left, [10..12, 15..20]);
        let mut out = [0; 512];
        runs[1].1.part(&(15..16)).unwrap().content.copy_to(&mut out);
        assert_eq!(out[0], 5);
    }
}
