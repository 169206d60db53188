#![allow(clippy::unwrap_used)]

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;

use super::*;
use crate::server::{self, Desk, Peer, ProtocolError, Verdict};
use crate::wire::{EXPORT_FLUSH, EXPORT_HAS_FLAGS, EXPORT_READ_ONLY, REQUEST_BYTES, be16, be64};
use mirror::control::ErrorKind;

const SIZE: usize = 64 << 10;
const FLUSH: u16 = EXPORT_HAS_FLAGS | EXPORT_FLUSH;

/// A socket's path that goes with the test.
struct Socket(std::path::PathBuf);

impl Socket {
    fn new(test: &str) -> Self {
        let name = format!("peer-{}-{test}", std::process::id());
        Self(std::env::temp_dir().join(name))
    }

    fn address(&self) -> Address {
        let place = Place::Unix {
            socket: self.0.clone(),
        };
        Address {
            place,
            export: String::new(),
            tls: None,
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn option_reply(kind: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    let magic = crate::wire::OPTION_REPLY_MAGIC.to_be_bytes();
    let head = [7_u32.to_be_bytes(), kind.to_be_bytes(), len.to_be_bytes()];
    [&magic[..], &head.concat(), data].concat()
}

/// What a server sends of an export with these flags, whose smallest request is 4096 bytes.
fn handshake(flags: u16) -> Vec<u8> {
    let size = u64::try_from(SIZE).unwrap().to_be_bytes();
    let export = [&[0, 0][..], &size, &flags.to_be_bytes()].concat();
    let sizes = [4096_u32, 4096, 8192].map(u32::to_be_bytes).concat();
    [
        b"NBDMAGICIHAVEOPT\0\x03".to_vec(),
        option_reply(3, &export),
        option_reply(3, &[&[0, 3][..], &sizes].concat()),
        option_reply(1, &[]),
    ]
    .concat()
}

/// Serves one client a disk in memory, in which byte `n` is `n % 251`; answers the `fail`th
/// request with ENOSPC. Returns the kinds of requests, and the disk.
fn serve(listener: UnixListener, flags: u16, fail: usize) -> JoinHandle<(Vec<u16>, Vec<u8>)> {
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&handshake(flags)).unwrap();
        // Flags, the option's header, lengths, no name, one kind of information.
        stream.read_exact(&mut [0; 4 + 16 + 4 + 4]).unwrap();
        let disk: Vec<u8> = (0..=250).cycle().take(SIZE).collect();
        requests(&mut stream, disk, fail)
    })
}

/// The part after the handshake.
fn requests(stream: &mut UnixStream, disk: Vec<u8>, fail: usize) -> (Vec<u16>, Vec<u8>) {
    let mut disk = disk;
    let mut kinds = Vec::new();
    let mut header = [0; REQUEST_BYTES];
    while stream.read_exact(&mut header).is_ok() {
        let kind = be16(&header, 6).unwrap();
        kinds.push(kind);
        let offset = usize::try_from(be64(&header, 16).unwrap()).unwrap();
        let len = crate::wire::be32(&header, 24).unwrap() as usize;
        assert!(len <= 8192 && len.is_multiple_of(4096) && offset.is_multiple_of(4096));
        if kind == 1 {
            stream.read_exact(&mut disk[offset..offset + len]).unwrap();
        }
        if kind == 2 {
            break;
        }
        let error = if kinds.len() == fail { 28_u32 } else { 0 };
        let magic = crate::wire::SIMPLE_REPLY_MAGIC.to_be_bytes();
        let mut reply = [magic, error.to_be_bytes()].concat();
        reply.extend_from_slice(&header[8..16]);
        if kind == 0 && error == 0 {
            reply.extend_from_slice(&disk[offset..offset + len]);
        }
        stream.write_all(&reply).unwrap();
    }
    (kinds, disk)
}

/// The server's end of a connection, for the negotiation that our servers use.
struct Ours(UnixStream);

#[derive(Debug)]
struct End;

impl From<io::Error> for End {
    fn from(_: io::Error) -> Self {
        Self
    }
}

impl From<ProtocolError> for End {
    fn from(_: ProtocolError) -> Self {
        Self
    }
}

impl Peer for Ours {
    type Error = End;

    async fn array<const N: usize>(&mut self) -> Result<[u8; N], End> {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    async fn take(&mut self, len: usize) -> Result<Vec<u8>, End> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    async fn skip(&mut self, len: usize) -> Result<(), End> {
        self.take(len).await.map(|_| ())
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), End> {
        Ok(self.0.write_all(bytes)?)
    }

    async fn secure(&mut self) -> Result<(), End> {
        unreachable!("it has no TLS")
    }
}

/// Grants the first claims and refuses the others, and keeps them all.
struct Claims {
    export: server::Export,
    grants: usize,
    refusals: Vec<Verdict>,
    seen: Vec<Option<Claim>>,
}

impl Desk for Claims {
    fn export(&self) -> &server::Export {
        &self.export
    }

    async fn claim(&mut self, claim: Option<Claim>) -> Verdict {
        self.seen.push(claim.clone());
        if claim.is_some() && self.grants == 0 {
            return self.refusals.pop().unwrap();
        }
        self.grants -= usize::from(claim.is_some());
        Verdict::Granted(FENCE)
    }
}

const FENCE: Fence = Fence {
    instance: 77,
    turn: 1,
    keeps_order: true,
};

/// Serves so many connections with a member on the disk; what was claimed.
fn serve_claims(listener: UnixListener, count: usize, grants: usize) -> JoinHandle<Claims> {
    std::thread::spawn(move || {
        let mut claims = Claims {
            export: server::Export {
                name: String::new(),
                size_bytes: SIZE as u64,
                block_bytes: 4096,
                payload_bytes_max: 8192,
                flags: FLUSH,
            },
            grants,
            refusals: vec![
                Verdict::Refused("it is older".to_owned()),
                Verdict::InUse("it is in use".to_owned()),
            ],
            seen: Vec::new(),
        };
        for _ in 0..count {
            let (stream, _) = listener.accept().unwrap();
            let mut ours = Ours(stream);
            let opened = {
                let negotiation = std::pin::pin!(server::negotiate(&mut ours, &mut claims));
                negotiation.poll(&mut Context::from_waker(Waker::noop()))
            };
            if matches!(opened, Poll::Ready(Ok(true))) {
                let mut disk = vec![0; SIZE];
                let copy = crate::claim::tests::disk(9, 30, &[20, 10]);
                disk[4096..8192].copy_from_slice(&copy);
                requests(&mut ours.0, disk, 0);
            }
        }
        claims
    })
}

#[test]
fn a_claim_names_what_lies_on_the_disk() {
    let socket = Socket::new("claims");
    let server = serve_claims(UnixListener::bind(&socket.0).unwrap(), 6, 1);
    let claimant = Claimant {
        owner: 5,
        take_over: true,
    };
    let mut client = Client::claim(&socket.address(), claimant).unwrap();
    assert_eq!(client.fence(), Some(FENCE));
    client.flush().unwrap();
    drop(client);
    // Somebody else has it now; and then it is there, but not to be used.
    let busy = Client::claim(&socket.address(), claimant).unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::Busy);
    assert!(busy.is_in_use() && busy.is_absence(), "{busy}");
    assert!(busy.to_string().contains("it is in use"), "{busy}");
    let refused = Client::claim(&socket.address(), claimant).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Refused);
    assert!(!refused.is_in_use() && !refused.is_absence(), "{refused}");
    assert!(refused.to_string().contains("it is older"), "{refused}");
    let claims = server.join().unwrap().seen;
    let claim = Claim {
        owner: 5,
        take_over: true,
        resumes: None,
        seen: Some(Seen {
            mirror: 9_u128.to_be_bytes(),
            epoch: 30,
            history: vec![20, 10],
        }),
    };
    let each = [None, Some(claim)];
    assert_eq!(claims, [each.clone(), each.clone(), each].concat());
}

#[test]
fn who_hangs_up_on_an_unknown_option_is_not_asked_again() {
    let socket = Socket::new("hangs-up");
    let listener = UnixListener::bind(&socket.0).unwrap();
    let plain = listener.try_clone().unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"NBDMAGICIHAVEOPT\0\x03").unwrap();
        // Flags, the option's header, the length of no name, a question.
        stream.read_exact(&mut [0; 4 + 16 + 4 + 1]).unwrap();
        drop(stream);
        serve(plain, FLUSH, 0).join().unwrap()
    });
    let claimant = Claimant {
        owner: 5,
        take_over: false,
    };
    let mut client = Client::claim(&socket.address(), claimant).unwrap();
    assert_eq!(client.fence(), None);
    client.flush().unwrap();
    drop(client);
    assert_eq!(server.join().unwrap().0, [3, 2]);
}

#[test]
fn any_bytes_are_read_and_whole_blocks_written() {
    let socket = Socket::new("io");
    let server = serve(UnixListener::bind(&socket.0).unwrap(), FLUSH, 7);
    let mut client = Client::connect(&socket.address()).unwrap();
    let mut bytes = [0; 5000];
    client.read_at(&mut bytes, 4090).unwrap();
    let want: Vec<u8> = (0..=250).cycle().skip(4090).take(5000).collect();
    assert_eq!(bytes[..], want);
    let past = client.read_at(&mut bytes, (SIZE - 4999) as u64);
    assert_eq!(past.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    client.write_at(&[7; 12288], 4096).unwrap();
    client.flush().unwrap();
    let part = client.write_at(&[7; 512], 0).unwrap_err();
    assert_eq!(part.kind(), io::ErrorKind::InvalidInput);
    let zero = client.zero_all(Duration::from_secs(1)).unwrap_err();
    assert_eq!(zero.kind(), io::ErrorKind::Unsupported);
    client.flush().unwrap();
    // An error is an answer; the connection goes on.
    let full = client.write_at(&[8; 4096], 0).unwrap_err();
    assert_eq!(full.raw_os_error(), Some(28));
    client.read_at(&mut bytes[..1], 20_000).unwrap();
    drop(client);
    let (kinds, disk) = server.join().unwrap();
    assert_eq!(kinds, [0, 0, 1, 1, 3, 3, 1, 0, 2]);
    assert_eq!(disk[4096..16384], [7; 12288]);
    assert_eq!(disk[16384], u8::try_from(16384 % 251).unwrap());
}

#[test]
fn what_cannot_hold_a_member_can_be_looked_at() {
    let socket = Socket::new("read-only");
    let listener = UnixListener::bind(&socket.0).unwrap();
    let flags = FLUSH | EXPORT_READ_ONLY;
    let server = serve(listener.try_clone().unwrap(), flags, 0);
    let refused = Client::connect(&socket.address()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Refused);
    assert!(!refused.is_absence() && refused.to_string().contains("read-only"));
    server.join().unwrap();
    let server = serve(listener, flags, 0);
    let mut client = Client::look(&socket.address(), CONNECT_PATIENCE).unwrap();
    client.read_at(&mut [0; 100], 0).unwrap();
    drop(client);
    server.join().unwrap();
}

#[test]
fn a_connection_that_failed_is_not_used_again() {
    let socket = Socket::new("broken");
    let listener = UnixListener::bind(&socket.0).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&handshake(FLUSH)).unwrap();
        stream.read_exact(&mut [0; 28 + REQUEST_BYTES]).unwrap();
        stream.write_all(&[0; 16]).unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        rest
    });
    let mut client = Client::connect(&socket.address()).unwrap();
    let first = client.flush().unwrap_err().to_string();
    assert!(first.contains("a reply begins with"), "{first}");
    let second = client.flush().unwrap_err();
    assert_eq!(second.kind(), io::ErrorKind::ConnectionReset);
    assert!(client.into_parts().is_err());
    assert_eq!(server.join().unwrap(), [0_u8; 0], "nothing more was sent");
}

#[test]
fn who_says_nothing_is_given_up() {
    let patience = Duration::from_millis(50);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("nbd://{}/", listener.local_addr().unwrap());
    let silent = Client::look(&address.parse().unwrap(), patience).unwrap_err();
    assert!(matches!(silent, ConnectError::NoAnswer { .. }), "{silent}");
    assert_eq!(
        (silent.kind(), silent.is_absence()),
        (ErrorKind::Busy, true)
    );
    // A beginning is not enough either.
    let _gone = listener.accept().unwrap();
    let slow = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&handshake(FLUSH)[..30]).unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).map_or(0, |_| rest.len())
    });
    let silent = Client::look(&address.parse().unwrap(), patience).unwrap_err();
    assert!(matches!(silent, ConnectError::NoAnswer { .. }), "{silent}");
    assert!(slow.join().unwrap() <= 28, "more was sent than an option");
}

#[test]
fn who_is_not_there_is_absent() {
    let socket = Socket::new("absent");
    let absent = Client::connect(&socket.address()).unwrap_err();
    assert_eq!(
        (absent.kind(), absent.is_absence()),
        (ErrorKind::NotFound, true)
    );
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("nbd://{}/", listener.local_addr().unwrap());
    drop(listener);
    let refused = Client::connect(&address.parse().unwrap()).unwrap_err();
    assert_eq!(
        (refused.kind(), refused.is_absence()),
        (ErrorKind::Failed, true)
    );
    assert!(!refused.to_string().contains("os error"), "{refused}");
}
