//! Time and tasks of a server: tokio's in the process that exports a disk, the simulator's in its
//! histories.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::time::Duration;

use peer::server::admission::SessionId;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// What a server does that a witness wants to know of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// From now on this session alone has the right to write.
    Granted(SessionId),
    /// A request of this session that changes the disk, or flushes it, begins.
    Begins(SessionId),
}

/// Time and tasks.
pub trait Tasks: 'static {
    /// Time since an arbitrary start.
    fn now(&self) -> Duration;

    /// Completes after `delay`.
    fn sleep(&self, delay: Duration) -> impl Future<Output = ()>;

    /// Runs a task beside the caller, on the same thread.
    fn spawn(&self, task: impl Future<Output = ()> + 'static);

    /// Is told what happens, where anybody wants to know.
    fn witness(&self, step: Step) {
        let _ = step;
    }
}

/// The result of `future`, or none when it has not ended within `patience`.
pub(crate) async fn within<T>(
    tasks: &impl Tasks,
    patience: Duration,
    future: impl Future<Output = T>,
) -> Option<T> {
    let (mut future, mut late) = (pin!(future), pin!(tasks.sleep(patience)));
    tokio::select! {
        biased;
        result = &mut future => Some(result),
        () = &mut late => None,
    }
}

/// Runs a task whose result is waited for, perhaps. It goes on when nobody does.
pub(crate) fn begin<T: 'static>(
    tasks: &impl Tasks,
    task: impl Future<Output = T> + 'static,
) -> oneshot::Receiver<T> {
    let (tell, told) = oneshot::channel();
    tasks.spawn(async move {
        // Whoever asked may be gone.
        let _ = tell.send(task.await);
    });
    told
}

/// This thread's tasks under tokio.
pub(crate) struct Local(Instant);

impl Local {
    pub(crate) fn new() -> Self {
        Self(Instant::now())
    }
}

impl Tasks for Local {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn sleep(&self, delay: Duration) -> impl Future<Output = ()> {
        tokio::time::sleep(delay)
    }

    /// A panic in a task ends the process: without that task nobody might be admitted again, and what
    /// is under way at the disk keeps it held until it is over.
    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        let mut task = Box::pin(task);
        tokio::task::spawn_local(std::future::poll_fn(move |cx| {
            let polled = catch_unwind(AssertUnwindSafe(|| task.as_mut().poll(cx)));
            // The panic's message has been printed.
            polled.unwrap_or_else(|_| std::process::abort())
        }));
    }
}
