//! What an NBD client sends after the negotiation: requests, and the data of writes (R17).
//!
//! An input is the export's size in sectors of 512 bytes (eight bytes), the size of its logical
//! blocks (one byte, odd for 4 KiB), and the client's side of the connection. Decoding a header
//! takes no memory; a request that is not refused lies within the export; what it asks memory
//! for stays within the announced limit. (Replies, which peers send, have a target of their own.)
#![no_main]

use libfuzzer_sys::fuzz_target;
use peer::server::{
    Command, EVERYTHING, Export, MAX_PAYLOAD_BYTES, REQUEST_BYTES, Request, payload_bytes, refusal,
    reply_header, request, wire_error,
};
use ublk_mirror_fuzz::{Input, within};

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let sectors = u64::from_le_bytes(input.take()) % (1 << 41);
    let [block] = input.take();
    let export = Export {
        name: String::new(),
        size_bytes: sectors * 512,
        block_bytes: if block.is_multiple_of(2) { 512 } else { 4096 },
        payload_bytes_max: MAX_PAYLOAD_BYTES,
        flags: EVERYTHING,
    };
    let mut stream = input.0;
    while let Some((header, rest)) = stream.split_first_chunk::<REQUEST_BYTES>() {
        let Ok(request) = within(0, || request(header)) else {
            break;
        };
        if request.command == Command::Disconnect {
            break;
        }
        let len = within(0, || check(&request, &export));
        let data = if request.command == Command::Write {
            len
        } else {
            0
        };
        let Some(rest) = rest.get(data..) else {
            break;
        };
        stream = rest;
    }
});

/// Checks what the daemon makes of a request; returns the bytes of memory for its data.
fn check(wanted: &Request, export: &Export) -> usize {
    if wanted.command != Command::Invalid {
        assert_eq!(request(&header(wanted)).as_ref(), Ok(wanted));
    }
    let len = payload_bytes(wanted, export);
    assert!(len <= MAX_PAYLOAD_BYTES as usize);
    let error = refusal(wanted, export);
    let ranged = matches!(
        wanted.command,
        Command::Read | Command::Write | Command::Trim | Command::WriteZeroes
    );
    if ranged && error.is_none() {
        let block = u64::from(export.block_bytes);
        let bytes = u64::from(wanted.len);
        assert!(bytes > 0 && bytes.is_multiple_of(block) && wanted.offset.is_multiple_of(block));
        assert!(wanted.offset <= export.size_bytes && bytes <= export.size_bytes - wanted.offset);
    }
    if let Some(error) = error {
        // Only numbers that the protocol knows, so that none is lost on the way.
        assert_eq!(i32::try_from(error).map(wire_error), Ok(error));
    }
    let reply = reply_header(wanted.cookie, error.unwrap_or(0));
    assert_eq!(reply[8..], wanted.cookie.to_be_bytes());
    len
}

/// The header that means `request`.
fn header(request: &Request) -> [u8; REQUEST_BYTES] {
    let kind: u16 = match request.command {
        Command::Read => 0,
        Command::Write => 1,
        Command::Disconnect => 2,
        Command::Flush => 3,
        Command::Trim => 4,
        Command::WriteZeroes => 6,
        Command::BlockStatus { .. } => 7,
        Command::Invalid => 99,
    };
    let mut bytes = [0; REQUEST_BYTES];
    bytes[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
    let one = request.command == Command::BlockStatus { one: true };
    let flags = u16::from(request.fua) | u16::from(one) << 3 | request.rank.flags();
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&request.cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&request.offset.to_be_bytes());
    bytes[24..].copy_from_slice(&request.len.to_be_bytes());
    bytes
}
