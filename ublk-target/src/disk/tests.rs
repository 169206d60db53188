//! Tests of local disks on temporary files.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::path::{Path, PathBuf};

use mirror::control::ErrorKind;
use mirror::host::{Buffer as _, Disk as _, DiskRequest, Errno, Span};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use super::{LocalDisk, OpenError, open, said_by_the_disk};
use crate::ring::tests::on_ring;
use crate::sys::IoBuffer;

/// R9: to the engine "timed out" means that nothing was said, and it would ask again for an answer
/// that it has had.
#[test]
fn a_disk_never_says_that_it_has_said_nothing() {
    assert_eq!(said_by_the_disk(110), Errno::IO);
    for errno in [5, 28, 84, 95] {
        assert_eq!(said_by_the_disk(errno), Errno(errno));
    }
}

/// A directory that goes with the test.
struct Dir(PathBuf);

impl Dir {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ublk-target-{}-{test}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn image(&self, name: &str, bytes: u64) -> String {
        let path = self.0.join(name);
        File::create(&path).unwrap().set_len(bytes).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn what_is_written_is_read_and_zeroes_are_zeroes() {
    on_ring(32, |ring| {
        let dir = Dir::new("io");
        let path = dir.image("a", 8 << 20);
        let disk = LocalDisk::new(&ring, open(&path).unwrap());
        assert_eq!(disk.geometry().size_bytes, 8 << 20);
        ring.block_on(async move {
            let data = IoBuffer::zeroed(64 << 10);
            data.fill(|bytes| bytes.fill(0x5a));
            let write = |offset, fua| {
                let span = Span::whole(data.clone());
                disk.submit(DiskRequest::Write { offset, span, fua })
            };
            assert_eq!(write(4096, false).await, Ok(()));
            assert_eq!(write(1 << 20, true).await, Ok(()));
            assert_eq!(disk.submit(DiskRequest::Flush).await, Ok(()));
            assert!(
                disk.geometry().cheap_zeroes,
                "the test's file system punches holes"
            );
            let zeroes = DiskRequest::WriteZeroes {
                offset: 8192,
                len: 4096,
            };
            assert_eq!(disk.submit(zeroes).await, Ok(()));
            let discard = DiskRequest::Discard {
                offset: 1 << 20,
                len: 64 << 10,
            };
            assert_eq!(disk.submit(discard).await, Ok(()));
            let back = IoBuffer::zeroed(16 << 10);
            back.fill(|bytes| bytes.fill(0xff));
            let read = DiskRequest::Read {
                offset: 0,
                span: Span::whole(back.clone()),
            };
            assert_eq!(disk.submit(read).await, Ok(()));
            back.read(|bytes| {
                assert!(bytes[..4096].iter().all(|byte| *byte == 0), "never written");
                assert!(bytes[4096..8192].iter().all(|byte| *byte == 0x5a));
                assert!(bytes[8192..12288].iter().all(|byte| *byte == 0), "zeroed");
                assert!(bytes[12288..].iter().all(|byte| *byte == 0x5a));
            });
            assert_eq!(disk.in_flight(), 0);
        })
        .unwrap();
    });
}

#[test]
fn a_transfer_that_ends_early_is_an_error() {
    on_ring(8, |ring| {
        let dir = Dir::new("short");
        let path = dir.image("a", 1 << 20);
        let disk = LocalDisk::new(&ring, open(&path).unwrap());
        let result = ring.block_on(async move {
            let span = Span::whole(IoBuffer::zeroed(8192));
            disk.submit(DiskRequest::Read {
                offset: (1 << 20) - 4096,
                span,
            })
            .await
        });
        assert_eq!(result.unwrap(), Err(Errno::IO));
    });
}

#[test]
fn a_write_that_fills_the_file_system_has_no_space() {
    if !rustix::process::geteuid().is_root() {
        // Only root makes a file system that is small enough to be filled.
        return;
    }
    let dir = Dir::new("full");
    crate::sys::unshare_mounts().unwrap();
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).unwrap();
    let full = dir.0.join("full");
    std::fs::create_dir(&full).unwrap();
    let size = std::ffi::CString::new("size=64k").unwrap();
    let flags = MountFlags::empty();
    rustix::mount::mount("none", &full, "tmpfs", flags, size.as_c_str()).unwrap();
    let path = dir.image("full/a", 1 << 20);
    on_ring(8, move |ring| {
        let disk = LocalDisk::new(&ring, open(&path).unwrap());
        let results = ring.block_on(async move {
            let write = |len| {
                let span = Span::whole(IoBuffer::zeroed(len));
                let fua = false;
                let offset = 0;
                disk.submit(DiskRequest::Write { offset, span, fua })
            };
            (write(32 << 10).await, write(128 << 10).await)
        });
        assert_eq!(results.unwrap(), (Ok(()), Err(Errno::NO_SPACE)));
    });
    rustix::mount::unmount(&full, UnmountFlags::DETACH).unwrap();
}

#[test]
fn an_abandoned_read_is_counted_until_it_is_over() {
    on_ring(8, |ring| {
        let dir = Dir::new("orphan");
        let disk = LocalDisk::new(&ring, open(&dir.image("a", 1 << 20)).unwrap());
        let buffer = IoBuffer::zeroed(4096);
        let span = Span::whole(buffer.clone());
        drop(disk.submit(DiskRequest::Read { offset: 0, span }));
        assert_eq!((disk.in_flight(), buffer.in_use()), (1, true));
        ring.run(|_| 0, crate::ring::reap_all, || disk.in_flight() == 0)
            .unwrap();
        assert!(!buffer.in_use());
    });
}

#[test]
fn a_member_is_opened_by_one_only() {
    let dir = Dir::new("busy");
    let path = dir.image("a", 1 << 20);
    let first = open(&path).unwrap();
    let refused = open(&path).unwrap_err();
    assert!(matches!(refused, OpenError::Busy { .. }));
    assert_eq!(refused.kind(), ErrorKind::Busy);
    drop(first);
    assert!(open(&path).is_ok());
}

#[test]
fn what_cannot_be_a_member_is_refused_with_the_reason() {
    let dir = Dir::new("refused");
    let missing = dir.0.join("nothing");
    let refused = |path: &Path| open(path.to_str().unwrap()).unwrap_err();
    assert!(matches!(refused(&missing), OpenError::Missing { .. }));
    assert!(matches!(refused(&dir.0), OpenError::WrongType { .. }));
    assert!(matches!(
        refused(Path::new("/dev/null")),
        OpenError::WrongType { .. }
    ));
    assert!(matches!(
        open(&dir.image("empty", 0)).unwrap_err(),
        OpenError::Empty { .. }
    ));
    let sentence = refused(&missing).to_string();
    assert!(sentence.contains("does not exist") && sentence.contains("check the path"));
}

#[test]
fn a_file_system_without_direct_io_is_refused() {
    // A regular file of procfs, which has none; root may open it for writing.
    if let Err(error) = open("/proc/sys/kernel/printk_delay") {
        let known = matches!(
            error,
            OpenError::NoDirectIo { .. } | OpenError::ReadOnly { .. }
        );
        assert!(known, "{error}");
    } else {
        panic!("procfs cannot do direct I/O");
    }
}
