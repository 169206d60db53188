//! A simulated disk that keeps barriers, as one behind an export server of ours does.

use super::SimDisk;
use super::disk::Pending;
use crate::host::{DiskRequest, Errno};
use crate::order::{Order, Turn};
use std::collections::VecDeque;

/// What waits for barriers, in the order in which it was asked for.
#[derive(Default)]
pub(super) struct Held {
    order: Order,
    waiting: VecDeque<(u64, Pending)>,
}

impl Held {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Pending> {
        self.waiting.iter().map(|(_, pending)| pending)
    }

    pub(super) fn into_waiting(self) -> impl Iterator<Item = Pending> {
        self.waiting.into_iter().map(|(_, pending)| pending)
    }
}

impl SimDisk {
    /// From now on it is behind a network, and keeps barriers.
    pub fn keep_order(&self) {
        self.alter(|geometry| {
            geometry.behind_network = true;
            geometry.keeps_order = true;
        });
    }

    /// Another session, of which the disk has refused nothing. What waits in the old one is done
    /// with before.
    pub(super) fn order_anew(&self) {
        let mut held = self.held().borrow_mut();
        if held.waiting.is_empty() {
            held.order = Order::default();
        }
    }

    /// Begins an operation, or lets it wait for the barriers before it.
    pub(super) fn in_order(&self, mut pending: Pending, barrier: bool) {
        let mut held = self.held().borrow_mut();
        let (ticket, changes) = (held.order.ticket(), changes(&pending.request));
        if barrier {
            pending.barrier = Some(held.order.barrier_begins());
        } else if changes && held.order.turn(ticket) == Turn::Wait {
            return held.waiting.push_back((ticket, pending));
        }
        let refused = !barrier && changes && held.order.turn(ticket) == Turn::Refused;
        drop(held);
        if refused {
            self.answer(&pending, Err(Errno::IO));
        } else {
            self.begin(pending);
        }
    }

    /// If it was a barrier, what has waited for it begins or is refused.
    pub(super) fn barrier_ended(&self, pending: &Pending, well: bool) {
        let Some(number) = pending.barrier else {
            return;
        };
        self.held().borrow_mut().order.barrier_ended(number, well);
        loop {
            let next = {
                let mut held = self.held().borrow_mut();
                let Held { order, waiting } = &mut *held;
                let due = |(ticket, _): &(u64, Pending)| order.turn(*ticket) != Turn::Wait;
                let at = waiting.iter().position(due);
                let next = at.and_then(|at| waiting.remove(at));
                next.map(|(ticket, pending)| (order.turn(ticket), pending))
            };
            match next {
                Some((Turn::Refused, pending)) => self.answer(&pending, Err(Errno::IO)),
                Some((_, pending)) => self.begin(pending),
                None => return,
            }
        }
    }

    /// What waits here waits there as well.
    pub(super) fn hold_in(&self, fork: &Self) {
        for pending in self.held().borrow().iter() {
            drop(fork.submit_as(pending.request.clone(), false));
        }
    }
}

fn changes<B>(request: &DiskRequest<B>) -> bool {
    !matches!(request, DiskRequest::Read { .. } | DiskRequest::Flush)
}
