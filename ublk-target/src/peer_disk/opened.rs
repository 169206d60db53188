//! Connecting to an export, and what there is to know before it is used.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use mirror::control::ErrorKind;
use mirror::superblock::{COPY_A_OFFSET, COPY_B_OFFSET, COPY_BYTES, LastStop, Loaded, Superblock};
use peer::blocking::CONNECT_PATIENCE;
use peer::claim::Fence;
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

/// Why what the last session has sent to a disk may still be on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unfinished {
    /// Its server could not be told to end it.
    Unfenced,
    /// It was served by another server, or by this one before it was restarted.
    OtherServer,
    /// What the superblock says of it cannot be read.
    Unreadable,
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

/// What comes of an attempt to go on where a connection broke.
pub(super) enum Reopened {
    /// Another one is up, and can.
    Up(OpenedPeer),
    /// It may be another time.
    NotNow(String),
    /// The server is not to be found this way.
    Nobody(String),
    /// No connection can.
    Never(String),
}

impl Reopened {
    /// Of what was connected to, and what was asked to go on with.
    pub(super) fn by(opened: Result<OpenedPeer, ConnectError>, wanted: Fence) -> Self {
        match opened {
            Ok(opened) => match opened.fence {
                Some(fence) if fence == wanted => Self::Up(opened),
                other => Self::unless_it_is(other, wanted).unwrap_or_else(|| {
                    let why = "another client had the right to write, or a flush failed";
                    Self::Never(why.to_owned())
                }),
            },
            Err(error) if error.is_the_networks() => Self::NotNow(error.to_string()),
            Err(error) => match error.kind() {
                // A claim that is refused.
                ErrorKind::Refused | ErrorKind::Busy => Self::Never(error.to_string()),
                _ => Self::Nobody(error.to_string()),
            },
        }
    }

    /// What it means when the server that answers is not the one that is looked for.
    fn unless_it_is(met: Option<Fence>, wanted: Fence) -> Option<Self> {
        match met {
            Some(met) if met.instance == wanted.instance => None,
            Some(_) => Some(Self::Nobody("its server was started anew".to_owned())),
            None => Some(Self::Nobody(
                "there is a server that knows no claims".to_owned(),
            )),
        }
    }
}

/// A way to the server of a connection. Both may block.
#[derive(Clone)]
pub(super) struct Way {
    /// Whether the server answers on it: a disk may be all that is slow.
    pub(super) answers: Arc<dyn Fn() -> bool + Send + Sync>,
    /// Goes on where a connection broke.
    pub(super) reopen: Arc<dyn Fn() -> Reopened + Send + Sync>,
}

impl Way {
    /// Through this address, in the name of the same owner; connecting may take `patience`. What
    /// another server exports is not claimed.
    pub(super) fn through(
        address: &Address,
        owner: u128,
        wanted: Fence,
        patience: Duration,
    ) -> Self {
        let there = address.clone();
        let asked = there.clone();
        let ask = move || match Client::ask(&there, patience) {
            Ok(asked) => Reopened::unless_it_is(asked.fence(), wanted),
            Err(error) if error.is_the_networks() => Some(Reopened::NotNow(error.to_string())),
            Err(error) => Some(Reopened::Nobody(error.to_string())),
        };
        let address = address.clone();
        Self {
            answers: Arc::new(move || match Client::ask(&asked, patience) {
                Ok(asked) => Reopened::unless_it_is(asked.fence(), wanted).is_none(),
                // Then nobody was asked.
                Err(error) => error.is_our_own(),
            }),
            reopen: Arc::new(move || {
                if let Some(other) = ask() {
                    return other;
                }
                // It decides when its disk has answered.
                let resumed = Client::resume(&address, owner, wanted.turn, CONNECT_PATIENCE);
                // What lies on the disk is known, and reading it might take long.
                Reopened::by(resumed.and_then(|it| OpenedPeer::of(it, None)), wanted)
            }),
        }
    }
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
        let unfinished = match Superblock::load(&copies[0], &copies[1]) {
            Ok(Loaded { superblock, .. })
                if superblock.last_stop == LastStop::Clean && !readable =>
            {
                Some(Unfinished::Unreadable)
            }
            Ok(Loaded { superblock, .. }) => Unfinished::by(
                superblock.last_stop == LastStop::Clean,
                superblock.server_instance,
                fence.map(|it| it.instance),
            ),
            Err(_) => (!readable).then_some(Unfinished::Unreadable),
        };
        Self::of(client, unfinished)
    }

    fn of(client: Client, unfinished: Option<Unfinished>) -> Result<Self, ConnectError> {
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
