//! From opened devices to a running mirror.
//!
//! # Order of a start, and why
//!
//! 1. Every candidate's superblock and state map are read; unequal superblock copies are made
//!    equal before anything relies on them.
//! 2. [`assemble`] decides who is in-sync and whether to start at all. A member that the mirror was
//!    handed over to loses that mark (`stop.rs`).
//! 3. The maps are put together: of each sector the newest valid content on any in-sync
//!    member. A sector bad everywhere never reads as *clear*: the start is refused
//!    unless forced, then its extents are hot; its blocks are missed.
//! 4. Hot extents become un-equalised and unflushed, and missed for every slot that is not
//!    in-sync (R12).
//! 5. One commit makes all of that durable, including sectors that differed. It goes by the
//!    sequence of the newest one found: commits of starts that were cut off would make an older
//!    copy look as new as those left out (R16). Then members that were found to be older copies
//!    are marked as such (R15), and a round records the start and the members lost by it. Only
//!    now anything is answered.
//! 6. Background tasks begin; members that can return by delta are joined.

use super::maps::{Maps, Page, pages_of};
use super::member_io::{self, RegionImage, Surveyed, read_pages, read_region, survey};
use super::slots::Return;
use super::stop::take_mark;
use super::sums::{STORED_EVERY, SumIo};
use super::{Candidate, Mirror, PIECE_BYTES, Running, Slot, StartOptions, View};
use crate::assemble::{AssembleOptions, Plan, Refusal, Seen, Verdict, assemble};
use crate::budget::ErrorBudgets;
use crate::control::{ErrorKind, IoCounts};
use crate::host::{Disk, Errno, Host};
use crate::layout::{PAGE_BYTES, RegionKind, SECTORS_PER_PAGE};
use crate::records;
use crate::scrub_log;
use crate::superblock::{LastStop, SlotState, Superblock};
use dirty_map::{Base, Extent, ExtentState, STATES_PER_SECTOR};
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

/// Why a mirror did not start; the message is a sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct StartError {
    kind: ErrorKind,
    message: String,
}

impl StartError {
    fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    /// Class of the failure.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl From<Refusal> for StartError {
    fn from(refusal: Refusal) -> Self {
        let kind = match refusal {
            Refusal::NoMembers => ErrorKind::NotFound,
            _ => ErrorKind::Refused,
        };
        Self::new(kind, refusal.to_string())
    }
}

/// A device that was surveyed.
struct Present<D> {
    path: String,
    disk: Rc<D>,
    surveyed: Surveyed,
}

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// Starts a mirror on the members among `candidates`.
    ///
    /// # Errors
    ///
    /// When starting could serve old or wrong data, or a device fails; a sentence says which.
    pub async fn start(
        host: Rc<H>,
        candidates: Vec<Candidate<D>>,
        options: StartOptions,
    ) -> Result<Rc<Self>, StartError> {
        let mut present = survey_all(&*host, candidates).await?;
        let seen: Vec<_> = present.iter().map(|p| p.surveyed.seen.clone()).collect();
        let plan = assemble(
            &seen,
            AssembleOptions {
                force: options.force,
                promote: options.promote,
            },
        )?;
        let config = &present[plan.newest].surveyed.seen.superblock;
        if config.name != options.name {
            return Err(StartError::new(
                ErrorKind::Usage,
                format!(
                    "these are members of the mirror '{}', not '{}'",
                    config.name, options.name
                ),
            ));
        }
        revoke(&*host, &mut present, &records::to_revoke(&seen, &plan)).await?;
        let config = &present[plan.newest].surveyed.seen.superblock;
        let mirror = Rc::new(Self::new(host, options, config.clone()));
        mirror.attach(&present, &plan);
        mirror.load_maps(&present, &plan).await?;
        mirror.begin(&present, &plan).await?;
        mirror.auto_join(present, plan);
        Ok(mirror)
    }

    fn new(host: Rc<H>, options: StartOptions, mut config: Superblock) -> Self {
        // It is one member's own.
        config.handed_over = false;
        let slots = config.slots.iter().map(|record| Slot {
            // What was failed on purpose, or for its errors, does not come back by itself.
            held_out: record.state == SlotState::Faulty,
            ..Slot::absent(record.address.clone())
        });
        let maps = Maps::new(&config, &options);
        Self {
            slots: RefCell::new(slots.collect()),
            view: RefCell::new(Rc::new(View {
                receivers: Vec::new(),
                absent: Vec::new(),
            })),
            maps: RefCell::new(maps),
            gate: super::Gate::default(),
            locks: super::RangeLocks::default(),
            reads: super::ReadPhases::default(),
            membership: super::Exclusive::default(),
            joining: super::Exclusive::default(),
            cooling: super::Exclusive::default(),
            sums: SumIo::new(&config),
            commits: super::Commits::default(),
            flushes: super::write::Flushes::default(),
            stalls: super::StallWatch::default(),
            probes: super::stall::Probes::default(),
            prepared: super::WaitList::default(),
            ahead: RefCell::default(),
            ahead_wanted: super::WaitList::default(),
            changed: super::WaitList::default(),
            losses_pending: Cell::new(0),
            flush_failed_here: Cell::new(false),
            flush_failures: Cell::new(0),
            flush_unrecorded: Cell::new(false),
            write_blocked: Cell::new(false),
            stopping: Cell::new(false),
            coarse_now: Cell::new(host.now()),
            // The last commit before the start may have been named by none.
            wrote_since_tick: Cell::new(true),
            wrote_before_tick: Cell::new(false),
            counts: RefCell::new(IoCounts::default()),
            budgets: RefCell::new(ErrorBudgets::new(options.error_budget)),
            pacers: RefCell::default(),
            resync: RefCell::new(None),
            last_resync: RefCell::new(None),
            zeroes: host.allocate(PIECE_BYTES),
            data_offset: config.layout.data_offset,
            size_bytes: config.layout.size_bytes,
            logical_block_bytes: config.logical_block_bytes,
            config: RefCell::new(config),
            attempt: RefCell::new(None),
            options,
            host,
        }
    }

    /// Gives the in-sync members their slots.
    fn attach(&self, present: &[Present<D>], plan: &Plan) {
        {
            let mut slots = self.slots.borrow_mut();
            for (member, verdict) in present.iter().zip(&plan.verdicts) {
                let superblock = &member.surveyed.seen.superblock;
                let Some(slot) = slots.get_mut(usize::from(superblock.own_slot)) else {
                    continue;
                };
                let config = self.config.borrow();
                if config.slots[usize::from(superblock.own_slot)].member != Some(superblock.member)
                {
                    // A replaced disk, found beside the one that has its slot now.
                    let why = verdict.refusal().unwrap_or_default();
                    tracing::warn!("{} is left out: {why}", member.path);
                    continue;
                }
                match verdict {
                    Verdict::InSync => {
                        *slot = Slot {
                            running: Running::InSync,
                            disk: Some(member.disk.clone()),
                            position: member.surveyed.seen.position,
                            epoch: superblock.epoch.id,
                            events: superblock.event_count,
                            write_count: superblock.write_count,
                            ..Slot::absent(member.path.clone())
                        };
                    }
                    Verdict::Delta { .. } => {}
                    Verdict::Full { .. } | Verdict::Refused { .. } => {
                        slot.reason = verdict.refusal();
                        slot.path.clone_from(&member.path);
                    }
                }
            }
        }
        self.refresh_view();
    }

    /// Steps 3 and 4 of the module documentation.
    async fn load_maps(&self, present: &[Present<D>], plan: &Plan) -> Result<(), StartError> {
        let in_sync: Vec<&Present<D>> = present
            .iter()
            .zip(&plan.verdicts)
            .filter(|(_, v)| **v == Verdict::InSync)
            .map(|(p, _)| p)
            .collect();
        let seen = || in_sync.iter().map(|p| &p.surveyed.seen);
        let highest = seen().map(|seen| seen.position.sequence);
        // A damaged position page names none.
        let proven = seen().max_by_key(|seen| (seen.effective != 0, seen.position));
        {
            let mut maps = self.maps.borrow_mut();
            // The first commit counts one up; see step 5.
            maps.stamp.sequence = highest.max().map_or(0, |highest| highest.saturating_sub(1));
            // The epoch that this start completes or draws is not effective yet.
            maps.effective = proven.map_or(0, |seen| seen.effective);
            maps.completed = seen().map(|seen| seen.completed).max().unwrap_or(0);
        }
        let states: Vec<&RegionImage> = in_sync.iter().map(|p| &p.surveyed.states).collect();
        self.load_states(&states)?;
        self.load_log(&in_sync).await;
        let lost: Vec<u8> = plan.lost.iter().map(|(slot, _)| *slot).collect();
        let absent = self.view().absent.clone();
        for &slot in absent.iter().filter(|slot| !lost.contains(slot)) {
            self.load_missed(&in_sync, slot).await;
        }
        self.expose_hot(&absent);
        let mut maps = self.maps.borrow_mut();
        for &slot in &absent {
            if lost.contains(&slot) {
                maps.restart_missed(slot);
            }
            maps.queue_missed(slot);
        }
        Ok(())
    }

    /// With no valid copy of a sector anywhere, *unwritten* cannot be told from *written*: the
    /// operator has to accept that these extents show what the disks hold.
    fn load_states(&self, images: &[&RegionImage]) -> Result<(), StartError> {
        let mut maps = self.maps.borrow_mut();
        let extents = u64::from(maps.states.len());
        for index in 0..maps.states.sectors() {
            let merged = newest_sector(images, index);
            match merged.payload.and_then(|payload| payload.try_into().ok()) {
                Some(payload) => maps.states.load_payload(index, payload),
                None if !self.options.force => {
                    return Err(StartError::new(
                        ErrorKind::Refused,
                        format!(
                            "sector {index} of the extent-state map is damaged in every copy on every in-sync member; start with --force to treat its extents as written (what was never written or was discarded there may then show old content)"
                        ),
                    ));
                }
                None => {
                    tracing::error!("map sector {index} is lost; its extents count as written");
                    let first = u64::from(index) * STATES_PER_SECTOR;
                    for extent in first..(first + STATES_PER_SECTOR).min(extents) {
                        let extent = Extent(u32::try_from(extent).unwrap_or(u32::MAX));
                        maps.states.force(extent, ExtentState::Hot);
                    }
                }
            }
            if merged.uneven {
                let page = index / u32::try_from(SECTORS_PER_PAGE).unwrap_or(1);
                maps.dirty.insert(Page {
                    kind: RegionKind::State,
                    slot: 0,
                    index: page,
                });
            }
        }
        Ok(())
    }

    /// Reads what scrubs have done and found. A sector that is damaged everywhere loses what it
    /// held. What it calls damaged gets a second look when it is read: it may have been written anew
    /// shortly before a crash.
    async fn load_log(&self, in_sync: &[&Present<D>]) {
        let config = self.config.borrow().clone();
        let Some(region) = config.layout.find(RegionKind::Scrub, 0) else {
            return;
        };
        let mut images = Vec::new();
        for member in in_sync {
            images.push(read_region(&*self.host, &*member.disk, &config, region).await);
        }
        let images: Vec<&RegionImage> = images.iter().collect();
        let mut maps = self.maps.borrow_mut();
        let maps = &mut *maps;
        for sector in 0..scrub_log::SECTORS {
            let merged = newest_sector(&images, sector);
            if let Some(payload) = merged.payload.and_then(|payload| payload.try_into().ok()) {
                maps.log.load(sector, payload);
            }
            if merged.uneven {
                maps.log.mark_dirty(sector);
            }
        }
        if config.checksums {
            for blocks in maps.log.damaged_runs() {
                maps.damaged.set(blocks);
            }
        }
        maps.queue_log();
    }

    /// Reads the missed map of a slot that was not in-sync already.
    async fn load_missed(&self, in_sync: &[&Present<D>], slot: u8) {
        let layout = self.config.borrow().layout.clone();
        let (Some(summary), Some(missed)) = (
            layout.find(RegionKind::Summary, slot),
            layout.find(RegionKind::Missed, slot),
        ) else {
            return;
        };
        let config = self.config.borrow().clone();
        let mut images = Vec::new();
        for member in in_sync {
            images.push(read_region(&*self.host, &*member.disk, &config, summary).await);
        }
        let images: Vec<&RegionImage> = images.iter().collect();
        self.load_summary(&images, slot);
        let pages: Vec<u32> = self.maps.borrow().missed[usize::from(slot)]
            .summary
            .iter()
            .collect();
        for run in pages.chunk_by(|a, b| a + 1 == *b) {
            for part in run.chunks(PIECE_BYTES / usize::try_from(PAGE_BYTES).unwrap_or(1)) {
                let range = u64::from(part[0])..u64::from(part[0]) + part.len() as u64;
                let mut images = Vec::new();
                for member in in_sync {
                    let image =
                        read_pages(&*self.host, &*member.disk, &config, missed, range.clone());
                    images.push(image.await);
                }
                self.load_missed_pages(&images.iter().collect::<Vec<_>>(), slot, range);
            }
        }
    }

    fn load_summary(&self, images: &[&RegionImage], slot: u8) {
        let mut maps = self.maps.borrow_mut();
        let maps = &mut *maps;
        let summary = &mut maps.missed[usize::from(slot)].summary;
        for index in 0..summary.sectors() {
            let merged = newest_sector(images, index);
            match merged.payload.and_then(|payload| payload.try_into().ok()) {
                Some(payload) => summary.load_payload(index, payload),
                // Every page of its range is looked at, and what is not valid there is missed.
                None => summary.load_payload(index, &[0xff; dirty_map::PAYLOAD_BYTES]),
            }
        }
        for index in 0..pages_of(u64::from(summary.sectors())) {
            maps.dirty.insert(Page {
                kind: RegionKind::Summary,
                slot,
                index,
            });
        }
    }

    fn load_missed_pages(&self, images: &[&RegionImage], slot: u8, pages: Range<u64>) {
        let mut maps = self.maps.borrow_mut();
        let maps = &mut *maps;
        let missed = &mut maps.missed[usize::from(slot)].map;
        for (at, sector) in
            (pages.start * SECTORS_PER_PAGE..pages.end * SECTORS_PER_PAGE).enumerate()
        {
            let sector = u32::try_from(sector).unwrap_or(u32::MAX);
            if sector >= missed.sectors() {
                break;
            }
            let merged = newest_sector(images, u32::try_from(at).unwrap_or(u32::MAX));
            match merged.payload.and_then(|payload| payload.try_into().ok()) {
                Some(payload) => missed.load_payload(sector, payload),
                None => missed.set_sector(sector),
            }
            if merged.uneven {
                let index = sector / u32::try_from(SECTORS_PER_PAGE).unwrap_or(1);
                maps.dirty.insert(Page {
                    kind: RegionKind::Missed,
                    slot,
                    index,
                });
            }
        }
    }

    /// Hot extents may differ between members and may sit in caches, on an only member too; absent
    /// members may lack any of their blocks (R12). After a flush that failed everywhere all of
    /// them are suspect: which of its blocks it covered is not recorded.
    fn expose_hot(&self, absent: &[u8]) {
        let mut maps = self.maps.borrow_mut();
        let suspect = self.config.borrow().flush_failed;
        let now = self.coarse_now.get();
        let mut from = Extent(0);
        while let Some(extent) = maps.states.next_in(ExtentState::Hot, from) {
            maps.hot.insert(extent, now);
            maps.sums.begin(extent, Base::Doubtful, now + STORED_EVERY);
            maps.hot.begin_write(extent, now);
            maps.hot.end_write(extent, extent.blocks(), now);
            maps.hot.set_unequalised_all(extent);
            maps.inherited.set(extent.blocks());
            if suspect {
                maps.suspect.set(extent.blocks());
            }
            for &slot in absent {
                maps.miss(slot, extent.blocks());
            }
            from = Extent(extent.0 + 1);
        }
    }

    /// Steps 5 and 6: durable before anything is answered.
    async fn begin(self: &Rc<Self>, present: &[Present<D>], plan: &Plan) -> Result<(), StartError> {
        self.spawn(Self::run_commits);
        self.spawn(Self::run_stall_watch);
        let failed = |errno: Errno| {
            StartError::new(
                ErrorKind::Failed,
                format!("the start could not be recorded on any in-sync member: {errno}"),
            )
        };
        self.commit().await.map_err(failed)?;
        let seen: Vec<Seen> = present.iter().map(|p| p.surveyed.seen.clone()).collect();
        for (at, superblock) in records::disown(&seen, plan) {
            let Present { path, disk, .. } = &present[at];
            if let Err(errno) = member_io::store_superblock(&*self.host, &**disk, &superblock).await
            {
                tracing::warn!("{path} could not be marked as an older copy: {errno}");
            }
        }
        for (slot, reason) in &plan.lost {
            tracing::warn!("slot {slot} does not start in-sync: {reason}");
            self.slots.borrow_mut()[usize::from(*slot)].reason = Some(reason.clone());
        }
        let round = self.round(|config| {
            config.last_stop = LastStop::Unclean;
            records::start(config, &seen, plan, self.options.force, self.host.random());
            if self.options.force && !plan.lost.is_empty() {
                config.forced_secs = self.host.wall_clock_secs();
                config.forced_reason.clone_from(&self.options.reason);
            }
        });
        round.await.map_err(failed)?;
        {
            // Maps of members that return are overwritten, with newer stamps than they have.
            let stamp = &mut self.maps.borrow_mut().stamp;
            let highest = seen.iter().map(|seen| seen.position.sequence);
            stamp.sequence = highest.fold(stamp.sequence, u64::max);
        }
        self.spawn(Self::run_losses);
        self.spawn(Self::run_ticks);
        self.spawn(Self::run_equalise);
        self.spawn(Self::run_zero_ahead);
        Ok(())
    }

    /// Members that can return by delta, and were not failed on purpose, come back by
    /// themselves, one after the other.
    fn auto_join(self: &Rc<Self>, present: Vec<Present<D>>, plan: Plan) {
        let mut returning = Vec::new();
        for (member, verdict) in present.into_iter().zip(plan.verdicts) {
            let slot = member.surveyed.seen.superblock.own_slot;
            let state = self
                .config
                .borrow()
                .slots
                .get(usize::from(slot))
                .map(|r| r.state);
            let by_itself = !matches!(state, Some(SlotState::Faulty));
            if matches!(verdict, Verdict::Delta { .. }) && by_itself {
                // Nobody else holds the device: it was opened for this start.
                if let Ok(disk) = Rc::try_unwrap(member.disk) {
                    returning.push((member.path, disk));
                }
            }
        }
        self.spawn(|mirror| async move {
            for (path, disk) in returning {
                let resynced = || mirror.resync.borrow().is_none().then_some(());
                mirror.changed.until(resynced).await;
                let back = mirror.bring_back(path.clone(), disk, Return::DELTA, false);
                if let Err(error) = back.await {
                    tracing::warn!("{path} could not return by itself: {error}");
                }
            }
        });
    }
}

/// Surveys all candidates; one that cannot be surveyed counts as absent, unless none can.
async fn survey_all<H: Host, D: Disk<Buffer = H::Buffer>>(
    host: &H,
    candidates: Vec<Candidate<D>>,
) -> Result<Vec<Present<D>>, StartError> {
    let mut present = Vec::new();
    let mut reasons = Vec::new();
    for Candidate { path, disk } in candidates {
        match survey(host, &disk, &path).await {
            Ok(surveyed) => present.push(Present {
                path,
                disk: Rc::new(disk),
                surveyed,
            }),
            Err(error) => {
                tracing::warn!("{path} is left out: {error}");
                reasons.push(format!("{path}: {error}"));
            }
        }
    }
    if present.is_empty() && !reasons.is_empty() {
        return Err(StartError::new(
            ErrorKind::Refused,
            format!("no usable member was given. {}", reasons.join(". ")),
        ));
    }
    Ok(present)
}

/// Takes the mark of having been handed over from those present, durably.
async fn revoke<H: Host, D: Disk<Buffer = H::Buffer>>(
    host: &H,
    present: &mut [Present<D>],
    marked: &[usize],
) -> Result<(), StartError> {
    for &at in marked {
        let Present {
            path,
            disk,
            surveyed,
        } = &mut present[at];
        take_mark(host, &**disk, surveyed).await.map_err(|errno| {
            let message = format!(
                "{path} says that the mirror was handed over to it, and cannot be told otherwise ({errno}); detach it, and start with --force if it is lost for good"
            );
            StartError::new(ErrorKind::Failed, message)
        })?;
    }
    Ok(())
}

/// The newest content of a sector over several members.
struct Merged<'a> {
    payload: Option<&'a [u8]>,
    /// Whether a copy anywhere is damaged or older.
    uneven: bool,
}

fn newest_sector<'a>(images: &[&'a RegionImage], index: u32) -> Merged<'a> {
    let index = usize::try_from(index).unwrap_or(usize::MAX);
    let contents = images
        .iter()
        .map(|image| image.sectors.get(index).and_then(Option::as_ref));
    let newest = contents.clone().flatten().max_by_key(|(stamp, _)| *stamp);
    let uneven = images
        .iter()
        .any(|image| image.uneven.get(index) != Some(&false))
        || contents.clone().any(|content| content != newest);
    Merged {
        payload: newest.map(|(_, payload)| payload.as_slice()),
        uneven,
    }
}
