//! Many parts, some copied and some in place, for one send.
//!
//! A batch owns what it lends: its parts stay where they are until it is dropped, which the
//! operation that sends it does only after its completion.

use std::ffi::c_void;
use std::ops::Range;

use mirror::host::Span;

use crate::sys::{IoBuffer, Lend};

/// Bytes that are sent with one system call.
#[derive(Default)]
pub(crate) struct Batch {
    /// Fixed-size parts, one after the other.
    inline: Vec<u8>,
    /// In the order of sending.
    parts: Vec<Part>,
    bytes: usize,
}

enum Part {
    Inline { start: usize, len: usize },
    Memory(Lend),
}

/// Most parts of one system call (UIO_MAXIOV).
const MAX_PARTS: usize = 1024;

impl Batch {
    /// Whether one more header with a payload fits into one system call.
    pub(crate) fn has_room(&self) -> bool {
        self.parts.len() + 2 <= MAX_PARTS
    }

    /// Bytes to send.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Appends bytes that are copied.
    pub(crate) fn push_bytes(&mut self, bytes: &[u8]) {
        let start = self.inline.len();
        self.inline.extend_from_slice(bytes);
        self.bytes += bytes.len();
        if let Some(Part::Inline { start: first, len }) = self.parts.last_mut()
            && *first + *len == start
        {
            *len += bytes.len();
            return;
        }
        self.parts.push(Part::Inline {
            start,
            len: bytes.len(),
        });
    }

    /// Appends a part of a buffer without copying it.
    pub(crate) fn push_span(&mut self, span: &Span<IoBuffer>) {
        self.push_lend(span.buffer.lend_to_reader(span.start, span.len));
    }

    /// Appends memory that has been lent already.
    pub(crate) fn push_lend(&mut self, lend: Lend) {
        self.bytes += lend.len();
        self.parts.push(Part::Memory(lend));
    }

    /// Takes bytes over, without copying them where there are no others.
    pub(crate) fn take(&mut self, bytes: Vec<u8>) {
        if !self.inline.is_empty() {
            return self.push_bytes(&bytes);
        }
        let len = bytes.len();
        self.bytes += len;
        self.inline = bytes;
        self.parts.push(Part::Inline { start: 0, len });
    }

    /// Gives the bytes in `range` to `f`, part by part.
    pub(crate) fn read(&self, range: Range<usize>, mut f: impl FnMut(&[u8])) {
        let mut at = 0;
        for part in &self.parts {
            let len = match part {
                Part::Inline { len, .. } => *len,
                Part::Memory(lend) => lend.len(),
            };
            let from = range.start.max(at).min(at + len) - at;
            let to = range.end.max(at).min(at + len) - at;
            at += len;
            if from == to {
                continue;
            }
            match part {
                Part::Inline { start, .. } => f(&self.inline[start + from..start + to]),
                Part::Memory(lend) => lend.read(|bytes| f(&bytes[from..to])),
            }
        }
    }

    /// The parts from byte `skip` on, as the kernel takes them.
    pub(crate) fn vectors(&self, mut skip: usize) -> Vec<libc::iovec> {
        let mut vectors = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            let (base, len) = match part {
                Part::Inline { start, len } => (self.inline[*start..].as_ptr(), *len),
                Part::Memory(lend) => (lend.address().cast_const(), lend.len()),
            };
            if skip >= len {
                skip -= len;
                continue;
            }
            let base = base.wrapping_add(skip).cast_mut().cast::<c_void>();
            vectors.push(libc::iovec {
                iov_base: base,
                iov_len: len - skip,
            });
            skip = 0;
        }
        vectors
    }
}

#[cfg(test)]
mod tests {
    use mirror::host::{Buffer as _, Span};

    use super::{Batch, IoBuffer};

    #[test]
    fn parts_keep_their_order_and_headers_in_a_row_are_one_part() {
        let payload = IoBuffer::zeroed(4096);
        let mut batch = Batch::default();
        batch.push_bytes(b"abcd");
        batch.push_bytes(b"efgh");
        batch.push_span(&Span::whole(payload.clone()).slice(8, 100));
        batch.push_bytes(b"tail");
        assert_eq!(batch.bytes(), 112);
        let lengths = |skip| -> Vec<usize> {
            batch
                .vectors(skip)
                .iter()
                .map(|vector| vector.iov_len)
                .collect()
        };
        assert_eq!(lengths(0), [8, 100, 4]);
        assert_eq!(lengths(8), [100, 4]);
        assert_eq!(lengths(50), [58, 4]);
        assert_eq!(lengths(111), [1]);
        assert!(payload.in_use());
        drop(batch);
        assert!(!payload.in_use());
    }

    #[test]
    fn any_range_of_it_is_read() {
        let payload = IoBuffer::zeroed(64);
        payload.fill(|bytes| {
            (0..=255)
                .cycle()
                .zip(bytes)
                .for_each(|(at, byte)| *byte = at)
        });
        let mut batch = Batch::default();
        batch.take(vec![200, 201]);
        batch.push_bytes(&[202]);
        batch.push_span(&Span::whole(payload.clone()).slice(8, 4));
        batch.push_bytes(&[203, 204]);
        let all = [200, 201, 202, 8, 9, 10, 11, 203, 204];
        assert_eq!(batch.bytes(), all.len());
        for start in 0..=all.len() {
            for end in start..=all.len() {
                let mut read = Vec::new();
                batch.read(start..end, |bytes| read.extend_from_slice(bytes));
                assert_eq!(read, all[start..end]);
            }
        }
    }

    #[test]
    fn a_batch_is_full_before_the_system_call_is() {
        let payload = IoBuffer::zeroed(4096);
        let mut batch = Batch::default();
        while batch.has_room() {
            batch.push_bytes(b"header");
            batch.push_span(&Span::whole(payload.clone()));
        }
        assert_eq!(batch.vectors(0).len(), 1024);
    }
}
