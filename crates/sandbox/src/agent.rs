//! The agent's client: one connection, requests with deadlines, silence told apart from refusal.

use std::path::Path;
use std::time::Duration;

use protocol::agent::{
    CloseStdinRequest, CreateContainerRequest, CreateSandboxRequest, ExecProcessRequest, GetOOMEventRequest,
    PauseContainerRequest, ReadStreamRequest, RemoveContainerRequest, ResumeContainerRequest, SetGuestDateTimeRequest,
    SignalProcessRequest, StartContainerRequest, StatsContainerRequest, StatsContainerResponse, TtyWinResizeRequest,
    UpdateContainerRequest, WaitProcessRequest, WriteStreamRequest,
};
use protocol::agent_ttrpc::AgentServiceClient;
use protocol::{AGENT_PORT, handshake, oci};
use tokio::net::UnixStream;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{self, Context};

use crate::Error;

/// Largest piece of a stream in one message; ttrpc messages hold 4 MiB.
pub(crate) const LARGEST_PIECE: u32 = 1 << 20;

/// How long the pieces of a dead connection take to say so, at most: nothing, they are local.
const CONNECT: Duration = Duration::from_secs(5);

/// A connection to the agent of one sandbox.
#[derive(Clone)]
pub(crate) struct Agent {
    client: AgentServiceClient,
    limit: Duration,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("limit", &self.limit).finish_non_exhaustive()
    }
}

impl Agent {
    /// Connects over the control channel's socket and waits until the agent answers, however long that takes: the
    /// caller has the deadline. `limit` is for each request that is not a wait.
    pub(crate) async fn connect(socket: &Path, limit: Duration) -> std::io::Result<Agent> {
        let mut stream = tokio::time::timeout(CONNECT, UnixStream::connect(socket)).await??;
        handshake::connect(&mut stream, AGENT_PORT).await?;
        Ok(Agent::over(stream, limit))
    }

    /// Speaks over a stream that leads to the agent already.
    pub(crate) fn over(stream: UnixStream, limit: Duration) -> Agent {
        let client = ttrpc::asynchronous::Client::new(Socket::new(stream));
        Agent { client: AgentServiceClient::new(client), limit }
    }

    fn soon(&self) -> Context {
        context::with_duration(self.limit)
    }

    pub(crate) async fn create_sandbox(&self, request: &CreateSandboxRequest) -> Result<(), Error> {
        self.client.create_sandbox(self.soon(), request).await.map(drop).map_err(refused)
    }

    pub(crate) async fn set_time(&self, since_epoch: Duration) -> Result<(), Error> {
        let request = SetGuestDateTimeRequest {
            Sec: i64::try_from(since_epoch.as_secs()).unwrap_or(i64::MAX),
            Usec: since_epoch.subsec_micros().into(),
            ..Default::default()
        };
        self.client.set_guest_date_time(self.soon(), &request).await.map(drop).map_err(refused)
    }

    pub(crate) async fn create_container(&self, request: &CreateContainerRequest) -> Result<(), Error> {
        self.client.create_container(self.soon(), request).await.map(drop).map_err(refused)
    }

    pub(crate) async fn start_container(&self, id: &str) -> Result<(), Error> {
        let request = StartContainerRequest { container_id: id.to_owned(), ..Default::default() };
        self.client.start_container(self.soon(), &request).await.map(drop).map_err(refused)
    }

    pub(crate) async fn remove_container(&self, id: &str) -> Result<(), Error> {
        let request = RemoveContainerRequest { container_id: id.to_owned(), ..Default::default() };
        self.client.remove_container(self.soon(), &request).await.map(drop).map_err(refused)
    }

    pub(crate) async fn exec(&self, id: &str, exec: &str, process: oci::Process) -> Result<(), Error> {
        let request = ExecProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            process: Some(process).into(),
            ..Default::default()
        };
        self.client.exec_process(self.soon(), &request).await.map(drop).map_err(refused)
    }

    pub(crate) async fn signal(&self, id: &str, exec: &str, signal: u32) -> Result<(), Error> {
        let request = SignalProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            signal,
            ..Default::default()
        };
        self.client.signal_process(self.soon(), &request).await.map(drop).map_err(refused)
    }

    pub(crate) async fn wait(&self, id: &str, exec: &str) -> Result<i32, Error> {
        let request =
            WaitProcessRequest { container_id: id.to_owned(), exec_id: exec.to_owned(), ..Default::default() };
        Ok(self.client.wait_process(no_limit(), &request).await.map_err(refused)?.status)
    }

    pub(crate) async fn write(&self, id: &str, exec: &str, data: Vec<u8>) -> Result<u32, Error> {
        let request =
            WriteStreamRequest { container_id: id.to_owned(), exec_id: exec.to_owned(), data, ..Default::default() };
        Ok(self.client.write_stdin(no_limit(), &request).await.map_err(refused)?.len)
    }

    /// Output of a process; nothing at its end, which the agent answers with an error status.
    pub(crate) async fn read(&self, id: &str, exec: &str, len: u32, stderr: bool) -> Result<Option<Vec<u8>>, Error> {
        let request = ReadStreamRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            len: len.min(LARGEST_PIECE),
            ..Default::default()
        };
        let answer = if stderr {
            self.client.read_stderr(no_limit(), &request).await
        } else {
            self.client.read_stdout(no_limit(), &request).await
        };
        match answer {
            Ok(answer) if answer.data.is_empty() => Ok(None),
            Ok(answer) => Ok(Some(answer.data)),
            Err(ttrpc::Error::RpcStatus(_)) => Ok(None),
            Err(error) => Err(refused(error)),
        }
    }

    pub(crate) async fn close_stdin(&self, id: &str, exec: &str) -> Result<(), Error> {
        let request = CloseStdinRequest { container_id: id.to_owned(), exec_id: exec.to_owned(), ..Default::default() };
        self.client.close_stdin(self.soon(), &request).await.map(drop).map_err(refused)
    }

    pub(crate) async fn resize(&self, id: &str, exec: &str, rows: u32, columns: u32) -> Result<(), Error> {
        let request = TtyWinResizeRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            row: rows,
            column: columns,
            ..Default::default()
        };
        self.client.tty_win_resize(self.soon(), &request).await.map(drop).map_err(refused)
    }

    pub(crate) async fn stats(&self, id: &str) -> Result<StatsContainerResponse, Error> {
        let request = StatsContainerRequest { container_id: id.to_owned(), ..Default::default() };
        self.client.stats_container(self.soon(), &request).await.map_err(refused)
    }

    pub(crate) async fn pause(&self, id: &str) -> Result<(), Error> {
        let request = PauseContainerRequest { container_id: id.to_owned(), ..Default::default() };
        self.client.pause_container(self.soon(), &request).await.map(drop).map_err(refused)
    }

    pub(crate) async fn resume(&self, id: &str) -> Result<(), Error> {
        let request = ResumeContainerRequest { container_id: id.to_owned(), ..Default::default() };
        self.client.resume_container(self.soon(), &request).await.map(drop).map_err(refused)
    }

    pub(crate) async fn update(&self, id: &str, resources: oci::LinuxResources) -> Result<(), Error> {
        let request = UpdateContainerRequest {
            container_id: id.to_owned(),
            resources: Some(resources).into(),
            ..Default::default()
        };
        self.client.update_container(self.soon(), &request).await.map(drop).map_err(refused)
    }

    /// The next container that the guest's kernel killed a process of for want of memory.
    pub(crate) async fn next_oom(&self) -> Result<String, Error> {
        let request = GetOOMEventRequest::new();
        Ok(self.client.get_oom_event(no_limit(), &request).await.map_err(refused)?.container_id)
    }
}

fn no_limit() -> Context {
    context::with_timeout(0)
}

fn refused(error: ttrpc::Error) -> Error {
    match error {
        ttrpc::Error::RpcStatus(status) => Error::Agent { code: status.code(), message: status.message().to_owned() },
        other => Error::AgentLost(other),
    }
}
