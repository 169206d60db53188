//! Connecting to an export, and what there is to know before it is used.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use mirror::superblock::{COPY_A_OFFSET, COPY_B_OFFSET, COPY_BYTES, LastStop, Loaded, Superblock};
use peer::claim::Fence;
use peer::{Address, Claimant, Client, ConnectError, Export};

/// A connection that is not bound to a ring yet. Connecting may block, so that it happens on
/// any thread.
#[derive(Debug)]
pub(crate) struct OpenedPeer {
    pub(super) fd: OwnedFd,
    pub(super) export: Export,
    pub(super) address: String,
    /// Of a server that admits one writer.
    pub(super) fence: Option<Fence>,
    pub(super) reopen: Reopen,
    pub(super) unfinished: Option<Unfinished>,
}

/// Why what the last session has sent to a disk may still be on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unfinished {
    /// Its server could not be told to end it.
    Unfenced,
    /// It was served by another server, or by this one before it was restarted.
    OtherServer,
}

impl Unfinished {
    /// By whether the session ended cleanly, and the instances of the server that served it and of
    /// the one that is met.
    fn by(clean: bool, served: Option<u128>, met: Option<u128>) -> Option<Self> {
        match served {
            _ if clean => None,
            None => Some(Self::Unfenced),
            Some(_) if served == met => None,
            Some(_) => Some(Self::OtherServer),
        }
    }
}

/// Opens the same export once more, in the name of the same owner. May block.
#[derive(Clone)]
pub(super) struct Reopen(
    pub(super) Arc<dyn Fn() -> Result<OpenedPeer, ConnectError> + Send + Sync>,
);

impl Reopen {
    fn of(address: &Address, owner: u128) -> Self {
        let address = address.clone();
        // Who has taken the export over meanwhile keeps it.
        let claimant = Claimant {
            owner,
            take_over: false,
        };
        Self(Arc::new(move || OpenedPeer::open(&address, claimant)))
    }
}

impl std::fmt::Debug for Reopen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reopen")
    }
}

impl OpenedPeer {
    /// Connects to an export, as its one writer where that can be had, and looks at its
    /// superblock.
    pub(crate) fn open(address: &Address, claimant: Claimant) -> Result<Self, ConnectError> {
        let mut client = Client::claim(address, claimant)?;
        let fence = client.fence();
        let broken = |source: io::Error| ConnectError::Unreachable {
            address: address.clone(),
            source,
        };
        let mut copies = [[0; COPY_BYTES]; 2];
        for (copy, offset) in copies.iter_mut().zip([COPY_A_OFFSET, COPY_B_OFFSET]) {
            // One that cannot be read, or is not there, is the engine's to judge.
            let read = client.read_at(copy, offset);
            tracing::debug!("{address}: superblock at byte {offset}: {read:?}");
        }
        let loaded = Superblock::load(&copies[0], &copies[1]);
        let unfinished = loaded.ok().and_then(|Loaded { superblock, .. }| {
            let clean = superblock.last_stop == LastStop::Clean;
            Unfinished::by(
                clean,
                superblock.server_instance,
                fence.map(|it| it.instance),
            )
        });
        let (fd, export) = client.into_parts().map_err(broken)?;
        Ok(Self {
            fd,
            export,
            address: address.to_string(),
            fence,
            reopen: Reopen::of(address, claimant.owner),
            unfinished,
        })
    }

    /// Why it must not be used without the operator's word (R13), if so.
    pub(crate) fn unfinished_session(&self) -> Option<String> {
        let why = match self.unfinished? {
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

#[cfg(test)]
mod tests {
    use super::Unfinished::{self, OtherServer, Unfenced};

    #[test]
    fn only_the_server_of_a_session_knows_that_it_is_over() {
        for (clean, served, met, want) in [
            (true, None, None, None),
            (true, Some(1), Some(2), None),
            (false, None, None, Some(Unfenced)),
            (false, None, Some(1), Some(Unfenced)),
            (false, Some(1), Some(1), None),
            (false, Some(1), Some(2), Some(OtherServer)),
            (false, Some(1), None, Some(OtherServer)),
        ] {
            let said = Unfinished::by(clean, served, met);
            assert_eq!(said, want, "clean {clean}, served {served:?}, met {met:?}");
        }
    }
}
