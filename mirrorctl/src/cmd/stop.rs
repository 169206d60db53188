//! `mirrorctl stop NAME`: stops a running mirror and waits until its daemon has gone, so that
//! the members are free when the command returns.

use std::os::fd::OwnedFd;
use std::time::Duration;

use mirror::control::{MemberRef, Request};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::failure::Failure;
use crate::{Context, client, output};

/// How long the daemon may take to end after it has said that it is done.
const LEAVE_TAKING: Duration = Duration::from_secs(30);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The mirror
    name: String,
    /// Stop even while the device is open
    #[arg(long)]
    force: bool,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    stop(context, &args.name, args.force, None).and_then(|done| output::done(context.json, &done))
}

/// Stops a mirror and waits until its daemon has gone; says what has come of it.
pub(crate) fn stop(
    context: &Context,
    name: &str,
    force: bool,
    hand_over: Option<MemberRef>,
) -> Result<String, Failure> {
    let status = client::status(&context.run_dir, name)?;
    let daemon = handle_of(status.daemon_pid);
    let request = Request::Stop { force, hand_over };
    let message = client::command(&context.run_dir, name, &request)?;
    if let Some(daemon) = daemon {
        wait_for_end(&daemon).map_err(|e| {
            Failure::busy(format!(
                "{message}, but its daemon (process {}) has not ended within {} s ({}); see {}.",
                status.daemon_pid,
                LEAVE_TAKING.as_secs(),
                crate::failure::words(&e),
                context.run_dir.log(name).display()
            ))
        })?;
    }
    Ok(message)
}

/// A handle of the process; `None` when it has gone or runs in another namespace.
fn handle_of(pid: u32) -> Option<OwnedFd> {
    let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
    pidfd_open(pid, PidfdFlags::empty()).ok()
}

fn wait_for_end(daemon: &OwnedFd) -> std::io::Result<()> {
    let limit = Timespec::try_from(LEAVE_TAKING).map_err(std::io::Error::other)?;
    let mut fds = [PollFd::new(daemon, PollFlags::IN)];
    if rustix::event::poll(&mut fds, Some(&limit))? == 0 {
        return Err(std::io::ErrorKind::TimedOut.into());
    }
    Ok(())
}
