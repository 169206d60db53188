//! Tasks of one thread, run in the order in which they were woken.
//!
//! Why not a crate's executor: those order and hand over tasks between threads, which here no
//! task ever does, and that was a quarter of a read's instructions in user space. What remains is
//! a list of tasks and a queue of numbers.
//!
//! # States of a task
//!
//! ```text
//!            wake                  run                pending
//!   Idle ───────────► Queued ───────────► Running ───────────────► Idle
//!                                            │  woken meanwhile ─► Queued
//!                                            │ ready
//!                                            ▼
//!                                          Free
//! ```
//!
//! A waker may outlive its task, and the task's number may have gone to another one: that one
//! is then polled once too often, which every future allows.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Wake, Waker};

/// Numbers of the tasks to run. Shared with wakers, which any thread may hold.
#[derive(Default)]
struct Ready(Mutex<VecDeque<usize>>);

impl Ready {
    fn queue(&self) -> MutexGuard<'_, VecDeque<usize>> {
        // Nothing that holds it can panic halfway.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Alarm {
    number: usize,
    queued: AtomicBool,
    ready: Arc<Ready>,
}

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            self.ready.queue().push_back(self.number);
        }
    }
}

struct Task<'a> {
    future: Pin<Box<dyn Future<Output = ()> + 'a>>,
    alarm: Arc<Alarm>,
    waker: Waker,
}

#[derive(Default)]
struct Tasks<'a> {
    /// `None`: free, or running now.
    list: Vec<Option<Task<'a>>>,
    free: Vec<usize>,
}

/// Runs tasks that live no longer than `'a` on the thread that owns it.
#[derive(Default)]
pub(crate) struct Executor<'a> {
    tasks: RefCell<Tasks<'a>>,
    ready: Arc<Ready>,
    /// Numbers taken out of `ready` at once, to lock it once for many.
    turn: RefCell<VecDeque<usize>>,
}

impl<'a> Executor<'a> {
    /// Adds a task; it runs for the first time in one of the next calls of [`Executor::run`].
    pub(crate) fn spawn(&self, future: impl Future<Output = ()> + 'a) {
        let future = Box::pin(future);
        let mut tasks = self.tasks.borrow_mut();
        let number = tasks.free.pop().unwrap_or_else(|| {
            tasks.list.push(None);
            tasks.list.len() - 1
        });
        let alarm = Arc::new(Alarm {
            number,
            queued: AtomicBool::new(true),
            ready: Arc::clone(&self.ready),
        });
        tasks.list[number] = Some(Task {
            future,
            waker: Waker::from(Arc::clone(&alarm)),
            alarm,
        });
        self.ready.queue().push_back(number);
    }

    /// Polls woken tasks, at most `limit` times. Returns how often.
    pub(crate) fn run(&self, limit: usize) -> usize {
        let mut polled = 0;
        while polled < limit {
            let Some(number) = self.next() else { break };
            let Some(mut task) = self.tasks.borrow_mut().list[number].take() else {
                continue;
            };
            // From here on a wake means once more.
            task.alarm.queued.swap(false, Ordering::AcqRel);
            let poll = task
                .future
                .as_mut()
                .poll(&mut Context::from_waker(&task.waker));
            if poll.is_ready() {
                drop(task);
                self.tasks.borrow_mut().free.push(number);
            } else {
                self.tasks.borrow_mut().list[number] = Some(task);
            }
            polled += 1;
        }
        polled
    }

    fn next(&self) -> Option<usize> {
        let mut turn = self.turn.borrow_mut();
        if turn.is_empty() {
            std::mem::swap(&mut *turn, &mut *self.ready.queue());
        }
        turn.pop_front()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::future::poll_fn;
    use std::rc::Rc;
    use std::task::{Poll, Waker};

    use super::Executor;

    /// Yields to the others once.
    async fn pause() {
        let mut paused = false;
        poll_fn(|cx| {
            if std::mem::replace(&mut paused, true) {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    #[test]
    fn tasks_take_turns_in_the_order_of_their_wakes() {
        let (order, executor) = (RefCell::new(Vec::new()), Executor::default());
        for name in ["a", "b"] {
            let order = &order;
            executor.spawn(async move {
                for step in 0..2 {
                    order.borrow_mut().push((name, step));
                    pause().await;
                }
            });
        }
        assert_eq!(executor.run(100), 6);
        assert_eq!(order.take(), [("a", 0), ("b", 0), ("a", 1), ("b", 1)]);
    }

    #[test]
    fn many_wakes_are_one_poll_and_a_late_one_harms_nobody() {
        let executor = Executor::default();
        let (waker, polls) = (Rc::new(RefCell::new(None::<Waker>)), Rc::new(Cell::new(0)));
        let (keep, count) = (Rc::clone(&waker), Rc::clone(&polls));
        executor.spawn(poll_fn(move |cx| {
            keep.replace(Some(cx.waker().clone()));
            count.set(count.get() + 1);
            if count.get() == 2 {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        }));
        executor.run(100);
        let waker = waker.take().unwrap();
        for _ in 0..3 {
            waker.wake_by_ref();
        }
        assert_eq!(executor.run(100), 1);
        // Its number now belongs to another task.
        executor.spawn(async {});
        executor.run(100);
        waker.wake();
        assert_eq!((executor.run(100), polls.get()), (0, 2));
    }

    #[test]
    fn a_wake_from_another_thread_arrives() {
        let executor = Executor::default();
        let (send, receive) = std::sync::mpsc::channel::<Waker>();
        let woken = Rc::new(Cell::new(false));
        let seen = Rc::clone(&woken);
        let mut first = true;
        executor.spawn(async move {
            poll_fn(|cx| {
                if !std::mem::take(&mut first) {
                    return Poll::Ready(());
                }
                send.send(cx.waker().clone()).unwrap();
                Poll::Pending
            })
            .await;
            seen.set(true);
        });
        executor.run(1);
        let other = std::thread::spawn(move || receive.recv().unwrap().wake());
        other.join().unwrap();
        executor.run(1);
        assert!(woken.get());
    }

    #[test]
    fn the_limit_holds_for_a_task_that_never_waits() {
        let executor = Executor::default();
        executor.spawn(async {
            loop {
                pause().await;
            }
        });
        assert_eq!(executor.run(10), 10);
    }
}
