//! Every signature as a row; real tools where they exist are the integration tests' part.
#![allow(clippy::unwrap_used)]
use super::*;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

const SIZE: u64 = (20 << 20) + 512;

struct Scratch(PathBuf, File);

impl Scratch {
    fn new(size: u64) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("mirrorctl-probe-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        file.set_len(size).unwrap();
        Self(path, file)
    }

    fn put(&self, offset: u64, bytes: &[u8]) -> &Self {
        self.1.write_all_at(bytes, offset).unwrap();
        self
    }

    fn signatures(&self) -> Vec<Finding> {
        let size = self.1.metadata().unwrap().len();
        signatures(&|bytes, offset| self.1.read_exact_at(bytes, offset), size).unwrap()
    }

    fn kinds(&self) -> Vec<String> {
        let found = self.signatures();
        found.into_iter().map(|finding| finding.what).collect()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.0));
    }
}

#[test]
fn every_row_of_the_table_is_found_and_needs_each_of_its_marks() {
    let offset_of = |at: At| match at {
        At::Start(offset) => offset,
        At::End(back) => SIZE - back,
        At::EndAligned {
            back,
            align,
            offset,
        } => SIZE / align * align - back + offset,
    };
    for signature in SIGNATURES {
        let scratch = Scratch::new(SIZE);
        for mark in signature.marks {
            assert!(!scratch.kinds().contains(&signature.what.to_owned()));
            scratch.put(offset_of(mark.at), mark.bytes);
        }
        assert_eq!(scratch.kinds(), [signature.what], "{signature:?}");
    }
}

#[test]
fn nothing_is_found_on_zeroes_on_noise_and_on_tiny_files() {
    assert!(Scratch::new(SIZE).kinds().is_empty());
    let noise: Vec<u8> = (0..SIZE)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0])
        .collect();
    let scratch = Scratch::new(SIZE);
    assert!(scratch.put(0, &noise).kinds().is_empty());
    for size in [0, 1, 511, 512, 4096, 12 << 10] {
        assert!(Scratch::new(size).kinds().is_empty(), "size {size}");
    }
}

#[test]
fn a_partition_table_needs_an_entry_and_not_only_the_mark() {
    let scratch = Scratch::new(SIZE);
    scratch.put(510, &[0x55, 0xaa]);
    assert!(scratch.kinds().is_empty());
    let entry = [0x80, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0x40, 0, 0];
    scratch.put(446 + 16, &entry);
    assert_eq!(scratch.kinds(), ["an MBR partition table"]);
    scratch.put(446, &[0x17]);
    assert!(scratch.kinds().is_empty(), "no such status byte");
}

#[test]
fn a_zfs_label_is_found_by_any_uberblock() {
    for (offset, magic) in [(128 << 10, ZFS_MAGICS[0]), (252 << 10, ZFS_MAGICS[1])] {
        let scratch = Scratch::new(SIZE);
        scratch.put(offset, &magic);
        assert_eq!(scratch.kinds(), ["a member of a ZFS pool"]);
    }
}

#[test]
fn a_damaged_superblock_still_says_that_it_is_a_member() {
    let scratch = Scratch::new(SIZE);
    scratch.put(COPY_B_OFFSET, b"UBLKMIRR");
    let found = scratch.signatures();
    assert_eq!(found.len(), 1);
    assert!(found[0].is_mirror);
    assert!(found[0].what.contains("damaged"), "{found:?}");
}

#[test]
fn several_findings_make_a_sentence_and_each_kind_is_named_once() {
    let scratch = Scratch::new(SIZE);
    scratch.put(0, b"LUKS\xba\xbe").put(0x438, &[0x53, 0xef]);
    scratch.put(512, b"EFI PART").put(SIZE - 512, b"EFI PART");
    let found = scratch.signatures();
    assert_eq!(
        describe(&found),
        "a LUKS encrypted volume (at byte 0), a GPT partition table (at byte 512) and an ext2, \
         ext3 or ext4 filesystem (at byte 1080)"
    );
    assert_eq!(describe(&[]), "nothing known");
}
