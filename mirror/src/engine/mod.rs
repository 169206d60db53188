//! The running mirror.
//!
//! One thread owns a mirror. Front ends call [`Mirror::read`], [`Mirror::write`],
//! [`Mirror::flush`], [`Mirror::discard`] and [`Mirror::write_zeroes`] from as many tasks as
//! they like; operators' commands call [`Mirror::fail`], [`Mirror::re_add`] and so on. A few
//! background tasks commit maps, cool quiet extents, equalise after an unclean stop and copy
//! missed blocks.
//!
//! | file | holds |
//! |---|---|
//! | `write.rs` | the write path, top to bottom; flush |
//! | `heat.rs` | making extents hot before a write: zeroing, intent |
//! | `zero_ahead.rs` | zeroing extents before anybody writes to them |
//! | `read.rs` | the read path, failover, repair of a bad copy |
//! | `zeroes.rs` | discard and write-zeroes |
//! | `sums.rs`, `edges.rs` | checksums of blocks, and of blocks that are written in part |
//! | `background.rs` | what the scrubber needs besides: latencies, error budgets |
//! | `check.rs` | checking an extent for the scrubber |
//! | `settle.rs` | a second look at blocks: which copy is right, and making the others so |
//! | `damaged.rs` | blocks that a resync finds without a right copy |
//! | `outcome.rs` | what comes of a second look |
//! | `copies.rs` | the members' copies of a range side by side |
//! | `commit.rs` | group commit of map pages |
//! | `loss.rs` | losing a member, rounds of superblock updates |
//! | `join.rs` | bringing a member back or a new one in |
//! | `stop.rs` | the clean stop; handing over, so that another host may go on with its member alone |
//! | `split.rs` | what a member has changed by itself, which it gives up |
//! | `slots.rs` | whether a device may have a slot, and how a former member comes back |
//! | `resync.rs` | copying missed blocks |
//! | `equalise.rs` | making copies equal after an unclean stop |
//! | `cool.rs` | cooling quiet extents, the position tick, the stall watch |
//! | `start.rs` | from superblocks and maps to a running mirror |
//! | `maps.rs` | the maps in memory and their pages on the members |
//! | `member_io.rs` | superblocks and map pages of one member |
//! | `fan_out.rs`, `wait.rs` | one request on several members; waiting |
//! | `stall.rs` | one request on one member: whether it alone has stalled |
//!
//! # States of a slot while the mirror runs
//!
//! ```text
//!            join                 all missed bits clear, round
//!  Absent ─────────► Resyncing ───────────────────────────────► InSync
//!    ▲                   │                                        │
//!    │ round effective   │ I/O error, stall, operator             │
//!    └──── Losing ◄──────┴────────────────────────────────────────┘
//! ```
//!
//! *Losing* begins the moment a fault is judged: from then on nothing is sent to the member and
//! new writes set its missed bits; no write is acknowledged until the round that records the
//! loss is effective (R2).

mod background;
mod by_sums;
mod check;
mod commit;
mod cool;
mod copies;
mod damaged;
mod edges;
mod equalise;
mod fan_out;
mod heat;
mod join;
mod loss;
mod maps;
mod member_io;
mod outcome;
mod quiet;
mod read;
mod resync;
mod settle;
mod slots;
mod split;
mod stall;
mod start;
mod status;
mod stop;
mod sums;
mod wait;
mod write;
mod zero_ahead;
mod zeroes;

use crate::budget::{ErrorBudget, ErrorBudgets};
use crate::control::{ErrorKind, IoCounts, ResyncStatus};
use crate::host::{Buffer, Disk, DiskRequest, Errno, Geometry, Host, Span};
use crate::pace::{Limits, Pacer};
use crate::superblock::{SlotState, Superblock};
use commit::Commits;
pub use dirty_map::HOT_CAP_BYTES;
use dirty_map::Stamp;
use fan_out::{FanOut, StallWatch};
use maps::Maps;
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;
use wait::{Exclusive, Gate, RangeLocks, ReadPhases, WaitList};

pub use background::ExtentLook;
pub use check::{CheckOptions, Checked};
pub use slots::Return;
pub use start::StartError;

/// Largest piece in which the engine itself moves data, in bytes.
pub const PIECE_BYTES: usize = 1 << 20;
/// A member that has not answered for this long is lost, unless told otherwise.
pub const DEADLINE_DEFAULT: Duration = Duration::from_secs(30);
/// Hot extents that may exist before it is reported, unless told otherwise: 64 GiB to equalise.
pub const HOT_BUDGET_DEFAULT: u32 = 16384;
/// Memory for pages of the checksum table, unless told otherwise: those of 120 GiB.
pub const SUM_CACHE_BYTES_DEFAULT: usize = 128 << 20;

/// Choices at start.
#[derive(Clone, Debug)]
pub struct StartOptions {
    /// The mirror's name; must be the one in the superblocks.
    pub name: String,
    /// Start although an absent member may hold newer data (R15).
    pub force: bool,
    /// Why, in the operator's words.
    pub reason: String,
    /// Start without members that have handed the mirror over (`stop.rs`).
    pub promote: bool,
    /// Record write intent. `false` is unsafe and for benchmarks only.
    pub write_intent: bool,
    /// How long a member may take to answer.
    pub deadline: Duration,
    /// Budget of hot extents; exceeded and reported rather than waited on.
    pub hot_budget: Option<u32>,
    /// Bytes that the state of hot extents may take; when they are used up, extents cool early.
    /// Half of it is for their checksums, where they are kept.
    pub hot_memory_bytes: usize,
    /// Check what is read against its checksum, and answer with another copy where it does not
    /// fit.
    pub check_reads: bool,
    /// Bytes that pages of the checksum table may take in memory.
    pub sum_cache_bytes: usize,
    /// How often a member may need a block rewritten before it is lost.
    pub error_budget: ErrorBudget,
    /// What a resync may cost the foreground, and how fast it is at the least and at the most.
    pub resync_limits: Limits,
}

/// An opened device that may be a member.
pub struct Candidate<D> {
    /// Its path, for messages and as a hint in the superblock.
    pub path: String,
    /// The device.
    pub disk: D,
}

/// Why an operator's command was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ControlError {
    /// Class of the failure.
    pub kind: ErrorKind,
    /// A sentence: what is wrong and what to do.
    pub message: String,
}

impl ControlError {
    fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }
}

/// A slot's state while the mirror runs; see the diagram in the module documentation.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Running {
    /// No member, or one that receives nothing.
    Absent,
    /// Receives writes; read from never.
    Resyncing,
    /// Receives writes and serves reads.
    InSync,
    /// Judged; its loss is not yet effective.
    Losing {
        /// What the slot record will say.
        becomes: SlotState,
    },
}

/// One slot.
struct Slot<D> {
    running: Running,
    /// Kept while the device still owes operations, also after a loss (R6).
    disk: Option<Rc<D>>,
    path: String,
    /// Why it is not in-sync, for people.
    reason: Option<String>,
    /// The operator took it out in this run: it does not come back by itself.
    held_out: bool,
    /// The newest commit that is durable on it for certain.
    position: Stamp,
    /// The last epoch that its superblock durably holds.
    epoch: u128,
    /// The event count that it holds with that.
    events: u64,
    /// Update counter of its superblock, attempts that failed counted in.
    write_count: u64,
    /// Reads that failed on it.
    read_errors: u64,
    /// Blocks rewritten on it after a failed read.
    repaired_blocks: u64,
}

impl<D> Slot<D> {
    fn absent(path: String) -> Self {
        Self {
            running: Running::Absent,
            disk: None,
            path,
            reason: None,
            held_out: false,
            position: Stamp {
                ordinal: 0,
                sequence: 0,
            },
            epoch: 0,
            events: 0,
            write_count: 0,
            read_errors: 0,
            repaired_blocks: 0,
        }
    }
}

/// A member that receives writes, as the data path sees it.
struct Receiver<D> {
    slot: u8,
    in_sync: bool,
    disk: Rc<D>,
    geometry: Geometry,
}

impl<D> Clone for Receiver<D> {
    fn clone(&self) -> Self {
        Self {
            disk: self.disk.clone(),
            ..*self
        }
    }
}

/// What the data path needs to know about the set of members; replaced as a whole whenever
/// the set changes, so that a request works with one consistent view.
struct View<D> {
    /// Receiving members.
    receivers: Vec<Receiver<D>>,
    /// Slots with a member that receives nothing: their missed maps grow with each write.
    absent: Vec<u8>,
}

/// A running mirror. See the module documentation.
pub struct Mirror<H: Host, D: Disk<Buffer = H::Buffer>> {
    host: Rc<H>,
    options: StartOptions,
    /// The configuration all members share. `member`, `own_slot` and `write_count` are filled
    /// in for each member when it is written.
    config: RefCell<Superblock>,
    /// What the last round has sent to members without becoming effective.
    attempt: RefCell<Option<Superblock>>,
    slots: RefCell<Vec<Slot<D>>>,
    view: RefCell<Rc<View<D>>>,
    maps: RefCell<Maps>,
    gate: Gate,
    locks: RangeLocks,
    reads: ReadPhases,
    membership: Exclusive,
    /// Held from the decision that a device may join until it has.
    joining: Exclusive,
    cooling: Exclusive,
    sums: sums::SumIo<H::Buffer>,
    commits: Commits,
    flushes: write::Flushes,
    stalls: StallWatch,
    probes: stall::Probes<D>,
    /// Woken when an extent's preparation ends.
    prepared: WaitList,
    ahead: RefCell<zero_ahead::ZeroAhead>,
    /// Woken when there may be extents to zero ahead of their use.
    ahead_wanted: WaitList,
    /// Woken when losses become effective, fail to, or resync state changes.
    changed: WaitList,
    /// Losses judged but not effective.
    losses_pending: Cell<usize>,
    /// The suspect blocks of a failed flush are known, because it failed in this run.
    flush_failed_here: Cell<bool>,
    /// Flushes that failed everywhere in this run.
    flush_failures: Cell<u64>,
    /// A flush failed everywhere and the superblocks do not say so yet.
    flush_unrecorded: Cell<bool>,
    /// A loss could not be made durable on the last survivor: writes answer EIO (R2).
    write_blocked: Cell<bool>,
    stopping: Cell<bool>,
    /// Coarse time for bookkeeping that does not need a clock reading a request.
    coarse_now: Cell<Duration>,
    /// Whether anything was answered, or a map changed on disk, since the last position tick.
    wrote_since_tick: Cell<bool>,
    /// Whether anything was between the last two.
    wrote_before_tick: Cell<bool>,
    counts: RefCell<IoCounts>,
    budgets: RefCell<ErrorBudgets>,
    /// Who wants to know how long requests take.
    pacers: RefCell<Vec<Rc<RefCell<Pacer>>>>,
    resync: RefCell<Option<ResyncStatus>>,
    last_resync: RefCell<Option<ResyncStatus>>,
    /// Zeroes for members that cannot zero by themselves.
    zeroes: H::Buffer,
    data_offset: u64,
    size_bytes: u64,
    logical_block_bytes: u32,
}

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// Size of the device in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Smallest unit of I/O in bytes.
    pub fn logical_block_bytes(&self) -> u32 {
        self.logical_block_bytes
    }

    /// The present view of the members.
    fn view(&self) -> Rc<View<D>> {
        self.view.borrow().clone()
    }

    /// Rebuilds the view after a slot changed.
    fn refresh_view(&self) {
        let config = self.config.borrow();
        let mut view = View {
            receivers: Vec::new(),
            absent: Vec::new(),
        };
        for (slot, (state, record)) in (0..).zip(self.slots.borrow().iter().zip(&config.slots)) {
            match (&state.running, &state.disk) {
                (Running::InSync | Running::Resyncing, Some(disk)) => {
                    view.receivers.push(Receiver {
                        slot,
                        in_sync: state.running == Running::InSync,
                        disk: disk.clone(),
                        geometry: disk.geometry(),
                    });
                }
                _ if record.member.is_some() => view.absent.push(slot),
                _ => {}
            }
        }
        self.stalls
            .set_receiving(view.receivers.iter().map(|r| (r.slot, r.in_sync)));
        *self.view.borrow_mut() = Rc::new(view);
    }

    /// Sends a request to every receiving member at once and waits for what comes of it.
    fn to_receivers(
        &self,
        view: &View<D>,
        mut request: impl FnMut(&Receiver<D>) -> DiskRequest<H::Buffer>,
    ) -> FanOut<'_, D::Op> {
        let mut fan_out = FanOut::new(&self.stalls);
        for receiver in &view.receivers {
            let op = receiver.disk.submit(request(receiver));
            fan_out.push(receiver.slot, receiver.in_sync, op);
        }
        fan_out
    }

    /// Checks a request's range against the device.
    fn check(&self, offset: u64, len: u64) -> Result<Range<u64>, Errno> {
        let block = u64::from(self.logical_block_bytes);
        let end = offset.checked_add(len).ok_or(Errno::INVALID)?;
        if end > self.size_bytes {
            return Err(Errno::NO_SPACE);
        }
        if !offset.is_multiple_of(block) || !len.is_multiple_of(block) {
            return Err(Errno::INVALID);
        }
        Ok(offset..end)
    }

    /// The part of the device that `extent` covers, in bytes; the last one may be short.
    fn extent_bytes(&self, extent: dirty_map::Extent) -> Range<u64> {
        let start = extent.start_bytes();
        start..(start + dirty_map::EXTENT_BYTES).min(self.size_bytes)
    }

    /// The part of the device that `blocks` cover, in bytes; the last one may be short.
    fn block_bytes(&self, blocks: &Range<u64>) -> Range<u64> {
        let bytes = dirty_map::BLOCK_BYTES;
        blocks.start * bytes..(blocks.end * bytes).min(self.size_bytes)
    }

    /// Spawns a background task that keeps the mirror alive.
    fn spawn<F: Future<Output = ()> + 'static>(self: &Rc<Self>, task: impl FnOnce(Rc<Self>) -> F) {
        self.host.spawn(Box::pin(task(self.clone())));
    }

    fn count(&self, update: impl FnOnce(&mut IoCounts)) {
        update(&mut self.counts.borrow_mut());
    }
}

/// A span of `len` bytes at the start of `buffer`.
fn front<B: Buffer>(buffer: &B, len: usize) -> Span<B> {
    Span {
        buffer: buffer.clone(),
        start: 0,
        len,
    }
}

/// A byte count as a length in memory; counts here are bounded by [`PIECE_BYTES`] or by a
/// buffer's length.
fn length(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
