//! `mirrorctl export PATH`: serves a disk of this machine as a peer member.
//!
//! The disk is opened as everything is that is written to: exclusively, and not while anything
//! here uses it. All its I/O goes through that one open file description: what a server that was
//! killed has under way at the disk, its ghosts, keeps the lock until it is over, and an `export`
//! before that says that the disk is in use (R13). It stays in the foreground and ends with SIGTERM or SIGINT, after what is under
//! way. What it promises its clients is in the crate [`export`].

use std::net::SocketAddr;
use std::path::PathBuf;

use export::{Listen, OpenError, Options, ServeError, Unclaimed};
use peer::Address;
use peer::tls::Acceptor;
use serde::Serialize;

use crate::failure::{Exit, Failure};
use crate::medium::{self, Access, Medium};
use crate::output::Notes;
use crate::size::human;
use crate::{Context, output};

/// What `--listen` begins with when it names a unix socket.
const UNIX: &str = "unix:";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A device or an image file
    path: PathBuf,
    /// Where clients connect: an address of this machine, or a unix socket
    #[arg(long, value_name = "ADDR:PORT|unix:PATH")]
    listen: String,
    /// The export's name; clients that ask for no name get it as well
    #[arg(long, default_value = "", hide_default_value = true)]
    name: String,
    /// Nobody may write
    #[arg(long, conflicts_with = "any_writer")]
    read_only: bool,
    /// Clients that know no claims may write: one at a time, the last to begin
    #[arg(long)]
    any_writer: bool,
    /// TLS only, with the certificates in this folder (README, "TLS")
    #[arg(long, value_name = "FOLDER")]
    tls: Option<PathBuf>,
    /// Only clients whose certificate bears this name; may be repeated
    #[arg(long, value_name = "NAME", requires = "tls")]
    tls_client: Vec<String>,
    /// Listen beyond this machine, without encryption or passwords
    #[arg(long, conflicts_with = "tls")]
    plain_text_on_network: bool,
}

/// What `--json` prints when clients can connect. Fields are only ever added.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Document {
    path: String,
    address: String,
    size_bytes: u64,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    let listen = listen(args)?;
    if medium::is_address(&args.path) {
        return Err(medium::needs_the_disk(&args.path));
    }
    if args.name.len() > 256 || args.name.chars().any(char::is_control) {
        return Err(Failure::usage(
            "The name of an export has at most 256 bytes, and no control characters.",
        ));
    }
    let access = if args.read_only {
        Access::Undisturbed
    } else {
        Access::Exclusive
    };
    let medium = Medium::open(&args.path, access)?;
    let Some(held) = medium.file() else {
        return Err(medium::needs_the_disk(&args.path));
    };
    let options = Options {
        name: args.name.clone(),
        unclaimed: if args.any_writer {
            Unclaimed::Write
        } else {
            Unclaimed::Read
        },
        read_only: args.read_only,
        instance: super::random()?,
        tls: tls(args)?,
    };
    let ready = |address: &Address| announce(context, &medium, address);
    let notes = Notes::begin().map_err(|error| {
        Failure::failed(format!("There can be no thread for messages: {error}."))
    })?;
    let served = export::serve(held, &listen, options, ready, notes.taker());
    notes.end();
    served.map_err(|error| failure(args, &error))
}

/// What there is to begin TLS with, and its folder as an address names it.
fn tls(args: &Args) -> Result<Option<(Acceptor, PathBuf)>, Failure> {
    let Some(folder) = &args.tls else {
        return Ok(None);
    };
    let folder = std::path::absolute(folder)
        .map_err(|error| Failure::failed(format!("{} is no folder: {error}.", folder.display())))?;
    let acceptor = Acceptor::new(&folder, &args.tls_client).map_err(|error| {
        Failure::failed(format!(
            "There can be no TLS: {error}. The folder needs ca-cert.pem, server-cert.pem and \
             server-key.pem; scripts/certificates.sh makes them."
        ))
    })?;
    Ok(Some((acceptor, folder)))
}

fn announce(context: &Context, medium: &Medium, address: &Address) {
    let (path, size_bytes) = (medium.path().display(), medium.size_bytes());
    let line = format!("ready: {path} ({}) is {address}", human(size_bytes));
    let document = Document {
        path: path.to_string(),
        address: address.to_string(),
        size_bytes,
    };
    if !context.json || output::json_line(&document).is_err() {
        output::line(&line);
    }
}

fn listen(args: &Args) -> Result<Listen, Failure> {
    if let Some(path) = args.listen.strip_prefix(UNIX) {
        // The system's limit, and one byte for the end.
        if path.is_empty() || path.len() > 107 {
            return Err(Failure::usage(format!(
                "'{path}' is no path of a unix socket: it has 1 to 107 bytes."
            )));
        }
        if args.tls.is_some() {
            return Err(Failure::usage(
                "Nobody can listen in on a unix socket: leave --tls out.",
            ));
        }
        return Ok(Listen::Unix(path.into()));
    }
    let address: SocketAddr = args.listen.parse().map_err(|_| {
        Failure::usage(format!(
            "'{}' is nothing to listen on: write ADDR:PORT with an address of this machine, such \
             as 127.0.0.1:10809, or unix:PATH.",
            args.listen
        ))
    })?;
    if !address.ip().is_loopback() && args.tls.is_none() && !args.plain_text_on_network {
        return Err(Failure::refused(format!(
            "{address} can be reached from other machines: anybody who can connect could read the \
             disk, and write it. Give certificates with --tls FOLDER, or say \
             --plain-text-on-network if that network is yours alone."
        )));
    }
    Ok(Listen::Tcp(address))
}

fn failure(args: &Args, error: &ServeError) -> Failure {
    let exit = match error {
        ServeError::Open(OpenError::Failed(error)) => Exit::of_io(error),
        ServeError::Open(_) => Exit::Refused,
        ServeError::Listen { source, .. } if source.kind() == std::io::ErrorKind::AddrInUse => {
            Exit::Busy
        }
        ServeError::Listen { .. } | ServeError::Ring(_) | ServeError::LastFlush(_) => Exit::Failed,
    };
    let path = args.path.display();
    Failure::new(exit, format!("{path} cannot be exported: {error}."))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn args(listen: &str, plain_text_on_network: bool) -> Args {
        Args {
            path: "disk".into(),
            listen: listen.to_owned(),
            name: String::new(),
            read_only: false,
            any_writer: false,
            tls: None,
            tls_client: Vec::new(),
            plain_text_on_network,
        }
    }

    #[test]
    fn nothing_leaves_this_machine_unencrypted_unasked() {
        for (text, beyond) in [
            ("127.0.0.1:10809", false),
            ("[::1]:10809", false),
            ("0.0.0.0:10809", true),
            ("192.0.2.7:10809", true),
            ("[::]:10809", true),
        ] {
            let want = Listen::Tcp(text.parse().unwrap());
            assert_eq!(listen(&args(text, true)), Ok(want.clone()), "{text}");
            match listen(&args(text, false)) {
                Ok(listen) => assert!(!beyond && listen == want, "{text}"),
                Err(refused) => {
                    assert!(beyond && refused.exit == Exit::Refused, "{text}");
                    assert!(refused.message.contains("--tls FOLDER"), "{text}");
                }
            }
        }
        let unix = listen(&args("unix:/run/s", false));
        assert_eq!(unix, Ok(Listen::Unix("/run/s".into())));
    }

    #[test]
    fn what_cannot_be_listened_on_is_refused() {
        for text in ["", "unix:", "localhost", "127.0.0.1", "127.0.0.1:99999"] {
            let refused = listen(&args(text, false)).unwrap_err();
            assert_eq!(refused.exit, Exit::Usage, "{text}");
        }
    }
}
