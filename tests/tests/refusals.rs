//! Bad input: one clear error that names cause and cure, soon, and nothing left behind.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use e2e::residue::Residue;
use e2e::{Said, kata, prefix, run};
use tempfile::TempDir;

/// Every refusal below is decided before or soon after a VM starts; none waits for a time-out.
const SOON: Duration = Duration::from_secs(30);

/// A configuration file with these lines under `[hypervisor.qemu]`, and `kata run` under it.
fn run_with(lines: &str, args: &[&str]) -> Said {
    let dir = TempDir::with_prefix("kata-refusal-").unwrap();
    let file = dir.path().join("configuration.toml");
    fs::write(&file, format!("[hypervisor.qemu]\n{lines}\n")).unwrap();
    let before = Residue::take();
    let said = run(kata().env("KATA_CONF_FILE", &file).args(["run", "--rm"]).args(args), SOON);
    before.assert_unchanged();
    said
}

#[track_caller]
fn names(said: &Said, words: &[&str]) {
    let text = said.failed();
    for word in words {
        assert!(text.contains(word), "`{word}` is not in: {text}");
    }
    assert!(!text.contains("' panicked at") && !text.contains("stack backtrace"), "{text}");
}

fn copy_of(name: &str, dir: &Path, change: impl FnOnce(&mut Vec<u8>)) -> PathBuf {
    let mut bytes = fs::read(prefix().join("share/kata").join(name)).unwrap();
    change(&mut bytes);
    let path = dir.join(name);
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn no_kernel() {
    names(&run_with("kernel = \"/nonexistent/vmlinuz\"", &["true"]), &["/nonexistent/vmlinuz", "kernel"]);
}

#[test]
fn no_initrd() {
    names(&run_with("initrd = \"/nonexistent/initrd.img\"", &["true"]), &["/nonexistent/initrd.img"]);
}

#[test]
fn a_corrupt_initrd() {
    let dir = TempDir::new().unwrap();
    let path = copy_of("initrd.img", dir.path(), |bytes| {
        bytes.truncate(bytes.len() / 3);
        for byte in bytes.iter_mut().skip(100).step_by(7) {
            *byte ^= 0x55;
        }
    });
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    names(&run_with(&format!("initrd = {path:?}"), &["true"]), &["panic"]);
}

#[test]
fn no_hypervisor() {
    names(&run_with("path = \"/nonexistent/qemu\"", &["true"]), &["/nonexistent/qemu", "install"]);
}

#[test]
fn more_memory_than_the_host_has() {
    let said = run_with("", &["-m", "900g", "true"]);
    names(&said, &["memory", "host"]);
}

#[test]
fn a_rootfs_that_is_not_there() {
    names(&run_with("", &["--rootfs", "/nonexistent/rootfs", "true"]), &["/nonexistent/rootfs"]);
}

#[test]
fn a_command_that_is_not_there() {
    let said = run_with("", &["/bin/no-such-command"]);
    names(&said, &["no-such-command"]);
    assert_eq!(said.code, 127, "as shells and engines have it");
}

#[test]
fn a_misspelt_key_and_an_unsupported_one_in_one_go() {
    let said = run_with("default_memroy = 512\nenable_iommu = true", &["true"]);
    names(&said, &["default_memroy", "default_memory", "enable_iommu"]);
}

#[test]
fn a_name_that_is_a_path() {
    names(&run_with("", &["--name", "../../etc", "true"]), &["../../etc"]);
}

#[test]
fn a_full_disk() {
    // /run is where a sandbox keeps its state; a tiny one of its own is full at once.
    let before = Residue::take();
    let script = format!(
        "mount -t tmpfs -o size=4k,nr_inodes=3 full /run/kata 2>/dev/null || {{ mkdir -p /run/kata; mount -t tmpfs -o \
         size=4k,nr_inodes=3 full /run/kata; }}; {} run --rm true",
        prefix().join("bin/kata").display()
    );
    let said = run(Command::new("unshare").args(["-m", "sh", "-c", &script]), SOON);
    names(&said, &["No space left"]);
    before.assert_unchanged();
}

#[test]
fn a_busy_name() {
    let before = Residue::take();
    let first = std::thread::spawn(|| {
        run(kata().args(["run", "--rm", "--name", "busy", "sleep", "8"]), Duration::from_secs(90))
    });
    e2e::eventually("the first is running", Duration::from_secs(60), || {
        run(kata().args(["list"]), SOON).out.lines().any(|line| line.contains("busy") && line.contains("running"))
    });
    names(&run(kata().args(["run", "--rm", "--name", "busy", "true"]), SOON), &["busy"]);
    first.join().unwrap().ok();
    before.assert_unchanged();
}
