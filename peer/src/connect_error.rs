//! Why there is no connection to an export, and what that means to who wanted one.

use std::io;

use mirror::control::ErrorKind;

use crate::address::Address;
use crate::export::Unusable;
use crate::handshake::HandshakeError;
use crate::tls::TlsError;

/// Why there is no connection to an export; a sentence.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody is there.
    #[error(
        "{address} cannot be reached: {}; check the address, the server and the network",
        words(source)
    )]
    Unreachable {
        /// The export.
        address: Address,
        /// The system's answer.
        source: io::Error,
    },
    /// Nobody says anything.
    #[error(
        "{address} did not answer within {seconds} s; the network is down, or its server hangs, or \
         serves one client at a time and has one"
    )]
    NoAnswer {
        /// The export.
        address: Address,
        /// How long was waited.
        seconds: u64,
    },
    /// The handshake failed.
    #[error("{address} cannot be used: {source}")]
    Handshake {
        /// The export.
        address: Address,
        /// Why.
        source: HandshakeError,
    },
    /// There is no TLS.
    #[error("{address} cannot be used: {source}")]
    Tls {
        /// The export.
        address: Address,
        /// Why.
        source: Box<TlsError>,
    },
    /// The export cannot hold a member.
    #[error("{address} cannot hold a member: {source}")]
    Unusable {
        /// The export.
        address: Address,
        /// Why.
        source: Unusable,
    },
}

impl ConnectError {
    /// Whether the server may be there all the same, and only the network in its way, or whoever is
    /// on the way: before TLS is there, and until it is, any of them can say anything.
    #[must_use]
    pub fn is_the_networks(&self) -> bool {
        use HandshakeError::{NoTls, Nonsense, NotNbd, TooOld};
        use io::ErrorKind::{ConnectionRefused, NotFound, PermissionDenied};
        match self {
            Self::Unreachable { source, .. } => !matches!(
                source.kind(),
                ConnectionRefused | NotFound | PermissionDenied
            ),
            Self::NoAnswer { .. } | Self::Tls { .. } => true,
            Self::Handshake { address, source } => {
                let from_anybody = matches!(source, NotNbd | TooOld | NoTls(_) | Nonsense(_));
                address.tls.is_some() && from_anybody
            }
            Self::Unusable { .. } => false,
        }
    }

    /// Class of the failure.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Unreachable { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                ErrorKind::NotFound
            }
            Self::Unreachable { .. } | Self::Tls { .. } => ErrorKind::Failed,
            Self::NoAnswer { .. } => ErrorKind::Busy,
            Self::Handshake { source, .. } => match source {
                HandshakeError::UnknownExport(_) => ErrorKind::NotFound,
                HandshakeError::ShuttingDown(_) | HandshakeError::InUse(_) => ErrorKind::Busy,
                HandshakeError::ClaimRefused(_) => ErrorKind::Refused,
                _ => ErrorKind::Failed,
            },
            Self::Unusable { .. } => ErrorKind::Refused,
        }
    }

    /// Whether the export is not there, or not for this host at present, rather than there and of
    /// no use. One whose server refuses a claim for what is on its disk (an older or another
    /// line, a format of a newer version) is there.
    #[must_use]
    pub fn is_absence(&self) -> bool {
        let refused = |source: &HandshakeError| matches!(source, HandshakeError::ClaimRefused(_));
        match self {
            Self::Unusable { .. } => false,
            Self::Handshake { source, .. } => !refused(source),
            _ => true,
        }
    }

    /// Whether another session writes, which may be a dead one that its server has not noticed.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        let in_use = |source: &HandshakeError| matches!(source, HandshakeError::InUse(_));
        matches!(self, Self::Handshake { source, .. } if in_use(source))
    }

    /// Whether nothing was asked of the network, for files of this host's own that are no use.
    #[must_use]
    pub fn is_our_own(&self) -> bool {
        use TlsError::{File, Files, Name};
        matches!(self, Self::Tls { source, .. } if matches!(**source, File { .. } | Files { .. } | Name(_)))
    }

    /// Whether whoever accepted the connection has ended it. With TLS only a farewell counts: anybody
    /// on the way can end a connection.
    pub(crate) fn is_hang_up(&self) -> bool {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        let Self::Unreachable { address, source } = self else {
            return false;
        };
        let ended = [UnexpectedEof, BrokenPipe, ConnectionReset];
        let ended = if address.tls.is_some() {
            &ended[..1]
        } else {
            &ended[..]
        };
        ended.contains(&source.kind())
    }
}

/// The system's words for an error, without the number that Rust appends.
fn words(error: &io::Error) -> String {
    let mut text = error.to_string();
    text.truncate(text.rfind(" (os error").unwrap_or(text.len()));
    text
}
