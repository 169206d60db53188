//! Claims: how a client asks our export server to be its one writer, and what decides that (R13).
//!
//! A session with an export of ours may read and not write, until it has claimed the export. The
//! server grants a claim only when no older session can reach the disk any more: that is what
//! `fenced` means. Whom it lets in is decided here, by the epochs of R10 and nothing else.
//!
//! # On the wire
//!
//! A client sends an option of its own, [`OPTION_CLAIM`](crate::wire::OPTION_CLAIM), before GO. Fixed newstyle has every
//! server answer an option that it does not know with "unsupported" and go on: a session with
//! such a server is what it always was. (A metadata context would be the protocol's other way. It
//! may only be set once structured replies are agreed on, which changes how every read is
//! answered, by stock servers as well.) The option's data, all numbers big-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 4 | length of the export's name |
//! | | the name |
//! | 1 | 0: only asks whether there are claims here; 1: claims, and the rest follows |
//! | 1 | bit 0: take over, also from a session that lives; bit 1: resume; not both |
//! | 16 | owner: random, the same in all claims of one process for one address |
//! | 8 | when it resumes: the turn |
//! | 1 | what the claimant has seen on the disk, 0: no superblock; 1: one, and the rest follows |
//! | 16 | its mirror |
//! | 16 | its epoch |
//! | 1 | number of earlier epochs, at most [`HISTORY_MAX`] |
//! | 16 each | earlier epochs, newest first |
//!
//! The answer to both kinds is an information ([`INFO_FENCE`](crate::wire::INFO_FENCE)) and an
//! acknowledgement; or an error with a sentence. One error is of our own
//! ([`REP_ERR_IN_USE`](crate::wire::REP_ERR_IN_USE)): another session, which lives, may write.
//! Trying again may help then, because the server may not have noticed yet that it is a dead
//! daemon's. The information:
//!
//! | bytes | what |
//! |---|---|
//! | 2 | its kind |
//! | 16 | the server's instance, random at each of its starts: by it a client knows whether the disk's cache has lived on (R14) |
//! | 8 | the turn: grows whenever the right to write is granted, except to a claim that resumes, and whenever a flush of the disk fails |
//! | 1 | bit 0: it keeps barriers ([`mirror::order`]); the others are 0, and ignored |
//!
//! A claim that resumes is granted to the owner of the present turn, if it names that turn, and to
//! nobody else; it cuts nobody before that is known. Who is granted it, by the same instance, knows
//! that nobody else has written, and that whatever it was answered is still what a flush will make
//! durable: it may go on in the new session where the old one broke off, asking again for all that
//! was not answered (R13). What it has seen on the disk then does not matter: its own last requests
//! may have changed that.
//!
//! # Who is let in
//!
//! The server reads the disk's superblock itself, and once more after the older session has been
//! drained, because its last requests may have changed it:
//!
//! | on the disk | claim | verdict |
//! |---|---|---|
//! | no superblock, or none that can be decoded | any | granted: nothing to be older than |
//! | one of a format that is not known here | any | refused |
//! | one | has seen none, or another mirror's | refused: somebody was quicker |
//! | epoch E | E, or E is in its history | granted |
//! | epoch E | an epoch of E's history | refused: older |
//! | epoch E | neither | refused: split brain |
//!
//! A session that lives is cut for a claim of the same owner, or one that says to take over. For
//! any other the answer is that the export is in use: a start by mistake, on a second host, must
//! not cost the first one its member. To say to take over is the operator's, in an option of its
//! own (`--take-over`): whether the other host may lose its member no epoch can tell.
//!
//! A client without a claim, where such a one may write at all, is refused while the disk holds a
//! superblock, or one of a format that is not known here.
//!
//! # Why two hosts never write at once
//!
//! 1. There is one writer. A claim is granted only after the session before it has been cut and
//!    all its requests that change the disk have ended; no request of a cut session starts.
//! 2. What a host relies on it reads after its claim has been granted, and by that its engine
//!    decides whether it may use the disk (R10). What it read before serves only to be compared:
//!    a client looks, claims what it has just seen, and reads anew. So the server's verdict
//!    catches what was written between the look and the claim, and the last writes of the session
//!    before; a host that is out of date as a whole is caught by its own engine, because it claims
//!    the epoch that it finds, whatever its own is.
//! 3. A host whose session was cut has lost the member, and answers no write that the member
//!    missed until that loss is durable on the others (R2), under a new epoch.
//!
//! So with an old host A, at epoch 1 on the disk, and a new host B that is started by force:
//!
//! | A | B | then |
//! |---|---|---|
//! | writes in flight | claims 1, take over | they end or never begin; then B reads and writes |
//! | loses the disk: epoch 2 on its others | writes epoch 3 | A connects again, sees 3 and claims it: in use while B's session lives; then granted, and A's engine reads 3, which it does not know: split brain, refused |
//! | has looked, at epoch 1, and claims it | has written epoch 3 since the look | 1 is in the disk's history: refused |
//! | notices nothing | granted, has written epoch 3 | A's session is cut: its next request fails, and it is as in the second row |
//! | claims 1 again, take over | granted, nothing written yet | A has it back; B's first write fails, and B has not started |
//! | claims again, take over | lives, has written epoch 3 | B loses the disk, A's engine refuses it: nobody has it, and nobody wrote over anything |
//! | is writing epoch 2 to this disk | claims 1, take over | the write ends before the second look: 1 is older, B is refused; A has lost a session and no data |
//! | is writing epoch 2 to this disk, never gets it there | claims 1, take over | granted; A's round begins anew without this disk |
//!
//! A claim names what its host has read from this very disk, not the newest epoch it knows from
//! the others: whether an epoch whose round was cut off counts (R10) takes evidence that only
//! assembly has. It judges the disk after the claim, as it judges every other member.

use mirror::superblock::{HISTORY_MAX, Loaded, Superblock, SuperblockError};

use crate::wire::{be32, put_string};

/// What a claimant has seen on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The mirror's uuid.
    pub mirror: [u8; 16],
    /// The superblock's epoch.
    pub epoch: u128,
    /// Earlier epochs, newest first; at most [`HISTORY_MAX`].
    pub history: Vec<u128>,
}

impl Seen {
    /// What two copies of a superblock say; none when they say nothing.
    #[must_use]
    pub fn on(copy_a: &[u8], copy_b: &[u8]) -> Option<Self> {
        let Loaded { superblock, .. } = Superblock::load(copy_a, copy_b).ok()?;
        Some(Self {
            mirror: superblock.mirror.into_bytes(),
            epoch: superblock.epoch.id,
            history: superblock.history.iter().map(|past| past.id).collect(),
        })
    }
}

/// Length of a [`Fence`] in bytes.
pub const FENCE_BYTES: usize = 25;

/// What a server that knows claims says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fence {
    /// Random at each of its starts.
    pub instance: u128,
    /// Grows whenever the right to write is granted, except to a claim that resumes, and whenever a
    /// flush of the disk fails.
    pub turn: u64,
    /// It keeps barriers ([`mirror::order`]).
    pub keeps_order: bool,
}

impl Fence {
    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; FENCE_BYTES] {
        let mut out = [0; FENCE_BYTES];
        out[..16].copy_from_slice(&self.instance.to_be_bytes());
        out[16..24].copy_from_slice(&self.turn.to_be_bytes());
        out[24] = u8::from(self.keeps_order);
        out
    }

    /// The fence of these bytes; all bytes are one.
    #[must_use]
    pub fn decode(bytes: &[u8; FENCE_BYTES]) -> Self {
        Self {
            instance: u128::from_be_bytes(std::array::from_fn(|at| bytes[at])),
            turn: u64::from_be_bytes(std::array::from_fn(|at| bytes[16 + at])),
            keeps_order: bytes[24] & 1 != 0,
        }
    }
}

/// A claim to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The process that claims; its older sessions are superseded without more ado.
    pub owner: u128,
    /// Also from another owner's session that lives.
    pub take_over: bool,
    /// The turn that it resumes; not together with `take_over`.
    pub resumes: Option<u64>,
    /// What the claimant has seen on the disk.
    pub seen: Option<Seen>,
}

/// The data of the option: a claim for the export of this name, or only the question whether
/// there are claims.
#[must_use]
pub fn encode(name: &str, claim: Option<&Claim>) -> Vec<u8> {
    let mut out = Vec::new();
    put_string(&mut out, name.as_bytes());
    let Some(claim) = claim else {
        out.push(0);
        return out;
    };
    let flags = u8::from(claim.take_over) | u8::from(claim.resumes.is_some()) << 1;
    out.extend_from_slice(&[1, flags]);
    out.extend_from_slice(&claim.owner.to_be_bytes());
    if let Some(turn) = claim.resumes {
        out.extend_from_slice(&turn.to_be_bytes());
    }
    let Some(seen) = &claim.seen else {
        out.push(0);
        return out;
    };
    let history = &seen.history[..seen.history.len().min(HISTORY_MAX)];
    out.push(1);
    out.extend_from_slice(&seen.mirror);
    out.extend_from_slice(&seen.epoch.to_be_bytes());
    out.push(u8::try_from(history.len()).unwrap_or(0));
    for epoch in history {
        out.extend_from_slice(&epoch.to_be_bytes());
    }
    out
}

/// Takes the option's data apart, in at most [`HISTORY_MAX`] epochs of memory: the export's name,
/// and the claim unless it was only a question. None when the data make no sense.
#[must_use]
pub fn decode(data: &[u8]) -> Option<(&[u8], Option<Claim>)> {
    let len = usize::try_from(be32(data, 0)?).ok()?;
    let (name, mut rest) = data.get(4..)?.split_at_checked(len)?;
    let rest = &mut rest;
    let claim = if flag(rest)? {
        let [flags] = bytes(rest)?;
        if flags > 2 {
            return None;
        }
        Some(Claim {
            take_over: flags == 1,
            owner: u128::from_be_bytes(bytes(rest)?),
            resumes: match flags {
                2 => Some(u64::from_be_bytes(bytes(rest)?)),
                _ => None,
            },
            seen: if flag(rest)? { Some(seen(rest)?) } else { None },
        })
    } else {
        None
    };
    rest.is_empty().then_some((name, claim))
}

fn seen(rest: &mut &[u8]) -> Option<Seen> {
    let mirror = bytes(rest)?;
    let epoch = u128::from_be_bytes(bytes(rest)?);
    let [count] = bytes(rest)?;
    let count = usize::from(count);
    if count > HISTORY_MAX || rest.len() != count * 16 {
        return None;
    }
    let mut history = Vec::with_capacity(count);
    for _ in 0..count {
        history.push(u128::from_be_bytes(bytes(rest)?));
    }
    Some(Seen {
        mirror,
        epoch,
        history,
    })
}

fn bytes<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, left) = rest.split_first_chunk()?;
    *rest = left;
    Some(*taken)
}

fn flag(rest: &mut &[u8]) -> Option<bool> {
    match bytes(rest)? {
        [0] => Some(false),
        [1] => Some(true),
        _ => None,
    }
}

/// Why a claim is refused by what is on the disk; a sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A member is there that the claimant has not seen.
    #[error("a member of mirror '{0}' has come to be on this disk meanwhile; look again")]
    Unseen(String),
    /// Another mirror's member.
    #[error("this disk has become a member of another mirror, '{0}'; look again")]
    OtherMirror(String),
    /// The disk is ahead.
    #[error(
        "this disk has gone on to epoch {disk} and the claim is for {claimed}, which is older: \
         another host has taken it over"
    )]
    Older {
        /// First digits of the disk's epoch.
        disk: String,
        /// First digits of the claimed one.
        claimed: String,
    },
    /// Neither is the other's ancestor.
    #[error(
        "split brain: this disk is at epoch {disk} and the claim is for {claimed}, and neither \
         comes from the other"
    )]
    Diverged {
        /// First digits of the disk's epoch.
        disk: String,
        /// First digits of the claimed one.
        claimed: String,
    },
    /// A client that knows no claims wants to write to a member.
    #[error(
        "this disk is a member of mirror '{0}', and only its daemon writes to it; destroy the \
         member first if it is not needed any more"
    )]
    Unclaimed(String),
    /// Written by a newer version.
    #[error("the superblock on this disk needs a newer ublk-mirror at the server ({0})")]
    TooNew(&'static str),
}

/// Decides about a claim by the copies of the superblock that are on the disk.
///
/// # Errors
///
/// Why it is refused.
pub fn judge(claim: &Claim, copy_a: &[u8], copy_b: &[u8]) -> Result<(), Refusal> {
    let disk = match Superblock::load(copy_a, copy_b) {
        Ok(Loaded { superblock, .. }) => superblock,
        Err(SuperblockError::NotAMember | SuperblockError::Damaged(_)) => return Ok(()),
        Err(SuperblockError::TooNew(why)) => return Err(Refusal::TooNew(why)),
    };
    let Some(seen) = &claim.seen else {
        return Err(Refusal::Unseen(disk.name));
    };
    if seen.mirror != disk.mirror.into_bytes() {
        return Err(Refusal::OtherMirror(disk.name));
    }
    if seen.epoch == disk.epoch.id || seen.history.contains(&disk.epoch.id) {
        return Ok(());
    }
    let (older, claimed) = (disk.descends_from(seen.epoch), short(seen.epoch));
    let disk = short(disk.epoch.id);
    Err(if older {
        Refusal::Older { disk, claimed }
    } else {
        Refusal::Diverged { disk, claimed }
    })
}

/// Decides about a client that writes without a claim.
///
/// # Errors
///
/// When the disk is a member of a mirror.
pub fn judge_unclaimed(copy_a: &[u8], copy_b: &[u8]) -> Result<(), Refusal> {
    match Superblock::load(copy_a, copy_b) {
        Ok(Loaded { superblock, .. }) => Err(Refusal::Unclaimed(superblock.name)),
        Err(SuperblockError::NotAMember | SuperblockError::Damaged(_)) => Ok(()),
        Err(SuperblockError::TooNew(why)) => Err(Refusal::TooNew(why)),
    }
}

fn short(epoch: u128) -> String {
    format!("{epoch:032x}")[..8].to_owned()
}

#[cfg(test)]
#[path = "claim_tests.rs"]
pub(crate) mod tests;
