//! The pod behind the seam: the `sandbox` crate, its errors put into codes an engine acts on.

use std::sync::Arc;

use async_trait::async_trait;
use config::Config;
use containerd_shim_protos::types::mount::Mount;
use oci_spec::runtime::{LinuxResources, Process};
use protocol::agent::StatsContainerResponse;
use sandbox::{ContainerSpec, Error, Sandbox, SandboxSpec};
use share::RootfsMount;
use ttrpc::Code;

use crate::chain::Chain;
use crate::fault::Fault;
use crate::pod::{Host, NewContainer, Pod, PodSpec};

/// The host with its machines.
pub(crate) fn host() -> Box<dyn Host> {
    Box::new(Machines)
}

/// Undoes the journal of a sandbox.
pub(crate) fn cleanup(id: &str) -> Result<(), Error> {
    sandbox::cleanup(id)
}

struct Machines;

#[async_trait]
impl Host for Machines {
    async fn start(&self, spec: PodSpec) -> Result<Arc<dyn Pod>, Fault> {
        let config = Config::load(spec.config_path.as_deref())
            .and_then(|config| config.with_annotations(&spec.annotations))
            .map_err(|error| Fault::invalid(Chain(&error).to_string()))?;
        let sandbox = Sandbox::start(SandboxSpec {
            id: spec.id,
            config,
            hostname: spec.shape.hostname,
            netns: spec.shape.netns,
            sandbox_pidns: spec.shape.shared_pidns,
            vcpus: spec.shape.vcpus,
            memory_mib: spec.shape.memory_mib,
            cgroups_path: spec.shape.cgroups_path,
        })
        .await
        .map_err(fault)?;
        Ok(Arc::new(Machine(sandbox)))
    }
}

struct Machine(Sandbox);

fn fault(error: Error) -> Fault {
    let code = match &error {
        Error::ContainerExists(_) => Code::ALREADY_EXISTS,
        Error::NoContainer(_) => Code::NOT_FOUND,
        Error::ContainerState { .. } => Code::FAILED_PRECONDITION,
        Error::Stopped | Error::Vmm(_) | Error::AgentLost(_) => Code::UNAVAILABLE,
        Error::Id(_) | Error::Wire(_) | Error::Json(_) | Error::Device(_) => Code::INVALID_ARGUMENT,
        // A refusal must stay one, whatever the guest says.
        Error::Agent { code: Code::OK, .. } => Code::UNKNOWN,
        Error::Agent { code, .. } => *code,
        _ => Code::UNKNOWN,
    };
    Fault::new(code, Chain(&error).to_string())
}

fn rootfs(mount: Mount) -> RootfsMount {
    RootfsMount { fs_type: mount.type_, source: mount.source, options: mount.options, target: mount.target }
}

#[async_trait]
impl Pod for Machine {
    fn vmm_pid(&self) -> u32 {
        self.0.vmm_pid()
    }

    async fn create_container(&self, container: NewContainer) -> Result<(), Fault> {
        let NewContainer { id, bundle, spec, rootfs: mounts } = container;
        let rootfs = mounts.into_iter().map(rootfs).collect();
        self.0.create_container(ContainerSpec { id, bundle, spec, rootfs }).await.map_err(fault)
    }

    async fn start_container(&self, id: &str) -> Result<(), Fault> {
        self.0.start_container(id).await.map_err(fault)
    }

    async fn exec(&self, id: &str, exec: &str, process: &Process) -> Result<(), Fault> {
        self.0.exec(id, exec, process).await.map_err(fault)
    }

    async fn signal(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<(), Fault> {
        self.0.signal(id, exec, signal, all).await.map_err(fault)
    }

    async fn wait(&self, id: &str, exec: &str) -> Result<i32, Fault> {
        self.0.wait(id, exec).await.map_err(fault)
    }

    async fn write_stdin(&self, id: &str, exec: &str, data: Vec<u8>) -> Result<u32, Fault> {
        self.0.write_stdin(id, exec, data).await.map_err(fault)
    }

    async fn read_stdout(&self, id: &str, exec: &str, len: u32) -> Result<Option<Vec<u8>>, Fault> {
        self.0.read_stdout(id, exec, len).await.map_err(fault)
    }

    async fn read_stderr(&self, id: &str, exec: &str, len: u32) -> Result<Option<Vec<u8>>, Fault> {
        self.0.read_stderr(id, exec, len).await.map_err(fault)
    }

    async fn close_stdin(&self, id: &str, exec: &str) -> Result<(), Fault> {
        self.0.close_stdin(id, exec).await.map_err(fault)
    }

    async fn resize(&self, id: &str, exec: &str, rows: u32, columns: u32) -> Result<(), Fault> {
        self.0.resize_tty(id, exec, rows, columns).await.map_err(fault)
    }

    async fn stats(&self, id: &str) -> Result<StatsContainerResponse, Fault> {
        self.0.stats(id).await.map_err(fault)
    }

    async fn pause(&self, id: &str) -> Result<(), Fault> {
        self.0.pause(id).await.map_err(fault)
    }

    async fn resume(&self, id: &str) -> Result<(), Fault> {
        self.0.resume(id).await.map_err(fault)
    }

    async fn update(&self, id: &str, resources: &LinuxResources) -> Result<(), Fault> {
        self.0.update(id, resources).await.map_err(fault)
    }

    async fn remove_container(&self, id: &str) -> Result<(), Fault> {
        self.0.remove_container(id).await.map_err(fault)
    }

    async fn next_oom(&self) -> Option<String> {
        self.0.next_oom().await
    }

    async fn gone(&self) -> String {
        self.0.vmm_exited().await.to_string()
    }

    async fn stop(&self) -> Result<(), Fault> {
        self.0.stop().await.map_err(fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_get_codes_they_act_on() {
        assert_eq!(fault(Error::NoContainer("c".into())).code, Code::NOT_FOUND);
        assert_eq!(fault(Error::ContainerExists("c".into())).code, Code::ALREADY_EXISTS);
        assert_eq!(fault(Error::Stopped).code, Code::UNAVAILABLE);
        let refused = |code| fault(Error::Agent { code, message: "no".into() }).code;
        assert_eq!(refused(Code::FAILED_PRECONDITION), Code::FAILED_PRECONDITION);
        assert_eq!(refused(Code::OK), Code::UNKNOWN);
    }
}
