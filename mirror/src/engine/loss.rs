//! Losing a member, and rounds of superblock updates.
//!
//! # Losing (R2)
//!
//! 1. [`Mirror::begin_loss`], without waiting: the member stops receiving, its missed map takes
//!    the unflushed set, what is in flight and what is un-equalised. From here on every new
//!    write sets its missed bits.
//! 2. The losing task: those bits are committed on all other members, so that the slot record
//!    may say that the loss is block-exact (R12).
//! 3. A round writes the new epoch to their superblocks. When it is effective, the waiting
//!    writes are answered.
//!
//! # A round
//!
//! One update of the superblocks of all members that stay in-sync, then of resyncing ones and
//! of a joiner. It is effective when all of them hold it. A failure inside it starts it again
//! without that member (whose loss the repeated round records); if it fails on all in-sync
//! members, nobody is dropped, writes answer EIO, and it is tried again.
//!
//! Some members may hold what a failed attempt has sent, and a crash would make it count. So the
//! losing task follows it up with another round at once (while that fails too, writes answer
//! EIO). It descends from the attempt's epoch and counts on from its events: no two superblocks
//! of a mirror say different things under one epoch and event count, and whoever got the attempt
//! and nothing after it is recognised as behind.

use super::fan_out::FanOut;
use super::{Mirror, Running, front};
use crate::Buffer;
use crate::ControlError;
use crate::control::ErrorKind;
use crate::control::MemberRef;
use crate::host::{Disk, DiskRequest, Errno, Host};
use crate::layout::SLOTS_MAX;
use crate::records;
use crate::superblock::{COPY_A_OFFSET, COPY_B_OFFSET, COPY_BYTES, Loss, SlotState, Superblock};
use dirty_map::{ExtentState, blocks_covering};
use std::rc::Rc;
use std::time::Duration;
use uuid::Uuid;

/// Pause before a round that failed on the last survivor is tried again.
const ROUND_RETRY: Duration = Duration::from_secs(1);

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// Stops a member that failed from receiving and starts recording its loss. The last
    /// in-sync member is never lost (R8); `false` then.
    pub(super) fn begin_loss(&self, slot: u8, reason: &str) -> bool {
        self.begin_loss_as(slot, SlotState::Faulty, reason)
    }

    fn begin_loss_as(&self, slot: u8, becomes: SlotState, reason: &str) -> bool {
        {
            let mut slots = self.slots.borrow_mut();
            let others = |(at, s): (usize, &super::Slot<D>)| {
                at != usize::from(slot) && s.running == Running::InSync
            };
            let has_other = slots.iter().enumerate().any(others);
            let state = &mut slots[usize::from(slot)];
            match state.running {
                Running::Absent | Running::Losing { .. } => return true,
                Running::InSync if !has_other => return false,
                Running::InSync | Running::Resyncing => {}
            }
            tracing::warn!("member {} (slot {slot}) is lost: {reason}", state.path);
            state.running = Running::Losing { becomes };
            state.reason = Some(reason.to_owned());
        }
        self.losses_pending.set(self.losses_pending.get() + 1);
        self.refresh_view();
        let mut maps = self.maps.borrow_mut();
        let maps = &mut *maps;
        self.locks.for_each_issued(|range| {
            maps.miss(slot, blocks_covering(range.start, range.end - range.start));
        });
        let mut lacking = Vec::new();
        maps.hot.for_each_unsafe(|_, blocks| lacking.push(blocks));
        if self.sums.are_kept() {
            // Extents that begin, or could not be recorded as begun, and may cool without any
            // write: its own map may not call them hot, and its pages of them be of another time.
            let begun = maps.preparing.iter().chain(&maps.unrecorded);
            let begun = begun.filter(|extent| maps.states.get(**extent) == ExtentState::Hot);
            let anew = begun.filter(|extent| maps.sums.is_wanted(**extent));
            lacking.extend(anew.map(|extent| extent.blocks()));
        }
        for blocks in lacking {
            maps.miss(slot, blocks);
        }
        self.changed.wake_all();
        true
    }

    /// The losing task: makes judged losses effective, records a flush that failed everywhere,
    /// and replaces what a round that failed has left on some members.
    pub(super) async fn run_losses(self: Rc<Self>) {
        loop {
            let pending = || {
                self.losses_pending.get() > 0
                    || self.flush_unrecorded.get()
                    || self.attempt.borrow().is_some()
            };
            self.changed.until(|| pending().then_some(())).await;
            // A round that someone else runs right now may take this loss along.
            if self.round(|_| {}).await.is_err() {
                self.write_blocked.set(true);
                self.changed.wake_all();
                self.host.sleep(ROUND_RETRY).await;
            }
        }
    }

    /// Runs a round that applies `change` to the configuration, along with every judged loss.
    ///
    /// # Errors
    ///
    /// When no in-sync member could be written; the configuration stays as it was.
    pub(super) async fn round(&self, change: impl Fn(&mut Superblock)) -> Result<(), Errno> {
        let _turn = self.membership.enter().await;
        self.round_inside(change).await
    }

    /// [`Mirror::round`] for a caller that holds the membership already.
    pub(super) async fn round_inside(&self, change: impl Fn(&mut Superblock)) -> Result<(), Errno> {
        loop {
            let losing = self.losing();
            self.commit_missed_of(&losing).await?;
            if losing != self.losing() {
                continue;
            }
            let Some(next) = self.draw_up(&losing, &change) else {
                return Ok(());
            };
            *self.attempt.borrow_mut() = Some(next.clone());
            if let Err(errno) = self.write_superblocks(&next, true).await {
                self.changed.wake_all();
                return Err(errno);
            }
            if losing == self.losing() {
                self.write_superblocks(&next, false).await?;
            }
            if losing == self.losing() {
                self.round_effective(&losing, next);
                return Ok(());
            }
            // A member failed inside the round: again without it.
        }
    }

    /// The configuration that a round is to make effective; `None` when it is effective already.
    fn draw_up(&self, losing: &[u8], change: impl Fn(&mut Superblock)) -> Option<Superblock> {
        let config = self.config.borrow();
        let attempt = self.attempt.borrow();
        let base = attempt.as_ref().unwrap_or(&config);
        let mut next = Superblock {
            epoch: base.epoch,
            history: base.history.clone(),
            ..config.clone()
        };
        change(&mut next);
        next.flush_failed |= self.flush_unrecorded.get();
        self.record_losses(losing, &mut next);
        if attempt.is_none() && next == *config && self.all_hold_the_config() {
            // A second flush that failed everywhere has nothing new to record.
            self.flush_recorded(&next);
            self.maps.borrow_mut().effective = next.epoch.id;
            return None;
        }
        if let Some(attempt) = attempt
            .as_ref()
            .filter(|attempt| says_the_same(attempt, &next))
        {
            // Tried again and again while no disk takes it, it must not fill the history.
            return Some(attempt.clone());
        }
        let begun = next.epoch != base.epoch;
        if !begun && (!losing.is_empty() || base.epoch != config.epoch) {
            next.begin_epoch(self.host.random());
        }
        next.event_count = base.event_count + 1;
        next.updated_secs = self.host.wall_clock_secs();
        if next.epoch != config.epoch {
            next.epoch_secs = next.updated_secs;
        }
        Some(next)
    }

    /// Slots whose loss is judged but not effective.
    fn losing(&self) -> Vec<u8> {
        let slots = self.slots.borrow();
        let losing = |s: &super::Slot<D>| matches!(s.running, Running::Losing { .. });
        (0..)
            .zip(slots.iter())
            .filter(|(_, s)| losing(s))
            .map(|(slot, _)| slot)
            .collect()
    }

    /// Makes the missed maps of members being lost durable on all others.
    async fn commit_missed_of(&self, losing: &[u8]) -> Result<(), Errno> {
        if losing.is_empty() {
            return Ok(());
        }
        {
            let mut maps = self.maps.borrow_mut();
            for &slot in losing {
                maps.restart_missed(slot);
                maps.queue_missed(slot);
            }
        }
        self.commit_now().await
    }

    fn record_losses(&self, losing: &[u8], next: &mut Superblock) {
        let slots = self.slots.borrow();
        for &slot in losing {
            let state = &slots[usize::from(slot)];
            let Running::Losing { becomes } = state.running else {
                continue;
            };
            next.slots[usize::from(slot)].address = crate::create::hint(&state.path);
            let loss = Loss {
                epoch: state.epoch,
                position: state.position,
                block_exact: true,
            };
            records::loss(next, slot, becomes, loss);
        }
    }

    /// Whether every receiving member's superblock is the present one; after a start in the
    /// middle of a round some are not.
    fn all_hold_the_config(&self) -> bool {
        let (epoch, events) = {
            let config = self.config.borrow();
            (config.epoch.id, config.event_count)
        };
        let slots = self.slots.borrow();
        let receiving =
            |s: &&super::Slot<D>| matches!(s.running, Running::InSync | Running::Resyncing);
        slots
            .iter()
            .filter(receiving)
            .all(|s| (s.epoch, s.events) == (epoch, events))
    }

    /// Writes `next` to the in-sync members, or to the other receiving ones. Members that fail
    /// begin to be lost.
    async fn write_superblocks(&self, next: &Superblock, in_sync: bool) -> Result<(), Errno> {
        let view = self.view();
        let targets: Vec<_> = view
            .receivers
            .iter()
            .filter(|r| r.in_sync == in_sync)
            .collect();
        let mut lacking = [None; SLOTS_MAX];
        let mut buffers = Vec::new();
        for receiver in &targets {
            let bytes = self.superblock_for(next, receiver.slot).encode();
            let buffer = self.host.allocate(COPY_BYTES);
            buffer.fill(|out| out.copy_from_slice(&bytes));
            buffers.push(buffer);
        }
        // Copy A everywhere, then copy B: never both of one member at once.
        for offset in [COPY_A_OFFSET, COPY_B_OFFSET] {
            let mut fan_out = FanOut::new(&self.stalls);
            if !in_sync {
                // The in-sync members have the update: nobody waits for a stalled other one.
                fan_out.limit_to_deadline();
            }
            for (receiver, buffer) in targets.iter().zip(&buffers) {
                if lacking[usize::from(receiver.slot)].is_none() {
                    let span = front(buffer, COPY_BYTES);
                    let write = DiskRequest::Write {
                        offset,
                        span,
                        fua: true,
                    };
                    let op = receiver.disk.submit_barrier(write);
                    fan_out.push(receiver.slot, true, op);
                }
            }
            let outcomes = fan_out.await;
            self.lose_stalled(&outcomes, "a superblock update");
            for outcome in outcomes.iter() {
                if let Err(errno) = outcome.result {
                    lacking[usize::from(outcome.slot)] = Some(errno);
                }
            }
        }
        if in_sync {
            self.judge_lacking(&view, &lacking, "a superblock update")?;
        } else {
            for receiver in &targets {
                if let Some(errno) = lacking[usize::from(receiver.slot)] {
                    self.begin_loss(
                        receiver.slot,
                        &format!("a superblock update failed: {errno}"),
                    );
                }
            }
        }
        for receiver in targets
            .iter()
            .filter(|r| lacking[usize::from(r.slot)].is_none())
        {
            let mut slots = self.slots.borrow_mut();
            let state = &mut slots[usize::from(receiver.slot)];
            state.epoch = next.epoch.id;
            state.events = next.event_count;
        }
        Ok(())
    }

    /// The shared configuration as the member in `slot` carries it, for one attempt to write it.
    /// Counts the attempt: what a failed one has left on the disk is not what the next one says.
    pub(super) fn superblock_for(&self, config: &Superblock, slot: u8) -> Superblock {
        let (write_count, server_instance) = {
            let state = &mut self.slots.borrow_mut()[usize::from(slot)];
            state.write_count += 1;
            let disk = state.disk.as_ref();
            let instance = disk.and_then(|disk| disk.geometry().server_instance);
            (state.write_count, instance)
        };
        let member = config.slots[usize::from(slot)]
            .member
            .unwrap_or(Uuid::nil());
        Superblock {
            member,
            own_slot: slot,
            server_instance,
            handed_over: false,
            write_count,
            ..config.clone()
        }
    }

    fn round_effective(&self, losing: &[u8], next: Superblock) {
        self.flush_recorded(&next);
        self.maps.borrow_mut().effective = next.epoch.id;
        *self.config.borrow_mut() = next;
        *self.attempt.borrow_mut() = None;
        for &slot in losing {
            self.slots.borrow_mut()[usize::from(slot)].running = Running::Absent;
        }
        self.losses_pending
            .set(self.losses_pending.get() - losing.len());
        self.write_blocked.set(false);
        self.release_idle_disks();
        self.refresh_view();
        self.changed.wake_all();
    }

    /// The superblocks hold `config`. A flush that failed everywhere only after `config` was
    /// drawn up is not in it and waits for the next round.
    fn flush_recorded(&self, config: &Superblock) {
        if config.flush_failed && self.flush_unrecorded.replace(false) {
            self.changed.wake_all();
        }
    }

    /// Lets go of lost members' devices that owe nothing any more, so that the operator can
    /// pull or re-add them.
    pub(super) fn release_idle_disks(&self) {
        for state in self.slots.borrow_mut().iter_mut() {
            let idle = state
                .disk
                .as_ref()
                .is_some_and(|disk| disk.in_flight() == 0);
            if idle && state.running == Running::Absent {
                state.disk = None;
            }
        }
    }

    /// Takes a member out of service, as the operator's decision.
    ///
    /// # Errors
    ///
    /// When there is no such member or it is the last in-sync one.
    pub async fn fail(&self, member: &MemberRef) -> Result<String, ControlError> {
        let slot = self.find_member(member)?;
        self.take_out(slot, SlotState::Faulty, "failed by the operator")
            .await?;
        Ok(format!(
            "{} (slot {slot}) is out of service; the mirror goes on without it",
            self.path_of(slot)
        ))
    }

    /// Lets go of a member's device.
    ///
    /// # Errors
    ///
    /// When the member is in service and `force` is not given, or its device still owes I/O.
    pub async fn remove(&self, member: &MemberRef, force: bool) -> Result<String, ControlError> {
        let slot = self.find_member(member)?;
        let path = self.path_of(slot);
        let receiving = matches!(
            self.slots.borrow()[usize::from(slot)].running,
            Running::InSync | Running::Resyncing
        );
        if receiving && !force {
            return Err(ControlError::new(
                ErrorKind::Refused,
                format!("{path} is in service; `mirrorctl fail` it first, or use --force"),
            ));
        }
        self.take_out(slot, SlotState::Missing, "removed by the operator")
            .await?;
        self.release_idle_disks();
        if self.slots.borrow()[usize::from(slot)].disk.is_some() {
            return Err(ControlError::new(
                ErrorKind::Busy,
                format!(
                    "{path} still owes answers to earlier requests; try again when it has given them or is gone"
                ),
            ));
        }
        Ok(format!(
            "{path} (slot {slot}) is removed; bring it back with `mirrorctl re-add`"
        ))
    }

    /// Lets FLUSH and FUA work again after a flush that failed on every in-sync member: the
    /// operator accepts that what it covered may be lost (R7).
    ///
    /// # Errors
    ///
    /// When it cannot be recorded.
    pub async fn clear_flush_error(&self) -> Result<String, ControlError> {
        if !self.config.borrow().flush_failed {
            return Ok("no flush has failed on every member; there is nothing to clear".to_owned());
        }
        let _pass = self.gate.enter().await;
        let failed = |what: &str| ControlError::new(ErrorKind::Failed, what.to_owned());
        // What is left of it becomes the same on all members first, or the next power cut could
        // leave it on one of them only.
        let failures = self.flush_failures.get();
        self.rewrite_suspects().await.map_err(|errno| {
            failed(&format!(
                "what the flush covered could not be written again ({errno}); nothing is cleared, try again when the disks work"
            ))
        })?;
        let cleared = self.round(|config| config.flush_failed = false).await;
        cleared.map_err(|errno| {
            failed(&format!(
                "it could not be recorded on any in-sync member: {errno}"
            ))
        })?;
        if self.flush_failures.get() != failures {
            return Err(failed("another flush failed on every member meanwhile"));
        }
        self.maps.borrow_mut().suspect.clear_all();
        Ok("FLUSH and FUA work again; check what was written before the failed flush".to_owned())
    }

    async fn take_out(&self, slot: u8, becomes: SlotState, why: &str) -> Result<(), ControlError> {
        // On purpose, so there is time to leave it as little to miss as possible.
        if !self.stopping.get() {
            let _pass = self.gate.enter().await;
            let flushed = self.flush_inside().await;
            tracing::debug!("flush before taking out slot {slot}: {flushed:?}");
        }
        self.slots.borrow_mut()[usize::from(slot)].held_out = true;
        if !self.begin_loss_as(slot, becomes, why) {
            self.slots.borrow_mut()[usize::from(slot)].held_out = false;
            return Err(ControlError::new(
                ErrorKind::Refused,
                format!(
                    "{} is the last in-sync member; the mirror cannot go on without it (stop the mirror instead)",
                    self.path_of(slot)
                ),
            ));
        }
        self.losses_effective().await.map_err(|errno| {
            ControlError::new(
                ErrorKind::Failed,
                format!("the loss could not be recorded on the remaining members: {errno}; writes are refused until it is"),
            )
        })?;
        self.record_held_out(slot, becomes).await
    }

    /// A member that had been missing before it was failed stays out at the next start too.
    async fn record_held_out(&self, slot: u8, becomes: SlotState) -> Result<(), ControlError> {
        let state = |config: &Superblock| config.slots[usize::from(slot)].state;
        let missing = matches!(
            state(&self.config.borrow()),
            SlotState::Missing | SlotState::Stale
        );
        if !missing || becomes != SlotState::Faulty {
            return Ok(());
        }
        let recorded = self.round(|config| {
            let record = &mut config.slots[usize::from(slot)];
            if matches!(record.state, SlotState::Missing | SlotState::Stale) {
                record.state = becomes;
            }
        });
        recorded.await.map_err(|errno| {
            ControlError::new(
                ErrorKind::Failed,
                format!("it could not be recorded on any in-sync member: {errno}"),
            )
        })
    }

    /// Where the member in `slot` is, or was last.
    ///
    /// # Panics
    ///
    /// When the mirror has no such slot.
    pub fn path_of(&self, slot: u8) -> String {
        self.slots.borrow()[usize::from(slot)].path.clone()
    }

    pub(super) fn find_member(&self, member: &MemberRef) -> Result<u8, ControlError> {
        let slots = self.slots.borrow();
        let found = match member {
            MemberRef::Slot(slot) => (usize::from(*slot) < slots.len()).then_some(*slot),
            MemberRef::Path(path) => (0..)
                .zip(slots.iter())
                .find(|(_, s)| s.path == *path)
                .map(|(slot, _)| slot),
        };
        found.ok_or_else(|| {
            let known: Vec<&str> = slots.iter().map(|s| s.path.as_str()).collect();
            ControlError::new(
                ErrorKind::NotFound,
                format!(
                    "the mirror has no member {member:?}; its members are {}",
                    known.join(", ")
                ),
            )
        })
    }
}

/// Whether two configurations differ in nothing but when and under which epoch they were drawn up.
fn says_the_same(one: &Superblock, other: &Superblock) -> bool {
    let undated = |config: &Superblock| Superblock {
        epoch: other.epoch,
        history: Vec::new(),
        event_count: 0,
        updated_secs: 0,
        epoch_secs: 0,
        ..config.clone()
    };
    undated(one) == undated(other)
}
