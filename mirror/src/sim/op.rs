//! A running operation on a simulated disk, on this machine or behind a network, and its result.

use super::{SimBuffer, SimDisk};
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

/// What came of it, and who waits for that.
#[derive(Default)]
pub(super) struct Answer {
    pub(super) result: Option<Result<(), Errno>>,
    pub(super) waker: Option<Waker>,
    /// It was given up before there was a result.
    pub(super) abandoned: bool,
}

/// A running operation.
pub struct SimOp(Running);

enum Running {
    Local {
        answer: Rc<RefCell<Answer>>,
        /// Of a barrier, until its result has been taken: its disk and number.
        barrier: Option<(SimDisk, u64)>,
    },
    Remote(RemoteOp),
}

impl SimOp {
    pub(super) fn local(answer: Rc<RefCell<Answer>>, barrier: Option<(SimDisk, u64)>) -> Self {
        Self(Running::Local { answer, barrier })
    }

    pub(super) fn remote(op: RemoteOp) -> Self {
        Self(Running::Remote(op))
    }
}

fn taken(barrier: &mut Option<(SimDisk, u64)>, result: Result<(), Errno>) {
    if let Some((disk, number)) = barrier.take() {
        disk.barrier_taken(number, result.is_ok());
    }
}

impl Future for SimOp {
    type Output = Result<(), Errno>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let (answer, barrier) = match &mut self.0 {
            Running::Local { answer, barrier } => (answer, barrier),
            Running::Remote(op) => return op.as_mut().poll(context),
        };
        let result = answer.borrow().result;
        if let Some(result) = result {
            taken(barrier, result);
            return Poll::Ready(result);
        }
        answer.borrow_mut().waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Drop for SimOp {
    fn drop(&mut self) {
        let Running::Local { answer, barrier } = &mut self.0 else {
            return;
        };
        let result = answer.borrow().result;
        match result {
            Some(result) => taken(barrier, result),
            None => answer.borrow_mut().abandoned = true,
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
