//! A flag that one task waits for.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::{Poll, Waker};

/// Remembers one notification until it is waited for. For one waiter on one thread.
#[derive(Default)]
pub struct Signal {
    set: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Signal {
    /// Lets the present or the next wait end.
    pub fn notify(&self) {
        self.set.set(true);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Waits for a notification and takes it.
    pub async fn wait(&self) {
        poll_fn(|cx| {
            if self.set.take() {
                return Poll::Ready(());
            }
            self.waker.replace(Some(cx.waker().clone()));
            Poll::Pending
        })
        .await;
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::Signal;

    #[test]
    fn a_notification_is_remembered_and_taken_once() {
        let signal = Signal::default();
        let mut cx = Context::from_waker(Waker::noop());
        signal.notify();
        signal.notify();
        assert_eq!(pin!(signal.wait()).poll(&mut cx), Poll::Ready(()));
        let mut waiting = pin!(signal.wait());
        assert_eq!(waiting.as_mut().poll(&mut cx), Poll::Pending);
        signal.notify();
        assert_eq!(waiting.poll(&mut cx), Poll::Ready(()));
    }
}
