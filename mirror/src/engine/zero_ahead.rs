//! Zeroing extents before anybody writes to them.
//!
//! The first write to an unwritten extent waits until the extent's data area has been zeroed
//! (R11, `heat.rs`). Where a member has no cheap way to do that, it means 4 MiB of writes and a
//! flush. This task does it beforehand: for the extents after one that a sequential writer has
//! just begun, and, while nothing is requested, for a stock of the lowest unwritten ones.
//!
//! # Promise
//!
//! An extent is *ahead* on a slot only while the slot's member holds zeroes in it durably: it was
//! zeroed, the member was flushed afterwards, and since then the member has been receiving and
//! the extent unwritten. Nothing is recorded on disk: after a restart, and for a member that
//! joins, nothing is ahead.
//!
//! # Why no lock is needed
//!
//! While it is being zeroed an extent counts as one in preparation, so that a writer waits and
//! a second zeroing cannot come after the writer's data. The task is inside the gate, so that
//! no member joins meanwhile.

use super::{Mirror, Receiver};
use crate::host::{Disk, Errno, Host};
use crate::layout::SLOTS_MAX;
use dirty_map::{Extent, ExtentState};
use std::collections::BTreeSet;
use std::rc::Rc;

/// Extents zeroed in idle time and not used yet: 4 GiB. All of the device would wear a flash
/// disk out for nothing, because what is ahead is forgotten at a restart.
const STOCK: usize = 1024;
/// Extents zeroed ahead of a sequential writer, and with one flush: 32 MiB.
const BATCH: u32 = 8;

/// Sequential writers that are told apart.
const STREAMS: usize = 4;

/// What is known to be zero.
pub(super) struct ZeroAhead {
    /// For each slot, the extents that are ahead.
    ahead: [BTreeSet<Extent>; SLOTS_MAX],
    /// The last extents that were first written to, newest first: a writer who goes on from
    /// one of them is sequential.
    recent: [Extent; STREAMS],
    /// A sequential writer will want the extents from here on.
    wanted: Option<Extent>,
    /// Nothing was requested in the last tick.
    idle: bool,
    /// Requests answered until the last tick.
    requests: u64,
    /// Where the search for unwritten extents goes on.
    cursor: u32,
    /// Whether the search has found any since it began at the first extent.
    found: bool,
    /// A whole search found nothing, or zeroing failed: no more of it until a member leaves.
    done: bool,
}

impl Default for ZeroAhead {
    fn default() -> Self {
        Self {
            ahead: Default::default(),
            recent: [Extent(u32::MAX); STREAMS],
            wanted: None,
            idle: false,
            requests: 0,
            cursor: 0,
            found: false,
            done: false,
        }
    }
}

impl ZeroAhead {
    /// Whether the member in `slot` holds zeroes in `extent`.
    pub(super) fn contains(&self, slot: u8, extent: Extent) -> bool {
        self.ahead[usize::from(slot)].contains(&extent)
    }

    /// Whether nothing was requested in the last tick.
    pub(super) fn is_idle(&self) -> bool {
        self.idle
    }

    /// A member joins in `slot`.
    pub(super) fn forget(&mut self, slot: u8) {
        self.ahead[usize::from(slot)].clear();
        (self.cursor, self.done) = (0, false);
    }

    /// `extent` is about to be written to for the first time.
    pub(super) fn used(&mut self, extent: Extent) {
        for ahead in &mut self.ahead {
            ahead.remove(&extent);
        }
        let before = |recent: &Extent| recent.0.checked_add(1) == Some(extent.0);
        if self.recent.iter().any(before) {
            self.wanted = extent.0.checked_add(1).map(Extent);
        }
        self.recent.rotate_right(1);
        self.recent[0] = extent;
    }
}

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// The zeroing task.
    pub(super) async fn run_zero_ahead(self: Rc<Self>) {
        loop {
            let batch = self.ahead_wanted.until(|| self.next_to_zero()).await;
            let _pass = self.gate.enter().await;
            if self.stopping.get() {
                continue;
            }
            let claimed = self.claim(&batch);
            if let Err(errno) = self.zero_claimed(&claimed).await {
                tracing::warn!("zeroing extents ahead of their use failed: {errno}");
                self.ahead.borrow_mut().done = true;
            }
            let mut maps = self.maps.borrow_mut();
            for extent in &claimed {
                maps.preparing.remove(extent);
            }
            drop(maps);
            self.prepared.wake_all();
        }
    }

    /// Once a tick: whether there is time for the stock.
    pub(super) fn note_idle(&self) {
        let requests = {
            let counts = self.counts.borrow();
            counts.reads + counts.writes + counts.flushes + counts.discards
        };
        let mut ahead = self.ahead.borrow_mut();
        ahead.idle = ahead.requests == requests;
        ahead.requests = requests;
        if ahead.idle {
            self.ahead_wanted.wake_all();
        }
    }

    /// The members that have to write zeroes themselves.
    fn without_cheap_zeroes(&self) -> Vec<Receiver<D>> {
        let config = self.config.borrow();
        let view = self.view();
        let plain = view.receivers.iter().filter(|receiver| {
            !receiver.geometry.cheap_zeroes && !config.slots[usize::from(receiver.slot)].zeroed
        });
        plain.cloned().collect()
    }

    /// The next extents worth zeroing.
    fn next_to_zero(&self) -> Option<Vec<Extent>> {
        if self.stopping.get() || self.write_blocked.get() {
            return None;
        }
        let mut ahead = self.ahead.borrow_mut();
        if ahead.wanted.is_none() && !ahead.idle {
            return None;
        }
        let targets = self.without_cheap_zeroes();
        let lacks = |ahead: &ZeroAhead, extent| {
            targets
                .iter()
                .any(|target| !ahead.contains(target.slot, extent))
                && self.maps.borrow().states.get(extent) == ExtentState::Unwritten
        };
        let end = self.maps.borrow().states.len();
        if let Some(first) = ahead.wanted.take() {
            let window = first.0..end.min(first.0.saturating_add(BATCH));
            let batch: Vec<Extent> = window.map(Extent).filter(|&e| lacks(&ahead, e)).collect();
            // A window that is half full can wait: fewer, larger steps.
            if batch.len() * 2 >= BATCH as usize {
                return Some(batch);
            }
        }
        if !ahead.idle || ahead.done || targets.is_empty() {
            return None;
        }
        let stock = targets
            .iter()
            .map(|t| ahead.ahead[usize::from(t.slot)].len());
        let stock = stock.min().unwrap_or(0);
        let mut batch = Vec::new();
        while batch.len() < BATCH as usize && stock + batch.len() < STOCK {
            let from = Extent(ahead.cursor);
            let Some(extent) = self
                .maps
                .borrow()
                .states
                .next_in(ExtentState::Unwritten, from)
            else {
                // Once more from the beginning, unless that has just been all.
                ahead.done = !std::mem::replace(&mut ahead.found, false);
                (ahead.cursor, ahead.idle) = (0, false);
                break;
            };
            ahead.cursor = extent.0 + 1;
            if lacks(&ahead, extent) {
                ahead.found = true;
                batch.push(extent);
            }
        }
        (!batch.is_empty()).then_some(batch)
    }

    /// Takes those extents of `batch` that still need it into preparation.
    fn claim(&self, batch: &[Extent]) -> Vec<Extent> {
        let mut maps = self.maps.borrow_mut();
        let free = |extent: &Extent| {
            maps.states.get(*extent) == ExtentState::Unwritten && !maps.preparing.contains(extent)
        };
        let claimed: Vec<Extent> = batch.iter().copied().filter(free).collect();
        maps.preparing.extend(&claimed);
        claimed
    }

    async fn zero_claimed(&self, claimed: &[Extent]) -> Result<(), Errno> {
        let targets = self.without_cheap_zeroes();
        if claimed.is_empty() || targets.is_empty() {
            return Ok(());
        }
        let failures = self.flush_failures.get();
        for &extent in claimed {
            let lacking = self.zero_on_each(&targets, self.extent_bytes(extent)).await;
            if let Some(&errno) = lacking.iter().flatten().next() {
                // Nobody asked for this write: its failure loses nobody.
                return Err(errno);
            }
        }
        self.flush_zeroes(failures).await?;
        let count = claimed.len() as u64;
        self.count(|counts| counts.extents_zeroed_ahead += count);
        // Who receives now has done so all the time: nobody joins while this is in the gate.
        let receiving = self.view();
        let mut ahead = self.ahead.borrow_mut();
        for target in &targets {
            if receiving.receivers.iter().any(|r| r.slot == target.slot) {
                ahead.ahead[usize::from(target.slot)].extend(claimed);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "zero_ahead_tests.rs"]
mod tests;
