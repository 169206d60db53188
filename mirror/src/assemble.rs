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
//! not know the new one. Such an epoch counts as its parent when it is compared, and is
//! completed when it turns out to be the newest.
//!
//! # Who may start alone (R15)
//!
//! The mirror starts only when the superblock of every member that the newest one names
//! in-sync has been read. Otherwise the absent one may hold newer data.
//!
//! # Who is an older copy (R16)
//!
//! Map commits reach all receiving members one after the other, so a member's position lags by
//! at most [`COMMITS_IN_FLIGHT_MAX`]. An in-sync member further behind is a restored backup or
//! a clone, whatever its superblock says.

use crate::superblock::{SlotState, Superblock};
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
    #[error("no member holds a complete copy: {0}")]
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
    let ahead = in_sync_position(seen, config);
    let mut verdicts = Vec::with_capacity(seen.len());
    let mut lost = Vec::new();
    for member in seen {
        let verdict = judge(config, member, seen, ahead);
        let slot = member.superblock.own_slot;
        if let Verdict::Full { reason } | Verdict::Refused { reason } = &verdict
            && names_in_sync(config, &member.superblock)
        {
            lost.push((slot, reason.clone()));
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
            "{} names a slot that the mirror does not have",
            member.path
        ));
    };
    if record.member != Some(superblock.member) {
        return refused(format!(
            "slot {} now belongs to another disk; use `add` to bring {} in as a new one",
            superblock.own_slot, member.path
        ));
    }
    let epoch = if ineffective(superblock, std::iter::once(config)) {
        parent(superblock)
    } else {
        superblock.epoch.id
    };
    let Some(loss) = record.loss else {
        return full(format!("no loss of {} is on record", member.path));
    };
    if !config.descends_from(epoch) && epoch != loss.epoch {
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
    // Sequences never fall from one epoch to the next, so along one history they alone tell.
    let needed = loss.position.sequence.max(record.base.sequence);
    if member.position.sequence < needed {
        return full(format!(
            "{} is older than the copy that was lost (position {} before {needed})",
            member.path, member.position.sequence
        ));
    }
    let exact = loss.block_exact && member.position == loss.position && epoch == loss.epoch;
    Verdict::Delta { own_hot: !exact }
}

fn judge(config: &Superblock, member: &Seen, seen: &[Seen], ahead: Option<Stamp>) -> Verdict {
    let superblock = &member.superblock;
    if !names_in_sync(config, superblock) {
        return judge_return(config, member);
    }
    let completes = superblock.epoch.id == parent(config)
        && ineffective(config, seen.iter().map(|s| &s.superblock));
    if superblock.epoch.id != config.epoch.id && !completes {
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

/// The furthest position among members that the configuration names in-sync and that stand at
/// its epoch or the one before.
fn in_sync_position(seen: &[Seen], config: &Superblock) -> Option<Stamp> {
    seen.iter()
        .filter(|s| names_in_sync(config, &s.superblock))
        .filter(|s| [config.epoch.id, parent(config)].contains(&s.superblock.epoch.id))
        .map(|s| s.position)
        .max_by_key(|position| position.sequence)
}

fn names_in_sync(config: &Superblock, member: &Superblock) -> bool {
    config
        .slots
        .get(usize::from(member.own_slot))
        .is_some_and(|record| {
            record.state == SlotState::InSync && record.member == Some(member.member)
        })
}

fn parent(superblock: &Superblock) -> u128 {
    superblock
        .history
        .first()
        .map_or(superblock.epoch.id, |epoch| epoch.id)
}

/// Whether there is evidence that `superblock`'s epoch never became effective (R10).
fn ineffective<'a>(
    superblock: &Superblock,
    mut others: impl Iterator<Item = &'a Superblock>,
) -> bool {
    let Some(before) = superblock.history.first() else {
        return false;
    };
    others.any(|other| {
        let resynced_since = other.own_record().base.ordinal >= superblock.epoch.ordinal;
        other.member != superblock.member
            && names_in_sync(superblock, other)
            && !resynced_since
            && other.descends_from(before.id)
            && !other.descends_from(superblock.epoch.id)
    })
}

fn newest(seen: &[Seen]) -> Result<usize, Refusal> {
    let counts_as: Vec<u128> = seen
        .iter()
        .map(|s| {
            let cut_off = ineffective(&s.superblock, seen.iter().map(|o| &o.superblock));
            if cut_off {
                parent(&s.superblock)
            } else {
                s.superblock.epoch.id
            }
        })
        .collect();
    let newest = (0..seen.len())
        .filter(|&i| {
            counts_as
                .iter()
                .all(|&epoch| seen[i].superblock.descends_from(epoch))
        })
        .max_by_key(|&i| {
            (
                seen[i].superblock.event_count,
                seen[i].superblock.write_count,
            )
        });
    newest.ok_or_else(|| split_brain(seen, &counts_as))
}

fn split_brain(seen: &[Seen], counts_as: &[u128]) -> Refusal {
    let pair = (0..seen.len())
        .flat_map(|a| (0..seen.len()).map(move |b| (a, b)))
        .find(|&(a, b)| {
            !seen[a].superblock.descends_from(counts_as[b])
                && !seen[b].superblock.descends_from(counts_as[a])
        });
    let (a, b) = pair.unwrap_or((0, seen.len() - 1));
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

#[cfg(test)]
#[path = "assemble_histories.rs"]
#[allow(clippy::unwrap_used, clippy::print_stderr)]
mod histories;
