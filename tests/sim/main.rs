//! The production engine on simulated disks: seeded histories of requests, faults, operators
//! and crashes, checked against an oracle after every read.
//!
//! `SIM_SEEDS=N` runs N seeds (default 100); `cargo sim --seed S` shows one. `CRASH_SAMPLES=N` crashes in up to N ways at each device operation (default 6).
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::cast_possible_truncation
)]
// `cargo sim` (cli.rs) is made of the same files: each of the two leaves something unused.
#![allow(dead_code)]

mod barriers;
mod block_sums;
mod budgets;
mod cases;
mod checksums;
mod client;
mod crashes;
mod double_faults;
mod equalising;
mod histories;
mod hot_extents;
mod invariants;
mod machine;
mod older_images;
mod oracle;
mod others;
mod peer_host;
mod peer_net;
mod peer_play;
mod peer_server;
mod peers;
mod play;
mod races;
mod refused_writes;
mod roles;
mod rot;
mod rounds;
mod runner;
mod script;
mod second_looks;
mod stalls;
mod sum_pages;
mod sums;
mod survivors_ahead;
mod survivors_edges;
mod survivors_joins;
mod survivors_maps;
mod survivors_orders;
mod survivors_requests;
mod survivors_sizes;
