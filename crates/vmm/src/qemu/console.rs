//! What a machine says: the guest's console and the VMM's standard error, kept for the log and for the last words.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncRead, AsyncReadExt};

/// How many lines are remembered: a kernel panic with its trace has about 40.
const LINES: usize = 40;

/// The longest line that is remembered whole.
const LINE_LENGTH: usize = 400;

/// How long the log may grow before it becomes `<log>.1` and a new one is begun: a guest that talks without end takes
/// twice this much of the host's memory or disk.
const LOG_LIMIT: u64 = 512 * 1024;

/// The last lines of a stream.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tail(Arc<Mutex<Lines>>);

#[derive(Debug, Default)]
struct Lines {
    whole: VecDeque<String>,
    current: Vec<u8>,
}

impl Tail {
    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, bytes: &[u8]) {
        let mut lines = self.lines();
        for byte in bytes {
            if *byte == b'\n' {
                lines.finish();
            } else if lines.current.len() < LINE_LENGTH {
                lines.current.push(*byte);
            }
        }
    }

    /// The lines, without empty ones, each ended by a line feed.
    pub(crate) fn text(&self) -> String {
        let mut lines = self.lines();
        lines.finish();
        lines.whole.iter().fold(String::new(), |text, line| text + line + "\n")
    }
}

impl Lines {
    fn finish(&mut self) {
        let line = printable(&std::mem::take(&mut self.current));
        if line.is_empty() {
            return;
        }
        if self.whole.len() == LINES {
            self.whole.pop_front();
        }
        self.whole.push_back(line);
    }
}

/// The guest chooses these bytes and they end in operators' terminals and logs: only text is left of them.
fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut plain = String::with_capacity(text.len());
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            // A control sequence, as in colours: up to its final letter.
            '\u{1b}' if characters.next_if_eq(&'[').is_some() => {
                while characters.next_if(|next| !('\u{40}'..='\u{7e}').contains(next)).is_some() {}
                characters.next();
            }
            '\t' => plain.push(' '),
            other if other.is_control() => {}
            other => plain.push(other),
        }
    }
    plain.trim_end().to_owned()
}

/// A file that never grows beyond its limit.
#[derive(Debug)]
pub(crate) struct Log {
    path: PathBuf,
    file: File,
    size: u64,
}

impl Log {
    pub(crate) fn create(path: PathBuf) -> io::Result<Log> {
        let file = Log::open(&path)?;
        Ok(Log { path, file, size: 0 })
    }

    fn open(path: &PathBuf) -> io::Result<File> {
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.size + bytes.len() as u64 > LOG_LIMIT {
            fs::rename(&self.path, self.path.with_added_extension("1"))?;
            self.file = Log::open(&self.path)?;
            self.size = 0;
        }
        self.file.write_all(bytes)?;
        self.size += bytes.len() as u64;
        Ok(())
    }
}

/// Reads a stream to its end, into the tail and the log. A log that can't be written is given up with one warning: the
/// stream is drained all the same, or the guest would block on its console.
pub(crate) async fn drain(mut stream: impl AsyncRead + Unpin, tail: Tail, mut log: Option<Log>) {
    let mut buffer = vec![0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
        let bytes = &buffer[..count];
        tail.push(bytes);
        if let Some(open) = &mut log
            && let Err(err) = open.write(bytes)
        {
            tracing::warn!("Console log {} ends here: {err}", open.path.display());
            log = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_last_lines_are_kept() {
        let tail = Tail::default();
        for number in 0..100 {
            tail.push(format!("line {number}\r\n\n").as_bytes());
        }
        tail.push(b"cut of");
        let text = tail.text();
        assert_eq!(text.lines().count(), LINES);
        assert!(text.starts_with("line 61\n") && text.ends_with("line 99\ncut of\n"), "{text}");
    }

    #[test]
    fn colours_and_titles_are_dropped() {
        assert_eq!(printable(b"\x1b[1;31mred\x1b[0m \x07bell\x1bc"), "red bellc");
    }

    #[tokio::test]
    async fn an_endless_console_takes_bounded_space() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let endless = vec![b'x'; 5 * usize::try_from(LOG_LIMIT).unwrap() / 2];
        drain(endless.as_slice(), Tail::default(), Some(Log::create(path.clone()).unwrap())).await;
        let sizes: u64 = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
        assert!(path.exists() && sizes <= 2 * LOG_LIMIT, "{sizes}");
        assert!(fs::read_dir(&dir).unwrap().count() <= 2);
    }

    proptest! {
        #[test]
        fn nothing_but_text_gets_through(bytes: Vec<u8>) {
            prop_assert!(!printable(&bytes).chars().any(char::is_control));
        }

        #[test]
        fn any_stream_is_bounded(chunks: Vec<Vec<u8>>) {
            let tail = Tail::default();
            for chunk in &chunks {
                tail.push(chunk);
            }
            prop_assert!(tail.text().lines().count() <= LINES);
        }
    }
}
