//! The record of a slot in the superblock.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 16 | uuid of its member, zero when empty |
//! | 16 | 1 | state: 0 empty, 1 in-sync, 2 resyncing, 3 stale, 4 faulty, 5 missing |
//! | 17 | 1 | flags: bit 0 loss recorded, bit 1 recorded block-exactly, bit 2 data area was all zero at creation, bit 3 full resync under way |
//! | 18 | 2 | length of the address |
//! | 20 | 4 | ordinal of the position at loss |
//! | 24 | 8 | sequence of the position at loss |
//! | 32 | 16 | epoch at loss |
//! | 48 | 4 | ordinal of the base |
//! | 52 | 4 | zero |
//! | 56 | 8 | sequence of the base: the position of its last join |
//! | 64 | 128 | address: last known path, or the address of a peer; a hint |

use super::{
    ADDRESS_BYTES_MAX, Loss, SlotRecord, SlotState, SuperblockError, code_of, decode_text,
};
use crate::bytes::{Reader, put};
use dirty_map::Stamp;
use uuid::Uuid;

const STATES: [SlotState; 6] = [
    SlotState::Empty,
    SlotState::InSync,
    SlotState::Resyncing,
    SlotState::Stale,
    SlotState::Faulty,
    SlotState::Missing,
];

pub(super) fn encode_slot(record: &SlotRecord, out: &mut [u8]) {
    put(out, 0, record.member.unwrap_or(Uuid::nil()).into_bytes());
    out[16] = code_of(&STATES, &record.state);
    let exact = record.loss.is_some_and(|loss| loss.block_exact);
    out[17] = u8::from(record.loss.is_some())
        | u8::from(exact) << 1
        | u8::from(record.zeroed) << 2
        | u8::from(record.full) << 3;
    if let Some(loss) = record.loss {
        put(out, 20, loss.position.ordinal.to_le_bytes());
        put(out, 24, loss.position.sequence.to_le_bytes());
        put(out, 32, loss.epoch.to_le_bytes());
    }
    put(out, 48, record.base.ordinal.to_le_bytes());
    put(out, 56, record.base.sequence.to_le_bytes());
    let address = record.address.as_bytes();
    if address.len() <= ADDRESS_BYTES_MAX {
        put(
            out,
            18,
            u16::try_from(address.len()).unwrap_or(0).to_le_bytes(),
        );
        out[64..64 + address.len()].copy_from_slice(address);
    }
}

pub(super) fn decode_slot(read: &Reader<'_>) -> Result<SlotRecord, SuperblockError> {
    use SuperblockError::Damaged;
    let state = *STATES
        .get(usize::from(read.u8(16)))
        .ok_or(Damaged("an unknown slot state"))?;
    let member = Uuid::from_bytes(read.bytes(0));
    let flags = read.u8(17);
    let address_len = usize::from(read.u16(18));
    let address = read
        .0
        .get(64..64 + address_len.min(ADDRESS_BYTES_MAX))
        .unwrap_or(&[]);
    if (state == SlotState::Empty) != member.is_nil() {
        return Err(Damaged("a slot's state and its member do not fit"));
    }
    Ok(SlotRecord {
        member: (!member.is_nil()).then_some(member),
        state,
        loss: (flags & 1 != 0).then(|| Loss {
            epoch: read.u128(32),
            position: Stamp {
                ordinal: read.u32(20),
                sequence: read.u64(24),
            },
            block_exact: flags & 2 != 0,
        }),
        base: Stamp {
            ordinal: read.u32(48),
            sequence: read.u64(56),
        },
        zeroed: flags & 4 != 0,
        full: flags & 8 != 0,
        address: decode_text(address).unwrap_or_default(),
    })
}
