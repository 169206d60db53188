//! The device as a picture that needs nothing but itself.

use std::fmt::Write as _;

use mirror::control::{ScrubClass, ScrubMap};

use super::map::{CLASSES, cells, count_of};
use crate::size::human;

/// Cells in a row.
pub(super) const COLUMNS: usize = 96;
/// Rows at most.
pub(super) const ROWS: usize = 32;
/// Side of a cell, in units of the picture.
const CELL: usize = 9;
const LEFT: usize = 86;
const TOP: usize = 70;
const WIDTH: usize = LEFT + COLUMNS * CELL + 24;

fn colour(class: ScrubClass) -> &'static str {
    match class {
        ScrubClass::Unwritten => "#e9ecef",
        ScrubClass::Written => "#8fb3d1",
        ScrubClass::Hot => "#f0b429",
        ScrubClass::Missed => "#9467bd",
        ScrubClass::Repaired => "#2f9e63",
        ScrubClass::Damaged => "#d62839",
    }
}

/// The picture of a map.
pub(super) fn picture(name: &str, map: &ScrubMap) -> String {
    let cells = cells(map);
    let rows = cells.len().div_ceil(COLUMNS).max(1);
    let legend = TOP + rows * CELL + 34;
    let height = legend + 58;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" role=\"img\">\n\
         <title>Map of mirror {name}</title>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"{LEFT}\" y=\"30\" font-size=\"18\" font-weight=\"bold\" fill=\"#212529\">\
         Mirror {name}, {}</text>\n\
         <text x=\"{LEFT}\" y=\"52\" font-size=\"12\" fill=\"#495057\">Each square is {} of the \
         device and shows the worst in it</text>\n",
        human(map.size_bytes),
        human(map.cell_bytes),
    );
    for (row, cells) in cells.chunks(COLUMNS).enumerate() {
        draw_row(&mut svg, map, row, cells);
    }
    draw_grid(&mut svg, cells.len());
    for (index, class) in cells.iter().enumerate() {
        let (x, y) = place(index);
        draw_mark(&mut svg, *class, x, y);
    }
    draw_legend(&mut svg, map, legend);
    svg.push_str("</svg>\n");
    svg
}

/// Where a cell is.
fn place(index: usize) -> (usize, usize) {
    (LEFT + index % COLUMNS * CELL, TOP + index / COLUMNS * CELL)
}

fn draw_row(svg: &mut String, map: &ScrubMap, row: usize, cells: &[ScrubClass]) {
    let mut column = row * COLUMNS;
    if row.is_multiple_of(4) {
        let begin = human(map.cell_bytes.saturating_mul(column as u64));
        let (x, y) = (LEFT - 8, TOP + row * CELL + CELL - 1);
        push(
            svg,
            &format!(
                "<text x=\"{x}\" y=\"{y}\" font-size=\"10\" text-anchor=\"end\" fill=\"#868e96\">{begin}</text>"
            ),
        );
    }
    for run in cells.chunk_by(|a, b| a == b) {
        let (x, y) = place(column);
        let (width, fill) = (run.len() * CELL, colour(run[0]));
        push(
            svg,
            &format!(
                "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{CELL}\" fill=\"{fill}\"/>"
            ),
        );
        column += run.len();
    }
}

/// White lines between the cells, drawn over them.
fn draw_grid(svg: &mut String, cells: usize) {
    let rows = cells.div_ceil(COLUMNS);
    let columns = cells.min(COLUMNS);
    let (right, bottom) = (LEFT + columns * CELL, TOP + rows * CELL);
    let mut path = String::new();
    for column in 0..=columns {
        let _ = write!(path, "M{} {TOP}V{bottom}", LEFT + column * CELL);
    }
    for row in 0..=rows {
        let _ = write!(path, "M{LEFT} {}H{right}", TOP + row * CELL);
    }
    push(
        svg,
        &format!("<path d=\"{path}\" stroke=\"#ffffff\" stroke-width=\"1\"/>"),
    );
}

/// What matters most is told by its form as well as by its colour.
fn draw_mark(svg: &mut String, class: ScrubClass, x: usize, y: usize) {
    let (near, far) = (2, CELL - 2);
    match class {
        ScrubClass::Damaged => push(
            svg,
            &format!(
                "<path d=\"M{} {}L{} {}M{} {}L{} {}\" stroke=\"#ffffff\" stroke-width=\"1.6\"/>",
                x + near,
                y + near,
                x + far,
                y + far,
                x + far,
                y + near,
                x + near,
                y + far
            ),
        ),
        ScrubClass::Repaired => push(
            svg,
            &format!(
                "<path d=\"M{}.5 {}V{}M{} {}.5H{}\" stroke=\"#ffffff\" stroke-width=\"1.4\"/>",
                x + CELL / 2,
                y + near,
                y + far,
                x + near,
                y + CELL / 2,
                x + far
            ),
        ),
        _ => {}
    }
}

fn draw_legend(svg: &mut String, map: &ScrubMap, top: usize) {
    const WIDE: usize = (COLUMNS * CELL) / 3;
    for (index, (class, name)) in CLASSES.iter().enumerate() {
        let (x, y) = (LEFT + index % 3 * WIDE, top + index / 3 * 24);
        let fill = colour(*class);
        push(
            svg,
            &format!(
                "<rect x=\"{x}\" y=\"{y}\" width=\"{CELL}\" height=\"{CELL}\" fill=\"{fill}\"/>"
            ),
        );
        draw_mark(svg, *class, x, y);
        let count = count_of(map, *class);
        push(
            svg,
            &format!(
                "<text x=\"{}\" y=\"{}\" font-size=\"12\" fill=\"#212529\">{name} \
             <tspan fill=\"#868e96\">{count}</tspan></text>",
                x + CELL + 7,
                y + CELL
            ),
        );
    }
}

fn push(svg: &mut String, element: &str) {
    svg.push_str(element);
    svg.push('\n');
}
