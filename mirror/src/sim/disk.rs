//! A disk as bad as the fault model allows (README, "Fault model").
//!
//! Completed writes sit in a volatile cache until a flush or FUA; a power cut keeps any subset
//! of the cached sectors, in any order, and any subset of the sectors of writes under way.
//! Reads, writes and flushes fail on demand, and what a
//! failed flush gave up is gone with the power, whatever a later flush says; a disk can hang or vanish and come back. A
//! discarded range reads as arbitrary bytes.

use super::{Rng, SimBuffer};
use crate::host::{Disk, DiskRequest, Errno, Geometry, Span};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

const SECTOR: u64 = 512;

/// What goes wrong from now on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Every write fails, leaving arbitrary parts written.
    pub writes: bool,
    /// Every read fails.
    pub reads: bool,
    /// Every flush fails, and what was cached may be lost.
    pub flushes: bool,
    /// Nothing is answered.
    pub hang: bool,
    /// The device is gone: everything fails with ENODEV.
    pub gone: bool,
}

struct Pending {
    request: DiskRequest<SimBuffer>,
    answer: Rc<RefCell<Answer>>,
    /// Cached sectors that a flush covers: those cached when it was submitted.
    covers: Option<u64>,
}

#[derive(Default)]
struct Answer {
    result: Option<Result<(), Errno>>,
    waker: Option<Waker>,
}

/// The bytes of a sector.
type Content = Rc<[u8]>;

/// A cached version of a sector.
struct Cached {
    bytes: Content,
    /// Order in which the disk took it.
    number: u64,
    /// A flush that failed has given it up: readable until the power goes, never durable.
    given_up: bool,
}

struct Inner {
    size_bytes: u64,
    durable: RefCell<BTreeMap<u64, Content>>,
    /// Versions of each sector that are not durable yet, oldest first.
    cache: RefCell<BTreeMap<u64, Vec<Cached>>>,
    pending: RefCell<Vec<Pending>>,
    faults: Cell<Faults>,
    bad_sectors: RefCell<BTreeSet<u64>>,
    next_number: Cell<u64>,
    /// Whether write-zeroes is one operation.
    cheap_zeroes: Cell<bool>,
    /// Fills what was never written: zeroes, or garbage of an earlier life.
    background: u8,
    operations: Cell<u64>,
}

/// A simulated disk; clones are the same disk.
#[derive(Clone)]
pub struct SimDisk(Rc<Inner>);

/// A running operation.
pub struct SimOp(Rc<RefCell<Answer>>);

impl Future for SimOp {
    type Output = Result<(), Errno>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut answer = self.0.borrow_mut();
        match answer.result {
            Some(result) => Poll::Ready(result),
            None => {
                answer.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl SimDisk {
    /// A disk of `size_bytes` whose untouched sectors hold `background` throughout.
    #[must_use]
    pub fn new(size_bytes: u64, background: u8) -> Self {
        Self(Rc::new(Inner {
            size_bytes,
            durable: RefCell::default(),
            cache: RefCell::default(),
            pending: RefCell::default(),
            faults: Cell::default(),
            bad_sectors: RefCell::default(),
            next_number: Cell::new(0),
            cheap_zeroes: Cell::new(true),
            background,
            operations: Cell::new(0),
        }))
    }

    /// Writes durably, from outside of any machine.
    pub fn write_now(&self, offset: u64, bytes: &[u8]) {
        let mut durable = self.0.durable.borrow_mut();
        for (sector, chunk) in (offset / SECTOR..).zip(bytes.chunks(512)) {
            durable.insert(sector, chunk.into());
        }
    }

    /// Reads what a reader would see, from outside of any machine.
    #[must_use]
    pub fn read_now(&self, offset: u64, len: u64) -> Vec<u8> {
        (offset / SECTOR..(offset + len) / SECTOR)
            .flat_map(|sector| self.sector(sector).to_vec())
            .collect()
    }

    /// A copy of the disk as it is now, cache included: an older image for later.
    #[must_use]
    pub fn image(&self) -> Self {
        let copy = Self::new(self.0.size_bytes, self.0.background);
        let mut durable = self.0.durable.borrow().clone();
        for (sector, versions) in self.0.cache.borrow().iter() {
            durable.extend(
                versions
                    .last()
                    .map(|cached| (*sector, cached.bytes.clone())),
            );
        }
        *copy.0.durable.borrow_mut() = durable;
        copy
    }

    /// Sets what goes wrong from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.0.faults.set(faults);
    }

    /// From the next start on the disk cannot write zeroes by itself.
    pub fn without_cheap_zeroes(&self) {
        self.0.cheap_zeroes.set(false);
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

    /// Whether the sector is unreadable.
    #[must_use]
    pub fn is_spoilt(&self, offset: u64) -> bool {
        self.0.bad_sectors.borrow().contains(&(offset / SECTOR))
    }

    /// A hash of everything durable, to tell states apart.
    #[must_use]
    pub fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.0.durable.borrow().hash(&mut hasher);
        hasher.finish()
    }

    /// Operations completed so far.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.0.operations.get()
    }

    /// The power goes: of what was cached, and of the writes under way, any subset of sectors
    /// stays. `choose` picks one of so many possibilities, again and again; what it has not
    /// been asked about is the same in every outcome.
    pub fn cut_power(&self, choose: &mut impl FnMut(usize) -> usize) {
        for pending in self.0.pending.take() {
            if let DiskRequest::Write { offset, span, .. } = &pending.request {
                self.write_some(*offset, span, choose);
            }
            release(&pending.request);
        }
        let mut durable = self.0.durable.borrow_mut();
        for (sector, mut versions) in self.0.cache.take() {
            versions.retain(|cached| !cached.given_up);
            // Any of its versions, or none: the disk writes back when it likes.
            let kept = choose(versions.len() + 1);
            if kept < versions.len() {
                durable.insert(sector, versions.swap_remove(kept).bytes);
            }
        }
    }

    /// The daemon is gone but the disk lives on: what it had taken it finishes.
    pub fn finish_all(&self, rng: &mut Rng) {
        while self.completable() > 0 {
            let chosen = rng.index(self.completable());
            self.complete(chosen, rng);
        }
    }

    /// Operations that may complete now.
    pub(super) fn completable(&self) -> usize {
        if self.0.faults.get().hang {
            0
        } else {
            self.0.pending.borrow().len()
        }
    }

    /// Completes the `chosen`th pending operation.
    pub(super) fn complete(&self, chosen: usize, rng: &mut Rng) {
        let pending = self.0.pending.borrow_mut().swap_remove(chosen);
        let result = self.apply(&pending, rng);
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
        if faults.gone {
            return Err(Errno::NO_DEVICE);
        }
        match &pending.request {
            DiskRequest::Read { offset, span } => {
                let sectors = offset / SECTOR..(offset + span.len as u64) / SECTOR;
                if faults.reads || self.0.bad_sectors.borrow().range(sectors).next().is_some() {
                    return Err(Errno::IO);
                }
                span.buffer
                    .device_fill(span.start, &self.read_now(*offset, span.len as u64));
            }
            DiskRequest::Write { offset, span, fua } => {
                if faults.writes {
                    self.write_some(*offset, span, &mut |n| rng.index(n));
                    return Err(Errno::IO);
                }
                self.write_all(*offset, span, *fua);
            }
            DiskRequest::Flush => {
                let covers = pending.covers.unwrap_or(0);
                if faults.flushes {
                    self.give_up_some(covers, rng);
                    return Err(Errno::IO);
                }
                self.write_back(covers);
            }
            DiskRequest::WriteZeroes { offset, len } => {
                if !self.0.cheap_zeroes.get() {
                    return Err(Errno::NOT_SUPPORTED);
                }
                if faults.writes {
                    return Err(Errno::IO);
                }
                self.fill(*offset, *len, 0);
            }
            DiskRequest::Discard { offset, len } => self.fill(*offset, *len, 0xd5),
        }
        Ok(())
    }

    /// Everything cached before `covers` becomes durable, in order, except what an earlier
    /// flush has given up.
    fn write_back(&self, covers: u64) {
        let mut durable = self.0.durable.borrow_mut();
        self.0.cache.borrow_mut().retain(|sector, versions| {
            let covered = |cached: &Cached| cached.number < covers && !cached.given_up;
            if let Some(last) = versions.iter().rposition(covered) {
                durable.insert(*sector, versions[last].bytes.clone());
                versions.drain(..=last);
            }
            !versions.is_empty()
        });
    }

    /// A failed flush: of what it covered, some will never be durable, and no later flush says
    /// so again.
    fn give_up_some(&self, covers: u64, rng: &mut Rng) {
        for cached in self.0.cache.borrow_mut().values_mut().flatten() {
            cached.given_up |= cached.number < covers && rng.one_in(2);
        }
    }

    fn write_all(&self, offset: u64, span: &Span<SimBuffer>, fua: bool) {
        let bytes = span.buffer.device_read(span.start..span.start + span.len);
        for (sector, chunk) in (offset / SECTOR..).zip(bytes.chunks(512)) {
            self.put(sector, chunk.into());
            if fua {
                self.make_durable(sector);
            }
        }
    }

    fn write_some(
        &self,
        offset: u64,
        span: &Span<SimBuffer>,
        choose: &mut impl FnMut(usize) -> usize,
    ) {
        let bytes = span.buffer.device_read(span.start..span.start + span.len);
        for (sector, chunk) in (offset / SECTOR..).zip(bytes.chunks(512)) {
            if choose(2) == 0 {
                self.put(sector, chunk.into());
            }
        }
    }

    fn fill(&self, offset: u64, len: u64, byte: u8) {
        let content: Content = vec![byte; 512].into();
        for sector in offset / SECTOR..(offset + len) / SECTOR {
            self.put(sector, content.clone());
        }
    }

    fn put(&self, sector: u64, bytes: Content) {
        self.0.bad_sectors.borrow_mut().remove(&sector);
        let number = self.0.next_number.get();
        self.0.next_number.set(number + 1);
        self.0
            .cache
            .borrow_mut()
            .entry(sector)
            .or_default()
            .push(Cached {
                bytes,
                number,
                given_up: false,
            });
    }

    /// What the cache holds of `sector` becomes durable.
    fn make_durable(&self, sector: u64) {
        if let Some(newest) = self
            .0
            .cache
            .borrow_mut()
            .remove(&sector)
            .and_then(|mut v| v.pop())
        {
            self.0.durable.borrow_mut().insert(sector, newest.bytes);
        }
    }

    fn sector(&self, sector: u64) -> Content {
        let cache = self.0.cache.borrow();
        if let Some(cached) = cache.get(&sector).and_then(|versions| versions.last()) {
            return cached.bytes.clone();
        }
        let durable = self.0.durable.borrow();
        durable
            .get(&sector)
            .cloned()
            .unwrap_or_else(|| vec![self.0.background; 512].into())
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
            end <= self.0.size_bytes,
            "a request beyond the end of the disk"
        );
        if let Some((buffer, device_writes)) = span_of(&request) {
            buffer.begin(device_writes);
        }
        let answer = Rc::new(RefCell::new(Answer::default()));
        let covers = matches!(request, DiskRequest::Flush).then(|| self.0.next_number.get());
        self.0.pending.borrow_mut().push(Pending {
            request,
            answer: answer.clone(),
            covers,
        });
        SimOp(answer)
    }

    fn in_flight(&self) -> usize {
        self.0.pending.borrow().len()
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.0.size_bytes,
            logical_block_bytes: 512,
            cheap_zeroes: self.0.cheap_zeroes.get(),
            discard: true,
        }
    }
}
