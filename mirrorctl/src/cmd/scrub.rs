//! `mirrorctl scrub VERB NAME`: what is scrubbed, what was found, and where.

mod map;
mod report;
mod svg;

use std::path::PathBuf;

use clap::Subcommand;
use mirror::control::{
    Reply, Request, ScrubEnding, ScrubPass, ScrubState, ScrubStatus, ScrubTotals,
};

use crate::failure::Failure;
use crate::size::human;
use crate::when::{moment, time};
use crate::{Context, client, output};

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Begin a pass over everything that is written, and go on if paused
    Start(StartArgs),
    /// Scrub nothing until resumed, also after a restart
    Pause(Named),
    /// Go on after a pause
    Resume(Named),
    /// End the pass under way; the next one begins at its usual time
    Cancel(Named),
    /// Show what is going on and what has been done
    Status(Named),
    /// List everything that was found: when, where, what, and what was done
    Report(Named),
    /// Show the device as a picture: written, hot, missed, repaired, damaged
    Map(MapArgs),
}

/// Names the mirror.
#[derive(Debug, clap::Args)]
pub(crate) struct Named {
    /// The mirror
    name: String,
}

/// What `start` is given.
#[derive(Debug, clap::Args)]
pub(crate) struct StartArgs {
    /// The mirror
    name: String,
    /// Repair nothing; only say what is wrong
    #[arg(long)]
    check_only: bool,
    /// This pass only: from now on none begins by itself, until --days is given again
    #[arg(long, conflicts_with = "days")]
    once: bool,
    /// From now on, days from the begin of one pass to that of the next; 0: only by command
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=3650))]
    days: Option<u16>,
    /// From now on, most that is read from a member a second; 0: as much as it gives
    #[arg(long, value_name = "MIB")]
    ceiling: Option<u32>,
}

/// What `map` is given.
#[derive(Debug, clap::Args)]
pub(crate) struct MapArgs {
    /// The mirror
    name: String,
    /// Write a picture (SVG) to this file instead
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    match &args.verb {
        Verb::Start(start) => {
            let request = Request::ScrubStart {
                check_only: start.check_only,
                once: start.once,
                days: start.days,
                ceiling_mib: start.ceiling,
            };
            command(&start.name, &request, context)
        }
        Verb::Pause(named) => command(&named.name, &Request::ScrubPause, context),
        Verb::Resume(named) => command(&named.name, &Request::ScrubResume, context),
        Verb::Cancel(named) => command(&named.name, &Request::ScrubCancel, context),
        Verb::Status(named) => status(&named.name, context),
        Verb::Report(named) => report::run(&named.name, context),
        Verb::Map(args) => map::run(&args.name, args.svg.as_deref(), context),
    }
}

fn command(name: &str, request: &Request, context: &Context) -> Result<(), Failure> {
    let message = client::command(&context.run_dir, name, request)?;
    output::done(context.json, &message)
}

fn status(name: &str, context: &Context) -> Result<(), Failure> {
    let reply = client::ask(&context.run_dir, name, &Request::ScrubStatus, client::QUICK)?;
    let Reply::ScrubStatus(status) = reply else {
        return Err(client::odd_reply(name));
    };
    if context.json {
        return output::json(&status);
    }
    output::raw(&text(name, &status));
    Ok(())
}

/// What is going on, in a line of `mirrorctl status`.
pub(crate) fn line(status: &ScrubStatus) -> String {
    let mut text = match (status.state, &status.pass) {
        (ScrubState::Paused, None) => "paused".to_owned(),
        (ScrubState::Paused, Some(pass)) => {
            format!("paused; pass {}: {}", pass.number, share(pass))
        }
        (_, Some(pass)) => format!("pass {}: {}", pass.number, progress(pass)),
        (_, None) => match (status.passes.first(), status.next_at_secs) {
            (None, None) => "never; only by command".to_owned(),
            (None, Some(_)) => "no pass yet".to_owned(),
            (Some(last), _) => format!("last {}", ended(last)),
        },
    };
    let found = &status.totals;
    if found.rewritten_blocks + found.mended_blocks > 0 {
        text.push_str(&format!(
            "; {} repaired since creation",
            counted(found.rewritten_blocks + found.mended_blocks, "block")
        ));
    }
    if status.damaged_blocks > 0 {
        text.push_str(&format!(
            "; DAMAGED BLOCKS: {}, of which no copy is known to be right; see 'mirrorctl scrub report'",
            status.damaged_blocks
        ));
    }
    text
}

/// The whole state for a person.
fn text(name: &str, status: &ScrubStatus) -> String {
    let mut text = format!("mirror {name}, scrub: {}\n", line(status));
    if let Some(pass) = &status.pass {
        text.push_str(&format!(
            "  pass {} began {}{}: {}, {} repaired, {} damaged\n",
            pass.number,
            moment(pass.began_secs),
            if pass.check_only { ", only checks" } else { "" },
            counted(pass.findings, "finding"),
            counted(pass.repaired_blocks, "block"),
            pass.damaged_blocks
        ));
        text.push_str(&format!("  {}\n", pace(status)));
    }
    text.push_str(&format!("  {}\n", plan(status)));
    text.push_str(&format!(
        "  error budget of each member (blocks rewritten / hours): {}\n",
        status.error_budget
    ));
    text.push_str(&totals(&status.totals));
    if !status.passes.is_empty() {
        text.push_str("  passes, the newest first:\n");
        text.push_str(&passes(&status.passes));
    }
    if !status.kept {
        text.push_str(
            "  nothing of this outlives the daemon: the mirror was made by a version that had no \
             room for it\n",
        );
    }
    text
}

fn pace(status: &ScrubStatus) -> String {
    let mut text = match status.allowed_bytes {
        Some(bytes) => format!("goes at up to {}/s of each member", human(bytes)),
        None => "goes as fast as the members give".to_owned(),
    };
    text.push_str(&format!(
        ", at least {}/s to end in time",
        human(status.floor_bytes)
    ));
    if let Some(ratio) = status.p99_permille {
        text.push_str(&format!(
            "; p99 of requests with / without: {}.{:02}",
            ratio / 1000,
            ratio % 1000 / 10
        ));
    }
    text
}

fn plan(status: &ScrubStatus) -> String {
    let every = match status.days {
        0 => "a pass begins only by command".to_owned(),
        days => format!("a pass every {days} days"),
    };
    let next = match status.next_at_secs {
        Some(0) => ", the next when something is written".to_owned(),
        Some(at) => format!(", the next on {}", moment(at)),
        None => String::new(),
    };
    let ceiling = match status.ceiling_mib {
        Some(mib) => format!(", at most {mib} MiB/s of each member"),
        None => String::new(),
    };
    format!("{every}{next}{ceiling}")
}

fn totals(totals: &ScrubTotals) -> String {
    let mut text = format!(
        "  since creation: {}, {} read from members, {} blocks checked\n",
        plural_passes(totals.passes),
        human(totals.member_bytes),
        totals.checked_blocks
    );
    let listed = |counts: &[(u64, &str)]| {
        let counts = counts.iter().filter(|(count, _)| *count > 0);
        let listed: Vec<String> = counts
            .map(|(count, what)| format!("{count} {what}"))
            .collect();
        listed.join(", ")
    };
    let found = listed(&[
        (totals.unreadable_blocks, "unreadable"),
        (totals.checksum_failed_blocks, "that failed their checksum"),
        (totals.copies_differ_blocks, "whose copies differed"),
        (totals.checksum_stale_blocks, "with a stale checksum"),
        (
            totals.page_unreadable_blocks,
            "whose checksums were unreadable",
        ),
    ]);
    if found.is_empty() {
        text.push_str("    nothing was found\n");
        return text;
    }
    text.push_str(&format!("    found, in blocks: {found}\n"));
    let done = listed(&[
        (totals.rewritten_blocks, "rewritten from a good copy"),
        (totals.mended_blocks, "given a new checksum"),
        (totals.damaged_blocks, "damaged"),
        (totals.found_by_reads_blocks, "of all that found by reads"),
        (totals.forgotten_blocks, "of the damaged no longer listed"),
    ]);
    text.push_str(&format!("    done, in blocks: {done}\n"));
    text
}

fn passes(passes: &[ScrubPass]) -> String {
    let head = [
        "pass", "began", "took", "read", "findings", "repaired", "damaged", "",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for pass in passes {
        let mut notes = Vec::new();
        if pass.ending == Some(ScrubEnding::Cancelled) {
            notes.push("cancelled".to_owned());
        }
        if pass.check_only {
            notes.push("only checked".to_owned());
        }
        if pass.left_out_extents > 0 {
            notes.push(could_not(pass.left_out_extents));
        }
        rows.push(vec![
            pass.number.to_string(),
            moment(pass.began_secs),
            time(pass.ended_secs.unwrap_or(0).saturating_sub(pass.began_secs)),
            human(pass.member_bytes),
            pass.findings.to_string(),
            pass.repaired_blocks.to_string(),
            pass.damaged_blocks.to_string(),
            notes.join(", "),
        ]);
    }
    output::table(&rows)
}

/// How much of the pass is done.
fn share(pass: &ScrubPass) -> String {
    let (done, all) = (
        u128::from(pass.checked_bytes.unwrap_or(0)),
        u128::from(pass.written_bytes.unwrap_or(0)),
    );
    // What is written meanwhile may be checked as well.
    let permille = (done.min(all) * 1000).checked_div(all).unwrap_or(1000);
    format!(
        "{}.{} % of {}",
        permille / 10,
        permille % 10,
        human(pass.written_bytes.unwrap_or(0))
    )
}

fn progress(pass: &ScrubPass) -> String {
    let left = pass
        .left_secs
        .map(|secs| format!(", about {} to go", time(secs)));
    format!("{}{}", share(pass), left.unwrap_or_default())
}

fn ended(pass: &ScrubPass) -> String {
    let how = match pass.ending {
        Some(ScrubEnding::Cancelled) => "was cancelled",
        _ => "ended",
    };
    let mut text = format!(
        "pass {how} {}, {}",
        moment(pass.ended_secs.unwrap_or(0)),
        counted(pass.findings, "finding")
    );
    if pass.left_out_extents > 0 {
        text.push_str(&format!(", {}", could_not(pass.left_out_extents)));
    }
    text
}

/// What a pass has left out.
fn could_not(extents: u64) -> String {
    format!("{} COULD NOT BE CHECKED", counted(extents, "extent"))
}

fn plural_passes(count: u64) -> String {
    if count == 1 {
        "1 pass".to_owned()
    } else {
        format!("{count} passes")
    }
}

/// `1 block`, `2 blocks`.
fn counted(count: u64, noun: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {noun}{plural}")
}

#[cfg(test)]
#[path = "scrub_tests.rs"]
mod tests;
