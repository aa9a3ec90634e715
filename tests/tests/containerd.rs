//! What a user of containerd relies on, through `ctr` and a real virtual machine.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::time::Duration;

use e2e::engine::{CONTAINER, Containerd, KATA, fresh_name};
use e2e::residue::Residue;
use e2e::{eventually, image, run, run_with_input};

/// SHA-256 of `some input`.
const SOME_INPUT: &str = "2be35bc671dc912e7f540f0e5a2e915ef6a4a4dbd2ada5ba9c1d2b117bfc907c";

/// Waits until a container's command has ended.
fn stopped(containerd: &Containerd, name: &str) {
    eventually("the task stopped", CONTAINER, || {
        containerd.ctr(&["task", "list"]).out.lines().any(|line| line.contains(name) && line.contains("STOPPED"))
    });
}

/// Deletes a container's task and returns the exit status that containerd has of it, which ctr puts into a warning.
fn deleted_with(containerd: &Containerd, name: &str) -> i32 {
    let said = containerd.ctr(&["task", "delete", name]);
    said.ok();
    said.err.rsplit("exit code ").next().and_then(|rest| rest.trim_end_matches(['"', '\n']).parse().ok()).unwrap_or(0)
}

#[test]
fn a_container_runs_under_another_kernel_and_leaves_nothing() {
    let before = Residue::take();
    let containerd = Containerd::start();
    let inside =
        containerd.run(KATA, &[], &["sh", "-c", "uname -r; cat /data/hello; id -u; ls /proc | grep -c '^[0-9]'"]);
    let host = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let lines: Vec<&str> = inside.ok().lines().collect();
    assert_ne!(lines[0], host.trim(), "the guest has a kernel of its own");
    assert_eq!(lines[1..3], ["hello from the image", "0"]);
    drop(containerd);
    before.assert_unchanged();
}

#[test]
fn exit_statuses_are_the_commands_own() {
    let containerd = Containerd::start();
    for (script, status) in [("exit 0", 0), ("exit 1", 1), ("kill -9 $$", 137)] {
        // The first process of a pid namespace ignores its own SIGKILL, so a child sends it to itself.
        let script = if script.starts_with("kill") { "sh -c 'kill -9 $$'; exit $?" } else { script };
        assert_eq!(containerd.run(KATA, &[], &["sh", "-c", script]).code, status, "{script}");
    }
    let name = containerd.sleeper(KATA, &[]);
    containerd.ctr(&["task", "kill", "-s", "SIGKILL", &name]).ok();
    stopped(&containerd, &name);
    assert_eq!(deleted_with(&containerd, &name), 137, "the status of a kill -9 is 128 + 9");
    containerd.ctr(&["container", "delete", &name]).ok();
}

#[test]
fn a_signal_reaches_the_command_and_its_handler_decides() {
    let containerd = Containerd::start();
    let name = fresh_name();
    let script = "trap 'exit 7' TERM; echo ready; while true; do sleep 0.1; done";
    containerd.ctr(&["run", "-d", "--runtime", KATA, image::NAME, &name, "sh", "-c", script]).ok();
    // The trap is set once the shell sleeps.
    eventually("the shell sleeps", CONTAINER, || containerd.exec(&name, &["ps"]).out.contains("sleep 0.1"));
    containerd.ctr(&["task", "kill", "-s", "SIGTERM", &name]).ok();
    stopped(&containerd, &name);
    assert_eq!(deleted_with(&containerd, &name), 7);
    containerd.ctr(&["container", "delete", &name]).ok();
}

#[test]
fn exec_runs_beside_the_command_with_a_status_and_input_of_its_own() {
    let containerd = Containerd::start();
    let name = containerd.sleeper(KATA, &[]);
    assert_eq!(containerd.exec(&name, &["sh", "-c", "ps | grep -c 'sleep 1000'; exit 3"]).code, 3);
    assert_eq!(containerd.exec(&name, &["cat", "/data/hello"]).ok(), "hello from the image");
    let said = run_with_input(
        containerd.command().args(["task", "exec", "--exec-id", "input", &name, "sha256sum"]),
        b"some input",
        CONTAINER,
    );
    assert!(said.ok().starts_with(SOME_INPUT), "{said:?}");
    assert_eq!(containerd.exec(&name, &["/bin/no-such-command"]).code, 1, "and the error names the command");
    assert!(containerd.exec(&name, &["/bin/no-such-command"]).err.contains("no-such-command"));
    assert_eq!(containerd.exec(&name, &["true"]).code, 0, "the container went on");
    containerd.remove(&name);
}

#[test]
fn a_terminal_is_a_terminal() {
    let containerd = Containerd::start();
    let name = fresh_name();
    // `script` gives ctr the terminal it insists on.
    let inner = format!(
        "ctr --address {} run --rm -t --runtime {KATA} {} {name} sh -c 'tty; stty size; test -t 1 && echo yes'",
        containerd.path("containerd.sock").display(),
        image::NAME,
    );
    let said = run(std::process::Command::new("script").args(["-qec", &inner, "/dev/null"]), CONTAINER);
    assert!(said.out.contains("/dev/pts/0") && said.out.contains("yes"), "{said:?}");
}

#[test]
fn pause_stops_the_container_and_resume_lets_it_go_on() {
    let containerd = Containerd::start();
    let name = fresh_name();
    let script = "n=0; while true; do n=$((n+1)); echo $n > /run/n; sleep 0.05; done";
    containerd
        .ctr(&[
            "run",
            "-d",
            "--runtime",
            KATA,
            "--mount",
            "type=bind,src=/tmp,dst=/host,options=rbind:rw",
            image::NAME,
            &name,
            "sh",
            "-c",
            &script.replace("/run/n", &format!("/host/{name}")),
        ])
        .ok();
    let counter = std::path::Path::new("/tmp").join(&name);
    let count = || fs::read_to_string(&counter).ok().and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0);
    eventually("it counts", CONTAINER, || count() > 2);
    containerd.ctr(&["task", "pause", &name]).ok();
    assert!(containerd.ctr(&["task", "list"]).out.contains("PAUSED"));
    let frozen = count();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(count(), frozen, "a paused container does nothing");
    containerd.ctr(&["task", "resume", &name]).ok();
    eventually("it counts again", CONTAINER, || count() > frozen);
    containerd.remove(&name);
    fs::remove_file(counter).unwrap();
}

#[test]
fn metrics_are_those_of_the_guest() {
    let containerd = Containerd::start();
    let name = containerd.sleeper(KATA, &[]);
    let metrics = containerd.ctr(&["task", "metrics", &name]);
    assert!(metrics.ok().contains("memory"), "{metrics:?}");
    assert!(metrics.ok().contains("pids.current") || metrics.ok().contains("cpu"), "{metrics:?}");
    containerd.remove(&name);
}

#[test]
fn what_is_wrong_is_refused_and_the_container_goes_on() {
    let containerd = Containerd::start();
    let name = containerd.sleeper(KATA, &[]);
    containerd.ctr(&["task", "start", "-d", &name]).failed();
    containerd.ctr(&["run", "-d", "--runtime", KATA, image::NAME, &name, "true"]).failed();
    containerd.ctr(&["task", "delete", &name]).failed();
    assert_eq!(containerd.exec(&name, &["echo", "alive"]).ok(), "alive");
    containerd.remove(&name);
    containerd.ctr(&["task", "delete", &name]).failed();
}

#[test]
fn twenty_containers_one_after_another_leave_nothing() {
    let before = Residue::take();
    let containerd = Containerd::start();
    for number in 0..20 {
        let said = containerd.run(KATA, &[], &["echo", &number.to_string()]);
        assert_eq!(said.ok(), number.to_string());
    }
    drop(containerd);
    before.assert_unchanged();
}

#[test]
fn five_containers_at_once_leave_nothing() {
    let before = Residue::take();
    let containerd = Containerd::start();
    std::thread::scope(|scope| {
        for number in 0..5 {
            let containerd = &containerd;
            scope.spawn(move || {
                let said = containerd.run(KATA, &[], &["echo", &number.to_string()]);
                assert_eq!(said.ok(), number.to_string());
            });
        }
    });
    drop(containerd);
    before.assert_unchanged();
}
