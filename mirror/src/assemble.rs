//! Who is in-sync, who returns how, and whether the mirror may start: one pure function over
//! the superblocks that were read.
//!
//! # How "newer" is decided (R10)
//!
//! Each superblock names its epoch and the epochs before it. X is at least as new as Y when
//! Y's epoch is X's or in X's history. The newest superblock must be at least as new as every
//! other one; if there is none, two members went on alone from the same epoch: split brain,
//! and nothing is chosen.
//!
//! A round may have been cut off: some members hold the new epoch, others do not, and nothing
//! was answered under it. That is believed only on evidence, namely a present member that the
//! new epoch names in-sync, that comes from the epoch before, was not resynced since, and does
//! not know the new one. Such an epoch counts as the one before when it is compared (as one
//! further back when several rounds were cut off in turn), and is completed when it turns out
//! to be the newest.
//!
//! An older image of a member looks just like that evidence. Two things tell them apart. Map
//! commits name the newest effective epoch in the position page: what a position page names was
//! effective, whoever does not know it. And every start with a slot that is not in-sync draws an
//! epoch, so that two runs from the same superblock never pass for one.
//!
//! # Who may start alone (R15)
//!
//! The mirror starts only when the superblock of every member that the newest one names
//! in-sync has been read. Otherwise the absent one may hold newer data.
//!
//! # Who is an older copy (R16)
//!
//! Map commits reach all receiving members one after the other, so a member's position lags by
//! at most [`COMMITS_IN_FLIGHT_MAX`]. An in-sync member further behind another, or behind one
//! that is resyncing, is a restored backup or a clone, whatever its superblock says.
//!
//! A member that returns further *ahead* than it can have been when its loss was recorded went
//! on without those who recorded it: they are the older copy, and no missed map says what the
//! two hold differently. Only a join that was cut off while it wrote the member's maps looks
//! the same; the join has made the loss block-exact before, and the epoch in the position page
//! is one that came after the loss.
//!
//! # What cannot be told
//!
//! When every member that is here has been put back to one earlier moment, the superblocks are
//! those of a legal past, and the start goes on from there. Nothing on these disks could say
//! otherwise; that would take a witness which was not put back with them (the members that are
//! absent are such witnesses, and are refused when they return).

use crate::records;
use crate::superblock::{Loss, SlotRecord, SlotState, Superblock};
use dirty_map::Stamp;

/// How far positions of in-sync members may lie apart: one commit runs at a time, and one
/// more may have ended on some members only.
pub const COMMITS_IN_FLIGHT_MAX: u64 = 2;

/// A member whose superblock and maps were read in this start.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Its path, for messages.
    pub path: String,
    /// Its superblock.
    pub superblock: Superblock,
    /// The newest stamp found on its maps.
    pub position: Stamp,
    /// The epoch that its position page names as effective; 0 when it names none.
    pub effective: u128,
}

/// What is to be done with a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It holds every block.
    InSync,
    /// It lacks only the blocks of its missed map.
    Delta {
        /// Whether its own hot extents join the missed map first (R12).
        own_hot: bool,
    },
    /// It lacks an unknown part: everything written must be copied.
    Full {
        /// Why, as a sentence.
        reason: String,
    },
    /// It must not be used.
    Refused {
        /// Why and what to do, as a sentence.
        reason: String,
    },
}

impl Verdict {
    /// Why a member does not come back by itself and what to do, as a sentence.
    #[must_use]
    pub fn refusal(&self) -> Option<String> {
        match self {
            Self::InSync | Self::Delta { .. } => None,
            Self::Full { reason } => Some(format!(
                "{reason}; only a full resync can bring it back: use --full"
            )),
            Self::Refused { reason } => Some(reason.clone()),
        }
    }
}

/// How to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Index of the member whose superblock is the mirror's configuration.
    pub newest: usize,
    /// One verdict for each member seen.
    pub verdicts: Vec<Verdict>,
    /// Slots that the configuration names in-sync but that do not start as such, with the
    /// reason: they are lost before anything is answered.
    pub lost: Vec<(u8, String)>,
}

/// Why the mirror does not start.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Nothing was given.
    #[error("no member was found; give the members' paths, or --scan with a directory or device")]
    NoMembers,
    /// Members of several mirrors.
    #[error("{0} and {1} belong to different mirrors; start each with its own members")]
    Foreign(String, String),
    /// Divergent histories.
    #[error(
        "split brain: {first} and {second} were both written without the other since epoch {common}; nothing is chosen for you. {first}: {first_history}. {second}: {second_history}. Start with the one to keep alone and --force, then re-add the other with --full"
    )]
    SplitBrain {
        /// One side.
        first: String,
        /// The other side.
        second: String,
        /// The last epoch both know.
        common: String,
        /// What the first side did.
        first_history: String,
        /// What the other side did.
        second_history: String,
    },
    /// A member that may hold newer data is absent.
    #[error(
        "{absent} of this mirror has not been found and may hold newer data than what is here; attach it, or start with --force if it is lost for good"
    )]
    MayBeOld {
        /// Which one, in words.
        absent: String,
    },
    /// Two devices claim to be one member.
    #[error(
        "{first} and {second} both claim to be the same member (one is a copy of the other); detach the copy"
    )]
    Twice {
        /// One device.
        first: String,
        /// The other.
        second: String,
    },
    /// No usable copy.
    #[error(
        "no member that is here holds a complete copy: {0}. Attach the members that are missing; to go on with what an older copy holds, start with it alone and --force"
    )]
    NoSource(String),
}

/// Choices of the operator.
#[derive(Clone, Copy, Debug, Default)]
pub struct AssembleOptions {
    /// Start although an absent member may hold newer data.
    pub force: bool,
}

/// Decides how to start from the members seen.
///
/// # Errors
///
/// When starting could serve old or wrong data; the reason is a sentence.
pub fn assemble(seen: &[Seen], options: AssembleOptions) -> Result<Plan, Refusal> {
    same_mirror(seen)?;
    no_member_twice(seen)?;
    let newest = newest(seen)?;
    let config = &seen[newest].superblock;
    let ahead = furthest(seen, config);
    let mut verdicts = Vec::with_capacity(seen.len());
    let mut lost = Vec::new();
    for member in seen {
        let verdict = judge(config, member, seen, ahead);
        let slot = member.superblock.own_slot;
        if let Some(reason) = verdict.refusal()
            && names_in_sync(config, &member.superblock)
        {
            lost.push((slot, reason));
        }
        verdicts.push(verdict);
    }
    for (slot, record) in config.slots.iter().enumerate() {
        let present = seen
            .iter()
            .any(|s| Some(s.superblock.member) == record.member);
        if record.state == SlotState::InSync && !present {
            let absent = format!(
                "the member in slot {slot} (last seen as {})",
                record.address
            );
            if !options.force {
                return Err(Refusal::MayBeOld { absent });
            }
            lost.push((
                u8::try_from(slot).unwrap_or(u8::MAX),
                format!("{absent} was not found"),
            ));
        }
    }
    if !verdicts.contains(&Verdict::InSync) {
        let reasons: Vec<String> = lost.into_iter().map(|(_, reason)| reason).collect();
        return Err(Refusal::NoSource(reasons.join("; ")));
    }
    Ok(Plan {
        newest,
        verdicts,
        lost,
    })
}

/// Decides how a former member comes back to a running mirror with configuration `config`.
#[must_use]
pub fn judge_return(config: &Superblock, member: &Seen) -> Verdict {
    let superblock = &member.superblock;
    if superblock.mirror != config.mirror {
        return refused(format!(
            "{} belongs to another mirror ('{}'); use `add --force` to make it a new disk of this one",
            member.path, superblock.name
        ));
    }
    let Some(record) = config.slots.get(usize::from(superblock.own_slot)) else {
        return refused(format!(
            "{} names a slot that the mirror does not have; use `add --force` to make it a new disk of this one",
            member.path
        ));
    };
    if record.member != Some(superblock.member) {
        return refused(format!(
            "slot {} now belongs to another disk; use `add` to bring {} in as a new one",
            superblock.own_slot, member.path
        ));
    }
    let Some(loss) = record.loss else {
        return full(format!("no loss of {} is on record", member.path));
    };
    let epoch = line(superblock).nth(cut_off_without(config, member));
    let epoch = epoch.unwrap_or(superblock.epoch.id);
    let known = |epoch| config.descends_from(epoch) || epoch == loss.epoch;
    if !known(epoch) || foreign_maps(member).is_some_and(|epoch| !known(epoch)) {
        return refused(format!(
            "split brain: {} went on without this mirror ({}), which is at {}; re-add it with --full to drop its changes",
            member.path,
            history(superblock),
            history(config)
        ));
    }
    if epoch != loss.epoch && age(config, epoch) > age(config, loss.epoch) {
        return full(format!(
            "{} is an older copy than the one that was lost",
            member.path
        ));
    }
    if superblock.own_record().full && !record.full {
        return full(format!("a full resync of {} was cut off", member.path));
    }
    match judge_position(config, record, loss, member) {
        Verdict::Delta { own_hot } => Verdict::Delta {
            own_hot: own_hot || epoch != loss.epoch,
        },
        verdict => verdict,
    }
}

/// The part of [`judge_return`] that is about positions (R16). Sequences never fall from one
/// epoch to the next, so along one history they alone tell.
fn judge_position(config: &Superblock, record: &SlotRecord, loss: Loss, member: &Seen) -> Verdict {
    let (path, at) = (&member.path, member.position.sequence);
    let needed = loss.position.sequence.max(record.base.sequence);
    if at < needed {
        return full(format!(
            "{path} is older than the copy that was lost (position {at} before {needed})"
        ));
    }
    // A loss that is not block-exact was recorded at a start, where its position is already
    // that of the furthest member less the commits that may have been in flight.
    let slack = if loss.block_exact { 1 } else { 2 } * COMMITS_IN_FLIGHT_MAX;
    let joined = member.position == record.base;
    let joining = loss.block_exact && age(config, member.effective) < age(config, loss.epoch);
    if at > loss.position.sequence + slack && !joined && !joining {
        return full(format!(
            "{path} went on after this mirror had lost it (position {at}, lost at {needed})"
        ));
    }
    let exact = loss.block_exact && member.position == loss.position;
    Verdict::Delta { own_hot: !exact }
}

fn judge(config: &Superblock, member: &Seen, seen: &[Seen], ahead: Option<Stamp>) -> Verdict {
    let superblock = &member.superblock;
    if !names_in_sync(config, superblock) {
        let mut config = config.clone();
        if let Some(ahead) = ahead {
            records::end_resyncs(&mut config, ahead);
        }
        return judge_return(&config, member);
    }
    if !epochs_in_sync(config, seen).contains(&superblock.epoch.id) {
        return full(format!(
            "{} is an older copy: its superblock stands at {}, the mirror's at {}",
            member.path,
            history(superblock),
            history(config)
        ));
    }
    let behind = ahead.map_or(0, |a| a.sequence.saturating_sub(member.position.sequence));
    if behind > COMMITS_IN_FLIGHT_MAX {
        return full(format!(
            "{} is an older copy (a restored backup or a clone): its maps are {behind} commits behind",
            member.path
        ));
    }
    Verdict::InSync
}

/// The furthest position among members that received what the in-sync ones did: those that the
/// configuration names in-sync or that are resyncing, and that stand where these may stand.
fn furthest(seen: &[Seen], config: &Superblock) -> Option<Stamp> {
    let epochs = epochs_in_sync(config, seen);
    let received = |s: &&Seen| {
        let resyncing = s.superblock.own_record().state == SlotState::Resyncing;
        epochs.contains(&s.superblock.epoch.id)
            && (resyncing || names_in_sync(config, &s.superblock))
    };
    let received = seen.iter().filter(received);
    received
        .map(|s| s.position)
        .max_by_key(|position| position.sequence)
}

/// Where in-sync members may stand: at the configuration's epoch, and when that was cut off, at
/// those back to the one it counts as.
fn epochs_in_sync(config: &Superblock, seen: &[Seen]) -> Vec<u128> {
    line(config).take(cut_off(config, seen) + 1).collect()
}

fn names_in_sync(config: &Superblock, member: &Superblock) -> bool {
    config
        .slots
        .get(usize::from(member.own_slot))
        .is_some_and(|record| {
            record.state == SlotState::InSync && record.member == Some(member.member)
        })
}

/// The epoch of a superblock and those before it.
fn line(superblock: &Superblock) -> impl Iterator<Item = u128> {
    let history = superblock.history.iter().map(|epoch| epoch.id);
    std::iter::once(superblock.epoch.id).chain(history)
}

/// How many epochs a superblock counts back because their rounds were cut off, as far as the
/// members present tell (R10).
fn cut_off(superblock: &Superblock, seen: &[Seen]) -> usize {
    let witnesses = seen
        .iter()
        .map(|s| (&s.superblock, s.superblock.own_record()));
    count_back(superblock, seen, witnesses)
}

/// The same for a former member of a mirror whose in-sync members all know `config`.
fn cut_off_without(config: &Superblock, member: &Seen) -> usize {
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
/// it and it is not in-sync (a round reaches such members last).
fn proves(member: &Seen, epoch: u128) -> bool {
    let last = member.superblock.own_record().state != SlotState::InSync;
    member.effective == epoch || last && member.superblock.epoch.id == epoch
}

/// The epoch that a member's maps come from, when its superblock does not know it: a join was
/// cut off.
fn foreign_maps(member: &Seen) -> Option<u128> {
    let foreign = member.effective != 0 && !member.superblock.descends_from(member.effective);
    foreign.then_some(member.effective)
}

/// The epochs of a member that the newest one must know.
fn to_be_known(member: &Seen, seen: &[Seen]) -> Vec<u128> {
    let epoch = line(&member.superblock).nth(cut_off(&member.superblock, seen));
    epoch.into_iter().chain(foreign_maps(member)).collect()
}

/// Whether all of another member's `epochs` are behind `superblock`. Of one that was lost long
/// ago the slot's record remembers what the history has forgotten.
fn knows(superblock: &Superblock, other: &Superblock, epochs: &[u128]) -> bool {
    let record = superblock.slots.get(usize::from(other.own_slot));
    let lost_at = record
        .filter(|record| record.member == Some(other.member))
        .and_then(|record| record.loss)
        .map(|loss| loss.epoch);
    epochs
        .iter()
        .all(|&epoch| superblock.descends_from(epoch) || lost_at == Some(epoch))
}

fn newest(seen: &[Seen]) -> Result<usize, Refusal> {
    let epochs: Vec<Vec<u128>> = seen.iter().map(|s| to_be_known(s, seen)).collect();
    let knows = |a: usize, b: usize| knows(&seen[a].superblock, &seen[b].superblock, &epochs[b]);
    let newest = (0..seen.len())
        .filter(|&i| (0..seen.len()).all(|other| knows(i, other)))
        .max_by_key(|&i| {
            let superblock = &seen[i].superblock;
            let behind = seen
                .iter()
                .filter(|s| superblock.descends_from(s.superblock.epoch.id));
            // Of two epochs that were cut off side by side either will do, but not by the order
            // in which the members were found. Events count within one epoch only.
            (
                behind.count(),
                superblock.epoch.id,
                superblock.event_count,
                superblock.write_count,
            )
        });
    newest.ok_or_else(|| {
        let pairs = (0..seen.len()).flat_map(|a| (0..seen.len()).map(move |b| (a, b)));
        let apart = pairs.filter(|(a, b)| a != b);
        let apart = apart
            .into_iter()
            .find(|&(a, b)| !knows(a, b) && !knows(b, a));
        split_brain(seen, apart.unwrap_or((0, seen.len() - 1)))
    })
}

fn split_brain(seen: &[Seen], (a, b): (usize, usize)) -> Refusal {
    let (first, second) = (&seen[a], &seen[b]);
    let common = first
        .superblock
        .history
        .iter()
        .find(|e| second.superblock.descends_from(e.id));
    Refusal::SplitBrain {
        first: first.path.clone(),
        second: second.path.clone(),
        common: common.map_or_else(|| "unknown".into(), |epoch| short(epoch.id)),
        first_history: history(&first.superblock),
        second_history: history(&second.superblock),
    }
}

fn same_mirror(seen: &[Seen]) -> Result<(), Refusal> {
    let first = seen.first().ok_or(Refusal::NoMembers)?;
    match seen
        .iter()
        .find(|s| s.superblock.mirror != first.superblock.mirror)
    {
        Some(other) => Err(Refusal::Foreign(first.path.clone(), other.path.clone())),
        None => Ok(()),
    }
}

fn no_member_twice(seen: &[Seen]) -> Result<(), Refusal> {
    for (index, member) in seen.iter().enumerate() {
        let uuid = member.superblock.member;
        if let Some(twin) = seen[..index]
            .iter()
            .find(|other| other.superblock.member == uuid)
        {
            let (first, second) = (twin.path.clone(), member.path.clone());
            return Err(Refusal::Twice { first, second });
        }
    }
    Ok(())
}

/// How many epochs back `epoch` lies; the largest number when it is unknown.
fn age(config: &Superblock, epoch: u128) -> usize {
    if config.epoch.id == epoch {
        return 0;
    }
    config
        .history
        .iter()
        .position(|past| past.id == epoch)
        .map_or(usize::MAX, |index| index + 1)
}

fn full(reason: String) -> Verdict {
    Verdict::Full { reason }
}

fn refused(reason: String) -> Verdict {
    Verdict::Refused { reason }
}

/// The first eight digits of an epoch.
fn short(epoch: u128) -> String {
    format!("{epoch:032x}")[..8].to_owned()
}

/// An epoch and the two before it, in words.
fn history(superblock: &Superblock) -> String {
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

#[cfg(test)]
#[path = "assemble_tests.rs"]
mod tests;
