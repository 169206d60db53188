#![allow(clippy::unwrap_used)]
use super::*;
use dirty_map::PAYLOAD_BYTES;

const STAMP: Stamp = Stamp {
    ordinal: 1,
    sequence: 2,
};

fn extents_of(sector: u32, extents: u32, hot: &[u32]) -> Option<(Stamp, Vec<u8>)> {
    let mut map = StateMap::new(extents);
    for &extent in hot {
        map.force(Extent(extent), ExtentState::Hot);
    }
    let mut payload = [0; PAYLOAD_BYTES];
    map.write_payload(sector, &mut payload);
    Some((STAMP, payload.to_vec()))
}

fn own_hot(sectors: Vec<Option<(Stamp, Vec<u8>)>>, extents: u32) -> Vec<u32> {
    let image = RegionImage {
        uneven: vec![false; sectors.len()],
        sectors,
        newest: STAMP,
    };
    let mut hot: Vec<u32> = own_hot_extents(&image, extents)
        .into_iter()
        .map(|extent| extent.0)
        .collect();
    hot.sort_unstable();
    hot
}

#[test]
fn hot_extents_of_all_sectors_are_found() {
    let hot = [0, 7, 1919, 1920, 3840, 4999];
    let sectors = (0..8).map(|sector| extents_of(sector, 5000, &hot));
    assert_eq!(own_hot(sectors.collect(), 5000), hot);
    let none = (0..8).map(|sector| extents_of(sector, 5000, &[]));
    assert_eq!(own_hot(none.collect(), 5000), [0; 0]);
}

#[test]
fn a_damaged_sector_is_hot_throughout() {
    let hot = [3, 2000, 4000];
    let sector = |sector| extents_of(sector, 5000, &hot);
    // The sectors beyond the device's last extent say nothing, damaged or not.
    let with = |damaged: usize| {
        let mut sectors: Vec<_> = (0..3).map(sector).collect();
        sectors.resize(8, None);
        sectors[damaged] = None;
        own_hot(sectors, 5000)
    };
    let mut middle = vec![3];
    middle.extend(1920..3840);
    middle.push(4000);
    assert_eq!(with(1), middle);
    let mut last = vec![3, 2000];
    last.extend(3840..5000);
    assert_eq!(with(2), last);
    assert_eq!(with(7), hot);
    // A device that ends with a sector.
    assert_eq!(own_hot(vec![sector(0), None], 1920), [3]);
}
