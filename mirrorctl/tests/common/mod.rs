//! A directory for one test, and `mirrorctl` run in it.
#![allow(dead_code, clippy::unwrap_used)]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A program that is being written cannot be run, and a process that is being started holds
/// what its parent was writing: one of the two at a time.
static PROGRAMS: Mutex<()> = Mutex::new(());

/// Keeps others from starting or writing a program meanwhile.
pub(crate) fn programs() -> MutexGuard<'static, ()> {
    PROGRAMS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A directory that is removed at the end.
pub(crate) struct Dir(PathBuf);

impl Dir {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("mirrorctl-test-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The path as text, for arguments.
    pub(crate) fn arg(&self, name: &str) -> String {
        self.path(name).into_os_string().into_string().unwrap()
    }

    /// A sparse file with `bytes` at `offset`.
    pub(crate) fn image(&self, name: &str, size: u64, offset: u64, bytes: &[u8]) -> String {
        let file = File::create(self.path(name)).unwrap();
        file.set_len(size).unwrap();
        file.write_all_at(bytes, offset).unwrap();
        self.arg(name)
    }

    /// Runs `mirrorctl` with this directory's `run` as run directory.
    pub(crate) fn run(&self, args: &[&str]) -> Ran {
        self.run_program(Path::new(env!("CARGO_BIN_EXE_mirrorctl")), args)
    }

    /// Runs another copy of `mirrorctl`.
    pub(crate) fn run_program(&self, program: &Path, args: &[&str]) -> Ran {
        let mut command = Command::new(program);
        command.arg("--run-dir").arg(self.path("run")).args(args);
        command.env("PATH", "/usr/bin:/bin");
        Ran::new(args, output(&mut command).unwrap())
    }

    /// A copy of `mirrorctl` with a shell script beside it that stands for the daemon. The
    /// script finds the descriptor for its readiness line in `$FD`.
    pub(crate) fn with_daemon(&self, script: &str) -> PathBuf {
        let _alone = programs();
        let bin = self.path("bin");
        fs::create_dir_all(&bin).unwrap();
        let program = bin.join("mirrorctl");
        fs::copy(env!("CARGO_BIN_EXE_mirrorctl"), &program).unwrap();
        let daemon = bin.join("ublk-mirror");
        let text = format!(
            "#!/bin/sh\necho \"$@\" >> {}\nFD=$2\n{script}\n",
            self.path("arguments").display()
        );
        fs::write(&daemon, text).unwrap();
        fs::set_permissions(&daemon, fs::Permissions::from_mode(0o755)).unwrap();
        program
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

/// Runs a command to its end.
pub(crate) fn output(command: &mut Command) -> std::io::Result<Output> {
    let starting = programs();
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let child = command.stderr(Stdio::piped()).spawn()?;
    drop(starting);
    child.wait_with_output()
}

/// What a run said.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) args: Vec<String>,
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    fn new(args: &[&str], output: Output) -> Self {
        Self {
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// It succeeded.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:?}");
        self
    }

    /// It failed with `code` and a message that has `words` in it.
    #[track_caller]
    pub(crate) fn fails(self, code: i32, words: &str) -> Self {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert!(self.stderr.contains(words), "no '{words}' in {self:?}");
        self
    }

    /// The document on standard output.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}
