//! Bringing a former member back, or a new disk in.
//!
//! # Order of a join, and why
//!
//! 1. The decision (R16): delta, full, or refused, with its reason.
//! 2. The missed map takes what the member may lack on its own account: its own hot extents
//!    for a delta (R12), everything written for a full resync. Durable on all in-sync members
//!    before one byte is written to the member, because step 4 overwrites the member's maps,
//!    which are the only other record of it.
//! 3. The gate closes and drains, so that the set of receiving members changes between
//!    requests (R1).
//! 4. A loss that was not recorded block-exactly is, by a round: with step 2 durable it is
//!    known exactly. A former member that gets a full resync is marked so in its superblock.
//!    Then the member gets the checksums of extents that its own map calls hot, which may have
//!    cooled without it, and a flush: its map is the only record of which these are. (Most of them
//!    before step 3, and here those that have cooled since.) Then it gets every map as the in-sync
//!    members have it, and a flush.
//! 5. A round with a new epoch: in-sync members first, then the member, whose superblock now
//!    says *resyncing*. The slot's base becomes the position of step 4: an older image of this
//!    member would need bits that are cleared from now on.
//! 6. The member receives; the gate opens; missed blocks are copied.
//!
//! A member that went on by itself, and gives its changes up, lacks those as well (step 2,
//! `split.rs`). It is marked like one that gets a full resync: once step 4 has overwritten its
//! maps, nothing there says what it has changed.
//!
//! A crash before 5 leaves a member that is still lost, with nothing cleared. A crash inside 5
//! leaves a member one epoch back whose position is the base: it returns by delta.

use super::maps::{Page, page_offset, pages_of};
use super::member_io::{self, MemberError, own_hot_extents, survey};
use super::slots::{Return, refuse};
use super::stop::take_mark;
use super::{Mirror, PIECE_BYTES, Running, Slot, length};
use crate::assemble::Seen;
use crate::control::{ErrorKind, ResyncKind, ResyncStatus};
use crate::create::{blank_maps, hint, random_uuid};
use crate::host::{Disk, Errno, Host};
use crate::layout::{PAGE_BYTES, RegionKind, SCRUB_PAGES};
use crate::records;
use crate::superblock::{Superblock, SuperblockError};
use crate::{ControlError, create};
use dirty_map::{Extent, Stamp};
use std::collections::BTreeSet;
use std::rc::Rc;
use uuid::Uuid;

/// So many extents may have cooled while their checksums were copied: these are copied again with
/// the gate closed.
const COOLED_FEW: usize = 32;
/// How often more than those are copied again with the gate open.
const COOLED_TRIES: usize = 8;

/// A device about to join.
struct Joiner<D> {
    slot: u8,
    path: String,
    disk: Rc<D>,
    member: Uuid,
    /// What is on it, if it was a member.
    was: Option<Seen>,
    kind: ResyncKind,
    reason: String,
    /// Extents that join its missed map (R12).
    own_hot: Vec<Extent>,
    /// It went on by itself, and gives its changes up.
    parted: bool,
    /// Extents of which its checksums may be old though it lacks no block of them, in order.
    old_sums: Vec<Extent>,
}

impl<D> Joiner<D> {
    /// It was never a member of this mirror.
    fn is_new(&self) -> bool {
        self.was.is_none()
    }

    /// Whether a former member's maps are of no use once they are overwritten.
    fn is_marked(&self) -> bool {
        self.kind == ResyncKind::Full || self.parted
    }

    /// The update counter that its superblock has before the round.
    fn write_count(&self) -> u64 {
        let marked = u64::from(self.is_marked());
        self.was
            .as_ref()
            .map_or(0, |was| was.superblock.write_count + marked)
    }
}

fn failed(message: String) -> ControlError {
    ControlError::new(ErrorKind::Failed, message)
}

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// Brings a former member back, by delta where that is safe.
    ///
    /// # Errors
    ///
    /// When the device is no former member, must not be used, or fails.
    pub async fn re_add(
        self: &Rc<Self>,
        path: String,
        disk: D,
        how: Return,
    ) -> Result<String, ControlError> {
        self.bring_back(path, disk, how, true).await
    }

    /// Brings a former member back by delta, not because the operator says so.
    ///
    /// # Errors
    ///
    /// As [`Mirror::re_add`]; and when the operator has taken it out.
    pub async fn return_by_itself(
        self: &Rc<Self>,
        path: String,
        disk: D,
    ) -> Result<String, ControlError> {
        self.bring_back(path, disk, Return::DELTA, false).await
    }

    /// [`Mirror::re_add`], for the operator or by itself. Only the operator undoes what the
    /// operator has done: a member that was taken out meanwhile stays out.
    pub(super) async fn bring_back(
        self: &Rc<Self>,
        path: String,
        disk: D,
        how: Return,
        by_operator: bool,
    ) -> Result<String, ControlError> {
        let _joining = self.joining.enter().await;
        if self.stopping.get() {
            return Err(failed("the mirror is stopping".to_owned()));
        }
        self.owes_nothing(&path)?;
        let mut surveyed = survey(&*self.host, &disk, &path).await.map_err(|error| match error {
            MemberError::Superblock(SuperblockError::NotAMember) => refuse(format!(
                "{path} holds no superblock of this mirror; use `mirrorctl add` to bring it in as a new disk"
            )),
            error => failed(format!("{path} cannot be re-added: {error}")),
        })?;
        let (slot, member) = {
            let superblock = &surveyed.seen.superblock;
            (superblock.own_slot, superblock.member)
        };
        let decision = self.decide_return(&surveyed, how)?;
        let old_sums = match decision.kind {
            ResyncKind::Delta => own_hot_extents(&surveyed.states, self.maps.borrow().states.len()),
            // It gets all of them with their blocks.
            ResyncKind::Full => Vec::new(),
        };
        self.may_join(slot, &path)?;
        if how.dry_run {
            return Ok(format!(
                "{path} would come back by {} resync: {}",
                decision.kind.word(),
                decision.reason
            ));
        }
        if by_operator {
            self.slots.borrow_mut()[usize::from(slot)].held_out = false;
        }
        if surveyed.seen.superblock.handed_over {
            take_mark(&*self.host, &disk, &mut surveyed)
                .await
                .map_err(|errno| {
                    failed(format!(
                        "{path} says that the mirror was handed over to it, and cannot be told otherwise ({errno}); see to the disk, and re-add it again"
                    ))
                })?;
        }
        if let Some(slots) = &decision.parted {
            let superblock = &surveyed.seen.superblock;
            self.miss_what_it_changed(&disk, superblock, slots).await;
        }
        let disk = Rc::new(disk);
        self.join(Joiner {
            slot,
            path,
            disk,
            member,
            was: Some(surveyed.seen),
            kind: decision.kind,
            reason: decision.reason,
            own_hot: decision.own_hot,
            parted: decision.parted.is_some(),
            old_sums,
        })
        .await
    }

    /// Brings a new disk into an empty slot, or into the slot of a member that is gone. What it
    /// holds is overwritten.
    ///
    /// # Errors
    ///
    /// When there is no free slot, the device does not fit, or it fails.
    pub async fn add(
        self: &Rc<Self>,
        path: String,
        disk: D,
        force: bool,
        dry_run: bool,
    ) -> Result<String, ControlError> {
        self.owes_nothing(&path)?;
        let geometry = disk.geometry();
        let need = self.config.borrow().layout.member_bytes();
        if geometry.size_bytes < need {
            return Err(refuse(format!(
                "{path} has {} bytes, but this mirror needs {need}; use a larger device",
                geometry.size_bytes
            )));
        }
        if geometry.logical_block_bytes > self.logical_block_bytes {
            return Err(refuse(format!(
                "{path} has blocks of {} bytes, the mirror of {}; use a device with smaller blocks",
                geometry.logical_block_bytes, self.logical_block_bytes
            )));
        }
        let held = member_io::load_superblock(&*self.host, &disk).await;
        if let (Ok(old), false) = (&held, force) {
            return Err(refuse(format!(
                "{path} is a member of the mirror '{}'; re-add it there, or use --force to overwrite it",
                old.name
            )));
        }
        let _joining = self.joining.enter().await;
        let slot = self.free_slot().ok_or_else(|| {
            refuse("every slot has a member in service; fail and remove one first".to_owned())
        })?;
        self.may_join(slot, &path)?;
        if dry_run {
            return Ok(format!(
                "{path} would take slot {slot} by full resync of the written extents"
            ));
        }
        let joiner = Joiner {
            slot,
            path,
            disk: Rc::new(disk),
            member: random_uuid(self.host.random()),
            was: None,
            kind: ResyncKind::Full,
            reason: "it is a new disk".to_owned(),
            own_hot: Vec::new(),
            parted: false,
            old_sums: Vec::new(),
        };
        self.join(joiner).await
    }

    /// Steps 2 to 6 of the module documentation.
    async fn join(self: &Rc<Self>, joiner: Joiner<D>) -> Result<String, ControlError> {
        let slot = joiner.slot;
        {
            if joiner.kind == ResyncKind::Full {
                self.miss_all_written(slot);
            }
            let mut maps = self.maps.borrow_mut();
            for extent in &joiner.own_hot {
                if maps.is_written(*extent) {
                    maps.miss(slot, extent.blocks());
                }
            }
            maps.restart_missed(slot);
            maps.queue_missed(slot);
        }
        self.commit().await.map_err(|errno| {
            failed(format!(
                "the missed map could not be recorded on the in-sync members: {errno}"
            ))
        })?;
        self.maps.borrow_mut().cooled = Some(BTreeSet::new());
        let joined = self.join_prepared(&joiner).await;
        self.maps.borrow_mut().cooled = None;
        joined?;
        Ok(self.begin_resync(joiner).await)
    }

    /// Steps 3 to 5.
    async fn join_prepared(&self, joiner: &Joiner<D>) -> Result<(), ControlError> {
        self.bring_sums(joiner, &joiner.old_sums).await?;
        for _ in 0..COOLED_TRIES {
            let cooled = self.cooled_of(joiner);
            if cooled.len() <= COOLED_FEW {
                self.maps
                    .borrow_mut()
                    .cooled
                    .get_or_insert_default()
                    .extend(cooled);
                break;
            }
            self.bring_sums(joiner, &cooled).await?;
        }
        let _closed = self.gate.close().await;
        let _turn = self.membership.enter().await;
        if self.stopping.get() {
            return Err(failed("the mirror is stopping".to_owned()));
        }
        if !joiner.is_new() && self.slots.borrow()[usize::from(joiner.slot)].held_out {
            return Err(refuse(format!(
                "{} has been taken out meanwhile",
                joiner.path
            )));
        }
        let base = self.prepare_joiner(joiner).await?;
        self.join_round(joiner, base).await
    }

    /// Step 6; says what has come of the join.
    async fn begin_resync(self: &Rc<Self>, joiner: Joiner<D>) -> String {
        let slot = joiner.slot;
        let message = if joiner.is_new() {
            let path = &joiner.path;
            format!("{path} (slot {slot}) joined as a new disk and is resyncing (full)")
        } else {
            format!(
                "{} (slot {slot}) is back and resyncing ({}): {}",
                joiner.path,
                joiner.kind.word(),
                joiner.reason
            )
        };
        tracing::info!("{message}");
        *self.resync.borrow_mut() = Some(ResyncStatus {
            slot,
            kind: joiner.kind,
            reason: joiner.reason,
            finished: false,
            copied_bytes: 0,
            zeroed_bytes: 0,
            remaining_bytes: 0,
            elapsed_ms: 0,
            stalled: None,
        });
        self.spawn(|mirror| mirror.run_resync(slot));
        // The same position on all receiving members again, the joiner's own one included.
        self.maps.borrow_mut().dirty.insert(Page::POSITION);
        if let Err(errno) = self.commit_now().await {
            tracing::warn!("the map commit after a join failed: {errno}");
        }
        message
    }

    /// Extents whose checksums the joiner has got and that have cooled since this was asked last.
    fn cooled_of(&self, joiner: &Joiner<D>) -> Vec<Extent> {
        let cooled = self.maps.borrow_mut().cooled.replace(BTreeSet::new());
        let known = |e: &Extent| joiner.old_sums.binary_search(e).is_ok();
        cooled
            .unwrap_or_default()
            .into_iter()
            .filter(known)
            .collect()
    }

    /// Copies checksums to the joiner, durably.
    async fn bring_sums(&self, joiner: &Joiner<D>, extents: &[Extent]) -> Result<(), ControlError> {
        let extents: Vec<Extent> = {
            let maps = self.maps.borrow();
            let written = extents.iter().copied().filter(|&e| maps.is_written(e));
            written.collect()
        };
        let brought = match self.copy_pages(&extents, &joiner.disk).await {
            Ok(()) if !extents.is_empty() => member_io::flush(&*self.host, &*joiner.disk).await,
            brought => brought,
        };
        brought.map_err(|errno| {
            failed(format!(
                "{} failed while its checksums were written: {errno}",
                joiner.path
            ))
        })
    }

    /// Step 4; returns the position that the member has then.
    async fn prepare_joiner(&self, joiner: &Joiner<D>) -> Result<Stamp, ControlError> {
        self.make_exact(joiner).await.map_err(|errno| {
            failed(format!(
                "what the member lacks could not be recorded on the in-sync members: {errno}"
            ))
        })?;
        let cooled = self.cooled_of(joiner);
        self.bring_sums(joiner, &cooled).await?;
        self.write_maps_to(joiner).await.map_err(|errno| {
            failed(format!(
                "{} failed while its maps were written: {errno}",
                joiner.path
            ))
        })
    }

    /// With its own hot extents durable in its missed map (step 2), that map says exactly what
    /// a former member lacks.
    async fn make_exact(&self, joiner: &Joiner<D>) -> Result<(), Errno> {
        // One that is marked does not come back by delta after a crash in the middle.
        let Some(was) = joiner.was.as_ref().filter(|_| !joiner.is_marked()) else {
            return Ok(());
        };
        self.round_inside(|config| records::exact(config, joiner.slot, was.position))
            .await
    }

    /// The round that makes the joiner a receiving member.
    async fn join_round(&self, joiner: &Joiner<D>, base: Stamp) -> Result<(), ControlError> {
        let slot = joiner.slot;
        {
            // It receives from here on; with the gate closed nothing but the round goes to it.
            self.ahead.borrow_mut().forget(slot);
            let mut slots = self.slots.borrow_mut();
            slots[usize::from(slot)] = Slot {
                running: Running::Resyncing,
                disk: Some(joiner.disk.clone()),
                position: base,
                write_count: joiner.write_count(),
                epoch: joiner.was.as_ref().map_or(0, |was| was.superblock.epoch.id),
                ..Slot::absent(joiner.path.clone())
            };
        }
        self.refresh_view();
        let join = records::Join {
            slot,
            member: joiner.member,
            address: hint(&joiner.path),
            new: joiner.is_new(),
            full: joiner.kind == ResyncKind::Full,
            parted: joiner.parted,
            base,
        };
        let round = self.round_inside(|config| {
            records::join(config, &join, self.host.random());
        });
        let failure = match round.await {
            Err(errno) => Some(format!("the join could not be recorded: {errno}")),
            Ok(()) if self.slots.borrow()[usize::from(slot)].running != Running::Resyncing => {
                Some(format!("{} failed while it joined", joiner.path))
            }
            Ok(()) => None,
        };
        let Some(message) = failure else {
            return Ok(());
        };
        if self.slots.borrow()[usize::from(slot)].running == Running::Resyncing {
            self.slots.borrow_mut()[usize::from(slot)].running = Running::Absent;
            self.refresh_view();
        }
        Err(failed(message))
    }

    /// Writes every map to the joiner as the in-sync members have it, and returns the position
    /// that the joiner has then.
    async fn write_maps_to(&self, joiner: &Joiner<D>) -> Result<Stamp, Errno> {
        let stamp = {
            let mut maps = self.maps.borrow_mut();
            maps.stamp.sequence += 1;
            maps.stamp
        };
        let config = self.config.borrow().clone();
        if joiner.is_marked() {
            self.mark_full(joiner).await?;
        }
        if joiner.is_new() {
            let config = Superblock {
                member: joiner.member,
                ..config.clone()
            };
            // Not a member of anything while its maps change: an old superblock must not
            // outlive the maps that belong to it.
            for (offset, len) in create::wipe_ranges() {
                let zeroes = vec![0; length(len)];
                member_io::write_bytes(&*self.host, &*joiner.disk, offset, &zeroes).await?;
            }
            member_io::flush(&*self.host, &*joiner.disk).await?;
            for (offset, bytes) in blank_maps(&config) {
                member_io::write_bytes(&*self.host, &*joiner.disk, offset, &bytes).await?;
            }
        }
        let marked = joiner.is_marked();
        // With the gate closed nobody waits longer for it than for any member.
        let limit = self.options.deadline.min(member_io::PATIENCE);
        for run in self
            .pages_of_all_maps(joiner.slot)
            .chunk_by(|a, b| (a.kind, a.slot, a.index + 1) == (b.kind, b.slot, b.index))
        {
            for pages in run.chunks(PIECE_BYTES / length(PAGE_BYTES)) {
                let page = pages[0];
                let Some(region) = config.layout.find(page.kind, page.slot) else {
                    continue;
                };
                let mut images = vec![0; pages.len() * length(PAGE_BYTES)];
                for (page, image) in pages.iter().zip(images.chunks_mut(length(PAGE_BYTES))) {
                    self.maps.borrow().encode_page(*page, stamp, image);
                }
                for copy in [region.copy_a, region.copy_b] {
                    let offset = copy + page_offset(page.index);
                    let written =
                        member_io::write_within(&*self.host, &*joiner.disk, offset, &images, limit);
                    written.await?;
                }
                if marked && page == Page::POSITION {
                    // It names our epoch: from here on nobody takes its maps for its own.
                    member_io::flush_within(&*self.host, &*joiner.disk, limit).await?;
                }
            }
        }
        member_io::flush_within(&*self.host, &*joiner.disk, limit).await?;
        Ok(stamp)
    }

    /// Makes the former member's own superblock say that a full resync has begun. What its maps
    /// say of how far it has come is about to be overwritten, and was wrong or too old: without
    /// this a crash here could let it return by delta.
    async fn mark_full(&self, joiner: &Joiner<D>) -> Result<(), Errno> {
        let Some(was) = &joiner.was else {
            return Ok(());
        };
        let mut own = was.superblock.clone();
        own.write_count = joiner.write_count();
        own.slots[usize::from(own.own_slot)].full = true;
        own.server_instance = joiner.disk.geometry().server_instance;
        member_io::store_superblock(&*self.host, &*joiner.disk, &own).await
    }

    /// Every page that says something: position, states, summaries, and the missed pages that
    /// count. What a member itself lacks is the others' to know, so `except` is left out.
    fn pages_of_all_maps(&self, except: u8) -> Vec<Page> {
        let maps = self.maps.borrow();
        let page = |kind, slot, index| Page { kind, slot, index };
        let mut pages = vec![Page::POSITION];
        let states = pages_of(u64::from(maps.states.sectors()));
        pages.extend((0..states).map(|index| page(RegionKind::State, 0, index)));
        let log = (0..SCRUB_PAGES).map_while(|index| u32::try_from(index).ok());
        pages.extend(log.map(|index| page(RegionKind::Scrub, 0, index)));
        for (slot, missed) in (0..).zip(&maps.missed).filter(|(slot, _)| *slot != except) {
            let summaries = pages_of(u64::from(missed.summary.sectors()));
            pages.extend((0..summaries).map(|index| page(RegionKind::Summary, slot, index)));
            pages.extend(
                missed
                    .summary
                    .iter()
                    .map(|index| page(RegionKind::Missed, slot, index)),
            );
        }
        pages
    }
}

impl ResyncKind {
    /// As people say it.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Delta => "delta",
            Self::Full => "full",
        }
    }
}
