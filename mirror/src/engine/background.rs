//! What work in the background needs of the engine: a look at extents, the foreground's latencies,
//! and the error budgets.

use super::Mirror;
use crate::budget::ErrorBudget;
use crate::host::{Disk, Host};
use crate::layout::RegionKind;
use crate::pace::Pacer;
use dirty_map::{Extent, ExtentState};
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

/// What an extent is to someone who looks at the whole device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ExtentLook {
    /// Reads as zeroes.
    Unwritten,
    /// All copies are equal.
    Cool,
    /// Written lately.
    Hot,
    /// A member lacks some of it.
    Missed,
}

/// Tells those who want to know how long a request took, when it ends.
pub(super) struct Timed<'a, H: Host, D: Disk<Buffer = H::Buffer>> {
    mirror: &'a Mirror<H, D>,
    /// None when nobody wants to know.
    began: Option<Duration>,
}

impl<H: Host, D: Disk<Buffer = H::Buffer>> Drop for Timed<'_, H, D> {
    fn drop(&mut self) {
        if let Some(began) = self.began {
            let now = self.mirror.host.now();
            for pacer in self.mirror.pacers.borrow().iter() {
                let latency = now.saturating_sub(began);
                pacer.borrow_mut().foreground(now, latency);
            }
        }
    }
}

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// The surroundings that it runs in.
    pub fn host(&self) -> &H {
        &self.host
    }

    /// How many extents are written.
    pub fn written(&self) -> u64 {
        let maps = self.maps.borrow();
        u64::from(maps.states.count(ExtentState::Cool) + maps.states.count(ExtentState::Hot))
    }

    /// What `extent`, one of the device, looks like.
    pub fn look(&self, extent: Extent) -> ExtentLook {
        let maps = self.maps.borrow();
        match maps.states.get(extent) {
            ExtentState::Unwritten | ExtentState::Discarded => ExtentLook::Unwritten,
            _ if maps.missed.iter().any(|m| m.map.any_in(extent.blocks())) => ExtentLook::Missed,
            ExtentState::Hot => ExtentLook::Hot,
            ExtentState::Cool => ExtentLook::Cool,
        }
    }

    /// Whether the members have room for what scrubs have done and found.
    pub fn keeps_scrub_log(&self) -> bool {
        let config = self.config.borrow();
        config.layout.find(RegionKind::Scrub, 0).is_some()
    }

    /// How often a member may need a block rewritten.
    pub fn error_budget(&self) -> ErrorBudget {
        self.budgets.borrow().budget()
    }

    /// The in-sync members as one number, not 0: another one when there is another member.
    pub fn members_as_number(&self) -> u64 {
        let config = self.config.borrow();
        let view = self.view();
        let in_sync = view.receivers.iter().filter(|r| r.in_sync);
        let uuids = in_sync.filter_map(|r| config.slots[usize::from(r.slot)].member);
        let (high, low) = uuids.fold((0, 0), |(high, low), uuid| {
            let (more, less) = uuid.as_u64_pair();
            (high ^ more, low ^ less)
        });
        (high ^ low).max(1)
    }

    /// Whether nothing was requested in the last second.
    pub fn is_idle(&self) -> bool {
        self.ahead.borrow().is_idle()
    }

    /// The latencies of reads, writes and flushes go to `pacer` from now on.
    pub fn sample(&self, pacer: &Rc<RefCell<Pacer>>) {
        self.pacers.borrow_mut().push(pacer.clone());
    }

    /// No latencies go to `pacer` any more.
    pub fn end_sampling(&self, pacer: &Rc<RefCell<Pacer>>) {
        let mut pacers = self.pacers.borrow_mut();
        pacers.retain(|own| !Rc::ptr_eq(own, pacer));
    }

    /// A request of the foreground begins; it ends when what is returned is dropped.
    pub(super) fn timed(&self) -> Timed<'_, H, D> {
        let wanted = !self.pacers.borrow().is_empty();
        Timed {
            mirror: self,
            began: wanted.then(|| self.host.now()),
        }
    }

    /// Counts blocks that had to be rewritten on a member, and loses it when that is more than
    /// its budget.
    pub(super) fn spend(&self, slot: u8, blocks: u64) {
        let now = self.host.now();
        let over = self.budgets.borrow_mut().rewrote(slot, blocks, now);
        let Some(reason) = over else { return };
        if !self.begin_loss(slot, &reason) {
            tracing::warn!(
                "member {} (slot {slot}) stays although {reason}: it is the last in-sync one",
                self.path_of(slot)
            );
        }
        // A member that comes back begins anew, and one that stays is not named for each block.
        self.budgets.borrow_mut().begin_anew(slot);
    }
}
