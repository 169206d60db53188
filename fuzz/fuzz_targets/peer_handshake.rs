//! What the server of a peer member sends before the first reply (R17).
//!
//! An input is the server's side of the connection from its first byte, to four clients: one
//! that knows no claims, without and with TLS (which itself is left out), one that asks about
//! claims, one that makes one. The handshake asks for no
//! more than the stated limit at once, sends one option or two, comes to an end, and what it makes
//! of an export is fit for use: sizes that the protocol allows, ranges cut without a gap. A claim
//! that was made is granted when the handshake succeeds.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peer::claim::Claim;
use peer::handshake::{REPLIES_MAX, REPLY_BYTES_MAX};
use peer::{Export, Handshake, HandshakeError};
use ublk_mirror_fuzz::within;

const NAME: &str = "disk";
/// What is sent: flags, an option's header, lengths, the name and one kind of information.
const SENT_BYTES: usize = 4 + 16 + 4 + NAME.len() + 4;
/// An option's header, and the question whether there are claims.
const QUESTION_BYTES: usize = 16 + 4 + NAME.len() + 1;
/// What follows in a claim that has seen no superblock.
const CLAIM_BYTES: usize = 1 + 16 + 1;
/// The greeting, then a header and data for each reply to two options; the next header ends it.
const STEPS_MAX: u32 = 1 + 4 * REPLIES_MAX + 2 + 1;
/// A server's words are cut off, whatever their encoding makes of them; the caller holds the
/// reply itself.
const MEMORY_MAX: usize = 4096;
/// Words in an error message, and the sentence around them.
const MESSAGE_BYTES_MAX: usize = 1024;

fuzz_target!(|data: &[u8]| {
    let claim = Claim {
        owner: 1,
        take_over: false,
        resumes: None,
        seen: None,
    };
    play(Handshake::new(NAME), data, SENT_BYTES, false);
    play(
        Handshake::new(NAME).with_tls(),
        data,
        16 + SENT_BYTES,
        false,
    );
    let sent = SENT_BYTES + QUESTION_BYTES;
    play(Handshake::asking(NAME, None), data, sent, false);
    let sent = sent + CLAIM_BYTES;
    play(Handshake::asking(NAME, Some(claim)), data, sent, true);
});

/// Plays a server that sends `data`; what a handshake that succeeds has sent, and whether it is
/// fenced then.
fn play(mut handshake: Handshake, data: &[u8], expected: usize, fenced: bool) {
    let (mut left, mut sent, mut steps) = (data, 0, 0);
    while handshake.wants() > 0 || handshake.wants_tls() {
        if handshake.wants_tls() {
            sent += handshake.secured().len();
            continue;
        }
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
    assert_eq!(sent, expected);
    assert!(
        handshake.fence().is_some() || !fenced,
        "a claim that nobody granted"
    );
    match handshake.export() {
        Some(export) => check(&export),
        None => unreachable!("the handshake is over"),
    }
}

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
