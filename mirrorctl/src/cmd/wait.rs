//! `mirrorctl wait NAME`: waits until every member is in-sync.
//!
//! It gives up when nothing is being resynced and members are still not in-sync: they will not
//! become so by waiting.

use std::time::{Duration, Instant};

use mirror::control::{MemberState, MirrorState, Status};

use crate::failure::Failure;
use crate::progress::{Progress, kind, summary};
use crate::{Context, client, output};

/// How often the daemon is asked.
const EVERY: Duration = Duration::from_millis(100);
/// How long a mirror may be degraded without a resync before that is believed to last: between
/// two resyncs, and while a member joins, there is none under way.
const GRACE: Duration = Duration::from_secs(3);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The mirror
    name: String,
    /// Give up after this many seconds
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    let mut progress = Progress::new();
    let ended = wait(args, context, &mut progress, is_in_sync);
    progress.end();
    let status = ended?;
    if context.json {
        return output::json(&status);
    }
    let message = match &status.last_resync {
        Some(resync) => format!(
            "{} ({} resync of slot {})",
            summary(resync, status.size_bytes),
            kind(resync.kind),
            resync.slot
        ),
        None => format!("every member of mirror {} is in-sync", args.name),
    };
    output::line(&message);
    Ok(())
}

/// Waits until the member at `path` is in-sync, however long that takes.
pub(crate) fn until_back(context: &Context, name: &str, path: &str) -> Result<(), Failure> {
    let is_back = |status: &Status| {
        let mut members = status.members.iter();
        members.any(|m| m.path == path && m.state == MemberState::InSync)
    };
    let args = Args {
        name: name.to_owned(),
        timeout: None,
    };
    let mut progress = Progress::new();
    let ended = wait(&args, context, &mut progress, is_back);
    progress.end();
    ended.map(|_| ())
}

fn wait(
    args: &Args,
    context: &Context,
    progress: &mut Progress,
    is_done: impl Fn(&Status) -> bool,
) -> Result<Status, Failure> {
    let began = Instant::now();
    let mut idle_since: Option<Instant> = None;
    loop {
        let status = client::status(&context.run_dir, &args.name)?;
        if is_done(&status) {
            return Ok(status);
        }
        if status.resync.is_some() || status.state == MirrorState::Resyncing {
            idle_since = None;
        } else if idle_since.get_or_insert_with(Instant::now).elapsed() >= GRACE {
            return Err(hopeless(&status));
        }
        if !context.json {
            progress.show(&status);
        }
        let limit = args.timeout.map(Duration::from_secs);
        if limit.is_some_and(|limit| began.elapsed() >= limit) {
            return Err(Failure::busy(format!(
                "Not every member of mirror {} was in-sync within {} s: {}. 'mirrorctl status \
                 {}' shows how far it has come.",
                args.name,
                args.timeout.unwrap_or_default(),
                laggards(&status),
                args.name
            )));
        }
        std::thread::sleep(EVERY);
    }
}

fn is_in_sync(status: &Status) -> bool {
    let mut members = status.members.iter();
    members.all(|member| member.state == MemberState::InSync)
}

/// The members that are not in-sync, as a part of a sentence.
fn laggards(status: &Status) -> String {
    let each = status.members.iter().filter_map(|member| {
        if member.state == MemberState::InSync {
            return None;
        }
        let state = super::status::member_state(member.state);
        let reason = member.reason.as_deref().map(|why| format!(" ({why})"));
        Some(format!(
            "slot {} is {state}{}",
            member.slot,
            reason.unwrap_or_default()
        ))
    });
    each.collect::<Vec<_>>().join(", ")
}

fn hopeless(status: &Status) -> Failure {
    Failure::failed(format!(
        "Nothing is being resynced, so waiting will not bring mirror {} in-sync: {}. Bring a \
         member back with 'mirrorctl re-add {} PATH', or put in a new one with 'mirrorctl add'.",
        status.name,
        laggards(status),
        status.name
    ))
}
