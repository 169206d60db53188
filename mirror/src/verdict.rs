//! Which copy of a block is right: one pure function over what the in-sync members hold.
//!
//! Everything that compares copies of a *cool* extent decides here, whether the mirror runs or
//! not. (Of a hot extent a stored checksum says less: see R5.)
//!
//! A content is *proven* when it fits the known checksum of any in-sync member: checksums and
//! copies rot independently, and a checksum that fits by chance is one in four billion.
//!
//! | checksums known | copies | verdict |
//! |---|---|---|
//! | any | one content is proven | it wins: other and unreadable copies are rewritten, checksums that do not fit it are mended |
//! | any | several are proven | the one that a strict majority of the in-sync members holds wins; else damaged |
//! | any | none is proven, all are readable, at least two, equal | the content stands, the checksums are mended |
//! | any | otherwise | damaged: nothing is overwritten |
//! | none | those readable are equal | it wins: unreadable ones are rewritten, checksums are filled in |
//! | none | they differ | what a strict majority of the in-sync members holds, at least two, wins; else undecidable |
//! | none | none is readable | damaged |

use dirty_map::{Block, Sum};

/// What an in-sync member holds of a block.
#[derive(Clone, Copy, Debug)]
pub struct Held<'a> {
    /// Its copy; `None` when it cannot be read.
    pub content: Option<&'a [u8]>,
    /// The checksum that it has stored; `None` when it is not known.
    pub sum: Option<Sum>,
}

/// Some of the members that a verdict was given on, by their index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Members(u16);

impl Members {
    /// Most members that can be judged.
    pub const MAX: usize = 16;

    /// Those of the first `count` members for which `holds`.
    fn which(count: usize, holds: impl Fn(usize) -> bool) -> Self {
        let chosen = (0..count).filter(|&member| holds(member));
        Self(chosen.fold(0, |bits, member| bits | 1 << member))
    }

    /// Whether `member` is one of them.
    #[must_use]
    pub fn contains(self, member: usize) -> bool {
        member < Self::MAX && self.0 >> member & 1 != 0
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// All of them, in order.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..Self::MAX).filter(move |&member| self.contains(member))
    }
}

/// Why a content is taken to be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// A stored checksum fits it.
    Checksum,
    /// Every copy that can be read is the same.
    Equal,
    /// Most members hold it.
    Majority,
}

/// How the copies of a block become equal and their checksums fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mend {
    /// A member that holds the right content.
    pub source: usize,
    /// Why it is right.
    pub proof: Proof,
    /// Its checksum.
    pub sum: Sum,
    /// Members whose copy is another, or cannot be read: to be rewritten from the source.
    pub rewrite: Members,
    /// Members whose known checksum does not fit the right content.
    pub stale: Members,
    /// Members of which no checksum is known.
    pub unknown: Members,
}

/// The verdict on a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockVerdict {
    /// All copies are equal and every checksum is known and fits.
    Fine,
    /// What is right is known, and something is to be written.
    Mend(Mend),
    /// No copy is provably right: nothing may be overwritten.
    Damaged,
    /// Copies differ and nothing is known about any: nothing may be overwritten.
    Undecidable,
}

/// Judges a block by what every in-sync member holds of it.
///
/// # Panics
///
/// When there are more than [`Members::MAX`].
#[must_use]
pub fn judge(block: Block, members: &[Held<'_>]) -> BlockVerdict {
    let count = members.len();
    assert!(count <= Members::MAX, "{count} members");
    if is_fine(block, members) {
        return BlockVerdict::Fine;
    }
    let is_majority = |candidate: &Candidate| candidate.holders * 2 > count;
    let candidates = candidates(block, members);
    let any_known = members.iter().any(|member| member.sum.is_some());
    let mut proven = candidates.iter().filter(|candidate| candidate.proven);
    let all_equal = candidates.len() == 1;
    let all_readable = members.iter().all(|member| member.content.is_some());
    let (right, proof) = if !any_known {
        let Some(first) = candidates.first() else {
            return BlockVerdict::Damaged;
        };
        let most = candidates.iter().find(|c| is_majority(c) && c.holders > 1);
        match most {
            _ if all_equal => (first, Proof::Equal),
            Some(most) => (most, Proof::Majority),
            None => return BlockVerdict::Undecidable,
        }
    } else {
        match (proven.next(), proven.next()) {
            (Some(only), None) => (only, Proof::Checksum),
            (Some(_), Some(_)) => {
                let most = candidates.iter().find(|c| c.proven && is_majority(c));
                let Some(most) = most else {
                    return BlockVerdict::Damaged;
                };
                (most, Proof::Majority)
            }
            (None, _) if all_readable && all_equal && count > 1 => (&candidates[0], Proof::Equal),
            (None, _) => return BlockVerdict::Damaged,
        }
    };
    verdict(members, right, proof)
}

/// Whether all is as it should be: so it is almost always, and this is the least that shows it.
fn is_fine(block: Block, members: &[Held<'_>]) -> bool {
    let Some((first, others)) = members.split_first() else {
        return false;
    };
    let Some(content) = first.content else {
        return false;
    };
    let known = members.iter().all(|member| member.sum.is_some());
    known && others.iter().all(|other| other.content == Some(content)) && {
        let sum = Some(Sum::of(block, content));
        members.iter().all(|member| member.sum == sum)
    }
}

/// A content that some member holds.
struct Candidate {
    /// The member to copy from: one whose own checksum fits, if there is one.
    source: usize,
    sum: Sum,
    holders: usize,
    proven: bool,
}

fn candidates(block: Block, members: &[Held<'_>]) -> Vec<Candidate> {
    let mut found: Vec<Candidate> = Vec::new();
    for (index, member) in members.iter().enumerate() {
        let Some(content) = member.content else {
            continue;
        };
        let same = |c: &&mut Candidate| members[c.source].content == Some(content);
        if let Some(known) = found.iter_mut().find(same) {
            known.holders += 1;
            if member.sum == Some(known.sum) && members[known.source].sum != member.sum {
                known.source = index;
            }
            continue;
        }
        let sum = Sum::of(block, content);
        found.push(Candidate {
            source: index,
            sum,
            holders: 1,
            proven: members.iter().any(|member| member.sum == Some(sum)),
        });
    }
    found
}

fn verdict(members: &[Held<'_>], right: &Candidate, proof: Proof) -> BlockVerdict {
    let which = |holds: &dyn Fn(&Held<'_>) -> bool| {
        Members::which(members.len(), |index| holds(&members[index]))
    };
    let content = members[right.source].content;
    let mend = Mend {
        source: right.source,
        proof,
        sum: right.sum,
        rewrite: which(&|member| member.content != content),
        stale: which(&|member| member.sum.is_some_and(|sum| sum != right.sum)),
        unknown: which(&|member| member.sum.is_none()),
    };
    if [mend.rewrite, mend.stale, mend.unknown] == [Members::default(); 3] {
        return BlockVerdict::Fine;
    }
    BlockVerdict::Mend(mend)
}

#[cfg(test)]
#[path = "verdict_tests.rs"]
mod tests;
