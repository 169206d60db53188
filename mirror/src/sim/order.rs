//! A simulated disk that keeps barriers, as one behind an export server of ours does.
//!
//! There are two books: the disk's, and that of the client, in which a barrier is open until its result
//! has been taken.

use super::SimDisk;
use super::disk::Pending;
use crate::host::{DiskRequest, Errno};
use crate::order::{Order, Ticket, Turn};
use std::collections::VecDeque;

/// What waits for barriers, in the order in which it was asked for.
#[derive(Default)]
pub(super) struct Held {
    order: Order,
    client: Order,
    waiting: VecDeque<(Ticket, Pending)>,
}

impl Held {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Pending> {
        self.waiting.iter().map(|(_, pending)| pending)
    }

    pub(super) fn into_waiting(self) -> impl Iterator<Item = Pending> {
        self.waiting.into_iter().map(|(_, pending)| pending)
    }

    /// The same in another course of events, in which nobody waits for it.
    pub(super) fn fork(&self) -> Self {
        let waiting = self.waiting.iter();
        Self {
            order: self.order.clone(),
            client: Order::default(),
            waiting: waiting.map(|(at, it)| (*at, it.unattended())).collect(),
        }
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

    /// Another session, of which the disk has refused nothing, once the old one is done with.
    pub(super) fn order_anew(&self) {
        let mut held = self.held().borrow_mut();
        if !held.order.is_open() {
            held.order = Order::default();
            held.client = Order::default();
        }
    }

    /// Begins an operation, or lets it wait for the barriers before it; returns its number if it is one.
    pub(super) fn in_order(&self, mut pending: Pending, barrier: bool) -> Option<u64> {
        let mut held = self.held().borrow_mut();
        let open = held.client.is_open();
        let mut turn = Turn::Now;
        if barrier {
            held.client.barrier_begins(!open);
            pending.barrier = Some(held.order.barrier_begins(!open));
        } else if open && changes(&pending.request) {
            let ticket = held.order.ticket();
            turn = held.order.turn(ticket);
            if turn == Turn::Wait {
                held.waiting.push_back((ticket, pending));
                return None;
            }
        }
        drop(held);
        let number = pending.barrier;
        if turn == Turn::Refused {
            self.answer(&pending, Err(Errno::IO));
        } else {
            self.begin(pending);
        }
        number
    }

    /// The client has taken a barrier's result, or never will.
    pub(super) fn barrier_taken(&self, number: u64, well: bool) {
        self.held().borrow_mut().client.barrier_ended(number, well);
    }

    /// If it was a barrier, what has waited for it begins or is refused.
    pub(super) fn barrier_ended(&self, pending: &Pending, well: bool) {
        let Some(number) = pending.barrier else {
            return;
        };
        self.held().borrow_mut().order.barrier_ended(number, well);
        if pending.answer.borrow().abandoned {
            self.barrier_taken(number, well);
        }
        loop {
            let next = {
                let mut held = self.held().borrow_mut();
                let Held { order, waiting, .. } = &mut *held;
                let due = |(ticket, _): &(Ticket, Pending)| order.turn(*ticket) != Turn::Wait;
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
}

fn changes<B>(request: &DiskRequest<B>) -> bool {
    !matches!(request, DiskRequest::Read { .. } | DiskRequest::Flush)
}
