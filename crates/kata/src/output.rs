//! Printing: tables for people, JSON for programs, colours where they are welcome.

use std::io::{self, IsTerminal, Write as _};

use serde::Serialize;

use crate::cli::Format;
use crate::failure::Failure;

/// Writes to standard output. A reader that has gone, such as `head`, has seen enough.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::new(error)),
        _ => Ok(()),
    }
}

/// Writes a value as JSON.
pub(crate) fn json(value: &impl Serialize) -> Result<(), Failure> {
    let mut text = serde_json::to_string_pretty(value).map_err(Failure::new)?;
    text.push('\n');
    print(&text)
}

/// Rows under a heading, in columns as wide as they need; the last one runs free.
pub(crate) fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain(heading.get(column).map(|cell| cell.chars().count())).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..heading.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = cells.zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("{}\n", padded.join("  ").trim_end())
    };
    let mut text = line(&mut heading.iter().copied());
    for row in rows {
        text.push_str(&line(&mut row.iter().map(String::as_str)));
    }
    text
}

/// A text in a colour, by its SGR code, where the stream is a terminal and nobody said `NO_COLOR`.
pub(crate) fn paint(stream: &impl IsTerminal, code: &str, text: &str) -> String {
    let unwelcome = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    if stream.is_terminal() && !unwelcome { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

/// `kata version`.
pub(crate) fn version(format: Format) -> Result<(), Failure> {
    let version = env!("CARGO_PKG_VERSION");
    match format {
        Format::Table => print(&format!("kata {version}\n")),
        Format::Json => json(&serde_json::json!({ "name": "kata", "version": version })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_have_no_tail() {
        let rows = [vec!["a".to_owned(), "bb".to_owned()], vec!["cccc".to_owned(), String::new()]];
        assert_eq!(table(&["X", "Y"], &rows), "X     Y\na     bb\ncccc\n");
    }
}
