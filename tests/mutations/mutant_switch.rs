//! Chooses one of the mutants that `mutants.py` has built into the sources, or records which of
//! them a run comes by.
//!
//! `MUTANT=N` turns mutant N on. `MUTANT_TRACE=FILE` appends the number of each mutant to FILE
//! when a run comes by it for the first time.

use std::fs::File;
use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

const UNREAD: u32 = u32::MAX;
const TRACING: u32 = u32::MAX - 1;
const MUTANTS_MAX: usize = 1 << 16;

static CHOSEN: AtomicU32 = AtomicU32::new(UNREAD);
static TRACE: OnceLock<File> = OnceLock::new();
static SEEN: [AtomicBool; MUTANTS_MAX] = [const { AtomicBool::new(false) }; MUTANTS_MAX];

/// Whether this mutant is the one.
#[inline]
pub fn on(number: u32) -> bool {
    let chosen = CHOSEN.load(Relaxed);
    if chosen < TRACING {
        chosen == number
    } else {
        first_or_traced(number)
    }
}

#[cold]
fn first_or_traced(number: u32) -> bool {
    let Ok(path) = std::env::var("MUTANT_TRACE") else {
        let chosen = std::env::var("MUTANT").map_or(0, |text| text.parse().expect("a number"));
        CHOSEN.store(chosen, Relaxed);
        return chosen == number;
    };
    CHOSEN.store(TRACING, Relaxed);
    if !SEEN[number as usize].swap(true, Relaxed) {
        let open = || File::options().append(true).create(true).open(&path);
        let mut trace = TRACE.get_or_init(|| open().expect("a trace"));
        let line = format!("{number}\n");
        trace.write_all(line.as_bytes()).expect("a trace");
    }
    false
}
