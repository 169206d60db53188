//! What the maps cost at 1, 16 and 256 TiB: mark, commit, cool, next-missed, count and load.
//!
//! The same number of blocks, extents or sectors is worked on at each size, spread over the
//! whole device, so that a cost which grows with the device and not with what is set shows as
//! a difference between the sizes. Positions come from a fixed sequence: every run measures
//! the same work.
#![allow(missing_docs)] // The macros of criterion make public items.

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dirty_map::{
    Address, BLOCKS_PER_EXTENT, Block, Extent, ExtentState, HOT_CAP_BYTES, HotExtents, Kind,
    MISSED_PER_SECTOR, MissedMap, PAYLOAD_BYTES, SECTOR_BYTES, STATES_PER_SECTOR, Stamp, StateMap,
    decode, encode,
};
use std::collections::BTreeSet;
use std::hint::black_box;
use std::time::Duration;

const SIZES_TIB: [u32; 3] = [1, 16, 256];
const EXTENTS_PER_TIB: u32 = 1 << 18;
/// Blocks that are marked, found and counted.
const MARKS: usize = 4096;
/// Extents that are hot before some of them cool.
const HOT: usize = 8192;
const COOL_BATCH: usize = 1024;
/// Missed sectors that are loaded; 15 GiB of device.
const MISSED_SECTORS: u32 = 1024;

const TAG: u32 = 0x6d61_7073;
const STAMP: Stamp = Stamp {
    ordinal: 1,
    sequence: 1,
};

/// A fixed sequence of well spread numbers (splitmix64).
struct Spread(u64);

impl Spread {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % end
    }

    fn payload(&mut self) -> [u8; PAYLOAD_BYTES] {
        let mut payload = [0; PAYLOAD_BYTES];
        for bytes in payload.chunks_exact_mut(8) {
            bytes.copy_from_slice(&self.below(u64::MAX).to_le_bytes());
        }
        payload
    }
}

fn extents(tib: u32) -> u32 {
    tib * EXTENTS_PER_TIB
}

fn blocks(tib: u32) -> u64 {
    u64::from(extents(tib)) * BLOCKS_PER_EXTENT
}

fn spread_blocks(tib: u32) -> Vec<u64> {
    let mut spread = Spread(u64::from(tib));
    (0..MARKS).map(|_| spread.below(blocks(tib))).collect()
}

/// Different extents all over the device.
fn spread_extents(tib: u32) -> Vec<Extent> {
    let mut spread = Spread(u64::from(tib));
    let mut all = BTreeSet::new();
    while all.len() < HOT {
        let block = Block(spread.below(blocks(tib)));
        all.insert(block.extent());
    }
    all.into_iter().collect()
}

fn marked(tib: u32) -> MissedMap {
    let mut map = MissedMap::new(blocks(tib));
    for block in spread_blocks(tib) {
        map.set(block..block + 1);
    }
    map
}

fn address(kind: Kind, index: u32) -> Address {
    Address {
        kind,
        slot: 0,
        index,
    }
}

fn mark(c: &mut Criterion) {
    let mut group = c.benchmark_group("mark");
    group.throughput(Throughput::Elements(MARKS as u64));
    for tib in SIZES_TIB {
        let positions = spread_blocks(tib);
        group.bench_function(BenchmarkId::new("missed-first-time", tib), |b| {
            b.iter_batched_ref(
                || MissedMap::new(blocks(tib)),
                |map| positions.iter().map(|&at| map.set(at..at + 1)).sum::<u64>(),
                BatchSize::PerIteration,
            );
        });
        let mut map = marked(tib);
        group.bench_function(BenchmarkId::new("missed-again", tib), |b| {
            b.iter(|| positions.iter().map(|&at| map.set(at..at + 1)).sum::<u64>());
        });
        let mut hot = HotExtents::new(HOT_CAP_BYTES);
        for extent in positions.iter().map(|&at| Block(at).extent()) {
            if !hot.contains(extent) {
                hot.insert(extent, Duration::ZERO);
            }
        }
        group.bench_function(BenchmarkId::new("hot-write", tib), |b| {
            b.iter(|| {
                for &at in &positions {
                    let extent = Block(at).extent();
                    hot.begin_write(extent, Duration::ZERO);
                    hot.end_write(extent, at..at + 1, Duration::ZERO);
                }
                hot.begin_flush();
                hot.end_flush(true);
            });
        });
    }
    group.finish();
}

/// One group commit: the sectors of what changed, each encoded once.
fn commit(c: &mut Criterion) {
    let mut group = c.benchmark_group("commit");
    for tib in SIZES_TIB {
        let mut states = StateMap::new(extents(tib));
        let mut state_sectors = BTreeSet::new();
        for extent in spread_extents(tib) {
            states.set(extent, ExtentState::Hot);
            let sector = u64::from(extent.0) / STATES_PER_SECTOR;
            state_sectors.extend(u32::try_from(sector));
        }
        group.throughput(Throughput::Elements(state_sectors.len() as u64));
        group.bench_function(BenchmarkId::new("state-sectors", tib), |b| {
            b.iter(|| {
                let mut payload = [0; PAYLOAD_BYTES];
                for &index in &state_sectors {
                    states.write_payload(index, &mut payload);
                    black_box(encode(address(Kind::State, index), TAG, STAMP, &payload));
                }
            });
        });

        let map = marked(tib);
        let missed_sectors: BTreeSet<u32> = spread_blocks(tib)
            .iter()
            .filter_map(|block| u32::try_from(block / MISSED_PER_SECTOR).ok())
            .collect();
        group.throughput(Throughput::Elements(missed_sectors.len() as u64));
        group.bench_function(BenchmarkId::new("missed-sectors", tib), |b| {
            b.iter(|| {
                let mut payload = [0; PAYLOAD_BYTES];
                for &index in &missed_sectors {
                    map.write_payload(index, &mut payload);
                    black_box(encode(address(Kind::Missed, index), TAG, STAMP, &payload));
                }
            });
        });
    }
    group.finish();
}

/// One batch cools out of many hot extents, oldest first.
fn cool(c: &mut Criterion) {
    let quiet = Duration::from_secs(10);
    let mut group = c.benchmark_group("cool");
    group.throughput(Throughput::Elements(COOL_BATCH as u64));
    for tib in SIZES_TIB {
        let all = spread_extents(tib);
        let setup = || {
            let mut states = StateMap::new(extents(tib));
            let mut hot = HotExtents::new(HOT_CAP_BYTES);
            let a_second = HOT.div_ceil(20);
            for (extents, second) in all.chunks(a_second).zip(0..) {
                for &extent in extents {
                    states.set(extent, ExtentState::Hot);
                    hot.insert(extent, Duration::from_secs(second));
                }
            }
            (states, hot)
        };
        group.bench_function(BenchmarkId::new("batch", tib), |b| {
            b.iter_batched_ref(
                setup,
                |(states, hot)| {
                    let cooled = hot.coolable(Duration::from_secs(60), quiet, COOL_BATCH);
                    assert_eq!(cooled.len(), COOL_BATCH);
                    for extent in cooled {
                        hot.remove(extent);
                        states.set(extent, ExtentState::Cool);
                    }
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

fn next_missed(c: &mut Criterion) {
    let mut group = c.benchmark_group("next-missed");
    for tib in SIZES_TIB {
        let map = marked(tib);
        group.throughput(Throughput::Elements(MARKS as u64));
        group.bench_function(BenchmarkId::new("walk-sparse", tib), |b| {
            b.iter(|| {
                let mut from = 0;
                while let Some(run) = map.next_run(from, 256) {
                    from = black_box(run).end;
                }
            });
        });

        let mut last = MissedMap::new(blocks(tib));
        last.set(blocks(tib) - 1..blocks(tib));
        group.throughput(Throughput::Elements(1));
        group.bench_function(BenchmarkId::new("only-the-last", tib), |b| {
            b.iter(|| last.next_run(black_box(0), 256));
        });

        let mut full = MissedMap::new(blocks(tib));
        full.set_all();
        group.bench_function(BenchmarkId::new("all-missed", tib), |b| {
            b.iter(|| full.next_run(black_box(0), 256));
        });
        group.bench_function(BenchmarkId::new("contains", tib), |b| {
            b.iter(|| last.contains(black_box(0)));
        });
    }
    group.finish();
}

fn count(c: &mut Criterion) {
    let mut group = c.benchmark_group("count");
    for tib in SIZES_TIB {
        let map = marked(tib);
        group.bench_function(BenchmarkId::new("all", tib), |b| {
            b.iter(|| black_box(&map).count());
        });
        group.bench_function(BenchmarkId::new("in-range", tib), |b| {
            b.iter(|| black_box(&map).count_in(0..blocks(tib)));
        });
    }
    group.finish();
}

/// A start: sectors are checked and taken.
fn load(c: &mut Criterion) {
    let mut group = c.benchmark_group("load");
    group.sample_size(10);
    for tib in SIZES_TIB {
        let cool = [0x55; PAYLOAD_BYTES];
        load_states(&mut group, "states-all-cool", tib, &cool);
        let mixed = Spread(7).payload();
        load_states(&mut group, "states-random", tib, &mixed);

        let payload = Spread(9).payload();
        let images: Vec<[u8; SECTOR_BYTES]> = (0..MISSED_SECTORS)
            .map(|index| encode(address(Kind::Missed, index), TAG, STAMP, &payload))
            .collect();
        group.throughput(Throughput::Elements(u64::from(MISSED_SECTORS)));
        group.bench_function(BenchmarkId::new("missed-random", tib), |b| {
            b.iter_batched_ref(
                || MissedMap::new(blocks(tib)),
                |map| {
                    for (index, image) in (0..).zip(&images) {
                        let sound = decode(image, address(Kind::Missed, index), TAG);
                        assert!(sound.is_ok());
                        if let Ok((_, payload)) = sound {
                            map.load_payload(index, payload);
                        }
                    }
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

/// The whole state map of a device. Every sector carries one payload: 256 TiB of different
/// images would measure the memory they lie in.
fn load_states(
    group: &mut criterion::BenchmarkGroup<'_, criterion::measurement::WallTime>,
    name: &str,
    tib: u32,
    payload: &[u8; PAYLOAD_BYTES],
) {
    let image = encode(address(Kind::State, 0), TAG, STAMP, payload);
    let sectors = StateMap::new(extents(tib)).sectors();
    group.throughput(Throughput::Elements(u64::from(sectors)));
    group.bench_function(BenchmarkId::new(name, tib), |b| {
        b.iter_batched_ref(
            || StateMap::new(extents(tib)),
            |map| {
                for index in 0..sectors {
                    let sound = decode(black_box(&image), address(Kind::State, 0), TAG);
                    assert!(sound.is_ok());
                    if let Ok((_, payload)) = sound {
                        map.load_payload(index, payload);
                    }
                }
            },
            BatchSize::PerIteration,
        );
    });
}

fn quick() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
}

criterion_group! {
    name = maps;
    config = quick();
    targets = mark, commit, cool, next_missed, count, load
}
criterion_main!(maps);
