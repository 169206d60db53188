//! The control socket: a request, as `mirrorctl` or anything else that may connect sends it (R17).
//!
//! An input is the line of JSON. What decodes encodes to a line that means the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mirror::control::{Request, decoded_bytes_max, from_line, to_line};
use ublk_mirror_fuzz::within;

fuzz_target!(|line: &[u8]| {
    let limit = decoded_bytes_max(line.len());
    let Ok(decoded) = within(limit, || from_line::<Request>(line)) else {
        return;
    };
    let again = to_line(&decoded).expect("what was decoded can be encoded");
    assert_eq!(again.last(), Some(&b'\n'));
    assert_eq!(from_line::<Request>(&again).ok(), Some(decoded));
});
