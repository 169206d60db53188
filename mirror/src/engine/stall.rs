//! Requests to one member that get no answer: whether that member has stalled, or all have.
//!
//! A request that went to one member cannot be judged by the others' outcomes as one that went to
//! all can (R8). So when three quarters of the deadline have passed the other in-sync members are
//! asked something: a copy of their superblock, each of them once at a time whoever waits. Only
//! when one of them answers well, and the first member has not answered a step later, has it
//! stalled, and the caller gives it up. While nobody answers everybody waits: a fault that all
//! share ends some time, and then nobody has been lost for it. (A cache may answer for a disk that
//! hangs with the first one: then that one is lost although all were to blame.)

use super::fan_out::{Limited, TICKS_PER_DEADLINE};
use super::{Mirror, Receiver, front, member_io};
use crate::host::{Disk, DiskRequest, Errno, Host};
use crate::layout::SLOTS_MAX;
use crate::superblock::{COPY_A_OFFSET, COPY_B_OFFSET, COPY_BYTES};
use std::cell::RefCell;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// After so many steps the others are asked; two more are left for what they say.
const STEPS_ALONE: u64 = TICKS_PER_DEADLINE - 2;

/// What a member has been asked. The disk is not held by it: one that is lost or removed is closed
/// when nothing is under way on it, whoever asked.
struct Probe<D: Disk> {
    disk: Weak<D>,
    op: D::Op,
}

/// What members have been asked.
struct Asked<D: Disk> {
    under_way: Option<Probe<D>>,
    /// So many times it has answered well.
    answers: u64,
    /// Where the copy of its superblock lies that is asked for next: the other one after an error,
    /// so that a bad sector does not make it mute.
    offset: u64,
}

/// What members have been asked, by slot.
pub(super) struct Probes<D: Disk>(RefCell<[Asked<D>; SLOTS_MAX]>);

impl<D: Disk> Default for Probes<D> {
    fn default() -> Self {
        let asked = || Asked {
            under_way: None,
            answers: 0,
            offset: COPY_A_OFFSET,
        };
        Self(RefCell::new(std::array::from_fn(|_| asked())))
    }
}

impl<D: Disk> Asked<D> {
    /// Takes note of an answer that has come.
    fn look(&mut self) {
        let mut context = Context::from_waker(Waker::noop());
        let Some(probe) = &mut self.under_way else {
            return;
        };
        if let Poll::Ready(result) = Pin::new(&mut probe.op).poll(&mut context) {
            match result {
                Ok(()) => self.answers += 1,
                Err(_) => self.offset = COPY_A_OFFSET + COPY_B_OFFSET - self.offset,
            }
            self.under_way = None;
        }
    }
}

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// Sends one request to one member. `TIMED_OUT` says that it has stalled; the caller then
    /// begins its loss before it waits for anything.
    pub(super) async fn to_one(
        &self,
        receiver: &Receiver<D>,
        request: DiskRequest<H::Buffer>,
    ) -> Result<(), Errno> {
        if !self.receives(receiver) {
            // To one that is lost nothing is sent any more.
            return Err(Errno::TIMED_OUT);
        }
        let mut op = receiver.disk.submit(request);
        let alone = self.step() * u32::try_from(STEPS_ALONE).unwrap_or(1);
        match member_io::in_time(&*self.host, &mut op, alone).await {
            Some(result) => result,
            None => self.outlast(receiver, op).await,
        }
    }

    /// [`Mirror::to_one`] for the data path and an in-sync member: without a timer of its own.
    pub(super) async fn read_from(
        &self,
        receiver: &Receiver<D>,
        read: DiskRequest<H::Buffer>,
    ) -> Result<(), Errno> {
        let mut op = receiver.disk.submit(read);
        // A tick may come at once: one less.
        match Limited::new(&self.stalls, &mut op, STEPS_ALONE - 1).await {
            Some(result) => result,
            None => Box::pin(self.outlast(receiver, op)).await,
        }
    }

    /// Waits for the operation of a member that has let most of the deadline pass.
    async fn outlast(&self, receiver: &Receiver<D>, mut op: D::Op) -> Result<(), Errno> {
        let slot = receiver.slot;
        let before = self.answers();
        let mut stalled = false;
        // Without others it waits: the last in-sync member is never lost, so that what is left to
        // it would outlive its range lock and strike at later writes (R13).
        while self.receives(receiver) {
            self.ask_others(slot);
            if let Some(result) = member_io::in_time(&*self.host, &mut op, self.step()).await {
                return result;
            }
            let now = self.answers();
            let answers = |other: u8| now[usize::from(other)] > before[usize::from(other)];
            let view = self.view();
            let mut others = view.receivers.iter().filter(|r| r.slot != slot);
            let others_answer = others.any(|r| r.in_sync && answers(r.slot));
            if stalled && others_answer {
                self.stalls.has_stalled(slot);
                break;
            }
            // A fault that all share may have ended in this moment: one step more.
            stalled = others_answer;
        }
        Err(Errno::TIMED_OUT)
    }

    fn step(&self) -> Duration {
        self.options.deadline / u32::try_from(TICKS_PER_DEADLINE).unwrap_or(1)
    }

    /// Whether requests still go to this member.
    fn receives(&self, member: &Receiver<D>) -> bool {
        let view = self.view();
        let mut receivers = view.receivers.iter();
        receivers.any(|r| Rc::ptr_eq(&r.disk, &member.disk))
    }

    /// Asks every in-sync member but the one in `slot` that has not been asked.
    fn ask_others(&self, slot: u8) {
        let view = self.view();
        let mut all = self.probes.0.borrow_mut();
        for other in view
            .receivers
            .iter()
            .filter(|r| r.in_sync && r.slot != slot)
        {
            let asked = &mut all[usize::from(other.slot)];
            let same = |probe: &Probe<D>| probe.disk.as_ptr() == Rc::as_ptr(&other.disk);
            if asked.under_way.as_ref().is_some_and(same) {
                continue;
            }
            let buffer = self.host.allocate_unzeroed(COPY_BYTES);
            let read = DiskRequest::Read {
                offset: asked.offset,
                span: front(&buffer, COPY_BYTES),
            };
            asked.under_way = Some(Probe {
                op: other.disk.submit(read),
                disk: Rc::downgrade(&other.disk),
            });
        }
    }

    /// How many times the member in each slot has answered well: those that were asked in an earlier
    /// stall, and had answered since, included.
    fn answers(&self) -> [u64; SLOTS_MAX] {
        let mut all = self.probes.0.borrow_mut();
        all.iter_mut().for_each(Asked::look);
        std::array::from_fn(|slot| all[slot].answers)
    }
}
