//! A link as the engine's operations see it.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use mirror::host::{DiskRequest, Errno, Geometry, Span};

use super::{Link, Net};
use crate::session::{Ask, Kind, Rank};

impl<N: Net> Link<N> {
    /// Begins an operation. Without FUA, a FUA write is a write and then a flush (R7).
    pub fn submit(self: &Rc<Self>, request: DiskRequest<N::Buffer>) -> LinkOp<N> {
        self.submit_as(request, false)
    }

    /// The same, and no later change begins at the server before it is durable, where the server keeps
    /// the order.
    pub fn submit_barrier(self: &Rc<Self>, request: DiskRequest<N::Buffer>) -> LinkOp<N> {
        self.submit_as(request, self.geometry().keeps_order)
    }

    /// Asks the server; `barrier` only where it keeps order.
    fn submit_as(self: &Rc<Self>, request: DiskRequest<N::Buffer>, barrier: bool) -> LinkOp<N> {
        let export = &self.export;
        let (kind, offset, len, fua, span) = match request {
            DiskRequest::Read { offset, span } => {
                (Kind::Read, offset, span.len as u64, false, Some(span))
            }
            DiskRequest::Write { offset, span, fua } => {
                (Kind::Write, offset, span.len as u64, fua, Some(span))
            }
            DiskRequest::Flush => (Kind::Flush, 0, 0, false, None),
            DiskRequest::WriteZeroes { offset, len } if export.has_write_zeroes() => {
                (Kind::WriteZeroes, offset, len, false, None)
            }
            DiskRequest::Discard { offset, len } if export.has_trim() => {
                (Kind::Trim, offset, len, false, None)
            }
            DiskRequest::WriteZeroes { .. } | DiskRequest::Discard { .. } => {
                return LinkOp::Over(Err(Errno::NOT_SUPPORTED));
            }
        };
        if len == 0 && kind != Kind::Flush {
            return LinkOp::Over(Ok(()));
        }
        let flush = (kind == Kind::Flush).then_some((Ask::FLUSH, None, None));
        let pieces = export.pieces(offset, len).map(|piece| {
            let ask = Ask {
                kind,
                fua: fua && export.has_fua(),
                rank: Rank::Any,
                offset: piece.offset,
                len: piece.len,
            };
            let (into, data) = lends::<N>(kind, span.as_ref(), piece.offset - offset, piece.len);
            (ask, into, data)
        });
        let then_flush = fua && !export.has_fua();
        match self.begin_op(then_flush, barrier, flush.into_iter().chain(pieces)) {
            Ok(op) => LinkOp::Running {
                link: Some(Rc::clone(self)),
                op,
            },
            Err(errno) => LinkOp::Over(Err(errno)),
        }
    }

    /// What there is to know of the disk.
    pub fn geometry(&self) -> Geometry {
        let export = &self.export;
        Geometry {
            size_bytes: export.usable_bytes(),
            logical_block_bytes: export.logical_block_bytes(),
            cheap_zeroes: export.has_write_zeroes(),
            discard: export.has_trim(),
            behind_network: true,
            server_instance: self.fence.map(|it| it.instance),
            // A write is a barrier by itself, or not at all.
            keeps_order: self.fence.is_some_and(|it| it.keeps_order) && export.has_fua(),
        }
    }
}

/// Lends the part of a span that a piece covers: to be written by a read, to be read by a write.
fn lends<N: Net>(
    kind: Kind,
    span: Option<&Span<N::Buffer>>,
    skip: u64,
    len: u32,
) -> (Option<N::Lend>, Option<N::Lend>) {
    let Some(span) = span else {
        return (None, None);
    };
    let start = span.start + usize::try_from(skip).unwrap_or(usize::MAX);
    if kind == Kind::Read {
        let lend = N::lend_to_writer(&span.buffer, start, len as usize);
        (Some(lend), None)
    } else {
        let lend = N::lend_to_reader(&span.buffer, start, len as usize);
        (None, Some(lend))
    }
}

/// A running operation on a link. Dropping it leaves an orphan.
pub enum LinkOp<N: Net> {
    /// The server has it, or will.
    Running {
        /// Taken when the result has been delivered.
        link: Option<Rc<Link<N>>>,
        /// Its place.
        op: u32,
    },
    /// It never went to the server.
    Over(Result<(), Errno>),
}

impl<N: Net> Future for LinkOp<N> {
    type Output = Result<(), Errno>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let (taken, op) = match &mut *self {
            Self::Running { link, op } => (link, *op),
            Self::Over(result) => return Poll::Ready(*result),
        };
        let Some(link) = taken.as_ref() else {
            panic!("an operation is polled after its end")
        };
        let result = link.poll(op, cx);
        if result.is_ready() {
            *taken = None;
        }
        result
    }
}

impl<N: Net> Drop for LinkOp<N> {
    fn drop(&mut self) {
        let Self::Running { link, op } = self else {
            return;
        };
        if let Some(link) = link.take() {
            link.abandon(*op);
        }
    }
}
