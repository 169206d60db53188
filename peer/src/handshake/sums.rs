//! The part of a handshake that asks for checksums of blocks: structured replies and the metadata
//! context, after the question about claims and before GO. Only a server of ours has them.

use super::{Handshake, HandshakeError, put_option};
use crate::wire::{
    CONTEXT_ID_SUMS, CONTEXT_SUMS, OPTION_SET_META_CONTEXT, OPTION_STRUCTURED_REPLY, REP_ACK,
    REP_ERROR_BIT, REP_META_CONTEXT, put_string,
};

/// How far the agreement has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sums {
    /// Not asked for.
    Unwanted,
    /// To be asked for.
    Wanted,
    /// The server has said that it has them.
    Known,
}

impl Handshake {
    /// A handshake that asks who the server is, without a claim, and ends well only with one that
    /// has checksums of blocks. What follows it are structured replies.
    #[must_use]
    pub fn for_sums(name: &str) -> Self {
        Self {
            sums: Sums::Wanted,
            ..Self::asking(name, None)
        }
    }

    /// Asks for structured replies.
    pub(super) fn ask_for_sums(&mut self) -> Vec<u8> {
        self.ask_of_sums(OPTION_STRUCTURED_REPLY, &[])
    }

    fn ask_of_sums(&mut self, option: u32, data: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        self.option = option;
        self.replies = 0;
        put_option(&mut out, option, data);
        out
    }

    /// Whether the reply to come is about checksums.
    pub(super) fn is_about_sums(&self) -> bool {
        matches!(
            self.option,
            OPTION_STRUCTURED_REPLY | OPTION_SET_META_CONTEXT
        )
    }

    /// A whole reply to one of the two options.
    pub(super) fn of_sums(&mut self, kind: u32, data: &[u8]) -> Result<Vec<u8>, HandshakeError> {
        let sets = self.option == OPTION_SET_META_CONTEXT;
        match kind {
            REP_ACK if !sets => {
                let mut query = Vec::new();
                put_string(&mut query, self.name.as_bytes());
                query.extend_from_slice(&1_u32.to_be_bytes());
                put_string(&mut query, CONTEXT_SUMS.as_bytes());
                Ok(self.ask_of_sums(OPTION_SET_META_CONTEXT, &query))
            }
            REP_META_CONTEXT if sets => {
                let (id, name) = data.split_at_checked(4).unwrap_or_default();
                if id != CONTEXT_ID_SUMS.to_be_bytes() || name != CONTEXT_SUMS.as_bytes() {
                    let why = "it answers with a metadata context that was not asked for";
                    return Err(HandshakeError::Nonsense(why));
                }
                self.sums = Sums::Known;
                Ok(Vec::new())
            }
            REP_ACK if self.sums == Sums::Known => Ok(self.go()),
            REP_ACK => Err(HandshakeError::NoSums),
            error if error & REP_ERROR_BIT != 0 => Err(HandshakeError::NoSums),
            _ => Err(HandshakeError::Nonsense(
                "it answers with a kind of reply that does not fit",
            )),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::claim::Fence;
    use crate::server::contexts::Agreed;
    use crate::server::{Desk, EVERYTHING, Export, Peer, ProtocolError, Verdict, negotiate};
    use std::task::{Context, Poll, Waker};

    const FENCE: Fence = Fence {
        instance: 77,
        turn: 3,
        keeps_order: true,
    };

    /// Our server's side: a desk, and the client that it talks to.
    struct Served {
        export: Export,
        agreed: Option<Agreed>,
    }

    impl Desk for Served {
        fn export(&self) -> &Export {
            &self.export
        }

        async fn claim(&mut self, claim: Option<crate::claim::Claim>) -> Verdict {
            assert_eq!(claim, None);
            Verdict::Granted(FENCE)
        }

        fn agreed(&mut self) -> Option<&mut Agreed> {
            self.agreed.as_mut()
        }
    }

    /// Feeds what the server sends to the handshake, and the server with its answers.
    struct Wire {
        handshake: Handshake,
        there: Vec<u8>,
        back: Vec<u8>,
        refused: Option<HandshakeError>,
    }

    impl Wire {
        fn next(&mut self, len: usize) -> Result<Vec<u8>, ProtocolError> {
            while self.back.len() < len {
                let wants = self.handshake.wants();
                if wants == 0 || self.there.len() < wants || self.refused.is_some() {
                    return Err(ProtocolError::UnknownExport);
                }
                let rest = self.there.split_off(wants);
                match self
                    .handshake
                    .feed(&std::mem::replace(&mut self.there, rest))
                {
                    Ok(answer) => self.back.extend(answer),
                    Err(why) => self.refused = Some(why),
                }
            }
            let rest = self.back.split_off(len);
            Ok(std::mem::replace(&mut self.back, rest))
        }
    }

    impl Peer for Wire {
        type Error = ProtocolError;

        async fn array<const N: usize>(&mut self) -> Result<[u8; N], ProtocolError> {
            Ok(self.next(N)?.try_into().unwrap())
        }

        async fn take(&mut self, len: usize) -> Result<Vec<u8>, ProtocolError> {
            self.next(len)
        }

        async fn skip(&mut self, len: usize) -> Result<(), ProtocolError> {
            self.next(len).map(drop)
        }

        async fn send(&mut self, bytes: &[u8]) -> Result<(), ProtocolError> {
            self.there.extend_from_slice(bytes);
            Ok(())
        }

        async fn secure(&mut self) -> Result<(), ProtocolError> {
            unreachable!("it has no TLS")
        }
    }

    /// A handshake with a server that knows structured replies, or not.
    fn shake(agreed: Option<Agreed>) -> (Wire, Option<Agreed>) {
        let export = Export {
            name: "m".to_owned(),
            size_bytes: 64 << 20,
            block_bytes: 512,
            payload_bytes_max: 4 << 20,
            flags: EVERYTHING,
        };
        let (handshake, there, back) = (Handshake::for_sums("m"), Vec::new(), Vec::new());
        let mut wire = Wire {
            handshake,
            there,
            back,
            refused: None,
        };
        let mut served = Served { export, agreed };
        {
            let negotiation = std::pin::pin!(negotiate(&mut wire, &mut served));
            let ended = negotiation.poll(&mut Context::from_waker(Waker::noop()));
            assert!(matches!(ended, Poll::Ready(_)));
        }
        // The last replies.
        while wire.refused.is_none() && wire.next(1).is_ok() {}
        (wire, served.agreed)
    }

    #[test]
    fn our_server_agrees() {
        let (wire, agreed) = shake(Some(Agreed::default()));
        assert_eq!(wire.refused, None);
        assert_eq!(wire.handshake.fence(), Some(FENCE));
        assert_eq!(wire.handshake.export().unwrap().size_bytes, 64 << 20);
        let all = Agreed {
            structured: true,
            sums: true,
        };
        assert_eq!(agreed, Some(all));
    }

    #[test]
    fn a_server_without_them_is_of_no_use() {
        let (wire, _) = shake(None);
        assert_eq!(wire.refused, Some(HandshakeError::NoSums));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let asks = |option| {
            let mut handshake = Handshake::for_sums("m");
            handshake.option = option;
            handshake
        };
        let (first, second) = (OPTION_STRUCTURED_REPLY, OPTION_SET_META_CONTEXT);
        let nonsense = |option, kind, data: &[u8]| {
            let refused = asks(option).of_sums(kind, data).unwrap_err();
            matches!(refused, HandshakeError::Nonsense(_))
        };
        assert!(nonsense(
            first,
            REP_META_CONTEXT,
            b"\0\0\0\x01x-ublk-mirror:crc32"
        ));
        assert!(nonsense(
            second,
            REP_META_CONTEXT,
            b"\0\0\0\x02x-ublk-mirror:crc32"
        ));
        assert!(nonsense(second, REP_META_CONTEXT, b"\0\0"));
        assert!(nonsense(second, 3, b""));
        let none = asks(second).of_sums(REP_ACK, b"");
        assert_eq!(
            none,
            Err(HandshakeError::NoSums),
            "it knows no such context"
        );
    }
}
