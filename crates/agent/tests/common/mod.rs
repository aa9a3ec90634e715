//! An agent of its own for each test: a process in a mount namespace of its own, reached over an abstract socket.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use protocol::agent::*;
use protocol::agent_ttrpc::AgentServiceClient;
use protocol::health_ttrpc::HealthClient;
use protocol::oci;
use ttrpc::Code;
use ttrpc::r#async::Client;
use ttrpc::context::{self, Context};

/// Long enough for a busy machine; nothing here waits for it to pass.
const PATIENCE: Duration = Duration::from_secs(60);

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A running agent, with a root directory for containers. Dropping it ends and removes everything.
pub(crate) struct Agent {
    process: Child,
    pub(crate) services: AgentServiceClient,
    pub(crate) health: HealthClient,
    pub(crate) files: tempfile::TempDir,
    name: String,
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        // The group above those of the containers, in each hierarchy (or in the only one).
        let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(&self.name));
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let _ = fs::remove_dir(hierarchy.path().join(&self.name));
        }
    }
}

pub(crate) fn patience() -> Context {
    context::with_duration(PATIENCE)
}

/// The code of a failure.
pub(crate) fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> Code {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => status.code.unwrap(),
        other => panic!("Expected a status, got {other}"),
    }
}

/// The message of a failure.
pub(crate) fn message<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> String {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => status.message,
        other => panic!("Expected a status, got {other}"),
    }
}

impl Agent {
    /// Starts an agent without a sandbox.
    pub(crate) async fn bare() -> Self {
        let name = format!("kata-agent-test-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let address = format!("unix://@{name}");
        fs::create_dir_all("/run/kata-containers").unwrap();
        let process = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "--kill-child", "sh", "-c"])
            .arg("mount -t tmpfs none /run/kata-containers && exec \"$0\"")
            .arg(env!("CARGO_BIN_EXE_kata-agent"))
            .env("KATA_AGENT_SERVER_ADDR", &address)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + PATIENCE;
        let client = loop {
            match Client::connect(&address).await {
                Ok(client) => break client,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        let files = tempfile::tempdir().unwrap();
        make_root(&files.path().join("rootfs"));
        Self {
            process,
            services: AgentServiceClient::new(client.clone()),
            health: HealthClient::new(client),
            files,
            name,
        }
    }

    /// Starts an agent and creates a sandbox.
    pub(crate) async fn start() -> Self {
        let agent = Self::bare().await;
        agent.create_sandbox().await.unwrap();
        agent
    }

    pub(crate) async fn create_sandbox(&self) -> ttrpc::Result<()> {
        let request = CreateSandboxRequest {
            hostname: "pod".to_owned(),
            sandbox_id: "sandbox".to_owned(),
            dns: vec!["nameserver 192.0.2.1".to_owned()],
            ..Default::default()
        };
        self.services.create_sandbox(patience(), &request).await.map(drop)
    }

    /// What a container is made of that runs `script` in a shell.
    pub(crate) fn spec(&self, id: &str, script: &str) -> oci::Spec {
        let namespace = |kind: &str| oci::LinuxNamespace { Type: kind.to_owned(), ..Default::default() };
        let mount = |destination: &str, kind: &str| oci::Mount {
            destination: destination.to_owned(),
            source: kind.to_owned(),
            type_: kind.to_owned(),
            options: vec!["nosuid".to_owned()],
            ..Default::default()
        };
        oci::Spec {
            Version: "1.1.0".to_owned(),
            Root: Some(oci::Root {
                Path: self.files.path().join("rootfs").display().to_string(),
                ..Default::default()
            })
            .into(),
            Process: Some(process(script)).into(),
            Mounts: vec![mount("/proc", "proc"), mount("/dev", "tmpfs"), mount("/dev/pts", "devpts")],
            Linux: Some(oci::Linux {
                Namespaces: ["pid", "ipc", "uts", "mount"].into_iter().map(namespace).collect(),
                CgroupsPath: format!("/{}/{id}", self.name),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        }
    }

    pub(crate) async fn create(&self, id: &str, spec: oci::Spec) -> ttrpc::Result<()> {
        let request =
            CreateContainerRequest { container_id: id.to_owned(), OCI: Some(spec).into(), ..Default::default() };
        self.services.create_container(patience(), &request).await.map(drop)
    }

    pub(crate) async fn start_container(&self, id: &str) -> ttrpc::Result<()> {
        let request = StartContainerRequest { container_id: id.to_owned(), ..Default::default() };
        self.services.start_container(patience(), &request).await.map(drop)
    }

    /// Creates and starts a container that runs `script`.
    pub(crate) async fn run(&self, id: &str, script: &str) {
        self.create(id, self.spec(id, script)).await.unwrap();
        self.start_container(id).await.unwrap();
    }

    pub(crate) async fn exec(&self, id: &str, exec_id: &str, process: oci::Process) -> ttrpc::Result<()> {
        let request = ExecProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            process: Some(process).into(),
            ..Default::default()
        };
        self.services.exec_process(patience(), &request).await.map(drop)
    }

    pub(crate) async fn wait(&self, id: &str, exec_id: &str) -> ttrpc::Result<i32> {
        let request =
            WaitProcessRequest { container_id: id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() };
        self.services.wait_process(patience(), &request).await.map(|response| response.status)
    }

    pub(crate) async fn signal(&self, id: &str, exec_id: &str, signal: i32) -> ttrpc::Result<()> {
        let request = SignalProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal: signal.cast_unsigned(),
            ..Default::default()
        };
        self.services.signal_process(patience(), &request).await.map(drop)
    }

    pub(crate) async fn remove(&self, id: &str) -> ttrpc::Result<()> {
        let request = RemoveContainerRequest { container_id: id.to_owned(), ..Default::default() };
        self.services.remove_container(patience(), &request).await.map(drop)
    }

    pub(crate) async fn read(&self, id: &str, exec_id: &str, len: u32) -> ttrpc::Result<Vec<u8>> {
        let request =
            ReadStreamRequest { container_id: id.to_owned(), exec_id: exec_id.to_owned(), len, ..Default::default() };
        self.services.read_stdout(patience(), &request).await.map(|response| response.data)
    }

    pub(crate) async fn read_stderr(&self, id: &str, exec_id: &str) -> String {
        let request = ReadStreamRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            len: 4096,
            ..Default::default()
        };
        let mut all = Vec::new();
        while let Ok(response) = self.services.read_stderr(patience(), &request).await {
            all.extend_from_slice(&response.data);
        }
        String::from_utf8(all).unwrap()
    }

    /// Everything that the process writes until its end.
    pub(crate) async fn output(&self, id: &str, exec_id: &str) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            match self.read(id, exec_id, 1 << 20).await {
                Ok(data) => all.extend_from_slice(&data),
                Err(error) => {
                    assert_eq!(code::<()>(Err(error)), Code::OUT_OF_RANGE);
                    return all;
                }
            }
        }
    }

    pub(crate) async fn text(&self, id: &str, exec_id: &str) -> String {
        String::from_utf8(self.output(id, exec_id).await).unwrap()
    }

    pub(crate) async fn write(&self, id: &str, exec_id: &str, data: &[u8]) -> ttrpc::Result<u32> {
        let request = WriteStreamRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            data: data.to_vec(),
            ..Default::default()
        };
        self.services.write_stdin(patience(), &request).await.map(|response| response.len)
    }

    pub(crate) async fn close_stdin(&self, id: &str, exec_id: &str) {
        let request =
            CloseStdinRequest { container_id: id.to_owned(), exec_id: exec_id.to_owned(), ..Default::default() };
        self.services.close_stdin(patience(), &request).await.unwrap();
    }
}

/// A process that runs `script` in a shell.
pub(crate) fn process(script: &str) -> oci::Process {
    oci::Process {
        Args: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        Env: vec!["PATH=/bin".to_owned()],
        Cwd: "/".to_owned(),
        User: Some(oci::User::default()).into(),
        ..Default::default()
    }
}

/// A root directory that holds busybox and its names.
fn make_root(root: &Path) {
    for directory in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    let busybox = root.join("bin/busybox");
    fs::copy("/bin/busybox", &busybox).unwrap();
    fs::set_permissions(&busybox, fs::Permissions::from_mode(0o755)).unwrap();
    for name in ["sh", "cat", "sleep", "head", "hostname", "stty", "kill", "id", "dd", "true", "tr", "ps"] {
        symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/sh\nweb:x:33:44::/:/bin/sh\n").unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\nweb:x:44:\nlog:x:55:\n").unwrap();
}
