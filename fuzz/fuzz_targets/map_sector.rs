//! Map sectors, and the maps that take their payload (R17).
//!
//! An input is the expected address (kind, slot, index in four bytes), the mirror's tag (four
//! bytes), the number of things in the map (four bytes), and the 512 bytes of a sector. What
//! decodes encodes to the same bytes, and a map that took a payload gives it back.
#![no_main]

use dirty_map::{
    Address, Extent, ExtentState, Kind, MISSED_PER_SECTOR, MissedMap, PAYLOAD_BYTES, SECTOR_BYTES,
    STATES_PER_SECTOR, SUMMARY_PER_SECTOR, StateMap, Summary, decode, encode,
};
use libfuzzer_sys::fuzz_target;
use ublk_mirror_fuzz::{Input, seal_sector, within};

/// Things in a map: some sectors, so that the last one may be in use in part.
const THINGS_MAX: u64 = 5 * MISSED_PER_SECTOR;
/// Memory that the maps of so many things may take.
const MAPS_BYTES_MAX: usize = 64 << 10;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let [kind, slot] = input.take();
    let kind = [Kind::State, Kind::Summary, Kind::Missed, Kind::Position][usize::from(kind % 4)];
    let address = Address {
        kind,
        slot,
        index: u32::from_le_bytes(input.take()),
    };
    let tag = u32::from_le_bytes(input.take());
    let things = u64::from(u32::from_le_bytes(input.take())) % THINGS_MAX;
    let mut sector: [u8; SECTOR_BYTES] = input.take();
    check(&sector, address, tag);
    // The same where it belongs, with all that is checked put right.
    sector[4..6].copy_from_slice(&0x4d55_u16.to_le_bytes());
    sector[6] = kind as u8;
    sector[7] = slot;
    sector[8..12].copy_from_slice(&address.index.to_le_bytes());
    sector[12..16].copy_from_slice(&tag.to_le_bytes());
    seal_sector(&mut sector);
    check(&sector, address, tag);
    let payload: &[u8; PAYLOAD_BYTES] = sector.last_chunk().expect("a sector is longer");
    within(MAPS_BYTES_MAX, || maps(payload, address.index, things));
});

fn check(sector: &[u8; SECTOR_BYTES], address: Address, tag: u32) {
    let Ok((stamp, payload)) = within(0, || decode(sector, address, tag)) else {
        return;
    };
    assert!(stamp.sequence.checked_add(1 << 61).is_some());
    let mut again = encode(address, tag, stamp, payload);
    // Bytes 20 to 23 are reserved: not checked, written as zeroes.
    again[20..24].copy_from_slice(&sector[20..24]);
    seal_sector(&mut again);
    assert_eq!(&again, sector);
}

/// Each kind of map takes the payload, over nothing and over its opposite.
fn maps(payload: &[u8; PAYLOAD_BYTES], index: u32, things: u64) {
    let opposite = payload.map(|byte| !byte);
    states(payload, &opposite, index, things);
    missed(payload, &opposite, index, things);
    summary(payload, &opposite, index, things);
}

/// How many of the `per_sector` things of sector `index` there are among `things`.
fn present(index: u32, per_sector: u64, things: u64) -> u64 {
    things
        .saturating_sub(u64::from(index) * per_sector)
        .min(per_sector)
}

/// `payload` without what stands for more than `present` things of `bits` bits.
fn cut(payload: &[u8; PAYLOAD_BYTES], present: u64, bits: u64) -> [u8; PAYLOAD_BYTES] {
    let mut out = *payload;
    for (byte, first) in out.iter_mut().zip((0..).step_by(8)) {
        let left = (present * bits).saturating_sub(first).min(8);
        *byte &= u8::try_from((1_u16 << left) - 1).unwrap_or(u8::MAX);
    }
    out
}

fn ones(bytes: &[u8; PAYLOAD_BYTES]) -> u64 {
    bytes.iter().map(|byte| u64::from(byte.count_ones())).sum()
}

fn states(payload: &[u8; PAYLOAD_BYTES], opposite: &[u8; PAYLOAD_BYTES], index: u32, things: u64) {
    let extents = u32::try_from(things).unwrap_or(u32::MAX);
    let mut map = StateMap::new(extents);
    // A sector beyond the map is ignored, as are extents beyond the device.
    let near = index % (map.sectors() + 2);
    for bytes in [payload, opposite, payload] {
        map.load_payload(near, bytes);
        let mut back = [0xff; PAYLOAD_BYTES];
        map.write_payload(near, &mut back);
        let want = cut(bytes, present(near, STATES_PER_SECTOR, things), 2);
        assert_eq!(back, want);
        let all = [
            ExtentState::Unwritten,
            ExtentState::Cool,
            ExtentState::Hot,
            ExtentState::Discarded,
        ];
        let counts = all.map(|state| map.count(state));
        assert_eq!(counts.iter().sum::<u32>(), extents);
        let first = near * u32::try_from(STATES_PER_SECTOR).expect("a small number");
        if let Some(hot) = map.next_in(ExtentState::Hot, Extent(0)) {
            assert!(hot.0 >= first && hot.0 < extents && map.get(hot) == ExtentState::Hot);
        } else {
            assert_eq!(counts[2], 0);
        }
    }
    map.load_payload(index, payload);
}

fn missed(payload: &[u8; PAYLOAD_BYTES], opposite: &[u8; PAYLOAD_BYTES], index: u32, things: u64) {
    let mut map = MissedMap::new(things);
    let near = index % (map.sectors() + 2);
    for bytes in [payload, opposite, payload] {
        map.load_payload(near, bytes);
        let mut back = [0xff; PAYLOAD_BYTES];
        map.write_payload(near, &mut back);
        let want = cut(bytes, present(near, MISSED_PER_SECTOR, things), 1);
        assert_eq!((back, map.count()), (want, ones(&want)));
        assert_eq!(map.count_in(0..things), map.count());
    }
    map.load_payload(index, payload);
    map.set_sector(index);
    assert!(map.count() <= things);
    map.clear_all();
    assert!(map.is_clear());
}

fn summary(payload: &[u8; PAYLOAD_BYTES], opposite: &[u8; PAYLOAD_BYTES], index: u32, things: u64) {
    let mut map = Summary::new(u32::try_from(things).unwrap_or(u32::MAX));
    if map.sectors() == 0 {
        return;
    }
    // Its sectors are counted before they are read: there is none beyond.
    let near = index % map.sectors();
    for bytes in [payload, opposite, payload] {
        map.load_payload(near, bytes);
        let mut back = [0xff; PAYLOAD_BYTES];
        map.write_payload(near, &mut back);
        let want = cut(bytes, present(near, SUMMARY_PER_SECTOR, things), 1);
        assert_eq!(back, want);
        assert_eq!(map.iter().count() as u64, ones(&want));
        assert!(
            map.iter()
                .all(|page| u64::from(page) < things && map.get(page))
        );
    }
}
