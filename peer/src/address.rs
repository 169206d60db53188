//! Addresses of exports, as people write them and as a slot record keeps them.
//!
//! | address | means |
//! |---|---|
//! | `nbd://HOST[:PORT]/EXPORT` | TCP; port 10809 unless given; HOST may be `[IPv6]` |
//! | `nbds://HOST[:PORT]/EXPORT[?tls-certificates=/FOLDER]` | the same with TLS ([`crate::tls`]) |
//! | `nbd+unix:///EXPORT?socket=/PATH` | a unix socket on this machine |
//!
//! EXPORT may be empty (the server's default export). Bytes that would be mistaken for a part of
//! the address are written as `%XX`. An address is printed in one form only, so that two texts
//! that mean the same are the same once read and printed.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::tls::FOLDER;

/// The port of NBD.
pub const PORT: u16 = 10809;
/// Longest path of a unix socket, by the system.
const SOCKET_BYTES_MAX: usize = 107;
/// Longest name of an export, by the protocol.
const EXPORT_BYTES_MAX: usize = 4096;

/// Whether a member's path is an address rather than a path on this machine.
#[must_use]
pub fn is_address(path: &str) -> bool {
    path.split_once("://")
        .is_some_and(|(scheme, _)| scheme.starts_with("nbd"))
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    /// Over TCP.
    Tcp {
        /// A name or an address; an IPv6 address without its brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// On a unix socket.
    Unix {
        /// Absolute.
        socket: PathBuf,
    },
}

/// An export's address.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address {
    /// Where the server listens.
    pub place: Place,
    /// The export's name; empty for the server's default.
    pub export: String,
    /// With TLS, and the folder of its certificates; only over TCP.
    pub tls: Option<PathBuf>,
}

/// Why a text is no address; a sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// TLS was asked for within this machine.
    #[error("{0} asks for TLS on a unix socket, which nobody can listen in on: write nbd+unix://")]
    Tls(String),
    /// A scheme that is not known.
    #[error(
        "{0} is no address of a peer: write nbd://HOST/EXPORT, nbds://HOST/EXPORT (with TLS) or \
         nbd+unix:///EXPORT?socket=PATH"
    )]
    Scheme(String),
    /// A part that makes no sense.
    #[error("{address} is no address: {what}")]
    Part {
        /// The text.
        address: String,
        /// What is wrong with it.
        what: &'static str,
    },
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let part = |what| AddressError::Part {
            address: text.to_owned(),
            what,
        };
        let (scheme, rest) = text
            .split_once("://")
            .ok_or_else(|| AddressError::Scheme(text.to_owned()))?;
        match scheme {
            "nbd" => tcp(rest, false).map_err(part),
            "nbds" => tcp(rest, true).map_err(part),
            "nbd+unix" => unix(rest).map_err(part),
            "nbds+unix" => Err(AddressError::Tls(text.to_owned())),
            _ => Err(AddressError::Scheme(text.to_owned())),
        }
    }
}

fn tcp(rest: &str, tls: bool) -> Result<Address, &'static str> {
    let (rest, query) = match rest.split_once('?') {
        Some((rest, query)) => (rest, Some(query)),
        None => (rest, None),
    };
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    if authority.contains('@') {
        return Err("NBD knows no user names");
    }
    let tls = match (tls, query) {
        (false, None) => None,
        (false, Some(_)) => return Err("an address over TCP without TLS has no '?'"),
        (true, None) => Some(PathBuf::from(FOLDER)),
        (true, Some(query)) => Some(folder(query)?),
    };
    let (host, port) = host_and_port(authority)?;
    Ok(Address {
        place: Place::Tcp { host, port },
        export: export(path)?,
        tls,
    })
}

/// The folder of certificates that a query names.
fn folder(query: &str) -> Result<PathBuf, &'static str> {
    let folder = query
        .strip_prefix("tls-certificates=")
        .filter(|folder| !folder.contains('&'))
        .ok_or("after '?' comes tls-certificates=/FOLDER and nothing else")?;
    let folder = decoded(folder)?;
    if !folder.starts_with('/') {
        return Err("the folder of its certificates does not begin with '/'");
    }
    Ok(folder.into())
}

/// Splits `HOST`, `HOST:PORT`, `[IPv6]` or `[IPv6]:PORT`.
fn host_and_port(authority: &str) -> Result<(String, u16), &'static str> {
    let (host, port) = if let Some(bracketed) = authority.strip_prefix('[') {
        let (host, rest) = bracketed
            .split_once(']')
            .ok_or("the '[' of its host is not closed")?;
        if host.parse::<std::net::Ipv6Addr>().is_err() {
            return Err("what stands between '[' and ']' is no IPv6 address");
        }
        let port = match rest {
            "" => None,
            rest => Some(
                rest.strip_prefix(':')
                    .ok_or("after ']' comes ':PORT' or '/'")?,
            ),
        };
        (host, port)
    } else {
        match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        }
    };
    let in_name = |c: char| c.is_ascii_alphanumeric() || "-._:".contains(c);
    if host.is_empty() || !host.chars().all(in_name) {
        return Err("its host is missing or has characters that no host's name has");
    }
    let port = match port {
        None => PORT,
        Some(port) => port
            .parse()
            .ok()
            .filter(|port| *port != 0)
            .ok_or("its port is no number from 1 to 65535")?,
    };
    Ok((host.to_ascii_lowercase(), port))
}

fn unix(rest: &str) -> Result<Address, &'static str> {
    let rest = rest
        .strip_prefix('/')
        .ok_or("a unix socket has no host: write nbd+unix:///EXPORT?socket=/PATH")?;
    let (path, query) = rest
        .split_once('?')
        .ok_or("it names no socket: write nbd+unix:///EXPORT?socket=/PATH")?;
    let socket = query
        .strip_prefix("socket=")
        .filter(|socket| !socket.contains('&'))
        .ok_or("after '?' comes socket=/PATH and nothing else")?;
    let socket = decoded(socket)?;
    if !socket.starts_with('/') {
        return Err("the path of its socket does not begin with '/'");
    }
    if socket.len() > SOCKET_BYTES_MAX {
        return Err("the path of its socket is longer than the 107 bytes that the system allows");
    }
    Ok(Address {
        place: Place::Unix {
            socket: socket.into(),
        },
        export: export(path)?,
        tls: None,
    })
}

fn export(path: &str) -> Result<String, &'static str> {
    let name = decoded(path)?;
    if name.len() > EXPORT_BYTES_MAX {
        return Err("the name of its export is longer than the 4096 bytes that NBD allows");
    }
    Ok(name)
}

/// Replaces `%XX` by what it stands for.
fn decoded(text: &str) -> Result<String, &'static str> {
    const WRONG: &str = "a '%' is not followed by two hexadecimal digits";
    if text.contains('#') {
        return Err("it has a '#'; within a name write it as %23");
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let (digits, after) = rest.split_at_checked(2).ok_or(WRONG)?;
        let digit = |at: usize| char::from(digits[at]).to_digit(16);
        let (Some(high), Some(low)) = (digit(0), digit(1)) else {
            return Err(WRONG);
        };
        bytes.push(u8::try_from(high * 16 + low).map_err(|_| WRONG)?);
        rest = after;
    }
    let text = String::from_utf8(bytes).map_err(|_| "it is not UTF-8")?;
    if text.chars().any(char::is_control) {
        return Err("it has control characters");
    }
    Ok(text)
}

/// Writes text with everything as `%XX` that is not plain within an address.
struct Encoded<'a>(&'a str);

impl fmt::Display for Encoded<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0.bytes() {
            if byte.is_ascii_alphanumeric() || b"-._~/:@,+=".contains(&byte) {
                write!(f, "{}", char::from(byte))?;
            } else {
                write!(f, "%{byte:02X}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let export = Encoded(&self.export);
        match &self.place {
            Place::Tcp { host, port } => {
                let (open, close) = if host.contains(':') {
                    ("[", "]")
                } else {
                    ("", "")
                };
                let scheme = if self.tls.is_some() { "nbds" } else { "nbd" };
                write!(f, "{scheme}://{open}{host}{close}")?;
                if *port != PORT {
                    write!(f, ":{port}")?;
                }
                write!(f, "/{export}")?;
                match &self.tls {
                    Some(folder) if folder.as_os_str() != FOLDER => {
                        let folder = folder.to_string_lossy();
                        write!(f, "?tls-certificates={}", Encoded(&folder))
                    }
                    _ => Ok(()),
                }
            }
            Place::Unix { socket } => {
                let socket = socket.to_string_lossy();
                write!(f, "nbd+unix:///{export}?socket={}", Encoded(&socket))
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn addresses_are_read_and_printed_in_one_form() {
        for (text, want) in [
            ("nbd://host/m", "nbd://host/m"),
            ("nbd://Host:10809/m", "nbd://host/m"),
            ("nbd://host", "nbd://host/"),
            ("nbd://10.0.0.1:99/a/b", "nbd://10.0.0.1:99/a/b"),
            ("nbd://[fe80::1]:99/", "nbd://[fe80::1]:99/"),
            ("nbd://[::1]/x%20y", "nbd://[::1]/x%20y"),
            ("nbds://Host:10809/m", "nbds://host/m"),
            (
                "nbds://h?tls-certificates=/etc/ublk-mirror/tls",
                "nbds://h/",
            ),
            (
                "nbds://h:1/m?tls-certificates=/a%20b",
                "nbds://h:1/m?tls-certificates=/a%20b",
            ),
            ("nbd+unix:///?socket=/run/s", "nbd+unix:///?socket=/run/s"),
            (
                "nbd+unix:///m?socket=/run/a%3fb",
                "nbd+unix:///m?socket=/run/a%3Fb",
            ),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address.to_string(), want);
            assert_eq!(want.parse(), Ok(address));
        }
        let address: Address = "nbd://h:1/e".parse().unwrap();
        let host = "h".to_owned();
        assert_eq!(address.place, Place::Tcp { host, port: 1 });
    }

    #[test]
    fn what_is_no_address_is_refused_by_name() {
        for (text, why) in [
            ("nbds://host/m?socket=/s", "tls-certificates=/FOLDER"),
            ("nbds://host/m?tls-certificates=/a&b", "nothing else"),
            ("nbds://host/m?tls-certificates=a", "begin with '/'"),
            ("nbds+unix:///m?socket=/s", "TLS"),
            ("nbd+vsock://1/m", "nbd://HOST/EXPORT"),
            ("nbd:/host/m", "nbd://HOST/EXPORT"),
            ("nbd:///m", "host"),
            ("nbd://a b/m", "host"),
            ("nbd://me@host/m", "user names"),
            ("nbd://host:0/m", "port"),
            ("nbd://host:65536/m", "port"),
            ("nbd://host:/m", "port"),
            ("nbd://[::1/m", "not closed"),
            ("nbd://[zz]/m", "IPv6"),
            ("nbd://[::1]x/m", "':PORT'"),
            ("nbd://host/m?socket=/s", "'?'"),
            ("nbd://host/m#f", "'#'"),
            ("nbd://host/%4", "'%'"),
            ("nbd://host/%zz", "'%'"),
            ("nbd://host/%+1", "'%'"),
            ("nbd://host/%00", "control"),
            ("nbd://host/%ff", "UTF-8"),
            ("nbd+unix://host/m?socket=/s", "no host"),
            ("nbd+unix:///m", "no socket"),
            ("nbd+unix:///m?sock=/s", "socket=/PATH"),
            ("nbd+unix:///m?socket=/s&x=1", "nothing else"),
            ("nbd+unix:///m?socket=s", "begin with '/'"),
            (&format!("nbd+unix:///m?socket=/{}", "s".repeat(107)), "107"),
            (&format!("nbd://h/{}", "e".repeat(4097)), "4096"),
        ] {
            let message = text.parse::<Address>().unwrap_err().to_string();
            assert!(message.contains(why), "{text}: {message}");
            assert!(message.contains(text), "{text}: {message}");
            assert_eq!(is_address(text), text.contains("://"), "{text}");
        }
        for path in ["/dev/sdb", "nbd.img", "./nbd://x", "http://x"] {
            assert!(!is_address(path), "{path}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(export in "\\PC{0,40}", socket in "/\\PC{0,20}",
                                        host in "[a-z0-9][a-z0-9.-]{0,20}", port in 1u16..) {
            let tcp = Place::Tcp { host, port };
            let unix = Place::Unix { socket: socket.clone().into() };
            for (place, tls) in [(tcp.clone(), None), (tcp, Some(socket.into())), (unix, None)] {
                let address = Address { place, export: export.clone(), tls };
                prop_assert_eq!(address.to_string().parse(), Ok(address));
            }
        }

        #[test]
        fn any_text_is_read_or_refused(text in "nbds?(\\+unix)?://\\PC{0,60}") {
            if let Ok(address) = text.parse::<Address>() {
                prop_assert_eq!(address.to_string().parse(), Ok(address));
            }
        }
    }
}
