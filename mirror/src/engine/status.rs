//! The status document.

use super::{HOT_BUDGET_DEFAULT, Mirror, Running};
use crate::control::{ExtentCounts, MemberState, MemberStatus, MirrorState, Status};
use crate::host::{Disk, Host};
use crate::superblock::SlotState;
use dirty_map::{BLOCK_BYTES, ExtentState};

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// The state of the mirror; `device` and `daemon_pid` are the daemon's to fill in.
    pub fn status(&self) -> Status {
        let config = self.config.borrow();
        let members = self.member_statuses();
        let is = |state| members.iter().any(|m| m.state == state);
        let state = if self.write_blocked.get() {
            MirrorState::WriteBlocked
        } else if is(MemberState::Resyncing) {
            MirrorState::Resyncing
        } else if members.iter().all(|m| m.state == MemberState::InSync) {
            MirrorState::InSync
        } else {
            MirrorState::Degraded
        };
        let resync = self.resync.borrow().clone().map(|mut status| {
            let missed = self.maps.borrow().missed[usize::from(status.slot)]
                .map
                .count();
            status.remaining_bytes = missed * BLOCK_BYTES;
            status
        });
        Status {
            name: config.name.clone(),
            uuid: config.mirror.to_string(),
            state,
            size_bytes: self.size_bytes,
            logical_block_bytes: self.logical_block_bytes,
            device: None,
            daemon_pid: 0,
            event_count: config.event_count,
            epoch: format!("{:032x}", config.epoch.id),
            write_intent: self.options.write_intent,
            flush_error: config.flush_failed,
            members,
            extents: self.extent_counts(),
            resync,
            last_resync: self.last_resync.borrow().clone(),
            scrub: None,
            io: *self.counts.borrow(),
        }
    }

    /// Whether the extent at `offset` reads as zeroes whatever its disks hold; members need not
    /// agree there.
    ///
    /// # Panics
    ///
    /// When `offset` lies beyond the device.
    pub fn reads_as_zeroes(&self, offset: u64) -> bool {
        let extent = dirty_map::Block(offset / BLOCK_BYTES).extent();
        !self.maps.borrow().is_written(extent)
    }

    fn extent_counts(&self) -> ExtentCounts {
        let maps = self.maps.borrow();
        let count = |state| u64::from(maps.states.count(state));
        ExtentCounts {
            unwritten: count(ExtentState::Unwritten),
            cool: count(ExtentState::Cool),
            hot: count(ExtentState::Hot),
            discarded: count(ExtentState::Discarded),
            hot_budget: u64::from(self.options.hot_budget.unwrap_or(HOT_BUDGET_DEFAULT)),
            unequalised_blocks: maps.hot.unequalised_blocks(),
        }
    }

    fn member_statuses(&self) -> Vec<MemberStatus> {
        let config = self.config.borrow();
        let slots = self.slots.borrow();
        let maps = self.maps.borrow();
        let all = (0..).zip(slots.iter().zip(&config.slots)).zip(&maps.missed);
        all.map(|((slot, (state, record)), missed)| {
            let recorded = match record.state {
                SlotState::Faulty => MemberState::Faulty,
                SlotState::Stale => MemberState::Stale,
                SlotState::Empty | SlotState::Missing => MemberState::Missing,
                SlotState::InSync | SlotState::Resyncing => MemberState::Stale,
            };
            MemberStatus {
                slot,
                path: state.path.clone(),
                uuid: record.member.map(|uuid| uuid.to_string()),
                state: match state.running {
                    Running::InSync => MemberState::InSync,
                    Running::Resyncing => MemberState::Resyncing,
                    Running::Losing { .. } => MemberState::Faulty,
                    Running::Absent => recorded,
                },
                reason: state.reason.clone(),
                missed_bytes: missed.map.count() * BLOCK_BYTES,
                attached: state.disk.is_some(),
                orphans: match (&state.running, &state.disk) {
                    (Running::Absent, Some(disk)) => disk.in_flight() as u64,
                    _ => 0,
                },
                read_errors: state.read_errors,
                repaired_blocks: state.repaired_blocks,
                unfenced: false,
                scrub_reads_all: false,
            }
        })
        .collect()
    }
}
