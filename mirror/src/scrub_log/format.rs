//! The log's fields at their places; the byte tables stand in the module's documentation.

use super::findings::{BLOCKS_MAX, Done, Finding, FoundBy, Kept, NUMBER_MAX, What};
use super::{
    Choices, EndedPass, Ending, LEFT_RANGES_MAX, PASSES_KEPT, Pass, PassCounts, Totals, coarsened,
};
use crate::bytes::{Reader, put};
use dirty_map::{Extent, PAYLOAD_BYTES};

/// Bytes of a finding.
pub(super) const FINDING_BYTES: usize = 32;
/// Bytes of a pass that is over.
const PASS_BYTES: usize = 64;
/// Bytes of a range of extents.
const RANGE_BYTES: usize = 8;
const RANGES_AT: usize = 96;
const WHAT_AT: usize = 40;
const DONE_AT: usize = 80;
const BY_AT: usize = 120;
/// About all members.
const ALL_SLOTS: u8 = u8::MAX;

type Payload = [u8; PAYLOAD_BYTES];

const _: () = assert!(RANGES_AT + LEFT_RANGES_MAX * RANGE_BYTES == PAYLOAD_BYTES);
const _: () = assert!(PASSES_KEPT * PASS_BYTES <= PAYLOAD_BYTES);
const _: () = assert!(WHAT_AT + What::ALL.len() * 8 == DONE_AT);
const _: () = assert!(DONE_AT + 5 * 8 == BY_AT);
const _: () = assert!(BY_AT + FoundBy::ALL.len() * 8 == 144);

pub(super) fn encode_totals(choices: &Choices, totals: &Totals, out: &mut Payload) {
    out[0] = u8::from(choices.paused);
    let days = choices.days.map_or(0, |days| days.saturating_add(1));
    put(out, 2, days.to_le_bytes());
    put(out, 4, choices.ceiling_mib.unwrap_or(0).to_le_bytes());
    put(out, 8, totals.passes_begun.to_le_bytes());
    put(out, 16, totals.passes_complete.to_le_bytes());
    put(out, 24, totals.member_bytes.to_le_bytes());
    put(out, 32, totals.blocks.to_le_bytes());
    let arrays = [
        (WHAT_AT, &totals.what[..]),
        (DONE_AT, &totals.done[..]),
        (BY_AT, &totals.by[..]),
    ];
    for (at, counts) in arrays {
        for (index, count) in counts.iter().enumerate() {
            put(out, at + index * 8, count.to_le_bytes());
        }
    }
    put(out, 144, totals.forgotten.to_le_bytes());
    put(out, 152, totals.members.to_le_bytes());
}

pub(super) fn decode_totals(payload: &Payload) -> (Choices, Totals) {
    let read = Reader(payload);
    let ceiling = read.u32(4);
    let choices = Choices {
        paused: read.u8(0) == 1,
        days: read.u16(2).checked_sub(1),
        ceiling_mib: (ceiling > 0).then_some(ceiling),
    };
    let totals = Totals {
        passes_begun: read.u64(8),
        passes_complete: read.u64(16),
        member_bytes: read.u64(24),
        blocks: read.u64(32),
        what: std::array::from_fn(|index| read.u64(WHAT_AT + index * 8)),
        done: std::array::from_fn(|index| read.u64(DONE_AT + index * 8)),
        by: std::array::from_fn(|index| read.u64(BY_AT + index * 8)),
        forgotten: read.u64(144),
        members: read.u64(152),
    };
    (choices, totals)
}

pub(super) fn encode_pass(pass: &Pass, out: &mut Payload) {
    let left = coarsened(pass.left.clone(), LEFT_RANGES_MAX);
    let counts = &pass.counts;
    out[0] = 1;
    out[1] = u8::from(pass.check_only) | u8::from(pass.wrapped) << 1;
    put(out, 2, u16::try_from(left.len()).unwrap_or(0).to_le_bytes());
    put(out, 4, pass.start.0.to_le_bytes());
    put(out, 8, pass.cursor.0.to_le_bytes());
    let words = [
        pass.number,
        pass.began_secs,
        pass.worked_ms,
        counts.extents,
        counts.blocks,
        counts.member_bytes,
        counts.findings,
        counts.repaired,
        counts.damaged,
        counts.left_out,
    ];
    const { assert!(16 + 10 * 8 == RANGES_AT) };
    for (index, word) in words.iter().enumerate() {
        put(out, 16 + index * 8, word.to_le_bytes());
    }
    for (index, range) in left.iter().enumerate() {
        let at = RANGES_AT + index * RANGE_BYTES;
        put(out, at, range.start.to_le_bytes());
        put(out, at + 4, range.end.to_le_bytes());
    }
}

pub(super) fn decode_pass(payload: &Payload) -> Option<Pass> {
    let read = Reader(payload);
    let number = read.u64(16);
    if read.u8(0) != 1 || number == 0 {
        return None;
    }
    let ranges = usize::from(read.u16(2)).min(LEFT_RANGES_MAX);
    let left = (0..ranges)
        .map(|index| RANGES_AT + index * RANGE_BYTES)
        .map(|at| read.u32(at)..read.u32(at + 4));
    Some(Pass {
        number,
        began_secs: read.u64(24),
        worked_ms: read.u64(32),
        check_only: read.u8(1) & 1 != 0,
        start: Extent(read.u32(4)),
        cursor: Extent(read.u32(8)),
        wrapped: read.u8(1) & 2 != 0,
        left: coarsened(left.collect(), LEFT_RANGES_MAX),
        counts: PassCounts {
            extents: read.u64(40),
            blocks: read.u64(48),
            member_bytes: read.u64(56),
            findings: read.u64(64),
            repaired: read.u64(72),
            damaged: read.u64(80),
            left_out: read.u64(88),
        },
    })
}

pub(super) fn encode_passes(passes: &[EndedPass], out: &mut Payload) {
    for (pass, out) in passes.iter().zip(out.chunks_exact_mut(PASS_BYTES)) {
        let words = [
            pass.number,
            pass.began_secs,
            pass.ended_secs,
            pass.member_bytes,
            pass.findings,
            pass.repaired,
            pass.damaged,
        ];
        for (index, word) in words.iter().enumerate() {
            put(out, index * 8, word.to_le_bytes());
        }
        put(out, 56, pass.left_out.to_le_bytes());
        out[60] = match pass.ending {
            Ending::Complete => 1,
            Ending::Cancelled => 2,
        };
        out[61] = u8::from(pass.check_only);
    }
}

pub(super) fn decode_passes(payload: &Payload) -> Vec<EndedPass> {
    let passes = payload.chunks_exact(PASS_BYTES).map(|bytes| {
        let read = Reader(bytes);
        let number = read.u64(0);
        let ending = match read.u8(60) {
            1 => Ending::Complete,
            2 => Ending::Cancelled,
            _ => return None,
        };
        (number != 0).then(|| EndedPass {
            number,
            began_secs: read.u64(8),
            ended_secs: read.u64(16),
            member_bytes: read.u64(24),
            findings: read.u64(32),
            repaired: read.u64(40),
            damaged: read.u64(48),
            left_out: read.u32(56),
            ending,
            check_only: read.u8(61) == 1,
        })
    });
    passes.flatten().collect()
}

/// `out` is zero and [`FINDING_BYTES`] long.
pub(super) fn encode_finding(kept: &Kept, out: &mut [u8]) {
    let finding = &kept.finding;
    let blocks = finding.blocks.end - finding.blocks.start;
    put(out, 0, kept.number.to_le_bytes());
    put(out, 8, finding.when_secs.to_le_bytes());
    put(out, 16, finding.blocks.start.to_le_bytes());
    put(
        out,
        24,
        u32::try_from(blocks).unwrap_or(u32::MAX).to_le_bytes(),
    );
    out[28] = finding.slot.unwrap_or(ALL_SLOTS);
    out[29] = code_of(finding.what.place());
    out[30] = code_of(finding.done.place());
    out[31] = code_of(finding.by.place());
}

/// The finding in [`FINDING_BYTES`] bytes; none where they are of no finding that is understood.
pub(super) fn decode_finding(bytes: &[u8]) -> Option<Kept> {
    let read = Reader(bytes);
    let number = read.u64(0);
    let start = read.u64(16);
    let blocks = u64::from(read.u32(24));
    let end = start.checked_add(blocks)?;
    if !(1..=NUMBER_MAX).contains(&number) || blocks == 0 || end > BLOCKS_MAX {
        return None;
    }
    let slot = read.u8(28);
    Some(Kept {
        number,
        finding: Finding {
            when_secs: read.u64(8),
            slot: (slot != ALL_SLOTS).then_some(slot),
            blocks: start..end,
            what: of_code(&What::ALL, read.u8(29))?,
            done: of_code(&Done::ALL, read.u8(30))?,
            by: of_code(&FoundBy::ALL, read.u8(31))?,
        },
    })
}

/// Codes begin with 1.
fn code_of(place: usize) -> u8 {
    u8::try_from(place + 1).unwrap_or(0)
}

fn of_code<T: Copy>(all: &[T], code: u8) -> Option<T> {
    all.get(usize::from(code.checked_sub(1)?)).copied()
}
