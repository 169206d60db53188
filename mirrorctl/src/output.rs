//! All that `mirrorctl` prints goes through here.
//!
//! Results go to standard output, everything else to standard error. A reader that has gone
//! away (`mirrorctl status | head -1`) ends the process quietly instead of with a panic.

use std::cell::Cell;
use std::io::{ErrorKind, IsTerminal, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use serde::Serialize;

use crate::failure::Failure;

/// Writes `text` and flushes; ends the process when nobody reads any more.
fn write_or_end(mut to: impl Write, text: &str) {
    let written = to.write_all(text.as_bytes()).and_then(|()| to.flush());
    if let Err(error) = written
        && error.kind() == ErrorKind::BrokenPipe
    {
        std::process::exit(0);
    }
}

/// Prints a result: one line, or several.
pub(crate) fn line(text: &str) {
    write_or_end(std::io::stdout().lock(), &format!("{text}\n"));
}

/// Prints without a line end, for redrawing.
pub(crate) fn raw(text: &str) {
    write_or_end(std::io::stdout().lock(), text);
}

/// Prints something worth knowing that is not the result.
pub(crate) fn note(text: &str) {
    write_or_end(std::io::stderr().lock(), &format!("mirrorctl: {text}\n"));
}

/// Notes of something that serves others: it waits for nobody who reads them, and goes on when
/// nobody does any more. What there is no room for is counted, and said with the next note.
pub(crate) struct Notes {
    /// `None` is the end.
    queue: SyncSender<Option<String>>,
    ended: Receiver<()>,
}

/// So many notes wait for their reader.
const NOTES_WAITING: usize = 256;
/// So long the last of them may take.
const LAST_NOTES: Duration = Duration::from_secs(1);

impl Notes {
    /// Notes on standard error.
    ///
    /// # Errors
    ///
    /// When there can be no thread.
    pub(crate) fn begin() -> std::io::Result<Self> {
        Self::to(std::io::stderr())
    }

    fn to(mut to: impl Write + Send + 'static) -> std::io::Result<Self> {
        let (queue, waiting) = sync_channel::<Option<String>>(NOTES_WAITING);
        let (end, ended) = sync_channel(1);
        std::thread::Builder::new().spawn(move || {
            for text in waiting.iter().map_while(|note| note) {
                // Nobody can be told that nobody reads it.
                _ = to.write_all(format!("mirrorctl: {text}\n").as_bytes());
                _ = to.flush();
            }
            _ = end.try_send(());
        })?;
        Ok(Self { queue, ended })
    }

    /// Takes a note.
    pub(crate) fn taker(&self) -> impl Fn(&str) + 'static {
        let (queue, missed) = (self.queue.clone(), Cell::new(0_u64));
        move |text| {
            let text = match missed.get() {
                0 => text.to_owned(),
                count => format!("({count} messages are missing here: nobody read them)\n{text}"),
            };
            match queue.try_send(Some(text)) {
                Ok(()) => missed.set(0),
                Err(_) => missed.set(missed.get() + 1),
            }
        }
    }

    /// Waits for the last notes to be read, but not for long.
    pub(crate) fn end(self) {
        if self.queue.try_send(None).is_ok() {
            _ = self.ended.recv_timeout(LAST_NOTES);
        }
    }
}

/// Prints why the command failed.
pub(crate) fn failure(failure: &Failure) {
    note(&failure.message);
}

/// Prints a document as JSON, indented.
pub(crate) fn json<T: Serialize>(document: &T) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(document)
        .map_err(|e| Failure::failed(format!("cannot print as JSON: {e}.")))?;
    line(&text);
    Ok(())
}

/// Prints a document as JSON on one line.
pub(crate) fn json_line<T: Serialize>(document: &T) -> Result<(), Failure> {
    let text = serde_json::to_string(document)
        .map_err(|e| Failure::failed(format!("cannot print as JSON: {e}.")))?;
    line(&text);
    Ok(())
}

/// Prints what was done: as the sentence, or as `{"message": sentence}`.
pub(crate) fn done(json: bool, message: &str) -> Result<(), Failure> {
    if json {
        json_line(&serde_json::json!({ "message": message }))
    } else {
        line(message);
        Ok(())
    }
}

/// The text with its first letter as a capital, except where that is a part of an address.
pub(crate) fn capital(text: &str) -> String {
    if text.split(' ').next().is_some_and(peer::is_address) {
        return text.to_owned();
    }
    let mut chars = text.chars();
    let first = chars.next().into_iter().flat_map(char::to_uppercase);
    first.chain(chars).collect()
}

/// Whether a person looks at standard output.
pub(crate) fn is_terminal() -> bool {
    std::io::stdout().is_terminal()
}

/// Rows as aligned columns, two spaces between them, each line indented by two.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width_of = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width_of).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("  {cell:<width$}"));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::sync::mpsc::{Sender, channel};

    /// Reads when it is told to, `Err` as an error; what it has read goes to the test.
    struct Reader {
        told: Receiver<std::io::Result<()>>,
        read: Sender<String>,
    }

    impl Write for Reader {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.told.recv().unwrap_or(Ok(()))?;
            let text = String::from_utf8_lossy(bytes).into_owned();
            self.read.send(text).unwrap();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn notes_wait_for_nobody_and_outlive_their_reader() {
        let ((tell, told), (read, seen)) = (channel(), channel());
        let notes = Notes::to(Reader { told, read }).unwrap();
        let note = notes.taker();
        // Nobody reads; the thread has at most one of them in hand.
        (0..NOTES_WAITING + 10).for_each(|number| note(&number.to_string()));
        tell.send(Err(ErrorKind::BrokenPipe.into())).unwrap();
        tell.send(Ok(())).unwrap();
        assert_eq!(
            seen.recv().unwrap(),
            "mirrorctl: 1\n",
            "the first had no reader"
        );
        drop(tell);
        while !seen
            .recv()
            .unwrap()
            .contains(&format!(" {}\n", NOTES_WAITING - 1))
        {}
        note("again");
        notes.end();
        let rest: Vec<String> = seen.iter().collect();
        let said = " messages are missing here: nobody read them)\nagain\n";
        assert!(rest.last().unwrap().ends_with(said), "{rest:?}");
    }

    #[test]
    fn sentences_begin_with_a_capital() {
        assert_eq!(capital("a mirror"), "A mirror");
        assert_eq!(capital(""), "");
        assert_eq!(capital("nbd://h/m has 1 byte"), "nbd://h/m has 1 byte");
    }

    #[test]
    fn columns_are_aligned_and_lines_end_without_blanks() {
        let rows = [
            vec!["slot".to_owned(), "state".to_owned(), "path".to_owned()],
            vec!["0".to_owned(), "resyncing".to_owned(), "/é".to_owned()],
            vec!["1".to_owned(), "in-sync".to_owned(), String::new()],
        ];
        assert_eq!(
            table(&rows),
            "  slot  state      path\n  0     resyncing  /é\n  1     in-sync\n"
        );
    }
}
