//! `mirrorctl status [NAME]`: the state of one running mirror, or of all.

use std::time::Duration;

use mirror::control::{MemberState, MirrorState, Status};

use crate::failure::Failure;
use crate::progress::{kind, sentence, summary};
use crate::size::human;
use crate::{Context, client, output};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The mirror; all that run when none is given
    name: Option<String>,
    /// Show it anew each second
    #[arg(long)]
    watch: bool,
}

/// Bytes of a block, the unit in which copies are made equal.
const BLOCK_BYTES: u64 = 4096;

/// What was heard of the mirrors.
#[derive(Debug, Default)]
struct Heard {
    mirrors: Vec<Status>,
    failures: Vec<Failure>,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    loop {
        let heard = listen(args, context)?;
        if args.watch && output::is_terminal() && !context.json {
            output::raw("\x1b[H\x1b[2J");
        }
        show(args, context, &heard)?;
        if !args.watch {
            // With all mirrors asked for, the ones that answer are shown before this.
            return heard.failures.into_iter().next().map_or(Ok(()), Err);
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn listen(args: &Args, context: &Context) -> Result<Heard, Failure> {
    let mut heard = Heard::default();
    if let Some(name) = &args.name {
        heard.mirrors.push(client::status(&context.run_dir, name)?);
        return Ok(heard);
    }
    for name in context.run_dir.names()? {
        match client::status(&context.run_dir, &name) {
            Ok(status) => heard.mirrors.push(status),
            Err(failure) => heard.failures.push(failure),
        }
    }
    Ok(heard)
}

fn show(args: &Args, context: &Context, heard: &Heard) -> Result<(), Failure> {
    // The first failure becomes that of the command, except when it goes on watching.
    let first = usize::from(!args.watch);
    for failure in heard.failures.iter().skip(first) {
        output::failure(failure);
    }
    if context.json {
        let one = args.name.as_ref().and_then(|_| heard.mirrors.first());
        return match (one, args.watch) {
            (Some(status), false) => output::json(status),
            (Some(status), true) => output::json_line(status),
            (None, false) => output::json(&heard.mirrors),
            (None, true) => output::json_line(&heard.mirrors),
        };
    }
    if heard.mirrors.is_empty() && heard.failures.is_empty() {
        output::line(&format!(
            "no mirror is running (there is no control socket in {})",
            context.run_dir.path().display()
        ));
    }
    let texts: Vec<String> = heard.mirrors.iter().map(text).collect();
    if !texts.is_empty() {
        output::raw(&texts.join("\n"));
    }
    Ok(())
}

/// A mirror's state for a person.
fn text(status: &Status) -> String {
    let mut text = format!(
        "mirror {}: {}, {} on {}\n",
        status.name,
        mirror_state(status.state),
        human(status.size_bytes),
        status.device.as_deref().unwrap_or("no device")
    );
    text.push_str(&format!(
        "  uuid {}, event count {}, daemon process {}, logical block {} bytes\n",
        status.uuid, status.event_count, status.daemon_pid, status.logical_block_bytes
    ));
    if !status.write_intent {
        text.push_str("  NO WRITE INTENT IS RECORDED: an unclean stop will lose data\n");
    }
    text.push_str(&troubles(status));
    text.push_str(&output::table(&member_rows(status)));
    text.push_str(&extents(status));
    if let Some(resync) = &status.resync {
        text.push_str(&format!("  {}\n", sentence(resync)));
        text.push_str(&format!("    {}\n", resync.reason));
    }
    if let Some(resync) = &status.last_resync {
        text.push_str(&format!(
            "  last resync (slot {}, {}{}): {}\n",
            resync.slot,
            kind(resync.kind),
            if resync.finished {
                ""
            } else {
                ", not finished"
            },
            summary(resync, status.size_bytes)
        ));
    }
    if let Some(scrub) = &status.scrub {
        text.push_str(&format!("  scrub: {}\n", super::scrub::line(scrub)));
    }
    let io = &status.io;
    text.push_str(&format!(
        "  {} reads ({}), {} writes ({}), {} flushes, {} discards, {} errors, {} map commits\n",
        io.reads,
        human(io.read_bytes),
        io.writes,
        human(io.written_bytes),
        io.flushes,
        io.discards,
        io.errors,
        io.map_commits
    ));
    text
}

/// What keeps the mirror from doing its job, and what to do about it.
fn troubles(status: &Status) -> String {
    let mut text = String::new();
    if status.state == MirrorState::WriteBlocked {
        text.push_str(
            "  WRITES ANSWER EIO: a loss could not be recorded on any in-sync member; reads go on\n    \
             see to the in-sync members' disks (cable, power, room under an image file): the \
             daemon tries again\n    by itself; if writes are still refused then, stop and start \
             the mirror\n",
        );
    }
    if status.flush_error {
        text.push_str(&format!(
            "  FLUSH ANSWERS EIO: a flush failed on every in-sync member, what was written before \
             it may be lost\n    check the disks and that data, and write it anew; then, or to \
             accept the loss: 'mirrorctl clear-flush-error {}'\n",
            status.name
        ));
    }
    text
}

fn member_rows(status: &Status) -> Vec<Vec<String>> {
    let head = ["slot", "state", "missed", "path", ""];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for member in &status.members {
        let fence = match (member.unfenced, peer::is_address(&member.path)) {
            (true, _) => Some("unfenced".to_owned()),
            (false, true) => Some("fenced".to_owned()),
            (false, false) => None,
        };
        let reads_all = member.scrub_reads_all.then(|| "scrub reads all".to_owned());
        let notes = fence.into_iter().chain(reads_all);
        let mut notes: Vec<String> = notes.chain(member.reason.clone()).collect();
        for (count, what) in [
            (member.read_errors, "read errors"),
            (member.repaired_blocks, "blocks repaired"),
            (member.orphans, "operations still owed by the old device"),
        ] {
            if count > 0 {
                notes.push(format!("{count} {what}"));
            }
        }
        let empty = member.uuid.is_none() && member.path.is_empty();
        rows.push(vec![
            member.slot.to_string(),
            if empty {
                "empty".to_owned()
            } else {
                member_state(member.state).to_owned()
            },
            if member.missed_bytes == 0 {
                "-".to_owned()
            } else {
                human(member.missed_bytes)
            },
            if member.path.is_empty() {
                "-".to_owned()
            } else {
                member.path.clone()
            },
            notes.join("; "),
        ]);
    }
    rows
}

fn extents(status: &Status) -> String {
    let counts = &status.extents;
    let mut text = format!(
        "  extents: {} written ({} hot of a budget of {}, {} cool), {} unwritten, {} discarded\n",
        counts.hot.saturating_add(counts.cool),
        counts.hot,
        counts.hot_budget,
        counts.cool,
        counts.unwritten,
        counts.discarded
    );
    if counts.hot > counts.hot_budget {
        text.push_str(&format!(
            "  the budget of hot extents is exceeded by {}: after an unclean stop, more is to be \
             equalised than planned\n    they cool when writes to them pause; if this lasts, \
             start with a larger --hot-budget\n",
            counts.hot - counts.hot_budget
        ));
    }
    if counts.unequalised_blocks > 0 {
        text.push_str(&format!(
            "  {} blocks ({}) still to be equalised after an unclean stop; goes on by itself\n",
            counts.unequalised_blocks,
            human(counts.unequalised_blocks.saturating_mul(BLOCK_BYTES))
        ));
    }
    text
}

fn mirror_state(state: MirrorState) -> &'static str {
    match state {
        MirrorState::InSync => "in-sync",
        MirrorState::Degraded => "degraded",
        MirrorState::Resyncing => "resyncing",
        MirrorState::WriteBlocked => "write-blocked",
    }
}

/// The state in the words that the JSON uses.
pub(super) fn member_state(state: MemberState) -> &'static str {
    match state {
        MemberState::InSync => "in-sync",
        MemberState::Resyncing => "resyncing",
        MemberState::Stale => "stale",
        MemberState::Faulty => "faulty",
        MemberState::Missing => "missing",
    }
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
