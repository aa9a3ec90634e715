//! The server's log: logfmt lines (`time=… level=… msg=… key=value`) into the FIFO the engine opened in the bundle.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Mutex;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;

/// The name of the FIFO in the bundle, by convention of all shims.
const FIFO: &str = "log";

/// Opens the log of the bundle in the working directory, or `fallback` where the engine opened no FIFO.
pub(crate) fn open(fallback: &Path) -> io::Result<File> {
    match std::fs::metadata(FIFO) {
        Ok(there) if there.file_type().is_fifo() => {
            // Both ends: opening must not wait for a reader, and writing not fail when the engine restarts.
            let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
            OpenOptions::new().read(true).write(true).custom_flags(flags).open(FIFO)
        }
        _ => OpenOptions::new().append(true).create(true).mode(0o600).open(fallback),
    }
}

/// Sends the program's log to `file`; every line names the sandbox.
pub(crate) fn init(file: File, sandbox: &str, debug: bool) {
    let level = if debug { Level::DEBUG } else { Level::INFO };
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .event_format(Logfmt { sandbox: sandbox.to_owned() })
        .with_writer(Mutex::new(Lossy(file)))
        .finish();
    // Only fails when a log is set already: then that one is as good.
    let _ = subscriber.try_init();
}

/// A writer that would rather lose a line than stop the pod: the FIFO is full when the engine is not reading.
struct Lossy(File);

impl Write for Lossy {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.0.write(line) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(line.len()),
            other => other,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The format of a line.
struct Logfmt {
    sandbox: String,
}

impl<S, N> FormatEvent<S, N> for Logfmt
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        out.write_str("time=\"")?;
        SystemTime.format_time(&mut out)?;
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        write!(out, "\" level={level}")?;
        let mut fields = Fields::default();
        event.record(&mut fields);
        write!(out, " msg={}", Value(&fields.message))?;
        write!(out, " runtime=kata sandbox={}", Value(&self.sandbox))?;
        writeln!(out, "{}", fields.rest)
    }
}

/// The message apart, the other fields as they will be written.
#[derive(Default)]
struct Fields {
    message: String,
    rest: String,
}

impl Fields {
    fn set(&mut self, field: &Field, value: String) {
        if field.name() == "message" {
            self.message = value;
        } else if !field.name().starts_with("log.") {
            self.rest.push_str(&format!(" {}={}", field.name(), Value(&value)));
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.set(field, format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field, value.to_owned());
    }
}

/// A value, quoted where it must be.
struct Value<'a>(&'a str);

impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = |c: char| c.is_alphanumeric() || "-_./:@+,".contains(c);
        if !self.0.is_empty() && self.0.chars().all(plain) {
            return f.write_str(self.0);
        }
        f.write_str("\"")?;
        for c in self.0.chars() {
            match c {
                '"' => f.write_str("\\\"")?,
                '\\' => f.write_str("\\\\")?,
                '\n' => f.write_str("\\n")?,
                c if c.is_control() => write!(f, "\\u{:04x}", u32::from(c))?,
                c => fmt::Write::write_char(f, c)?,
            }
        }
        f.write_str("\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_can_be_parsed_again() {
        assert_eq!(Value("plain/path:1").to_string(), "plain/path:1");
        assert_eq!(Value("two words").to_string(), "\"two words\"");
        assert_eq!(Value("").to_string(), "\"\"");
        assert_eq!(Value("a\"b\\c\nd\u{1b}[0m").to_string(), "\"a\\\"b\\\\c\\nd\\u001b[0m\"");
    }

    #[test]
    fn events_become_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(Level::INFO)
            .event_format(Logfmt { sandbox: "pod1".into() })
            .with_writer(Mutex::new(Lossy(File::create(&path).unwrap())))
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(container = "c 1", code = 3, "Container ended");
            tracing::debug!("not at this level");
        });
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("time=\"2"), "{text}");
        assert!(
            text.ends_with(
                "\" level=info msg=\"Container ended\" runtime=kata sandbox=pod1 container=\"c 1\" code=3\n"
            ),
            "{text}"
        );
        assert_eq!(text.lines().count(), 1);
    }
}
