//! Tests of the reactor on a real ring.
#![allow(clippy::unwrap_used)]

use std::cell::{Cell, RefCell};
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use mirror::host::Buffer as _;

use super::{Ring, now, reap_all};
use crate::sys::{IoBuffer, Prepared};

/// Runs `test` on a thread of its own: rings are thread-local.
pub(crate) fn on_ring(entries: u32, test: impl FnOnce(Rc<Ring>) + Send + 'static) {
    let thread = std::thread::spawn(move || test(Ring::new(entries).unwrap()));
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn socket_pair() -> (Rc<OwnedFd>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Rc::new(OwnedFd::from(ours)), theirs)
}

#[test]
fn a_second_ring_on_one_thread_is_refused() {
    on_ring(8, |_first| assert!(Ring::new(8).is_err()));
}

#[test]
fn an_abandoned_operation_keeps_its_buffer_until_it_completes() {
    on_ring(8, |ring| {
        let (fd, mut peer) = socket_pair();
        let buffer = IoBuffer::zeroed(4096);
        let gauge = Rc::new(Cell::new(0));
        let lend = buffer.lend_to_writer(0, 4096);
        drop(ring.submit(Prepared::receive(&fd, lend, false), Some(&gauge)));
        assert_eq!((gauge.get(), buffer.in_use()), (1, true));
        peer.write_all(b"late").unwrap();
        let seen = Rc::clone(&gauge);
        ring.run(|_| 0, reap_all, move || seen.get() == 0).unwrap();
        assert!(!buffer.in_use());
        assert_eq!(buffer.read(|bytes| bytes[..4].to_vec()), b"late");
    });
}

#[test]
fn more_operations_than_the_queue_holds_all_complete() {
    on_ring(4, |ring| {
        let (fd, mut peer) = socket_pair();
        let work = Rc::clone(&ring);
        let total = ring.block_on(async move {
            let buffer = IoBuffer::zeroed(4096);
            let receives: Vec<_> = (0..100)
                .map(|at| {
                    let lend = buffer.lend_to_writer(at, 1);
                    work.submit(Prepared::receive(&fd, lend, false), None)
                })
                .collect();
            peer.write_all(&[7; 100]).unwrap();
            let mut total = 0;
            for receive in receives {
                total += receive.bytes().await.unwrap();
            }
            buffer.read(|bytes| assert!(bytes[..100].iter().all(|byte| *byte == 7)));
            total
        });
        assert_eq!(total.unwrap(), 100);
    });
}

#[test]
fn timers_fire_in_the_order_of_their_deadlines() {
    on_ring(8, |ring| {
        let order = Rc::new(RefCell::new(Vec::new()));
        let start = now();
        for millis in [30_u64, 10, 20] {
            let sleep = ring.sleep_until(start + Duration::from_millis(millis));
            let order = Rc::clone(&order);
            ring.spawn(async move {
                sleep.await;
                order.borrow_mut().push(millis);
            });
        }
        let seen = Rc::clone(&order);
        ring.run(|_| 0, reap_all, move || seen.borrow().len() == 3)
            .unwrap();
        assert_eq!(*order.borrow(), [10, 20, 30]);
        assert!(now() - start >= Duration::from_millis(30));
    });
}

#[test]
fn dropped_timers_do_not_pile_up() {
    on_ring(8, |ring| {
        for _ in 0..1000 {
            drop(ring.sleep_until(now() + Duration::from_secs(3600)));
        }
        assert!(ring.timers.borrow().heap.len() <= 130);
    });
}

#[test]
fn work_on_another_thread_wakes_the_ring() {
    on_ring(8, |ring| {
        let worker = Rc::clone(&ring);
        let answer = ring.block_on(async move {
            let mut sum = 0;
            for value in 0..50_u32 {
                sum += worker.blocking(move || value).await;
            }
            sum
        });
        assert_eq!(answer.unwrap(), 1225);
    });
}

#[test]
fn a_task_that_never_waits_does_not_starve_io() {
    on_ring(8, |ring| {
        let (fd, mut peer) = socket_pair();
        let done = Rc::new(Cell::new(false));
        let (busy, end) = (Rc::clone(&done), Rc::clone(&done));
        ring.spawn(async move {
            while !busy.get() {
                futures_yield().await;
            }
        });
        let receiver = Rc::clone(&ring);
        ring.spawn(async move {
            let buffer = IoBuffer::zeroed(4096);
            let lend = buffer.lend_to_writer(0, 1);
            receiver
                .submit(Prepared::receive(&fd, lend, false), None)
                .await;
            end.set(true);
        });
        peer.write_all(b"x").unwrap();
        let seen = Rc::clone(&done);
        ring.run(|_| 0, reap_all, move || seen.get()).unwrap();
        assert!(done.get());
    });
}

/// Gives other tasks a turn.
async fn futures_yield() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if yielded {
            return std::task::Poll::Ready(());
        }
        yielded = true;
        cx.waker().wake_by_ref();
        std::task::Poll::Pending
    })
    .await;
}
