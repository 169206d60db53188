//! What must not be lost or taken when flushes fail, sessions are cut, claims are refused.

use std::os::unix::process::ExitStatusExt as _;

use super::*;
use crate::session::HANDSHAKE_LIMIT;
use crate::tasks::{Local, Tasks as _};

const FLUSH: Ask = Ask {
    kind: Kind::Flush,
    fua: false,
    rank: Rank::Any,
    offset: 0,
    len: 0,
};
const EIO: Option<u32> = Some(5);

impl Client {
    async fn flush(&self) -> Option<u32> {
        self.ask(&FLUSH).await;
        self.answer().await
    }

    async fn write_fua(&self, block: u64, byte: u8) -> Option<u32> {
        let ask = Ask {
            kind: Kind::Write,
            fua: true,
            rank: Rank::Any,
            offset: block * u64::from(BLOCK),
            len: BLOCK,
        };
        self.ask(&ask).await;
        self.0.say(&[byte; BLOCK as usize]).await;
        self.answer().await
    }
}

#[test]
fn a_flush_of_one_who_only_reads_reaches_no_disk() {
    run(async {
        let store = SimStore::new(SIZE);
        for unclaimed in [Unclaimed::Read, Unclaimed::Write] {
            let server = server(&store, unclaimed);
            let writer = Client::writer(&server, &blank(1)).await;
            assert_eq!(writer.write(100, 1).await, Some(0));
            let reader = Client::stranger(&server, WIDE).await;
            let flushes = store.flushes();
            store.fail_one_flush();
            assert_eq!(reader.flush().await, Some(0));
            assert_eq!(store.flushes(), flushes);
            // The failure is the writer's to hear of, once.
            assert_eq!(writer.flush().await, EIO);
            assert_eq!(writer.flush().await, Some(0));
            assert_eq!(store.flushes(), flushes + 2);
        }
    });
}

#[test]
fn a_failed_flush_is_everybodys_who_relied_on_it() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Read);
        let writer = Client::writer(&server, &blank(1)).await;
        assert_eq!(writer.write(100, 1).await, Some(0));
        store.hold_flushes(true);
        store.fail_one_flush();
        writer.ask(&FLUSH).await;
        writer.ask(&FLUSH).await;
        let ask = Ask {
            kind: Kind::Write,
            fua: true,
            rank: Rank::Any,
            offset: 0,
            len: BLOCK,
        };
        writer.ask(&ask).await;
        writer.0.say(&[7; BLOCK as usize]).await;
        idle().await;
        // The disk says it to the first of them and is content with the others.
        store.hold_flushes(false);
        let answers = [
            writer.answer().await,
            writer.answer().await,
            writer.answer().await,
        ];
        assert_eq!(answers, [EIO; 3]);
        assert_eq!(writer.flush().await, Some(0), "they have been told");
        assert_eq!(writer.write_fua(0, 8).await, Some(0));
        store.fail_one_flush();
        assert_eq!(writer.write_fua(0, 9).await, EIO);
    });
}

#[test]
fn a_new_writer_begins_without_the_failures_of_the_one_before() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Read);
        let first = Client::writer(&server, &blank(1)).await;
        store.fail_one_flush();
        assert_eq!(first.flush().await, EIO);
        let second = Client::writer(&server, &blank(1)).await;
        assert_eq!(second.write_fua(100, 1).await, Some(0));
    });
}

/// All places are taken: one writes, the one that has been silent for longest waits for reads
/// that do not end and has sent a write behind them, and was cut for somebody who came in vain.
async fn with_one_that_cannot_end(store: &SimStore, server: &SimServer) -> (Client, Vec<Client>) {
    let writer = Client::stranger(server, WIDE).await;
    assert_eq!(writer.write(100, 1).await, Some(0));
    let mut others = vec![Client::stranger(server, WIDE).await];
    store.hold_reads(true);
    let mut ask = Ask {
        kind: Kind::Read,
        fua: false,
        rank: Rank::Any,
        offset: 0,
        len: BLOCK,
    };
    for _ in 0..128 {
        others[0].ask(&ask).await;
    }
    // What is refused also waits for room.
    ask.offset = SIZE as u64;
    others[0].ask(&ask).await;
    others[0].send_write(100, 9).await;
    for _ in 2..SESSIONS_MAX {
        idle().await;
        others.push(Client::stranger(server, WIDE).await);
    }
    idle().await;
    let (late, theirs) = connection(WIDE);
    server.open(theirs, "a test".to_owned()).await;
    let greeting = tokio::time::timeout(Duration::from_millis(1), late.hear(1));
    assert!(greeting.await.is_err(), "there is no place yet");
    assert_eq!(others[0].answer().await, None, "it has been cut");
    (writer, others)
}

#[test]
fn one_that_cannot_end_is_not_cut_again_and_again() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Write);
        let (writer, others) = with_one_that_cannot_end(&store, &server).await;
        Client::stranger(&server, WIDE).await;
        assert_eq!(others[1].answer().await, None, "the next silent one went");
        assert_eq!(writer.write(100, 2).await, Some(0));
    });
}

#[test]
fn a_session_that_was_cut_takes_nothing_back() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Write);
        let (writer, _others) = with_one_that_cannot_end(&store, &server).await;
        // It comes to the write that it sent before.
        store.hold_reads(false);
        idle().await;
        assert_eq!(store.get(409_600, 1), [1]);
        assert_eq!(writer.write(100, 2).await, Some(0), "it is the writer");
    });
}

#[test]
fn a_refused_second_claim_gives_the_right_back() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Read);
        let first = Client::new(&server, WIDE).await;
        assert_eq!(first.claim(Some(&blank(1))).await, Some(Ok(77)));
        put_superblock(&store, &superblock(30, &[20]));
        let refused = first.claim(Some(&blank(1))).await.unwrap().unwrap_err();
        assert!(refused.contains("look again"), "{refused}");
        // It is in nobody's way, and writes nothing.
        Client::writer(&server, &seen(2, 30, &[20])).await;
        assert_ne!(first.go().await & EXPORT_READ_ONLY, 0);
        assert_eq!(first.write(100, 1).await, Some(EPERM));
    });
}

#[test]
fn a_member_is_written_to_by_claims_only() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Write);
        let first = Client::stranger(&server, WIDE).await;
        assert_eq!(first.write(100, 1).await, Some(0));
        let mut too_new = superblock(30, &[]);
        too_new[8] = 99;
        too_new[12..16].fill(0);
        let crc = crc32fast::hash(&too_new);
        too_new[12..16].copy_from_slice(&crc.to_le_bytes());
        for copy in [superblock(30, &[]), too_new] {
            put_superblock(&store, &copy);
            let second = Client::stranger(&server, WIDE).await;
            assert_eq!(second.write(100, 2).await, Some(EPERM));
            assert_eq!(second.read(100).await.unwrap()[0], 1);
            assert_eq!(first.write(101, 1).await, Some(0), "it was not cut");
        }
        put_superblock(&store, &[0; 4096]);
        let second = Client::stranger(&server, WIDE).await;
        assert_eq!(second.write(100, 2).await, Some(0));
    });
}

#[test]
fn in_use_is_not_the_same_as_refused() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Read);
        let _writer = Client::writer(&server, &blank(1)).await;
        let client = Client::new(&server, WIDE).await;
        client
            .option(OPTION_CLAIM, &encode("m", Some(&blank(2))))
            .await;
        let (kind, words) = client.option_reply().await.unwrap();
        assert_eq!(kind, REP_ERR_IN_USE);
        let words = String::from_utf8(words).unwrap();
        assert!(words.contains("--take-over"), "{words}");
    });
}

#[test]
fn a_panic_ends_the_process() {
    const CHILD: &str = "EXPORT_TEST_PANICS";
    if std::env::var_os(CHILD).is_some() {
        return run(async {
            Local::new().spawn(async { assert_eq!(1, 2, "as it is meant to be") });
            idle().await;
        });
    }
    let test = "tests::failures::a_panic_ends_the_process";
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    let output = child.args(["--exact", test]).env(CHILD, "1").output();
    assert_eq!(output.unwrap().status.signal(), Some(6), "SIGABRT");
}

/// Who goes on where it was is granted the turn it had; anybody's claim in between, also of the same
/// owner, a write without a claim, and a flush that failed, end that.
#[test]
fn a_turn_is_resumed_until_anything_else_has_happened() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Write);
        let claimed = async |claim: Option<Claim>| {
            let client = Client::new(&server, WIDE).await;
            let fence = client.fence(claim.as_ref()).await.unwrap();
            fence.map(|it| (it.turn, client))
        };
        let resumed = |owner, turn| {
            claimed(Some(Claim {
                resumes: Some(turn),
                ..blank(owner)
            }))
        };
        let (first, old) = claimed(Some(blank(1))).await.unwrap();
        assert_eq!(
            claimed(None).await.unwrap().0,
            first,
            "asking changes nothing"
        );
        // While the session before lives, and when it has left.
        let (turn, client) = resumed(1, first).await.unwrap();
        assert_eq!(turn, first);
        assert_eq!(old.answer().await, None, "it was not cut");
        client.0.close();
        idle().await;
        assert_eq!(resumed(1, first).await.unwrap().0, first);
        for (owner, turn) in [(2, first), (1, first + 1), (1, first - 1)] {
            assert!(resumed(owner, turn).await.is_err());
        }
        assert!(claimed(Some(blank(2))).await.is_err(), "it is in use");
        let (turn, client) = resumed(1, first).await.unwrap();
        assert_eq!(turn, first, "who is refused had none");
        // A new claim of the same owner is another connection's: that one is not cut by the first.
        let (second, newer) = claimed(Some(blank(1))).await.unwrap();
        assert!(second > first);
        assert_eq!(client.answer().await, None);
        assert!(resumed(1, first).await.is_err());
        newer.go().await;
        assert_eq!(newer.write(100, 1).await, Some(0), "it was cut");
        let (other, client) = claimed(Some(taking(blank(2)))).await.unwrap();
        assert!(resumed(1, second).await.is_err());
        client.0.close();
        idle().await;
        assert!(
            resumed(1, second).await.is_err(),
            "also when that one has left"
        );
        let stranger = Client::stranger(&server, WIDE).await;
        assert_eq!(stranger.write(100, 1).await, Some(0));
        stranger.0.close();
        idle().await;
        assert!(
            resumed(2, other).await.is_err(),
            "a client without a claim has written"
        );
        let (last, client) = claimed(Some(blank(2))).await.unwrap();
        client.go().await;
        store.fail_one_flush();
        assert_ne!(client.flush().await, Some(0));
        assert!(resumed(2, last).await.is_err(), "a flush has failed");
    });
}

/// A disk says once that a flush failed. That of a claim that was given up, and of a session that was
/// cut, may come late: nobody goes on before it has come.
#[test]
fn a_flush_that_fails_for_nobody_ends_the_turn() {
    for of_a_claim in [true, false] {
        run(async move {
            let store = SimStore::new(SIZE);
            let server = server(&store, Unclaimed::Read);
            let client = Client::new(&server, WIDE).await;
            let claim = blank(1);
            let turn = client.fence(Some(&claim)).await.unwrap().unwrap().turn;
            let resume = Claim {
                resumes: Some(turn),
                ..claim
            };
            client.go().await;
            if of_a_claim {
                client.0.close();
                idle().await;
                store.delay_next_flush();
                let given_up = Client::new(&server, WIDE).await;
                let data = encode("m", Some(&resume));
                given_up.option(OPTION_CLAIM, &data).await;
                idle().await;
                given_up.0.close();
                tokio::time::advance(HANDSHAKE_LIMIT * 2).await;
            } else {
                store.delay_next_flush();
                client.ask(&FLUSH).await;
                idle().await;
                client.0.close();
            }
            let resuming = Client::new(&server, WIDE).await;
            let granted = spawn_local(async move { resuming.fence(Some(&resume)).await });
            idle().await;
            store.fail_delayed_flush();
            assert!(granted.await.unwrap().unwrap().is_err());
        });
    }
}
