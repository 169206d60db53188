//! One request sent to several members at once, and what came of it.
//!
//! Outcomes are judged only when all are in, or when the deadline has passed and at least one
//! in-sync member has succeeded (R8). Operations still running then become orphans: the disk
//! keeps their buffer, and the member is lost for the stall. When it is, all else that it owes is
//! given up at once: a stall costs one deadline, whatever was asked when.

use crate::host::Errno;
use crate::layout::SLOTS_MAX;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

/// Wakes waiting requests now and then so that they can notice a stall, without a timer for
/// each request. A request takes a place while it waits; places are reused, so that the data
/// path allocates nothing.
#[derive(Default)]
pub(crate) struct StallWatch {
    tick: Cell<u64>,
    /// Slots that are in-sync now, one bit each: a member that was lost after a request went
    /// to it is no proof that the request succeeded.
    in_sync: Cell<u16>,
    /// Slots to which requests go now, and those of them and others that have stalled.
    receiving: Cell<u16>,
    stalled: Cell<u16>,
    places: RefCell<Places>,
}

#[derive(Default)]
struct Places {
    wakers: Vec<Option<Waker>>,
    free: Vec<usize>,
}

impl StallWatch {
    /// One step of coarse time; every waiting request looks at its age.
    pub(crate) fn advance(&self) {
        self.tick.set(self.tick.get() + 1);
        self.wake_all();
    }

    fn wake_all(&self) {
        for waker in self.places.borrow().wakers.iter().flatten() {
            waker.wake_by_ref();
        }
    }

    /// Replaces the set of slots to which requests go: each with whether it is in-sync.
    pub(crate) fn set_receiving(&self, slots: impl Iterator<Item = (u8, bool)>) {
        let before = self.receiving.get();
        let (mut receiving, mut in_sync) = (0, 0);
        for (slot, is_in_sync) in slots {
            receiving |= 1 << slot;
            in_sync |= u16::from(is_in_sync) << slot;
        }
        self.in_sync.set(in_sync);
        self.receiving.set(receiving);
        // Who has come back has nothing to do with who has stalled.
        self.stalled
            .set(self.stalled.get() & !(receiving & !before));
        if before & !receiving & self.stalled.get() != 0 {
            self.wake_all();
        }
    }

    /// The member in `slot` has stalled, and is about to be lost for it.
    pub(crate) fn has_stalled(&self, slot: u8) {
        self.stalled.set(self.stalled.get() | 1 << slot);
    }

    /// Whether the member in `slot` has been lost for a stall.
    fn is_lost(&self, slot: u8) -> bool {
        self.stalled.get() & !self.receiving.get() & (1 << slot) != 0
    }

    /// Whether the member in `slot` is in-sync now.
    pub(crate) fn is_in_sync(&self, slot: u8) -> bool {
        self.in_sync.get() & (1 << slot) != 0
    }

    /// Whether a member is in-sync now whose slot is not among these.
    fn is_beyond(&self, slots: u16) -> bool {
        self.in_sync.get() & !slots != 0
    }

    fn take_place(&self, waker: &Waker) -> usize {
        let mut places = self.places.borrow_mut();
        let place = places.free.pop().unwrap_or(places.wakers.len());
        if place == places.wakers.len() {
            places.wakers.push(None);
        }
        places.wakers[place] = Some(waker.clone());
        place
    }

    fn leave(&self, place: usize) {
        let mut places = self.places.borrow_mut();
        places.wakers[place] = None;
        places.free.push(place);
    }
}

/// Ticks of the [`StallWatch`] after which an operation is stalled. The watch advances
/// `TICKS_PER_DEADLINE` times in a deadline.
pub(crate) const TICKS_PER_DEADLINE: u64 = 8;

/// What came of a request on one member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// The member's slot.
    pub(crate) slot: u8,
    /// Whether the member counts as in-sync.
    pub(crate) in_sync: bool,
    /// Success or the error; `TIMED_OUT` for a stall.
    pub(crate) result: Result<(), Errno>,
}

/// The outcomes of a request, one for each member it went to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outcomes {
    list: [Option<Outcome>; SLOTS_MAX],
    len: usize,
}

impl Outcomes {
    /// All outcomes.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Outcome> {
        self.list[..self.len].iter().flatten()
    }

    /// Whether every member succeeded: the only case on the fast path.
    pub(crate) fn all_ok(&self) -> bool {
        self.iter().all(|outcome| outcome.result.is_ok())
    }

    /// The first error of an in-sync member if none that is still in-sync succeeded.
    pub(crate) fn common_error(&self, watch: &StallWatch) -> Option<Errno> {
        let proves = |o: &Outcome| o.in_sync && o.result.is_ok() && watch.is_in_sync(o.slot);
        if self.iter().any(proves) {
            return None;
        }
        Some(
            self.iter()
                .find_map(|o| if o.in_sync { o.result.err() } else { None })
                .unwrap_or(Errno::IO),
        )
    }
}

/// One operation, waited for until more than a number of steps of coarse time have passed: `None`
/// then.
pub(crate) struct Limited<'a, Op> {
    watch: &'a StallWatch,
    last: u64,
    place: Option<usize>,
    op: Op,
}

impl<'a, Op: Future<Output = Result<(), Errno>> + Unpin> Limited<'a, Op> {
    /// Waits for `op` for so many steps.
    pub(crate) fn new(watch: &'a StallWatch, op: Op, steps: u64) -> Self {
        Self {
            watch,
            last: watch.tick.get() + steps,
            place: None,
            op,
        }
    }
}

impl<Op: Future<Output = Result<(), Errno>> + Unpin> Future for Limited<'_, Op> {
    type Output = Option<Result<(), Errno>>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        if let Poll::Ready(result) = Pin::new(&mut this.op).poll(context) {
            return Poll::Ready(Some(result));
        }
        if this.watch.tick.get() > this.last {
            return Poll::Ready(None);
        }
        if this.place.is_none() {
            this.place = Some(this.watch.take_place(context.waker()));
        }
        Poll::Pending
    }
}

impl<Op> Drop for Limited<'_, Op> {
    fn drop(&mut self) {
        if let Some(place) = self.place.take() {
            self.watch.leave(place);
        }
    }
}

/// Operations under way on several members.
pub(crate) struct FanOut<'a, Op> {
    watch: &'a StallWatch,
    begun: u64,
    limited: bool,
    /// When the first in-sync member had succeeded.
    proved: Option<u64>,
    place: Option<usize>,
    running: [Option<Op>; SLOTS_MAX],
    outcomes: Outcomes,
}

impl<'a, Op: Future<Output = Result<(), Errno>> + Unpin> FanOut<'a, Op> {
    /// An empty set; add operations with [`FanOut::push`].
    pub(crate) fn new(watch: &'a StallWatch) -> Self {
        Self {
            watch,
            begun: watch.tick.get(),
            limited: false,
            proved: None,
            place: None,
            running: [const { None }; SLOTS_MAX],
            outcomes: Outcomes {
                list: [None; SLOTS_MAX],
                len: 0,
            },
        }
    }

    /// Ends at the deadline even when no member has succeeded.
    pub(crate) fn limit_to_deadline(&mut self) {
        self.limited = true;
    }

    /// Adds the operation of the member in `slot`.
    pub(crate) fn push(&mut self, slot: u8, in_sync: bool, op: Op) {
        let index = self.outcomes.len;
        self.running[index] = Some(op);
        // Until it completes, the outcome is that of a stall.
        self.outcomes.list[index] = Some(Outcome {
            slot,
            in_sync,
            result: Err(Errno::TIMED_OUT),
        });
        self.outcomes.len += 1;
    }

    /// The slots whose operations still run.
    fn waiting(&self) -> impl Iterator<Item = u8> {
        let all = self.running.iter().zip(&self.outcomes.list);
        all.filter_map(|(op, outcome)| op.as_ref().and(outcome.as_ref()).map(|o| o.slot))
    }

    /// Whether every operation has succeeded, except that those on `slots` may still run, and an
    /// in-sync member is among those that have.
    pub(crate) fn has_succeeded_but_for(&self, slots: u16) -> bool {
        let len = self.outcomes.len;
        let all = self.running[..len].iter().zip(&self.outcomes.list);
        let mut outcomes = all.filter_map(|(op, outcome)| Some((op.is_some(), (*outcome)?)));
        let good = |(runs, outcome): (bool, Outcome)| match runs {
            true => slots & (1 << outcome.slot) != 0,
            false => outcome.result.is_ok(),
        };
        outcomes.all(good) && self.outcomes.common_error(self.watch).is_none()
    }

    /// Whether the operations still running may be given up: whoever is still in-sync has
    /// answered, or one of them has succeeded, or there is one that this was not meant for.
    ///
    /// Where all have stalled, the first that answers at last does not condemn the others: they
    /// have a step more (R8).
    fn may_end(&self) -> bool {
        if self.proved == Some(self.watch.tick.get()) {
            return false;
        }
        let asked = self.outcomes.iter().fold(0, |all, o| all | 1 << o.slot);
        self.limited
            || self.watch.is_beyond(asked)
            || self.outcomes.common_error(self.watch).is_none()
            || self.waiting().all(|slot| !self.watch.is_in_sync(slot))
    }
}

impl<Op: Future<Output = Result<(), Errno>> + Unpin> Future for FanOut<'_, Op> {
    type Output = Outcomes;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Outcomes> {
        let this = self.get_mut();
        let mut pending = false;
        let len = this.outcomes.len;
        let all = this.running[..len].iter_mut();
        for (running, outcome) in all.zip(&mut this.outcomes.list) {
            let (Some(op), Some(outcome)) = (running.as_mut(), outcome.as_mut()) else {
                continue;
            };
            match Pin::new(op).poll(context) {
                Poll::Ready(result) => {
                    outcome.result = result;
                    *running = None;
                }
                Poll::Pending => pending = true,
            }
        }
        if !pending {
            return Poll::Ready(this.outcomes);
        }
        if this.proved.is_none() && this.outcomes.common_error(this.watch).is_none() {
            this.proved = Some(this.watch.tick.get());
        }
        let late = this.watch.tick.get() - this.begun > TICKS_PER_DEADLINE;
        if late && this.may_end() || this.waiting().all(|slot| this.watch.is_lost(slot)) {
            this.waiting().for_each(|slot| this.watch.has_stalled(slot));
            // Dropping the operations leaves them to the disk as orphans.
            return Poll::Ready(this.outcomes);
        }
        if this.place.is_none() {
            this.place = Some(this.watch.take_place(context.waker()));
        }
        Poll::Pending
    }
}

impl<Op> Drop for FanOut<'_, Op> {
    fn drop(&mut self) {
        if let Some(place) = self.place.take() {
            self.watch.leave(place);
        }
    }
}

#[cfg(test)]
#[path = "fan_out_tests.rs"]
mod tests;
