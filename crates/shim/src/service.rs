//! The Task service: each request handed to the [`Engine`], in a task of its own so that it ends even if the caller
//! hangs up; each answer put into the engine's words.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
    ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim_async::{Task, create_task};
use protobuf::MessageField;
use tracing::{debug, warn};
use ttrpc::r#async::{Service, TtrpcContext};

use crate::engine::Engine;
use crate::fault::Fault;
use crate::time::timestamp;

/// The service under both of its names: version 3 (containerd 2) is version 2 renamed.
pub(crate) fn services(engine: &Arc<Engine>) -> HashMap<String, Service> {
    let service = || create_task(Arc::new(TaskService(Arc::clone(engine))) as Arc<_>);
    let version_2 = service().into_iter().map(|(name, service)| (name.replace(".v3.", ".v2."), service));
    service().into_iter().chain(version_2).collect()
}

struct TaskService(Arc<Engine>);

impl TaskService {
    fn engine(&self) -> Arc<Engine> {
        Arc::clone(&self.0)
    }
}

/// Runs an operation to its end, whatever becomes of the caller, and logs what it answers.
async fn run<T: Send + 'static>(
    request: &'static str,
    id: String,
    work: impl Future<Output = Result<T, Fault>> + Send + 'static,
) -> ttrpc::Result<T> {
    debug!(request, container = id, "Request");
    let task = tokio::spawn(work);
    let result = task.await.unwrap_or_else(|e| Err(Fault::internal(&e)));
    if let Err(fault) = &result {
        warn!(request, container = id, code = ?fault.code, error = fault.message, "Request failed");
    }
    Ok(result?)
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        Ok(self.0.state(&request.id, &request.exec_id)?)
    }

    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        let pid = run("Create", request.id.clone(), self.engine().create(request)).await?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let pid = run("Start", request.id.clone(), self.engine().start(request.id, request.exec_id)).await?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        run("Delete", request.id.clone(), self.engine().delete(request.id, request.exec_id)).await
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        self.0.check(&request.id)?;
        // The guest's processes have no pid here; what runs on this host is the machine.
        let machine = ProcessInfo { pid: self.0.pid(), ..Default::default() };
        Ok(PidsResponse { processes: vec![machine], ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        run("Pause", request.id.clone(), self.engine().pause(request.id, true)).await?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        run("Resume", request.id.clone(), self.engine().pause(request.id, false)).await?;
        Ok(Empty::default())
    }

    async fn checkpoint(&self, _: &TtrpcContext, request: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        let message = format!("Container {} cannot be checkpointed: Kata has no checkpoints", request.id);
        Err(Fault::unimplemented(message).into())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        run("Kill", request.id.clone(), self.engine().kill(request)).await?;
        Ok(Empty::default())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        run("Exec", request.id.clone(), self.engine().exec(request)).await?;
        Ok(Empty::default())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let (rows, columns) = (request.height, request.width);
        let work = self.engine().resize(request.id.clone(), request.exec_id, rows, columns);
        run("ResizePty", request.id, work).await?;
        Ok(Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        debug!(container = request.id, exec = request.exec_id, stdin = request.stdin, "CloseIO");
        if request.stdin {
            self.0.close_stdin(&request.id, &request.exec_id)?;
        }
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        run("Update", request.id.clone(), self.engine().update(request)).await?;
        Ok(Empty::default())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exit = self.engine().wait(request.id, request.exec_id).await?;
        let exited_at = timestamp(exit.at);
        Ok(WaitResponse { exit_status: exit.status, exited_at, ..Default::default() })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = run("Stats", request.id.clone(), self.engine().stats(request.id)).await?;
        Ok(StatsResponse { stats: MessageField::some(stats), ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        debug!(container = request.id, "Connect");
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.0.pid(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        self.0.shutdown(request.now);
        Ok(Empty::default())
    }
}
