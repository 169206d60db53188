//! Barriers: the order that a disk behind an export server keeps between a write and the changes
//! that are asked of it later.
//!
//! The write intent has to be durable on a member before data is (R1). Where the disk itself keeps
//! that order, both travel in one round trip: nobody waits on this side of the network for the
//! answer to the first.
//!
//! # What it promises
//!
//! A *barrier* is a durable write. A change (a write, write-zeroes, a discard) that a client asks for
//! while it has no answer to some barrier is *behind* it: it begins when the barriers that were asked
//! for before it have ended, and is refused when one of them has failed. Reads, flushes, and changes
//! that are asked for while every barrier has its answer, wait for nothing and are never refused.
//!
//! # Groups
//!
//! The server sees a failure before the client knows of it. Barriers that the client has asked for
//! meanwhile, and their success, say nothing of what lies behind the one that failed. So barriers come
//! in groups. A group begins with a barrier that the client asks for while no other is open: it has all
//! answers then, and knows what they mean. A failure dooms all that is behind any barrier of its group.
//!
//! ```text
//!  client   B1 first ──► B2 ──► D behind            (answers: B1 failed, B2 well)   B3 first ──► E behind
//!  server   B1 fails            D: refused, whether B2 ends well or not             B3 ends: E begins
//! ```
//!
//! Both sides keep this book: the server to obey it, the client to know what is behind a barrier, to
//! refuse it itself once the group has failed, and so that a connection that goes on in another one's
//! place asks nobody again for what was refused: the new session's book is empty. To a client a barrier
//! is open until whoever asked for it has taken its result: until then others may rely on it. That it
//! has failed counts as soon as the answer is there.

/// Groups whose failures are remembered. What is behind an older one is refused: it should long have
/// been told.
const REMEMBERED: u64 = u32::BITS as u64;

/// The barriers of one session.
#[derive(Clone, Debug, Default)]
pub struct Order {
    next: u64,
    /// Barriers that have not ended.
    open: Vec<u64>,
    group: u64,
    /// Of this group and those before it, those in which a barrier has failed, this one's bit lowest.
    failed: u32,
}

/// The place of a change behind barriers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// Barriers with lower numbers were asked for before it.
    before: u64,
    group: u64,
}

/// What becomes of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It may begin.
    Now,
    /// A barrier before it has not ended.
    Wait,
    /// A barrier of its group has failed.
    Refused,
}

impl Order {
    /// Whether a barrier has not ended: for a client, whether what it asks for now is behind one.
    #[must_use]
    pub fn is_open(&self) -> bool {
        !self.open.is_empty()
    }

    /// A barrier is asked for, `first` of a group or not; returns its number, with which it ends.
    pub fn barrier_begins(&mut self, first: bool) -> u64 {
        if first {
            self.group += 1;
            self.failed <<= 1;
        }
        let number = self.next;
        self.next += 1;
        self.open.push(number);
        number
    }

    /// A barrier has ended, well or not.
    pub fn barrier_ended(&mut self, number: u64, well: bool) {
        self.open.retain(|&open| open != number);
        if !well {
            self.barrier_failed();
        }
    }

    /// An open barrier has failed.
    pub fn barrier_failed(&mut self) {
        self.failed |= 1;
    }

    /// Whether the group of the change with this ticket is known to have failed.
    #[must_use]
    pub fn has_failed(&self, ticket: Ticket) -> bool {
        let age = self.group.saturating_sub(ticket.group);
        age < REMEMBERED && self.failed >> age & 1 == 1
    }

    /// For a client: whether what it asks for now is refused.
    #[must_use]
    pub fn refuses(&self) -> bool {
        self.is_open() && self.has_failed(self.ticket())
    }

    /// The place of a change that is asked for now, behind a barrier.
    #[must_use]
    pub fn ticket(&self) -> Ticket {
        Ticket {
            before: self.next,
            group: self.group,
        }
    }

    /// What becomes of the change with this ticket.
    #[must_use]
    pub fn turn(&self, ticket: Ticket) -> Turn {
        let age = self.group.saturating_sub(ticket.group);
        if age >= REMEMBERED || self.has_failed(ticket) {
            Turn::Refused
        } else if self.open.iter().any(|&open| open < ticket.before) {
            Turn::Wait
        } else {
            Turn::Now
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_wait_for_barriers_before_them_only() {
        let mut order = Order::default();
        let first = order.barrier_begins(true);
        let between = order.ticket();
        let second = order.barrier_begins(false);
        let after = order.ticket();
        let turns = |order: &Order| [between, after].map(|ticket| order.turn(ticket));
        assert_eq!(turns(&order), [Turn::Wait; 2]);
        order.barrier_ended(first, true);
        assert_eq!(turns(&order), [Turn::Now, Turn::Wait]);
        order.barrier_ended(second, true);
        assert_eq!(turns(&order), [Turn::Now; 2]);
        assert!(!order.is_open());
    }

    /// A barrier of the same group that comes later and ends well says nothing of the failure: its
    /// client did not know of it.
    #[test]
    fn a_failure_dooms_its_group() {
        let mut order = Order::default();
        let first = order.barrier_begins(true);
        let early = order.ticket();
        order.barrier_ended(first, false);
        assert_eq!(order.turn(early), Turn::Refused);
        let second = order.barrier_begins(false);
        let late = order.ticket();
        assert_eq!(order.turn(late), Turn::Refused, "also while one is open");
        assert!(order.refuses());
        order.barrier_ended(second, true);
        assert_eq!([early, late].map(|it| order.turn(it)), [Turn::Refused; 2]);
        assert!(!order.refuses(), "all answers are there");
    }

    #[test]
    fn the_next_group_begins_anew() {
        let mut order = Order::default();
        let failing = order.barrier_begins(true);
        let doomed = order.ticket();
        order.barrier_ended(failing, false);
        let again = order.barrier_begins(true);
        let next = order.ticket();
        assert_eq!(order.turn(next), Turn::Wait);
        assert_eq!(order.turn(doomed), Turn::Refused);
        order.barrier_ended(again, true);
        assert_eq!(order.turn(next), Turn::Now);
        assert_eq!(order.turn(doomed), Turn::Refused, "for good");
    }

    #[test]
    fn what_is_long_over_is_refused() {
        let mut order = Order::default();
        let ticket = order.ticket();
        for _ in 0..REMEMBERED - 1 {
            let number = order.barrier_begins(true);
            order.barrier_ended(number, true);
        }
        assert_eq!(order.turn(ticket), Turn::Now);
        order.barrier_begins(true);
        assert_eq!(order.turn(ticket), Turn::Refused);
    }
}
