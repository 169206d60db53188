//! A disk as bad as the fault model allows (README, "Fault model").
//!
//! Completed writes sit in a volatile cache until a flush or FUA; a power cut keeps any subset
//! of the cached sectors, in any order, and any subset of the sectors of writes under way.
//! Reads, writes and flushes fail on demand, and what a failed flush gave up is gone with the
//! power, whatever a later flush says; a disk can hang, or vanish and come back. A discarded
//! range reads as arbitrary bytes.

use super::content::{Content, Run, Sectors, sectors, some_of, written_by};
use super::faults::{Faults, Observer, WriteFault};
use super::op::{Answer, Ranges, Remote, SimOp};
use super::order::Held;
use super::{Rng, SECTOR, SimBuffer};
use crate::host::{Disk, DiskRequest, Errno, Geometry, SumsOp};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::ops::Range;
use std::rc::Rc;

mod look;

pub(super) struct Pending {
    pub(super) request: DiskRequest<SimBuffer>,
    pub(super) answer: Rc<RefCell<Answer>>,
    /// Cached sectors that a flush covers: those cached when it was submitted.
    covers: Option<u64>,
    /// The opening that it came through.
    opening: u32,
    /// Its number among the barriers, if it is one.
    pub(super) barrier: Option<u64>,
}

impl Pending {
    /// The same once more, for which nobody waits.
    pub(super) fn unattended(&self) -> Self {
        if let Some((buffer, device_writes)) = span_of(&self.request) {
            buffer.begin(device_writes);
        }
        Self {
            request: self.request.clone(),
            answer: Rc::default(),
            covers: self.covers,
            // It is the first one of its disk.
            opening: 0,
            barrier: self.barrier,
        }
    }
}

struct Inner {
    /// What a reader sees.
    visible: RefCell<Sectors>,
    /// What a power cut leaves in any case.
    durable: RefCell<Sectors>,
    /// What is not durable yet, oldest first, each with its number in the order in which the
    /// disk took it. What a failed flush gave up is not here: readable, and never durable.
    cache: RefCell<Vec<(u64, Run)>>,
    pending: RefCell<Vec<Pending>>,
    /// What waits for a barrier: the disk has not been given it yet.
    held: RefCell<Held>,
    faults: Cell<Faults>,
    write_fault: Cell<Option<WriteFault>>,
    bad_sectors: RefCell<BTreeSet<u64>>,
    /// Sectors that a failed flush gave up and that were not written since.
    given_up: RefCell<Vec<(u64, Run)>>,
    observer: RefCell<Option<Rc<dyn Observer>>>,
    next_number: Cell<u64>,
    /// Whether write-zeroes is one operation.
    geometry: RefCell<Geometry>,
    operations: Cell<u64>,
    /// When it tells checksums of blocks.
    tells_sums: Cell<Option<u64>>,
    /// What changes are on their way here through a network.
    on_its_way: Ranges,
    /// How often it has lost its power alone: openings from before are dead.
    outages: Cell<u32>,
}

/// A simulated disk, opened; clones are the same disk and the same opening of it. What is asked of it
/// goes through a network, if it was opened through one; what tests look at is the disk itself.
#[derive(Clone)]
pub struct SimDisk(Rc<Inner>, u32, Option<Rc<dyn Remote>>);

impl SimDisk {
    /// A disk of `size_bytes` whose untouched sectors hold `background` throughout.
    #[must_use]
    pub fn new(size_bytes: u64, background: u8) -> Self {
        let mut all = Sectors::default();
        all.put(Run {
            sectors: 0..size_bytes / SECTOR,
            content: Content::Fill(background),
        });
        Self::holding(size_bytes, all)
    }

    fn holding(size_bytes: u64, content: Sectors) -> Self {
        Self(
            Rc::new(Inner {
                visible: RefCell::new(content.clone()),
                durable: RefCell::new(content),
                cache: RefCell::default(),
                pending: RefCell::default(),
                held: RefCell::default(),
                faults: Cell::default(),
                write_fault: Cell::default(),
                bad_sectors: RefCell::default(),
                given_up: RefCell::default(),
                observer: RefCell::default(),
                next_number: Cell::new(0),
                geometry: RefCell::new(Geometry {
                    size_bytes,
                    logical_block_bytes: 512,
                    cheap_zeroes: true,
                    discard: true,
                    behind_network: false,
                    server_instance: None,
                    keeps_order: false,
                }),
                operations: Cell::new(0),
                tells_sums: Cell::default(),
                on_its_way: Ranges::default(),
                outages: Cell::new(0),
            }),
            0,
            None,
        )
    }

    /// Writes durably, from outside of any machine.
    pub fn write_now(&self, offset: u64, bytes: &[u8]) {
        let run = Run {
            sectors: sectors(offset, bytes.len() as u64),
            content: Content::of(bytes),
        };
        self.put_durably(run);
    }

    /// Reads what a reader would see, from outside of any machine, into `out`.
    pub fn read_now(&self, offset: u64, out: &mut [u8]) {
        self.0.visible.borrow().read(offset / SECTOR, out);
    }

    /// A copy of the disk as it is now, cache included: an older image for later.
    #[must_use]
    pub fn image(&self) -> Self {
        Self::holding(self.geometry().size_bytes, self.0.visible.borrow().clone())
    }

    /// The same disk in another course of events: with its cache, and with the operations
    /// under way that change it, which nobody there waits for. Until those are over there,
    /// nothing may go on here: they share their buffers.
    #[must_use]
    pub fn fork(&self) -> Self {
        let fork = Self::holding(self.geometry().size_bytes, self.0.durable.borrow().clone());
        fork.0.visible.replace(self.0.visible.borrow().clone());
        fork.0.cache.replace(self.0.cache.borrow().clone());
        fork.0
            .bad_sectors
            .replace(self.0.bad_sectors.borrow().clone());
        let given_up = self.0.given_up.borrow().clone();
        fork.0.given_up.replace(given_up);
        fork.0.next_number.set(self.0.next_number.get());
        fork.0.geometry.replace(self.geometry());
        fork.0.faults.set(self.0.faults.get());
        for pending in self.0.pending.borrow().iter() {
            let reads = matches!(pending.request, DiskRequest::Read { .. });
            if pending.opening == self.0.outages.get() && !reads {
                fork.begin(pending.unattended());
            }
        }
        fork.0.held.replace(self.0.held.borrow().fork());
        fork
    }

    /// Sets what goes wrong from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.0.faults.set(faults);
    }

    /// Sets what goes wrong with some of the writes from now on.
    pub fn set_write_fault(&self, fault: Option<WriteFault>) {
        self.0.write_fault.set(fault);
    }

    /// Changes what it says of itself, to those who open it from now on.
    pub fn alter(&self, change: impl FnOnce(&mut Geometry)) {
        change(&mut self.0.geometry.borrow_mut());
    }

    /// What goes wrong at present.
    #[must_use]
    pub fn faults(&self) -> Faults {
        self.0.faults.get()
    }

    /// Makes a sector unreadable until it is rewritten.
    pub fn spoil(&self, offset: u64) {
        self.0.bad_sectors.borrow_mut().insert(offset / SECTOR);
    }

    /// Makes every sector readable again.
    pub fn heal_all(&self) {
        self.0.bad_sectors.borrow_mut().clear();
    }

    /// Whether the sector is unreadable.
    #[must_use]
    pub fn is_spoilt(&self, offset: u64) -> bool {
        self.0.bad_sectors.borrow().contains(&(offset / SECTOR))
    }

    /// A hash of everything durable, to tell states apart.
    #[must_use]
    pub fn digest(&self) -> u64 {
        self.0.durable.borrow().digest()
    }

    /// Tells `observer` of everything from now on.
    pub fn observe(&self, observer: Option<Rc<dyn Observer>>) {
        self.0.observer.replace(observer);
    }

    fn observer(&self) -> Option<Rc<dyn Observer>> {
        self.0.observer.borrow().clone()
    }

    pub(super) fn held(&self) -> &RefCell<Held> {
        &self.0.held
    }

    pub(super) fn tells_sums(&self) -> &Cell<Option<u64>> {
        &self.0.tells_sums
    }

    /// Whether both are openings of one disk.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }

    /// Operations completed so far.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.0.operations.get()
    }

    /// The power goes: of what was cached, and of the writes under way, any subset of sectors
    /// stays, in any of the versions that the disk was given (of large writes in steps of a
    /// 32nd). `choose` picks one of so many possibilities, again and again; what it has not
    /// been asked about is the same in every outcome.
    pub fn cut_power(&self, choose: &mut impl FnMut(usize) -> usize) {
        let pending = self.0.pending.take();
        self.lose_cache(&pending, choose);
        let held = self.0.held.take().into_waiting();
        let all = pending.into_iter().chain(held);
        all.for_each(|pending| release(&pending.request));
    }

    /// The power of this disk alone goes, and comes back: what was under way fails, and so does
    /// everything through this opening of it and older ones.
    pub fn lose_power(&self, choose: &mut impl FnMut(usize) -> usize) {
        let pending = self.0.pending.take();
        self.lose_cache(&pending, choose);
        self.0.outages.set(self.0.outages.get() + 1);
        let held = self.0.held.take().into_waiting();
        for pending in pending.into_iter().chain(held) {
            self.answer(&pending, Err(Errno::NO_DEVICE));
        }
    }

    /// The disk opened anew.
    #[must_use]
    pub fn reopen(&self) -> Self {
        self.order_anew();
        Self(self.0.clone(), self.0.outages.get(), None)
    }

    /// This opening of the disk, whose operations go through `remote` from now on.
    #[must_use]
    pub fn through(&self, remote: Rc<dyn Remote>) -> Self {
        Self(self.0.clone(), self.1, Some(remote))
    }

    /// Whether the disk has lost its power since this was opened.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.1 != self.0.outages.get()
    }

    fn lose_cache(&self, pending: &[Pending], choose: &mut impl FnMut(usize) -> usize) {
        let cached = self.0.cache.take().into_iter().map(|(_, run)| run);
        let under_way = pending.iter().filter(|p| p.opening == self.0.outages.get());
        let loose: Vec<Run> = cached
            .chain(under_way.filter_map(|p| written_by(&p.request)))
            .collect();
        let mut cuts = BTreeSet::new();
        for Range { start, end } in loose.iter().map(|run| run.sectors.clone()) {
            let step = ((end - start) / 32).max(1);
            cuts.extend((start..end).step_by(usize::try_from(step).unwrap_or(1)));
            cuts.insert(end);
        }
        let mut durable = self.0.durable.borrow_mut();
        for (&start, &end) in cuts.iter().zip(cuts.iter().skip(1)) {
            let versions = || loose.iter().filter_map(|run| run.part(&(start..end)));
            let count = versions().count();
            if count > 0
                && let Some(kept) = versions().nth(choose(count + 1))
            {
                durable.put(kept);
            }
        }
        self.0.visible.borrow_mut().clone_from(&durable);
        self.0.given_up.borrow_mut().clear();
    }

    /// The daemon is gone but the disk lives on: what it had taken it finishes.
    pub fn finish_all(&self, rng: &mut Rng) {
        while self.completable() > 0 {
            let chosen = rng.index(self.completable());
            self.complete(chosen, rng);
        }
        self.order_anew();
    }

    /// Operations that may complete now.
    pub(super) fn completable(&self) -> usize {
        let pending = self.0.pending.borrow();
        match self.0.write_fault.get().filter(|fault| fault.hangs) {
            _ if self.0.faults.get().hang => 0,
            None => pending.len(),
            Some(fault) => pending
                .iter()
                .filter(|p| !fault.strikes(&p.request))
                .count(),
        }
    }

    /// Completes the `chosen`th pending operation of those that may.
    pub(super) fn complete(&self, chosen: usize, rng: &mut Rng) {
        let hangs = self.0.write_fault.get().filter(|fault| fault.hangs);
        let at = {
            let pending = self.0.pending.borrow();
            let free = |at: &usize| hangs.is_none_or(|fault| !fault.strikes(&pending[*at].request));
            (0..pending.len()).filter(free).nth(chosen)
        };
        let at = at.unwrap_or(chosen);
        let pending = self.0.pending.borrow_mut().swap_remove(at);
        let result = self.apply(&pending, rng);
        self.answer(&pending, result);
        self.barrier_ended(&pending, result.is_ok());
    }

    pub(super) fn answer(&self, pending: &Pending, result: Result<(), Errno>) {
        if let (Ok(()), Some(observer)) = (result, self.observer()) {
            observer.completed(self, &pending.request);
        }
        release(&pending.request);
        self.0.operations.set(self.0.operations.get() + 1);
        let waker = {
            let mut answer = pending.answer.borrow_mut();
            answer.result = Some(result);
            answer.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn apply(&self, pending: &Pending, rng: &mut Rng) -> Result<(), Errno> {
        let faults = self.0.faults.get();
        if faults.gone || pending.opening != self.0.outages.get() {
            return Err(Errno::NO_DEVICE);
        }
        match &pending.request {
            DiskRequest::Read { offset, span } => {
                let sectors = sectors(*offset, span.len as u64);
                if faults.reads || self.0.bad_sectors.borrow().range(sectors).next().is_some() {
                    return Err(Errno::IO);
                }
                let read = |out: &mut [u8]| self.read_now(*offset, out);
                span.buffer
                    .device_fill(span.start..span.start + span.len, read);
            }
            request @ DiskRequest::Write { fua, .. } => {
                let struck = self
                    .0
                    .write_fault
                    .get()
                    .is_some_and(|fault| fault.strikes(request));
                if faults.writes || struck {
                    self.write_some(request, rng);
                    return Err(Errno::IO);
                }
                if let Some(run) = written_by(request) {
                    if *fua {
                        self.put_durably(run);
                    } else {
                        self.put(run);
                    }
                }
            }
            DiskRequest::Flush => {
                let covers = pending.covers.unwrap_or(0);
                if faults.flushes {
                    self.give_up_some(covers, rng);
                    return Err(Errno::IO);
                }
                self.write_back(covers);
            }
            request @ DiskRequest::WriteZeroes { .. } => {
                if !self.geometry().cheap_zeroes {
                    return Err(Errno::NOT_SUPPORTED);
                }
                if faults.writes {
                    self.write_some(request, rng);
                    return Err(Errno::IO);
                }
                written_by(request)
                    .into_iter()
                    .for_each(|run| self.put(run));
            }
            request @ DiskRequest::Discard { .. } => {
                written_by(request)
                    .into_iter()
                    .for_each(|run| self.put(run));
            }
        }
        Ok(())
    }

    fn submit_as(&self, request: DiskRequest<SimBuffer>, barrier: bool) -> SimOp {
        let end = match &request {
            DiskRequest::Read { offset, span } | DiskRequest::Write { offset, span, .. } => {
                offset + span.len as u64
            }
            DiskRequest::WriteZeroes { offset, len } | DiskRequest::Discard { offset, len } => {
                offset + len
            }
            DiskRequest::Flush => 0,
        };
        assert!(
            end <= self.geometry().size_bytes,
            "a request beyond the end of the disk"
        );
        if let Some((buffer, device_writes)) = span_of(&request) {
            buffer.begin(device_writes);
        }
        let answer = Rc::new(RefCell::new(Answer::default()));
        let covers = matches!(request, DiskRequest::Flush).then(|| self.0.next_number.get());
        let pending = Pending {
            request,
            answer: answer.clone(),
            covers,
            opening: self.1,
            barrier: None,
        };
        let number = self.in_order(pending, barrier);
        SimOp::local(answer, number.map(|number| (self.clone(), number)))
    }

    /// The disk is given it.
    pub(super) fn begin(&self, pending: Pending) {
        if let Some(observer) = self.observer() {
            observer.submitted(self, &pending.request);
        }
        self.0.pending.borrow_mut().push(pending);
    }

    /// Everything cached before `covers` becomes durable, in order.
    fn write_back(&self, covers: u64) {
        let mut durable = self.0.durable.borrow_mut();
        self.0.cache.borrow_mut().retain(|(number, run)| {
            let covered = *number < covers;
            if covered {
                durable.put(run.clone());
            }
            !covered
        });
    }

    /// A failed flush: of what it covered, some will never be durable, and no later flush says
    /// so again.
    fn give_up_some(&self, covers: u64, rng: &mut Rng) {
        let mut cache = self.0.cache.borrow_mut();
        let given_up: Vec<(u64, Range<u64>)> = cache
            .iter()
            .filter(|(number, _)| *number < covers)
            .map(|(number, run)| (*number, some_of(&run.sectors, rng)))
            .collect();
        for (number, sectors) in given_up {
            let mut own: Vec<_> = cache.extract_if(.., |(of, _)| *of == number).collect();
            let lost = own
                .iter()
                .filter_map(|(of, run)| Some((*of, run.part(&sectors)?)));
            self.0.given_up.borrow_mut().extend(lost);
            Run::subtract(&mut own, &sectors);
            cache.extend(own);
        }
        cache.sort_by_key(|(number, _)| *number);
    }

    /// A failed write leaves an arbitrary part of it.
    fn write_some(&self, request: &DiskRequest<SimBuffer>, rng: &mut Rng) {
        if let Some(run) = written_by(request)
            && let Some(part) = run.part(&some_of(&run.sectors, rng))
        {
            self.put(part);
        }
    }

    fn put(&self, run: Run) {
        self.heal(&run.sectors);
        self.0.visible.borrow_mut().put(run.clone());
        let number = self.0.next_number.get();
        self.0.next_number.set(number + 1);
        self.0.cache.borrow_mut().push((number, run));
    }

    /// No older version of these sectors can come back any more.
    fn put_durably(&self, run: Run) {
        self.heal(&run.sectors);
        Run::subtract(&mut self.0.cache.borrow_mut(), &run.sectors);
        self.0.visible.borrow_mut().put(run.clone());
        self.0.durable.borrow_mut().put(run);
    }

    fn heal(&self, sectors: &Range<u64>) {
        Run::subtract(&mut self.0.given_up.borrow_mut(), sectors);
        let mut bad = self.0.bad_sectors.borrow_mut();
        if !bad.is_empty() {
            bad.retain(|sector| !sectors.contains(sector));
        }
    }
}

fn span_of(request: &DiskRequest<SimBuffer>) -> Option<(&SimBuffer, bool)> {
    match request {
        DiskRequest::Read { span, .. } => Some((&span.buffer, true)),
        DiskRequest::Write { span, .. } => Some((&span.buffer, false)),
        _ => None,
    }
}

fn release(request: &DiskRequest<SimBuffer>) {
    if let Some((buffer, device_writes)) = span_of(request) {
        buffer.end(device_writes);
    }
}

impl Disk for SimDisk {
    type Buffer = SimBuffer;
    type Op = SimOp;

    fn submit(&self, request: DiskRequest<SimBuffer>) -> SimOp {
        if let Some(remote) = &self.2 {
            return SimOp::remote(remote.submit(request, false));
        }
        self.submit_as(request, false)
    }

    fn submit_barrier(&self, request: DiskRequest<SimBuffer>) -> SimOp {
        if let Some(remote) = &self.2 {
            return SimOp::remote(remote.submit(request, true));
        }
        self.submit_as(request, self.geometry().keeps_order)
    }

    fn in_flight(&self) -> usize {
        if let Some(remote) = &self.2 {
            return remote.in_flight();
        }
        let pending = self.0.pending.borrow();
        let waiting = self.0.held.borrow();
        let all = pending.iter().chain(waiting.iter());
        all.filter(|p| p.opening == self.1).count()
    }

    fn sums(&self, offset: u64, blocks: usize) -> Option<SumsOp> {
        self.ask_sums(offset, blocks)
    }

    fn geometry(&self) -> Geometry {
        if let Some(remote) = &self.2 {
            return remote.geometry();
        }
        *self.0.geometry.borrow()
    }
}
