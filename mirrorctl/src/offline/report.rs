//! What was found, in the order in which it was found, and how bad it is.
//!
//! Neighbouring findings that say the same become one. The list is bounded; what does not fit
//! is counted, and everything counts for the exit code.

use std::collections::{BTreeMap, VecDeque};

use serde::Serialize;

use crate::failure::Exit;

/// How bad a finding is; worse ones are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Class {
    /// As it should be after an unclean stop.
    Expected,
    /// A good copy is there.
    Mendable,
    /// Something that the mirror counts on could not be checked.
    Incomplete,
    /// No good copy of a part of the metadata is there.
    Metadata,
    /// Blocks of which no copy is provably right.
    Damaged,
}

impl Class {
    /// The exit code for it; `None` for success.
    pub(crate) fn exit(self) -> Option<Exit> {
        match self {
            Self::Expected => None,
            Self::Mendable => Some(Exit::Mendable),
            Self::Incomplete => Some(Exit::Incomplete),
            Self::Metadata => Some(Exit::MetadataDamaged),
            Self::Damaged => Some(Exit::BlocksDamaged),
        }
    }
}

/// What kind of thing was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// A superblock copy is damaged, unreadable or older.
    Superblock,
    /// The member is smaller than its superblock says.
    Truncated,
    /// A member that the mirror names in-sync was not given or cannot be used.
    NotGiven,
    /// A map sector is damaged, unreadable or older.
    Map,
    /// A page of checksums cannot be read.
    ChecksumPage,
    /// A block cannot be read.
    Unreadable,
    /// A block does not fit its stored checksum.
    ChecksumFailed,
    /// A block differs from the right copy.
    CopiesDiffer,
    /// The copy is right and its stored checksum is not.
    ChecksumStale,
    /// No copy of a block is provably right.
    Damaged,
    /// Copies differ and no checksum is known.
    Undecidable,
    /// Copies differ in a hot extent.
    HotDiffers,
}

/// What became of a finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Only looked at.
    Found,
    /// A repair would mend it.
    WouldMend,
    /// It is mended.
    Mended,
    /// It is as it was, with the reason.
    Left(String),
}

/// A finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    /// How bad it is.
    pub(crate) class: Class,
    /// What it is.
    pub(crate) kind: Kind,
    /// The member, with its slot where that is known.
    pub(crate) member: Option<(String, Option<u8>)>,
    /// The bytes of the device that it is about: first and number.
    pub(crate) bytes: Option<(u64, u64)>,
    /// What was found, as a sentence without its end.
    pub(crate) what: String,
    /// What became of it.
    pub(crate) outcome: Outcome,
}

impl Finding {
    /// The line that says it.
    pub(crate) fn line(&self) -> String {
        let mut text = match &self.member {
            Some((path, Some(slot))) => format!("{path} (slot {slot}): "),
            Some((path, None)) => format!("{path}: "),
            None => String::new(),
        };
        if let Some((offset, len)) = self.bytes {
            text.push_str(&format!("{len} bytes at byte {offset} of the device: "));
        }
        text.push_str(&self.what);
        match &self.outcome {
            Outcome::Found => {}
            Outcome::WouldMend => text.push_str("; would be mended"),
            Outcome::Mended => text.push_str("; mended"),
            Outcome::Left(why) => text.push_str(&format!("; left: {why}")),
        }
        text
    }

    /// Takes in a finding that says the same of the bytes that follow.
    fn absorb(&mut self, other: &Self) -> bool {
        let (Some((offset, len)), Some((next, more))) = (self.bytes, other.bytes) else {
            return false;
        };
        let same = (
            self.class,
            self.kind,
            &self.member,
            &self.what,
            &self.outcome,
        ) == (
            other.class,
            other.kind,
            &other.member,
            &other.what,
            &other.outcome,
        );
        if same && offset + len == next {
            self.bytes = Some((offset, len + more));
        }
        same && offset + len == next
    }
}

/// How many findings, beyond those shown, may still grow.
const GROWING: usize = 16;

/// All that was found.
#[derive(Debug)]
pub(crate) struct Findings {
    shown: Vec<Finding>,
    growing: VecDeque<Finding>,
    limit: usize,
    /// Findings that are not shown.
    pub(crate) not_shown: u64,
    /// Findings by kind: for those about blocks, how many blocks, else how many.
    pub(crate) counts: BTreeMap<Kind, u64>,
    /// What was mended, or would be, counted in the same way.
    pub(crate) mended: u64,
    /// The worst that is not mended.
    pub(crate) worst: Option<Class>,
}

impl Findings {
    /// None yet; `limit` are kept to be shown.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            shown: Vec::new(),
            growing: VecDeque::new(),
            limit,
            not_shown: 0,
            counts: BTreeMap::new(),
            mended: 0,
            worst: None,
        }
    }

    /// Adds one.
    pub(crate) fn add(&mut self, finding: Finding) {
        let count = finding.bytes.map_or(1, |(_, len)| len.div_ceil(4096));
        *self.counts.entry(finding.kind).or_default() += count;
        if matches!(finding.outcome, Outcome::Mended | Outcome::WouldMend) {
            self.mended += count;
        } else {
            self.worst = self.worst.max(Some(finding.class));
        }
        let mut recent = self.growing.iter_mut().rev();
        if recent.any(|before| before.absorb(&finding)) {
            return;
        }
        self.growing.push_back(finding);
        if self.growing.len() > GROWING {
            self.settle();
        }
    }

    fn settle(&mut self) {
        let Some(oldest) = self.growing.pop_front() else {
            return;
        };
        if self.shown.len() < self.limit {
            self.shown.push(oldest);
        } else {
            self.not_shown += 1;
        }
    }

    /// Those that are shown; none is added afterwards.
    pub(crate) fn finish(&mut self) -> &[Finding] {
        while !self.growing.is_empty() {
            self.settle();
        }
        &self.shown
    }

    /// How many there are of a kind.
    pub(crate) fn count(&self, kind: Kind) -> u64 {
        self.counts.get(&kind).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(slot: u8, block: u64, what: &str) -> Finding {
        Finding {
            class: Class::Mendable,
            kind: Kind::Unreadable,
            member: Some((format!("/m{slot}"), Some(slot))),
            bytes: Some((block * 4096, 4096)),
            what: what.to_owned(),
            outcome: Outcome::Found,
        }
    }

    #[test]
    fn neighbours_become_one_and_the_rest_is_counted() {
        let mut findings = Findings::new(2);
        for block in 0..1000 {
            findings.add(finding(0, block, "bad"));
            findings.add(finding(1, block, "bad"));
        }
        for block in 0..40 {
            findings.add(finding(0, 2000 + 2 * block, "bad"));
        }
        let shown: Vec<String> = findings.finish().iter().map(Finding::line).collect();
        assert_eq!(
            shown,
            [
                "/m0 (slot 0): 4096000 bytes at byte 0 of the device: bad",
                "/m1 (slot 1): 4096000 bytes at byte 0 of the device: bad"
            ]
        );
        assert_eq!(findings.not_shown, 40);
        assert_eq!(findings.count(Kind::Unreadable), 2040);
        assert_eq!(findings.worst, Some(Class::Mendable));
    }

    #[test]
    fn the_worst_that_is_left_counts() {
        let mut findings = Findings::new(9);
        let mut add = |class, outcome| {
            let base = finding(0, 0, "x");
            findings.add(Finding {
                class,
                outcome,
                bytes: None,
                ..base
            });
            findings.worst
        };
        assert_eq!(add(Class::Damaged, Outcome::Mended), None);
        assert_eq!(add(Class::Expected, Outcome::Found), Some(Class::Expected));
        let left = Outcome::Left("so".to_owned());
        assert_eq!(add(Class::Metadata, left), Some(Class::Metadata));
        assert_eq!(
            add(Class::Incomplete, Outcome::Found),
            Some(Class::Metadata)
        );
        assert_eq!(add(Class::Damaged, Outcome::Found), Some(Class::Damaged));
        assert_eq!(findings.mended, 1);
    }
}
