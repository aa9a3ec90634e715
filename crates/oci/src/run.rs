//! `kata run`: a container from nothing to its exit status.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::Error;
use crate::bundle::{self, Bundle};
use crate::server::{self, Server};
use crate::stdio::{self, Copying, RawTerminal, Streams};
use crate::task::{self, Task};

/// The longest name: it becomes part of paths, and of a host name, which has 64 bytes.
const LONGEST_NAME: usize = 64;

/// How long a killed container, or its shim, may take to end.
pub(crate) const END: Duration = Duration::from_secs(10);

/// This many requests to end (SIGINT or SIGTERM) become SIGKILL.
const INSISTENCE: u32 = 3;

/// What `kata run` is asked for.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// The container's name; made up when absent.
    pub name: Option<String>,
    /// Remove the container when its command has ended.
    pub remove: bool,
    /// Give it a terminal.
    pub terminal: bool,
    /// Forward standard input.
    pub interactive: bool,
    /// Its root file system; a tiny built-in one when absent.
    pub rootfs: Option<PathBuf>,
    /// Where the busybox of the built-in root file system is installed.
    pub busybox: PathBuf,
    /// `KEY=value` additions to the environment.
    pub env: Vec<String>,
    /// The working directory.
    pub workdir: String,
    /// Processors, in whole or in part.
    pub cpus: Option<f64>,
    /// Memory of the container, in bytes.
    pub memory: Option<u64>,
    /// The command with its arguments.
    pub command: Vec<String>,
}

/// Runs a container and returns its command's exit status, 128 plus the signal that ended it included.
///
/// # Errors
///
/// What kept the command from running, or the shim's end under it. Nothing of the container is left then.
pub async fn run(options: &RunOptions) -> Result<u32, Error> {
    let name = match &options.name {
        Some(name) => name.clone(),
        None => made_up_name()?,
    };
    check_name(&name)?;
    if sandbox::list().iter().any(|sandbox| sandbox.id == name) {
        return Err(Error::Taken(name));
    }
    let bundle = Bundle::create(&name)?;
    bundle.write(&name, options)?;
    let streams = Streams::create(bundle.path().join("streams"), options.terminal, options.interactive)?;
    let address = task::start_shim(&name, bundle.path())?;
    let result = match Task::connect(&address, &name).await {
        Ok(task) => {
            let result = run_in(&task, &bundle, &streams).await;
            if options.remove || result.is_err() {
                remove(&task, &name).await;
            }
            result
        }
        Err(error) => Err(error),
    };
    if !options.remove && result.is_ok() {
        bundle.keep();
        return result;
    }
    // What a shim that died, or never served, left behind; after one that ended properly there is nothing to do.
    if server::dir(&name).exists() {
        let cleaned = task::delete_shim(&name, bundle.path());
        return result.and_then(|status| cleaned.map(|()| status));
    }
    result
}

/// Ends a container, its sandbox and its shim, as far as they are there. Errors don't matter: what is left after this is
/// found and removed without the shim.
async fn remove(task: &Task, name: &str) {
    let server = Server::find(name);
    drop(task.kill("", sigkill(), true).await);
    if ended(task, END).await {
        drop(task.delete("").await);
    }
    task.shutdown(true).await;
    if let Some(server) = server {
        server.wait(END);
    }
}

async fn run_in(task: &Task, bundle: &Bundle, streams: &Streams) -> Result<u32, Error> {
    let mut signals = Signals::listen()?;
    let copying = streams.copy()?;
    let create = task.create(bundle.path(), streams);
    tokio::pin!(create);
    loop {
        tokio::select! {
            created = &mut create => break created?,
            // There is no command yet to pass it to: whoever wants an end gets it.
            received = signals.next() => match received {
                Received::Forward(number) => return Err(Error::Interrupted(number)),
                Received::Resized => {}
            },
        }
    }
    attended(task, "", streams, copying, signals).await
}

/// Starts a created process and stays with it to its end: signals and terminal sizes go in, output comes out.
pub(crate) async fn attended(
    task: &Task,
    exec: &str,
    streams: &Streams,
    copying: Copying,
    mut signals: Signals,
) -> Result<u32, Error> {
    let raw = if streams.terminal { Some(RawTerminal::enter()?) } else { None };
    task.start(exec).await?;
    resize(task, exec, streams).await;

    let mut copying = copying;
    let mut input_open = true;
    let mut asked = 0;
    let wait = task.wait(exec);
    tokio::pin!(wait);
    let status = loop {
        tokio::select! {
            status = &mut wait => break status,
            _ = &mut copying.input_ended, if input_open => {
                input_open = false;
                // The command may have ended meanwhile.
                drop(task.close_stdin(exec).await);
            }
            received = signals.next() => match received {
                Received::Resized => resize(task, exec, streams).await,
                Received::Forward(number) => {
                    // The first process of a PID namespace doesn't get signals that it has no handler for, so a plain
                    // command never sees them; whoever insists means an end.
                    asked += u32::from(ends(number));
                    let number = if ends(number) && asked >= INSISTENCE { sigkill() } else { number };
                    // One that comes too late is no error.
                    drop(task.kill(exec, number, false).await);
                }
            },
        }
    };
    copying.finish().await;
    drop(raw);
    status
}

async fn resize(task: &Task, exec: &str, streams: &Streams) {
    if streams.terminal
        && let Some((columns, rows)) = stdio::terminal_size()
    {
        // The command may have ended meanwhile.
        drop(task.resize(exec, columns, rows).await);
    }
}

enum Received {
    Resized,
    Forward(u32),
}

/// The signals that a command gets instead of us.
pub(crate) struct Signals {
    resized: Signal,
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    quit: Signal,
    user1: Signal,
    user2: Signal,
}

impl Signals {
    pub(crate) fn listen() -> Result<Signals, Error> {
        let listen = |kind| signal(kind).map_err(|error| Error::Own("listen for signals", error));
        Ok(Signals {
            resized: listen(SignalKind::window_change())?,
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
            quit: listen(SignalKind::quit())?,
            user1: listen(SignalKind::user_defined1())?,
            user2: listen(SignalKind::user_defined2())?,
        })
    }

    async fn next(&mut self) -> Received {
        let number = |kind: SignalKind| Received::Forward(kind.as_raw_value().unsigned_abs());
        tokio::select! {
            _ = self.resized.recv() => Received::Resized,
            _ = self.interrupt.recv() => number(SignalKind::interrupt()),
            _ = self.terminate.recv() => number(SignalKind::terminate()),
            _ = self.hangup.recv() => number(SignalKind::hangup()),
            _ = self.quit.recv() => number(SignalKind::quit()),
            _ = self.user1.recv() => number(SignalKind::user_defined1()),
            _ = self.user2.recv() => number(SignalKind::user_defined2()),
        }
    }
}

/// Whether a signal asks its receiver to end.
fn ends(number: u32) -> bool {
    let is = |kind: SignalKind| kind.as_raw_value().unsigned_abs() == number;
    is(SignalKind::interrupt()) || is(SignalKind::terminate())
}

/// SIGKILL's number.
pub(crate) fn sigkill() -> u32 {
    rustix::process::Signal::KILL.as_raw().unsigned_abs()
}

/// Whether `name` can be a container's: the rule that containerd and podman share.
pub(crate) fn check_name(name: &str) -> Result<(), Error> {
    let good = name.len() <= LONGEST_NAME
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.chars().all(|char| char.is_ascii_alphanumeric() || "_.-".contains(char));
    if good { Ok(()) } else { Err(Error::Name(name.to_owned())) }
}

fn made_up_name() -> Result<String, Error> {
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| Error::Own("make up a name", errno.into()))?;
    Ok(format!("kata-{:08x}", u32::from_ne_bytes(bytes)))
}

/// Waits until a container that was told to end has ended, so that it can be deleted.
pub(crate) async fn ended(task: &Task, limit: Duration) -> bool {
    matches!(tokio::time::timeout(limit, task.wait("")).await, Ok(Ok(_)))
}

/// Removes what is left of a container when its shim has gone.
pub(crate) fn clean_up(sandbox: &str, bundle: &Path) -> Result<(), Error> {
    task::delete_shim(sandbox, bundle)?;
    bundle::remove(sandbox)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_names_and_never_paths() {
        for good in ["a", "web-1", "A_b.c", &"x".repeat(64)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "-a", "a/b", "../../etc", "a b", "ä", &"x".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn made_up_names_are_good_ones() {
        check_name(&made_up_name().unwrap()).unwrap();
    }
}
