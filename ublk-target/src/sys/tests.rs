//! Tests of the rules by which memory is lent.
#![allow(clippy::unwrap_used)]

use mirror::host::Buffer as _;

use super::{IoBuffer, KernelLend};

#[test]
fn memory_is_zeroed_also_when_it_is_used_again() {
    let first = IoBuffer::zeroed(100);
    assert_eq!(first.len(), 4096);
    let address = first.read(|bytes| bytes.as_ptr().addr());
    assert_eq!(address % 4096, 0);
    first.fill(|bytes| bytes.fill(0xa5));
    drop(first);
    let second = IoBuffer::zeroed(4096);
    assert_eq!(
        second.read(|bytes| bytes.as_ptr().addr()),
        address,
        "taken from the pool"
    );
    assert!(second.read(|bytes| bytes.iter().all(|byte| *byte == 0)));
}

#[test]
fn a_lent_buffer_is_in_use_until_the_last_lend_ends() {
    let buffer = IoBuffer::zeroed(8192);
    let (one, two) = (
        buffer.lend_to_reader(0, 4096),
        buffer.lend_to_reader(4096, 4096),
    );
    assert!(buffer.in_use() && !buffer.being_written());
    buffer.read(|bytes| assert_eq!(bytes.len(), 8192));
    drop(one);
    assert!(buffer.in_use());
    drop(two);
    assert!(!buffer.in_use());
    buffer.fill(|bytes| bytes[0] = 1);
}

#[test]
#[should_panic(expected = "while a device fills it")]
fn reading_what_a_device_writes_is_caught() {
    let buffer = IoBuffer::zeroed(4096);
    let _lend = buffer.lend_to_writer(0, 512);
    buffer.read(|_| ());
}

#[test]
#[should_panic(expected = "while a device uses it")]
fn filling_what_a_device_reads_is_caught() {
    let buffer = IoBuffer::zeroed(4096);
    let _lend = buffer.lend_to_reader(0, 512);
    buffer.fill(|_| ());
}

#[test]
#[should_panic(expected = "that Rust code uses")]
fn lending_to_a_writer_inside_a_read_is_caught() {
    let buffer = IoBuffer::zeroed(4096);
    buffer.read(|_| drop(buffer.lend_to_writer(0, 512)));
}

#[test]
#[should_panic(expected = "while it is borrowed")]
fn filling_inside_a_read_is_caught() {
    let buffer = IoBuffer::zeroed(4096);
    buffer.read(|_| buffer.fill(|_| ()));
}

#[test]
#[should_panic(expected = "out of bounds")]
fn lending_beyond_the_end_is_caught() {
    drop(IoBuffer::zeroed(4096).lend_to_reader(4096, 1));
}

#[test]
fn memory_that_the_kernel_never_gave_back_is_leaked() {
    let buffer = IoBuffer::zeroed(4096);
    let lend = KernelLend::new(&buffer);
    assert!(!lend.address().is_null());
    lend.returned();
    assert!(!buffer.in_use());
    drop(KernelLend::new(&buffer));
    assert!(buffer.in_use(), "a forgotten command keeps the memory");
}
