//! Requests to one member that get no answer: whether that member has stalled, or all have.
//!
//! A request that went to one member cannot be judged by the others' outcomes as one that went to
//! all can (R8). So when three quarters of the deadline have passed the other in-sync members are
//! asked something: a copy of their superblock, each of them once at a time whoever waits. Only
//! when one of them answers well, and the first member has not answered a step later, has it
//! stalled, and the caller gives it up. While nobody answers everybody waits: a fault that all
//! share ends some time, and then nobody has been lost for it.

use super::fan_out::{Limited, TICKS_PER_DEADLINE};
use super::{Mirror, Receiver, front, member_io};
use crate::host::{Disk, DiskRequest, Errno, Host};
use crate::layout::SLOTS_MAX;
use crate::superblock::{COPY_A_OFFSET, COPY_BYTES};
use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// After so many steps the others are asked; two more are left for what they say.
const STEPS_ALONE: u64 = TICKS_PER_DEADLINE - 2;

/// What a member has been asked.
struct Probe<D: Disk> {
    disk: Rc<D>,
    op: D::Op,
}

/// What members have been asked, by slot, and when they last answered well.
pub(super) struct Probes<D: Disk> {
    under_way: RefCell<[Option<Probe<D>>; SLOTS_MAX]>,
    answered: [Cell<Option<Duration>>; SLOTS_MAX],
}

impl<D: Disk> Default for Probes<D> {
    fn default() -> Self {
        Self {
            under_way: RefCell::new([const { None }; SLOTS_MAX]),
            answered: [const { Cell::new(None) }; SLOTS_MAX],
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
        let mut op = receiver.disk.submit(request);
        let deadline = self.options.deadline;
        if !receiver.in_sync {
            return member_io::timed(&*self.host, &mut op, deadline).await;
        }
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

    /// Waits for the operation of an in-sync member that has let most of the deadline pass.
    async fn outlast(&self, receiver: &Receiver<D>, mut op: D::Op) -> Result<(), Errno> {
        let (slot, since) = (receiver.slot, self.host.now());
        let mut stalled = false;
        // Without others it waits: the last in-sync member is never lost, so that what is left to
        // it would outlive its range lock and strike at later writes (R13).
        while self.stalls.is_in_sync(slot) {
            self.ask_others(slot);
            if let Some(result) = member_io::in_time(&*self.host, &mut op, self.step()).await {
                return result;
            }
            let others_answer = self.others_answer(slot, since);
            if stalled && others_answer {
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

    /// Asks every in-sync member but the one in `slot` that has not been asked.
    fn ask_others(&self, slot: u8) {
        let view = self.view();
        let mut under_way = self.probes.under_way.borrow_mut();
        for other in view
            .receivers
            .iter()
            .filter(|r| r.in_sync && r.slot != slot)
        {
            let probe = &mut under_way[usize::from(other.slot)];
            let asked = probe.as_ref();
            if asked.is_some_and(|asked| Rc::ptr_eq(&asked.disk, &other.disk)) {
                continue;
            }
            let buffer = self.host.allocate_unzeroed(COPY_BYTES);
            let read = DiskRequest::Read {
                offset: COPY_A_OFFSET,
                span: front(&buffer, COPY_BYTES),
            };
            *probe = Some(Probe {
                op: other.disk.submit(read),
                disk: other.disk.clone(),
            });
        }
    }

    /// Whether an in-sync member other than that in `slot` has answered well since then.
    fn others_answer(&self, slot: u8, since: Duration) -> bool {
        let mut under_way = self.probes.under_way.borrow_mut();
        let mut context = Context::from_waker(Waker::noop());
        for (probe, answered) in under_way.iter_mut().zip(&self.probes.answered) {
            let Some(asked) = probe else {
                continue;
            };
            if let Poll::Ready(result) = Pin::new(&mut asked.op).poll(&mut context) {
                if result.is_ok() {
                    answered.set(Some(self.host.now()));
                }
                *probe = None;
            }
        }
        let others = (0..).zip(&self.probes.answered);
        let mut others =
            others.filter(|(other, _)| *other != slot && self.stalls.is_in_sync(*other));
        others.any(|(_, answered)| answered.get().is_some_and(|at| at >= since))
    }
}
