//! Collects ended children: those of containers through their pidfds, everybody else's orphans here.
//!
//! ```text
//!   SIGCHLD ─▶ look at an ended child without collecting it (WNOWAIT)
//!               ├─ somebody is starting processes ─▶ look again when that is done
//!               ├─ watched ─▶ leave it; its watcher collects it and pokes
//!               └─ orphan  ─▶ collect it, look for the next
//! ```

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::{Pid, WaitId, WaitIdOptions, WaitIdStatus};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, watch};

/// The status reported when the kernel does not tell one: somebody else has collected the child.
const STATUS_UNKNOWN: i32 = 255;

/// The children of this process.
#[derive(Debug, Default)]
pub struct Children {
    state: Mutex<State>,
    poke: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// How many callers are between making a child and having it watched (or collected by themselves).
    starting: usize,
    watched: HashSet<i32>,
}

/// While it lives no child is collected behind the holder's back.
#[derive(Debug)]
pub struct Starting {
    children: Arc<Children>,
}

impl Drop for Starting {
    fn drop(&mut self) {
        self.children.lock().starting -= 1;
        self.children.poke.notify_one();
    }
}

/// Tells the exit status of one process, to any number of waiters, for as long as it is kept.
#[derive(Debug, Clone)]
pub struct Exit(watch::Receiver<Option<i32>>);

impl Exit {
    /// The status, once there is one: the exit code, or 128 and the signal's number.
    pub async fn wait(&self) -> i32 {
        let mut receiver = self.0.clone();
        match receiver.wait_for(Option::is_some).await {
            Ok(status) => status.unwrap_or(STATUS_UNKNOWN),
            Err(_watcher_gone) => STATUS_UNKNOWN,
        }
    }

    /// The status, if the process has ended.
    pub fn now(&self) -> Option<i32> {
        *self.0.borrow()
    }
}

impl Children {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be held while children are made, until they are watched or collected.
    pub fn starting(self: &Arc<Self>) -> Starting {
        self.lock().starting += 1;
        Starting { children: self.clone() }
    }

    /// Watches a child: collects it when it ends. Call it while [`Children::starting`] is held.
    ///
    /// # Errors
    ///
    /// When the pidfd cannot be waited for.
    pub fn watch(self: &Arc<Self>, pid: i32, pidfd: OwnedFd) -> io::Result<Exit> {
        let pidfd = crate::sys::wait_for(pidfd, Interest::READABLE)?;
        self.lock().watched.insert(pid);
        let (sender, receiver) = watch::channel(None);
        let children = self.clone();
        tokio::spawn(async move {
            let status = collect(&pidfd).await;
            children.lock().watched.remove(&pid);
            children.poke.notify_one();
            sender.send_replace(Some(status));
        });
        Ok(Exit(receiver))
    }

    /// Collects orphans for as long as the agent lives.
    ///
    /// # Errors
    ///
    /// When SIGCHLD cannot be listened to.
    pub fn collect_orphans(self: &Arc<Self>) -> io::Result<()> {
        let mut ended = signal(SignalKind::child())?;
        let children = self.clone();
        tokio::spawn(async move {
            loop {
                children.collect_ended();
                children.next_change(&mut ended).await;
            }
        });
        Ok(())
    }

    async fn next_change(&self, ended: &mut Signal) {
        tokio::select! {
            _ = ended.recv() => {}
            () = self.poke.notified() => {}
        }
    }

    fn collect_ended(&self) {
        loop {
            let state = self.lock();
            if state.starting > 0 {
                return;
            }
            match crate::sys::peek_ended_child() {
                Ok(Some(pid)) if !state.watched.contains(&pid) => {
                    let Some(pid) = Pid::from_raw(pid) else { return };
                    let _ = rustix::process::waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
                }
                // None ended, none at all, or one that its watcher collects and pokes for.
                Ok(_) | Err(_) => return,
            }
        }
    }
}

async fn collect(pidfd: &AsyncFd<OwnedFd>) -> i32 {
    loop {
        let Ok(mut ready) = pidfd.readable().await else { return STATUS_UNKNOWN };
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match rustix::process::waitid(WaitId::PidFd(pidfd.get_ref().as_fd()), options) {
            Ok(Some(status)) => return exit_code(status),
            Ok(None) => ready.clear_ready(),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return STATUS_UNKNOWN,
        }
    }
}

fn exit_code(status: WaitIdStatus) -> i32 {
    status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal)).unwrap_or(STATUS_UNKNOWN)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn start(children: &Arc<Children>, script: &str) -> Exit {
        let starting = children.starting();
        #[expect(clippy::zombie_processes, reason = "collecting it is what is tested")]
        let child = Command::new("sh").args(["-c", script]).stdin(Stdio::null()).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let pidfd =
            rustix::process::pidfd_open(Pid::from_raw(pid).unwrap(), rustix::process::PidfdFlags::empty()).unwrap();
        let exit = children.watch(pid, pidfd).unwrap();
        drop(starting);
        exit
    }

    #[tokio::test]
    async fn codes_and_signals_reach_every_waiter() {
        let children = Arc::new(Children::default());
        let coded = start(&children, "exit 7");
        let killed = start(&children, "kill -9 $$");
        let (one, two) = tokio::join!(coded.wait(), coded.wait());
        assert_eq!((one, two), (7, 7));
        assert_eq!(killed.wait().await, 137);
        assert_eq!(killed.now(), Some(137));
    }
}
