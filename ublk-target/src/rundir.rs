//! The run directory: one lock and one set of sockets for each mirror.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use mirror::control::ErrorKind;
use rustix::fs::{FlockOperation, Mode};

use crate::ready::Failure;

/// How long a listener may take to be gone after its process was killed: the kernel first ends
/// the process's I/O, and until then connections to its sockets go through.
const DYING: Duration = Duration::from_secs(5);
/// How often to look whether it is gone.
const RECHECK: Duration = Duration::from_millis(20);
/// Longest path of a unix socket that the kernel takes (`sun_path` without its zero).
const MAX_SOCKET_PATH: usize = 107;

/// A mirror's place in the run directory, held by this process alone.
pub(crate) struct RunDir {
    dir: PathBuf,
    name: String,
    /// Locked for as long as the daemon lives.
    _lock: File,
}

impl RunDir {
    /// Makes the directory if needed and takes the mirror's lock.
    pub(crate) fn claim(dir: &Path, name: &str) -> Result<Self, Failure> {
        let usable = !name.is_empty()
            && name.len() <= 64
            && !name.starts_with(['.', '-'])
            && name
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
        if !usable {
            return Err(Failure::new(
                ErrorKind::Usage,
                format!(
                    "{name:?} cannot be a mirror's name: use up to 64 letters, digits, dots, \
                     dashes and underscores, beginning with a letter or digit"
                ),
            ));
        }
        let cannot = |what: &str, error: io::Error| {
            Failure::failed(format!("cannot {what} {} ({error})", dir.display()))
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|error| cannot("make the run directory", error))?;
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(dir.join(format!("{name}.lock")))
            .map_err(|error| cannot("write to the run directory", error))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            let message = format!("the mirror {name} is running already; stop it first");
            Failure::new(ErrorKind::Busy, message)
        })?;
        Ok(Self {
            dir: dir.to_owned(),
            name: name.to_owned(),
            _lock: lock,
        })
    }

    /// A file of this mirror.
    pub(crate) fn path(&self, suffix: &str) -> PathBuf {
        self.dir.join(format!("{}.{suffix}", self.name))
    }
}

/// Listens on a unix socket that only the owner may connect to. A socket file that nobody
/// listens on is left from a daemon that was killed, and is replaced; a daemon that is still
/// dying is waited for.
pub(crate) fn listen_unix(path: &Path) -> Result<Rc<OwnedFd>, Failure> {
    listen_unix_within(path, DYING)
}

fn listen_unix_within(path: &Path, patience: Duration) -> Result<Rc<OwnedFd>, Failure> {
    let cannot = |error: io::Error| {
        Failure::failed(format!("cannot listen on {} ({error})", path.display()))
    };
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        let message = format!(
            "the socket path {} is longer than {MAX_SOCKET_PATH} bytes; use a shorter --run-dir",
            path.display()
        );
        return Err(Failure::new(ErrorKind::Usage, message));
    }
    if path.exists() {
        let began = Instant::now();
        while UnixStream::connect(path).is_ok() {
            if began.elapsed() < patience {
                std::thread::sleep(RECHECK);
                continue;
            }
            let message = format!("another process listens on {}", path.display());
            return Err(Failure::new(ErrorKind::Busy, message));
        }
        std::fs::remove_file(path).map_err(cannot)?;
    }
    // No other thread makes files at this time, and the mode is put back at once.
    let before = rustix::process::umask(Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    rustix::process::umask(before);
    let listener = listener.map_err(cannot)?;
    listener.set_nonblocking(true).map_err(cannot)?;
    Ok(Rc::new(OwnedFd::from(listener)))
}

/// Listens on a TCP address.
pub(crate) fn listen_tcp(address: SocketAddr) -> Result<Rc<OwnedFd>, Failure> {
    let cannot =
        |error: io::Error| Failure::failed(format!("cannot listen on {address} ({error})"));
    let listener = TcpListener::bind(address).map_err(cannot)?;
    listener.set_nonblocking(true).map_err(cannot)?;
    Ok(Rc::new(OwnedFd::from(listener)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::path::PathBuf;
    use std::time::Duration;

    use mirror::control::ErrorKind;

    use super::{RunDir, listen_unix, listen_unix_within};

    fn directory(test: &str) -> PathBuf {
        std::env::temp_dir().join(format!("ublk-rundir-{}-{test}", std::process::id()))
    }

    #[test]
    fn a_mirror_runs_once() {
        let dir = directory("once");
        let first = RunDir::claim(&dir, "m0").unwrap();
        assert_eq!(first.path("sock"), dir.join("m0.sock"));
        let second = RunDir::claim(&dir, "m0").err().unwrap();
        assert_eq!(second.kind, ErrorKind::Busy);
        assert!(
            second.message.contains("running already"),
            "{}",
            second.message
        );
        RunDir::claim(&dir, "m1").unwrap();
        drop(first);
        RunDir::claim(&dir, "m0").unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn names_that_would_leave_the_directory_are_refused() {
        let dir = directory("names");
        for name in ["", "..", "a/b", "-x", ".hidden", "a b", &"x".repeat(65)] {
            let failure = RunDir::claim(&dir, name).err().unwrap();
            assert_eq!(failure.kind, ErrorKind::Usage, "{name:?}");
        }
        assert!(!dir.exists());
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let dir = directory("sockets");
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("a.sock");
        let listener = listen_unix(&path).unwrap();
        let refused = listen_unix_within(&path, Duration::ZERO).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Busy);
        drop(listener);
        listen_unix(&path).unwrap();
        // One that is let go of while it is waited for, as by a process that is being killed.
        let dying = std::os::unix::net::UnixListener::bind(dir.join("b.sock")).unwrap();
        let death = std::thread::spawn(move || drop(dying.accept()));
        listen_unix_within(&dir.join("b.sock"), Duration::from_secs(60)).unwrap();
        death.join().unwrap();
        let long = dir.join("x".repeat(120));
        assert_eq!(listen_unix(&long).unwrap_err().kind, ErrorKind::Usage);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
