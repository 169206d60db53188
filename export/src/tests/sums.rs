//! Checksums of blocks, and the structured replies that come with them.

use super::*;
use peer::server::REQUEST_BYTES;
use peer::structured::{Brings, decode_chunk, decode_sums};
use peer::wire::{
    CONTEXT_SUMS, OPTION_SET_META_CONTEXT, OPTION_STRUCTURED_REPLY, REP_META_CONTEXT, SUMS_MAX,
};

const EIO: u32 = 5;
const EINVAL: u32 = 22;
/// REQ_ONE.
const ONE: u16 = 8;

impl Client {
    /// Without a claim, in transmission, with checksums agreed on.
    async fn with_sums(server: &SimServer) -> Self {
        let client = Self::new(server, WIDE).await;
        client.option(OPTION_STRUCTURED_REPLY, &[]).await;
        assert_eq!(client.option_reply().await, Some((REP_ACK, Vec::new())));
        let mut query = vec![0, 0, 0, 1, b'm', 0, 0, 0, 1, 0, 0, 0, 19];
        query.extend(CONTEXT_SUMS.as_bytes());
        client.option(OPTION_SET_META_CONTEXT, &query).await;
        let (kind, _) = client.option_reply().await.unwrap();
        assert_eq!(kind, REP_META_CONTEXT);
        assert_eq!(client.option_reply().await, Some((REP_ACK, Vec::new())));
        client.go().await;
        client
    }

    async fn ask_sums(&self, offset: u64, len: u32, flags: u16) {
        let ask = Ask {
            kind: Kind::Sums,
            fua: false,
            barrier: false,
            offset,
            len,
        };
        let mut header: [u8; REQUEST_BYTES] = ask.header(9);
        header[4..6].copy_from_slice(&flags.to_be_bytes());
        self.0.say(&header).await;
    }

    /// The checksums in the next reply, or its error.
    async fn sums_answered(&self) -> Option<Result<Vec<u32>, u32>> {
        let header = self.0.hear(20).await?;
        let chunk = decode_chunk(header.as_slice().try_into().unwrap()).unwrap();
        assert_eq!(chunk.cookie, 9);
        let payload = self.0.hear(chunk.len as usize).await?;
        Some(match chunk.brings {
            Brings::Sums => Ok(decode_sums(&payload, (payload.len() - 4) / 8).unwrap()),
            Brings::Error => Err(be32(&payload, 0).unwrap()),
        })
    }

    async fn sums(&self, offset: u64, len: u32, flags: u16) -> Result<Vec<u32>, u32> {
        self.ask_sums(offset, len, flags).await;
        self.sums_answered().await.unwrap()
    }
}

/// Blocks from the third on are not zero.
fn filled() -> SimStore {
    let store = SimStore::new(SIZE);
    let bytes: Vec<u8> = (0..SIZE - 8192)
        .map(|at| u8::try_from(at % 251).unwrap())
        .collect();
    store.put(8192, &bytes);
    store
}

fn expected(store: &SimStore, first: usize, count: usize) -> Vec<u32> {
    let block = |at| store.get((first + at) * 4096, 4096);
    (0..count).map(|at| crc32fast::hash(&block(at))).collect()
}

#[test]
fn checksums_are_those_of_the_content() {
    run(async {
        let store = filled();
        let server = server(&store, Unclaimed::Read);
        let client = Client::with_sums(&server).await;
        let want = expected(&store, 1, 300);
        assert_eq!(client.sums(4096, 300 * 4096, 0).await, Ok(want.clone()));
        assert_eq!(client.sums(4096, 4096, 0).await, Ok(want[..1].to_vec()));
        assert_eq!(
            client.sums(8192, 1 << 20, ONE).await,
            Ok(want[1..2].to_vec())
        );
        // A part of a block at the end is left out, and of what is too much the rest.
        assert_eq!(
            client.sums(4096, 8192 + 512, 0).await,
            Ok(want[..2].to_vec())
        );
        let all = client.sums(0, 8 << 20, 0).await.unwrap();
        assert_eq!(all, expected(&store, 0, SUMS_MAX as usize));
        for (offset, len) in [(512, 4096), (0, 512), (0, 0), (SIZE as u64, 4096)] {
            assert_eq!(client.sums(offset, len, 0).await, Err(EINVAL));
        }
    });
}

#[test]
fn what_cannot_be_read_has_no_checksum() {
    run(async {
        let store = filled();
        let server = server(&store, Unclaimed::Read);
        let client = Client::with_sums(&server).await;
        store.spoil(Some(20 * 4096 + 512));
        assert_eq!(client.sums(0, 1 << 20, 0).await, Err(EIO));
        let around = client.sums(21 * 4096, 4096, 0).await;
        assert_eq!(around, Ok(expected(&store, 21, 1)));
        store.spoil(None);
        assert_eq!(
            client.sums(0, 1 << 20, 0).await,
            Ok(expected(&store, 0, 256))
        );
    });
}

#[test]
fn reads_are_answered_by_chunks_once_that_is_agreed_on() {
    run(async {
        let store = filled();
        let server = server(&store, Unclaimed::Read);
        let client = Client::with_sums(&server).await;
        let ask = Ask {
            kind: Kind::Read,
            fua: false,
            barrier: false,
            offset: 8192,
            len: 4096,
        };
        client.ask(&ask).await;
        let reply = client.0.hear(28 + 4096).await.unwrap();
        let head = b"\x66\x8e\x33\xef\0\x01\0\x01\0\0\0\0\0\0\0\0\0\0\x10\x08\0\0\0\0\0\0\x20\0";
        assert_eq!(reply[..28], head[..]);
        assert_eq!(reply[28..], store.get(8192, 4096));
        let failed = b"\x66\x8e\x33\xef\0\x01\x80\x01\0\0\0\0\0\0\0\0\0\0\0\x06\0\0\0\x05\0\0";
        store.spoil(Some(8192));
        client.ask(&ask).await;
        assert_eq!(client.0.hear(26).await.unwrap(), failed);
        // All other replies stay as they are.
        client.ask(&Ask::FLUSH).await;
        assert_eq!(client.answer().await, Some(0));
        assert_eq!(client.write(100, 1).await, Some(EPERM));
    });
}

#[test]
fn who_has_not_agreed_is_refused_simply() {
    run(async {
        let server = server(&filled(), Unclaimed::Read);
        let client = Client::stranger(&server, WIDE).await;
        client.ask_sums(0, 4096, 0).await;
        assert_eq!(client.answer().await, Some(EINVAL));
        assert!(client.read(2).await.is_some(), "and goes on");
    });
}

/// However much is asked for, what is under way is limited, and nobody else waits.
#[test]
fn many_questions_are_in_nobodys_way() {
    run(async {
        let store = filled();
        let server = server(&store, Unclaimed::Read);
        let writer = Client::writer(&server, &blank(1)).await;
        let client = Client::with_sums(&server).await;
        store.hold_reads(true);
        for _ in 0..8 {
            client.ask_sums(0, 4 << 20, 0).await;
        }
        idle().await;
        assert_eq!(store.reading(), 1, "4 MiB at a time");
        assert_eq!(writer.write(1000, 7).await, Some(0));
        store.hold_reads(false);
        let want = expected(&store, 0, 1024);
        for _ in 0..8 {
            assert_eq!(client.sums_answered().await, Some(Ok(want.clone())));
        }
    });
}
