//! Blocks that cannot be read, which no image file has: the device's tests hook stands for them.
#![allow(clippy::unwrap_used)]

use std::ops::Range;
use std::path::PathBuf;

use dirty_map::{Block, Extent};

use super::device::{Event, damage, events};
use super::report::{Class, Finding, Kind, Outcome};
use super::{Inspection, Mode, Request, inspect};
use crate::failure::Exit;
use crate::progress::Progress;
use crate::run_dir::RunDir;

#[path = "../../tests/common/members.rs"]
mod members;
use members::{Members, content};

/// Nothing is started here, so nobody has to wait.
fn programs() -> impl Sized {
    std::io::sink()
}

/// Members in a directory of their own, which goes with them.
struct Made {
    dir: PathBuf,
    members: Members,
}

impl Made {
    fn new(name: &str, count: usize) -> Self {
        let name = format!("mirrorctl-offline-{name}-{}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir(&dir).unwrap();
        let members = Members::new(&dir, count, true);
        Self { dir, members }
    }

    /// Bytes of a member that cannot be read until they are written.
    fn unreadable(&self, member: usize, range: Range<u64>) {
        damage(&self.members.paths[member], range);
    }

    fn unreadable_block(&self, member: usize, block: u64) {
        let at = self.members.block_at(block);
        self.unreadable(member, at + 100..at + 101);
    }

    fn run(&self, mode: Mode) -> (Inspection, Vec<Finding>) {
        let request = Request {
            paths: &self.members.paths,
            mode,
            force: false,
            limit: 100,
        };
        let run_dir = RunDir::new(&self.dir).unwrap();
        let mut inspection = inspect(&request, &run_dir, &mut Progress::quiet()).unwrap();
        let findings = inspection.findings.finish().to_vec();
        (inspection, findings)
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.dir));
    }
}

/// A finding without its words: kind, class, slot and bytes.
type Short = (Kind, Class, Option<u8>, Option<(u64, u64)>);

fn kinds(findings: &[Finding]) -> Vec<Short> {
    let slot = |finding: &Finding| finding.member.as_ref().and_then(|(_, slot)| *slot);
    let each = findings.iter();
    each.map(|f| (f.kind, f.class, slot(f), f.bytes)).collect()
}

#[test]
fn an_export_is_refused_unconnected_and_nothing_is_written_to_the_others() {
    let mut made = Made::new("export", 2);
    let before = made.members.everything();
    // Nobody listens there: a try to connect would be another error.
    let address = "nbd+unix:///data?socket=/nowhere";
    made.members.paths.push(address.into());
    let run_dir = RunDir::new(&made.dir).unwrap();
    for mode in [Mode::Check, Mode::DryRun, Mode::Repair] {
        let request = Request {
            paths: &made.members.paths,
            mode,
            force: true,
            limit: 100,
        };
        let refused = inspect(&request, &run_dir, &mut Progress::quiet()).unwrap_err();
        assert_eq!(refused.exit, Exit::Usage);
        assert_eq!(
            refused.message,
            format!("{address} is an NBD export: run this where its disk is.")
        );
    }
    made.members.paths.pop();
    assert!(made.members.everything() == before);
}

#[test]
fn unreadable_blocks_are_found_and_rewritten() {
    let made = Made::new("blocks", 2);
    let before = made.members.everything();
    for block in [7, 8, 4 * 1024, 4 * 1024 + 1023] {
        made.unreadable_block(1, block);
    }
    made.unreadable_block(0, 9);
    let (_, found) = made.run(Mode::Check);
    let at = |slot, block: u64, blocks: u64| {
        let bytes = Some((block * 4096, blocks * 4096));
        (Kind::Unreadable, Class::Mendable, Some(slot), bytes)
    };
    let want = [
        at(1, 7, 2),
        at(0, 9, 1),
        at(1, 4096, 1),
        at(1, 4096 + 1023, 1),
    ];
    assert_eq!(kinds(&found), want);
    let (inspection, found) = made.run(Mode::Repair);
    assert_eq!(kinds(&found), want);
    assert!(
        found.iter().all(|f| f.outcome == Outcome::Mended),
        "{found:?}"
    );
    assert_eq!(inspection.findings.worst, None);
    assert!(made.members.everything() == before);
    assert_eq!(made.run(Mode::Check).1, []);
}

#[test]
fn without_a_checksum_what_can_be_read_is_vouched_for_before_it_is_copied() {
    let made = Made::new("unknown", 2);
    let before = made.members.everything();
    for member in [0, 1] {
        made.members.put_sum(member, 30, None);
    }
    made.unreadable_block(0, 30);
    let (_, found) = made.run(Mode::Repair);
    assert_eq!(found[0].outcome, Outcome::Mended, "{found:?}");
    assert!(made.members.everything() == before);
    // Each durable before the next, after what was there has been made durable.
    let sums = Event::Write(made.members.page_at(Extent(0)));
    let copy = Event::Write(made.members.block_at(30));
    let want = [
        (0, Event::Sync),
        (1, Event::Sync),
        (1, sums),
        (1, Event::Sync),
        (0, copy),
        (0, Event::Sync),
        (0, sums),
        (0, Event::Sync),
    ];
    let want = want.map(|(member, event)| (made.members.paths[member].clone(), event));
    assert_eq!(events(&made.dir), want);
}

#[test]
fn unreadable_everywhere_is_damaged_and_left() {
    let made = Made::new("everywhere", 2);
    made.unreadable_block(0, 9);
    made.unreadable_block(1, 9);
    for mode in [Mode::Check, Mode::Repair, Mode::Check] {
        let (inspection, found) = made.run(mode);
        let want = (Kind::Damaged, Class::Damaged, None, Some((9 * 4096, 4096)));
        assert_eq!(kinds(&found), [want]);
        assert_eq!(inspection.findings.worst, Some(Class::Damaged));
    }
    assert_eq!(
        made.members.get(0, made.members.block_at(9), 4096),
        content(9)
    );
}

#[test]
fn an_unreadable_page_of_checksums_is_written_anew() {
    let made = Made::new("page", 2);
    let before = made.members.everything();
    let at = made.members.page_at(Extent(4));
    made.unreadable(1, at..at + 1);
    made.members.flip(1, 4 * 1024 + 5, 5);
    let (_, found) = made.run(Mode::Check);
    let want = [
        (
            Kind::ChecksumPage,
            Class::Mendable,
            Some(1),
            Some((16 << 20, 4 << 20)),
        ),
        (
            Kind::CopiesDiffer,
            Class::Mendable,
            Some(1),
            Some(((4 * 1024 + 5) * 4096, 4096)),
        ),
    ];
    assert_eq!(kinds(&found), want);
    let (_, found) = made.run(Mode::Repair);
    assert!(
        found.iter().all(|f| f.outcome == Outcome::Mended),
        "{found:?}"
    );
    assert!(made.members.everything() == before);
}

#[test]
fn unreadable_blocks_of_hot_extents_are_left_to_the_start() {
    let made = Made::new("hot", 2);
    made.unreadable_block(1, 1024);
    // Its stored checksums are not even looked at.
    let at = made.members.page_at(Extent(1));
    made.unreadable(0, at..at + 1);
    let (inspection, found) = made.run(Mode::Repair);
    let want = (
        Kind::Unreadable,
        Class::Mendable,
        Some(1),
        Some((4 << 20, 4096)),
    );
    assert_eq!(kinds(&found), [want]);
    assert!(matches!(found[0].outcome, Outcome::Left(_)));
    assert_eq!(inspection.findings.worst, Some(Class::Mendable));
    made.unreadable_block(0, 1024);
    assert_eq!(made.run(Mode::Check).0.findings.worst, Some(Class::Damaged));
}

#[test]
fn unreadable_metadata_is_taken_from_the_other_copy() {
    use mirror::layout::RegionKind;
    let made = Made::new("metadata", 2);
    let before = made.members.everything();
    made.unreadable(0, 4096..4097);
    made.unreadable(1, 8192..8193);
    let kinds = [
        RegionKind::State,
        RegionKind::Position,
        RegionKind::Summary,
        RegionKind::Scrub,
    ];
    for kind in kinds {
        let at = made.members.map_at(kind, 0, 1) + 600;
        made.unreadable(1, at..at + 1);
    }
    let (_, found) = made.run(Mode::Repair);
    assert_eq!(found.len(), 6, "{found:?}");
    assert!(
        found.iter().all(|f| f.outcome == Outcome::Mended),
        "{found:?}"
    );
    assert!(made.members.everything() == before);
    assert_eq!(made.run(Mode::Check).1, []);
}

#[test]
fn a_block_that_stays_unreadable_is_said_to_be_left() {
    let made = Made::new("stays", 2);
    let at = made.members.block_at(9);
    // Half a block, of which a write of the block cannot heal all.
    made.unreadable(1, at..at + 2 * 4096);
    let (inspection, found) = made.run(Mode::Repair);
    assert!(
        matches!(&found[0].outcome, Outcome::Left(why) if why.contains("read back")),
        "{found:?}"
    );
    assert_eq!(inspection.findings.worst, Some(Class::Mendable));
    let sum = made.members.page(1, Extent(0)).get(Block(9));
    assert_eq!(sum, made.members.page(0, Extent(0)).get(Block(9)));
}
