//! Silent corruption in histories: a copy that changes behind everybody's back is never read as
//! if nothing had happened, and in the end it is made good.
//!
//! Only what can be told is asked for. A block rots where a checksum is on disk for it: in an
//! extent that is cool on every member, while all are in-sync. When the machine then stops without
//! a word, the extent may be hot, and what its page says of a block may be older than the block:
//! copies are still compared, and the one that fits is taken, as long as every member is there.
//! With one member less nothing can be told from what it holds, so the copy is put right first.

use crate::client::Client;
use crate::machine::{Machine, SimMirror, superblock_on};
use crate::play::Bench;
use crate::sums;
use dirty_map::{BLOCK_BYTES, Block, Extent, ExtentState};
use mirror::Host as _;
use mirror::control::MemberState;
use mirror::engine::CheckOptions;
use mirror::scrub_log::What;
use mirror::sim::{SimDisk, SimHost};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

/// What has rotted in a history.
#[derive(Default)]
pub(crate) struct Rotten {
    copies: RefCell<Vec<Rot>>,
    /// Blocks that ever did: with another fault at the same time they may be lost.
    blocks: RefCell<BTreeSet<u64>>,
    counts: Cell<Counts>,
}

/// How often copies rotted, and what became of them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    /// Blocks that scrubs have checked.
    pub(crate) scrubbed: u64,
    pub(crate) rotted: u64,
    /// Mended by the mirror, or written over.
    pub(crate) gone: u64,
    /// Put right by the harness, because nothing could tell any more.
    pub(crate) undone: u64,
}

struct Rot {
    disk: SimDisk,
    block: u64,
    /// On the disk.
    offset: u64,
    good: Held,
    /// Of each sector the same, or something that is never written there.
    bad: Held,
    /// Covered by a write that the crash to come may take away.
    doomed: Cell<bool>,
}

const SECTOR: usize = 512;

/// What a disk holds of a block.
type Held = [u8; BLOCK_BYTES as usize];

impl Rot {
    /// Where a sector of it is still rotten, in bytes from its begin.
    fn rotten(&self) -> impl Iterator<Item = usize> {
        let now = copy_at(&self.disk, self.offset);
        let at = move |start: &usize| {
            let sector = *start..start + SECTOR;
            self.bad[sector.clone()] != self.good[sector.clone()]
                && now[sector.clone()] == self.bad[sector]
        };
        (0..now.len()).step_by(SECTOR).filter(at)
    }

    fn is_there(&self) -> bool {
        self.rotten().next().is_some()
    }

    /// Something is written over it that is not durable.
    fn is_covered(&self) -> bool {
        self.disk.settled(self.offset, BLOCK_BYTES).is_none()
    }

    fn undo(&self) {
        for start in self.rotten() {
            let good = &self.good[start..start + SECTOR];
            self.disk.write_now(self.offset + start as u64, good);
        }
    }
}

fn copy_at(disk: &SimDisk, offset: u64) -> Held {
    let mut copy = [0; BLOCK_BYTES as usize];
    disk.read_now(offset, &mut copy);
    copy
}

/// Lets a block rot on one disk, if it can be told there: a bit flips, or another block's content
/// was written here, or what was written here never was.
pub(crate) fn rot(client: &Client, bench: &Bench, slot: u8, block: u64) {
    if !client.tells_rot || !is_decidable(client, bench, slot, block) {
        return;
    }
    let disk = bench.disk(slot);
    let offset_of = |block: u64| client.data_offset + block * BLOCK_BYTES;
    let offset = offset_of(block);
    let good = copy_at(&disk, offset);
    let mut bad = match block % 4 {
        0 => copy_at(&disk, offset_of(block ^ 1)),
        1 => [0; BLOCK_BYTES as usize],
        _ => good,
    };
    if bad == good {
        bad[589] ^= 1;
    }
    for (bad, good) in bad.chunks_mut(SECTOR).zip(good.chunks(SECTOR)) {
        if bad != good && bad.iter().all(|byte| *byte == 0) {
            // Never what a discard leaves there.
            bad[77] = 1;
        }
    }
    tracing::trace!("block {block} rots in slot {slot}");
    disk.write_now(offset, &bad);
    let rot = Rot {
        disk,
        block,
        offset,
        good,
        bad,
        doomed: Cell::new(false),
    };
    bench.rotten.count(|counts| counts.rotted += 1);
    bench.rotten.blocks.borrow_mut().insert(block);
    bench.rotten.copies.borrow_mut().push(rot);
}

/// Whether rot of a block in `slot` can be told.
fn is_decidable(client: &Client, bench: &Bench, slot: u8, block: u64) -> bool {
    let members = client.mirror.status().members;
    let extent = Block(block).extent();
    let knows = |slot: usize| {
        let disk = bench.disk(slot as u8);
        let Some(superblock) = superblock_on(&disk) else {
            return false;
        };
        let cool = sums::states_on(&disk, &superblock).get(extent) == ExtentState::Cool;
        cool && sums::page_on(&disk, &superblock, extent)
            .get(Block(block))
            .is_some()
    };
    let others = bench.rotten.copies.borrow();
    let twice = |rot: &Rot| rot.block == block && rot.is_there();
    let at = client.data_offset + block * BLOCK_BYTES;
    members.iter().all(|m| m.state == MemberState::InSync)
        && bench.no_outages()
        // No write of it is on its way, or in the disk's cache.
        && bench.disk(slot).settled(at, BLOCK_BYTES).is_some()
        && (0..members.len()).all(knows)
        && !others.iter().any(twice)
}

impl Counts {
    pub(crate) fn add(&mut self, other: Self) {
        self.scrubbed += other.scrubbed;
        self.rotted += other.rotted;
        self.gone += other.gone;
        self.undone += other.undone;
    }
}

impl Rotten {
    /// Puts everything right that is rotten still.
    pub(crate) fn put_right(&self) {
        self.put_right_unless(|_| false);
    }

    /// The machine stops without a word. What can be told afterwards stays as it is: with every
    /// member in-sync, and nothing of the block on its way to any disk or in a cache.
    /// [`Rotten::after_a_crash`] has to follow.
    pub(crate) fn before_a_crash(&self, disks: &[SimDisk], data_offset: u64, all_in_sync: bool) {
        self.put_right_unless(|rot| {
            let at = data_offset + rot.block * BLOCK_BYTES;
            all_in_sync
                && disks
                    .iter()
                    .all(|disk| disk.settled(at, BLOCK_BYTES).is_some())
        });
        for rot in self.copies.borrow().iter() {
            rot.doomed.set(rot.is_covered());
        }
    }

    /// What was written over some of it may be gone.
    pub(crate) fn after_a_crash(&self) {
        self.copies.borrow_mut().retain(|rot| {
            let back = rot.doomed.take() && rot.is_there();
            if back {
                rot.undo();
                self.count(|counts| counts.undone += 1);
            }
            !back
        });
    }

    fn put_right_unless(&self, stays: impl Fn(&Rot) -> bool) {
        let mut copies = self.copies.borrow_mut();
        self.forget_what_is_gone(&mut copies);
        for rot in copies.iter().filter(|rot| rot.is_there() && !stays(rot)) {
            rot.undo();
            self.count(|counts| counts.undone += 1);
        }
        copies.retain(|rot| rot.is_there() || rot.is_covered());
    }

    fn forget_what_is_gone(&self, copies: &mut Vec<Rot>) {
        let before = copies.len();
        copies.retain(|rot| rot.is_there() || rot.is_covered());
        let gone = (before - copies.len()) as u64;
        self.count(|counts| counts.gone += gone);
    }

    fn count(&self, change: impl FnOnce(&mut Counts)) {
        let mut counts = self.counts.get();
        change(&mut counts);
        self.counts.set(counts);
    }

    /// How often copies have rotted so far, and what became of them.
    pub(crate) fn counts(&self) -> Counts {
        self.forget_what_is_gone(&mut self.copies.borrow_mut());
        self.counts.get()
    }

    /// Nothing of it is left, where anything is written.
    pub(crate) fn all_healed(&self, mirror: &SimMirror) {
        let is_written = |extent| mirror.next_written(extent) == Some(extent);
        for rot in self.copies.borrow().iter().filter(|rot| rot.is_there()) {
            let extent = Block(rot.block).extent();
            assert!(
                !is_written(extent),
                "block {} is rotten after a scrub: {:?}",
                rot.block,
                mirror.scrub_log().findings()
            );
        }
    }

    /// Nothing is called wrong that never was.
    pub(crate) fn no_false_finding(&self, mirror: &SimMirror) {
        for finding in mirror.scrub_log().findings() {
            // A disk may say at any time that it cannot read.
            let refused = matches!(finding.what, What::Unreadable | What::PageUnreadable);
            let mut blocks = finding.blocks.clone();
            let rotten = self.blocks.borrow();
            assert!(
                refused || blocks.all(|block| rotten.contains(&block)),
                "nothing was wrong there: {finding:?}"
            );
        }
    }

    /// Whether a block of these sectors has ever rotted.
    pub(crate) fn concerns(&self, offset: u64, len: u64) -> bool {
        let blocks = dirty_map::blocks_covering(offset, len);
        self.blocks.borrow().range(blocks).next().is_some()
    }
}

/// With repairs; of what is not hot.
pub(crate) fn repairing(at_once: bool) -> CheckOptions {
    CheckOptions {
        repair: true,
        at_once,
        hot_too: false,
    }
}

/// Checks every extent once, hot or not: what is wrong is repaired.
pub(crate) fn check_all_extents(machine: &Machine) {
    let mirror = machine.mirror();
    machine.world.block_on(async move {
        for extent in (0..mirror.extents()).map(Extent) {
            let how = CheckOptions {
                hot_too: true,
                ..repairing(extent.0 % 2 == 1)
            };
            mirror.check_extent(extent, how).await.unwrap();
        }
    });
}

/// One pass after the other over all extents, until the clients have ended.
pub(crate) async fn scrub(
    mirror: Rc<SimMirror>,
    rotten: Rc<Rotten>,
    host: SimHost,
    ended: impl Fn() -> bool,
) {
    let mut extent = Extent(0);
    while !ended() {
        // Errors are legal while disks are faulty.
        let how = CheckOptions {
            hot_too: host.random().is_multiple_of(2),
            ..repairing(extent.0 % 2 == 1)
        };
        if let Ok(checked) = mirror.check_extent(extent, how).await {
            rotten.count(|counts| counts.scrubbed += checked.blocks);
        }
        extent = Extent((extent.0 + 1) % mirror.extents());
        if extent.0 == 0 {
            let pause = 1 + (host.random() % 16) as u64;
            host.sleep(Duration::from_secs(pause)).await;
        }
    }
}

impl Client {
    /// Reads sectors of which some cannot be read, because their block has rotted.
    pub(crate) async fn read_singly(
        &self,
        sectors: &[u64],
        rotten: &Rotten,
        found: &mut Vec<(u64, Vec<u8>)>,
    ) {
        for &sector in sectors {
            match self.read_raw(sector * 512, 512).await {
                Ok(bytes) => found.push((sector, bytes)),
                Err(error) => assert!(rotten.concerns(sector * 512, 512), "{sector}: {error}"),
            }
        }
    }
}
