//! Extent states: two bits an extent, uniform parts in no memory.

use crate::sector::PAYLOAD_BYTES;
use crate::units::Extent;

/// Extent states in a map sector.
pub const STATES_PER_SECTOR: u64 = PAYLOAD_BYTES as u64 * 4;

const STATES_PER_WORD: usize = 32;
const WORDS_PER_PAGE: usize = 128;
const STATES_PER_PAGE: usize = STATES_PER_WORD * WORDS_PER_PAGE;
const WORDS_PER_SECTOR: usize = PAYLOAD_BYTES / 8;

/// What may be assumed of an extent.
///
/// ```text
///               first write: zeroed, then                 whole-extent discard
///  Unwritten ─────────────────────► Hot ◄──────────────────────────┐
///                                  │  ▲ │                          │
///           quiet, flushed, equal  │  │ └────────────────► Discarded
///                                  ▼  │ write                     ▲
///                                 Cool ───────────────────────────┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ExtentState {
    /// Reads as zeroes; the disks have not been touched.
    Unwritten = 0,
    /// All in-sync copies are equal.
    Cool = 1,
    /// Copies may differ: a write is or was under way.
    Hot = 2,
    /// Reads as zeroes; must be zeroed again before use.
    Discarded = 3,
}

const ALL: [ExtentState; 4] = [
    ExtentState::Unwritten,
    ExtentState::Cool,
    ExtentState::Hot,
    ExtentState::Discarded,
];

impl ExtentState {
    /// Whether the diagram above has an arrow from this state to `next`.
    #[must_use]
    pub fn may_become(self, next: Self) -> bool {
        use ExtentState::{Cool, Discarded, Hot, Unwritten};
        matches!(
            (self, next),
            (Unwritten | Discarded | Cool, Hot) | (Hot, Cool | Discarded) | (Cool, Discarded)
        )
    }

    fn from_bits(bits: u64) -> Self {
        ALL[usize::try_from(bits & 3).unwrap_or(0)]
    }

    /// A word in which every extent has this state.
    fn word(self) -> u64 {
        (self as u64) * 0x5555_5555_5555_5555
    }
}

#[derive(Clone, Debug)]
enum Page {
    Uniform(ExtentState),
    Mixed {
        words: Box<[u64; WORDS_PER_PAGE]>,
        counts: [u16; 4],
    },
}

/// The states of all extents of a device.
#[derive(Clone, Debug)]
pub struct StateMap {
    extents: u32,
    pages: Vec<Page>,
    counts: [u32; 4],
}

impl StateMap {
    /// All unwritten.
    #[must_use]
    pub fn new(extents: u32) -> Self {
        let pages = index(extents).div_ceil(STATES_PER_PAGE);
        Self {
            extents,
            pages: vec![Page::Uniform(ExtentState::Unwritten); pages],
            counts: [extents, 0, 0, 0],
        }
    }

    /// Number of extents.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.extents
    }

    /// Whether the device has no extents.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.extents == 0
    }

    /// How many extents are in `state`.
    #[must_use]
    pub fn count(&self, state: ExtentState) -> u32 {
        self.counts[state as usize]
    }

    /// The state of an extent.
    ///
    /// # Panics
    ///
    /// When there is no such extent.
    #[must_use]
    pub fn get(&self, extent: Extent) -> ExtentState {
        let at = self.checked(extent);
        match &self.pages[at / STATES_PER_PAGE] {
            Page::Uniform(state) => *state,
            Page::Mixed { words, .. } => state_in(words, at % STATES_PER_PAGE),
        }
    }

    /// Moves an extent along an arrow of the diagram; returns the state it had.
    ///
    /// # Panics
    ///
    /// When the diagram has no such arrow.
    pub fn set(&mut self, extent: Extent, state: ExtentState) -> ExtentState {
        let before = self.get(extent);
        assert!(
            before.may_become(state),
            "{extent:?} cannot go from {before:?} to {state:?}"
        );
        self.force(extent, state)
    }

    /// Gives an extent a state without regard to the diagram, for loading and recovery;
    /// returns the state it had.
    pub fn force(&mut self, extent: Extent, state: ExtentState) -> ExtentState {
        let at = self.checked(extent);
        let before = self.get(extent);
        if before == state {
            return before;
        }
        self.counts[before as usize] -= 1;
        self.counts[state as usize] += 1;
        let size = self.page_size(at / STATES_PER_PAGE);
        let page = &mut self.pages[at / STATES_PER_PAGE];
        let (words, counts) = page.make_mixed(size);
        let shift = 2 * (at % STATES_PER_WORD);
        let word = &mut words[at % STATES_PER_PAGE / STATES_PER_WORD];
        *word = *word & !(3 << shift) | (state as u64) << shift;
        counts[before as usize] -= 1;
        counts[state as usize] += 1;
        if usize::from(counts[state as usize]) == size {
            *page = Page::Uniform(state);
        }
        before
    }

    /// The first extent in `state` at or after `from`.
    #[must_use]
    pub fn next_in(&self, state: ExtentState, from: Extent) -> Option<Extent> {
        self.next_of(1 << state as u8, from)
    }

    /// The first cool or hot extent at or after `from`.
    #[must_use]
    pub fn next_written(&self, from: Extent) -> Option<Extent> {
        self.next_of(
            1 << ExtentState::Cool as u8 | 1 << ExtentState::Hot as u8,
            from,
        )
    }

    fn next_of(&self, wanted: u8, from: Extent) -> Option<Extent> {
        let matches = |state: ExtentState| wanted & (1 << state as u8) != 0;
        let mut at = index(from.0);
        let end = index(self.extents);
        while at < end {
            let page_end = ((at / STATES_PER_PAGE + 1) * STATES_PER_PAGE).min(end);
            match &self.pages[at / STATES_PER_PAGE] {
                Page::Uniform(state) if matches(*state) => return extent_at(at),
                Page::Mixed { words, counts }
                    if ALL.iter().any(|&s| matches(s) && counts[s as usize] > 0) =>
                {
                    let found =
                        (at..page_end).find(|&i| matches(state_in(words, i % STATES_PER_PAGE)));
                    if let Some(found) = found {
                        return extent_at(found);
                    }
                }
                _ => {}
            }
            at = page_end;
        }
        None
    }

    /// Map sectors that it takes.
    #[must_use]
    pub fn sectors(&self) -> u32 {
        let sectors = u64::from(self.extents).div_ceil(STATES_PER_SECTOR);
        u32::try_from(sectors).unwrap_or(u32::MAX)
    }

    /// The payload of sector `sector`; extents beyond the device are zero.
    pub fn write_payload(&self, sector: u32, out: &mut [u8; PAYLOAD_BYTES]) {
        let first = index(sector) * WORDS_PER_SECTOR;
        for (at, bytes) in (first..).zip(out.chunks_exact_mut(8)) {
            let word = match self.pages.get(at / WORDS_PER_PAGE) {
                Some(Page::Uniform(state)) => state.word(),
                Some(Page::Mixed { words, .. }) => words[at % WORDS_PER_PAGE],
                None => 0,
            };
            bytes.copy_from_slice(&(word & self.valid(at)).to_le_bytes());
        }
    }

    /// Takes the states of sector `sector`; those beyond the device are ignored.
    pub fn load_payload(&mut self, sector: u32, payload: &[u8; PAYLOAD_BYTES]) {
        let first = index(sector) * WORDS_PER_SECTOR;
        for (at, bytes) in (first..).zip(payload.chunks_exact(8)) {
            let valid = self.valid(at);
            if valid == 0 {
                return;
            }
            let mut word = [0; 8];
            word.copy_from_slice(bytes);
            self.load_word(at, u64::from_le_bytes(word) & valid, valid);
        }
    }

    fn load_word(&mut self, at: usize, new: u64, valid: u64) {
        let size = self.page_size(at / WORDS_PER_PAGE);
        let page = &mut self.pages[at / WORDS_PER_PAGE];
        let old = match page {
            Page::Uniform(state) => state.word() & valid,
            Page::Mixed { words, .. } => words[at % WORDS_PER_PAGE] & valid,
        };
        if old == new {
            return;
        }
        let (words, counts) = page.make_mixed(size);
        words[at % WORDS_PER_PAGE] = new;
        for lane in (0..STATES_PER_WORD).filter(|lane| valid >> (2 * lane) & 3 != 0) {
            let (before, after) = (old >> (2 * lane) & 3, new >> (2 * lane) & 3);
            let (before, after) = (
                ExtentState::from_bits(before),
                ExtentState::from_bits(after),
            );
            counts[before as usize] -= 1;
            counts[after as usize] += 1;
            self.counts[before as usize] -= 1;
            self.counts[after as usize] += 1;
        }
        if let Some(&uniform) = ALL
            .iter()
            .find(|&&s| usize::from(counts[s as usize]) == size)
        {
            *page = Page::Uniform(uniform);
        }
    }

    /// Bytes of memory in use.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        let mixed = self
            .pages
            .iter()
            .filter(|page| matches!(page, Page::Mixed { .. }))
            .count();
        self.pages.capacity() * size_of::<Page>() + mixed * WORDS_PER_PAGE * 8
    }

    fn checked(&self, extent: Extent) -> usize {
        assert!(extent.0 < self.extents, "{extent:?} of {}", self.extents);
        index(extent.0)
    }

    /// Extents in a page; fewer in the last one.
    fn page_size(&self, page: usize) -> usize {
        (index(self.extents) - page * STATES_PER_PAGE).min(STATES_PER_PAGE)
    }

    /// The bits of word `at` that stand for extents of the device.
    fn valid(&self, at: usize) -> u64 {
        match index(self.extents).saturating_sub(at * STATES_PER_WORD) {
            0 => 0,
            left if left >= STATES_PER_WORD => u64::MAX,
            left => (1 << (2 * left)) - 1,
        }
    }
}

impl Page {
    fn make_mixed(&mut self, size: usize) -> (&mut [u64; WORDS_PER_PAGE], &mut [u16; 4]) {
        if let Self::Uniform(state) = *self {
            let mut counts = [0; 4];
            counts[state as usize] = u16::try_from(size).unwrap_or(u16::MAX);
            *self = Self::Mixed {
                words: Box::new([state.word(); WORDS_PER_PAGE]),
                counts,
            };
        }
        match self {
            Self::Mixed { words, counts } => (words, counts),
            Self::Uniform(_) => unreachable!("made mixed above"),
        }
    }
}

fn state_in(words: &[u64; WORDS_PER_PAGE], at: usize) -> ExtentState {
    ExtentState::from_bits(words[at / STATES_PER_WORD] >> (2 * (at % STATES_PER_WORD)))
}

fn index(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

fn extent_at(at: usize) -> Option<Extent> {
    u32::try_from(at).ok().map(Extent)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_map_has_as_many_extents_as_it_was_given() {
        for extents in [0, 1, 5000] {
            let map = StateMap::new(extents);
            assert_eq!((map.len(), map.is_empty()), (extents, extents == 0));
        }
    }

    #[test]
    fn memory_grows_by_mixed_pages() {
        let mut map = StateMap::new(4 * 4096);
        let empty = map.memory_bytes();
        assert_eq!(empty, 4 * size_of::<Page>());
        for (extent, pages) in [(7, 1), (9, 1), (4096, 2), (3 * 4096 + 5, 3)] {
            map.force(Extent(extent), ExtentState::Hot);
            assert_eq!(map.memory_bytes(), empty + pages * WORDS_PER_PAGE * 8);
        }
    }

    /// A page becomes uniform whichever way its last extent comes, also a short one.
    #[test]
    fn pages_that_are_uniform_again_take_no_memory() {
        let extents = 4096 + 1000;
        let mut map = StateMap::new(extents);
        let empty = map.memory_bytes();
        for extent in 0..extents {
            map.force(Extent(extent), ExtentState::Cool);
        }
        assert_eq!(map.memory_bytes(), empty);
        assert_eq!(map.count(ExtentState::Cool), extents);
        let mut hot = StateMap::new(extents);
        for extent in 0..extents {
            hot.force(Extent(extent), ExtentState::Hot);
        }
        for sector in 0..map.sectors() {
            let mut payload = [0; PAYLOAD_BYTES];
            hot.write_payload(sector, &mut payload);
            map.load_payload(sector, &payload);
        }
        assert_eq!(map.memory_bytes(), empty);
        let counts = ALL.map(|state| map.count(state));
        assert_eq!(counts, [0, 0, extents, 0]);
    }

    /// Extents that come by loads and by themselves are counted together.
    #[test]
    fn a_page_of_several_states_is_not_uniform() {
        let mut map = StateMap::new(4096);
        let mut payload = [0; PAYLOAD_BYTES];
        payload[..8].fill(0b0101_0101);
        map.load_payload(0, &payload);
        for extent in 64..128 {
            map.force(Extent(extent), ExtentState::Hot);
        }
        payload[8..16].fill(0b0101_0101);
        payload[16..32].fill(0b1010_1010);
        map.load_payload(0, &payload);
        let counts = ALL.map(|state| map.count(state));
        assert_eq!(counts, [4096 - 128, 64, 64, 0]);
        let states = [0, 63, 64, 127, 128].map(|extent| map.get(Extent(extent)) as u8);
        assert_eq!(states, [1, 1, 2, 2, 0]);
    }

    #[test]
    fn only_the_diagrams_arrows_are_taken() {
        let legal: Vec<(ExtentState, ExtentState)> = ALL
            .iter()
            .flat_map(|&from| ALL.iter().map(move |&to| (from, to)))
            .filter(|(from, to)| from.may_become(*to))
            .collect();
        use ExtentState::{Cool, Discarded, Hot, Unwritten};
        assert_eq!(
            legal,
            [
                (Unwritten, Hot),
                (Cool, Hot),
                (Cool, Discarded),
                (Hot, Cool),
                (Hot, Discarded),
                (Discarded, Hot)
            ]
        );
    }

    #[test]
    fn uniform_parts_take_no_memory() {
        let per_tib = 1 << 18;
        for tib in [1, 16, 256] {
            let mut map = StateMap::new(per_tib * tib);
            assert!(
                map.memory_bytes() < 16384 * index(tib),
                "{}",
                map.memory_bytes()
            );
            for extent in 0..20_000 {
                map.set(Extent(extent), ExtentState::Hot);
            }
            for extent in 0..20_000 {
                map.set(Extent(extent), ExtentState::Cool);
            }
            assert!(map.memory_bytes() < 16384 * index(tib) + 1024);
        }
        let mut map = StateMap::new(per_tib);
        for extent in (0..per_tib).step_by(2) {
            map.set(Extent(extent), ExtentState::Hot);
        }
        assert!(
            map.memory_bytes() < 1 << 20,
            "under 1 MiB per TiB whatever it holds"
        );
    }

    proptest! {
        #[test]
        fn agrees_with_a_plain_vector(
            len in 1u32..9000,
            changes in proptest::collection::vec((any::<u32>(), 0u64..4), 0..300),
        ) {
            let mut map = StateMap::new(len);
            let mut plain = vec![ExtentState::Unwritten; index(len)];
            for (extent, state) in changes {
                // Runs, so that pages become uniform again.
                for extent in (extent % len..len).take(700) {
                    let state = ExtentState::from_bits(state);
                    prop_assert_eq!(map.force(Extent(extent), state), plain[index(extent)]);
                    plain[index(extent)] = state;
                }
            }
            let mut copy = StateMap::new(len);
            for sector in 0..map.sectors() {
                let mut payload = [0; PAYLOAD_BYTES];
                map.write_payload(sector, &mut payload);
                copy.load_payload(sector, &payload);
            }
            for state in ALL {
                let have = plain.iter().filter(|s| **s == state).count();
                prop_assert_eq!(index(map.count(state)), have);
                prop_assert_eq!(index(copy.count(state)), have);
                let mut found = Vec::new();
                let mut from = Extent(0);
                while let Some(extent) = map.next_in(state, from) {
                    found.push(index(extent.0));
                    from = Extent(extent.0 + 1);
                }
                let want: Vec<usize> = (0..plain.len()).filter(|&i| plain[i] == state).collect();
                prop_assert_eq!(found, want);
            }
            for extent in 0..len {
                prop_assert_eq!(map.get(Extent(extent)), plain[index(extent)]);
                prop_assert_eq!(copy.get(Extent(extent)), plain[index(extent)]);
            }
        }

        #[test]
        fn loading_any_bytes_never_panics(bytes in proptest::collection::vec(any::<u8>(), PAYLOAD_BYTES)) {
            let mut map = StateMap::new(1921);
            let payload: [u8; PAYLOAD_BYTES] = bytes.try_into().unwrap();
            map.load_payload(0, &payload);
            map.load_payload(1, &payload);
            let total: u32 = ALL.iter().map(|&state| map.count(state)).sum();
            prop_assert_eq!(total, 1921);
        }
    }
}
