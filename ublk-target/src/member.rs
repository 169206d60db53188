//! A member's device, whatever it is: a disk in this machine, or an export behind the network.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use mirror::control::ErrorKind;
use mirror::host::{Disk, DiskRequest, Errno, Geometry, SumsOp};
use peer::{Address, Claimant};

use crate::disk::{self, DiskOp, LocalDisk, OpenedDisk};
use crate::peer_disk::{OpenedPeer, PeerDisk, PeerOp, Peers};
use crate::ring::Ring;
use crate::sys::IoBuffer;

/// Why a member could not be opened; a sentence.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    /// A disk in this machine.
    #[error(transparent)]
    Local(#[from] disk::OpenError),
    /// What looks like an address is none.
    #[error(transparent)]
    Address(#[from] peer::AddressError),
    /// An export.
    #[error(transparent)]
    Peer(#[from] peer::ConnectError),
}

impl OpenError {
    /// Class of the failure for the control protocol.
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Local(error) => error.kind(),
            Self::Address(_) => ErrorKind::Usage,
            Self::Peer(error) => error.kind(),
        }
    }

    /// Whether the device is not there, rather than there and of no use.
    pub(crate) fn is_absence(&self) -> bool {
        use disk::OpenError::{Failed, Missing};
        match self {
            Self::Local(error) => matches!(error, Missing { .. } | Failed { .. }),
            Self::Address(_) => false,
            Self::Peer(error) => error.is_absence(),
        }
    }

    /// Whether trying again a little later may help.
    pub(crate) fn may_pass(&self) -> bool {
        match self {
            Self::Local(error) => matches!(error, disk::OpenError::Busy { .. }),
            Self::Address(_) => false,
            Self::Peer(error) => error.is_in_use(),
        }
    }
}

/// An opened device that is not bound to a ring yet.
#[derive(Debug)]
pub(crate) enum Opened {
    /// In this machine.
    Local(OpenedDisk),
    /// Behind the network.
    Peer(OpenedPeer),
}

/// Opens the member at `path`, which may be an address; `claimant` matters to those. May block.
pub(crate) fn open(path: &str, claimant: Claimant) -> Result<Opened, OpenError> {
    if !peer::is_address(path) {
        return Ok(Opened::Local(disk::open(path)?));
    }
    let address: Address = path.parse()?;
    Ok(Opened::Peer(OpenedPeer::open(&address, claimant)?))
}

impl Opened {
    /// Why it must not be used without the operator's word (R13), if so.
    pub(crate) fn unfinished_session(&self) -> Option<String> {
        match self {
            Self::Local(_) => None,
            Self::Peer(peer) => peer.unfinished_session(),
        }
    }

    /// Whether it is behind a server that ends older sessions before it admits a new one.
    pub(crate) fn is_fenced(&self) -> bool {
        match self {
            Self::Local(_) => false,
            Self::Peer(peer) => peer.is_fenced(),
        }
    }

    /// Binds it to the ring that does its I/O; `deadline` and `peers` matter to peers.
    pub(crate) fn bind(self, ring: &Rc<Ring>, deadline: Duration, peers: &Peers) -> MemberDisk {
        match self {
            Self::Local(opened) => MemberDisk::Local(LocalDisk::new(ring, opened)),
            Self::Peer(opened) => MemberDisk::Peer(PeerDisk::new(ring, opened, deadline, peers)),
        }
    }
}

/// A member's device.
pub(crate) enum MemberDisk {
    /// In this machine.
    Local(LocalDisk),
    /// Behind the network.
    Peer(PeerDisk),
}

impl Disk for MemberDisk {
    type Buffer = IoBuffer;
    type Op = MemberOp;

    fn submit(&self, request: DiskRequest<IoBuffer>) -> MemberOp {
        match self {
            Self::Local(disk) => MemberOp::Local(disk.submit(request)),
            Self::Peer(disk) => MemberOp::Peer(disk.submit(request)),
        }
    }

    fn submit_barrier(&self, request: DiskRequest<IoBuffer>) -> MemberOp {
        match self {
            Self::Local(disk) => MemberOp::Local(disk.submit_barrier(request)),
            Self::Peer(disk) => MemberOp::Peer(disk.submit_barrier(request)),
        }
    }

    fn in_flight(&self) -> usize {
        match self {
            Self::Local(disk) => disk.in_flight(),
            Self::Peer(disk) => disk.in_flight(),
        }
    }

    fn sums(&self, offset: u64, blocks: usize) -> Option<SumsOp> {
        match self {
            Self::Local(_) => None,
            Self::Peer(disk) => disk.sums(offset, blocks),
        }
    }

    fn geometry(&self) -> Geometry {
        match self {
            Self::Local(disk) => disk.geometry(),
            Self::Peer(disk) => disk.geometry(),
        }
    }
}

/// A running operation on a [`MemberDisk`].
pub(crate) enum MemberOp {
    /// In this machine.
    Local(DiskOp),
    /// Behind the network.
    Peer(PeerOp),
}

impl Future for MemberOp {
    type Output = Result<(), Errno>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Self::Local(op) => Pin::new(op).poll(cx),
            Self::Peer(op) => Pin::new(op).poll(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{DiskOp, MemberOp};

    #[test]
    fn a_local_operation_is_hardly_larger_for_it() {
        // Requests hold one for each slot.
        assert!(size_of::<MemberOp>() <= size_of::<DiskOp>() + size_of::<usize>());
    }
}
