//! Both sides of TLS against each other, in memory.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use proptest::prelude::*;

use super::*;

/// Certificates of one authority or another, for `localhost` and `client.example`.
fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("testdata")
        .join(name)
}

fn pair(of_client: &str, host: &str, names: &[&str]) -> (Tls, Tls) {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let acceptor = Acceptor::new(&folder("own"), &names).unwrap();
    let client = client(&folder(of_client), host).unwrap();
    (client, acceptor.accept().unwrap())
}

/// Opens all of `sealed`.
fn open_all(tls: &mut Tls, mut sealed: &[u8]) -> Result<Vec<u8>, TlsError> {
    let (mut plain, mut into) = (Vec::new(), [0; 1000]);
    loop {
        match tls.open(&mut sealed, &mut into)? {
            Opened::Plain(len) => plain.extend_from_slice(&into[..len]),
            Opened::More => {
                assert!(sealed.is_empty());
                return Ok(plain);
            }
            Opened::End => return Ok(plain),
        }
    }
}

/// Carries both sides' own words until neither has any; the first error.
fn shake(one: &mut Tls, other: &mut Tls) -> Result<(), TlsError> {
    let mut result = Ok(());
    for _ in 0..10 {
        for turn in 0..2 {
            let (from, to) = if turn == 0 {
                (&mut *one, &mut *other)
            } else {
                (&mut *other, &mut *one)
            };
            let mut words = Vec::new();
            from.own_words(&mut words);
            let opened = open_all(to, &words);
            result = result.and(opened.map(|plain| assert!(plain.is_empty())));
        }
    }
    result
}

#[test]
fn what_is_sealed_is_opened() {
    let (mut client, mut server) = pair("own", "localhost", &["other.example", "client.example"]);
    assert!(client.is_handshaking());
    shake(&mut client, &mut server).unwrap();
    assert!(!client.is_handshaking() && !server.is_handshaking());
    let text: Vec<u8> = (0..200_000_u32).map(|at| at.to_le_bytes()[1]).collect();
    let (mut there, mut back) = (Vec::new(), Vec::new());
    client.seal(&text, &mut there).unwrap();
    server.seal(b"and back", &mut back).unwrap();
    assert!(there.len() > text.len() && there.len() < text.len() + text.len() / 100);
    // What comes with the end of something else is kept.
    server.keep(&there[..70_000]);
    assert!(open_all(&mut server, &there[70_000..]).unwrap() == text);
    assert_eq!(open_all(&mut client, &back).unwrap(), b"and back");
    let mut end = Vec::new();
    client.farewell(&mut end);
    let mut rest = &end[..];
    assert_eq!(server.open(&mut rest, &mut [0; 10]).unwrap(), Opened::End);
}

#[test]
fn keys_are_renewed_under_way() {
    let (mut client, mut server) = pair("own", "127.0.0.1", &[]);
    shake(&mut client, &mut server).unwrap();
    for round in 0..3_u8 {
        client.session.refresh_traffic_keys().unwrap();
        let (mut there, mut back) = (Vec::new(), Vec::new());
        client.seal(&[round; 30_000], &mut there).unwrap();
        assert_eq!(open_all(&mut server, &there).unwrap(), [round; 30_000]);
        server.seal(&[round; 100], &mut back).unwrap();
        assert_eq!(open_all(&mut client, &back).unwrap(), [round; 100]);
    }
}

#[test]
fn who_is_not_who_was_expected_is_refused() {
    for (of_client, host, names, why) in [
        ("other", "localhost", &[][..], "ca-cert.pem"),
        ("own", "elsewhere.example", &[][..], "elsewhere.example"),
        ("own", "127.0.0.2", &[][..], "not valid for name"),
        (
            "own",
            "localhost",
            &["other.example"][..],
            "not valid for name",
        ),
    ] {
        let (mut client, mut server) = pair(of_client, host, names);
        let message = shake(&mut client, &mut server).unwrap_err().to_string();
        assert!(message.contains(why), "{host} {names:?}: {message}");
    }
}

/// The client learns from the server why it is not accepted.
#[test]
fn a_client_is_told_why() {
    let (mut client, mut server) = pair("own", "localhost", &["other.example"]);
    let mut words = Vec::new();
    client.own_words(&mut words);
    open_all(&mut server, &words).unwrap();
    words.clear();
    server.own_words(&mut words);
    open_all(&mut client, &words).unwrap();
    words.clear();
    client.own_words(&mut words);
    open_all(&mut server, &words).unwrap_err();
    words.clear();
    server.own_words(&mut words);
    let message = open_all(&mut client, &words).unwrap_err().to_string();
    assert!(
        message.contains("does not accept our certificate"),
        "{message}"
    );
}

#[test]
fn files_that_are_no_use_are_named() {
    let message = client(&folder("absent"), "localhost")
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("absent/ca-cert.pem cannot be read: No such file"),
        "{message}"
    );
    let there = std::env::temp_dir().join(format!("tls-files-{}", std::process::id()));
    std::fs::create_dir_all(&there).unwrap();
    for file in ["ca-cert.pem", "client-cert.pem", "client-key.pem"] {
        std::fs::copy(folder("own").join(file), there.join(file)).unwrap();
    }
    client(&there, "localhost").unwrap();
    let message = client(&there, "no name").unwrap_err().to_string();
    assert!(message.contains("no name is no name"), "{message}");
    std::fs::copy(
        folder("other").join("client-key.pem"),
        there.join("client-key.pem"),
    )
    .unwrap();
    let message = client(&there, "localhost").unwrap_err().to_string();
    assert!(message.contains("are of no use"), "{message}");
    std::fs::copy(
        folder("own").join("ca-cert.pem"),
        there.join("client-key.pem"),
    )
    .unwrap();
    let message = client(&there, "localhost").unwrap_err().to_string();
    assert!(
        message.contains("client-key.pem cannot be read: it holds no key"),
        "{message}"
    );
    std::fs::write(there.join("ca-cert.pem"), "nothing").unwrap();
    let message = client(&there, "localhost").unwrap_err().to_string();
    assert!(message.contains("it holds no certificate"), "{message}");
    std::fs::remove_dir_all(&there).unwrap();
}

proptest! {
    #[test]
    fn any_bytes_are_text_or_an_error(words in prop::collection::vec(any::<u8>(), 0..300),
                                      at in 0..400_usize) {
        let (mut client, mut server) = pair("own", "localhost", &[]);
        let _ = open_all(&mut server, &words);
        // Words of its own with some of these in them.
        let mut own = Vec::new();
        client.own_words(&mut own);
        let (_, mut server) = pair("own", "localhost", &[]);
        let end = (at + words.len()).min(own.len());
        if at < end {
            own[at..end].copy_from_slice(&words[..end - at]);
        }
        let _ = open_all(&mut server, &own);
    }

    #[test]
    fn pieces_of_any_length_are_opened(lens in prop::collection::vec(1..40_000_usize, 1..6),
                                       cut in 1..30_000_usize) {
        let (mut client, mut server) = pair("own", "localhost", &[]);
        shake(&mut client, &mut server).unwrap();
        let (mut sealed, mut all, mut opened) = (Vec::new(), Vec::new(), Vec::new());
        for (fill, len) in (1..).zip(lens) {
            client.seal(&vec![fill; len], &mut sealed).unwrap();
            all.resize(all.len() + len, fill);
        }
        for piece in sealed.chunks(cut) {
            opened.extend(open_all(&mut server, piece).unwrap());
        }
        prop_assert!(opened == all);
    }
}

/// The server's side of the handshake over TCP, with certificates or without; whether requests
/// would follow.
struct Ours {
    socket: std::net::TcpStream,
    acceptor: Option<Acceptor>,
    tls: Option<Tls>,
    plain: Vec<u8>,
}

#[derive(Debug)]
struct End;

impl From<crate::server::ProtocolError> for End {
    fn from(_: crate::server::ProtocolError) -> Self {
        Self
    }
}

impl From<io::Error> for End {
    fn from(_: io::Error) -> Self {
        Self
    }
}

impl crate::server::Peer for Ours {
    type Error = End;

    async fn array<const N: usize>(&mut self) -> Result<[u8; N], End> {
        Ok(self.take(N).await?.try_into().unwrap())
    }

    async fn take(&mut self, len: usize) -> Result<Vec<u8>, End> {
        while self.plain.len() < len {
            let mut bytes = [0; 5000];
            let received = self.socket.read(&mut bytes)?;
            let mut bytes = &bytes[..received];
            if received == 0 {
                return Err(End);
            }
            let Some(tls) = &mut self.tls else {
                self.plain.extend_from_slice(bytes);
                continue;
            };
            let (mut into, mut words) = ([0; 1000], Vec::new());
            let end = loop {
                match tls.open(&mut bytes, &mut into) {
                    Ok(Opened::Plain(len)) => self.plain.extend_from_slice(&into[..len]),
                    Ok(Opened::More) => break false,
                    Ok(Opened::End) | Err(_) => break true,
                }
            };
            tls.own_words(&mut words);
            self.socket.write_all(&words)?;
            if end {
                return Err(End);
            }
        }
        Ok(self.plain.drain(..len).collect())
    }

    async fn skip(&mut self, len: usize) -> Result<(), End> {
        self.take(len).await.map(|_| ())
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), End> {
        let mut sealed = Vec::new();
        match &mut self.tls {
            Some(tls) => tls.seal(bytes, &mut sealed).unwrap(),
            None => sealed.extend_from_slice(bytes),
        }
        Ok(self.socket.write_all(&sealed)?)
    }

    async fn secure(&mut self) -> Result<(), End> {
        assert!(self.plain.is_empty());
        self.tls = Some(self.acceptor.as_ref().unwrap().accept().unwrap());
        Ok(())
    }
}

struct Secured(crate::server::Export, bool);

impl crate::server::Desk for Secured {
    fn export(&self) -> &crate::server::Export {
        &self.0
    }

    fn has_tls(&self) -> bool {
        self.1
    }

    async fn claim(&mut self, _: Option<crate::claim::Claim>) -> crate::server::Verdict {
        crate::server::Verdict::Unknown
    }
}

/// Serves one client's handshake; its port, and whether requests would follow.
fn serve(certificates: bool) -> (u16, std::thread::JoinHandle<bool>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let serving = std::thread::spawn(move || {
        let acceptor = certificates.then(|| Acceptor::new(&folder("own"), &[]).unwrap());
        let mut ours = Ours {
            socket: listener.accept().unwrap().0,
            acceptor,
            tls: None,
            plain: Vec::new(),
        };
        let export = crate::server::Export {
            name: "m".to_owned(),
            size_bytes: 1 << 20,
            block_bytes: 512,
            payload_bytes_max: 65536,
            flags: crate::server::EVERYTHING,
        };
        let mut desk = Secured(export, certificates);
        let negotiation = std::pin::pin!(crate::server::negotiate(&mut ours, &mut desk));
        let waker = std::task::Waker::noop();
        let polled = negotiation.poll(&mut std::task::Context::from_waker(waker));
        matches!(polled, std::task::Poll::Ready(Ok(true)))
    });
    (port, serving)
}

#[test]
fn a_client_connects_with_tls_or_says_why_not() {
    let own = folder("own").display().to_string();
    let other = folder("other").display().to_string();
    for (certificates, address, why) in [
        (
            true,
            format!("nbds://localhost:P/m?tls-certificates={own}"),
            "",
        ),
        (true, "nbd://localhost:P/m".to_owned(), "write nbds://"),
        (
            false,
            format!("nbds://localhost:P/m?tls-certificates={own}"),
            "offers no TLS",
        ),
        (
            true,
            format!("nbds://127.0.0.1:P/m?tls-certificates={other}"),
            "is not signed by",
        ),
        (
            true,
            "nbds://127.0.0.1:P/m?tls-certificates=/absent".to_owned(),
            "/absent/ca-cert.pem",
        ),
    ] {
        let (port, serving) = serve(certificates);
        let address: crate::Address = address.replace('P', &port.to_string()).parse().unwrap();
        let connected = crate::Client::connect(&address);
        match &connected {
            Ok(client) => {
                assert_eq!(why, "");
                assert_eq!(client.export().size_bytes, 1 << 20);
            }
            Err(error) => {
                let message = error.to_string();
                assert!(
                    !why.is_empty() && message.contains(why),
                    "{address}: {message}"
                );
                let plain = address.tls.is_none();
                assert_eq!(error.is_the_networks(), !plain, "{address}");
                assert_eq!(error.is_our_own(), why.contains("/absent"), "{address}");
            }
        }
        if message_of_files(&connected) {
            // Nobody has connected.
            drop(std::net::TcpStream::connect(("127.0.0.1", port)).unwrap());
        }
        drop(connected);
        assert_eq!(serving.join().unwrap(), why.is_empty(), "{address}");
    }
}

fn message_of_files<T>(connected: &Result<T, crate::ConnectError>) -> bool {
    let Err(crate::ConnectError::Tls { source, .. }) = connected else {
        return false;
    };
    matches!(**source, TlsError::File { .. })
}
