//! Plays a script, and in the end brings everything back, compares the members and reads all.

use crate::client::Client;
use crate::invariants::Rules;
use crate::machine::{DEADLINE, Machine, path};
use crate::oracle::Caches;
use crate::peer_host::PeerHost;
use crate::peer_play;
use crate::rot::{self, Rotten};
use crate::script::{Action, Author, End, Fault, Life, OPERATIONS_MIN, Request, SIZE, Script};
use crate::sums;
use mirror::control::{MemberRef, MemberState};
use mirror::engine::Return;
use mirror::sim::{Faults, Rng, SimDisk, SimHost};
use mirror::{Disk as _, Errno, Host as _};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

/// What was played.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Played {
    pub(crate) requests: u64,
    pub(crate) actions: u64,
    pub(crate) crashes: u64,
    pub(crate) steps: u64,
    pub(crate) rot: rot::Counts,
    pub(crate) peers: peer_play::Counts,
}

/// What the operator's task shares with the player.
#[derive(Default)]
pub(crate) struct Bench {
    /// The disk of each slot.
    disks: RefCell<Vec<SimDisk>>,
    /// New disks that may or may not have taken a slot by now.
    joining: RefCell<Vec<SimDisk>>,
    /// Slots whose disk has lost its power since the mirror opened it.
    outages: RefCell<BTreeSet<usize>>,
    /// Copies that have changed silently.
    pub(crate) rotten: Rc<Rotten>,
    /// The machine behind the network, if there is one.
    pub(crate) peer: Option<Rc<PeerHost>>,
    requests: Cell<u64>,
    actions: Cell<u64>,
    ended: Cell<usize>,
    /// Of so many tasks.
    all: Cell<usize>,
}

impl Bench {
    pub(crate) fn of(machine: &Machine) -> Self {
        let bench = Self::default();
        bench.disks.replace(machine.disks.clone());
        Self {
            rotten: machine.rotten.clone(),
            peer: machine.peer.clone(),
            ..bench
        }
    }

    /// The disk in a slot.
    pub(crate) fn disk(&self, slot: u8) -> SimDisk {
        self.disks.borrow()[usize::from(slot)].clone()
    }

    /// The machine that has this disk, if it is another one.
    pub(crate) fn peer_of(&self, disk: &SimDisk) -> Option<Rc<PeerHost>> {
        self.peer.clone().filter(|peer| peer.has(disk))
    }

    /// Whether every disk has had power since the mirror opened it.
    pub(crate) fn no_outages(&self) -> bool {
        self.outages.borrow().is_empty()
    }

    /// How many slots there are.
    pub(crate) fn slots(&self) -> usize {
        self.disks.borrow().len()
    }

    /// The disk of each slot, and after them those that may have taken a slot by now.
    pub(crate) fn all_disks(&self) -> Vec<SimDisk> {
        let mut all = self.disks.borrow().clone();
        all.extend(self.joining.borrow().iter().cloned());
        all
    }
}

/// Draws the history of `seed` and plays it. The script is complete only afterwards, also when
/// this panics.
pub(crate) fn play_seed(seed: u64, script: &mut Script) -> Played {
    let (mut author, begun) = Author::new(seed);
    *script = begun;
    let mut machine = build(script);
    let mut played = Played::default();
    while played.requests + played.actions < OPERATIONS_MIN {
        let mut life = author.life();
        // In every history there is a scrub at some time.
        life.scrub |= script.lives.is_empty();
        script.lives.push(life.clone());
        play_life(&mut machine, &life, &mut played);
    }
    finish(&mut machine, &mut played);
    played
}

/// Plays a script that is complete.
pub(crate) fn play_script(script: &Script) -> Played {
    let mut machine = build(script);
    let mut played = Played::default();
    for life in &script.lives {
        play_life(&mut machine, life, &mut played);
    }
    finish(&mut machine, &mut played);
    played
}

fn build(script: &Script) -> Machine {
    let mut machine = Machine::new(script.schedule, script.members, SIZE);
    // Where the last disk is no peer, it tells checksums of blocks in one history of three, as behind a
    // network.
    let last = machine.disks.last().filter(|_| script.paths == 0);
    if let Some(disk) = last.filter(|_| script.schedule % 3 == 1) {
        disk.tell_sums(script.schedule);
    }
    // In every other one it keeps the order of intent and data.
    if let Some(disk) = last.filter(|_| script.schedule % 2 == 1) {
        disk.keep_order();
    }
    for &slot in &script.plain {
        machine.disks[usize::from(slot)].alter(|it| it.cheap_zeroes = false);
    }
    if script.paths > 0 {
        machine.put_behind_network(script.members - 1, script.paths);
    }
    machine
}

fn play_life(machine: &mut Machine, life: &Life, played: &mut Played) {
    if life.without.is_some() {
        machine.rotten.put_right();
    }
    start(machine, life.without);
    machine.check_all("after the start");
    let bench = Rc::new(Bench::of(machine));
    for requests in life.clients.clone() {
        let (client, bench) = (machine.client(), bench.clone());
        machine.world.spawn_task(async move {
            for request in requests {
                bench.requests.set(bench.requests.get() + 1);
                // Errors are legal while disks are faulty; wrong data never is.
                let _: Result<(), Errno> = ask(&client, request).await;
            }
            bench.ended.set(bench.ended.get() + 1);
        });
    }
    let (client, actions, shared) = (machine.client(), life.operator.clone(), bench.clone());
    machine.world.spawn_task(async move {
        for action in actions {
            shared.actions.set(shared.actions.get() + 1);
            act(&client, &shared, action).await;
        }
        shared.ended.set(shared.ended.get() + 1);
    });
    if life.scrub {
        let (mirror, bench) = (machine.mirror(), bench.clone());
        let (host, rotten) = (SimHost(machine.world.clone()), machine.rotten.clone());
        machine
            .world
            .spawn_task(rot::scrub(mirror, rotten, host, move || {
                bench.ended.get() == bench.all.get()
            }));
    }
    let all = life.clients.len() + 1;
    bench.all.set(all);
    let ended = || bench.ended.get() == all;
    let finished = machine.world.run(life.steps.unwrap_or(20_000_000), ended);
    assert!(
        finished || life.steps.is_some(),
        "R9: a request stands still: {:#?}",
        machine.mirror().status()
    );
    for disk in bench.disks.borrow().iter() {
        disk.set_faults(Faults::default());
    }
    played.requests += bench.requests.get();
    played.actions += bench.actions.get();
    played.steps += machine.world.steps();
    end(machine, &bench, life.end, finished);
    played.crashes += u64::from(life.end != End::Stop);
}

/// Starts on all disks, first without one of them if `without` says so.
fn start(machine: &mut Machine, without: Option<u8>) {
    let all: Vec<usize> = (0..machine.disks.len()).collect();
    if let Some(slot) = without {
        let others: Vec<usize> = all
            .iter()
            .copied()
            .filter(|&other| other != usize::from(slot))
            .collect();
        if machine.start_on(&others, false).is_ok() {
            return;
        }
    }
    if let Err(error) = machine.start_on(&all, false) {
        panic!("a mirror with all its members does not start: {error}");
    }
}

fn end(machine: &mut Machine, bench: &Bench, end: End, finished: bool) {
    machine.rotten.no_false_finding(&machine.mirror());
    machine.disks = bench.all_disks();
    if end != End::Stop || !finished {
        let members = machine.mirror().status().members;
        let in_sync = members.iter().all(|m| m.state == MemberState::InSync);
        let told = in_sync && bench.no_outages() && bench.joining.borrow().is_empty();
        let disks = &machine.disks;
        machine
            .rotten
            .before_a_crash(disks, machine.data_offset, told);
    }
    // A member whose cache is gone and whose loss is not recorded takes what nobody had flushed
    // along; with a crash on top its part of what was in the caches is gone for the reader.
    let outages = bench.outages.borrow().clone();
    let unrecorded = |slot: &usize| !machine.is_recorded_lost(*slot, &outages);
    let caches_lost = outages.iter().any(unrecorded);
    match end {
        End::Stop if finished => {
            if machine.stop().is_err() {
                // As a crash: nobody says what state things were left in.
                machine.rotten.put_right();
            }
        }
        End::Stop | End::KillDaemon => {
            machine.kill_daemon();
        }
        End::PowerCut => machine.cut_power(),
    }
    machine.rotten.after_a_crash();
    if caches_lost && end != End::PowerCut {
        machine.oracle.borrow_mut().crash(Caches::Lost);
    }
    machine.settle_slots(bench.slots());
}

pub(crate) async fn ask(client: &Client, request: Request) -> Result<(), Errno> {
    let bytes = |sectors: u64| (sectors * 512) as usize;
    match request {
        Request::Read(first, sectors) => client.read(first * 512, bytes(sectors)).await,
        Request::Write(first, sectors) => client.write(first * 512, bytes(sectors), false).await,
        Request::Fua(first, sectors) => client.write(first * 512, bytes(sectors), true).await,
        Request::Zeroes(first, sectors) => {
            client
                .write_zeroes(first * 512, sectors * 512, first % 3 == 0)
                .await
        }
        Request::Discard(extent) => client.discard_extent(extent).await,
        Request::Flush => client.flush().await,
    }
}

async fn sleep(client: &Client, seconds: u64) {
    SimHost(client.world.clone())
        .sleep(Duration::from_secs(seconds))
        .await;
}

fn faults(fault: Fault) -> Faults {
    let mut faults = Faults::default();
    match fault {
        Fault::Reads => faults.reads = true,
        Fault::Writes => faults.writes = true,
        Fault::Flushes => faults.flushes = true,
        Fault::Hang => faults.hang = true,
        Fault::Gone => faults.gone = true,
    }
    faults
}

pub(crate) async fn act(client: &Client, bench: &Bench, action: Action) {
    tracing::trace!("operator: {action:?}");
    let disk = |slot: u8| bench.disk(slot);
    let world = &client.world;
    match action {
        Action::Fail(slot) => drop(client.mirror.fail(&MemberRef::Slot(slot)).await),
        Action::Remove(slot) => drop(client.mirror.remove(&MemberRef::Slot(slot), true).await),
        Action::Faulty(slot, fault, seconds) => {
            disk(slot).set_faults(faults(fault));
            sleep(client, seconds).await;
            disk(slot).set_faults(Faults::default());
        }
        Action::AllFaulty(fault, seconds) => {
            if matches!(fault, Fault::Reads | Fault::Gone) {
                // A part of a block is written, and nobody can read the rest for its checksum.
                bench.rotten.put_right();
            }
            let disks = bench.disks.borrow().clone();
            disks.iter().for_each(|disk| disk.set_faults(faults(fault)));
            sleep(client, seconds).await;
            disks
                .iter()
                .for_each(|disk| disk.set_faults(Faults::default()));
        }
        Action::Spoil(slot, sector) => disk(slot).spoil(client.data_offset + sector * 512),
        Action::PowerOf(slot) => {
            let mut rng = world.choose(|rng| Rng::new(rng.bits()));
            peer_play::power_of_server(bench, &disk(slot), &mut rng);
            disk(slot).lose_power(&mut |of| rng.index(of));
            bench.outages.borrow_mut().insert(usize::from(slot));
        }
        Action::PowerOfAll => {
            let mut rng = world.choose(|rng| Rng::new(rng.bits()));
            for (slot, disk) in bench.disks.borrow().iter().enumerate() {
                peer_play::power_of_server(bench, disk, &mut rng);
                disk.lose_power(&mut |of| rng.index(of));
                bench.outages.borrow_mut().insert(slot);
            }
        }
        Action::Rot(slot, block) => rot::rot(client, bench, slot, block),
        Action::Replace(slot) => replace(client, bench, slot).await,
        Action::OlderImage(slot, seconds) => {
            bench.rotten.put_right();
            let image = disk(slot).image();
            sleep(client, seconds).await;
            if take_out(client, slot).await {
                world.connect(&image);
                peer_play::put_image(bench, &disk(slot), &image);
                if let Some(rules) = client.rules.clone() {
                    rules.forget(&disk(slot));
                    rules.watch(&image);
                }
                bench.disks.borrow_mut()[usize::from(slot)] = image;
                bring_back(client, bench, usize::from(slot)).await;
            }
        }
        Action::ReturnAll => {
            let slots = bench.disks.borrow().len();
            for slot in 0..slots {
                bring_back(client, bench, slot).await;
            }
        }
        Action::ClearFlushError => client.clear_flush_error().await,
        Action::Seconds(seconds) => sleep(client, seconds).await,
        Action::Network(trouble, seconds) => peer_play::trouble(bench, trouble, seconds).await,
    }
}

fn state(client: &Client, slot: usize) -> MemberState {
    client.mirror.status().members[slot].state
}

/// Fails and removes a member; false when it is still in service.
async fn take_out(client: &Client, slot: u8) -> bool {
    let member = MemberRef::Slot(slot);
    let failed = client.mirror.fail(&member).await;
    let removed = client.mirror.remove(&member, true).await;
    let out = !matches!(
        state(client, usize::from(slot)),
        MemberState::InSync | MemberState::Resyncing
    );
    failed.is_ok() && removed.is_ok() && out
}

async fn replace(client: &Client, bench: &Bench, slot: u8) {
    // What it throws away may be the only good copy.
    bench.rotten.put_right();
    if !take_out(client, slot).await {
        return;
    }
    let slot = usize::from(slot);
    let size = bench.disks.borrow()[slot].geometry().size_bytes;
    let new = SimDisk::new(size, 0x5c);
    client.world.connect(&new);
    if let Some(rules) = client.rules.clone() {
        rules.watch(&new);
    }
    bench.joining.borrow_mut().push(new.clone());
    let name = format!("new {}", bench.actions.get());
    let added = client
        .mirror
        .add(name.clone(), new.clone(), false, false)
        .await;
    tracing::trace!("a new disk: {added:?}");
    // It takes whichever slot is free, which need not be the one just emptied.
    let members = client.mirror.status().members;
    let taken = members.iter().position(|m| m.path == name);
    if let (Ok(_), Some(slot)) = (added, taken) {
        bench.joining.borrow_mut().pop();
        bench.outages.borrow_mut().remove(&slot);
        bench.disks.borrow_mut()[slot] = new;
    }
}

async fn bring_back(client: &Client, bench: &Bench, slot: usize) {
    if matches!(
        state(client, slot),
        MemberState::InSync | MemberState::Resyncing
    ) {
        return;
    }
    let disk = bench.disks.borrow()[slot].clone();
    let member = match bench.peer_of(&disk) {
        None => disk.reopen(),
        Some(peer) => match peer.open(false, DEADLINE).await {
            Ok(member) => member,
            Err(error) => return tracing::trace!("slot {slot} cannot be had: {error}"),
        },
    };
    let disk = disk.reopen();
    if let Some(rules) = client.rules.clone() {
        rules.watch(&disk);
    }
    let before = client.mirror.status();
    let by_delta = client
        .mirror
        .re_add(path(slot), member.clone(), Return::DELTA);
    let mut back = by_delta.await;
    if back
        .as_ref()
        .is_err_and(|error| error.message.contains("--full"))
    {
        bench.rotten.put_right();
        back = client.mirror.re_add(path(slot), member, Return::FULL).await;
    }
    tracing::trace!("bringing slot {slot} back: {back:?}");
    if back.is_ok() {
        Rules::r14_a_return_is_an_epoch(&before, &client.mirror.status());
        bench.outages.borrow_mut().remove(&slot);
        bench.disks.borrow_mut()[slot] = disk;
    }
}

/// In the end all members come back, hold the same, and what they hold is legal.
fn finish(machine: &mut Machine, played: &mut Played) {
    start(machine, None);
    let members = machine.mirror().status().members;
    if members.iter().any(|m| m.state != MemberState::InSync) {
        machine.rotten.put_right();
    }
    bring_all_back(machine);
    machine.check_all("in the end");
    let mirror = machine.mirror();
    let equal = || mirror.status().extents.unequalised_blocks == 0;
    assert!(machine.run_coarsely(equal), "R5: never all equal");
    rot::check_all_extents(machine);
    machine.rotten.all_healed(&machine.mirror());
    machine.rotten.no_false_finding(&machine.mirror());
    machine.compare_members();
    if machine.stop().is_ok() {
        sums::check(machine, "in the end");
    }
    played.rot = machine.rotten.counts();
    played.peers = peer_play::Counts::of(machine);
    played.steps += machine.world.steps();
}

/// Every member is in-sync again, by full resync or as a new disk where nothing else helps.
pub(crate) fn bring_all_back(machine: &mut Machine) {
    let mirror = machine.mirror();
    let of = |slot: usize| mirror.status().members[slot].state;
    let slots = 0..machine.disks.len();
    // Members come back by themselves too, one at a time, so an attempt may find one busy.
    for attempt in 0..8 {
        let settled = || slots.clone().all(|slot| of(slot) != MemberState::Resyncing);
        assert!(machine.run_coarsely(settled), "a resync stands still");
        for slot in slots
            .clone()
            .filter(|&slot| of(slot) != MemberState::InSync)
        {
            let disk = machine.disks[slot].clone();
            let mut back = machine.re_add_disk(path(slot), disk, true);
            if back.is_err() && attempt > 4 {
                // A replacement that the mirror knows and that does not know it yet.
                back = machine.add_new(&format!("last {attempt}"));
            }
            tracing::trace!("bringing slot {slot} back: {back:?}");
        }
    }
    machine.wait_in_sync();
}
