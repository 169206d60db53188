//! What a new member is filled with. Pure: the caller performs the writes.
//!
//! Nothing of the data area is written: a mirror is redundant at once because every extent is
//! *unwritten* and reads as zeroes (R11). The small state map and the summaries are written in
//! full, so that a sector that was never written can later be told from a damaged one; the
//! large missed maps are not, their summaries say that nothing of them counts.
//!
//! Order on each member: maps first, a flush, then the superblock's two copies and a flush. A
//! creation cut off in the middle leaves members without a superblock, which are no members.

use crate::layout::{
    Layout, MEMBER_BYTES_MIN, MIRROR_BYTES_MAX, PAGE_BYTES, RegionKind, SLOTS_MAX,
};
use crate::superblock::{
    ADDRESS_BYTES_MAX, COPY_A_OFFSET, COPY_B_OFFSET, COPY_BYTES, Epoch, LastStop, NAME_BYTES_MAX,
    SlotRecord, SlotState, Superblock,
};
use dirty_map::{Address, Kind, PAYLOAD_BYTES, SECTOR_BYTES, Stamp, encode};
use uuid::Uuid;

/// Fewest and most members of a mirror.
pub const MEMBERS: std::ops::RangeInclusive<usize> = 2..=8;

/// A device that is to become a member.
#[derive(Clone, Debug)]
pub struct NewMember {
    /// Its path, recorded as a hint.
    pub path: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Its smallest unit of I/O in bytes.
    pub logical_block_bytes: u32,
    /// Whether its data area is known to read as zeroes (a new sparse file).
    pub zeroed: bool,
}

/// What a mirror is to be.
#[derive(Clone, Debug)]
pub struct CreateRequest {
    /// Its name.
    pub name: String,
    /// Its first members, in slot order.
    pub members: Vec<NewMember>,
    /// Size in bytes; the largest that fits when none is given.
    pub size_bytes: Option<u64>,
    /// Smallest unit of I/O in bytes; the largest of the members' when none is given.
    pub logical_block_bytes: Option<u32>,
    /// Whether checksums of blocks are kept.
    pub checksums: bool,
    /// One unpredictable number for the mirror, one for the epoch and one for each member.
    pub random: Vec<u128>,
    /// Seconds since 1970, for display.
    pub now_secs: u64,
}

/// The writes for one member, in order.
#[derive(Clone, Debug)]
pub struct MemberPlan {
    /// The member's path.
    pub path: String,
    /// Maps: perform, then flush.
    pub maps: Vec<(u64, Vec<u8>)>,
    /// Superblock copies: perform after the flush, then flush again.
    pub superblocks: Vec<(u64, Vec<u8>)>,
}

/// Everything to write for a new mirror.
#[derive(Clone, Debug)]
pub struct CreatePlan {
    /// Size of the device in bytes.
    pub size_bytes: u64,
    /// Bytes that each member must have.
    pub member_bytes: u64,
    /// First byte of the data area on each member.
    pub data_offset: u64,
    /// The mirror's identity.
    pub mirror: Uuid,
    /// One plan a member.
    pub members: Vec<MemberPlan>,
}

/// Why a mirror cannot be created so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CreateError {
    /// Wrong number of members.
    #[error("a mirror has 2 to 8 members, not {0}; give --member once for each")]
    Members(usize),
    /// Unusable name.
    #[error(
        "'{0}' cannot be a mirror's name; use 1 to 64 letters, digits, '.', '_' or '-', not beginning with '.' or '-'"
    )]
    Name(String),
    /// Unusable size.
    #[error("a size of {0} bytes makes no sense; give a multiple of {1} bytes, at most 1 PiB")]
    Size(u64, u32),
    /// A member cannot hold the device.
    #[error(
        "{path} has {have} bytes, but {need} are needed; use a larger device or a smaller --size"
    )]
    TooSmall {
        /// The member.
        path: String,
        /// What it has.
        have: u64,
        /// What it needs.
        need: u64,
    },
    /// Unusable logical block.
    #[error(
        "a logical block of {0} bytes does not work with {1}; use 512 or 4096, not less than the device's own"
    )]
    LogicalBlock(u32, String),
}

/// Whether `name` can be a mirror's name (it becomes a file name under the run directory).
#[must_use]
pub fn is_name(name: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len())
        && !name.starts_with(['.', '-'])
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// Plans a new mirror.
///
/// # Errors
///
/// When the request makes no sense; nothing has been written then.
pub fn plan(request: &CreateRequest) -> Result<CreatePlan, CreateError> {
    if !MEMBERS.contains(&request.members.len()) {
        return Err(CreateError::Members(request.members.len()));
    }
    if !is_name(&request.name) {
        return Err(CreateError::Name(request.name.clone()));
    }
    let logical_block_bytes = logical_block(request)?;
    let size_bytes = size(request, logical_block_bytes)?;
    let layout = Layout::for_size(size_bytes);
    for member in &request.members {
        let need = layout.member_bytes().max(MEMBER_BYTES_MIN);
        if member.size_bytes < need {
            return Err(CreateError::TooSmall {
                path: member.path.clone(),
                have: member.size_bytes,
                need,
            });
        }
    }
    let mut random = request.random.iter().copied();
    let mut draw = || random.next().unwrap_or_default();
    let mirror = random_uuid(draw());
    let epoch = Epoch {
        id: draw(),
        ordinal: 0,
    };
    let members: Vec<Uuid> = request
        .members
        .iter()
        .map(|_| random_uuid(draw()))
        .collect();
    let template = Superblock {
        checksums: request.checksums,
        logical_block_bytes,
        epoch_secs: request.now_secs,
        created_secs: request.now_secs,
        updated_secs: request.now_secs,
        ..first_superblock(
            mirror,
            &request.name,
            layout,
            epoch,
            first_slots(request, &members),
        )
    };
    let plans = request
        .members
        .iter()
        .zip(&members)
        .enumerate()
        .map(|(slot, (new, &member))| {
            let superblock = Superblock {
                member,
                own_slot: u8::try_from(slot).unwrap_or(u8::MAX),
                ..template.clone()
            };
            MemberPlan {
                path: new.path.clone(),
                maps: blank_maps(&superblock),
                superblocks: copies(&superblock),
            }
        });
    Ok(CreatePlan {
        size_bytes,
        member_bytes: template.layout.member_bytes(),
        data_offset: template.layout.data_offset,
        mirror,
        members: plans.collect(),
    })
}

/// Every first member in-sync in its slot.
fn first_slots(request: &CreateRequest, members: &[Uuid]) -> Vec<SlotRecord> {
    let record = |(new, &uuid): (&NewMember, &Uuid)| SlotRecord {
        member: Some(uuid),
        state: SlotState::InSync,
        zeroed: new.zeroed,
        address: hint(&new.path),
        ..SlotRecord::empty()
    };
    request.members.iter().zip(members).map(record).collect()
}

/// Both copies of a superblock with their offsets.
#[must_use]
pub fn copies(superblock: &Superblock) -> Vec<(u64, Vec<u8>)> {
    let bytes = superblock.encode();
    vec![(COPY_A_OFFSET, bytes.clone()), (COPY_B_OFFSET, bytes)]
}

/// Ranges (offset, length) to zero so that a member is none any more.
#[must_use]
pub fn wipe_ranges() -> Vec<(u64, u64)> {
    vec![
        (COPY_A_OFFSET, COPY_BYTES as u64),
        (COPY_B_OFFSET, COPY_BYTES as u64),
    ]
}

/// Every map of a new member, all extents unwritten and nothing missed.
#[must_use]
pub fn blank_maps(superblock: &Superblock) -> Vec<(u64, Vec<u8>)> {
    let stamp = Stamp {
        ordinal: superblock.epoch.ordinal,
        sequence: 1,
    };
    let mut writes = Vec::new();
    let region_kinds = [
        (RegionKind::Position, Kind::Position),
        (RegionKind::State, Kind::State),
        (RegionKind::Scrub, Kind::Scrub),
    ]
    .map(|kinds| (kinds, 0..1))
    .into_iter()
    .chain([((RegionKind::Summary, Kind::Summary), 0..SLOTS_MAX)]);
    for ((region_kind, kind), slots) in region_kinds {
        for slot in slots {
            let slot = u8::try_from(slot).unwrap_or(u8::MAX);
            let Some(region) = superblock.layout.find(region_kind, slot) else {
                continue;
            };
            let bytes = blank_region(kind, slot, superblock.tag(), stamp, region.len);
            writes.push((region.copy_a, bytes.clone()));
            writes.push((region.copy_b, bytes));
        }
    }
    writes
}

fn blank_region(kind: Kind, slot: u8, tag: u32, stamp: Stamp, len: u64) -> Vec<u8> {
    let sectors = len / SECTOR_BYTES as u64;
    debug_assert_eq!(len % PAGE_BYTES, 0);
    let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap_or(0));
    for index in 0..u32::try_from(sectors).unwrap_or(u32::MAX) {
        bytes.extend_from_slice(&encode(
            Address { kind, slot, index },
            tag,
            stamp,
            &[0; PAYLOAD_BYTES],
        ));
    }
    bytes
}

/// The first superblock of a mirror, as stopped; of nobody yet: `member` and `own_slot` are to be set.
#[must_use]
pub fn first_superblock(
    mirror: Uuid,
    name: &str,
    layout: Layout,
    epoch: Epoch,
    slots: Vec<SlotRecord>,
) -> Superblock {
    Superblock {
        mirror,
        member: Uuid::nil(),
        name: name.to_owned(),
        write_count: 1,
        layout,
        event_count: 1,
        epoch,
        history: Vec::new(),
        own_slot: 0,
        server_instance: None,
        slots,
        last_stop: LastStop::Clean,
        flush_failed: false,
        forced: false,
        handed_over: false,
        epoch_secs: 0,
        forced_secs: 0,
        forced_reason: String::new(),
        checksums: true,
        logical_block_bytes: 512,
        resync_cursor: 0,
        created_secs: 0,
        updated_secs: 0,
    }
}

/// A version 4 uuid from random bits.
#[must_use]
pub fn random_uuid(bits: u128) -> Uuid {
    uuid::Builder::from_random_bytes(bits.to_le_bytes()).into_uuid()
}

/// A path as recorded in a slot: left out when it is too long to be a hint.
#[must_use]
pub fn hint(path: &str) -> String {
    if path.len() <= ADDRESS_BYTES_MAX {
        path.to_owned()
    } else {
        String::new()
    }
}

fn logical_block(request: &CreateRequest) -> Result<u32, CreateError> {
    let Some(largest) = request.members.iter().max_by_key(|m| m.logical_block_bytes) else {
        return Err(CreateError::Members(0));
    };
    let chosen = request
        .logical_block_bytes
        .unwrap_or(largest.logical_block_bytes);
    if !matches!(chosen, 512 | 4096) || chosen < largest.logical_block_bytes {
        return Err(CreateError::LogicalBlock(chosen, largest.path.clone()));
    }
    Ok(chosen)
}

fn size(request: &CreateRequest, logical_block_bytes: u32) -> Result<u64, CreateError> {
    if let Some(size) = request.size_bytes {
        if size == 0 || size > MIRROR_BYTES_MAX || size % u64::from(logical_block_bytes) != 0 {
            return Err(CreateError::Size(size, logical_block_bytes));
        }
        return Ok(size);
    }
    let Some(smallest) = request.members.iter().min_by_key(|m| m.size_bytes) else {
        return Err(CreateError::Members(0));
    };
    let too_small = CreateError::TooSmall {
        path: smallest.path.clone(),
        have: smallest.size_bytes,
        need: MEMBER_BYTES_MIN,
    };
    if smallest.size_bytes < MEMBER_BYTES_MIN {
        return Err(too_small);
    }
    let size = Layout::largest_size_on(smallest.size_bytes).ok_or(too_small)?;
    Ok(size.min(MIRROR_BYTES_MAX))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn request(sizes: &[u64]) -> CreateRequest {
        let members = sizes.iter().enumerate().map(|(i, &size_bytes)| NewMember {
            path: format!("/dev/d{i}"),
            size_bytes,
            logical_block_bytes: 512,
            zeroed: false,
        });
        CreateRequest {
            name: "m".into(),
            members: members.collect(),
            size_bytes: None,
            logical_block_bytes: None,
            checksums: true,
            random: (1..20).map(|i| i << 64 | i).collect(),
            now_secs: 0,
        }
    }

    #[test]
    fn members_agree_and_differ_where_they_must() {
        let plan = plan(&request(&[1 << 30, 2 << 30])).unwrap();
        let blocks: Vec<Superblock> = plan
            .members
            .iter()
            .map(|m| {
                Superblock::load(&m.superblocks[0].1, &m.superblocks[1].1)
                    .unwrap()
                    .superblock
            })
            .collect();
        assert_ne!(blocks[0].member, blocks[1].member);
        assert_eq!(blocks[0].slots, blocks[1].slots);
        assert_eq!(blocks[1].slots[1].member, Some(blocks[1].member));
        assert!(plan.member_bytes <= 1 << 30);
        for (offset, bytes) in &plan.members[0].maps {
            assert!(offset + bytes.len() as u64 <= plan.data_offset);
        }
    }

    #[test]
    fn nonsense_is_refused_with_its_reason() {
        let large = 1 << 30;
        type Change = fn(&mut CreateRequest);
        let cases: [(&[u64], Change, &str); 9] = [
            (&[large], |_| {}, "2 to 8 members"),
            (&[large; 9], |_| {}, "2 to 8 members"),
            (
                &[large; 2],
                |r| r.name = "a/b".into(),
                "cannot be a mirror's name",
            ),
            (
                &[large; 2],
                |r| r.name = "-x".into(),
                "cannot be a mirror's name",
            ),
            (&[large; 2], |r| r.size_bytes = Some(0), "makes no sense"),
            (&[large; 2], |r| r.size_bytes = Some(1000), "makes no sense"),
            (&[large, 15 << 20], |_| {}, "/dev/d1 has 15728640 bytes"),
            (
                &[large; 2],
                |r| r.size_bytes = Some(2 << 30),
                "use a larger device",
            ),
            (
                &[large; 2],
                |r| r.logical_block_bytes = Some(1024),
                "logical block of 1024",
            ),
        ];
        for (sizes, change, want) in cases {
            let mut request = request(sizes);
            change(&mut request);
            let error = plan(&request).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }

    #[test]
    fn what_is_known_of_a_device_is_recorded() {
        let mut asked = request(&[1 << 30, 1 << 30]);
        asked.members[1].zeroed = true;
        asked.members[1].path = "/".to_owned() + &"x".repeat(ADDRESS_BYTES_MAX);
        let plan = plan(&asked).unwrap();
        let [(_, a), (_, b)] = &plan.members[0].superblocks[..] else {
            panic!("two copies");
        };
        let slots = Superblock::load(a, b).unwrap().superblock.slots;
        assert_eq!((slots[0].zeroed, slots[1].zeroed), (false, true));
        assert_eq!(slots[0].address, "/dev/d0");
        assert_eq!(slots[1].address, "", "too long to be a hint");
        let longest = "x".repeat(ADDRESS_BYTES_MAX);
        assert_eq!(hint(&longest), longest);
        assert_eq!(wipe_ranges(), [(4096, 4096), (8192, 4096)]);
    }

    #[test]
    fn a_logical_block_is_no_smaller_than_any_members() {
        let block = |of_members: u32, asked: Option<u32>| {
            let mut request = request(&[1 << 30, 1 << 30]);
            request.members[1].logical_block_bytes = of_members;
            request.logical_block_bytes = asked;
            logical_block(&request).ok()
        };
        assert_eq!(block(512, None), Some(512));
        assert_eq!(block(4096, None), Some(4096));
        assert_eq!(block(512, Some(4096)), Some(4096));
        assert_eq!(block(4096, Some(512)), None);
        assert_eq!(block(512, Some(1024)), None);
    }

    #[test]
    fn sizes_at_the_limits() {
        let sized = |asked: Option<u64>, smallest: u64| {
            let mut request = request(&[1 << 60, smallest]);
            request.size_bytes = asked;
            size(&request, 512).ok()
        };
        assert_eq!(
            sized(Some(MIRROR_BYTES_MAX), 1 << 60),
            Some(MIRROR_BYTES_MAX)
        );
        assert_eq!(sized(Some(MIRROR_BYTES_MAX + 512), 1 << 60), None);
        assert_eq!(sized(Some(512), 1 << 60), Some(512));
        assert_eq!(sized(Some(256), 1 << 60), None);
        assert_eq!(sized(Some(0), 1 << 60), None);
        assert_eq!(sized(None, 1 << 60), Some(MIRROR_BYTES_MAX));
        assert!(sized(None, MEMBER_BYTES_MIN).is_some());
        assert_eq!(sized(None, MEMBER_BYTES_MIN - 4096), None);
    }
}
