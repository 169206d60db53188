//! `mirrorctl start NAME [PATH...]`: starts the daemon of a mirror and waits until its device
//! takes I/O.
//!
//! Which members are good is decided by the daemon; this command only finds candidates: the
//! paths given, or else whatever carries the mirror's name where it was last seen, where
//! `--scan` says, or on the machine's block devices.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::ValueEnum;
use mirror::budget::ErrorBudget;
use mirror::control::MemberState;
use mirror::superblock::REASON_BYTES_MAX;

use crate::client;
use crate::daemon::{self, Ready};
use crate::failure::Failure;
use crate::run_dir::{RunDir, check_name};
use crate::{Context, medium, output, scan};

/// The kernel's door to ublk.
const UBLK_CONTROL: &str = "/dev/ublk-control";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The mirror
    name: String,
    /// Its members; found by a scan when none is given
    paths: Vec<PathBuf>,
    /// Look for members on this device or in this directory (may be repeated)
    #[arg(long, value_name = "DIR|DEVICE", conflicts_with = "paths")]
    scan: Vec<PathBuf>,
    #[command(flatten)]
    options: Options,
    /// Stay in the foreground and print what the daemon prints
    #[arg(long)]
    foreground: bool,
}

/// How applications reach the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Front {
    /// A block device, /dev/ublkbN
    Ublk,
    /// A Network Block Device server on a unix socket
    Nbd,
}

/// What `start` and `assemble` pass on to the daemon.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How applications reach the device [default: ublk where the kernel has it, else nbd]
    #[arg(long, value_enum)]
    front: Option<Front>,
    /// Where the NBD server listens [default: NAME.nbd in the run directory]
    #[arg(long, value_name = "PATH")]
    pub(crate) nbd_socket: Option<PathBuf>,
    /// Let the NBD server listen on TCP as well; anybody who can connect can write
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) nbd_tcp: Option<SocketAddr>,
    /// Start although an absent member may hold newer data
    #[arg(long)]
    force: bool,
    /// Why it is forced; kept in the superblocks
    #[arg(long, value_name = "TEXT", requires = "force", value_parser = reason)]
    reason: Option<String>,
    /// The servers of peer members have ended every earlier session with them (or were restarted)
    #[arg(long)]
    peer_sessions_over: bool,
    /// Another address of a peer member's server (only one of ours: `mirrorctl export`), used when
    /// the one before it fails; may be given several times
    #[arg(long = "path", value_name = "ADDRESS")]
    other_paths: Vec<peer::Address>,
    /// Take peer members from another host that uses them, which loses them; `mirrorctl export`
    /// then ends its sessions
    #[arg(long)]
    take_over: bool,
    /// Record no write intent: an unclean stop then loses data. For benchmarks only
    #[arg(long)]
    no_intent_unsafe_for_benchmarks: bool,
    /// Requests in flight at once
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    queue_depth: Option<u16>,
    /// How long a member may take to answer before it is lost [default: 5 with peers, else 30]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=3600))]
    deadline: Option<u32>,
    /// How many extents may be hot before it is reported
    #[arg(long, value_name = "EXTENTS", value_parser = clap::value_parser!(u32).range(1..))]
    hot_budget: Option<u32>,
    /// Memory that the state of hot extents may take, beyond which they cool early
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u16).range(1..))]
    hot_memory: Option<u16>,
    /// Check reads against the checksums of their blocks: `always`, or `scrub-only` [default: always]
    #[arg(long, value_enum)]
    check_reads: Option<CheckReads>,
    /// How often a minute a peer member may come back by itself when the network does; 0: only by
    /// command [default: 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=60))]
    #[arg(env = "UBLK_MIRROR_RETURNS", hide_env_values = true)]
    returns: Option<u8>,
    /// Days from the begin of one scrub pass to that of the next; 0: only by command
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=3650))]
    #[arg(env = "UBLK_MIRROR_SCRUB_DAYS", hide_env_values = true)]
    scrub_days: Option<u16>,
    /// Most that a scrub reads from a member a second
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..))]
    scrub_ceiling: Option<u32>,
    /// Least that a resync copies a second, whatever it costs the applications [default: 10]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..))]
    resync_floor: Option<u32>,
    /// Most that a resync copies a second
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..))]
    resync_ceiling: Option<u32>,
    /// Blocks that may have to be rewritten on a member within so many hours before it is failed;
    /// or `unlimited` [default: 64/24]
    #[arg(long, value_name = "BLOCKS/HOURS")]
    error_budget: Option<ErrorBudget>,
    /// Memory for checksums that have been read
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u16).range(1..))]
    checksum_cache: Option<u16>,
}

/// When reads are checked.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum CheckReads {
    /// Each; what does not fit is answered from another member, and the bad copy rewritten
    Always,
    /// Never; only a scrub checks
    ScrubOnly,
}

impl CheckReads {
    fn word(self) -> &'static str {
        match self {
            Self::Always => "always",
            Self::ScrubOnly => "scrub-only",
        }
    }
}

impl Options {
    /// Whoever goes on without the other host by force says why.
    pub(crate) fn refuse_force_without_reason(&self) -> Result<(), Failure> {
        if self.force && self.reason.is_none() {
            return Err(Failure::usage(
                "With --force the other host loses what it alone holds: say why with --reason, so \
                 that whoever finds two histories later can tell.",
            ));
        }
        Ok(())
    }

    fn arguments(&self, run_dir: &RunDir, name: &str, members: &[PathBuf]) -> Vec<OsString> {
        let mut args: Vec<OsString> = vec!["--name".into(), name.into()];
        args.extend(["--run-dir".into(), run_dir.path().into(), "--front".into()]);
        args.push(match self.front.unwrap_or_else(default_front) {
            Front::Ublk => "ublk".into(),
            Front::Nbd => "nbd".into(),
        });
        let mut option = |flag: &str, value: Option<OsString>| {
            if let Some(value) = value {
                args.extend([flag.into(), value]);
            }
        };
        let absolute = |path: &PathBuf| medium::absolute(path).unwrap_or_else(|_| path.clone());
        let number = |n: u32| OsString::from(n.to_string());
        option(
            "--nbd-socket",
            self.nbd_socket.as_ref().map(|p| absolute(p).into()),
        );
        option(
            "--nbd-tcp",
            self.nbd_tcp.map(|addr| addr.to_string().into()),
        );
        option("--queue-depth", self.queue_depth.map(|n| number(n.into())));
        option("--deadline", self.deadline.map(number));
        option("--hot-budget", self.hot_budget.map(number));
        option("--hot-memory", self.hot_memory.map(|n| number(n.into())));
        option("--returns", self.returns.map(|n| number(n.into())));
        option("--scrub-days", self.scrub_days.map(|n| number(n.into())));
        option("--scrub-ceiling", self.scrub_ceiling.map(number));
        option("--resync-floor", self.resync_floor.map(number));
        option("--resync-ceiling", self.resync_ceiling.map(number));
        option(
            "--error-budget",
            self.error_budget.map(|budget| budget.to_string().into()),
        );
        option("--check-reads", self.check_reads.map(|c| c.word().into()));
        option("--reason", self.reason.as_ref().map(OsString::from));
        let cache = self.checksum_cache.map(|n| number(n.into()));
        option("--checksum-cache", cache);
        if self.force {
            args.push("--force".into());
        }
        if self.peer_sessions_over {
            args.push("--peer-sessions-over".into());
        }
        for path in &self.other_paths {
            args.push("--path".into());
            args.push(path.to_string().into());
        }
        if self.take_over {
            args.push("--take-over".into());
        }
        if self.no_intent_unsafe_for_benchmarks {
            args.push("--no-intent-unsafe-for-benchmarks".into());
        }
        args.push("--".into());
        args.extend(members.iter().map(|path| path.into()));
        args
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(self.deadline.unwrap_or_default().into())
    }
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    check_name(&args.name)?;
    refuse_running(context, &args.name)?;
    let members = candidates(&args.name, &args.paths, &args.scan, context)?;
    if args.foreground {
        context.run_dir.ensure()?;
        context.run_dir.set_hints(&args.name, &members);
        let arguments = args
            .options
            .arguments(&context.run_dir, &args.name, &members);
        let mut daemon = Command::new(daemon::program()?);
        return Err(daemon::run_in_place(daemon.args(arguments)));
    }
    start(context, &args.name, &members, &args.options)
}

/// How a mirror is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    /// With every member that could hold newer data.
    Start,
    /// Also without members that have handed the mirror over.
    Promote,
}

/// Starts a mirror and prints the sentence that says so.
pub(crate) fn start(
    context: &Context,
    name: &str,
    members: &[PathBuf],
    options: &Options,
) -> Result<(), Failure> {
    launch(context, name, members, options, Verb::Start)
}

/// [`start`], or a promotion.
pub(crate) fn launch(
    context: &Context,
    name: &str,
    members: &[PathBuf],
    options: &Options,
    verb: Verb,
) -> Result<(), Failure> {
    refuse_running(context, name)?;
    context.run_dir.ensure()?;
    let mut arguments = options.arguments(&context.run_dir, name, members);
    if verb == Verb::Promote {
        arguments.insert(0, "--promote".into());
    }
    let ready = daemon::launch(&context.run_dir, name, &arguments, options.patience())?;
    context.run_dir.set_hints(name, members);
    report(context, name, &ready)
}

fn report(context: &Context, name: &str, ready: &Ready) -> Result<(), Failure> {
    let Ok(status) = client::status(&context.run_dir, name) else {
        return output::done(context.json, &ready.message);
    };
    if context.json {
        return output::json(&status);
    }
    let device = ready.device.as_ref().or(status.device.as_ref());
    let in_sync = |state| state == MemberState::InSync;
    let good = status.members.iter().filter(|m| in_sync(m.state)).count();
    output::line(&format!(
        "mirror {name} started on {} ({good} of {} members in-sync)",
        device.map_or("an unnamed device", String::as_str),
        status.members.len()
    ));
    Ok(())
}

fn refuse_running(context: &Context, name: &str) -> Result<(), Failure> {
    let Some(status) = client::served(&context.run_dir, name)? else {
        return Ok(());
    };
    let place = status
        .device
        .map_or_else(String::new, |device| format!(" on {device}"));
    Err(Failure::busy(format!(
        "Mirror {name} is already running{place}. 'mirrorctl status {name}' shows it."
    )))
}

/// The members to start with: those given, or what a scan finds.
pub(crate) fn candidates(
    name: &str,
    paths: &[PathBuf],
    places: &[PathBuf],
    context: &Context,
) -> Result<Vec<PathBuf>, Failure> {
    if !paths.is_empty() {
        for path in paths {
            // Only to say in time that it is not there or no device. Of an export the daemon says
            // it as well, and decides whether the mirror may start without it.
            if medium::is_address(path) {
                medium::absolute(path)?;
            } else {
                medium::Medium::open(path, medium::Access::Look)?;
            }
        }
        let absolute = paths.iter().map(|path| medium::absolute(path));
        return absolute.collect();
    }
    Ok(scan::named(&context.run_dir, name, places)?.paths())
}

/// A reason has to fit into a superblock.
fn reason(text: &str) -> Result<String, String> {
    if text.trim().is_empty() || text.chars().any(char::is_control) {
        return Err("a reason has some words, and no control characters".to_owned());
    }
    if text.len() > REASON_BYTES_MAX {
        return Err(format!(
            "it has {} bytes, and a superblock has room for {REASON_BYTES_MAX}",
            text.len()
        ));
    }
    Ok(text.to_owned())
}

/// ublk where the kernel has it or can load it.
fn default_front() -> Front {
    let there = || Path::new(UBLK_CONTROL).exists();
    if there() {
        return Front::Ublk;
    }
    if rustix::process::geteuid().is_root() {
        let loaded = Command::new("modprobe").arg("ublk_drv").output();
        if loaded.is_ok_and(|output| output.status.success()) && there() {
            return Front::Ublk;
        }
    }
    output::note(
        "This kernel has no ublk driver (/dev/ublk-control is missing); serving NBD instead.",
    );
    Front::Nbd
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_option_reaches_the_daemon() {
        let options = Options {
            front: Some(Front::Nbd),
            nbd_socket: Some("/s".into()),
            nbd_tcp: Some("[::1]:10809".parse().unwrap()),
            force: true,
            reason: Some("because".into()),
            peer_sessions_over: true,
            other_paths: vec!["nbd://b:10809/m".parse().unwrap()],
            take_over: true,
            no_intent_unsafe_for_benchmarks: true,
            queue_depth: Some(64),
            deadline: Some(7),
            hot_budget: Some(9),
            hot_memory: Some(64),
            returns: Some(5),
            scrub_days: Some(0),
            scrub_ceiling: Some(90),
            resync_floor: Some(3),
            resync_ceiling: Some(70),
            error_budget: Some(ErrorBudget::Unlimited),
            check_reads: Some(CheckReads::ScrubOnly),
            checksum_cache: Some(8),
        };
        let run = RunDir::new(Path::new("/r")).unwrap();
        let args = options.arguments(&run, "m", &["/a".into(), "-b".into()]);
        let text: Vec<&str> = args.iter().map(|arg| arg.to_str().unwrap()).collect();
        assert_eq!(
            text.join(" "),
            "--name m --run-dir /r --front nbd --nbd-socket /s --nbd-tcp [::1]:10809 \
             --queue-depth 64 --deadline 7 --hot-budget 9 --hot-memory 64 \
             --returns 5 --scrub-days 0 --scrub-ceiling 90 --resync-floor 3 --resync-ceiling 70 \
             --error-budget unlimited --check-reads scrub-only --reason because --checksum-cache 8 --force \
             --peer-sessions-over --path nbd://b/m --take-over --no-intent-unsafe-for-benchmarks -- /a -b"
        );
        assert_eq!(options.patience(), Duration::from_secs(7));
    }
}
