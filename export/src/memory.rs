//! Memory for one request's data, aligned for direct I/O without unsafe code.
//!
//! Direct I/O wants an aligned address, and the ring's operations take owned vectors. So a vector
//! is made a little larger, and the data begin at its first aligned byte that leaves room in
//! front for a reply's head: head and data then go out in one send.

use std::ops::Range;

use peer::structured::{HEAD_BYTES_MAX, Head};

/// Alignment of the data.
const ALIGNMENT: usize = 4096;

/// A vector with a window of aligned bytes.
#[derive(Debug)]
pub struct Memory {
    vector: Vec<u8>,
    window: Range<usize>,
}

impl Memory {
    /// `len` zeroes.
    pub fn zeroed(len: usize) -> Self {
        let vector = vec![0; HEAD_BYTES_MAX + ALIGNMENT + len];
        let skip = vector[HEAD_BYTES_MAX..].as_ptr().align_offset(ALIGNMENT);
        let start = HEAD_BYTES_MAX + skip.min(ALIGNMENT);
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
    pub fn data(&self) -> &[u8] {
        &self.vector[self.window.clone()]
    }

    /// The data.
    pub fn data_mut(&mut self) -> &mut [u8] {
        &mut self.vector[self.window.clone()]
    }

    /// Leaves only the first bytes.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.window.end = self.window.end.min(self.window.start + len);
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

    /// The vector, and where the reply lies in it: `head`, and then the data.
    pub(crate) fn with_head(mut self, head: &Head) -> (Vec<u8>, Range<usize>) {
        let start = self.window.start - head.bytes().len();
        self.vector[start..self.window.start].copy_from_slice(head.bytes());
        (self.vector, start..self.window.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_are_aligned_with_room_for_a_head() {
        for len in [1, 512, 4096, 1 << 20] {
            for head in [Head::simple([1; 16]), Head::of_data(1, 2, 3)] {
                let mut memory = Memory::zeroed(len);
                assert_eq!(memory.len(), len);
                assert_eq!(memory.data().as_ptr().align_offset(ALIGNMENT), 0);
                memory.data_mut().fill(7);
                let (vector, window) = memory.with_head(&head);
                let sent = &vector[window];
                let (first, data) = sent.split_at(head.bytes().len());
                assert_eq!(first, head.bytes());
                assert_eq!(data, vec![7; len]);
            }
        }
    }
}
