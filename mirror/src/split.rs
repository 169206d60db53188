//! Split brain, and its end: a member that went on by itself gives its changes up, and gets only
//! what the two sides hold differently.
//!
//! # What the two hold differently
//!
//! What this side has changed since it lost the member stands in the member's missed map here (R2,
//! R12). What the member has changed since it lost those who are in-sync here stands in *their*
//! missed maps on the member, in its own hot extents (hot means missed, R12), and in the extents
//! that it does not use any more. Their union is copied. It holds all that differs if both sides
//! count from one moment, to which both were equal:
//!
//! * Each lost the other in an epoch that lies in the other's past too.
//! * Each had come equally far when they parted, but for a commit under way: one that has been
//!   put back and went on from there has not, be it by one commit (R16). How far either has come
//!   since says nothing: sequences of two lines cannot be compared.
//! * No join after the loss has taken bits from the map again: it would have left a base that is
//!   younger than the epoch of the loss.
//! * Only those count who have been in-sync here since before the loss. One that has joined since
//!   is equal to them, and what the member says of it is of another time.
//! * The member's maps are its own: no join was cut off after it had written ours there.
//!
//! Otherwise all that is written is copied. Nothing is decided here for the operator: without
//! their word a split brain is refused (R10).

use crate::assemble::{Seen, left_out};
use crate::epochs::age;
use crate::superblock::{Loss, SlotRecord, SlotState, Superblock};
use uuid::Uuid;

/// The slots whose missed maps on `member` name, together with its own hot extents and those that
/// it does not use, all that it has changed by itself.
///
/// # Errors
///
/// When that cannot be told, with the reason, as a sentence.
pub fn changed_by(config: &Superblock, member: &Seen) -> Result<Vec<u8>, String> {
    let (path, own) = (&member.path, &member.superblock);
    let foreign = member.effective != 0 && !own.descends_from(member.effective);
    if own.own_record().full || left_out(own) || foreign {
        return Err(format!("a join of {path} was cut off"));
    }
    let Some(loss) = loss_on_record(config, own.own_slot, own.member) else {
        return Err(format!(
            "what was changed without {path} is not on record as a whole"
        ));
    };
    if !own.descends_from(loss.epoch) {
        return Err(format!(
            "{path} does not know the epoch in which this mirror lost it"
        ));
    }
    if !is_before(own, own.own_record(), loss.epoch) {
        return Err(format!(
            "{path} has joined others since this mirror lost it"
        ));
    }
    let mut slots = Vec::new();
    for (slot, here) in (0..).zip(&config.slots) {
        let Some(uuid) = here.member.filter(|_| slot != own.own_slot) else {
            continue;
        };
        if here.state != SlotState::InSync || !is_before(config, here, loss.epoch) {
            continue;
        }
        let there = loss_on_record(own, slot, uuid);
        let Some(there) = there.filter(|there| config.descends_from(there.epoch)) else {
            return Err(format!(
                "what {path} has changed since it went on without slot {slot} is not on record"
            ));
        };
        let (one, other) = (loss.position.sequence, there.position.sequence);
        if !may_have_parted(&loss, &there) {
            return Err(format!(
                "{path} or slot {slot} has been put back to what it was once (they parted at positions {other} and {one})"
            ));
        }
        slots.push(slot);
    }
    if slots.is_empty() {
        return Err(format!(
            "nobody who has been in-sync since {path} was lost is here"
        ));
    }
    Ok(slots)
}

/// The loss of a member that has not been back since, also not for a part of a resync: what was
/// changed without it stands in its missed map.
#[must_use]
pub fn loss_on_record(superblock: &Superblock, slot: u8, member: Uuid) -> Option<Loss> {
    let record = superblock.slots.get(usize::from(slot))?;
    let gone = matches!(
        record.state,
        SlotState::Stale | SlotState::Faulty | SlotState::Missing
    );
    let loss = record.loss.filter(|_| gone)?;
    let same = record.member == Some(member);
    (same && is_before(superblock, record, loss.epoch)).then_some(loss)
}

/// Whether two losses of each other can be of one moment, by how far each side says that had come.
/// Of one that was lost while the mirror ran (block-exactly) it is how far it had come for certain: a
/// commit under way may have reached it. When both were started without the other it may have
/// reached either.
fn may_have_parted(here: &Loss, there: &Loss) -> bool {
    let (here_at, there_at) = (here.position.sequence, there.position.sequence);
    let reaches = |certain: u64, real: u64| real == certain || real == certain.saturating_add(1);
    match (here.block_exact, there.block_exact) {
        (true, true) => here_at == there_at,
        (true, false) => reaches(here_at, there_at),
        (false, true) => reaches(there_at, here_at),
        (false, false) => here_at.abs_diff(there_at) <= 1,
    }
}

/// Whether the last join of a slot came before `epoch`.
fn is_before(superblock: &Superblock, record: &SlotRecord, epoch: u128) -> bool {
    let ordinal = match age(superblock, epoch) {
        0 => Some(superblock.epoch.ordinal),
        back => superblock.history.get(back - 1).map(|past| past.ordinal),
    };
    ordinal.is_some_and(|ordinal| record.base.ordinal <= ordinal)
}

#[cfg(test)]
#[path = "split_tests.rs"]
mod tests;
