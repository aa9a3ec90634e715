//! Processes named so that a reused pid is never mistaken for them: pid and start time.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid};

/// How long the kernel may take to end a process that was killed. More than seconds means that it hangs in a driver.
const DEATH_DEADLINE: Duration = Duration::from_secs(10);

/// A running helper: a direct child of the process that spawned it.
///
/// Dropping it leaves the process alone; use [`Process::kill`].
#[derive(Debug)]
pub struct Process {
    pid: u32,
    start_time: u64,
    pidfd: OwnedFd,
}

impl Process {
    /// Takes hold of a child of ours.
    pub(crate) fn of_child(pid: u32) -> io::Result<Process> {
        let pidfd = open(pid)?;
        Ok(Process { pid, start_time: start_time_of(pid)?, pidfd })
    }

    /// The pid in the caller's pid namespace.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Field 22 of `/proc/<pid>/stat`: clock ticks between boot and the process's start.
    #[must_use]
    pub fn start_time(&self) -> u64 {
        self.start_time
    }

    /// Readable once the process has ended.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Takes the exit status if the process has ended: `None` while it runs.
    ///
    /// # Errors
    /// `ECHILD` if someone else has reaped it.
    pub fn try_wait(&self) -> io::Result<Option<ExitStatus>> {
        let status = waitid(WaitId::PidFd(self.pidfd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG)?;
        Ok(status.map(|status| {
            // The raw form that waitpid(2) would have given.
            let raw = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => (code & 0xff) << 8,
                (None, signal) => signal.unwrap_or_default() | if status.dumped() { 0x80 } else { 0 },
            };
            ExitStatus::from_raw(raw)
        }))
    }

    /// Waits for the end, at most `limit`: `None` if it still runs then.
    ///
    /// # Errors
    /// `ECHILD` if someone else has reaped it.
    pub fn wait_for(&self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        if ended_within(self.pidfd(), limit)? { self.try_wait() } else { Ok(None) }
    }

    /// Kills the process and waits until it is gone; its status is left for [`Process::try_wait`].
    ///
    /// # Errors
    /// It didn't die in time.
    pub fn kill(&self) -> io::Result<()> {
        kill_and_wait(self.pidfd())
    }
}

/// The start time of a process, in clock ticks since boot: field 22 of `/proc/<pid>/stat`.
///
/// # Errors
/// There is no such process, or `/proc` isn't what proc(5) says.
pub fn start_time_of(pid: u32) -> io::Result<u64> {
    let stat = fs::read(format!("/proc/{pid}/stat")).map_err(|err| {
        // A process that ends between open and read gives ESRCH: the same thing to the caller.
        if err.raw_os_error() == Some(libc::ESRCH) { io::Error::from(io::ErrorKind::NotFound) } else { err }
    })?;
    parse_start_time(&stat)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat has no start time")))
}

/// The second field is the program's name in parentheses and may hold anything, more parentheses too: the fields are
/// counted from the last closing one.
fn parse_start_time(stat: &[u8]) -> Option<u64> {
    let end_of_name = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(stat.get(end_of_name + 1..)?).ok()?;
    // The rest begins with field 3.
    rest.split_ascii_whitespace().nth(22 - 3)?.parse().ok()
}

/// Kills the process that has this pid and this start time, and waits until it is gone. One that isn't there any
/// more, or another that has the pid now, is success: nothing is left of the one meant.
///
/// # Errors
/// It may not be killed, or didn't die in time.
pub fn kill_exact(pid: u32, start_time: u64) -> io::Result<()> {
    let pidfd = match open(pid) {
        Ok(pidfd) => pidfd,
        Err(err) if err.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
        Err(err) => return Err(err),
    };
    // The descriptor is held first: if the start time matches now, the descriptor is the process meant.
    match start_time_of(pid) {
        Ok(found) if found == start_time => kill_and_wait(pidfd.as_fd()),
        Ok(_) => Ok(()),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(err) => Err(err),
    }
}

fn open(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

fn kill_and_wait(pidfd: BorrowedFd<'_>) -> io::Result<()> {
    match pidfd_send_signal(pidfd, Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => {}
        Err(err) => return Err(err.into()),
    }
    if ended_within(pidfd, DEATH_DEADLINE)? {
        Ok(())
    } else {
        Err(io::Error::new(io::ErrorKind::TimedOut, "the process was killed but doesn't end; it hangs in the kernel"))
    }
}

fn ended_within(pidfd: BorrowedFd<'_>, limit: Duration) -> io::Result<bool> {
    readable_within(pidfd, limit)
}

/// Waits until `fd` has something to read or is closed at the other end.
pub(crate) fn readable_within(fd: BorrowedFd<'_>, limit: Duration) -> io::Result<bool> {
    let end = Instant::now() + limit;
    loop {
        let left = Timespec::try_from(end.saturating_duration_since(Instant::now())).map_err(io::Error::other)?;
        match poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&left)) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(err) => return Err(err.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::process::Command;

    #[test]
    fn a_name_with_parentheses_hides_nothing() {
        let line = b"42 (a) b) (c) S 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 987654 4096 1 18446744073709551615";
        assert_eq!(parse_start_time(line), Some(987_654));
    }

    #[test]
    fn our_own_start_time_is_stable() {
        let me = std::process::id();
        assert_eq!(start_time_of(me).unwrap(), start_time_of(me).unwrap());
    }

    #[test]
    fn only_the_process_meant_is_killed() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let start = start_time_of(child.id()).unwrap();
        kill_exact(child.id(), start + 1).unwrap();
        assert!(child.try_wait().unwrap().is_none(), "another process with the pid must live");
        kill_exact(child.id(), start).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        kill_exact(child.id(), start).unwrap();
    }

    proptest! {
        #[test]
        fn any_stat_line_is_survived(bytes: Vec<u8>) {
            let _ = parse_start_time(&bytes);
        }

        #[test]
        fn any_name_is_skipped(name in "\\PC{0,15}", start: u64) {
            let line = format!("7 ({name}) R 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 {start} 20");
            prop_assert_eq!(parse_start_time(line.as_bytes()), Some(start));
        }
    }
}
