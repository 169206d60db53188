//! The control socket: a reply, as `mirrorctl` reads it (R17).
//!
//! An input is the line of JSON. What decodes encodes to a line that means the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mirror::control::{Reply, decoded_bytes_max, from_line, to_line};
use ublk_mirror_fuzz::within;

fuzz_target!(|line: &[u8]| {
    let limit = decoded_bytes_max(line.len());
    let Ok(decoded) = within(limit, || from_line::<Reply>(line)) else {
        return;
    };
    let again = to_line(&decoded).expect("what was decoded can be encoded");
    assert_eq!(again.last(), Some(&b'\n'));
    assert_eq!(from_line::<Reply>(&again).ok(), Some(decoded));
});
