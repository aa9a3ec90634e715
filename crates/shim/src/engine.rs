//! What each request does: the table says whether it may, the pod does it, the engine hears of it.
//!
//! One pod per server. The first container owns the sandbox: its creation starts the machine, its deletion stops it.
//! Every operation runs to its end in a task of its own, even if the caller hangs up.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteResponse, ExecProcessRequest, KillRequest, StateResponse, UpdateTaskRequest,
};
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskPaused, TaskResumed,
    TaskStart,
};
use containerd_shim_protos::topics;
use oci_spec::runtime::{LinuxResources, Process as ProcessSpec};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use tokio::sync::Notify;
use tracing::{debug, error, info, warn};

use crate::bundle;
use crate::chain::Chain;
use crate::events::Events;
use crate::fault::Fault;
use crate::io::{Opened, Paths, Streams};
use crate::metrics;
use crate::options;
use crate::pod::{Host, NewContainer, Pod, PodSpec};
use crate::table::{Exit, Table};
use crate::time::timestamp;

/// The status of a process whose machine is gone: as if killed.
const KILLED: u32 = 137;

/// The status of a process whose end the guest could not tell.
const UNKNOWN: u32 = 255;

const SIGKILL: u32 = 9;

/// How long a container that never ran may take to end when it is deleted.
const END_WITHIN: Duration = Duration::from_secs(10);

/// The pod, as far as the Task service sees it.
pub(crate) struct Engine {
    sandbox: String,
    host: Box<dyn Host>,
    events: Events,
    table: Mutex<Table>,
    pod: Mutex<Option<Arc<dyn Pod>>>,
    /// Set when the server shall end.
    done: Notify,
}

impl Engine {
    /// A pod that is not started.
    pub(crate) fn new(sandbox: &str, host: Box<dyn Host>, events: Events) -> Arc<Engine> {
        Arc::new(Engine {
            sandbox: sandbox.to_owned(),
            host,
            events,
            table: Mutex::default(),
            pod: Mutex::default(),
            done: Notify::new(),
        })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn current_pod(&self) -> Option<Arc<dyn Pod>> {
        self.pod.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_pod(&self, pod: Option<Arc<dyn Pod>>) {
        *self.pod.lock().unwrap_or_else(PoisonError::into_inner) = pod;
    }

    fn pod(&self) -> Result<Arc<dyn Pod>, Fault> {
        self.current_pod().ok_or_else(|| Fault::precondition(format!("Sandbox {} does not run", self.sandbox)))
    }

    /// The pid engines see: the machine's. Never 0, which they would take for "not started".
    pub(crate) fn pid(&self) -> u32 {
        self.current_pod().map_or_else(std::process::id, |pod| pod.vmm_pid())
    }

    /// Creates a container, and the pod with its first.
    pub(crate) async fn create(self: Arc<Self>, request: CreateTaskRequest) -> Result<u32, Fault> {
        let id = request.id.clone();
        bundle::check_id(&id).map_err(|e| Fault::invalid(Chain(&e).to_string()))?;
        if !request.checkpoint.is_empty() {
            return Err(Fault::unimplemented(format!("Container {id} cannot be restored: there are no checkpoints")));
        }
        let dir = PathBuf::from(&request.bundle);
        if !dir.is_absolute() {
            return Err(Fault::invalid(format!("Bundle {:?} of container {id} is no absolute path", request.bundle)));
        }
        let mut spec = bundle::read_spec(&dir).map_err(|e| Fault::invalid(Chain(&e).to_string()))?;
        let annotations = spec.annotations().clone().unwrap_or_default();
        let kind = bundle::kind(&annotations).map_err(|e| Fault::invalid(Chain(&e).to_string()))?;
        let sandbox = kind.sandbox_id(&id);
        if sandbox != self.sandbox {
            let message = format!("Container {id} belongs to sandbox {sandbox}; this server is {}", self.sandbox);
            return Err(Fault::invalid(message));
        }
        if let Some(process) = spec.process_mut() {
            process.set_terminal(Some(request.terminal));
        }
        let paths = Paths {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };

        self.table().begin_create(&id, dir.clone(), kind.clone(), paths.clone())?;
        let created = async {
            let opened = Opened::open(&paths)?;
            if kind.owns_sandbox() {
                let shape = bundle::shape(&spec).map_err(|e| Fault::invalid(Chain(&e).to_string()))?;
                let config_path = options::config_path(request.options.as_ref())?;
                let spec = PodSpec { id: self.sandbox.clone(), shape, config_path, annotations };
                let pod = self.host.start(spec).await?;
                info!(vmm = pod.vmm_pid(), "Sandbox started");
                self.set_pod(Some(Arc::clone(&pod)));
                self.watch(&pod);
            }
            let new = NewContainer { id: id.clone(), bundle: dir, spec, rootfs: request.rootfs.clone() };
            self.pod()?.create_container(new).await?;
            Ok(opened)
        };
        match created.await.and_then(|opened| self.table().finish_create(&id, opened)) {
            Ok(()) => {}
            Err(fault) => {
                warn!(container = id, error = fault.message, "Container not created");
                if kind.owns_sandbox() {
                    self.stop_pod().await.unwrap_or_else(|e| error!(error = e.message, "Cannot stop the sandbox"));
                }
                self.table().abort_create(&id);
                return Err(fault);
            }
        }

        let pid = self.pid();
        let io = TaskIO {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
            ..Default::default()
        };
        self.events.publish(
            topics::TASK_CREATE_EVENT_TOPIC,
            &TaskCreate {
                container_id: id.clone(),
                bundle: request.bundle,
                rootfs: request.rootfs,
                io: MessageField::some(io),
                checkpoint: request.checkpoint,
                pid,
                ..Default::default()
            },
        );
        self.spawn_waiter(&id, "");
        info!(container = id, "Container created");
        Ok(pid)
    }

    /// Starts a created process.
    pub(crate) async fn start(self: Arc<Self>, id: String, exec: String) -> Result<u32, Fault> {
        let lock = self.table().start_lock(&id, &exec)?;
        let _starting = lock.lock().await;
        let pod = self.pod()?;
        let plan = self.table().begin_start(&id, &exec)?;
        let started = match &plan.spec {
            None => pod.start_container(&id).await,
            Some(process) => pod.exec(&id, &exec, process).await,
        };
        if let Err(fault) = started {
            warn!(container = id, exec, error = fault.message, "Process not started");
            self.table().fail_start(&id, &exec);
            return Err(fault);
        }
        if let Some((rows, columns)) = plan.window
            && let Err(fault) = pod.resize(&id, &exec, rows, columns).await
        {
            // The process may have ended already.
            debug!(container = id, exec, error = fault.message, "Cannot set the terminal's size");
        }
        let streams = Streams::start(plan.opened, &pod, &id, &exec);
        self.table().finish_start(&id, &exec, streams);
        let pid = pod.vmm_pid();
        if exec.is_empty() {
            self.events
                .publish(topics::TASK_START_EVENT_TOPIC, &TaskStart { container_id: id, pid, ..Default::default() });
        } else {
            self.events.publish(
                topics::TASK_EXEC_STARTED_EVENT_TOPIC,
                &TaskExecStarted { container_id: id.clone(), exec_id: exec.clone(), pid, ..Default::default() },
            );
            self.spawn_waiter(&id, &exec);
        }
        Ok(pid)
    }

    /// Waits for a process's end in the background.
    fn spawn_waiter(self: &Arc<Self>, id: &str, exec: &str) {
        let (engine, id, exec) = (Arc::clone(self), id.to_owned(), exec.to_owned());
        tokio::spawn(async move {
            let Ok(pod) = engine.pod() else { return };
            let ended = pod.wait(&id, &exec).await;
            let status = match ended {
                Ok(status) => u32::try_from(status).unwrap_or(UNKNOWN),
                Err(fault) => {
                    // The pod was stopped, its machine died, or the guest has lost the process.
                    debug!(container = id, exec, error = fault.message, "Cannot learn how the process ended");
                    if engine.current_pod().is_some() { UNKNOWN } else { KILLED }
                }
            };
            engine.ended(&id, &exec, Exit::now(status)).await;
        });
    }

    /// Tells that a process has ended: after its beginning was told, and after its output is delivered.
    async fn ended(&self, id: &str, exec: &str, exit: Exit) {
        let Ok(lock) = self.table().start_lock(id, exec) else { return };
        drop(lock.lock().await);
        let streams = self.table().streams(id, exec);
        if let Some(streams) = streams {
            streams.drained().await;
        }
        if !self.table().exited(id, exec, exit) {
            return;
        }
        info!(container = id, exec, status = exit.status, "Process ended");
        self.events.publish(
            topics::TASK_EXIT_EVENT_TOPIC,
            &TaskExit {
                container_id: id.to_owned(),
                id: if exec.is_empty() { id.to_owned() } else { exec.to_owned() },
                pid: self.pid(),
                exit_status: exit.status,
                exited_at: timestamp(exit.at),
                ..Default::default()
            },
        );
    }

    /// Watches the machine: its end is the end of all in it, and the guest's kernel may kill for want of memory.
    fn watch(self: &Arc<Self>, pod: &Arc<dyn Pod>) {
        let (engine, watched) = (Arc::clone(self), Arc::clone(pod));
        tokio::spawn(async move {
            while let Some(container_id) = watched.next_oom().await {
                warn!(container = container_id, "Container ran out of memory");
                engine.events.publish(topics::TASK_OOM_EVENT_TOPIC, &TaskOOM { container_id, ..Default::default() });
            }
        });
        let (engine, watched) = (Arc::clone(self), Arc::clone(pod));
        tokio::spawn(async move {
            let words = watched.gone().await;
            let alive = engine.table().alive();
            if alive.is_empty() {
                debug!("The machine is gone");
                return;
            }
            error!(last_words = words, "The machine died; everything in it is lost");
            for (id, exec) in alive {
                engine.ended(&id, &exec, Exit::now(KILLED)).await;
            }
        });
    }

    /// Removes a process that has ended or never ran; with the pod's first container the machine goes too.
    pub(crate) async fn delete(self: Arc<Self>, id: String, exec: String) -> Result<DeleteResponse, Fault> {
        let exit = self.table().begin_delete(&id, &exec)?;
        let pid = self.pid();
        let exit = match self.remove(&id, &exec, exit).await {
            Ok(exit) => exit,
            Err(fault) => {
                self.table().abort_delete(&id, &exec);
                return Err(fault);
            }
        };
        for streams in self.table().finish_delete(&id, &exec) {
            streams.abort();
        }
        if exec.is_empty() {
            info!(container = id, "Container deleted");
            self.events.publish(
                topics::TASK_DELETE_EVENT_TOPIC,
                &TaskDelete {
                    container_id: id,
                    pid,
                    exit_status: exit.status,
                    exited_at: timestamp(exit.at),
                    ..Default::default()
                },
            );
        }
        let exited_at = timestamp(exit.at);
        Ok(DeleteResponse { pid, exit_status: exit.status, exited_at, ..Default::default() })
    }

    async fn remove(&self, id: &str, exec: &str, exit: Option<Exit>) -> Result<Exit, Fault> {
        if !exec.is_empty() {
            // The guest forgets a process with its end.
            return Ok(exit.unwrap_or_else(|| Exit::now(KILLED)));
        }
        let owner = self.table().kind(id)?.owns_sandbox();
        let mut exit = exit;
        if let Some(pod) = self.current_pod() {
            if exit.is_none() {
                exit = self.end(&pod, id).await;
            }
            match pod.remove_container(id).await {
                Ok(()) => {}
                Err(fault) if fault.is_not_found() => {}
                // The machine is about to go, and the container with it.
                Err(fault) if owner => debug!(container = id, error = fault.message, "Container not removed"),
                Err(fault) => return Err(fault),
            }
        }
        if owner {
            self.stop_pod().await?;
        }
        Ok(exit.unwrap_or_else(|| Exit::now(KILLED)))
    }

    /// Ends a container that was created and never started.
    async fn end(&self, pod: &Arc<dyn Pod>, id: &str) -> Option<Exit> {
        let mut watched = self.table().watch_exit(id, "").ok()?;
        if let Err(fault) = pod.signal(id, "", SIGKILL, true).await {
            debug!(container = id, error = fault.message, "Cannot kill a container that never ran");
            return None;
        }
        let ended = tokio::time::timeout(END_WITHIN, watched.wait_for(Option::is_some)).await;
        ended.ok()?.ok().and_then(|exit| *exit)
    }

    async fn stop_pod(&self) -> Result<(), Fault> {
        let Some(pod) = self.current_pod() else { return Ok(()) };
        pod.stop().await?;
        self.set_pod(None);
        info!("Sandbox stopped");
        Ok(())
    }

    /// Sends a signal.
    pub(crate) async fn kill(self: Arc<Self>, request: KillRequest) -> Result<(), Fault> {
        let KillRequest { id, exec_id: exec, signal, all, .. } = request;
        self.table().check_kill(&id, &exec)?;
        let Err(fault) = self.pod()?.signal(&id, &exec, signal, all).await else { return Ok(()) };
        // It may have ended on the way.
        self.table().check_kill(&id, &exec)?;
        if signal == SIGKILL && exec.is_empty() && !fault.is_not_found() && self.table().kind(&id)?.owns_sandbox() {
            // A guest that does not answer must not be able to keep its pod.
            warn!(container = id, error = fault.message, "The guest does not take a SIGKILL; stopping its machine");
            let alive = self.table().alive();
            self.stop_pod().await?;
            for (id, exec) in alive {
                self.ended(&id, &exec, Exit::now(KILLED)).await;
            }
            return Ok(());
        }
        Err(fault)
    }

    /// Adds a process to a container.
    pub(crate) async fn exec(self: Arc<Self>, request: ExecProcessRequest) -> Result<(), Fault> {
        let ExecProcessRequest { id, exec_id: exec, .. } = request;
        bundle::check_id(&exec).map_err(|e| Fault::invalid(Chain(&e).to_string()))?;
        self.table().check_exec(&id, &exec)?;
        let mut process: ProcessSpec = options::json(request.spec.as_ref(), "process")?;
        process.set_terminal(Some(request.terminal));
        let paths =
            Paths { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr, terminal: request.terminal };
        let opened = Opened::open(&paths)?;
        self.table().add_exec(&id, &exec, process, paths, opened)?;
        self.events.publish(
            topics::TASK_EXEC_ADDED_EVENT_TOPIC,
            &TaskExecAdded { container_id: id, exec_id: exec, ..Default::default() },
        );
        Ok(())
    }

    /// Waits for a process's end.
    pub(crate) async fn wait(self: Arc<Self>, id: String, exec: String) -> Result<Exit, Fault> {
        let mut watched = self.table().watch_exit(&id, &exec)?;
        let gone = || Fault::not_found(format!("Container {id} was deleted"));
        let exit = watched.wait_for(Option::is_some).await.map_err(|_| gone())?;
        (*exit).ok_or_else(gone)
    }

    /// Says how a process stands.
    pub(crate) fn state(&self, id: &str, exec: &str) -> Result<StateResponse, Fault> {
        let view = self.table().view(id, exec)?;
        Ok(StateResponse {
            id: id.to_owned(),
            bundle: view.bundle.display().to_string(),
            pid: self.pid(),
            status: view.status.into(),
            stdin: view.paths.stdin,
            stdout: view.paths.stdout,
            stderr: view.paths.stderr,
            terminal: view.paths.terminal,
            exit_status: view.exit.map_or(0, |exit| exit.status),
            exited_at: view.exit.map_or_else(MessageField::none, |exit| timestamp(exit.at)),
            exec_id: exec.to_owned(),
            ..Default::default()
        })
    }

    /// Freezes a container (`pause`) or thaws it.
    pub(crate) async fn pause(self: Arc<Self>, id: String, pause: bool) -> Result<(), Fault> {
        self.table().check_pause(&id, pause)?;
        let pod = self.pod()?;
        if pause {
            pod.pause(&id).await?;
        } else {
            pod.resume(&id).await?;
        }
        self.table().set_paused(&id, pause);
        let container_id = id;
        if pause {
            self.events.publish(topics::TASK_PAUSED_EVENT_TOPIC, &TaskPaused { container_id, ..Default::default() });
        } else {
            self.events.publish(topics::TASK_RESUMED_EVENT_TOPIC, &TaskResumed { container_id, ..Default::default() });
        }
        Ok(())
    }

    /// Sets a terminal's size, or notes it for the start.
    pub(crate) async fn resize(
        self: Arc<Self>,
        id: String,
        exec: String,
        rows: u32,
        columns: u32,
    ) -> Result<(), Fault> {
        let runs = self.table().resize(&id, &exec, rows, columns)?;
        if runs { self.pod()?.resize(&id, &exec, rows, columns).await } else { Ok(()) }
    }

    /// Ends a process's input.
    pub(crate) fn close_stdin(&self, id: &str, exec: &str) -> Result<(), Fault> {
        self.table().close_stdin(id, exec)
    }

    /// Changes a container's limits.
    pub(crate) async fn update(self: Arc<Self>, request: UpdateTaskRequest) -> Result<(), Fault> {
        self.table().check_there(&request.id)?;
        let resources: LinuxResources = options::json(request.resources.as_ref(), "resources")?;
        self.pod()?.update(&request.id, &resources).await
    }

    /// Reads a container's statistics.
    pub(crate) async fn stats(self: Arc<Self>, id: String) -> Result<Any, Fault> {
        self.table().check_there(&id)?;
        let stats = self.pod()?.stats(&id).await?;
        metrics::metrics(&stats).map_err(|e| Fault::internal(&e))
    }

    /// Whether a container exists.
    pub(crate) fn check(&self, id: &str) -> Result<(), Fault> {
        self.table().view(id, "").map(drop)
    }

    /// Ends the server if no container is left, or in any case (`now`).
    pub(crate) fn shutdown(&self, now: bool) {
        if now || self.table().is_empty() {
            self.done.notify_one();
        } else {
            debug!("Not shutting down: there are containers");
        }
    }

    /// Waits until the server shall end.
    pub(crate) async fn finished(&self) {
        self.done.notified().await;
    }

    /// Stops what still runs. The last thing before the server ends.
    pub(crate) async fn close(&self) {
        if let Err(fault) = self.stop_pod().await {
            error!(error = fault.message, "Cannot stop the sandbox");
        }
    }

    /// Publishes nothing more.
    pub(crate) fn end_events(&self) {
        self.events.end();
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("sandbox", &self.sandbox).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
