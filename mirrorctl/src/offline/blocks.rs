//! The blocks of written extents: every copy against its stored checksum and the copies against
//! each other.
//!
//! Of a cool extent `mirror::verdict` judges each block. Of a hot one the copies are only
//! compared: they may differ after an unclean stop, and the next start makes them equal.
//! Unwritten and discarded extents are not read, nobody will see what lies there.
//!
//! Each member is read by a thread of its own, in order and 1 MiB at a time, a little ahead of
//! the one that compares.

use dirty_map::{BLOCK_BYTES, Block, EXTENT_BYTES, Extent, ExtentState, StateMap, Sum, SumPage};
use mirror::layout::{PAGE_BYTES, RegionKind};
use mirror::verdict::{BlockVerdict, Held, Members, Mend, Proof, judge};
use std::ops::Range;
use std::time::Instant;

use super::device::{BLOCK, Buffer};
use super::member::{CHUNK_PAGES, Member};
use super::mend::{self, Failed, Job};
use super::report::{Class, Finding, Findings, Kind, Outcome};
use super::stream::{Copy, Piece, Stream, blocks_of, pieces};
use super::{Assembly, Mode};
use crate::failure::Failure;
use crate::progress::Progress;

/// What is looked at.
pub(super) struct View<'a> {
    pub(super) members: &'a [Member],
    pub(super) assembly: &'a Assembly,
    pub(super) states: &'a StateMap,
    pub(super) mode: Mode,
}

impl<'a> View<'a> {
    /// The in-sync members, in order of their slots.
    pub(super) fn in_sync(&self) -> impl Iterator<Item = &'a Member> {
        let members = self.members;
        self.assembly
            .in_sync
            .iter()
            .map(move |&index| &members[index])
    }

    /// Where the device's data begin on each of them.
    pub(super) fn data_offset(&self) -> u64 {
        self.assembly.config.layout.data_offset
    }

    /// Where the page of an extent's checksums is; `None` when none are kept.
    pub(super) fn sum_page_at(&self, extent: Extent) -> Option<u64> {
        let config = &self.assembly.config;
        let region = config.layout.find(RegionKind::Checksums, 0)?;
        let at = u64::from(extent.0) * PAGE_BYTES;
        (config.checksums && at < region.len).then_some(region.copy_a + at)
    }
}

/// How many blocks were looked at.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Blocks {
    /// Of cool extents.
    pub(crate) checked: u64,
    /// Of those, blocks of which a member has no checksum although checksums are kept.
    pub(crate) without_checksum: u64,
    /// Of those, blocks of which every member has one now.
    pub(crate) filled_in: u64,
    /// Of hot extents.
    pub(crate) hot: u64,
    /// Of those, blocks that differ.
    pub(crate) hot_differing: u64,
    /// How long it took, in milliseconds.
    pub(crate) millis: u64,
}

/// Looks at all blocks, and mends them when asked to.
pub(super) fn look(
    view: &View<'_>,
    findings: &mut Findings,
    progress: &mut Progress,
) -> Result<Blocks, Failure> {
    let began = Instant::now();
    let mut blocks = std::thread::scope(|scope| {
        let streams = view
            .in_sync()
            .map(|member| Stream::begin(scope, view, member));
        Walk::new(view, streams.collect(), findings).run(progress)
    })?;
    blocks.millis = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    Ok(blocks)
}

/// What a member has stored of an extent's checksums.
pub(super) struct Sums {
    pub(super) page: SumPage,
    pub(super) readable: bool,
}

/// Pages of checksums of one member that were read together.
struct SumBatch {
    first: u32,
    buffer: Buffer,
    bad: Vec<Range<usize>>,
}

/// What became a finding, and which job mends it.
struct Pending {
    finding: Finding,
    /// The member, and the job unless it is about its page of checksums.
    mended_by: Option<(usize, Option<usize>)>,
}

struct Walk<'a, 'b> {
    view: &'a View<'a>,
    streams: Vec<Stream>,
    findings: &'b mut Findings,
    blocks: Blocks,
    batches: Vec<Option<SumBatch>>,
    /// Of the extent under way.
    sums: Vec<Sums>,
    jobs: Vec<Job>,
    pending: Vec<Pending>,
    unsynced: bool,
}

impl<'a, 'b> Walk<'a, 'b> {
    fn new(view: &'a View<'a>, streams: Vec<Stream>, findings: &'b mut Findings) -> Self {
        Self {
            batches: streams.iter().map(|_| None).collect(),
            view,
            streams,
            findings,
            blocks: Blocks::default(),
            sums: Vec::new(),
            jobs: Vec::new(),
            pending: Vec::new(),
            unsynced: false,
        }
    }

    fn run(mut self, progress: &mut Progress) -> Result<Blocks, Failure> {
        if self.streams.is_empty() {
            return Ok(self.blocks);
        }
        let size_bytes = self.view.assembly.config.layout.size_bytes;
        let states = self.view.states;
        let extents = states.count(ExtentState::Cool) + states.count(ExtentState::Hot);
        let total = u64::from(extents) * EXTENT_BYTES;
        let mut done = 0;
        for piece in pieces(states, size_bytes) {
            let mut copies = Vec::with_capacity(self.streams.len());
            for stream in &self.streams {
                copies.push(stream.next()?);
            }
            if piece.first {
                self.begin(&piece)?;
            }
            if piece.hot {
                self.compare(&piece, &copies);
            } else {
                self.check(&piece, &copies);
            }
            if piece.last {
                self.end(piece.extent);
            }
            for (stream, copy) in self.streams.iter().zip(copies) {
                stream.give_back(copy);
            }
            done += piece.len as u64;
            progress.share("checked", done, total);
        }
        if self.unsynced {
            mend::sync_all(self.view)?;
        }
        Ok(self.blocks)
    }

    /// Reads the stored checksums of an extent.
    fn begin(&mut self, piece: &Piece) -> Result<(), Failure> {
        self.sums.clear();
        for (index, member) in self.view.in_sync().enumerate() {
            let sums = match self.view.sum_page_at(piece.extent).filter(|_| !piece.hot) {
                None => Sums {
                    page: SumPage::unknown(),
                    readable: true,
                },
                Some(_) => self.sums_of(index, member, piece.extent)?,
            };
            if !sums.readable {
                let (offset, len) = (piece.offset, self.extent_bytes(piece.extent));
                self.pending.push(Pending {
                    finding: Finding {
                        class: Class::Mendable,
                        kind: Kind::ChecksumPage,
                        member: Some(member.name()),
                        bytes: Some((offset, len)),
                        what: "their stored checksums cannot be read".to_owned(),
                        outcome: Outcome::Found,
                    },
                    mended_by: Some((index, None)),
                });
            }
            self.sums.push(sums);
        }
        Ok(())
    }

    fn extent_bytes(&self, extent: Extent) -> u64 {
        let size_bytes = self.view.assembly.config.layout.size_bytes;
        EXTENT_BYTES.min(size_bytes - extent.start_bytes())
    }

    fn sums_of(&mut self, index: usize, member: &Member, extent: Extent) -> Result<Sums, Failure> {
        let pages = u32::try_from(CHUNK_PAGES).unwrap_or(1);
        let first = extent.0 / pages * pages;
        let batch = &mut self.batches[index];
        if batch.as_ref().is_none_or(|batch| batch.first != first) {
            let count = pages.min(self.view.states.len() - first);
            let mut buffer = Buffer::new(usize::try_from(count).unwrap_or(0) * BLOCK);
            let at = self.view.sum_page_at(Extent(first)).unwrap_or(0);
            let bad = member.device.read(at, buffer.get_mut())?;
            *batch = Some(SumBatch { first, buffer, bad });
        }
        let start = usize::try_from(extent.0 - first).unwrap_or(0) * BLOCK;
        let batch = batch.as_ref();
        let readable = batch.is_some_and(|b| !b.bad.iter().any(|bad| bad.contains(&start)));
        let bytes = batch.and_then(|batch| batch.buffer.get()[start..].first_chunk());
        let page = bytes
            .filter(|_| readable)
            .map_or_else(SumPage::unknown, SumPage::decode);
        Ok(Sums { page, readable })
    }

    /// Checks a piece of a cool extent.
    fn check(&mut self, piece: &Piece, copies: &[Copy]) {
        let keeps = self.view.sum_page_at(piece.extent).is_some();
        let (first, others) = (copies[0].all(), &copies[1..]);
        let equal = copies.iter().all(|copy| copy.bad.is_empty())
            && others.iter().all(|copy| copy.all() == first);
        for (block, range) in blocks_of(piece) {
            self.blocks.checked += 1;
            let known = |sums: &Sums| sums.page.get(block);
            let unknown = self
                .sums
                .iter()
                .filter(|sums| known(sums).is_none())
                .count();
            self.blocks.without_checksum += u64::from(unknown > 0 && keeps);
            if equal && !keeps {
                continue;
            }
            if equal && unknown == 0 {
                let sum = Some(Sum::of(block, &first[range.clone()]));
                if self.sums.iter().all(|sums| known(sums) == sum) {
                    continue;
                }
            }
            if equal && unknown == self.sums.len() && self.view.mode != Mode::Repair {
                continue;
            }
            let absent = std::iter::repeat_n(
                Held {
                    content: None,
                    sum: None,
                },
                self.view.assembly.absent,
            );
            let held = copies.iter().zip(&self.sums).map(|(copy, sums)| Held {
                content: copy.block(&range),
                sum: sums.page.get(block),
            });
            let held: Vec<Held<'_>> = held.chain(absent).take(Members::MAX).collect();
            match judge(block, &held) {
                BlockVerdict::Fine => {}
                BlockVerdict::Mend(mend) => self.mendable(block, &range, &held, mend),
                BlockVerdict::Damaged => {
                    self.hopeless(block, &range, &held, Kind::Damaged);
                }
                BlockVerdict::Undecidable => {
                    self.hopeless(block, &range, &held, Kind::Undecidable);
                }
            }
        }
    }

    fn mendable(&mut self, block: Block, range: &Range<usize>, held: &[Held<'_>], mut mend: Mend) {
        let keeps = self.view.sum_page_at(block.extent()).is_some();
        if !keeps || self.view.assembly.absent > 0 {
            // The one that is not here may hold another content, and as good a claim to it.
            mend.unknown = Members::default();
        }
        let job = self.jobs.len();
        let source = self.slot_name(mend.source);
        let why = match mend.proof {
            Proof::Checksum => format!("the copy of {source} fits a checksum"),
            Proof::Equal => format!("{source} can be read"),
            Proof::Majority => format!("most members hold what {source} holds"),
        };
        for (index, held) in held.iter().enumerate().take(self.sums.len()) {
            let Held { content, sum } = *held;
            let fits = content.map(|content| Some(Sum::of(block, content)) == sum);
            let (kind, what) = match fits {
                _ if !mend.rewrite.contains(index) => {
                    if !mend.stale.contains(index) {
                        continue;
                    }
                    let what = match mend.proof {
                        Proof::Equal => "the stored checksum fits no copy, and all copies agree",
                        _ => "the copy is right and its stored checksum is not",
                    };
                    (Kind::ChecksumStale, what.to_owned())
                }
                None => (Kind::Unreadable, format!("cannot be read; {why}")),
                Some(false) if sum.is_some() => (
                    Kind::ChecksumFailed,
                    format!("does not fit its checksum; {why}"),
                ),
                Some(_) => (Kind::CopiesDiffer, format!("differs; {why}")),
            };
            self.pend(
                Class::Mendable,
                kind,
                Some(index),
                (block, range),
                what,
                Some(job),
            );
        }
        let any = |which: Members| which.iter().any(|member| member < self.sums.len());
        let rewrites = any(mend.rewrite);
        let something = rewrites || keeps && (any(mend.stale) || any(mend.unknown));
        if something && self.view.mode == Mode::Repair {
            let content = held[mend.source].content.filter(|_| rewrites);
            self.jobs.push(Job {
                block,
                mend,
                content: content.map(<[u8]>::to_vec),
            });
        }
    }

    fn hopeless(&mut self, block: Block, range: &Range<usize>, held: &[Held<'_>], kind: Kind) {
        let each = held
            .iter()
            .take(self.sums.len())
            .enumerate()
            .map(|(index, held)| {
                let what = match (held.content, held.sum) {
                    (None, _) => "cannot be read",
                    (Some(_), None) => "has no checksum",
                    (Some(content), Some(sum)) if Sum::of(block, content) == sum => {
                        "fits its checksum"
                    }
                    (Some(_), Some(_)) => "does not fit its checksum",
                };
                format!("{} {what}", self.slot_name(index))
            });
        let each = each.collect::<Vec<_>>().join(", ");
        let what = if kind == Kind::Damaged {
            format!("damaged, no copy is provably right ({each})")
        } else {
            format!("copies differ and nothing tells which is right ({each})")
        };
        self.pend(Class::Damaged, kind, None, (block, range), what, None);
    }

    /// Compares a piece of a hot extent.
    fn compare(&mut self, piece: &Piece, copies: &[Copy]) {
        let first = copies[0].all();
        let equal = copies
            .iter()
            .all(|copy| copy.bad.is_empty() && copy.all() == first);
        for (block, range) in blocks_of(piece) {
            self.blocks.hot += 1;
            if equal {
                continue;
            }
            let contents: Vec<_> = copies.iter().map(|copy| copy.block(&range)).collect();
            let mut readable = contents.iter().flatten();
            let one = readable.next();
            for index in (0..contents.len()).filter(|&index| contents[index].is_none()) {
                let (class, what) = if one.is_some() {
                    (
                        Class::Mendable,
                        "cannot be read, in a hot extent: the next start rewrites it",
                    )
                } else {
                    (Class::Damaged, "cannot be read from any member")
                };
                let at = (block, &range);
                self.pend(
                    class,
                    Kind::Unreadable,
                    Some(index),
                    at,
                    what.to_owned(),
                    None,
                );
            }
            if readable.any(|other| Some(other) != one) {
                self.blocks.hot_differing += 1;
                let what = "copies differ in a hot extent, as may be after an unclean stop: the \
                            next start makes them equal";
                let at = (block, &range);
                self.pend(
                    Class::Expected,
                    Kind::HotDiffers,
                    None,
                    at,
                    what.to_owned(),
                    None,
                );
            }
        }
    }

    fn pend(
        &mut self,
        class: Class,
        kind: Kind,
        member: Option<usize>,
        (block, range): (Block, &Range<usize>),
        what: String,
        job: Option<usize>,
    ) {
        let name = member
            .and_then(|index| self.view.in_sync().nth(index))
            .map(Member::name);
        self.pending.push(Pending {
            finding: Finding {
                class,
                kind,
                member: name,
                bytes: Some((block.0 * BLOCK_BYTES, range.len() as u64)),
                what,
                outcome: Outcome::Found,
            },
            mended_by: job.and_then(|job| Some((member?, Some(job)))),
        });
    }

    /// `slot 1`.
    fn slot_name(&self, index: usize) -> String {
        let slot = self
            .view
            .in_sync()
            .nth(index)
            .and_then(|member| member.name().1);
        format!("slot {}", slot.unwrap_or_default())
    }

    /// Mends what was found in an extent, when asked to, and reports it.
    fn end(&mut self, extent: Extent) {
        let mut failed = Vec::new();
        if self.view.mode == Mode::Repair && !self.jobs.is_empty() {
            let done = mend::apply(self.view, extent, &mut self.sums, &self.jobs);
            self.unsynced |= done.unsynced;
            failed = done.failed;
            if failed.is_empty() {
                let jobs = self.jobs.iter();
                let filled = jobs.filter(|job| !job.mend.unknown.is_empty()).count();
                self.blocks.filled_in += filled as u64;
            }
        }
        let rewritten = |index: usize| self.jobs.iter().any(|job| job.mend.unknown.contains(index));
        for Pending {
            mut finding,
            mended_by,
        } in std::mem::take(&mut self.pending)
        {
            finding.outcome = match (self.view.mode, mended_by) {
                (Mode::Check, _) => Outcome::Found,
                (_, None) => Outcome::Left(left_because(&finding).to_owned()),
                (Mode::Repair, Some((index, None))) if !rewritten(index) => {
                    Outcome::Left("no checksum of it can be vouched for".to_owned())
                }
                (Mode::DryRun, Some(_)) => Outcome::WouldMend,
                (Mode::Repair, Some((index, job))) => outcome_of(&failed, index, job),
            };
            self.findings.add(finding);
        }
        self.jobs.clear();
    }
}

fn left_because(finding: &Finding) -> &'static str {
    match finding.class {
        Class::Damaged => "nothing is overwritten without proof",
        _ => "the next start does that",
    }
}

fn outcome_of(failed: &[Failed], index: usize, job: Option<usize>) -> Outcome {
    let why = failed.iter().find(|failed| {
        failed.member == index && (failed.job.is_none() || failed.job == job || job.is_none())
    });
    why.map_or(Outcome::Mended, |failed| Outcome::Left(failed.why.clone()))
}
