//! Mappings that are not in use, kept by each thread: mapping and locking cost more than an I/O.

#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::collections::HashMap;

use super::Mapping;

/// Memory kept for reuse on each thread, in bytes. More than this is given back.
const LIMIT_BYTES: usize = 64 << 20;

thread_local! {
    static POOL: RefCell<Pool> = RefCell::new(Pool::default());
}

#[derive(Default)]
struct Pool {
    free: HashMap<usize, Vec<Mapping>>,
    bytes: usize,
}

impl Pool {
    /// Gives back mappings of the length that takes most of the memory, if it is not this one.
    fn make_room_for(&mut self, len: usize) {
        while self.bytes + len > LIMIT_BYTES {
            let sizes = self.free.iter_mut().filter(|(other, _)| **other != len);
            let Some((_, most)) = sizes.max_by_key(|(other, all)| **other * all.len()) else {
                return;
            };
            let Some(mapping) = most.pop() else { return };
            self.bytes -= mapping.len;
        }
    }
}

/// A mapping of exactly `len` bytes, if one is kept.
pub(super) fn take(len: usize) -> Option<Mapping> {
    POOL.with_borrow_mut(|pool| {
        let mapping = pool.free.get_mut(&len)?.pop()?;
        pool.bytes -= len;
        Some(mapping)
    })
}

/// Keeps a mapping, or unmaps it when enough are kept or the thread is ending.
pub(super) fn put(mapping: Mapping) {
    // Dropped with the closure when the thread has no pool any more.
    let _ = POOL.try_with(move |pool| {
        let mut pool = pool.borrow_mut();
        pool.make_room_for(mapping.len);
        if pool.bytes + mapping.len <= LIMIT_BYTES {
            pool.bytes += mapping.len;
            pool.free.entry(mapping.len).or_default().push(mapping);
        }
    });
}
