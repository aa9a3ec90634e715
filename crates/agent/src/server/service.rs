//! The services' methods, in the order of the protocol.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use protocol::agent::*;
use protocol::agent_ttrpc::AgentService;
use protocol::csi::VolumeStatsResponse;
use protocol::empty::Empty;
use protocol::health::health_check_response::ServingStatus;
use protocol::health::{CheckRequest, HealthCheckResponse, VersionCheckResponse};
use protocol::health_ttrpc::Health;
use protocol::types::Interface;
use ttrpc::Code;
use ttrpc::r#async::TtrpcContext;

use super::status::{because, failure, internal};
use super::{Agent, copy_file, guest, io};

/// The version of the protocol (the `grpc_version` of upstream's agent).
const PROTOCOL_VERSION: &str = "0.0.1";

/// Answers for [`Agent`].
#[derive(Debug)]
pub(super) struct Service {
    agent: Arc<Agent>,
}

impl Service {
    pub(super) fn new(agent: Arc<Agent>) -> Self {
        Self { agent }
    }
}

/// Finishes work even if the caller hangs up or loses patience: half a container is worse than one nobody waits for.
async fn finish<T: Send + 'static>(work: impl Future<Output = ttrpc::Result<T>> + Send + 'static) -> ttrpc::Result<T> {
    tokio::spawn(work).await.map_err(internal)?
}

/// A call that this agent does not have says its own name.
fn not_here<T>(name: &str) -> ttrpc::Result<T> {
    Err(failure(Code::UNIMPLEMENTED, format!("{name} is not implemented")))
}

#[async_trait]
impl AgentService for Service {
    async fn create_container(&self, _: &TtrpcContext, request: CreateContainerRequest) -> ttrpc::Result<Empty> {
        let agent = self.agent.clone();
        finish(async move { agent.create_container(request).await }).await?;
        Ok(Empty::new())
    }

    async fn start_container(&self, _: &TtrpcContext, request: StartContainerRequest) -> ttrpc::Result<Empty> {
        let agent = self.agent.clone();
        finish(async move { agent.start_container(&request.container_id).await }).await?;
        Ok(Empty::new())
    }

    async fn remove_container(&self, _: &TtrpcContext, request: RemoveContainerRequest) -> ttrpc::Result<Empty> {
        let agent = self.agent.clone();
        finish(async move { agent.remove_container(&request.container_id, request.timeout).await }).await?;
        Ok(Empty::new())
    }

    async fn exec_process(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let agent = self.agent.clone();
        finish(async move { agent.exec_process(request).await }).await?;
        Ok(Empty::new())
    }

    async fn signal_process(&self, _: &TtrpcContext, request: SignalProcessRequest) -> ttrpc::Result<Empty> {
        let agent = self.agent.clone();
        finish(async move { agent.signal_process(&request).await }).await?;
        Ok(Empty::new())
    }

    async fn wait_process(&self, _: &TtrpcContext, request: WaitProcessRequest) -> ttrpc::Result<WaitProcessResponse> {
        let process = self.agent.process(&request.container_id, &request.exec_id)?;
        let status = process.wait().await;
        Ok(WaitProcessResponse { status, ..Default::default() })
    }

    async fn update_container(&self, _: &TtrpcContext, request: UpdateContainerRequest) -> ttrpc::Result<Empty> {
        let agent = self.agent.clone();
        finish(async move { agent.update_container(request).await }).await?;
        Ok(Empty::new())
    }

    async fn stats_container(
        &self,
        _: &TtrpcContext,
        request: StatsContainerRequest,
    ) -> ttrpc::Result<StatsContainerResponse> {
        let mut response = self.agent.stats_container(&request.container_id).await?;
        response.network_stats = guest::network_stats();
        Ok(response)
    }

    async fn pause_container(&self, _: &TtrpcContext, request: PauseContainerRequest) -> ttrpc::Result<Empty> {
        let agent = self.agent.clone();
        finish(async move { agent.pause_container(&request.container_id).await }).await?;
        Ok(Empty::new())
    }

    async fn resume_container(&self, _: &TtrpcContext, request: ResumeContainerRequest) -> ttrpc::Result<Empty> {
        let agent = self.agent.clone();
        finish(async move { agent.resume_container(&request.container_id).await }).await?;
        Ok(Empty::new())
    }

    async fn write_stdin(&self, _: &TtrpcContext, request: WriteStreamRequest) -> ttrpc::Result<WriteStreamResponse> {
        let process = self.agent.process(&request.container_id, &request.exec_id)?;
        let taken = process.stdin().write(&request.data).await.map_err(|error| io::write_failure(&error))?;
        let len = u32::try_from(taken).map_err(internal)?;
        Ok(WriteStreamResponse { len, ..Default::default() })
    }

    async fn read_stdout(&self, _: &TtrpcContext, request: ReadStreamRequest) -> ttrpc::Result<ReadStreamResponse> {
        let process = self.agent.process(&request.container_id, &request.exec_id)?;
        io::read_response(process.read_stdout(io::length(&request)).await)
    }

    async fn read_stderr(&self, _: &TtrpcContext, request: ReadStreamRequest) -> ttrpc::Result<ReadStreamResponse> {
        let process = self.agent.process(&request.container_id, &request.exec_id)?;
        io::read_response(process.read_stderr(io::length(&request)).await)
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: CloseStdinRequest) -> ttrpc::Result<Empty> {
        let process = self.agent.process(&request.container_id, &request.exec_id)?;
        finish(async move {
            process.close_stdin().await;
            Ok(())
        })
        .await?;
        Ok(Empty::new())
    }

    async fn tty_win_resize(&self, _: &TtrpcContext, request: TtyWinResizeRequest) -> ttrpc::Result<Empty> {
        let process = self.agent.process(&request.container_id, &request.exec_id)?;
        io::resize(&process, &request)?;
        Ok(Empty::new())
    }

    async fn create_sandbox(&self, _: &TtrpcContext, request: CreateSandboxRequest) -> ttrpc::Result<Empty> {
        let agent = self.agent.clone();
        finish(async move { agent.create_sandbox(request).await }).await?;
        Ok(Empty::new())
    }

    async fn destroy_sandbox(&self, _: &TtrpcContext, _: DestroySandboxRequest) -> ttrpc::Result<Empty> {
        let agent = self.agent.clone();
        finish(async move { agent.destroy_sandbox().await }).await?;
        Ok(Empty::new())
    }

    async fn online_cpu_mem(&self, _: &TtrpcContext, request: OnlineCPUMemRequest) -> ttrpc::Result<Empty> {
        guest::online(request).await?;
        Ok(Empty::new())
    }

    async fn reseed_random_dev(&self, _: &TtrpcContext, request: ReseedRandomDevRequest) -> ttrpc::Result<Empty> {
        guest::reseed(&request)?;
        Ok(Empty::new())
    }

    async fn get_guest_details(
        &self,
        _: &TtrpcContext,
        request: GuestDetailsRequest,
    ) -> ttrpc::Result<GuestDetailsResponse> {
        Ok(guest::details(&request))
    }

    async fn set_guest_date_time(&self, _: &TtrpcContext, request: SetGuestDateTimeRequest) -> ttrpc::Result<Empty> {
        guest::set_time(&request)?;
        Ok(Empty::new())
    }

    async fn copy_file(&self, _: &TtrpcContext, request: CopyFileRequest) -> ttrpc::Result<Empty> {
        self.agent.ready().await;
        let root = Path::new(protocol::SHARE_GUEST_DIR);
        let copied = tokio::task::spawn_blocking(move || {
            copy_file::make_root(root).map_err(|error| because(Code::INTERNAL, &error))?;
            copy_file::copy(root, &request).map_err(|error| copy_failure(&error))
        });
        copied.await.map_err(internal)??;
        Ok(Empty::new())
    }

    async fn get_oom_event(&self, _: &TtrpcContext, _: GetOOMEventRequest) -> ttrpc::Result<OOMEvent> {
        let mut events = self.agent.oom_events.lock().await;
        match events.recv().await {
            Some(container_id) => Ok(OOMEvent { container_id, ..Default::default() }),
            None => Err(failure(Code::UNAVAILABLE, "The agent is ending")),
        }
    }

    async fn update_ephemeral_mounts(&self, _: &TtrpcContext, _: UpdateEphemeralMountsRequest) -> ttrpc::Result<Empty> {
        not_here("UpdateEphemeralMounts")
    }

    async fn remove_stale_virtiofs_share_mounts(
        &self,
        _: &TtrpcContext,
        _: RemoveStaleVirtiofsShareMountsRequest,
    ) -> ttrpc::Result<Empty> {
        not_here("RemoveStaleVirtiofsShareMounts")
    }

    async fn get_diagnostic_data(
        &self,
        _: &TtrpcContext,
        _: GetDiagnosticDataRequest,
    ) -> ttrpc::Result<GetDiagnosticDataResponse> {
        not_here("GetDiagnosticData")
    }

    async fn update_interface(&self, _: &TtrpcContext, _: UpdateInterfaceRequest) -> ttrpc::Result<Interface> {
        not_here("UpdateInterface")
    }

    async fn update_routes(&self, _: &TtrpcContext, _: UpdateRoutesRequest) -> ttrpc::Result<Routes> {
        not_here("UpdateRoutes")
    }

    async fn list_interfaces(&self, _: &TtrpcContext, _: ListInterfacesRequest) -> ttrpc::Result<Interfaces> {
        not_here("ListInterfaces")
    }

    async fn list_routes(&self, _: &TtrpcContext, _: ListRoutesRequest) -> ttrpc::Result<Routes> {
        not_here("ListRoutes")
    }

    async fn add_arp_neighbors(&self, _: &TtrpcContext, _: AddARPNeighborsRequest) -> ttrpc::Result<Empty> {
        not_here("AddARPNeighbors")
    }

    async fn get_ip_tables(&self, _: &TtrpcContext, _: GetIPTablesRequest) -> ttrpc::Result<GetIPTablesResponse> {
        not_here("GetIPTables")
    }

    async fn set_ip_tables(&self, _: &TtrpcContext, _: SetIPTablesRequest) -> ttrpc::Result<SetIPTablesResponse> {
        not_here("SetIPTables")
    }

    async fn get_metrics(&self, _: &TtrpcContext, _: GetMetricsRequest) -> ttrpc::Result<Metrics> {
        not_here("GetMetrics")
    }

    async fn mem_agent_memcg_set(&self, _: &TtrpcContext, _: MemAgentMemcgConfig) -> ttrpc::Result<Empty> {
        not_here("MemAgentMemcgSet")
    }

    async fn mem_agent_compact_set(&self, _: &TtrpcContext, _: MemAgentCompactConfig) -> ttrpc::Result<Empty> {
        not_here("MemAgentCompactSet")
    }

    async fn mem_hotplug_by_probe(&self, _: &TtrpcContext, _: MemHotplugByProbeRequest) -> ttrpc::Result<Empty> {
        not_here("MemHotplugByProbe")
    }

    async fn add_swap(&self, _: &TtrpcContext, _: AddSwapRequest) -> ttrpc::Result<Empty> {
        not_here("AddSwap")
    }

    async fn add_swap_path(&self, _: &TtrpcContext, _: AddSwapPathRequest) -> ttrpc::Result<Empty> {
        not_here("AddSwapPath")
    }

    async fn get_volume_stats(&self, _: &TtrpcContext, _: VolumeStatsRequest) -> ttrpc::Result<VolumeStatsResponse> {
        not_here("GetVolumeStats")
    }

    async fn resize_volume(&self, _: &TtrpcContext, _: ResizeVolumeRequest) -> ttrpc::Result<Empty> {
        not_here("ResizeVolume")
    }

    async fn set_policy(&self, _: &TtrpcContext, _: SetPolicyRequest) -> ttrpc::Result<Empty> {
        not_here("SetPolicy")
    }
}

fn copy_failure(error: &copy_file::Error) -> ttrpc::Error {
    let code = match error {
        copy_file::Error::Step { .. } => Code::FAILED_PRECONDITION,
        _ => Code::INVALID_ARGUMENT,
    };
    because(code, error)
}

#[async_trait]
impl Health for Service {
    async fn check(&self, _: &TtrpcContext, _: CheckRequest) -> ttrpc::Result<HealthCheckResponse> {
        Ok(HealthCheckResponse { status: ServingStatus::SERVING.into(), ..Default::default() })
    }

    async fn version(&self, _: &TtrpcContext, _: CheckRequest) -> ttrpc::Result<VersionCheckResponse> {
        Ok(VersionCheckResponse {
            grpc_version: PROTOCOL_VERSION.to_owned(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }
}
