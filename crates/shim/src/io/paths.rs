//! Opening what the engine names as a process's streams.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec};
use tokio::net::unix::pipe;
use tokio::sync::watch;

use crate::fault::Fault;

/// The streams as the engine named them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Paths {
    /// Where input comes from; empty for none.
    pub(crate) stdin: String,
    /// Where output goes; empty for nowhere.
    pub(crate) stdout: String,
    /// Where errors go; empty for nowhere, and unused with a terminal.
    pub(crate) stderr: String,
    /// Whether the process has a terminal.
    pub(crate) terminal: bool,
}

/// Where input comes from.
#[derive(Debug)]
pub(super) enum Source {
    /// No input: the process finds its end at once.
    None,
    /// A FIFO.
    Fifo(pipe::Receiver),
    /// A file, read to its end.
    File(File),
}

/// Where output goes.
#[derive(Debug)]
pub(super) enum Sink {
    /// Read and thrown away: a process must not stop because nobody listens.
    Nowhere,
    /// A FIFO that can be written to while nobody reads.
    Fifo(pipe::Sender, Readers),
    /// A file.
    File(File),
}

/// The opened streams of a process that is not started yet.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(super) stdin: Source,
    pub(super) stdout: Sink,
    pub(super) stderr: Sink,
    pub(super) terminal: bool,
    /// Set when input shall end after what is in the FIFO.
    pub(super) close: watch::Sender<bool>,
}

impl Opened {
    /// Opens all streams. None of them waits for its other end.
    pub(crate) fn open(paths: &Paths) -> Result<Opened, Fault> {
        Ok(Opened {
            stdin: source(&paths.stdin)?,
            stdout: sink("stdout", &paths.stdout)?,
            stderr: if paths.terminal { Sink::Nowhere } else { sink("stderr", &paths.stderr)? },
            terminal: paths.terminal,
            close: watch::Sender::new(false),
        })
    }

    /// Where to say that input shall end once what is in the FIFO is delivered.
    pub(crate) fn closer(&self) -> watch::Sender<bool> {
        self.close.clone()
    }
}

/// What a stream's name leads to.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    None,
    /// A path that must exist: a FIFO the engine made, or a file.
    Existing(PathBuf),
    /// A file that is made where it is missing.
    Log(PathBuf),
}

fn target(stream: &str, name: &str) -> Result<Target, Fault> {
    let refuse = |why: &str| Err(Fault::invalid(format!("Cannot use {name:?} as {stream}: {why}")));
    if name.is_empty() {
        return Ok(Target::None);
    }
    let (scheme, path) = name.split_once("://").unwrap_or(("fifo", name));
    if !path.starts_with('/') {
        return refuse("it must be an absolute path");
    }
    match scheme {
        "fifo" => Ok(Target::Existing(path.into())),
        "file" if stream == "stdin" => refuse("file:// is for output"),
        // An engine may add options for its own use.
        "file" => Ok(Target::Log(path.split_once('?').map_or(path, |(path, _)| path).into())),
        "binary" => refuse("logging programs (binary://) are not supported; use FIFOs or file://"),
        _ => refuse("known are FIFOs, plain or as fifo://, and file://"),
    }
}

fn cannot(stream: &str, path: &Path, error: &std::io::Error) -> Fault {
    let message = format!("Cannot open {} as {stream}: {error}", path.display());
    if error.kind() == ErrorKind::NotFound { Fault::not_found(message) } else { Fault::invalid(message) }
}

fn source(name: &str) -> Result<Source, Fault> {
    let path = match target("stdin", name)? {
        Target::None => return Ok(Source::None),
        Target::Existing(path) | Target::Log(path) => path,
    };
    let failed = |error: std::io::Error| cannot("stdin", &path, &error);
    if std::fs::metadata(&path).map_err(failed)?.file_type().is_fifo() {
        return pipe::OpenOptions::new().open_receiver(&path).map(Source::Fifo).map_err(failed);
    }
    File::open(&path).map(Source::File).map_err(failed)
}

fn sink(stream: &str, name: &str) -> Result<Sink, Fault> {
    let (path, create) = match target(stream, name)? {
        Target::None => return Ok(Sink::Nowhere),
        Target::Existing(path) => (path, false),
        Target::Log(path) => (path, true),
    };
    let failed = |error: std::io::Error| cannot(stream, &path, &error);
    match std::fs::metadata(&path) {
        Ok(there) if there.file_type().is_fifo() => fifo_sink(&path).map_err(failed),
        Ok(_) => File::options().append(true).open(&path).map(Sink::File).map_err(failed),
        Err(error) if error.kind() == ErrorKind::NotFound && create => {
            if let Some(dir) = path.parent() {
                std::fs::create_dir_all(dir).map_err(failed)?;
            }
            File::options().append(true).create(true).mode(0o640).open(&path).map(Sink::File).map_err(failed)
        }
        Err(error) => Err(failed(error)),
    }
}

fn fifo_sink(path: &Path) -> std::io::Result<Sink> {
    // The reading end first: without one, opening for writing fails.
    let keep = File::options().read(true).custom_flags(nonblock()).open(path)?;
    let writer = pipe::OpenOptions::new().open_sender(path)?;
    let probe = writer.as_fd().try_clone_to_owned()?;
    Ok(Sink::Fifo(writer, Readers(Arc::new(Mutex::new(Some(Held { probe, keep: Some(keep) }))))))
}

fn nonblock() -> i32 {
    rustix::fs::OFlags::NONBLOCK.bits().cast_signed()
}

/// Another descriptor for the FIFO behind `fd`, by way of `/proc`: its name may be gone already.
fn reopen(fd: BorrowedFd<'_>, options: &mut std::fs::OpenOptions) -> std::io::Result<File> {
    options.custom_flags(nonblock()).open(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Opens a writing end of a FIFO that is read from.
pub(super) fn writing_end(reader: BorrowedFd<'_>) -> std::io::Result<File> {
    reopen(reader, File::options().write(true))
}

/// Opens a FIFO for reading anew, as if its writers had never left.
pub(super) fn fresh_reader(reader: BorrowedFd<'_>) -> std::io::Result<pipe::Receiver> {
    pipe::Receiver::from_file(reopen(reader, File::options().read(true))?)
}

/// Our own reading end of an output FIFO, and finding out whether there is another.
#[derive(Debug, Clone)]
pub(super) struct Readers(Arc<Mutex<Option<Held>>>);

#[derive(Debug)]
struct Held {
    /// A writing end.
    probe: OwnedFd,
    /// A reading end, so that writing does not fail while no client is there.
    keep: Option<File>,
}

impl Readers {
    /// Whether a client has the FIFO open for reading; none when that cannot be known.
    ///
    /// Nothing else of this process may write meanwhile; there is one thread, and this does not wait.
    pub(super) fn any(&self) -> Option<bool> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let held = held.as_mut()?;
        held.keep = None;
        // An error condition on a writing end says: no reader (poll(2)).
        let mut fds = [PollFd::new(&held.probe, PollFlags::OUT)];
        let polled = rustix::event::poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        let any = polled.ok().map(|_| !fds[0].revents().contains(PollFlags::ERR));
        held.keep = reopen(held.probe.as_fd(), File::options().read(true)).ok();
        any
    }

    /// Gives the FIFO up: what has been written is the client's now.
    pub(super) fn close(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

impl Opened {
    /// Where to ask whether the client that reads the output is there.
    pub(super) fn client(&self) -> Option<Readers> {
        match (&self.stdout, &self.stderr) {
            (Sink::Fifo(_, readers), _) | (_, Sink::Fifo(_, readers)) => Some(readers.clone()),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_understood() {
        assert_eq!(target("stdout", "").unwrap(), Target::None);
        assert_eq!(target("stdout", "/run/x/1-stdout").unwrap(), Target::Existing("/run/x/1-stdout".into()));
        assert_eq!(target("stdin", "fifo:///x").unwrap(), Target::Existing("/x".into()));
        assert_eq!(target("stderr", "file:///var/log/x?y=1").unwrap(), Target::Log("/var/log/x".into()));
    }

    #[test]
    fn what_cannot_be_used_is_refused_by_name() {
        for (stream, name) in [
            ("stdout", "relative"),
            ("stdin", "file:///x"),
            ("stdout", "binary:///bin/logger?a=b"),
            ("stdout", "http://x/y"),
            ("stdout", "gopher:///x"),
        ] {
            let fault = target(stream, name).unwrap_err();
            assert_eq!(fault.code, ttrpc::Code::INVALID_ARGUMENT);
            assert!(fault.message.contains(name) && fault.message.contains(stream), "{}", fault.message);
        }
    }

    #[test]
    fn a_missing_fifo_is_an_error_and_a_missing_log_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("missing");
        assert!(sink("stdout", missing.to_str().unwrap()).unwrap_err().is_not_found());
        let log = dir.path().join("sub/log");
        assert!(matches!(sink("stdout", &format!("file://{}", log.display())).unwrap(), Sink::File(_)));
        assert!(log.exists());
    }
}
