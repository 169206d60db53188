//! Checksums of blocks and the page that holds those of an extent; the byte table stands in the
//! crate's documentation.

use crate::units::{BLOCK_BYTES, BLOCKS_PER_EXTENT, Block, Extent};
use std::num::NonZeroU32;
use std::sync::LazyLock;

/// Bytes of the page that holds an extent's checksums.
pub const SUM_PAGE_BYTES: usize = SUMS * size_of::<u32>();
const SUMS: usize = 1024;
const _: () = assert!(SUMS as u64 == BLOCKS_PER_EXTENT);

/// Checksum of a block: of its content and of its number, so that a block that was written to
/// the wrong place is noticed there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sum(NonZeroU32);

impl Sum {
    fn new(crc: u32) -> Self {
        // Zero stands for a checksum that is not known.
        Self(NonZeroU32::new(crc).unwrap_or(NonZeroU32::MAX))
    }

    /// The checksum of `block` with `content`: a whole block, or what there is of the device's
    /// last one.
    #[must_use]
    pub fn of(block: Block, content: &[u8]) -> Self {
        Self::of_parts(block, [content])
    }

    /// [`Sum::of`] a block whose content lies in parts.
    #[must_use]
    pub fn of_parts<'a>(block: Block, parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut hasher = crc32fast::Hasher::new_with_initial(of_number(block));
        for part in parts {
            hasher.update(part);
        }
        Self::new(hasher.finalize())
    }

    /// The checksum of a whole block of which only the CRC32 of its content is known: whoever has
    /// computed that need not know which block it is.
    #[must_use]
    pub fn of_crc(block: Block, crc: u32) -> Self {
        let number = of_number(block);
        let effects = (0..).zip(&AFTER_A_BLOCK.0);
        let effects = effects.filter(|(at, _)| number >> at & 1 != 0);
        Self::new(effects.fold(crc, |crc, (_, effect)| crc ^ effect))
    }

    /// The checksum of a whole block of zeroes, without looking at 4 KiB of them.
    #[must_use]
    pub fn of_zeroes(block: Block) -> Self {
        Self::of_crc(block, AFTER_A_BLOCK.1)
    }
}

/// What each bit of the number's CRC becomes at the end of the block, whatever is in it, and what
/// none becomes at the end of a block of zeroes.
static AFTER_A_BLOCK: LazyLock<([u32; 32], u32)> = LazyLock::new(|| {
    let zeroes = vec![0; usize::try_from(BLOCK_BYTES).unwrap_or(0)];
    let after = |crc: u32| {
        let mut hasher = crc32fast::Hasher::new_with_initial(crc);
        hasher.update(&zeroes);
        hasher.finalize()
    };
    let none = after(0);
    let mut bit = 1_u32;
    let bits = std::array::from_fn(|_| {
        let effect = after(bit) ^ none;
        bit = bit.rotate_left(1);
        effect
    });
    (bits, none)
});

/// CRC32 of a block's number, which the content's goes on from.
fn of_number(block: Block) -> u32 {
    crc32fast::hash(&block.0.to_le_bytes())
}

/// The checksums of an extent's blocks, as far as they are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SumPage(Box<[u32; SUMS]>);

impl SumPage {
    /// Nothing is known.
    #[must_use]
    pub fn unknown() -> Self {
        Self(Box::new([0; SUMS]))
    }

    /// Every block of `extent` is zero; what lies beyond the device's last whole block (it has
    /// `size_bytes`) is not known.
    #[must_use]
    pub fn zeroes(extent: Extent, size_bytes: u64) -> Self {
        let mut page = Self::unknown();
        let blocks = extent.blocks();
        for block in blocks.start..blocks.end.min(size_bytes / BLOCK_BYTES) {
            page.set(Block(block), Some(Sum::of_zeroes(Block(block))));
        }
        page
    }

    /// Decodes a page; every page decodes to something.
    #[must_use]
    pub fn decode(bytes: &[u8; SUM_PAGE_BYTES]) -> Self {
        let mut page = Self::unknown();
        let (words, _) = bytes.as_chunks();
        for (sum, word) in page.0.iter_mut().zip(words) {
            *sum = u32::from_le_bytes(*word);
        }
        page
    }

    /// The page's bytes.
    pub fn encode(&self, out: &mut [u8; SUM_PAGE_BYTES]) {
        let (words, _) = out.as_chunks_mut();
        for (word, sum) in words.iter_mut().zip(&*self.0) {
            *word = sum.to_le_bytes();
        }
    }

    /// What is known of `block`, a block of the page's extent.
    #[must_use]
    pub fn get(&self, block: Block) -> Option<Sum> {
        NonZeroU32::new(self.0[place(block)]).map(Sum)
    }

    /// Records what is known of `block`, a block of the page's extent.
    pub fn set(&mut self, block: Block, sum: Option<Sum>) {
        self.0[place(block)] = sum.map_or(0, |sum| sum.0.get());
    }
}

/// A block's place in its extent.
fn place(block: Block) -> usize {
    usize::try_from(block.0 % BLOCKS_PER_EXTENT).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    const ZEROES: [u8; 4096] = [0; 4096];

    #[test]
    fn golden() {
        let mut bytes = 7_u64.to_le_bytes().to_vec();
        bytes.extend(ZEROES);
        let expected = crc32fast::hash(&bytes);
        assert_eq!(Sum::of(Block(7), &ZEROES).0.get(), expected);
        assert_eq!(expected, 0x477e_4990);
    }

    #[test]
    fn a_crc_of_zero_is_no_unknown_checksum() {
        assert_eq!(Sum::new(0), Sum::new(u32::MAX));
        assert_ne!(Sum::new(0), Sum::new(1));
    }

    #[test]
    fn a_page_keeps_each_sum_in_its_place() {
        let mut page = SumPage::unknown();
        let (first, last) = (Block(3 * 1024), Block(3 * 1024 + 1023));
        page.set(first, Some(Sum::new(0x0403_0201)));
        page.set(last, Some(Sum::new(5)));
        let mut bytes = [9; SUM_PAGE_BYTES];
        page.encode(&mut bytes);
        assert_eq!(bytes[..8], [1, 2, 3, 4, 0, 0, 0, 0]);
        assert_eq!(bytes[4088..], [0, 0, 0, 0, 5, 0, 0, 0]);
        let again = SumPage::decode(&bytes);
        assert_eq!(again, page);
        assert_eq!(again.get(first), Some(Sum::new(0x0403_0201)));
        assert_eq!(again.get(Block(3 * 1024 + 1)), None);
        page.set(first, None);
        assert_eq!(page.get(first), None);
    }

    #[test]
    fn a_page_of_zeroes_ends_with_the_last_whole_block() {
        let page = SumPage::zeroes(Extent(2), (2 << 22) + 3 * 4096 + 512);
        for block in 2048..2051 {
            let sum = Sum::of(Block(block), &ZEROES);
            assert_eq!(page.get(Block(block)), Some(sum));
        }
        assert_eq!(page.get(Block(2051)), None);
        assert_eq!(page.get(Block(3071)), None);
    }

    proptest! {
        #[test]
        fn zeroes_need_not_be_looked_at(number in any::<u64>()) {
            let block = Block(number);
            prop_assert_eq!(Sum::of_zeroes(block), Sum::of(block, &ZEROES));
        }

        #[test]
        fn a_crc_of_the_content_is_enough(
            number in any::<u64>(),
            content in proptest::collection::vec(any::<u8>(), 4096),
        ) {
            let block = Block(number);
            let sum = Sum::of_crc(block, crc32fast::hash(&content));
            prop_assert_eq!(sum, Sum::of(block, &content));
        }

        #[test]
        fn parts_are_the_whole(
            number in any::<u64>(),
            content in proptest::collection::vec(any::<u8>(), 4096),
            cut in 0_usize..4096,
        ) {
            let block = Block(number);
            let (head, tail) = content.split_at(cut);
            prop_assert_eq!(Sum::of_parts(block, [head, tail]), Sum::of(block, &content));
        }

        #[test]
        fn another_place_or_a_flipped_bit_is_noticed(
            number in 0..1_u64 << 38,
            other in 0..1_u64 << 38,
            bit in 0_usize..4096 * 8,
        ) {
            let mut content = vec![0x5a; 4096];
            let sum = Sum::of(Block(number), &content);
            prop_assert!(number == other || Sum::of(Block(other), &content) != sum || number >> 32 != other >> 32);
            content[bit / 8] ^= 1 << (bit % 8);
            prop_assert_ne!(Sum::of(Block(number), &content), sum);
        }
    }
}
