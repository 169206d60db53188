#![allow(clippy::unwrap_used)]

use super::*;
use crate::wire::{EXPORT_FLUSH, EXPORT_HAS_FLAGS};
use proptest::prelude::*;

fn greeting(flags: u16) -> Vec<u8> {
    [b"NBDMAGICIHAVEOPT".as_slice(), &flags.to_be_bytes()].concat()
}

fn reply(kind: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    [
        &OPTION_REPLY_MAGIC.to_be_bytes()[..],
        &OPTION_GO.to_be_bytes(),
        &kind.to_be_bytes(),
        &len.to_be_bytes(),
        data,
    ]
    .concat()
}

fn described(size: u64, flags: u16) -> Vec<u8> {
    let data = [&[0, 0][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
    reply(REP_INFO, &data)
}

fn sizes(minimum: u32, preferred: u32, maximum: u32) -> Vec<u8> {
    let mut data = vec![0, 3];
    for bytes in [minimum, preferred, maximum] {
        data.extend_from_slice(&bytes.to_be_bytes());
    }
    reply(REP_INFO, &data)
}

/// Plays a server that sends `stream`; what the client sent, and what came of it. None when the
/// stream ended first.
fn play(name: &str, stream: &[u8]) -> (Vec<u8>, Result<Option<Export>, HandshakeError>) {
    let (mut handshake, mut sent, mut left) = (Handshake::new(name), Vec::new(), stream);
    while handshake.wants() > 0 {
        let Some((bytes, rest)) = left.split_at_checked(handshake.wants()) else {
            return (sent, Ok(None));
        };
        left = rest;
        match handshake.feed(bytes) {
            Ok(out) => sent.extend(out),
            Err(error) => return (sent, Err(error)),
        }
    }
    (sent, Ok(handshake.export()))
}

/// A reply to the question about claims, or to a claim.
fn claim_reply(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = reply(kind, data);
    bytes[8..12].copy_from_slice(&OPTION_CLAIM.to_be_bytes());
    bytes
}

const FENCE: Fence = Fence {
    instance: 77,
    turn: 3,
    keeps_order: true,
};

fn granted() -> Vec<u8> {
    let data = [&INFO_FENCE.to_be_bytes()[..], &FENCE.encode()].concat();
    [claim_reply(REP_INFO, &data), claim_reply(REP_ACK, &[])].concat()
}

/// Plays a server that sends `stream` against a handshake with claims.
fn play_claim(
    claim: Option<Claim>,
    stream: &[u8],
) -> (
    Vec<u8>,
    Option<Fence>,
    Result<Option<Export>, HandshakeError>,
) {
    let mut handshake = Handshake::asking("m", claim);
    let (mut sent, mut left) = (Vec::new(), stream);
    while handshake.wants() > 0 {
        let Some((bytes, rest)) = left.split_at_checked(handshake.wants()) else {
            return (sent, handshake.fence(), Ok(None));
        };
        left = rest;
        match handshake.feed(bytes) {
            Ok(out) => sent.extend(out),
            Err(error) => return (sent, handshake.fence(), Err(error)),
        }
    }
    (sent, handshake.fence(), Ok(handshake.export()))
}

#[test]
fn claims_are_asked_about_before_the_export() {
    let rest = [
        described(1 << 20, EXPORT_HAS_FLAGS | EXPORT_FLUSH),
        reply(REP_ACK, &[]),
    ]
    .concat();
    let stream = [greeting(3), granted(), rest.clone()].concat();
    let (sent, fence, export) = play_claim(None, &stream);
    assert_eq!((fence, export.unwrap().is_some()), (Some(FENCE), true));
    let asked = claim::encode("m", None);
    assert_eq!(sent[4..12], *b"IHAVEOPT");
    assert_eq!(sent[12..16], OPTION_CLAIM.to_be_bytes());
    assert_eq!(sent[20..20 + asked.len()], asked);
    let (plain, _) = play("m", &greeting(3));
    assert_eq!(sent[20 + asked.len()..], plain[4..]);
    // Whoever does not know them is used as ever.
    for error in [REP_ERR_UNSUP, REP_ERR_POLICY] {
        let unknown = claim_reply(error, b"what?");
        let (_, fence, export) = play_claim(None, &[greeting(3), unknown, rest.clone()].concat());
        assert_eq!((fence, export.unwrap().is_some()), (None, true));
    }
}

#[test]
fn a_claim_is_granted_or_the_handshake_ends() {
    let claim = || {
        Some(Claim {
            owner: 1,
            take_over: true,
            resumes: None,
            seen: None,
        })
    };
    let (sent, fence, _) = play_claim(claim(), &[greeting(3), granted()].concat());
    let data = claim::encode("m", claim().as_ref());
    assert_eq!(
        (&sent[20..20 + data.len()], fence),
        (&data[..], Some(FENCE))
    );
    for error in [REP_ERR_UNSUP, REP_ERR_POLICY] {
        let refused = claim_reply(error, b"it is in use");
        let (_, _, ended) = play_claim(claim(), &[greeting(3), refused].concat());
        let words = ended.unwrap_err().to_string();
        assert!(words.contains("does not let this host write (it says: it is in use)"));
    }
    let nameless = claim_reply(REP_ACK, &[]);
    let short = claim_reply(REP_INFO, b"UM123");
    let other = claim_reply(REP_INFO, &[0; 18]);
    for nonsense in [nameless, short, other, reply(REP_ACK, &[])] {
        let (_, _, ended) = play_claim(claim(), &[greeting(3), nonsense].concat());
        assert!(
            matches!(ended, Err(HandshakeError::Nonsense(_))),
            "{ended:?}"
        );
    }
}

#[test]
fn an_export_is_described() {
    let flags = EXPORT_HAS_FLAGS | EXPORT_FLUSH;
    let name = reply(REP_INFO, b"\0\x01its name");
    let stream = [
        greeting(3),
        described(1 << 40, flags),
        name,
        sizes(512, 4096, 1 << 20),
        reply(REP_ACK, b""),
    ];
    let (sent, export) = play("disk", &stream.concat());
    let export = export.unwrap().unwrap();
    assert_eq!((export.size_bytes, export.flags), (1 << 40, flags));
    assert_eq!(export.blocks.maximum, 1 << 20);
    let want = [
        &b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x0c"[..],
        b"\0\0\0\x04disk\0\x01\0\x03",
    ];
    assert_eq!(sent, want.concat());
    // Without sizes, the protocol's own; without the flag, not asked to leave zeroes out.
    let stream = [greeting(1), described(512, flags), reply(REP_ACK, b"")];
    let (sent, export) = play("", &stream.concat());
    assert_eq!(export.unwrap().unwrap().blocks, BlockSizes::DEFAULT);
    assert_eq!(sent[..4], [0, 0, 0, 1]);
}

#[test]
fn refusals_are_sentences_with_the_servers_words() {
    for (kind, words, want) in [
        (
            REP_ERR_UNKNOWN,
            &b"no 'x'\n"[..],
            "no such export (it says: no 'x')",
        ),
        (REP_ERR_TLS_REQD, b"", "wants TLS: write nbds://"),
        (REP_ERR_POLICY, b"", "forbids"),
        (REP_ERR_SHUTDOWN, b"", "shutting down"),
        (REP_ERR_UNSUP, b"", "too old"),
        (0x8000_00ff, b"\x1b[1m", "0x800000ff (it says:  [1m)"),
    ] {
        let stream = [greeting(3), reply(kind, words)].concat();
        let message = play("x", &stream).1.unwrap_err().to_string();
        assert!(message.contains(want), "{message}");
    }
    let long = [greeting(3), reply(REP_ERR_POLICY, &[b'a'; 8192])].concat();
    assert!(play("x", &long).1.unwrap_err().to_string().len() < 400);
}

#[test]
fn nonsense_is_refused() {
    let old = [
        b"NBDMAGIC".as_slice(),
        &OLD_STYLE_MAGIC.to_be_bytes(),
        &[0; 2],
    ]
    .concat();
    assert_eq!(play("", &old).1, Err(HandshakeError::TooOld));
    assert_eq!(play("", &greeting(2)).1, Err(HandshakeError::TooOld));
    let other = b"SSH-2.0-OpenSSH_9.2p1".as_slice();
    assert_eq!(play("", other).1, Err(HandshakeError::NotNbd));
    let after = |bytes: Vec<u8>| play("", &[greeting(3), bytes].concat()).1;
    let nonsense = |bytes: Vec<u8>| {
        let ended = after(bytes);
        assert!(
            matches!(ended, Err(HandshakeError::Nonsense(_))),
            "{ended:?}"
        );
    };
    nonsense(vec![7; 20]);
    nonsense(reply(REP_ACK, b""));
    nonsense(reply(2, b"a server's reply"));
    nonsense(reply(REP_INFO, b""));
    nonsense(reply(REP_INFO, b"\0\0short"));
    nonsense(reply(REP_INFO, &[0; 13]));
    nonsense(sizes(3, 4096, 4096));
    nonsense(sizes(4096, 512, 4096));
    nonsense(sizes(512, 4096, 2048));
    nonsense(sizes(512, 4096, 5000));
    nonsense(reply(REP_INFO, &[1; 8193]));
    nonsense(reply(REP_INFO, b"\0\x01name").repeat(65));
    let mut other_option = reply(REP_ACK, b"");
    other_option[11] = 6;
    nonsense(other_option);
    assert_eq!(after(reply(REP_INFO, b"\0\x01name").repeat(64)), Ok(None));
}

proptest! {
    #[test]
    fn any_bytes_end_or_are_refused(
        bytes in prop::collection::vec(any::<u8>(), 0..200), greeted in any::<bool>(),
        kind in prop::sample::select(vec![REP_ACK, REP_INFO, REP_ERR_UNKNOWN, 0]),
        cut in 0usize..40,
    ) {
        let mut stream = if greeted { greeting(3) } else { Vec::new() };
        let framed = reply(kind, &bytes);
        stream.extend_from_slice(&framed[..framed.len().saturating_sub(cut)]);
        stream.extend_from_slice(&bytes);
        let (_, ended) = play("x", &stream);
        if let Ok(Some(export)) = ended {
            prop_assert!(export.blocks.are_legal());
        }
    }
}
