//! Group commit of map pages.
//!
//! Promise: when [`Mirror::commit`] returns `Ok`, every map change made before the call is
//! durable, in both copies, on every member that still receives writes (R1). Members on which
//! the commit failed have stopped receiving before the caller goes on.
//!
//! All that waits at a moment shares one commit; the next one collects meanwhile. One commit
//! runs at a time, so that a later image of a page never meets an earlier one on a disk.
//!
//! A commit gives its pages a new sequence, makes their images from memory, and writes both
//! copies to every receiving member at once with FUA; a large one does so in steps. The copies of
//! one page may both be torn by a power cut; each sector then holds its old or its new content,
//! and the caller has not gone on.
//!
//! Its position page names the newest commit before it that all receiving members hold: by that a
//! start tells older images of members (R16, `assemble.rs`).
//!
//! # Ahead of the answer of a disk that keeps order
//!
//! A disk behind an export server of ours begins no change before the map pages that are on their way
//! to it are durable there, and refuses it if they are not ([`order`](crate::order)). So a write
//! into an extent that has just become hot need not wait for that disk's answer: when all other
//! receiving members hold the commit, an in-sync one among them, [`Mirror::commit_intent`] returns,
//! and intent and data reach the peer in one round trip. The commit itself ends as ever, with the last
//! answer of those peers, and the next one waits for it. If it fails on all in-sync members after all,
//! the extents of those who went on are not durably hot: they are recorded anew before the next write
//! (`Maps::unrecorded`).

use super::fan_out::Outcomes;
use super::maps::{Page, page_offset};
use super::wait::WaitList;
use super::{FanOut, Mirror, Receiver, Running, View, front, length};
use crate::host::{Buffer, Disk, DiskRequest, Errno, Host, Span};
use crate::layout::{PAGE_BYTES, SLOTS_MAX};
use crate::superblock::SlotState;
use dirty_map::Extent;
use std::cell::{Cell, RefCell};
use std::future::{Future as _, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;

/// Pages written by one commit step; a larger commit takes several.
pub(super) const PAGES_PER_STEP: usize = 64;

/// Failed commits that are remembered for those who still wait: far more than can be waited
/// for at once.
const FAILED_KEPT: usize = 1024;

/// Who waits for which commit.
#[derive(Default)]
pub(super) struct Commits {
    /// Number of the last request for a commit.
    requested: Cell<u64>,
    /// Requests up to this one have been served.
    served: Cell<u64>,
    /// Requests up to this one are held by all members but those that keep order.
    ahead: Cell<u64>,
    /// Whose writers have gone on since, before the commit has ended.
    pub(super) went_ahead: RefCell<Vec<Extent>>,
    /// Requests whose commit failed on every in-sync member.
    failed: RefCell<Vec<(u64, u64)>>,
    waiting: WaitList,
    kick: WaitList,
}

/// Runs of pages that follow each other on disk: first page and count.
fn runs(pages: &[Page]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (at, page) in pages.iter().enumerate() {
        match runs.last_mut() {
            Some((first, count))
                if pages[*first].kind == page.kind
                    && pages[*first].slot == page.slot
                    && u64::from(page.index) == u64::from(pages[*first].index) + *count as u64 =>
            {
                *count += 1;
            }
            _ => runs.push((at, 1)),
        }
    }
    runs
}

impl<H: Host, D: Disk<Buffer = H::Buffer>> Mirror<H, D> {
    /// Makes every map change so far durable; see the module documentation. Waits for judged
    /// losses first: until they are recorded no commit counts as held by all, and an older image
    /// would not be known by those that it lacks (R16).
    pub(super) async fn commit(&self) -> Result<(), Errno> {
        self.losses_effective().await?;
        self.commit_now().await
    }

    /// [`Mirror::commit`] for those who are about to write into these extents, which it makes hot:
    /// it may return as soon as nothing can reach a member before the commit does.
    pub(super) async fn commit_intent(&self, cold: &[Extent]) -> Result<(), Errno> {
        self.losses_effective().await?;
        let (commits, ticket) = (&self.commits, self.ask_for_commit());
        let held = || commits.ahead.get().max(commits.served.get()) >= ticket;
        commits.waiting.until(|| held().then_some(())).await;
        if commits.served.get() >= ticket {
            return self.served(ticket);
        }
        commits.went_ahead.borrow_mut().extend(cold);
        Ok(())
    }

    /// [`Mirror::commit`] for the losing itself.
    pub(super) async fn commit_now(&self) -> Result<(), Errno> {
        let (commits, ticket) = (&self.commits, self.ask_for_commit());
        let served = || (commits.served.get() >= ticket).then_some(());
        commits.waiting.until(served).await;
        self.served(ticket)
    }

    fn ask_for_commit(&self) -> u64 {
        let commits = &self.commits;
        let ticket = commits.requested.get() + 1;
        commits.requested.set(ticket);
        commits.kick.wake_all();
        ticket
    }

    /// What came of a request for a commit that has been served.
    fn served(&self, ticket: u64) -> Result<(), Errno> {
        let commits = &self.commits;
        let failed = commits.failed.borrow();
        if failed
            .iter()
            .any(|&(first, last)| (first..=last).contains(&ticket))
        {
            return Err(Errno::IO);
        }
        Ok(())
    }

    /// The committing task.
    pub(super) async fn run_commits(self: Rc<Self>) {
        let commits = &self.commits;
        let mut buffer = self.host.allocate(PAGES_PER_STEP * length(PAGE_BYTES));
        loop {
            let wanted = || commits.requested.get() > commits.served.get();
            commits.kick.until(|| wanted().then_some(())).await;
            let first = commits.served.get() + 1;
            let last = commits.requested.get();
            let committed = self.commit_pages(&mut buffer, last).await;
            let went_ahead = commits.went_ahead.take();
            if let Err(errno) = committed {
                tracing::error!("a map commit failed on every in-sync member: {errno}");
                self.maps.borrow_mut().unrecorded.extend(went_ahead);
                // Nor does anybody go ahead whom this was said to and who has not looked yet.
                commits.ahead.set(commits.ahead.get().min(last));
                let mut failed = commits.failed.borrow_mut();
                let old = failed.len().saturating_sub(FAILED_KEPT);
                failed.drain(..old);
                failed.push((first, last));
            }
            commits.served.set(last);
            commits.waiting.wake_all();
        }
    }

    /// Writes the pages that are dirty now. On failure they stay dirty. Requests up to `last` wait for
    /// them.
    async fn commit_pages(&self, buffer: &mut H::Buffer, last: u64) -> Result<(), Errno> {
        // One sequence for all steps, and a page once: with two contents of one sequence a start
        // could not tell which is the newer one. What becomes dirty meanwhile waits for the next.
        let (stamp, mut left) = {
            let mut maps = self.maps.borrow_mut();
            if maps.dirty.is_empty() {
                return Ok(());
            }
            maps.stamp.sequence += 1;
            maps.stamp.ordinal = self.config.borrow().epoch.ordinal;
            maps.completed = maps.completed.max(self.held_by_all());
            (maps.stamp, std::mem::take(&mut maps.dirty))
        };
        while !left.is_empty() {
            let taken = || left.pop_first();
            let mut pages: Vec<Page> = std::iter::from_fn(taken).take(PAGES_PER_STEP - 1).collect();
            if !pages.contains(&Page::POSITION) {
                // How far a member has come does not depend on the state of its maps.
                pages.insert(0, Page::POSITION);
            }
            if pages.iter().any(|page| *page != Page::POSITION) {
                // Ticks follow until a commit names this one (R16).
                self.wrote_since_tick.set(true);
            }
            if buffer.in_use() {
                // A stalled, lost member still holds it (R6).
                *buffer = self.host.allocate(PAGES_PER_STEP * length(PAGE_BYTES));
            }
            let bytes = pages.len() * length(PAGE_BYTES);
            front(buffer, bytes).fill(|out| {
                let maps = self.maps.borrow();
                for (page, image) in pages.iter().zip(out.chunks_exact_mut(length(PAGE_BYTES))) {
                    maps.encode_page(*page, stamp, image);
                }
            });
            let view = self.view();
            // With the last step those who wait for it may go on ahead; whoever has asked since too, if
            // nothing has become dirty since.
            let none_since = self.maps.borrow().dirty.is_empty();
            let asked = if none_since {
                self.commits.requested.get()
            } else {
                last
            };
            let ahead = left.is_empty().then_some(asked);
            if let Err(errno) = self.write_pages(&view, &pages, buffer, ahead).await {
                let mut maps = self.maps.borrow_mut();
                maps.dirty.extend(pages.into_iter().chain(left));
                return Err(errno);
            }
            for receiver in &view.receivers {
                let state = &mut self.slots.borrow_mut()[usize::from(receiver.slot)];
                if matches!(state.running, Running::InSync | Running::Resyncing) {
                    // One that failed inside the commit does not hold it for certain.
                    state.position = stamp;
                }
            }
            self.count(|counts| counts.map_commits += 1);
        }
        Ok(())
    }

    /// The newest sequence that every member holds which the superblocks call receiving, or some
    /// of them after a round that failed: also one whose loss is judged and not recorded, because
    /// a crash now would make it start.
    fn held_by_all(&self) -> u64 {
        let (config, attempt) = (self.config.borrow(), self.attempt.borrow());
        let slots = self.slots.borrow();
        let configs = std::iter::once(&*config).chain(attempt.as_ref());
        let records = configs.flat_map(|config| config.slots.iter().zip(slots.iter()));
        let receiving = records
            .filter(|(record, _)| matches!(record.state, SlotState::InSync | SlotState::Resyncing));
        let held = receiving.map(|(_, slot)| slot.position.sequence);
        held.min().unwrap_or(0)
    }

    /// Writes page images to both copies on every member of `view`; members that fail while
    /// another in-sync one succeeds begin to be lost. Requests up to `ahead` may go on before the end.
    async fn write_pages(
        &self,
        view: &View<D>,
        pages: &[Page],
        buffer: &H::Buffer,
        ahead: Option<u64>,
    ) -> Result<(), Errno> {
        let layout = self.config.borrow().layout.clone();
        // Nobody goes ahead of all in-sync members: then nothing has to wait behind the commit, nor
        // to fail with it.
        let answers_first = |r: &Receiver<D>| r.in_sync && !r.geometry.keeps_order;
        let may_go_ahead = view.receivers.iter().any(answers_first);
        let mut under_way: Vec<FanOut<'_, D::Op>> = Vec::new();
        for (first, count) in runs(pages) {
            let page = pages[first];
            let Some(region) = layout.find(page.kind, page.slot) else {
                continue;
            };
            for copy in [region.copy_a, region.copy_b] {
                let mut fan_out = FanOut::new(&self.stalls);
                for receiver in &view.receivers {
                    let write = DiskRequest::Write {
                        offset: copy + page_offset(page.index),
                        span: Span {
                            buffer: buffer.clone(),
                            start: first * length(PAGE_BYTES),
                            len: count * length(PAGE_BYTES),
                        },
                        fua: true,
                    };
                    let op = if may_go_ahead {
                        receiver.disk.submit_barrier(write)
                    } else {
                        receiver.disk.submit(write)
                    };
                    fan_out.push(receiver.slot, receiver.in_sync, op);
                }
                under_way.push(fan_out);
            }
        }
        // A member is judged by all its writes together: it has the commit or it has not.
        let lacking = self
            .outcomes_of(view, under_way, ahead.filter(|_| may_go_ahead))
            .await;
        self.judge_lacking(view, &lacking, "a map commit")
    }

    /// Waits for all writes of a commit; the error of each member that lacks one.
    async fn outcomes_of(
        &self,
        view: &View<D>,
        mut under_way: Vec<FanOut<'_, D::Op>>,
        ahead: Option<u64>,
    ) -> [Option<Errno>; SLOTS_MAX] {
        let keep_order = view.receivers.iter().filter(|r| r.geometry.keeps_order);
        let keep_order = keep_order.fold(0, |all: u16, r| all | 1 << r.slot);
        let ahead = ahead.filter(|_| keep_order != 0);
        let mut lacking = [None; SLOTS_MAX];
        let mut over = vec![false; under_way.len()];
        poll_fn(|context| {
            for (fan_out, over) in under_way.iter_mut().zip(&mut over) {
                if *over {
                    continue;
                }
                let Poll::Ready(outcomes) = Pin::new(fan_out).poll(context) else {
                    continue;
                };
                *over = true;
                self.lose_stalled(&outcomes, "a map commit");
                for outcome in outcomes.iter() {
                    if let Err(errno) = outcome.result {
                        lacking[usize::from(outcome.slot)] = Some(errno);
                    }
                }
            }
            if over.iter().all(|over| *over) {
                return Poll::Ready(());
            }
            let held = |fan_out: &FanOut<'_, D::Op>| fan_out.has_succeeded_but_for(keep_order);
            if let Some(ahead) = ahead.filter(|ahead| *ahead > self.commits.ahead.get())
                && under_way.iter().all(held)
            {
                self.commits.ahead.set(ahead);
                self.commits.waiting.wake_all();
            }
            Poll::Pending
        })
        .await;
        lacking
    }

    /// Loses whoever has given no answer within the deadline, at once: whether the other
    /// members succeed in the end or not, what it owes must not strike a later write (R13). A
    /// request that is given up has succeeded on another in-sync member, so one remains.
    pub(super) fn lose_stalled(&self, outcomes: &Outcomes, what: &str) {
        for outcome in outcomes.iter() {
            if outcome.result == Err(Errno::TIMED_OUT) {
                let reason = format!("{what} got no answer within the deadline");
                self.begin_loss(outcome.slot, &reason);
            }
        }
    }

    /// Loses the members that lack something another in-sync member has; when all in-sync
    /// members lack it, none of them is lost and the error is returned (R8).
    pub(super) fn judge_lacking(
        &self,
        view: &View<D>,
        lacking: &[Option<Errno>],
        what: &str,
    ) -> Result<(), Errno> {
        let lacks = |slot: u8| lacking[usize::from(slot)];
        // One that was lost meanwhile proves nothing.
        let holds = |r: &&Receiver<D>| r.in_sync && self.stalls.is_in_sync(r.slot);
        let mut in_sync = view.receivers.iter().filter(holds);
        if in_sync.clone().all(|r| lacks(r.slot).is_some()) {
            let errno = in_sync.find_map(|r| lacks(r.slot)).unwrap_or(Errno::IO);
            return Err(errno);
        }
        for receiver in &view.receivers {
            if let Some(errno) = lacks(receiver.slot) {
                self.begin_loss(receiver.slot, &format!("{what} failed: {errno}"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "commit_tests.rs"]
mod tests;
