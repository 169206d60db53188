//! Members behind the network: NBD, the side of the client and that of a server.
//!
//! A peer member is a disk that some NBD server exports. It carries superblock, maps and data
//! like a disk in this machine, so that nothing above this crate knows the network.
//!
//! | module | holds |
//! |---|---|
//! | [`address`] | `nbd://HOST/EXPORT`, `nbds://HOST/EXPORT` and `nbd+unix:///EXPORT?socket=PATH` |
//! | [`wire`] | the protocol's numbers |
//! | [`handshake`] | from the server's greeting to the export's description |
//! | [`export`] | what a server offers, whether that can hold a member, how requests are cut |
//! | [`session`] | requests and replies, matched by cookie |
//! | [`structured`] | structured replies: data, checksums of blocks, errors |
//! | [`server`] | the other side: options answered, requests taken apart, who may write |
//! | [`claim`] | who may write to an export of our own server, and why nobody else does |
//! | [`tls`] | TLS, and whose certificates are accepted |
//! | [`blocking`] | connecting, and a client that waits for each answer |
//! | [`link`] | many requests at once, over one connection after another, on whatever is a network |
//! | [`signal`] | a flag that a task waits for |
//!
//! All but `blocking` and `link` are state machines over bytes, without I/O: the daemon runs them on
//! its ring, `mirrorctl` over a blocking socket, and the fuzzer over nothing. `link` does its I/O
//! through a trait, for the daemon's ring and for the simulator.
//!
//! # What it promises
//!
//! - Decoding any bytes gives a value or an error (R17). The handshake holds one reply of at most
//!   [`handshake::REPLY_BYTES_MAX`] bytes; a reply to a request is decoded without memory.
//! - A reply that answers nothing, or a second time, is an error that ends the connection: after
//!   it nobody can tell which request the next bytes belong to.
//! - No request is sent twice (R13), except to a server of ours that has ended the session in which
//!   it was sent first ([`link`]). Otherwise a connection that has failed stays failed; going on means
//!   a new one, and that is the operator's decision, because an ordinary server may still be
//!   working on what the old one brought it.
//!
//! Only our own server fences ([`claim`]): no ordinary one can be asked to end an older session
//! first.
#![forbid(unsafe_code)]

pub mod address;
pub mod blocking;
pub mod claim;
mod connect_error;
pub mod export;
pub mod handshake;
pub mod link;
pub mod server;
pub mod session;
pub mod signal;
mod stream;
pub mod structured;
pub mod tls;
pub mod wire;

pub use address::{Address, AddressError, is_address};
pub use blocking::{Claimant, Client};
pub use connect_error::ConnectError;
pub use export::{Export, Unusable};
pub use handshake::{Handshake, HandshakeError};
pub use session::{Answer, Ask, Kind, ProtocolError, Rank, Session};
