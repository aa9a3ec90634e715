//! The containers: who may do what to which, and in which order.
//!
//! ```text
//!   Creating ──▶ Created ──StartContainer──▶ Started ◀──Pause/Resume──▶ Paused
//!      │            └───────────────┬───────────┴────────────────────────┘
//!      └─ failure ─▶ gone ◀── RemoveContainer
//! ```
//!
//! What changes a container takes its turn: one change after the other. Signals, waits and streams do not: they find
//! the process and go to it directly.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use protocol::agent::{
    CreateContainerRequest, CreateSandboxRequest, ExecProcessRequest, SignalProcessRequest, StatsContainerResponse,
    UpdateContainerRequest,
};
use protocol::oci::Spec;
use tokio::sync::OwnedMutexGuard;
use ttrpc::Code;

use super::core::{Core, Group};
use super::status::{Failure, because, failure, internal};
use super::{Agent, SandboxState, id, lock, user};
use crate::process::Process;
use crate::sandbox::Sandbox;

/// How long a killed container may take to end when the host does not say.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(30);

/// Ended execs that are remembered for late questions, for each container.
const ENDED_EXECS: usize = 64;

/// A container, from the first moment of its creation on.
#[derive(Debug)]
pub(super) struct Entry {
    id: String,
    /// Whoever holds it may change the container.
    turn: Arc<tokio::sync::Mutex<Turn>>,
    /// Set once it is created.
    group: OnceLock<Arc<Group>>,
    /// By exec id; the first process has the empty one.
    processes: Mutex<HashMap<String, Arc<Process>>>,
}

/// What only one at a time may see.
#[derive(Debug, Default)]
struct Turn {
    phase: Phase,
    core: Option<Core>,
    storages: Vec<String>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Phase {
    #[default]
    Creating,
    Created,
    Started,
    Paused,
    Gone,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Creating => "being created",
            Self::Created => "created",
            Self::Started => "started",
            Self::Paused => "paused",
            Self::Gone => "gone",
        }
    }
}

/// Runs what blocks where it may.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.map_err(internal)?
}

fn unknown(id: &str) -> Failure {
    failure(Code::NOT_FOUND, format!("There is no container {id}"))
}

impl Entry {
    /// A container whose creation has begun, with the turn that creates it.
    fn new(id: &str) -> (Arc<Self>, OwnedMutexGuard<Turn>) {
        let turn = Arc::new(tokio::sync::Mutex::new(Turn::default()));
        // Nobody else can have it yet.
        let guard = turn.clone().try_lock_owned().unwrap_or_else(|_| unreachable!("A new lock is free"));
        let entry = Self { id: id.to_owned(), turn, group: OnceLock::new(), processes: Mutex::default() };
        (Arc::new(entry), guard)
    }

    /// Waits for the turn; fails when the container went away meanwhile.
    async fn take_turn(&self) -> Result<OwnedMutexGuard<Turn>, Failure> {
        let turn = self.turn.clone().lock_owned().await;
        if turn.phase == Phase::Gone || turn.phase == Phase::Creating {
            return Err(unknown(&self.id));
        }
        Ok(turn)
    }

    fn process(&self, exec_id: &str) -> Result<Arc<Process>, Failure> {
        // Upstream's runtimes name the first process by the container's id too.
        let key = if exec_id == self.id { "" } else { exec_id };
        lock(&self.processes).get(key).cloned().ok_or_else(|| match key {
            "" => failure(Code::FAILED_PRECONDITION, format!("The container {} is still being created", self.id)),
            _ => failure(Code::NOT_FOUND, format!("The container {} has no process {exec_id}", self.id)),
        })
    }

    /// Fails unless the container is in one of the phases.
    fn expect(&self, turn: &Turn, allowed: &[Phase], what: &str) -> Result<(), Failure> {
        if allowed.contains(&turn.phase) {
            return Ok(());
        }
        let now = turn.phase.name();
        Err(failure(Code::FAILED_PRECONDITION, format!("The container {} is {now}: it cannot be {what}", self.id)))
    }

    fn group(&self) -> Result<&Arc<Group>, Failure> {
        self.group.get().ok_or_else(|| unknown(&self.id))
    }
}

impl Turn {
    fn core(&mut self) -> Result<&mut Core, Failure> {
        self.core.as_mut().ok_or_else(|| failure(Code::INTERNAL, "The container has no body"))
    }
}

/// Refuses what this agent cannot do, by name, before anything is made.
fn check_supported(request: &CreateContainerRequest) -> Result<(), Failure> {
    let refused = |what: String| Err(failure(Code::UNIMPLEMENTED, format!("{what} not implemented")));
    if let Some(device) = request.devices.first() {
        return refused(format!("Devices of the type {} are", device.type_));
    }
    if !request.shared_mounts.is_empty() {
        return refused("Mounts shared between containers are".to_owned());
    }
    if [request.stdin_port, request.stdout_port, request.stderr_port].iter().any(|port| *port != 0) {
        return refused("Streams over ports of their own are".to_owned());
    }
    Ok(())
}

impl Agent {
    fn entry(&self, id: &str) -> Result<Arc<Entry>, Failure> {
        lock(&self.containers).get(id).cloned().ok_or_else(|| unknown(id))
    }

    /// A process by container and exec id.
    pub(super) fn process(&self, id: &str, exec_id: &str) -> Result<Arc<Process>, Failure> {
        self.entry(id)?.process(exec_id)
    }

    pub(super) async fn create_sandbox(self: Arc<Self>, request: CreateSandboxRequest) -> Result<(), Failure> {
        if !request.guest_hook_path.is_empty() {
            return Err(failure(Code::UNIMPLEMENTED, "Guest hooks (guest_hook_path) are not implemented"));
        }
        self.ready().await;
        {
            let mut sandbox = lock(&self.sandbox);
            if !matches!(*sandbox, SandboxState::None) {
                return Err(failure(Code::ALREADY_EXISTS, "There is a sandbox already"));
            }
            *sandbox = SandboxState::Changing;
        }
        let agent = self.clone();
        let made = blocking(move || {
            Sandbox::set_up(&request, &agent.storages, &agent.children).map_err(|error| sandbox_failure(&error))
        })
        .await;
        let (state, result) = match made {
            Ok(sandbox) => (SandboxState::Some(sandbox), Ok(())),
            Err(error) => (SandboxState::None, Err(error)),
        };
        *lock(&self.sandbox) = state;
        result
    }

    pub(super) async fn destroy_sandbox(self: Arc<Self>) -> Result<(), Failure> {
        let sandbox = match std::mem::replace(&mut *lock(&self.sandbox), SandboxState::Changing) {
            SandboxState::Some(sandbox) => Some(sandbox),
            SandboxState::None => None,
            SandboxState::Changing => return Err(failure(Code::FAILED_PRECONDITION, "The sandbox is changing")),
        };
        let ids: Vec<String> = lock(&self.containers).keys().cloned().collect();
        for id in ids {
            if let Err(error) = self.clone().remove_container(&id, 0).await {
                tracing::warn!(id, %error, "Cannot remove a container at the end of the sandbox");
            }
        }
        let agent = self.clone();
        let result = blocking(move || {
            if let Some(sandbox) = sandbox {
                sandbox.tear_down();
            }
            agent.storages.release_all();
            rustix::fs::sync();
            Ok(())
        })
        .await;
        *lock(&self.sandbox) = SandboxState::None;
        result
    }

    pub(super) async fn create_container(self: Arc<Self>, request: CreateContainerRequest) -> Result<(), Failure> {
        id::check("container", &request.container_id)?;
        check_supported(&request)?;
        self.ready().await;
        let (entry, mut turn) = Entry::new(&request.container_id);
        {
            let mut containers = lock(&self.containers);
            if containers.contains_key(&entry.id) {
                return Err(failure(Code::ALREADY_EXISTS, format!("There is a container {} already", entry.id)));
            }
            containers.insert(entry.id.clone(), entry.clone());
        }
        let agent = self.clone();
        let created = blocking({
            let entry = entry.clone();
            move || {
                let result = agent.build(&entry, &mut turn, request);
                turn.phase = if result.is_ok() { Phase::Created } else { Phase::Gone };
                if result.is_err() {
                    agent.storages.release(&turn.storages);
                }
                result
            }
        })
        .await;
        if created.is_err() {
            lock(&self.containers).remove(&entry.id);
        }
        created
    }

    /// Makes the container. Blocks.
    fn build(&self, entry: &Entry, turn: &mut Turn, mut request: CreateContainerRequest) -> Result<(), Failure> {
        let mut spec: Spec = *request
            .OCI
            .0
            .take()
            .ok_or_else(|| failure(Code::INVALID_ARGUMENT, "The request has no OCI configuration"))?;
        turn.storages = self.storages.acquire(&request.storages).map_err(|error| storage_failure(&error))?;
        let shared = match &*lock(&self.sandbox) {
            SandboxState::Some(sandbox) => {
                Some(sandbox.share(request.sandbox_pidns).map_err(|error| because(Code::FAILED_PRECONDITION, &error))?)
            }
            SandboxState::None => None,
            SandboxState::Changing => return Err(failure(Code::FAILED_PRECONDITION, "The sandbox is changing")),
        };
        if let (Some(names), Some(process)) = (request.string_user.as_ref(), spec.Process.as_mut()) {
            let root = Path::new(&spec.Root.Path).to_owned();
            user::resolve(&root, names, process.User.mut_or_insert_default())
                .map_err(|error| because(Code::INVALID_ARGUMENT, &error))?;
        }
        let starting = self.children.starting();
        let (core, group, started) = Core::create(&entry.id, &spec, shared.as_ref())?;
        let process = match Process::new(&self.children, started) {
            Ok(process) => Arc::new(process),
            Err(error) => {
                group.clean_up();
                core.delete();
                return Err(internal(error));
            }
        };
        drop(starting);
        lock(&entry.processes).insert(String::new(), process);
        group.watch_oom(&entry.id, &self.oom);
        let _ = entry.group.set(group);
        turn.core = Some(core);
        Ok(())
    }

    pub(super) async fn start_container(self: Arc<Self>, id: &str) -> Result<(), Failure> {
        let entry = self.entry(id)?;
        let mut turn = entry.take_turn().await?;
        entry.expect(&turn, &[Phase::Created], "started")?;
        let children = self.children.clone();
        blocking(move || {
            let _starting = children.starting();
            turn.core()?.start()?;
            turn.phase = Phase::Started;
            Ok(())
        })
        .await
    }

    pub(super) async fn exec_process(self: Arc<Self>, mut request: ExecProcessRequest) -> Result<(), Failure> {
        id::check("exec", &request.exec_id)?;
        if [request.stdin_port, request.stdout_port, request.stderr_port].iter().any(|port| *port != 0) {
            return Err(failure(Code::UNIMPLEMENTED, "Streams over ports of their own are not implemented"));
        }
        let entry = self.entry(&request.container_id)?;
        let mut turn = entry.take_turn().await?;
        entry.expect(&turn, &[Phase::Started], "entered")?;
        if entry.process("")?.exited().is_some() {
            let message = format!("The container {} has ended: it cannot be entered", entry.id);
            return Err(failure(Code::FAILED_PRECONDITION, message));
        }
        {
            let mut processes = lock(&entry.processes);
            let taken = request.exec_id == entry.id
                || processes.get(&request.exec_id).is_some_and(|process| !process.is_done());
            if taken {
                let message = format!("The container {} has a process {} already", entry.id, request.exec_id);
                return Err(failure(Code::ALREADY_EXISTS, message));
            }
            forget_ended(&mut processes);
        }
        let mut process =
            *request.process.0.take().ok_or_else(|| failure(Code::INVALID_ARGUMENT, "The request has no process"))?;
        let children = self.children.clone();
        blocking(move || {
            if let Some(names) = request.string_user.as_ref() {
                let root = turn.core()?.root().to_owned();
                user::resolve(&root, names, process.User.mut_or_insert_default())
                    .map_err(|error| because(Code::INVALID_ARGUMENT, &error))?;
            }
            let starting = children.starting();
            let started = turn.core()?.exec(&process)?;
            let process = Process::new(&children, started).map_err(internal)?;
            drop(starting);
            lock(&entry.processes).insert(request.exec_id, Arc::new(process));
            Ok(())
        })
        .await
    }

    pub(super) async fn signal_process(self: Arc<Self>, request: &SignalProcessRequest) -> Result<(), Failure> {
        let entry = self.entry(&request.container_id)?;
        let process = entry.process(&request.exec_id)?;
        let signal = i32::try_from(request.signal)
            .ok()
            .filter(|signal| (0..=64).contains(signal))
            .ok_or_else(|| failure(Code::INVALID_ARGUMENT, format!("{} is no signal", request.signal)))?;
        process.signal(signal).map_err(internal)?;
        let first = request.exec_id.is_empty() || request.exec_id == entry.id;
        if signal == libc::SIGKILL && first {
            let group = entry.group()?.clone();
            // In a PID namespace of its own the rest goes with it; here it goes in any case, and when frozen too.
            return blocking(move || group.kill()).await;
        }
        Ok(())
    }

    pub(super) async fn remove_container(self: Arc<Self>, id: &str, timeout: u32) -> Result<(), Failure> {
        let entry = self.entry(id)?;
        let limit = if timeout == 0 { REMOVE_TIMEOUT } else { Duration::from_secs(timeout.into()) };
        let removal = self.clone().remove_entry(entry);
        match tokio::time::timeout(limit, removal).await {
            Ok(result) => result,
            Err(_elapsed) => Err(failure(
                Code::DEADLINE_EXCEEDED,
                format!("The container {id} has not ended within {} s after it was killed", limit.as_secs()),
            )),
        }
    }

    async fn remove_entry(self: Arc<Self>, entry: Arc<Entry>) -> Result<(), Failure> {
        let mut turn = entry.take_turn().await?;
        let group = entry.group()?.clone();
        blocking({
            let group = group.clone();
            move || group.kill()
        })
        .await?;
        let processes: Vec<_> = lock(&entry.processes).values().cloned().collect();
        for process in processes {
            // A process that has moved to another control group is still the container's.
            process.signal(libc::SIGKILL).map_err(internal)?;
            process.ended().await;
        }
        let agent = self.clone();
        blocking(move || {
            let starting = agent.children.starting();
            group.remove()?;
            if let Some(core) = turn.core.take() {
                core.delete();
            }
            drop(starting);
            agent.storages.release(&turn.storages);
            turn.phase = Phase::Gone;
            lock(&agent.containers).remove(&entry.id);
            Ok(())
        })
        .await
    }

    pub(super) async fn pause_container(self: Arc<Self>, id: &str) -> Result<(), Failure> {
        self.change_freezing(id, Phase::Started, Phase::Paused, "paused").await
    }

    pub(super) async fn resume_container(self: Arc<Self>, id: &str) -> Result<(), Failure> {
        self.change_freezing(id, Phase::Paused, Phase::Started, "resumed").await
    }

    async fn change_freezing(&self, id: &str, from: Phase, to: Phase, what: &str) -> Result<(), Failure> {
        let entry = self.entry(id)?;
        let mut turn = entry.take_turn().await?;
        entry.expect(&turn, &[from], what)?;
        let group = entry.group()?.clone();
        blocking(move || {
            if to == Phase::Paused {
                group.freeze()?
            } else {
                group.thaw()?
            }
            turn.phase = to;
            Ok(())
        })
        .await
    }

    pub(super) async fn update_container(self: Arc<Self>, mut request: UpdateContainerRequest) -> Result<(), Failure> {
        let entry = self.entry(&request.container_id)?;
        let turn = entry.take_turn().await?;
        let resources = *request
            .resources
            .0
            .take()
            .ok_or_else(|| failure(Code::INVALID_ARGUMENT, "The request has no resources"))?;
        let group = entry.group()?.clone();
        blocking(move || {
            let result = group.apply(&resources);
            drop(turn);
            result
        })
        .await
    }

    pub(super) async fn stats_container(&self, id: &str) -> Result<StatsContainerResponse, Failure> {
        let entry = self.entry(id)?;
        let group = entry.group()?.clone();
        blocking(move || group.stats()).await
    }
}

/// Forgets execs that have ended and were asked for, all but the last few.
fn forget_ended(processes: &mut HashMap<String, Arc<Process>>) {
    let ended: Vec<String> = processes
        .iter()
        .filter(|(exec_id, process)| !exec_id.is_empty() && process.is_done())
        .map(|(exec_id, _)| exec_id.clone())
        .collect();
    if ended.len() >= ENDED_EXECS {
        for exec_id in ended {
            processes.remove(&exec_id);
        }
    }
}

fn storage_failure(error: &crate::storage::Error) -> Failure {
    use crate::storage::Error;
    let code = match error {
        Error::Driver { .. } => Code::UNIMPLEMENTED,
        Error::MountPoint { .. } | Error::Option { .. } => Code::INVALID_ARGUMENT,
        Error::Taken { .. } => Code::ALREADY_EXISTS,
        Error::Directory { .. } | Error::Mount { .. } => Code::INTERNAL,
    };
    because(code, error)
}

fn sandbox_failure(error: &crate::sandbox::Error) -> Failure {
    match error {
        crate::sandbox::Error::Storage(error) => storage_failure(error),
        error => because(Code::INTERNAL, error),
    }
}
