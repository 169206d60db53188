//! Whether a connection may be used, and whether another one may go on where it broke.

use mirror::control::ErrorKind;
use mirror::superblock::{COPY_BYTES, LastStop, Loaded, Superblock};

use crate::claim::Fence;
use crate::connect_error::ConnectError;
use crate::export::Export;

/// A connection in transmission, with what its server has said.
#[derive(Debug)]
pub struct Opened<W> {
    /// The connection.
    pub wire: W,
    /// What is exported.
    pub export: Export,
    /// Where it is.
    pub address: String,
    /// Of a server that admits one writer.
    pub fence: Option<Fence>,
}

/// What comes of an attempt to go on where a connection broke.
#[derive(Debug)]
pub enum Reopened<T> {
    /// Another one is up, and can.
    Up(T),
    /// It may be another time.
    NotNow(String),
    /// The server is not to be found this way.
    Nobody(String),
    /// No connection can.
    Never(String),
}

impl<T> Reopened<T> {
    /// Goes on if the server of `wanted` is met: what another server exports is not claimed. `ask`
    /// asks a server without a claim; `resume` claims in the name of the same owner. `fence` is what
    /// the server said to that.
    pub async fn through(
        wanted: Fence,
        ask: impl AsyncFnOnce() -> Result<Option<Fence>, ConnectError>,
        resume: impl AsyncFnOnce() -> Result<T, ConnectError>,
        fence: impl FnOnce(&T) -> Option<Fence>,
    ) -> Self {
        match ask().await {
            Ok(met) => {
                if let Some(other) = Self::unless_it_is(met, wanted) {
                    return other;
                }
            }
            Err(error) if error.is_the_networks() => return Self::NotNow(error.to_string()),
            Err(error) => return Self::Nobody(error.to_string()),
        }
        Self::by(resume().await, fence, wanted)
    }

    /// Of what was connected to, and what was asked to go on with.
    pub fn by(
        opened: Result<T, ConnectError>,
        fence: impl FnOnce(&T) -> Option<Fence>,
        wanted: Fence,
    ) -> Self {
        match opened {
            Ok(opened) => match fence(&opened) {
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

    /// Whether a server that answered a question is the one of `wanted`.
    pub fn is_met(asked: Result<Option<Fence>, ConnectError>, wanted: Fence) -> bool {
        match asked {
            Ok(met) => Self::unless_it_is(met, wanted).is_none(),
            // Then nobody was asked.
            Err(error) => error.is_our_own(),
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

    /// The same with something else that is up.
    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Reopened<U> {
        match self {
            Self::Up(opened) => Reopened::Up(change(opened)),
            Self::NotNow(why) => Reopened::NotNow(why),
            Self::Nobody(why) => Reopened::Nobody(why),
            Self::Never(why) => Reopened::Never(why),
        }
    }
}

/// Why what the last session has sent to a disk may still be on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfinished {
    /// Its server could not be told to end it.
    Unfenced,
    /// It was served by another server, or by this one before it was restarted.
    OtherServer,
    /// What the superblock says of it cannot be read.
    Unreadable,
}

impl Unfinished {
    /// By the copies of a disk's superblock, of which all could be read or not, and by the server
    /// through which they were read.
    #[must_use]
    pub fn of(copies: &[[u8; COPY_BYTES]; 2], readable: bool, met: Option<Fence>) -> Option<Self> {
        match Superblock::load(&copies[0], &copies[1]) {
            Ok(Loaded { superblock, .. })
                if superblock.last_stop == LastStop::Clean && !readable =>
            {
                Some(Self::Unreadable)
            }
            Ok(Loaded { superblock, .. }) => Self::by(
                superblock.last_stop == LastStop::Clean,
                superblock.server_instance,
                met.map(|it| it.instance),
            ),
            Err(_) => (!readable).then_some(Self::Unreadable),
        }
    }

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
