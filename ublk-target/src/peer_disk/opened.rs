//! Connecting to an export, and what there is to know before it is used.

use std::io;
use std::os::fd::OwnedFd;

use mirror::superblock::{COPY_A_OFFSET, COPY_B_OFFSET, COPY_BYTES, Superblock};
use peer::blocking::CONNECT_PATIENCE;
use peer::claim::Fence;
use peer::link::Unfinished;
use peer::tls::Tls;
use peer::{Address, Claimant, Client, ConnectError, Export};

/// A connection that is not bound to a ring yet. Connecting may block, so that it happens on
/// any thread.
#[derive(Debug)]
pub(crate) struct OpenedPeer {
    pub(super) fd: OwnedFd,
    pub(super) tls: Option<Tls>,
    pub(super) export: Export,
    pub(super) address: String,
    /// Of a server that admits one writer.
    pub(super) fence: Option<Fence>,
    pub(super) unfinished: Option<Unfinished>,
}

impl OpenedPeer {
    /// Connects to an export, as its one writer where that can be had, and looks at its
    /// superblock.
    pub(crate) fn open(address: &Address, claimant: Claimant) -> Result<Self, ConnectError> {
        let mut client = Client::claim(address, claimant)?;
        let fence = client.fence();
        let mut copies = [[0; COPY_BYTES]; 2];
        let mut readable = true;
        for (copy, offset) in copies.iter_mut().zip([COPY_A_OFFSET, COPY_B_OFFSET]) {
            // One that cannot be read, or is not there, is the engine's to judge.
            let read = client.read_at(copy, offset);
            readable &= read.is_ok();
            tracing::debug!("{address}: superblock at byte {offset}: {read:?}");
        }
        let unfinished = Unfinished::of(&copies, readable, fence);
        Self::of(client, unfinished)
    }

    pub(super) fn of(client: Client, unfinished: Option<Unfinished>) -> Result<Self, ConnectError> {
        let (address, fence) = (client.address().clone(), client.fence());
        let broken = |source: io::Error| ConnectError::Unreachable {
            address: address.clone(),
            source,
        };
        let (fd, tls, export) = client.into_parts().map_err(broken)?;
        Ok(Self {
            fd,
            tls,
            export,
            address: address.to_string(),
            fence,
            unfinished,
        })
    }

    /// What the member at `address` says of itself, without a claim: nobody's session ends by it.
    pub(crate) fn look(address: &Address) -> Result<Superblock, String> {
        let mut client = Client::look(address, CONNECT_PATIENCE).map_err(|e| e.to_string())?;
        let mut copies = [[0; COPY_BYTES]; 2];
        for (copy, offset) in copies.iter_mut().zip([COPY_A_OFFSET, COPY_B_OFFSET]) {
            let read = client.read_at(copy, offset);
            read.map_err(|e| e.to_string())?;
        }
        let loaded = Superblock::load(&copies[0], &copies[1]).map_err(|e| e.to_string())?;
        Ok(loaded.superblock)
    }

    /// Of a server that admits one writer.
    pub(super) fn fence(&self) -> Option<Fence> {
        self.fence
    }

    /// Whether its server ends older sessions before it admits a new one.
    pub(crate) fn is_fenced(&self) -> bool {
        self.fence.is_some()
    }

    /// Why it must not be used without the operator's word (R13), if so.
    pub(crate) fn unfinished_session(&self) -> Option<String> {
        let why = match self.unfinished? {
            Unfinished::Unreadable => {
                return Some(format!(
                    "{} is left out: whether the last session with it ended cleanly cannot be \
                     read; when it surely has ended, start with --peer-sessions-over",
                    self.address
                ));
            }
            Unfinished::Unfenced => "its server may still be writing what that brought",
            Unfinished::OtherServer => {
                "this server was started since, while the one before it may still be writing what \
                 that brought"
            }
        };
        Some(format!(
            "{} is left out: the last session with it did not end cleanly, and {why}; when that \
             server has surely ended, or the session, start with --peer-sessions-over",
            self.address
        ))
    }
}
