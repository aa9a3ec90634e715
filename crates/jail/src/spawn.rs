//! The caller's side: starts the fresh process, holds it until the journal knows it, releases it.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv,
    send, sendmsg, socketpair,
};
use serde::{Deserialize, Serialize};

use crate::process::readable_within;
use crate::{Error, Jail, Process, Program};

/// How long the helper may take for each half of its way. Measured in milliseconds; a loaded machine gets its chance.
const DEADLINE: Duration = Duration::from_secs(30);

/// The most descriptors that one message may carry (`SCM_MAX_FD`).
const MAX_FDS: usize = 253;

/// What the caller tells the helper: with it, in the same message, go the descriptors.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) jail: Jail,
    /// The numbers that the descriptors shall have, in the order in which they come.
    pub(crate) fds: Vec<RawFd>,
}

/// What the helper tells the caller.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Report {
    /// The final process exists and waits; its pid in the caller's pid namespace.
    Held { pid: u32 },
    /// A step failed; the process is about to exit.
    Failed { step: String, cure: String, errno: i32 },
}

/// The longest message either way. A description of a machine is a few KiB.
pub(crate) const MAX_MESSAGE: usize = 128 * 1024;

/// A helper that was spawned and waits for its release. Dropped unreleased, it is killed and reaped.
#[derive(Debug)]
pub struct Held {
    process: Option<Process>,
    control: OwnedFd,
}

impl Jail {
    /// Starts the helper and returns once its final process waits for the release.
    ///
    /// `fds` are the descriptors it gets, each with the number it has there (0, 1 and 2 are `/dev/null` unless given).
    /// Takes some milliseconds, and holds up the calling thread: see the module about which thread that must be.
    ///
    /// # Errors
    /// The executable can't be started, or a step inside fails.
    pub fn spawn(&self, fds: Vec<(RawFd, OwnedFd)>) -> Result<Held, Error> {
        self.spawn_from(Path::new("/proc/self/exe"), fds)
    }

    /// As [`Jail::spawn`], with another executable in the place of our own: one whose `main` calls [`crate::main`]
    /// for the first argument `__jail`.
    ///
    /// # Errors
    /// As [`Jail::spawn`].
    pub fn spawn_from(&self, executable: &Path, fds: Vec<(RawFd, OwnedFd)>) -> Result<Held, Error> {
        let talk = |err: io::Error| Error::Talk("describe the jail to", err);
        if fds.len() > MAX_FDS {
            return Err(talk(io::Error::new(io::ErrorKind::InvalidInput, "more than 253 descriptors")));
        }
        let (control, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|err| talk(err.into()))?;
        let mut command = Command::new(executable);
        command.arg0("kata").env_clear().stdin(Stdio::from(theirs));
        match &self.program {
            Program::Exec { .. } => command.arg("__jail"),
            Program::Helper { verb, args } => command.arg(verb).args(args),
        };
        let mut first = command.spawn().map_err(|err| Error::Spawn(executable.to_path_buf(), err))?;
        // It still has the helper's end of the socket, which would never read as closed.
        drop(command);
        let held = self.hold(control, fds);
        // With a pid namespace of its own the first process ends once the final one exists; without, it is the final
        // one and belongs to `Held`. After an error it is either gone already or about to read a closed socket.
        let is_final = held.as_ref().is_ok_and(|held| held.pid() == first.id());
        if !is_final {
            if held.is_err() {
                let _ = first.kill();
            }
            let _ = first.wait();
        }
        held
    }

    fn hold(&self, control: OwnedFd, fds: Vec<(RawFd, OwnedFd)>) -> Result<Held, Error> {
        let talk = |err: io::Error| Error::Talk("describe the jail to", err);
        let order = Order { jail: self.clone(), fds: fds.iter().map(|(number, _)| *number).collect() };
        let order = serde_json::to_vec(&order).map_err(|err| talk(err.into()))?;
        if order.len() > MAX_MESSAGE {
            return Err(talk(io::Error::new(io::ErrorKind::InvalidInput, "description is too long")));
        }
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(|(_, fd)| fd.as_fd()).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        if !borrowed.is_empty() && !rights.push(SendAncillaryMessage::ScmRights(&borrowed)) {
            return Err(talk(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors")));
        }
        sendmsg(&control, &[IoSlice::new(&order)], &mut rights, SendFlags::NOSIGNAL).map_err(|err| talk(err.into()))?;
        drop(fds);
        match receive(&control, "ready to be recorded")? {
            Some(Report::Held { pid }) => {
                let process = Process::of_child(pid).map_err(|err| Error::Talk("find", err))?;
                Ok(Held { process: Some(process), control })
            }
            Some(Report::Failed { step, cure, errno }) => Err(failed(step, cure, errno)),
            None => Err(Error::Gone("ready to be recorded")),
        }
    }
}

impl Held {
    /// The final process's pid in the caller's pid namespace.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.as_ref().map_or(0, Process::pid)
    }

    /// Its start time: field 22 of `/proc/<pid>/stat`.
    #[must_use]
    pub fn start_time(&self) -> u64 {
        self.process.as_ref().map_or(0, Process::start_time)
    }

    /// Lets the helper go on and returns once its program runs, or its own code goes on confined.
    ///
    /// # Errors
    /// The step that failed; the process is gone and reaped then.
    pub fn release(mut self) -> Result<Process, Error> {
        // If the helper died meanwhile, the answer below says so.
        let _ = send(&self.control, b"r", SendFlags::NOSIGNAL);
        match receive(&self.control, "confined")? {
            // Closed without a complaint: exec succeeded, or the helper went on.
            None => self.process.take().ok_or(Error::Gone("confined")),
            Some(Report::Failed { step, cure, errno }) => Err(failed(step, cure, errno)),
            Some(Report::Held { .. }) => Err(Error::Gone("confined")),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            let _ = process.kill();
            let _ = process.try_wait();
        }
    }
}

fn failed(step: String, cure: String, errno: i32) -> Error {
    Error::Step { step, cure, source: io::Error::from_raw_os_error(errno) }
}

/// The next report; `None` when the helper closed its end.
fn receive(control: &OwnedFd, what: &'static str) -> Result<Option<Report>, Error> {
    let talk = |err: io::Error| Error::Talk("listen to", err);
    if !readable_within(control.as_fd(), DEADLINE).map_err(talk)? {
        return Err(Error::Timeout { what, after: DEADLINE });
    }
    let mut buffer = vec![0_u8; MAX_MESSAGE];
    let (length, _) = match recv(control, &mut buffer, RecvFlags::empty()) {
        Ok(got) => got,
        Err(rustix::io::Errno::CONNRESET) => return Ok(None),
        Err(err) => return Err(talk(err.into())),
    };
    if length == 0 {
        return Ok(None);
    }
    serde_json::from_slice(&buffer[..length]).map(Some).map_err(|err| talk(err.into()))
}
