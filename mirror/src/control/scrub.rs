//! Scrubs in the control protocol: what is asked of them, and what they say.

use serde::{Deserialize, Serialize};

/// Most cells of a [`ScrubMap`].
pub const MAP_CELLS_MAX: u32 = 4096;

/// What scrubs do and have done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ScrubStatus {
    /// What is going on.
    pub state: ScrubState,
    /// The pass under way.
    pub pass: Option<ScrubPass>,
    /// When the next pass begins by itself, in seconds since 1970; none when it does not.
    pub next_at_secs: Option<u64>,
    /// Days from the begin of one pass to that of the next; 0: only by command.
    pub days: u16,
    /// Most MiB a second that a member is read with; none: as much as it gives.
    pub ceiling_mib: Option<u32>,
    /// Bytes a second of each member that are allowed at present; none while nothing is scrubbed
    /// or there is no bound.
    pub allowed_bytes: Option<u64>,
    /// Bytes a second of each member below which the pass would not end in time.
    pub floor_bytes: u64,
    /// The p99 latency of requests with the scrub over that without, in thousandths, when it was
    /// compared last.
    pub p99_permille: Option<u32>,
    /// Whether all of this is kept across restarts.
    pub kept: bool,
    /// Blocks that may have to be rewritten on a member within so many hours before it is failed:
    /// BLOCKS/HOURS, or `unlimited`.
    pub error_budget: String,
    /// Blocks of which no copy is known to be right: they read as errors, or, in a mirror without
    /// checksums, as one of the copies.
    pub damaged_blocks: u64,
    /// Since the mirror was made.
    pub totals: ScrubTotals,
    /// The passes that ended last, the newest first.
    pub passes: Vec<ScrubPass>,
}

/// What is going on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScrubState {
    /// No pass is under way.
    Idle,
    /// A pass is under way.
    Running,
    /// The operator has paused scrubbing.
    Paused,
}

/// How a pass ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScrubEnding {
    /// It has seen everything.
    Complete,
    /// The operator ended it.
    Cancelled,
}

/// One pass.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ScrubPass {
    /// Its number, counted from 1.
    pub number: u64,
    /// It repairs nothing.
    pub check_only: bool,
    /// When it began, in seconds since 1970.
    pub began_secs: u64,
    /// When it ended, in seconds since 1970.
    pub ended_secs: Option<u64>,
    /// How it ended.
    pub ending: Option<ScrubEnding>,
    /// Bytes of the device that were checked; only while it is under way.
    pub checked_bytes: Option<u64>,
    /// Bytes of the device that are written; only while it is under way.
    pub written_bytes: Option<u64>,
    /// Seconds until it ends, if it goes on as it did; only while it is under way.
    pub left_secs: Option<u64>,
    /// Bytes read from members.
    pub member_bytes: u64,
    /// Findings.
    pub findings: u64,
    /// Blocks repaired.
    pub repaired_blocks: u64,
    /// Blocks damaged.
    pub damaged_blocks: u64,
    /// Extents left out, because they were hot each time.
    pub left_out_extents: u64,
}

/// Since the mirror was made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct ScrubTotals {
    /// Passes that came to their end.
    pub passes: u64,
    /// Bytes that passes read from members.
    pub member_bytes: u64,
    /// Blocks that passes checked.
    pub checked_blocks: u64,
    /// Blocks found unreadable.
    pub unreadable_blocks: u64,
    /// Blocks that did not fit their checksum.
    pub checksum_failed_blocks: u64,
    /// Blocks whose copies differed.
    pub copies_differ_blocks: u64,
    /// Blocks whose stored checksum was another's.
    pub checksum_stale_blocks: u64,
    /// Blocks whose page of checksums was unreadable.
    pub page_unreadable_blocks: u64,
    /// Blocks rewritten from a good copy.
    pub rewritten_blocks: u64,
    /// Blocks whose checksum was mended.
    pub mended_blocks: u64,
    /// Blocks found damaged.
    pub damaged_blocks: u64,
    /// Blocks found by reads rather than scrubs.
    pub found_by_reads_blocks: u64,
    /// Damaged blocks that are not listed any more, for lack of room.
    pub forgotten_blocks: u64,
}

/// Everything that was found, as far as it is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ScrubReport {
    /// Where applications find the device.
    pub device: Option<String>,
    /// The oldest first.
    pub findings: Vec<ScrubFinding>,
    /// Damaged blocks that are not listed any more, for lack of room.
    pub forgotten_blocks: u64,
}

/// Something that was not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ScrubFinding {
    /// When it was first found, in seconds since 1970.
    pub when_secs: u64,
    /// The member's slot; none when it is about all members.
    pub slot: Option<u8>,
    /// Path of the member that is in this slot now.
    pub path: Option<String>,
    /// Where it begins on the device, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// What was found.
    pub what: ScrubWhat,
    /// What was done.
    pub done: ScrubDone,
    /// Who found it.
    pub by: ScrubBy,
}

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScrubWhat {
    /// The member did not return it.
    Unreadable,
    /// The copy does not fit its checksum.
    ChecksumFailed,
    /// The copies differ, and no checksum is known.
    CopiesDiffer,
    /// All copies agree, and the stored checksum is another's.
    ChecksumStale,
    /// The page of checksums could not be read.
    PageUnreadable,
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScrubDone {
    /// Written anew from a good copy.
    Rewritten,
    /// The checksum was written anew.
    ChecksumMended,
    /// Nothing: there is no good copy, and it reads as an error.
    Damaged,
    /// Nothing: the pass only checked.
    CheckOnly,
    /// The member was failed.
    MemberFailed,
    /// It was damaged, and has been written again since.
    WrittenAgain,
}

/// Who found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScrubBy {
    /// A scrub.
    Scrub,
    /// A read.
    Read,
    /// A resync.
    Resync,
}

/// The device as a row of cells, each of which stands for the same number of extents and is what
/// is worst in them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ScrubMap {
    /// Size of the device in bytes.
    pub size_bytes: u64,
    /// Bytes of the device that a cell stands for.
    pub cell_bytes: u64,
    /// Cells in order, as runs of equal ones.
    pub runs: Vec<ScrubRun>,
}

/// Equal cells that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ScrubRun {
    /// What they are.
    pub class: ScrubClass,
    /// How many.
    pub cells: u32,
}

/// What a cell is; later ones are worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScrubClass {
    /// Not written.
    Unwritten,
    /// Written; nothing to say of it.
    Written,
    /// Written lately.
    Hot,
    /// Something in it was repaired.
    Repaired,
    /// A member lacks some of it.
    Missed,
    /// Something in it is damaged.
    Damaged,
}
