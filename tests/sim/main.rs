//! The production engine on simulated disks: seeded histories of requests, faults, operators
//! and crashes, checked against an oracle after every read.
//!
//! `SIM_SEEDS=N` runs N seeds of each kind (default 100), `SIM_SEED=S` runs one and prints
//! what it did.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::cast_possible_truncation
)]

mod cases;
mod histories;
mod machine;
mod oracle;
mod races;
