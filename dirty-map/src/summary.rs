//! Which pages of a missed map have been written since the map began: tells a page that was
//! never written from a damaged one.

use crate::sector::PAYLOAD_BYTES;

/// Summary bits in a map sector.
pub const SUMMARY_PER_SECTOR: u64 = PAYLOAD_BYTES as u64 * 8;
const BYTES_PER_SECTOR: usize = PAYLOAD_BYTES;

/// One bit for each page of a missed map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    pages: u32,
    /// Whole sectors' worth of bits; those beyond `pages` stay clear.
    bits: Vec<u8>,
}

impl Summary {
    /// All clear, for a missed map of `pages` pages.
    #[must_use]
    pub fn new(pages: u32) -> Self {
        let sectors = u64::from(pages).div_ceil(SUMMARY_PER_SECTOR);
        let bytes = usize::try_from(sectors).unwrap_or(usize::MAX) * BYTES_PER_SECTOR;
        Self {
            pages,
            bits: vec![0; bytes],
        }
    }

    /// Map sectors that it takes.
    #[must_use]
    pub fn sectors(&self) -> u32 {
        u32::try_from(self.bits.len() / BYTES_PER_SECTOR).unwrap_or(u32::MAX)
    }

    /// Whether `page` has been written.
    #[must_use]
    pub fn get(&self, page: u32) -> bool {
        self.bits
            .get(byte(page))
            .is_some_and(|bits| bits & mask(page) != 0)
    }

    /// Notes that `page` is written.
    ///
    /// # Panics
    ///
    /// When there is no such page.
    pub fn set(&mut self, page: u32) {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        self.bits[byte(page)] |= mask(page);
    }

    /// Nothing is written any more.
    pub fn clear_all(&mut self) {
        self.bits.fill(0);
    }

    /// The written pages in order.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        let bytes = (0_u32..).zip(&self.bits).filter(|(_, bits)| **bits != 0);
        bytes.flat_map(|(at, bits)| {
            (0..8)
                .filter(move |bit| bits & (1 << bit) != 0)
                .map(move |bit| at * 8 + bit)
        })
    }

    /// The payload of sector `sector`.
    pub fn write_payload(&self, sector: u32, out: &mut [u8; PAYLOAD_BYTES]) {
        out.copy_from_slice(&self.bits[start(sector)..start(sector) + BYTES_PER_SECTOR]);
    }

    /// Takes the bits of sector `sector`; bits of pages that do not exist are ignored.
    pub fn load_payload(&mut self, sector: u32, payload: &[u8; PAYLOAD_BYTES]) {
        self.bits[start(sector)..start(sector) + BYTES_PER_SECTOR].copy_from_slice(payload);
        let end = u64::from(sector + 1) * SUMMARY_PER_SECTOR;
        for page in u64::from(self.pages)..end {
            let page = u32::try_from(page).unwrap_or(u32::MAX);
            if let Some(bits) = self.bits.get_mut(byte(page)) {
                *bits &= !mask(page);
            }
        }
    }
}

fn byte(page: u32) -> usize {
    usize::try_from(page / 8).unwrap_or(usize::MAX)
}

fn mask(page: u32) -> u8 {
    1 << (page % 8)
}

fn start(sector: u32) -> usize {
    usize::try_from(sector).unwrap_or(usize::MAX) * BYTES_PER_SECTOR
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_survive_their_sectors() {
        let mut summary = Summary::new(5000);
        assert_eq!(summary.sectors(), 2);
        let pages = [0, 7, 8, 3839, 3840, 4999];
        for page in pages {
            summary.set(page);
        }
        assert_eq!(summary.iter().collect::<Vec<_>>(), pages);
        assert!((0..5000).all(|page| summary.get(page) == pages.contains(&page)));
        let mut copy = Summary::new(5000);
        for sector in 0..2 {
            let mut payload = [0; PAYLOAD_BYTES];
            summary.write_payload(sector, &mut payload);
            copy.load_payload(sector, &payload);
        }
        assert_eq!(copy, summary);
        copy.load_payload(1, &[0xff; PAYLOAD_BYTES]);
        assert_eq!(
            copy.iter().max(),
            Some(4999),
            "bits beyond the map are ignored"
        );
        assert!(!copy.get(5000));
        copy.clear_all();
        assert_eq!(copy.iter().count(), 0);
    }
}
