//! The order of a durable write and what is asked for after it.

use super::*;

const EIO: Option<u32> = Some(5);

impl Client {
    async fn send_placed(&self, rank: Rank, block: u64, byte: u8) {
        let ask = Ask {
            kind: Kind::Write,
            fua: matches!(rank, Rank::Barrier { .. }),
            rank,
            offset: block * u64::from(BLOCK),
            len: BLOCK,
        };
        let data = [byte; BLOCK as usize];
        self.0.say(&[&ask.header(block)[..], &data].concat()).await;
    }

    async fn send_barrier(&self, first: bool, block: u64) {
        self.send_placed(Rank::Barrier { first }, block, 1).await;
    }

    async fn send_behind(&self, block: u64) {
        self.send_placed(Rank::Behind, block, 7).await;
    }
}

fn holds(store: &SimStore, block: usize, byte: u8) -> bool {
    let bytes = store.get(block * BLOCK as usize, BLOCK as usize);
    bytes.iter().all(|it| *it == byte)
}

#[test]
fn what_is_behind_a_barrier_waits_for_it_and_nothing_else_does() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Read);
        let writer = Client::writer(&server, &blank(1)).await;
        assert_eq!(writer.write(300, 9).await, Some(0));
        store.hold_flushes(true);
        writer.send_barrier(true, 100).await;
        writer.send_behind(200).await;
        let zeroes = Ask {
            kind: Kind::WriteZeroes,
            fua: false,
            rank: Rank::Behind,
            offset: 300 * u64::from(BLOCK),
            len: BLOCK,
        };
        writer.ask(&zeroes).await;
        assert!(writer.read(200).await.unwrap().iter().all(|it| *it == 0));
        assert_eq!(writer.write(400, 5).await, Some(0));
        idle().await;
        assert!(holds(&store, 200, 0) && holds(&store, 300, 9), "too early");
        store.hold_flushes(false);
        for _ in 0..3 {
            assert_eq!(writer.answer().await, Some(0));
        }
        assert!(holds(&store, 100, 1) && holds(&store, 200, 7) && holds(&store, 300, 0));
    });
}

/// Also behind another barrier of the group, which ends well: its client does not know yet.
#[test]
fn what_is_behind_a_barrier_that_failed_is_refused() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Read);
        let writer = Client::writer(&server, &blank(1)).await;
        store.hold_flushes(true);
        store.fail_one_flush();
        writer.send_barrier(true, 100).await;
        writer.send_behind(200).await;
        idle().await;
        store.hold_flushes(false);
        assert_eq!([writer.answer().await, writer.answer().await], [EIO; 2]);
        writer.send_barrier(false, 101).await;
        assert_eq!(writer.answer().await, Some(0));
        writer.send_behind(200).await;
        assert_eq!(writer.answer().await, EIO);
        assert!(holds(&store, 200, 0));
        assert_eq!(writer.write(300, 9).await, Some(0), "not behind it");
        writer.send_barrier(true, 100).await;
        assert_eq!(writer.answer().await, Some(0));
        writer.send_behind(200).await;
        assert_eq!(writer.answer().await, Some(0), "the next group");
        assert!(holds(&store, 200, 7));
    });
}

/// A barrier that is refused at once has failed as well.
#[test]
fn a_barrier_that_is_refused_has_failed() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Read);
        let writer = Client::writer(&server, &blank(1)).await;
        writer
            .send_barrier(true, SIZE as u64 / u64::from(BLOCK))
            .await;
        assert_ne!(writer.answer().await, Some(0));
        writer.send_behind(200).await;
        assert_eq!(writer.answer().await, EIO);
        assert!(holds(&store, 200, 0));
    });
}

/// A session that has been cut leaves nothing that waits: the next writer gets in.
#[test]
fn a_take_over_does_not_wait_for_ever_behind_a_barrier() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Read);
        let old = Client::writer(&server, &blank(1)).await;
        store.hold_flushes(true);
        old.send_barrier(true, 100).await;
        old.send_behind(200).await;
        idle().await;
        let new = Client::new(&server, WIDE).await;
        let claiming = {
            let new = new.clone();
            spawn_local(async move { new.claim(Some(&taking(blank(2)))).await })
        };
        idle().await;
        store.hold_flushes(false);
        assert_eq!(claiming.await.unwrap(), Some(Ok(77)));
        new.go().await;
        assert_eq!(new.write(200, 8).await, Some(0));
        idle().await;
        assert!(holds(&store, 200, 8), "the old session's write came later");
    });
}
