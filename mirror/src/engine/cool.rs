//! Cooling quiet extents, the position tick, and the stall watch.
//!
//! An extent cools about ten seconds after its last write (`quiet.rs`), when nothing in it is in flight,
//! unflushed or un-equalised (R3). Extents cool in batches: one flush, one commit of the missed
//! bits that belong to them, their checksums, one commit of their states. Before the last a write
//! may take an extent back; it is then simply hot again.
//!
//! While writes are answered or maps change, and once more after that, a position sector is
//! committed each second: it names the commit before, so that an older image of a member is
//! recognised (R16).

use super::Mirror;
use super::fan_out::TICKS_PER_DEADLINE;
use super::maps::Page;
use super::sums::Store;
use crate::host::{Disk, Errno, Host};
use dirty_map::{Extent, ExtentState};
use std::rc::Rc;
use std::time::Duration;

/// How often quiet extents are looked for and positions committed.
pub(super) const TICK: Duration = Duration::from_secs(1);
/// Extents cooled in one batch.
pub(super) const BATCH: usize = 8192;

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// The ticking task.
    pub(super) async fn run_ticks(self: Rc<Self>) {
        loop {
            self.host.sleep(TICK).await;
            self.coarse_now.set(self.host.now());
            self.release_idle_disks();
            self.note_idle();
            let _pass = self.gate.enter().await;
            if self.stopping.get() {
                continue;
            }
            if let Err(errno) = self.tick().await {
                tracing::warn!("cooling is put off: {errno}");
            }
        }
    }

    /// Wakes waiting requests so that they notice stalls.
    pub(super) async fn run_stall_watch(self: Rc<Self>) {
        let step = self.options.deadline / u32::try_from(TICKS_PER_DEADLINE).unwrap_or(1);
        loop {
            self.host.sleep(step).await;
            self.stalls.advance();
        }
    }

    async fn tick(&self) -> Result<(), Errno> {
        if !self.options.write_intent {
            return Ok(());
        }
        let now = self.coarse_now.get();
        if self.maps.borrow().hot.is_unflushed() {
            // Applications that never flush must not make U, and so what a lost member is
            // given again, grow without bound.
            if let Err(errno) = self.flush_inside().await {
                tracing::warn!("the background flush failed: {errno}");
            }
        }
        // The position first: it does not wait for what cools.
        self.commit_position().await?;
        let quiet = {
            let mut maps = self.maps.borrow_mut();
            maps.quiet.tick(now);
            let time = maps.quiet.time();
            maps.hot.coolable(now, time, BATCH)
        };
        let cooled = self.cool(quiet).await;
        self.store_hot().await;
        cooled
    }

    async fn commit_position(&self) -> Result<(), Errno> {
        if self.maps.borrow_mut().queue_log() {
            self.wrote_since_tick.set(true);
        }
        let wrote = self.wrote_since_tick.replace(false);
        if self.wrote_before_tick.replace(wrote) || wrote {
            self.maps.borrow_mut().dirty.insert(Page::POSITION);
            let committed = self.commit().await;
            // One that failed names nothing.
            self.wrote_since_tick
                .set(committed.is_err() || self.wrote_since_tick.get());
            committed?;
        }
        Ok(())
    }

    /// Cools extents that have nothing in flight, unflushed or un-equalised.
    pub(super) async fn cool(&self, extents: Vec<Extent>) -> Result<(), Errno> {
        // One at a time: the missed bits of an extent that one call took must not be left to
        // the commit of another.
        let _turn = self.cooling.enter().await;
        let extents: Vec<Extent> = {
            let maps = self.maps.borrow();
            extents
                .into_iter()
                .filter(|&extent| maps.hot.is_coolable(extent))
                // One that a write is recording as hot, after an attempt that failed (R1).
                .filter(|extent| !maps.preparing.contains(extent))
                .collect()
        };
        if extents.is_empty() {
            return Ok(());
        }
        {
            let mut maps = self.maps.borrow_mut();
            for &extent in &extents {
                maps.hot.remove(extent);
                maps.cooling.insert(extent);
            }
            for &slot in &self.view().absent {
                maps.queue_missed(slot);
            }
            for slot in self.resyncing() {
                maps.queue_missed(slot);
            }
        }
        let ready = self.make_ready_to_cool(&extents).await;
        {
            let mut maps = self.maps.borrow_mut();
            let maps = &mut *maps;
            for extent in extents {
                if !maps.cooling.remove(&extent) {
                    continue;
                }
                if !ready.as_ref().is_ok_and(|left| !left.contains(&extent)) {
                    maps.hot.insert(extent, self.coarse_now.get());
                    continue;
                }
                maps.unrecorded.remove(&extent);
                maps.set_state(extent, ExtentState::Cool);
                maps.sums.end(extent);
                if let Some(cooled) = &mut maps.cooled {
                    cooled.insert(extent);
                }
            }
        }
        ready?;
        self.commit().await
    }

    /// Makes durable what says more than that an extent is hot: an extent that is cool says
    /// nothing about absent members, and its checksums are believed. Returns those that stay hot
    /// because their checksums cannot be stored.
    async fn make_ready_to_cool(&self, extents: &[Extent]) -> Result<Vec<Extent>, Errno> {
        self.commit().await?;
        let mut pages: Vec<Extent> = {
            let maps = self.maps.borrow();
            let wanted = |e: &&Extent| maps.cooling.contains(e) && maps.sums.is_wanted(**e);
            extents.iter().filter(wanted).copied().collect()
        };
        pages.sort_unstable();
        let left = self.store_pages(&pages, Store::ToCool).await;
        // A member that has not taken a page must not start as one that has: the losing task's own
        // commit takes along what is called cool by then.
        self.losses_effective().await?;
        Ok(left)
    }
}
