//! The maps of all members: every sector in both copies, and the in-sync members against each
//! other.
//!
//! Of a sector the newest valid content counts, as at a start: in both copies of one member,
//! and on all in-sync members. Position pages are each member's own, and maps of slots that are
//! in-sync count for nobody (they begin anew with the next loss), so of these only damage is
//! told, not age.
//!
//! # Mending
//!
//! The newest content is copied byte for byte to where there is older or none. It keeps its
//! stamp: a new one would make an older copy of the mirror look newer than one that is not here
//! (R16). First copy A of all members, durably, then copy B, so that at every moment one copy of
//! each sector is whole. A page that holds a sector without any good copy keeps that sector's
//! bytes, and what the next start makes of it stays the start's decision.

use dirty_map::{
    Address, Extent, ExtentState, PAYLOAD_BYTES, SECTOR_BYTES, STATES_PER_SECTOR, SectorError,
    Stamp, StateMap, Summary, encode,
};
use mirror::layout::{PAGE_BYTES, RegionKind, SECTORS_PER_PAGE, extents_of, missed_pages_of};
use mirror::superblock::SlotState;
use std::ops::Range;

use super::device::BLOCK;
use super::member::{CHUNK_PAGES, Member, Pages, Sector, chunks, narrow, sector_kind};
use super::report::{Class, Finding, Findings, Kind, Outcome};
use super::{Assembly, Mode};
use crate::failure::{Failure, words};

const SECTORS: usize = BLOCK / SECTOR_BYTES;
const _: () = assert!(SECTORS as u64 == SECTORS_PER_PAGE);

/// Looks at all maps, mends them when asked to, and returns the extent states that count.
pub(super) fn look(
    members: &[Member],
    assembly: &Assembly,
    mode: Mode,
    findings: &mut Findings,
) -> Result<StateMap, Failure> {
    let mut look = Look {
        members,
        assembly,
        mode,
        entries: Vec::new(),
    };
    let size_bytes = assembly.config.layout.size_bytes;
    look.whole(Map::of(RegionKind::Position, 0, false), |_, _| {})?;
    let mut states = StateMap::new(narrow(extents_of(size_bytes)));
    look.whole(Map::of(RegionKind::State, 0, true), |index, payload| {
        load_states(&mut states, index, payload);
    })?;
    for region in &assembly.config.layout.regions {
        if region.kind != RegionKind::Summary {
            continue;
        }
        let slot = region.slot;
        let record = assembly.config.slots.get(usize::from(slot));
        let counts = record
            .is_some_and(|record| !matches!(record.state, SlotState::InSync | SlotState::Empty));
        let mut summary = Summary::new(narrow(missed_pages_of(size_bytes)));
        look.whole(
            Map::of(RegionKind::Summary, slot, counts),
            |index, payload| {
                if index < summary.sectors() {
                    summary.load_payload(index, payload.unwrap_or(&[0xff; PAYLOAD_BYTES]));
                }
            },
        )?;
        look.missed(Map::of(RegionKind::Missed, slot, counts), &summary)?;
    }
    look.whole(Map::of(RegionKind::Scrub, 0, true), |_, _| {})?;
    look.report(findings);
    Ok(states)
}

/// What cannot be told reads as hot.
pub(crate) fn load_states(
    states: &mut StateMap,
    index: u32,
    payload: Option<&[u8; PAYLOAD_BYTES]>,
) {
    if index >= states.sectors() {
        return;
    }
    if let Some(payload) = payload {
        states.load_payload(index, payload);
        return;
    }
    let first = u64::from(index) * STATES_PER_SECTOR;
    for extent in first..(first + STATES_PER_SECTOR).min(u64::from(states.len())) {
        states.force(Extent(narrow(extent)), ExtentState::Hot);
    }
}

/// Names a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Map {
    kind: RegionKind,
    slot: u8,
    /// Whether a start goes by what in-sync members say here together.
    shared: bool,
}

impl Map {
    fn of(kind: RegionKind, slot: u8, shared: bool) -> Self {
        Self { kind, slot, shared }
    }

    fn name(self) -> String {
        match self.kind {
            RegionKind::Position => "the position page".to_owned(),
            RegionKind::State => "the extent-state map".to_owned(),
            RegionKind::Summary => format!("the summary of slot {}'s missed map", self.slot),
            RegionKind::Missed => format!("slot {}'s missed map", self.slot),
            RegionKind::Scrub => "the scrub's log".to_owned(),
            RegionKind::Checksums => "a map".to_owned(),
        }
    }
}

/// What is wrong with a copy of a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    /// Damaged or unreadable, and a good copy is there.
    Damaged,
    /// Sound, and older than another copy of it.
    Older,
    /// Damaged everywhere.
    Lost,
}

/// Sectors of which the same is to be said.
struct Entry {
    member: usize,
    copy: usize,
    map: Map,
    wrong: Wrong,
    outcome: Outcome,
    first: u32,
    count: u64,
}

struct Look<'a> {
    members: &'a [Member],
    assembly: &'a Assembly,
    mode: Mode,
    entries: Vec<Entry>,
}

/// A sound sector.
type Content = (Stamp, [u8; PAYLOAD_BYTES]);

/// What is to become of one member's sectors of a part of a map, and what is wrong now.
struct Plan {
    want: Vec<Option<Content>>,
    wrong: [Vec<Option<Wrong>>; 2],
}

impl Look<'_> {
    /// Looks at a whole map and shows what counts of each sector.
    fn whole(
        &mut self,
        map: Map,
        mut visit: impl FnMut(u32, Option<&[u8; PAYLOAD_BYTES]>),
    ) -> Result<(), Failure> {
        let Some(region) = self.assembly.config.layout.find(map.kind, map.slot) else {
            return Ok(());
        };
        for pages in chunks(region) {
            let first = narrow(pages.start * SECTORS_PER_PAGE);
            let contents = self.part(map, pages)?;
            for (index, content) in (first..).zip(&contents) {
                visit(index, content.as_ref().map(|(_, payload)| payload));
            }
        }
        Ok(())
    }

    /// Looks at the pages of a missed map that have been written.
    fn missed(&mut self, map: Map, summary: &Summary) -> Result<(), Failure> {
        let pages: Vec<u32> = summary.iter().collect();
        for run in pages.chunk_by(|a, b| a + 1 == *b) {
            for part in run.chunks(usize::try_from(CHUNK_PAGES).unwrap_or(1)) {
                let first = u64::from(part[0]);
                self.part(map, first..first + part.len() as u64)?;
            }
        }
        Ok(())
    }

    /// Looks at some pages on all members; returns what counts of each sector.
    fn part(&mut self, map: Map, pages: Range<u64>) -> Result<Vec<Option<Content>>, Failure> {
        let sectors = usize::try_from((pages.end - pages.start) * SECTORS_PER_PAGE).unwrap_or(0);
        let mut images = Vec::new();
        for (index, member) in self.members.iter().enumerate() {
            if let Some(superblock) = &member.superblock
                && let Some(region) = superblock.layout.find(map.kind, map.slot)
            {
                let read = member.read_pages(superblock, region, pages.clone())?;
                images.push((index, read));
            }
        }
        let mut newest: Vec<Option<Content>> = vec![None; sectors];
        let mut own = Vec::new();
        for (index, [copy_a, copy_b]) in &images {
            let best: Vec<Option<Content>> = copy_a
                .sectors()
                .zip(copy_b.sectors())
                .map(|(a, b)| newer(a, b))
                .collect();
            if self.assembly.in_sync.contains(index) {
                for (newest, best) in newest.iter_mut().zip(&best) {
                    let newer =
                        best.filter(|(stamp, _)| newest.is_none_or(|(have, _)| *stamp >= have));
                    *newest = newer.or(*newest);
                }
            }
            own.push(best);
        }
        let first = narrow(pages.start * SECTORS_PER_PAGE);
        let mut plans = Vec::new();
        for ((index, copies), own) in images.iter().zip(own) {
            let together = map.shared && self.assembly.in_sync.contains(index);
            let want = if together { newest.clone() } else { own };
            let wrong = [0, 1].map(|copy| {
                let each = copies[copy].sectors().zip(&want);
                each.map(|(have, want)| judge(map, together, have, want.as_ref()))
                    .collect()
            });
            plans.push(Plan { want, wrong });
        }
        // Copy A of all members before copy B of any.
        for copy in [0, 1] {
            for ((index, copies), plan) in images.iter().zip(&plans) {
                let outcomes = self.mend(*index, copy, map, &copies[copy], pages.start, plan);
                self.note(*index, copy, map, first, plan, &outcomes);
            }
        }
        Ok(newest)
    }

    /// Writes what is wrong in one copy, when asked to; what became of each page.
    fn mend(
        &self,
        member: usize,
        copy: usize,
        map: Map,
        have: &Pages,
        first_page: u64,
        plan: &Plan,
    ) -> Vec<Outcome> {
        let Member {
            device, superblock, ..
        } = &self.members[member];
        let layout = superblock.as_ref().map(|superblock| &superblock.layout);
        let region = layout.and_then(|layout| layout.find(map.kind, map.slot));
        let pages = plan.want.len() / SECTORS;
        let mut outcomes = vec![Outcome::Found; pages];
        let mut written = Vec::new();
        let Some(region) = region else {
            return outcomes;
        };
        let start = [region.copy_a, region.copy_b][copy];
        for (page, outcome) in outcomes.iter_mut().enumerate() {
            let range = page * SECTORS..(page + 1) * SECTORS;
            let mend = |wrong: &Option<Wrong>| matches!(wrong, Some(Wrong::Damaged | Wrong::Older));
            if self.mode == Mode::Check || !plan.wrong[copy][range.clone()].iter().any(mend) {
                continue;
            }
            let at = first_page + page as u64;
            let Some(bytes) = composed(
                self.assembly.config.tag(),
                map,
                at,
                have.page(page),
                &plan.want[range.clone()],
                &plan.wrong[copy][range],
            ) else {
                *outcome = Outcome::Left("a sector beside it has no good copy".to_owned());
                continue;
            };
            *outcome = Outcome::WouldMend;
            if self.mode == Mode::Repair {
                *outcome = match device.write(start + at * PAGE_BYTES, &bytes) {
                    Ok(()) => Outcome::Mended,
                    Err(e) => Outcome::Left(format!("it could not be written ({})", words(&e))),
                };
                written.push(page);
            }
        }
        if !written.is_empty()
            && let Err(e) = device.sync()
        {
            for page in written {
                outcomes[page] =
                    Outcome::Left(format!("it could not be made durable ({})", words(&e)));
            }
        }
        outcomes
    }

    /// Notes what is wrong in one copy.
    fn note(
        &mut self,
        member: usize,
        copy: usize,
        map: Map,
        first: u32,
        plan: &Plan,
        outcomes: &[Outcome],
    ) {
        for (at, wrong) in plan.wrong[copy].iter().enumerate() {
            let Some(wrong) = *wrong else { continue };
            if wrong == Wrong::Lost && copy == 1 {
                continue; // said with copy A
            }
            let outcome = match (wrong, &outcomes[at / SECTORS]) {
                (Wrong::Lost, _) if self.mode != Mode::Check => {
                    Outcome::Left("there is no good copy".to_owned())
                }
                (Wrong::Lost, _) => Outcome::Found,
                (_, outcome) => outcome.clone(),
            };
            let same = |entry: &&mut Entry| {
                (
                    entry.member,
                    entry.copy,
                    entry.map,
                    entry.wrong,
                    &entry.outcome,
                ) == (member, copy, map, wrong, &outcome)
            };
            if let Some(entry) = self.entries.iter_mut().find(same) {
                entry.count += 1;
                continue;
            }
            self.entries.push(Entry {
                member,
                copy,
                map,
                wrong,
                outcome,
                first: first + narrow(at as u64),
                count: 1,
            });
        }
    }

    fn report(self, findings: &mut Findings) {
        for entry in self.entries {
            let map = entry.map;
            let name = map.name();
            let sectors = if entry.count == 1 {
                format!("sector {}", entry.first)
            } else {
                format!("{} sectors (the first is {})", entry.count, entry.first)
            };
            let copy = ["A", "B"][entry.copy];
            let in_sync = self.assembly.in_sync.contains(&entry.member);
            let (class, what) = match entry.wrong {
                Wrong::Damaged => (
                    Class::Mendable,
                    format!("copy {copy} of {name}: {sectors} damaged or unreadable"),
                ),
                Wrong::Older => (
                    if self.assembly.unclean || !in_sync {
                        Class::Expected
                    } else {
                        Class::Mendable
                    },
                    format!("copy {copy} of {name}: {sectors} older than another copy"),
                ),
                Wrong::Lost => (
                    Class::Metadata,
                    format!(
                        "{name}: {sectors} without any good copy{}",
                        consequence(map, in_sync)
                    ),
                ),
            };
            findings.add(Finding {
                class,
                kind: Kind::Map,
                member: Some(self.members[entry.member].name()),
                bytes: None,
                what,
                outcome: entry.outcome,
            });
        }
    }
}

/// What follows from the loss of a sector.
fn consequence(map: Map, in_sync: bool) -> &'static str {
    match map.kind {
        RegionKind::State if in_sync => {
            " on any in-sync member; a start is refused, and 'start --force' takes its extents as \
             written"
        }
        RegionKind::State => "; when the member returns, its extents are copied whole",
        RegionKind::Position => "; the next start writes it anew",
        RegionKind::Scrub => "; the next start forgets what it held of scrubs and their findings",
        _ if map.shared && in_sync => "; the next start takes all its blocks as missed",
        _ => "; it is written anew before it counts",
    }
}

fn newer(a: Sector<'_>, b: Sector<'_>) -> Option<Content> {
    let content = |sector: Sector<'_>| sector.ok().map(|(stamp, payload)| (stamp, *payload));
    match (content(a), content(b)) {
        (Some(a), Some(b)) => Some(if b.0 > a.0 { b } else { a }),
        (a, b) => a.or(b),
    }
}

fn judge(map: Map, together: bool, have: Sector<'_>, want: Option<&Content>) -> Option<Wrong> {
    let never_written = map.kind == RegionKind::Missed && have == Err(SectorError::Blank);
    match (have, want) {
        // A member that has joined was given the same content with a later stamp. A position page
        // is nothing but its stamp.
        (Ok((stamp, payload)), Some(want))
            if *payload == want.1 && (map.kind != RegionKind::Position || stamp == want.0) =>
        {
            None
        }
        // Of maps that count for nobody age says nothing.
        (Ok(_), _) if !map.shared && map.kind != RegionKind::Position => None,
        (Err(_), _) if never_written && !together => None,
        (Err(_), Some(_)) if never_written => Some(Wrong::Older),
        (Ok(_), _) => Some(Wrong::Older),
        (Err(_), Some(_)) => Some(Wrong::Damaged),
        (Err(_), None) => Some(Wrong::Lost),
    }
}

/// The bytes of a page with what is wrong put right; `None` when not all of it is known.
fn composed(
    tag: u32,
    map: Map,
    page: u64,
    have: Option<&[u8]>,
    want: &[Option<Content>],
    wrong: &[Option<Wrong>],
) -> Option<Vec<u8>> {
    let mut bytes = have.map_or_else(|| vec![0; BLOCK], <[u8]>::to_vec);
    for (at, sector) in bytes.chunks_exact_mut(SECTOR_BYTES).enumerate() {
        if have.is_some() && wrong[at].is_none() {
            continue;
        }
        match &want[at] {
            Some((stamp, payload)) => {
                let address = Address {
                    kind: sector_kind(map.kind),
                    slot: map.slot,
                    index: narrow(page * SECTORS_PER_PAGE + at as u64),
                };
                sector.copy_from_slice(&encode(address, tag, *stamp, payload));
            }
            None if have.is_some() => {}
            None => return None,
        }
    }
    Some(bytes)
}
