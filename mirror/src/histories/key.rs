//! When two worlds of the model are the same.

use super::model::{ACKNOWLEDGED, Slots, World, one, slots_of};
use crate::superblock::Superblock;
use dirty_map::Stamp;
use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};

/// Equal for worlds with equal futures; 128 bits, so that chance makes no two worlds one.
pub(crate) fn key(world: &World) -> u128 {
    let facts = Facts::of(world);
    let mut slots: Vec<(u64, usize)> = (0..world.members)
        .map(|slot| (facts.signature(world, slot), slot))
        .collect();
    slots.sort_unstable();
    let order: Vec<usize> = slots.iter().map(|&(_, slot)| slot).collect();
    // Slots that look alike may still differ in how they relate to others.
    let alike = slots.windows(2).any(|pair| pair[0].0 == pair[1].0);
    let orders = if alike {
        every_order(&order)
    } else {
        vec![order]
    };
    let keys = orders.iter().map(|order| facts.key(world, order));
    keys.min().unwrap_or_default()
}

fn every_order(slots: &[usize]) -> Vec<Vec<usize>> {
    if slots.is_empty() {
        return vec![Vec::new()];
    }
    let mut orders = Vec::new();
    for (at, &first) in slots.iter().enumerate() {
        let rest = [&slots[..at], &slots[at + 1..]].concat();
        orders.extend(every_order(&rest).into_iter().map(|mut order| {
            order.push(first);
            order
        }));
    }
    orders
}

/// Where counting begins in a world: only differences of numbers matter.
struct Facts {
    sequence: u64,
    ordinal: u32,
    /// Events are counted in each epoch.
    events: BTreeMap<u128, u64>,
}

impl Facts {
    fn of(world: &World) -> Self {
        let mut facts = Self {
            sequence: u64::MAX,
            ordinal: u32::MAX,
            events: BTreeMap::new(),
        };
        for disk in &world.disks {
            let least = facts.sequence.min(disk.position.sequence);
            facts.sequence = match disk.completed {
                0 => least,
                completed => least.min(completed),
            };
            facts.ordinal = facts.ordinal.min(disk.position.ordinal);
            if let Some(superblock) = &disk.superblock {
                facts.ordinal = facts.ordinal.min(superblock.epoch.ordinal);
                let (epoch, count) = (superblock.epoch.id, superblock.event_count);
                let least = facts.events.entry(epoch).or_insert(count);
                *least = count.min(*least);
            }
        }
        facts
    }

    fn stamp(&self, stamp: Stamp) -> [u64; 2] {
        if stamp.sequence == 0 {
            return [u64::MAX; 2]; // the base of a slot without a join
        }
        let ordinal = stamp.ordinal.wrapping_sub(self.ordinal);
        let sequence = stamp.sequence.wrapping_sub(self.sequence);
        [u64::from(ordinal), sequence]
    }

    /// The same for slots that could change places.
    fn signature(&self, world: &World, slot: usize) -> u64 {
        let mut hasher = std::hash::DefaultHasher::new();
        for group in 0..3 {
            let place = group * world.members + slot;
            let disk = &world.disks[place];
            self.stamp(disk.position).hash(&mut hasher);
            disk.completed.wrapping_sub(self.sequence).hash(&mut hasher);
            if let Some(superblock) = &disk.superblock {
                let record = superblock.own_record();
                (superblock.epoch.ordinal - self.ordinal).hash(&mut hasher);
                (record.state as u8, record.full).hash(&mut hasher);
                self.stamp(record.base).hash(&mut hasher);
            }
            for what in 0..2 {
                let bit = world.bit(place, what);
                let count = world.writes.iter().filter(|write| *write & bit != 0);
                count.count().hash(&mut hasher);
            }
        }
        let sets = [world.needed, world.good, world.reverted];
        sets.map(|set| set >> slot & 1).hash(&mut hasher);
        hasher.finish()
    }

    fn key(&self, world: &World, order: &[usize]) -> u128 {
        let mut words = Words {
            words: Vec::with_capacity(256),
            epochs: Vec::new(),
            members: Vec::new(),
            facts: self,
        };
        let members = world.members;
        for group in 0..3 {
            for slot in order {
                let disk = &world.disks[group * members + slot];
                words.stamp(disk.position);
                words.epoch(disk.effective);
                words.sequence(disk.completed);
                match &disk.superblock {
                    None => words.words.push(u64::MAX),
                    Some(superblock) => words.superblock(superblock, order),
                }
            }
        }
        let permuted = |set: Slots| {
            let places = slots_of(set).filter_map(|slot| order.iter().position(|&o| o == slot));
            u64::from(places.fold(0, |to, at| to | one(at)))
        };
        let running = world
            .running
            .map(|run| permuted(run.in_sync) << 32 | (run.sequence - self.sequence));
        words.sequence(world.running.map_or(0, |run| run.completed));
        words.words.extend([
            running.unwrap_or(u64::MAX),
            permuted(world.needed),
            permuted(world.good),
            permuted(world.reverted),
            u64::from(world.honest),
            u64::from(world.untouched),
        ]);
        let from = words.words.len();
        let writes = world.writes.iter();
        words
            .words
            .extend(writes.map(|&write| permute(write, members, order)));
        words.words[from..].sort_unstable();
        hash(&words.words)
    }
}

/// A pattern with its slots in another order.
fn permute(write: u64, members: usize, order: &[usize]) -> u64 {
    let width = members + 2;
    let mut to = write & (ACKNOWLEDGED);
    for group in 0..4 {
        for (at, slot) in order.iter().enumerate() {
            // The running mirror's memory is one place.
            let (from, into) = if group == 3 {
                (3 * members, 3 * members)
            } else {
                (group * members + slot, group * members + at)
            };
            if group == 3 && at > 0 {
                break;
            }
            let bits = write >> (from * width);
            let mut moved = bits & 3;
            for (at, slot) in order.iter().enumerate() {
                moved |= (bits >> (2 + slot) & 1) << (2 + at);
            }
            to |= moved << (into * width);
        }
    }
    to
}

fn hash(words: &[u64]) -> u128 {
    const ODD: u128 = 0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835;
    words.iter().fold(ODD, |hash, &word| {
        let mixed = (hash ^ u128::from(word)).wrapping_mul(ODD);
        mixed ^ mixed >> 61
    })
}

/// A world as numbers, names replaced by the order in which they come up.
struct Words<'a> {
    words: Vec<u64>,
    epochs: Vec<u128>,
    members: Vec<u128>,
    facts: &'a Facts,
}

fn number(names: &mut Vec<u128>, name: u128) -> u64 {
    let at = names
        .iter()
        .position(|&known| known == name)
        .unwrap_or_else(|| {
            names.push(name);
            names.len() - 1
        });
    at as u64
}

impl Words<'_> {
    fn epoch(&mut self, epoch: u128) {
        let word = if epoch == 0 {
            u64::MAX
        } else {
            number(&mut self.epochs, epoch)
        };
        self.words.push(word);
    }

    /// Zero stands for none.
    fn sequence(&mut self, sequence: u64) {
        let word = match sequence {
            0 => u64::MAX,
            sequence => sequence - self.facts.sequence,
        };
        self.words.push(word);
    }

    fn stamp(&mut self, stamp: Stamp) {
        self.words.extend(self.facts.stamp(stamp));
    }

    fn superblock(&mut self, superblock: &Superblock, order: &[usize]) {
        let member = number(&mut self.members, superblock.member.as_u128());
        let ordinal = superblock.epoch.ordinal - self.facts.ordinal;
        let event = superblock.event_count - self.facts.events[&superblock.epoch.id];
        self.words.extend([member, u64::from(ordinal), event]);
        self.epoch(superblock.epoch.id);
        for past in &superblock.history {
            self.epoch(past.id);
        }
        let handed_over = u64::from(superblock.handed_over);
        self.words.push(u64::MAX - 1 - handed_over);
        for &slot in order {
            let record = &superblock.slots[slot];
            let member = record.member.map_or(0, |member| member.as_u128());
            let member = number(&mut self.members, member);
            let exact = record.loss.is_some_and(|loss| loss.block_exact);
            let flags = u64::from(record.full) << 1 | u64::from(exact);
            self.words
                .push(member << 16 | flags << 8 | record.state as u64);
            self.stamp(record.base);
            match record.loss {
                None => self.words.push(u64::MAX),
                Some(loss) => {
                    self.epoch(loss.epoch);
                    self.stamp(loss.position);
                }
            }
        }
    }
}
