//! The daemon's command line. People use `mirrorctl`, which starts the daemon.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use mirror::budget::ErrorBudget;

/// Serves one mirror in the foreground until it is told to stop.
#[derive(Clone, Debug, Parser)]
#[command(name = "ublk-mirror", version, about, long_about = None)]
pub(crate) struct Args {
    /// Name of the mirror
    #[arg(long)]
    pub(crate) name: String,
    /// Directory of the control socket, the lock and the log
    #[arg(long, env = "UBLK_MIRROR_RUN_DIR", default_value = "/run/ublk-mirror")]
    pub(crate) run_dir: PathBuf,
    /// How applications reach the mirror
    #[arg(long, value_enum)]
    pub(crate) front: FrontKind,
    /// Unix socket of the NBD server [default: RUN_DIR/NAME.nbd]
    #[arg(long)]
    pub(crate) nbd_socket: Option<PathBuf>,
    /// Also serve NBD on this address; there is no authentication
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) nbd_tcp: Option<SocketAddr>,
    /// Start although a member that is not here may hold newer data
    #[arg(long)]
    pub(crate) force: bool,
    /// Why it is forced, in the operator's words; kept in the superblocks
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
    /// Start without members that have handed the mirror over to one that is here
    #[arg(long)]
    pub(crate) promote: bool,
    /// The servers of peer members have ended every earlier session with them
    #[arg(long)]
    pub(crate) peer_sessions_over: bool,
    /// Another address of a peer member's server, to be used when the first one fails
    #[arg(long = "path", value_name = "ADDRESS")]
    pub(crate) paths: Vec<peer::Address>,
    /// Servers that admit one writer end another host's session, also one that lives
    #[arg(long)]
    pub(crate) take_over: bool,
    /// Do not record write intent: after a crash the copies may differ. For benchmarks only
    #[arg(long)]
    pub(crate) no_intent_unsafe_for_benchmarks: bool,
    /// Requests of the block device under way at once
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub(crate) queue_depth: u16,
    /// A member that has not answered for so long is lost [default: 5 with peers, else 30]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) deadline: Option<u64>,
    /// Extents that may be hot at once [default: decided by the engine]
    #[arg(long, value_name = "EXTENTS")]
    pub(crate) hot_budget: Option<u32>,
    /// Memory that the state of hot extents may take [default: decided by the engine]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) hot_memory: Option<u16>,
    /// Whether reads are checked against the checksums of their blocks
    #[arg(long, value_enum, default_value_t = CheckReads::Always)]
    pub(crate) check_reads: CheckReads,
    /// Memory for checksums that have been read [default: decided by the engine]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) checksum_cache: Option<u16>,
    /// How often a minute a peer member may come back by itself when the network does; 0: only by
    /// command
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(0..=60))]
    pub(crate) returns: u8,
    /// Days from the begin of one scrub pass to that of the next; 0: only by command
    /// [default: as chosen by command, else 14]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=3650))]
    pub(crate) scrub_days: Option<u16>,
    /// Most that a scrub reads from a member a second [default: as much as it gives]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) scrub_ceiling: Option<u32>,
    /// Least that a resync copies a second, whatever it costs the applications
    #[arg(long, value_name = "MIB", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) resync_floor: u32,
    /// Most that a resync copies a second [default: as much as the members take]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) resync_ceiling: Option<u32>,
    /// Blocks that may have to be rewritten on a member within so many hours before it is failed;
    /// or `unlimited`
    #[arg(long, value_name = "BLOCKS/HOURS", default_value_t)]
    pub(crate) error_budget: ErrorBudget,
    /// Descriptor that receives one line of JSON when the mirror is up or has failed
    #[arg(long, value_name = "FD")]
    pub(crate) ready_fd: Option<i32>,
    /// The members' devices, image files or addresses
    #[arg(required = true, value_name = "MEMBER_PATH")]
    pub(crate) members: Vec<String>,
}

impl Args {
    /// When a member that does not answer is lost. A disk may take long over a bad sector, and a
    /// network that is silent for five seconds is down.
    pub(crate) fn deadline(&self) -> Duration {
        let behind_network = self.members.iter().any(|path| peer::is_address(path));
        let default = if behind_network { 5 } else { 30 };
        Duration::from_secs(self.deadline.unwrap_or(default))
    }
}

/// When reads are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CheckReads {
    /// Each; what does not fit is answered from another member, and the bad copy rewritten
    Always,
    /// Never; only a scrub checks
    ScrubOnly,
}

/// How applications reach the mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FrontKind {
    /// A block device, `/dev/ublkbN`
    Ublk,
    /// An NBD server on a socket
    Nbd,
}
