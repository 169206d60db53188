//! Superblocks and map pages of one member, outside the data path.

use super::maps::{COMPLETED_AT, EFFECTIVE_AT};
use super::{front, length};
use crate::assemble::Seen;
use crate::bytes::Reader;
use crate::host::{Disk, DiskRequest, Errno, Host};
use crate::layout::{PAGE_BYTES, Region, RegionKind};
use crate::superblock::{COPY_A_OFFSET, COPY_B_OFFSET, COPY_BYTES, Superblock, SuperblockError};
use dirty_map::{
    Address, Extent, ExtentState, SECTOR_BYTES, STATES_PER_SECTOR, Stamp, StateMap, decode,
};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

/// Bytes moved by one request here.
const CHUNK_BYTES: u64 = 1 << 20;

/// Why a member's metadata could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum MemberError {
    /// The device failed.
    #[error("it cannot be read or written: {0}")]
    Io(#[from] Errno),
    /// The bytes make no sense.
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
    /// The device is smaller than its superblock says.
    #[error("it has {have} bytes, but its superblock needs {need}; it has shrunk or is not whole")]
    TooSmall {
        /// The device's size.
        have: u64,
        /// What the layout needs.
        need: u64,
    },
}

/// How long a member's metadata may take to be read or written, a request.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for an operation, but not longer than `limit`; it is an orphan afterwards.
pub(super) async fn timed<H: Host>(
    host: &H,
    op: impl Future<Output = Result<(), Errno>> + Unpin,
    limit: Duration,
) -> Result<(), Errno> {
    let answer = in_time(host, op, limit).await;
    answer.unwrap_or(Err(Errno::TIMED_OUT))
}

/// Waits for an operation, but not longer than `limit`.
pub(super) async fn in_time<H: Host>(
    host: &H,
    mut op: impl Future<Output = Result<(), Errno>> + Unpin,
    limit: Duration,
) -> Option<Result<(), Errno>> {
    let mut timer = None;
    poll_fn(move |context| {
        if let Poll::Ready(result) = Pin::new(&mut op).poll(context) {
            return Poll::Ready(Some(result));
        }
        let timer = timer.get_or_insert_with(|| host.sleep(limit));
        Pin::new(timer).poll(context).map(|()| None)
    })
    .await
}

/// Submits a request and waits for it with patience.
async fn submit<H: Host, D: Disk<Buffer = H::Buffer>>(
    host: &H,
    disk: &D,
    request: DiskRequest<H::Buffer>,
) -> Result<(), Errno> {
    timed(host, disk.submit(request), PATIENCE).await
}

/// Makes what was written to a member durable.
pub(super) async fn flush<H: Host, D: Disk<Buffer = H::Buffer>>(
    host: &H,
    disk: &D,
) -> Result<(), Errno> {
    flush_within(host, disk, PATIENCE).await
}

/// [`flush`], which may not take longer than `limit`.
pub(super) async fn flush_within<H: Host, D: Disk<Buffer = H::Buffer>>(
    host: &H,
    disk: &D,
    limit: Duration,
) -> Result<(), Errno> {
    timed(host, disk.submit(DiskRequest::Flush), limit).await
}

/// Reads `len` bytes at `offset`; both multiples of 4 KiB.
pub(super) async fn read_bytes<H: Host, D: Disk<Buffer = H::Buffer>>(
    host: &H,
    disk: &D,
    offset: u64,
    len: u64,
) -> Result<Vec<u8>, Errno> {
    let mut out = Vec::with_capacity(length(len));
    let buffer = host.allocate(length(len.min(CHUNK_BYTES)));
    while (out.len() as u64) < len {
        let at = out.len() as u64;
        let span = front(&buffer, length((len - at).min(CHUNK_BYTES)));
        submit(
            host,
            disk,
            DiskRequest::Read {
                offset: offset + at,
                span: span.clone(),
            },
        )
        .await?;
        span.read(|bytes| out.extend_from_slice(bytes));
    }
    Ok(out)
}

/// Writes `bytes` at `offset`; both multiples of 4 KiB. Durable after the next flush.
pub(super) async fn write_bytes<H: Host, D: Disk<Buffer = H::Buffer>>(
    host: &H,
    disk: &D,
    offset: u64,
    bytes: &[u8],
) -> Result<(), Errno> {
    write_within(host, disk, offset, bytes, PATIENCE).await
}

/// [`write_bytes`], of which no request may take longer than `limit`.
pub(super) async fn write_within<H: Host, D: Disk<Buffer = H::Buffer>>(
    host: &H,
    disk: &D,
    offset: u64,
    bytes: &[u8],
    limit: Duration,
) -> Result<(), Errno> {
    let chunk_bytes = length(CHUNK_BYTES);
    let buffer = host.allocate(bytes.len().min(chunk_bytes));
    let mut at = offset;
    for chunk in bytes.chunks(chunk_bytes) {
        let span = front(&buffer, chunk.len());
        span.fill(|out| out.copy_from_slice(chunk));
        let write = DiskRequest::Write {
            offset: at,
            span,
            fua: false,
        };
        timed(host, disk.submit(write), limit).await?;
        at += chunk.len() as u64;
    }
    Ok(())
}

/// Reads a member's superblock and makes unequal copies equal, before anything relies on it.
pub(super) async fn load_superblock<H: Host, D: Disk<Buffer = H::Buffer>>(
    host: &H,
    disk: &D,
) -> Result<Superblock, MemberError> {
    let have = disk.geometry().size_bytes;
    if have < crate::layout::MEMBER_BYTES_MIN {
        return Err(SuperblockError::NotAMember.into());
    }
    // One bad sector under one copy must not cost the other.
    let mut copies = Vec::new();
    let mut error = None;
    for offset in [COPY_A_OFFSET, COPY_B_OFFSET] {
        match read_bytes(host, disk, offset, COPY_BYTES as u64).await {
            Ok(bytes) => copies.push(bytes),
            Err(errno) => {
                error = Some(errno);
                copies.push(vec![0; COPY_BYTES]);
            }
        }
    }
    let loaded = match (Superblock::load(&copies[0], &copies[1]), error) {
        (Err(SuperblockError::NotAMember), Some(errno)) => return Err(errno.into()),
        (result, _) => result?,
    };
    let need = loaded.superblock.layout.member_bytes();
    if have < need {
        return Err(MemberError::TooSmall { have, need });
    }
    if loaded.needs_mending {
        store_superblock(host, disk, &loaded.superblock).await?;
    }
    Ok(loaded.superblock)
}

/// Writes both copies, one after the other: at every moment one is whole.
pub(super) async fn store_superblock<H: Host, D: Disk<Buffer = H::Buffer>>(
    host: &H,
    disk: &D,
    superblock: &Superblock,
) -> Result<(), Errno> {
    let bytes = superblock.encode();
    for offset in [COPY_A_OFFSET, COPY_B_OFFSET] {
        write_bytes(host, disk, offset, &bytes).await?;
        flush(host, disk).await?;
    }
    Ok(())
}

/// What a member's maps say, sector by sector.
pub(super) struct RegionImage {
    /// For each sector, the newest valid content, if any.
    pub(super) sectors: Vec<Option<(Stamp, Vec<u8>)>>,
    /// Whether a sector's copies differ or are damaged, by sector.
    pub(super) uneven: Vec<bool>,
    /// The newest stamp on either copy of any sector.
    pub(super) newest: Stamp,
}

/// Reads pages `first..first + count` of both copies of a region.
///
/// A copy that cannot be read counts as damaged.
pub(super) async fn read_pages<H: Host, D: Disk<Buffer = H::Buffer>>(
    host: &H,
    disk: &D,
    superblock: &Superblock,
    region: &Region,
    pages: std::ops::Range<u64>,
) -> RegionImage {
    let len = (pages.end - pages.start) * PAGE_BYTES;
    let mut copies = Vec::new();
    for copy in [region.copy_a, region.copy_b] {
        let offset = copy + pages.start * PAGE_BYTES;
        copies.push(read_tolerant(host, disk, offset, len).await);
    }
    let sectors = length(len) / SECTOR_BYTES;
    let first = pages.start * (PAGE_BYTES / SECTOR_BYTES as u64);
    let kind = super::maps::sector_kind(region.kind);
    let mut image = RegionImage {
        sectors: Vec::with_capacity(sectors),
        uneven: Vec::with_capacity(sectors),
        newest: Stamp {
            ordinal: 0,
            sequence: 0,
        },
    };
    for sector in 0..sectors {
        let index = u32::try_from(first + sector as u64).unwrap_or(u32::MAX);
        let address = Address {
            kind,
            slot: region.slot,
            index,
        };
        let mut best: Option<(Stamp, Vec<u8>)> = None;
        let at = sector * SECTOR_BYTES;
        for copy in &copies {
            let bytes = &copy[at..at + SECTOR_BYTES];
            let Ok(bytes) = <&[u8; SECTOR_BYTES]>::try_from(bytes) else {
                continue;
            };
            let Ok((stamp, payload)) = decode(bytes, address, superblock.tag()) else {
                continue;
            };
            image.newest = image.newest.max(stamp);
            if best.as_ref().is_none_or(|(have, _)| stamp > *have) {
                best = Some((stamp, payload.to_vec()));
            }
        }
        let even = copies[0][at..at + SECTOR_BYTES] == copies[1][at..at + SECTOR_BYTES];
        image.uneven.push(!even || best.is_none());
        image.sectors.push(best);
    }
    image
}

/// Reads what can be read; what cannot comes as zeroes, which no sector decodes from.
async fn read_tolerant<H: Host, D: Disk<Buffer = H::Buffer>>(
    host: &H,
    disk: &D,
    offset: u64,
    len: u64,
) -> Vec<u8> {
    if let Ok(bytes) = read_bytes(host, disk, offset, len).await {
        return bytes;
    }
    let mut out = Vec::with_capacity(length(len));
    let mut answers = true;
    for page in 0..len / PAGE_BYTES {
        let offset = offset + page * PAGE_BYTES;
        let read = if answers {
            read_bytes(host, disk, offset, PAGE_BYTES).await
        } else {
            Err(Errno::TIMED_OUT)
        };
        // A disk that does not answer is not asked page by page.
        answers &= read != Err(Errno::TIMED_OUT);
        match read {
            Ok(bytes) => out.extend_from_slice(&bytes),
            Err(_) => out.resize(out.len() + length(PAGE_BYTES), 0),
        }
    }
    out
}

/// Reads a whole region.
pub(super) async fn read_region<H: Host, D: Disk<Buffer = H::Buffer>>(
    host: &H,
    disk: &D,
    superblock: &Superblock,
    region: &Region,
) -> RegionImage {
    read_pages(host, disk, superblock, region, 0..region.len / PAGE_BYTES).await
}

/// A member's superblock with the position of its maps.
pub(super) struct Surveyed {
    /// For the assembly decision.
    pub(super) seen: Seen,
    /// Its extent-state map.
    pub(super) states: RegionImage,
}

/// Reads what the assembly decision needs of a member.
pub(super) async fn survey<H: Host, D: Disk<Buffer = H::Buffer>>(
    host: &H,
    disk: &D,
    path: &str,
) -> Result<Surveyed, MemberError> {
    let superblock = load_superblock(host, disk).await?;
    let missing = MemberError::Superblock(SuperblockError::Damaged("a region is missing"));
    let state_region = superblock
        .layout
        .find(RegionKind::State, 0)
        .ok_or(missing.clone())?;
    let position_region = superblock
        .layout
        .find(RegionKind::Position, 0)
        .ok_or(missing)?;
    let states = read_region(host, disk, &superblock, state_region).await;
    let positions = read_region(host, disk, &superblock, position_region).await;
    let newest = positions.sectors.iter().flatten();
    let newest = newest.max_by_key(|(stamp, _)| *stamp);
    let (effective, completed) = newest.map_or((0, 0), |(_, payload)| {
        let fields = Reader(payload);
        (fields.u128(EFFECTIVE_AT), fields.u64(COMPLETED_AT))
    });
    let seen = Seen {
        path: path.to_owned(),
        superblock,
        position: states.newest.max(positions.newest),
        damaged: newest.is_none(),
        effective,
        completed,
    };
    Ok(Surveyed { seen, states })
}

/// The extents that a member's own map calls hot, in order; a damaged sector counts as hot throughout.
pub(super) fn own_hot_extents(states: &RegionImage, extents: u32) -> Vec<Extent> {
    own_extents(states, extents, |state| state == ExtentState::Hot)
}

/// The extents of which a member's own map says that, in order; all of a damaged sector.
pub(super) fn own_extents(
    states: &RegionImage,
    extents: u32,
    wanted: impl Fn(ExtentState) -> bool,
) -> Vec<Extent> {
    let mut map = StateMap::new(extents);
    let mut found = Vec::new();
    for (index, sector) in (0..).zip(&states.sectors) {
        let first = u64::from(index) * STATES_PER_SECTOR;
        if first >= u64::from(extents) {
            break;
        }
        match sector
            .as_ref()
            .and_then(|(_, payload)| payload.as_slice().try_into().ok())
        {
            Some(payload) => map.load_payload(index, payload),
            None => {
                let last = (first + STATES_PER_SECTOR).min(u64::from(extents));
                found.extend((first..last).map(|e| Extent(u32::try_from(e).unwrap_or(u32::MAX))));
            }
        }
    }
    let known = (0..extents).map(Extent).filter(|&e| wanted(map.get(e)));
    found.extend(known);
    found.sort_unstable();
    found.dedup();
    found
}

#[cfg(test)]
#[path = "member_io_tests.rs"]
mod tests;
