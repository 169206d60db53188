//! What a device or file holds, asked before anything is written over it.
//!
//! [`signatures`] looks for the marks of filesystems, partition tables, volume managers, other
//! mirrors and disk image formats. It promises to name what it knows and to change nothing; it
//! does not promise that a device on which it finds nothing is empty. Whether somebody has the
//! device open is another question, answered by opening it exclusively (see
//! [`crate::medium`]) and explained by [`users`].

pub(crate) mod table;
pub(crate) mod users;

use std::io;

use mirror::superblock::{COPY_A_OFFSET, COPY_B_OFFSET, COPY_BYTES, Superblock, SuperblockError};

use table::{At, SIGNATURES};

/// How much of the beginning and of the end is read.
const WINDOW_BYTES: u64 = 256 << 10;
/// Where the uberblocks of the first ZFS label begin, and how far apart they may be.
const ZFS_UBERBLOCKS: (usize, usize) = (128 << 10, 1 << 10);
/// The magic number of a ZFS uberblock, in both byte orders.
const ZFS_MAGICS: [[u8; 8]; 2] = [0x00ba_b10c_u64.to_le_bytes(), 0x00ba_b10c_u64.to_be_bytes()];

/// Something known that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    /// What it is, with its article: `an ext2, ext3 or ext4 filesystem`.
    pub(crate) what: String,
    /// Where its mark lies, in bytes from the start.
    pub(crate) offset: u64,
    /// Whether the mark lies in the last part of the device, where a mirror keeps the
    /// applications' data.
    pub(crate) at_end: bool,
    /// Whether it is the superblock of a mirror of ours.
    pub(crate) is_mirror: bool,
}

/// Fills bytes from an offset of the device.
type ReadAt<'a> = dyn Fn(&mut [u8], u64) -> io::Result<()> + 'a;

/// The beginning and the end of a device.
struct Windows {
    head: Vec<u8>,
    tail: Vec<u8>,
    size_bytes: u64,
}

impl Windows {
    fn read(read: &ReadAt<'_>, size_bytes: u64) -> io::Result<Self> {
        let len = size_bytes.min(WINDOW_BYTES);
        let read_at = |offset| -> io::Result<Vec<u8>> {
            let len = usize::try_from(len).map_err(io::Error::other)?;
            let mut bytes = vec![0; len];
            read(&mut bytes, offset)?;
            Ok(bytes)
        };
        Ok(Self {
            head: read_at(0)?,
            tail: read_at(size_bytes - len)?,
            size_bytes,
        })
    }

    /// The `len` bytes at `at` and their offset, when they lie in one of the windows.
    fn get(&self, at: At, len: usize) -> Option<(u64, &[u8])> {
        let offset = match at {
            At::Start(offset) => offset,
            At::End(back) => self.size_bytes.checked_sub(back)?,
            At::EndAligned {
                back,
                align,
                offset,
            } => (self.size_bytes / align * align)
                .checked_sub(back)?
                .checked_add(offset)?,
        };
        let in_head = usize::try_from(offset).ok();
        if let Some(bytes) = in_head.and_then(|start| self.head.get(start..start.checked_add(len)?))
        {
            return Some((offset, bytes));
        }
        let tail_start = self.size_bytes - u64::try_from(self.tail.len()).ok()?;
        let start = usize::try_from(offset.checked_sub(tail_start)?).ok()?;
        let bytes = self.tail.get(start..start.checked_add(len)?)?;
        Some((offset, bytes))
    }
}

/// Everything known that lies on the device, in order of its place, each kind once. `read` fills
/// bytes from an offset.
pub(crate) fn signatures(read: &ReadAt<'_>, size_bytes: u64) -> io::Result<Vec<Finding>> {
    let windows = Windows::read(read, size_bytes)?;
    let mut found = Vec::new();
    for signature in SIGNATURES {
        let all_fit = signature.marks.iter().all(|mark| {
            let bytes = windows.get(mark.at, mark.bytes.len());
            bytes.is_some_and(|(_, bytes)| bytes == mark.bytes)
        });
        if let Some(first) = signature.marks.first()
            && all_fit
            && let Some((offset, _)) = windows.get(first.at, first.bytes.len())
        {
            found.push(Finding {
                what: signature.what.to_owned(),
                offset,
                at_end: !matches!(first.at, At::Start(_)),
                is_mirror: false,
            });
        }
    }
    found.extend(partition_table(&windows));
    found.extend(zfs(&windows));
    found.extend(mirror_superblock(&windows));
    found.sort_by_key(|finding| finding.offset);
    let mut kinds = std::collections::BTreeSet::new();
    found.retain(|finding| kinds.insert(finding.what.clone()));
    Ok(found)
}

/// An MBR: the mark alone is also that of every FAT boot sector, so an entry in use is asked
/// for as well.
fn partition_table(windows: &Windows) -> Option<Finding> {
    let (_, sector) = windows.get(At::Start(0), 512)?;
    let entries = sector.get(446..510)?.chunks_exact(16);
    let in_use = |entry: &[u8]| entry[4] != 0 && entry[12..16] != [0; 4];
    let sound = entries.clone().all(|entry| matches!(entry[0], 0 | 0x80));
    let found = sector.ends_with(&[0x55, 0xaa]) && sound && entries.clone().any(in_use);
    found.then(|| Finding {
        what: "an MBR partition table".to_owned(),
        offset: 510,
        at_end: false,
        is_mirror: false,
    })
}

/// A ZFS label: any uberblock of its ring.
fn zfs(windows: &Windows) -> Option<Finding> {
    let (start, step) = ZFS_UBERBLOCKS;
    let ring = windows.head.get(start..)?;
    let index = ring.chunks(step).position(|block| {
        let magic = block.get(..8);
        magic.is_some_and(|magic| ZFS_MAGICS.iter().any(|known| known == magic))
    })?;
    Some(Finding {
        what: "a member of a ZFS pool".to_owned(),
        offset: u64::try_from(start + index * step).ok()?,
        at_end: false,
        is_mirror: false,
    })
}

/// Our own superblock.
fn mirror_superblock(windows: &Windows) -> Option<Finding> {
    let (_, copy_a) = windows.get(At::Start(COPY_A_OFFSET), COPY_BYTES)?;
    let (_, copy_b) = windows.get(At::Start(COPY_B_OFFSET), COPY_BYTES)?;
    let what = match Superblock::load(copy_a, copy_b) {
        Ok(loaded) => {
            let superblock = loaded.superblock;
            format!(
                "a member (slot {}) of mirror {} (uuid {})",
                superblock.own_slot, superblock.name, superblock.mirror
            )
        }
        Err(SuperblockError::NotAMember) => return None,
        Err(SuperblockError::Damaged(_)) => {
            "a member of a mirror, with both superblock copies damaged".to_owned()
        }
        Err(SuperblockError::TooNew(_)) => {
            "a member of a mirror made by a newer version of ublk-mirror".to_owned()
        }
    };
    Some(Finding {
        what,
        offset: COPY_A_OFFSET,
        at_end: false,
        is_mirror: true,
    })
}

/// The findings as a part of a sentence: `an XFS filesystem (at byte 0) and a GPT ...`.
pub(crate) fn describe(findings: &[Finding]) -> String {
    let each: Vec<String> = findings
        .iter()
        .map(|finding| format!("{} (at byte {})", finding.what, finding.offset))
        .collect();
    match each.as_slice() {
        [] => "nothing known".to_owned(),
        [one] => one.clone(),
        [most @ .., last] => format!("{} and {last}", most.join(", ")),
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
