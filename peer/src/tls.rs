//! TLS between a client and a server of NBD (STARTTLS), without any I/O.
//!
//! Both sides show a certificate (X.509), and each accepts what the one authority in its folder has
//! signed. The client wants the certificate of the host that the address names; the server may
//! want one of several names. TLS 1.3 only. The files are those that qemu, nbdkit and libnbd look
//! for:
//!
//! | file | holds (PEM) | who reads it |
//! |---|---|---|
//! | `ca-cert.pem` | whose signatures are accepted | both |
//! | `client-cert.pem`, `client-key.pem` | the client's certificate, and those it was signed with | the client |
//! | `server-cert.pem`, `server-key.pem` | the server's | the server |
//!
//! A certificate that does not say for which side it is passes for either. They are read at each connection by a client, so that new ones need no restart, and at its start
//! by a server.
//!
//! # What it promises
//!
//! - Before both certificates are accepted nothing of NBD but the wish for TLS is answered, and
//!   that a client leaves.
//! - Any bytes give plain text or an error that ends the connection (R17). What is held of a
//!   connection is a record of 16 KiB or two in each direction. The library takes memory for each
//!   record: with TLS the data path is not without allocations.
//! - Keys are renewed by the library before they are worn out, so that a connection may last.
//! - An end without a farewell is an end like any other: NBD says itself how long everything is.

use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    ClientConfig, ClientConnection, Connection, DigitallySignedStruct, DistinguishedName,
    RootCertStore, ServerConfig, ServerConnection, SignatureScheme,
};

/// Where the files are unless an address names another folder.
pub const FOLDER: &str = "/etc/ublk-mirror/tls";

/// Why there is no TLS; a part of a sentence.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file that is not there or cannot be read.
    #[error("{} cannot be read: {why}; TLS needs the certificates there", path.display())]
    File {
        /// Which one.
        path: PathBuf,
        /// The library's words.
        why: String,
    },
    /// Files that are no use.
    #[error(
        "the certificates in {} are of no use: {why}; put those there that belong to the keys",
        folder.display()
    )]
    Files {
        /// Where they are.
        folder: PathBuf,
        /// The library's words.
        why: String,
    },
    /// No certificate is about this host.
    #[error("{0} is no name that a certificate could be for; give a host's name or address")]
    Name(String),
    /// What the other side sent or showed is not accepted, or ours is not by it.
    #[error("TLS failed: {}", explained(.0))]
    Session(rustls::Error),
}

/// The library's words, and where they tell nobody what to do, ours.
fn explained(error: &rustls::Error) -> String {
    use rustls::{AlertDescription as Alert, CertificateError as Bad, Error};
    let hint = match error {
        Error::InvalidCertificate(Bad::UnknownIssuer | Bad::BadSignature) => {
            "; its certificate is not signed by the authority in ca-cert.pem"
        }
        Error::AlertReceived(Alert::UnknownCA | Alert::DecryptError) => {
            "; the other side's ca-cert.pem is not of the authority that signed our certificate"
        }
        Error::AlertReceived(Alert::CertificateRequired) => {
            "; the other side wants a certificate of ours"
        }
        Error::AlertReceived(Alert::AccessDenied | Alert::BadCertificate) => {
            "; the other side does not accept our certificate, or the name in it"
        }
        _ => "",
    };
    format!("{error}{hint}")
}

/// What one side needs of its folder.
struct Files {
    roots: RootCertStore,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Files {
    fn read(folder: &Path, side: &str) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        let authority = certificates(&folder.join("ca-cert.pem"))?;
        for certificate in authority {
            roots.add(certificate).map_err(useless(folder))?;
        }
        let chain = certificates(&folder.join(format!("{side}-cert.pem")))?;
        let path = folder.join(format!("{side}-key.pem"));
        let key = PrivateKeyDer::from_pem_file(&path).map_err(|error| TlsError::File {
            path,
            why: said(&error),
        })?;
        Ok(Self { roots, chain, key })
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let unreadable = |why| TlsError::File {
        path: path.to_owned(),
        why,
    };
    let all = CertificateDer::pem_file_iter(path).map_err(|error| unreadable(said(&error)))?;
    let all: Result<Vec<_>, _> = all.collect();
    let all = all.map_err(|error| unreadable(said(&error)))?;
    if all.is_empty() {
        return Err(unreadable("it holds no certificate".to_owned()));
    }
    Ok(all)
}

fn said(error: &rustls::pki_types::pem::Error) -> String {
    match error {
        rustls::pki_types::pem::Error::Io(error) => {
            let mut text = error.to_string();
            text.truncate(text.rfind(" (os error").unwrap_or(text.len()));
            text
        }
        rustls::pki_types::pem::Error::NoItemsFound => "it holds no key".to_owned(),
        other => other.to_string(),
    }
}

fn useless<E: ToString>(folder: &Path) -> impl Fn(E) -> TlsError {
    move |error| TlsError::Files {
        folder: folder.to_owned(),
        why: error.to_string(),
    }
}

/// A client's side for connections to `host`.
///
/// # Errors
///
/// When the files are not there or are of no use.
pub fn client(folder: &Path, host: &str) -> Result<Tls, TlsError> {
    let files = Files::read(folder, "client")?;
    let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&TLS13])
        .map_err(useless(folder))?
        .with_root_certificates(files.roots)
        .with_client_auth_cert(files.chain, files.key)
        .map_err(useless(folder))?;
    let name = ServerName::try_from(host.to_owned());
    let name = name.map_err(|_| TlsError::Name(host.to_owned()))?;
    let session = ClientConnection::new(Arc::new(config), name).map_err(useless(folder))?;
    Ok(Tls::of(session.into()))
}

/// What a server needs for all its connections.
#[derive(Clone, Debug)]
pub struct Acceptor(Arc<ServerConfig>);

impl Acceptor {
    /// Of the files in `folder`; `names` are those of which a client's certificate must bear one,
    /// and without any every client is welcome whose certificate is accepted.
    ///
    /// # Errors
    ///
    /// When the files are not there or are of no use, or a name is none.
    pub fn new(folder: &Path, names: &[String]) -> Result<Self, TlsError> {
        let files = Files::read(folder, "server")?;
        let names = names.iter().map(|name| {
            ServerName::try_from(name.clone()).map_err(|_| TlsError::Name(name.clone()))
        });
        let names = names.collect::<Result<Vec<_>, _>>()?;
        let provider = Arc::new(default_provider());
        let accepted = WebPkiClientVerifier::builder_with_provider(
            Arc::new(files.roots),
            Arc::clone(&provider),
        );
        let verifier = Named {
            accepted: accepted.build().map_err(useless(folder))?,
            names,
        };
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(useless(folder))?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_single_cert(files.chain, files.key)
            .map_err(useless(folder))?;
        // Nobody resumes a session of TLS: connections are few and last.
        config.send_tls13_tickets = 0;
        Ok(Self(Arc::new(config)))
    }

    /// The server's side of one connection.
    ///
    /// # Errors
    ///
    /// When the library has no session to give.
    pub fn accept(&self) -> Result<Tls, TlsError> {
        let session = ServerConnection::new(Arc::clone(&self.0)).map_err(TlsError::Session)?;
        Ok(Tls::of(session.into()))
    }
}

/// Accepts a client by its certificate, and then by the names that this is for.
#[derive(Debug)]
struct Named {
    accepted: Arc<dyn ClientCertVerifier>,
    names: Vec<ServerName<'static>>,
}

impl ClientCertVerifier for Named {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.accepted.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        own: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.accepted.verify_client_cert(own, others, now)?;
        if self.names.is_empty() {
            return Ok(verified);
        }
        let own = ParsedCertificate::try_from(own)?;
        let mut result = Ok(());
        for name in &self.names {
            result = rustls::client::verify_server_name(&own, name);
            if result.is_ok() {
                break;
            }
        }
        result.map(|()| verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.accepted
            .verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.accepted
            .verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.accepted.supported_verify_schemes()
    }
}

/// What [`Tls::open`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opened {
    /// So many bytes of plain text.
    Plain(usize),
    /// More has to be received first.
    More,
    /// The other side has said that nothing follows.
    End,
}

/// One connection's TLS, of either side.
#[derive(Debug)]
pub struct Tls {
    session: Box<Connection>,
    /// Received with something before, and not looked at yet.
    left: Vec<u8>,
}

impl Tls {
    fn of(session: Connection) -> Self {
        Self {
            session: Box::new(session),
            left: Vec::new(),
        }
    }

    /// Whether certificates and keys are still being exchanged: what [`Tls::own_words`] gives has
    /// to be sent, and what is received to be opened, until it is not.
    #[must_use]
    pub fn is_handshaking(&self) -> bool {
        self.session.is_handshaking()
    }

    /// Appends to `out` what the protocol itself wants sent.
    pub fn own_words(&mut self, out: &mut Vec<u8>) {
        while self.session.wants_write() {
            let Ok(1..) = self.session.write_tls(out) else {
                return;
            };
        }
    }

    /// Appends `plain` to `out` as it is to be sent, in the order of the calls.
    ///
    /// # Errors
    ///
    /// When the keys are worn out and the session has no others.
    pub fn seal(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Result<(), TlsError> {
        let mut rest = plain;
        while !rest.is_empty() {
            // The library takes as much as it likes to hold.
            let taken = self.session.writer().write(rest).unwrap_or(0);
            if taken == 0 && !self.session.wants_write() {
                let why = "the session takes nothing more".to_owned();
                return Err(TlsError::Session(rustls::Error::General(why)));
            }
            rest = &rest[taken..];
            self.own_words(out);
        }
        Ok(())
    }

    /// Opens what was received: takes from the front of `sealed` what it needs and puts plain text
    /// into `into`, which is not empty. To be called again with what is left of `sealed` until that
    /// is empty and it wants [`Opened::More`].
    ///
    /// # Errors
    ///
    /// When what was received makes no sense or is not accepted: then [`Tls::own_words`] may still
    /// be sent, so that the other side learns why.
    pub fn open(&mut self, sealed: &mut &[u8], into: &mut [u8]) -> Result<Opened, TlsError> {
        loop {
            match self.session.reader().read(into) {
                Ok(0) => return Ok(Opened::End),
                Ok(plain) => return Ok(Opened::Plain(plain)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Ok(Opened::End),
            }
            let taken = if self.left.is_empty() {
                if sealed.is_empty() {
                    return Ok(Opened::More);
                }
                self.session.read_tls(sealed)
            } else {
                let mut left = &self.left[..];
                let taken = self.session.read_tls(&mut left);
                let len = left.len();
                self.left.drain(..self.left.len() - len);
                taken
            };
            let processed = self.session.process_new_packets();
            processed.map_err(TlsError::Session)?;
            if taken.is_err() {
                let why = "a record does not end".to_owned();
                return Err(TlsError::Session(rustls::Error::General(why)));
            }
        }
    }

    /// Keeps what was received and not opened, for the next call of [`Tls::open`].
    pub fn keep(&mut self, sealed: &[u8]) {
        self.left.extend_from_slice(sealed);
    }

    /// Appends to `out` that nothing follows.
    pub fn farewell(&mut self, out: &mut Vec<u8>) {
        self.session.send_close_notify();
        self.own_words(out);
    }
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
