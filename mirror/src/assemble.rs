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
//! in-sync has been read. Otherwise the absent one may hold newer data. A member to which the
//! mirror was handed over may be promoted without them: they have stopped for it
//! (`engine/stop.rs`).
//!
//! An older copy that a start leaves out is given that start's configuration and calls itself
//! stale from then on (`records::disown`): by what it said before, it could serve later beside a
//! member that was lost still earlier. By force, and with nothing else here, it may serve alone.
//!
//! # Who is an older copy (R16)
//!
//! Each map commit names the newest one before it that every receiving member holds. An in-sync
//! member that lacks a commit so named, by another one or by one that is resyncing, is a restored
//! backup or a clone, whatever its superblock says.
//!
//! A member that returns and names a commit as held by all that those who recorded its loss did
//! not hold then went on without them: they are the older copy, and no missed map says what the
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

pub use crate::epochs::short as short_epoch;
use crate::epochs::{Stand, age, cut_off, cut_off_without, history, line, short};
use crate::records;
use crate::superblock::{LastStop, Loss, SlotRecord, SlotState, Superblock};
use dirty_map::Stamp;

/// A member whose superblock and maps were read in this start.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Its path, for messages.
    pub path: String,
    /// Its superblock.
    pub superblock: Superblock,
    /// The newest stamp found on its maps.
    pub position: Stamp,
    /// Its position page is damaged in both copies: it may have come further than its position.
    pub damaged: bool,
    /// The epoch that its position page names as effective; 0 when it names none.
    pub effective: u128,
    /// The commit that its position page names as held by all receiving members; 0 for none.
    pub completed: u64,
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

impl Plan {
    /// Whether nobody but the member at `index` starts in-sync.
    pub(crate) fn serves_alone(&self, index: usize) -> bool {
        let in_sync = |&at: &usize| self.verdicts[at] == Verdict::InSync;
        (0..self.verdicts.len()).filter(in_sync).eq([index])
    }
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
        "split brain: {first} and {second} were both written without the other since epoch {common}; nothing is chosen for you. {first}: {first_history}. {second}: {second_history}. `mirrorctl resolve` shows what each has changed, and keeps the one that you choose"
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
    /// Joins that were cut off.
    #[error(
        "a join of {0} was cut off and had begun to overwrite its maps, so nothing here says what it holds; attach the members that are missing, and re-add it with --full"
    )]
    Overwritten(String),
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
    /// Start without members that have handed the mirror over to one that is here.
    pub promote: bool,
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
    let mut config = seen[newest].superblock.clone();
    let serves = |s: &Seen| !left_out(&s.superblock) && names_in_sync(&config, &s.superblock);
    if options.force && left_out(&config) && !config.own_record().full && !seen.iter().any(serves) {
        // With nothing else here one copy that was left out may serve after all, if its maps
        // have not been overwritten since.
        config.slots[usize::from(config.own_slot)].state = SlotState::InSync;
    }
    let config = &config;
    let reached = reached(seen, config);
    let mut verdicts = Vec::with_capacity(seen.len());
    let mut lost = Vec::new();
    for member in seen {
        let verdict = judge(config, member, seen, reached);
        let slot = member.superblock.own_slot;
        if let Some(reason) = verdict.refusal()
            && names_in_sync(config, &member.superblock)
        {
            lost.push((slot, reason));
        }
        verdicts.push(verdict);
    }
    let handed_over = options.promote && handed_over(seen, config, &verdicts);
    for (slot, record) in config.slots.iter().enumerate() {
        let present = seen
            .iter()
            .any(|s| Some(s.superblock.member) == record.member);
        if record.state == SlotState::InSync && !present {
            let absent = format!(
                "the member in slot {slot} (last seen as {})",
                record.address
            );
            if !options.force && !handed_over {
                return Err(Refusal::MayBeOld { absent });
            }
            lost.push((
                u8::try_from(slot).unwrap_or(u8::MAX),
                format!("{absent} was not found"),
            ));
        }
    }
    if !verdicts.contains(&Verdict::InSync) {
        let serves = |s: &&Seen| names_in_sync(config, &s.superblock);
        if let Some(only) = seen
            .iter()
            .find(|s| serves(s) && is_overwritten(&s.superblock))
        {
            return Err(Refusal::Overwritten(only.path.clone()));
        }
        let reasons: Vec<String> = lost.into_iter().map(|(_, reason)| reason).collect();
        return Err(Refusal::NoSource(reasons.join("; ")));
    }
    Ok(Plan {
        newest,
        verdicts,
        lost,
    })
}

/// Whether a member may go on without the others: it says so, in the very state in which the mirror
/// was stopped.
fn handed_over(seen: &[Seen], config: &Superblock, verdicts: &[Verdict]) -> bool {
    let same = |s: &Superblock| {
        (s.epoch.id, s.event_count) == (config.epoch.id, config.event_count)
            && s.last_stop == LastStop::Clean
    };
    let mut judged = seen.iter().zip(verdicts);
    judged.any(|(member, verdict)| {
        let superblock = &member.superblock;
        superblock.handed_over && same(superblock) && *verdict == Verdict::InSync
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
    let stands = Stand::all_of(member, cut_off_without(config, member));
    if !stands
        .clone()
        .all(|stand| stand.is_known(config, Some(loss.epoch)))
    {
        return refused(format!(
            "split brain: {} went on without this mirror ({}), which is at {}; `mirrorctl resolve` shows both sides; re-add it with --discard-changes to drop what it has changed, or with --full",
            member.path,
            history(superblock),
            history(config)
        ));
    }
    let known = |stand: &Stand| config.descends_from(stand.epoch) || stand.epoch == loss.epoch;
    if !stands.clone().all(|stand| known(&stand)) {
        return full(format!(
            "{} was joining longer ago than the mirror's history reaches",
            member.path
        ));
    }
    let epoch = stands.map(|stand| stand.epoch).next();
    let epoch = epoch.unwrap_or(superblock.epoch.id);
    // A loss that is not block-exact was recorded at a start, by members that may not have known
    // of a round that was cut off: the positions tell.
    if loss.block_exact && epoch != loss.epoch && age(config, epoch) > age(config, loss.epoch) {
        return full(format!(
            "{} is an older copy than the one that was lost",
            member.path
        ));
    }
    if left_out(superblock) {
        return full(left_out_before(member));
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
    let needed = if loss.block_exact {
        loss.position.sequence.max(record.base.sequence)
    } else {
        record.base.sequence
    };
    if at < needed {
        return full(format!(
            "{path} is older than the copy that was lost (position {at} before {needed})"
        ));
    }
    let joined = member.position == record.base;
    let joining = loss.block_exact && age(config, member.effective) < age(config, loss.epoch);
    let without = member.completed;
    if without > loss.position.sequence && !joined && !joining {
        return full(format!(
            "{path} went on after this mirror had lost it (to position {without}, lost at {})",
            loss.position.sequence
        ));
    }
    let exact = loss.block_exact && member.position == loss.position;
    Verdict::Delta { own_hot: !exact }
}

fn judge(config: &Superblock, member: &Seen, seen: &[Seen], reached: Reached) -> Verdict {
    let superblock = &member.superblock;
    if !names_in_sync(config, superblock) {
        let mut config = config.clone();
        records::end_resyncs(&mut config, reached);
        return judge_return(&config, member);
    }
    if left_out(superblock) && superblock.member != config.member {
        return full(left_out_before(member));
    }
    if is_overwritten(superblock) {
        return full(format!("a full resync of {} was cut off", member.path));
    }
    if !epochs_in_sync(config, seen).contains(&superblock.epoch.id) {
        return full(format!(
            "{} is an older copy: its superblock stands at {}, the mirror's at {}",
            member.path,
            history(superblock),
            history(config)
        ));
    }
    let behind = reached.completed.saturating_sub(member.position.sequence);
    if behind > 0 && !member.damaged {
        return full(format!(
            "{} is an older copy (a restored backup or a clone): its maps are {behind} commits behind",
            member.path
        ));
    }
    Verdict::InSync
}

/// How far the commits of those have come that were receiving.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reached {
    /// The newest commit that all of them hold.
    pub(crate) completed: u64,
    /// The newest one that an in-sync member holds.
    pub(crate) ahead: Stamp,
}

/// By what those say that received what the in-sync ones did: those that the configuration names
/// in-sync or that are resyncing, and that stand where these may stand.
pub(crate) fn reached(seen: &[Seen], config: &Superblock) -> Reached {
    let epochs = epochs_in_sync(config, seen);
    let here = seen
        .iter()
        .filter(|s| epochs.contains(&s.superblock.epoch.id));
    let in_sync = |s: &&Seen| names_in_sync(config, &s.superblock);
    let resyncing = |s: &Seen| s.superblock.own_record().state == SlotState::Resyncing;
    let received = here.clone().filter(|s| resyncing(s) || in_sync(s));
    let completed = received.map(|s| s.completed).max().unwrap_or(0);
    let ahead = here.filter(in_sync).map(|s| s.position);
    let mut ahead = ahead.max_by_key(|p| p.sequence).unwrap_or(Stamp {
        ordinal: 0,
        sequence: 0,
    });
    ahead.sequence = ahead.sequence.max(completed);
    Reached { completed, ahead }
}

/// Where in-sync members may stand: at the configuration's epoch, and when that was cut off, at
/// those back to the one it counts as.
fn epochs_in_sync(config: &Superblock, seen: &[Seen]) -> Vec<u128> {
    line(config).take(cut_off(config, seen) + 1).collect()
}

/// Whether a start has left the member out as an older copy (`records::disown`): a member's own
/// superblock never calls it stale otherwise.
pub(crate) fn left_out(superblock: &Superblock) -> bool {
    superblock.own_record().state == SlotState::Stale
}

/// Whether a join has begun to overwrite its maps: it calls itself in-sync, and they may be those of
/// others.
fn is_overwritten(superblock: &Superblock) -> bool {
    let own = superblock.own_record();
    own.full && own.state == SlotState::InSync
}

fn left_out_before(member: &Seen) -> String {
    format!(
        "{} was found to be an older copy at an earlier start",
        member.path
    )
}

fn names_in_sync(config: &Superblock, member: &Superblock) -> bool {
    config
        .slots
        .get(usize::from(member.own_slot))
        .is_some_and(|record| {
            record.state == SlotState::InSync && record.member == Some(member.member)
        })
}

/// Whether all that another member has come to is behind `superblock`.
fn knows(superblock: &Superblock, other: &Superblock, stands: &[Stand]) -> bool {
    let record = superblock.slots.get(usize::from(other.own_slot));
    let lost_at = record
        .filter(|record| record.member == Some(other.member))
        .and_then(|record| record.loss)
        .map(|loss| loss.epoch);
    stands
        .iter()
        .all(|stand| stand.is_known(superblock, lost_at))
}

fn newest(seen: &[Seen]) -> Result<usize, Refusal> {
    let stands = |s: &Seen| Stand::all_of(s, cut_off(&s.superblock, seen)).collect();
    let stands: Vec<Vec<Stand>> = seen.iter().map(stands).collect();
    let knows = |a: usize, b: usize| knows(&seen[a].superblock, &seen[b].superblock, &stands[b]);
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
                !left_out(superblock),
                superblock.epoch.id,
                superblock.event_count,
                superblock.write_count,
            )
        });
    newest.ok_or_else(|| {
        let pairs = (0..seen.len()).flat_map(|a| (0..seen.len()).map(move |b| (a, b)));
        let mut pairs = pairs.filter(|(a, b)| a != b);
        let apart = pairs.find(|&(a, b)| !knows(a, b) && !knows(b, a));
        let not_itself = (0..seen.len()).find(|&i| !knows(i, i));
        match (apart, not_itself) {
            (None, Some(i)) => Refusal::Overwritten(seen[i].path.clone()),
            _ => split_brain(seen, apart.unwrap_or((0, seen.len() - 1))),
        }
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

fn full(reason: String) -> Verdict {
    Verdict::Full { reason }
}

fn refused(reason: String) -> Verdict {
    Verdict::Refused { reason }
}

#[cfg(test)]
#[path = "assemble_tests.rs"]
pub(crate) mod tests;
