//! The containers of a pod and where each of their processes stands.
//!
//! The table is the only owner of this state. It does no input or output: an operation first *begins* here, which
//! checks and reserves, then does its work, then *finishes* here. What must not happen twice, or at the same time, is
//! refused at the beginning.
//!
//! ```text
//!              begin_create        finish_create        begin_start         finish_start(ok)
//!   (nothing) ─────────────► Creating ─────────► Created ─────────► Starting ─────────► Running ⇄ paused
//!       ▲                       │                 ▲ │  │               │ │                 │
//!       │◄──────────────────────┘ abort_create    │ │  │ failed        │ │                 │ exited
//!       │                                         └─┼──┼───────────────┘ │ exited          ▼
//!       │                                           │  └─────────────────┴────────────► Stopped
//!       │                             begin_delete  ▼                    begin_delete     │
//!       └────────────────────────────────────── Deleting ◄────────────────────────────────┘
//!                                finish_delete      └─► back (abort_delete)
//! ```

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use containerd_shim_protos::types::task::Status;
use oci_spec::runtime::Process as ProcessSpec;
use tokio::sync::{Mutex as AsyncMutex, watch};

use crate::bundle::Kind;
use crate::fault::Fault;
use crate::io::{Opened, Paths, Streams};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Its status; 128 + n for signal n.
    pub(crate) status: u32,
    /// When.
    pub(crate) at: SystemTime,
}

impl Exit {
    /// A process that ended now.
    pub(crate) fn now(status: u32) -> Exit {
        Exit { status, at: SystemTime::now() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Creating,
    Created,
    Starting,
    Running,
    Stopped,
    /// Whether to go back to `Stopped`, else to `Created`, if deleting fails.
    Deleting {
        stopped: bool,
    },
}

/// A process: a container's first, or an exec.
#[derive(Debug)]
struct Process {
    phase: Phase,
    paths: Paths,
    opened: Option<Opened>,
    /// Set to end the input: from the moment the streams are opened, since the request may come at any time.
    close: Option<watch::Sender<bool>>,
    streams: Option<Arc<Streams>>,
    spec: Option<ProcessSpec>,
    window: Option<(u32, u32)>,
    exit: watch::Sender<Option<Exit>>,
    /// Held while the process is started, so that its end is told after its beginning.
    starting: Arc<AsyncMutex<()>>,
}

impl Process {
    fn new(phase: Phase, paths: Paths, opened: Option<Opened>, spec: Option<ProcessSpec>) -> Process {
        Process {
            phase,
            paths,
            close: opened.as_ref().map(Opened::closer),
            opened,
            streams: None,
            spec,
            window: None,
            exit: watch::Sender::new(None),
            starting: Arc::default(),
        }
    }
}

#[derive(Debug)]
struct Container {
    bundle: PathBuf,
    kind: Kind,
    paused: bool,
    init: Process,
    execs: HashMap<String, Process>,
}

/// What a request about a process's state is answered with.
#[derive(Debug, Clone)]
pub(crate) struct View {
    /// The container's bundle.
    pub(crate) bundle: PathBuf,
    /// The state in the engine's words.
    pub(crate) status: Status,
    /// Where the streams lead.
    pub(crate) paths: Paths,
    /// How it ended, if it has.
    pub(crate) exit: Option<Exit>,
}

/// What is needed to start a process.
#[derive(Debug)]
pub(crate) struct Starting {
    /// The streams, opened when the process was created.
    pub(crate) opened: Opened,
    /// The process of an exec.
    pub(crate) spec: Option<ProcessSpec>,
    /// The terminal's size, where it was set before.
    pub(crate) window: Option<(u32, u32)>,
}

/// All containers of the pod.
#[derive(Debug, Default)]
pub(crate) struct Table {
    containers: HashMap<String, Container>,
}

impl Table {
    /// Whether there is no container.
    pub(crate) fn is_empty(&self) -> bool {
        self.containers.is_empty()
    }

    /// Every process that has not ended: container and exec.
    pub(crate) fn alive(&self) -> Vec<(String, String)> {
        let mut alive = Vec::new();
        for (id, container) in &self.containers {
            let execs = container.execs.iter().map(|(exec, process)| (exec.as_str(), process));
            for (exec, process) in execs.chain([("", &container.init)]) {
                if matches!(process.phase, Phase::Starting | Phase::Running)
                    || exec.is_empty() && process.phase == Phase::Created
                {
                    alive.push((id.clone(), exec.to_owned()));
                }
            }
        }
        alive
    }

    fn container(&self, id: &str) -> Result<&Container, Fault> {
        self.containers.get(id).ok_or_else(|| Fault::not_found(format!("Container {id} does not exist")))
    }

    fn container_mut(&mut self, id: &str) -> Result<&mut Container, Fault> {
        self.containers.get_mut(id).ok_or_else(|| Fault::not_found(format!("Container {id} does not exist")))
    }

    fn process(&self, id: &str, exec: &str) -> Result<&Process, Fault> {
        let container = self.container(id)?;
        if exec.is_empty() {
            return Ok(&container.init);
        }
        container.execs.get(exec).ok_or_else(|| no_exec(id, exec))
    }

    fn process_mut(&mut self, id: &str, exec: &str) -> Result<&mut Process, Fault> {
        let container = self.container_mut(id)?;
        if exec.is_empty() {
            return Ok(&mut container.init);
        }
        container.execs.get_mut(exec).ok_or_else(|| no_exec(id, exec))
    }

    /// Reserves a container's id. The first container must own the sandbox, and only the first may.
    pub(crate) fn begin_create(&mut self, id: &str, bundle: PathBuf, kind: Kind, paths: Paths) -> Result<(), Fault> {
        if self.containers.contains_key(id) {
            return Err(Fault::exists(format!("Container {id} exists already")));
        }
        let owner = self.containers.iter().find(|(_, c)| c.kind.owns_sandbox());
        match (owner, kind.owns_sandbox()) {
            (Some((owner, _)), true) => {
                return Err(Fault::precondition(format!(
                    "Container {id} wants a sandbox; this one belongs to {owner}"
                )));
            }
            (None, false) => {
                return Err(Fault::precondition(format!("Container {id} joins a sandbox that is not started")));
            }
            (Some((owner, container)), false) if container.init.phase == Phase::Creating => {
                return Err(Fault::precondition(format!("Sandbox {owner} of container {id} is still being created")));
            }
            _ => {}
        }
        let init = Process::new(Phase::Creating, paths, None, None);
        let container = Container { bundle, kind, paused: false, init, execs: HashMap::new() };
        self.containers.insert(id.to_owned(), container);
        Ok(())
    }

    /// The container is created.
    pub(crate) fn finish_create(&mut self, id: &str, opened: Opened) -> Result<(), Fault> {
        let init = &mut self.container_mut(id)?.init;
        init.phase = Phase::Created;
        init.close = Some(opened.closer());
        init.opened = Some(opened);
        Ok(())
    }

    /// The container could not be created; nothing is left of it.
    pub(crate) fn abort_create(&mut self, id: &str) {
        self.containers.remove(id);
    }

    /// Adds a process to a running container; it waits to be started.
    pub(crate) fn add_exec(
        &mut self,
        id: &str,
        exec: &str,
        spec: ProcessSpec,
        paths: Paths,
        opened: Opened,
    ) -> Result<(), Fault> {
        self.check_exec(id, exec)?;
        let process = Process::new(Phase::Created, paths, Some(opened), Some(spec));
        self.container_mut(id)?.execs.insert(exec.to_owned(), process);
        Ok(())
    }

    /// Whether a process of that name may be added.
    pub(crate) fn check_exec(&self, id: &str, exec: &str) -> Result<(), Fault> {
        let container = self.container(id)?;
        if exec.is_empty() {
            return Err(Fault::invalid(format!("Exec in container {id} has no id")));
        }
        if container.execs.contains_key(exec) {
            return Err(Fault::exists(format!("Exec {exec} in container {id} exists already")));
        }
        match container.init.phase {
            Phase::Running if container.paused => Err(Fault::precondition(format!("Container {id} is paused"))),
            Phase::Running => Ok(()),
            other => Err(Fault::precondition(format!("Container {id} is {}, not running", name(other)))),
        }
    }

    /// The lock to hold while starting.
    pub(crate) fn start_lock(&self, id: &str, exec: &str) -> Result<Arc<AsyncMutex<()>>, Fault> {
        Ok(Arc::clone(&self.process(id, exec)?.starting))
    }

    /// Begins to start a created process. Its streams are handed out; a second start finds none.
    pub(crate) fn begin_start(&mut self, id: &str, exec: &str) -> Result<Starting, Fault> {
        if !exec.is_empty() {
            let container = self.container(id)?;
            if container.init.phase != Phase::Running || container.paused {
                return Err(Fault::precondition(format!("Container {id} of exec {exec} is not running")));
            }
        }
        let what = title(id, exec);
        let process = self.process_mut(id, exec)?;
        match (process.phase, process.opened.take()) {
            (Phase::Created, Some(opened)) => {
                process.phase = Phase::Starting;
                Ok(Starting { opened, spec: process.spec.clone(), window: process.window })
            }
            (Phase::Created, None) => Err(Fault::precondition(format!("{what} failed to start; delete it"))),
            (phase, opened) => {
                process.opened = opened;
                Err(Fault::precondition(format!("{what} is {}, it cannot be started", name(phase))))
            }
        }
    }

    /// The process runs, unless it has ended meanwhile.
    pub(crate) fn finish_start(&mut self, id: &str, exec: &str, streams: Arc<Streams>) {
        if let Ok(process) = self.process_mut(id, exec) {
            process.streams = Some(streams);
            if process.phase == Phase::Starting {
                process.phase = Phase::Running;
            }
        }
    }

    /// The process could not be started.
    pub(crate) fn fail_start(&mut self, id: &str, exec: &str) {
        if let Ok(process) = self.process_mut(id, exec)
            && process.phase == Phase::Starting
        {
            process.phase = Phase::Created;
        }
    }

    /// The process has ended; says whether this was news.
    pub(crate) fn exited(&mut self, id: &str, exec: &str, exit: Exit) -> bool {
        let Ok(process) = self.process_mut(id, exec) else { return false };
        let news = process.exit.send_if_modified(|known| {
            let news = known.is_none();
            if news {
                *known = Some(exit);
            }
            news
        });
        if news {
            process.phase = match process.phase {
                Phase::Deleting { .. } => Phase::Deleting { stopped: true },
                _ => Phase::Stopped,
            };
        }
        news
    }

    /// Whether the process was ever started.
    pub(crate) fn streams(&self, id: &str, exec: &str) -> Option<Arc<Streams>> {
        self.process(id, exec).ok()?.streams.clone()
    }

    /// A receiver that gets the end of the process.
    pub(crate) fn watch_exit(&self, id: &str, exec: &str) -> Result<watch::Receiver<Option<Exit>>, Fault> {
        Ok(self.process(id, exec)?.exit.subscribe())
    }

    /// Closes stdin once what was written to it is delivered; before the start too.
    pub(crate) fn close_stdin(&self, id: &str, exec: &str) -> Result<(), Fault> {
        if let Some(close) = &self.process(id, exec)?.close {
            close.send_replace(true);
        }
        Ok(())
    }

    /// Notes a terminal's size; says whether the process is there to be told.
    pub(crate) fn resize(&mut self, id: &str, exec: &str, rows: u32, columns: u32) -> Result<bool, Fault> {
        let what = title(id, exec);
        let process = self.process_mut(id, exec)?;
        match process.phase {
            Phase::Stopped | Phase::Deleting { .. } => Err(finished(&what)),
            phase => {
                process.window = Some((rows, columns));
                Ok(phase == Phase::Running)
            }
        }
    }

    /// Whether the process can be signalled.
    pub(crate) fn check_kill(&self, id: &str, exec: &str) -> Result<(), Fault> {
        let what = title(id, exec);
        match self.process(id, exec)?.phase {
            Phase::Running | Phase::Starting => Ok(()),
            Phase::Created if exec.is_empty() => Ok(()),
            Phase::Stopped | Phase::Deleting { .. } => Err(finished(&what)),
            phase => Err(Fault::precondition(format!("{what} is {}, it cannot be signalled", name(phase)))),
        }
    }

    /// Whether the container runs or waits to (its limits can be changed and its statistics read).
    pub(crate) fn check_there(&self, id: &str) -> Result<(), Fault> {
        match self.container(id)?.init.phase {
            Phase::Created | Phase::Starting | Phase::Running => Ok(()),
            Phase::Stopped | Phase::Deleting { .. } => Err(finished(&title(id, ""))),
            Phase::Creating => Err(Fault::precondition(format!("Container {id} is being created"))),
        }
    }

    /// Whether the container can be paused (`pause`) or resumed.
    pub(crate) fn check_pause(&self, id: &str, pause: bool) -> Result<(), Fault> {
        let container = self.container(id)?;
        match (container.init.phase, container.paused, pause) {
            (Phase::Running, false, true) | (Phase::Running, true, false) => Ok(()),
            (Phase::Running, true, true) => Err(Fault::precondition(format!("Container {id} is paused already"))),
            (Phase::Running, false, false) => Err(Fault::precondition(format!("Container {id} is not paused"))),
            (phase, ..) => Err(Fault::precondition(format!("Container {id} is {}, not running", name(phase)))),
        }
    }

    /// The container is paused, or no longer.
    pub(crate) fn set_paused(&mut self, id: &str, paused: bool) {
        if let Ok(container) = self.container_mut(id) {
            container.paused = paused;
        }
    }

    /// Begins to delete a process that has ended or never ran. Says how it ended.
    pub(crate) fn begin_delete(&mut self, id: &str, exec: &str) -> Result<Option<Exit>, Fault> {
        let what = title(id, exec);
        let process = self.process_mut(id, exec)?;
        let stopped = match process.phase {
            Phase::Stopped => true,
            Phase::Created => false,
            phase => return Err(Fault::precondition(format!("{what} is {}; it must end first", name(phase)))),
        };
        process.phase = Phase::Deleting { stopped };
        Ok(*process.exit.borrow())
    }

    /// The process could not be deleted; it is what it was.
    pub(crate) fn abort_delete(&mut self, id: &str, exec: &str) {
        if let Ok(process) = self.process_mut(id, exec)
            && let Phase::Deleting { stopped } = process.phase
        {
            process.phase = if stopped { Phase::Stopped } else { Phase::Created };
        }
    }

    /// The process is gone, and with a container its execs. Hands out the streams that may still flow.
    pub(crate) fn finish_delete(&mut self, id: &str, exec: &str) -> Vec<Arc<Streams>> {
        if exec.is_empty() {
            let Some(container) = self.containers.remove(id) else { return Vec::new() };
            let execs = container.execs.into_values().filter_map(|p| p.streams);
            container.init.streams.into_iter().chain(execs).collect()
        } else {
            let removed = self.container_mut(id).ok().and_then(|c| c.execs.remove(exec));
            removed.and_then(|p| p.streams).into_iter().collect()
        }
    }

    /// The kind of a container.
    pub(crate) fn kind(&self, id: &str) -> Result<Kind, Fault> {
        Ok(self.container(id)?.kind.clone())
    }

    /// How a process stands.
    pub(crate) fn view(&self, id: &str, exec: &str) -> Result<View, Fault> {
        let container = self.container(id)?;
        let process = self.process(id, exec)?;
        let status = match process.phase {
            Phase::Creating => return Err(Fault::not_found(format!("Container {id} is being created"))),
            Phase::Created | Phase::Starting | Phase::Deleting { stopped: false } => Status::CREATED,
            Phase::Running if container.paused => Status::PAUSED,
            Phase::Running => Status::RUNNING,
            Phase::Stopped | Phase::Deleting { stopped: true } => Status::STOPPED,
        };
        Ok(View {
            bundle: container.bundle.clone(),
            status,
            paths: process.paths.clone(),
            exit: *process.exit.borrow(),
        })
    }
}

fn title(id: &str, exec: &str) -> String {
    if exec.is_empty() { format!("Container {id}") } else { format!("Exec {exec} of container {id}") }
}

fn no_exec(id: &str, exec: &str) -> Fault {
    Fault::not_found(format!("Exec {exec} of container {id} does not exist"))
}

/// The words engines look for.
fn finished(what: &str) -> Fault {
    Fault::not_found(format!("{what}: process already finished"))
}

fn name(phase: Phase) -> &'static str {
    match phase {
        Phase::Creating => "being created",
        Phase::Created => "created",
        Phase::Starting => "being started",
        Phase::Running => "running",
        Phase::Stopped => "stopped",
        Phase::Deleting { .. } => "being deleted",
    }
}

#[cfg(test)]
mod tests;
