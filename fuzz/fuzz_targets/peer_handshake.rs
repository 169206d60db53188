//! What the server of a peer member sends before the first reply (R17).
//!
//! An input is the server's side of the connection from its first byte. The handshake asks for no
//! more than the stated limit at once, sends one option, comes to an end, and what it makes of
//! an export is fit for use: sizes that the protocol allows, ranges cut without a gap.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peer::handshake::{REPLIES_MAX, REPLY_BYTES_MAX};
use peer::{Export, Handshake, HandshakeError};
use ublk_mirror_fuzz::within;

const NAME: &str = "disk";
/// What is sent: flags, an option's header, lengths, the name and one kind of information.
const SENT_BYTES: usize = 4 + 16 + 4 + NAME.len() + 4;
/// The greeting, then a header and data for each reply that is taken; the next header ends it.
const STEPS_MAX: u32 = 1 + 2 * REPLIES_MAX + 1;
/// A server's words are cut off, whatever their encoding makes of them; the caller holds the
/// reply itself.
const MEMORY_MAX: usize = 4096;
/// Words in an error message, and the sentence around them.
const MESSAGE_BYTES_MAX: usize = 1024;

fuzz_target!(|data: &[u8]| {
    let mut handshake = Handshake::new(NAME);
    let (mut left, mut sent, mut steps) = (data, 0, 0);
    while handshake.wants() > 0 {
        assert!(handshake.wants() <= REPLY_BYTES_MAX);
        let Some((bytes, rest)) = left.split_at_checked(handshake.wants()) else {
            assert_eq!(handshake.export(), None, "an export before the end");
            return;
        };
        left = rest;
        steps += 1;
        assert!(steps <= STEPS_MAX, "a handshake without an end");
        match within(MEMORY_MAX, || handshake.feed(bytes)) {
            Ok(out) => sent += out.len(),
            Err(error) => return check_error(&error),
        }
    }
    assert_eq!(sent, SENT_BYTES);
    match handshake.export() {
        Some(export) => check(&export),
        None => unreachable!("the handshake is over"),
    }
});

fn check_error(error: &HandshakeError) {
    let message = error.to_string();
    assert!(message.len() <= MESSAGE_BYTES_MAX);
    assert!(!message.contains(char::is_control));
}

fn check(export: &Export) {
    assert!(export.blocks.are_legal());
    if within(0, || export.check()).is_err() {
        return;
    }
    let unit = u64::from(export.logical_block_bytes());
    assert!(unit <= 4096 && export.usable_bytes() > 0);
    let end = export.usable_bytes();
    let mut at = end.saturating_sub(64 << 20) / unit * unit;
    for piece in export.pieces(at, end - at).take(1000) {
        assert_eq!(piece.offset, at);
        assert!(piece.len > 0 && piece.len <= export.blocks.maximum);
        assert!(u64::from(piece.len).is_multiple_of(unit.min(4096)) || export.blocks.minimum < 512);
        at += u64::from(piece.len);
    }
    assert!(at <= end);
}
