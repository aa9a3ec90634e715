//! `kata run` and its everyday verbs, with no engine at all.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::process::Command;
use std::time::Duration;

use e2e::residue::Residue;
use e2e::{eventually, image, kata, prefix, run, run_with_input};
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(90);

fn kata_run(args: &[&str]) -> e2e::Said {
    run(kata().args(["run", "--rm"]).args(args), LIMIT)
}

#[test]
fn the_built_in_root_runs_a_command_and_leaves_nothing() {
    let before = Residue::take();
    assert_eq!(kata_run(&["echo", "hello"]).ok(), "hello");
    assert_eq!(kata_run(&["sh", "-c", "echo out; echo err >&2; exit 9"]).code, 9);
    before.assert_unchanged();
}

#[test]
fn the_options_do_what_they_say() {
    let before = Residue::take();
    assert_eq!(kata_run(&["-e", "A=b c", "-w", "/tmp", "sh", "-c", "echo $A; pwd"]).ok(), "b c\n/tmp");
    assert_eq!(kata_run(&["--cpus", "2", "nproc"]).ok(), "2");
    let big = kata_run(&["-m", "1g", "sh", "-c", "grep MemTotal /proc/meminfo | tr -dc 0-9"]);
    let kib: u64 = big.ok().parse().unwrap();
    assert!((900 << 10..1100 << 10).contains(&kib), "{kib} KiB");
    let rootfs = TempDir::new().unwrap();
    image::unpack(rootfs.path());
    let path = rootfs.path().to_str().unwrap();
    assert_eq!(kata_run(&["--rootfs", path, "cat", "/data/hello"]).ok(), "hello from the image");
    drop(rootfs);
    before.assert_unchanged();
}

#[test]
fn standard_input_is_piped_and_its_end_is_seen() {
    let said = run_with_input(kata().args(["run", "--rm", "cat"]), b"line one\nline two\n", LIMIT);
    assert_eq!(said.ok(), "line one\nline two");
}

#[test]
fn a_terminal_has_its_size_and_ctrl_c_interrupts() {
    let before = Residue::take();
    let command = format!("stty cols 91 rows 37; {} run --rm -it stty size", prefix().join("bin/kata").display());
    let said = run(Command::new("script").args(["-qec", &command, "/dev/null"]), LIMIT);
    assert!(said.out.contains("37 91"), "{said:?}");

    let command = format!("{} run --rm -it sh -c 'sleep 1000; echo after'", prefix().join("bin/kata").display());
    let mut child = Command::new("script")
        .args(["-qec", &command, "/dev/null"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    eventually("it runs", LIMIT, || run(kata().arg("list"), LIMIT).out.contains("running"));
    let mut input = child.stdin.take().unwrap();
    // Until the shell has started its command nobody minds the key: process 1 has no handler for the signal.
    eventually("it ended", Duration::from_secs(20), || {
        // Once it has ended there is nobody to type to.
        drop(std::io::Write::write_all(&mut input, b"\x03"));
        child.try_wait().unwrap().is_some()
    });
    assert_eq!(child.wait().unwrap().code(), Some(130));
    before.assert_unchanged();
}

#[test]
fn list_exec_kill_and_delete_see_it() {
    let before = Residue::take();
    let runner = std::thread::spawn(|| run(kata().args(["run", "--name", "verbs", "sleep", "1000"]), LIMIT));
    eventually("it runs", LIMIT, || {
        run(kata().arg("list"), LIMIT).out.lines().any(|line| line.contains("verbs") && line.contains("running"))
    });
    assert_eq!(run(kata().args(["exec", "verbs", "echo", "inside"]), LIMIT).ok(), "inside");
    assert_eq!(run(kata().args(["exec", "verbs", "sh", "-c", "exit 5"]), LIMIT).code, 5);
    let listed: serde_json::Value =
        serde_json::from_str(run(kata().args(["list", "--format", "json"]), LIMIT).ok()).unwrap();
    assert!(listed.to_string().contains("verbs"));
    run(kata().args(["delete", "verbs"]), LIMIT).failed();
    run(kata().args(["kill", "verbs", "KILL"]), LIMIT).ok();
    assert_eq!(runner.join().unwrap().code, 137);
    run(kata().args(["delete", "--force", "verbs"]), LIMIT).ok();
    before.assert_unchanged();
}

#[test]
fn the_configuration_explains_itself() {
    let shown = run(kata().args(["config", "show"]), LIMIT);
    assert!(shown.ok().contains("default_memory"), "{shown:?}");
    run(kata().args(["config", "check"]), LIMIT).ok();
    assert!(run(kata().args(["config", "explain", "hypervisor.qemu.default_memory"]), LIMIT).ok().contains("MiB"));
}
