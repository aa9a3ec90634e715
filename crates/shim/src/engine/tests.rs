use std::sync::atomic::Ordering;

use containerd_shim_protos::types::task::Status;
use protobuf::Message as _;
use ttrpc::Code;
use ttrpc::r#async::Server;

use super::*;
use crate::fake::{FakeEngine, FakeHost, FakePod, VMM, topics};

struct Rig {
    dir: tempfile::TempDir,
    pod: Arc<FakePod>,
    engine: Arc<Engine>,
    told: Arc<FakeEngine>,
    _server: Server,
}

impl Rig {
    async fn new(sandbox: &str) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let told = Arc::new(FakeEngine::default());
        let socket = dir.path().join("events");
        let server = told.serve(&socket).await;
        let (events, _) = Events::new(socket.to_str().unwrap(), "default");
        let pod = Arc::new(FakePod::default());
        let engine = Engine::new(sandbox, Box::new(FakeHost(Arc::clone(&pod))), events);
        Rig { dir, pod, engine, told, _server: server }
    }

    /// A request for a container whose config.json has these annotations.
    fn request(&self, id: &str, annotations: &str) -> CreateTaskRequest {
        let bundle = self.dir.path().join(id);
        std::fs::create_dir_all(&bundle).unwrap();
        let config = format!(
            r#"{{"ociVersion":"1.0.2","annotations":{{{annotations}}},
                "process":{{"user":{{"uid":0,"gid":0}},"args":["sh"],"cwd":"/"}},"root":{{"path":"rootfs"}}}}"#
        );
        std::fs::write(bundle.join("config.json"), config).unwrap();
        CreateTaskRequest { id: id.into(), bundle: bundle.to_str().unwrap().into(), ..Default::default() }
    }

    async fn create(&self, id: &str) -> Result<u32, Fault> {
        Arc::clone(&self.engine).create(self.request(id, "")).await
    }

    async fn start(&self, id: &str, exec: &str) -> Result<u32, Fault> {
        Arc::clone(&self.engine).start(id.into(), exec.into()).await
    }

    async fn delete(&self, id: &str, exec: &str) -> Result<DeleteResponse, Fault> {
        Arc::clone(&self.engine).delete(id.into(), exec.into()).await
    }

    async fn wait(&self, id: &str, exec: &str) -> u32 {
        let wait = Arc::clone(&self.engine).wait(id.into(), exec.into());
        tokio::time::timeout(Duration::from_secs(60), wait).await.unwrap().unwrap().status
    }

    async fn kill(&self, id: &str, exec: &str, signal: u32) -> Result<(), Fault> {
        let request = KillRequest { id: id.into(), exec_id: exec.into(), signal, ..Default::default() };
        Arc::clone(&self.engine).kill(request).await
    }

    async fn exec(&self, id: &str, exec: &str, command: &str) -> Result<(), Fault> {
        let process = format!(r#"{{"user":{{"uid":0,"gid":0}},"args":["{command}"],"cwd":"/"}}"#);
        let spec = Any { value: process.into_bytes(), ..Default::default() };
        let request = ExecProcessRequest {
            id: id.into(),
            exec_id: exec.into(),
            spec: MessageField::some(spec),
            ..Default::default()
        };
        Arc::clone(&self.engine).exec(request).await
    }

    fn status(&self, id: &str, exec: &str) -> Status {
        self.engine.state(id, exec).unwrap().status.enum_value().unwrap()
    }
}

#[tokio::test]
async fn the_life_of_a_container() {
    let rig = Rig::new("c1").await;
    assert_eq!(rig.create("c1").await.unwrap(), VMM);
    assert_eq!(rig.status("c1", ""), Status::CREATED);
    assert_eq!(rig.start("c1", "").await.unwrap(), VMM);
    assert_eq!(rig.status("c1", ""), Status::RUNNING);
    rig.pod.run_out_of_memory();
    rig.told.wait_for(3).await;
    rig.pod.process("c1", "").exit(3);
    assert_eq!(rig.wait("c1", "").await, 3);
    assert_eq!(rig.status("c1", ""), Status::STOPPED);
    let response = rig.delete("c1", "").await.unwrap();
    assert_eq!((response.pid, response.exit_status), (VMM, 3));
    assert!(response.exited_at.seconds > 0);
    assert!(rig.engine.state("c1", "").unwrap_err().is_not_found());

    let events = rig.told.wait_for(5).await;
    assert_eq!(topics(&events), ["/tasks/create", "/tasks/start", "/tasks/oom", "/tasks/exit", "/tasks/delete"]);
    let exit = TaskExit::parse_from_bytes(&events[3].envelope.event.value).unwrap();
    assert_eq!((exit.container_id.as_str(), exit.id.as_str(), exit.exit_status, exit.pid), ("c1", "c1", 3, VMM));
    // The machine went with its container.
    assert_eq!(*rig.pod.calls.lock().unwrap(), ["start pod c1", "create c1", "start c1", "remove c1", "stop"]);
    rig.engine.shutdown(false);
    rig.engine.finished().await;
}

#[tokio::test]
async fn what_is_done_twice_is_an_error_and_harms_nobody() {
    let rig = Rig::new("c1").await;
    rig.create("c1").await.unwrap();
    assert_eq!(rig.create("c1").await.unwrap_err().code, Code::ALREADY_EXISTS);
    rig.start("c1", "").await.unwrap();
    assert_eq!(rig.start("c1", "").await.unwrap_err().code, Code::FAILED_PRECONDITION);
    assert_eq!(rig.create("c1").await.unwrap_err().code, Code::ALREADY_EXISTS);
    assert_eq!(rig.delete("c1", "").await.unwrap_err().code, Code::FAILED_PRECONDITION);
    assert_eq!(rig.status("c1", ""), Status::RUNNING);
    rig.engine.shutdown(false);

    rig.pod.process("c1", "").exit(0);
    assert_eq!(rig.wait("c1", "").await, 0);
    let fault = rig.kill("c1", "", 15).await.unwrap_err();
    assert!(fault.is_not_found() && fault.message.contains("process already finished"), "{fault:?}");
    rig.delete("c1", "").await.unwrap();
    assert!(rig.delete("c1", "").await.unwrap_err().is_not_found());
    assert!(rig.start("c1", "").await.unwrap_err().is_not_found());
    assert!(rig.kill("c1", "", 9).await.unwrap_err().is_not_found());
    assert_eq!(rig.pod.stopped.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn processes_join_and_leave() {
    let rig = Rig::new("c1").await;
    rig.create("c1").await.unwrap();
    assert_eq!(rig.exec("c1", "e1", "ls").await.unwrap_err().code, Code::FAILED_PRECONDITION);
    rig.start("c1", "").await.unwrap();
    rig.exec("c1", "e1", "ls").await.unwrap();
    assert_eq!(rig.exec("c1", "e1", "ls").await.unwrap_err().code, Code::ALREADY_EXISTS);
    assert_eq!(rig.status("c1", "e1"), Status::CREATED);
    // A size that is set before the start is not lost.
    Arc::clone(&rig.engine).resize("c1".into(), "e1".into(), 24, 80).await.unwrap();
    assert_eq!(rig.start("c1", "e1").await.unwrap(), VMM);
    assert_eq!(rig.start("c1", "e1").await.unwrap_err().code, Code::FAILED_PRECONDITION);
    rig.kill("c1", "e1", 9).await.unwrap();
    assert_eq!(rig.wait("c1", "e1").await, 137);
    assert_eq!(rig.delete("c1", "e1").await.unwrap().exit_status, 137);

    // One that cannot start leaves the container as it was, and can be deleted.
    rig.exec("c1", "e2", "missing").await.unwrap();
    assert!(rig.start("c1", "e2").await.unwrap_err().is_not_found());
    rig.delete("c1", "e2").await.unwrap();
    assert_eq!(rig.status("c1", ""), Status::RUNNING);

    let events = rig.told.wait_for(6).await;
    let expected = ["create", "start", "exec-added", "exec-started", "exit", "exec-added"];
    assert_eq!(topics(&events), expected.map(|t| format!("/tasks/{t}")));
    let exit = TaskExit::parse_from_bytes(&events[4].envelope.event.value).unwrap();
    assert_eq!((exit.container_id.as_str(), exit.id.as_str(), exit.exit_status), ("c1", "e1", 137));
    assert!(rig.pod.calls.lock().unwrap().contains(&"resize c1 e1 24x80".to_owned()));
}

#[tokio::test]
async fn pausing() {
    let rig = Rig::new("c1").await;
    rig.create("c1").await.unwrap();
    let pause = |pause| Arc::clone(&rig.engine).pause("c1".into(), pause);
    assert_eq!(pause(true).await.unwrap_err().code, Code::FAILED_PRECONDITION);
    rig.start("c1", "").await.unwrap();
    pause(true).await.unwrap();
    assert_eq!(rig.status("c1", ""), Status::PAUSED);
    assert_eq!(pause(true).await.unwrap_err().code, Code::FAILED_PRECONDITION);
    assert_eq!(rig.exec("c1", "e1", "ls").await.unwrap_err().code, Code::FAILED_PRECONDITION);
    pause(false).await.unwrap();
    assert_eq!(rig.status("c1", ""), Status::RUNNING);
    let events = rig.told.wait_for(4).await;
    assert_eq!(topics(&events)[2..], ["/tasks/paused", "/tasks/resumed"]);
}

#[tokio::test]
async fn a_pod_shares_one_machine() {
    let rig = Rig::new("pod").await;
    let sandbox = r#""io.kubernetes.cri.container-type":"sandbox""#;
    let member = r#""io.kubernetes.cri.container-type":"container","io.kubernetes.cri.sandbox-id":"pod""#;
    let create = |id: &str, annotations: &str| Arc::clone(&rig.engine).create(rig.request(id, annotations));
    assert_eq!(create("c1", member).await.unwrap_err().code, Code::FAILED_PRECONDITION);
    create("pod", sandbox).await.unwrap();
    rig.start("pod", "").await.unwrap();
    create("c1", member).await.unwrap();
    rig.start("c1", "").await.unwrap();
    let stranger = member.replace("\"pod\"", "\"another\"");
    assert_eq!(create("c2", &stranger).await.unwrap_err().code, Code::INVALID_ARGUMENT);

    rig.kill("c1", "", 9).await.unwrap();
    rig.wait("c1", "").await;
    rig.delete("c1", "").await.unwrap();
    assert_eq!(rig.pod.stopped.load(Ordering::Relaxed), 0);
    assert_eq!(rig.status("pod", ""), Status::RUNNING);
    rig.kill("pod", "", 9).await.unwrap();
    rig.wait("pod", "").await;
    rig.delete("pod", "").await.unwrap();
    assert_eq!(rig.pod.stopped.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_creation_that_fails_leaves_nothing() {
    let rig = Rig::new("c1").await;
    rig.pod.refuse_create.store(true, Ordering::Relaxed);
    assert!(rig.create("c1").await.unwrap_err().message.contains("the guest refuses"));
    assert_eq!(rig.pod.stopped.load(Ordering::Relaxed), 1);
    assert!(rig.delete("c1", "").await.unwrap_err().is_not_found());
    rig.pod.refuse_create.store(false, Ordering::Relaxed);
    rig.create("c1").await.unwrap();

    let rig = Rig::new("c2").await;
    let missing = CreateTaskRequest { stdout: "/nowhere/fifo".into(), ..rig.request("c2", "") };
    assert!(Arc::clone(&rig.engine).create(missing).await.unwrap_err().message.contains("/nowhere/fifo"));
    // No machine was started for it.
    assert!(rig.pod.calls.lock().unwrap().is_empty());
}

#[tokio::test]
async fn the_machine_dies() {
    let rig = Rig::new("c1").await;
    rig.create("c1").await.unwrap();
    rig.start("c1", "").await.unwrap();
    rig.exec("c1", "e1", "ls").await.unwrap();
    rig.start("c1", "e1").await.unwrap();
    let (init, exec) = (rig.pod.process("c1", ""), rig.pod.process("c1", "e1"));
    init.exit_leaving_output(137);
    exec.exit_leaving_output(137);
    rig.pod.die();
    assert_eq!(rig.wait("c1", "").await, 137);
    assert_eq!(rig.wait("c1", "e1").await, 137);
    rig.delete("c1", "").await.unwrap();
    assert_eq!(topics(&rig.told.wait_for(7).await)[4..], ["/tasks/exit", "/tasks/exit", "/tasks/delete"]);
}

#[tokio::test]
async fn a_guest_that_does_not_answer_cannot_keep_its_pod() {
    let rig = Rig::new("c1").await;
    rig.create("c1").await.unwrap();
    rig.start("c1", "").await.unwrap();
    rig.pod.deaf.store(true, Ordering::Relaxed);
    assert_eq!(rig.kill("c1", "", 15).await.unwrap_err().code, Code::DEADLINE_EXCEEDED);
    rig.kill("c1", "", 9).await.unwrap();
    assert_eq!(rig.wait("c1", "").await, 137);
    rig.delete("c1", "").await.unwrap();
}

#[tokio::test]
async fn one_that_never_started_can_be_deleted() {
    let rig = Rig::new("c1").await;
    rig.create("c1").await.unwrap();
    let response = rig.delete("c1", "").await.unwrap();
    assert_eq!(response.exit_status, 137);
    assert_eq!(rig.pod.stopped.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn requests_that_cannot_be_meant() {
    let rig = Rig::new("c1").await;
    let engine = || Arc::clone(&rig.engine);
    let relative = CreateTaskRequest { bundle: "bundle".into(), ..rig.request("c1", "") };
    assert_eq!(engine().create(relative).await.unwrap_err().code, Code::INVALID_ARGUMENT);
    let checkpoint = CreateTaskRequest { checkpoint: "/c".into(), ..rig.request("c1", "") };
    assert_eq!(engine().create(checkpoint).await.unwrap_err().code, Code::UNIMPLEMENTED);
    let escaping = CreateTaskRequest { id: "../c1".into(), ..rig.request("c1", "") };
    assert_eq!(engine().create(escaping).await.unwrap_err().code, Code::INVALID_ARGUMENT);
    assert!(rig.start("nobody", "").await.unwrap_err().is_not_found());
    assert!(engine().stats("nobody".into()).await.unwrap_err().is_not_found());
    assert!(engine().wait("nobody".into(), String::new()).await.unwrap_err().is_not_found());
    assert!(rig.engine.close_stdin("nobody", "").unwrap_err().is_not_found());
}

#[tokio::test]
async fn input_may_be_closed_while_the_process_starts() {
    let rig = Rig::new("c1").await;
    let stdin = rig.dir.path().join("stdin");
    rustix::fs::mkfifoat(rustix::fs::CWD, &stdin, rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
    let request = CreateTaskRequest { stdin: stdin.to_str().unwrap().into(), ..rig.request("c1", "") };
    Arc::clone(&rig.engine).create(request).await.unwrap();
    rig.pod.hold_start.store(true, Ordering::Relaxed);
    let start = tokio::spawn(Arc::clone(&rig.engine).start("c1".into(), String::new()));
    rig.pod.start_asked.notified().await;
    std::fs::write(&stdin, "hello").unwrap();
    rig.engine.close_stdin("c1", "").unwrap();
    rig.pod.let_start.notify_one();
    start.await.unwrap().unwrap();
    assert_eq!(rig.pod.process("c1", "").whole_input().await, b"hello");
}
