//! Waiting for a while, or for news.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::{Poll, Waker};

/// Something has changed that those who wait should look at.
#[derive(Debug, Default)]
pub(crate) struct News {
    edition: Cell<u64>,
    waiting: RefCell<Vec<Waker>>,
}

impl News {
    /// Wakes all who wait.
    pub(crate) fn tell(&self) {
        self.edition.set(self.edition.get().wrapping_add(1));
        for waker in self.waiting.take() {
            waker.wake();
        }
    }

    /// Waits for `sleep`, or for news that come meanwhile.
    pub(crate) async fn within(&self, sleep: impl Future<Output = ()>) {
        let known = self.edition.get();
        let mut sleep = pin!(sleep);
        poll_fn(|context| {
            if self.edition.get() != known || sleep.as_mut().poll(context).is_ready() {
                return Poll::Ready(());
            }
            let mut waiting = self.waiting.borrow_mut();
            if !waiting.iter().any(|waker| waker.will_wake(context.waker())) {
                waiting.push(context.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }
}
