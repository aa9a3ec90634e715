//! Standard streams between this process and a shim: FIFOs, or one terminal.
//!
//! Each stream has a thread of its own that copies with blocking calls: opening a FIFO waits for the other side, and so
//! does reading a terminal. The threads end with their streams; those that would wait for ever end with the process.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags, fcntl_setfl, open};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::sync::oneshot;

use crate::{Error, server};

/// How long the last output may take to arrive after the command's end.
const LAST_OUTPUT: Duration = Duration::from_secs(10);

/// The FIFOs of one process, in a directory that is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Streams {
    dir: PathBuf,
    pub(crate) terminal: bool,
    interactive: bool,
}

/// Copying, under way.
#[derive(Debug)]
pub(crate) struct Copying {
    outputs: Vec<JoinHandle<()>>,
    /// Answers when standard input has ended and all of it is on its way.
    pub(crate) input_ended: oneshot::Receiver<()>,
}

impl Streams {
    /// Makes the FIFOs in `dir`, which is made too.
    ///
    /// `interactive` says whether standard input is forwarded at all.
    pub(crate) fn create(dir: PathBuf, terminal: bool, interactive: bool) -> Result<Streams, Error> {
        if terminal && !isatty(io::stdin()) {
            return Err(Error::NoTerminal);
        }
        DirBuilder::new().mode(0o700).create(&dir).map_err(Error::file("create", &dir))?;
        let streams = Streams { dir, terminal, interactive };
        for name in [streams.stdin(), streams.stdout(), streams.stderr()] {
            if !name.is_empty() {
                rustix::fs::mknodat(CWD, &name, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
                    .map_err(|errno| Error::file("create", &name)(errno.into()))?;
            }
        }
        Ok(streams)
    }

    pub(crate) fn stdin(&self) -> String {
        if self.interactive { self.name("stdin") } else { String::new() }
    }

    pub(crate) fn stdout(&self) -> String {
        self.name("stdout")
    }

    /// A terminal has one output.
    pub(crate) fn stderr(&self) -> String {
        if self.terminal { String::new() } else { self.name("stderr") }
    }

    fn name(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    /// Starts copying. The shim opens its ends during Create or Exec.
    pub(crate) fn copy(&self) -> Result<Copying, Error> {
        let mut outputs = vec![copy_out(&self.stdout(), io::stdout())?];
        if !self.terminal {
            outputs.push(copy_out(&self.stderr(), io::stderr())?);
        }
        let (ended, input_ended) = oneshot::channel();
        if self.interactive {
            let path = self.stdin();
            std::thread::spawn(move || {
                if let Ok(fifo) = OpenOptions::new().write(true).open(path) {
                    pump(io::stdin().lock(), fifo);
                }
                // Nobody waits for it any more once the command has ended.
                let _ = ended.send(());
            });
        }
        Ok(Copying { outputs, input_ended })
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.dir));
    }
}

impl Copying {
    /// Waits until all output has been written, which after the command's end is soon.
    pub(crate) async fn finish(self) {
        let joined =
            tokio::task::spawn_blocking(move || self.outputs.into_iter().for_each(|output| drop(output.join())));
        // A stream that stays open longer than that has lost its shim.
        drop(tokio::time::timeout(LAST_OUTPUT, joined).await);
    }
}

/// Copies what comes out of a FIFO, from its first writer's arrival to its last one's end.
fn copy_out(path: &str, output: impl Write + Send + 'static) -> Result<JoinHandle<()>, Error> {
    // Opened before the shim knows of it, so that even a command that ends at once finds a reader; hence without waiting
    // for a writer.
    let fifo = open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| Error::file("open", path)(errno.into()))?;
    Ok(std::thread::spawn(move || {
        // A FIFO that never had a writer reads as ended, but polls as quiet.
        while matches!(poll(&mut [PollFd::new(&fifo, PollFlags::IN)], None), Err(rustix::io::Errno::INTR)) {}
        if fcntl_setfl(&fifo, OFlags::empty()).is_ok() {
            pump(File::from(fifo), output);
        }
    }))
}

/// Copies until either side is done; each piece is passed on at once, as a person at a terminal expects.
fn pump(mut from: impl Read, mut to: impl Write) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => {
                if to.write_all(&buffer[..count]).and_then(|()| to.flush()).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// The caller's terminal in raw mode: keys go through as they are, Ctrl-C among them. Put back when dropped.
#[derive(Debug)]
pub(crate) struct RawTerminal(Termios);

impl RawTerminal {
    pub(crate) fn enter() -> Result<RawTerminal, Error> {
        let error = |errno: rustix::io::Errno| Error::Own("set up the terminal", errno.into());
        let before = tcgetattr(io::stdin()).map_err(error)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw).map_err(error)?;
        Ok(RawTerminal(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// The terminal's size: columns, rows.
pub(crate) fn terminal_size() -> Option<(u16, u16)> {
    tcgetwinsize(io::stdin()).ok().map(|size| (size.ws_col, size.ws_row))
}

/// A directory name for the streams of an added process.
pub(crate) fn exec_dir(sandbox: &str, exec: &str) -> PathBuf {
    server::dir(sandbox).join(format!("exec-{exec}"))
}
