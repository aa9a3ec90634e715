//! What the Task service needs of a pod: the seam between containerd's words and the `sandbox` crate.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::types::mount::Mount;
use oci_spec::runtime::{LinuxResources, Process, Spec};
use protocol::agent::StatsContainerResponse;

use crate::bundle::Shape;
use crate::fault::Fault;

/// A pod to be started.
#[derive(Debug, Clone)]
pub(crate) struct PodSpec {
    /// The sandbox's id.
    pub(crate) id: String,
    /// Its first container's wishes.
    pub(crate) shape: Shape,
    /// The configuration file the engine's own configuration names; never one that a pod names.
    pub(crate) config_path: Option<PathBuf>,
    /// The annotations of the pod.
    pub(crate) annotations: HashMap<String, String>,
}

/// A container to be created in a pod.
#[derive(Debug, Clone)]
pub(crate) struct NewContainer {
    /// Its id.
    pub(crate) id: String,
    /// Its bundle on the host.
    pub(crate) bundle: PathBuf,
    /// Its specification.
    pub(crate) spec: Spec,
    /// What its root file system is mounted from.
    pub(crate) rootfs: Vec<Mount>,
}

/// Starts pods.
#[async_trait]
pub(crate) trait Host: Send + Sync {
    /// Starts the machine of a pod; leaves nothing behind when it fails.
    async fn start(&self, spec: PodSpec) -> Result<Arc<dyn Pod>, Fault>;
}

/// A running pod. `exec` is empty for a container's first process.
#[async_trait]
pub(crate) trait Pod: Send + Sync {
    /// The process that is the machine.
    fn vmm_pid(&self) -> u32;
    /// Creates a container; its process waits to be started.
    async fn create_container(&self, container: NewContainer) -> Result<(), Fault>;
    /// Lets the container's process go.
    async fn start_container(&self, id: &str) -> Result<(), Fault>;
    /// Starts another process in a container.
    async fn exec(&self, id: &str, exec: &str, process: &Process) -> Result<(), Fault>;
    /// Sends a signal to a process, or to all of a container.
    async fn signal(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<(), Fault>;
    /// Waits for the end of a process; 128 + n for one killed by signal n.
    async fn wait(&self, id: &str, exec: &str) -> Result<i32, Fault>;
    /// Writes to a process's stdin; returns how much was taken.
    async fn write_stdin(&self, id: &str, exec: &str, data: Vec<u8>) -> Result<u32, Fault>;
    /// Reads at most `len` bytes of stdout; none at its end.
    async fn read_stdout(&self, id: &str, exec: &str, len: u32) -> Result<Option<Vec<u8>>, Fault>;
    /// Reads at most `len` bytes of stderr; none at its end.
    async fn read_stderr(&self, id: &str, exec: &str, len: u32) -> Result<Option<Vec<u8>>, Fault>;
    /// Ends a process's stdin.
    async fn close_stdin(&self, id: &str, exec: &str) -> Result<(), Fault>;
    /// Sets a terminal's size.
    async fn resize(&self, id: &str, exec: &str, rows: u32, columns: u32) -> Result<(), Fault>;
    /// Reads a container's statistics.
    async fn stats(&self, id: &str) -> Result<StatsContainerResponse, Fault>;
    /// Freezes a container.
    async fn pause(&self, id: &str) -> Result<(), Fault>;
    /// Thaws a container.
    async fn resume(&self, id: &str) -> Result<(), Fault>;
    /// Changes a container's limits.
    async fn update(&self, id: &str, resources: &LinuxResources) -> Result<(), Fault>;
    /// Removes a container that has ended or never started.
    async fn remove_container(&self, id: &str) -> Result<(), Fault>;
    /// Waits for the next container that ran out of memory; none when no more can come.
    async fn next_oom(&self) -> Option<String>;
    /// Waits until the machine is gone; what it said last.
    async fn gone(&self) -> String;
    /// Stops the machine and undoes all that was made for it. May be called again.
    async fn stop(&self) -> Result<(), Fault>;
}
