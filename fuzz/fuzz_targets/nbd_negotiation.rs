//! What an NBD client sends before its first request (R17).
//!
//! An input is the client's side of the connection from its first byte: flags, then options.
//! The negotiation of the daemon and of the export server runs on it, with and without
//! certificates (TLS itself is left out); claims are judged by a superblock. Every answer has to be one that a client can take apart, memory stays within one
//! option, its answer and what a superblock takes, and no claim is granted that does not name
//! the superblock's epoch.
#![no_main]

use std::pin::pin;
use std::sync::LazyLock;
use std::task::{Context, Poll, Waker};

use libfuzzer_sys::fuzz_target;
use mirror::create::first_superblock;
use mirror::layout::Layout;
use mirror::superblock::{
    DECODED_BYTES_MAX, Epoch, HISTORY_MAX, SlotRecord, SlotState, Superblock,
};
use peer::claim::{Claim, Fence, judge};
use peer::server::contexts::Agreed;
use peer::server::{
    Desk, EVERYTHING, Export, MAX_OPTION_BYTES, MAX_PAYLOAD_BYTES, Peer, ProtocolError, Verdict,
    negotiate,
};
use ublk_mirror_fuzz::within;
use uuid::Uuid;

/// Longest answer to one option: an export's description, the mirror's name, or a context.
const ANSWER_BYTES_MAX: usize = 256;
/// One option's data, and twice the answer for a vector that has grown.
const MEMORY_MAX: usize = MAX_OPTION_BYTES + 2 * ANSWER_BYTES_MAX + CLAIM_BYTES_MAX;
/// A claim's epochs, and two copies of a superblock.
const CLAIM_BYTES_MAX: usize = HISTORY_MAX * 16 + 2 * DECODED_BYTES_MAX;
/// The epoch of the disk.
const EPOCH: u128 = 30;

/// What is on the disk.
static DISK: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut slots = vec![SlotRecord::empty(); 3];
    slots[0].member = Some(Uuid::from_u128(7));
    slots[0].state = SlotState::InSync;
    let epoch = |id| Epoch { id, ordinal: 0 };
    let (mirror, layout) = (Uuid::from_u128(9), Layout::for_size(1 << 30));
    Superblock {
        member: Uuid::from_u128(7),
        history: vec![epoch(20), epoch(10)],
        ..first_superblock(mirror, "data", layout, epoch(EPOCH), slots)
    }
    .encode()
});

const FENCE: Fence = Fence {
    instance: 1,
    turn: 1,
    keeps_order: true,
};

/// Decides on claims as the export server does, by the disk; with certificates or without.
struct Judge(Export, Agreed, bool);

impl Desk for Judge {
    fn export(&self) -> &Export {
        &self.0
    }

    fn has_tls(&self) -> bool {
        self.2
    }

    fn agreed(&mut self) -> Option<&mut Agreed> {
        Some(&mut self.1)
    }

    async fn claim(&mut self, claim: Option<Claim>) -> Verdict {
        let Some(claim) = claim else {
            return Verdict::Granted(FENCE);
        };
        match judge(&claim, &DISK, &DISK) {
            Ok(()) => {
                let seen = claim
                    .seen
                    .unwrap_or_else(|| unreachable!("a member is there"));
                assert!(seen.epoch == EPOCH || seen.history.contains(&EPOCH));
                Verdict::Granted(FENCE)
            }
            Err(refusal) => Verdict::Refused(refusal.to_string()),
        }
    }
}

fuzz_target!(|data: &[u8]| {
    LazyLock::force(&DISK);
    play(data, false);
    play(data, true);
});

fn play(data: &[u8], tls: bool) {
    let export = Export {
        name: "data".to_owned(),
        size_bytes: 1 << 30,
        block_bytes: 512,
        payload_bytes_max: MAX_PAYLOAD_BYTES,
        flags: EVERYTHING,
    };
    let mut desk = Judge(export, Agreed::default(), tls);
    let mut client = Client {
        left: data,
        no_zeroes: data.get(3).is_some_and(|flags| flags & 2 != 0),
        greeted: false,
        plain: tls,
        option: 0,
    };
    let ended = within(MEMORY_MAX, || {
        let mut negotiation = pin!(negotiate(&mut client, &mut desk));
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
        Ok(opened) => {
            assert_eq!(opened, matches!(client.option, 1 | 7));
            assert!(!opened || !client.plain, "an export without TLS");
        }
        Err(End::Closed | End::Protocol) => {}
    }
}

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
    /// TLS is wanted first, and has not begun.
    plain: bool,
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
        if self.plain && !matches!(self.option, 2 | 5) {
            let kind = be32(&bytes[12..]);
            assert!(matches!(kind, 0x8000_0005), "an answer without TLS");
        }
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

    async fn secure(&mut self) -> Result<(), End> {
        assert!(std::mem::take(&mut self.plain), "TLS in TLS");
        Ok(())
    }
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}
