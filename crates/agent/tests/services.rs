//! The agent as a host sees it: every service of this release, over ttrpc, with real containers. Needs root.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod common;

use common::{Agent, code, message, patience, process};
use protocol::agent::*;
use protocol::health::CheckRequest;
use ttrpc::Code;

#[tokio::test]
async fn it_is_healthy_and_tells_its_version_and_abilities() {
    let agent = Agent::bare().await;
    agent.health.check(patience(), &CheckRequest::new()).await.unwrap();
    let version = agent.health.version(patience(), &CheckRequest::new()).await.unwrap();
    assert_eq!(version.agent_version, env!("CARGO_PKG_VERSION"));
    let details = agent.services.get_guest_details(patience(), &GuestDetailsRequest::new()).await.unwrap();
    assert!(details.agent_details.supports_seccomp);
    assert!(!details.agent_details.init_daemon);
    assert!(details.agent_details.storage_handlers.iter().any(|name| name == "virtio-fs"));
}

#[tokio::test]
async fn a_container_lives_from_create_to_remove() {
    let agent = Agent::start().await;
    agent.create("first", agent.spec("first", "hostname; echo wrong >&2; exit 7")).await.unwrap();
    agent.start_container("first").await.unwrap();
    assert_eq!(agent.wait("first", "").await.unwrap(), 7);
    // After the end what was written is still there, and the status can be asked for again.
    assert_eq!(agent.text("first", "").await, "pod\n");
    assert_eq!(agent.read_stderr("first", "").await, "wrong\n");
    assert_eq!(agent.wait("first", "first").await.unwrap(), 7);
    agent.remove("first").await.unwrap();
    assert_eq!(code(agent.wait("first", "").await), Code::NOT_FOUND);
    assert_eq!(code(agent.remove("first").await), Code::NOT_FOUND);
}

#[tokio::test]
async fn a_second_create_or_start_is_refused_and_the_container_goes_on() {
    let agent = Agent::start().await;
    agent.run("twice", "cat").await;
    assert_eq!(code(agent.create("twice", agent.spec("twice", "true")).await), Code::ALREADY_EXISTS);
    assert_eq!(code(agent.start_container("twice").await), Code::FAILED_PRECONDITION);
    agent.write("twice", "", b"still here\n").await.unwrap();
    assert_eq!(agent.read("twice", "", 64).await.unwrap(), b"still here\n");
    agent.remove("twice").await.unwrap();
    // The name is free again.
    agent.run("twice", "exit 3").await;
    assert_eq!(agent.wait("twice", "").await.unwrap(), 3);
    agent.remove("twice").await.unwrap();
}

#[tokio::test]
async fn who_is_not_there_is_not_found_and_bad_ids_are_refused() {
    let agent = Agent::start().await;
    assert_eq!(code(agent.start_container("nobody").await), Code::NOT_FOUND);
    assert_eq!(code(agent.signal("nobody", "", 9).await), Code::NOT_FOUND);
    assert_eq!(code(agent.read("nobody", "", 1).await), Code::NOT_FOUND);
    assert_eq!(code(agent.exec("nobody", "exec", process("true")).await), Code::NOT_FOUND);
    agent.run("some", "cat").await;
    assert_eq!(code(agent.wait("some", "nobody").await), Code::NOT_FOUND);
    for id in ["../some", "", "a/b", ".."] {
        assert_eq!(code(agent.create(id, agent.spec("some", "true")).await), Code::INVALID_ARGUMENT, "{id:?}");
        assert_eq!(code(agent.exec("some", id, process("true")).await), Code::INVALID_ARGUMENT, "{id:?}");
    }
    agent.remove("some").await.unwrap();
}

#[tokio::test]
async fn a_failed_create_leaves_the_name_free_and_says_why() {
    let agent = Agent::start().await;
    let mut spec = agent.spec("broken", "true");
    spec.Root.mut_or_insert_default().Path = "/nonexistent/rootfs".to_owned();
    let text = message(agent.create("broken", spec).await);
    assert!(text.contains("/nonexistent/rootfs"), "{text}");
    let request = CreateContainerRequest {
        container_id: "broken".to_owned(),
        OCI: Some(agent.spec("broken", "true")).into(),
        storages: vec![Storage {
            driver: "scsi".to_owned(),
            mount_point: "/run/kata-containers/x".to_owned(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let result = agent.services.create_container(patience(), &request).await;
    assert_eq!(message(result), "The storage driver scsi is not implemented");
    agent.run("broken", "exit 5").await;
    assert_eq!(agent.wait("broken", "").await.unwrap(), 5);
    agent.remove("broken").await.unwrap();
}

#[tokio::test]
async fn a_program_that_does_not_exist_is_named() {
    let agent = Agent::start().await;
    let mut spec = agent.spec("missing", "true");
    spec.Process.mut_or_insert_default().Args = vec!["/bin/nosuchprogram".to_owned()];
    // Whether create or start tells it, one of them does.
    let text = match agent.create("missing", spec).await {
        Err(error) => message::<()>(Err(error)),
        Ok(()) => message(agent.start_container("missing").await),
    };
    assert!(text.contains("/bin/nosuchprogram"), "{text}");
}

#[tokio::test]
async fn execs_have_their_own_streams_status_and_names() {
    let agent = Agent::start().await;
    agent.run("host", "cat").await;
    agent.exec("host", "one", process("echo one; exit 11")).await.unwrap();
    agent.exec("host", "two", process("cat; kill -9 $$")).await.unwrap();
    assert_eq!(code(agent.exec("host", "two", process("true")).await), Code::ALREADY_EXISTS);
    assert_eq!(code(agent.exec("host", "host", process("true")).await), Code::ALREADY_EXISTS);
    agent.write("host", "two", b"in and out").await.unwrap();
    agent.close_stdin("host", "two").await;
    assert_eq!(agent.text("host", "two").await, "in and out");
    assert_eq!(agent.wait("host", "two").await.unwrap(), 137);
    assert_eq!(agent.wait("host", "one").await.unwrap(), 11);
    assert_eq!(agent.text("host", "one").await, "one\n");
    // A name is free again when its process is history.
    agent.exec("host", "one", process("exit 12")).await.unwrap();
    assert_eq!(agent.wait("host", "one").await.unwrap(), 12);
    agent.remove("host").await.unwrap();
}

#[tokio::test]
async fn users_are_found_by_name_in_the_containers_files() {
    let agent = Agent::start().await;
    agent.run("users", "cat").await;
    let request = ExecProcessRequest {
        container_id: "users".to_owned(),
        exec_id: "who".to_owned(),
        process: Some(process("id -u; id -G")).into(),
        string_user: Some(StringUser {
            uid: "web".to_owned(),
            additionalGids: vec!["log".to_owned()],
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    agent.services.exec_process(patience(), &request).await.unwrap();
    assert_eq!(agent.text("users", "who").await, "33\n44 55\n");
    agent.remove("users").await.unwrap();
}

#[tokio::test]
async fn signals_reach_the_process_and_are_told_in_the_status() {
    let agent = Agent::start().await;
    agent.run("trap", "trap 'exit 42' TERM; echo ready; while :; do sleep 1; done").await;
    assert_eq!(agent.read("trap", "", 64).await.unwrap(), b"ready\n");
    agent.signal("trap", "", libc::SIGTERM).await.unwrap();
    assert_eq!(agent.wait("trap", "").await.unwrap(), 42);
    // A process that has ended takes any signal.
    agent.signal("trap", "", libc::SIGTERM).await.unwrap();
    assert_eq!(code(agent.signal("trap", "", 999).await), Code::INVALID_ARGUMENT);
    agent.remove("trap").await.unwrap();

    agent.run("kill", "sleep 1000 & wait").await;
    let (one, two, killed) =
        tokio::join!(agent.wait("kill", ""), agent.wait("kill", ""), agent.signal("kill", "", libc::SIGKILL));
    killed.unwrap();
    assert_eq!((one.unwrap(), two.unwrap()), (137, 137));
    agent.remove("kill").await.unwrap();
}

#[tokio::test]
async fn eight_mebibytes_of_output_arrive_byte_for_byte() {
    const SIZE: usize = 8 << 20;
    let agent = Agent::start().await;
    // A pattern that no page or pipe boundary repeats.
    let pattern: Vec<u8> = (0..SIZE).map(|at| (at % 251).to_le_bytes()[0]).collect();
    std::fs::write(agent.files.path().join("rootfs/pattern"), &pattern).unwrap();
    agent.run("much", "cat /pattern").await;
    let output = agent.output("much", "").await;
    assert_eq!(output.len(), SIZE);
    assert!(output == pattern, "The bytes differ");
    assert_eq!(agent.wait("much", "").await.unwrap(), 0);
    agent.remove("much").await.unwrap();
}

#[tokio::test]
async fn input_arrives_whole_and_its_end_too() {
    const SIZE: usize = 3 << 20;
    let agent = Agent::start().await;
    agent.run("into", "cat").await;
    let data: Vec<u8> = (0..SIZE).map(|at| (at % 241).to_le_bytes()[0]).collect();
    let writer = async {
        for piece in data.chunks(1 << 20) {
            assert_eq!(usize::try_from(agent.write("into", "", piece).await.unwrap()).unwrap(), piece.len());
        }
        agent.close_stdin("into", "").await;
    };
    let (output, ()) = tokio::join!(agent.output("into", ""), writer);
    assert!(output == data, "{} bytes came back", output.len());
    assert_eq!(code(agent.write("into", "", b"late").await), Code::FAILED_PRECONDITION);
    agent.remove("into").await.unwrap();
}

#[tokio::test]
async fn a_terminal_has_the_size_it_is_told() {
    let agent = Agent::start().await;
    let mut spec = agent.spec("tty", "read line; stty size; exit 4");
    spec.Process.mut_or_insert_default().Terminal = true;
    agent.create("tty", spec).await.unwrap();
    agent.start_container("tty").await.unwrap();
    let resize = TtyWinResizeRequest { container_id: "tty".to_owned(), row: 33, column: 99, ..Default::default() };
    agent.services.tty_win_resize(patience(), &resize).await.unwrap();
    agent.write("tty", "", b"go\n").await.unwrap();
    let output = agent.text("tty", "").await;
    assert!(output.contains("33 99\r\n"), "{output:?}");
    assert_eq!(agent.wait("tty", "").await.unwrap(), 4);
    agent.remove("tty").await.unwrap();

    agent.run("pipe", "cat").await;
    let resize = TtyWinResizeRequest { container_id: "pipe".to_owned(), row: 3, column: 9, ..Default::default() };
    assert_eq!(code(agent.services.tty_win_resize(patience(), &resize).await), Code::FAILED_PRECONDITION);
    agent.remove("pipe").await.unwrap();
}

#[tokio::test]
async fn a_paused_container_stands_still_and_resumes() {
    let agent = Agent::start().await;
    agent.run("frozen", "cat").await;
    let pause = PauseContainerRequest { container_id: "frozen".to_owned(), ..Default::default() };
    let resume = ResumeContainerRequest { container_id: "frozen".to_owned(), ..Default::default() };
    assert_eq!(code(agent.services.resume_container(patience(), &resume).await), Code::FAILED_PRECONDITION);
    agent.services.pause_container(patience(), &pause).await.unwrap();
    agent.write("frozen", "", b"echo").await.unwrap();
    let mut answer = std::pin::pin!(agent.read("frozen", "", 64));
    let soon = tokio::time::timeout(std::time::Duration::from_millis(300), &mut answer).await;
    assert!(soon.is_err(), "A paused container has answered: {soon:?}");
    assert_eq!(code(agent.exec("frozen", "exec", process("true")).await), Code::FAILED_PRECONDITION);
    agent.services.resume_container(patience(), &resume).await.unwrap();
    assert_eq!(answer.await.unwrap(), b"echo");
    // A paused one can be killed.
    agent.services.pause_container(patience(), &pause).await.unwrap();
    agent.signal("frozen", "", libc::SIGKILL).await.unwrap();
    assert_eq!(agent.wait("frozen", "").await.unwrap(), 137);
    agent.remove("frozen").await.unwrap();
}

#[tokio::test]
async fn a_running_container_and_its_children_go_with_remove() {
    let agent = Agent::start().await;
    agent.run("busy", "trap '' TERM; sleep 1000 & echo up; sleep 1000").await;
    assert_eq!(agent.read("busy", "", 64).await.unwrap(), b"up\n");
    agent.exec("busy", "more", process("sleep 1000")).await.unwrap();
    let (status, removed) = tokio::join!(agent.wait("busy", ""), agent.remove("busy"));
    removed.unwrap();
    assert_eq!(status.unwrap(), 137);
    let cgroup = format!("{}/busy", agent.spec("x", "").Linux.CgroupsPath.trim_end_matches("/x"));
    for hierarchy in std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        assert!(!hierarchy.path().join(cgroup.trim_start_matches('/')).exists(), "{:?}", hierarchy.path());
    }
}

#[tokio::test]
async fn containers_created_at_once_do_not_wait_for_each_other() {
    let agent = Agent::start().await;
    agent.run("slow", "cat").await;
    // A read that is not answered must not keep anybody.
    let pending = agent.read("slow", "", 1);
    let rest = async {
        for number in 0..4 {
            let id = format!("quick{number}");
            agent.run(&id, &format!("exit {number}")).await;
            assert_eq!(agent.wait(&id, "").await.unwrap(), number);
            agent.remove(&id).await.unwrap();
        }
        agent.close_stdin("slow", "").await;
    };
    let (end, ()) = tokio::join!(pending, rest);
    assert_eq!(code(end), Code::OUT_OF_RANGE);
    agent.remove("slow").await.unwrap();
}

#[tokio::test]
async fn start_and_remove_at_once_end_in_one_of_both_orders() {
    let agent = Agent::start().await;
    for _ in 0..5 {
        agent.create("race", agent.spec("race", "sleep 1000")).await.unwrap();
        let (started, removed) = tokio::join!(agent.start_container("race"), agent.remove("race"));
        removed.unwrap();
        if let Err(error) = started {
            assert_eq!(code::<()>(Err(error)), Code::NOT_FOUND);
        }
        assert_eq!(code(agent.wait("race", "").await), Code::NOT_FOUND);
    }
}

#[tokio::test]
async fn statistics_count_the_containers_processes() {
    let agent = Agent::start().await;
    agent.run("count", "cat").await;
    let request = StatsContainerRequest { container_id: "count".to_owned(), ..Default::default() };
    let stats = agent.services.stats_container(patience(), &request).await.unwrap();
    assert!(matches!(stats.cgroup_version, 1 | 2));
    assert_eq!(stats.cgroup_stats.pids_stats.current, 1);
    assert!(stats.network_stats.iter().any(|interface| interface.name == "lo"));
    agent.remove("count").await.unwrap();
}

#[tokio::test]
async fn there_is_one_sandbox_at_a_time() {
    let agent = Agent::start().await;
    let second = agent.create_sandbox().await;
    assert_eq!(code(second), Code::ALREADY_EXISTS);
    agent.run("left", "sleep 1000").await;
    agent.services.destroy_sandbox(patience(), &DestroySandboxRequest::new()).await.unwrap();
    assert_eq!(code(agent.wait("left", "").await), Code::NOT_FOUND);
    agent.create_sandbox().await.unwrap();
}

#[tokio::test]
async fn a_shared_pid_namespace_outlives_its_containers() {
    let agent = Agent::bare().await;
    let sandbox = CreateSandboxRequest { sandbox_pidns: true, ..Default::default() };
    agent.services.create_sandbox(patience(), &sandbox).await.unwrap();
    let create = |id: &str, script: &str| CreateContainerRequest {
        container_id: id.to_owned(),
        OCI: Some(agent.spec(id, script)).into(),
        sandbox_pidns: true,
        ..Default::default()
    };
    agent.services.create_container(patience(), &create("one", "sleep 1000 & exit 0")).await.unwrap();
    agent.start_container("one").await.unwrap();
    assert_eq!(agent.wait("one", "").await.unwrap(), 0);
    agent.services.create_container(patience(), &create("two", "cat /proc/1/comm; ps -o args")).await.unwrap();
    agent.start_container("two").await.unwrap();
    let seen = agent.text("two", "").await;
    assert!(seen.starts_with("pause\n"), "{seen}");
    assert!(seen.contains("sleep 1000"), "{seen}");
    // SIGKILL to a container takes its children along, though nothing else does here.
    agent.signal("one", "", libc::SIGKILL).await.unwrap();
    agent.remove("one").await.unwrap();
    agent.remove("two").await.unwrap();
}

#[tokio::test]
async fn files_are_copied_below_the_shared_directory_only() {
    let agent = Agent::start().await;
    let request = |path: &str, mode: u32, data: &[u8]| CopyFileRequest {
        path: path.to_owned(),
        file_size: i64::try_from(data.len()).unwrap(),
        file_mode: mode,
        dir_mode: 0o755,
        data: data.to_vec(),
        ..Default::default()
    };
    let share = protocol::SHARE_GUEST_DIR;
    let copy = async |request: CopyFileRequest| agent.services.copy_file(patience(), &request).await.map(drop);
    copy(request(&format!("{share}one/file"), libc::S_IFREG | 0o644, b"content")).await.unwrap();
    copy(request(&format!("{share}one/out"), libc::S_IFLNK | 0o777, b"/etc")).await.unwrap();
    copy(request(&format!("{share}one/chain"), libc::S_IFLNK | 0o777, b"out")).await.unwrap();
    for path in ["/etc/passwd", "../../../etc/x", "one/../../../x"] {
        let path = if path.starts_with('/') { path.to_owned() } else { format!("{share}{path}") };
        let refused = copy(request(&path, libc::S_IFREG | 0o644, b"x")).await;
        assert_eq!(code(refused), Code::INVALID_ARGUMENT, "{path}");
    }
    for path in ["one/out/kata-test", "one/chain/kata-test", "one/out"] {
        let refused = copy(request(&format!("{share}{path}"), libc::S_IFREG | 0o644, b"x")).await;
        assert_eq!(code(refused), Code::FAILED_PRECONDITION, "{path}");
    }
    assert!(!std::path::Path::new("/etc/kata-test").exists());
}

#[tokio::test]
async fn what_is_not_there_yet_says_its_name() {
    let agent = Agent::bare().await;
    let service = &agent.services;
    macro_rules! check {
        ($($method:ident($request:ty), $name:literal;)*) => {
            $(
                let result = service.$method(patience(), &<$request>::new()).await;
                assert_eq!(message(result), concat!($name, " is not implemented"));
            )*
        };
    }
    check! {
        update_ephemeral_mounts(UpdateEphemeralMountsRequest), "UpdateEphemeralMounts";
        remove_stale_virtiofs_share_mounts(RemoveStaleVirtiofsShareMountsRequest), "RemoveStaleVirtiofsShareMounts";
        get_diagnostic_data(GetDiagnosticDataRequest), "GetDiagnosticData";
        update_interface(UpdateInterfaceRequest), "UpdateInterface";
        update_routes(UpdateRoutesRequest), "UpdateRoutes";
        list_interfaces(ListInterfacesRequest), "ListInterfaces";
        list_routes(ListRoutesRequest), "ListRoutes";
        add_arp_neighbors(AddARPNeighborsRequest), "AddARPNeighbors";
        get_ip_tables(GetIPTablesRequest), "GetIPTables";
        set_ip_tables(SetIPTablesRequest), "SetIPTables";
        get_metrics(GetMetricsRequest), "GetMetrics";
        mem_agent_memcg_set(MemAgentMemcgConfig), "MemAgentMemcgSet";
        mem_agent_compact_set(MemAgentCompactConfig), "MemAgentCompactSet";
        mem_hotplug_by_probe(MemHotplugByProbeRequest), "MemHotplugByProbe";
        add_swap(AddSwapRequest), "AddSwap";
        add_swap_path(AddSwapPathRequest), "AddSwapPath";
        get_volume_stats(VolumeStatsRequest), "GetVolumeStats";
        resize_volume(ResizeVolumeRequest), "ResizeVolume";
        set_policy(SetPolicyRequest), "SetPolicy";
    }
    let result = service.set_policy(patience(), &SetPolicyRequest::new()).await;
    assert_eq!(code(result), Code::UNIMPLEMENTED);
}

#[tokio::test]
async fn randomness_is_taken_and_a_senseless_time_is_not() {
    let agent = Agent::bare().await;
    let reseed = ReseedRandomDevRequest { data: vec![5; 32], ..Default::default() };
    agent.services.reseed_random_dev(patience(), &reseed).await.unwrap();
    let empty = agent.services.reseed_random_dev(patience(), &ReseedRandomDevRequest::new()).await;
    assert_eq!(code(empty), Code::INVALID_ARGUMENT);
    let time = SetGuestDateTimeRequest { Sec: -5, ..Default::default() };
    assert_eq!(code(agent.services.set_guest_date_time(patience(), &time).await), Code::INVALID_ARGUMENT);
}
