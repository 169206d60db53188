//! Structured replies as bytes: what our export server sends of them, and how a client takes
//! checksums out of them. Each reply is one chunk; byte tables are in [`crate::wire`].
//!
//! Decoding any bytes gives a value or an error (R17), and takes no more memory than
//! [`SUMS_MAX`] checksums.

use crate::wire::{
    CHUNK_BLOCK_STATUS, CHUNK_BYTES, CHUNK_DATA, CHUNK_ERROR, CHUNK_FLAG_DONE, CONTEXT_ID_SUMS,
    REPLY_BYTES, STRUCTURED_REPLY_MAGIC, SUM_BLOCK_BYTES, SUMS_MAX, be16, be32, be64,
};

/// Longest head of a reply: a chunk's header and the offset of its data.
pub const HEAD_BYTES_MAX: usize = CHUNK_BYTES + 8;
/// Bytes of a descriptor.
const DESCRIPTOR_BYTES: usize = 8;
/// Bytes of an error that says nothing for people.
const ERROR_BYTES: usize = 6;
/// Longest error that a client takes: the longest text that the protocol knows.
const ERROR_BYTES_MAX: u32 = 6 + 4096;

/// What a reply begins with, up to its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    bytes: [u8; HEAD_BYTES_MAX],
    len: usize,
}

impl Head {
    /// A simple reply.
    #[must_use]
    pub fn simple(header: [u8; REPLY_BYTES]) -> Self {
        Self::of(&header, &[])
    }

    /// A chunk that `data_bytes` of data follow, which begin at `offset` of the export.
    #[must_use]
    pub fn of_data(cookie: u64, offset: u64, data_bytes: u32) -> Self {
        let header = chunk(CHUNK_DATA, cookie, data_bytes.saturating_add(8));
        Self::of(&header, &offset.to_be_bytes())
    }

    /// A chunk that a payload of [`put_context`] follows.
    #[must_use]
    pub fn of_sums(cookie: u64, payload_bytes: u32) -> Self {
        Self::of(&chunk(CHUNK_BLOCK_STATUS, cookie, payload_bytes), &[])
    }

    /// A chunk that says an error, without a text.
    #[must_use]
    pub fn of_error(cookie: u64, error: u32) -> Self {
        let header = chunk(CHUNK_ERROR, cookie, 6);
        let mut payload = [0; ERROR_BYTES];
        payload[..4].copy_from_slice(&error.to_be_bytes());
        Self::of(&header, &payload)
    }

    fn of(header: &[u8], more: &[u8]) -> Self {
        let (mut bytes, len) = ([0; HEAD_BYTES_MAX], header.len() + more.len());
        bytes[..header.len()].copy_from_slice(header);
        bytes[header.len()..len].copy_from_slice(more);
        Self { bytes, len }
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

fn chunk(kind: u16, cookie: u64, len: u32) -> [u8; CHUNK_BYTES] {
    let mut bytes = [0; CHUNK_BYTES];
    bytes[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&CHUNK_FLAG_DONE.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// Bytes of a payload with so many checksums.
#[must_use]
pub fn sums_bytes(count: usize) -> usize {
    4 + count * DESCRIPTOR_BYTES
}

/// Puts the context's id where a payload begins.
pub fn put_context(payload: &mut [u8]) {
    payload[..4].copy_from_slice(&CONTEXT_ID_SUMS.to_be_bytes());
}

/// Puts the checksum of the block with index `at` where it belongs in a payload.
pub fn put_sum(payload: &mut [u8], at: usize, crc: u32) {
    let place = sums_bytes(at);
    let descriptor = &mut payload[place..place + DESCRIPTOR_BYTES];
    descriptor[..4].copy_from_slice(&SUM_BLOCK_BYTES.to_be_bytes());
    descriptor[4..].copy_from_slice(&crc.to_be_bytes());
}

/// What a chunk of the answer to a question for checksums brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Brings {
    /// Checksums.
    Sums,
    /// The server could not compute them.
    Error,
}

/// The header of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The request's.
    pub cookie: u64,
    /// What follows.
    pub brings: Brings,
    /// How many bytes follow.
    pub len: u32,
}

/// Takes the header of an answer apart; none when it is not one of a server of ours.
#[must_use]
pub fn decode_chunk(header: &[u8; CHUNK_BYTES]) -> Option<Chunk> {
    if be32(header, 0) != Some(STRUCTURED_REPLY_MAGIC) || be16(header, 4) != Some(CHUNK_FLAG_DONE) {
        return None;
    }
    let len = be32(header, 16)?;
    let (brings, least, most) = match be16(header, 6)? {
        CHUNK_BLOCK_STATUS => (Brings::Sums, 4 + 8, 4 + 8 * SUMS_MAX),
        CHUNK_ERROR => (Brings::Error, 6, ERROR_BYTES_MAX),
        _ => return None,
    };
    (least..=most).contains(&len).then_some(Chunk {
        cookie: be64(header, 8)?,
        brings,
        len,
    })
}

/// The checksums in a payload; none unless it has those of just so many blocks.
#[must_use]
pub fn decode_sums(payload: &[u8], count: usize) -> Option<Vec<u32>> {
    let (id, descriptors) = payload.split_at_checked(4)?;
    let fits = descriptors.len() == count.checked_mul(DESCRIPTOR_BYTES)?;
    if be32(id, 0) != Some(CONTEXT_ID_SUMS)
        || !fits
        || payload.len() > sums_bytes(SUMS_MAX as usize)
    {
        return None;
    }
    let descriptors = descriptors.chunks_exact(DESCRIPTOR_BYTES);
    descriptors
        .map(|it| be32(it, 4).filter(|_| be32(it, 0) == Some(SUM_BLOCK_BYTES)))
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn chunks_are_encoded_as_the_protocol_says() {
        let cookie = 0x2122_2324_2526_2728;
        assert_eq!(
            Head::of_data(cookie, 0x0102_0304_0506_0708, 512).bytes(),
            b"\x66\x8e\x33\xef\0\x01\0\x01\x21\x22\x23\x24\x25\x26\x27\x28\0\0\x02\x08\
              \x01\x02\x03\x04\x05\x06\x07\x08"
        );
        assert_eq!(
            Head::of_error(cookie, 5).bytes(),
            b"\x66\x8e\x33\xef\0\x01\x80\x01\x21\x22\x23\x24\x25\x26\x27\x28\0\0\0\x06\0\0\0\x05\0\0"
        );
        assert_eq!(
            Head::of_sums(cookie, 20).bytes(),
            b"\x66\x8e\x33\xef\0\x01\0\x05\x21\x22\x23\x24\x25\x26\x27\x28\0\0\0\x14"
        );
        let mut payload = [0; 20];
        put_context(&mut payload);
        put_sum(&mut payload, 0, 0x0102_0304);
        put_sum(&mut payload, 1, 0);
        assert_eq!(
            payload,
            *b"\0\0\0\x01\0\0\x10\0\x01\x02\x03\x04\0\0\x10\0\0\0\0\0"
        );
        assert_eq!(decode_sums(&payload, 2), Some(vec![0x0102_0304, 0]));
        assert_eq!(decode_sums(&payload, 1), None);
        assert_eq!(Head::simple([7; REPLY_BYTES]).bytes(), [7; REPLY_BYTES]);
    }

    #[test]
    fn what_is_not_a_whole_answer_is_none() {
        let header = |head: Head| *head.bytes().first_chunk().unwrap();
        let good = header(Head::of_sums(9, 12));
        let chunk = decode_chunk(&good).unwrap();
        assert_eq!(
            (chunk.cookie, chunk.brings, chunk.len),
            (9, Brings::Sums, 12)
        );
        let error = decode_chunk(&header(Head::of_error(9, 5))).unwrap();
        assert_eq!((error.brings, error.len), (Brings::Error, 6));
        let others = [
            header(Head::of_sums(9, 11)),
            header(Head::of_sums(9, 4 + 8 * SUMS_MAX + 8)),
            header(Head::of_data(9, 0, 512)),
        ];
        assert!(others.iter().all(|it| decode_chunk(it).is_none()));
        for at in [0, 4, 5, 6] {
            let mut bad = good;
            bad[at] ^= 2;
            assert_eq!(decode_chunk(&bad), None, "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn any_header_gives_a_value_within_limits(header: [u8; CHUNK_BYTES], kind in 0..3_u16) {
            let mut near = header;
            near[..6].copy_from_slice(b"\x66\x8e\x33\xef\0\x01");
            near[6..8].copy_from_slice(&[1, 5, CHUNK_ERROR][usize::from(kind)].to_be_bytes());
            near[16..18].fill(0);
            for header in [header, near] {
                if let Some(chunk) = decode_chunk(&header) {
                    prop_assert!(chunk.len <= 4 + 8 * SUMS_MAX);
                }
            }
        }

        #[test]
        fn any_payload_gives_just_so_many_sums_or_none(
            payload in prop::collection::vec(any::<u8>(), 0..64),
            crcs in prop::collection::vec(any::<u32>(), 1..40),
            count in any::<usize>(),
        ) {
            if let Some(sums) = decode_sums(&payload, count) {
                prop_assert_eq!(sums.len(), count);
            }
            let mut right = vec![0; sums_bytes(crcs.len())];
            put_context(&mut right);
            for (at, crc) in crcs.iter().enumerate() {
                put_sum(&mut right, at, *crc);
            }
            prop_assert_eq!(decode_sums(&right, count), (count == crcs.len()).then_some(crcs));
        }
    }
}
