//! Memory for one request's data, aligned for direct I/O without unsafe code.
//!
//! Direct I/O wants an aligned address, and the ring's operations take owned vectors. So a vector
//! is made a little larger, and the data begin at its first aligned byte that leaves room in
//! front for a reply's header: header and data then go out in one send.

use std::ops::Range;

use peer::wire::REPLY_BYTES;

/// Alignment of the data.
const ALIGNMENT: usize = 4096;

/// A vector with a window of aligned bytes.
#[derive(Debug)]
pub(crate) struct Memory {
    vector: Vec<u8>,
    window: Range<usize>,
}

impl Memory {
    /// `len` zeroes.
    pub(crate) fn zeroed(len: usize) -> Self {
        let vector = vec![0; REPLY_BYTES + ALIGNMENT + len];
        let skip = vector[REPLY_BYTES..].as_ptr().align_offset(ALIGNMENT);
        let start = REPLY_BYTES + skip.min(ALIGNMENT);
        Self {
            vector,
            window: start..start + len,
        }
    }

    /// How many bytes of data.
    pub(crate) fn len(&self) -> usize {
        self.window.len()
    }

    /// The data.
    pub(crate) fn data(&self) -> &[u8] {
        &self.vector[self.window.clone()]
    }

    /// The data.
    pub(crate) fn data_mut(&mut self) -> &mut [u8] {
        &mut self.vector[self.window.clone()]
    }

    /// Puts a reply's header in front of the data.
    pub(crate) fn set_header(&mut self, header: [u8; REPLY_BYTES]) {
        let start = self.window.start;
        self.vector[start - REPLY_BYTES..start].copy_from_slice(&header);
    }

    /// The vector, and where the data from byte `from` of them on lie in it.
    pub(crate) fn take_apart(self, from: usize) -> (Vec<u8>, Range<usize>, Range<usize>) {
        let part = self.window.start + from..self.window.end;
        (self.vector, part, self.window)
    }

    /// What [`Memory::take_apart`] took apart.
    pub(crate) fn put_together(vector: Vec<u8>, window: Range<usize>) -> Self {
        Self { vector, window }
    }

    /// The vector, and where the header and the data lie in it.
    pub(crate) fn with_header(self) -> (Vec<u8>, Range<usize>) {
        (
            self.vector,
            self.window.start - REPLY_BYTES..self.window.end,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_are_aligned_with_room_for_a_header() {
        for len in [1, 512, 4096, 1 << 20] {
            let mut memory = Memory::zeroed(len);
            assert_eq!(memory.len(), len);
            assert_eq!(memory.data().as_ptr().align_offset(ALIGNMENT), 0);
            memory.data_mut().fill(7);
            memory.set_header([1; REPLY_BYTES]);
            assert!(memory.data().iter().all(|byte| *byte == 7));
            let (vector, window) = memory.with_header();
            let sent = &vector[window];
            assert_eq!(sent.len(), REPLY_BYTES + len);
            assert_eq!(
                sent[..REPLY_BYTES + 1],
                [&[1; REPLY_BYTES][..], &[7]].concat()
            );
        }
    }
}
