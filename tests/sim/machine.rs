//! A mirror on simulated disks, with the steps that tests put together.

use crate::client::Client;
use crate::invariants::Rules;
use crate::oracle::{Caches, Oracle, Version};
use crate::peer_host::PeerHost;
use crate::rot::Rotten;
use mirror::budget::ErrorBudget;
use mirror::control::{MemberRef, MemberState};
use mirror::create::{CreateRequest, NewMember, plan};
use mirror::engine::{HOT_CAP_BYTES, Return};
use mirror::pace::Limits;
use mirror::sim::net::Side;
use mirror::sim::{Group, SimDisk, SimHost, World};
use mirror::superblock::{COPY_A_OFFSET, COPY_B_OFFSET, COPY_BYTES, Superblock};
use mirror::{Candidate, Disk as _, Mirror, StartError, StartOptions};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

pub(crate) type SimMirror = Mirror<SimHost, SimDisk>;

/// Garbage that a disk held before it became a member.
pub(crate) const GARBAGE: u8 = 0xa7;

/// The superblock that a disk holds now.
pub(crate) fn superblock_on(disk: &SimDisk) -> Option<Superblock> {
    let mut copies = [[0; COPY_BYTES], [0; COPY_BYTES]];
    disk.read_now(COPY_A_OFFSET, &mut copies[0]);
    disk.read_now(COPY_B_OFFSET, &mut copies[1]);
    let loaded = Superblock::load(&copies[0], &copies[1]);
    loaded.ok().map(|loaded| loaded.superblock)
}

/// Disks, the machine that runs the daemon, and what readers may see.
pub(crate) struct Machine {
    pub(crate) world: Rc<World>,
    pub(crate) disks: Vec<SimDisk>,
    pub(crate) oracle: Rc<RefCell<Oracle>>,
    pub(crate) mirror: Option<Rc<SimMirror>>,
    /// Watches the disks while the mirror runs.
    pub(crate) rules: Option<Rc<Rules>>,
    next_version: Rc<Cell<Version>>,
    pub(crate) data_offset: u64,
    /// Memory for hot extents; of every fourth seed so little that they have to make room.
    hot_memory_bytes: usize,
    /// Whether reads are checked against checksums.
    check_reads: bool,
    pub(crate) resync_limits: Limits,
    pub(crate) error_budget: ErrorBudget,
    /// Whether a silent change of a copy is told, where there is a checksum.
    tells_rot: bool,
    /// Copies that have changed behind the mirror's back.
    pub(crate) rotten: Rc<Rotten>,
    /// The machine behind the network that has one of the disks.
    pub(crate) peer: Option<Rc<PeerHost>>,
}

/// When the engine gives an operation up.
pub(crate) const DEADLINE: Duration = Duration::from_secs(5);

pub(crate) fn path(slot: usize) -> String {
    format!("disk{slot}")
}

impl Machine {
    /// A new mirror of `members` disks, not started.
    pub(crate) fn new(seed: u64, members: usize, size_bytes: u64) -> Self {
        Self::made(seed, members, size_bytes, seed % 8 != 5)
    }

    /// Reads of applications are not checked.
    pub(crate) fn without_read_checks(&mut self) {
        self.check_reads = false;
    }

    /// A new mirror that keeps checksums, checks reads against them, and has memory for that.
    pub(crate) fn with_checksums(seed: u64, members: usize, size_bytes: u64) -> Self {
        let mut machine = Self::made(seed, members, size_bytes, true);
        machine.hot_memory_bytes = HOT_CAP_BYTES;
        machine.check_reads = true;
        machine
    }

    fn made(seed: u64, members: usize, size_bytes: u64, checksums: bool) -> Self {
        let world = World::new(seed);
        let request = CreateRequest {
            name: "m".into(),
            members: (0..members)
                .map(|slot| NewMember {
                    path: path(slot),
                    size_bytes: (1 << 30) + 2 * size_bytes,
                    logical_block_bytes: 512,
                    zeroed: false,
                })
                .collect(),
            size_bytes: Some(size_bytes),
            logical_block_bytes: None,
            checksums,
            random: (0..20).map(|i| u128::from(seed) << 64 | (i + 1)).collect(),
            now_secs: 0,
        };
        let plan = plan(&request).unwrap();
        let disks: Vec<SimDisk> = (0..members)
            .map(|_| SimDisk::new(plan.member_bytes + (16 << 20), GARBAGE))
            .collect();
        for (disk, member) in disks.iter().zip(&plan.members) {
            for (offset, bytes) in member.maps.iter().chain(&member.superblocks) {
                disk.write_now(*offset, bytes);
            }
        }
        let machine = Self {
            world,
            disks,
            oracle: Rc::default(),
            mirror: None,
            rules: None,
            next_version: Rc::new(Cell::new(1)),
            data_offset: plan.data_offset,
            hot_memory_bytes: if seed % 4 == 3 { 1400 } else { HOT_CAP_BYTES },
            check_reads: seed % 16 != 6,
            resync_limits: Limits::RESYNC,
            error_budget: ErrorBudget::Unlimited,
            tells_rot: checksums && seed % 16 != 6 && seed % 4 != 3,
            rotten: Rc::default(),
            peer: None,
        };
        machine.connect();
        machine
    }

    /// From now on this slot's disk is in another machine, to which there are so many ways. That
    /// machine goes on when this one has ended.
    pub(crate) fn put_behind_network(&mut self, slot: usize, paths: usize) -> Rc<PeerHost> {
        let peer = PeerHost::new(&self.world, &self.disks[slot], paths);
        self.peer = Some(peer.clone());
        peer
    }

    /// The machine that has this disk, if it is another one.
    pub(crate) fn peer_of(&self, disk: &SimDisk) -> Option<Rc<PeerHost>> {
        self.peer.clone().filter(|peer| peer.has(disk))
    }

    pub(crate) fn options(&self, force: bool) -> StartOptions {
        StartOptions {
            name: "m".into(),
            force,
            reason: String::new(),
            promote: false,
            write_intent: true,
            deadline: DEADLINE,
            hot_budget: None,
            hot_memory_bytes: self.hot_memory_bytes,
            check_reads: self.check_reads,
            sum_cache_bytes: 10_000,
            resync_limits: self.resync_limits,
            error_budget: self.error_budget,
        }
    }

    /// This machine and `disks` in another course of events, for a crash: nobody runs there.
    pub(crate) fn fork(&self, disks: Vec<SimDisk>, seed: u64) -> Self {
        let fork = Self {
            world: World::new(seed),
            disks: disks.iter().map(SimDisk::fork).collect(),
            oracle: Rc::new(RefCell::new(self.oracle.borrow().clone())),
            mirror: None,
            rules: None,
            next_version: Rc::new(Cell::new(self.next_version.get())),
            data_offset: self.data_offset,
            hot_memory_bytes: self.hot_memory_bytes,
            check_reads: self.check_reads,
            tells_rot: self.tells_rot,
            resync_limits: self.resync_limits,
            error_budget: self.error_budget,
            rotten: self.rotten.clone(),
            peer: None,
        };
        fork.disks
            .iter()
            .for_each(|disk| disk.set_faults(mirror::sim::Faults::default()));
        fork
    }

    /// After a crash: of the disks beyond the first `slots`, those that the mirror knows take
    /// their slots, and all are opened anew, without faults.
    pub(crate) fn settle_slots(&mut self, slots: usize) {
        let newer: Vec<SimDisk> = self.disks.drain(slots..).collect();
        for newer in newer {
            if let Some(slot) = self.slot_of(&newer) {
                self.disks[slot] = newer;
            }
        }
        for disk in &mut self.disks {
            disk.heal_all();
            *disk = disk.reopen();
        }
        self.peer.iter().for_each(|peer| peer.heal());
    }

    fn connect(&self) {
        for disk in &self.disks {
            self.world.connect(disk);
        }
    }

    /// Starts the mirror on the disks in `slots`.
    pub(crate) fn start_on(&mut self, slots: &[usize], force: bool) -> Result<(), StartError> {
        let candidates = self.candidates(slots);
        let here = |slot: &&usize| candidates.iter().any(|it| it.path == path(**slot));
        let here = slots.iter().filter(here);
        let disks: Vec<SimDisk> = here.map(|&slot| self.disks[slot].reopen()).collect();
        self.end_rules();
        self.rules = Rules::watching(&disks, self.rotten.clone());
        let host = Rc::new(SimHost(self.world.clone()));
        let start = SimMirror::start(host, candidates, self.options(force));
        let mirror = self.world.block_on(start)?;
        Rules::r12_hot_means_missed(&mirror.status());
        if !force {
            Rules::r15_no_start_on_what_may_be_old(&disks);
        }
        self.mirror = Some(mirror);
        Ok(())
    }

    pub(crate) fn start(&mut self) {
        let all: Vec<usize> = (0..self.disks.len()).collect();
        self.start_on(&all, false).unwrap();
    }

    /// Operations that the disks have completed.
    pub(crate) fn operations(&self) -> u64 {
        self.disks.iter().map(SimDisk::operations).sum()
    }

    /// Starts on all disks and crashes after `operations` of the start; true when the start
    /// ended before.
    pub(crate) fn start_cut_short(&mut self, operations: u64) -> bool {
        let all: Vec<usize> = (0..self.disks.len()).collect();
        let begun = self.operations();
        self.start_on_until(&all, false, |machine| {
            machine.operations() - begun >= operations
        })
    }

    /// Starts on some of the disks and goes no further when `cut` says so.
    pub(crate) fn start_on_until(
        &self,
        slots: &[usize],
        force: bool,
        cut: impl Fn(&Self) -> bool,
    ) -> bool {
        let candidates = self.candidates(slots);
        let host = Rc::new(SimHost(self.world.clone()));
        let ended = Rc::new(Cell::new(false));
        let (end, options) = (ended.clone(), self.options(force));
        self.world.spawn_task(async move {
            drop(SimMirror::start(host, candidates, options).await);
            end.set(true);
        });
        self.world.run(1_000_000, || ended.get() || cut(self));
        ended.get()
    }

    pub(crate) fn candidates(&self, slots: &[usize]) -> Vec<Candidate<SimDisk>> {
        let candidate = |&slot: &usize| {
            let disk = self.disks[slot].clone();
            let disk = match self.peer_of(&disk) {
                Some(peer) => self
                    .world
                    .block_on(async move { peer.open_at_start().await })?,
                None => disk,
            };
            let path = path(slot);
            Some(Candidate { path, disk })
        };
        slots.iter().filter_map(candidate).collect()
    }

    pub(crate) fn mirror(&self) -> Rc<SimMirror> {
        self.mirror.clone().unwrap()
    }

    /// A clean stop, which promises what a flush promises; the daemon ends.
    pub(crate) fn stop(&mut self) -> Result<(), mirror::ControlError> {
        let mirror = self.mirror.take().unwrap();
        let begun = self.oracle.borrow_mut().begin_flush();
        let peer = self.peer.clone();
        let result = self.world.block_on(async move {
            let stopped = mirror.stop().await;
            if let Some(peer) = peer {
                peer.leave().await;
            }
            stopped
        });
        if result.is_ok() {
            self.oracle.borrow_mut().flushed(begun);
        }
        self.oracle.borrow_mut().crash(Caches::Kept);
        self.replace_machine();
        result
    }

    /// The daemon is killed; the disks finish what they have taken.
    pub(crate) fn kill_daemon(&mut self) {
        self.end_tasks();
        let mut rng = self.world.choose(|rng| rng.clone());
        for disk in self.disks.iter().filter(|it| self.peer_of(it).is_none()) {
            disk.finish_all(&mut rng);
        }
        self.oracle.borrow_mut().crash(Caches::Kept);
        self.replace_machine();
    }

    /// The power of the whole machine goes.
    pub(crate) fn cut_power(&mut self) {
        let mut rng = self.world.choose(|rng| rng.clone());
        self.cut_power_choosing(&mut |n| rng.index(n));
    }

    /// [`Machine::cut_power`] with every choice made by the caller.
    pub(crate) fn cut_power_choosing(&mut self, choose: &mut impl FnMut(usize) -> usize) {
        if let Some(peer) = &self.peer {
            let paths = peer.paths.iter();
            paths.for_each(|path| path.vanish(Side::Client));
        }
        self.end_tasks();
        for disk in &self.disks {
            if let Some(peer) = self.peer_of(disk) {
                if choose(2) == 0 {
                    continue;
                }
                peer.lose_power();
            }
            disk.cut_power(choose);
        }
        self.oracle.borrow_mut().crash(Caches::Lost);
        self.replace_machine();
    }

    pub(crate) fn end_rules(&mut self) {
        if let Some(rules) = self.rules.take() {
            rules.end();
        }
    }

    /// The tasks of the daemon end; another machine's do not.
    fn end_tasks(&self) {
        match &self.peer {
            Some(_) => self.world.end_group(Group::DAEMON),
            None => self.world.crash(),
        }
    }

    pub(crate) fn replace_machine(&mut self) {
        self.mirror = None;
        self.end_rules();
        self.end_tasks();
        if self.peer.is_some() {
            return;
        }
        let seed = self.world.choose(mirror::sim::Rng::bits);
        self.world = World::new(seed);
        self.connect();
    }

    /// Another disk in the place of one, while the mirror is stopped.
    pub(crate) fn replace_disk(&mut self, slot: usize, disk: SimDisk) {
        self.world.connect(&disk);
        self.disks[slot] = disk;
    }

    /// A client that shares the oracle.
    pub(crate) fn client(&self) -> Client {
        Client {
            mirror: self.mirror(),
            world: self.world.clone(),
            oracle: self.oracle.clone(),
            next_version: self.next_version.clone(),
            data_offset: self.data_offset,
            rules: self.rules.clone(),
            tells_rot: self.tells_rot,
        }
    }

    /// Reads every sector ever written and checks it; after a crash this settles it.
    pub(crate) fn check_all(&mut self, what: &str) {
        let touched = self.oracle.borrow().touched();
        let (client, oracle) = (self.client(), self.oracle.clone());
        let rotten = self.rotten.clone();
        let found = self.world.block_on(async move {
            let mut found = Vec::new();
            for run in touched.chunk_by(|a, b| a + 1 == *b) {
                for part in run.chunks(128) {
                    let (offset, len) = (part[0] * 512, part.len() * 512);
                    match client.read_raw(offset, len).await {
                        Ok(bytes) => found.push((part[0], bytes)),
                        Err(error) => {
                            let may = rotten.concerns(offset, len as u64);
                            assert!(
                                may,
                                "sectors {} to {}: {error}",
                                part[0],
                                part[part.len() - 1]
                            );
                            client.read_singly(part, &rotten, &mut found).await;
                        }
                    }
                }
            }
            found
        });
        for (first, bytes) in found {
            for (sector, bytes) in (first..).zip(bytes.chunks(512)) {
                let settled = oracle.borrow_mut().settle(sector, bytes);
                assert!(settled.is_ok(), "{what}: {}", settled.unwrap_err());
            }
        }
    }

    /// Runs until `done`, which is looked at only now and then because it costs something.
    pub(crate) fn run_coarsely(&self, mut done: impl FnMut() -> bool) -> bool {
        (0..400_000).any(|_| done() || !self.world.run(50, || false) && done())
    }

    /// Whether every in-sync member with its power on has recorded that `slot` is lost, and
    /// there is one.
    pub(crate) fn is_recorded_lost(&self, slot: usize, outages: &BTreeSet<usize>) -> bool {
        let members = self.mirror().status().members;
        let mut alive = (0..members.len()).filter(|other| {
            members[*other].state == MemberState::InSync && !outages.contains(other)
        });
        let records = |other: usize| {
            superblock_on(&self.disks[other])
                .is_some_and(|superblock| !superblock.slots[slot].state.is_receiving())
        };
        alive.clone().next().is_some() && alive.all(records)
    }

    /// The slot that the newest superblock gives to what is on `disk`.
    pub(crate) fn slot_of(&self, disk: &SimDisk) -> Option<usize> {
        let member = superblock_on(disk)?.member;
        let all = self.disks.iter().filter_map(superblock_on);
        let newest = all.max_by_key(|superblock| superblock.event_count)?;
        newest
            .slots
            .iter()
            .position(|slot| slot.member == Some(member))
    }

    /// Waits until every member is in-sync.
    pub(crate) fn wait_in_sync(&self) {
        let mirror = self.mirror();
        let in_sync = || {
            let members = mirror.status().members;
            members.iter().all(|m| m.state == MemberState::InSync)
        };
        assert!(
            self.run_coarsely(in_sync),
            "not in-sync: {:#?}",
            mirror.status()
        );
    }

    pub(crate) fn fail(&self, slot: u8) -> Result<String, mirror::ControlError> {
        let (mirror, member) = (self.mirror(), MemberRef::Slot(slot));
        self.world
            .block_on(async move { mirror.fail(&member).await })
    }

    pub(crate) fn re_add(&self, slot: usize) -> Result<String, mirror::ControlError> {
        self.re_add_disk(path(slot), self.disks[slot].clone(), false)
    }

    pub(crate) fn re_add_disk(
        &self,
        path: String,
        disk: SimDisk,
        full: bool,
    ) -> Result<String, mirror::ControlError> {
        let mirror = self.mirror();
        let how = [Return::DELTA, Return::FULL][usize::from(full)];
        let peer = self.peer_of(&disk);
        let back = async move {
            let disk = match peer {
                Some(peer) => peer.open_for_operator(&mirror, &path).await?,
                None => disk,
            };
            mirror.re_add(path, disk, how).await
        };
        self.world.block_on(back)
    }

    /// A new disk for whichever slot is free.
    pub(crate) fn add_new(&mut self, path: &str) -> Result<String, mirror::ControlError> {
        let (mirror, name) = (self.mirror(), path.to_owned());
        let new = SimDisk::new(self.disks[0].geometry().size_bytes, 0x5c);
        self.world.connect(&new);
        let (adding, disk) = (mirror.clone(), new.clone());
        let added = self
            .world
            .block_on(async move { adding.add(name, disk, false, false).await })?;
        let members = mirror.status().members;
        if let Some(slot) = members.iter().position(|m| m.path == path) {
            self.disks[slot] = new;
        }
        Ok(added)
    }

    /// After everything is written back: all in-sync members hold the same in every sector
    /// ever written, unless its extent reads as zeroes.
    pub(crate) fn compare_members(&self) {
        let status = self.mirror().status();
        let in_sync: Vec<usize> = status
            .members
            .iter()
            .filter(|m| m.state == MemberState::InSync)
            .map(|m| usize::from(m.slot))
            .collect();
        for sector in self.oracle.borrow().touched() {
            if self.mirror().reads_as_zeroes(sector * 512) {
                continue;
            }
            let at = self.data_offset + sector * 512;
            let (mut first, mut other) = ([0; 512], [0; 512]);
            self.disks[in_sync[0]].read_now(at, &mut first);
            for &slot in &in_sync[1..] {
                self.disks[slot].read_now(at, &mut other);
                assert!(
                    first == other,
                    "sector {sector} differs between {} and {slot}",
                    in_sync[0]
                );
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Tasks hold the mirror, which holds the machine: nobody else would let go.
        self.world.crash();
        self.end_rules();
    }
}
