//! The three levels of a missed map: what is uniform takes no memory, whichever way it comes.
use super::*;

/// A node and a part of a page more.
const BLOCKS: u64 = BITS_PER_NODE + BITS_PER_PAGE + 3840;

fn payload(word: u64) -> [u8; PAYLOAD_BYTES] {
    let mut out = [0; PAYLOAD_BYTES];
    for bytes in out.chunks_exact_mut(8) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    out
}

#[test]
fn memory_grows_by_mixed_pages_and_nodes() {
    let mut map = MissedMap::new(3 * BITS_PER_NODE);
    let empty = map.memory_bytes();
    assert_eq!(empty, 3 * size_of::<Node>());
    let page = WORDS_PER_PAGE * 8;
    let node = size_of::<[Page; PAGES_PER_NODE]>();
    for (blocks, pages, nodes) in [
        (7..8, 1, 1),
        (9..10, 1, 1),
        (BITS_PER_PAGE..BITS_PER_PAGE + 1, 2, 1),
        (2 * BITS_PER_NODE + 5..2 * BITS_PER_NODE + 6, 3, 2),
        // A page that is set throughout is none.
        (0..BITS_PER_PAGE, 2, 2),
    ] {
        map.set(blocks);
        assert_eq!(map.memory_bytes(), empty + pages * page + nodes * node);
    }
}

#[test]
fn a_sector_that_is_loaded_leaves_the_others_alone() {
    for first in [0, BITS_PER_NODE] {
        let sector = u32::try_from(first.div_ceil(MISSED_PER_SECTOR)).unwrap_or(0);
        let own = u64::from(sector) * MISSED_PER_SECTOR..u64::from(sector + 1) * MISSED_PER_SECTOR;
        for word in [0, u64::MAX, 0xaaaa_aaaa_5555_0000] {
            let ones = u64::from(word.count_ones()) * WORDS_PER_SECTOR;
            let mut map = MissedMap::new(BLOCKS);
            map.set_all();
            map.load_payload(sector, &payload(word));
            assert_eq!(map.count(), BLOCKS - MISSED_PER_SECTOR + ones);
            assert_eq!(map.count_in(own.clone()), ones);
            let mut map = MissedMap::new(BLOCKS);
            map.load_payload(sector, &payload(word));
            assert_eq!((map.count(), map.count_in(own.clone())), (ones, ones));
            // Turned over: some become clear, others set.
            map.load_payload(sector, &payload(word ^ 0xff));
            let turned = u64::from((word ^ 0xff).count_ones()) * WORDS_PER_SECTOR;
            assert_eq!((map.count(), map.count_in(own.clone())), (turned, turned));
        }
    }
}

#[test]
fn what_is_searched_for_within_a_later_node_is_found() {
    let mut map = MissedMap::new(BLOCKS);
    for block in [10, BITS_PER_NODE + 10, BITS_PER_NODE + 20, BLOCKS - 1] {
        map.set(block..block + 1);
    }
    let next = |from| map.next_run(from, u64::MAX).map(|run| run.start);
    assert_eq!(next(11), Some(BITS_PER_NODE + 10));
    assert_eq!(next(BITS_PER_NODE + 11), Some(BITS_PER_NODE + 20));
    assert_eq!(next(BITS_PER_NODE + 21), Some(BLOCKS - 1));
    assert_eq!(next(BLOCKS), None);
}

/// The short last page of a map, and the short last node, are uniform when all of theirs is.
#[test]
fn short_pages_and_nodes_become_uniform() {
    let empty = MissedMap::new(BLOCKS).memory_bytes();
    let node = size_of::<[Page; PAGES_PER_NODE]>();
    let last = BITS_PER_NODE + BITS_PER_PAGE;
    let mut map = MissedMap::new(BLOCKS);
    map.set(last..last + 1000);
    assert_eq!(map.memory_bytes(), empty + node + WORDS_PER_PAGE * 8);
    map.set(last + 1000..BLOCKS);
    assert_eq!(map.memory_bytes(), empty + node, "the page is full");
    map.set(BITS_PER_NODE..last - 1);
    assert_eq!(map.memory_bytes(), empty + node + WORDS_PER_PAGE * 8);
    map.set(last - 1..last);
    assert_eq!(map.memory_bytes(), empty, "the node is full");
    assert_eq!(map.count(), BLOCKS - BITS_PER_NODE);
}

/// The same, word by word: what each turns over is counted on every level.
#[test]
fn words_that_are_turned_over_are_counted() {
    let empty = MissedMap::new(BLOCKS).memory_bytes();
    let mut map = MissedMap::new(BLOCKS);
    let load = |map: &mut MissedMap, word: u64| {
        for at in BITS_PER_NODE / 64..BLOCKS / 64 {
            map.load_word(at, word, u64::MAX);
        }
    };
    for (word, is_mixed) in [
        (0x00ff, true),
        (0xff00, true),
        (0xfff0, true),
        (u64::MAX, false),
        (0x0f0f, true),
        (1, true),
        (0, false),
    ] {
        load(&mut map, word);
        assert_eq!(map.memory_bytes() > empty, is_mixed, "{word:x}");
        let words = (BLOCKS - BITS_PER_NODE) / 64;
        assert_eq!(map.count(), words * u64::from(word.count_ones()));
    }
    // One bit of each page is left, then none.
    load(&mut map, 0x10);
    load(&mut map, 0x03);
    map.clear(BITS_PER_NODE..BLOCKS - 1);
    assert_eq!(map.memory_bytes(), empty);
    assert_eq!(map.count(), 0);
}

/// A page whose words were turned over is none when it is empty, beside one that is not.
#[test]
fn a_page_that_was_turned_over_and_emptied_takes_no_memory() {
    let node = size_of::<[Page; PAGES_PER_NODE]>();
    let mut map = MissedMap::new(BLOCKS);
    let empty = map.memory_bytes();
    map.set(BITS_PER_PAGE..BITS_PER_PAGE + 1);
    map.load_word(3, 0x00ff, u64::MAX);
    map.load_word(3, 0xff0f, u64::MAX);
    assert_eq!(map.memory_bytes(), empty + node + 2 * WORDS_PER_PAGE * 8);
    map.clear(3 * 64..3 * 64 + 20);
    assert_eq!(map.memory_bytes(), empty + node + WORDS_PER_PAGE * 8);
    assert_eq!(map.count(), 1);
}
