//! What an operator sees.

use crate::{Scrubber, Subject, schedule};
use dirty_map::{BLOCK_BYTES, EXTENT_BYTES, Extent};
use mirror::control::{
    MAP_CELLS_MAX, ScrubBy, ScrubClass, ScrubDone, ScrubEnding, ScrubFinding, ScrubMap, ScrubPass,
    ScrubReport, ScrubRun, ScrubState, ScrubStatus, ScrubTotals, ScrubWhat,
};
use mirror::engine::ExtentLook;
use mirror::host::Host;
use mirror::scrub_log::{Done, EndedPass, Ending, Finding, FoundBy, Pass, ScrubLog, Totals, What};
use std::time::Duration;

/// Extents that are looked at before others have their turn.
const LOOKS_AT_ONCE: u32 = 16_384;

impl<S: Subject> Scrubber<S> {
    /// What scrubs do and have done.
    pub fn status(&self) -> ScrubStatus {
        let days = self.days();
        let written = self.subject.written();
        // Nearer to the present than what was noted.
        let present = self.with_sweep(|sweep| sweep.pass().clone());
        let since_noted = self.now().saturating_sub(self.noted.get());
        let noted = self.subject.log(|log| log.pass().cloned());
        let pass = present.clone().or(noted);
        let floor_bytes = pass.as_ref().map_or(0, |pass| self.floor(pass));
        let ceiling_mib = self.ceiling_mib().filter(|mib| *mib > 0);
        let pacer = self.pacer.borrow();
        let allowed = Some(pacer.rate()).filter(|rate| present.is_some() && *rate < u64::MAX);
        self.subject.log(|log| {
            let state = match pass {
                _ if log.choices().paused => ScrubState::Paused,
                None => ScrubState::Idle,
                Some(_) => ScrubState::Running,
            };
            let since_noted = present.as_ref().map_or(Duration::ZERO, |_| since_noted);
            let next = schedule::next_at(days, log.passes()).filter(|_| pass.is_none());
            ScrubStatus {
                state,
                pass: pass
                    .as_ref()
                    .map(|pass| under_way(pass, written, since_noted)),
                next_at_secs: next.filter(|_| state == ScrubState::Idle),
                days,
                ceiling_mib,
                allowed_bytes: allowed,
                floor_bytes,
                p99_permille: pacer.ratio_permille().filter(|_| present.is_some()),
                kept: self.subject.log_is_kept(),
                error_budget: self.subject.error_budget(),
                damaged_blocks: damaged_blocks(log),
                totals: totals(log.totals()),
                passes: log.passes().iter().map(ended).collect(),
            }
        })
    }

    /// Everything that was found, as far as it is kept; `path` names the member in a slot.
    pub fn report(&self, path: impl Fn(u8) -> Option<String>) -> ScrubReport {
        self.subject.log(|log| ScrubReport {
            device: None,
            findings: log
                .findings()
                .into_iter()
                .map(|finding| document(finding, finding.slot.and_then(&path)))
                .collect(),
            forgotten_blocks: log.totals().forgotten,
        })
    }

    /// The device of `size_bytes` as at most `cells` cells, and at most [`MAP_CELLS_MAX`].
    pub async fn map(&self, size_bytes: u64, cells: u32) -> ScrubMap {
        let extents = self.subject.extents().max(1);
        let cells = cells.clamp(1, MAP_CELLS_MAX);
        let per_cell = extents.div_ceil(cells);
        let mut classes = vec![ScrubClass::Unwritten; places(extents.div_ceil(per_cell))];
        for number in 0..extents {
            if number % LOOKS_AT_ONCE == LOOKS_AT_ONCE - 1 {
                self.subject.host().sleep(Duration::from_micros(100)).await;
            }
            let class = match self.subject.look(Extent(number)) {
                ExtentLook::Unwritten => ScrubClass::Unwritten,
                ExtentLook::Cool => ScrubClass::Written,
                ExtentLook::Hot => ScrubClass::Hot,
                ExtentLook::Missed => ScrubClass::Missed,
            };
            worsen(&mut classes, number / per_cell, class);
        }
        self.subject.log(|log| {
            for finding in log.findings() {
                let class = match finding.done {
                    Done::Damaged => ScrubClass::Damaged,
                    Done::Rewritten | Done::ChecksumMended => ScrubClass::Repaired,
                    Done::CheckOnly | Done::MemberFailed | Done::WrittenAgain => continue,
                };
                let extent = |block: u64| u32::try_from(block * BLOCK_BYTES / EXTENT_BYTES);
                let first = extent(finding.blocks.start).unwrap_or(u32::MAX);
                let last = extent(finding.blocks.end - 1).unwrap_or(u32::MAX);
                for cell in first / per_cell..=(last.min(extents - 1)) / per_cell {
                    let unwritten = classes.get(places(cell)) == Some(&ScrubClass::Unwritten);
                    // What was repaired there has been discarded since.
                    if class == ScrubClass::Damaged || !unwritten {
                        worsen(&mut classes, cell, class);
                    }
                }
            }
        });
        let runs = classes.chunk_by(|a, b| a == b).map(|run| ScrubRun {
            class: run[0],
            cells: u32::try_from(run.len()).unwrap_or(u32::MAX),
        });
        ScrubMap {
            size_bytes,
            cell_bytes: u64::from(per_cell) * EXTENT_BYTES,
            runs: runs.collect(),
        }
    }
}

fn places(count: u32) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

fn worsen(classes: &mut [ScrubClass], cell: u32, class: ScrubClass) {
    if let Some(place) = classes.get_mut(places(cell)) {
        *place = class.max(*place);
    }
}

fn damaged_blocks(log: &ScrubLog) -> u64 {
    log.damaged_runs()
        .iter()
        .map(|run| run.end - run.start)
        .sum()
}

fn under_way(pass: &Pass, written: u64, since_noted: Duration) -> ScrubPass {
    let counts = &pass.counts;
    let left = written.saturating_sub(counts.extents);
    let millis = u64::try_from(since_noted.as_millis()).unwrap_or(u64::MAX);
    let worked = u128::from(pass.worked_ms.saturating_add(millis));
    let left_secs = (u128::from(left) * worked)
        .checked_div(u128::from(counts.extents) * 1000)
        .map(|secs| u64::try_from(secs).unwrap_or(u64::MAX));
    ScrubPass {
        number: pass.number,
        check_only: pass.check_only,
        began_secs: pass.began_secs,
        ended_secs: None,
        ending: None,
        checked_bytes: Some(counts.extents.saturating_mul(EXTENT_BYTES)),
        written_bytes: Some(written.saturating_mul(EXTENT_BYTES)),
        left_secs,
        member_bytes: counts.member_bytes,
        findings: counts.findings,
        repaired_blocks: counts.repaired,
        damaged_blocks: counts.damaged,
        left_out_extents: counts.left_out,
    }
}

fn ended(pass: &EndedPass) -> ScrubPass {
    ScrubPass {
        number: pass.number,
        check_only: pass.check_only,
        began_secs: pass.began_secs,
        ended_secs: Some(pass.ended_secs),
        ending: Some(match pass.ending {
            Ending::Complete => ScrubEnding::Complete,
            Ending::Cancelled => ScrubEnding::Cancelled,
        }),
        checked_bytes: None,
        written_bytes: None,
        left_secs: None,
        member_bytes: pass.member_bytes,
        findings: pass.findings,
        repaired_blocks: pass.repaired,
        damaged_blocks: pass.damaged,
        left_out_extents: pass.left_out.into(),
    }
}

fn totals(totals: &Totals) -> ScrubTotals {
    ScrubTotals {
        passes: totals.passes_complete,
        member_bytes: totals.member_bytes,
        checked_blocks: totals.blocks,
        unreadable_blocks: totals.found(What::Unreadable),
        checksum_failed_blocks: totals.found(What::ChecksumFailed),
        copies_differ_blocks: totals.found(What::CopiesDiffer),
        checksum_stale_blocks: totals.found(What::ChecksumStale),
        page_unreadable_blocks: totals.found(What::PageUnreadable),
        rewritten_blocks: totals.did(Done::Rewritten),
        mended_blocks: totals.did(Done::ChecksumMended),
        damaged_blocks: totals.did(Done::Damaged),
        found_by_reads_blocks: totals.found_by(FoundBy::Read),
        forgotten_blocks: totals.forgotten,
    }
}

fn document(finding: &Finding, path: Option<String>) -> ScrubFinding {
    ScrubFinding {
        when_secs: finding.when_secs,
        slot: finding.slot,
        path,
        offset: finding.blocks.start * BLOCK_BYTES,
        len: (finding.blocks.end - finding.blocks.start) * BLOCK_BYTES,
        what: match finding.what {
            What::Unreadable => ScrubWhat::Unreadable,
            What::ChecksumFailed => ScrubWhat::ChecksumFailed,
            What::CopiesDiffer => ScrubWhat::CopiesDiffer,
            What::ChecksumStale => ScrubWhat::ChecksumStale,
            What::PageUnreadable => ScrubWhat::PageUnreadable,
        },
        done: match finding.done {
            Done::Rewritten => ScrubDone::Rewritten,
            Done::ChecksumMended => ScrubDone::ChecksumMended,
            Done::Damaged => ScrubDone::Damaged,
            Done::CheckOnly => ScrubDone::CheckOnly,
            Done::MemberFailed => ScrubDone::MemberFailed,
            Done::WrittenAgain => ScrubDone::WrittenAgain,
        },
        by: match finding.by {
            FoundBy::Scrub => ScrubBy::Scrub,
            FoundBy::Read => ScrubBy::Read,
            FoundBy::Resync => ScrubBy::Resync,
        },
    }
}
