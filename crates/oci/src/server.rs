//! The shim's server process, known by pid and start time, so that another process with its number is never taken for it.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// The sandbox's directory, where its server notes its address and its process.
pub(crate) fn dir(sandbox: &str) -> PathBuf {
    Path::new("/run/kata").join(sandbox)
}

/// A server that was there when it was looked for.
#[derive(Debug)]
pub(crate) struct Server(OwnedFd);

impl Server {
    /// Finds the server of a sandbox, if it lives.
    pub(crate) fn find(sandbox: &str) -> Option<Server> {
        let text = std::fs::read_to_string(dir(sandbox).join("shim.process")).ok()?;
        let (pid, start_time) = text.trim().split_once(' ')?;
        let pid: u32 = pid.parse().ok()?;
        let fd = pidfd_open(Pid::from_raw(i32::try_from(pid).ok()?)?, PidfdFlags::empty()).ok()?;
        // Compared once the descriptor holds the process: from here on its number can't become another's.
        (jail::start_time_of(pid).ok()? == start_time.parse::<u64>().ok()?).then_some(Server(fd))
    }

    /// Waits until it has ended; false when it hasn't within the limit.
    pub(crate) fn wait(&self, limit: Duration) -> bool {
        let limit = Timespec::try_from(limit).ok();
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        matches!(rustix::event::poll(&mut fds, limit.as_ref()), Ok(1..))
    }
}
