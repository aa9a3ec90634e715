//! What a host looks like from outside: processes, mounts, links, namespaces, cgroups, files.
//!
//! A test takes a [`Residue`] before and calls [`Residue::assert_unchanged`] after; whatever the product left is named.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A picture of everything a container runtime could leave on a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Residue {
    things: BTreeSet<String>,
}

impl Residue {
    /// Takes the picture.
    pub fn take() -> Residue {
        let mut things = BTreeSet::new();
        processes(&mut things);
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        things.extend(mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(|at| format!("mount {at}")));
        for link in entries(Path::new("/sys/class/net")) {
            things.insert(format!("link {}", link.display()));
        }
        for dir in ["/run/kata", "/run/kata-containers", "/run/containerd/s", "/run/netns", "/run/vc"] {
            tree(Path::new(dir), "file", &mut things);
        }
        tree_of_dirs(Path::new("/sys/fs/cgroup"), 4, &mut things);
        // Directories that hold state while there is something to hold may stay, empty.
        for kept in [
            "/run/kata",
            "/run/kata/uids",
            "/run/kata/bundles",
            "/run/kata-containers",
            "/run/kata-containers/shared",
            "/run/kata-containers/shared/sandboxes",
            "/run/containerd/s",
        ] {
            things.remove(&format!("file {kept}"));
        }
        Residue { things }
    }

    /// Compares with the host as it is now, giving things that are ending a moment to end.
    ///
    /// # Panics
    ///
    /// With the list of what is new or gone.
    #[track_caller]
    pub fn assert_unchanged(&self) {
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            let now = Residue::take();
            let left: Vec<_> = now.things.difference(&self.things).collect();
            let gone: Vec<_> =
                self.things.difference(&now.things).filter(|thing| !thing.starts_with("process")).collect();
            if left.is_empty() && gone.is_empty() {
                return;
            }
            assert!(Instant::now() < end, "left behind: {left:#?}\ngone: {gone:#?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The processes of this host at one moment, to tell those that a test has caused from everybody else's.
#[derive(Clone, Debug)]
pub struct Bystanders(BTreeSet<u32>);

impl Bystanders {
    /// Takes note of who is there.
    pub fn take() -> Bystanders {
        Bystanders(pids().collect())
    }

    /// The newcomers whose command line contains `sign`, the newest last.
    pub fn newcomers(&self, sign: &str) -> Vec<u32> {
        let mut found: Vec<u32> =
            pids().filter(|pid| !self.0.contains(pid)).filter(|pid| command_line(*pid).contains(sign)).collect();
        found.sort_unstable();
        found
    }
}

fn pids() -> impl Iterator<Item = u32> {
    entries(Path::new("/proc")).into_iter().filter_map(|dir| dir.file_name()?.to_str()?.parse().ok())
}

/// The words of a process' command line; nothing for one that has ended.
fn command_line(pid: u32) -> String {
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&command).replace('\0', " ")
}

/// Programs that belong to a container; any other process of the host is not ours to judge.
const OURS: &[&str] = &["kata", "qemu-system", "containerd-shim", "runc", "vhost"];

fn processes(things: &mut BTreeSet<String>) {
    for pid in pids() {
        let command = command_line(pid);
        let program = command.split(' ').next().unwrap_or_default().rsplit('/').next().unwrap_or_default();
        if OURS.iter().any(|ours| program.starts_with(ours)) {
            things.insert(format!("process {pid} {}", command.trim_end().chars().take(120).collect::<String>()));
        }
    }
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).map(|entries| entries.flatten().map(|entry| entry.path()).collect()).unwrap_or_default()
}

fn tree(dir: &Path, what: &str, things: &mut BTreeSet<String>) {
    if !dir.exists() {
        return;
    }
    things.insert(format!("{what} {}", dir.display()));
    for path in entries(dir) {
        if path.is_dir() && !path.is_symlink() {
            tree(&path, what, things);
        } else {
            things.insert(format!("{what} {}", path.display()));
        }
    }
}

fn tree_of_dirs(dir: &Path, depth: u32, things: &mut BTreeSet<String>) {
    for path in entries(dir).into_iter().filter(|path| path.is_dir() && !path.is_symlink()) {
        // The host's own daemons make and remove groups as they please.
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if ["kata", "e2e-", "default"].iter().any(|ours| name.starts_with(ours)) {
            things.insert(format!("cgroup {}", path.display()));
        }
        if depth > 0 {
            tree_of_dirs(&path, depth - 1, things);
        }
    }
}
