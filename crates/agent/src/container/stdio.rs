//! The standard streams of a process: three pipes, or a terminal whose master side the child hands over.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::pipe::PipeFlags;

use super::error::Error;

/// The agent's ends of a process' streams.
#[derive(Debug, Default)]
pub struct ProcessIo {
    /// To write to; none with a terminal.
    pub stdin: Option<OwnedFd>,
    /// To read from; none with a terminal.
    pub stdout: Option<OwnedFd>,
    /// To read from; none with a terminal.
    pub stderr: Option<OwnedFd>,
    /// The master side of the terminal, if there is one.
    pub terminal: Option<OwnedFd>,
}

/// The process' ends of its pipes.
#[derive(Debug)]
pub(super) struct Ends([OwnedFd; 3]);

impl Ends {
    /// Their numbers, for the plan.
    pub(super) fn numbers(&self) -> [RawFd; 3] {
        [self.0[0].as_raw_fd(), self.0[1].as_raw_fd(), self.0[2].as_raw_fd()]
    }
}

/// Makes the pipes, owned by the process' user so that it can open `/dev/stdout` again.
///
/// `capacity` is in bytes; the kernel's own when absent.
///
/// # Errors
///
/// Those of pipe2(2), fchown(2), and `F_SETPIPE_SZ`.
pub(super) fn pipes(uid: u32, gid: u32, capacity: Option<usize>) -> Result<(Ends, ProcessIo), Error> {
    let pipe = |name: &str| {
        let (read, write) =
            rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(Error::agent(format!("make a pipe for {name}")))?;
        if let Some(capacity) = capacity {
            rustix::pipe::fcntl_setpipe_size(&write, capacity)
                .map_err(Error::agent(format!("make the pipe for {name} {capacity} bytes large")))?;
        }
        rustix::fs::fchown(read.as_fd(), Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .map_err(Error::agent(format!("give the pipe for {name} to user {uid}")))?;
        Ok((read, write))
    };
    let (stdin, to_stdin) = pipe("stdin")?;
    let (from_stdout, stdout) = pipe("stdout")?;
    let (from_stderr, stderr) = pipe("stderr")?;
    let io = ProcessIo { stdin: Some(to_stdin), stdout: Some(from_stdout), stderr: Some(from_stderr), terminal: None };
    Ok((Ends([stdin, stdout, stderr]), io))
}

/// The agent's /dev/null, thrice: what a process with a terminal has until it has the terminal.
///
/// # Errors
///
/// Those of open(2).
pub(super) fn nothing() -> Result<Ends, Error> {
    let open = || {
        rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(Error::agent("open /dev/null"))
    };
    Ok(Ends([open()?, open()?, open()?]))
}
