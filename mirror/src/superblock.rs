//! The superblock: enough to assemble the mirror from one surviving member.
//!
//! A member carries two copies, at 4 KiB and at 8 KiB. An update writes copy A with FUA, then
//! copy B with FUA, and is durable when both are, so at every moment at least one copy is
//! whole. Each update raises `write count`; the valid copy with the higher count is the
//! member's superblock, and a start makes unequal copies equal before it relies on anything.
//!
//! The configuration part is the same on all members and kept in step by rounds; `member`, `own
//! slot`, `server instance` and `handed over` differ. All numbers are little-endian.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic `UBLKMIRR` |
//! | 8 | 4 | format version, 1 |
//! | 12 | 4 | CRC32 of the 4096 bytes with this field zero |
//! | 16 | 8 | compatible features: a reader may ignore those it does not know |
//! | 24 | 8 | read-only compatible features: bit 0 the checksum table is kept; unknown ones forbid writing |
//! | 32 | 8 | incompatible features: unknown ones forbid everything |
//! | 40 | 16 | mirror uuid |
//! | 56 | 16 | member uuid |
//! | 72 | 64 | mirror name, UTF-8 padded with zeroes |
//! | 136 | 8 | write count |
//! | 144 | 8 | device size in bytes |
//! | 152 | 8 | data offset in bytes |
//! | 160 | 8 | event count |
//! | 168 | 16 | epoch |
//! | 184 | 4 | ordinal of the epoch: how many epochs came before it |
//! | 188 | 1 | own slot |
//! | 189 | 1 | number of slots |
//! | 190 | 1 | last stop: 0 clean, 1 unclean or running |
//! | 191 | 1 | flags: bit 0 a flush failed everywhere (R7), bit 1 the epoch was forced (R15), bit 2 handed over: the member may be promoted without the others (`engine/stop.rs`) |
//! | 192 | 4 | logical block in bytes |
//! | 196 | 1 | number of regions |
//! | 197 | 1 | number of epochs in the history |
//! | 198 | 2 | zero |
//! | 200 | 8 | resync cursor in bytes, a hint for display and order |
//! | 208 | 8 | creation time, seconds since 1970, for display only |
//! | 216 | 8 | time of this update, likewise |
//! | 224 | 9 x 192 | slot records (`superblock/slot.rs`) |
//! | 1952 | 24 x 40 | region table |
//! | 2912 | 48 x 20 | epoch history, newest first: epoch (16), ordinal (4) |
//! | 3872 | 16 | server instance: that of the export server which this copy was written through; zero when none is known |
//! | 3888 | 8 | when the epoch began, seconds since 1970, for display only |
//! | 3896 | 8 | when a start was last forced, likewise; zero when never |
//! | 3904 | 128 | why it was, UTF-8 padded with zeroes, for display only |
//! | 4032 | 64 | zero |
//!
//! A region record: kind (1: position, 2: state, 3: summary, 4: missed, 5: checksums, 6: scrub), slot
//! (1), zero (6), copy A (8), copy B (8), length (8), extents (8).

mod slot;

use crate::bytes::{Reader, put};
use crate::layout::{Layout, MIRROR_BYTES_MAX, Region, RegionKind, SLOTS_MAX};
use dirty_map::Stamp;
use slot::{decode_slot, encode_slot};
use uuid::Uuid;

/// Where copy A lies on a member.
pub const COPY_A_OFFSET: u64 = 4096;
/// Where copy B lies on a member.
pub const COPY_B_OFFSET: u64 = 8192;
/// Length of a copy in bytes.
pub const COPY_BYTES: usize = 4096;
/// Most memory, in bytes, that decoding a copy takes (R17).
pub const DECODED_BYTES_MAX: usize = 16 << 10;
/// Highest write count and event count that are believed. Both grow by one at a time and never
/// get here; from one near the end of the numbers the next would be lower (R9).
const COUNT_MAX: u64 = 1 << 62;
/// Epochs kept as history; a member further back than that is no longer recognised (and gets a
/// full resync or a refusal).
pub const HISTORY_MAX: usize = 48;
/// Longest mirror name in bytes.
pub const NAME_BYTES_MAX: usize = 64;
/// Longest reason for a forced start in bytes.
pub const REASON_BYTES_MAX: usize = 128;
/// Longest address in bytes; longer ones are not recorded (they are only hints).
pub const ADDRESS_BYTES_MAX: usize = 128;

const MAGIC: &[u8; 8] = b"UBLKMIRR";
const VERSION: u32 = 1;
/// Read-only compatible feature: who writes blocks has to keep their checksums.
const CHECKSUMS: u64 = 1;
const REGIONS_MAX: usize = 24;
const CRC_AT: usize = 12;
const SLOTS_AT: usize = 224;
const SLOT_BYTES: usize = 192;
const REGIONS_AT: usize = SLOTS_AT + SLOTS_MAX * SLOT_BYTES;
const REGION_BYTES: usize = 40;
const HISTORY_AT: usize = REGIONS_AT + REGIONS_MAX * REGION_BYTES;
const HISTORY_BYTES: usize = 20;
const INSTANCE_AT: usize = HISTORY_AT + HISTORY_MAX * HISTORY_BYTES;
const EPOCH_SECS_AT: usize = INSTANCE_AT + 16;
const FORCED_SECS_AT: usize = EPOCH_SECS_AT + 8;
const REASON_AT: usize = FORCED_SECS_AT + 8;
const END: usize = REASON_AT + REASON_BYTES_MAX;
const _: () = assert!(REGIONS_AT == 1952 && HISTORY_AT == 2912 && INSTANCE_AT == 3872);
const _: () = assert!(EPOCH_SECS_AT == 3888 && REASON_AT == 3904 && END == 4032);
const _: () = assert!(END <= COPY_BYTES);

/// Identity of a set of members that receive writes, while degraded also of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Epoch {
    /// Random identity.
    pub id: u128,
    /// How many epochs came before it; orders map sectors, never members (R10).
    pub ordinal: u32,
}

/// What a slot holds, as the superblock's writer saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotState {
    /// No member.
    Empty,
    /// The member holds every block.
    InSync,
    /// The member receives writes and is being brought up to date.
    Resyncing,
    /// The member lacks blocks and receives nothing. Said by a member of itself: a start has left
    /// it out as an older copy.
    Stale,
    /// The member failed, or the operator failed it.
    Faulty,
    /// The member was not there.
    Missing,
}

impl SlotState {
    /// Whether the member receives writes.
    #[must_use]
    pub fn is_receiving(self) -> bool {
        matches!(self, Self::InSync | Self::Resyncing)
    }
}

/// What is known about a member at the moment it was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    /// The epoch it was last part of.
    pub epoch: u128,
    /// How far its copy had come for certain.
    pub position: Stamp,
    /// Whether the missed map names exactly what it lacks: no need for its own hot extents
    /// (R12).
    pub block_exact: bool,
}

/// One slot's record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotRecord {
    /// The member whose place this is.
    pub member: Option<Uuid>,
    /// Its state.
    pub state: SlotState,
    /// The last loss; kept while resyncing.
    pub loss: Option<Loss>,
    /// Position of the last join (R16).
    pub base: Stamp,
    /// The data area was all zero when the member joined: extents that never left *unwritten*
    /// need not be zeroed on it.
    pub zeroed: bool,
    /// The resync under way, or still to be done, covers all written extents.
    pub full: bool,
    /// Last known path or address.
    pub address: String,
}

impl SlotRecord {
    /// A slot without a member.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            member: None,
            state: SlotState::Empty,
            loss: None,
            base: Stamp {
                ordinal: 0,
                sequence: 0,
            },
            zeroed: false,
            full: false,
            address: String::new(),
        }
    }
}

/// What the last stop was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastStop {
    /// Everything flushed and cool.
    Clean,
    /// The mirror is running, or stopped without saying so.
    Unclean,
}

/// A decoded, checked superblock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// The mirror's identity.
    pub mirror: Uuid,
    /// The member's identity.
    pub member: Uuid,
    /// The mirror's name.
    pub name: String,
    /// Grows with every update on this member.
    pub write_count: u64,
    /// Where things lie, and the device's size.
    pub layout: Layout,
    /// Grows with every membership change.
    pub event_count: u64,
    /// The present set of receiving members.
    pub epoch: Epoch,
    /// Earlier epochs, newest first.
    pub history: Vec<Epoch>,
    /// The member's own slot.
    pub own_slot: u8,
    /// The export server through which the member's copy was written: whether what its last
    /// session has sent is over, only that server knows (R13).
    pub server_instance: Option<u128>,
    /// All slots.
    pub slots: Vec<SlotRecord>,
    /// What the last stop was.
    pub last_stop: LastStop,
    /// A flush failed on every in-sync member and nobody has cleared it (R7).
    pub flush_failed: bool,
    /// The epoch was begun by force (R15).
    pub forced: bool,
    /// The member may be promoted without the others: they have stopped cleanly, and start no more
    /// without it.
    pub handed_over: bool,
    /// When the epoch began; display only.
    pub epoch_secs: u64,
    /// When a start was last forced, 0 when never; display only.
    pub forced_secs: u64,
    /// Why it was, in the operator's words; display only.
    pub forced_reason: String,
    /// Whether the checksum table is kept.
    pub checksums: bool,
    /// Smallest unit of I/O in bytes.
    pub logical_block_bytes: u32,
    /// Where the resync under way stands, in bytes; display only.
    pub resync_cursor: u64,
    /// When the mirror was created; display only.
    pub created_secs: u64,
    /// When this update was made; display only.
    pub updated_secs: u64,
}

/// Why bytes are not a superblock.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SuperblockError {
    /// No magic: not a member of any mirror.
    #[error("it holds no ublk-mirror superblock")]
    NotAMember,
    /// A member once, but both copies are damaged.
    #[error("both superblock copies are damaged ({0}); re-add it as a new disk, or restore it")]
    Damaged(&'static str),
    /// Written by a newer version.
    #[error("its superblock needs a newer ublk-mirror ({0})")]
    TooNew(&'static str),
}

/// A superblock read from a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// The newer valid copy.
    pub superblock: Superblock,
    /// Whether the copies must be made equal before anything relies on them.
    pub needs_mending: bool,
}

fn count_u8(len: usize) -> u8 {
    u8::try_from(len).unwrap_or(u8::MAX)
}

const KINDS: [RegionKind; 6] = [
    RegionKind::Position,
    RegionKind::State,
    RegionKind::Summary,
    RegionKind::Missed,
    RegionKind::Checksums,
    RegionKind::Scrub,
];

/// The index of `item` in a table that maps codes to values.
fn code_of<T: PartialEq>(table: &[T], item: &T) -> u8 {
    count_u8(
        table
            .iter()
            .position(|entry| entry == item)
            .unwrap_or(usize::from(u8::MAX)),
    )
}

impl Superblock {
    /// The bytes of a copy.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; COPY_BYTES];
        out[..8].copy_from_slice(MAGIC);
        put(&mut out, 8, VERSION.to_le_bytes());
        let read_only_compatible = if self.checksums { CHECKSUMS } else { 0 };
        put(&mut out, 24, read_only_compatible.to_le_bytes());
        put(&mut out, 40, self.mirror.into_bytes());
        put(&mut out, 56, self.member.into_bytes());
        encode_text(&self.name, &mut out[72..72 + NAME_BYTES_MAX]);
        put(&mut out, 136, self.write_count.to_le_bytes());
        put(&mut out, 144, self.layout.size_bytes.to_le_bytes());
        put(&mut out, 152, self.layout.data_offset.to_le_bytes());
        put(&mut out, 160, self.event_count.to_le_bytes());
        put(&mut out, 168, self.epoch.id.to_le_bytes());
        put(&mut out, 184, self.epoch.ordinal.to_le_bytes());
        out[188] = self.own_slot;
        out[189] = count_u8(self.slots.len());
        out[190] = u8::from(self.last_stop == LastStop::Unclean);
        out[191] = u8::from(self.flush_failed)
            | u8::from(self.forced) << 1
            | u8::from(self.handed_over) << 2;
        put(&mut out, 192, self.logical_block_bytes.to_le_bytes());
        out[196] = count_u8(self.layout.regions.len().min(REGIONS_MAX));
        let history = self.history.len().min(HISTORY_MAX);
        out[197] = count_u8(history);
        put(&mut out, 200, self.resync_cursor.to_le_bytes());
        put(&mut out, 208, self.created_secs.to_le_bytes());
        put(&mut out, 216, self.updated_secs.to_le_bytes());
        for (record, chunk) in self
            .slots
            .iter()
            .zip(out[SLOTS_AT..].chunks_mut(SLOT_BYTES))
        {
            encode_slot(record, chunk);
        }
        let regions = out[REGIONS_AT..HISTORY_AT].chunks_mut(REGION_BYTES);
        for (region, chunk) in self.layout.regions.iter().zip(regions) {
            chunk[0] = code_of(&KINDS, &region.kind) + 1;
            chunk[1] = region.slot;
            put(chunk, 8, region.copy_a.to_le_bytes());
            put(chunk, 16, region.copy_b.to_le_bytes());
            put(chunk, 24, region.len.to_le_bytes());
            put(chunk, 32, region.extents.to_le_bytes());
        }
        let epochs = out[HISTORY_AT..INSTANCE_AT].chunks_mut(HISTORY_BYTES);
        for (epoch, chunk) in self.history[..history].iter().zip(epochs) {
            put(chunk, 0, epoch.id.to_le_bytes());
            put(chunk, 16, epoch.ordinal.to_le_bytes());
        }
        put(
            &mut out,
            INSTANCE_AT,
            self.server_instance.unwrap_or(0).to_le_bytes(),
        );
        put(&mut out, EPOCH_SECS_AT, self.epoch_secs.to_le_bytes());
        put(&mut out, FORCED_SECS_AT, self.forced_secs.to_le_bytes());
        encode_text(&self.forced_reason, &mut out[REASON_AT..END]);
        let crc = crc32fast::hash(&out);
        put(&mut out, CRC_AT, crc.to_le_bytes());
        out
    }

    /// Decodes one copy, in at most [`DECODED_BYTES_MAX`] of memory.
    ///
    /// # Errors
    ///
    /// When the bytes are no superblock that this version can work with.
    pub fn decode(bytes: &[u8]) -> Result<Self, SuperblockError> {
        use SuperblockError::{Damaged, NotAMember, TooNew};
        if bytes.len() != COPY_BYTES || &bytes[..8] != MAGIC {
            return Err(NotAMember);
        }
        let read = Reader(bytes);
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&bytes[..CRC_AT]);
        hasher.update(&[0; 4]);
        hasher.update(&bytes[CRC_AT + 4..]);
        if hasher.finalize() != read.u32(CRC_AT) {
            return Err(Damaged("their checksums do not fit"));
        }
        if read.u32(8) != VERSION {
            return Err(TooNew("unknown format version"));
        }
        if read.u64(32) != 0 || read.u64(24) & !CHECKSUMS != 0 {
            return Err(TooNew("unknown features"));
        }
        let (slots, own_slot) = (usize::from(read.u8(189)), read.u8(188));
        if !(1..=SLOTS_MAX).contains(&slots) || usize::from(own_slot) >= slots {
            return Err(Damaged("the slot numbers make no sense"));
        }
        let (write_count, event_count) = (read.u64(136), read.u64(160));
        if write_count.max(event_count) > COUNT_MAX {
            return Err(Damaged("the counters make no sense"));
        }
        let logical_block_bytes = read.u32(192);
        if !matches!(logical_block_bytes, 512 | 4096) {
            return Err(Damaged("the logical block size makes no sense"));
        }
        Ok(Self {
            mirror: Uuid::from_bytes(read.bytes(40)),
            member: Uuid::from_bytes(read.bytes(56)),
            name: decode_text(&bytes[72..72 + NAME_BYTES_MAX])
                .ok_or(Damaged("the name is not text"))?,
            write_count,
            layout: decode_layout(&read)?,
            event_count,
            epoch: Epoch {
                id: read.u128(168),
                ordinal: read.u32(184),
            },
            history: decode_history(&read)?,
            own_slot,
            server_instance: Some(read.u128(INSTANCE_AT)).filter(|&it| it != 0),
            slots: bytes[SLOTS_AT..REGIONS_AT]
                .chunks(SLOT_BYTES)
                .take(slots)
                .map(|record| decode_slot(&Reader(record)))
                .collect::<Result<_, _>>()?,
            last_stop: if read.u8(190) == 0 {
                LastStop::Clean
            } else {
                LastStop::Unclean
            },
            flush_failed: read.u8(191) & 1 != 0,
            forced: read.u8(191) & 2 != 0,
            handed_over: read.u8(191) & 4 != 0,
            epoch_secs: read.u64(EPOCH_SECS_AT),
            forced_secs: read.u64(FORCED_SECS_AT),
            // It decides nothing: what is no text is left out.
            forced_reason: decode_text(&bytes[REASON_AT..END]).unwrap_or_default(),
            checksums: read.u64(24) & CHECKSUMS != 0,
            logical_block_bytes,
            resync_cursor: read.u64(200),
            created_secs: read.u64(208),
            updated_secs: read.u64(216),
        })
    }

    /// Chooses between the two copies of a member.
    ///
    /// # Errors
    ///
    /// When neither copy is valid.
    pub fn load(copy_a: &[u8], copy_b: &[u8]) -> Result<Loaded, SuperblockError> {
        match (Self::decode(copy_a), Self::decode(copy_b)) {
            (Ok(a), Ok(b)) => {
                let needs_mending = a != b;
                let superblock = if b.write_count > a.write_count { b } else { a };
                Ok(Loaded {
                    superblock,
                    needs_mending,
                })
            }
            (Ok(superblock), Err(SuperblockError::TooNew(_)))
            | (Err(SuperblockError::TooNew(_)), Ok(superblock)) => {
                // A newer version was cut off between its two copies: it alone may go on.
                let _ = superblock;
                Err(SuperblockError::TooNew(
                    "one copy was written by a newer version",
                ))
            }
            (Ok(superblock), Err(_)) | (Err(_), Ok(superblock)) => Ok(Loaded {
                superblock,
                needs_mending: true,
            }),
            (Err(SuperblockError::NotAMember), Err(error)) | (Err(error), Err(_)) => Err(error),
        }
    }

    /// The record of the member's own slot.
    #[must_use]
    pub fn own_record(&self) -> &SlotRecord {
        &self.slots[usize::from(self.own_slot)]
    }

    /// Whether `epoch` is this superblock's epoch or one of its ancestors.
    #[must_use]
    pub fn descends_from(&self, epoch: u128) -> bool {
        self.epoch.id == epoch || self.history.iter().any(|past| past.id == epoch)
    }

    /// Begins a new epoch, the present one becoming history.
    pub fn begin_epoch(&mut self, id: u128) {
        self.history.insert(0, self.epoch);
        self.history.truncate(HISTORY_MAX);
        self.epoch = Epoch {
            id,
            ordinal: self.epoch.ordinal.saturating_add(1),
        };
    }

    /// The first four bytes of the mirror's uuid, which tie map sectors to it.
    #[must_use]
    pub fn tag(&self) -> u32 {
        let uuid = self.mirror.as_bytes();
        u32::from_le_bytes([uuid[0], uuid[1], uuid[2], uuid[3]])
    }
}

fn decode_layout(read: &Reader<'_>) -> Result<Layout, SuperblockError> {
    use SuperblockError::Damaged;
    let count = usize::from(read.u8(196)).min(REGIONS_MAX);
    let mut regions = Vec::with_capacity(count);
    for index in 0..count {
        let at = REGIONS_AT + index * REGION_BYTES;
        let code = usize::from(read.u8(at)).wrapping_sub(1);
        let kind = *KINDS
            .get(code)
            .ok_or(SuperblockError::TooNew("an unknown kind of region"))?;
        regions.push(Region {
            kind,
            slot: read.u8(at + 1),
            copy_a: read.u64(at + 8),
            copy_b: read.u64(at + 16),
            len: read.u64(at + 24),
            extents: read.u64(at + 32),
        });
    }
    let layout = Layout {
        regions,
        data_offset: read.u64(152),
        size_bytes: read.u64(144),
    };
    let size = layout.size_bytes;
    if size == 0 || size > MIRROR_BYTES_MAX || !size.is_multiple_of(512) || !layout.is_sound() {
        return Err(Damaged("the sizes and the table of regions make no sense"));
    }
    Ok(layout)
}

fn decode_history(read: &Reader<'_>) -> Result<Vec<Epoch>, SuperblockError> {
    let count = usize::from(read.u8(197));
    if count > HISTORY_MAX {
        return Err(SuperblockError::Damaged("the epoch history is too long"));
    }
    Ok((0..count)
        .map(|index| HISTORY_AT + index * HISTORY_BYTES)
        .map(|at| Epoch {
            id: read.u128(at),
            ordinal: read.u32(at + 16),
        })
        .collect())
}

/// Text up to the first zero byte; `None` when it is not UTF-8.
/// Text, padded with zeroes; what does not fit is left out.
fn encode_text(text: &str, out: &mut [u8]) {
    let mut len = text.len().min(out.len());
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    out[..len].copy_from_slice(&text.as_bytes()[..len]);
}

fn decode_text(bytes: &[u8]) -> Option<String> {
    let len = bytes
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(bytes.len());
    std::str::from_utf8(&bytes[..len]).ok().map(str::to_owned)
}

#[cfg(test)]
#[path = "superblock_tests.rs"]
mod tests;
