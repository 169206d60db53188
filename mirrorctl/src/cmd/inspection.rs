//! What `check` and `repair` say: as text, as a document, and as an exit code.

use mirror::assemble::Verdict;
use mirror::superblock::SlotState;
use serde::Serialize;

use crate::Context;
use crate::cmd::slot_state;
use crate::failure::Failure;
use crate::offline::report::{Class, Finding, Kind, Outcome};
use crate::offline::{self, Inspection, Mode, Request};
use crate::output;
use crate::progress::Progress;
use crate::size::{human, human_millis};

/// Findings that are listed unless told otherwise.
pub(crate) const LISTED: usize = 100;

/// The end of `mirrorctl check --help` and `mirrorctl repair --help`.
pub(crate) const HELP: &str = "\
Looked at are: both superblock copies of every member, what a start would decide for it, every
map sector in both copies, and of members that are in-sync each block of the written extents:
against its stored checksum, and the copies against each other. Hot extents (those written
shortly before an unclean stop) are only compared; they may differ, and the next start makes
them equal. A part that cannot be read is read again in smaller pieces, down to a block.

A repair writes only what is provably right: a copy that fits a stored checksum, or where no
checksum is known the copy that all who can be read, or most, agree on. It reads back what it
wrote. It leaves hot extents to the next start, and damaged blocks alone.

Exit codes (the highest of 10 to 13 that applies; repair counts what is left, --dry-run what
would be left):
  0   nothing to be mended
  1 to 5 as for every command: 4 a path that is no member, 5 a member that is in use,
      3 members of different mirrors, of diverging histories, or (repair) not all of them
  10  something is to be mended, by a repair or by the next start, and a good copy is there
  11  a member that the mirror names in-sync was not given or cannot be used
  12  a part of the metadata has no good copy
  13  blocks are damaged: no copy of them is provably right

The document of --json (fields are only ever added):
  command           check, repair or repair-dry-run
  mirror            name, uuid, size-bytes, checksums (whether they are kept),
                    last-stop (clean, unclean); null when no given member can be used
  members           for each path: path, slot, verdict (in-sync, delta, full, refused, unusable)
                    and reason, as a start would decide
  not-given         members that were not given: slot, state, address
  start-refused     why a start of these members would be refused, or null
  extents           cool, hot, unwritten, discarded
  blocks            checked, without-checksum (and how many of these a repair has filled-in),
                    hot-compared, hot-differing
  elapsed-ms        how long reading and comparing the blocks took
  counts            for each kind of finding, how many blocks or how many findings without any
  findings          class (expected, mendable, incomplete, metadata, damaged), kind, path, slot,
                    offset and bytes (of the device), what,
                    outcome (found, would-mend, mended, left) and reason
  findings-not-shown, mended
  exit-code         what the command ends with
Kinds are superblock, truncated, not-given, map, checksum-page, unreadable, checksum-failed,
copies-differ, checksum-stale, damaged, undecidable, hot-differs.";

/// Looks, mends when asked to, and says so.
pub(crate) fn run(request: &Request<'_>, context: &Context) -> Result<(), Failure> {
    let mut progress = if context.json {
        Progress::quiet()
    } else {
        Progress::new()
    };
    let inspected = offline::inspect(request, &context.run_dir, &mut progress);
    progress.end();
    let mut inspection = inspected?;
    let findings: Vec<Finding> = inspection.findings.finish().to_vec();
    if context.json {
        output::json(&document(request.mode, &inspection, &findings))?;
    } else {
        output::raw(&text(request.mode, &inspection, &findings));
    }
    let worst = inspection.findings.worst;
    match worst.and_then(Class::exit) {
        None => Ok(()),
        Some(exit) => Err(Failure::new(exit, verdict(request.mode, worst))),
    }
}

/// The last sentence.
fn verdict(mode: Mode, worst: Option<Class>) -> String {
    let what = match worst {
        Some(Class::Damaged) => {
            "There are blocks of which no copy is provably right. Restore what lies there from a \
             backup: writing a block anew mends it."
        }
        Some(Class::Metadata) => {
            "A part of the metadata has no good copy; the findings say what follows from that."
        }
        Some(Class::Incomplete) => {
            "Not every in-sync member could be checked. Give all of them at once."
        }
        _ if mode == Mode::Check => {
            "Everything that is wrong has a good copy: 'mirrorctl repair' mends it."
        }
        _ => "What is left has a good copy; the findings say why it was not mended.",
    };
    what.to_owned()
}

fn text(mode: Mode, inspection: &Inspection, findings: &[Finding]) -> String {
    let mut text = String::new();
    let mut line = |words: &str| {
        text.push_str(words);
        text.push('\n');
    };
    if let Some(assembly) = &inspection.assembly {
        let config = &assembly.config;
        line(&format!(
            "mirror {} (uuid {}): {}, last stop {}, checksums {}",
            config.name,
            config.mirror,
            human(config.layout.size_bytes),
            last_stop(assembly.unclean),
            if config.checksums { "kept" } else { "not kept" },
        ));
    }
    let rows = members(inspection);
    let rows = rows.iter().map(|member| {
        let slot = member.slot.map_or("-".to_owned(), |slot| slot.to_string());
        let reason = member.reason.clone().unwrap_or_default();
        vec![slot, member.verdict.to_owned(), member.path.clone(), reason]
    });
    let titles = ["slot", "state", "path"].map(str::to_owned).to_vec();
    let rows: Vec<Vec<String>> = std::iter::once(titles).chain(rows).collect();
    line(output::table(&rows).trim_end_matches('\n'));
    for (slot, state, address) in &inspection.not_given {
        line(&format!(
            "slot {slot}, {} and last seen as {address}, was not given",
            slot_state(*state)
        ));
    }
    if let Some(why) = inspection
        .assembly
        .as_ref()
        .and_then(|a| a.refusal.as_ref())
    {
        line(&format!("a start would be refused: {why}"));
    }
    if inspection.assembly.is_some() {
        counted(inspection, &mut line);
    }
    for finding in findings {
        line(&finding.line());
    }
    let hidden = inspection.findings.not_shown;
    if hidden > 0 {
        line(&format!(
            "and {hidden} more findings; --findings N lists more"
        ));
    }
    line(&summary(mode, inspection));
    text
}

fn counted(inspection: &Inspection, line: &mut impl FnMut(&str)) {
    let [cool, hot, unwritten, discarded] = inspection.extents;
    line(&format!(
        "extents: {cool} cool, {hot} hot, {unwritten} unwritten, {discarded} discarded"
    ));
    let blocks = &inspection.blocks;
    let each = (blocks.checked + blocks.hot) * 4096;
    let mut words = format!(
        "{} blocks of cool extents checked ({} of each member in {})",
        blocks.checked,
        human(each),
        human_millis(blocks.millis)
    );
    if blocks.without_checksum > 0 {
        words.push_str(&format!(
            ", {} of them without a known checksum",
            blocks.without_checksum
        ));
        if blocks.filled_in > 0 {
            words.push_str(&format!(", {} of those filled in", blocks.filled_in));
        }
    }
    if blocks.hot > 0 {
        words.push_str(&format!(
            "; {} of hot extents compared, {} differ",
            blocks.hot, blocks.hot_differing
        ));
    }
    line(&words);
}

fn summary(mode: Mode, inspection: &Inspection) -> String {
    let findings = &inspection.findings;
    let total: u64 = findings.counts.values().sum();
    let expected = findings.count(Kind::HotDiffers);
    if total == expected {
        let verdicts = inspection.assembly.iter().flat_map(|it| &it.verdicts);
        let unused =
            |verdict: &Option<Verdict>| verdict.as_ref().is_some_and(|it| *it != Verdict::InSync);
        let given = inspection.members.iter().zip(verdicts);
        let unchecked: Vec<&str> = given
            .filter(|(_, verdict)| unused(verdict))
            .map(|((path, _), _)| path.as_str())
            .collect();
        if unchecked.is_empty() {
            return "nothing is wrong".to_owned();
        }
        return format!(
            "nothing is wrong with the members in-sync; not checked: {}",
            unchecked.join(", ")
        );
    }
    let each = findings
        .counts
        .iter()
        .map(|(kind, count)| format!("{} {count}", name(*kind)));
    let each = each.collect::<Vec<_>>().join(", ");
    let left = total - findings.mended;
    match mode {
        Mode::Check => format!("found: {each}"),
        Mode::DryRun => format!(
            "found: {each}; {} would be mended, {left} left",
            findings.mended
        ),
        Mode::Repair => format!("found: {each}; {} mended, {left} left", findings.mended),
    }
}

/// A kind as the document names it.
fn name(kind: Kind) -> String {
    let value = serde_json::to_value(kind).ok();
    value
        .and_then(|value| value.as_str().map(str::to_owned))
        .unwrap_or_default()
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Document {
    command: &'static str,
    mirror: Option<MirrorDocument>,
    members: Vec<MemberDocument>,
    not_given: Vec<NotGivenDocument>,
    start_refused: Option<String>,
    extents: ExtentsDocument,
    blocks: BlocksDocument,
    elapsed_ms: u64,
    counts: std::collections::BTreeMap<String, u64>,
    findings: Vec<FindingDocument>,
    findings_not_shown: u64,
    mended: u64,
    exit_code: u8,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct MirrorDocument {
    name: String,
    uuid: String,
    size_bytes: u64,
    checksums: bool,
    last_stop: &'static str,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct MemberDocument {
    path: String,
    slot: Option<u8>,
    verdict: &'static str,
    reason: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct NotGivenDocument {
    slot: usize,
    state: &'static str,
    address: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct ExtentsDocument {
    cool: u32,
    hot: u32,
    unwritten: u32,
    discarded: u32,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct BlocksDocument {
    checked: u64,
    without_checksum: u64,
    filled_in: u64,
    hot_compared: u64,
    hot_differing: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct FindingDocument {
    class: Class,
    kind: Kind,
    path: Option<String>,
    slot: Option<u8>,
    offset: Option<u64>,
    bytes: Option<u64>,
    what: String,
    outcome: &'static str,
    reason: Option<String>,
}

fn document(mode: Mode, inspection: &Inspection, findings: &[Finding]) -> Document {
    let assembly = inspection.assembly.as_ref();
    let [cool, hot, unwritten, discarded] = inspection.extents;
    let blocks = &inspection.blocks;
    let all = &inspection.findings;
    let exit = all.worst.and_then(Class::exit);
    Document {
        command: match mode {
            Mode::Check => "check",
            Mode::DryRun => "repair-dry-run",
            Mode::Repair => "repair",
        },
        mirror: assembly.map(|assembly| MirrorDocument {
            name: assembly.config.name.clone(),
            uuid: assembly.config.mirror.to_string(),
            size_bytes: assembly.config.layout.size_bytes,
            checksums: assembly.config.checksums,
            last_stop: last_stop(assembly.unclean),
        }),
        members: members(inspection),
        not_given: inspection.not_given.iter().map(not_given).collect(),
        start_refused: assembly.and_then(|assembly| assembly.refusal.clone()),
        extents: ExtentsDocument {
            cool,
            hot,
            unwritten,
            discarded,
        },
        blocks: BlocksDocument {
            checked: blocks.checked,
            without_checksum: blocks.without_checksum,
            filled_in: blocks.filled_in,
            hot_compared: blocks.hot,
            hot_differing: blocks.hot_differing,
        },
        elapsed_ms: blocks.millis,
        counts: all
            .counts
            .iter()
            .map(|(kind, count)| (name(*kind), *count))
            .collect(),
        findings: findings.iter().map(finding).collect(),
        findings_not_shown: all.not_shown,
        mended: all.mended,
        exit_code: exit.map_or(0, |exit| exit.code()),
    }
}

fn not_given((slot, state, address): &(usize, SlotState, String)) -> NotGivenDocument {
    NotGivenDocument {
        slot: *slot,
        state: slot_state(*state),
        address: address.clone(),
    }
}

fn finding(finding: &Finding) -> FindingDocument {
    let (outcome, reason) = match &finding.outcome {
        Outcome::Found => ("found", None),
        Outcome::WouldMend => ("would-mend", None),
        Outcome::Mended => ("mended", None),
        Outcome::Left(why) => ("left", Some(why.clone())),
    };
    FindingDocument {
        class: finding.class,
        kind: finding.kind,
        path: finding.member.as_ref().map(|(path, _)| path.clone()),
        slot: finding.member.as_ref().and_then(|(_, slot)| *slot),
        offset: finding.bytes.map(|(offset, _)| offset),
        bytes: finding.bytes.map(|(_, len)| len),
        what: finding.what.clone(),
        outcome,
        reason,
    }
}

fn members(inspection: &Inspection) -> Vec<MemberDocument> {
    let verdicts = inspection
        .assembly
        .as_ref()
        .map(|assembly| &assembly.verdicts);
    let each = inspection.members.iter().enumerate();
    each.map(|(index, (path, slot))| {
        let verdict = verdicts.and_then(|verdicts| verdicts[index].as_ref());
        MemberDocument {
            path: path.clone(),
            slot: *slot,
            verdict: match verdict {
                Some(Verdict::InSync) => "in-sync",
                Some(Verdict::Delta { .. }) => "delta",
                Some(Verdict::Full { .. }) => "full",
                Some(Verdict::Refused { .. }) => "refused",
                None => "unusable",
            },
            reason: verdict.and_then(Verdict::refusal),
        }
    })
    .collect()
}

fn last_stop(unclean: bool) -> &'static str {
    if unclean { "unclean" } else { "clean" }
}
