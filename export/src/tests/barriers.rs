//! The order of a durable write and what is asked for after it.

use super::*;

const EIO: Option<u32> = Some(5);

impl Client {
    async fn send_barrier(&self, block: u64, byte: u8) {
        let ask = Ask {
            kind: Kind::Write,
            fua: true,
            barrier: true,
            offset: block * u64::from(BLOCK),
            len: BLOCK,
        };
        let data = [byte; BLOCK as usize];
        self.0.say(&[&ask.header(block)[..], &data].concat()).await;
    }
}

fn holds(store: &SimStore, block: usize, byte: u8) -> bool {
    let bytes = store.get(block * BLOCK as usize, BLOCK as usize);
    bytes.iter().all(|it| *it == byte)
}

#[test]
fn changes_wait_for_a_barrier_and_reads_do_not() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Read);
        let writer = Client::writer(&server, &blank(1)).await;
        assert!(writer.send_write(300, 9).await);
        assert_eq!(writer.answer().await, Some(0));
        store.hold_flushes(true);
        writer.send_barrier(100, 1).await;
        assert!(writer.send_write(200, 7).await);
        let zeroes = Ask {
            kind: Kind::WriteZeroes,
            fua: false,
            barrier: false,
            offset: 300 * u64::from(BLOCK),
            len: BLOCK,
        };
        writer.ask(&zeroes).await;
        assert!(writer.read(200).await.unwrap().iter().all(|it| *it == 0));
        idle().await;
        assert!(holds(&store, 200, 0) && holds(&store, 300, 9), "too early");
        store.hold_flushes(false);
        for _ in 0..3 {
            assert_eq!(writer.answer().await, Some(0));
        }
        assert!(holds(&store, 100, 1) && holds(&store, 200, 7) && holds(&store, 300, 0));
    });
}

#[test]
fn what_follows_a_barrier_that_failed_is_refused() {
    run(async {
        let store = SimStore::new(SIZE);
        let server = server(&store, Unclaimed::Read);
        let writer = Client::writer(&server, &blank(1)).await;
        store.hold_flushes(true);
        store.fail_one_flush();
        writer.send_barrier(100, 1).await;
        assert!(writer.send_write(200, 7).await);
        idle().await;
        store.hold_flushes(false);
        assert_eq!([writer.answer().await, writer.answer().await], [EIO; 2]);
        assert_eq!(writer.write(200, 7).await, EIO, "also what comes later");
        assert!(holds(&store, 200, 0));
        writer.send_barrier(100, 2).await;
        assert_eq!(writer.answer().await, Some(0));
        assert_eq!(writer.write(200, 7).await, Some(0), "until one succeeds");
        assert!(holds(&store, 200, 7));
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
        old.send_barrier(100, 1).await;
        assert!(old.send_write(200, 7).await);
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
