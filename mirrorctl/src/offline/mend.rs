//! Writing what was found to be right, an extent at a time.
//!
//! The order is that of the module above: checksums of those who hold the right content, copies,
//! the other checksums, each durable before the next begins, and each copy read back from the
//! disk. A member that fails keeps what it has, and the others go on without it.

use dirty_map::{BLOCK_BYTES, Block, Extent, SUM_PAGE_BYTES};
use mirror::verdict::Mend;

use super::blocks::{Sums, View};
use super::device::Buffer;
use super::member::Member;
use crate::failure::{Failure, words};

/// A block to be mended.
pub(super) struct Job {
    pub(super) block: Block,
    pub(super) mend: Mend,
    /// The right content, where a copy has to be rewritten.
    pub(super) content: Option<Vec<u8>>,
}

/// What could not be mended.
#[derive(Debug)]
pub(super) struct Failed {
    /// The member, by its index among the in-sync ones.
    pub(super) member: usize,
    /// The job; `None` for everything on that member in this extent.
    pub(super) job: Option<usize>,
    /// Why.
    pub(super) why: String,
}

/// What became of the jobs of an extent.
#[derive(Debug, Default)]
pub(super) struct Done {
    pub(super) failed: Vec<Failed>,
    /// Checksums were written that only became durable with the next flush: they vouch for
    /// contents that were durable before.
    pub(super) unsynced: bool,
}

/// Mends the blocks of an extent.
pub(super) fn apply(view: &View<'_>, extent: Extent, sums: &mut [Sums], jobs: &[Job]) -> Done {
    let mut done = Done::default();
    let members: Vec<&Member> = view.in_sync().collect();
    let rewrites = jobs.iter().any(|job| job.content.is_some());
    for (index, member) in members.iter().enumerate() {
        let holds = |job: &&Job| !job.mend.rewrite.contains(index);
        if let Err(why) = vouch(
            view,
            extent,
            member,
            index,
            &mut sums[index],
            jobs.iter().filter(holds),
            rewrites,
        ) {
            done.fail(index, None, why);
        }
    }
    if !rewrites {
        done.unsynced = true;
        return done;
    }
    if !done.failed.is_empty() {
        // What is right would not be provable all the time.
        for index in 0..members.len() {
            done.fail(
                index,
                None,
                "a checksum page could not be written".to_owned(),
            );
        }
        return done;
    }
    for (index, member) in members.iter().enumerate() {
        let before = done.failed.len();
        rewrite(view, member, index, jobs, &mut done);
        let failed = &done.failed[before..];
        let lost = failed.iter().any(|failed| failed.job.is_none());
        let mended = jobs
            .iter()
            .enumerate()
            .filter(|(job, _)| !lost && !failed.iter().any(|failed| failed.job == Some(*job)));
        let mended = mended
            .map(|(_, job)| job)
            .filter(|job| job.mend.rewrite.contains(index));
        let mended: Vec<&Job> = mended.collect();
        if let Err(why) = vouch(
            view,
            extent,
            member,
            index,
            &mut sums[index],
            mended.into_iter(),
            true,
        ) {
            done.fail(index, None, why);
        }
    }
    done
}

impl Done {
    fn fail(&mut self, member: usize, job: Option<usize>, why: String) {
        self.failed.push(Failed { member, job, why });
    }
}

/// Stores checksums on one member, durably unless that can wait.
fn vouch<'a>(
    view: &View<'_>,
    extent: Extent,
    member: &Member,
    index: usize,
    sums: &mut Sums,
    jobs: impl Iterator<Item = &'a Job>,
    durably: bool,
) -> Result<(), String> {
    let Some(at) = view.sum_page_at(extent) else {
        return Ok(());
    };
    let mut changed = false;
    for Job { block, mend, .. } in jobs {
        if mend.stale.contains(index) || mend.unknown.contains(index) {
            sums.page.set(*block, Some(mend.sum));
            changed = true;
        }
    }
    if !changed {
        return Ok(());
    }
    let mut bytes = [0; SUM_PAGE_BYTES];
    sums.page.encode(&mut bytes);
    let written = member.device.write(at, &bytes);
    let synced = written.and_then(|()| {
        if durably {
            member.device.sync()
        } else {
            Ok(())
        }
    });
    synced.map_err(|e| format!("its checksum page could not be written ({})", words(&e)))
}

/// Rewrites the wrong copies of one member, flushes it and reads them back.
fn rewrite(view: &View<'_>, member: &Member, index: usize, jobs: &[Job], done: &mut Done) {
    let wrong = |(_, job): &(usize, &Job)| job.mend.rewrite.contains(index);
    let mut written = Vec::new();
    for (number, job) in jobs.iter().enumerate().filter(wrong) {
        let Some(content) = &job.content else {
            continue;
        };
        let offset = view.data_offset() + job.block.0 * BLOCK_BYTES;
        match member.device.write(offset, content) {
            Ok(()) => written.push((number, offset, content)),
            Err(e) => done.fail(
                index,
                Some(number),
                format!("it could not be written ({})", words(&e)),
            ),
        }
    }
    if written.is_empty() {
        return;
    }
    if let Err(e) = member.device.sync() {
        done.fail(
            index,
            None,
            format!("it could not be made durable ({})", words(&e)),
        );
        return;
    }
    for (number, offset, content) in written {
        let mut buffer = Buffer::new(content.len());
        let why = match member.device.read(offset, buffer.get_mut()) {
            Ok(bad) if bad.is_empty() && buffer.get() == content => continue,
            Ok(bad) if bad.is_empty() => "it reads back as something else".to_owned(),
            Ok(_) => "it cannot be read back".to_owned(),
            Err(gone) => gone.message,
        };
        done.fail(index, Some(number), why);
    }
}

/// Makes the last checksums durable.
pub(super) fn sync_all(view: &View<'_>) -> Result<(), Failure> {
    for member in view.in_sync() {
        member.device.sync().map_err(|e| {
            Failure::failed(format!(
                "{} did not make durable what was written to it: {}.",
                member.path,
                words(&e)
            ))
        })?;
    }
    Ok(())
}
