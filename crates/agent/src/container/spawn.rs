//! Starts the child and follows it through its gates.
//!
//! ```text
//!   agent thread                              child
//!   join namespaces ─▶ clone3 ───────────────▶ isolate
//!   cgroups, id maps   ◀──────── Cloned ────── wait
//!                      ──────── go ──────────▶ mounts, devices
//!   hooks              ◀──────── Prepared ──── wait            (only with hooks)
//!                      ──────── go ──────────▶ change root, user, capabilities
//!   limits             ◀──────── Ready ─────── wait            (until StartContainer)
//!                      ──────── go ──────────▶ seccomp, execve
//!   end of file: it runs; or at any time: Failed(step, errno), and the child is gone
//! ```

use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Signal, WaitId, WaitIdOptions};
use rustix::thread::ThreadNameSpaceType;

use super::call::{self, Cloned, Pointers};
use super::channel::{self, Gate, Message};
use super::child;
use super::error::Error;
use super::plan::Plan;

/// How long the child may take from gate to gate, and to die after SIGKILL. Mounting a slow share is the longest part.
const PATIENCE: Duration = Duration::from_secs(60);

/// A namespace, or a process, to join before the clone.
#[derive(Debug)]
pub(super) struct Join {
    /// Of a namespace, or a pidfd.
    pub(super) number: RawFd,
    /// `CLONE_NEW*`.
    pub(super) flags: u32,
    /// For the error.
    pub(super) name: &'static str,
}

/// A child on its way, killed when it is dropped before it got there.
#[derive(Debug)]
pub(super) struct Launch {
    pub(super) pid: i32,
    pidfd: Option<OwnedFd>,
    line: Line,
}

/// The line to a child.
#[derive(Debug)]
pub(super) struct Line {
    socket: OwnedFd,
    /// What each step does, for errors.
    steps: Vec<String>,
    terminal: Option<OwnedFd>,
}

/// Clones, and lets the child begin with its plan.
///
/// # Errors
///
/// Those of setns(2) and clone3(2).
pub(super) fn launch(plan: &Plan, flags: u32, cgroup: Option<BorrowedFd<'_>>, joins: &[Join]) -> Result<Launch, Error> {
    let (ours, theirs) = channel::pair().map_err(Error::agent("make a socket pair"))?;
    // A thread of its own: what it joins and blocks is gone with it.
    let cloned = thread::scope(|scope| {
        let work = || clone_from_here(plan, flags, cgroup, joins, theirs.as_fd());
        let thread = thread::Builder::new()
            .name("spawn".to_owned())
            .spawn_scoped(scope, work)
            .map_err(Error::agent_io("start a thread"))?;
        thread.join().unwrap_or(Err(Error::Died))
    })?;
    drop(theirs);
    let steps = (0..plan.steps.len()).map(|step| plan.describe(step)).collect();
    let (pid, pidfd) = cloned;
    Ok(Launch { pid, pidfd: Some(pidfd), line: Line { socket: ours, steps, terminal: None } })
}

fn clone_from_here(
    plan: &Plan,
    flags: u32,
    cgroup: Option<BorrowedFd<'_>>,
    joins: &[Join],
    socket: BorrowedFd<'_>,
) -> Result<(i32, OwnedFd), Error> {
    for join in joins {
        let kinds = ThreadNameSpaceType::from_bits_retain(join.flags);
        rustix::thread::move_into_thread_name_spaces(call::borrow(join.number), kinds)
            .map_err(Error::agent(format!("join the {} namespace", join.name)))?;
    }
    let arguments = Pointers::new(&plan.arguments);
    let environment = Pointers::new(&plan.environment);
    let mask = call::block_signals();
    let cloned = call::clone3(u64::from(flags), cgroup);
    match cloned {
        Ok(Cloned::Child) => child::run(plan, &arguments, &environment, socket),
        Ok(Cloned::Parent { pid, pidfd }) => {
            mask.restore();
            Ok((pid, pidfd))
        }
        Err(errno) => Err(Error::agent("clone a process with its namespaces and cgroup")(errno)),
    }
}

impl Line {
    fn next(&mut self) -> Result<Message, Error> {
        loop {
            match channel::receive(self.socket.as_fd(), Instant::now() + PATIENCE) {
                Ok(Message::Terminal(master)) => self.terminal = Some(master),
                Ok(message) => return Ok(message),
                Err(Errno::TIMEDOUT) => return Err(Error::Late(PATIENCE)),
                Err(errno) => return Err(Error::agent("hear from the process")(errno)),
            }
        }
    }

    fn failed(&self, step: usize, errno: Errno, note: String) -> Error {
        let what = self.steps.get(step).cloned().unwrap_or_else(|| "prepare the process".to_owned());
        Error::Step { what, note, source: errno.into() }
    }

    /// Waits until the child is at the gate.
    pub(super) fn wait_for(&mut self, gate: Gate) -> Result<(), Error> {
        match self.next()? {
            Message::At(number) if number == gate as u8 => Ok(()),
            Message::Failed { step, errno, note } => Err(self.failed(step, errno, note)),
            Message::At(_) | Message::Terminal(_) | Message::End => Err(Error::Died),
        }
    }

    /// Lets the child go on.
    pub(super) fn go(&self) -> Result<(), Error> {
        channel::go(self.socket.as_fd()).map_err(|errno| match errno {
            Errno::PIPE | Errno::CONNRESET => Error::Died,
            errno => Error::agent("let the process go on")(errno),
        })
    }

    /// Lets the child run its program, and waits until it does.
    pub(super) fn execute(mut self) -> Result<(), Error> {
        self.go()?;
        match self.next()? {
            Message::End => Ok(()),
            Message::Failed { step, errno, note } => Err(self.failed(step, errno, note)),
            Message::At(_) | Message::Terminal(_) => Err(Error::Died),
        }
    }

    /// The master side of the terminal, if the child has sent one.
    pub(super) fn take_terminal(&mut self) -> Option<OwnedFd> {
        self.terminal.take()
    }
}

impl Launch {
    /// The line.
    pub(super) fn line(&mut self) -> &mut Line {
        &mut self.line
    }

    /// The child.
    pub(super) fn pidfd(&self) -> Result<BorrowedFd<'_>, Error> {
        self.pidfd.as_ref().map(AsFd::as_fd).ok_or(Error::Died)
    }

    /// Lets the child live: it is the caller's now.
    pub(super) fn keep(mut self) -> Result<(i32, OwnedFd, Line), Error> {
        let pidfd = self.pidfd.take().ok_or(Error::Died)?;
        let (socket, terminal) = (self.line.socket.try_clone(), self.line.terminal.take());
        let socket = socket.map_err(Error::agent_io("duplicate a descriptor"))?;
        let steps = std::mem::take(&mut self.line.steps);
        Ok((self.pid, pidfd, Line { socket, steps, terminal }))
    }
}

impl Drop for Launch {
    fn drop(&mut self) {
        if let Some(pidfd) = self.pidfd.take() {
            kill_and_collect(pidfd.as_fd());
        }
    }
}

/// Kills a child of ours and takes its status, so that nothing of it stays.
pub(super) fn kill_and_collect(pidfd: BorrowedFd<'_>) {
    // It may have ended by itself; then there is only its status to take.
    let _ = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
    if channel::wait_readable(pidfd, Instant::now() + PATIENCE).is_ok() {
        let _ = rustix::process::waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
    }
}
