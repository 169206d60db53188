//! Looking at the members of a stopped mirror, and mending them: what `mirrorctl check` and
//! `mirrorctl repair` share.
//!
//! | module | looks at |
//! |---|---|
//! | [`member`] | a member's superblock copies and its size |
//! | [`maps`] | every map sector in both copies, and the in-sync members against each other |
//! | [`blocks`] | the blocks of written extents: copies against checksums and each other |
//! | [`mend`] | nothing: it writes what [`blocks`] found to be right |
//! | [`stream`] | nothing: it reads a member ahead of [`blocks`] |
//! | [`report`] | what is said of it all |
//!
//! Both commands take the same way, so that a repair mends exactly what a check finds. A check
//! opens everything read-only.
//!
//! # The order of a repair, and why
//!
//! It may be cut off at any point, also by a power cut that loses what was not flushed.
//!
//! 1. All members are flushed: an earlier repair may have been killed with its writes in a
//!    disk's cache, and what is read below has to be durable before a checksum vouches for it.
//! 2. Superblock copies, each from the other copy of the same member, which stays whole.
//! 3. Map sectors ([`maps`]): copy A everywhere, durably, then copy B.
//! 4. Extent by extent ([`mend`]): the checksums of members that hold the right content, durably;
//!    then the copies that are wrong, durably, and read back; then the checksums of those.
//!
//! A checksum never goes before the content that it vouches for: cut off in between, it would
//! make a block that reads well a damaged one as soon as the other copy is gone too. The
//! checksums of those who hold the right content go first because a write that is cut off can
//! tear: were nothing known about either copy, nobody could tell the torn one from the good one.
//! `mirror::verdict`'s tests walk through every such order and cut.
//!
//! Hot extents are left to the start's equalising, which knows what their checksums are worth,
//! and blocks without a copy that is provably right are never written to.

mod blocks;
mod device;
mod maps;
mod member;
mod mend;
pub(crate) mod report;
mod stream;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::path::PathBuf;

use dirty_map::{ExtentState, StateMap};
use mirror::assemble::{AssembleOptions, Refusal, Seen, Verdict, assemble};
use mirror::superblock::{LastStop, SlotState, Superblock};

pub(crate) use blocks::Blocks;
pub(crate) use maps::load_states;
use member::Member;
pub(crate) use member::{CHUNK_PAGES, chunks, narrow, sector_kind};
use report::{Class, Finding, Findings, Kind, Outcome};

use crate::failure::{Failure, words};
use crate::medium::{Access, identity};
use crate::progress::Progress;
use crate::run_dir::RunDir;
use crate::{client, output};

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Only look.
    Check,
    /// Look, and say what a repair would mend.
    DryRun,
    /// Mend.
    Repair,
}

/// What to look at.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    /// The members' devices and files.
    pub(crate) paths: &'a [PathBuf],
    /// What to do.
    pub(crate) mode: Mode,
    /// Repair although an in-sync member is not here.
    pub(crate) force: bool,
    /// How many findings are kept to be shown.
    pub(crate) limit: usize,
}

/// Who is who, as a start would decide.
#[derive(Debug)]
pub(crate) struct Assembly {
    /// The mirror's configuration.
    pub(crate) config: Superblock,
    /// A verdict for each given member; `None` for one that cannot be used.
    pub(crate) verdicts: Vec<Option<Verdict>>,
    /// The in-sync members, by their index among those given, in order of their slots.
    in_sync: Vec<usize>,
    /// How many members the mirror names in-sync that are not here.
    absent: usize,
    /// Why a start would be refused, as a sentence.
    pub(crate) refusal: Option<String>,
    /// Whether the mirror was not stopped cleanly.
    pub(crate) unclean: bool,
}

/// All that is said in the end.
#[derive(Debug)]
pub(crate) struct Inspection {
    /// Path and slot of each given member.
    pub(crate) members: Vec<(String, Option<u8>)>,
    /// `None` when no given member can be used.
    pub(crate) assembly: Option<Assembly>,
    /// Slots with a member that was not given: slot, state, last known path.
    pub(crate) not_given: Vec<(usize, SlotState, String)>,
    /// How many extents are cool, hot, unwritten and discarded.
    pub(crate) extents: [u32; 4],
    /// How many blocks were looked at.
    pub(crate) blocks: Blocks,
    /// What was found.
    pub(crate) findings: Findings,
}

/// Looks at the members, and mends them when asked to.
///
/// Fails when a path is in use, no member or of another mirror, when who is right cannot be
/// told, and when a device goes away.
pub(crate) fn inspect(
    request: &Request<'_>,
    run_dir: &RunDir,
    progress: &mut Progress,
) -> Result<Inspection, Failure> {
    let mut members = open(request)?;
    let mut seen = Vec::new();
    for member in &members {
        refuse_running(member, run_dir)?;
        seen.push(member.seen()?);
    }
    let assembly = decide(&seen)?;
    let mut findings = Findings::new(request.limit);
    let mut inspection = Inspection {
        members: members.iter().map(Member::name).collect(),
        not_given: Vec::new(),
        extents: [0; 4],
        blocks: Blocks::default(),
        assembly: None,
        findings: Findings::new(0),
    };
    if let Some(assembly) = &assembly {
        inspection.not_given = not_given(assembly, &members, request.mode, &mut findings);
        not_used(assembly, &members, request.mode, &mut findings);
        refuse_incomplete(request, assembly)?;
    }
    if request.mode == Mode::Repair {
        for member in &members {
            flush(member)?;
        }
    }
    for member in &mut members {
        match request.mode {
            Mode::Check => {}
            Mode::DryRun => member.would_mend_superblock(),
            Mode::Repair => member.mend_superblock(),
        }
        for finding in std::mem::take(&mut member.findings) {
            findings.add(finding);
        }
    }
    if let Some(assembly) = &assembly {
        let states = maps::look(&members, assembly, request.mode, &mut findings)?;
        inspection.extents = counts(&states);
        let view = blocks::View {
            members: &members,
            assembly,
            states: &states,
            mode: request.mode,
        };
        inspection.blocks = blocks::look(&view, &mut findings, progress)?;
    }
    progress.end();
    inspection.assembly = assembly;
    inspection.findings = findings;
    Ok(inspection)
}

fn open(request: &Request<'_>) -> Result<Vec<Member>, Failure> {
    let access = if request.mode == Mode::Repair {
        Access::Exclusive
    } else {
        Access::Undisturbed
    };
    let mut given = BTreeSet::new();
    let mut members = Vec::new();
    for path in request.paths {
        if identity(path).is_some_and(|identity| !given.insert(identity)) {
            return Err(Failure::usage(format!(
                "{} is given twice, or by two names.",
                path.display()
            )));
        }
        members.push(Member::open(path, access)?);
    }
    Ok(members)
}

/// A member that a running mirror has let go of is not open, and still not to be judged alone.
fn refuse_running(member: &Member, run_dir: &RunDir) -> Result<(), Failure> {
    let Some(superblock) = &member.superblock else {
        return Ok(());
    };
    let (name, uuid) = (&superblock.name, superblock.mirror.to_string());
    if !client::is_running(run_dir, name).unwrap_or(false) {
        return Ok(());
    }
    match client::served(run_dir, name)? {
        Some(status) if status.uuid != uuid => Ok(()),
        _ => Err(Failure::busy(format!(
            "Mirror {name}, of which {} is a member, is running. Stop it first with 'mirrorctl \
             stop {name}'.",
            member.path
        ))),
    }
}

/// Decides as a start does; where that refuses because a member is not here, as one by force.
fn decide(seen: &[Option<Seen>]) -> Result<Option<Assembly>, Failure> {
    let usable: Vec<Seen> = seen.iter().flatten().cloned().collect();
    if usable.is_empty() {
        return Ok(None);
    }
    let refused =
        |refusal: Refusal| Failure::refused(format!("{}.", output::capital(&refusal.to_string())));
    let (plan, refusal) = match assemble(&usable, AssembleOptions::default()) {
        Ok(plan) => (plan, None),
        Err(why @ Refusal::MayBeOld { .. }) => {
            let forced = assemble(
                &usable,
                AssembleOptions {
                    force: true,
                    ..AssembleOptions::default()
                },
            );
            (forced.map_err(refused)?, Some(why.to_string()))
        }
        Err(why) => return Err(refused(why)),
    };
    let config = usable[plan.newest].superblock.clone();
    let mut verdicts = plan.verdicts.into_iter();
    let verdicts: Vec<Option<Verdict>> = seen
        .iter()
        .map(|seen| seen.as_ref().and_then(|_| verdicts.next()))
        .collect();
    let slot = |index: &usize| seen[*index].as_ref().map(|seen| seen.superblock.own_slot);
    let mut in_sync: Vec<usize> = (0..seen.len())
        .filter(|&index| verdicts[index] == Some(Verdict::InSync))
        .collect();
    in_sync.sort_by_key(slot);
    let records = config.slots.iter();
    let absent = records.filter(|record| {
        let here = usable
            .iter()
            .any(|s| Some(s.superblock.member) == record.member);
        record.state == SlotState::InSync && !here
    });
    if let Some(odd) = in_sync
        .iter()
        .filter_map(|&index| seen[index].as_ref())
        .find(|seen| seen.superblock.layout != config.layout)
    {
        return Err(Failure::refused(format!(
            "{} is laid out in another way than the other members of its mirror; nothing can be \
             compared.",
            odd.path
        )));
    }
    Ok(Some(Assembly {
        absent: absent.count(),
        unclean: in_sync
            .iter()
            .filter_map(|&index| seen[index].as_ref())
            .any(|seen| seen.superblock.last_stop == LastStop::Unclean),
        config,
        verdicts,
        in_sync,
        refusal,
    }))
}

fn not_given(
    assembly: &Assembly,
    members: &[Member],
    mode: Mode,
    findings: &mut Findings,
) -> Vec<(usize, SlotState, String)> {
    let mut absent = Vec::new();
    for (slot, record) in assembly.config.slots.iter().enumerate() {
        let here = |member: &Member| {
            let superblock = member.superblock.as_ref();
            superblock.is_some_and(|superblock| Some(superblock.member) == record.member)
        };
        if record.member.is_none() || members.iter().any(here) {
            continue;
        }
        absent.push((slot, record.state, record.address.clone()));
        if record.state == SlotState::InSync {
            let why = "it is not here".to_owned();
            findings.add(Finding {
                class: Class::Incomplete,
                kind: Kind::NotGiven,
                member: Some((record.address.clone(), u8::try_from(slot).ok())),
                bytes: None,
                what: "in-sync, but not given or not usable: it may hold newer data, and what it \
                       holds is not checked"
                    .to_owned(),
                outcome: if mode == Mode::Check {
                    Outcome::Found
                } else {
                    Outcome::Left(why)
                },
            });
        }
    }
    absent
}

/// Members that are here, that the mirror calls in-sync, and that a start would not use as such: an
/// image from a backup, above all.
fn not_used(assembly: &Assembly, members: &[Member], mode: Mode, findings: &mut Findings) {
    for (member, verdict) in members.iter().zip(&assembly.verdicts) {
        let (Some(superblock), Some(verdict)) = (&member.superblock, verdict) else {
            continue;
        };
        let mut records = assembly.config.slots.iter();
        let named = records.any(|record| {
            record.state == SlotState::InSync && record.member == Some(superblock.member)
        });
        let Some(why) = verdict.refusal().filter(|_| named) else {
            continue;
        };
        findings.add(Finding {
            class: Class::Incomplete,
            kind: Kind::NotGiven,
            member: Some(member.name()),
            bytes: None,
            what: format!("in-sync, but what is here cannot be used, and is not checked: {why}"),
            outcome: if mode == Mode::Check {
                Outcome::Found
            } else {
                Outcome::Left("a running mirror takes it back with 'mirrorctl re-add'".to_owned())
            },
        });
    }
}

fn refuse_incomplete(request: &Request<'_>, assembly: &Assembly) -> Result<(), Failure> {
    match &assembly.refusal {
        Some(why) if request.mode != Mode::Check && !request.force => {
            // The sentence ends with what to do about a start.
            let what = why.split(';').next().unwrap_or(why);
            Err(Failure::refused(format!(
                "Nothing was repaired: {what}. Give it as well, or repair what is here with \
                 --force if it is lost for good."
            )))
        }
        _ => Ok(()),
    }
}

fn flush(member: &Member) -> Result<(), Failure> {
    member.device.sync().map_err(|e| {
        Failure::failed(format!(
            "{} cannot be flushed: {}. Nothing was repaired.",
            member.path,
            words(&e)
        ))
    })
}

fn counts(states: &StateMap) -> [u32; 4] {
    use ExtentState::{Cool, Discarded, Hot, Unwritten};
    [Cool, Hot, Unwritten, Discarded].map(|state| states.count(state))
}
