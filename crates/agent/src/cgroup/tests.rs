//! Groups on a real kernel (version 1, which this needs mounted) and as data (version 2).

use std::process::Command;

use proptest::prelude::*;
use protocol::oci::{LinuxCPU, LinuxHugepageLimit, LinuxMemory, LinuxPids};
use tempfile::TempDir;

use super::limits::{Write, v1, v2};
use super::stats::{blkio, io_stat, parse_pairs};
use super::*;

fn resources() -> LinuxResources {
    LinuxResources {
        Memory: Some(LinuxMemory { Limit: 64 << 20, Swap: 96 << 20, Reservation: 32 << 20, ..Default::default() })
            .into(),
        CPU: Some(LinuxCPU { Shares: 1024, Quota: 50_000, Period: 100_000, ..Default::default() }).into(),
        Pids: Some(LinuxPids { Limit: 10, ..Default::default() }).into(),
        ..Default::default()
    }
}

/// A group without files.
fn nothing(_file: &str) -> Option<String> {
    None
}

fn value(writes: &[Write], file: &str) -> Option<String> {
    writes.iter().find(|write| write.file == file).map(|write| write.value.clone())
}

#[test]
fn limits_of_version_2() {
    let writes = v2(&resources(), &nothing).unwrap();
    for (file, expected) in [
        ("memory.max", "67108864"),
        ("memory.swap.max", "33554432"),
        ("memory.low", "33554432"),
        ("cpu.weight", "100"),
        ("cpu.max", "50000 100000"),
        ("pids.max", "10"),
    ] {
        assert_eq!(value(&writes, file).as_deref(), Some(expected), "{file}");
    }
}

#[test]
fn limits_of_version_1() {
    let writes = v1(&resources()).unwrap();
    assert_eq!(value(&writes, "memory.memsw.limit_in_bytes").as_deref(), Some("100663296"));
    assert_eq!(value(&writes, "cpu.shares").as_deref(), Some("1024"));
}

#[test]
fn what_a_version_lacks_is_an_error_that_names_it() {
    let mut resources = LinuxResources::new();
    resources.Unified.insert("memory.high".into(), "1".into());
    assert!(v1(&resources).unwrap_err().to_string().contains("memory.high"));
    assert_eq!(value(&v2(&resources, &nothing).unwrap(), "memory.high").as_deref(), Some("1"));
    resources.Unified.insert("../escape.x".into(), "1".into());
    assert!(v2(&resources, &nothing).is_err());
}

#[test]
fn paths_of_engines_stay_below_the_root() {
    assert_eq!(relative("/a/b", "c"), Path::new("a/b"));
    assert_eq!(relative("system.slice:cri:x", "c"), Path::new("system.slice/cri-x"));
    assert_eq!(relative("../../x", "c"), Path::new("x"));
    assert_eq!(relative("", "c"), Path::new("kata/c"));
}

#[test]
fn files_of_version_2_are_written_where_they_belong() {
    let root = TempDir::new().unwrap();
    fs::write(root.path().join("cgroup.controllers"), "cpu memory pids").unwrap();
    fs::write(root.path().join("cgroup.subtree_control"), "").unwrap();
    fs::create_dir(root.path().join("a")).unwrap();
    for file in ["cgroup.procs", "memory.max", "memory.low", "memory.swap.max", "cpu.weight", "pids.max"] {
        fs::write(root.path().join("a").join(file), "").unwrap();
    }
    let create = || Cgroup::create_in(root.path(), "/a", "id", &resources());
    let error = create().unwrap_err().to_string();
    assert!(error.contains("a/cpu.max` to `50000 100000`"), "{error}");
    fs::write(root.path().join("a/cpu.max"), "max 20000\n").unwrap();
    let group = create().unwrap();
    assert_eq!(fs::read_to_string(root.path().join("cgroup.subtree_control")).unwrap(), "+pids");
    assert_eq!(fs::read_to_string(root.path().join("a/memory.max")).unwrap(), "67108864");
    assert!(group.join().unwrap().v2_fd.is_some());
    // An update with one half of a pair keeps the other.
    let update = LinuxCPU { Quota: 1000, ..Default::default() };
    group.apply(&LinuxResources { CPU: Some(update).into(), ..Default::default() }).unwrap();
    assert_eq!(fs::read_to_string(root.path().join("a/cpu.max")).unwrap(), "1000 100000");
    // Somebody's processes are not put under another container's limits.
    fs::write(root.path().join("a/cgroup.procs"), "7\n").unwrap();
    assert!(matches!(create().unwrap_err(), Error::Group { what: "make", .. }));
    assert!(root.path().join("a").exists());
}

#[test]
fn shares_become_weights_with_both_ends_and_the_default_in_place() {
    for (shares, weight) in [(2, "1"), (1024, "100"), (262_144, "10000"), (1, "1"), (u64::MAX, "10000")] {
        let cpu = LinuxCPU { Shares: shares, ..Default::default() };
        let writes = v2(&LinuxResources { CPU: Some(cpu).into(), ..Default::default() }, &nothing).unwrap();
        assert_eq!(value(&writes, "cpu.weight").as_deref(), Some(weight), "{shares}");
    }
}

#[test]
fn swap_means_memory_and_swap_together() {
    let of = |limit, swap| {
        let memory = LinuxMemory { Limit: limit, Swap: swap, ..Default::default() };
        let writes = v2(&LinuxResources { Memory: Some(memory).into(), ..Default::default() }, &nothing)?;
        let swap = writes.into_iter().find(|write| write.file == "memory.swap.max");
        Ok::<_, Error>(swap.map(|write| (write.value, write.optional)))
    };
    let written = |value: &str, optional| Some((value.to_owned(), optional));
    assert_eq!(of(100, 0).unwrap(), None);
    assert_eq!(of(100, 100).unwrap(), written("0", true));
    assert_eq!(of(100, 150).unwrap(), written("50", false));
    assert_eq!(of(100, -1).unwrap(), written("max", true));
    assert_eq!(of(-1, 0).unwrap(), written("max", true));
    assert!(of(100, 50).is_err());
    assert!(of(0, 50).is_err());
}

#[test]
fn a_page_size_that_the_guest_lacks_may_be_limited_to_nothing() {
    let huge = |size: &str, limit| LinuxResources {
        HugepageLimits: vec![LinuxHugepageLimit { Pagesize: size.into(), Limit: limit, ..Default::default() }],
        ..Default::default()
    };
    let writes = v2(&huge("1GB", 0), &nothing).unwrap();
    assert!(writes.iter().all(|write| write.optional));
    let writes = v2(&huge("1GB", 5), &nothing).unwrap();
    assert_eq!(writes.iter().find(|write| !write.optional).map(|write| write.file.as_str()), Some("hugetlb.1GB.max"));
    assert!(v2(&huge("../x", 5), &nothing).is_err());
}

#[test]
fn a_process_joins_the_group_of_the_init_that_manages_groups_itself() {
    let root = TempDir::new().unwrap();
    let own = root.path().join("own");
    for (dir, procs) in [("own/late", "12\n"), ("own/init.scope", "9\n11\n")] {
        fs::create_dir_all(root.path().join(dir)).unwrap();
        fs::write(root.path().join(dir).join("cgroup.procs"), procs).unwrap();
    }
    fs::write(own.join("cgroup.procs"), "").unwrap();
    fs::write(own.join("cgroup.subtree_control"), "").unwrap();
    let group = Cgroup { version: Version::V2, dirs: vec![(String::new(), own.clone())], made: Vec::new() };
    assert_eq!(group.inhabited(), own);
    fs::write(own.join("cgroup.subtree_control"), "memory pids\n").unwrap();
    assert_eq!(group.inhabited(), own.join("init.scope"));
}

/// The version 2 hierarchy of this machine, if it has one.
fn unified(test: &str) -> Option<&'static Path> {
    let roots = [ROOT, "/sys/fs/cgroup/unified"].map(Path::new);
    let found = roots.into_iter().find(|root| Version::detect(root) == Version::V2);
    if found.is_none() {
        eprintln!("NOT RUN: {test}: version 2 is not mounted");
    }
    found
}

#[test]
fn a_real_group_of_version_2_freezes_is_killed_with_those_below_it_and_goes() {
    let Some(root) = unified("a_real_group_of_version_2_freezes_is_killed_with_those_below_it_and_goes") else {
        return;
    };
    let name = format!("kata-test-v2-{}", std::process::id());
    let group = Cgroup::create_in(root, &format!("/{name}/below/own"), "c", &LinuxResources::new()).unwrap();
    let inner = group.main().join("inner");
    fs::create_dir(&inner).unwrap();
    let mut children: Vec<_> = (0..2).map(|_| Command::new("sleep").arg("1000").spawn().unwrap()).collect();
    for (child, dir) in children.iter().zip([group.main(), inner.as_path()]) {
        fs::write(dir.join("cgroup.procs"), child.id().to_string()).unwrap();
    }
    assert_eq!(group.pids().unwrap().len(), 2);
    group.freeze().unwrap();
    assert!(read(group.main(), "cgroup.events").unwrap().contains("frozen 1"));
    group.thaw().unwrap();
    group.freeze().unwrap();
    group.kill_all().unwrap();
    group.wait_empty().unwrap();
    for child in &mut children {
        child.wait().unwrap();
    }
    group.delete().unwrap();
    assert!(!root.join(name).exists());
}

#[tokio::test]
async fn a_watch_tells_kills_and_ends_with_the_group() {
    let root = TempDir::new().unwrap();
    let dir = root.path().join("group");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("memory.events"), "low 0\noom_kill 0\n").unwrap();
    let group = Cgroup { version: Version::V2, dirs: vec![(String::new(), dir.clone())], made: Vec::new() };
    let mut watch = group.oom_events().unwrap();
    fs::write(dir.join("memory.events"), "low 0\noom_kill 2\n").unwrap();
    assert_eq!(watch.next().await, Some(2));
    fs::write(dir.join("memory.events"), "low 9\noom_kill 3\n").unwrap();
    assert_eq!(watch.next().await, Some(1));
    let waiting = tokio::spawn(async move { watch.next().await });
    tokio::task::yield_now().await;
    fs::remove_dir_all(&dir).unwrap();
    assert_eq!(waiting.await.unwrap(), None);
}

#[tokio::test]
async fn a_kill_for_want_of_memory_is_told_by_a_real_kernel() {
    let limit = 16 << 20;
    let memory = LinuxMemory { Limit: limit, Swap: limit, ..Default::default() };
    let resources = LinuxResources { Memory: Some(memory).into(), ..Default::default() };
    let group = Cgroup::create(&format!("/kata-test-oom-{}", std::process::id()), "c", &resources).unwrap();
    let mut watch = group.oom_events().unwrap();
    let join: Vec<String> =
        group.dirs.iter().map(|(_, dir)| format!("echo $$ > {}/cgroup.procs;", dir.display())).collect();
    // tail keeps all of a line in memory.
    let script = format!("{} exec tail /dev/zero", join.concat());
    let mut child = Command::new("sh").arg("-c").arg(script).spawn().unwrap();
    assert!(watch.next().await.is_some_and(|kills| kills > 0));
    assert!(!child.wait().unwrap().success());
    // Raised and lowered, whichever of the two limits the kernel wants first.
    for limit in [32 << 20, 16 << 20] {
        let memory = LinuxMemory { Limit: limit, Swap: limit, ..Default::default() };
        group.apply(&LinuxResources { Memory: Some(memory).into(), ..Default::default() }).unwrap();
        assert_eq!(group.stats().unwrap().memory_stats.usage.limit, limit.cast_unsigned());
    }
    group.wait_empty().unwrap();
    group.delete().unwrap();
    while watch.next().await.is_some() {}
}

#[test]
fn a_real_group_takes_processes_limits_them_and_lets_them_go() {
    let name = format!("/kata-test-{}", std::process::id());
    let resources = LinuxResources { Pids: resources().Pids, ..Default::default() };
    let group = Cgroup::create(&name, "c", &resources).unwrap();
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    for (_, dir) in &group.dirs {
        fs::write(dir.join("cgroup.procs"), child.id().to_string()).unwrap();
    }
    assert_eq!(group.pids().unwrap(), [i32::try_from(child.id()).unwrap()]);
    let stats = group.stats().unwrap();
    assert_eq!(stats.pids_stats.limit, 10);
    assert_eq!(stats.pids_stats.current, 1);
    group.freeze().unwrap();
    group.thaw().unwrap();
    group.freeze().unwrap();
    group.kill_all().unwrap();
    child.wait().unwrap();
    group.wait_empty().unwrap();
    group.delete().unwrap();
    assert!(group.dirs.iter().all(|(_, dir)| !dir.exists()));
    group.delete().unwrap();
}

#[test]
fn what_cannot_be_made_leaves_nothing() {
    let mut resources = LinuxResources::new();
    resources.Unified.insert("memory.high".into(), "1".into());
    let name = format!("/kata-test-undone-{}", std::process::id());
    if Version::detect(Path::new(ROOT)) == Version::V1 {
        assert!(Cgroup::create(&name, "c", &resources).is_err());
        assert!(!Path::new(ROOT).join("pids").join(&name[1..]).exists());
    }
}

#[test]
fn statistics_of_devices() {
    let stats = io_stat("8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\nbroken\n");
    assert_eq!(stats.io_service_bytes_recursive.len(), 3);
    assert_eq!(stats.io_serviced_recursive[0].value, 3);
    assert_eq!(blkio("8:0 Read 10\n8:0 Write 20\nTotal 30\n").len(), 2);
}

proptest! {
    #[test]
    fn any_file_is_survived(text in "\\PC*", lines in prop::collection::vec("[0-9:]{0,8} [a-z]*=?[0-9]{0,25}", 0..5)) {
        for text in [text, lines.join("\n")] {
            let _ = (parse_pairs(&text), io_stat(&text), blkio(&text));
        }
    }
}
