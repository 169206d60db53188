//! What the server of a peer member sends after the handshake (R17).
//!
//! An input is a list of steps. An even byte asks: bits 1 to 3 choose what, the next two bytes
//! the length. An odd byte takes a reply, whose 16 bytes follow. A reply is taken if and only if
//! it answers what is outstanding, once; it brings the data that were asked for; and taking it
//! needs no memory.
#![no_main]

use std::collections::HashMap;

use libfuzzer_sys::fuzz_target;
use peer::wire::REPLY_BYTES;
use peer::{Ask, Kind, Session};
use ublk_mirror_fuzz::{Input, within};

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let mut session = Session::default();
    let mut outstanding: HashMap<u64, Ask> = HashMap::new();
    while !input.is_empty() {
        let [step] = input.take();
        if step & 1 == 0 {
            let ask = asked(step, u16::from_le_bytes(input.take()));
            let header = session.ask(&ask, ask);
            let cookie = be64(&header[8..16]);
            assert_eq!(header, ask.header(cookie));
            assert!(outstanding.insert(cookie, ask).is_none(), "a cookie twice");
        } else if !take(&mut session, &mut outstanding, &input.take()) {
            break;
        }
        assert_eq!(session.outstanding(), outstanding.len());
    }
    assert_eq!(session.give_up().count(), outstanding.len());
    assert_eq!(session.outstanding(), 0);
});

fn asked(step: u8, len: u16) -> Ask {
    let kind = match step >> 1 & 7 {
        0..=2 => Kind::Read,
        3 | 4 => Kind::Write,
        5 => Kind::Flush,
        6 => Kind::Trim,
        _ => Kind::WriteZeroes,
    };
    Ask {
        kind,
        fua: step & 16 != 0,
        rank: peer::Rank::Any,
        offset: u64::from(len) * 512,
        len: u32::from(len),
    }
}

/// Takes a reply; whether the connection goes on.
fn take(
    session: &mut Session<Ask>,
    outstanding: &mut HashMap<u64, Ask>,
    header: &[u8; REPLY_BYTES],
) -> bool {
    let answer = within(0, || session.answered(header));
    let cookie = be64(&header[8..]);
    if header[..4] != 0x6744_6698_u32.to_be_bytes() {
        assert!(answer.is_err());
        return false;
    }
    let (Some(ask), Ok(answer)) = (outstanding.remove(&cookie), answer) else {
        assert_eq!(session.outstanding(), outstanding.len());
        assert!(answer.is_err(), "a reply to nothing was taken");
        return false;
    };
    assert_eq!(answer.token, ask);
    assert_eq!(answer.error.is_none(), header[4..8] == [0; 4]);
    assert!(answer.error.is_none_or(|errno| errno > 0));
    let data = answer.error.is_none() && ask.kind == Kind::Read;
    assert_eq!(answer.data_bytes, if data { ask.len } else { 0 });
    true
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes([
        bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7],
    ])
}
