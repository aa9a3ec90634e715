//! Joins the container core and its control group to the services.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use protocol::agent::StatsContainerResponse;
use protocol::oci::{LinuxResources, Process, Spec};
use tokio::sync::mpsc;
use ttrpc::Code;

use super::status::{Failure, because, chain};
use crate::cgroup::{self, Cgroup, Join};
use crate::container::{self, CgroupEntry, Container, CreateArgs, ExecArgs, Filter};
use crate::process::Started;
use crate::sandbox::Shared;
use crate::seccomp;

/// A container's body.
#[derive(Debug)]
pub(super) struct Core {
    container: Container,
    group: Arc<Group>,
}

/// A container's control group.
#[derive(Debug)]
pub(super) struct Group {
    cgroup: Cgroup,
    join: Join,
}

/// What relative paths of a configuration are relative to: in a guest there is no bundle.
const BUNDLE: &str = "/";

fn container_failure(error: &container::Error) -> Failure {
    use container::Error;
    let code = match error {
        Error::Invalid(_) => Code::INVALID_ARGUMENT,
        Error::Unsupported(_) => Code::UNIMPLEMENTED,
        Error::State { .. } => Code::FAILED_PRECONDITION,
        Error::Step { source, .. } if source.kind() == std::io::ErrorKind::NotFound => Code::NOT_FOUND,
        _ => Code::INTERNAL,
    };
    because(code, error)
}

fn started(process: container::Process) -> Started {
    let io = process.io;
    Started {
        pid: process.pid,
        pidfd: process.pidfd,
        terminal: io.terminal,
        stdin: io.stdin,
        stdout: io.stdout,
        stderr: io.stderr,
    }
}

impl Core {
    /// Makes the container, up to the point where its program is about to run.
    pub(super) fn create(
        id: &str,
        spec: &Spec,
        shared: Option<&Shared>,
    ) -> Result<(Self, Arc<Group>, Started), Failure> {
        let seccomp = spec
            .Linux
            .Seccomp
            .as_ref()
            .map(seccomp::compile)
            .transpose()
            .map_err(|error| because(Code::INVALID_ARGUMENT, &error))?
            .map(|program| Filter { instructions: program.instructions, flags: program.flags });
        let group = Arc::new(Group::make(id, spec)?);
        let created = Container::create(CreateArgs {
            id,
            spec,
            bundle_dir: Path::new(BUNDLE),
            cgroup: group.entry(),
            shared: shared.map(Shared::borrow).unwrap_or_default(),
            seccomp,
            pipe_capacity: None,
        });
        match created {
            Ok((container, process)) => Ok((Self { container, group: group.clone() }, group, started(process))),
            Err(error) => {
                group.clean_up();
                Err(container_failure(&error))
            }
        }
    }

    /// Its root directory, as the agent sees it.
    pub(super) fn root(&self) -> &Path {
        self.container.root()
    }

    /// Runs its program.
    pub(super) fn start(&mut self) -> Result<(), Failure> {
        self.container.start().map_err(|error| container_failure(&error))
    }

    /// Runs a further process.
    pub(super) fn exec(&self, process: &Process) -> Result<Started, Failure> {
        let arguments = ExecArgs { cgroup: self.group.entry(), pipe_capacity: None };
        self.container.exec(process, arguments).map(started).map_err(|error| container_failure(&error))
    }

    /// What is to be done when its processes are gone.
    pub(super) fn delete(&self) {
        self.container.run_poststop_hooks();
    }
}

impl Group {
    fn make(id: &str, spec: &Spec) -> Result<Self, Failure> {
        let cgroup = Cgroup::create(&spec.Linux.CgroupsPath, id, &spec.Linux.Resources)
            .map_err(|error| cgroup_failure(&error))?;
        let join = cgroup.join().inspect_err(|_| drop(cgroup.delete())).map_err(|error| cgroup_failure(&error))?;
        Ok(Self { cgroup, join })
    }

    fn entry(&self) -> CgroupEntry<'_> {
        CgroupEntry { v2: self.join.v2_fd.as_ref().map(AsFd::as_fd), procs_files: &self.join.procs_files }
    }

    /// Kills all processes, frozen ones too.
    pub(super) fn kill(&self) -> Result<(), Failure> {
        self.cgroup.kill_all().map_err(|error| cgroup_failure(&error))
    }

    /// Waits until no process is left, and removes it. Blocks.
    pub(super) fn remove(&self) -> Result<(), Failure> {
        let removed = self.cgroup.wait_empty().and_then(|()| self.cgroup.delete());
        removed.map_err(|error| cgroup_failure(&error))
    }

    /// Removes it after a failure that is already being reported.
    pub(super) fn clean_up(&self) {
        if let Err(error) =
            self.cgroup.kill_all().and_then(|()| self.cgroup.wait_empty()).and_then(|()| self.cgroup.delete())
        {
            tracing::warn!("{}", chain(&error));
        }
    }

    /// Puts the container's name into the queue each time the kernel has killed one of its processes for memory.
    pub(super) fn watch_oom(&self, id: &str, queue: &mpsc::Sender<String>) {
        let mut events = match self.cgroup.oom_events() {
            Ok(events) => events,
            Err(error) => {
                tracing::info!(id, "{}", chain(&error));
                return;
            }
        };
        let (id, queue) = (id.to_owned(), queue.clone());
        tokio::spawn(async move {
            while events.next().await.is_some() {
                // A full queue holds enough news already.
                let _ = queue.try_send(id.clone());
            }
        });
    }

    pub(super) fn freeze(&self) -> Result<(), Failure> {
        self.cgroup.freeze().map_err(|error| cgroup_failure(&error))
    }

    pub(super) fn thaw(&self) -> Result<(), Failure> {
        self.cgroup.thaw().map_err(|error| cgroup_failure(&error))
    }

    pub(super) fn apply(&self, resources: &LinuxResources) -> Result<(), Failure> {
        self.cgroup.apply(resources).map_err(|error| cgroup_failure(&error))
    }

    pub(super) fn stats(&self) -> Result<StatsContainerResponse, Failure> {
        let stats = self.cgroup.stats().map_err(|error| cgroup_failure(&error))?;
        Ok(StatsContainerResponse {
            cgroup_stats: Some(stats).into(),
            cgroup_version: self.cgroup.version().number().into(),
            ..Default::default()
        })
    }
}

fn cgroup_failure(error: &cgroup::Error) -> Failure {
    let code = match error {
        cgroup::Error::Unsupported(..) => Code::UNIMPLEMENTED,
        cgroup::Error::Set { .. } => Code::INVALID_ARGUMENT,
        cgroup::Error::Late { .. } => Code::DEADLINE_EXCEEDED,
        cgroup::Error::Group { .. } | cgroup::Error::Devices { .. } => Code::INTERNAL,
    };
    because(code, error)
}
