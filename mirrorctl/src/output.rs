//! All that `mirrorctl` prints goes through here.
//!
//! Results go to standard output, everything else to standard error. A reader that has gone
//! away (`mirrorctl status | head -1`) ends the process quietly instead of with a panic.

use std::io::{ErrorKind, IsTerminal, Write};

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
    use super::*;

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
