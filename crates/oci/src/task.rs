//! The Task service of a shim, as its client.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use containerd_shim_protos::api::{
    CloseIORequest, CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest, ResizePtyRequest,
    ShutdownRequest, StartRequest, WaitRequest,
};
use containerd_shim_protos::shim_async::{Client, TaskClient};
use protobuf::well_known_types::any::Any;
use ttrpc::context;

use crate::stdio::Streams;
use crate::{Error, server};

/// The namespace of containers started by hand, beside those of containerd (`default`, `k8s.io`, `moby`).
const NAMESPACE: &str = "kata";

/// The program's name under which it is a shim.
const SHIM: &str = "containerd-shim-kata-v2";

/// How long a shim may take for anything but a start or a wait.
const SOON: Duration = Duration::from_secs(30);

/// A connection to one shim, for one container.
#[derive(Clone)]
pub(crate) struct Task {
    client: TaskClient,
    id: String,
}

impl std::fmt::Debug for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Task").field("id", &self.id).finish_non_exhaustive()
    }
}

/// Starts a shim for the bundle, as containerd would, and returns its address.
pub(crate) fn start_shim(id: &str, bundle: &Path) -> Result<String, Error> {
    let output = Command::new("/proc/self/exe")
        .arg0(SHIM)
        .args(["-namespace", NAMESPACE, "-id", id, "-address", "", "start"])
        .current_dir(bundle)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Error::Own("run the shim", error))?;
    if !output.status.success() {
        return Err(Error::Shim(words(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// What a shim says on its way out, without its name.
fn words(stderr: &[u8]) -> String {
    let words = String::from_utf8_lossy(stderr);
    words.trim().trim_start_matches("containerd-shim-kata-v2: ").to_owned()
}

/// Has a shim's `delete` clean up after a crash, as containerd would.
pub(crate) fn delete_shim(id: &str, bundle: &Path) -> Result<(), Error> {
    let output = Command::new("/proc/self/exe")
        .arg0(SHIM)
        .args(["-namespace", NAMESPACE, "-id", id, "-address", "", "-bundle"])
        .arg(bundle)
        .arg("delete")
        .current_dir(if bundle.is_dir() { bundle } else { Path::new("/") })
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Error::Own("run the shim", error))?;
    if output.status.success() { Ok(()) } else { Err(Error::Leftovers(id.to_owned(), words(&output.stderr))) }
}

impl Task {
    /// Connects to the shim at `address` for the container `id`.
    pub(crate) async fn connect(address: &str, id: &str) -> Result<Task, Error> {
        let client =
            Client::connect(address).await.map_err(|source| Error::Unreachable { name: id.to_owned(), source })?;
        Ok(Task { client: TaskClient::new(client), id: id.to_owned() })
    }

    /// Connects to the shim that serves a sandbox.
    pub(crate) async fn of_sandbox(sandbox: &str, id: &str) -> Result<Task, Error> {
        let path = server::dir(sandbox).join("shim.address");
        let address = std::fs::read_to_string(&path).map_err(Error::file("read", path))?;
        Task::connect(address.trim(), id).await
    }

    /// Creates the container, which boots the virtual machine: as long as it takes, the shim has deadlines of its own.
    pub(crate) async fn create(&self, bundle: &Path, streams: &Streams) -> Result<(), Error> {
        let request = CreateTaskRequest {
            id: self.id.clone(),
            bundle: bundle.display().to_string(),
            terminal: streams.terminal,
            stdin: streams.stdin(),
            stdout: streams.stdout(),
            stderr: streams.stderr(),
            ..Default::default()
        };
        self.client.create(no_limit(), &request).await.map_err(Error::from_reply)?;
        Ok(())
    }

    /// Adds a process; `process` is the OCI process as JSON.
    pub(crate) async fn add(&self, exec: &str, process: String, streams: &Streams) -> Result<(), Error> {
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
            value: process.into_bytes(),
            ..Default::default()
        };
        let request = ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec.to_owned(),
            terminal: streams.terminal,
            stdin: streams.stdin(),
            stdout: streams.stdout(),
            stderr: streams.stderr(),
            spec: Some(spec).into(),
            ..Default::default()
        };
        self.client.exec(soon(), &request).await.map_err(Error::from_reply)?;
        Ok(())
    }

    /// Starts the container's command, or an added process.
    pub(crate) async fn start(&self, exec: &str) -> Result<(), Error> {
        let request = StartRequest { id: self.id.clone(), exec_id: exec.to_owned(), ..Default::default() };
        self.client.start(soon(), &request).await.map_err(Error::from_reply)?;
        Ok(())
    }

    /// Waits for the end and returns the exit status.
    pub(crate) async fn wait(&self, exec: &str) -> Result<u32, Error> {
        let request = WaitRequest { id: self.id.clone(), exec_id: exec.to_owned(), ..Default::default() };
        Ok(self.client.wait(no_limit(), &request).await.map_err(Error::from_reply)?.exit_status)
    }

    /// Sends a signal; with `all`, to every process of the container.
    pub(crate) async fn kill(&self, exec: &str, signal: u32, all: bool) -> Result<(), Error> {
        let request = KillRequest { id: self.id.clone(), exec_id: exec.to_owned(), signal, all, ..Default::default() };
        self.client.kill(soon(), &request).await.map_err(Error::from_reply)?;
        Ok(())
    }

    /// Tells the terminal its size.
    pub(crate) async fn resize(&self, exec: &str, columns: u16, rows: u16) -> Result<(), Error> {
        let request = ResizePtyRequest {
            id: self.id.clone(),
            exec_id: exec.to_owned(),
            width: columns.into(),
            height: rows.into(),
            ..Default::default()
        };
        self.client.resize_pty(soon(), &request).await.map_err(Error::from_reply)?;
        Ok(())
    }

    /// Says that standard input has ended.
    pub(crate) async fn close_stdin(&self, exec: &str) -> Result<(), Error> {
        let request =
            CloseIORequest { id: self.id.clone(), exec_id: exec.to_owned(), stdin: true, ..Default::default() };
        self.client.close_io(soon(), &request).await.map_err(Error::from_reply)?;
        Ok(())
    }

    /// Deletes the container, or an added process, once it has ended.
    pub(crate) async fn delete(&self, exec: &str) -> Result<(), Error> {
        let request = DeleteRequest { id: self.id.clone(), exec_id: exec.to_owned(), ..Default::default() };
        self.client.delete(soon(), &request).await.map_err(Error::from_reply)?;
        Ok(())
    }

    /// Ends the shim if it has no container left, or `now` whatever it has.
    pub(crate) async fn shutdown(&self, now: bool) {
        let request = ShutdownRequest { id: self.id.clone(), now, ..Default::default() };
        // It may hang up before it answers.
        drop(self.client.shutdown(soon(), &request).await);
    }
}

fn soon() -> context::Context {
    context::with_duration(SOON)
}

fn no_limit() -> context::Context {
    context::with_timeout(0)
}
