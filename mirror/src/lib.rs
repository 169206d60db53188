//! The mirror engine of ublk-mirror: what is written where, in which order, and who is right.
//!
//! The crate decides and orders; it does no system calls. Devices, memory, time, randomness
//! and tasks come through the traits of [`host`], so that the daemon and the simulator run the
//! same code.
//!
//! | module | holds |
//! |---|---|
//! | [`host`] | the traits [`host::Disk`], [`host::Host`] and [`host::Buffer`] |
//! | [`layout`] | where each thing lies on a member |
//! | [`superblock`] | the superblock: byte table, encoding, decoding |
//! | [`create`] | what a new member is filled with |
//! | [`assemble`] | the pure decision who is in-sync and whether to start |
//! | [`split`] | the pure decision what a member has changed by itself |
//! | [`verdict`] | the pure decision which copy of a block is right |
//! | [`engine`] | the running mirror: write, read, flush, discard, loss, join, resync |
//! | [`scrub_log`] | what scrubs have done and found |
//! | [`budget`] | how often a member may need a block rewritten |
//! | [`pace`] | how fast background work may go without hurting the foreground |
//! | [`control`] | the control protocol and the status document |
//!
//! Rules named `R1` to `R17` in comments are those of the README's section "The rules".
#![forbid(unsafe_code)]

pub mod assemble;
pub mod budget;
mod bytes;
pub mod control;
pub mod create;
pub mod engine;
mod epochs;
#[cfg(test)]
mod histories;
pub mod host;
pub mod layout;
pub mod order;
pub mod pace;
mod records;
pub mod scrub_log;
#[cfg(feature = "sim")]
pub mod sim;
pub mod split;
pub mod superblock;
pub mod verdict;

pub use engine::{Candidate, ControlError, Mirror, StartError, StartOptions};
pub use host::{Buffer, Disk, DiskRequest, Errno, Geometry, Host, Span, SumsOp};
