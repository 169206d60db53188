//! Whether a device may have a slot, and which; how a former member comes back to its own.

use super::member_io::{Surveyed, own_extents, own_hot_extents};
use super::{Mirror, Running, Slot};
use crate::ControlError;
use crate::assemble::{Verdict, judge_return};
use crate::control::{ErrorKind, ResyncKind};
use crate::host::{Disk, Host};
use crate::split;
use crate::superblock::{SlotState, Superblock};
use dirty_map::{Extent, ExtentState};

/// How a former member is to be brought back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Return {
    /// By full resync where a delta is not possible.
    pub full: bool,
    /// Giving up what it has changed by itself (split brain).
    pub discard_changes: bool,
    /// Only say what would be done.
    pub dry_run: bool,
}

impl Return {
    /// By delta or not at all.
    pub const DELTA: Self = Self {
        full: false,
        discard_changes: false,
        dry_run: false,
    };
    /// By full resync where a delta is not possible.
    pub const FULL: Self = Self {
        full: true,
        ..Self::DELTA
    };
}

/// How a former member comes back, and why.
pub(super) struct Decision {
    pub(super) kind: ResyncKind,
    pub(super) reason: String,
    /// Extents of its own that join its missed map where they are in use here.
    pub(super) own_hot: Vec<Extent>,
    /// The slots whose missed maps on it do as well.
    pub(super) parted: Option<Vec<u8>>,
}

impl Decision {
    fn new(kind: ResyncKind, reason: String) -> Self {
        Self {
            kind,
            reason,
            own_hot: Vec::new(),
            parted: None,
        }
    }
}

pub(super) fn refuse(message: String) -> ControlError {
    ControlError::new(ErrorKind::Refused, message)
}

fn owes_answers(path: &str) -> ControlError {
    let message =
        format!("{path} still owes answers to requests from before it was lost; try again later");
    ControlError::new(ErrorKind::Busy, message)
}

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// Which resync, why, and what joins the missed map of a former member.
    pub(super) fn decide_return(
        &self,
        surveyed: &Surveyed,
        how: Return,
    ) -> Result<Decision, ControlError> {
        let config = self.config.borrow();
        let superblock = &surveyed.seen.superblock;
        let record = config.slots.get(usize::from(superblock.own_slot));
        let in_config = record.and_then(|r| r.member) == Some(superblock.member);
        let verdict = judge_return(&config, &surveyed.seen);
        let refusal = verdict.refusal().unwrap_or_default();
        let own_hot = || own_hot_extents(&surveyed.states, self.maps.borrow().states.len());
        match verdict {
            Verdict::InSync => Err(refuse(format!("{} is in-sync already", surveyed.seen.path))),
            Verdict::Delta { own_hot: false } => {
                let reason = "its loss was recorded block-exactly".to_owned();
                Ok(Decision::new(ResyncKind::Delta, reason))
            }
            Verdict::Delta { own_hot: true } => {
                let own_hot = own_hot();
                let count = own_hot.len();
                let reason =
                    format!("what it missed is known, with {count} extents it was writing");
                Ok(Decision {
                    own_hot,
                    ..Decision::new(ResyncKind::Delta, reason)
                })
            }
            Verdict::Refused { .. } if how.discard_changes && in_config => {
                self.decide_giving_up(surveyed, how.full)
            }
            Verdict::Full { reason } if how.full => Ok(Decision::new(ResyncKind::Full, reason)),
            Verdict::Refused { reason } if how.full && in_config => {
                Ok(Decision::new(ResyncKind::Full, reason))
            }
            Verdict::Full { .. } | Verdict::Refused { .. } => Err(refuse(refusal)),
        }
    }

    /// Whether a member has come no further than this mirror knows: nobody has gone on with it.
    pub fn is_past(&self, member: &Superblock) -> bool {
        let config = self.config.borrow();
        let record = config.slots.get(usize::from(member.own_slot));
        let lost_at = record.and_then(|record| record.loss).map(|loss| loss.epoch);
        let epoch = member.epoch.id;
        member.mirror == config.mirror && (config.descends_from(epoch) || lost_at == Some(epoch))
    }

    /// Where the members were that are away, and that nobody has taken out or still owes answers to.
    pub fn may_return(&self) -> Vec<String> {
        if self.stopping.get() {
            return Vec::new();
        }
        self.release_idle_disks();
        let (config, slots) = (self.config.borrow(), self.slots.borrow());
        let away = slots.iter().zip(&config.slots).filter(|(slot, record)| {
            let idle = slot.running == Running::Absent && slot.disk.is_none();
            idle && !slot.held_out && record.member.is_some()
        });
        away.map(|(slot, _)| slot.path.clone()).collect()
    }

    /// The slot for a new disk: an empty one, else one whose member is gone.
    pub(super) fn free_slot(&self) -> Option<u8> {
        let config = self.config.borrow();
        let slots = self.slots.borrow();
        let absent = |slot: &usize| slots[*slot].running == Running::Absent;
        let free: Vec<usize> = (0..slots.len()).filter(absent).collect();
        let empty = free
            .iter()
            .find(|&&slot| config.slots[slot].state == SlotState::Empty);
        empty
            .or(free.first())
            .and_then(|&slot| u8::try_from(slot).ok())
    }

    /// The same for one that went on by itself, and gives up what it has changed.
    fn decide_giving_up(&self, surveyed: &Surveyed, full: bool) -> Result<Decision, ControlError> {
        match split::changed_by(&self.config.borrow(), &surveyed.seen) {
            Ok(slots) => {
                // What it discarded it does not call missed by anybody.
                let changed = |state| state != ExtentState::Cool;
                let extents = self.maps.borrow().states.len();
                let reason = "it gives up what it has changed by itself";
                Ok(Decision {
                    own_hot: own_extents(&surveyed.states, extents, changed),
                    parted: Some(slots),
                    ..Decision::new(ResyncKind::Delta, reason.to_owned())
                })
            }
            Err(reason) if full => Ok(Decision::new(ResyncKind::Full, reason)),
            Err(reason) => Err(refuse(format!(
                "{reason}; only a full resync can bring it back: use --full as well"
            ))),
        }
    }

    /// Whether the device at `path` is not in service, and no earlier incarnation of it has
    /// operations outstanding (R6).
    pub(super) fn owes_nothing(&self, path: &str) -> Result<(), ControlError> {
        self.release_idle_disks();
        let slots = self.slots.borrow();
        if slots
            .iter()
            .any(|s| s.path == path && s.running != Running::Absent)
        {
            return Err(refuse(format!("{path} is in service already")));
        }
        let held = |s: &Slot<D>| s.path == path && s.running == Running::Absent && s.disk.is_some();
        if slots.iter().any(held) {
            Err(owes_answers(path))
        } else {
            Ok(())
        }
    }

    pub(super) fn may_join(&self, slot: u8, path: &str) -> Result<(), ControlError> {
        self.release_idle_disks();
        let slots = self.slots.borrow();
        let state = &slots[usize::from(slot)];
        if state.running != Running::Absent {
            return Err(refuse(format!(
                "slot {slot} has a member in service ({})",
                state.path
            )));
        }
        if state.disk.is_some() {
            return Err(owes_answers(path));
        }
        if self
            .resync
            .borrow()
            .as_ref()
            .is_some_and(|resync| !resync.finished)
        {
            return Err(ControlError::new(
                ErrorKind::Busy,
                "another member is resyncing; wait for it (`mirrorctl wait`)",
            ));
        }
        Ok(())
    }
}
