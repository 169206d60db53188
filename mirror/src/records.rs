//! What rounds write into the slot records: of a start, a loss, a join and its end.
//!
//! Pure, like the decisions in `assemble.rs` that rely on it, so that the tests can try every
//! history of both together. The engine decides when, and makes it durable.

use crate::assemble::{Plan, Reached, Seen, Verdict, left_out, reached};
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
    // Not the configuration's: a round that is tried again has begun another already.
    let mut before = seen[plan.newest].superblock.clone();
    let left_out = left_out(&before);
    let judged = seen.iter().zip(&plan.verdicts);
    for (member, _) in judged.filter(|(_, verdict)| **verdict == Verdict::InSync) {
        // One that an earlier start has left out may serve by force.
        let slot = usize::from(member.superblock.own_slot);
        before.slots[slot].state = SlotState::InSync;
        config.slots[slot].state = SlotState::InSync;
    }
    let reached = reached(seen, &before);
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
        // A copy that was left out has the epoch of the others, and not what they wrote in it.
        record.loss = (!left_out).then_some(Loss {
            epoch: before.epoch.id,
            position: reached.ahead,
            block_exact: false,
        });
        record.base.sequence = record.base.sequence.max(if here {
            // Found to be older: it must not come back by delta.
            reached.ahead.sequence
        } else {
            reached.completed
        });
    }
    end_resyncs(config, reached);
    if config.slots.iter().any(|r| r.state != SlotState::InSync) {
        config.forced = forced && !plan.lost.is_empty();
        config.begin_epoch(epoch);
    }
}

/// Resyncs that a crash ended: nobody recorded how far their members had come, except that they
/// hold the commit which all of them hold.
pub(crate) fn end_resyncs(config: &mut Superblock, reached: Reached) {
    for record in &mut config.slots {
        if let (SlotState::Resyncing, Some(loss)) = (record.state, &mut record.loss) {
            loss.position = reached.ahead;
            loss.block_exact = false;
            record.base.sequence = record.base.sequence.max(reached.completed);
            record.state = SlotState::Stale;
        }
    }
}

/// Of whom a start takes the mark of having been handed over before it writes anything else, by
/// their indexes. The only one that starts in-sync keeps it: that one's round takes it, and names
/// everybody else lost (`engine/stop.rs`).
pub(crate) fn to_revoke(seen: &[Seen], plan: &Plan) -> Vec<usize> {
    let marked = |&at: &usize| seen[at].superblock.handed_over && !plan.serves_alone(at);
    (0..seen.len()).filter(marked).collect()
}

/// A superblock without that mark.
pub(crate) fn revoke(superblock: &mut Superblock) {
    superblock.handed_over = false;
    superblock.write_count += 1;
}

/// The superblocks to be written to older copies before a start that leaves them out, with
/// their indexes. By what its own superblock says such a copy might serve one day together with
/// others that were lost before it, with what it was put back to. It is made to say who is
/// in-sync with this start (R15), and that it is stale itself; its data and maps stay as they
/// are, and alone it can be started by force.
pub(crate) fn disown(seen: &[Seen], plan: &Plan) -> Vec<(usize, Superblock)> {
    let config = &seen[plan.newest].superblock;
    let judged = seen.iter().zip(&plan.verdicts).enumerate();
    let older = judged.filter(|(_, (_, verdict))| matches!(verdict, Verdict::Full { .. }));
    let marked = older.map(|(at, (member, _))| {
        let own = &member.superblock;
        let mut superblock = Superblock {
            member: own.member,
            own_slot: own.own_slot,
            server_instance: own.server_instance,
            handed_over: false,
            write_count: own.write_count,
            event_count: own.event_count,
            updated_secs: own.updated_secs,
            ..config.clone()
        };
        for record in &mut superblock.slots {
            // They go with missed maps that this copy does not have.
            record.loss = None;
        }
        let record = &mut superblock.slots[usize::from(own.own_slot)];
        record.clone_from(own.own_record());
        record.state = SlotState::Stale;
        (at, superblock)
    });
    let changed = marked.filter(|(at, new)| *new != seen[*at].superblock);
    changed
        .map(|(at, mut new)| {
            new.event_count = config.event_count;
            new.updated_secs = config.updated_secs;
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
    /// It was written to by itself: what never left *unwritten* here may not be zero on it.
    pub(crate) parted: bool,
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
    record.zeroed &= !join.full && !join.parted;
    config.begin_epoch(epoch);
}

/// The resync of `slot` has ended.
pub(crate) fn resynced(config: &mut Superblock, slot: u8) {
    let record = &mut config.slots[usize::from(slot)];
    record.state = SlotState::InSync;
    record.full = false;
}

#[cfg(test)]
#[path = "records_tests.rs"]
mod tests;
