//! Joins in the model: of a former member and of a new disk, up to the end of the resync.

use super::model::{HOLDS, HOT, Image, MISSED, Slots, Violation, World, one, slots_of};
use crate::assemble::{Verdict, judge_return};
use crate::records;
use crate::split;
use crate::superblock::Superblock;
use std::rc::Rc;
use uuid::Uuid;

/// Where a join is cut off by a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// These in-sync members hold the superblock that makes its loss block-exact.
    Exact(Slots),
    /// The member's maps are written, nobody's superblock says that it joins.
    Maps,
    /// Of the in-sync members these hold the new superblock, the joiner does not.
    Round(Slots),
    /// All hold it, nothing more has happened.
    Joined,
    /// Writes have come, and all that was missed has been copied or nothing.
    Resync(bool),
    /// These hold the superblock that ends the resync, the joiner does not.
    Finish(Slots),
    /// Nowhere: the member is in-sync.
    Done,
}

/// Who joins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    /// A former member, by full resync where a delta is not allowed.
    Returns,
    /// A former member that went on by itself, and gives up what it has changed.
    GivesUp,
    /// A new disk.
    New,
}

/// What a join copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Lacks {
    /// All that is written.
    full: bool,
    /// What its own missed maps for these slots name.
    parted: Option<Slots>,
}

impl Lacks {
    const KNOWN: Self = Self {
        full: false,
        parted: None,
    };
    const ALL: Self = Self {
        full: true,
        parted: None,
    };
}

impl World {
    /// Somebody takes a slot.
    pub(crate) fn join(&mut self, slot: usize, who: Who, stop: Stop) -> Result<bool, Violation> {
        let (in_sync, new) = (self.in_sync(), who == Who::New);
        let allowed = match stop {
            Stop::Exact(_) if who != Who::Returns => false,
            Stop::Exact(reached) | Stop::Round(reached) | Stop::Finish(reached) => {
                reached & !in_sync == 0
            }
            _ => true,
        };
        if in_sync == 0 || in_sync & one(slot) != 0 || !allowed {
            return Ok(false);
        }
        let mut config = self.config();
        let Some(lacks) = self.decide_join(&config, slot, who)? else {
            return Ok(false);
        };
        let full = lacks.full;
        if full && matches!(stop, Stop::Exact(_)) {
            return Ok(false);
        }
        self.keep_images(Image::Changed);
        self.begin_join(&mut config, slot, new, lacks, stop);
        let join = records::Join {
            slot: u8::try_from(slot).unwrap(),
            member: if new {
                Uuid::from_u128(self.fresh())
            } else {
                config.slots[slot].member.unwrap()
            },
            address: format!("/dev/{slot}"),
            new,
            full,
            parted: lacks.parted.is_some(),
            base: self.disks[slot].position,
        };
        if matches!(stop, Stop::Exact(_) | Stop::Maps) {
            self.stop();
            return Ok(true);
        }
        records::join(&mut config, &join, self.fresh());
        config.event_count += 1;
        let receivers = in_sync | one(slot);
        match stop {
            Stop::Round(reached) => self.round(&config, reached),
            _ => self.round(&config, receivers),
        }
        if !matches!(stop, Stop::Round(_) | Stop::Joined) {
            if stop != Stop::Done {
                self.keep_images(Image::Changed);
            }
            self.commit_now(receivers, 1);
            self.write(receivers);
            self.resync(config, slot, stop)?;
        }
        if stop != Stop::Done {
            self.stop();
        }
        Ok(true)
    }

    /// What a return of the disk in `slot` would be.
    pub(crate) fn verdict(&self, slot: usize) -> Verdict {
        judge_return(&self.config(), &self.seen(slot).unwrap())
    }

    /// What is copied; none when it must not come in.
    fn decide_join(
        &self,
        config: &Superblock,
        slot: usize,
        who: Who,
    ) -> Result<Option<Lacks>, Violation> {
        if who == Who::New {
            return Ok(Some(Lacks::ALL));
        }
        let Some(seen) = self.seen(slot) else {
            return Ok(None);
        };
        let verdict = judge_return(config, &seen);
        self.judge_words(&verdict, self.untouched)?;
        let ours = config.slots[slot].member == Some(seen.superblock.member);
        if who == Who::GivesUp {
            let refused = ours && matches!(verdict, Verdict::Refused { .. });
            let slots = split::changed_by(config, &seen).ok().filter(|_| refused);
            return Ok(slots.map(|slots| Lacks {
                full: false,
                parted: Some(
                    slots
                        .into_iter()
                        .fold(0, |set, s| set | one(usize::from(s))),
                ),
            }));
        }
        Ok(match verdict {
            Verdict::Delta { .. } => Some(Lacks::KNOWN),
            Verdict::Full { .. } => Some(Lacks::ALL),
            Verdict::Refused { .. } => ours.then_some(Lacks::ALL),
            Verdict::InSync => return Err("in-sync, and it returns".into()),
        })
    }

    /// Up to the member's maps.
    fn begin_join(
        &mut self,
        config: &mut Superblock,
        slot: usize,
        new: bool,
        Lacks { full, parted }: Lacks,
        stop: Stop,
    ) {
        let in_sync = self.in_sync();
        let (memory, own) = (self.memory(), self.bit(slot, HOT));
        let missed = self.bit(memory, MISSED + slot);
        let width = MISSED + self.members;
        if new {
            self.clear(((1 << width) - 1) << (slot * width));
            self.disks[slot].superblock = None;
        }
        let lacks = if full {
            self.bit(memory, HOLDS) | self.bit(slot, HOLDS)
        } else {
            let own_missed = |s| self.bit(slot, MISSED + s);
            slots_of(parted.unwrap_or(0)).fold(own, |bits, s| bits | own_missed(s))
        };
        self.mark(lacks, missed);
        self.store_missed(in_sync, slot);
        self.commit_now(in_sync, 1);
        if !full && parted.is_none() {
            let before = config.clone();
            let position = self.disks[slot].position;
            records::exact(config, u8::try_from(slot).unwrap(), position);
            config.event_count += u64::from(*config != before);
            if let Stop::Exact(reached) = stop {
                self.round(config, reached);
                return;
            }
            self.round(config, in_sync);
        } else if let Some(superblock) = &mut self.disks[slot].superblock {
            Rc::make_mut(superblock).slots[slot].full = true;
        }
        let source = in_sync.trailing_zeros() as usize;
        for what in HOT..width {
            let (from, to) = (self.bit(source, what), self.bit(slot, what));
            self.clear(to);
            if what != MISSED + slot {
                self.mark(from, to);
            }
        }
        self.commit_now(one(slot), 1);
    }

    /// From the join to the end of the resync, or to where it is cut off.
    fn resync(&mut self, mut config: Superblock, slot: usize, stop: Stop) -> Result<(), Violation> {
        if stop == Stop::Resync(false) {
            return Ok(());
        }
        let in_sync = self.in_sync();
        let (source, own) = (self.bit(self.memory(), HOLDS), self.bit(slot, HOLDS));
        let missed = self.bit(self.memory(), MISSED + slot);
        for write in &mut self.writes {
            if *write & missed != 0 {
                *write = *write & !own & !missed | if *write & source == 0 { 0 } else { own };
            }
            if (*write & source == 0) != (*write & own == 0) {
                return Err(format!("the resync of slot {slot} left something out"));
            }
        }
        self.store_missed(in_sync, slot);
        self.commit_now(in_sync | one(slot), 1);
        records::resynced(&mut config, u8::try_from(slot).unwrap());
        config.event_count += 1;
        self.reverted &= !one(slot);
        match stop {
            Stop::Finish(reached) => {
                self.round(&config, reached);
                self.needed |= one(slot);
            }
            Stop::Done => {
                self.round(&config, in_sync | one(slot));
                self.go_on(in_sync | one(slot), in_sync | one(slot));
            }
            _ => {}
        }
        Ok(())
    }
}
