//! A simulated disk that tells the CRC32 of blocks, as an export server of ours does: of what it
//! holds at some moment after the question, or nothing, and never of what it could not read.

use super::{Rng, SimDisk};
use crate::host::{Disk as _, SumsOp};

/// Bytes of a block.
const BLOCK: usize = 4096;
/// How often others may have a turn before it is answered.
const TURNS: u64 = 40;

impl SimDisk {
    /// From now on it is behind a network, and can be asked for checksums of blocks. `seed` says how
    /// long it takes, and when they are not to be had.
    pub fn tell_sums(&self, seed: u64) {
        self.alter(|geometry| geometry.behind_network = true);
        self.tells_sums().set(Some(seed));
    }

    /// An answer to come, if there are any.
    pub(super) fn ask_sums(&self, offset: u64, blocks: usize) -> Option<SumsOp> {
        let mut rng = Rng::new(self.tells_sums().get()?);
        self.tells_sums().set(Some(rng.bits()));
        let (turns, refused) = (rng.below(TURNS), rng.one_in(50));
        let disk = self.clone();
        Some(Box::pin(async move {
            super::turns(turns).await;
            let faults = disk.faults();
            let bad = (0..blocks).any(|at| disk.is_bad_block(offset + (at * BLOCK) as u64));
            if refused || bad || faults.reads || faults.hang || faults.gone || disk.is_dead() {
                return None;
            }
            let mut all = vec![0; blocks * BLOCK];
            disk.read_now(offset, &mut all);
            Some(all.chunks(BLOCK).map(crc32fast::hash).collect())
        }))
    }

    fn is_bad_block(&self, offset: u64) -> bool {
        let end = (offset + BLOCK as u64).min(self.geometry().size_bytes);
        (offset..end).step_by(512).any(|at| self.is_spoilt(at))
    }
}
