//! What can be told of a simulated disk from outside, for those who watch the rules.

use super::{SECTOR, SimDisk, sectors};
use crate::host::DiskRequest;
use crate::sim::OnItsWay;

impl SimDisk {
    /// The bytes that a power cut leaves in any case, if no sector of them is in the cache,
    /// given up, or under way.
    #[must_use]
    pub fn settled(&self, offset: u64, len: u64) -> Option<Vec<u8>> {
        let range = sectors(offset, len);
        let (cache, given_up) = (self.0.cache.borrow(), self.0.given_up.borrow());
        let mut loose = cache.iter().chain(given_up.iter());
        if loose.any(|(_, run)| run.part(&range).is_some()) || self.is_under_way(offset, len) {
            return None;
        }
        let mut out = vec![0; usize::try_from(len).ok()?];
        self.0.durable.borrow().read(range.start, &mut out);
        Some(out)
    }

    /// Whether a flush that failed has dropped part of this range, which reads show still.
    #[must_use]
    pub fn has_given_up(&self, offset: u64, len: u64) -> bool {
        let range = sectors(offset, len);
        let given_up = self.0.given_up.borrow();
        given_up.iter().any(|(_, run)| run.part(&range).is_some())
    }

    /// Whether an operation under way changes part of this range.
    #[must_use]
    pub fn is_under_way(&self, offset: u64, len: u64) -> bool {
        let range = offset..offset + len;
        let pending = self.0.pending.borrow();
        let mut alive = pending.iter().filter(|p| p.opening == self.0.outages.get());
        alive.any(|pending| match &pending.request {
            DiskRequest::Write { offset, span, .. } => {
                *offset < range.end && range.start < offset + span.len as u64
            }
            DiskRequest::WriteZeroes { offset, len } | DiskRequest::Discard { offset, len } => {
                *offset < range.end && range.start < offset + len
            }
            DiskRequest::Read { .. } | DiskRequest::Flush => false,
        })
    }

    /// A change of this range is on its way here through a network.
    #[must_use]
    pub fn expect(&self, offset: u64, len: u64) -> OnItsWay {
        OnItsWay::new(&self.0.on_its_way, offset..offset + len)
    }

    /// Whether a change of part of this range is.
    #[must_use]
    pub fn expects(&self, offset: u64, len: u64) -> bool {
        let comes = self.0.on_its_way.borrow();
        comes
            .iter()
            .any(|it| it.start < offset + len && offset < it.end)
    }

    /// The number that the next cached write gets.
    #[must_use]
    pub fn next_number(&self) -> u64 {
        self.0.next_number.get()
    }

    /// Whether nothing from `offset` on that was cached before `number` had been reached is in
    /// the cache still.
    #[must_use]
    pub fn is_flushed(&self, offset: u64, number: u64) -> bool {
        let beyond = offset / SECTOR..u64::MAX;
        let cache = self.0.cache.borrow();
        let mut cached = cache.iter();
        !cached.any(|(of, run)| *of < number && run.part(&beyond).is_some())
    }
}
