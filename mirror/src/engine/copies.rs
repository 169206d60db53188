//! What the in-sync members hold of a range, side by side.

use super::{FanOut, Mirror, Receiver, front, length};
use crate::host::{Buffer, Disk, DiskRequest, Errno, Host, Span};
use crate::layout::SLOTS_MAX;
use dirty_map::{BLOCK_BYTES, Block, blocks_covering};
use std::future::Future as _;
use std::ops::Range;
use std::task::Poll;

/// The copies of a range of whole blocks.
pub(super) struct Copies<D: Disk> {
    /// The range, in bytes of the device.
    pub(super) range: Range<u64>,
    /// The in-sync members.
    pub(super) members: Vec<Receiver<D>>,
    /// Of each its copy; none when it has stalled.
    spans: Vec<Option<Span<D::Buffer>>>,
    /// Of each which blocks could be read.
    readable: Vec<Vec<bool>>,
    /// Why one could not.
    pub(super) error: Option<Errno>,
}

/// Calls `f` with the bytes of all spans at once, none for those that are not there.
fn lend<B: Buffer, R>(
    spans: &[Option<Span<B>>],
    held: &[&[u8]],
    f: &mut dyn FnMut(&[&[u8]]) -> R,
) -> R {
    let Some((first, rest)) = spans.split_first() else {
        return f(held);
    };
    let mut more = |bytes: &[u8]| {
        let held: Vec<&[u8]> = held.iter().copied().chain([bytes]).collect();
        lend(rest, &held, f)
    };
    match first {
        Some(span) => span.read(more),
        None => more(&[]),
    }
}

impl<D: Disk> Copies<D> {
    /// The blocks.
    pub(super) fn blocks(&self) -> impl Iterator<Item = Block> + use<D> {
        blocks_covering(self.range.start, self.range.end - self.range.start).map(Block)
    }

    /// Bytes that were read from members.
    pub(super) fn bytes_read(&self) -> u64 {
        let whole = self.range.end - self.range.start;
        self.spans.iter().flatten().count() as u64 * whole
    }

    /// Calls `visit` for each block with what each member holds of it; nothing where it cannot
    /// be read.
    pub(super) fn for_each_block(&self, mut visit: impl FnMut(Block, &[Option<&[u8]>])) {
        lend(&self.spans, &[], &mut |held| {
            for (at, block) in self.blocks().enumerate() {
                let place = self.place(at);
                let members = held.iter().zip(&self.readable);
                let mut copies = [None; SLOTS_MAX];
                for (copy, (bytes, readable)) in copies.iter_mut().zip(members) {
                    *copy = readable[at].then(|| &bytes[place.clone()]);
                }
                visit(block, &copies[..held.len()]);
            }
        });
    }

    /// Where the block with index `at` lies in each copy.
    fn place(&self, at: usize) -> Range<usize> {
        let whole = length(self.range.end - self.range.start);
        let start = at * length(BLOCK_BYTES);
        start..(start + length(BLOCK_BYTES)).min(whole)
    }

    /// Whether no member could read anything.
    pub(super) fn nothing_readable(&self) -> bool {
        let mut all = self.readable.iter().flatten();
        !all.any(|&readable| readable)
    }

    /// Whether a member's copy of the block with index `at` could be read.
    pub(super) fn readable_at(&self, member: usize, at: usize) -> bool {
        self.readable[member][at]
    }

    /// A member's copy of some of the blocks, counted from the first.
    pub(super) fn span(&self, member: usize, at: &Range<usize>) -> Option<Span<D::Buffer>> {
        let (first, last) = (self.place(at.start), self.place(at.end - 1));
        let span = self.spans[member].as_ref()?;
        Some(span.slice(first.start, last.end - first.start))
    }
}

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// Reads `range`, whole blocks, from every in-sync member; what cannot be read as a whole is
    /// read block by block.
    pub(super) async fn read_copies(&self, range: &Range<u64>) -> Copies<D> {
        let view = self.view();
        let members = view.receivers.iter().filter(|r| r.in_sync).cloned();
        let mut copies = self.unread(members.collect(), range);
        let mut fan_out = FanOut::new(&self.stalls);
        for member in 0..copies.members.len() {
            let receiver = &copies.members[member];
            let read = self.reading(&copies, member);
            fan_out.push(receiver.slot, true, receiver.disk.submit(read));
        }
        let outcomes = fan_out.await;
        self.lose_stalled(&outcomes, "a read");
        let mut results = [Ok(()); SLOTS_MAX];
        for outcome in outcomes.iter() {
            results[usize::from(outcome.slot)] = outcome.result;
        }
        for member in 0..copies.members.len() {
            let slot = copies.members[member].slot;
            if let Err(errno) = results[usize::from(slot)] {
                copies.error = Some(errno);
                self.read_singly(&mut copies, member, errno).await;
            }
        }
        copies
    }

    /// The same from some of them only, if each can be read as a whole. One that does not answer is
    /// lost when others do, and not before: they may share what keeps it (R8).
    pub(super) async fn read_some_copies(
        &self,
        members: Vec<Receiver<D>>,
        range: &Range<u64>,
    ) -> Option<Copies<D>> {
        let copies = self.unread(members, range);
        let read = |member| self.read_from(&copies.members[member], self.reading(&copies, member));
        let mut reads: Vec<_> = (0..copies.members.len())
            .map(|member| (member, Box::pin(read(member))))
            .collect();
        let mut all_ok = true;
        std::future::poll_fn(|cx| {
            reads.retain_mut(|(member, read)| {
                let Poll::Ready(result) = read.as_mut().poll(cx) else {
                    return true;
                };
                if result == Err(Errno::TIMED_OUT) {
                    let slot = copies.members[*member].slot;
                    self.begin_loss(slot, "a read got no answer within the deadline");
                }
                all_ok &= result.is_ok();
                false
            });
            if reads.is_empty() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
        drop(reads);
        all_ok.then_some(copies)
    }

    /// Copies with memory for all of `range`, to be read.
    fn unread(&self, members: Vec<Receiver<D>>, range: &Range<u64>) -> Copies<D> {
        let len = length(range.end - range.start);
        let blocks = blocks_covering(range.start, range.end - range.start);
        Copies {
            range: range.clone(),
            spans: members
                .iter()
                .map(|_| Some(self.span_to_read(len)))
                .collect(),
            readable: vec![vec![true; length(blocks.end - blocks.start)]; members.len()],
            members,
            error: None,
        }
    }

    fn reading(&self, copies: &Copies<D>, member: usize) -> DiskRequest<H::Buffer> {
        let Some(span) = &copies.spans[member] else {
            unreachable!("memory for what is to be read")
        };
        DiskRequest::Read {
            offset: self.data_offset + copies.range.start,
            span: span.clone(),
        }
    }

    /// Reads a member's copy block by block.
    async fn read_singly(&self, copies: &mut Copies<D>, member: usize, errno: Errno) {
        let receiver = copies.members[member].clone();
        let mut answers = errno != Errno::TIMED_OUT;
        for at in 0..copies.readable[member].len() {
            let span = copies.span(member, &(at..at + 1)).filter(|_| answers);
            let Some(span) = span else {
                copies.readable[member][at] = false;
                continue;
            };
            let read = DiskRequest::Read {
                offset: self.data_offset + copies.range.start + at as u64 * BLOCK_BYTES,
                span,
            };
            let result = self.to_one(&receiver, read).await;
            copies.readable[member][at] = result.is_ok();
            if result == Err(Errno::TIMED_OUT) {
                self.begin_loss(receiver.slot, "a read got no answer within the deadline");
                answers = false;
            }
        }
        if !answers {
            // It may still write there (R6).
            copies.spans[member] = None;
            copies.readable[member].fill(false);
        } else if copies.readable[member].iter().any(|&readable| !readable) {
            let mut slots = self.slots.borrow_mut();
            slots[usize::from(receiver.slot)].read_errors += 1;
        }
    }

    /// A buffer of `len` bytes of our own.
    pub(super) fn fresh_span(&self, len: usize) -> Span<H::Buffer> {
        let whole = len.next_multiple_of(length(BLOCK_BYTES));
        front(&self.host.allocate(whole), len)
    }

    /// The same with whatever in it.
    fn span_to_read(&self, len: usize) -> Span<H::Buffer> {
        let whole = len.next_multiple_of(length(BLOCK_BYTES));
        front(&self.host.allocate_unzeroed(whole), len)
    }
}
