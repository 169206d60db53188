//! A peer member, and the network, its server and another host in the middle of something.

use crate::machine::{DEADLINE, Machine, SimMirror, path};
use crate::older_images::{drop_all, seconds, states};
use crate::peer_host::PeerHost;
use crate::play::play_seed;
use crate::races::{fl, seeds, wr};
use crate::script::Author;
use mirror::control::MemberRef;
use mirror::control::MemberState::{self, InSync};
use mirror::sim::net::Side;
use mirror::sim::{SimHost, WriteFault};
use mirror::{Candidate, Disk as _, Host as _, Span};
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

const SIZE: u64 = 64 << 20;
/// The slot whose disk is in another machine.
const PEER: usize = 1;

/// A mirror that is up, of a disk here and one behind so many ways.
fn started(seed: u64, paths: usize) -> (Machine, Rc<PeerHost>) {
    let mut machine = Machine::new(seed, 2, SIZE);
    let peer = machine.put_behind_network(PEER, paths);
    machine.start();
    wr(&machine, 0, 65536);
    (machine, peer)
}

/// Begins so many writes; how many have been answered well.
fn write_in_the_background(machine: &Machine, count: u64) -> Rc<Cell<u64>> {
    let answered = Rc::new(Cell::new(0));
    for at in 0..count {
        let (client, answered) = (machine.client(), answered.clone());
        machine.world.spawn_task(async move {
            client.write(at << 16, 65536, at % 4 == 3).await.unwrap();
            answered.set(answered.get() + 1);
        });
    }
    answered
}

fn peer_state(machine: &Machine) -> MemberState {
    states(machine)[PEER]
}

/// Everybody has everything again.
fn all_is_well_again(machine: &mut Machine, what: &str) {
    if let Some(peer) = &machine.peer {
        peer.heal();
        peer.start();
    }
    crate::play::bring_all_back(machine);
    fl(machine);
    machine.check_all(what);
    machine.compare_members();
}

/// Whatever is under way: the connection breaks, and another one goes on. Nobody is lost by it, and
/// nothing is lost of it.
#[test]
fn a_cut_with_writes_in_flight_is_survived() {
    let mut went_on = 0;
    for seed in seeds(60) {
        let (mut machine, peer) = started(seed, 1);
        let epoch = machine.mirror().status().epoch;
        let answered = write_in_the_background(&machine, 12);
        for cut in 0..1 + seed % 3 {
            machine.world.run(5 + seed * 7 + cut * 400, || false);
            peer.paths[0].cut();
        }
        assert!(
            machine.world.run(2_000_000, || answered.get() == 12),
            "seed {seed}"
        );
        assert_eq!(peer_state(&machine), InSync, "seed {seed}");
        assert_eq!(machine.mirror().status().epoch, epoch, "seed {seed}");
        fl(&machine);
        machine.check_all(&format!("seed {seed}"));
        machine.compare_members();
        went_on += peer.counts.reconnects.get();
        machine.cut_power();
        machine.start();
        machine.check_all(&format!("seed {seed}, after a power cut"));
    }
    assert!(went_on >= 60, "{went_on}");
}

/// Nothing arrives in one direction, or in both, and nobody learns of it: the engine loses the member
/// when its time is up, and what was given up does not come back by another connection.
#[test]
fn a_silent_cut_loses_the_member() {
    for seed in seeds(45) {
        let (mut machine, peer) = started(seed, 1);
        let answered = write_in_the_background(&machine, 6);
        machine.world.run(seed * 5, || false);
        let sides: &[Side] = match seed % 3 {
            0 => &[Side::Client],
            1 => &[Side::Server],
            _ => &[Side::Client, Side::Server],
        };
        peer.paths[0].stall(sides);
        assert!(
            machine.world.run(2_000_000, || answered.get() == 6),
            "seed {seed}"
        );
        wr(&machine, 0, 4096);
        assert_ne!(peer_state(&machine), InSync, "seed {seed}");
        // Before or after the ends have noticed.
        seconds(&machine, seed);
        wr(&machine, 4096, 4096);
        all_is_well_again(&mut machine, &format!("seed {seed}"));
    }
}

/// Where there is another way, the same costs nobody the member.
#[test]
fn another_way_is_taken_when_one_is_silent() {
    for seed in seeds(30) {
        let (mut machine, peer) = started(seed, 2);
        let epoch = machine.mirror().status().epoch;
        // Whichever way it has taken at first, one of the two turns is the other one's.
        for path in &peer.paths {
            let answered = write_in_the_background(&machine, 6);
            machine.world.run(seed * 3, || false);
            path.stall(&[Side::Client, Side::Server]);
            assert!(
                machine.world.run(4_000_000, || answered.get() == 6),
                "seed {seed}"
            );
            path.heal();
            seconds(&machine, 3);
        }
        assert_eq!(peer_state(&machine), InSync, "seed {seed}");
        assert_eq!(machine.mirror().status().epoch, epoch, "seed {seed}");
        machine.check_all(&format!("seed {seed}"));
        machine.compare_members();
    }
}

/// Nothing arrives for longer than anybody waits, and there is no other member: what is asked meanwhile
/// fails, and when something arrives again it serves again, without anybody's help (R8). What failed is not
/// asked again (R13).
#[test]
fn an_only_member_that_was_out_of_reach_serves_again() {
    for seed in seeds(40) {
        let (mut machine, peer) = started(seed, 1 + (seed % 2) as usize);
        let (mirror, instance) = (machine.mirror(), peer.instance());
        let other = async move { mirror.fail(&MemberRef::Slot(0)).await.unwrap() };
        machine.world.block_on(other);
        wr(&machine, 65536, 65536);
        let paths = peer.paths.iter();
        paths.for_each(|path| path.stall(&[Side::Client, Side::Server]));
        seconds(&machine, 25 + seed % 10);
        let (client, fua) = (machine.client(), seed % 3 == 0);
        let write = async move { client.write(131_072, 65536, fua).await };
        assert!(machine.world.block_on(write).is_err(), "seed {seed}");
        peer.heal();
        // An answer of its server may take seconds, and a round that failed is tried again after one.
        seconds(&machine, 20);
        let client = machine.client();
        machine.world.block_on(async move {
            // What became of a flush nobody can say (R7): the operator's word.
            if client.flush().await.is_err() {
                client.clear_flush_error().await;
            }
        });
        let client = machine.client();
        let written = machine.world.block_on(async move {
            let written = client.write(196_608, 65536, fua).await;
            written.and(client.flush().await)
        });
        assert_eq!(written, Ok(()), "seed {seed}");
        assert_eq!(peer_state(&machine), InSync, "seed {seed}");
        assert_eq!(peer.instance(), instance, "seed {seed}");
        assert!(peer.counts.reconnects.get() > 0, "seed {seed}");
        machine.check_all(&format!("seed {seed}"));
        all_is_well_again(&mut machine, &format!("seed {seed}"));
        machine.cut_power();
        machine.start();
        machine.check_all(&format!("seed {seed}, after a power cut"));
    }
}

/// The server ends in the middle of a flush, by itself or with its machine and what its disk had not
/// made durable: what comes up is another instance, and nothing of it is taken for granted.
#[test]
fn a_server_that_is_started_anew_in_a_flush_is_a_loss_and_a_return() {
    for seed in seeds(60) {
        let (mut machine, peer) = started(seed, 1);
        let before = machine.mirror().status().epoch;
        let instance = peer.instance();
        wr(&machine, 65536, 65536);
        let (client, flushed) = (machine.client(), Rc::new(Cell::new(false)));
        let told = flushed.clone();
        machine.world.spawn_task(async move {
            client.flush().await.unwrap();
            told.set(true);
        });
        machine.world.run(seed % 40, || false);
        if seed % 2 == 0 {
            peer.lose_power();
            machine.disks[PEER].lose_power(&mut drop_all);
        } else {
            peer.kill();
        }
        peer.start();
        assert!(
            machine.world.run(2_000_000, || flushed.get()),
            "seed {seed}"
        );
        wr(&machine, 131_072, 4096);
        fl(&machine);
        assert_ne!(peer.instance(), instance, "seed {seed}");
        assert_ne!(peer_state(&machine), InSync, "seed {seed}");
        assert_ne!(machine.mirror().status().epoch, before, "seed {seed}: R14");
        machine.disks[PEER] = machine.disks[PEER].reopen();
        all_is_well_again(&mut machine, &format!("seed {seed}"));
        machine.cut_power();
        machine.start();
        machine.check_all(&format!("seed {seed}, after a power cut"));
    }
}

/// Another host takes the export over while writes of this one are at the disk, which takes its time:
/// it is let in when they are over, and this one has lost the member.
#[test]
fn a_host_that_takes_over_waits_for_what_drains() {
    for seed in seeds(40) {
        let (mut machine, peer) = started(seed, 1);
        let disk = machine.disks[PEER].clone();
        let answered = write_in_the_background(&machine, 6);
        let data = WriteFault {
            offset: machine.data_offset,
            len: SIZE,
            hangs: true,
        };
        disk.set_write_fault(Some(data));
        let all = disk.geometry().size_bytes;
        machine
            .world
            .run(2_000_000, || disk.is_under_way(machine.data_offset, SIZE));
        let (other, let_in) = (peer.clone(), Rc::new(Cell::new(false)));
        let told = let_in.clone();
        machine.world.spawn_task(async move {
            let session = other.claim(77, true).await.unwrap();
            told.set(true);
            SimHost(other.world.clone())
                .sleep(Duration::from_secs(2))
                .await;
            drop(session);
        });
        seconds(&machine, 1 + seed % 3);
        assert!(!let_in.get(), "seed {seed}: let in while requests drain");
        disk.set_write_fault(None);
        assert!(machine.world.run(2_000_000, || let_in.get()), "seed {seed}");
        assert!(!disk.is_under_way(0, all), "seed {seed}");
        assert!(
            machine.world.run(2_000_000, || answered.get() == 6),
            "seed {seed}"
        );
        wr(&machine, 0, 4096);
        assert_ne!(peer_state(&machine), InSync, "seed {seed}");
        seconds(&machine, 30);
        all_is_well_again(&mut machine, &format!("seed {seed}"));
    }
}

/// The other host goes further: it starts the mirror by force on what it has, and writes. Then there
/// are two sides, and neither is chosen silently.
#[test]
fn two_sides_are_never_one_again_by_themselves() {
    for seed in seeds(30) {
        let (mut machine, peer) = started(seed, 1);
        fl(&machine);
        let answered = write_in_the_background(&machine, 4);
        machine.world.run(seed * 11, || false);
        // Two mirrors write to its disk from now on, one after the other.
        machine.end_rules();
        let (host, options) = (
            Rc::new(SimHost(machine.world.clone())),
            machine.options(true),
        );
        let theirs = peer.clone();
        let other = machine.world.block_on(async move {
            let (disk, _) = theirs.open_as(77, true, DEADLINE).await.unwrap();
            let path = path(PEER);
            let candidates = vec![Candidate { path, disk }];
            let other = SimMirror::start(host.clone(), candidates, options)
                .await
                .unwrap();
            let buffer = host.allocate(4096);
            buffer_filled(&buffer);
            let span = Span::whole(buffer);
            other.write(0, span, true).await.unwrap();
            other
        });
        assert!(
            machine.world.run(2_000_000, || answered.get() == 4),
            "seed {seed}"
        );
        wr(&machine, 0, 4096);
        assert_ne!(peer_state(&machine), InSync, "seed {seed}");
        if seed % 2 == 0 {
            machine
                .world
                .block_on(async move { drop(other.stop().await) });
        } else {
            drop(other);
        }
        let refused = machine.re_add(PEER).unwrap_err();
        assert_ne!(peer_state(&machine), InSync, "seed {seed}: {refused}");
        machine.check_all(&format!("seed {seed}"));
    }
}

fn buffer_filled(buffer: &mirror::sim::SimBuffer) {
    mirror::Buffer::fill(buffer, |bytes| bytes.fill(0x77));
}

/// A seed says everything of a history with a peer as well.
#[test]
fn a_history_with_a_peer_repeats() {
    for seed in [5, 14, 38] {
        let play = || {
            let (_, mut script) = Author::new(seed);
            format!("{:?}", play_seed(seed, &mut script))
        };
        let first = play();
        assert!(first.contains("histories: 1"), "{first}");
        assert_eq!(first, play(), "seed {seed}");
    }
}
