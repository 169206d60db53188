//! The server that exports a disk as a peer member: NBD with one fenced writer.
//!
//! # What it promises
//!
//! - **One writer** (R13). A session that takes the export over may write only after the one
//!   before it has been cut, every request of that one which changes the disk has ended, and the
//!   disk has been flushed. Who may take over is in [`peer::claim`], with the reasons; the order
//!   of the right's states in [`peer::server::admission`].
//! - A session without a claim reads: `mirrorctl examine nbd://...`, and whoever wants to look. An
//!   export for clients that know no claims ([`Unclaimed::Write`]) makes a session the writer at
//!   its first write; who only reads then costs nobody a session.
//! - A writer's FLUSH covers what was answered before, in its session; what older ones wrote was
//!   flushed before it was let in. FUA is FUA. Neither is left out, and an error of the disk is the
//!   writer's to see: a flush that fails is said once by a disk, to whoever flushes next, so every
//!   FLUSH and FUA that was under way then answers EIO, also when the disk was content with it. A
//!   session that does not write has nothing to flush: its FLUSH does not reach the disk, and takes
//!   no error from it. Each request is answered once.
//! - The disk is held exclusively (by who calls [`serve`]) for as long as it is exported, and all
//!   I/O goes through the one open file description that holds it: requests that outlive this
//!   process, its ghosts, keep the disk in use until they are over, and the next server, or a
//!   daemon on the spot, is kept out until then (R13). At the end requests under way are answered
//!   and the disk is flushed. A panic ends the process, and so all sessions.
//! - With [`Unclaimed::Write`] a disk that is a member of a mirror is not written to without a claim
//!   all the same.
//! - Whoever may read can have checksums of blocks instead, by a metadata context of NBD's
//!   ([`peer::wire`]): the disk is read here, and a few bytes travel. It is a read in every
//!   respect, the limits included. What cannot be read has no checksum but an error.
//! - The server's instance is random at each start: a client knows by it whether what the disk
//!   held in its cache is still there (R14).
//!
//! # Limits
//!
//! | what | at most | then |
//! |---|---|---|
//! | sessions | 16 | one without TLS where that is wanted goes, else the one that has been silent for longest; never the writer or who waits to be |
//! | handshake | 10 s, 8 KiB an option; where TLS is wanted, 3 s of it until it is there | the session ends |
//! | TLS of a session | 0.5 MiB | |
//! | requests under way in a session | 128, 4 MiB of data | it is not read from |
//! | one read or write | 4 MiB, announced as the maximum | EOVERFLOW |
//! | blocks whose checksums are one answer | 1024, which count as 4 MiB of data | the first ones are answered |
//! | replies that a client does not take | count as under way | it is not read from |
//! | a connection whose host is gone | 25 to 30 s | the session ends |
//!
//! So all sessions together cost less than 80 MiB, and a client that is slow, or sends nonsense,
//! costs its own session and nobody else's. A take-over waits for the disk and for no client.
//!
//! # States of a session
//!
//! ```text
//!  handshake ──GO──► reads ──first write, if allowed──┐
//!      │                                               ├─► waits for older requests ─► writes
//!      └─────claim─────────────────────────────────────┘        │ refused                │
//!                                                               ▼                        ▼
//!                                                             reads            cut, or left: drains
//! ```
//!
//! # Order of a take-over, and why
//!
//! 1. The disk's superblock is read, and a claim that it refuses ends here: who has no right to
//!    the disk costs nobody a session.
//! 2. A writer that lives is cut, if the claim may do that: its socket is shut in both directions,
//!    and none of its requests begins any more, whether it has been received or not.
//! 3. Its requests end. There is no limit of time: a disk that hangs keeps everybody out, because
//!    nobody knows what it will still write. (The claimant gives up after its own patience.)
//! 4. The disk is flushed. Its older writer may have written a superblock and not come to flush it;
//!    what the next one reads and decides by must not vanish with this machine's power. A disk
//!    that does not flush is of no use to a claimant either: it is refused.
//! 5. The superblock is read and judged again: the requests that ended in step 3 may have changed
//!    it.
//! 6. The answer goes out. What the new writer read before that, it reads again.
//!
//! One thread, one ring (tokio-uring), a task for each session and each request. Disk and sockets
//! are behind two small traits (`io.rs`), time and tasks behind another one (`tasks.rs`), so that the
//! tests run the same code in memory and let requests end when they want them to, and the simulator
//! runs it in its histories.
#![forbid(unsafe_code)]

mod inbox;
mod io;
mod memory;
mod server;
mod session;
#[cfg(test)]
mod sim;
mod stream;
mod sums;
mod tasks;
#[cfg(test)]
mod tests;
mod uring;

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use peer::Address;
use peer::address::Place;
use peer::server::Export;
use peer::tls::Acceptor;
use peer::wire::{
    EXPORT_FLUSH, EXPORT_FUA, EXPORT_HAS_FLAGS, EXPORT_READ_ONLY, EXPORT_TRIM, EXPORT_WRITE_ZEROES,
};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};

pub use io::{Store, Stream};
pub use memory::Memory;
pub use server::{Server, Unclaimed};
pub use session::PAYLOAD_BYTES_MAX;
use stream::{Socket, UringStream};
use tasks::Local;
pub use tasks::{Step, Tasks};
use uring::UringStore;

/// Between two attempts to accept, when one failed: descriptors may have run out.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// TCP, on an address of this machine.
    Tcp(SocketAddr),
    /// A unix socket, for its owner only.
    Unix(PathBuf),
}

/// How to export a disk.
#[derive(Clone, Debug)]
pub struct Options {
    /// The export's name; clients that ask for no name get it as well.
    pub name: String,
    /// Who may write without a claim.
    pub unclaimed: Unclaimed,
    /// Nobody writes.
    pub read_only: bool,
    /// Random.
    pub instance: u128,
    /// With this all clients have to use TLS, and the folder that it was made of.
    pub tls: Option<(Acceptor, PathBuf)>,
}

/// Why a disk cannot be exported; a part of a sentence.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file system below has no direct I/O.
    #[error(
        "its file system refuses direct I/O (O_DIRECT), without which what is written is not on \
         the disk; put the image on ext4, XFS or btrfs"
    )]
    NoDirectIo,
    /// Sectors larger than a block.
    #[error("it has {0}-byte sectors; at most 4096 can be used")]
    SectorTooLarge(u32),
    /// Nothing in it.
    #[error("it is empty")]
    Empty,
    /// Any other answer of the kernel.
    #[error("it cannot be opened: {0}")]
    Failed(#[from] std::io::Error),
}

/// Why a server did not come up, or did not end well; a part of a sentence.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The disk.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The socket.
    #[error("cannot listen on {at}: {source}")]
    Listen {
        /// Where.
        at: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// No ring, or no signals.
    #[error("the kernel refused to set up io_uring or signals: {0}")]
    Ring(std::io::Error),
    /// The last flush.
    #[error("the last flush failed: {0}; what was written since the one before may be lost")]
    LastFlush(mirror::host::Errno),
}

/// Exports the disk `held`, which is open exclusively (O_EXCL, or flock on a file) and is switched to
/// direct I/O, until SIGTERM or SIGINT. `ready`
/// is told the address once clients can connect; `say` gets a line for a person now and then.
///
/// # Errors
///
/// When the disk cannot be used, nothing can be listened on, or the last flush fails.
pub fn serve(
    held: &File,
    listen: &Listen,
    options: Options,
    ready: impl FnOnce(&Address),
    say: impl Fn(&str) + 'static,
) -> Result<(), ServeError> {
    let opened = uring::open(held, options.read_only)?;
    let runtime = tokio_uring::Runtime::new(&tokio_uring::builder()).map_err(ServeError::Ring)?;
    runtime.block_on(async {
        let mut flags = EXPORT_HAS_FLAGS | EXPORT_FLUSH | EXPORT_FUA;
        if opened.cheap_zeroes {
            flags |= EXPORT_TRIM | EXPORT_WRITE_ZEROES;
        }
        if options.read_only {
            flags |= EXPORT_READ_ONLY;
        }
        let export = Export {
            name: options.name.clone(),
            size_bytes: opened.size_bytes,
            block_bytes: opened.block_bytes,
            payload_bytes_max: PAYLOAD_BYTES_MAX,
            flags,
        };
        let mut terminate = signal(SignalKind::terminate()).map_err(ServeError::Ring)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(ServeError::Ring)?;
        let (listener, place) = Listener::new(listen)?;
        let store = UringStore::new(opened);
        let say = Box::new(say);
        let (acceptor, tls) = options.tls.unzip();
        let rights = (options.unclaimed, options.instance);
        let server = Server::new((Local::new(), store), export, rights, acceptor, say);
        ready(&Address {
            place,
            export: options.name,
            tls,
        });
        tokio::select! {
            never = accept(&server, &listener) => never,
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        drop(listener);
        server.stop().await.map_err(ServeError::LastFlush)
    })
}

enum Listener {
    Tcp(tokio_uring::net::TcpListener),
    Unix(UnixListener, PathBuf),
}

impl Listener {
    fn new(listen: &Listen) -> Result<(Self, Place), ServeError> {
        match listen {
            Listen::Tcp(address) => Self::tcp(*address).map_err(|source| ServeError::Listen {
                at: address.to_string(),
                source,
            }),
            Listen::Unix(path) => Self::unix(path).map_err(|source| ServeError::Listen {
                at: path.display().to_string(),
                source,
            }),
        }
    }

    fn tcp(address: SocketAddr) -> std::io::Result<(Self, Place)> {
        let listener = TcpListener::bind(address)?;
        uring::tune(&listener)?;
        let bound = listener.local_addr()?;
        let place = Place::Tcp {
            host: bound.ip().to_string(),
            port: bound.port(),
        };
        let listener = tokio_uring::net::TcpListener::from_std(listener);
        Ok((Self::Tcp(listener), place))
    }

    /// A socket that nobody listens on any more is replaced. (The ring's own listener asks for
    /// SO_REUSEPORT, which newer kernels refuse on unix sockets; only accepting is left to tokio.)
    fn unix(path: &PathBuf) -> std::io::Result<(Self, Place)> {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(std::io::ErrorKind::AddrInUse.into());
        }
        match std::fs::symlink_metadata(path) {
            Ok(meta) if std::os::unix::fs::FileTypeExt::is_socket(&meta.file_type()) => {
                std::fs::remove_file(path)?;
            }
            _ => {}
        }
        // No other thread makes files at this time, and the mode is put back at once.
        let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
        let listener = std::os::unix::net::UnixListener::bind(path);
        rustix::process::umask(before);
        let listener = listener?;
        listener.set_nonblocking(true)?;
        let socket = std::path::absolute(path)?;
        let place = Place::Unix {
            socket: socket.clone(),
        };
        Ok((Self::Unix(UnixListener::from_std(listener)?, socket), place))
    }

    async fn next(&self) -> std::io::Result<(UringStream, String)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, from) = listener.accept().await?;
                Ok((UringStream::new(Socket::Tcp(stream)), from.to_string()))
            }
            Self::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                let stream = stream.into_std()?;
                stream.set_nonblocking(false)?;
                let stream = tokio_uring::net::UnixStream::from_std(stream);
                Ok((
                    UringStream::new(Socket::Unix(stream)),
                    "this machine".to_owned(),
                ))
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // Only tidiness: the next start replaces what is left.
            let _ = std::fs::remove_file(path);
        }
    }
}

async fn accept(server: &Rc<Server<Local, UringStore, UringStream>>, listener: &Listener) {
    loop {
        match listener.next().await {
            Ok((stream, from)) => server.open(stream, from).await,
            Err(error) => {
                server.say(&format!("a connection could not be accepted: {error}"));
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}
