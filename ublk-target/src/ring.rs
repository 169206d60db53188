//! The reactor of the device's thread: one io_uring, its running operations, timers and tasks.
//!
//! # What it promises
//!
//! - Operations queued by all tasks of one turn reach the kernel with one system call, which
//!   also waits for the next completion.
//! - An operation's buffer stays alive and is counted as in use until its completion arrives,
//!   whatever happens to the future that waits for it (R6).
//! - Timers cost nothing while they are far away: the kernel holds a timeout for the nearest
//!   one only, and no clock is read before that has fired.
//! - Work on other threads ([`Ring::blocking`]) wakes the ring through an eventfd that is
//!   always being polled.
//!
//! # States of an operation
//!
//! ```text
//!   submit ──► Waiting ──completion──► Done ──poll──► Free
//!                 │ future dropped       │ future dropped
//!                 ▼                      ▼
//!              Orphan ──completion──►  Free
//! ```
//!
//! The ring itself is libublk's thread-local one, because the ublk front end's commands travel
//! on it too. Their completions carry no [`UblkUringData::Target`] bit and go to libublk; ours
//! carry it and the index of their slot.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, BinaryHeap};
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use io_uring::{IoUring, cqueue};
use libublk::uring_async::ublk_wake_task;
use libublk::{UblkError, UblkUringData, ublk_init_task_ring, with_task_io_ring_mut};
use mirror::host::Errno;

use crate::executor::Executor;
use crate::sys::{self, InFlight, IoBuffer, Prepared};

const TARGET: u64 = UblkUringData::Target as u64;

/// Tasks polled in one turn before the ring is looked at again, so that a task that never waits
/// cannot starve I/O.
const POLLS_PER_TURN: usize = 512;

/// Why the ring could not be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RingError {
    /// The kernel refused io_uring.
    #[error(
        "the kernel refused an io_uring of {entries} entries ({source}); \
         check /proc/sys/kernel/io_uring_disabled and the memory limit (ulimit -l)"
    )]
    Refused {
        /// Submission entries asked for.
        entries: u32,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Another system call failed.
    #[error("cannot set up the wake-up descriptor ({0})")]
    Eventfd(io::Error),
}

enum Slot {
    Free,
    Waiting {
        flight: InFlight,
        waker: Option<Waker>,
        gauge: Option<Rc<Cell<usize>>>,
    },
    Orphan {
        flight: InFlight,
        gauge: Option<Rc<Cell<usize>>>,
    },
    Done(i32),
}

#[derive(Default)]
struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

impl Slots {
    fn reserve(&mut self) -> u32 {
        if let Some(key) = self.free.pop() {
            return key;
        }
        let Ok(key) = u32::try_from(self.slots.len()) else {
            panic!("four thousand million operations at once")
        };
        self.slots.push(Slot::Free);
        key
    }

    fn release(&mut self, key: u32) {
        self.slots[key as usize] = Slot::Free;
        self.free.push(key);
    }

    /// Returns who waits for the operation.
    fn complete(&mut self, key: u32, result: i32) -> Option<Waker> {
        let slot = self.slots.get_mut(key as usize)?;
        let (flight, waker, gauge, next) = match std::mem::replace(slot, Slot::Free) {
            Slot::Waiting {
                flight,
                waker,
                gauge,
            } => (flight, waker, gauge, Some(result)),
            Slot::Orphan { flight, gauge } => (flight, None, gauge, None),
            Slot::Free | Slot::Done(_) => panic!("a completion for an operation that is over"),
        };
        flight.complete();
        if let Some(gauge) = gauge {
            gauge.set(gauge.get() - 1);
        }
        match next {
            Some(result) => *slot = Slot::Done(result),
            None => self.free.push(key),
        }
        waker
    }
}

/// One timer. The heap's order is reversed so that the earliest is on top.
struct Timer {
    deadline: Duration,
    waker: RefCell<Option<Waker>>,
    fired: Cell<bool>,
    dropped: Cell<bool>,
}

struct HeapEntry(Rc<Timer>);

impl PartialEq for HeapEntry {
    fn eq(&self, other: &Self) -> bool {
        self.0.deadline == other.0.deadline
    }
}
impl Eq for HeapEntry {}
impl PartialOrd for HeapEntry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for HeapEntry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        other.0.deadline.cmp(&self.0.deadline)
    }
}

#[derive(Default)]
struct Timers {
    heap: BinaryHeap<HeapEntry>,
    /// Entries of the heap whose future is gone; they are swept when they are the majority.
    dropped: usize,
    /// Deadlines for which the kernel holds a timeout. The first is never later than the
    /// heap's while the thread waits.
    armed: BTreeSet<Duration>,
}

/// The reactor. Lives on one thread.
pub(crate) struct Ring {
    slots: RefCell<Slots>,
    timers: Rc<RefCell<Timers>>,
    /// Timeouts that have not fired.
    timeouts: Rc<Cell<usize>>,
    executor: Executor<'static>,
    kick: Arc<OwnedFd>,
}

impl Ring {
    /// Creates this thread's ring with room for `entries` submissions in one turn.
    pub(crate) fn new(entries: u32) -> Result<Rc<Self>, RingError> {
        let refused = |source| RingError::Refused { entries, source };
        let mut failure = None;
        let made = ublk_init_task_ring(|cell| {
            if cell.get().is_some() {
                // Two reactors would take each other's completions.
                return Err(UblkError::InvalidVal);
            }
            match build_ring(entries) {
                Ok(ring) => cell
                    .set(RefCell::new(ring))
                    .map_err(|_| UblkError::InvalidVal),
                Err(source) => {
                    failure = Some(source);
                    Err(UblkError::InvalidVal)
                }
            }
        });
        if made.is_err() {
            return Err(refused(
                failure.unwrap_or_else(|| io::ErrorKind::AlreadyExists.into()),
            ));
        }
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let kick = rustix::event::eventfd(0, flags)
            .map_err(|errno| RingError::Eventfd(io::Error::from(errno)))?;
        let ring = Rc::new(Self {
            slots: RefCell::default(),
            timers: Rc::default(),
            timeouts: Rc::default(),
            executor: Executor::default(),
            kick: Arc::new(kick),
        });
        ring.listen_for_kicks()?;
        Ok(ring)
    }

    /// Keeps one poll of the eventfd under way for ever.
    fn listen_for_kicks(self: &Rc<Self>) -> Result<(), RingError> {
        let fd = self.kick.try_clone().map_err(RingError::Eventfd)?;
        let (fd, ring) = (Rc::new(fd), Rc::downgrade(self));
        self.spawn(async move {
            loop {
                let Some(strong) = ring.upgrade() else { return };
                let readable = strong.submit(Prepared::poll_readable(&fd), None);
                drop(strong);
                readable.await;
                let mut count = [0_u8; 8];
                // Nothing to read means that an earlier read took this kick along.
                let _ = rustix::io::read(fd.as_fd(), &mut count);
            }
        });
        Ok(())
    }

    /// Runs `task` on this thread.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.executor.spawn(task);
    }

    /// Queues an operation; `gauge` counts it until the device has answered.
    pub(crate) fn submit(
        self: &Rc<Self>,
        prepared: Prepared,
        gauge: Option<&Rc<Cell<usize>>>,
    ) -> Completion {
        let mut slots = self.slots.borrow_mut();
        let key = slots.reserve();
        let user_data = TARGET | u64::from(key);
        let flight = with_task_io_ring_mut(|ring| prepared.push(ring, user_data));
        let gauge = gauge.map(|gauge| {
            gauge.set(gauge.get() + 1);
            Rc::clone(gauge)
        });
        slots.slots[key as usize] = Slot::Waiting {
            flight,
            waker: None,
            gauge,
        };
        Completion {
            ring: Some(Rc::clone(self)),
            key,
        }
    }

    /// Makes operations on these buffers cheaper. Once for a ring; an error changes nothing.
    pub(crate) fn register_buffers(&self, buffers: &[IoBuffer]) -> io::Result<()> {
        with_task_io_ring_mut(|ring| sys::register_buffers(ring, buffers))
    }

    /// A delay that ends at `deadline` on [`now`]'s clock.
    pub(crate) fn sleep_until(&self, deadline: Duration) -> Sleep {
        let timer = Rc::new(Timer {
            deadline,
            waker: RefCell::new(None),
            fired: Cell::new(false),
            dropped: Cell::new(false),
        });
        self.timers
            .borrow_mut()
            .heap
            .push(HeapEntry(Rc::clone(&timer)));
        Sleep {
            timer,
            timers: Rc::clone(&self.timers),
        }
    }

    /// Runs `work` on a thread of its own. For what may block: opening devices, control
    /// commands.
    pub(crate) fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Blocking<T> {
        self.try_blocking(work)
            .unwrap_or_else(|error| panic!("no thread is to be had: {error}"))
    }

    /// The same, for what can do without when there is no thread to be had.
    pub(crate) fn try_blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<Blocking<T>> {
        let shared = Arc::new(Mutex::new(BlockingState {
            result: None,
            waker: None,
        }));
        let (theirs, kick) = (Arc::clone(&shared), Arc::clone(&self.kick));
        std::thread::Builder::new().spawn(move || {
            let result = work();
            let waker = {
                let mut state = theirs.lock().unwrap_or_else(PoisonError::into_inner);
                state.result = Some(result);
                state.waker.take()
            };
            if let Some(waker) = waker {
                waker.wake();
            }
            // A full counter means that a kick is pending anyway.
            let _ = rustix::io::write(kick.as_fd(), &1_u64.to_ne_bytes());
        })?;
        Ok(Blocking(shared))
    }

    /// Runs tasks and I/O until `done`. `front` runs the front end's own tasks, at most as often
    /// as it is told, and says how often it did; `reap` passes on the completions on the ring.
    pub(crate) fn run(
        self: &Rc<Self>,
        mut front: impl FnMut(usize) -> usize,
        mut reap: impl FnMut(&mut dyn FnMut(&cqueue::Entry)),
        done: impl Fn() -> bool,
    ) -> io::Result<()> {
        loop {
            // The two sides' tasks wake each other.
            let mut polled = 0;
            loop {
                // Half of what is left, so that the other side gets its share.
                polled += front((POLLS_PER_TURN - polled).div_ceil(2));
                let ours = self.executor.run(POLLS_PER_TURN - polled);
                polled += ours;
                if ours == 0 || polled == POLLS_PER_TURN {
                    break;
                }
            }
            if done() {
                return Ok(());
            }
            self.arm_timers();
            let timeouts = self.timeouts.get();
            self.enter(polled == POLLS_PER_TURN)?;
            reap(&mut |entry| self.dispatch(entry));
            if self.timeouts.get() < timeouts {
                self.fire_timers();
            }
        }
    }

    /// Runs the ring until `future` has a result.
    pub(crate) fn block_on<T: 'static>(
        self: &Rc<Self>,
        future: impl Future<Output = T> + 'static,
    ) -> io::Result<T> {
        let slot = Rc::new(RefCell::new(None));
        let filled = Rc::clone(&slot);
        self.spawn(async move {
            let result = future.await;
            filled.replace(Some(result));
        });
        self.run(|_| 0, reap_all, || slot.borrow().is_some())?;
        match slot.take() {
            Some(result) => Ok(result),
            None => Err(io::Error::other("the ring stopped early")),
        }
    }

    /// Has the kernel hold a timeout for the nearest timer.
    fn arm_timers(self: &Rc<Self>) {
        let nearest = {
            let mut timers = self.timers.borrow_mut();
            let Some(nearest) = timers.heap.peek().map(|entry| entry.0.deadline) else {
                return;
            };
            if timers.armed.first().is_some_and(|armed| *armed <= nearest) {
                return;
            }
            timers.armed.insert(nearest);
            nearest
        };
        // One that has passed already fires at once. Nobody waits for the completion itself.
        drop(self.submit(Prepared::timeout(nearest), Some(&self.timeouts)));
    }

    /// Hands queued operations to the kernel and, unless `busy`, waits for a completion.
    fn enter(&self, busy: bool) -> io::Result<()> {
        match with_task_io_ring_mut(|ring| ring.submit_and_wait(usize::from(!busy))) {
            Ok(_) => Ok(()),
            // Interrupted, or the completion queue has to be emptied first.
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Wakes who waits. Submits nothing: the ring is borrowed by the caller.
    fn dispatch(&self, entry: &cqueue::Entry) {
        let user_data = entry.user_data();
        if user_data & TARGET == 0 {
            ublk_wake_task(user_data, entry);
            return;
        }
        let Ok(key) = u32::try_from(user_data & !TARGET) else {
            return;
        };
        let waker = self.slots.borrow_mut().complete(key, entry.result());
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn fire_timers(&self) {
        let mut timers = self.timers.borrow_mut();
        let now = now();
        timers.armed.retain(|deadline| *deadline > now);
        if self.timeouts.get() == 0 {
            // The kernel gave one up early: it is asked again.
            timers.armed.clear();
        }
        while timers
            .heap
            .peek()
            .is_some_and(|entry| entry.0.deadline <= now)
        {
            let Some(HeapEntry(timer)) = timers.heap.pop() else {
                return;
            };
            timer.fired.set(true);
            if timer.dropped.get() {
                timers.dropped -= 1;
            }
            if let Some(waker) = timer.waker.take() {
                waker.wake();
            }
        }
    }
}

/// Takes all completions off this thread's ring.
pub(crate) fn reap_all(dispatch: &mut dyn FnMut(&cqueue::Entry)) {
    with_task_io_ring_mut(|ring| ring.completion().for_each(|entry| dispatch(&entry)));
}

fn build_ring(entries: u32) -> io::Result<IoUring> {
    let completions = entries.saturating_mul(4);
    let mut builder = IoUring::builder();
    builder.setup_cqsize(completions).setup_clamp().dontfork();
    builder
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag();
    let ring = match builder.build(entries) {
        // Kernels before 6.1 know neither of the two.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let mut builder = IoUring::builder();
            builder
                .setup_cqsize(completions)
                .setup_clamp()
                .dontfork()
                .setup_coop_taskrun();
            builder.build(entries)?
        }
        other => other?,
    };
    // Saves a descriptor lookup in every enter; harmless where the kernel does not offer it.
    let _ = ring.submitter().register_ring_fd();
    Ok(ring)
}

/// Time since boot, suspended time included.
pub(crate) fn now() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or(0);
    Duration::new(seconds, nanoseconds)
}

/// Waits for one operation's result: what the system call would return, negative on error.
///
/// Dropping it leaves an orphan.
pub(crate) struct Completion {
    /// Taken when the result has been delivered.
    ring: Option<Rc<Ring>>,
    key: u32,
}

impl Completion {
    /// The result as a number of bytes.
    pub(crate) async fn bytes(self) -> Result<usize, Errno> {
        let result = self.await;
        usize::try_from(result).map_err(|_| Errno(-result))
    }
}

impl Future for Completion {
    type Output = i32;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<i32> {
        let Some(ring) = self.ring.as_ref() else {
            panic!("an operation is polled after its end")
        };
        let mut slots = ring.slots.borrow_mut();
        let result = match &mut slots.slots[self.key as usize] {
            Slot::Done(result) => *result,
            Slot::Waiting { waker, .. } => {
                match waker {
                    Some(waker) => waker.clone_from(cx.waker()),
                    None => *waker = Some(cx.waker().clone()),
                }
                return Poll::Pending;
            }
            Slot::Free | Slot::Orphan { .. } => panic!("an operation's slot was taken from it"),
        };
        slots.release(self.key);
        drop(slots);
        self.ring = None;
        Poll::Ready(result)
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        let Some(ring) = self.ring.take() else { return };
        let mut slots = ring.slots.borrow_mut();
        let slot = &mut slots.slots[self.key as usize];
        match std::mem::replace(slot, Slot::Free) {
            Slot::Waiting { flight, gauge, .. } => *slot = Slot::Orphan { flight, gauge },
            _ => slots.free.push(self.key),
        }
    }
}

/// A delay.
pub(crate) struct Sleep {
    timer: Rc<Timer>,
    timers: Rc<RefCell<Timers>>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.timer.fired.get() {
            return Poll::Ready(());
        }
        *self.timer.waker.borrow_mut() = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if self.timer.fired.get() {
            return;
        }
        self.timer.dropped.set(true);
        self.timer.waker.replace(None);
        let mut timers = self.timers.borrow_mut();
        timers.dropped += 1;
        if timers.dropped > 64 && timers.dropped * 2 > timers.heap.len() {
            timers.heap.retain(|entry| !entry.0.dropped.get());
            timers.dropped = 0;
        }
    }
}

struct BlockingState<T> {
    result: Option<T>,
    waker: Option<Waker>,
}

/// Work on another thread.
pub(crate) struct Blocking<T>(Arc<Mutex<BlockingState<T>>>);

impl<T> Future for Blocking<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match state.result.take() {
            Some(result) => Poll::Ready(result),
            None => {
                state.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
