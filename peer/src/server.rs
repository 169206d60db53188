//! The server's side of NBD as bytes: what it receives and sends, without any I/O.
//!
//! The daemon's front end, which serves a mirror, and the export server, which serves one disk,
//! both speak through it.
//!
//! Source: "The NBD protocol" (doc/proto.md of the NBD project). All numbers are big-endian.
//! Fixed newstyle negotiation. Structured replies and a metadata context ([`contexts`]) are for
//! who serves with them, and unknown to the front end. Where there is TLS ([`crate::tls`]) nothing
//! is answered without it. Claims ([`crate::claim`]) are decided by
//! who serves, and unknown to the front end. Decoding gives a value or an error for
//! any bytes (R17): a request's header allocates nothing, an option what [`MAX_OPTION_BYTES`]
//! says and its short answer.
//!
//! Byte tables and numbers are in [`crate::wire`].

pub mod admission;
pub mod contexts;

use crate::claim::{self, Claim, Fence};
use contexts::{Agreed, answer_context};

pub use crate::wire::REQUEST_BYTES;
use crate::wire::{
    COMMAND_FLAG_BARRIER, COMMAND_FLAG_FUA, COMMAND_FLAG_NO_HOLE, COMMAND_FLAG_REQ_ONE,
    EXPORT_FLUSH, EXPORT_FUA, EXPORT_HAS_FLAGS, EXPORT_MULTI_CONN, EXPORT_READ_ONLY, EXPORT_TRIM,
    EXPORT_WRITE_ZEROES, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, INFO_BLOCK_SIZE, INFO_EXPORT,
    INFO_FENCE, INIT_MAGIC, OPTION_ABORT, OPTION_BYTES, OPTION_CLAIM, OPTION_EXPORT_NAME,
    OPTION_GO, OPTION_INFO, OPTION_LIST, OPTION_MAGIC, OPTION_REPLY_MAGIC, OPTION_STARTTLS,
    REP_ACK, REP_ERR_IN_USE, REP_ERR_INVALID, REP_ERR_POLICY, REP_ERR_TLS_REQD, REP_ERR_TOO_BIG,
    REP_ERR_UNKNOWN, REP_ERR_UNSUP, REP_INFO, REP_SERVER, REPLY_BYTES, REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC, be16, be32, be64,
};

/// Longest option data that is read; the longest meaningful one is a name of 4096 bytes.
pub const MAX_OPTION_BYTES: usize = 8192;
/// Longest read or write, announced as the maximum block size.
pub const MAX_PAYLOAD_BYTES: u32 = 32 << 20;

const NO_SUCH_EXPORT: &[u8] = b"this server has no such export";

/// Transmission flags of an export that can do everything, on one connection or several.
pub const EVERYTHING: u16 = EXPORT_HAS_FLAGS
    | EXPORT_FLUSH
    | EXPORT_FUA
    | EXPORT_TRIM
    | EXPORT_WRITE_ZEROES
    | EXPORT_MULTI_CONN;

/// What a client sees of a mirror or a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// Its name; the empty name means it too.
    pub name: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Smallest unit of a request.
    pub block_bytes: u32,
    /// Longest read or write in bytes, [`MAX_PAYLOAD_BYTES`] or less.
    pub payload_bytes_max: u32,
    /// Transmission flags.
    pub flags: u16,
}

impl Export {
    fn answers_to(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.name.as_bytes()
    }

    fn offers(&self, command: Command) -> bool {
        self.flags
            & match command {
                Command::Flush => EXPORT_FLUSH,
                Command::Trim => EXPORT_TRIM,
                Command::WriteZeroes => EXPORT_WRITE_ZEROES,
                Command::BlockStatus { .. } => return false,
                _ => return true,
            }
            != 0
    }
}

/// What ends a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// The peer does not speak the protocol, or the stream is out of step.
    #[error("the client sent {found:#x} where the protocol has {expected:#x}")]
    Magic {
        /// What the protocol says.
        expected: u64,
        /// What came.
        found: u64,
    },
    /// The client set a handshake flag that is unknown.
    #[error("the client set unknown handshake flags {0:#x}")]
    ClientFlags(u32),
    /// The client wants an export that does not exist, in the form that cannot be refused.
    #[error("the client asked for an export that does not exist")]
    UnknownExport,
    /// The client wants an export without TLS, in the form that cannot be refused.
    #[error("the client asked for the export without TLS")]
    PlainText,
    /// Something came between the wish for TLS and its begin: from whom nobody can tell.
    #[error("the client sent more before TLS had begun")]
    BeforeTls,
    /// A write whose data would not fit.
    #[error("the client announced a write of {0} bytes, more than the limit")]
    WriteTooLong(u32),
}

/// The server's greeting.
fn greeting() -> [u8; 18] {
    let mut bytes = [0; 18];
    bytes[..8].copy_from_slice(&INIT_MAGIC.to_be_bytes());
    bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes[16..].copy_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    bytes
}

/// Whether the client does without the 124 zeroes after an export's description.
fn client_flags(bytes: [u8; 4]) -> Result<bool, ProtocolError> {
    let flags = u32::from_be_bytes(bytes);
    let known = u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
    if flags & !known != 0 {
        return Err(ProtocolError::ClientFlags(flags));
    }
    Ok(flags & u32::from(FLAG_NO_ZEROES) != 0)
}

/// A connection, as the negotiation uses it.
#[allow(
    async_fn_in_trait,
    reason = "a connection stays on the thread that serves it"
)]
pub trait Peer {
    /// What ends the connection.
    type Error: From<ProtocolError>;

    /// Takes the next `N` bytes.
    async fn array<const N: usize>(&mut self) -> Result<[u8; N], Self::Error>;

    /// Takes the next `len` bytes.
    async fn take(&mut self, len: usize) -> Result<Vec<u8>, Self::Error>;

    /// Throws the next `len` bytes away, without memory for them.
    async fn skip(&mut self, len: usize) -> Result<(), Self::Error>;

    /// Sends all of `bytes`.
    async fn send(&mut self, bytes: &[u8]) -> Result<(), Self::Error>;

    /// Begins TLS with the next byte in either direction. Only where [`Desk::has_tls`].
    ///
    /// # Errors
    ///
    /// [`ProtocolError::BeforeTls`] when something has been received and not taken.
    async fn secure(&mut self) -> Result<(), Self::Error>;
}

/// What a server makes of a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The server knows no claims.
    Unknown,
    /// Granted, or only asked for.
    Granted(Fence),
    /// Another session, which lives, may write; a sentence.
    InUse(String),
    /// Refused; a sentence.
    Refused(String),
}

/// Who decides what a client gets during the negotiation.
#[allow(
    async_fn_in_trait,
    reason = "a connection stays on the thread that serves it"
)]
pub trait Desk {
    /// The export as this client has it by now.
    fn export(&self) -> &Export;

    /// Whether there is TLS: then nothing is answered without it.
    fn has_tls(&self) -> bool {
        false
    }

    /// Decides on a claim; without one only says whether claims are known.
    async fn claim(&mut self, claim: Option<Claim>) -> Verdict;

    /// What has been agreed on with this client; none for a server of simple replies only.
    fn agreed(&mut self) -> Option<&mut Agreed> {
        None
    }
}

/// A server without claims.
impl Desk for Export {
    fn export(&self) -> &Export {
        self
    }

    async fn claim(&mut self, _: Option<Claim>) -> Verdict {
        Verdict::Unknown
    }
}

/// Greets a client and answers its options; returns whether requests follow.
///
/// # Errors
///
/// When the connection fails, or the client does not speak the protocol.
pub async fn negotiate<P: Peer>(peer: &mut P, desk: &mut impl Desk) -> Result<bool, P::Error> {
    peer.send(&greeting()).await?;
    let no_zeroes = client_flags(peer.array().await?)?;
    let mut secured = !desk.has_tls();
    loop {
        let (option, len) = option_header(&peer.array().await?)?;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let data = if len <= MAX_OPTION_BYTES {
            Some(peer.take(len).await?)
        } else {
            peer.skip(len).await?;
            None
        };
        let mut reply = Vec::new();
        if option == OPTION_STARTTLS && desk.has_tls() {
            let begins = !secured && data.as_ref().is_some_and(Vec::is_empty);
            let (kind, why) = if begins {
                (REP_ACK, &[][..])
            } else {
                (REP_ERR_INVALID, &b"TLS begins once, and takes no data"[..])
            };
            option_reply(&mut reply, option, kind, why);
            peer.send(&reply).await?;
            if begins {
                peer.secure().await?;
                secured = true;
            }
            continue;
        }
        if !secured && option == OPTION_EXPORT_NAME {
            return Err(ProtocolError::PlainText.into());
        }
        let next = if !secured && option != OPTION_ABORT {
            let why = b"this server wants TLS first";
            option_reply(&mut reply, option, REP_ERR_TLS_REQD, why);
            Next::More
        } else if let (OPTION_CLAIM, Some(data)) = (option, &data) {
            answer_claim(data, desk, &mut reply).await
        } else if answer_context(option, data.as_deref(), desk, &mut reply) {
            Next::More
        } else {
            answer_option(
                option,
                data.as_deref(),
                desk.export(),
                no_zeroes,
                &mut reply,
            )?
        };
        let sent = peer.send(&reply).await;
        match next {
            Next::More => sent?,
            Next::Transmission => return sent.map(|()| true),
            Next::Close => return Ok(false),
        }
    }
}

/// An option's header: its number and the length of its data.
fn option_header(bytes: &[u8; OPTION_BYTES]) -> Result<(u32, u32), ProtocolError> {
    let magic = be64(bytes, 0).unwrap_or(0);
    if magic != OPTION_MAGIC {
        return Err(ProtocolError::Magic {
            expected: OPTION_MAGIC,
            found: magic,
        });
    }
    Ok((be32(bytes, 8).unwrap_or(0), be32(bytes, 12).unwrap_or(0)))
}

/// What the negotiation does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Another option may follow.
    More,
    /// Requests follow.
    Transmission,
    /// The client leaves.
    Close,
}

/// Answers one option by appending to `reply`. `data` is none when it was longer than
/// [`MAX_OPTION_BYTES`] and has been skipped.
pub fn answer_option(
    option: u32,
    data: Option<&[u8]>,
    export: &Export,
    no_zeroes: bool,
    reply: &mut Vec<u8>,
) -> Result<Next, ProtocolError> {
    if option == OPTION_EXPORT_NAME {
        if !data.is_some_and(|name| export.answers_to(name)) {
            return Err(ProtocolError::UnknownExport);
        }
        reply.extend_from_slice(&export.size_bytes.to_be_bytes());
        reply.extend_from_slice(&export.flags.to_be_bytes());
        if !no_zeroes {
            reply.extend_from_slice(&[0; 124]);
        }
        return Ok(Next::Transmission);
    }
    let Some(data) = data else {
        option_reply(reply, option, REP_ERR_TOO_BIG, b"the option is too long");
        return Ok(Next::More);
    };
    match option {
        OPTION_ABORT => {
            option_reply(reply, option, REP_ACK, &[]);
            Ok(Next::Close)
        }
        OPTION_LIST if data.is_empty() => {
            let mut server = Vec::with_capacity(4 + export.name.len());
            let len = u32::try_from(export.name.len()).unwrap_or(0);
            server.extend_from_slice(&len.to_be_bytes());
            server.extend_from_slice(export.name.as_bytes());
            option_reply(reply, option, REP_SERVER, &server);
            option_reply(reply, option, REP_ACK, &[]);
            Ok(Next::More)
        }
        OPTION_LIST => {
            option_reply(reply, option, REP_ERR_INVALID, b"LIST takes no data");
            Ok(Next::More)
        }
        OPTION_INFO | OPTION_GO => Ok(answer_go(option, data, export, reply)),
        _ => {
            option_reply(reply, option, REP_ERR_UNSUP, &[]);
            Ok(Next::More)
        }
    }
}

/// Answers a claim by appending to `reply`.
async fn answer_claim(data: &[u8], desk: &mut impl Desk, reply: &mut Vec<u8>) -> Next {
    let option = OPTION_CLAIM;
    let Some((name, claim)) = claim::decode(data) else {
        let why = b"the claim makes no sense";
        option_reply(reply, option, REP_ERR_INVALID, why);
        return Next::More;
    };
    if !desk.export().answers_to(name) {
        option_reply(reply, option, REP_ERR_UNKNOWN, NO_SUCH_EXPORT);
        return Next::More;
    }
    match desk.claim(claim).await {
        Verdict::Unknown => option_reply(reply, option, REP_ERR_UNSUP, &[]),
        Verdict::InUse(why) => option_reply(reply, option, REP_ERR_IN_USE, why.as_bytes()),
        Verdict::Refused(why) => option_reply(reply, option, REP_ERR_POLICY, why.as_bytes()),
        Verdict::Granted(fence) => {
            let mut info = INFO_FENCE.to_be_bytes().to_vec();
            info.extend_from_slice(&fence.encode());
            option_reply(reply, option, REP_INFO, &info);
            option_reply(reply, option, REP_ACK, &[]);
        }
    }
    Next::More
}

fn answer_go(option: u32, data: &[u8], export: &Export, reply: &mut Vec<u8>) -> Next {
    let Some(name) = go_name(data) else {
        option_reply(
            reply,
            option,
            REP_ERR_INVALID,
            b"the option's lengths do not fit",
        );
        return Next::More;
    };
    if !export.answers_to(name) {
        option_reply(reply, option, REP_ERR_UNKNOWN, NO_SUCH_EXPORT);
        return Next::More;
    }
    let mut info = Vec::with_capacity(14);
    info.extend_from_slice(&INFO_EXPORT.to_be_bytes());
    info.extend_from_slice(&export.size_bytes.to_be_bytes());
    info.extend_from_slice(&export.flags.to_be_bytes());
    option_reply(reply, option, REP_INFO, &info);
    // Sent unasked: the specification asks servers with a minimum above one byte to do so.
    info.clear();
    info.extend_from_slice(&INFO_BLOCK_SIZE.to_be_bytes());
    for bytes in [
        export.block_bytes,
        export.block_bytes.max(4096),
        export.payload_bytes_max,
    ] {
        info.extend_from_slice(&bytes.to_be_bytes());
    }
    option_reply(reply, option, REP_INFO, &info);
    option_reply(reply, option, REP_ACK, &[]);
    if option == OPTION_GO {
        Next::Transmission
    } else {
        Next::More
    }
}

/// The export's name in the data of INFO and GO, when all its lengths agree.
fn go_name(data: &[u8]) -> Option<&[u8]> {
    let len = usize::try_from(be32(data, 0)?).ok()?;
    let after = len.checked_add(4)?;
    let name = data.get(4..after)?;
    let requests = usize::from(be16(data, after)?);
    (data.len() == after + 2 + requests * 2).then_some(name)
}

fn option_reply(reply: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    reply.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    reply.extend_from_slice(&option.to_be_bytes());
    reply.extend_from_slice(&kind.to_be_bytes());
    let len = u32::try_from(data.len()).unwrap_or(0);
    reply.extend_from_slice(&len.to_be_bytes());
    reply.extend_from_slice(data);
}

/// What a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read `len` bytes.
    Read,
    /// Write the `len` bytes that follow.
    Write,
    /// Flush.
    Flush,
    /// Discard.
    Trim,
    /// Write zeroes.
    WriteZeroes,
    /// What is known of `len` bytes.
    BlockStatus {
        /// Of the first block alone.
        one: bool,
    },
    /// The client leaves; there is no reply.
    Disconnect,
    /// Answered with an error.
    Invalid,
}

impl Command {
    /// Whether it changes what the export holds.
    #[must_use]
    pub fn changes(self) -> bool {
        matches!(self, Self::Write | Self::Trim | Self::WriteZeroes)
    }
}

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub command: Command,
    /// Given back in the reply.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub len: u32,
    /// Durable before the reply.
    pub fua: bool,
    /// A durable write that later changes wait for.
    pub barrier: bool,
}

const BARRIER: u16 = COMMAND_FLAG_BARRIER | COMMAND_FLAG_FUA;

/// Decodes a request's header.
pub fn request(bytes: &[u8; REQUEST_BYTES]) -> Result<Request, ProtocolError> {
    let magic = be32(bytes, 0).unwrap_or(0);
    if magic != REQUEST_MAGIC {
        let expected = u64::from(REQUEST_MAGIC);
        return Err(ProtocolError::Magic {
            expected,
            found: u64::from(magic),
        });
    }
    let flags = be16(bytes, 4).unwrap_or(0);
    let command = match be16(bytes, 6).unwrap_or(u16::MAX) {
        0 => Command::Read,
        1 => Command::Write,
        2 => Command::Disconnect,
        3 => Command::Flush,
        4 => Command::Trim,
        6 => Command::WriteZeroes,
        7 => Command::BlockStatus {
            one: flags & COMMAND_FLAG_REQ_ONE != 0,
        },
        _ => Command::Invalid,
    };
    let len = be32(bytes, 24).unwrap_or(0);
    if command == Command::Write && len > MAX_PAYLOAD_BYTES {
        return Err(ProtocolError::WriteTooLong(len));
    }
    // A write keeps its command even when it is refused: its data has to be taken in.
    let known_flags = match command {
        Command::BlockStatus { .. } => COMMAND_FLAG_FUA | COMMAND_FLAG_REQ_ONE,
        _ => COMMAND_FLAG_FUA | COMMAND_FLAG_NO_HOLE,
    };
    let unknown_flags = flags & !known_flags != 0;
    let command = match command {
        Command::Write | Command::Disconnect => command,
        _ if unknown_flags => Command::Invalid,
        _ => command,
    };
    Ok(Request {
        command,
        cookie: be64(bytes, 8).unwrap_or(0),
        offset: be64(bytes, 16).unwrap_or(0),
        len,
        fua: flags & COMMAND_FLAG_FUA != 0,
        barrier: command == Command::Write && flags & BARRIER == BARRIER,
    })
}

/// A request's answer that is known without doing it.
pub fn refusal(request: &Request, export: &Export) -> Option<u32> {
    let block = u64::from(export.block_bytes);
    let len = u64::from(request.len);
    match request.command {
        Command::Invalid => return Some(EINVAL),
        _ if !export.offers(request.command) => return Some(EINVAL),
        Command::Flush | Command::Disconnect => return None,
        changing if changing.changes() && export.flags & EXPORT_READ_ONLY != 0 => {
            return Some(EPERM);
        }
        _ => {}
    }
    let end = request.offset.checked_add(len);
    if end.is_none_or(|end| end > export.size_bytes) {
        // Beyond the end: the specification names ENOSPC for writes, EINVAL for the others.
        let writes = matches!(request.command, Command::Write | Command::WriteZeroes);
        return Some(if writes { ENOSPC } else { EINVAL });
    }
    if len == 0 || !request.offset.is_multiple_of(block) || !len.is_multiple_of(block) {
        return Some(EINVAL);
    }
    let has_payload = matches!(request.command, Command::Read | Command::Write);
    if has_payload && request.len > export.payload_bytes_max {
        return Some(EOVERFLOW);
    }
    None
}

/// Bytes of memory that a request needs for its data, at most [`MAX_PAYLOAD_BYTES`].
pub fn payload_bytes(request: &Request, export: &Export) -> usize {
    match request.command {
        // Also a refused write's data has to be taken in.
        Command::Write => request.len as usize,
        Command::Read if refusal(request, export).is_none() => request.len as usize,
        _ => 0,
    }
}

/// Not allowed.
pub const EPERM: u32 = 1;
const EIO: u32 = 5;
const ENOMEM: u32 = 12;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const ENOTSUP: u32 = 95;
const ESHUTDOWN: u32 = 108;

/// The protocol knows few error numbers; all others become EIO.
pub fn wire_error(errno: i32) -> u32 {
    match u32::try_from(errno) {
        Ok(code @ (EPERM | EIO | ENOMEM | EINVAL | ENOSPC | EOVERFLOW | ENOTSUP | ESHUTDOWN)) => {
            code
        }
        _ => EIO,
    }
}

/// A simple reply's header.
pub fn reply_header(cookie: u64, error: u32) -> [u8; REPLY_BYTES] {
    let mut bytes = [0; REPLY_BYTES];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests;
