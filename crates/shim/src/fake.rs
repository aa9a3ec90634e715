//! A pod without a machine, for tests: processes do what the test says.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::{Empty, ForwardRequest};
use containerd_shim_protos::shim_async::create_events;
use oci_spec::runtime::{LinuxResources, Process};
use protocol::agent::StatsContainerResponse;
use tokio::sync::{Notify, mpsc, watch};
use ttrpc::r#async::{Server, TtrpcContext};

use crate::fault::Fault;
use crate::pod::{Host, NewContainer, Pod, PodSpec};

/// The pid of a machine that is none.
pub(crate) const VMM: u32 = 4242;

/// A process in the guest.
pub(crate) struct FakeProcess {
    output: Mutex<Option<mpsc::Sender<Vec<u8>>>>,
    reading: tokio::sync::Mutex<mpsc::Receiver<Vec<u8>>>,
    exit: watch::Sender<Option<i32>>,
    started: AtomicBool,
    /// What was written to it.
    pub(crate) input: Mutex<Vec<u8>>,
    /// Whether its input was ended.
    pub(crate) input_closed: watch::Sender<bool>,
}

impl FakeProcess {
    fn new() -> Arc<FakeProcess> {
        let (output, reading) = mpsc::channel(1);
        Arc::new(FakeProcess {
            output: Mutex::new(Some(output)),
            reading: tokio::sync::Mutex::new(reading),
            exit: watch::Sender::new(None),
            started: AtomicBool::new(false),
            input: Mutex::default(),
            input_closed: watch::Sender::new(false),
        })
    }

    /// Writes to stdout; waits while one chunk is not taken, as a full pipe does.
    pub(crate) async fn say(&self, data: &[u8]) {
        let output = self.output.lock().unwrap().clone().unwrap();
        output.send(data.to_vec()).await.unwrap();
    }

    /// Ends, keeping stdout open: a child holds it.
    pub(crate) fn exit_leaving_output(&self, status: i32) {
        self.exit.send_if_modified(|exit| exit.is_none() && exit.replace(status).is_none());
    }

    /// Ends.
    pub(crate) fn exit(&self, status: i32) {
        self.output.lock().unwrap().take();
        self.exit_leaving_output(status);
    }

    /// Waits until its input is ended; returns it all.
    pub(crate) async fn whole_input(&self) -> Vec<u8> {
        let mut closed = self.input_closed.subscribe();
        tokio::time::timeout(Duration::from_secs(30), closed.wait_for(|c| *c)).await.unwrap().unwrap();
        self.input.lock().unwrap().clone()
    }
}

/// A pod whose processes the test moves.
#[derive(Default)]
pub(crate) struct FakePod {
    processes: Mutex<HashMap<(String, String), Arc<FakeProcess>>>,
    /// Requests that came, in order.
    pub(crate) calls: Mutex<Vec<String>>,
    /// Refuses to create containers.
    pub(crate) refuse_create: AtomicBool,
    /// Starts wait for `let_start`, and say so by `start_asked`.
    pub(crate) hold_start: AtomicBool,
    pub(crate) start_asked: Notify,
    pub(crate) let_start: Notify,
    /// The guest does not take signals.
    pub(crate) deaf: AtomicBool,
    /// How often the machine was stopped.
    pub(crate) stopped: AtomicUsize,
    died: Notify,
    oom: Notify,
}

impl FakePod {
    /// A process that was created.
    pub(crate) fn process(&self, id: &str, exec: &str) -> Arc<FakeProcess> {
        self.find(id, exec).unwrap()
    }

    fn find(&self, id: &str, exec: &str) -> Result<Arc<FakeProcess>, Fault> {
        let key = (id.to_owned(), exec.to_owned());
        self.processes.lock().unwrap().get(&key).cloned().ok_or_else(|| Fault::not_found("no such process"))
    }

    /// Adds a process without a request.
    pub(crate) fn add(&self, id: &str, exec: &str) -> Arc<FakeProcess> {
        let process = FakeProcess::new();
        self.processes.lock().unwrap().insert((id.to_owned(), exec.to_owned()), Arc::clone(&process));
        process
    }

    fn call(&self, call: String) {
        self.calls.lock().unwrap().push(call);
    }

    /// The machine dies.
    pub(crate) fn die(&self) {
        self.died.notify_one();
    }

    /// The guest's kernel kills for want of memory.
    pub(crate) fn run_out_of_memory(&self) {
        self.oom.notify_one();
    }
}

#[async_trait]
impl Pod for FakePod {
    fn vmm_pid(&self) -> u32 {
        VMM
    }

    async fn create_container(&self, container: NewContainer) -> Result<(), Fault> {
        if self.refuse_create.load(Ordering::Relaxed) {
            return Err(Fault::invalid("the guest refuses"));
        }
        self.call(format!("create {}", container.id));
        self.add(&container.id, "");
        Ok(())
    }

    async fn start_container(&self, id: &str) -> Result<(), Fault> {
        self.call(format!("start {id}"));
        if self.hold_start.load(Ordering::Relaxed) {
            self.start_asked.notify_one();
            self.let_start.notified().await;
        }
        self.find(id, "")?.started.store(true, Ordering::Relaxed);
        Ok(())
    }

    async fn exec(&self, id: &str, exec: &str, process: &Process) -> Result<(), Fault> {
        let args = process.args().clone().unwrap_or_default().join(" ");
        self.call(format!("exec {id} {exec} {args}"));
        if args == "missing" {
            return Err(Fault::not_found("missing: no such file"));
        }
        self.add(id, exec).started.store(true, Ordering::Relaxed);
        Ok(())
    }

    async fn signal(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<(), Fault> {
        if self.deaf.load(Ordering::Relaxed) {
            return Err(Fault::new(ttrpc::Code::DEADLINE_EXCEEDED, "the guest does not answer"));
        }
        self.call(format!("signal {id} {exec} {signal} {all}"));
        self.find(id, exec)?.exit(128 + i32::try_from(signal).unwrap());
        Ok(())
    }

    async fn wait(&self, id: &str, exec: &str) -> Result<i32, Fault> {
        let mut exit = self.find(id, exec)?.exit.subscribe();
        let status = exit.wait_for(Option::is_some).await.map_err(|_| Fault::not_found("gone"))?;
        Ok(status.unwrap())
    }

    async fn write_stdin(&self, id: &str, exec: &str, data: Vec<u8>) -> Result<u32, Fault> {
        // Takes less than it is given, as a pipe may.
        let taken = data.len().min(1000);
        self.find(id, exec)?.input.lock().unwrap().extend_from_slice(&data[..taken]);
        Ok(u32::try_from(taken).unwrap())
    }

    async fn read_stdout(&self, id: &str, exec: &str, len: u32) -> Result<Option<Vec<u8>>, Fault> {
        let process = self.find(id, exec)?;
        let data = process.reading.lock().await.recv().await;
        assert!(data.as_ref().is_none_or(|d| d.len() <= len as usize));
        Ok(data)
    }

    async fn read_stderr(&self, _: &str, _: &str, _: u32) -> Result<Option<Vec<u8>>, Fault> {
        Ok(None)
    }

    async fn close_stdin(&self, id: &str, exec: &str) -> Result<(), Fault> {
        self.find(id, exec)?.input_closed.send_replace(true);
        Ok(())
    }

    async fn resize(&self, id: &str, exec: &str, rows: u32, columns: u32) -> Result<(), Fault> {
        self.call(format!("resize {id} {exec} {rows}x{columns}"));
        Ok(())
    }

    async fn stats(&self, _: &str) -> Result<StatsContainerResponse, Fault> {
        Ok(StatsContainerResponse { cgroup_version: 2, ..Default::default() })
    }

    async fn pause(&self, id: &str) -> Result<(), Fault> {
        self.call(format!("pause {id}"));
        Ok(())
    }

    async fn resume(&self, id: &str) -> Result<(), Fault> {
        self.call(format!("resume {id}"));
        Ok(())
    }

    async fn update(&self, id: &str, _: &LinuxResources) -> Result<(), Fault> {
        self.call(format!("update {id}"));
        Ok(())
    }

    async fn remove_container(&self, id: &str) -> Result<(), Fault> {
        self.call(format!("remove {id}"));
        self.processes.lock().unwrap().retain(|(container, _), _| container != id);
        Ok(())
    }

    async fn next_oom(&self) -> Option<String> {
        self.oom.notified().await;
        Some("c1".to_owned())
    }

    async fn gone(&self) -> String {
        self.died.notified().await;
        "qemu: bye".to_owned()
    }

    async fn stop(&self) -> Result<(), Fault> {
        self.call("stop".to_owned());
        self.stopped.fetch_add(1, Ordering::Relaxed);
        for process in self.processes.lock().unwrap().values() {
            process.exit(137);
        }
        Ok(())
    }
}

/// A host with one pod.
pub(crate) struct FakeHost(pub(crate) Arc<FakePod>);

#[async_trait]
impl Host for FakeHost {
    async fn start(&self, spec: PodSpec) -> Result<Arc<dyn Pod>, Fault> {
        self.0.call(format!("start pod {}", spec.id));
        Ok(Arc::clone(&self.0) as Arc<dyn Pod>)
    }
}

/// An engine that takes events.
#[derive(Default)]
pub(crate) struct FakeEngine {
    taken: Mutex<Vec<ForwardRequest>>,
    more: Notify,
}

#[async_trait]
impl containerd_shim_protos::shim_async::Events for FakeEngine {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        self.taken.lock().unwrap().push(request);
        self.more.notify_one();
        Ok(Empty::default())
    }
}

impl FakeEngine {
    /// Listens at `socket`, in place of what was there.
    pub(crate) async fn serve(self: &Arc<Self>, socket: &Path) -> Server {
        let _ = std::fs::remove_file(socket);
        let mut server = Server::new()
            .bind(&format!("unix://{}", socket.display()))
            .unwrap()
            .register_service(create_events(Arc::clone(self) as Arc<_>));
        server.start().await.unwrap();
        server
    }

    /// Waits for this many events.
    pub(crate) async fn wait_for(&self, count: usize) -> Vec<ForwardRequest> {
        let all = async {
            while self.taken.lock().unwrap().len() < count {
                self.more.notified().await;
            }
        };
        let came = tokio::time::timeout(Duration::from_secs(60), all).await;
        let taken = self.taken.lock().unwrap().clone();
        assert!(came.is_ok(), "{} of {count} events came: {:?}", taken.len(), topics(&taken));
        taken
    }
}

/// The topics of events.
pub(crate) fn topics(events: &[ForwardRequest]) -> Vec<&str> {
    events.iter().map(|e| e.envelope.topic.as_str()).collect()
}
