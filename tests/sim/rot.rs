//! Silent corruption in histories: a copy that changes behind everybody's back is never read as
//! if nothing had happened, and in the end it is made good.
//!
//! Only what can be told is asked for. A block rots where a checksum is on disk for it: in an
//! extent that is cool on every member, while all are in-sync. When the machine then stops without
//! a word, the extent may be hot, and what its page says of a block may be older than the block:
//! copies are still compared, and the one that fits is taken, as long as every member is there.
//! With one member less nothing can be told from what it holds, so the copy is put right first.

use crate::machine::{Client, Machine, SimMirror, superblock_on};
use crate::play::Bench;
use crate::sums;
use dirty_map::{BLOCK_BYTES, Block, Extent, ExtentState};
use mirror::Host as _;
use mirror::control::MemberState;
use mirror::engine::CheckOptions;
use mirror::sim::{SimDisk, SimHost};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

/// What has rotted in a history.
#[derive(Default)]
pub(crate) struct Rotten {
    sectors: RefCell<Vec<Rot>>,
    /// Blocks that ever did: with another fault at the same time they may be lost.
    blocks: RefCell<BTreeSet<u64>>,
}

struct Rot {
    disk: SimDisk,
    block: u64,
    /// On the disk.
    offset: u64,
    good: [u8; 512],
    bad: [u8; 512],
}

impl Rot {
    fn is_there(&self) -> bool {
        let mut now = [0; 512];
        self.disk.read_now(self.offset, &mut now);
        now == self.bad
    }
}

/// Lets a sector of a block rot on one disk, if it can be told there.
pub(crate) fn rot(client: &Client, bench: &Bench, slot: u8, block: u64) {
    if !client.tells_rot || !is_decidable(client, bench, block) {
        return;
    }
    let disk = bench.disk(slot);
    let offset = client.data_offset + block * BLOCK_BYTES + 512;
    if disk.settled(offset - 512, BLOCK_BYTES).is_none() {
        // A write is on its way, or in the disk's cache.
        return;
    }
    let mut good = [0; 512];
    disk.read_now(offset, &mut good);
    let mut bad = good;
    bad[77] ^= 1;
    tracing::trace!("block {block} rots in slot {slot}");
    disk.write_now(offset, &bad);
    let rot = Rot {
        disk,
        block,
        offset,
        good,
        bad,
    };
    bench.rotten.blocks.borrow_mut().insert(block);
    bench.rotten.sectors.borrow_mut().push(rot);
}

fn is_decidable(client: &Client, bench: &Bench, block: u64) -> bool {
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
    let others = bench.rotten.sectors.borrow();
    let twice = |rot: &Rot| rot.block == block && rot.is_there();
    members.iter().all(|m| m.state == MemberState::InSync)
        && bench.no_outages()
        && (0..members.len()).all(knows)
        && !others.iter().any(twice)
}

impl Rotten {
    /// Puts everything right that is rotten still.
    pub(crate) fn put_right(&self) {
        self.put_right_unless(|_| false);
    }

    /// The machine stops without a word. What can be told afterwards stays as it is: with every
    /// member in-sync, and nothing of the block on its way to any disk or in a cache.
    pub(crate) fn before_a_crash(&self, disks: &[SimDisk], data_offset: u64, all_in_sync: bool) {
        self.put_right_unless(|rot| {
            let at = data_offset + rot.block * BLOCK_BYTES;
            all_in_sync
                && disks
                    .iter()
                    .all(|disk| disk.settled(at, BLOCK_BYTES).is_some())
        });
    }

    fn put_right_unless(&self, stays: impl Fn(&Rot) -> bool) {
        let mut sectors = self.sectors.borrow_mut();
        sectors.retain(|rot| rot.is_there());
        for rot in sectors.extract_if(.., |rot| !stays(rot)) {
            rot.disk.write_now(rot.offset, &rot.good);
        }
    }

    /// Nothing of it is left.
    pub(crate) fn is_healed(&self) -> bool {
        !self.sectors.borrow().iter().any(Rot::is_there)
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

/// Checks every extent once: what is wrong is repaired.
pub(crate) fn check_all_extents(machine: &Machine) {
    let mirror = machine.mirror();
    machine.world.block_on(async move {
        for extent in (0..mirror.extents()).map(Extent) {
            mirror
                .check_extent(extent, repairing(extent.0 % 2 == 1))
                .await
                .unwrap();
        }
    });
}

/// One pass after the other over all extents, until the clients have ended.
pub(crate) async fn scrub(mirror: Rc<SimMirror>, host: SimHost, ended: impl Fn() -> bool) {
    let mut extent = Extent(0);
    while !ended() {
        // Errors are legal while disks are faulty.
        let how = CheckOptions {
            hot_too: host.random().is_multiple_of(2),
            ..repairing(extent.0 % 2 == 1)
        };
        let _ = mirror.check_extent(extent, how).await;
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
