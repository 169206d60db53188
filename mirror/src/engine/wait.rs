//! Waiting without locks: wait lists, an asynchronous mutex, the gate and range locks.
//!
//! Everything here belongs to the one thread that owns a mirror. A waiter re-checks its
//! condition whenever its list is woken, so waking too often is harmless and waking is never
//! lost.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::ops::Range;
use std::task::{Context, Poll, Waker};

/// Tasks that wait for a condition.
#[derive(Default)]
pub(crate) struct WaitList {
    wakers: RefCell<Vec<Waker>>,
}

impl WaitList {
    /// Lets every waiter look again.
    pub(crate) fn wake_all(&self) {
        let mut wakers = self.wakers.take();
        for waker in wakers.drain(..) {
            waker.wake();
        }
        // Keep the larger allocation for the next waiters.
        let mut current = self.wakers.borrow_mut();
        if current.is_empty() && current.capacity() < wakers.capacity() {
            *current = wakers;
        }
    }

    fn register(&self, context: &Context<'_>) {
        let mut wakers = self.wakers.borrow_mut();
        if !wakers.iter().any(|waker| waker.will_wake(context.waker())) {
            wakers.push(context.waker().clone());
        }
    }

    /// Waits until `condition` gives a value.
    pub(crate) fn until<T>(
        &self,
        mut condition: impl FnMut() -> Option<T>,
    ) -> impl Future<Output = T> {
        poll_fn(move |context| match condition() {
            Some(value) => Poll::Ready(value),
            None => {
                self.register(context);
                Poll::Pending
            }
        })
    }
}

/// Mutual exclusion across awaits, for membership changes. Not on the data path.
#[derive(Default)]
pub(crate) struct Exclusive {
    held: Cell<bool>,
    waiting: WaitList,
}

/// Holds an [`Exclusive`].
pub(crate) struct ExclusiveGuard<'a>(&'a Exclusive);

impl Exclusive {
    /// Waits for the turn.
    pub(crate) async fn enter(&self) -> ExclusiveGuard<'_> {
        self.waiting
            .until(|| (!self.held.replace(true)).then_some(()))
            .await;
        ExclusiveGuard(self)
    }
}

impl Drop for ExclusiveGuard<'_> {
    fn drop(&mut self) {
        self.0.held.set(false);
        self.0.waiting.wake_all();
    }
}

/// The gate every request passes: closed while the set of receiving members grows, so that a
/// join waits for the requests under way and new ones wait for it (R1).
#[derive(Default)]
pub(crate) struct Gate {
    closed: Cell<bool>,
    inside: Cell<usize>,
    waiting: WaitList,
}

/// A request inside the gate.
pub(crate) struct Pass<'a>(&'a Gate);

/// The gate, held closed with nobody inside.
pub(crate) struct Closed<'a>(&'a Gate);

impl Gate {
    /// Enters, waiting while the gate is closed.
    pub(crate) async fn enter(&self) -> Pass<'_> {
        if self.closed.get() {
            self.waiting
                .until(|| (!self.closed.get()).then_some(()))
                .await;
        }
        self.inside.set(self.inside.get() + 1);
        Pass(self)
    }

    /// Closes the gate and waits until nobody is inside.
    pub(crate) async fn close(&self) -> Closed<'_> {
        self.waiting
            .until(|| (!self.closed.replace(true)).then_some(()))
            .await;
        let closed = Closed(self);
        self.waiting
            .until(|| (self.inside.get() == 0).then_some(()))
            .await;
        closed
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let inside = self.0.inside.get() - 1;
        self.0.inside.set(inside);
        if inside == 0 && self.0.closed.get() {
            self.0.waiting.wake_all();
        }
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.0.closed.set(false);
        self.0.waiting.wake_all();
    }
}

/// Tells when every read that was under way has ended, without a lock in the read path: reads
/// count themselves in the present phase, and a waiter begins a new phase and waits for the old
/// one to empty.
#[derive(Default)]
pub(crate) struct ReadPhases {
    phase: Cell<usize>,
    inside: [Cell<usize>; 2],
    turn: Exclusive,
    waiting: WaitList,
}

/// A read under way.
pub(crate) struct Reading<'a> {
    phases: &'a ReadPhases,
    phase: usize,
}

impl ReadPhases {
    /// A read begins.
    pub(crate) fn begin(&self) -> Reading<'_> {
        let phase = self.phase.get();
        self.inside[phase].set(self.inside[phase].get() + 1);
        Reading {
            phases: self,
            phase,
        }
    }

    /// Waits until every read that has begun before the call has ended.
    pub(crate) async fn drained(&self) {
        let _turn = self.turn.enter().await;
        let before = self.phase.replace(1 - self.phase.get());
        self.waiting
            .until(|| (self.inside[before].get() == 0).then_some(()))
            .await;
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        let inside = &self.phases.inside[self.phase];
        inside.set(inside.get() - 1);
        if inside.get() == 0 && self.phases.phase.get() != self.phase {
            self.phases.waiting.wake_all();
        }
    }
}

struct Entry {
    id: u64,
    range: Range<u64>,
    /// New data is on its way to the members under this lock (what R2 calls *in flight*).
    issued: bool,
    waker: Option<Waker>,
}

/// Exclusive locks on byte ranges of the device, granted first come, first served.
///
/// As many entries as requests are in progress: a scan is cheaper than any tree.
#[derive(Default)]
pub(crate) struct RangeLocks {
    entries: RefCell<Vec<Entry>>,
    next_id: Cell<u64>,
}

/// Holds a range.
pub(crate) struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    id: u64,
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl RangeLocks {
    /// Waits until no earlier holder or waiter overlaps `range`.
    pub(crate) async fn lock(&self, range: Range<u64>) -> RangeGuard<'_> {
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        self.entries.borrow_mut().push(Entry {
            id,
            range,
            issued: false,
            waker: None,
        });
        // From here on the guard removes the entry, also when this future is dropped.
        let guard = RangeGuard { locks: self, id };
        poll_fn(|context| {
            let mut entries = self.entries.borrow_mut();
            let own = position(&entries, id);
            let (earlier, rest) = entries.split_at_mut(own);
            if earlier
                .iter()
                .any(|entry| overlap(&entry.range, &rest[0].range))
            {
                rest[0].waker = Some(context.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(())
        })
        .await;
        guard
    }

    /// Calls `visit` for each range with new data on its way.
    pub(crate) fn for_each_issued(&self, mut visit: impl FnMut(Range<u64>)) {
        for entry in self.entries.borrow().iter().filter(|entry| entry.issued) {
            visit(entry.range.clone());
        }
    }
}

fn position(entries: &[Entry], id: u64) -> usize {
    // Entries are in the order of their ids.
    entries
        .binary_search_by_key(&id, |entry| entry.id)
        .unwrap_or_else(|_| unreachable!("a range lock's entry lives as long as its guard"))
}

impl RangeGuard<'_> {
    /// Says whether new data is on its way under this lock.
    pub(crate) fn set_issued(&self, issued: bool) {
        let mut entries = self.locks.entries.borrow_mut();
        let own = position(&entries, self.id);
        entries[own].issued = issued;
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut entries = self.locks.entries.borrow_mut();
        let own = position(&entries, self.id);
        let gone = entries.remove(own);
        for later in entries.iter_mut().skip(own) {
            if overlap(&later.range, &gone.range)
                && let Some(waker) = later.waker.take()
            {
                waker.wake();
            }
        }
    }
}

/// Runs all of them side by side; what they give, in their order.
pub(super) async fn side_by_side<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut all: Vec<_> = futures.map(|future| (Box::pin(future), None)).collect();
    poll_fn(|context| {
        for (future, output) in all.iter_mut().filter(|(_, output)| output.is_none()) {
            if let Poll::Ready(value) = future.as_mut().poll(context) {
                *output = Some(value);
            }
        }
        if all.iter().any(|(_, output)| output.is_none()) {
            return Poll::Pending;
        }
        Poll::Ready(())
    })
    .await;
    all.into_iter().filter_map(|(_, output)| output).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::pin::pin;

    fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn overlapping_ranges_take_turns_in_order() {
        let locks = RangeLocks::default();
        let mut first = pin!(locks.lock(0..8));
        let mut second = pin!(locks.lock(4..12));
        let mut third = pin!(locks.lock(10..20));
        let mut apart = pin!(locks.lock(20..30));
        let Poll::Ready(held) = poll(first.as_mut()) else {
            panic!()
        };
        assert!(poll(second.as_mut()).is_pending());
        assert!(
            poll(third.as_mut()).is_pending(),
            "behind the second, though free now"
        );
        assert!(poll(apart.as_mut()).is_ready());
        drop(held);
        let Poll::Ready(held) = poll(second.as_mut()) else {
            panic!()
        };
        assert!(poll(third.as_mut()).is_pending());
        drop(held);
        assert!(poll(third.as_mut()).is_ready());
    }

    #[test]
    fn only_issued_ranges_are_in_flight() {
        let locks = RangeLocks::default();
        let mut first = pin!(locks.lock(0..8));
        let Poll::Ready(held) = poll(first.as_mut()) else {
            panic!()
        };
        let seen = |locks: &RangeLocks| {
            let mut all = Vec::new();
            locks.for_each_issued(|range| all.push(range));
            all
        };
        assert!(seen(&locks).is_empty());
        held.set_issued(true);
        let issued = seen(&locks);
        assert!(issued.len() == 1 && issued[0] == (0..8));
    }

    #[test]
    fn the_gate_drains_before_it_closes() {
        let gate = Gate::default();
        let mut enter = pin!(gate.enter());
        let Poll::Ready(pass) = poll(enter.as_mut()) else {
            panic!()
        };
        let mut close = pin!(gate.close());
        assert!(poll(close.as_mut()).is_pending());
        let mut late = pin!(gate.enter());
        assert!(poll(late.as_mut()).is_pending());
        drop(pass);
        let Poll::Ready(closed) = poll(close.as_mut()) else {
            panic!()
        };
        assert!(poll(late.as_mut()).is_pending());
        drop(closed);
        assert!(poll(late.as_mut()).is_ready());
    }

    #[derive(Default)]
    struct Count(std::sync::atomic::AtomicU64);

    impl std::task::Wake for Count {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    }

    #[test]
    fn a_drain_waits_for_the_reads_before_it_and_no_others() {
        let reads = ReadPhases::default();
        for _ in 0..3 {
            assert!(poll(pin!(reads.drained())).is_ready(), "nobody reads");
            let (first, second) = (reads.begin(), reads.begin());
            let count = std::sync::Arc::new(Count::default());
            let waker = Waker::from(count.clone());
            let woken = || count.0.load(std::sync::atomic::Ordering::Relaxed);
            let mut drained = pin!(reads.drained());
            let mut context = Context::from_waker(&waker);
            assert!(drained.as_mut().poll(&mut context).is_pending());
            let later = reads.begin();
            drop(first);
            assert_eq!(woken(), 0);
            assert!(drained.as_mut().poll(&mut context).is_pending());
            drop(second);
            assert_eq!(woken(), 1);
            assert!(drained.as_mut().poll(&mut context).is_ready());
            // The later one is what the next drain waits for.
            let mut next = pin!(reads.drained());
            assert!(poll(next.as_mut()).is_pending());
            drop(later);
            assert!(poll(next.as_mut()).is_ready());
        }
    }

    #[test]
    fn who_waits_is_woken_once() {
        let list = WaitList::default();
        let count = std::sync::Arc::new(Count::default());
        let waker = Waker::from(count.clone());
        let mut wait = pin!(list.until(|| None::<()>));
        for round in 1..4 {
            for _ in 0..2 {
                let mut context = Context::from_waker(&waker);
                assert!(wait.as_mut().poll(&mut context).is_pending());
            }
            list.wake_all();
            let woken = count.0.load(std::sync::atomic::Ordering::Relaxed);
            assert_eq!(woken, round);
            list.wake_all();
        }
        // The allocation is kept.
        assert!(list.wakers.borrow().capacity() > 0);
    }
}
