#![allow(clippy::unwrap_used)]
use super::*;

#[test]
fn a_message_is_one_line() {
    let line = to_line(&Request::Status).unwrap();
    assert_eq!(line, b"{\"request\":\"status\"}\n");
    assert_eq!(from_line::<Request>(&line).unwrap(), Request::Status);
}

#[test]
fn memory_for_decoding_grows_with_the_line() {
    let bytes = [0, 1, 1000].map(decoded_bytes_max);
    assert_eq!(bytes, [4096, 4192, 100_096]);
    assert!(decoded_bytes_max(MAX_REQUEST_BYTES) < 8 << 20);
}

#[test]
fn an_error_number_is_said_in_words() {
    let words = crate::Errno::IO.to_string();
    assert!(words.contains("os error 5"), "{words}");
}
