//! A part of a simulated buffer that something other than a disk uses, with the same checks.

use super::SimBuffer;
use crate::host::Buffer as _;

/// A hold on a part of a buffer: the buffer is in use until it is dropped.
pub struct SimLend {
    buffer: SimBuffer,
    start: usize,
    len: usize,
    to_writer: bool,
}

impl SimLend {
    /// Lends that part, to be written into or to be read.
    ///
    /// # Panics
    ///
    /// When the part is not in the buffer.
    #[must_use]
    pub fn new(buffer: &SimBuffer, start: usize, len: usize, to_writer: bool) -> Self {
        assert!(start + len <= buffer.len(), "lent beyond the buffer");
        buffer.begin(to_writer);
        Self {
            buffer: buffer.clone(),
            start,
            len,
            to_writer,
        }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it is of no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Another hold on memory that is lent for reading.
    ///
    /// # Panics
    ///
    /// When it is lent to be written into.
    #[must_use]
    pub fn again(&self) -> Self {
        assert!(!self.to_writer, "memory that is written goes to one alone");
        Self::new(&self.buffer, self.start, self.len, false)
    }

    /// Reads the part.
    ///
    /// # Panics
    ///
    /// When it is lent to be written into.
    pub fn read<R>(&self, f: impl FnOnce(&[u8]) -> R) -> R {
        assert!(!self.to_writer, "memory is read that something writes");
        self.buffer
            .device_read(self.start..self.start + self.len, f)
    }

    /// Writes into the part from its byte `at` on.
    ///
    /// # Panics
    ///
    /// When it is lent for reading.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        assert!(self.to_writer, "a write into memory lent for reading");
        let first = self.start + at;
        self.buffer
            .device_fill(first..first + bytes.len(), |to| to.copy_from_slice(bytes));
    }
}

impl Drop for SimLend {
    fn drop(&mut self) {
        self.buffer.end(self.to_writer);
    }
}
