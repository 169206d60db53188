//! The log, which goes to standard error by way of a thread of its own.
//!
//! # Why
//!
//! The log usually lies under `/run`, in memory, and what lies there can be swapped out: to our
//! own device, when that is swap. Whoever then writes to the log waits until the page is read
//! back, which only the mirror's thread can do. So that thread must not be the one that writes.
//! The same holds for a log on a file system that our device carries.
//!
//! # What it promises
//!
//! - From [`start`] on, nothing but the log's thread touches standard error, and nobody waits for
//!   it, except for a moment at the end ([`flush`]).
//! - Lines come in order. When the log cannot keep up, lines are lost, and their number is told.

use std::io::{self, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

/// Lines that wait to be written.
const QUEUE_LINES: usize = 1024;
/// How long the end of the process waits for its last lines.
const FLUSH_PATIENCE: Duration = Duration::from_secs(2);

static QUEUE: OnceLock<SyncSender<Message>> = OnceLock::new();
static LOST: AtomicUsize = AtomicUsize::new(0);

enum Message {
    /// A line with its end.
    Line(Vec<u8>),
    /// Everything before this has been written.
    Flushed(SyncSender<()>),
}

/// Where `tracing` writes; each write is one line.
pub(crate) struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match QUEUE.get() {
            // There is no device of ours yet that could be waited for.
            None => io::stderr().write_all(line)?,
            Some(queue) => {
                if queue.try_send(Message::Line(line.to_vec())).is_err() {
                    LOST.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Starts the log's thread. After signals are blocked, which it would take otherwise, and after
/// memory is locked, which would lock all of its stack.
pub(crate) fn start() {
    let (queue, lines) = sync_channel(QUEUE_LINES);
    if QUEUE.set(queue).is_ok() {
        std::thread::spawn(move || write_lines(&lines, &mut io::stderr()));
    }
    // The standard hook writes by itself.
    std::panic::set_hook(Box::new(|panic| {
        tracing::error!("{panic}");
        flush();
    }));
}

/// Waits a moment for the lines so far.
pub(crate) fn flush() {
    let Some(queue) = QUEUE.get() else { return };
    let (written, told) = sync_channel(1);
    if queue.try_send(Message::Flushed(written)).is_ok() {
        // Too late means that the log cannot be written now; the process ends without it.
        let _ = told.recv_timeout(FLUSH_PATIENCE);
    }
}

fn write_lines(lines: &Receiver<Message>, to: &mut impl Write) {
    for message in lines {
        // There is nobody to tell of an error, and the next line may be luckier.
        match message {
            Message::Line(line) => drop(to.write_all(&line)),
            Message::Flushed(written) => drop(written.send(())),
        }
        let lost = LOST.swap(0, Ordering::Relaxed);
        if lost > 0 {
            drop(writeln!(to, "{lost} lines of the log are lost here"));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test")]
mod tests {
    use super::{Message, write_lines};
    use std::sync::mpsc::sync_channel;

    #[test]
    fn lines_come_in_order_and_a_flush_after_them() {
        let (queue, lines) = sync_channel(4);
        let (written, told) = sync_channel(1);
        for line in ["one\n", "two\n"] {
            queue
                .try_send(Message::Line(line.as_bytes().to_vec()))
                .unwrap();
        }
        queue.try_send(Message::Flushed(written)).unwrap();
        drop(queue);
        let mut log = Vec::new();
        write_lines(&lines, &mut log);
        assert_eq!(log, b"one\ntwo\n");
        assert_eq!(told.try_recv(), Ok(()));
    }
}
