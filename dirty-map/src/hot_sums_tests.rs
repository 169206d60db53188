#![allow(clippy::unwrap_used)]
use super::*;
use proptest::prelude::*;

const SIZE: u64 = 1 << 30;
const LATER: Duration = Duration::from_secs(60);

fn sum(block: u64, content: u8) -> Sum {
    Sum::of(Block(block), &[content])
}

/// A page as it may lie on disk.
fn stored(extent: Extent) -> SumPage {
    let mut page = SumPage::unknown();
    for block in extent.blocks() {
        page.set(Block(block), Some(sum(block, 200)));
    }
    page
}

#[test]
fn what_was_not_written_is_as_the_extent_began() {
    let mut sums = HotSums::new(1 << 20, SIZE);
    for (number, base) in [(0, Base::Stored), (1, Base::Zeroes), (2, Base::Doubtful)] {
        sums.begin(Extent(number), base, LATER);
        sums.set(
            Block(Extent(number).blocks().start + 3),
            Some(sum(number.into(), 1)),
        );
    }
    assert_eq!(sums.get(Block(0)), Known::Stored);
    assert_eq!(
        sums.get(Block(1024)),
        Known::Sum(Sum::of_zeroes(Block(1024)))
    );
    assert_eq!(sums.get(Block(2048)), Known::Nothing);
    assert_eq!(sums.get(Block(9999)), Known::Stored, "not hot");
    for number in 0..3 {
        let block = Block(Extent(number).blocks().start + 3);
        assert_eq!(sums.get(block), Known::Sum(sum(number.into(), 1)));
    }
    let old = stored(Extent(1));
    assert_eq!(
        sums.page(Extent(1), Some(&old)).get(Block(1024)),
        Some(Sum::of_zeroes(Block(1024))),
        "a page from before a discard says nothing"
    );
    let old = stored(Extent(2));
    assert_eq!(sums.page(Extent(2), Some(&old)).get(Block(2048)), None);
    assert_eq!(
        sums.page_of_hot(Extent(2), Some(&old), |_| false)
            .get(Block(2048)),
        old.get(Block(2048)),
        "the judge of blocks that are not equal yet"
    );
}

#[test]
fn a_short_last_block_is_not_known_to_be_of_zeroes() {
    let size = (1 << 22) + 3 * 4096 + 512;
    let mut sums = HotSums::new(1 << 20, size);
    sums.begin(Extent(1), Base::Zeroes, LATER);
    let (last, short) = (Block(1024 + 2), Block(1024 + 3));
    assert_eq!(sums.get(last), Known::Sum(Sum::of_zeroes(last)));
    assert_eq!(sums.get(short), Known::Nothing);
    for page in [
        sums.page(Extent(1), None),
        sums.page_of_hot(Extent(1), None, |_| false),
    ] {
        assert_eq!(page.get(last), Some(Sum::of_zeroes(last)));
        assert_eq!(page.get(short), None);
    }
}

#[test]
fn beginning_again_changes_nothing_and_an_end_forgets() {
    let mut sums = HotSums::new(1 << 20, SIZE);
    sums.begin(Extent(5), Base::Zeroes, LATER);
    let block = Block(5 * 1024 + 7);
    sums.set(block, Some(sum(7, 1)));
    sums.begin(Extent(5), Base::Stored, LATER);
    assert_eq!(sums.get(block), Known::Sum(sum(7, 1)));
    sums.end(Extent(5));
    assert_eq!(sums.memory_bytes(), 0);
    sums.begin(Extent(5), Base::Stored, LATER);
    assert!(!sums.is_wanted(Extent(5)));
    assert_eq!(sums.get(block), Known::Stored);
    sums.want(Extent(5));
    assert!(sums.is_wanted(Extent(5)));
}

#[test]
fn an_extent_for_which_there_is_no_memory_has_no_checksums() {
    let mut sums = HotSums::new(2 * ENTRY_BYTES, SIZE);
    sums.begin(Extent(0), Base::Stored, LATER);
    sums.begin(Extent(1), Base::Stored, LATER);
    sums.set(Block(0), Some(sum(0, 1)));
    sums.set(Block(1024), Some(sum(1, 1)));
    sums.set(Block(1), Some(sum(2, 1)));
    assert_eq!(sums.get(Block(0)), Known::Nothing);
    assert_eq!(sums.get(Block(2)), Known::Nothing, "which were written?");
    assert_eq!(sums.get(Block(1024)), Known::Sum(sum(1, 1)));
    let old = stored(Extent(0));
    assert_eq!(sums.page(Extent(0), Some(&old)), SumPage::unknown());
    assert!(sums.is_wanted(Extent(0)) && !sums.needs_stored(Extent(0)));
    sums.set(Block(0), Some(sum(0, 1)));
    assert_eq!(sums.memory_bytes(), ENTRY_BYTES);
}

#[test]
fn the_stored_page_is_needed_while_a_block_has_not_changed() {
    let mut sums = HotSums::new(1 << 20, SIZE);
    sums.begin(Extent(0), Base::Stored, LATER);
    sums.begin(Extent(1), Base::Zeroes, LATER);
    assert!(sums.needs_stored(Extent(0)) && !sums.needs_stored(Extent(1)));
    for block in 0..1023 {
        sums.set(Block(block), None);
        assert!(sums.needs_stored(Extent(0)));
    }
    sums.set(Block(1023), None);
    assert!(!sums.needs_stored(Extent(0)));
}

#[test]
fn many_blocks_at_once_get_a_page_at_once() {
    let mut sums = HotSums::new(1 << 20, SIZE);
    sums.begin(Extent(0), Base::Stored, LATER);
    sums.expect(&(0..8));
    sums.expect(&(500..508));
    assert_eq!(sums.memory_bytes(), 0);
    sums.set(Block(900), Some(sum(900, 1)));
    sums.expect(&(0..32));
    assert_eq!(sums.memory_bytes(), PAGE_BYTES);
    assert_eq!(sums.get(Block(900)), Known::Sum(sum(900, 1)));
    assert_eq!(sums.get(Block(0)), Known::Stored);
    sums.end(Extent(0));
    assert_eq!(sums.memory_bytes(), 0);
}

/// The entries of an extent give their memory to its page.
#[test]
fn there_is_memory_for_a_page_in_place_of_the_entries() {
    let mut sums = HotSums::new(PAGE_BYTES, SIZE);
    sums.begin(Extent(0), Base::Stored, LATER);
    for block in 0..=u64::from(ENTRIES_MAX) {
        sums.set(Block(block), Some(sum(block, 1)));
    }
    assert_eq!(sums.memory_bytes(), PAGE_BYTES);
    for block in 0..=u64::from(ENTRIES_MAX) {
        assert_eq!(sums.get(Block(block)), Known::Sum(sum(block, 1)));
    }
}

#[test]
fn what_stays_hot_is_due_again_and_what_cooled_is_not() {
    let seconds = Duration::from_secs;
    let mut sums = HotSums::new(1 << 20, SIZE);
    for number in 0..4 {
        sums.begin(Extent(number), Base::Stored, seconds(60));
        if number < 3 {
            sums.set(Block(Extent(number).blocks().start), None);
        }
    }
    sums.end(Extent(1));
    sums.begin(Extent(1), Base::Zeroes, seconds(90));
    assert!(sums.take_due(seconds(59), seconds(119), 9).is_empty());
    assert_eq!(
        sums.take_due(seconds(60), seconds(120), 9),
        [Extent(0), Extent(2)],
        "one cooled meanwhile, and one has not changed"
    );
    assert_eq!(sums.take_due(seconds(90), seconds(150), 9), [Extent(1)]);
    sums.set(Block(3 * 1024), None);
    assert_eq!(sums.take_due(seconds(120), seconds(180), 1), [Extent(0)]);
    assert_eq!(
        sums.take_due(seconds(120), seconds(180), 9),
        [Extent(2), Extent(3)]
    );
}

#[test]
fn a_hot_page_takes_what_is_known_and_settled() {
    let mut sums = HotSums::new(1 << 20, SIZE);
    let old = stored(Extent(0));
    sums.begin(Extent(0), Base::Stored, LATER);
    sums.set(Block(0), Some(sum(0, 1)));
    sums.set(Block(1), Some(sum(1, 1)));
    sums.set(Block(2), None);
    let page = sums.page_of_hot(Extent(0), Some(&old), |block| block == Block(1));
    assert_eq!(page.get(Block(0)), Some(sum(0, 1)));
    for block in [1, 2, 3] {
        assert_eq!(page.get(Block(block)), old.get(Block(block)));
    }
}

#[derive(Clone, Debug)]
enum Step {
    Begin(u32, Base),
    End(u32),
    Set(u64, Option<u8>),
    Expect(u64, u64),
}

fn step() -> impl Strategy<Value = Step> {
    let bases = prop_oneof![Just(Base::Stored), Just(Base::Zeroes), Just(Base::Doubtful)];
    prop_oneof![
        2 => (0..3_u32, bases).prop_map(|(extent, base)| Step::Begin(extent, base)),
        1 => (0..3_u32).prop_map(Step::End),
        20 => (0..3 * 1024_u64, any::<Option<u8>>()).prop_map(|(block, sum)| Step::Set(block, sum)),
        20 => (0..300_u64, any::<Option<u8>>()).prop_map(|(block, sum)| Step::Set(block, sum)),
        2 => (0..3 * 1024_u64, 1..80_u64).prop_map(|(block, len)| Step::Expect(block, len)),
    ]
}

proptest! {
    /// Against a map of everything: what is known is right, and with enough memory all is known.
    #[test]
    fn never_wrong_and_within_the_cap(
        cap in prop_oneof![Just(0_usize), 0..20_000_usize, Just(1 << 20)],
        steps in proptest::collection::vec(step(), 0..600),
    ) {
        let mut sums = HotSums::new(cap, SIZE);
        let mut model: HashMap<u32, (Base, HashMap<u64, Option<Sum>>)> = HashMap::default();
        for step in steps {
            match step {
                Step::Begin(extent, base) => {
                    sums.begin(Extent(extent), base, LATER);
                    model.entry(extent).or_insert((base, HashMap::default()));
                }
                Step::End(extent) => {
                    sums.end(Extent(extent));
                    model.remove(&extent);
                }
                Step::Set(block, content) => {
                    if let Some((_, blocks)) = model.get_mut(&Block(block).extent().0) {
                        let sum = content.map(|content| sum(block, content));
                        sums.set(Block(block), sum);
                        blocks.insert(block, sum);
                    }
                }
                Step::Expect(block, len) => {
                    let end = Block(block).extent().blocks().end;
                    sums.expect(&(block..(block + len).min(end)));
                }
            }
            prop_assert!(sums.memory_bytes() <= cap);
        }
        for extent in (0..3).map(Extent) {
            let old = stored(extent);
            let page = sums.page(extent, Some(&old));
            let Some((base, blocks)) = model.get(&extent.0) else {
                prop_assert_eq!(sums.get(Block(extent.blocks().start)), Known::Stored);
                continue;
            };
            for block in extent.blocks() {
                let expected = match (blocks.get(&block), base) {
                    (Some(sum), _) => *sum,
                    (None, Base::Stored) => old.get(Block(block)),
                    (None, Base::Zeroes) => Some(Sum::of_zeroes(Block(block))),
                    (None, Base::Doubtful) => None,
                };
                let known = match sums.get(Block(block)) {
                    Known::Sum(sum) => Some(sum),
                    Known::Stored => old.get(Block(block)),
                    Known::Nothing => None,
                };
                prop_assert_eq!(known, page.get(Block(block)));
                prop_assert!(known.is_none() || known == expected);
                prop_assert!(cap < 1 << 20 || known == expected);
            }
        }
    }
}
