//! The device as rows of characters, and as a picture.

use std::path::Path;

use mirror::control::{Reply, Request, ScrubClass, ScrubMap};

use super::svg;
use crate::failure::{Exit, Failure, words};
use crate::size::human;
use crate::{Context, client, output};

/// Cells in a row of the terminal.
const COLUMNS: usize = 64;
/// Rows in a terminal.
const ROWS: usize = 16;

/// All classes, in the order in which they are explained.
pub(super) const CLASSES: [(ScrubClass, &str); 6] = [
    (ScrubClass::Unwritten, "not written"),
    (ScrubClass::Written, "written"),
    (ScrubClass::Hot, "hot"),
    (ScrubClass::Missed, "missed by a member"),
    (ScrubClass::Repaired, "repaired"),
    (ScrubClass::Damaged, "damaged"),
];

pub(super) fn run(name: &str, file: Option<&Path>, context: &Context) -> Result<(), Failure> {
    let cells = match file {
        Some(_) => svg::COLUMNS * svg::ROWS,
        None => COLUMNS * ROWS,
    };
    let request = Request::ScrubMap {
        cells: u32::try_from(cells).unwrap_or(u32::MAX),
    };
    let reply = client::ask(&context.run_dir, name, &request, client::QUICK)?;
    let Reply::ScrubMap(map) = reply else {
        return Err(client::odd_reply(name));
    };
    if let Some(file) = file {
        std::fs::write(file, svg::picture(name, &map)).map_err(|error| {
            Failure::new(
                Exit::of_io(&error),
                format!("{} cannot be written: {}.", file.display(), words(&error)),
            )
        })?;
        return output::done(context.json, &format!("the map is in {}", file.display()));
    }
    if context.json {
        return output::json(&map);
    }
    let colour = output::is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    output::raw(&text(name, &map, colour));
    Ok(())
}

/// The cells in order, not more than a daemon may send.
pub(super) fn cells(map: &ScrubMap) -> Vec<ScrubClass> {
    let most = usize::try_from(mirror::control::MAP_CELLS_MAX).unwrap_or(usize::MAX);
    let runs = map.runs.iter();
    runs.flat_map(|run| (0..run.cells).map(|_| run.class))
        .take(most)
        .collect()
}

/// How many cells are of a class.
pub(super) fn count_of(map: &ScrubMap, class: ScrubClass) -> u64 {
    let runs = map.runs.iter().filter(|run| run.class == class);
    runs.map(|run| u64::from(run.cells)).sum()
}

pub(super) fn text(name: &str, map: &ScrubMap, colour: bool) -> String {
    let mut text = format!(
        "mirror {name}: {}, a character is {} and shows the worst in it\n",
        human(map.size_bytes),
        human(map.cell_bytes)
    );
    for (row, cells) in cells(map).chunks(COLUMNS).enumerate() {
        let begin = map.cell_bytes.saturating_mul((row * COLUMNS) as u64);
        text.push_str(&format!("{:>10} ", human(begin)));
        for run in cells.chunk_by(|a, b| a == b) {
            text.push_str(&painted(run[0], run.len(), colour));
        }
        text.push('\n');
    }
    for (class, name) in CLASSES {
        let count = count_of(map, class);
        text.push_str(&format!(
            "{count:>10} {} {name}\n",
            painted(class, 1, colour)
        ));
    }
    text
}

/// `count` characters of a class. They differ without colour as well.
fn painted(class: ScrubClass, count: usize, colour: bool) -> String {
    let (character, code) = match class {
        ScrubClass::Unwritten => ("·", "2"),
        ScrubClass::Written => ("░", "34"),
        ScrubClass::Hot => ("▒", "33"),
        ScrubClass::Missed => ("▓", "35"),
        ScrubClass::Repaired => ("+", "1;32"),
        ScrubClass::Damaged => ("X", "1;31"),
    };
    let characters = character.repeat(count);
    if colour {
        format!("\x1b[{code}m{characters}\x1b[0m")
    } else {
        characters
    }
}
