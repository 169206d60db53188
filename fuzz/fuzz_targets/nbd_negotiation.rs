//! What an NBD client sends before its first request (R17).
//!
//! An input is the client's side of the connection from its first byte: flags, then options.
//! The daemon's own negotiation runs on it. Every answer has to be one that a client can take
//! apart, and memory stays within one option and its answer.
#![no_main]

use std::pin::pin;
use std::task::{Context, Poll, Waker};

use libfuzzer_sys::fuzz_target;
use nbd_proto::{Export, MAX_OPTION_BYTES, Peer, ProtocolError, negotiate};
use ublk_mirror_fuzz::within;

// The daemon is a program, so its protocol module is taken in as a file.
#[allow(dead_code, reason = "requests have a target of their own")]
#[path = "../../ublk-target/src/nbd_proto.rs"]
mod nbd_proto;

/// Longest answer to one option: an export's description, or the mirror's name.
const ANSWER_BYTES_MAX: usize = 256;
/// One option's data, and twice the answer for a vector that has grown.
const MEMORY_MAX: usize = MAX_OPTION_BYTES + 2 * ANSWER_BYTES_MAX;

fuzz_target!(|data: &[u8]| {
    let export = Export {
        name: "data".to_owned(),
        size_bytes: 1 << 30,
        block_bytes: 512,
    };
    let mut client = Client {
        left: data,
        no_zeroes: data.get(3).is_some_and(|flags| flags & 2 != 0),
        greeted: false,
        option: 0,
    };
    let ended = within(MEMORY_MAX, || {
        let mut negotiation = pin!(negotiate(&mut client, &export));
        match negotiation
            .as_mut()
            .poll(&mut Context::from_waker(Waker::noop()))
        {
            Poll::Ready(ended) => ended,
            Poll::Pending => unreachable!("this client never makes anybody wait"),
        }
    });
    assert!(client.greeted);
    match ended {
        // GO or EXPORT_NAME opened the export, or ABORT closed the connection.
        Ok(opened) => assert_eq!(opened, matches!(client.option, 1 | 7)),
        Err(End::Closed | End::Protocol) => {}
    }
});

/// How a connection ends.
#[derive(Debug)]
enum End {
    /// The client has said all it has to say.
    Closed,
    /// It does not speak the protocol.
    Protocol,
}

impl From<ProtocolError> for End {
    fn from(_: ProtocolError) -> Self {
        Self::Protocol
    }
}

/// A client that sends its input and reads every answer.
struct Client<'a> {
    left: &'a [u8],
    no_zeroes: bool,
    greeted: bool,
    /// The option sent last.
    option: u32,
}

impl<'a> Client<'a> {
    fn next(&mut self, len: usize) -> Result<&'a [u8], End> {
        let (taken, left) = self.left.split_at_checked(len).ok_or(End::Closed)?;
        self.left = left;
        Ok(taken)
    }
}

impl Peer for Client<'_> {
    type Error = End;

    async fn array<const N: usize>(&mut self) -> Result<[u8; N], End> {
        let mut out = [0; N];
        out.copy_from_slice(self.next(N)?);
        if N == 16 {
            self.option = be32(&out[8..]);
        }
        Ok(out)
    }

    async fn take(&mut self, len: usize) -> Result<Vec<u8>, End> {
        // As the daemon does: the memory comes before the bytes.
        let mut taken = vec![0; len];
        taken.copy_from_slice(self.next(len)?);
        Ok(taken)
    }

    async fn skip(&mut self, len: usize) -> Result<(), End> {
        self.next(len).map(|_| ())
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), End> {
        if !self.greeted {
            assert_eq!(&bytes[..16], b"NBDMAGICIHAVEOPT");
            assert_eq!(bytes.len(), 18);
            self.greeted = true;
            return Ok(());
        }
        assert!(bytes.len() <= ANSWER_BYTES_MAX);
        if self.option == 1 {
            assert_eq!(bytes.len(), if self.no_zeroes { 10 } else { 134 });
            return Ok(());
        }
        assert!(!bytes.is_empty(), "every option is answered");
        let mut left = bytes;
        while !left.is_empty() {
            assert_eq!(left[..8], 0x0003_e889_0455_65a9_u64.to_be_bytes());
            assert_eq!(be32(&left[8..]), self.option);
            let (kind, len) = (be32(&left[12..]), be32(&left[16..]) as usize);
            left = &left[20 + len..];
            // An acknowledgement or an error is the last word on an option.
            let last = kind == 1 || kind & 0x8000_0000 != 0;
            assert_eq!(last, left.is_empty());
        }
        Ok(())
    }
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}
