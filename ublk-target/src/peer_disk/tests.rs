//! Tests of peer disks against servers that are scripted: no server of others answers twice.
#![allow(clippy::unwrap_used)]

use std::cell::Cell;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread::JoinHandle;

use mirror::host::{Buffer as _, Errno, Span};
use peer::export::BlockSizes;
use peer::link::GONE;
use peer::wire::{
    EXPORT_FLUSH, EXPORT_FUA, EXPORT_HAS_FLAGS, EXPORT_TRIM, EXPORT_WRITE_ZEROES, REPLY_BYTES,
    REQUEST_BYTES, be16, be32, be64,
};

use super::*;
use crate::ring::reap_all;
use crate::ring::tests::on_ring;
use peer::Export;
use std::os::fd::OwnedFd;

#[path = "reconnect_tests.rs"]
mod reconnect;

const ALL: u16 = EXPORT_HAS_FLAGS | EXPORT_FLUSH | EXPORT_FUA | EXPORT_TRIM | EXPORT_WRITE_ZEROES;
const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;

/// A request as the server got it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Got {
    kind: u16,
    flags: u16,
    cookie: u64,
    offset: u64,
    len: u32,
    data: Vec<u8>,
}

/// The server's end.
struct Server(UnixStream);

impl Server {
    /// The next request; none when the client has closed or said farewell.
    fn next(&mut self) -> Option<Got> {
        let mut header = [0; REQUEST_BYTES];
        self.0.read_exact(&mut header).ok()?;
        let kind = be16(&header, 6).unwrap();
        let len = be32(&header, 24).unwrap();
        let mut data = vec![0; if kind == WRITE { len as usize } else { 0 }];
        self.0.read_exact(&mut data).ok()?;
        (kind != 2).then(|| Got {
            kind,
            flags: be16(&header, 4).unwrap(),
            cookie: be64(&header, 8).unwrap(),
            offset: be64(&header, 16).unwrap(),
            len,
            data,
        })
    }

    fn requests(&mut self, count: usize) -> Vec<Got> {
        (0..count).map(|_| self.next().unwrap()).collect()
    }

    fn header(cookie: u64, error: u32) -> Vec<u8> {
        let parts = [0x6744_6698_u32.to_be_bytes(), error.to_be_bytes()];
        [parts.concat(), cookie.to_be_bytes().to_vec()].concat()
    }

    fn reply(&mut self, cookie: u64, error: u32, data: &[u8]) {
        let mut bytes = Self::header(cookie, error);
        bytes.extend_from_slice(data);
        self.0.write_all(&bytes).unwrap();
    }
}

/// A disk and its server, which runs `script` and then lets go of the connection.
fn disk<T: Send + 'static>(
    ring: &Rc<Ring>,
    flags: u16,
    blocks: BlockSizes,
    script: impl FnOnce(Server) -> T + Send + 'static,
) -> (Rc<PeerDisk>, Rc<Peers>, JoinHandle<T>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let opened = OpenedPeer {
        fd: OwnedFd::from(ours),
        tls: None,
        export: Export {
            size_bytes: 64 << 20,
            flags,
            blocks,
        },
        address: "nbd://test/".to_owned(),
        unfinished: None,
        fence: None,
    };
    let server = std::thread::spawn(move || script(Server(theirs)));
    let peers = Rc::new(Peers::default());
    let disk = PeerDisk::new(ring, opened, Duration::from_secs(30), &peers);
    (Rc::new(disk), peers, server)
}

fn buffer(len: usize, byte: u8) -> IoBuffer {
    let buffer = IoBuffer::zeroed(len);
    buffer.fill(|bytes| bytes.fill(byte));
    buffer
}

fn read(disk: &PeerDisk, offset: u64, buffer: &IoBuffer) -> PeerOp {
    let span = Span::whole(buffer.clone());
    disk.submit(DiskRequest::Read { offset, span })
}

fn write(disk: &PeerDisk, offset: u64, buffer: &IoBuffer, fua: bool) -> PeerOp {
    let span = Span::whole(buffer.clone());
    disk.submit(DiskRequest::Write { offset, span, fua })
}

fn holds(buffer: &IoBuffer, byte: u8) -> bool {
    buffer.read(|bytes| bytes.iter().all(|it| *it == byte))
}

/// The byte that a block of the export holds.
fn content(offset: u64) -> u8 {
    u8::try_from(offset / 4096 % 251).unwrap()
}

#[test]
fn many_requests_are_answered_in_any_order() {
    on_ring(64, |ring| {
        let (disk, _, server) = disk(&ring, ALL, BlockSizes::DEFAULT, |mut server| {
            let mut got = server.requests(64);
            got.reverse();
            for request in &got {
                let data = vec![content(request.offset); request.len as usize];
                let data = if request.kind == READ { &data[..] } else { &[] };
                server.reply(request.cookie, 0, data);
            }
            got
        });
        let ours = Rc::clone(&disk);
        ring.block_on(async move {
            let buffers: Vec<_> = (0..64).map(|at| buffer(4096, at)).collect();
            // Sizes from less to much more than one receive brings.
            let larger: Vec<_> = (0..16)
                .map(|at| IoBuffer::zeroed(4096 << (at / 2)))
                .collect();
            let writes: Vec<_> = (0_u64..)
                .zip(&buffers[..48])
                .map(|(at, buffer)| write(&ours, at * 4096, buffer, at % 2 == 1))
                .collect();
            let reads: Vec<_> = (100_u64..)
                .zip(&larger)
                .map(|(at, buffer)| (at, read(&ours, at * 4096, buffer)))
                .collect();
            assert_eq!(ours.in_flight(), 64);
            assert!(buffers[..48].iter().chain(&larger).all(|it| it.in_use()));
            for op in writes {
                assert_eq!(op.await, Ok(()));
            }
            for ((at, op), buffer) in reads.into_iter().zip(&larger) {
                assert_eq!(op.await, Ok(()));
                assert!(holds(buffer, content(at * 4096)));
            }
            assert_eq!(ours.in_flight(), 0);
            assert!(!buffers.iter().chain(&larger).any(|it| it.in_use()));
        })
        .unwrap();
        drop(disk);
        let got = server.join().unwrap();
        for request in got.iter().filter(|it| it.kind == WRITE) {
            let at = u8::try_from(request.offset / 4096).unwrap();
            assert_eq!(request.data, [at; 4096]);
            assert_eq!(request.flags, u16::from(at % 2 == 1), "FUA is FUA");
        }
    });
}

#[test]
fn what_the_server_does_not_offer_is_done_otherwise_or_refused() {
    on_ring(32, |ring| {
        let blocks = BlockSizes {
            minimum: 512,
            preferred: 4096,
            maximum: 8192,
        };
        let flags = EXPORT_HAS_FLAGS | EXPORT_FLUSH;
        let (disk, _, server) = disk(&ring, flags, blocks, |mut server| {
            let mut got = Vec::new();
            while let Some(request) = server.next() {
                let refused = if request.offset == 1 << 20 { 28 } else { 0 };
                let bytes = |len| (0..len).map(|at| content(request.offset + u64::from(at)));
                let right: Vec<u8> = bytes(request.len).collect();
                let data = if request.kind == READ {
                    &right[..]
                } else {
                    &[]
                };
                server.reply(request.cookie, refused, data);
                assert!(request.kind != WRITE || request.data == right);
                got.push((request.kind, request.flags, request.offset, request.len));
            }
            got
        });
        let geometry = disk.geometry();
        assert_eq!((geometry.cheap_zeroes, geometry.discard), (false, false));
        assert_eq!(geometry.logical_block_bytes, 512);
        ring.block_on(async move {
            let (offset, len) = (0, 4096);
            let zeroes = disk.submit(DiskRequest::WriteZeroes { offset, len });
            assert_eq!(zeroes.await, Err(Errno::NOT_SUPPORTED));
            let discard = disk.submit(DiskRequest::Discard { offset, len });
            assert_eq!(discard.await, Err(Errno::NOT_SUPPORTED));
            // FUA is a flush after the last part; each part is of the right bytes.
            let (long, back) = (IoBuffer::zeroed(20 << 10), IoBuffer::zeroed(20 << 10));
            let right = |at: usize| content(4096 + at as u64);
            long.fill(|bytes| (0..).zip(bytes).for_each(|(at, byte)| *byte = right(at)));
            assert_eq!(write(&disk, 4096, &long, true).await, Ok(()));
            assert_eq!(read(&disk, 4096, &back).await, Ok(()));
            let same = |ours: &[u8]| back.read(|bytes| bytes[..20 << 10] == ours[..20 << 10]);
            assert!(long.read(same));
            // A write that failed is not flushed.
            let failed = buffer(4096, content(1 << 20));
            let failed = write(&disk, 1 << 20, &failed, true).await;
            assert_eq!(failed, Err(Errno::NO_SPACE));
            assert_eq!(disk.submit(DiskRequest::Flush).await, Ok(()));
        })
        .unwrap();
        let got = server.join().unwrap();
        let want = [
            (WRITE, 0, 4096, 8192),
            (WRITE, 0, 12288, 8192),
            (WRITE, 0, 20480, 4096),
            (FLUSH, 0, 0, 0),
            (READ, 0, 4096, 8192),
            (READ, 0, 12288, 8192),
            (READ, 0, 20480, 4096),
            (WRITE, 0, 1 << 20, 4096),
            (FLUSH, 0, 0, 0),
        ];
        assert_eq!(got, want);
    });
}

#[test]
fn errors_of_the_server_are_few() {
    on_ring(32, |ring| {
        let (disk, _, _) = disk(&ring, ALL, BlockSizes::DEFAULT, |mut server| {
            for error in [5, 28, 95, 1, 108, 4_000_000_000] {
                let request = server.next().unwrap();
                server.reply(request.cookie, error, &[]);
            }
            server.next()
        });
        ring.block_on(async move {
            use Errno as E;
            for want in [E::IO, E::NO_SPACE, E::NOT_SUPPORTED, E::IO, E::IO, E::IO] {
                let target = buffer(4096, 7);
                assert_eq!(read(&disk, 0, &target).await, Err(want));
                assert!(holds(&target, 7), "an error brings no data");
            }
        })
        .unwrap();
    });
}

/// Has the server take four requests (a read, two writes, a flush) and do `then`: whatever it
/// is, it ends the connection, and all of them and what comes later fail.
fn breaks(then: impl FnOnce(&mut Server, &[Got]) + Send + 'static) {
    on_ring(32, |ring| {
        let (disk, _, server) = disk(&ring, ALL, BlockSizes::DEFAULT, |mut server| {
            let got = server.requests(4);
            then(&mut server, &got);
            // Nothing is asked again.
            let more = server.next();
            assert_eq!(more, None);
        });
        ring.block_on(async move {
            let buffers: Vec<_> = (0..3).map(|_| buffer(256 << 10, 0)).collect();
            let ops = [
                read(&disk, 0, &buffers[0]),
                write(&disk, 0, &buffers[1], false),
                write(&disk, 1 << 20, &buffers[2], true),
                disk.submit(DiskRequest::Flush),
            ];
            for op in ops {
                assert_eq!(op.await, Err(GONE));
                assert!(
                    !buffers.iter().any(|it| it.in_use()),
                    "memory is still used"
                );
            }
            assert_eq!(disk.in_flight(), 0);
            assert_eq!(disk.submit(DiskRequest::Flush).await, Err(GONE));
            assert_eq!(read(&disk, 0, &buffers[0]).await, Err(GONE));
        })
        .unwrap();
        server.join().unwrap();
    });
}

#[test]
fn the_end_of_the_connection_fails_everything() {
    breaks(|server, _| server.0.shutdown(std::net::Shutdown::Both).unwrap());
}

#[test]
fn an_end_in_the_middle_of_data_fails_everything() {
    breaks(|server, got| {
        let part = [Server::header(got[0].cookie, 0), vec![1; 200 << 10]].concat();
        server.0.write_all(&part).unwrap();
        server.0.shutdown(std::net::Shutdown::Both).unwrap();
    });
}

#[test]
fn a_wrong_magic_fails_everything() {
    breaks(|server, got| {
        let mut header = Server::header(got[0].cookie, 0);
        header[3] ^= 1;
        server.0.write_all(&header).unwrap();
    });
}

#[test]
fn an_unknown_cookie_fails_everything() {
    breaks(|server, got| server.reply(got[1].cookie ^ 1 << 40, 0, &[]));
}

#[test]
fn a_second_answer_fails_what_is_left() {
    on_ring(32, |ring| {
        let (disk, _, server) = disk(&ring, ALL, BlockSizes::DEFAULT, |mut server| {
            let got = server.requests(3);
            server.reply(got[1].cookie, 0, &[]);
            server.reply(got[1].cookie, 0, &[]);
            assert_eq!(server.next(), None);
        });
        ring.block_on(async move {
            let data = buffer(4096, 1);
            let ops = [0, 4096, 8192].map(|offset| write(&disk, offset, &data, false));
            let [first, second, third] = ops;
            assert_eq!(first.await, Err(GONE));
            assert_eq!(second.await, Ok(()));
            assert_eq!(third.await, Err(GONE));
        })
        .unwrap();
        server.join().unwrap();
    });
}

#[test]
fn an_orphans_late_data_go_into_its_own_buffer() {
    on_ring(32, |ring| {
        let (go, wait) = mpsc::channel();
        let (disk, _, server) = disk(&ring, ALL, BlockSizes::DEFAULT, move |mut server| {
            let orphan = server.next().unwrap();
            let other = server.next().unwrap();
            server.reply(other.cookie, 0, &[2; 4096]);
            wait.recv().unwrap();
            server.reply(orphan.cookie, 0, &vec![1; 128 << 10]);
            let last = server.next().unwrap();
            server.reply(last.cookie, 0, &[]);
        });
        let ours = Rc::clone(&disk);
        let (late, seen) = (buffer(128 << 10, 0), Rc::new(Cell::new(false)));
        let (orphans, over) = (late.clone(), Rc::clone(&seen));
        ring.block_on(async move {
            drop(read(&ours, 0, &orphans));
            let other = buffer(4096, 0);
            assert_eq!(read(&ours, 4096, &other).await, Ok(()));
            assert!(holds(&other, 2));
            assert_eq!((ours.in_flight(), orphans.in_use()), (1, true));
            go.send(()).unwrap();
            // Answered after the orphan.
            assert_eq!(ours.submit(DiskRequest::Flush).await, Ok(()));
            assert_eq!((ours.in_flight(), orphans.in_use()), (0, false));
            assert!(holds(&other, 2), "an orphan's data went to someone else");
            over.set(true);
        })
        .unwrap();
        assert!(seen.get() && holds(&late, 1));
        drop(disk);
        server.join().unwrap();
    });
}

#[test]
fn a_server_that_only_hangs_is_let_go_of() {
    on_ring(32, |ring| {
        // Takes the first header only, so that the rest fills the socket.
        let ((begun, wait), (release, held)) = (mpsc::channel(), mpsc::channel::<()>());
        let (disk, peers, server) = disk(&ring, ALL, BlockSizes::DEFAULT, move |mut server| {
            let mut header = [0; REQUEST_BYTES];
            server.0.read_exact(&mut header).unwrap();
            begun.send(()).unwrap();
            held.recv().unwrap_err();
            let mut rest = Vec::new();
            server.0.read_to_end(&mut rest).unwrap_or(0)
        });
        let ours = Rc::clone(&ring);
        ring.block_on(async move {
            let buffers: Vec<_> = (0..64).map(|_| buffer(1 << 20, 3)).collect();
            let target = buffer(4096, 0);
            drop(read(&disk, 0, &target));
            let waits = write(&disk, 0, &buffers[0], false);
            for data in &buffers[1..] {
                drop(write(&disk, 1 << 20, data, false));
            }
            ours.blocking(move || wait.recv().unwrap()).await;
            assert!(
                target.in_use() && buffers[63].in_use(),
                "both tasks are at work"
            );
            assert_eq!(disk.in_flight(), 65);
            assert!(!peers.sever(&ours, "nbd://other/").await);
            assert_eq!(disk.in_flight(), 65);
            assert!(peers.sever(&ours, "nbd://test/").await);
            assert_eq!(disk.in_flight(), 0);
            assert_eq!(waits.await, Err(GONE));
            assert!(!target.in_use() && !buffers.iter().any(|it| it.in_use()));
            drop(release);
        })
        .unwrap();
        let sent = server.join().unwrap();
        assert!(
            sent < 32 << 20,
            "the server was not stuck: {sent} bytes came"
        );
    });
}

#[test]
fn nothing_fails_while_the_kernel_may_still_use_its_memory() {
    on_ring(32, |ring| {
        let (release, held) = mpsc::channel::<()>();
        // The sender is stuck in the middle of data when the reader meets nonsense.
        let (disk, _, server) = disk(&ring, ALL, BlockSizes::DEFAULT, move |mut server| {
            server.0.read_exact(&mut [0; REQUEST_BYTES]).unwrap();
            server.0.write_all(&[0; REPLY_BYTES]).unwrap();
            held.recv().unwrap_err();
        });
        ring.block_on(async move {
            let buffers: Vec<_> = (0..16).map(|_| buffer(1 << 20, 3)).collect();
            let ops: Vec<_> = buffers
                .iter()
                .map(|data| write(&disk, 0, data, false))
                .collect();
            for op in ops {
                assert_eq!(op.await, Err(GONE));
                assert!(
                    !buffers.iter().any(|it| it.in_use()),
                    "a write was answered and its memory is still used"
                );
            }
            drop(release);
        })
        .unwrap();
        server.join().unwrap();
    });
}

#[test]
fn a_disk_that_is_dropped_leaves_in_an_orderly_way() {
    on_ring(32, |ring| {
        let (disk, _, server) = disk(&ring, ALL, BlockSizes::DEFAULT, |mut server| {
            let mut bytes = Vec::new();
            server.0.read_to_end(&mut bytes).unwrap();
            bytes
        });
        drop(disk);
        let gone = Rc::new(Cell::new(false));
        let seen = Rc::clone(&gone);
        ring.spawn(async move { seen.set(true) });
        ring.run(|_| 0, reap_all, move || gone.get()).unwrap();
        assert_eq!(server.join().unwrap(), peer::session::farewell());
    });
}
