//! `kill -9` of any process at any moment leaves nothing behind once the container is deleted.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::process::{Command, Stdio};
use std::time::Duration;

use e2e::engine::{CONTAINER, Containerd, KATA, fresh_name};
use e2e::residue::{Bystanders, Residue};
use e2e::{eventually, image};

fn kill(pid: u32) {
    drop(Command::new("kill").args(["-KILL", &pid.to_string()]).stderr(Stdio::null()).status());
}

/// The processes of a pod, by what their command lines show.
const VMM: &str = "qemu-system";
const SHIM: &str = "containerd-shim-kata-v2 -namespace";
const SHARE: &str = "__share";

#[test]
fn the_vmm_killed_under_a_running_container() {
    let before = Residue::take();
    let others = Bystanders::take();
    let containerd = Containerd::start();
    let name = containerd.sleeper(KATA, &[]);
    kill(*others.newcomers(VMM).last().unwrap());
    eventually("the task is known to be over", Duration::from_secs(10), || {
        containerd.ctr(&["task", "list"]).out.contains("STOPPED")
    });
    let deleted = containerd.ctr(&["task", "delete", &name]);
    assert!(deleted.err.contains("exit code 137"), "as if it had been killed itself: {deleted:?}");
    containerd.ctr(&["container", "delete", &name]).ok();
    drop(containerd);
    before.assert_unchanged();
}

#[test]
fn the_shim_killed_under_a_running_container() {
    let before = Residue::take();
    let others = Bystanders::take();
    let containerd = Containerd::start();
    let name = containerd.sleeper(KATA, &[]);
    kill(*others.newcomers(SHIM).last().unwrap());
    eventually("the VM died with its shim", Duration::from_secs(10), || others.newcomers(VMM).is_empty());
    containerd.remove(&name);
    drop(containerd);
    before.assert_unchanged();
}

#[test]
fn the_file_server_killed_under_a_running_container() {
    let before = Residue::take();
    let others = Bystanders::take();
    let containerd = Containerd::start();
    let name = containerd.sleeper(KATA, &[]);
    kill(*others.newcomers(SHARE).last().unwrap());
    containerd.remove(&name);
    drop(containerd);
    before.assert_unchanged();
}

#[test]
fn each_process_killed_at_several_moments_of_the_start() {
    let before = Residue::take();
    let others = Bystanders::take();
    let containerd = Containerd::start();
    for victim in [SHIM, VMM, SHARE] {
        for moment in [0, 20, 100, 400, 1500, 3000] {
            let name = fresh_name();
            let mut start = containerd
                .command()
                .args(["run", "-d", "--runtime", KATA, image::NAME, &name, "sleep", "1000"])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            eventually("the victim exists", CONTAINER, || {
                !others.newcomers(victim).is_empty() || start.try_wait().unwrap().is_some()
            });
            std::thread::sleep(Duration::from_millis(moment));
            for pid in others.newcomers(victim) {
                kill(pid);
            }
            eventually("ctr returns", CONTAINER, || start.try_wait().unwrap().is_some());
            containerd.remove(&name);
            eventually(
                &format!("{victim} killed after {moment} ms leaves no process"),
                Duration::from_secs(10),
                || {
                    others.newcomers(VMM).is_empty()
                        && others.newcomers(SHIM).is_empty()
                        && others.newcomers(SHARE).is_empty()
                },
            );
        }
    }
    drop(containerd);
    before.assert_unchanged();
}

#[test]
fn containerd_restarted_under_a_running_container() {
    let before = Residue::take();
    let mut containerd = Containerd::start();
    let name = containerd.sleeper(KATA, &[]);
    containerd.kill();
    containerd.launch();
    assert_eq!(containerd.exec(&name, &["echo", "still here"]).ok(), "still here");
    containerd.remove(&name);
    drop(containerd);
    before.assert_unchanged();
}

#[test]
fn the_agent_killed_in_the_guest_ends_the_sandbox() {
    let before = Residue::take();
    let containerd = Containerd::start();
    let name = containerd.sleeper(KATA, &[]);
    // Process 1 of a guest cannot be killed from a container; a panic is what its death amounts to.
    let options = ["--privileged"];
    let doomed = fresh_name();
    let mut args = vec!["run", "-d", "--runtime", KATA];
    args.extend(options);
    args.extend([
        image::NAME,
        &doomed,
        "sh",
        "-c",
        "sleep 1; echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger",
    ]);
    containerd.ctr(&args).ok();
    eventually("the task is known to be over", CONTAINER, || {
        containerd.ctr(&["task", "list"]).out.lines().any(|line| line.contains(&doomed) && line.contains("STOPPED"))
    });
    assert_eq!(containerd.exec(&name, &["echo", "unharmed"]).ok(), "unharmed", "another pod is another kernel");
    containerd.remove(&doomed);
    containerd.remove(&name);
    drop(containerd);
    before.assert_unchanged();
}
