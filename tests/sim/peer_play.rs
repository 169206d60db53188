//! What happens to a peer member in a history, and how much of it did.

use crate::machine::Machine;
use crate::play::Bench;
use crate::script::Trouble;
use mirror::Host as _;
use mirror::sim::net::Side;
use mirror::sim::{Rng, SimDisk, SimHost};
use std::time::Duration;

/// What was played with a peer member.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    /// Histories with one.
    pub(crate) histories: u64,
    /// Starts of its server.
    pub(crate) starts: u64,
    /// Sessions with a claim that was granted.
    pub(crate) claims: u64,
    /// Connections that went on where one had broken.
    pub(crate) went_on: u64,
}

impl Counts {
    pub(crate) fn of(machine: &Machine) -> Self {
        let Some(peer) = &machine.peer else {
            return Self::default();
        };
        Self {
            histories: 1,
            starts: peer.counts.starts.get(),
            claims: peer.counts.opened.get(),
            went_on: peer.counts.reconnects.get(),
        }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.histories += other.histories;
        self.starts += other.starts;
        self.claims += other.claims;
        self.went_on += other.went_on;
    }
}

/// The power of the machine that has this disk goes, if that is another one, and comes back soon.
pub(crate) fn power_of_server(bench: &Bench, disk: &SimDisk, rng: &mut Rng) {
    if let Some(peer) = bench.peer_of(disk) {
        peer.lose_power();
        peer.start_after(Duration::from_millis(rng.below(6000)));
    }
}

/// The machine that had the one disk has the other one.
pub(crate) fn put_image(bench: &Bench, disk: &SimDisk, image: &SimDisk) {
    if let Some(peer) = bench.peer_of(disk) {
        peer.kill();
        peer.put_disk(image);
        peer.start();
    }
}

/// Something goes wrong for a while.
pub(crate) async fn trouble(bench: &Bench, trouble: Trouble, seconds: u64) {
    let Some(peer) = bench.peer.clone() else {
        return;
    };
    let host = SimHost(peer.world.clone());
    let time = Duration::from_secs(seconds);
    // On the first way alone, or on all.
    let all = peer.world.choose(|rng| rng.one_in(2));
    let paths = if all {
        &peer.paths[..]
    } else {
        &peer.paths[..1]
    };
    let sides: &[Side] = match trouble {
        Trouble::Silence => &[Side::Client, Side::Server],
        Trouble::NothingThere => &[Side::Client],
        Trouble::NothingBack => &[Side::Server],
        Trouble::Cut => {
            peer.paths.iter().for_each(|path| path.cut());
            return host.sleep(time / 8).await;
        }
        Trouble::Killed => {
            peer.kill();
            let early = Duration::from_millis(peer.world.choose(|rng| rng.below(3000)));
            peer.start_after(early);
            return host.sleep(time / 4).await;
        }
        Trouble::TakenOver => {
            let session = peer.claim(host.random(), true).await;
            tracing::trace!("another host took over: {}", session.is_ok());
            return host.sleep(time / 4).await;
        }
    };
    paths.iter().for_each(|path| path.stall(sides));
    host.sleep(time).await;
    paths.iter().for_each(|path| path.heal());
}
