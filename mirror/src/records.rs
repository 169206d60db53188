//! What rounds write into the slot records: of a start, a loss, a join and its end.
//!
//! Pure, like the decisions in `assemble.rs` that rely on it, so that the tests can try every
//! history of both together. The engine decides when, and makes it durable.

use crate::assemble::{COMMITS_IN_FLIGHT_MAX, Plan, Seen, Verdict};
use crate::create::hint;
use crate::superblock::{Loss, SlotRecord, SlotState, Superblock};
use dirty_map::Stamp;
use uuid::Uuid;

/// A start by `plan`: who is lost by it, and which resyncs it found interrupted. Draws `epoch`
/// when a slot is not in-sync: an absent member may have gone on from a later state than that
/// of those present, and the two runs must not pass for one (R10).
pub(crate) fn start(
    config: &mut Superblock,
    seen: &[Seen],
    plan: &Plan,
    forced: bool,
    epoch: u128,
) {
    let in_sync = seen.iter().zip(&plan.verdicts);
    let in_sync = in_sync.filter(|(_, verdict)| **verdict == Verdict::InSync);
    let ahead = in_sync.map(|(s, _)| s.position).max_by_key(|p| p.sequence);
    let ahead = ahead.unwrap_or(Stamp {
        ordinal: 0,
        sequence: 0,
    });
    // Not the configuration's: a round that is tried again has begun another already.
    let before = seen[plan.newest].superblock.epoch.id;
    for (slot, _) in &plan.lost {
        let record = &mut config.slots[usize::from(*slot)];
        let here = seen
            .iter()
            .any(|s| Some(s.superblock.member) == record.member);
        record.state = if here {
            SlotState::Stale
        } else {
            SlotState::Missing
        };
        record.loss = Some(Loss {
            epoch: before,
            // One that is here was found to be older and must not come back by delta.
            position: if here { ahead } else { reached(ahead) },
            block_exact: false,
        });
    }
    end_resyncs(config, ahead);
    if config.slots.iter().any(|r| r.state != SlotState::InSync) {
        config.forced = forced && !plan.lost.is_empty();
        config.begin_epoch(epoch);
    }
}

/// Resyncs that a crash ended: nobody recorded how far their members had come. One that has
/// come further than those in-sync, which stand at `ahead`, went on without them.
pub(crate) fn end_resyncs(config: &mut Superblock, ahead: Stamp) {
    for record in &mut config.slots {
        if let (SlotState::Resyncing, Some(loss)) = (record.state, &mut record.loss) {
            loss.position = reached(ahead);
            loss.block_exact = false;
            record.state = SlotState::Stale;
        }
    }
}

/// What every receiving member has reached for certain when the furthest stands at `ahead`.
fn reached(ahead: Stamp) -> Stamp {
    Stamp {
        sequence: ahead.sequence.saturating_sub(COMMITS_IN_FLIGHT_MAX),
        ..ahead
    }
}

/// The superblocks to be written to older copies before a start that leaves them out, with
/// their indexes. By what its own superblock says such a copy might start alone one day, with
/// what it was put back to: it is made to say that those who start now may hold newer data
/// (R15).
pub(crate) fn disown(seen: &[Seen], plan: &Plan) -> Vec<(usize, Superblock)> {
    let judged = || seen.iter().zip(&plan.verdicts);
    let in_sync = || judged().filter(|(_, verdict)| **verdict == Verdict::InSync);
    let older = judged().map(|(member, verdict)| {
        let mut superblock = member.superblock.clone();
        if matches!(verdict, Verdict::Full { .. }) {
            for (serving, _) in in_sync() {
                let slot = usize::from(serving.superblock.own_slot);
                if let Some(record) = superblock.slots.get_mut(slot) {
                    record.member = Some(serving.superblock.member);
                    record.state = SlotState::InSync;
                    record.address = hint(&serving.path);
                }
            }
        }
        superblock
    });
    let changed = older.enumerate().filter(|(at, new)| {
        let old = &seen[*at].superblock;
        let differs = |(new, old): (&SlotRecord, &SlotRecord)| {
            (new.member, new.state) != (old.member, old.state)
        };
        new.slots.iter().zip(&old.slots).any(differs)
    });
    changed
        .map(|(at, mut new)| {
            new.write_count += 1;
            (at, new)
        })
        .collect()
}

/// A running mirror lost the member in `slot`; the caller begins an epoch.
pub(crate) fn loss(config: &mut Superblock, slot: u8, becomes: SlotState, loss: Loss) {
    let record = &mut config.slots[usize::from(slot)];
    record.state = becomes;
    record.loss = Some(loss);
}

/// The missed map of `slot` says exactly what its member, which stands at `position`, lacks.
/// Has to be effective before a join overwrites the member's maps: after a crash in the middle
/// they tell no more how far its copy had come.
pub(crate) fn exact(config: &mut Superblock, slot: u8, position: Stamp) {
    if let Some(loss) = &mut config.slots[usize::from(slot)].loss
        && !loss.block_exact
    {
        loss.position = position;
        loss.block_exact = true;
    }
}

/// A join.
pub(crate) struct Join {
    /// The slot.
    pub(crate) slot: u8,
    /// The device's identity.
    pub(crate) member: Uuid,
    /// Its path, as a hint.
    pub(crate) address: String,
    /// It was no member before.
    pub(crate) new: bool,
    /// All that is written is copied to it.
    pub(crate) full: bool,
    /// Its position when it joins.
    pub(crate) base: Stamp,
}

/// A member joins and is resyncing from here on.
pub(crate) fn join(config: &mut Superblock, join: &Join, epoch: u128) {
    let record = &mut config.slots[usize::from(join.slot)];
    if join.new {
        // Lacking everything since this join is all there is to know of it: a restart goes on
        // from its missed map.
        record.clone_from(&SlotRecord::empty());
        record.loss = Some(Loss {
            epoch,
            position: join.base,
            block_exact: false,
        });
    }
    record.member = Some(join.member);
    record.address.clone_from(&join.address);
    record.state = SlotState::Resyncing;
    record.base = join.base;
    // A delta after a full resync that was cut off goes on with it.
    record.full |= join.full;
    record.zeroed &= !join.full;
    config.begin_epoch(epoch);
}

/// The resync of `slot` has ended.
pub(crate) fn resynced(config: &mut Superblock, slot: u8) {
    let record = &mut config.slots[usize::from(slot)];
    record.state = SlotState::InSync;
    record.full = false;
}
