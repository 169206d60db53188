//! Requests and their replies, matched by cookie, without any I/O.
//!
//! A [`Session`] knows what it has asked and what has been answered. A cookie is the number of a
//! place in its table and how often that place has been used, so that a second answer to an old
//! request is never taken for the answer to a new one:
//!
//! | bits | what |
//! |---|---|
//! | 0 to 31 | place |
//! | 32 to 63 | generation of the place |
//!
//! Memory: one place for each request that was outstanding at the busiest moment. Decoding a
//! reply takes none. Byte tables are in [`crate::wire`].

use crate::wire::{
    COMMAND_FLAG_BARRIER, COMMAND_FLAG_BEHIND, COMMAND_FLAG_FIRST, COMMAND_FLAG_FUA, REPLY_BYTES,
    REQUEST_BYTES, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, be32, be64,
};

/// Where a request stands among the barriers of its session ([`mirror::order`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rank {
    /// It has nothing to do with them.
    #[default]
    Any,
    /// It is one.
    Barrier {
        /// It begins a group.
        first: bool,
    },
    /// It is behind those before it.
    Behind,
}

impl Rank {
    /// The flags of a request that say it.
    #[must_use]
    pub fn flags(self) -> u16 {
        match self {
            Self::Any => 0,
            Self::Barrier { first: false } => COMMAND_FLAG_BARRIER,
            Self::Barrier { first: true } => COMMAND_FLAG_BARRIER | COMMAND_FLAG_FIRST,
            Self::Behind => COMMAND_FLAG_BEHIND,
        }
    }

    /// What the flags of a request say, whose command is a write or changes otherwise.
    pub(crate) fn of(flags: u16, writes: bool, changes: bool) -> Self {
        const BARRIER: u16 = COMMAND_FLAG_BARRIER | COMMAND_FLAG_FUA;
        if writes && flags & BARRIER == BARRIER {
            let first = flags & COMMAND_FLAG_FIRST != 0;
            Self::Barrier { first }
        } else if changes && flags & COMMAND_FLAG_BEHIND != 0 {
            Self::Behind
        } else {
            Self::Any
        }
    }
}

/// What is asked of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Data follow the reply.
    Read,
    /// Data follow the request.
    Write,
    /// Make durable what has been answered.
    Flush,
    /// Discard.
    Trim,
    /// Write zeroes; may leave a hole.
    WriteZeroes,
    /// Checksums of blocks; the reply is a structured one.
    Sums,
}

impl Kind {
    /// Whether it changes what the export holds.
    #[must_use]
    pub fn changes(self) -> bool {
        matches!(self, Self::Write | Self::Trim | Self::WriteZeroes)
    }

    fn number(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::WriteZeroes => 6,
            Self::Sums => 7,
        }
    }
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// What to do.
    pub kind: Kind,
    /// Durable before the reply; only where the server offers it.
    pub fua: bool,
    /// Its place among barriers; only where the server keeps order.
    pub rank: Rank,
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub len: u32,
}

impl Ask {
    /// A flush.
    pub const FLUSH: Self = Self {
        kind: Kind::Flush,
        fua: false,
        rank: Rank::Any,
        offset: 0,
        len: 0,
    };

    /// The header under a cookie.
    #[must_use]
    pub fn header(&self, cookie: u64) -> [u8; REQUEST_BYTES] {
        let fua = if self.fua { COMMAND_FLAG_FUA } else { 0 };
        let flags = fua | self.rank.flags();
        header(flags, self.kind.number(), cookie, self.offset, self.len)
    }
}

fn header(flags: u16, kind: u16, cookie: u64, offset: u64, len: u32) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// The last message of a client that has nothing outstanding; it has no reply.
#[must_use]
pub fn farewell() -> [u8; REQUEST_BYTES] {
    header(0, 2, 0, 0, 0)
}

/// What ends a connection; a part of a sentence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// The stream is out of step, or it is no NBD server.
    #[error("its server sent {0:#x} where a reply begins with 0x67446698")]
    Magic(u32),
    /// A reply to nothing, or the second one to a request.
    #[error("its server answered a request that is not outstanding (cookie {0:#x})")]
    NotOutstanding(u64),
}

/// A reply with what was remembered for its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer<T> {
    /// What was given to [`Session::ask`].
    pub token: T,
    /// Bytes of data that follow the reply.
    pub data_bytes: u32,
    /// The server's error, as a Linux error number; never 0.
    pub error: Option<i32>,
}

#[derive(Clone, Debug)]
struct Place<T> {
    generation: u32,
    /// Length of the data that will come, and what was remembered.
    asked: Option<(u32, T)>,
}

/// What is outstanding on one connection; `T` is remembered for each request.
#[derive(Clone, Debug)]
pub struct Session<T> {
    places: Vec<Place<T>>,
    free: Vec<u32>,
}

impl<T> Default for Session<T> {
    fn default() -> Self {
        Self {
            places: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T> Session<T> {
    /// The header to send for a request; `token` comes back with its reply.
    ///
    /// # Panics
    ///
    /// With four thousand million requests outstanding.
    pub fn ask(&mut self, ask: &Ask, token: T) -> [u8; REQUEST_BYTES] {
        let data = if ask.kind == Kind::Read { ask.len } else { 0 };
        let number = self.free.pop().unwrap_or_else(|| {
            let Ok(number) = u32::try_from(self.places.len()) else {
                panic!("four thousand million requests at once")
            };
            self.places.push(Place {
                generation: 0,
                asked: None,
            });
            // Room for all of them, so that taking a reply needs no memory.
            self.free.reserve(self.places.len());
            number
        });
        let place = &mut self.places[number as usize];
        place.generation = place.generation.wrapping_add(1);
        place.asked = Some((data, token));
        ask.header(u64::from(place.generation) << 32 | u64::from(number))
    }

    /// Takes a reply's header.
    ///
    /// # Errors
    ///
    /// When it is none or answers nothing that is outstanding: nothing that follows on this
    /// connection can be understood.
    pub fn answered(&mut self, header: &[u8; REPLY_BYTES]) -> Result<Answer<T>, ProtocolError> {
        let magic = be32(header, 0).unwrap_or(0);
        if magic != SIMPLE_REPLY_MAGIC {
            return Err(ProtocolError::Magic(magic));
        }
        let cookie = be64(header, 8).unwrap_or(0);
        let (data, token) = self
            .take(cookie)
            .ok_or(ProtocolError::NotOutstanding(cookie))?;
        let error = be32(header, 4).filter(|code| *code != 0).map(errno);
        let data_bytes = if error.is_none() { data } else { 0 };
        Ok(Answer {
            token,
            data_bytes,
            error,
        })
    }

    /// Takes a request by its cookie: how many bytes of data it has asked for, and what was
    /// remembered; none when it is not outstanding.
    pub fn take(&mut self, cookie: u64) -> Option<(u32, T)> {
        let number = u32::try_from(cookie & u64::from(u32::MAX)).ok()?;
        let place = self.places.get_mut(number as usize)?;
        if u64::from(place.generation) != cookie >> 32 {
            return None;
        }
        let asked = place.asked.take()?;
        self.free.push(number);
        Some(asked)
    }

    /// Takes all that is outstanding: the connection has ended, no reply will come.
    pub fn give_up(&mut self) -> impl Iterator<Item = T> {
        self.free.clear();
        let places = std::mem::take(&mut self.places);
        places.into_iter().filter_map(|it| Some(it.asked?.1))
    }

    /// How many requests are outstanding.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.places.len() - self.free.len()
    }
}

/// The protocol's few error numbers are Linux's; whatever else comes is an I/O error.
fn errno(code: u32) -> i32 {
    const EIO: i32 = 5;
    // EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN.
    match i32::try_from(code) {
        Ok(code @ (1 | 5 | 12 | 22 | 28 | 75 | 95 | 108)) => code,
        _ => EIO,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(offset: u64, len: u32) -> Ask {
        Ask {
            kind: Kind::Read,
            fua: false,
            rank: Rank::Any,
            offset,
            len,
        }
    }

    fn reply(cookie: u64, error: u32) -> [u8; REPLY_BYTES] {
        let mut bytes = [0; REPLY_BYTES];
        bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        bytes[4..8].copy_from_slice(&error.to_be_bytes());
        bytes[8..].copy_from_slice(&cookie.to_be_bytes());
        bytes
    }

    fn cookie(header: &[u8; REQUEST_BYTES]) -> u64 {
        be64(header, 8).unwrap()
    }

    #[test]
    fn requests_are_encoded_as_the_protocol_says() {
        let ask = Ask {
            kind: Kind::Write,
            fua: true,
            rank: Rank::Any,
            offset: 0x0102_0304_0506_0708,
            len: 0x1112_1314,
        };
        assert_eq!(
            ask.header(0x2122_2324_2526_2728),
            *b"\x25\x60\x95\x13\0\x01\0\x01\x21\x22\x23\x24\x25\x26\x27\x28\
               \x01\x02\x03\x04\x05\x06\x07\x08\x11\x12\x13\x14"
        );
        let numbers = [Kind::Read, Kind::Flush, Kind::Trim, Kind::WriteZeroes].map(Kind::number);
        assert_eq!(numbers, [0, 3, 4, 6]);
        assert_eq!(farewell()[6..8], [0, 2]);
    }

    #[test]
    fn replies_come_in_any_order_and_once() {
        let mut session = Session::default();
        let first = cookie(&session.ask(&read(0, 512), "first"));
        let second = cookie(&session.ask(&Ask::FLUSH, "second"));
        let answer = session.answered(&reply(second, 0)).unwrap();
        assert_eq!(
            (answer.token, answer.data_bytes, answer.error),
            ("second", 0, None)
        );
        let answer = session.answered(&reply(first, 0)).unwrap();
        assert_eq!((answer.token, answer.data_bytes), ("first", 512));
        for cookie in [first, second, 7, u64::MAX] {
            let again = session.answered(&reply(cookie, 0));
            assert_eq!(again, Err(ProtocolError::NotOutstanding(cookie)));
        }
        // A place used again is another request: a late second answer does not fit it.
        let third = cookie(&session.ask(&Ask::FLUSH, "third"));
        assert_eq!(third & 0xffff_ffff, first & 0xffff_ffff, "the same place");
        let late = session.answered(&reply(first, 0));
        assert_eq!(late, Err(ProtocolError::NotOutstanding(first)));
        assert_eq!(session.outstanding(), 1);
    }

    #[test]
    fn errors_bring_no_data_and_known_numbers_only() {
        let mut session = Session::default();
        for (code, want) in [(5, 5), (28, 28), (95, 95), (4, 5), (u32::MAX, 5)] {
            let asked = cookie(&session.ask(&read(0, 4096), ()));
            let answer = session.answered(&reply(asked, code)).unwrap();
            assert_eq!((answer.error, answer.data_bytes), (Some(want), 0));
        }
    }

    #[test]
    fn another_kind_of_reply_ends_it() {
        let mut session = Session::default();
        let mut header = reply(cookie(&session.ask(&Ask::FLUSH, ())), 0);
        // A structured reply, which was not negotiated.
        header[..4].copy_from_slice(&0x668e_33ef_u32.to_be_bytes());
        assert_eq!(
            session.answered(&header),
            Err(ProtocolError::Magic(0x668e_33ef))
        );
        assert_eq!(session.give_up().count(), 1);
        assert_eq!(session.outstanding(), 0);
    }

    proptest! {
        /// Against a map: asks, answers and nonsense in any order.
        #[test]
        fn a_session_is_a_map_from_cookies(
            steps in prop::collection::vec((0u8..4, any::<prop::sample::Index>(), any::<u64>()), 0..200)
        ) {
            let mut session = Session::default();
            let (mut known, mut over) = (Vec::new(), Vec::new());
            for (number, (action, which, noise)) in (0..).zip(steps) {
                match action {
                    0 | 1 => known.push((cookie(&session.ask(&read(0, number), number)), number)),
                    2 if !known.is_empty() => {
                        let (cookie, number) = known.swap_remove(which.index(known.len()));
                        let answer = session.answered(&reply(cookie, 0));
                        prop_assert_eq!(answer, Ok(Answer { token: number, data_bytes: number, error: None }));
                        over.push(cookie);
                    }
                    _ => {
                        let stale = over.get(which.index(over.len().max(1))).copied();
                        let cookie = stale.unwrap_or(noise);
                        if known.iter().all(|(known, _)| *known != cookie) {
                            prop_assert!(session.answered(&reply(cookie, 0)).is_err());
                        }
                    }
                }
                prop_assert_eq!(session.outstanding(), known.len());
            }
            let mut left: Vec<u32> = session.give_up().collect();
            let mut want: Vec<u32> = known.into_iter().map(|(_, number)| number).collect();
            left.sort_unstable();
            want.sort_unstable();
            prop_assert_eq!(left, want);
        }
    }
}
