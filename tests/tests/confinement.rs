//! What parses a guest's words is confined: each helper's posture as the host's kernel sees it.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashMap;
use std::fs;

use e2e::engine::{CONTAINER, Containerd, KATA, fresh_name};
use e2e::residue::{Bystanders, Residue};
use e2e::{image, prefix, run};

/// The one new process whose command line contains `sign`.
fn pid_of(sign: &str, others: &Bystanders) -> u32 {
    let found = others.newcomers(sign);
    assert_eq!(found.len(), 1, "{sign}: {found:?}");
    found[0]
}

fn status(pid: u32) -> HashMap<String, String> {
    fs::read_to_string(format!("/proc/{pid}/status"))
        .unwrap()
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
        .collect()
}

fn namespace(pid: &str, name: &str) -> String {
    fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap().display().to_string()
}

#[test]
fn helpers_have_no_more_than_they_need() {
    let before = Residue::take();
    let others = Bystanders::take();
    let containerd = Containerd::start();
    let name = containerd.sleeper(KATA, &[]);

    let vmm = pid_of("qemu-system", &others);
    let posture = status(vmm);
    let uid: u32 = posture["Uid"].split_whitespace().next().unwrap().parse().unwrap();
    assert!(uid >= 1_000_000, "a user of its own: {uid}");
    assert_eq!(posture["CapEff"], "0000000000000000");
    assert_eq!(posture["CapPrm"], "0000000000000000");
    assert_eq!(posture["NoNewPrivs"], "1");
    assert_eq!(posture["Seccomp"], "2");
    for kind in ["mnt", "pid", "net", "ipc", "uts"] {
        assert_ne!(namespace(&vmm.to_string(), kind), namespace("self", kind), "{kind}");
    }
    let mut root: Vec<String> = fs::read_dir(format!("/proc/{vmm}/root"))
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    root.retain(|entry| ["root", "home", "run", "var", "tmp", "sys", "proc"].contains(&entry.as_str()));
    assert!(root.is_empty(), "the VMM sees {root:?}");

    let server = pid_of("__share", &others);
    let posture = status(server);
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD and SETFCAP.
    assert_eq!(posture["CapEff"], "00000000880000db");
    assert_eq!(posture["NoNewPrivs"], "1");
    assert_eq!(posture["Seccomp"], "2");
    for kind in ["mnt", "pid", "net", "ipc", "uts"] {
        assert_ne!(namespace(&server.to_string(), kind), namespace("self", kind), "{kind}");
    }
    let exported = fs::read_dir(format!("/proc/{server}/root")).unwrap().flatten().map(|entry| entry.file_name());
    assert_eq!(exported.collect::<Vec<_>>(), [name.as_str()], "the export and nothing else");

    containerd.remove(&name);
    drop(containerd);
    before.assert_unchanged();
}

#[test]
fn a_hostile_guest_changes_no_file_of_the_installation() {
    let containerd = Containerd::start();
    let files = ["share/kata/vmlinuz", "share/kata/initrd.img", "bin/kata"];
    let hash = || {
        files.map(|file| {
            run(std::process::Command::new("sha256sum").arg(prefix().join(file)), CONTAINER).ok().to_owned()
        })
    };
    let before = hash();
    // Every device of the guest that can be opened is written to, memory included.
    let script = "for d in /dev/* /run/*; do [ -b $d ] && dd if=/dev/zero of=$d bs=4k count=64 2>/dev/null; done; \
                  for m in 0 1 2 16 32; do mknod /run/b$m b 254 $m; dd if=/dev/zero of=/run/b$m bs=4k count=64 2>/dev/null; done; \
                  echo tried";
    let said = containerd.run(KATA, &["--privileged"], &["sh", "-c", script]);
    assert_eq!(said.ok(), "tried");
    assert_eq!(hash(), before);
}

#[test]
fn a_read_only_mount_is_read_only_for_the_guests_root_too() {
    let containerd = Containerd::start();
    let dir = tempfile::TempDir::new().unwrap();
    fs::write(dir.path().join("file"), "unchanged").unwrap();
    let mount = format!("type=bind,src={},dst=/mnt,options=rbind:ro", dir.path().display());
    let script = "mount -o remount,rw /mnt; mount -o remount,rw,bind /mnt; echo changed > /mnt/file; echo $?";
    let said = containerd.run(KATA, &["--privileged", "--mount", &mount], &["sh", "-c", script]);
    assert_eq!(said.out.trim(), "1", "{said:?}");
    assert_eq!(fs::read_to_string(dir.path().join("file")).unwrap(), "unchanged");
}

#[test]
fn a_link_in_a_root_file_system_leads_nowhere_on_the_host() {
    // The container's image says that /mnt is a link out; a volume is then mounted below it.
    let containerd = Containerd::start();
    let rootfs = tempfile::TempDir::new().unwrap();
    image::unpack(rootfs.path());
    let victim = tempfile::TempDir::new().unwrap();
    std::os::unix::fs::symlink(victim.path(), rootfs.path().join("mnt")).unwrap();
    let name = fresh_name();
    let mut spec = e2e::spec::base(rootfs.path(), "echo x > /mnt/volume/file; ls -l /mnt/volume");
    spec["mounts"].as_array_mut().unwrap().push(e2e::spec::mount("/mnt/volume", "tmpfs", "tmpfs", &[]));
    let config = rootfs.path().join("config.json");
    fs::write(&config, spec.to_string()).unwrap();
    let args = ["run", "--rm", "--runtime", KATA, "--config", config.to_str().unwrap(), &name];
    run(containerd.command().args(args), CONTAINER);
    assert_eq!(fs::read_dir(victim.path()).unwrap().count(), 0, "nothing was made on the host");
}
