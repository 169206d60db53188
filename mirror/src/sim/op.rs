//! A running operation of a simulated disk, and its result.

use super::SimDisk;
use crate::host::Errno;
use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// What came of it, and who waits for that.
#[derive(Default)]
pub(super) struct Answer {
    pub(super) result: Option<Result<(), Errno>>,
    pub(super) waker: Option<Waker>,
    /// It was given up before there was a result.
    pub(super) abandoned: bool,
}

/// A running operation.
pub struct SimOp {
    answer: Rc<RefCell<Answer>>,
    /// Of a barrier, until its result has been taken: its disk and number.
    barrier: Option<(SimDisk, u64)>,
}

impl SimOp {
    pub(super) fn new(answer: Rc<RefCell<Answer>>, barrier: Option<(SimDisk, u64)>) -> Self {
        Self { answer, barrier }
    }

    fn taken(&mut self, result: Result<(), Errno>) {
        if let Some((disk, number)) = self.barrier.take() {
            disk.barrier_taken(number, result.is_ok());
        }
    }
}

impl Future for SimOp {
    type Output = Result<(), Errno>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let result = self.answer.borrow().result;
        if let Some(result) = result {
            self.taken(result);
            return Poll::Ready(result);
        }
        self.answer.borrow_mut().waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Drop for SimOp {
    fn drop(&mut self) {
        let result = self.answer.borrow().result;
        match result {
            Some(result) => self.taken(result),
            None => self.answer.borrow_mut().abandoned = true,
        }
    }
}
