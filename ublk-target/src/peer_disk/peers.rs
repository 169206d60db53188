//! The connections to peer members that a daemon has, and what it knows of their servers.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::rc::{Rc, Weak};
use std::time::Duration;

use peer::blocking::CONNECT_PATIENCE;
use peer::link::Link;
use peer::{Address, Claimant};

use super::net::{RingNet, Way};
use super::opened::OpenedPeer;
use super::sums::{Sums, connect_to};
use crate::host::random_bytes;
use crate::ring::{self, Ring};

/// How long a connection that was cut may take to be over.
const SEVER_PATIENCE: Duration = Duration::from_secs(5);

/// How long a server may take to close what a daemon that ends has no use for any more.
const LEAVE_PATIENCE: Duration = Duration::from_secs(2);

/// How long connecting may take where there is more than one way.
const WAY_PATIENCE: Duration = Duration::from_secs(1);

/// What is known of an address.
struct Known {
    /// In whose name this daemon claims it, at each of its connections.
    owner: u128,
    /// Its server admits one writer.
    fenced: bool,
    /// There is no connection because the last one failed, or there was none to be had.
    cut_off: Rc<Cell<bool>>,
    /// Where the last connection's disk asks for checksums of blocks.
    sums: Weak<Sums>,
}

/// Nobody else brings in the member at an address: two that do would end each other's sessions.
pub(crate) struct Turn(Rc<RefCell<HashSet<String>>>, String);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.borrow_mut().remove(&self.1);
    }
}

/// An address as connections have it, whichever way it was given.
pub(crate) fn one_form(address: &str) -> String {
    let parsed = address.parse::<Address>();
    parsed.map_or_else(|_| address.to_owned(), |it| it.to_string())
}

/// The connections of this daemon.
#[derive(Default)]
pub(crate) struct Peers {
    links: RefCell<Vec<Weak<Link<RingNet>>>>,
    /// More addresses of the servers of members.
    paths: Vec<Address>,
    /// Whose members are being brought in.
    turns: Rc<RefCell<HashSet<String>>>,
    /// By the addresses in their one form.
    known: RefCell<HashMap<String, Known>>,
}

impl Peers {
    /// Peers to whose servers these addresses lead as well, it need not be said to which.
    pub(crate) fn with_paths(paths: Vec<Address>) -> Self {
        Self {
            paths,
            ..Self::default()
        }
    }

    /// The ways on which a connection that breaks can be taken up again, the one that it took first.
    /// No try takes longer than `deadline`.
    pub(super) fn ways_to(&self, opened: &OpenedPeer, deadline: Duration) -> Vec<Way> {
        let known = self.known.borrow();
        let own = opened.address.parse::<Address>();
        let (Some(fence), Some(known), Ok(own)) = (opened.fence, known.get(&opened.address), own)
        else {
            return Vec::new();
        };
        let (all, patience) = self.addresses(own);
        all.iter()
            .map(|address| Way::through(address, known.owner, fence, patience.min(deadline)))
            .collect()
    }

    /// All that may lead to a server, its own address first, and how long connecting may take.
    fn addresses(&self, own: Address) -> (Vec<Address>, Duration) {
        let others = self.paths.iter().filter(|path| **path != own).cloned();
        let all: Vec<_> = std::iter::once(own.clone()).chain(others).collect();
        let patience = if all.len() > 1 {
            WAY_PATIENCE
        } else {
            CONNECT_PATIENCE
        };
        (all, patience)
    }

    /// Where checksums of a member's blocks can be asked for, if its server is one of ours.
    pub(super) fn sums_of(
        &self,
        ring: &Rc<Ring>,
        opened: &OpenedPeer,
        deadline: Duration,
    ) -> Option<Rc<Sums>> {
        let (fence, own) = (opened.fence?, opened.address.parse().ok()?);
        let (all, patience) = self.addresses(own);
        let size_bytes = opened.export.size_bytes;
        let connect = connect_to(all, fence, size_bytes, patience.min(deadline));
        let sums = Sums::new(ring, &opened.address, connect, deadline);
        if let Some(known) = self.known.borrow_mut().get_mut(&opened.address) {
            known.sums = Rc::downgrade(&sums);
        }
        Some(sums)
    }

    /// Whether checksums of the blocks of the member at `address` are to be had now, as far as is
    /// known.
    pub(crate) fn has_sums(&self, address: &str) -> bool {
        let known = self.known.borrow();
        let sums = known
            .get(&one_form(address))
            .and_then(|it| it.sums.upgrade());
        sums.is_some_and(|sums| sums.are_to_be_had())
    }

    /// Who connects to `address`. Each has an owner of its own, so that two addresses which lead
    /// to one disk do not take it from each other.
    pub(crate) fn claimant(&self, address: &str, take_over: bool) -> Claimant {
        let mut known = self.known.borrow_mut();
        let known = known.entry(one_form(address)).or_insert_with(|| Known {
            owner: u128::from_le_bytes(random_bytes()),
            fenced: false,
            cut_off: Rc::default(),
            sums: Weak::new(),
        });
        Claimant {
            owner: known.owner,
            take_over,
        }
    }

    /// Somebody else, who is refused while this daemon has a session.
    pub(crate) fn stranger() -> Claimant {
        Claimant {
            owner: u128::from_le_bytes(random_bytes()),
            take_over: false,
        }
    }

    /// Remembers a new connection.
    pub(super) fn add(&self, link: &Rc<Link<RingNet>>) {
        if let Some(known) = self.known.borrow_mut().get_mut(link.address()) {
            known.fenced = link.fence().is_some();
        }
        let mut links = self.links.borrow_mut();
        links.retain(|link| link.strong_count() > 0);
        links.push(Rc::downgrade(link));
    }

    /// Whether the server at `address`, as it was last met, ends older sessions before it admits
    /// a new one.
    pub(crate) fn is_fenced(&self, address: &str) -> bool {
        let known = self.known.borrow();
        known.get(&one_form(address)).is_some_and(|it| it.fenced)
    }

    /// Whether the member at `address` is away because its connection has failed.
    pub(crate) fn is_cut_off(&self, address: &str) -> bool {
        let known = self.known.borrow();
        known
            .get(&one_form(address))
            .is_some_and(|it| it.cut_off.get())
    }

    /// Its server was not there when the mirror was started; or the member is in service.
    pub(crate) fn set_cut_off(&self, address: &str, cut_off: bool) {
        if let Some(known) = self.known.borrow().get(&one_form(address)) {
            known.cut_off.set(cut_off);
        }
    }

    /// Waits until nobody else brings the member at `address` in.
    pub(crate) async fn turn(&self, ring: &Rc<Ring>, address: &str) -> Turn {
        let address = one_form(address);
        while !self.turns.borrow_mut().insert(address.clone()) {
            let soon = ring::now() + Duration::from_millis(10);
            ring.sleep_until(soon).await;
        }
        Turn(Rc::clone(&self.turns), address)
    }

    /// What to tell when a connection to `address` has failed.
    pub(super) fn cut_off(&self, address: &str) -> Rc<Cell<bool>> {
        let known = self.known.borrow();
        let cut_off = known.get(address).map(|it| Rc::clone(&it.cut_off));
        cut_off.unwrap_or_default()
    }

    /// Cuts the connections to `address` that are waiting for answers, and says whether nothing
    /// is outstanding on any now. Only for members that are out of service.
    pub(crate) async fn sever(&self, ring: &Rc<Ring>, address: &str) -> bool {
        let (links, address) = (self.alive(), one_form(address));
        let links: Vec<_> = links.iter().filter(|it| it.address() == address).collect();
        let owing = || links.iter().any(|link| link.in_flight() > 0);
        for link in links.iter().filter(|link| link.in_flight() > 0) {
            link.end("the operator lets go of it");
        }
        until(ring, SEVER_PATIENCE, || !owing()).await;
        !links.is_empty() && !owing()
    }

    /// Ends all sessions; returns when the servers have closed them. The kernel would close the
    /// sockets of a daemon that ends only some time after it, and who starts the mirror elsewhere
    /// then would be told that it is in use.
    pub(crate) async fn leave(&self, ring: &Rc<Ring>) {
        let links = self.alive();
        for link in &links {
            link.leave();
        }
        let closed = || links.iter().all(|link| link.is_closed());
        until(ring, LEAVE_PATIENCE, closed).await;
    }

    fn alive(&self) -> Vec<Rc<Link<RingNet>>> {
        let links = self.links.borrow();
        links.iter().filter_map(Weak::upgrade).collect()
    }
}

/// Waits until something is so, or for `patience`.
async fn until(ring: &Rc<Ring>, patience: Duration, is_so: impl Fn() -> bool) {
    let give_up = ring::now() + patience;
    while !is_so() && ring::now() < give_up {
        let soon = ring::now() + Duration::from_millis(1);
        ring.sleep_until(soon).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_known_in_all_its_forms() {
        let peers = Peers::default();
        let given = peers.claimant("nbd://host:10809/m", false);
        assert_eq!(peers.claimant("nbd://host/m", true).owner, given.owner);
        assert_ne!(peers.claimant("nbd://host/n", false).owner, given.owner);
    }
}
