//! Barriers: the order that a disk behind an export server keeps between a write and the changes
//! that are asked of it later.
//!
//! The write intent has to be durable on a member before data is (R1). Where the disk itself keeps
//! that order, both travel in one round trip: nobody waits on this side of the network for the
//! answer to the first.
//!
//! # What it promises
//!
//! A *barrier* is a durable write. A change (a write, write-zeroes, a discard) that is asked for
//! after it
//!
//! - begins when the barrier has ended;
//! - is refused when the barrier has failed, until a barrier that was asked for after that failure
//!   has succeeded. What was asked for in between stays refused.
//!
//! Reads and flushes wait for nothing.
//!
//! # How
//!
//! Barriers are numbered; a change's ticket is the number that the next barrier will get.
//!
//! ```text
//!  asked for:   barrier 0    change, ticket 1    barrier 1    change, ticket 2
//!  barrier 0 fails:          refused             waits for 1  refused if 1 was asked for before
//!                                                             the failure; else as 1 ends
//! ```
//!
//! Both sides keep this book: the server to obey it, the client so that a connection that goes on
//! in another one's place asks for nothing again that was refused.

use std::ops::Range;

/// The barriers of one session.
#[derive(Clone, Debug, Default)]
pub struct Order {
    next: u64,
    /// Barriers that have not ended.
    open: Vec<u64>,
    failed: Option<Failed>,
    /// Barriers `from..to` lie between one that failed and the one that has lifted it.
    refused: Range<u64>,
}

/// A failure that no barrier has lifted yet.
#[derive(Clone, Copy, Debug)]
struct Failed {
    barrier: u64,
    /// The first barrier that was asked for afterwards.
    lifted_from: u64,
}

/// What becomes of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It may begin.
    Now,
    /// A barrier before it has not ended.
    Wait,
    /// A barrier before it has failed.
    Refused,
}

impl Order {
    /// A barrier is asked for; returns its number, with which it ends.
    pub fn barrier_begins(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        self.open.push(number);
        number
    }

    /// A barrier has ended, well or not.
    pub fn barrier_ended(&mut self, number: u64, well: bool) {
        self.open.retain(|&open| open != number);
        let barrier = self.failed.map_or(number, |it| it.barrier.min(number));
        match self.failed {
            _ if !well => {
                self.failed = Some(Failed {
                    barrier,
                    lifted_from: self.next,
                });
            }
            Some(failed) if number >= failed.lifted_from => {
                // Two such ranges become one: what waits between them is refused as well.
                let empty = self.refused.is_empty();
                let from = if empty { u64::MAX } else { self.refused.start };
                self.refused = from.min(failed.barrier)..self.refused.end.max(number);
                self.failed = None;
            }
            _ => {}
        }
    }

    /// The ticket of a change that is asked for now.
    #[must_use]
    pub fn ticket(&self) -> u64 {
        self.next
    }

    /// What becomes of the change with this ticket; once it is told not to wait it is not asked
    /// about again.
    #[must_use]
    pub fn turn(&self, ticket: u64) -> Turn {
        if self.open.iter().any(|&open| open < ticket) {
            return Turn::Wait;
        }
        let fails = self.failed.is_some_and(|it| it.barrier < ticket);
        if fails || ticket > 0 && self.refused.contains(&(ticket - 1)) {
            return Turn::Refused;
        }
        Turn::Now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_wait_for_barriers_before_them_only() {
        let mut order = Order::default();
        let before = order.ticket();
        let first = order.barrier_begins();
        let between = order.ticket();
        let second = order.barrier_begins();
        let after = order.ticket();
        let turns = |order: &Order| [before, between, after].map(|ticket| order.turn(ticket));
        assert_eq!(turns(&order), [Turn::Now, Turn::Wait, Turn::Wait]);
        order.barrier_ended(second, true);
        assert_eq!(turns(&order), [Turn::Now, Turn::Wait, Turn::Wait]);
        order.barrier_ended(first, true);
        assert_eq!(turns(&order), [Turn::Now; 3]);
    }

    #[test]
    fn a_failure_refuses_until_a_later_barrier_succeeds() {
        let mut order = Order::default();
        let copies = [order.barrier_begins(), order.barrier_begins()];
        let held = order.ticket();
        order.barrier_ended(copies[0], false);
        let late = order.ticket();
        assert_eq!(order.turn(late), Turn::Wait, "for the other copy");
        // It was asked for before the failure: what it says is not about what was refused.
        order.barrier_ended(copies[1], true);
        assert_eq!(order.turn(held), Turn::Refused);
        assert_eq!(order.turn(late), Turn::Refused);
        let again = order.barrier_begins();
        let next = order.ticket();
        assert_eq!(order.turn(next), Turn::Wait);
        assert_eq!(order.turn(late), Turn::Refused);
        order.barrier_ended(again, true);
        assert_eq!(order.turn(next), Turn::Now);
        assert_eq!(order.turn(order.ticket()), Turn::Now);
        assert_eq!(order.turn(held), Turn::Refused, "for good");
    }

    #[test]
    fn each_failure_needs_a_later_barrier() {
        let mut order = Order::default();
        let first = order.barrier_begins();
        order.barrier_ended(first, false);
        let copies = [order.barrier_begins(), order.barrier_begins()];
        let held = order.ticket();
        order.barrier_ended(copies[1], true);
        assert_eq!(order.turn(held), Turn::Wait);
        order.barrier_ended(copies[0], false);
        assert_eq!(order.turn(held), Turn::Refused);
        let lifts = order.barrier_begins();
        order.barrier_ended(lifts, true);
        assert_eq!(order.turn(held), Turn::Refused);
        assert_eq!(order.turn(order.ticket()), Turn::Now);
    }
}
