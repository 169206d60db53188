//! Who descends from whom (R10): the part of `assemble.rs` that is about epochs. What cut-off
//! rounds and older images look like, and what tells them apart, stands there.

use crate::assemble::Seen;
use crate::superblock::{HISTORY_MAX, SlotRecord, SlotState, Superblock};

/// The epoch of a superblock and those before it.
pub(crate) fn line(superblock: &Superblock) -> impl Iterator<Item = u128> {
    let history = superblock.history.iter().map(|epoch| epoch.id);
    std::iter::once(superblock.epoch.id).chain(history)
}

/// An epoch that a member has come to, by its superblock or by its maps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stand {
    pub(crate) epoch: u128,
    ordinal: u32,
    /// The member may have gone on from there by itself: it calls itself in-sync.
    claims: bool,
}

impl Stand {
    /// All of a member's, when its superblock counts `back` epochs.
    pub(crate) fn all_of(member: &Seen, back: usize) -> impl Iterator<Item = Self> + Clone {
        let superblock = &member.superblock;
        let past = superblock.history.get(back.wrapping_sub(1));
        let epoch = past.copied().unwrap_or(superblock.epoch);
        let own = Self {
            epoch: epoch.id,
            ordinal: epoch.ordinal,
            claims: superblock.own_record().state == SlotState::InSync,
        };
        // Maps of an epoch that the superblock does not know: a join was cut off.
        let effective = member.effective;
        let foreign = effective != 0 && !superblock.descends_from(effective);
        let maps = foreign.then_some(Self {
            epoch: effective,
            ordinal: member.position.ordinal,
            claims: false,
        });
        std::iter::once(own).chain(maps)
    }

    /// Whether it lies behind `superblock`. Of a member that was lost long ago the slot's record
    /// remembers what the history has forgotten; of one that was joining and could not have gone
    /// on by itself the age tells.
    pub(crate) fn is_known(&self, superblock: &Superblock, lost_at: Option<u128>) -> bool {
        superblock.descends_from(self.epoch)
            || lost_at == Some(self.epoch)
            || !self.claims && self.is_forgotten(superblock)
    }

    /// Whether it is older than all that a full history reaches.
    fn is_forgotten(&self, superblock: &Superblock) -> bool {
        let full = superblock.history.len() == HISTORY_MAX;
        let oldest = superblock.history.last().filter(|_| full);
        oldest.is_some_and(|oldest| self.ordinal < oldest.ordinal)
    }
}

/// How many epochs a superblock counts back because their rounds were cut off, as far as the
/// members present tell (R10).
pub(crate) fn cut_off(superblock: &Superblock, seen: &[Seen]) -> usize {
    let witnesses = seen
        .iter()
        .map(|s| (&s.superblock, s.superblock.own_record()));
    count_back(superblock, seen, witnesses)
}

/// The same for a former member of a mirror whose in-sync members all know `config`.
pub(crate) fn cut_off_without(config: &Superblock, member: &Seen) -> usize {
    let in_sync = config.slots.iter().filter(|r| r.state == SlotState::InSync);
    let witnesses = in_sync.map(|record| (config, record));
    count_back(&member.superblock, std::slice::from_ref(member), witnesses)
}

/// A witness is a member that should have the epoch and does not, with its slot's record. Of
/// several rounds that were cut off one after the other it may have none; but when it lacks an
/// epoch that was effective, it is an older copy and proves nothing.
fn count_back<'a>(
    superblock: &Superblock,
    proofs: &[Seen],
    witnesses: impl Iterator<Item = (&'a Superblock, &'a SlotRecord)>,
) -> usize {
    let effective =
        line(superblock).position(|epoch| proofs.iter().any(|seen| proves(seen, epoch)));
    let known = |(other, record): (&Superblock, &SlotRecord)| {
        let mut slots = superblock.slots.iter();
        let in_sync = slots.any(|r| r.state == SlotState::InSync && r.member == record.member);
        let resynced_since = record.base.ordinal >= superblock.epoch.ordinal;
        if !in_sync || resynced_since {
            return None;
        }
        line(superblock).position(|epoch| other.descends_from(epoch))
    };
    witnesses
        .filter_map(known)
        .filter(|&back| back <= effective.unwrap_or(1))
        .max()
        .unwrap_or(0)
}

/// Whether a member shows that an epoch was effective: its maps name it, or its superblock has
/// it and it is resyncing (a round reaches such members last).
fn proves(member: &Seen, epoch: u128) -> bool {
    let last = member.superblock.own_record().state == SlotState::Resyncing;
    member.effective == epoch || last && member.superblock.epoch.id == epoch
}

/// How many epochs back `epoch` lies; the largest number when it is unknown.
pub(crate) fn age(config: &Superblock, epoch: u128) -> usize {
    if config.epoch.id == epoch {
        return 0;
    }
    config
        .history
        .iter()
        .position(|past| past.id == epoch)
        .map_or(usize::MAX, |index| index + 1)
}

/// The first eight digits of an epoch.
#[must_use]
pub fn short(epoch: u128) -> String {
    format!("{epoch:032x}")[..8].to_owned()
}

/// An epoch and the two before it, in words.
pub(crate) fn history(superblock: &Superblock) -> String {
    let mut text = format!(
        "epoch {} (event {})",
        short(superblock.epoch.id),
        superblock.event_count
    );
    for epoch in superblock.history.iter().take(2) {
        text.push_str(&format!(" after {}", short(epoch.id)));
    }
    text
}
