//! The numbers of the NBD protocol, as far as this project speaks it.
//!
//! Source: "The NBD protocol" (doc/proto.md of the NBD project). All numbers are big-endian.
//!
//! # The handshake (fixed newstyle)
//!
//! Greeting, server to client:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `NBDMAGIC` |
//! | 8 | 8 | `IHAVEOPT` |
//! | 16 | 2 | handshake flags: fixed newstyle, no zeroes |
//!
//! The client answers with four bytes of the same flags. An option, client to server:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `IHAVEOPT` |
//! | 8 | 4 | option |
//! | 12 | 4 | length of the data |
//! | 16 | | data; of GO: name length u32, name, count u16, information kinds u16 each |
//!
//! An option's reply, server to client (any number; an acknowledgement or an error is the last):
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | [`OPTION_REPLY_MAGIC`] |
//! | 8 | 4 | option |
//! | 12 | 4 | kind: acknowledgement, information, or an error (highest bit set) |
//! | 16 | 4 | length of the data |
//! | 20 | | data; of an error: a text for people |
//!
//! The data of an information about the export, and about block sizes:
//!
//! | offset | bytes | what | offset | bytes | what |
//! |---|---|---|---|---|---|
//! | 0 | 2 | 0: export | 0 | 2 | 3: block sizes |
//! | 2 | 8 | size in bytes | 2 | 4 | smallest request |
//! | 10 | 2 | transmission flags | 6 | 4 | preferred |
//! | | | | 10 | 4 | largest payload |
//!
//! # Transmission (simple replies)
//!
//! | offset | bytes | request | offset | bytes | reply |
//! |---|---|---|---|---|---|
//! | 0 | 4 | [`REQUEST_MAGIC`] | 0 | 4 | [`SIMPLE_REPLY_MAGIC`] |
//! | 4 | 2 | flags: FUA, no hole, barrier | 4 | 4 | error, 0 for success |
//! | 6 | 2 | command | 8 | 8 | cookie of the request |
//! | 8 | 8 | cookie | 16 | | data of a read that succeeded |
//! | 16 | 8 | offset | | | |
//! | 24 | 4 | length | | | |
//! | 28 | | data of a write | | | |
//!
//! # Checksums of blocks
//!
//! The export server computes checksums of blocks for who has agreed on structured replies
//! ([`OPTION_STRUCTURED_REPLY`]) and on the context [`CONTEXT_SUMS`]. The data of
//! [`OPTION_LIST_META_CONTEXT`] and [`OPTION_SET_META_CONTEXT`], and of what answers them for each
//! context ([`REP_META_CONTEXT`]; none for one that is not known) before the acknowledgement:
//!
//! | bytes | option | bytes | reply |
//! |---|---|---|---|
//! | 4 | length of the export's name | 4 | the context's id, [`CONTEXT_ID_SUMS`] |
//! | | the name | | its name |
//! | 4 | number of queries | | |
//! | 4 and more, each | length of a query, the query | | |
//!
//! From then on the replies to READ and BLOCK_STATUS are structured, each of one chunk; all others
//! stay simple:
//!
//! | offset | bytes | chunk |
//! |---|---|---|
//! | 0 | 4 | [`STRUCTURED_REPLY_MAGIC`] |
//! | 4 | 2 | flags: [`CHUNK_FLAG_DONE`] |
//! | 6 | 2 | kind: data, block status, or an error |
//! | 8 | 8 | cookie of the request |
//! | 16 | 4 | length of what follows |
//! | 20 | | of data: offset u64, data; of an error: number u32, length u16, a text for people |
//! | 20 | | of a block status: the context's id u32, then for each block of 4096 bytes its length u32, which is 4096, and u32 the CRC32 (of zlib) of its content |
//!
//! A request has to begin at a multiple of 4096 bytes. What is answered are the whole blocks in it,
//! at most [`SUMS_MAX`]; the first one alone with [`COMMAND_FLAG_REQ_ONE`]. A block that cannot be
//! read makes the answer an error.

/// First eight bytes of a server's greeting, `NBDMAGIC`.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: follows the greeting's magic and begins each option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// What follows the greeting's magic in the handshake of old, which knows no options.
pub const OLD_STYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Begins a reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Begins a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Begins a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Begins a chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Bytes of a request's header.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of a simple reply's header.
pub const REPLY_BYTES: usize = 16;
/// Bytes of the header of a structured reply's chunk.
pub const CHUNK_BYTES: usize = 20;
/// Bytes of an option's header.
pub const OPTION_BYTES: usize = 16;
/// Bytes of the header of a reply to an option.
pub const OPTION_REPLY_BYTES: usize = 20;
/// Bytes of the server's greeting.
pub const GREETING_BYTES: usize = 18;

/// Handshake flag: options are answered one by one, errors included.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag: no 124 zeroes after an export's description.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;

/// Option: begin transmission, without a way to refuse.
pub const OPTION_EXPORT_NAME: u32 = 1;
/// Option: leave.
pub const OPTION_ABORT: u32 = 2;
/// Option: list the exports.
pub const OPTION_LIST: u32 = 3;
/// TLS is wanted ([`crate::tls`]): it begins after the acknowledgement, and options go on in it.
pub const OPTION_STARTTLS: u32 = 5;
/// Option: describe an export.
pub const OPTION_INFO: u32 = 6;
/// Option: describe an export and begin transmission.
pub const OPTION_GO: u32 = 7;

/// Option: structured replies from now on.
pub const OPTION_STRUCTURED_REPLY: u32 = 8;
/// Option: which metadata contexts there are.
pub const OPTION_LIST_META_CONTEXT: u32 = 9;
/// Option: chooses metadata contexts.
pub const OPTION_SET_META_CONTEXT: u32 = 10;

/// Option of our own: asks to be an export's one writer (see [`crate::claim`]). Servers that do
/// not know it say so.
pub const OPTION_CLAIM: u32 = u32::from_be_bytes(*b"UMCL");

/// Reply to an option: done.
pub const REP_ACK: u32 = 1;
/// Reply to an option: an export's name.
pub const REP_SERVER: u32 = 2;
/// Reply to an option: information about an export.
pub const REP_INFO: u32 = 3;
/// Reply to an option: a metadata context.
pub const REP_META_CONTEXT: u32 = 4;
/// Reply to an option: the bit that all errors have.
pub const REP_ERROR_BIT: u32 = 1 << 31;
/// Reply to an option: it is unknown.
pub const REP_ERR_UNSUP: u32 = 0x8000_0001;
/// Reply to an option: forbidden by the server's configuration.
pub const REP_ERR_POLICY: u32 = 0x8000_0002;
/// Reply to an option: its data make no sense.
pub const REP_ERR_INVALID: u32 = 0x8000_0003;
/// Reply to an option: only with TLS.
pub const REP_ERR_TLS_REQD: u32 = 0x8000_0005;
/// Reply to an option: there is no such export.
pub const REP_ERR_UNKNOWN: u32 = 0x8000_0006;
/// Reply to an option: the server is shutting down.
pub const REP_ERR_SHUTDOWN: u32 = 0x8000_0007;
/// Reply to an option: too long.
pub const REP_ERR_TOO_BIG: u32 = 0x8000_0009;
/// Reply of our own to a claim: another session, which lives, may write.
pub const REP_ERR_IN_USE: u32 = REP_ERROR_BIT | u32::from_be_bytes(*b"\0UMB");

/// Information: the export's size and flags.
pub const INFO_EXPORT: u16 = 0;
/// Information: limits of requests.
pub const INFO_BLOCK_SIZE: u16 = 3;

/// Information of our own, in the answer to [`OPTION_CLAIM`]: a [`Fence`](crate::claim::Fence).
pub const INFO_FENCE: u16 = u16::from_be_bytes(*b"UM");

/// Transmission flag: the flags mean something.
pub const EXPORT_HAS_FLAGS: u16 = 1 << 0;
/// Transmission flag: the export cannot be written.
pub const EXPORT_READ_ONLY: u16 = 1 << 1;
/// Transmission flag: FLUSH works.
pub const EXPORT_FLUSH: u16 = 1 << 2;
/// Transmission flag: FUA works.
pub const EXPORT_FUA: u16 = 1 << 3;
/// Transmission flag: TRIM works.
pub const EXPORT_TRIM: u16 = 1 << 5;
/// Transmission flag: WRITE_ZEROES works.
pub const EXPORT_WRITE_ZEROES: u16 = 1 << 6;
/// Transmission flag: a flush on one connection covers them all.
pub const EXPORT_MULTI_CONN: u16 = 1 << 8;

/// Flag of a request: durable before the reply.
pub const COMMAND_FLAG_FUA: u16 = 1 << 0;
/// Flag of WRITE_ZEROES: keep the space allocated.
pub const COMMAND_FLAG_NO_HOLE: u16 = 1 << 1;

/// Flag of a FUA write, between our client and our export server alone
/// ([`Fence::keeps_order`](crate::claim::Fence::keeps_order)): a barrier, as `mirror::order` has it.
pub const COMMAND_FLAG_BARRIER: u16 = 1 << 15;

/// Flag of BLOCK_STATUS: one descriptor.
pub const COMMAND_FLAG_REQ_ONE: u16 = 1 << 3;

/// Flag of a chunk: the last one of its reply.
pub const CHUNK_FLAG_DONE: u16 = 1 << 0;
/// Kind of a chunk: an offset and data.
pub const CHUNK_DATA: u16 = 1;
/// Kind of a chunk: a context's id and descriptors.
pub const CHUNK_BLOCK_STATUS: u16 = 5;
/// Kind of a chunk: an error.
pub const CHUNK_ERROR: u16 = 1 << 15 | 1;

/// The namespace of our metadata contexts.
pub const CONTEXT_NAMESPACE: &str = "x-ublk-mirror:";
/// The metadata context that has checksums of blocks.
pub const CONTEXT_SUMS: &str = "x-ublk-mirror:crc32";
/// Its id, in every session.
pub const CONTEXT_ID_SUMS: u32 = 1;
/// Bytes of a block that has a checksum.
pub const SUM_BLOCK_BYTES: u32 = 4096;
/// Most checksums in one answer.
pub const SUMS_MAX: u32 = 1024;

/// Appends a length of four bytes and then the bytes, the protocol's form of a string.
pub fn put_string(out: &mut Vec<u8>, bytes: &[u8]) {
    let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(bytes);
}

/// The number at `at`, when it lies within `bytes`.
#[must_use]
pub fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// The number at `at`, when it lies within `bytes`.
#[must_use]
pub fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// The number at `at`, when it lies within `bytes`.
#[must_use]
pub fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}
