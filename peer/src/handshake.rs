//! From a server's greeting to the description of an export, without any I/O.
//!
//! ```text
//! Greeting ──flags, option──► Reply ──header──► Data ──┐
//!     │                         ▲                      │ information
//!     │ STARTTLS                ├──────────────────────┤
//!     └──► Reply ──► Secure ────┤                      │
//!                               │ GO                   │ of a claim: answered, or unknown
//!                               ├──────────────────────┘
//!                               └─ acknowledgement ─► Done   (an error, or nonsense, ends it)
//! ```
//!
//! The caller reads as many bytes as [`Handshake::wants`], hands them to [`Handshake::feed`] and
//! sends what that returns, until nothing more is wanted. Where TLS is wanted, nothing of the export
//! is asked before it is there ([`Handshake::wants_tls`]). Byte tables are in [`crate::wire`].
//! Structured replies and a metadata context are asked for only in a handshake made for
//! checksums of blocks ([`Handshake::for_sums`]). A server is asked whether it
//! knows claims, or sent one ([`crate::claim`]), only in a handshake made for that.

mod sums;

use crate::claim::{self, Claim, Fence};
use crate::export::{BlockSizes, Export};
use crate::wire::{
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, GREETING_BYTES, INFO_BLOCK_SIZE, INFO_EXPORT, INFO_FENCE,
    INIT_MAGIC, OLD_STYLE_MAGIC, OPTION_CLAIM, OPTION_GO, OPTION_MAGIC, OPTION_REPLY_BYTES,
    OPTION_REPLY_MAGIC, OPTION_STARTTLS, REP_ACK, REP_ERR_IN_USE, REP_ERR_POLICY, REP_ERR_SHUTDOWN,
    REP_ERR_TLS_REQD, REP_ERR_UNKNOWN, REP_ERR_UNSUP, REP_ERROR_BIT, REP_INFO, be16, be32, be64,
    put_string,
};

/// Longest data of one reply that is read. Strings have 4096 bytes at most by the protocol.
pub const REPLY_BYTES_MAX: usize = 8192;
/// A server that says more than this of one export will not come to an end.
pub const REPLIES_MAX: u32 = 64;
/// Longest part of a server's own words that is passed on.
const WORDS_BYTES_MAX: usize = 256;

/// Why there is no description; a part of a sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// Whatever listens there is something else.
    #[error("what answers there is no NBD server")]
    NotNbd,
    /// The handshake of before 2011.
    #[error("its server speaks a form of NBD that is too old (no fixed newstyle handshake)")]
    TooOld,
    /// The server has no such export.
    #[error("its server has no such export{0}")]
    UnknownExport(Words),
    /// The server insists on TLS.
    #[error("its server wants TLS: write nbds:// instead of nbd://{0}")]
    TlsRequired(Words),
    /// TLS was asked for.
    #[error("its server offers no TLS: start it with certificates{0}")]
    NoTls(Words),
    /// The server is configured to refuse.
    #[error("its server's configuration forbids it{0}")]
    Forbidden(Words),
    /// The server is going down.
    #[error("its server is shutting down{0}")]
    ShuttingDown(Words),
    /// The claim is older than the disk, or of another line.
    #[error("its server does not let this host write{0}")]
    ClaimRefused(Words),
    /// The server has another writer, whose session lives.
    #[error("its server has another writer{0}")]
    InUse(Words),
    /// No server of ours, or one of an earlier version.
    #[error("its server has no checksums of blocks")]
    NoSums,
    /// Another refusal.
    #[error("its server refuses with error {code:#x}{words}")]
    Refused {
        /// The protocol's number.
        code: u32,
        /// What the server said.
        words: Words,
    },
    /// The server breaks the protocol.
    #[error("its server breaks the protocol: {0}")]
    Nonsense(&'static str),
}

/// What a server said for people; prints as nothing, or as ` (it says: ...)`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Words(String);

impl Words {
    fn of(data: &[u8]) -> Self {
        let text = String::from_utf8_lossy(&data[..data.len().min(WORDS_BYTES_MAX)]);
        let plain = |c: char| if c.is_control() { ' ' } else { c };
        Self(text.trim().chars().map(plain).collect())
    }
}

impl std::fmt::Display for Words {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() {
            return Ok(());
        }
        write!(f, " (it says: {})", self.0)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Greeting,
    Reply,
    Data {
        kind: u32,
        len: usize,
    },
    /// TLS begins.
    Secure,
    Done,
}

/// The client's side of the handshake for one export.
#[derive(Clone, Debug)]
pub struct Handshake {
    name: String,
    stage: Stage,
    tls: bool,
    /// The option whose reply comes next.
    option: u32,
    /// Whether claims are asked about, and the claim if one is made.
    ask: Option<Option<Claim>>,
    /// A claim was made: it must not go unanswered.
    claimed: bool,
    /// Whether checksums of blocks are asked for.
    sums: sums::Sums,
    fence: Option<Fence>,
    replies: u32,
    described: Option<(u64, u16)>,
    blocks: BlockSizes,
}

impl Handshake {
    /// A handshake that asks for the export of this name.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            stage: Stage::Greeting,
            tls: false,
            option: OPTION_GO,
            ask: None,
            claimed: false,
            sums: sums::Sums::Unwanted,
            fence: None,
            replies: 0,
            described: None,
            blocks: BlockSizes::DEFAULT,
        }
    }

    /// The same, that also asks whether the server knows claims, or makes one.
    #[must_use]
    pub fn asking(name: &str, claim: Option<Claim>) -> Self {
        Self {
            ask: Some(claim),
            ..Self::new(name)
        }
    }

    /// The same with TLS.
    #[must_use]
    pub fn with_tls(self) -> Self {
        Self { tls: true, ..self }
    }

    /// Whether TLS begins with the next byte in either direction; then what
    /// [`Handshake::secured`] returns is sent in it.
    #[must_use]
    pub fn wants_tls(&self) -> bool {
        self.stage == Stage::Secure
    }

    /// TLS is there: what is to be sent next.
    ///
    /// # Panics
    ///
    /// When it was not wanted.
    pub fn secured(&mut self) -> Vec<u8> {
        assert!(self.wants_tls(), "TLS that nobody wanted");
        self.stage = Stage::Reply;
        let mut out = Vec::new();
        self.put_first(&mut out);
        out
    }

    /// What a server that knows claims says of itself; it has granted the one that was made.
    #[must_use]
    pub fn fence(&self) -> Option<Fence> {
        self.fence
    }

    /// How many bytes to receive next, at most [`REPLY_BYTES_MAX`]; 0 when it is over, or TLS is
    /// to begin.
    #[must_use]
    pub fn wants(&self) -> usize {
        match self.stage {
            Stage::Greeting => GREETING_BYTES,
            Stage::Reply => OPTION_REPLY_BYTES,
            Stage::Data { len, .. } => len,
            Stage::Secure | Stage::Done => 0,
        }
    }

    /// Takes the bytes that were wanted and returns what is to be sent.
    ///
    /// # Errors
    ///
    /// When the server refuses or makes no sense; the connection is of no use then.
    ///
    /// # Panics
    ///
    /// When `bytes` are not as many as were wanted.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Vec<u8>, HandshakeError> {
        assert_eq!(bytes.len(), self.wants(), "the handshake was fed too much");
        match self.stage {
            Stage::Greeting => self.greeted(bytes),
            Stage::Reply => self.reply(bytes),
            Stage::Data { kind, .. } => {
                self.stage = Stage::Reply;
                self.data(kind, bytes)
            }
            Stage::Secure | Stage::Done => Ok(Vec::new()),
        }
    }

    /// The export, when the handshake is over.
    #[must_use]
    pub fn export(&self) -> Option<Export> {
        let (size_bytes, flags) = self.described.filter(|_| self.stage == Stage::Done)?;
        Some(Export {
            size_bytes,
            flags,
            blocks: self.blocks,
        })
    }

    fn greeted(&mut self, bytes: &[u8]) -> Result<Vec<u8>, HandshakeError> {
        if be64(bytes, 0) != Some(INIT_MAGIC) {
            return Err(HandshakeError::NotNbd);
        }
        let flags = be16(bytes, 16).unwrap_or(0);
        match be64(bytes, 8) {
            Some(OPTION_MAGIC) if flags & FLAG_FIXED_NEWSTYLE != 0 => {}
            Some(OPTION_MAGIC | OLD_STYLE_MAGIC) => return Err(HandshakeError::TooOld),
            _ => return Err(HandshakeError::NotNbd),
        }
        self.stage = Stage::Reply;
        let ours = flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        let mut out = u32::from(ours).to_be_bytes().to_vec();
        if self.tls {
            self.option = OPTION_STARTTLS;
            put_option(&mut out, OPTION_STARTTLS, &[]);
        } else {
            self.put_first(&mut out);
        }
        Ok(out)
    }

    /// The first option about the export.
    fn put_first(&mut self, out: &mut Vec<u8>) {
        match self.ask.take() {
            Some(claim) => {
                self.option = OPTION_CLAIM;
                let data = claim::encode(&self.name, claim.as_ref());
                put_option(out, OPTION_CLAIM, &data);
                self.claimed = claim.is_some();
                self.replies = 0;
            }
            None => self.put_go(out),
        }
    }

    fn put_go(&mut self, out: &mut Vec<u8>) {
        self.option = OPTION_GO;
        self.replies = 0;
        let mut data = Vec::with_capacity(4 + self.name.len() + 4);
        put_string(&mut data, self.name.as_bytes());
        // Who asks for block sizes promises to keep to them.
        data.extend_from_slice(&1_u16.to_be_bytes());
        data.extend_from_slice(&INFO_BLOCK_SIZE.to_be_bytes());
        put_option(out, OPTION_GO, &data);
    }

    fn reply(&mut self, header: &[u8]) -> Result<Vec<u8>, HandshakeError> {
        let nonsense = HandshakeError::Nonsense;
        if be64(header, 0) != Some(OPTION_REPLY_MAGIC) {
            return Err(nonsense("a reply to an option begins wrongly"));
        }
        if be32(header, 8) != Some(self.option) {
            return Err(nonsense("it answers an option that was not sent"));
        }
        self.replies += 1;
        if self.replies > REPLIES_MAX {
            return Err(nonsense("its answer to one option does not end"));
        }
        let kind = be32(header, 12).unwrap_or(0);
        let len =
            be32(header, 16).map_or(usize::MAX, |len| usize::try_from(len).unwrap_or(usize::MAX));
        if len > REPLY_BYTES_MAX {
            return Err(nonsense("a reply to an option is too long"));
        }
        if len == 0 {
            return self.data(kind, &[]);
        }
        self.stage = Stage::Data { kind, len };
        Ok(Vec::new())
    }

    /// A whole reply.
    fn data(&mut self, kind: u32, data: &[u8]) -> Result<Vec<u8>, HandshakeError> {
        let nonsense = HandshakeError::Nonsense;
        if self.is_about_sums() {
            return self.of_sums(kind, data);
        }
        let of_claim = self.option == OPTION_CLAIM;
        if self.option == OPTION_STARTTLS {
            return match kind {
                REP_ACK => {
                    self.stage = Stage::Secure;
                    Ok(Vec::new())
                }
                error if error & REP_ERROR_BIT != 0 => Err(HandshakeError::NoTls(Words::of(data))),
                _ => Err(nonsense(
                    "it answers with a kind of reply that does not fit",
                )),
            };
        }
        match kind {
            REP_ACK if of_claim && self.fence.is_none() => {
                return Err(nonsense("it grants a claim and does not say who it is"));
            }
            REP_ACK if !of_claim && self.described.is_none() => {
                return Err(nonsense("it does not say how large the export is"));
            }
            REP_ACK if of_claim => return Ok(self.go()),
            REP_ACK => self.stage = Stage::Done,
            REP_INFO if of_claim => self.fence = Some(fence(data)?),
            REP_INFO => self.information(data)?,
            // Whatever else is wrong with a server that knows no claims, GO brings it to light.
            error if error & REP_ERROR_BIT != 0 && of_claim => {
                if self.claimed {
                    let words = Words::of(data);
                    return Err(match error {
                        REP_ERR_IN_USE => HandshakeError::InUse(words),
                        _ => HandshakeError::ClaimRefused(words),
                    });
                }
                self.fence = None;
                return Ok(self.go());
            }
            error if error & REP_ERROR_BIT != 0 => return Err(refusal(error, Words::of(data))),
            _ => {
                return Err(nonsense(
                    "it answers with a kind of reply that does not fit",
                ));
            }
        }
        Ok(Vec::new())
    }

    /// The claim has been dealt with.
    fn go(&mut self) -> Vec<u8> {
        if self.sums == sums::Sums::Wanted {
            return self.ask_for_sums();
        }
        let mut out = Vec::new();
        self.put_go(&mut out);
        out
    }

    fn information(&mut self, data: &[u8]) -> Result<(), HandshakeError> {
        let wrong = HandshakeError::Nonsense("what it says of the export has a wrong length");
        match be16(data, 0).ok_or(wrong.clone())? {
            INFO_EXPORT => {
                let (Some(size), Some(flags), 12) = (be64(data, 2), be16(data, 10), data.len())
                else {
                    return Err(wrong);
                };
                self.described = Some((size, flags));
            }
            INFO_BLOCK_SIZE => {
                let at = |at| be32(data, at).filter(|_| data.len() == 14);
                let (Some(minimum), Some(preferred), Some(maximum)) = (at(2), at(6), at(10)) else {
                    return Err(wrong);
                };
                let blocks = BlockSizes {
                    minimum,
                    preferred,
                    maximum,
                };
                if !blocks.are_legal() {
                    return Err(HandshakeError::Nonsense("its block sizes make no sense"));
                }
                self.blocks = blocks;
            }
            // Whatever else a server wants to say: names, descriptions.
            _ => {}
        }
        Ok(())
    }
}

fn put_option(out: &mut Vec<u8>, option: u32, data: &[u8]) {
    out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    put_string(out, data);
}

/// The information in the answer to a claim.
fn fence(data: &[u8]) -> Result<Fence, HandshakeError> {
    let wrong = HandshakeError::Nonsense("what it says of its instance has a wrong form");
    let (kind, fence) = data.split_at_checked(2).ok_or(wrong.clone())?;
    match (be16(kind, 0), fence.try_into()) {
        (Some(INFO_FENCE), Ok(fence)) => Ok(Fence::decode(fence)),
        _ => Err(wrong),
    }
}

fn refusal(code: u32, words: Words) -> HandshakeError {
    match code {
        REP_ERR_UNKNOWN => HandshakeError::UnknownExport(words),
        REP_ERR_TLS_REQD => HandshakeError::TlsRequired(words),
        REP_ERR_POLICY => HandshakeError::Forbidden(words),
        REP_ERR_SHUTDOWN => HandshakeError::ShuttingDown(words),
        // Who does not know GO is from before 2017.
        REP_ERR_UNSUP => HandshakeError::TooOld,
        _ => HandshakeError::Refused { code, words },
    }
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
