//! Questions for checksums against servers that are scripted.
#![allow(clippy::unwrap_used)]

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use peer::structured::{Head, put_context, put_sum, sums_bytes};
use peer::wire::{be16, be32, be64};

use super::*;
use crate::ring::tests::on_ring;

/// A request: cookie, offset and blocks.
type Got = (u64, u64, usize);

struct Server(UnixStream);

impl Server {
    /// The next question; none when the client has closed.
    fn next(&mut self) -> Option<Got> {
        let mut header = [0; REQUEST_BYTES];
        self.0.read_exact(&mut header).ok()?;
        assert_eq!((be16(&header, 4), be16(&header, 6)), (Some(0), Some(7)));
        let blocks = be32(&header, 24)? as usize / 4096;
        Some((be64(&header, 8)?, be64(&header, 16)?, blocks))
    }

    /// Answers with the numbers of the blocks as checksums.
    fn answer(&mut self, (cookie, offset, blocks): Got) {
        let mut payload = vec![0; sums_bytes(blocks)];
        put_context(&mut payload);
        for at in 0..blocks {
            put_sum(&mut payload, at, crc(offset, at));
        }
        let head = Head::of_sums(cookie, u32::try_from(payload.len()).unwrap());
        self.0.write_all(head.bytes()).unwrap();
        self.0.write_all(&payload).unwrap();
    }
}

fn crc(offset: u64, at: usize) -> u32 {
    u32::try_from(offset / 4096).unwrap() + u32::try_from(at).unwrap()
}

fn right(offset: u64, blocks: usize) -> Option<Vec<u32>> {
    Some((0..blocks).map(|at| crc(offset, at)).collect())
}

/// Connects to these scripts one after the other, each on a thread of its own, and then to nobody.
fn scripted<F: FnOnce(Server) + Send + 'static>(ring: &Rc<Ring>, scripts: Vec<F>) -> Rc<Sums> {
    let scripts = Mutex::new(scripts.into_iter());
    let connect: Connect = Arc::new(move || {
        let script = scripts.lock().unwrap().next().ok_or("nobody is there")?;
        let (ours, theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || script(Server(theirs)));
        Ok((OwnedFd::from(ours), None))
    });
    Sums::new(ring, "nbd://test/", connect, Duration::from_millis(500))
}

#[test]
fn many_questions_are_answered_in_any_order() {
    on_ring(64, |ring| {
        let script = |mut server: Server| {
            let mut got: Vec<_> = (0..32).map(|_| server.next().unwrap()).collect();
            got.reverse();
            got.into_iter().for_each(|it| server.answer(it));
            let (cookie, ..) = server.next().unwrap();
            let head = Head::of_error(cookie, 5);
            server.0.write_all(head.bytes()).unwrap();
            let last = server.next().unwrap();
            server.answer(last);
            assert_eq!(server.next(), None, "it is closed in the end");
        };
        let sums = scripted(&ring, vec![script]);
        let ours = Rc::clone(&sums);
        ring.block_on(async move {
            let asked: Vec<_> = (1..33)
                .map(|count| (count, ours.ask(1 << 22, count * 32).unwrap()))
                .collect();
            for (count, op) in asked {
                assert_eq!(op.await, right(1 << 22, count * 32));
            }
            let unreadable = ours.ask(0, 1).unwrap();
            assert_eq!(unreadable.await, None);
            assert_eq!(
                ours.ask(4096, 2).unwrap().await,
                right(4096, 2),
                "it goes on"
            );
            assert!(ours.ask(0, 0).is_none() && ours.ask(0, 1025).is_none());
            ours.end();
            assert!(ours.ask(0, 1).is_none());
        })
        .unwrap();
    });
}

#[test]
fn what_makes_no_sense_or_does_not_come_is_not_to_be_had() {
    type Script = fn(Server, Got);
    let scripts: [Script; 6] = [
        |mut server, _| server.0.write_all(&[0xa5; 64]).unwrap(),
        // One block less.
        |mut server, (cookie, offset, blocks)| server.answer((cookie, offset, blocks - 1)),
        |mut server, (cookie, offset, blocks)| server.answer((cookie + 1, offset, blocks)),
        |mut server, got| {
            server.answer(got);
            server.answer(got);
        },
        |_, _| {},
        |mut server, _| assert_eq!(server.next(), None, "it is given up"),
    ];
    for (number, script) in scripts.into_iter().enumerate() {
        on_ring(64, move |ring| {
            let script = move |mut server: Server| {
                let first = server.next().unwrap();
                script(server, first);
            };
            let sums = scripted(&ring, vec![script, script]);
            let sleeping = Rc::clone(&ring);
            ring.block_on(async move {
                let first = sums.ask(0, 3).unwrap().await;
                let twice = number == 3;
                assert_eq!(first, right(0, 3).filter(|_| twice), "script {number}");
                let soon = ring::now() + Duration::from_millis(100);
                sleeping.sleep_until(soon).await;
                assert!(sums.ask(0, 3).is_none(), "not before a minute: {number}");
            })
            .unwrap();
        });
    }
}

#[test]
fn where_nobody_is_nothing_is_to_be_had() {
    on_ring(64, |ring| {
        let sums = scripted::<fn(Server)>(&ring, Vec::new());
        ring.block_on(async move {
            assert!(sums.are_to_be_had(), "nobody knows better yet");
            let both = (sums.ask(0, 3).unwrap(), sums.ask(0, 3).unwrap());
            assert_eq!((both.0.await, both.1.await), (None, None));
            assert!(sums.ask(0, 3).is_none() && !sums.are_to_be_had());
            // Another time it is tried again.
            sums.state.borrow_mut().not_before = Duration::ZERO;
            assert!(sums.are_to_be_had());
            assert_eq!(sums.ask(0, 3).unwrap().await, None);
        })
        .unwrap();
    });
}
