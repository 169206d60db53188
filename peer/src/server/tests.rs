//! Tests of the NBD protocol's bytes.
#![allow(clippy::unwrap_used)]

use proptest::prelude::{any, prop_assert, proptest};

use super::{
    Command, EINVAL, ENOSPC, EOVERFLOW, EPERM, EVERYTHING, EXPORT_READ_ONLY, EXPORT_TRIM, Export,
    MAX_PAYLOAD_BYTES, Next, OPTION_BYTES, OPTION_MAGIC, ProtocolError, REQUEST_BYTES,
    REQUEST_MAGIC, Request, answer_option, client_flags, option_header, refusal, reply_header,
    request, wire_error,
};

fn export() -> Export {
    Export {
        name: "m0".to_owned(),
        size_bytes: 1 << 20,
        block_bytes: 512,
        payload_bytes_max: MAX_PAYLOAD_BYTES,
        flags: EVERYTHING,
    }
}

fn header(flags: u16, kind: u16, cookie: u64, offset: u64, len: u32) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&len.to_be_bytes());
    bytes
}

fn go_data(name: &[u8], requests: u16) -> Vec<u8> {
    let mut data = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
    data.extend_from_slice(name);
    data.extend_from_slice(&requests.to_be_bytes());
    data.extend(std::iter::repeat_n(0, usize::from(requests) * 2));
    data
}

/// The types of the option replies in `bytes`.
fn reply_types(mut bytes: &[u8]) -> Vec<u32> {
    let mut types = Vec::new();
    while !bytes.is_empty() {
        types.push(u32::from_be_bytes(bytes[12..16].try_into().unwrap()));
        let len = u32::from_be_bytes(bytes[16..20].try_into().unwrap()) as usize;
        bytes = &bytes[20 + len..];
    }
    types
}

#[test]
fn a_request_is_decoded_field_by_field() {
    let decoded = request(&header(1, 1, 77, 4096, 8192)).unwrap();
    let expected = Request {
        command: Command::Write,
        cookie: 77,
        offset: 4096,
        len: 8192,
        fua: true,
        barrier: false,
    };
    assert_eq!(decoded, expected);
}

#[test]
fn a_stream_out_of_step_ends_the_connection() {
    let mut bytes = header(0, 0, 1, 0, 512);
    bytes[0] ^= 1;
    assert!(matches!(request(&bytes), Err(ProtocolError::Magic { .. })));
    let mut option = [0; OPTION_BYTES];
    option[..8].copy_from_slice(&(OPTION_MAGIC ^ 1).to_be_bytes());
    assert!(matches!(
        option_header(&option),
        Err(ProtocolError::Magic { .. })
    ));
}

#[test]
fn a_write_that_cannot_be_taken_in_ends_the_connection() {
    let bytes = header(0, 1, 1, 0, MAX_PAYLOAD_BYTES + 1);
    assert_eq!(
        request(&bytes),
        Err(ProtocolError::WriteTooLong(MAX_PAYLOAD_BYTES + 1))
    );
}

#[test]
fn what_is_unknown_is_answered_as_invalid() {
    for bytes in [
        header(0, 5, 1, 0, 512),
        header(0, 99, 1, 0, 512),
        header(1 << 4, 0, 1, 0, 512),
    ] {
        let decoded = request(&bytes).unwrap();
        assert_eq!(decoded.command, Command::Invalid);
        assert_eq!(refusal(&decoded, &export()), Some(EINVAL));
    }
}

#[test]
fn requests_outside_the_export_are_refused_with_the_right_error() {
    let refused = |kind: u16, offset: u64, len: u32| {
        refusal(
            &request(&header(0, kind, 1, offset, len)).unwrap(),
            &export(),
        )
    };
    assert_eq!(refused(0, 0, 512), None);
    assert_eq!(refused(0, (1 << 20) - 512, 512), None);
    assert_eq!(
        refused(0, (1 << 20) - 512, 1024),
        Some(EINVAL),
        "a read beyond the end"
    );
    assert_eq!(
        refused(1, (1 << 20) - 512, 1024),
        Some(ENOSPC),
        "a write beyond the end"
    );
    assert_eq!(
        refused(6, 1 << 20, 512),
        Some(ENOSPC),
        "zeroes beyond the end"
    );
    assert_eq!(
        refused(4, u64::MAX, 512),
        Some(EINVAL),
        "an end that overflows"
    );
    assert_eq!(refused(0, 100, 512), Some(EINVAL), "an unaligned offset");
    assert_eq!(refused(0, 0, 100), Some(EINVAL), "an unaligned length");
    assert_eq!(refused(1, 0, 0), Some(EINVAL), "no length");
    assert_eq!(refused(3, 0, 0), None, "a flush has no range");
    let large = Export {
        size_bytes: 1 << 40,
        ..export()
    };
    let read = request(&header(0, 0, 1, 0, MAX_PAYLOAD_BYTES + 512)).unwrap();
    assert_eq!(
        refusal(&read, &large),
        Some(EOVERFLOW),
        "a read above the announced limit"
    );
}

#[test]
fn what_an_export_does_not_offer_is_refused() {
    let refused = |flags: u16, kind: u16, len: u32| {
        let export = Export {
            flags,
            payload_bytes_max: 4096,
            ..export()
        };
        refusal(&request(&header(0, kind, 1, 0, len)).unwrap(), &export)
    };
    let looking = EVERYTHING | EXPORT_READ_ONLY;
    for changing in [1, 4, 6] {
        assert_eq!(refused(looking, changing, 512), Some(EPERM));
        assert_eq!(refused(EVERYTHING, changing, 512), None);
    }
    assert_eq!(refused(looking, 0, 512), None);
    assert_eq!(refused(looking, 3, 0), None);
    assert_eq!(refused(EVERYTHING & !EXPORT_TRIM, 4, 512), Some(EINVAL));
    assert_eq!(refused(EVERYTHING, 0, 4608), Some(EOVERFLOW));
    assert_eq!(refused(EVERYTHING, 1, 4608), Some(EOVERFLOW));
    assert_eq!(refused(EVERYTHING, 6, 4608), None);
}

#[test]
fn go_tells_size_and_block_sizes_and_begins_transmission() {
    let mut reply = Vec::new();
    let next = answer_option(7, Some(&go_data(b"m0", 1)), &export(), true, &mut reply);
    assert_eq!(next, Ok(Next::Transmission));
    assert_eq!(reply_types(&reply), [3, 3, 1]);
    assert_eq!(reply[22..30], (1_u64 << 20).to_be_bytes());
}

#[test]
fn info_and_wrong_names_leave_the_negotiation_open() {
    let mut reply = Vec::new();
    let next = answer_option(6, Some(&go_data(b"", 0)), &export(), true, &mut reply);
    assert_eq!((next, reply_types(&reply)), (Ok(Next::More), vec![3, 3, 1]));
    reply.clear();
    let next = answer_option(7, Some(&go_data(b"other", 0)), &export(), true, &mut reply);
    assert_eq!(
        (next, reply_types(&reply)),
        (Ok(Next::More), vec![0x8000_0006])
    );
    reply.clear();
    let mut lying = go_data(b"m0", 0);
    lying[3] = 200;
    let next = answer_option(7, Some(&lying), &export(), true, &mut reply);
    assert_eq!(
        (next, reply_types(&reply)),
        (Ok(Next::More), vec![0x8000_0003])
    );
}

#[test]
fn options_that_are_not_offered_are_refused_and_abort_closes() {
    for option in [5_u32, 8, 10, 4000] {
        let mut reply = Vec::new();
        assert_eq!(
            answer_option(option, Some(&[]), &export(), true, &mut reply),
            Ok(Next::More)
        );
        assert_eq!(reply_types(&reply), [0x8000_0001]);
    }
    let mut reply = Vec::new();
    assert_eq!(
        answer_option(2, Some(&[]), &export(), true, &mut reply),
        Ok(Next::Close)
    );
    assert_eq!(reply_types(&reply), [1]);
    reply.clear();
    assert_eq!(
        answer_option(3, Some(&[]), &export(), true, &mut reply),
        Ok(Next::More)
    );
    assert_eq!(reply_types(&reply), [2, 1]);
    reply.clear();
    assert_eq!(
        answer_option(7, None, &export(), true, &mut reply),
        Ok(Next::More)
    );
    assert_eq!(reply_types(&reply), [0x8000_0009]);
}

#[test]
fn export_name_answers_with_or_without_the_zeroes() {
    let mut reply = Vec::new();
    let next = answer_option(1, Some(b"m0"), &export(), false, &mut reply);
    assert_eq!((next, reply.len()), (Ok(Next::Transmission), 134));
    reply.clear();
    let next = answer_option(1, Some(b""), &export(), true, &mut reply);
    assert_eq!((next, reply.len()), (Ok(Next::Transmission), 10));
    let next = answer_option(1, Some(b"other"), &export(), true, &mut reply);
    assert_eq!(next, Err(ProtocolError::UnknownExport));
}

#[test]
fn handshake_flags_are_checked() {
    assert_eq!(client_flags([0, 0, 0, 3]), Ok(true));
    assert_eq!(client_flags([0, 0, 0, 1]), Ok(false));
    assert_eq!(
        client_flags([0, 0, 0, 4]),
        Err(ProtocolError::ClientFlags(4))
    );
}

#[test]
fn errors_on_the_wire_are_those_that_the_protocol_knows() {
    assert_eq!(wire_error(28), ENOSPC);
    assert_eq!(wire_error(110), 5);
    assert_eq!(wire_error(-5), 5);
    let bytes = reply_header(0x0102_0304_0506_0708, 5);
    assert_eq!(
        bytes,
        [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5, 1, 2, 3, 4, 5, 6, 7, 8]
    );
}

proptest! {
    #[test]
    fn any_bytes_decode_to_a_value_or_an_error(
        head in any::<[u8; REQUEST_BYTES]>(),
        option in any::<u32>(),
        data in proptest::collection::vec(any::<u8>(), 0..64),
    ) {
        let mut bytes = head;
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        if let Ok(decoded) = request(&bytes) {
            let end = decoded.offset.checked_add(u64::from(decoded.len));
            let ranged = matches!(decoded.command, Command::Read | Command::Write);
            if refusal(&decoded, &export()).is_none() && ranged {
                prop_assert!(end.is_some_and(|end| end <= 1 << 20));
            }
        }
        let mut reply = Vec::new();
        let _ = answer_option(option, Some(&data), &export(), true, &mut reply);
        prop_assert!(reply.len() < 1024);
    }
}
