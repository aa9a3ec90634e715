//! The kernel's word that it killed a process of a group for want of memory.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::inotify;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::stats::parse_pairs;
use super::{Cgroup, Error, Version};

/// A watch on one group, which ends with it.
#[derive(Debug)]
pub struct OomWatch {
    /// Readable when there is something to look at.
    wake: AsyncFd<OwnedFd>,
    count: Count,
    /// The directory that is gone when the group is.
    dir: PathBuf,
}

/// How kills are counted.
#[derive(Debug)]
enum Count {
    /// Version 1: `wake` is an event descriptor that the kernel adds to, and once more when the group goes.
    Added(u64),
    /// Version 2: `memory.events` counts, and has counted this many. `wake` watches it, and the directory above for the
    /// group's removal, which an open file of the group is not told of.
    Seen(u64),
}

/// Watches a group. Only inside a tokio runtime.
pub(super) fn watch(group: &Cgroup) -> Result<OomWatch, Error> {
    let dir = group
        .dir("memory")
        .ok_or_else(|| Error::Unsupported("memory (the guest's kernel lacks it)".to_owned(), group.version().number()))?
        .to_owned();
    let error = |source| Error::Group { what: "watch", path: dir.clone(), source };
    let (fd, count) = match group.version() {
        Version::V1 => {
            let control = File::open(dir.join("memory.oom_control")).map_err(error)?;
            let event =
                eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|errno| error(errno.into()))?;
            let line = format!("{} {}", event.as_raw_fd(), control.as_raw_fd());
            fs::write(dir.join("cgroup.event_control"), line).map_err(error)?;
            (event, Count::Added(0))
        }
        Version::V2 => {
            let watch = || -> io::Result<OwnedFd> {
                let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
                inotify::add_watch(&fd, dir.join("memory.events"), inotify::WatchFlags::MODIFY)?;
                if let Some(parent) = dir.parent() {
                    inotify::add_watch(&fd, parent, inotify::WatchFlags::DELETE | inotify::WatchFlags::ONLYDIR)?;
                }
                Ok(fd)
            };
            (watch().map_err(error)?, Count::Seen(0))
        }
    };
    Ok(OomWatch { wake: crate::sys::wait_for(fd, Interest::READABLE).map_err(error)?, count, dir })
}

impl OomWatch {
    /// Waits for the next kills and returns how many; nothing when the group is gone.
    pub async fn next(&mut self) -> Option<u64> {
        loop {
            let new = match &mut self.count {
                Count::Added(added) => std::mem::take(added),
                Count::Seen(seen) => {
                    let events = fs::read_to_string(self.dir.join("memory.events")).ok()?;
                    let kills = parse_pairs(&events).get("oom_kill").copied().unwrap_or(0);
                    kills.saturating_sub(std::mem::replace(seen, kills))
                }
            };
            if !self.dir.exists() {
                return None;
            }
            if new > 0 {
                return Some(new);
            }
            let mut buffer = [0; 4096];
            let mut ready = self.wake.readable().await.ok()?;
            match ready.try_io(|fd| Ok(rustix::io::read(fd, &mut buffer)?)) {
                Ok(Ok(_)) => {
                    if let (Count::Added(added), Some(count)) = (&mut self.count, buffer.first_chunk()) {
                        *added = u64::from_ne_bytes(*count);
                    }
                }
                Ok(Err(_)) => return None,
                // Somebody else's wake-up: nothing was there.
                Err(_) => {}
            }
        }
    }
}
