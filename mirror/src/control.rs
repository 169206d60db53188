//! The control protocol between `mirrorctl` and a mirror's daemon, and the JSON that
//! `mirrorctl --json` prints.
//!
//! One request a connection on a unix stream socket: the client sends one [`Request`] as a
//! line of JSON, the daemon answers with one [`Reply`] as a line of JSON and closes. A request
//! is at most [`MAX_REQUEST_BYTES`] long and a reply [`MAX_LINE_BYTES`]. Fields are only ever
//! added; a reader ignores those it does not know.

mod scrub;

pub use scrub::{
    MAP_CELLS_MAX, ScrubBy, ScrubClass, ScrubDone, ScrubEnding, ScrubFinding, ScrubMap, ScrubPass,
    ScrubReport, ScrubRun, ScrubState, ScrubStatus, ScrubTotals, ScrubWhat,
};
use serde::{Deserialize, Serialize};

/// The longest reply that is accepted, in bytes.
pub const MAX_LINE_BYTES: usize = 1 << 20;
/// The longest request that is accepted, in bytes: the longest path, every byte of it escaped,
/// takes 24 KiB. Decoding takes up to a hundred times as much memory ([`decoded_bytes_max`]).
pub const MAX_REQUEST_BYTES: usize = 64 << 10;

/// Most memory, in bytes, that [`from_line`] takes for a line of `line_bytes` (R17).
///
/// Fields may come in any order, so a line is first taken apart as a whole: a few bytes of
/// nested brackets are then a vector of their own.
#[must_use]
pub fn decoded_bytes_max(line_bytes: usize) -> usize {
    (4 << 10) + 96 * line_bytes
}

/// Decodes a [`Request`] or a [`Reply`] from its line, with or without the newline.
///
/// # Errors
///
/// When the line is no such message; the error says where and why.
pub fn from_line<'line, M: Deserialize<'line>>(line: &'line [u8]) -> serde_json::Result<M> {
    serde_json::from_slice(line)
}

/// The line of a [`Request`] or a [`Reply`], newline included.
///
/// # Errors
///
/// None for these two.
pub fn to_line(message: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

/// What `mirrorctl` asks of a daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Report the mirror's state.
    Status,
    /// Take an in-sync or resyncing member out of service as faulty.
    Fail {
        /// The member.
        member: MemberRef,
    },
    /// Let go of a member's device (it must be faulty, stale or missing; an in-sync member is
    /// failed first when `force` is given).
    Remove {
        /// The member.
        member: MemberRef,
        /// Also take an in-sync member out.
        force: bool,
    },
    /// Bring a former member back; decides delta or full resync (R16).
    ReAdd {
        /// Path of the member's device or image file.
        path: String,
        /// Accept a full resync when a delta is not possible.
        full: bool,
        /// It gives up what it has changed by itself (split brain).
        #[serde(default)]
        discard_changes: bool,
        /// Only say what would be done.
        dry_run: bool,
    },
    /// Put a new disk into an empty slot; full resync of the written extents.
    Add {
        /// Path of the new device or image file.
        path: String,
        /// Overwrite what the disk holds.
        force: bool,
        /// Only say what would be done.
        dry_run: bool,
    },
    /// Accept that blocks after a failed flush may be lost, and let FLUSH work again (R7).
    ClearFlushError,
    /// Begin a pass of the scrubber, and go on if paused.
    ScrubStart {
        /// Repair nothing.
        #[serde(default)]
        check_only: bool,
        /// No further pass begins by itself.
        #[serde(default)]
        once: bool,
        /// Days from the begin of one pass to that of the next, from now on.
        #[serde(default)]
        days: Option<u16>,
        /// Most MiB a second that a member is read with, from now on; 0: as much as it gives.
        #[serde(default)]
        ceiling_mib: Option<u32>,
    },
    /// Scrub nothing until told to.
    ScrubPause,
    /// Go on.
    ScrubResume,
    /// End the pass under way.
    ScrubCancel,
    /// What scrubs do and have done.
    ScrubStatus,
    /// What was found.
    ScrubReport,
    /// The device as a row of cells.
    ScrubMap {
        /// How many at most, up to [`MAP_CELLS_MAX`].
        cells: u32,
    },
    /// Flush, cool every extent, record the clean stop and exit.
    Stop {
        /// Stop even while the device is open.
        force: bool,
        /// The member that may go on without the others.
        #[serde(default)]
        hand_over: Option<MemberRef>,
    },
}

/// Names a member of a running mirror.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemberRef {
    /// By slot number.
    Slot(u8),
    /// By the path of its device or file.
    Path(String),
}

/// The daemon's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// Done; `message` says in a sentence what was done.
    Done {
        /// A sentence for a person.
        message: String,
    },
    /// The state of the mirror.
    Status(Box<Status>),
    /// What scrubs do and have done.
    ScrubStatus(Box<ScrubStatus>),
    /// What was found.
    ScrubReport(ScrubReport),
    /// The device as a row of cells.
    ScrubMap(ScrubMap),
    /// Refused or failed.
    Error {
        /// What is wrong and what to do, as a sentence.
        message: String,
        /// Class of the failure.
        kind: ErrorKind,
    },
}

/// Class of a failure; `mirrorctl` maps it to its exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// The request made no sense.
    Usage,
    /// Refused to protect data; may be forced.
    Refused,
    /// No such mirror or member.
    NotFound,
    /// Something is in use.
    Busy,
    /// A device or the system failed.
    Failed,
}

/// A mirror's state as one document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Status {
    /// The mirror's name.
    pub name: String,
    /// The mirror's uuid.
    pub uuid: String,
    /// Whether every slot is in-sync.
    pub state: MirrorState,
    /// Size of the device in bytes.
    pub size_bytes: u64,
    /// Smallest unit of I/O in bytes.
    pub logical_block_bytes: u32,
    /// Where applications find it: `/dev/ublkbN`, or an `nbd+unix://` address.
    pub device: Option<String>,
    /// Process id of the daemon.
    pub daemon_pid: u32,
    /// Membership changes so far.
    pub event_count: u64,
    /// Identity of the present set of members (32 hex digits).
    pub epoch: String,
    /// Whether write intent is recorded; false only under the benchmark's unsafe flag.
    pub write_intent: bool,
    /// Whether FLUSH and FUA answer EIO because an earlier flush failed everywhere (R7).
    pub flush_error: bool,
    /// The slots in order.
    pub members: Vec<MemberStatus>,
    /// Extent counts.
    pub extents: ExtentCounts,
    /// The resync under way.
    pub resync: Option<ResyncStatus>,
    /// The resync that ended last.
    pub last_resync: Option<ResyncStatus>,
    /// Requests and bytes since the start.
    pub io: IoCounts,
    /// What scrubs do and have done; none from a daemon that does not scrub.
    #[serde(default)]
    pub scrub: Option<Box<ScrubStatus>>,
}

/// State of the whole mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MirrorState {
    /// Every slot holds an in-sync member.
    InSync,
    /// At least one slot is not in-sync, none is resyncing.
    Degraded,
    /// At least one slot is resyncing.
    Resyncing,
    /// Writes answer EIO because a loss could not be made durable; reads go on.
    WriteBlocked,
}

/// State of one member (design words).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemberState {
    /// Holds every block.
    InSync,
    /// Receives new writes and is being brought up to date.
    Resyncing,
    /// Lacks blocks and does not receive writes.
    Stale,
    /// Failed I/O or was failed by the operator.
    Faulty,
    /// Not present.
    Missing,
}

/// One slot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemberStatus {
    /// Slot number.
    pub slot: u8,
    /// Path of the device or file; the last one known when it is not present.
    pub path: String,
    /// The member's uuid; none for an empty slot.
    pub uuid: Option<String>,
    /// Its state.
    pub state: MemberState,
    /// Why it is not in-sync, as a sentence.
    pub reason: Option<String>,
    /// Bytes it lacks.
    pub missed_bytes: u64,
    /// Whether the device is held open by the daemon.
    pub attached: bool,
    /// Operations an earlier, lost device still owes.
    pub orphans: u64,
    /// Reads that failed here and were answered by another member.
    pub read_errors: u64,
    /// Blocks rewritten here from a good copy after a failed read.
    pub repaired_blocks: u64,
    /// Whether it is a peer whose server cannot end an earlier session first (R13).
    #[serde(default)]
    pub unfenced: bool,
    /// Whether it is an in-sync peer of which checksums of blocks are not to be had now, as far as is
    /// known: a scrub reads all of its blocks.
    #[serde(default)]
    pub scrub_reads_all: bool,
}

/// How many extents are in each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ExtentCounts {
    /// Read as zeroes; the disks have not been touched.
    pub unwritten: u64,
    /// All copies equal.
    pub cool: u64,
    /// Written lately; copies may differ after a crash.
    pub hot: u64,
    /// Read as zeroes; zeroed again before use.
    pub discarded: u64,
    /// Budget of hot extents; exceeding it is reported, not waited on.
    pub hot_budget: u64,
    /// Blocks still to be equalised after an unclean stop.
    pub unequalised_blocks: u64,
}

/// A delta or full resync.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ResyncStatus {
    /// The slot being brought up to date.
    pub slot: u8,
    /// Which kind.
    pub kind: ResyncKind,
    /// Why this kind, as a sentence.
    pub reason: String,
    /// Whether it ended with the member in-sync.
    pub finished: bool,
    /// Bytes copied so far.
    pub copied_bytes: u64,
    /// Bytes that were all zero and were zeroed instead of copied.
    pub zeroed_bytes: u64,
    /// Bytes still missed.
    pub remaining_bytes: u64,
    /// Time since it began, in milliseconds.
    pub elapsed_ms: u64,
    /// Set when nothing has moved for a while: why.
    pub stalled: Option<String>,
}

/// Delta or full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResyncKind {
    /// Missed blocks only.
    Delta,
    /// All written extents.
    Full,
}

/// Requests and bytes since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct IoCounts {
    /// Reads answered.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes answered.
    pub writes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Flushes answered.
    pub flushes: u64,
    /// Discards and write-zeroes answered.
    pub discards: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Map commits made durable.
    pub map_commits: u64,
    /// Extents zeroed on the members before their first use.
    pub extents_zeroed: u64,
    /// Extents zeroed before their first use, out of a request's way.
    #[serde(default)]
    pub extents_zeroed_ahead: u64,
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
