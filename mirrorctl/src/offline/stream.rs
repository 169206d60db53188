//! The written extents of a member, read in order and a little ahead of who looks at them.

use dirty_map::{BLOCK_BYTES, Block, EXTENT_BYTES, Extent, ExtentState, StateMap};
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::Scope;

use super::blocks::View;
use super::device::{BLOCK, Buffer};
use super::member::Member;
use crate::failure::Failure;

/// Bytes read at once.
const PIECE: usize = 1 << 20;
/// Pieces of a member in memory: one being compared, one waiting, one being read.
const PIECES_AHEAD: usize = 3;

/// A part of an extent that is read at once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) extent: Extent,
    pub(super) hot: bool,
    /// First byte of the device.
    pub(super) offset: u64,
    pub(super) len: usize,
    pub(super) first: bool,
    pub(super) last: bool,
}

/// Everything to read, in order.
pub(super) fn pieces(states: &StateMap, size_bytes: u64) -> impl Iterator<Item = Piece> {
    let mut next = states.next_written(Extent(0));
    let extents = std::iter::from_fn(move || {
        let extent = next?;
        next = states.next_written(Extent(extent.0 + 1));
        Some(extent)
    });
    extents.flat_map(move |extent| {
        let start = extent.start_bytes();
        let end = size_bytes.min(start + EXTENT_BYTES);
        let hot = states.get(extent) == ExtentState::Hot;
        (start..end).step_by(PIECE).map(move |offset| {
            let stop = end.min(offset + PIECE as u64);
            Piece {
                extent,
                hot,
                offset,
                len: usize::try_from(stop - offset).unwrap_or(0),
                first: offset == start,
                last: stop == end,
            }
        })
    })
}

/// One member's copy of a piece.
pub(super) struct Copy {
    buffer: Buffer,
    len: usize,
    pub(super) bad: Vec<Range<usize>>,
}

impl Copy {
    /// All bytes; those that could not be read may be anything.
    pub(super) fn all(&self) -> &[u8] {
        &self.buffer.get()[..self.len]
    }

    /// A block; `None` when it cannot be read.
    pub(super) fn block(&self, range: &Range<usize>) -> Option<&[u8]> {
        let bad = self.bad.iter().any(|bad| bad.contains(&range.start));
        (!bad).then(|| &self.buffer.get()[range.clone()])
    }
}

/// Copies as they are read.
pub(super) struct Stream {
    copies: Receiver<Result<Copy, Failure>>,
    free: Sender<Buffer>,
}

impl Stream {
    /// Begins to read a member in a thread of its own.
    pub(super) fn begin<'scope, 'env>(
        scope: &'scope Scope<'scope, 'env>,
        view: &'env View<'env>,
        member: &'env Member,
    ) -> Self {
        let (to, copies) = sync_channel(PIECES_AHEAD);
        let (free, free_to_read) = channel();
        let stream = Self { copies, free };
        for _ in 0..PIECES_AHEAD {
            stream.put(Buffer::new(PIECE));
        }
        scope.spawn(move || read_ahead(view, member, &to, &free_to_read));
        stream
    }

    /// The copy of the next piece.
    pub(super) fn next(&self) -> Result<Copy, Failure> {
        let gone = |_| Failure::failed("The thread that reads a member has ended early.");
        self.copies.recv().map_err(gone)?
    }

    /// Lends the memory of a copy to the reader again.
    pub(super) fn give_back(&self, copy: Copy) {
        self.put(copy.buffer);
    }

    fn put(&self, buffer: Buffer) {
        // At the end nobody takes it any more.
        drop(self.free.send(buffer));
    }
}

fn read_ahead(
    view: &View<'_>,
    member: &Member,
    to: &SyncSender<Result<Copy, Failure>>,
    free: &Receiver<Buffer>,
) {
    for piece in pieces(view.states, view.assembly.config.layout.size_bytes) {
        let Ok(mut buffer) = free.recv() else { return };
        let part = &mut buffer.get_mut()[..piece.len];
        let read = member.device.read(view.data_offset() + piece.offset, part);
        let copy = read.map(|bad| Copy {
            buffer,
            len: piece.len,
            bad,
        });
        if to.send(copy).is_err() {
            return;
        }
    }
}

/// The blocks of a piece with their places in it; the device's last one may be short.
pub(super) fn blocks_of(piece: &Piece) -> impl Iterator<Item = (Block, Range<usize>)> + use<> {
    let len = piece.len;
    let first = piece.offset / BLOCK_BYTES;
    (first..)
        .zip((0..len).step_by(BLOCK))
        .map(move |(block, start)| (Block(block), start..len.min(start + BLOCK)))
}
