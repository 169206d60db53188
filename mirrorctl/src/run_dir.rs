//! The run directory: one control socket, one log and one hint file for each mirror.
//!
//! | file | holds |
//! |---|---|
//! | `NAME.sock` | the control socket of the daemon, mode 0600 |
//! | `NAME.log` | what the daemon printed since its start |
//! | `NAME.members` | the member paths last seen, one a line: a hint where to look first |
//! | `NAME.nbd` | the NBD front end's socket, unless another was asked for |
//!
//! The hint is never trusted: what a path holds is decided by its superblock.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use mirror::superblock::NAME_BYTES_MAX;

use crate::failure::{Exit, Failure, words};

/// Where it is unless told otherwise.
pub(crate) const DEFAULT: &str = "/run/ublk-mirror";
/// The longest path of a unix socket, in bytes.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// More hints than this are not read.
const HINTS_MAX: usize = 64;

/// The run directory.
#[derive(Clone, Debug)]
pub(crate) struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// The run directory at `path`, which need not exist yet.
    pub(crate) fn new(path: &Path) -> Result<Self, Failure> {
        let path = std::path::absolute(path).map_err(|e| {
            Failure::usage(format!(
                "'{}' is not a run directory: {}.",
                path.display(),
                words(&e)
            ))
        })?;
        Ok(Self { path })
    }

    /// Its absolute path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The control socket of a mirror.
    pub(crate) fn socket(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.sock"))
    }

    /// The daemon's log of a mirror.
    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.log"))
    }

    fn hints_path(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.members"))
    }

    /// Makes the directory, for its owner only, unless it exists.
    pub(crate) fn ensure(&self) -> Result<(), Failure> {
        let made = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.path);
        made.map_err(|e| {
            Failure::failed(format!(
                "The run directory {} cannot be made: {}. Run as root, or name a directory of \
                 your own with --run-dir.",
                self.path.display(),
                words(&e)
            ))
        })
    }

    /// Refuses a socket path that the system would cut off.
    pub(crate) fn check_socket_length(&self, name: &str) -> Result<(), Failure> {
        let len = self.socket(name).as_os_str().len();
        if len > SOCKET_PATH_BYTES_MAX {
            return Err(Failure::usage(format!(
                "The control socket {} would have a path of {len} bytes and the system allows \
                 {SOCKET_PATH_BYTES_MAX}. Choose a shorter --run-dir.",
                self.socket(name).display()
            )));
        }
        Ok(())
    }

    /// Names of all mirrors that have a control socket, sorted.
    pub(crate) fn names(&self) -> Result<Vec<String>, Failure> {
        self.names_with(".sock")
    }

    /// Names of all mirrors that have a file with this suffix, sorted.
    fn names_with(&self, suffix: &str) -> Result<Vec<String>, Failure> {
        let entries = match fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => {
                return Err(Failure::new(
                    Exit::of_io(&e),
                    format!(
                        "The run directory {} cannot be read: {}. Run as root, or name another \
                         with --run-dir.",
                        self.path.display(),
                        words(&e)
                    ),
                ));
            }
        };
        let mut names = Vec::new();
        for entry in entries.flatten() {
            let file = entry.file_name();
            if let Some(name) = file.to_str().and_then(|f| f.strip_suffix(suffix))
                && check_name(name).is_ok()
            {
                names.push(name.to_owned());
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Paths where the members of a mirror were last seen.
    pub(crate) fn hints(&self, name: &str) -> Vec<PathBuf> {
        let text = fs::read_to_string(self.hints_path(name)).unwrap_or_default();
        let lines = text
            .lines()
            .filter(|line| line.starts_with('/') || peer::is_address(line));
        lines.take(HINTS_MAX).map(PathBuf::from).collect()
    }

    /// Paths where the members of any mirror were last seen, as far as they exist.
    pub(crate) fn all_hints(&self) -> Vec<PathBuf> {
        let names = self.names_with(".members").unwrap_or_default();
        let mut all: Vec<PathBuf> = names.iter().flat_map(|name| self.hints(name)).collect();
        all.retain(|path| may_be_there(path));
        all
    }

    /// Remembers where the members of a mirror are. Losing a hint costs only a scan, so a
    /// failure is not reported.
    pub(crate) fn set_hints(&self, name: &str, paths: &[PathBuf]) {
        let unique: BTreeSet<&Path> = paths.iter().map(PathBuf::as_path).collect();
        let lines = unique.iter().filter_map(|path| path.to_str());
        let text: String = lines
            .filter(|line| !line.contains('\n'))
            .map(|line| format!("{line}\n"))
            .collect();
        let written = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(self.hints_path(name))
            .and_then(|mut file| file.write_all(text.as_bytes()));
        drop(written);
    }

    /// Remembers one more path.
    pub(crate) fn add_hint(&self, name: &str, path: &Path) {
        let mut paths = self.hints(name);
        paths.push(path.to_owned());
        self.set_hints(name, &paths);
    }

    /// Forgets where the members of a mirror were.
    pub(crate) fn forget_hints(&self, name: &str) {
        drop(fs::remove_file(self.hints_path(name)));
    }
}

/// Whether a look at the path is worth it. An export is found out by asking its server.
pub(crate) fn may_be_there(path: &Path) -> bool {
    crate::medium::is_address(path) || path.exists()
}

/// Refuses what cannot be the name of a mirror; the name becomes part of file names.
pub(crate) fn check_name(name: &str) -> Result<(), Failure> {
    if mirror::create::is_name(name) {
        return Ok(());
    }
    Err(Failure::usage(format!(
        "'{name}' cannot be the name of a mirror: use 1 to {NAME_BYTES_MAX} letters, digits, \
         '-', '_' or '.', not beginning with '-' or '.'."
    )))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_are_judged() {
        for good in [
            "a",
            "data",
            "db-1",
            "x_y.z",
            "0",
            &"n".repeat(NAME_BYTES_MAX),
        ] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "-a",
            "a/b",
            "../x",
            "a b",
            "a\n",
            "é",
            ".x",
            &"n".repeat(NAME_BYTES_MAX + 1),
        ] {
            let failure = check_name(bad).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            assert!(failure.message.contains(bad), "{bad:?}");
        }
    }

    #[test]
    fn hints_are_kept_added_to_and_forgotten() {
        let dir = std::env::temp_dir().join(format!("mirrorctl-hints-{}", std::process::id()));
        let run = RunDir::new(&dir).unwrap();
        run.ensure().unwrap();
        assert!(run.hints("m").is_empty());
        run.set_hints("m", &[PathBuf::from("/b"), PathBuf::from("/a")]);
        run.add_hint("m", Path::new("/b"));
        run.add_hint("m", Path::new("nbd://host/c"));
        assert_eq!(
            run.hints("m"),
            [
                PathBuf::from("/a"),
                PathBuf::from("/b"),
                PathBuf::from("nbd://host/c")
            ]
        );
        run.forget_hints("m");
        assert!(run.hints("m").is_empty());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_refused() {
        let run = RunDir::new(Path::new(&format!("/tmp/{}", "d".repeat(100)))).unwrap();
        let failure = run.check_socket_length("data").unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        assert!(failure.message.contains("data.sock"));
    }
}
