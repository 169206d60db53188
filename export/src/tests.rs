//! The server in memory: take-overs, drains and limits, without a wait that is not for something.
//! Time stands still while anything can run, and jumps to the next timer otherwise.
#![allow(clippy::unwrap_used)]

mod barriers;
mod failures;
mod sums;
mod tls;

use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use mirror::create::first_superblock;
use mirror::layout::Layout;
use mirror::superblock::{COPY_A_OFFSET, COPY_B_OFFSET, Epoch, SlotRecord, SlotState, Superblock};
use peer::claim::{Claim, Fence, Seen, encode};
use peer::server::{EPERM, EVERYTHING, Export, MAX_PAYLOAD_BYTES};
use peer::tls::Acceptor;
use peer::wire::{
    EXPORT_MULTI_CONN, EXPORT_READ_ONLY, INFO_FENCE, OPTION_CLAIM, OPTION_GO, OPTION_MAGIC,
    REP_ACK, REP_ERR_IN_USE, REP_ERR_POLICY, REP_INFO, be16, be32, be64,
};
use peer::{Ask, Kind, Rank};
use tokio::task::{LocalSet, spawn_local};
use uuid::Uuid;

use crate::server::{SESSIONS_MAX, Server, Unclaimed};
use crate::session::PAYLOAD_BYTES_MAX;
use crate::sim::{SimStore, SimStream, connection};
use crate::tasks::Local;

const SIZE: usize = 8 << 20;
const BLOCK: u32 = 4096;
/// Bytes that a connection holds in each direction.
const WIDE: usize = 1 << 20;

type SimServer = Rc<Server<Local, SimStore, SimStream>>;

fn run(test: impl Future<Output = ()>) {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_time().start_paused(true).build().unwrap();
    LocalSet::new().block_on(&runtime, test);
}

/// Until nothing can run any more.
async fn idle() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}

fn server(store: &SimStore, unclaimed: Unclaimed) -> SimServer {
    server_with(store, unclaimed, None)
}

fn server_with(store: &SimStore, unclaimed: Unclaimed, acceptor: Option<Acceptor>) -> SimServer {
    let export = Export {
        name: "m".to_owned(),
        size_bytes: SIZE as u64,
        block_bytes: 512,
        payload_bytes_max: PAYLOAD_BYTES_MAX,
        flags: EVERYTHING & !EXPORT_MULTI_CONN,
    };
    Server::new(
        (Local::new(), store.clone()),
        export,
        (unclaimed, 77),
        acceptor,
        Box::new(|_| ()),
    )
}

/// A superblock of mirror 9 at `epoch`, after `history`.
fn superblock(epoch: u128, history: &[u128]) -> Vec<u8> {
    let mut slots = vec![SlotRecord::empty(); 3];
    slots[0].member = Some(Uuid::from_u128(7));
    slots[0].state = SlotState::InSync;
    let numbered = |id: &u128| Epoch {
        id: *id,
        ordinal: 0,
    };
    let (mirror, layout) = (Uuid::from_u128(9), Layout::for_size(1 << 30));
    Superblock {
        member: Uuid::from_u128(7),
        history: history.iter().map(numbered).collect(),
        ..first_superblock(mirror, "data", layout, numbered(&epoch), slots)
    }
    .encode()
}

fn put_superblock(store: &SimStore, copy: &[u8]) {
    store.put(usize::try_from(COPY_A_OFFSET).unwrap(), copy);
    store.put(usize::try_from(COPY_B_OFFSET).unwrap(), copy);
}

/// A claim of `owner` that has seen no superblock.
fn blank(owner: u128) -> Claim {
    Claim {
        owner,
        take_over: false,
        resumes: None,
        seen: None,
    }
}

fn taking(claim: Claim) -> Claim {
    Claim {
        take_over: true,
        ..claim
    }
}

/// A claim of `owner` that has seen mirror 9 at `epoch`.
fn seen(owner: u128, epoch: u128, history: &[u128]) -> Claim {
    let seen = Seen {
        mirror: Uuid::from_u128(9).into_bytes(),
        epoch,
        history: history.to_vec(),
    };
    Claim {
        seen: Some(seen),
        ..blank(owner)
    }
}

/// A client, one request at a time unless told otherwise.
#[derive(Clone)]
struct Client(SimStream);

impl Client {
    /// Connects and greets.
    async fn new(server: &SimServer, capacity: usize) -> Self {
        let (client, theirs) = connection(capacity);
        server.open(theirs, "a test".to_owned()).await;
        assert_eq!(&client.hear(18).await.unwrap()[..8], b"NBDMAGIC");
        assert!(client.say(&3_u32.to_be_bytes()).await);
        Self(client)
    }

    async fn option(&self, option: u32, data: &[u8]) {
        let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend(data);
        self.0.say(&bytes).await;
    }

    async fn option_reply(&self) -> Option<(u32, Vec<u8>)> {
        let header = self.0.hear(20).await?;
        let len = be32(&header, 16).unwrap() as usize;
        let data = self.0.hear(len).await?;
        Some((be32(&header, 12).unwrap(), data))
    }

    /// The server's refusal, or its instance; none when the connection ends.
    async fn claim(&self, claim: Option<&Claim>) -> Option<Result<u128, String>> {
        let answer = self.fence(claim).await?;
        Some(answer.map(|fence| fence.instance))
    }

    /// The server's refusal, or its fence; none when the connection ends.
    async fn fence(&self, claim: Option<&Claim>) -> Option<Result<Fence, String>> {
        self.option(OPTION_CLAIM, &encode("m", claim)).await;
        let (kind, data) = self.option_reply().await?;
        if matches!(kind, REP_ERR_POLICY | REP_ERR_IN_USE) {
            return Some(Err(String::from_utf8(data).unwrap()));
        }
        assert_eq!((kind, be16(&data, 0)), (REP_INFO, Some(INFO_FENCE)));
        assert_eq!(self.option_reply().await?, (REP_ACK, Vec::new()));
        Some(Ok(Fence::decode(data[2..].try_into().unwrap())))
    }

    /// The transmission flags.
    async fn go(&self) -> u16 {
        self.option(OPTION_GO, &[0, 0, 0, 1, b'm', 0, 0]).await;
        let (_, export) = self.option_reply().await.unwrap();
        assert_eq!(be64(&export, 2), Some(SIZE as u64));
        let (_, sizes) = self.option_reply().await.unwrap();
        assert_eq!(be32(&sizes, 10), Some(PAYLOAD_BYTES_MAX));
        assert_eq!(self.option_reply().await, Some((REP_ACK, Vec::new())));
        be16(&export, 10).unwrap()
    }

    /// Connected, granted, and in transmission.
    async fn writer(server: &SimServer, claim: &Claim) -> Self {
        let client = Self::new(server, WIDE).await;
        assert_eq!(client.claim(Some(claim)).await, Some(Ok(77)));
        assert_eq!(client.go().await & EXPORT_READ_ONLY, 0);
        client
    }

    /// Without a claim, in transmission.
    async fn stranger(server: &SimServer, capacity: usize) -> Self {
        let client = Self::new(server, capacity).await;
        client.go().await;
        client
    }

    /// Sends a write of a block full of `byte`; false when the connection is gone.
    async fn send_write(&self, block: u64, byte: u8) -> bool {
        let ask = Ask {
            kind: Kind::Write,
            fua: false,
            rank: Rank::Any,
            offset: block * u64::from(BLOCK),
            len: BLOCK,
        };
        let mut bytes = ask.header(block).to_vec();
        bytes.resize(bytes.len() + BLOCK as usize, byte);
        self.0.say(&bytes).await
    }

    async fn ask(&self, ask: &Ask) -> bool {
        self.0.say(&ask.header(0)).await
    }

    /// The next reply's error; none when the connection ends.
    async fn answer(&self) -> Option<u32> {
        be32(&self.0.hear(16).await?, 4)
    }

    async fn write(&self, block: u64, byte: u8) -> Option<u32> {
        self.send_write(block, byte).await;
        self.answer().await
    }

    async fn read(&self, block: u64) -> Option<Vec<u8>> {
        let ask = Ask {
            kind: Kind::Read,
            fua: false,
            rank: Rank::Any,
            offset: block * u64::from(BLOCK),
            len: BLOCK,
        };
        self.ask(&ask).await;
        assert_eq!(self.answer().await?, 0);
        self.0.hear(BLOCK as usize).await
    }
}

#[test]
fn a_take_over_waits_for_what_is_under_way() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Read);
        let old = Client::writer(&server, &blank(1)).await;
        store.hold(true);
        assert!(old.send_write(100, 1).await);
        idle().await;
        assert_eq!(store.writing(), 1);
        let (new, granted) = (Client::new(&server, WIDE).await, Rc::new(Cell::new(false)));
        let task = {
            let (new, granted) = (new.clone(), Rc::clone(&granted));
            spawn_local(async move {
                assert_eq!(new.claim(Some(&taking(blank(2)))).await, Some(Ok(77)));
                granted.set(true);
            })
        };
        assert_eq!(old.answer().await, None, "the old session is cut");
        idle().await;
        assert!(!granted.get(), "its write has not ended");
        let flushes = store.flushes();
        store.hold(false);
        task.await.unwrap();
        assert_eq!((store.writing(), store.get(409_600, 1)), (0, vec![1]));
        assert_eq!(store.flushes(), flushes + 1, "and it is durable");
        new.go().await;
        assert_eq!(new.write(100, 2).await, Some(0));
        assert!(!old.send_write(100, 3).await);
        idle().await;
        assert_eq!(store.get(409_600, 1), [2]);
    });
}

#[test]
fn what_was_received_and_not_begun_never_happens() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Read);
        let old = Client::writer(&server, &blank(1)).await;
        store.hold(true);
        let sending = old.clone();
        spawn_local(async move {
            for block in 100..400 {
                sending.send_write(block, 1).await;
            }
        });
        idle().await;
        assert_eq!(store.writing(), 128, "no more are begun");
        let new = Client::new(&server, WIDE).await;
        let claim = taking(blank(2));
        let claiming = {
            let new = new.clone();
            spawn_local(async move { new.claim(Some(&claim)).await })
        };
        idle().await;
        store.hold(false);
        assert_eq!(claiming.await.unwrap(), Some(Ok(77)));
        let landed = |block: usize| store.get(block * BLOCK as usize, 1) == [1];
        let now = (100..400).filter(|block| landed(*block)).count();
        assert_eq!(now, 128);
        idle().await;
        assert_eq!((100..400).filter(|block| landed(*block)).count(), now);
    });
}

#[test]
fn a_writer_that_takes_no_replies_is_taken_over_all_the_same() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Write);
        let old = Client::stranger(&server, 64).await;
        let sending = old.clone();
        spawn_local(async move { while sending.send_write(100, 1).await {} });
        idle().await;
        let new = Client::stranger(&server, WIDE).await;
        assert_eq!(new.write(100, 2).await, Some(0));
        idle().await;
        assert_eq!(store.get(409_600, 1), [2]);
    });
}

#[test]
fn a_session_that_lives_is_cut_only_for_its_owner_or_on_demand() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Read);
        let first = Client::writer(&server, &blank(1)).await;
        let second = Client::new(&server, WIDE).await;
        let refused = second.claim(Some(&blank(2))).await.unwrap().unwrap_err();
        assert!(refused.contains("in use by session 1"), "{refused}");
        assert_eq!(first.write(100, 1).await, Some(0), "it goes on");
        // Refused it may still look, and the handshake goes on.
        assert_ne!(second.go().await & EXPORT_READ_ONLY, 0);
        let again = Client::writer(&server, &blank(1)).await;
        assert_eq!(first.answer().await, None);
        assert_eq!(again.write(100, 2).await, Some(0));
        Client::writer(&server, &taking(blank(2))).await;
        assert_eq!(again.answer().await, None);
        assert!(second.read(100).await.is_some(), "who looks is not cut");
    });
}

#[test]
fn a_session_that_has_left_is_in_nobodys_way() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Read);
        let first = Client::writer(&server, &blank(1)).await;
        store.hold(true);
        first.send_write(100, 1).await;
        idle().await;
        first.0.close();
        idle().await;
        let second = Client::new(&server, WIDE).await;
        let claiming = {
            let second = second.clone();
            spawn_local(async move { second.claim(Some(&blank(2))).await })
        };
        idle().await;
        assert!(!claiming.is_finished(), "its write has not ended");
        store.hold(false);
        assert_eq!(claiming.await.unwrap(), Some(Ok(77)));
    });
}

#[test]
fn an_older_epoch_is_refused_and_costs_nobody_a_session() {
    run(async {
        let store = SimStore::new(SIZE);
        put_superblock(&store, &superblock(30, &[20, 10]));
        let server = server(&store, Unclaimed::Read);
        let writer = Client::writer(&server, &seen(1, 30, &[20, 10])).await;
        for (claim, why) in [
            (seen(2, 20, &[10]), "older"),
            (seen(2, 40, &[20, 10]), "split brain"),
            (blank(2), "look again"),
        ] {
            let client = Client::new(&server, WIDE).await;
            let refused = client.claim(Some(&taking(claim))).await.unwrap();
            assert!(refused.as_ref().unwrap_err().contains(why), "{refused:?}");
        }
        assert_eq!(writer.write(100, 1).await, Some(0), "it goes on");
        Client::writer(&server, &taking(seen(2, 50, &[40, 30]))).await;
    });
}

#[test]
fn the_last_write_of_the_old_session_may_be_a_new_epoch() {
    run(async {
        let store = SimStore::new(SIZE);
        put_superblock(&store, &superblock(30, &[20]));
        let server = server(&store, Unclaimed::Read);
        let old = Client::writer(&server, &seen(1, 30, &[20])).await;
        store.hold(true);
        let ask = Ask {
            kind: Kind::Write,
            fua: true,
            rank: Rank::Any,
            offset: COPY_A_OFFSET,
            len: 8192,
        };
        let copy = superblock(40, &[30, 20]);
        old.0
            .say(&[&ask.header(1)[..], &copy, &copy].concat())
            .await;
        idle().await;
        let new = Client::new(&server, WIDE).await;
        let claiming = {
            let new = new.clone();
            spawn_local(async move { new.claim(Some(&taking(seen(2, 30, &[20])))).await })
        };
        idle().await;
        store.hold(false);
        let refused = claiming.await.unwrap().unwrap().unwrap_err();
        assert!(refused.contains("older"), "{refused}");
        // What has looked again is let in.
        assert_eq!(new.claim(Some(&seen(2, 40, &[30, 20]))).await, Some(Ok(77)));
    });
}

#[test]
fn a_disk_that_does_not_flush_has_no_writer() {
    run(async {
        let store = SimStore::new(SIZE);
        store.fail_flushes();
        let server = server(&store, Unclaimed::Write);
        let client = Client::new(&server, WIDE).await;
        let refused = client.claim(Some(&blank(1))).await.unwrap().unwrap_err();
        assert!(refused.contains("flush"), "{refused}");
        client.go().await;
        assert_eq!(client.write(100, 1).await, Some(EPERM));
        assert_eq!(store.get(409_600, 1), [0]);
    });
}

#[test]
fn who_has_not_claimed_reads() {
    run(async {
        let store = SimStore::new(SIZE);
        store.put(409_600, &[5]);
        let server = server(&store, Unclaimed::Read);
        let client = Client::new(&server, WIDE).await;
        assert_eq!(client.claim(None).await, Some(Ok(77)), "asking is free");
        assert_ne!(client.go().await & EXPORT_READ_ONLY, 0);
        assert_eq!(client.write(100, 1).await, Some(EPERM));
        assert_eq!(client.read(100).await.unwrap()[0], 5);
    });
}

#[test]
fn without_claims_the_first_write_takes_over() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Write);
        let first = Client::stranger(&server, WIDE).await;
        assert_eq!(first.write(100, 1).await, Some(0));
        let second = Client::stranger(&server, WIDE).await;
        assert_eq!(second.read(100).await.unwrap()[0], 1);
        assert_eq!(first.write(100, 2).await, Some(0), "who reads cuts nobody");
        assert_eq!(second.write(100, 3).await, Some(0));
        assert_eq!(first.answer().await, None);
        // A claim stands above that.
        let third = Client::writer(&server, &taking(blank(1))).await;
        assert_eq!(second.answer().await, None);
        let fourth = Client::stranger(&server, WIDE).await;
        assert_eq!(fourth.write(100, 4).await, Some(EPERM));
        assert_eq!(third.write(100, 5).await, Some(0));
    });
}

#[test]
fn a_client_that_takes_no_replies_costs_a_bounded_amount_and_no_one_else() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Read);
        let slow = Client::stranger(&server, 4096).await;
        let asked = Rc::new(Cell::new(0_u32));
        let (sending, count) = (slow.clone(), Rc::clone(&asked));
        spawn_local(async move {
            let ask = Ask {
                kind: Kind::Read,
                fua: false,
                rank: Rank::Any,
                offset: 0,
                len: 256 << 10,
            };
            while sending.ask(&ask).await {
                count.set(count.get() + 1);
            }
        });
        idle().await;
        let stuck = asked.get();
        // 16 fill its room; a few thousand headers wait in the inbox, unread.
        assert!(
            stuck < 16 + 65536 / 28 + 4096 / 28 + 8,
            "{stuck} were taken"
        );
        let other = Client::stranger(&server, WIDE).await;
        assert!(other.read(0).await.is_some());
        idle().await;
        assert_eq!(asked.get(), stuck);
        server.stop().await.unwrap();
        assert_eq!(other.read(0).await, None);
    });
}

#[test]
fn nonsense_costs_one_session() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Read);
        let writer = Client::writer(&server, &blank(1)).await;
        for nonsense in [&[0xa5; 4096][..], b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff"] {
            let client = Client::new(&server, WIDE).await;
            client.0.say(nonsense).await;
        }
        let client = Client::stranger(&server, WIDE).await;
        client.0.say(&[0xa5; 28]).await;
        assert_eq!(client.answer().await, None);
        let client = Client::stranger(&server, WIDE).await;
        let too_long = Ask {
            kind: Kind::Write,
            fua: false,
            rank: Rank::Any,
            offset: 0,
            len: MAX_PAYLOAD_BYTES + 1,
        };
        client.ask(&too_long).await;
        assert_eq!(client.answer().await, None);
        assert_eq!(writer.write(100, 1).await, Some(0));
    });
}

#[test]
fn who_never_ends_the_handshake_is_cut() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Read);
        let (silent, theirs) = connection(WIDE);
        server.open(theirs, "a test".to_owned()).await;
        silent.hear(18).await.unwrap();
        assert_eq!(silent.hear(1).await, None);
    });
}

#[test]
fn the_silent_make_room_and_the_writer_stays() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Read);
        let writer = Client::writer(&server, &blank(1)).await;
        let mut others = Vec::new();
        for _ in 1..SESSIONS_MAX {
            idle().await;
            others.push(Client::stranger(&server, WIDE).await);
        }
        idle().await;
        assert!(others[0].read(0).await.is_some());
        for _ in 0..3 {
            idle().await;
            assert!(
                Client::stranger(&server, WIDE)
                    .await
                    .read(0)
                    .await
                    .is_some()
            );
        }
        assert!(others[0].read(0).await.is_some(), "it has been heard of");
        assert_eq!(others[1].answer().await, None);
        assert_eq!(writer.write(100, 1).await, Some(0));
    });
}

#[test]
fn a_stop_answers_what_is_under_way_and_flushes() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Read);
        let writer = Client::writer(&server, &blank(1)).await;
        store.hold(true);
        writer.send_write(100, 1).await;
        idle().await;
        let flushes = store.flushes();
        let stopping = spawn_local(async move { server.stop().await });
        // Longer than a stop has patience with clients: it is the disk that is slow.
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert!(!stopping.is_finished());
        store.hold(false);
        assert_eq!(stopping.await.unwrap(), Ok(()));
        assert_eq!(store.flushes(), flushes + 1);
        assert_eq!(store.get(409_600, 1), [1]);
    });
}
