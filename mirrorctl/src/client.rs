//! The client's side of the control protocol: one request, one reply, over a unix socket.
//!
//! A daemon that does not run, one that died and left its socket behind, and one that does not
//! answer are three different sentences, because three different things are to be done.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use mirror::control::{MAX_LINE_BYTES, Reply, Request, Status, from_line, to_line};

use crate::failure::{Exit, Failure, words};
use crate::run_dir::{RunDir, check_name};

/// How long to wait for an answer that needs no disk.
pub(crate) const QUICK: Duration = Duration::from_secs(10);
/// How long to wait for an answer that a slow disk may hold up.
pub(crate) const PATIENT: Duration = Duration::from_secs(600);

/// How long a daemon that was killed may take to let go of its socket. The kernel ends its I/O
/// first, and until then connections go through and nobody answers.
const DYING: Duration = Duration::from_secs(5);
/// How often to look whether it has.
const RECHECK: Duration = Duration::from_millis(50);

/// What became of the attempt to reach a daemon.
#[derive(Debug)]
pub(crate) enum Reach {
    /// It listens.
    Connected(UnixStream),
    /// There is no socket: it does not run.
    NotRunning,
    /// There is a socket and nobody behind it: it died.
    Stale,
}

/// Tries to reach the daemon of a mirror.
pub(crate) fn reach(run_dir: &RunDir, name: &str) -> Result<Reach, Failure> {
    check_name(name)?;
    run_dir.check_socket_length(name)?;
    let socket = run_dir.socket(name);
    match UnixStream::connect(&socket) {
        Ok(stream) => Ok(Reach::Connected(stream)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(Reach::NotRunning),
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => Ok(Reach::Stale),
        Err(e) if e.kind() == ErrorKind::PermissionDenied => Err(Failure::failed(format!(
            "The control socket {} does not let you in. Run as the user who started the mirror.",
            socket.display()
        ))),
        Err(e) => Err(Failure::failed(format!(
            "The control socket {} cannot be reached: {}.",
            socket.display(),
            words(&e)
        ))),
    }
}

/// Sends a request to the daemon of a mirror and returns its reply, an error reply as a failure.
pub(crate) fn ask(
    run_dir: &RunDir,
    name: &str,
    request: &Request,
    patience: Duration,
) -> Result<Reply, Failure> {
    let stream = match reach(run_dir, name)? {
        Reach::Connected(stream) => stream,
        Reach::NotRunning => return Err(not_running(run_dir, name)),
        Reach::Stale => {
            return Err(Failure::not_found(format!(
                "The daemon of mirror {name} has died and left {} behind. Start it again with \
                 'mirrorctl start {name}'; its last words are in {}.",
                run_dir.socket(name).display(),
                run_dir.log(name).display()
            )));
        }
    };
    let reply =
        exchange(&stream, request, patience).map_err(|e| no_answer(run_dir, name, &e, patience))?;
    match reply {
        Reply::Error { message, kind } => Err(Failure::new(Exit::from(kind), message)),
        reply => Ok(reply),
    }
}

/// Sends a request that is answered with a sentence.
pub(crate) fn command(run_dir: &RunDir, name: &str, request: &Request) -> Result<String, Failure> {
    match ask(run_dir, name, request, PATIENT)? {
        Reply::Done { message } => Ok(message),
        _ => Err(odd_reply(name)),
    }
}

/// The state of a running mirror.
pub(crate) fn status(run_dir: &RunDir, name: &str) -> Result<Status, Failure> {
    status_within(run_dir, name, QUICK)
}

fn status_within(run_dir: &RunDir, name: &str, patience: Duration) -> Result<Status, Failure> {
    match ask(run_dir, name, &Request::Status, patience)? {
        Reply::Status(status) => Ok(*status),
        _ => Err(odd_reply(name)),
    }
}

/// The state of a mirror if it is served. A daemon that lets itself be reached and does not
/// answer is given the time to die, and then counts as none: for a caller that starts another,
/// which finds out by the mirror's lock.
pub(crate) fn served(run_dir: &RunDir, name: &str) -> Result<Option<Status>, Failure> {
    let began = Instant::now();
    loop {
        let left = DYING.saturating_sub(began.elapsed());
        if left.is_zero() {
            return Ok(None);
        }
        if let Ok(status) = status_within(run_dir, name, left) {
            return Ok(Some(status));
        }
        let Reach::Connected(_) = reach(run_dir, name)? else {
            return Ok(None);
        };
        std::thread::sleep(RECHECK);
    }
}

/// Whether a daemon of this name answers to a connection.
pub(crate) fn is_running(run_dir: &RunDir, name: &str) -> Result<bool, Failure> {
    Ok(matches!(reach(run_dir, name)?, Reach::Connected(_)))
}

fn not_running(run_dir: &RunDir, name: &str) -> Failure {
    let running = run_dir.names().unwrap_or_default();
    let known = if running.is_empty() {
        "No mirror has a control socket there".to_owned()
    } else {
        format!("There is: {}", running.join(", "))
    };
    Failure::not_found(format!(
        "No mirror named {name} runs with the run directory {}. {known}. Start it with \
         'mirrorctl start {name}'.",
        run_dir.path().display()
    ))
}

fn no_answer(run_dir: &RunDir, name: &str, error: &std::io::Error, patience: Duration) -> Failure {
    let log = run_dir.log(name);
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Failure::busy(format!(
            "The daemon of mirror {name} did not answer within {} s. It may be waiting for a \
             disk; see {}.",
            patience.as_secs(),
            log.display()
        )),
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
            Failure::failed(format!(
                "The daemon of mirror {name} closed the connection without an answer: it has \
                 ended, or it does not know you. See {}.",
                log.display()
            ))
        }
        _ => Failure::failed(format!(
            "Talking to the daemon of mirror {name} failed: {}. See {}.",
            words(error),
            log.display()
        )),
    }
}

pub(crate) fn odd_reply(name: &str) -> Failure {
    Failure::failed(format!(
        "The daemon of mirror {name} gave an answer of another kind than asked for. It may be \
         of another version: stop the mirror and start it again."
    ))
}

fn exchange(
    mut stream: &UnixStream,
    request: &Request,
    patience: Duration,
) -> std::io::Result<Reply> {
    stream.set_write_timeout(Some(QUICK))?;
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(&to_line(request)?)?;
    let limit = u64::try_from(MAX_LINE_BYTES).unwrap_or(u64::MAX);
    let mut answer = Vec::new();
    BufReader::new(stream.take(limit)).read_until(b'\n', &mut answer)?;
    if answer.last() != Some(&b'\n') {
        return Err(if answer.len() == MAX_LINE_BYTES {
            std::io::Error::new(ErrorKind::InvalidData, "the answer is too long")
        } else {
            std::io::Error::from(ErrorKind::UnexpectedEof)
        });
    }
    from_line(&answer).map_err(|e| {
        std::io::Error::new(
            ErrorKind::InvalidData,
            format!("the answer makes no sense ({e})"),
        )
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use mirror::control::ErrorKind as Kind;
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;

    /// A run directory with a daemon that answers one request with `answer`.
    fn with_daemon(
        tag: &str,
        answer: &'static [u8],
    ) -> (RunDir, PathBuf, std::thread::JoinHandle<String>) {
        let dir = std::env::temp_dir().join(format!("mirrorctl-{tag}-{}", std::process::id()));
        let run = RunDir::new(&dir).unwrap();
        run.ensure().unwrap();
        let listener = UnixListener::bind(run.socket("m")).unwrap();
        let daemon = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut request = String::new();
            BufReader::new(&stream).read_line(&mut request).unwrap();
            (&stream).write_all(answer).unwrap();
            request
        });
        (run, dir, daemon)
    }

    #[test]
    fn a_sentence_is_passed_on() {
        let (run, dir, daemon) =
            with_daemon("done", b"{\"reply\":\"done\",\"message\":\"Did it.\"}\n");
        assert_eq!(
            command(&run, "m", &Request::ClearFlushError),
            Ok("Did it.".into())
        );
        assert_eq!(
            daemon.join().unwrap(),
            "{\"request\":\"clear-flush-error\"}\n"
        );
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn an_error_keeps_its_sentence_and_gets_its_code() {
        let (run, dir, daemon) = with_daemon(
            "error",
            b"{\"reply\":\"error\",\"message\":\"Slot 7 is empty.\",\"kind\":\"not-found\"}\n",
        );
        let failure = command(&run, "m", &Request::Status).unwrap_err();
        assert_eq!(failure, Failure::not_found("Slot 7 is empty."));
        assert_eq!(Exit::from(Kind::NotFound), failure.exit);
        daemon.join().unwrap();
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn silence_and_nonsense_are_told_apart() {
        for (tag, answer, want) in [
            ("silence", &b""[..], "closed the connection"),
            ("cut", &b"{\"reply\":"[..], "closed the connection"),
            ("nonsense", &b"hello\n"[..], "makes no sense"),
            ("other", &b"{\"reply\":\"sung\"}\n"[..], "makes no sense"),
        ] {
            let (run, dir, daemon) = with_daemon(tag, answer);
            let failure = status(&run, "m").unwrap_err();
            assert!(failure.message.contains(want), "{tag}: {failure}");
            assert_eq!(failure.exit, Exit::Failed);
            daemon.join().unwrap();
            std::fs::remove_dir_all(dir).unwrap();
        }
    }

    #[test]
    fn a_socket_without_a_daemon_is_stale() {
        let (run, dir, daemon) = with_daemon("stale", b"\n");
        assert!(is_running(&run, "m").unwrap());
        drop(daemon.join());
        let failure = status(&run, "m").unwrap_err();
        assert!(failure.message.contains("has died"), "{failure}");
        assert_eq!(failure.exit, Exit::NotFound);
        assert!(!is_running(&run, "m").unwrap());
        assert!(!is_running(&run, "other").unwrap());
        std::fs::remove_dir_all(dir).unwrap();
    }
}
