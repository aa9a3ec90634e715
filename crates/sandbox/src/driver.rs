//! The state driver of a sandbox: one task that owns its state and takes requests from a queue.
//!
//! ```text
//!            start()                    Stop, or the machine's end
//!  (nothing) ───────▶ Running ──────────────────────────────────▶ (nothing)
//!      ▲ any failure: everything undone
//!
//!  a container:   Create ──▶ created ──Start──▶ running ◀──Pause/Resume──▶ paused
//!                               └── Ended ──┐      │ Ended                   │ Ended
//!                                           ▼      ▼                         ▼
//!                               (nothing) ◀──Remove── stopped ◀──────────────┘
//! ```
//!
//! When the machine ends by itself every container becomes stopped; the record and the journal stay until Stop.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use oci_spec::runtime::Spec;
use protocol::agent::CreateContainerRequest;
use share::Share;
use tokio::sync::{mpsc, oneshot, watch};
use vmm::Vmm;

use crate::agent::Agent;
use crate::hooks::{self, Point};
use crate::journal::Journal;
use crate::record::{self, ContainerState, ContainerSummary, Summary};
use crate::{ContainerSpec, Error, Sandbox, SandboxSpec, launch, translate};

/// How many requests may wait: more than a pod has containers.
const QUEUE: usize = 64;

/// How long a VMM may take to quit by itself.
const QUIT: Duration = Duration::from_secs(2);

type Reply = oneshot::Sender<Result<(), Error>>;

/// A request that changes the state.
#[derive(Debug)]
pub(crate) enum Request {
    Create(Box<ContainerSpec>, Reply),
    Start(String, Reply),
    Pause(String, Reply),
    Resume(String, Reply),
    Remove(String, Reply),
    /// A container's command has ended.
    Ended(String),
    Stop(Reply),
}

/// What the driver keeps of a container beyond what everybody may know.
#[derive(Debug)]
struct Container {
    spec: Spec,
    bundle: PathBuf,
}

/// Everything of a running sandbox.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) journal: Arc<Journal>,
    pub(crate) share: Share,
    pub(crate) vmm: Arc<dyn Vmm>,
    pub(crate) agent: Agent,
    pub(crate) summary: Summary,
    /// Seccomp profiles reach the guest.
    pub(crate) seccomp: bool,
    /// Held for the sandbox's life: the VMM's user.
    pub(crate) _user: jail::VmmUser,
    pub(crate) server: jail::Process,
    containers: HashMap<String, Container>,
}

/// Starts a sandbox and its driver.
pub(crate) async fn start(spec: SandboxSpec) -> Result<Sandbox, Error> {
    crate::check_id(&spec.id)?;
    let journal = Arc::new(Journal::create(&spec.id)?);
    match launch::launch(&spec, &journal).await {
        Ok(launched) => Ok(run(launched, journal)),
        Err(error) => {
            // The first error is the one to report; what is left is in the journal for the next attempt.
            if let Err(again) = journal.undo() {
                tracing::warn!("{again}");
            }
            Err(error)
        }
    }
}

fn run(launched: launch::Launched, journal: Arc<Journal>) -> Sandbox {
    let (requests, queue) = mpsc::channel(QUEUE);
    let (exit, exited) = watch::channel(None);
    let sandbox = Sandbox { requests, agent: launched.agent.clone(), vmm: Arc::clone(&launched.vmm), exited };
    let driver = Driver {
        journal,
        share: launched.share,
        vmm: launched.vmm,
        agent: launched.agent,
        summary: launched.summary,
        seccomp: launched.seccomp,
        _user: launched.user,
        server: launched.server,
        containers: HashMap::new(),
    };
    tokio::spawn(driver.drive(queue, exit));
    sandbox
}

impl Driver {
    async fn drive(mut self, mut queue: mpsc::Receiver<Request>, exit: watch::Sender<Option<vmm::Exit>>) {
        let vmm = Arc::clone(&self.vmm);
        let mut running = true;
        loop {
            tokio::select! {
                request = queue.recv() => match request {
                    Some(Request::Stop(reply)) => {
                        queue.close();
                        let result = self.stop().await;
                        // Whoever asked may have stopped waiting.
                        drop(reply.send(result));
                        return;
                    }
                    Some(request) => self.handle(request, running).await,
                    // Every handle is gone: nobody will ever ask to stop.
                    None => {
                        if let Err(error) = self.stop().await {
                            tracing::warn!("{error}");
                        }
                        return;
                    }
                },
                gone = vmm.wait(), if running => {
                    running = false;
                    tracing::warn!("the virtual machine ended: {gone}");
                    for container in &mut self.summary.containers {
                        container.state = ContainerState::Stopped;
                    }
                    self.record();
                    exit.send_replace(Some(gone));
                }
            }
        }
    }

    async fn handle(&mut self, request: Request, running: bool) {
        // A caller that has given up needs no answer.
        match request {
            Request::Create(container, reply) => drop(reply.send(self.create(*container).await)),
            Request::Start(id, reply) => drop(reply.send(self.start(&id).await)),
            Request::Pause(id, reply) => drop(reply.send(self.pause(&id).await)),
            Request::Resume(id, reply) => drop(reply.send(self.resume(&id).await)),
            Request::Remove(id, reply) => drop(reply.send(self.remove(&id, running).await)),
            Request::Ended(id) => self.set_state(&id, ContainerState::Stopped),
            // Taken by the caller of this.
            Request::Stop(_) => {}
        }
    }

    async fn create(&mut self, container: ContainerSpec) -> Result<(), Error> {
        let ContainerSpec { id, bundle, spec, rootfs } = container;
        crate::check_id(&id)?;
        if self.containers.contains_key(&id) {
            return Err(Error::ContainerExists(id));
        }
        let made = self.make(&id, &bundle, &spec, &rootfs).await;
        if let Err(error) = made {
            // The first error is the one to report.
            drop(self.share.remove_container(&id));
            return Err(error);
        }
        self.summary.containers.push(ContainerSummary {
            id: id.clone(),
            bundle: bundle.clone(),
            state: ContainerState::Created,
            created: record::now(),
        });
        self.containers.insert(id, Container { spec, bundle });
        self.record();
        Ok(())
    }

    async fn make(
        &self,
        id: &str,
        bundle: &std::path::Path,
        spec: &Spec,
        rootfs: &[share::RootfsMount],
    ) -> Result<(), Error> {
        let root = spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_else(|| "rootfs".into());
        let guest_root = self.share.add_rootfs(id, rootfs, &bundle.join(root))?;
        let translated = translate::translate(id, spec, bundle, &guest_root, &self.share, self.seccomp)?;
        hooks::run(Point::Create, spec, id, bundle, self.vmm.pid()).await?;
        let request = CreateContainerRequest {
            container_id: id.to_owned(),
            exec_id: id.to_owned(),
            OCI: Some(translated.spec).into(),
            sandbox_pidns: translated.sandbox_pidns,
            ..Default::default()
        };
        self.agent.create_container(&request).await
    }

    async fn start(&mut self, id: &str) -> Result<(), Error> {
        self.expect(id, "start", &[ContainerState::Created])?;
        self.agent.start_container(id).await?;
        self.set_state(id, ContainerState::Running);
        self.run_hooks(Point::Started, id).await;
        Ok(())
    }

    async fn pause(&mut self, id: &str) -> Result<(), Error> {
        self.expect(id, "pause", &[ContainerState::Running])?;
        self.agent.pause(id).await?;
        self.set_state(id, ContainerState::Paused);
        Ok(())
    }

    async fn resume(&mut self, id: &str) -> Result<(), Error> {
        self.expect(id, "resume", &[ContainerState::Paused])?;
        self.agent.resume(id).await?;
        self.set_state(id, ContainerState::Running);
        Ok(())
    }

    async fn remove(&mut self, id: &str, running: bool) -> Result<(), Error> {
        self.state(id)?;
        if running {
            match self.agent.remove_container(id).await {
                // The machine may be ending at this moment, or the agent never heard of the container.
                Ok(()) | Err(Error::AgentLost(_)) => {}
                Err(Error::Agent { code: ttrpc::Code::NOT_FOUND, .. }) => {}
                Err(error) => return Err(error),
            }
        }
        self.share.remove_container(id)?;
        self.run_hooks(Point::Stopped, id).await;
        self.containers.remove(id);
        self.summary.containers.retain(|container| container.id != id);
        self.record();
        Ok(())
    }

    async fn stop(&mut self) -> Result<(), Error> {
        // Containers that were not deleted one by one: their hooks are owed all the same.
        let left: Vec<String> = self.containers.keys().cloned().collect();
        // Files on the share are the host's already, and nothing in the guest outlives it: it need not be asked.
        if let Err(error) = self.vmm.stop(QUIT).await {
            tracing::warn!("{error}");
        }
        for id in left {
            self.run_hooks(Point::Stopped, &id).await;
        }
        // The server ends with the VMM's connection; the journal makes sure, below.
        drop(self.server.kill());
        drop(self.server.try_wait());
        let share = self.share.stop();
        let undone = self.journal.undo();
        share?;
        undone
    }

    /// Hooks after the fact: a failure is logged and changes nothing, as the specification has it.
    async fn run_hooks(&self, point: Point, id: &str) {
        let Some(container) = self.containers.get(id) else { return };
        if let Err(error) = hooks::run(point, &container.spec, id, &container.bundle, self.vmm.pid()).await {
            tracing::warn!("{error}");
        }
    }

    fn state(&self, id: &str) -> Result<ContainerState, Error> {
        let found = self.summary.containers.iter().find(|container| container.id == id);
        found.map(|container| container.state).ok_or_else(|| Error::NoContainer(id.to_owned()))
    }

    fn expect(&self, id: &str, verb: &'static str, wanted: &[ContainerState]) -> Result<(), Error> {
        let state = self.state(id)?;
        if wanted.contains(&state) { Ok(()) } else { Err(Error::ContainerState { id: id.to_owned(), verb, state }) }
    }

    fn set_state(&mut self, id: &str, state: ContainerState) {
        if let Some(container) = self.summary.containers.iter_mut().find(|container| container.id == id) {
            container.state = state;
            self.record();
        }
    }

    fn record(&self) {
        // For others to see only: the driver's own state is here.
        if let Err(error) = self.summary.write() {
            tracing::warn!("cannot write sandbox.json: {error}");
        }
    }
}

/// Waits until the machine has ended.
pub(crate) async fn exit_of(exited: &mut watch::Receiver<Option<vmm::Exit>>) -> vmm::Exit {
    loop {
        if let Some(exit) = exited.borrow_and_update().clone() {
            return exit;
        }
        if exited.changed().await.is_err() {
            // The driver has stopped the machine itself; who still waits learns that there is nothing any more.
            return vmm::Exit { status: None, cause: Some("it was stopped".to_owned()), last_words: String::new() };
        }
    }
}

/// Why the agent hung up: the machine's end if that is what it was, told from the connection's own error.
pub(crate) async fn cause_of_loss(exited: &mut watch::Receiver<Option<vmm::Exit>>, error: ttrpc::Error) -> Error {
    match tokio::time::timeout(QUIT, exit_of(exited)).await {
        Ok(exit) => Error::Vmm(exit),
        Err(_) => Error::AgentLost(error),
    }
}
