//! The clean stop, and handing the mirror over to another host: `mirrorctl demote` here, `mirrorctl
//! promote` there.
//!
//! # What it promises
//!
//! After a clean stop all copies are equal and every map says so.
//!
//! A member that says *handed over* may be started without those that it calls in-sync (R15):
//! nothing has been acknowledged anywhere since it was told so, and nothing will be before it has
//! been told otherwise.
//!
//! # Order, and why
//!
//! 1. The mirror stops: the gate closes, everything is flushed and cool, and the clean stop is on
//!    every in-sync member.
//! 2. From here on there is no round: one that lost the member now would let those that stay start
//!    without it as well.
//! 3. Last of all that one member's superblock gets the mark. This daemon serves nothing any more,
//!    whether that write succeeds or not, so either is right.
//! 4. A start that finds the mark on a member, and does not go by it alone, takes it away before
//!    anything else is written ([`crate::records::to_revoke`]); where it cannot, there is no start.
//!    Otherwise the start's own round could lose that member and go on without it, and the mark
//!    would let it start by itself with what is old by then.
//! 5. A start that goes by the mark alone, with nobody else in-sync, takes it away with its round,
//!    which names everybody else lost, in an epoch of its own: a degraded mirror like any other.
//!
//! A member that is not here keeps its mark. Those that are here call it in-sync, and do not start
//! without it but by force, which says that it is gone for good. When it returns to a mirror that
//! was forced, its mark goes before anything else is written to it.
//!
//! A copy of a disk that was made while it was handed over can be promoted again, like every disk
//! that is put back together with all the others ("What cannot be told" in `assemble.rs`).

use super::maps::Page;
use super::member_io::{self, Surveyed};
use super::slots::refuse;
use super::{Mirror, Running};
use crate::ControlError;
use crate::control::{ErrorKind, MemberRef};
use crate::host::{Disk, Errno, Host};
use crate::records;
use crate::superblock::LastStop;
use std::rc::Rc;
use std::time::Duration;

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// Flushes, cools every extent and records the clean stop. The front end has stopped
    /// sending requests; what still comes is answered with EIO.
    ///
    /// # Errors
    ///
    /// When the stop could not be recorded: nothing is lost, the next start is that after a
    /// crash.
    pub async fn stop(self: &Rc<Self>) -> Result<(), ControlError> {
        let _closed = self.gate.close().await;
        let result = self.stop_inside().await;
        self.stopping.set(true);
        result.map_err(|errno| {
            ControlError::new(
                ErrorKind::Failed,
                format!("the clean stop could not be recorded ({errno}); the next start will be as after a crash, nothing is lost"),
            )
        })
    }

    async fn stop_inside(&self) -> Result<(), Errno> {
        self.flush_inside().await?;
        let quiet =
            self.maps
                .borrow_mut()
                .hot
                .coolable(self.host.now(), Duration::ZERO, usize::MAX);
        if self.options.write_intent {
            self.cool(quiet).await?;
            // So that every member's maps name the last commit that wrote something (R16).
            self.maps.borrow_mut().queue_log();
            self.maps.borrow_mut().dirty.insert(Page::POSITION);
            self.commit().await?;
        }
        let clean = self.maps.borrow().hot.is_empty();
        self.round(|config| {
            if clean {
                config.last_stop = LastStop::Clean;
            }
        })
        .await
    }

    /// Stops as [`Mirror::stop`] does, and lets the member in `slot` be started without the others.
    /// Returns what has come of it, as the end of a sentence.
    ///
    /// # Errors
    ///
    /// When the clean stop or the mark could not be recorded: the mirror has stopped all the same,
    /// and starts as usual.
    pub async fn hand_over(self: &Rc<Self>, slot: u8) -> Result<String, ControlError> {
        let path = self.path_of(slot);
        self.stop().await?;
        let stopped_but = |why: String| {
            let message =
                format!("the mirror has stopped, and is not handed over to {path}: {why}");
            ControlError::new(ErrorKind::Failed, message)
        };
        // Step 2: this turn does not end.
        std::mem::forget(self.membership.enter().await);
        if self.config.borrow().last_stop != LastStop::Clean {
            let why = "its copies are not all equal yet; start it here again, and wait a little";
            return Err(stopped_but(why.to_owned()));
        }
        let disk = {
            let slots = self.slots.borrow();
            let slot = &slots[usize::from(slot)];
            slot.disk
                .clone()
                .filter(|_| slot.running == Running::InSync)
        };
        let Some(disk) = disk else {
            return Err(stopped_but(
                "it was lost meanwhile; start the mirror here, wait until it is back (`mirrorctl wait`), and demote again".to_owned(),
            ));
        };
        let config = self.config.borrow().clone();
        let mut superblock = self.superblock_for(&config, slot);
        superblock.handed_over = true;
        let stored = member_io::store_superblock(&*self.host, &*disk, &superblock);
        stored.await.map_err(|errno| {
            stopped_but(format!(
                "its superblock could not be written ({errno}). Should it have been all the same, a promotion there is safe; else start the mirror here and demote again"
            ))
        })?;
        Ok(format!("stopped and handed over to {path} (slot {slot})"))
    }

    /// The slot of a member that the mirror can be handed over to.
    ///
    /// # Errors
    ///
    /// When it is not in-sync.
    pub fn may_take_over(&self, member: &MemberRef) -> Result<u8, ControlError> {
        let slot = self.find_member(member)?;
        let path = self.path_of(slot);
        if self.slots.borrow()[usize::from(slot)].running != Running::InSync {
            return Err(refuse(format!(
                "{path} is not in-sync and cannot go on alone; wait until it is (`mirrorctl wait`), or stop the mirror without handing it over"
            )));
        }
        Ok(slot)
    }
}

/// Takes the mark of being handed over from a member, durably.
pub(super) async fn take_mark<H: Host, D: Disk<Buffer = H::Buffer>>(
    host: &H,
    disk: &D,
    surveyed: &mut Surveyed,
) -> Result<(), Errno> {
    let superblock = &mut surveyed.seen.superblock;
    records::revoke(superblock);
    member_io::store_superblock(host, disk, superblock).await
}
