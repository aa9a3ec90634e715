//! A process of a container as the host sees it: three streams, a signal, an exit status.

pub mod children;
pub mod stream;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use children::{Children, Exit};
use rustix::termios::Winsize;
use stream::{Input, Output};

/// What a started process left in the agent's hands.
#[derive(Debug)]
pub struct Started {
    /// Its number in the agent's PID namespace.
    pub pid: i32,
    /// Refers to exactly this process, also after its number was used again.
    pub pidfd: OwnedFd,
    /// The master side, for a process with a terminal; the three below are not there then.
    pub terminal: Option<OwnedFd>,
    /// The end to write to.
    pub stdin: Option<OwnedFd>,
    /// The end to read from.
    pub stdout: Option<OwnedFd>,
    /// The end to read from.
    pub stderr: Option<OwnedFd>,
}

/// A process of a container.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    pidfd: OwnedFd,
    exit: Exit,
    terminal: bool,
    stdin: Input,
    stdout: Mutex<Option<Arc<Output>>>,
    stderr: Mutex<Option<Arc<Output>>>,
    waited: AtomicBool,
}

impl Process {
    /// Takes charge of a process that was just started. Call it while [`Children::starting`] is held.
    ///
    /// # Errors
    ///
    /// When a descriptor cannot be waited for.
    pub fn new(children: &Arc<Children>, started: Started) -> io::Result<Self> {
        let output = |fd: Option<OwnedFd>| -> io::Result<Mutex<Option<Arc<Output>>>> {
            Ok(Mutex::new(fd.map(Output::new).transpose()?.map(Arc::new)))
        };
        let exit = children.watch(started.pid, started.pidfd.try_clone()?)?;
        let terminal = started.terminal.is_some();
        let (stdin, stdout) = match started.terminal {
            Some(master) => (Some(master.try_clone()?), Some(master)),
            None => (started.stdin, started.stdout),
        };
        Ok(Self {
            pid: started.pid,
            pidfd: started.pidfd,
            exit,
            terminal,
            stdin: Input::new(stdin)?,
            stdout: output(stdout)?,
            stderr: output(started.stderr)?,
            waited: AtomicBool::new(false),
        })
    }

    /// Its number in the agent's PID namespace.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends a signal. A process that has ended takes any signal silently.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a number that is no signal.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        match crate::sys::send_signal(self.pidfd.as_fd(), signal) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            result => result,
        }
    }

    /// Waits for the end and returns the exit status.
    pub async fn wait(&self) -> i32 {
        let status = self.exit.wait().await;
        self.waited.store(true, Ordering::Release);
        status
    }

    /// The exit status, if the process has ended.
    pub fn exited(&self) -> Option<i32> {
        self.exit.now()
    }

    /// Waits for the end without counting as one who asked for the status.
    pub async fn ended(&self) {
        self.exit.wait().await;
    }

    /// Whether the process is history: ended, and its status was asked for.
    pub fn is_done(&self) -> bool {
        self.exit.now().is_some() && self.waited.load(Ordering::Acquire)
    }

    /// The input.
    pub fn stdin(&self) -> &Input {
        &self.stdin
    }

    /// Closes the input; a terminal has no input that could be closed alone.
    pub async fn close_stdin(&self) {
        if !self.terminal {
            self.stdin.close().await;
        }
    }

    /// Reads from the output; `None` at the end, and when there is no such stream.
    ///
    /// # Errors
    ///
    /// Those of read(2).
    pub async fn read_stdout(&self, length: usize) -> io::Result<Option<Vec<u8>>> {
        read(&self.stdout, length).await
    }

    /// Reads from the error output; `None` at the end, and when there is no such stream.
    ///
    /// # Errors
    ///
    /// Those of read(2).
    pub async fn read_stderr(&self, length: usize) -> io::Result<Option<Vec<u8>>> {
        read(&self.stderr, length).await
    }

    /// Tells the terminal its size.
    ///
    /// # Errors
    ///
    /// `ENOTTY` without a terminal, or after its end was read.
    pub fn resize(&self, rows: u16, columns: u16) -> io::Result<()> {
        let output = self.stdout.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let output = output.filter(|_| self.terminal).ok_or_else(|| io::Error::from(rustix::io::Errno::NOTTY))?;
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(rustix::termios::tcsetwinsize(output.as_terminal(), size)?)
    }
}

/// Reads from a stream, and lets go of its descriptor at its end.
async fn read(stream: &Mutex<Option<Arc<Output>>>, length: usize) -> io::Result<Option<Vec<u8>>> {
    let Some(output) = stream.lock().unwrap_or_else(PoisonError::into_inner).clone() else { return Ok(None) };
    let data = output.read(length).await?;
    if data.is_none() {
        stream.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
    Ok(data)
}
