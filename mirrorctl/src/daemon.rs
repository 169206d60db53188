//! Starting a mirror's daemon and hearing from it.
//!
//! The daemon `ublk-mirror` runs in the foreground of whoever starts it. To detach it, this
//! program runs itself once more as [`DETACHED_VERB`]: that process begins a session of its
//! own and then becomes the daemon, so nothing between the two needs unsafe code. The daemon
//! inherits the writing end of a pipe and writes one line of JSON into it when the device takes
//! I/O, or when it gives up; a pipe that closes without a line means that it died.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{PipeReader, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mirror::control::ErrorKind;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::FdFlags;
use serde::Deserialize;

use crate::failure::{Exit, Failure, words};
use crate::run_dir::RunDir;

/// The hidden command by which this program becomes the daemon.
pub(crate) const DETACHED_VERB: &str = "detached-daemon";
/// File name of the daemon.
const PROGRAM: &str = "ublk-mirror";
/// How long a daemon may take to start, beyond the deadline for its predecessor's I/O.
const PATIENCE: Duration = Duration::from_secs(120);
/// The longest readiness line that is read.
const READY_BYTES_MAX: usize = 64 << 10;
/// How much of the log is shown when the daemon died.
const LOG_TAIL_LINES: usize = 5;

/// What a daemon says when it is ready or has given up.
#[derive(Debug, Deserialize)]
pub(crate) struct Ready {
    /// Whether the device takes I/O.
    ready: bool,
    /// Where applications find it.
    pub(crate) device: Option<String>,
    /// A sentence.
    #[serde(default)]
    pub(crate) message: String,
    /// Class of the failure.
    kind: Option<String>,
}

/// What the hidden command is given.
#[derive(Debug, clap::Args)]
pub(crate) struct DetachedArgs {
    /// The daemon's program and arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<OsString>,
}

/// Begins a session and becomes the daemon; returns only when that fails.
pub(crate) fn become_daemon(args: &DetachedArgs) -> Result<(), Failure> {
    let Some((program, rest)) = args.command.split_first() else {
        return Err(Failure::usage("There is no program to run."));
    };
    rustix::process::setsid()
        .map_err(|e| Failure::failed(format!("A new session cannot begin: {e}.")))?;
    Err(run_in_place(Command::new(program).args(rest)))
}

/// Becomes the program; returns only when that fails.
pub(crate) fn run_in_place(command: &mut Command) -> Failure {
    let program = command.get_program().to_owned();
    let error = command.exec();
    Failure::failed(format!(
        "{} cannot be run: {}.",
        program.display(),
        words(&error)
    ))
}

/// Where the daemon's program is: beside this one, or in PATH.
pub(crate) fn program() -> Result<PathBuf, Failure> {
    let beside = std::env::current_exe()
        .ok()
        .and_then(|own| Some(own.parent()?.join(PROGRAM)));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).map(|dir| dir.join(PROGRAM));
    beside
        .into_iter()
        .chain(in_path)
        .find(|file| file.is_file())
        .ok_or_else(|| {
            Failure::not_found(format!(
                "The daemon's program, {PROGRAM}, is neither beside mirrorctl nor in PATH. Build \
                 it or install it there."
            ))
        })
}

/// Starts the daemon with `args` in a session of its own and waits until it is ready.
pub(crate) fn launch(
    run_dir: &RunDir,
    name: &str,
    args: &[OsString],
    deadline: Duration,
) -> Result<Ready, Failure> {
    let program = program()?;
    let log_path = run_dir.log(name);
    let log = open_log(&log_path)?;
    let log_start = log.metadata().map_or(0, |meta| meta.len());
    let system = |e: std::io::Error| {
        Failure::failed(format!("The daemon cannot be started: {}.", words(&e)))
    };
    let (reader, writer) = std::io::pipe().map_err(system)?;
    rustix::io::fcntl_setfd(&writer, FdFlags::empty()).map_err(|e| system(e.into()))?;
    let own = std::env::current_exe().map_err(system)?;
    let child = Command::new(own)
        .arg(DETACHED_VERB)
        .arg("--")
        .arg(program)
        .args(["--ready-fd", &writer.as_raw_fd().to_string()])
        .args(args)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(system)?)
        .stderr(log)
        .spawn()
        .map_err(system)?;
    drop(writer);
    let patience = PATIENCE + deadline;
    let line = read_line(reader, patience).map_err(|e| match e.kind() {
        std::io::ErrorKind::TimedOut => Failure::busy(format!(
            "The daemon of mirror {name} was not ready within {} s and goes on trying (process \
             {}). See {}, and 'mirrorctl status {name}'.",
            patience.as_secs(),
            child.id(),
            log_path.display()
        )),
        _ => system(e),
    })?;
    judge(name, &line).unwrap_or_else(|| Err(died(name, child, &log_path, log_start)))
}

/// What the line says; `None` when it is none.
fn judge(name: &str, line: &[u8]) -> Option<Result<Ready, Failure>> {
    let ready: Ready = serde_json::from_slice(line).ok()?;
    if ready.ready {
        return Some(Ok(ready));
    }
    let kind = ready.kind.unwrap_or_default();
    let exit = serde_json::from_value::<ErrorKind>(kind.into()).map_or(Exit::Failed, Exit::from);
    let message = if ready.message.is_empty() {
        format!("Mirror {name} did not start, and its daemon did not say why.")
    } else {
        ready.message
    };
    Some(Err(Failure::new(exit, message)))
}

fn open_log(path: &Path) -> Result<File, Failure> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .map_err(|e| {
            Failure::failed(format!(
                "The daemon's log {} cannot be opened: {}. Run as the user who owns the run \
                 directory.",
                path.display(),
                words(&e)
            ))
        })
}

/// Reads until a line end or the end of the pipe.
fn read_line(mut reader: PipeReader, patience: Duration) -> std::io::Result<Vec<u8>> {
    let began = Instant::now();
    let mut line = Vec::new();
    let mut chunk = [0; 4096];
    while !line.ends_with(b"\n") && line.len() < READY_BYTES_MAX {
        let left = patience.saturating_sub(began.elapsed());
        let limit = Timespec::try_from(left).map_err(std::io::Error::other)?;
        let mut fds = [PollFd::new(&reader, PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&limit)) {
            Ok(0) => return Err(std::io::ErrorKind::TimedOut.into()),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(e) => return Err(e.into()),
        }
        match reader.read(&mut chunk)? {
            0 => break,
            len => line.extend_from_slice(&chunk[..len]),
        }
    }
    Ok(line)
}

/// The failure of a daemon that ended without a word, with the end of its log.
fn died(name: &str, mut child: Child, log: &Path, log_start: u64) -> Failure {
    let how = match child.wait() {
        Ok(status) => status.to_string(),
        Err(e) => words(&e),
    };
    let text = std::fs::read(log).unwrap_or_default();
    let start = usize::try_from(log_start).unwrap_or(usize::MAX);
    let said = String::from_utf8_lossy(text.get(start..).unwrap_or_default());
    let lines: Vec<&str> = said.lines().filter(|line| !line.is_empty()).collect();
    let tail = &lines[lines.len().saturating_sub(LOG_TAIL_LINES)..];
    let words = if tail.is_empty() {
        "It printed nothing.".to_owned()
    } else {
        format!("It printed last:\n  {}", tail.join("\n  "))
    };
    Failure::failed(format!(
        "The daemon of mirror {name} ended before the device was ready ({how}); its log is {}. \
         {words}",
        log.display()
    ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::Write;

    #[test]
    fn readiness_lines_are_judged() {
        let ready = br#"{"ready":true,"device":"/dev/ublkb0","message":"Up."}"#;
        let ready = judge("m", ready).unwrap().unwrap();
        assert_eq!(ready.device.as_deref(), Some("/dev/ublkb0"));
        for (line, want) in [
            (
                r#"{"ready":false,"message":"No.","kind":"refused"}"#,
                Failure::refused("No."),
            ),
            (
                r#"{"ready":false,"message":"No.","kind":"busy"}"#,
                Failure::busy("No."),
            ),
            (
                r#"{"ready":false,"message":"No.","kind":"odd"}"#,
                Failure::failed("No."),
            ),
            (r#"{"ready":false,"message":"No."}"#, Failure::failed("No.")),
        ] {
            assert_eq!(judge("m", line.as_bytes()).unwrap().unwrap_err(), want);
        }
        for line in ["", "hello", "{}", "{\"ready\":tr"] {
            assert!(judge("m", line.as_bytes()).is_none(), "{line}");
        }
    }

    #[test]
    fn a_line_is_read_up_to_its_end_or_the_pipes() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(b"{}\n").unwrap();
        assert_eq!(
            read_line(reader, Duration::from_secs(5)).unwrap(),
            b"{}\n",
            "the writer is still open"
        );
        let (reader, writer) = std::io::pipe().unwrap();
        drop(writer);
        assert!(
            read_line(reader, Duration::from_secs(5))
                .unwrap()
                .is_empty()
        );
        let (reader, _writer) = std::io::pipe().unwrap();
        let error = read_line(reader, Duration::ZERO).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
    }
}
