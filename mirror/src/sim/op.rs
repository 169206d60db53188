//! A running operation on a simulated disk, on this machine or behind a network.

use super::SimBuffer;
use crate::host::{DiskRequest, Errno, Geometry};
use std::cell::RefCell;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// A way to a disk that is behind a network.
pub trait Remote {
    /// As [`crate::host::Disk::submit`], or as [`crate::host::Disk::submit_barrier`].
    fn submit(&self, request: DiskRequest<SimBuffer>, barrier: bool) -> RemoteOp;
    /// As [`crate::host::Disk::in_flight`].
    fn in_flight(&self) -> usize;
    /// As [`crate::host::Disk::geometry`].
    fn geometry(&self) -> Geometry;
}

/// A running operation on a disk that is behind a network.
pub type RemoteOp = Pin<Box<dyn Future<Output = Result<(), Errno>>>>;

#[derive(Default)]
pub(super) struct Answer {
    pub(super) result: Option<Result<(), Errno>>,
    pub(super) waker: Option<Waker>,
}

/// A running operation.
pub struct SimOp(pub(super) Running);

pub(super) enum Running {
    Local(Rc<RefCell<Answer>>),
    Remote(RemoteOp),
}

impl Future for SimOp {
    type Output = Result<(), Errno>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = match &mut self.0 {
            Running::Local(answer) => answer,
            Running::Remote(op) => return op.as_mut().poll(context),
        };
        let mut answer = answer.borrow_mut();
        match answer.result {
            Some(result) => Poll::Ready(result),
            None => {
                answer.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// A change that is on its way to a disk behind a network, until this is dropped.
pub struct OnItsWay {
    ranges: Ranges,
    own: Range<u64>,
}

/// Parts of a disk, in bytes.
pub(super) type Ranges = Rc<RefCell<Vec<Range<u64>>>>;

impl OnItsWay {
    pub(super) fn new(ranges: &Ranges, own: Range<u64>) -> Self {
        ranges.borrow_mut().push(own.clone());
        Self {
            ranges: Rc::clone(ranges),
            own,
        }
    }
}

impl Drop for OnItsWay {
    fn drop(&mut self) {
        let mut ranges = self.ranges.borrow_mut();
        if let Some(at) = ranges.iter().position(|range| *range == self.own) {
            ranges.swap_remove(at);
        }
    }
}
