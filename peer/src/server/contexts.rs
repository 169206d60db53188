//! Structured replies and the one metadata context of our export server, which has checksums of
//! blocks: the options that agree on them, and which requests may ask for them.
//!
//! ```text
//! nothing ──STRUCTURED_REPLY──► structured ──SET_META_CONTEXT that names it──► sums
//!                                    ▲                                          │
//!                                    └─────── SET_META_CONTEXT that does not ◄──┘
//! ```
//!
//! Byte tables are in [`crate::wire`].

use super::{Command, EINVAL, Export, NO_SUCH_EXPORT, Request, option_reply};
use crate::structured::Head;
use crate::wire::{
    CONTEXT_ID_SUMS, CONTEXT_NAMESPACE, CONTEXT_SUMS, OPTION_LIST_META_CONTEXT,
    OPTION_SET_META_CONTEXT, OPTION_STRUCTURED_REPLY, REP_ACK, REP_ERR_INVALID, REP_ERR_UNKNOWN,
    REP_META_CONTEXT, SUM_BLOCK_BYTES, SUMS_MAX, be32,
};

/// What a client and the server have agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    /// Replies to READ and BLOCK_STATUS are structured.
    pub structured: bool,
    /// BLOCK_STATUS gives checksums.
    pub sums: bool,
}

impl Agreed {
    /// Answers one of the options that this is about by appending to `reply`; false for others.
    pub(super) fn answer(
        &mut self,
        option: u32,
        data: &[u8],
        export: &Export,
        reply: &mut Vec<u8>,
    ) -> bool {
        let invalid = |reply: &mut Vec<u8>, why: &[u8]| {
            option_reply(reply, option, REP_ERR_INVALID, why);
        };
        match option {
            OPTION_STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                option_reply(reply, option, REP_ACK, &[]);
            }
            OPTION_STRUCTURED_REPLY => invalid(reply, b"STRUCTURED_REPLY takes no data"),
            OPTION_LIST_META_CONTEXT | OPTION_SET_META_CONTEXT => {
                let sets = option == OPTION_SET_META_CONTEXT;
                let Some(asked) = Asked::decode(data, sets) else {
                    invalid(reply, b"the option's lengths do not fit");
                    return true;
                };
                if !self.structured {
                    invalid(reply, b"agree on structured replies first");
                } else if export.answers_to(asked.name) {
                    if sets {
                        self.sums = asked.sums;
                    }
                    if asked.sums {
                        let id = if sets { CONTEXT_ID_SUMS } else { 0 };
                        let context = [&id.to_be_bytes(), CONTEXT_SUMS.as_bytes()].concat();
                        option_reply(reply, option, REP_META_CONTEXT, &context);
                    }
                    option_reply(reply, option, REP_ACK, &[]);
                } else {
                    option_reply(reply, option, REP_ERR_UNKNOWN, NO_SUCH_EXPORT);
                }
            }
            _ => return false,
        }
        true
    }

    /// Bytes whose checksums a request is answered with, or the error that it is answered with
    /// without looking at them.
    ///
    /// # Errors
    ///
    /// When there is nothing that it could be answered with.
    pub fn sums_of(self, request: &Request, one: bool, export: &Export) -> Result<u32, u32> {
        let end = request.offset.checked_add(u64::from(request.len));
        let block = SUM_BLOCK_BYTES;
        let most = if one { block } else { block * SUMS_MAX };
        let len = (request.len - request.len % block).min(most);
        let legal = self.sums
            && end.is_some_and(|end| end <= export.size_bytes)
            && request.offset.is_multiple_of(u64::from(block));
        if legal && len > 0 {
            Ok(len)
        } else {
            Err(EINVAL)
        }
    }

    /// What the reply to a request begins with, of whose data `data_bytes` follow.
    #[must_use]
    pub fn head(self, request: &Request, error: u32, data_bytes: u32) -> Head {
        let cookie = request.cookie;
        match request.command {
            Command::Read | Command::BlockStatus { .. } | Command::Invalid if !self.structured => {}
            // One of these two, with a flag that nobody agreed on.
            Command::Invalid if error != 0 => return Head::of_error(cookie, error),
            Command::Read | Command::BlockStatus { .. } if error != 0 => {
                return Head::of_error(cookie, error);
            }
            Command::Read => return Head::of_data(cookie, request.offset, data_bytes),
            Command::BlockStatus { .. } => return Head::of_sums(cookie, data_bytes),
            _ => {}
        }
        Head::simple(super::reply_header(cookie, error))
    }
}

/// Answers an option about structured replies or metadata contexts, if it is one and they are known.
pub(super) fn answer_context(
    option: u32,
    data: Option<&[u8]>,
    desk: &mut impl super::Desk,
    reply: &mut Vec<u8>,
) -> bool {
    let Some(mut agreed) = desk.agreed().copied() else {
        return false;
    };
    let answered = data.is_some_and(|data| agreed.answer(option, data, desk.export(), reply));
    if let Some(known) = desk.agreed() {
        *known = agreed;
    }
    answered
}

/// What LIST and SET ask for.
struct Asked<'a> {
    name: &'a [u8],
    /// The context with checksums is among it.
    sums: bool,
}

impl<'a> Asked<'a> {
    /// None when the lengths do not agree. LIST without a query, or with a namespace alone, asks
    /// for all that there is.
    fn decode(data: &'a [u8], sets: bool) -> Option<Self> {
        let (name, mut rest) = string(data)?;
        let count = be32(rest, 0)?;
        rest = &rest[4..];
        let mut sums = count == 0 && !sets;
        // Each takes four bytes at least.
        for _ in 0..count {
            let (query, after) = string(rest)?;
            rest = after;
            sums |= query == CONTEXT_SUMS.as_bytes();
            sums |= !sets && query == CONTEXT_NAMESPACE.as_bytes();
        }
        rest.is_empty().then_some(Self { name, sums })
    }
}

/// A string, and what follows it.
fn string(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let len = usize::try_from(be32(bytes, 0)?).ok()?;
    bytes[4..].split_at_checked(len)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::server::{EVERYTHING, MAX_PAYLOAD_BYTES, REQUEST_BYTES, request};
    use crate::wire::{REQUEST_MAGIC, put_string};
    use proptest::prelude::*;

    fn export() -> Export {
        Export {
            name: "m".to_owned(),
            size_bytes: 8 << 20,
            block_bytes: 512,
            payload_bytes_max: MAX_PAYLOAD_BYTES,
            flags: EVERYTHING,
        }
    }

    fn query(name: &str, queries: &[&str]) -> Vec<u8> {
        let mut data = Vec::new();
        put_string(&mut data, name.as_bytes());
        data.extend(u32::try_from(queries.len()).unwrap().to_be_bytes());
        for query in queries {
            put_string(&mut data, query.as_bytes());
        }
        data
    }

    /// The kinds of replies, and the data of the first one.
    fn answer(agreed: &mut Agreed, option: u32, data: &[u8]) -> (Vec<u32>, Vec<u8>) {
        let mut reply = Vec::new();
        assert!(agreed.answer(option, data, &export(), &mut reply));
        let (mut kinds, mut first, mut rest) = (Vec::new(), None, &reply[..]);
        while !rest.is_empty() {
            assert_eq!(be32(rest, 8), Some(option));
            let len = be32(rest, 16).unwrap() as usize;
            kinds.push(be32(rest, 12).unwrap());
            first.get_or_insert(rest[20..20 + len].to_vec());
            rest = &rest[20 + len..];
        }
        (kinds, first.unwrap())
    }

    #[test]
    fn contexts_are_agreed_on_as_the_protocol_says() {
        let mut agreed = Agreed::default();
        let sums = query("m", &["base:allocation", CONTEXT_SUMS]);
        let early = answer(&mut agreed, OPTION_SET_META_CONTEXT, &sums);
        assert_eq!(early.0, [REP_ERR_INVALID]);
        assert_eq!(
            answer(&mut agreed, OPTION_STRUCTURED_REPLY, b"x").0,
            [REP_ERR_INVALID]
        );
        assert_eq!(agreed, Agreed::default());
        assert_eq!(
            answer(&mut agreed, OPTION_STRUCTURED_REPLY, b"").0,
            [REP_ACK]
        );
        for listed in [&[][..], &[CONTEXT_NAMESPACE], &[CONTEXT_SUMS]] {
            let listed = query("", listed);
            let (kinds, first) = answer(&mut agreed, OPTION_LIST_META_CONTEXT, &listed);
            assert_eq!(kinds, [REP_META_CONTEXT, REP_ACK]);
            assert_eq!(first[4..], *CONTEXT_SUMS.as_bytes());
            assert!(!agreed.sums, "a list changes nothing");
        }
        let (kinds, first) = answer(&mut agreed, OPTION_SET_META_CONTEXT, &sums);
        assert_eq!(kinds, [REP_META_CONTEXT, REP_ACK]);
        assert_eq!(first, b"\0\0\0\x01x-ublk-mirror:crc32");
        assert!(agreed.structured && agreed.sums);
        for (data, kind) in [
            (query("other", &[CONTEXT_SUMS]), REP_ERR_UNKNOWN),
            (sums[..sums.len() - 1].to_vec(), REP_ERR_INVALID),
            ([&sums[..], b"x"].concat(), REP_ERR_INVALID),
        ] {
            let (kinds, _) = answer(&mut agreed, OPTION_SET_META_CONTEXT, &data);
            assert_eq!(kinds, [kind]);
            assert!(agreed.sums, "a refusal changes nothing");
        }
        let other = query("m", &["base:allocation", CONTEXT_NAMESPACE]);
        assert_eq!(
            answer(&mut agreed, OPTION_SET_META_CONTEXT, &other).0,
            [REP_ACK]
        );
        assert!(agreed.structured && !agreed.sums);
    }

    fn status(flags: u16, offset: u64, len: u32) -> Request {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&7_u16.to_be_bytes());
        bytes[16..24].copy_from_slice(&offset.to_be_bytes());
        bytes[24..].copy_from_slice(&len.to_be_bytes());
        request(&bytes).unwrap()
    }

    #[test]
    fn the_whole_blocks_of_a_request_are_answered_up_to_a_limit() {
        let agreed = Agreed {
            structured: true,
            sums: true,
        };
        let asked = |flags, offset, len| {
            let request = status(flags, offset, len);
            let Command::BlockStatus { one } = request.command else {
                return Err(EINVAL);
            };
            agreed.sums_of(&request, one, &export())
        };
        for (flags, offset, len, want) in [
            (0, 0, 4096, Ok(4096)),
            (0, 4096, 8192 + 512, Ok(8192)),
            (0, 0, 8 << 20, Ok(4 << 20)),
            (8, 4096, 1 << 20, Ok(4096)),
            (0, 0, 0, Err(EINVAL)),
            (0, 0, 4095, Err(EINVAL)),
            (0, 512, 4096, Err(EINVAL)),
            (0, 4096, 8 << 20, Err(EINVAL)),
            (0, u64::MAX - 4095, 4096, Err(EINVAL)),
            (16, 0, 4096, Err(EINVAL)),
        ] {
            assert_eq!(asked(flags, offset, len), want, "{flags} {offset} {len}");
        }
        let request = status(0, 0, 4096);
        let none = Agreed::default();
        assert_eq!(none.sums_of(&request, false, &export()), Err(EINVAL));
        let simple = super::super::reply_header(0, EINVAL);
        assert_eq!(none.head(&request, EINVAL, 0), Head::simple(simple));
    }

    proptest! {
        #[test]
        fn any_data_is_answered(data in prop::collection::vec(any::<u8>(), 0..80), structured: bool) {
            for option in [8, 9, 10] {
                let mut agreed = Agreed { structured, sums: false };
                let (kinds, _) = answer(&mut agreed, option, &data);
                let last = *kinds.last().unwrap();
                prop_assert!(last == REP_ACK || last >> 31 == 1);
            }
        }
    }
}
