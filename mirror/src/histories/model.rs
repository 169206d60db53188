//! A model of a mirror: what each disk says of itself, and which writes it holds. Decisions and
//! records are the real ones (`assemble.rs`, `records.rs`); the model does what the engine does
//! between them.
//!
//! The unit of data is a write. All that matters of one is where it is held, hot, missed and
//! whether it was acknowledged, so writes are a set of bit patterns: those that are alike are
//! one, and a world stays small however many writes there were.

use crate::assemble::Seen;
use crate::create::first_superblock;
use crate::layout::Layout;
use crate::records;
use crate::superblock::{Epoch, LastStop, Loss, SlotRecord, SlotState, Superblock};
use dirty_map::Stamp;
use std::rc::Rc;
use uuid::Uuid;

/// A set of slots, one bit each.
pub(crate) type Slots = u8;

/// Something that must never happen, in words.
pub(crate) type Violation = String;

/// What a disk says of itself; which writes it holds stands in the patterns.
#[derive(Clone)]
pub(crate) struct Disk {
    /// None: a new disk whose join was cut off is no member of anything.
    pub(crate) superblock: Option<Rc<Superblock>>,
    pub(crate) position: Stamp,
    pub(crate) effective: u128,
    pub(crate) completed: u64,
}

#[derive(Clone, Copy)]
pub(crate) struct Running {
    pub(crate) in_sync: Slots,
    pub(crate) sequence: u64,
    /// The commit that all receiving members hold.
    pub(crate) completed: u64,
}

/// How far an older image goes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Image {
    /// To before the last start.
    Begun,
    /// To before the last loss or return; to the midst of a resync that a crash ended.
    Changed,
}

/// A world. Places: the disks, the disks as they were before the last start, before the last
/// change of membership (as many each), and the running mirror's memory.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) members: usize,
    pub(crate) disks: Vec<Disk>,
    pub(crate) running: Option<Running>,
    pub(crate) writes: Vec<u64>,
    /// With these here nothing newer can be elsewhere: those in-sync, before or after a round
    /// that was cut off.
    pub(crate) needed: Slots,
    /// Of these, those that are in-sync by their own superblocks.
    pub(crate) good: Slots,
    /// Older images that no start and no resync has seen since.
    pub(crate) reverted: Slots,
    /// What was acknowledged last is what has been acknowledged in all.
    pub(crate) honest: bool,
    /// No older image and no force so far: whoever was lost returns by delta.
    pub(crate) untouched: bool,
    /// A crash in the middle of a start is one of the actions.
    pub(crate) starts_are_cut_off: bool,
    fresh: u32,
}

pub(crate) const HOLDS: usize = 0;
pub(crate) const HOT: usize = 1;
pub(crate) const MISSED: usize = 2;
pub(crate) const ACKNOWLEDGED: u64 = 1 << 63;

pub(crate) fn slots_of(set: Slots) -> impl Iterator<Item = usize> + Clone {
    (0..8).filter(move |slot| set >> slot & 1 == 1)
}

pub(crate) fn one(slot: usize) -> Slots {
    1 << slot
}

/// What a member's uuid is when a world begins.
fn uuid(slot: usize) -> Uuid {
    Uuid::from_u128(1 + slot as u128)
}

/// The first superblock of the first member.
fn template(members: usize) -> Superblock {
    let slots = (0..members).map(|slot| SlotRecord {
        member: Some(uuid(slot)),
        state: SlotState::InSync,
        address: format!("/dev/{slot}"),
        ..SlotRecord::empty()
    });
    let layout = Layout {
        regions: Vec::new(),
        data_offset: 0,
        size_bytes: 0,
    };
    let epoch = Epoch {
        id: 1 << 96,
        ordinal: 0,
    };
    Superblock {
        member: uuid(0),
        ..first_superblock(Uuid::from_u128(99), "m", layout, epoch, slots.collect())
    }
}

impl World {
    /// Freshly created, and started once.
    pub(crate) fn new(members: usize) -> Self {
        let template = template(members);
        let disk = |slot| Disk {
            superblock: Some(Rc::new(Superblock {
                member: uuid(slot),
                own_slot: u8::try_from(slot).unwrap(),
                ..template.clone()
            })),
            position: Stamp {
                ordinal: 0,
                sequence: 100, // far from zero, which stands for none
            },
            effective: 0,
            completed: 0,
        };
        let mut world = Self {
            members,
            disks: (0..3 * members)
                .map(|place| disk(place % members))
                .collect(),
            running: None,
            writes: Vec::new(),
            needed: 0,
            good: 0,
            reverted: 0,
            honest: true,
            untouched: true,
            starts_are_cut_off: true,
            fresh: 10,
        };
        let decision = world.decide(world.all()).unwrap().unwrap();
        assert!(world.begin(&decision, None));
        world
    }

    pub(crate) fn bit(&self, place: usize, what: usize) -> u64 {
        1 << (place * (MISSED + self.members) + what)
    }

    pub(crate) fn memory(&self) -> usize {
        3 * self.members
    }

    pub(crate) fn bits(&self, slots: Slots, what: usize) -> u64 {
        slots_of(slots).fold(0, |bits, slot| bits | self.bit(slot, what))
    }

    pub(crate) fn all(&self) -> Slots {
        one(self.members) - 1
    }

    fn image(&self, slot: usize, image: Image) -> usize {
        slot + self.members * if image == Image::Begun { 1 } else { 2 }
    }

    pub(crate) fn fresh(&mut self) -> u128 {
        self.fresh += 1;
        // In no order, like the random ones that they stand for.
        u128::from(self.fresh.wrapping_mul(0x9e37_79b1)) << 96
    }

    pub(crate) fn in_sync(&self) -> Slots {
        self.running.map_or(0, |run| run.in_sync)
    }

    /// The running mirror's configuration.
    pub(crate) fn config(&self) -> Superblock {
        let slot = self.in_sync().trailing_zeros() as usize;
        let superblock = self.disks[slot].superblock.as_deref();
        superblock.unwrap().clone()
    }

    pub(crate) fn seen(&self, place: usize) -> Option<Seen> {
        let disk = &self.disks[place];
        disk.superblock.as_ref().map(|superblock| Seen {
            path: format!("/dev/{}", place % self.members),
            superblock: Superblock::clone(superblock),
            position: disk.position,
            damaged: false,
            effective: disk.effective,
            completed: disk.completed,
        })
    }

    /// Copies all that a place says and holds.
    fn copy_place(&mut self, from: usize, to: usize) {
        self.disks[to] = self.disks[from].clone();
        let width = MISSED + self.members;
        let mask = (1 << width) - 1;
        for write in &mut self.writes {
            let bits = *write >> (from * width) & mask;
            *write = *write & !(mask << (to * width)) | bits << (to * width);
        }
    }

    pub(crate) fn keep_images(&mut self, image: Image) {
        for slot in 0..self.members {
            self.copy_place(slot, self.image(slot, image));
        }
    }

    /// Sets `to` in every write that has one of `any`.
    pub(crate) fn mark(&mut self, any: u64, to: u64) {
        for write in &mut self.writes {
            if *write & any != 0 {
                *write |= to;
            }
        }
    }

    pub(crate) fn clear(&mut self, bits: u64) {
        self.writes.iter_mut().for_each(|write| *write &= !bits);
    }

    /// A map commit that reaches `slots`.
    pub(crate) fn commit(&mut self, slots: Slots, after: u64, epoch: (u32, u128)) {
        let Some(run) = &mut self.running else { return };
        run.sequence += after;
        for slot in slots_of(slots) {
            let disk = &mut self.disks[slot];
            disk.position = Stamp {
                ordinal: epoch.0,
                sequence: run.sequence,
            };
            (disk.effective, disk.completed) = (epoch.1, run.completed);
        }
    }

    /// Of what the superblocks call receiving, all hold this commit.
    fn complete(&mut self) {
        let config = self.config();
        let receiving = |slot: &usize| {
            let state = config.slots[*slot].state;
            matches!(state, SlotState::InSync | SlotState::Resyncing)
        };
        let held = (0..self.members).filter(receiving);
        let held = held.map(|slot| self.disks[slot].position.sequence).min();
        let Some(run) = &mut self.running else { return };
        run.completed = run.completed.max(held.unwrap());
    }

    /// A commit under the epoch that is effective.
    pub(crate) fn commit_now(&mut self, slots: Slots, after: u64) {
        self.complete();
        let epoch = self.config().epoch;
        self.commit(slots, after, (epoch.ordinal, epoch.id));
    }

    /// The missed map of `slot` becomes durable on `on`.
    pub(crate) fn store_missed(&mut self, on: Slots, slot: usize) {
        let memory = self.bit(self.memory(), MISSED + slot);
        let disks = self.bits(on, MISSED + slot);
        for write in &mut self.writes {
            *write = *write & !disks | if *write & memory == 0 { 0 } else { disks };
        }
    }

    /// A second of writes that are acknowledged: extents cool, others become hot.
    pub(crate) fn write(&mut self, receivers: Slots) {
        let hot = self.bits(receivers, HOT);
        self.clear(hot);
        let holds = self.bits(receivers, HOLDS) | self.bit(self.memory(), HOLDS);
        let absent = slots_of(self.all() & !receivers);
        let missed = absent.fold(0, |bits, slot| {
            bits | self.bit(self.memory(), MISSED + slot)
        });
        // Bits of what is hot need not be durable: hot means missed.
        self.writes.push(holds | missed);
        for slot in 0..self.members {
            self.store_missed(receivers, slot);
        }
        self.writes.push(holds | missed | hot);
        self.acknowledge();
        // The first names what came before these writes only.
        self.commit_now(receivers, 1);
        self.commit_now(receivers, 1);
    }

    /// What the running mirror holds is what has been acknowledged.
    fn acknowledge(&mut self) {
        let memory = self.bit(self.memory(), HOLDS);
        for write in &mut self.writes {
            let acknowledged = if *write & memory == 0 {
                0
            } else {
                ACKNOWLEDGED
            };
            *write = *write & !ACKNOWLEDGED | acknowledged;
        }
    }

    /// A write under way: its extent is hot everywhere, and it has reached only some.
    fn issue(&mut self, reached: Slots) {
        let in_sync = self.in_sync();
        let absent = slots_of(self.all() & !reached);
        let missed = absent.fold(0, |bits, slot| {
            bits | self.bit(self.memory(), MISSED + slot)
        });
        let write = self.bits(reached, HOLDS) | self.bits(in_sync, HOT) | missed;
        self.writes.push(write | self.bit(self.memory(), HOLDS));
        self.commit_now(in_sync, 1);
    }

    /// A superblock update reaches these disks.
    pub(crate) fn round(&mut self, config: &Superblock, slots: Slots) {
        for slot in slots_of(slots) {
            self.disks[slot].superblock = Some(Rc::new(Superblock {
                member: config.slots[slot].member.unwrap(),
                own_slot: u8::try_from(slot).unwrap(),
                ..config.clone()
            }));
        }
    }

    /// What the configuration will be without the member in `slot`, whose missed map is durable
    /// on `left` then.
    fn lose(&mut self, config: &mut Superblock, slot: usize, left: Slots) {
        let lost = &self.disks[slot];
        let loss = Loss {
            epoch: lost.superblock.as_ref().unwrap().epoch.id,
            position: lost.position,
            block_exact: true,
        };
        let missed = self.bit(self.memory(), MISSED + slot);
        self.mark(self.bit(slot, HOT), missed);
        self.store_missed(left, slot);
        // Not the one that a failed attempt has begun: it is not effective.
        self.commit_now(left, 1);
        let number = u8::try_from(slot).unwrap();
        records::loss(config, number, SlotState::Faulty, loss);
        config.begin_epoch(self.fresh());
        config.event_count += 1;
    }

    /// Loses the member in `slot` while a write that it does not get is under way. With
    /// `crash`, only those members hold the new superblock.
    pub(crate) fn lose_one(&mut self, slot: usize, crash: Option<Slots>) -> bool {
        let left = self.in_sync() & !one(slot);
        let reached = crash.unwrap_or(left);
        if self.in_sync() & one(slot) == 0 || left == 0 || reached & !left != 0 {
            return false;
        }
        self.keep_images(Image::Changed);
        let mut config = self.config();
        self.issue(left);
        self.lose(&mut config, slot, left);
        self.round(&config, reached);
        if crash.is_some() {
            if reached == left {
                (self.needed, self.good) = (left, left);
            }
            self.stop();
        } else {
            self.go_on(left, left);
        }
        true
    }

    /// Loses `first`; its round reaches the other two, of which `second` fails in it, so that
    /// it is tried again without both.
    pub(crate) fn lose_two(&mut self, first: usize, second: usize) -> bool {
        let left = self.in_sync() & !one(first) & !one(second);
        if first == second || self.in_sync() != self.all() || left == 0 {
            return false;
        }
        self.keep_images(Image::Changed);
        let mut config = self.config();
        self.issue(left);
        self.lose(&mut config, first, left | one(second));
        let attempt = config.clone();
        self.lose(&mut config, second, left);
        self.round(&attempt, one(second));
        self.round(&config, left);
        self.go_on(left, left);
        true
    }

    pub(crate) fn go_on(&mut self, in_sync: Slots, receivers: Slots) {
        let run = self.running.as_mut().unwrap();
        run.in_sync = in_sync;
        (self.needed, self.good) = (in_sync, in_sync);
        self.write(receivers);
    }

    /// Writes that nobody holds any more, and all but one of those that are alike, are dropped.
    pub(crate) fn tidy(&mut self) {
        let width = MISSED + self.members;
        let held = (0..=self.memory()).fold(0, |bits, place| bits | 1 << (place * width));
        self.writes
            .retain(|write| write & (held | ACKNOWLEDGED) != 0);
        self.writes.sort_unstable();
        self.writes.dedup();
    }

    /// The daemon and its memory are gone.
    pub(crate) fn stop(&mut self) {
        let width = MISSED + self.members;
        let memory = ((1 << width) - 1) << (self.memory() * width);
        self.clear(memory);
        self.running = None;
    }

    /// A crash; a write and a commit may have reached one member only.
    pub(crate) fn crash(&mut self, reached: Option<usize>) -> bool {
        let in_sync = self.in_sync();
        match reached {
            _ if in_sync == 0 => return false,
            Some(slot) if in_sync & one(slot) == 0 || in_sync == one(slot) => return false,
            Some(slot) => {
                self.issue(one(slot));
                self.commit_now(one(slot), 1);
            }
            None => {}
        }
        self.stop();
        true
    }

    /// A clean stop, after which the member in `slot` may go on without the others.
    pub(crate) fn hand_over(&mut self, slot: usize) -> bool {
        let in_sync = self.in_sync();
        if in_sync & one(slot) == 0 {
            return false;
        }
        // All cools: what is missed is durable before.
        for absent in 0..self.members {
            self.store_missed(in_sync, absent);
        }
        self.clear(self.bits(in_sync, HOT));
        self.commit_now(in_sync, 1);
        let mut config = self.config();
        config.last_stop = LastStop::Clean;
        config.event_count += 1;
        self.round(&config, in_sync);
        let marked = self.disks[slot].superblock.as_mut().unwrap();
        Rc::make_mut(marked).handed_over = true;
        self.stop();
        true
    }

    /// A disk is put back to what it was; while the mirror runs only one that is out of service.
    pub(crate) fn older_image(&mut self, slot: usize, image: Image) -> bool {
        if self.in_sync() & one(slot) != 0 {
            return false;
        }
        self.copy_place(self.image(slot, image), slot);
        self.reverted |= one(slot);
        self.untouched = false;
        true
    }
}
