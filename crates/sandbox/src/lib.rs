//! A pod: its machine, its share, its containers.
//!
//! A [`Sandbox`] is a handle to a driver (see `driver`) that owns everything and takes requests one after another; what
//! only passes through to the agent (streams, waits, signals) goes there directly. Every resource of the host is in the
//! journal before it exists, so that [`cleanup`] can take it back whatever happened to the process that made it.

mod agent;
mod cgroup;
mod driver;
mod error;
mod hooks;
mod journal;
mod launch;
mod record;
mod translate;
mod wire;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::runtime::{LinuxResources, Process, Spec};
use protocol::agent::StatsContainerResponse;
use tokio::sync::{mpsc, oneshot, watch};

use crate::agent::Agent;
use crate::driver::Request;

pub use error::Error;
pub use record::{ContainerState, ContainerSummary, Summary, list};
pub use wire::WireError;

/// The exit status of a command whose machine died under it: as if it had been killed.
pub const KILLED: i32 = 128 + 9;

/// What a new sandbox is made of.
#[derive(Clone, Debug)]
pub struct SandboxSpec {
    /// Its name, unique on the host.
    pub id: String,
    /// What the operator set.
    pub config: config::Config,
    /// The host name of the pod.
    pub hostname: String,
    /// The network namespace that the engine prepared.
    pub netns: Option<PathBuf>,
    /// The pod's containers share a process namespace.
    pub sandbox_pidns: bool,
    /// Processors asked for; the configured default when absent.
    pub vcpus: Option<f64>,
    /// Memory asked for, in MiB; the configured default when absent.
    pub memory_mib: Option<u32>,
    /// The control group the engine wants the pod in, in either of the forms of `linux.cgroupsPath`.
    pub cgroups_path: Option<PathBuf>,
}

/// What a new container is made of.
#[derive(Clone, Debug)]
pub struct ContainerSpec {
    /// Its name, unique in the sandbox.
    pub id: String,
    /// Where its configuration is.
    pub bundle: PathBuf,
    /// Its configuration.
    pub spec: Spec,
    /// What its root file system is mounted from; the configuration's root path is used when empty.
    pub rootfs: Vec<share::RootfsMount>,
}

/// A running pod. Clones are handles to the same one.
#[derive(Clone, Debug)]
pub struct Sandbox {
    requests: mpsc::Sender<Request>,
    agent: Agent,
    vmm: Arc<dyn vmm::Vmm>,
    exited: watch::Receiver<Option<vmm::Exit>>,
}

impl Sandbox {
    /// Starts a pod: journal, share, machine, agent.
    ///
    /// Must be called on the process' main thread, in a mount namespace of its own: the helpers die with that thread.
    ///
    /// # Errors
    ///
    /// Whatever kept it from starting; everything that was made is taken back.
    pub async fn start(spec: SandboxSpec) -> Result<Sandbox, Error> {
        driver::start(spec).await
    }

    /// The VMM's process.
    #[must_use]
    pub fn vmm_pid(&self) -> u32 {
        self.vmm.pid()
    }

    /// Makes a container; its command waits for [`Sandbox::start_container`].
    ///
    /// # Errors
    ///
    /// [`Error::ContainerExists`], or what kept it from being made; nothing of it is left then.
    pub async fn create_container(&self, container: ContainerSpec) -> Result<(), Error> {
        self.ask(|reply| Request::Create(Box::new(container), reply)).await
    }

    /// Starts a container's command.
    ///
    /// # Errors
    ///
    /// [`Error::NoContainer`], [`Error::State`] for one that was started before, or the agent's reason.
    pub async fn start_container(&self, id: &str) -> Result<(), Error> {
        self.ask(|reply| Request::Start(id.to_owned(), reply)).await
    }

    /// Adds a process to a running container and starts it.
    ///
    /// # Errors
    ///
    /// The agent's reason.
    pub async fn exec(&self, id: &str, exec: &str, process: &Process) -> Result<(), Error> {
        let process = translate::process(process)?;
        self.alive(self.agent.exec(id, exec, process)).await
    }

    /// Sends a signal to a process; with `all`, to every process of the container.
    ///
    /// # Errors
    ///
    /// The agent's reason; that the process has ended already, among others.
    pub async fn signal(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<(), Error> {
        // The first process of a container takes the others with it, so only a lesser signal has to reach each.
        let _ = all;
        self.alive(self.agent.signal(id, exec, signal)).await
    }

    /// Waits for a process' end and returns its exit status; [`KILLED`] when the machine died.
    ///
    /// # Errors
    ///
    /// There is no such process.
    pub async fn wait(&self, id: &str, exec: &str) -> Result<i32, Error> {
        let result = match self.alive(self.agent.wait(id, exec)).await {
            Err(Error::Vmm(_) | Error::AgentLost(_)) => Ok(KILLED),
            other => other,
        };
        if exec.is_empty() && result.is_ok() {
            // The driver may be gone already, and then nobody asks for the state any more.
            drop(self.requests.send(Request::Ended(id.to_owned())).await);
        }
        result
    }

    /// Writes to a process' standard input and returns how much was taken.
    ///
    /// # Errors
    ///
    /// It has closed its standard input.
    pub async fn write_stdin(&self, id: &str, exec: &str, data: Vec<u8>) -> Result<u32, Error> {
        self.alive(self.agent.write(id, exec, data)).await
    }

    /// Reads what a process wrote, at most `len` bytes; `None` at the end.
    ///
    /// # Errors
    ///
    /// The machine died.
    pub async fn read_stdout(&self, id: &str, exec: &str, len: u32) -> Result<Option<Vec<u8>>, Error> {
        self.alive(self.agent.read(id, exec, len, false)).await
    }

    /// As [`Sandbox::read_stdout`], for standard error.
    ///
    /// # Errors
    ///
    /// The machine died.
    pub async fn read_stderr(&self, id: &str, exec: &str, len: u32) -> Result<Option<Vec<u8>>, Error> {
        self.alive(self.agent.read(id, exec, len, true)).await
    }

    /// Ends a process' standard input.
    ///
    /// # Errors
    ///
    /// There is no such process.
    pub async fn close_stdin(&self, id: &str, exec: &str) -> Result<(), Error> {
        self.alive(self.agent.close_stdin(id, exec)).await
    }

    /// Tells a process' terminal its size.
    ///
    /// # Errors
    ///
    /// It has no terminal.
    pub async fn resize_tty(&self, id: &str, exec: &str, rows: u32, columns: u32) -> Result<(), Error> {
        self.alive(self.agent.resize(id, exec, rows, columns)).await
    }

    /// What a container uses.
    ///
    /// # Errors
    ///
    /// There is no such container.
    pub async fn stats(&self, id: &str) -> Result<StatsContainerResponse, Error> {
        self.alive(self.agent.stats(id)).await
    }

    /// Holds all processes of a container.
    ///
    /// # Errors
    ///
    /// It does not run.
    pub async fn pause(&self, id: &str) -> Result<(), Error> {
        self.ask(|reply| Request::Pause(id.to_owned(), reply)).await
    }

    /// Lets a paused container go on.
    ///
    /// # Errors
    ///
    /// It is not paused.
    pub async fn resume(&self, id: &str) -> Result<(), Error> {
        self.ask(|reply| Request::Resume(id.to_owned(), reply)).await
    }

    /// Changes a container's resources.
    ///
    /// # Errors
    ///
    /// The agent's reason.
    pub async fn update(&self, id: &str, resources: &LinuxResources) -> Result<(), Error> {
        let resources = translate::resources(resources)?;
        self.alive(self.agent.update(id, resources)).await
    }

    /// Removes a container: what is left of it in the guest, its place in the share, its record.
    ///
    /// # Errors
    ///
    /// There is no such container, or its mounts could not be taken away.
    pub async fn remove_container(&self, id: &str) -> Result<(), Error> {
        self.ask(|reply| Request::Remove(id.to_owned(), reply)).await
    }

    /// The next container that ran out of memory; `None` when the machine has ended.
    pub async fn next_oom(&self) -> Option<String> {
        self.alive(self.agent.next_oom()).await.ok()
    }

    /// Waits for the machine's end, proper or not.
    pub async fn vmm_exited(&self) -> vmm::Exit {
        self.vmm.wait().await
    }

    /// Ends the pod and takes back everything it held.
    ///
    /// # Errors
    ///
    /// What could not be taken back; [`cleanup`] can try again.
    pub async fn stop(&self) -> Result<(), Error> {
        match self.ask(Request::Stop).await {
            // Stopped before: nothing is held any more.
            Err(Error::Stopped) => Ok(()),
            other => other,
        }
    }

    async fn ask(&self, request: impl FnOnce(oneshot::Sender<Result<(), Error>>) -> Request) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(request(reply)).await.map_err(|_| Error::Stopped)?;
        match answer.await.map_err(|_| Error::Stopped)? {
            // The connection breaks some moments before the VMM is known to be gone.
            Err(Error::AgentLost(error)) => Err(driver::cause_of_loss(&mut self.exited.clone(), error).await),
            other => other,
        }
    }

    /// Runs a request to the agent; when the machine ends first, its last words are the answer.
    async fn alive<T>(&self, request: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let mut exited = self.exited.clone();
        let mut losing = self.exited.clone();
        tokio::select! {
            biased;
            result = request => match result {
                // The connection breaks some moments before the VMM is known to be gone.
                Err(Error::AgentLost(error)) => Err(driver::cause_of_loss(&mut losing, error).await),
                other => other,
            },
            exit = driver::exit_of(&mut exited) => Err(Error::Vmm(exit)),
        }
    }
}

/// Takes back everything that a sandbox held, from its journal alone: after a crash.
///
/// # Errors
///
/// What could not be taken back; calling it again goes on from there.
pub fn cleanup(id: &str) -> Result<(), Error> {
    check_id(id)?;
    journal::undo(id)
}

/// Whether a name can be a sandbox's: it becomes part of paths.
fn check_id(id: &str) -> Result<(), Error> {
    let good = id.len() <= 128
        && id.starts_with(|first: char| first.is_ascii_alphanumeric())
        && id.chars().all(|char| char.is_ascii_alphanumeric() || "_.-".contains(char))
        && Path::new(id).components().count() == 1;
    if good { Ok(()) } else { Err(Error::Id(id.to_owned())) }
}
