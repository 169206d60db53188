//! Pages of checksums that have been read or written lately.
//!
//! Bounded; when it is full, a page that nobody has asked for since the hand last came by makes
//! room (the clock algorithm).

use crate::sums::{SUM_PAGE_BYTES, SumPage};
use crate::units::Extent;
use std::collections::HashMap;

/// What a page takes besides its content: its places in the table and under the hand.
const OVERHEAD_BYTES: usize = 64;

#[derive(Debug)]
struct Held {
    extent: Extent,
    page: SumPage,
    asked: bool,
}

/// Pages by their extent.
#[derive(Debug)]
pub struct SumCache {
    places: HashMap<Extent, usize>,
    held: Vec<Held>,
    hand: usize,
    pages_max: usize,
}

impl SumCache {
    /// Nothing is held; at most `cap_bytes` are taken, and one page at the least.
    #[must_use]
    pub fn new(cap_bytes: usize) -> Self {
        Self {
            places: HashMap::new(),
            held: Vec::new(),
            hand: 0,
            pages_max: (cap_bytes / (SUM_PAGE_BYTES + OVERHEAD_BYTES)).max(1),
        }
    }

    /// Whether the page of `extent` is held.
    #[must_use]
    pub fn contains(&self, extent: Extent) -> bool {
        self.places.contains_key(&extent)
    }

    /// The page of `extent`, if it is held.
    pub fn get(&mut self, extent: Extent) -> Option<&SumPage> {
        let held = &mut self.held[*self.places.get(&extent)?];
        held.asked = true;
        Some(&held.page)
    }

    /// Holds a page, in place of one that was held of its extent.
    pub fn put(&mut self, extent: Extent, page: SumPage) {
        let held = Held {
            extent,
            page,
            asked: true,
        };
        if let Some(&place) = self.places.get(&extent) {
            self.held[place] = held;
        } else if self.held.len() < self.pages_max {
            self.places.insert(extent, self.held.len());
            self.held.push(held);
        } else {
            while std::mem::take(&mut self.held[self.hand].asked) {
                self.hand = (self.hand + 1) % self.held.len();
            }
            self.places.remove(&self.held[self.hand].extent);
            self.places.insert(extent, self.hand);
            self.held[self.hand] = held;
            self.hand = (self.hand + 1) % self.held.len();
        }
    }

    /// The page of `extent` on disk is, or may be, another one from now on.
    pub fn forget(&mut self, extent: Extent) {
        let Some(place) = self.places.remove(&extent) else {
            return;
        };
        self.held.swap_remove(place);
        if let Some(moved) = self.held.get(place) {
            self.places.insert(moved.extent, place);
        }
        if self.hand >= self.held.len() {
            self.hand = 0;
        }
    }

    /// Pages held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether no page is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sums::Sum;
    use crate::units::Block;
    use proptest::prelude::*;

    /// A page that tells whose it is and when it was made.
    fn page(extent: u32, made: u8) -> SumPage {
        let mut page = SumPage::unknown();
        let block = Block(Extent(extent).blocks().start);
        page.set(block, Some(Sum::of(block, &[made])));
        page
    }

    #[test]
    fn what_is_asked_for_stays() {
        let mut cache = SumCache::new(3 * (SUM_PAGE_BYTES + OVERHEAD_BYTES));
        for extent in 0..3 {
            cache.put(Extent(extent), page(extent, 0));
        }
        cache.put(Extent(3), page(3, 0));
        assert!(!cache.contains(Extent(0)), "all were asked for: the first");
        assert!(cache.get(Extent(1)).is_some());
        cache.put(Extent(4), page(4, 0));
        assert!(cache.contains(Extent(1)));
        assert!(!cache.contains(Extent(2)));
        assert_eq!(cache.len(), 3);
    }

    proptest! {
        #[test]
        fn holds_the_last_page_or_none(
            pages in 1_usize..5,
            steps in proptest::collection::vec((0_u32..8, 0..3), 0..200),
        ) {
            let mut cache = SumCache::new(pages * (SUM_PAGE_BYTES + OVERHEAD_BYTES));
            let mut last = [None; 8];
            for (made, (extent, what)) in (0_u8..).zip(steps) {
                let place = usize::try_from(extent).unwrap_or(0);
                match what {
                    0 => {
                        cache.put(Extent(extent), page(extent, made));
                        last[place] = Some(made);
                        prop_assert!(cache.contains(Extent(extent)));
                    }
                    1 => {
                        cache.forget(Extent(extent));
                        last[place] = None;
                    }
                    _ => {}
                }
                let expected = last[place].map(|made| page(extent, made));
                let held = cache.get(Extent(extent));
                prop_assert!(held.is_none() || held == expected.as_ref());
                prop_assert!(cache.len() <= pages);
            }
        }
    }
}
