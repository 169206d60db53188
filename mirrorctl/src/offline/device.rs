//! Reading and writing a member past the page cache, so that what is checked is what the disk
//! holds and not what the kernel remembers of it.
//!
//! Where direct I/O is not to be had (some filesystems), the page cache is used.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use dirty_map::BLOCK_BYTES;

use crate::failure::{Failure, words};
use crate::medium::{self, Access, Medium};

/// Bytes of a block, as lengths in memory are counted.
pub(super) const BLOCK: usize = 4096;
const _: () = assert!(BLOCK as u64 == BLOCK_BYTES);
/// What is read at once after a longer read failed, down to single blocks.
const SMALLER: [usize; 2] = [64 << 10, BLOCK];

/// Memory that direct I/O can use.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// Room for `len` bytes, all zero.
    pub(super) fn new(len: usize) -> Self {
        let bytes = vec![0; len + BLOCK];
        let address = bytes.as_ptr().addr();
        let start = address.next_multiple_of(BLOCK) - address;
        Self { bytes, start, len }
    }

    /// Its bytes.
    pub(super) fn get(&self) -> &[u8] {
        &self.bytes[self.start..][..self.len]
    }

    /// Its bytes, to change them.
    pub(super) fn get_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..][..self.len]
    }
}

/// An open member.
#[derive(Debug)]
pub(super) struct Device {
    medium: Medium,
    direct: Option<File>,
}

impl Device {
    /// Opens the device or file at `path`, to read it undisturbed or to mend it alone.
    ///
    /// Refuses an export: over NBD nobody else can be kept away, and the server's cache cannot be
    /// read past.
    pub(super) fn open(path: &Path, access: Access) -> Result<Self, Failure> {
        if medium::is_address(path) {
            return Err(medium::needs_the_disk(path));
        }
        let medium = Medium::open(path, access)?;
        let file = medium.file().ok_or_else(|| medium::needs_the_disk(path))?;
        let same = format!("/proc/self/fd/{}", file.as_raw_fd());
        let direct = OpenOptions::new()
            .read(true)
            .write(access == Access::Exclusive)
            .custom_flags(rustix::fs::OFlags::DIRECT.bits().cast_signed())
            .open(same);
        Ok(Self {
            medium,
            direct: direct.ok(),
        })
    }

    /// The open device or file.
    pub(super) fn medium(&self) -> &Medium {
        &self.medium
    }

    fn file(&self) -> io::Result<&File> {
        let file = self.medium.file();
        file.ok_or_else(|| io::ErrorKind::Unsupported.into())
    }

    /// Reads at `offset`, a multiple of 4 KiB. Parts that cannot be read are named, in whole
    /// blocks, and hold anything.
    ///
    /// Fails when the device has gone.
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> Result<Vec<Range<usize>>, Failure> {
        read_parts(&mut |at, part| self.read_whole(at, part), offset, out).map_err(|e| {
            Failure::failed(format!(
                "{} has gone: reading at byte {offset} ended with: {}.",
                self.medium.path().display(),
                words(&e)
            ))
        })
    }

    fn read_whole(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        #[cfg(test)]
        tests::read(self.medium.path(), offset, out.len())?;
        if let Some(direct) = &self.direct {
            match direct.read_exact_at(out, offset) {
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => {}
                done => return done,
            }
        }
        self.file()?.read_exact_at(out, offset)
    }

    /// Writes at `offset`, a multiple of 4 KiB; durable after [`Device::sync`].
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        #[cfg(test)]
        tests::written(self.medium.path(), offset, bytes.len());
        let mut aligned = Buffer::new(bytes.len());
        aligned.get_mut().copy_from_slice(bytes);
        if let Some(direct) = &self.direct {
            match direct.write_all_at(aligned.get(), offset) {
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => {}
                done => return done,
            }
        }
        self.file()?.write_all_at(aligned.get(), offset)
    }

    /// Makes everything written durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        #[cfg(test)]
        tests::note(self.medium.path(), Event::Sync);
        self.file()?.sync_all()
    }
}

/// Reads in ever smaller parts where a read fails.
fn read_parts(
    read: &mut impl FnMut(u64, &mut [u8]) -> io::Result<()>,
    offset: u64,
    out: &mut [u8],
) -> io::Result<Vec<Range<usize>>> {
    match read(offset, out) {
        Ok(()) => return Ok(Vec::new()),
        Err(error) if has_gone(&error) => return Err(error),
        Err(_) => {}
    }
    let mut bad: Vec<Range<usize>> = Vec::new();
    let Some(&step) = SMALLER.iter().find(|&&step| step < out.len()) else {
        bad.push(0..out.len());
        return Ok(bad);
    };
    for (index, part) in out.chunks_mut(step).enumerate() {
        let start = index * step;
        for range in read_parts(read, offset + start as u64, part)? {
            let range = start + range.start..start + range.end;
            match bad.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => bad.push(range),
            }
        }
    }
    Ok(bad)
}

/// Whether an error means the whole device and not a part of it: ENODEV, ENXIO.
fn has_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(19 | 6))
}

#[cfg(test)]
pub(super) use tests::{Event, damage, events};

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::path::PathBuf;
    use std::sync::Mutex;

    /// Bytes that cannot be read until they have been written.
    static BAD: Mutex<Vec<(PathBuf, Range<u64>)>> = Mutex::new(Vec::new());

    /// What was done to files, in order.
    static EVENTS: Mutex<Vec<(PathBuf, Event)>> = Mutex::new(Vec::new());

    /// Something done to a file.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(in super::super) enum Event {
        Write(u64),
        Sync,
    }

    pub(super) fn note(path: &Path, event: Event) {
        EVENTS.lock().unwrap().push((path.to_owned(), event));
    }

    /// What was done to the files in `dir`, in order.
    pub(in super::super) fn events(dir: &Path) -> Vec<(PathBuf, Event)> {
        let mut events = EVENTS.lock().unwrap().clone();
        events.retain(|(path, _)| path.starts_with(dir));
        events
    }

    /// Bytes of the file at `path` cannot be read until a single write covers them.
    pub(in super::super) fn damage(path: &Path, range: Range<u64>) {
        BAD.lock().unwrap().push((path.to_owned(), range));
    }

    pub(super) fn read(path: &Path, offset: u64, len: usize) -> io::Result<()> {
        let end = offset + len as u64;
        let hit = |(bad, range): &(PathBuf, Range<u64>)| {
            bad == path && range.start < end && offset < range.end
        };
        if BAD.lock().unwrap().iter().any(hit) {
            return Err(io::Error::from_raw_os_error(5));
        }
        Ok(())
    }

    pub(super) fn written(path: &Path, offset: u64, len: usize) {
        note(path, Event::Write(offset));
        let end = offset + len as u64;
        BAD.lock()
            .unwrap()
            .retain(|(bad, range)| !(bad == path && offset <= range.start && range.end <= end));
    }

    #[test]
    fn what_cannot_be_read_is_named_to_the_block_and_the_rest_is_read() {
        let disk: Vec<u8> = (0..1 << 20).map(|at: u32| at.to_le_bytes()[1]).collect();
        let bad = [
            3 * 4096..4 * 4096,
            4 * 4096 + 512..4 * 4096 + 1024,
            900_000..900_001,
        ];
        let mut reads = 0;
        let mut read = |offset: u64, out: &mut [u8]| {
            reads += 1;
            let range =
                usize::try_from(offset).unwrap()..usize::try_from(offset).unwrap() + out.len();
            if bad
                .iter()
                .any(|bad| bad.start < range.end && range.start < bad.end)
            {
                return Err(io::Error::from_raw_os_error(5));
            }
            out.copy_from_slice(&disk[range]);
            Ok(())
        };
        let mut out = vec![0xee; 1 << 20];
        let found = read_parts(&mut read, 0, &mut out).unwrap();
        assert_eq!(found, [3 * 4096..5 * 4096, 219 * 4096..220 * 4096]);
        assert_eq!(reads, 1 + 16 + 16 + 16);
        for block in (0..256).filter(|block| ![3, 4, 219].contains(block)) {
            let range = block * 4096..(block + 1) * 4096;
            assert_eq!(out[range.clone()], disk[range], "block {block}");
        }
    }

    #[test]
    fn a_device_that_has_gone_is_not_asked_block_by_block() {
        let mut reads = 0;
        let mut read = |_: u64, _: &mut [u8]| {
            reads += 1;
            Err(io::Error::from_raw_os_error(19))
        };
        assert!(read_parts(&mut read, 0, &mut [0; 1 << 20]).is_err());
        assert_eq!(reads, 1);
    }

    #[test]
    fn buffers_suit_direct_io() {
        for len in [512, 4096, 1 << 20] {
            let mut buffer = Buffer::new(len);
            assert_eq!(buffer.get().as_ptr().addr() % BLOCK, 0);
            assert_eq!(buffer.get_mut().len(), len);
        }
    }
}
