//! Tests of connections that go on where one broke.

use super::net::Way;
use super::*;
use peer::claim::Fence;
use peer::link::Reopened;
use peer::{Address, ConnectError};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};

const FENCE: Fence = Fence {
    instance: 77,
    turn: 5,
    keeps_order: true,
};

fn opened(stream: UnixStream, fence: Option<Fence>) -> OpenedPeer {
    OpenedPeer {
        fd: OwnedFd::from(stream),
        tls: None,
        export: Export {
            size_bytes: 64 << 20,
            flags: ALL,
            blocks: BlockSizes::DEFAULT,
        },
        address: "nbd://test/".to_owned(),
        unfinished: None,
        fence,
    }
}

fn link(ring: &Rc<Ring>, opened: OpenedPeer, ways: Vec<Way>) -> Rc<Link<RingNet>> {
    let (net, opened) = (RingNet(Rc::clone(ring)), RingNet::bind(opened));
    Link::new(net, opened, ways, Duration::from_secs(30))
}

/// What comes of an attempt to connect again.
type Attempt = Box<dyn FnOnce() -> Result<(UnixStream, Fence), io::ErrorKind> + Send>;

/// A disk whose connections are these, one after the other; how many were asked for.
fn disk(
    ring: &Rc<Ring>,
    first: UnixStream,
    fence: Option<Fence>,
    attempts: Vec<Attempt>,
) -> (Rc<PeerDisk>, Rc<Peers>, Arc<Mutex<VecDeque<Attempt>>>) {
    let attempts = Arc::new(Mutex::new(VecDeque::from(attempts)));
    let ways = fence.map(|_| way(&attempts)).into_iter().collect();
    let link = link(ring, opened(first, fence), ways);
    let peers = Rc::new(Peers::default());
    peers.add(&link);
    (
        Rc::new(PeerDisk(link, Rc::default(), None)),
        peers,
        attempts,
    )
}

/// A way on which these attempts are made; after them nobody is there.
fn way(attempts: &Arc<Mutex<VecDeque<Attempt>>>) -> Way {
    let left = Arc::clone(attempts);
    let reopen = move || {
        let attempt = left.lock().unwrap().pop_front();
        let connected = match attempt.map_or(Err(io::ErrorKind::ConnectionRefused), |it| it()) {
            Ok((stream, fence)) => Ok(opened(stream, Some(fence))),
            Err(kind) => Err(ConnectError::Unreachable {
                address: "nbd://test/x".parse::<Address>().unwrap(),
                source: kind.into(),
            }),
        };
        Reopened::by(connected, OpenedPeer::fence, FENCE)
    };
    Way {
        answers: Arc::new(|| false),
        reopen: Arc::new(reopen),
    }
}

fn pair() -> (UnixStream, Server) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (ours, Server(theirs))
}

#[test]
fn another_connection_goes_on_where_one_broke() {
    on_ring(64, |ring| {
        let (first, mut old) = pair();
        let (second, mut new) = pair();
        let attempts: Vec<Attempt> = vec![
            Box::new(|| Err(io::ErrorKind::TimedOut)),
            Box::new(|| Err(io::ErrorKind::ConnectionReset)),
            Box::new(move || Ok((second, FENCE))),
        ];
        let (disk, _, attempts) = disk(&ring, first, Some(FENCE), attempts);
        let server = std::thread::spawn(move || {
            let asked = old.requests(9);
            // Answers two, and half of a third.
            old.reply(asked[1].cookie, 0, &[]);
            old.reply(asked[6].cookie, 0, &[content(asked[6].offset); 4096]);
            let half = [Server::header(asked[5].cookie, 0), vec![9; 1000]].concat();
            old.0.write_all(&half).unwrap();
            drop(old);
            let again = new.requests(7);
            for request in &again {
                let data = [content(request.offset); 4096];
                let data = if request.kind == READ { &data[..] } else { &[] };
                new.reply(request.cookie, 0, data);
            }
            assert!(new.next().is_none(), "asked for what was answered");
            (asked, again)
        });
        ring.block_on(async move {
            let written: Vec<_> = (0..4).map(|at| buffer(4096, at)).collect();
            let targets: Vec<_> = (0..4).map(|_| buffer(4096, 0)).collect();
            let mut ops: Vec<_> = (0..)
                .zip(&written)
                .map(|(at, data)| write(&disk, at * 4096, data, at == 3))
                .collect();
            ops.extend(
                (100..)
                    .zip(&targets)
                    .map(|(at, target)| read(&disk, at * 4096, target)),
            );
            ops.push(disk.submit(DiskRequest::Flush));
            for op in ops {
                assert_eq!(op.await, Ok(()));
            }
            for (at, target) in (100..).zip(&targets) {
                assert!(holds(target, content(at * 4096)), "block {at}");
            }
            assert_eq!(disk.in_flight(), 0);
            assert!(!written.iter().chain(&targets).any(|it| it.in_use()));
        })
        .unwrap();
        assert!(attempts.lock().unwrap().is_empty());
        let (asked, mut again) = server.join().unwrap();
        let mut missing: Vec<_> = [0, 2, 3, 4, 5, 7, 8].map(|at| asked[at].clone()).into();
        for list in [&mut missing, &mut again] {
            list.iter_mut().for_each(|it| it.cookie = 0);
            list.sort_by_key(|it| (it.kind, it.offset));
        }
        assert_eq!(again, missing);
    });
}

fn barrier(disk: &PeerDisk, offset: u64, data: &IoBuffer) -> PeerOp {
    let span = Span {
        buffer: data.clone(),
        start: 0,
        len: 4096,
    };
    disk.submit_barrier(DiskRequest::Write {
        offset,
        span,
        fua: true,
    })
}

/// A barrier reaches the new connection before what waits for it, whatever the order of the places
/// that they had in the old one.
#[test]
fn what_is_asked_again_keeps_its_order() {
    on_ring(64, |ring| {
        let (first, mut old) = pair();
        let (second, mut new) = pair();
        let attempts: Vec<Attempt> = vec![Box::new(move || Ok((second, FENCE)))];
        let (disk, _, _) = disk(&ring, first, Some(FENCE), attempts);
        let server = std::thread::spawn(move || {
            let asked = old.requests(2);
            old.reply(asked[0].cookie, 0, &[]);
            old.next().unwrap();
            drop(old);
            let again = new.requests(2);
            again.iter().for_each(|it| new.reply(it.cookie, 0, &[]));
            again.iter().map(|it| it.offset).collect::<Vec<_>>()
        });
        ring.block_on(async move {
            let data = [1, 2, 3].map(|byte| buffer(4096, byte));
            let early = write(&disk, 8192, &data[0], false);
            let intent = barrier(&disk, 4096, &data[1]);
            assert_eq!(early.await, Ok(()));
            let late = write(&disk, 65536, &data[2], false);
            assert_eq!(intent.await, Ok(()));
            assert_eq!(late.await, Ok(()));
        })
        .unwrap();
        assert_eq!(server.join().unwrap(), [4096, 65536]);
    });
}

/// The server refuses what is behind a barrier that failed; a new session would not know of it. Also
/// while another barrier of the group has no answer.
#[test]
fn what_was_refused_is_not_asked_again() {
    for barriers in [1, 2] {
        on_ring(64, move |ring| {
            let (first, mut old) = pair();
            let (second, mut new) = pair();
            let attempts: Vec<Attempt> = vec![Box::new(move || Ok((second, FENCE)))];
            let (disk, _, _) = disk(&ring, first, Some(FENCE), attempts);
            let (close, closes) = mpsc::channel::<()>();
            let server = std::thread::spawn(move || {
                let asked = old.requests(barriers + 1);
                old.reply(asked[0].cookie, 5, &[]);
                closes.recv().unwrap();
                drop(old);
                new.next()
            });
            ring.block_on(async move {
                let data = [1, 2, 3].map(|byte| buffer(4096, byte));
                let mut intents: Vec<_> = (0..barriers as u64)
                    .map(|at| barrier(&disk, at * 4096, &data[0]))
                    .collect();
                let behind = write(&disk, 65536, &data[1], false);
                assert_eq!(intents.remove(0).await, Err(Errno::IO));
                close.send(()).unwrap();
                assert_eq!(behind.await, Err(GONE));
                for intent in intents {
                    assert_eq!(intent.await, Err(GONE));
                }
            })
            .unwrap();
            assert_eq!(server.join().unwrap(), None, "{barriers} barriers");
        });
    }
}

/// Once all barriers are answered nothing is behind them, whatever became of them.
#[test]
fn what_is_asked_after_the_answers_is_behind_nothing() {
    on_ring(64, |ring| {
        let (first, mut server) = pair();
        let (disk, _, _) = disk(&ring, first, Some(FENCE), Vec::new());
        let serving = std::thread::spawn(move || {
            let mut flags = Vec::new();
            for error in [5, 0, 0] {
                let request = server.next().unwrap();
                flags.push(request.flags);
                server.reply(request.cookie, error, &[]);
            }
            flags
        });
        ring.block_on(async move {
            let data = [1, 2, 3].map(|byte| buffer(4096, byte));
            assert_eq!(barrier(&disk, 4096, &data[0]).await, Err(Errno::IO));
            assert_eq!(write(&disk, 65536, &data[1], false).await, Ok(()));
            assert_eq!(barrier(&disk, 4096, &data[2]).await, Ok(()));
        })
        .unwrap();
        let fua_first = 1 | 1 << 15 | 1 << 14;
        assert_eq!(serving.join().unwrap(), [fua_first, 0, fua_first]);
    });
}

/// The answer is there, and nobody has taken it: others may still rely on it. Once it has failed they
/// are refused here.
#[test]
fn a_barrier_is_open_until_its_result_is_taken() {
    for error in [0, 5] {
        on_ring(64, move |ring| {
            let (first, mut server) = pair();
            let (disk, _, _) = disk(&ring, first, Some(FENCE), Vec::new());
            let requests = if error == 0 { 4 } else { 3 };
            let serving = std::thread::spawn(move || {
                let mut flags = Vec::new();
                for at in 0..requests {
                    let request = server.next().unwrap();
                    flags.push(request.flags);
                    server.reply(request.cookie, if at == 0 { error } else { 0 }, &[]);
                }
                flags
            });
            ring.block_on(async move {
                let data = [1, 2].map(|byte| buffer(4096, byte));
                let intent = barrier(&disk, 4096, &data[0]);
                assert_eq!(disk.submit(DiskRequest::Flush).await, Ok(()));
                let beside = write(&disk, 65536, &data[1], false).await;
                let failed = error != 0;
                assert_eq!(beside, if failed { Err(Errno::IO) } else { Ok(()) });
                assert_eq!(intent.await.is_err(), failed);
                assert_eq!(write(&disk, 65536, &data[1], false).await, Ok(()));
            })
            .unwrap();
            let flags = serving.join().unwrap();
            let (behind, last) = (flags[2], flags[requests - 1]);
            assert_eq!(last, 0);
            assert_eq!(behind, if error == 0 { 1 << 13 } else { 0 });
        });
    }
}

/// Not when what was answered may be lost, or another has written, or nobody is there.
#[test]
fn a_connection_that_none_can_replace_has_failed() {
    type Other = fn(UnixStream) -> Result<(UnixStream, Fence), io::ErrorKind>;
    let cases: [(&str, Option<Fence>, bool, Option<Other>); 6] = [
        ("unfenced", None, false, None),
        ("nonsense", Some(FENCE), true, None),
        (
            "another instance",
            Some(FENCE),
            false,
            Some(|it| {
                Ok((
                    it,
                    Fence {
                        instance: 78,
                        ..FENCE
                    },
                ))
            }),
        ),
        (
            "another turn",
            Some(FENCE),
            false,
            Some(|it| Ok((it, Fence { turn: 6, ..FENCE }))),
        ),
        (
            "no server",
            Some(FENCE),
            false,
            Some(|_| Err(io::ErrorKind::ConnectionRefused)),
        ),
        (
            "no socket",
            Some(FENCE),
            false,
            Some(|_| Err(io::ErrorKind::NotFound)),
        ),
    ];
    for (name, fence, nonsense, other) in cases {
        on_ring(32, move |ring| {
            let ((first, mut old), (second, mut new)) = (pair(), pair());
            // Where none is to be made, one would succeed.
            let attempt: Attempt = match other {
                Some(other) => Box::new(move || other(second)),
                None => Box::new(move || Ok((second, FENCE))),
            };
            let unused = usize::from(other.is_none());
            let attempts = vec![attempt];
            let (disk, _, attempts) = disk(&ring, first, fence, attempts);
            let server = std::thread::spawn(move || {
                old.next().unwrap();
                if nonsense {
                    old.0.write_all(&[0; REPLY_BYTES]).unwrap();
                }
                drop(old);
                new.next()
            });
            ring.block_on(async move {
                let data = buffer(4096, 1);
                assert_eq!(write(&disk, 0, &data, false).await, Err(GONE), "{name}");
                assert_eq!(write(&disk, 0, &data, false).await, Err(GONE), "{name}");
                assert!(!data.in_use() && disk.in_flight() == 0);
            })
            .unwrap();
            assert_eq!(attempts.lock().unwrap().len(), unused, "{name}");
            attempts.lock().unwrap().clear();
            assert_eq!(server.join().unwrap(), None, "{name}");
        });
    }
}

/// All fails while nobody is there; then it works, and what has failed is not asked again.
#[test]
fn a_connection_that_is_down_comes_up_again() {
    on_ring(32, |ring| {
        let ((first, mut old), (second, mut new)) = (pair(), pair());
        let (release, held) = mpsc::channel::<()>();
        let attempts: Vec<Attempt> = vec![
            Box::new(|| Err(io::ErrorKind::ConnectionRefused)),
            Box::new(move || {
                held.recv().unwrap();
                Ok((second, FENCE))
            }),
        ];
        let (disk, _, _) = disk(&ring, first, Some(FENCE), attempts);
        let server = std::thread::spawn(move || {
            old.next().unwrap();
            drop(old);
            let asked = new.next().unwrap();
            new.reply(asked.cookie, 0, &[]);
            (asked.offset, new.next())
        });
        let ours = Rc::clone(&ring);
        ring.block_on(async move {
            let data = buffer(4096, 1);
            for at in 0..3 {
                let written = write(&disk, at * 4096, &data, false).await;
                assert_eq!(written, Err(GONE), "write {at}");
            }
            assert!(disk.0.has_failed() && disk.in_flight() == 0 && !data.in_use());
            release.send(()).unwrap();
            while write(&disk, 8 * 4096, &data, false).await.is_err() {
                assert!(disk.0.has_failed());
                let soon = crate::ring::now() + Duration::from_millis(5);
                ours.sleep_until(soon).await;
            }
            assert!(disk.0.has_failed(), "what failed may not be judged yet");
            drop(disk);
            let got = ours.blocking(move || server.join().unwrap()).await;
            assert_eq!(got, (8 * 4096, None));
        })
        .unwrap();
    });
}

/// What was given up is not asked again: later writes may be to the same blocks (R13).
#[test]
fn nothing_goes_on_once_an_operation_was_given_up() {
    for before in [true, false] {
        on_ring(32, move |ring| {
            let ((first, mut old), (second, mut new)) = (pair(), pair());
            let ((tries, tried), (release, held)) = (mpsc::channel(), mpsc::channel::<()>());
            let connects: Attempt = Box::new(move || {
                tries.send(()).unwrap();
                if !before {
                    held.recv().unwrap();
                }
                Ok((second, FENCE))
            });
            let (disk, peers, attempts) = disk(&ring, first, Some(FENCE), vec![connects]);
            let (close, closes) = mpsc::channel::<()>();
            let server = std::thread::spawn(move || {
                old.requests(2);
                closes.recv().unwrap();
                drop(old);
                new.next()
            });
            let ours = Rc::clone(&ring);
            ring.block_on(async move {
                let data = [buffer(4096, 1), buffer(4096, 2)];
                let given_up = write(&disk, 0, &data[0], false);
                let other = write(&disk, 4096, &data[1], false);
                if before {
                    drop(given_up);
                    close.send(()).unwrap();
                } else {
                    close.send(()).unwrap();
                    ours.blocking(move || tried.recv().unwrap()).await;
                    assert_eq!(disk.in_flight(), 2);
                    drop(given_up);
                }
                assert_eq!(other.await, Err(GONE));
                assert!(disk.in_flight() == 0 && !data.iter().any(|it| it.in_use()));
                // Comes too late, or is not asked for.
                let _ = release.send(());
                assert_eq!(attempts.lock().unwrap().len(), usize::from(before));
                attempts.lock().unwrap().clear();
                drop(disk);
                peers.leave(&ours).await;
                let asked = ours.blocking(move || server.join().unwrap()).await;
                assert_eq!(asked, None);
            })
            .unwrap();
        });
    }
}

/// A server that closes after the farewell is not connected to again.
#[test]
fn who_leaves_stays_away() {
    on_ring(32, |ring| {
        let (first, mut server) = pair();
        let refused: Attempt = Box::new(|| Err(io::ErrorKind::ConnectionRefused));
        let (disk, peers, attempts) = disk(&ring, first, Some(FENCE), vec![refused]);
        let serving = std::thread::spawn(move || server.next());
        let ours = Rc::clone(&ring);
        ring.block_on(async move {
            peers.leave(&ours).await;
            assert_eq!(serving.join().unwrap(), None);
            let data = buffer(4096, 1);
            assert_eq!(write(&disk, 0, &data, false).await, Err(GONE));
        })
        .unwrap();
        let left = attempts.lock().unwrap().len();
        assert_eq!(left, 1, "it has connected again");
    });
}

/// A connection that owes an answer and says nothing is given up when there is another way, and the
/// next one gets twice the time.
#[test]
fn a_silent_connection_is_given_up_for_another_way() {
    on_ring(32, |ring| {
        let (first, mut old) = pair();
        let (second, mut between) = pair();
        let (third, mut new) = pair();
        let queue = |attempts: Vec<Attempt>| Arc::new(Mutex::new(VecDeque::from(attempts)));
        let own = queue(vec![Box::new(move || Ok((third, FENCE)))]);
        let other = queue(vec![Box::new(move || Ok((second, FENCE)))]);
        let ways = vec![way(&own), way(&other)];
        let opened = opened(first, Some(FENCE));
        let disk = PeerDisk(link(&ring, opened, ways), Rc::default(), None);
        let server = std::thread::spawn(move || {
            let asked = old.next().unwrap();
            assert!(old.next().is_none(), "given up");
            let again = between.next().unwrap();
            assert!(between.next().is_none(), "given up");
            let last = new.next().unwrap();
            new.reply(last.cookie, 0, &[]);
            assert!(new.next().is_none());
            [asked, again, last].map(|it| (it.kind, it.offset, it.data))
        });
        let (begun, ours) = (crate::ring::now(), Rc::clone(&ring));
        ring.block_on(async move {
            let data = buffer(4096, 1);
            assert_eq!(write(&disk, 4096, &data, false).await, Ok(()));
            let took = crate::ring::now() - begun;
            assert!(took > Duration::from_secs(3), "given up after {took:?}");
            drop(disk);
            let got = ours.blocking(move || server.join().unwrap()).await;
            assert!(got.iter().all(|it| *it == got[0]));
        })
        .unwrap();
    });
}

/// A server that answers who asks anew has a slow disk, and is waited for.
#[test]
fn a_slow_disk_is_not_a_silent_connection() {
    on_ring(32, |ring| {
        let (first, mut server) = pair();
        let none = Arc::new(Mutex::new(VecDeque::new()));
        let (asked, asks) = mpsc::channel();
        let own = Way {
            answers: Arc::new(move || asked.send(()).is_ok()),
            ..way(&none)
        };
        let ways = vec![own, way(&none)];
        let opened = opened(first, Some(FENCE));
        let disk = PeerDisk(link(&ring, opened, ways), Rc::default(), None);
        let serving = std::thread::spawn(move || {
            let request = server.next().unwrap();
            // Asked twice whether it is there, it answers in the end.
            asks.recv().unwrap();
            asks.recv().unwrap();
            server.reply(request.cookie, 0, &[]);
            assert!(server.next().is_none());
        });
        ring.block_on(async move {
            let data = buffer(4096, 1);
            assert_eq!(write(&disk, 4096, &data, false).await, Ok(()));
        })
        .unwrap();
        serving.join().unwrap();
    });
}

/// While a server is asked whether it is there, the connection breaks and another one takes its place:
/// that nobody answered is not held against the new one.
#[test]
fn what_is_learnt_of_a_connection_is_not_held_against_the_next() {
    on_ring(32, |ring| {
        let (first, mut old) = pair();
        let (second, mut new) = pair();
        let attempt: Attempt = Box::new(move || Ok((second, FENCE)));
        let own = Arc::new(Mutex::new(VecDeque::from(vec![attempt])));
        let none = Arc::new(Mutex::new(VecDeque::new()));
        let (asked, asks) = mpsc::channel();
        let (tell, told) = mpsc::channel::<()>();
        let told = Mutex::new(told);
        let asking = Way {
            answers: Arc::new(move || {
                asked.send(()).unwrap();
                // As long as nobody says anything, and then there is no answer.
                told.lock().unwrap().recv().is_err()
            }),
            ..way(&own)
        };
        let opened = opened(first, Some(FENCE));
        let ways = vec![asking, way(&none)];
        let disk = PeerDisk(link(&ring, opened, ways), Rc::default(), None);
        let serving = std::thread::spawn(move || {
            old.next().unwrap();
            asks.recv().unwrap();
            drop(old);
            let request = new.next().unwrap();
            tell.send(()).unwrap();
            // Nothing is to come of it: no event says so.
            let patience = Duration::from_millis(300);
            new.0.set_read_timeout(Some(patience)).unwrap();
            let ended = new.0.read(&mut [0]);
            assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::WouldBlock);
            new.0.set_read_timeout(None).unwrap();
            new.reply(request.cookie, 0, &[]);
            assert!(new.next().is_none());
        });
        ring.block_on(async move {
            let data = buffer(4096, 1);
            assert_eq!(write(&disk, 4096, &data, false).await, Ok(()));
        })
        .unwrap();
        serving.join().unwrap();
    });
}
