//! Whether a device may have a slot, and which.

use super::{Mirror, Running, Slot};
use crate::ControlError;
use crate::control::ErrorKind;
use crate::host::{Disk, Host};
use crate::superblock::SlotState;

pub(super) fn refuse(message: String) -> ControlError {
    ControlError::new(ErrorKind::Refused, message)
}

fn owes_answers(path: &str) -> ControlError {
    let message =
        format!("{path} still owes answers to requests from before it was lost; try again later");
    ControlError::new(ErrorKind::Busy, message)
}

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
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
