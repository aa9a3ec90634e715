//! What a group uses: control group files as the wire's statistics.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use protocol::agent::{
    BlkioStats, BlkioStatsEntry, CgroupStats, CpuStats, CpuUsage, HugetlbStats, MemoryData, MemoryStats, PidsStats,
    ThrottlingData,
};

use super::{Cgroup, Error, Version, read};

/// Nanoseconds of one tick of `cpuacct.stat`: `USER_HZ` is 100 on every architecture that Linux has left.
const TICK: u64 = 10_000_000;

/// Reads the statistics of a group.
pub(super) fn stats(group: &Cgroup) -> Result<CgroupStats, Error> {
    // A group that is gone has no statistics; a controller that is missing has none to give.
    read(group.main(), "cgroup.procs")?;
    Ok(match group.version() {
        Version::V2 => v2(group.main()),
        Version::V1 => v1(group),
    })
}

fn v2(dir: &Path) -> CgroupStats {
    let cpu = pairs(dir, "cpu.stat");
    let micro = |key: &str| cpu.get(key).copied().unwrap_or(0).saturating_mul(1000);
    let count = |key: &str| cpu.get(key).copied().unwrap_or(0);
    let memory = |current: &str, max: &str| MemoryData {
        usage: number(dir, current),
        limit: number(dir, max),
        ..Default::default()
    };
    let events = pairs(dir, "memory.events");
    let stats = pairs(dir, "memory.stat");
    let used = |key: &str| stats.get(key).copied().unwrap_or(0);
    let mut usage = memory("memory.current", "memory.max");
    usage.max_usage = number(dir, "memory.peak");
    usage.failcnt = events.get("max").copied().unwrap_or(0);
    CgroupStats {
        cpu_stats: Some(CpuStats {
            cpu_usage: Some(CpuUsage {
                total_usage: micro("usage_usec"),
                usage_in_kernelmode: micro("system_usec"),
                usage_in_usermode: micro("user_usec"),
                ..Default::default()
            })
            .into(),
            throttling_data: Some(ThrottlingData {
                periods: count("nr_periods"),
                throttled_periods: count("nr_throttled"),
                throttled_time: micro("throttled_usec"),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        })
        .into(),
        memory_stats: Some(MemoryStats {
            usage: Some(usage).into(),
            cache: used("file"),
            swap_usage: Some(memory("memory.swap.current", "memory.swap.max")).into(),
            kernel_usage: Some(MemoryData { usage: used("kernel"), ..Default::default() }).into(),
            stats,
            events,
            use_hierarchy: true,
            ..Default::default()
        })
        .into(),
        pids_stats: Some(PidsStats {
            current: number(dir, "pids.current"),
            limit: number(dir, "pids.max"),
            ..Default::default()
        })
        .into(),
        blkio_stats: Some(io_stat(&text(dir, "io.stat"))).into(),
        hugetlb_stats: huge(dir, ".current", ".max", ""),
        ..Default::default()
    }
}

fn v1(group: &Cgroup) -> CgroupStats {
    let mut stats = CgroupStats::new();
    if let Some(dir) = group.dir("cpuacct") {
        let ticks = pairs(dir, "cpuacct.stat");
        let usage = stats.cpu_stats.mut_or_insert_default().cpu_usage.mut_or_insert_default();
        usage.total_usage = number(dir, "cpuacct.usage");
        usage.percpu_usage = numbers(&text(dir, "cpuacct.usage_percpu"));
        usage.usage_in_usermode = ticks.get("user").copied().unwrap_or(0).saturating_mul(TICK);
        usage.usage_in_kernelmode = ticks.get("system").copied().unwrap_or(0).saturating_mul(TICK);
    }
    if let Some(dir) = group.dir("cpu") {
        let pairs = pairs(dir, "cpu.stat");
        let count = |key: &str| pairs.get(key).copied().unwrap_or(0);
        let throttling = stats.cpu_stats.mut_or_insert_default().throttling_data.mut_or_insert_default();
        throttling.periods = count("nr_periods");
        throttling.throttled_periods = count("nr_throttled");
        throttling.throttled_time = count("throttled_time");
    }
    if let Some(dir) = group.dir("memory") {
        let data = |prefix: &str| MemoryData {
            usage: number(dir, &format!("{prefix}.usage_in_bytes")),
            max_usage: number(dir, &format!("{prefix}.max_usage_in_bytes")),
            failcnt: number(dir, &format!("{prefix}.failcnt")),
            limit: number(dir, &format!("{prefix}.limit_in_bytes")),
            ..Default::default()
        };
        let pairs = pairs(dir, "memory.stat");
        stats.memory_stats = Some(MemoryStats {
            cache: pairs.get("cache").copied().unwrap_or(0),
            usage: Some(data("memory")).into(),
            swap_usage: Some(data("memory.memsw")).into(),
            kernel_usage: Some(data("memory.kmem")).into(),
            use_hierarchy: number(dir, "memory.use_hierarchy") == 1,
            stats: pairs,
            ..Default::default()
        })
        .into();
    }
    if let Some(dir) = group.dir("pids") {
        stats.pids_stats = Some(PidsStats {
            current: number(dir, "pids.current"),
            limit: number(dir, "pids.max"),
            ..Default::default()
        })
        .into();
    }
    if let Some(dir) = group.dir("blkio") {
        stats.blkio_stats = Some(BlkioStats {
            io_service_bytes_recursive: blkio(&text(dir, "blkio.throttle.io_service_bytes_recursive")),
            io_serviced_recursive: blkio(&text(dir, "blkio.throttle.io_serviced_recursive")),
            ..Default::default()
        })
        .into();
    }
    if let Some(dir) = group.dir("hugetlb") {
        stats.hugetlb_stats = huge(dir, ".usage_in_bytes", ".limit_in_bytes", ".max_usage_in_bytes");
    }
    stats
}

/// A file's text; one that is not there says nothing.
fn text(dir: &Path, file: &str) -> String {
    fs::read_to_string(dir.join(file)).unwrap_or_default()
}

/// A file's one number; `max` is the largest there is.
fn number(dir: &Path, file: &str) -> u64 {
    parse(&text(dir, file))
}

fn parse(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        other => other.parse().unwrap_or(0),
    }
}

fn numbers(text: &str) -> Vec<u64> {
    text.split_whitespace().map(parse).collect()
}

/// A file of lines `key value`.
fn pairs(dir: &Path, file: &str) -> HashMap<String, u64> {
    parse_pairs(&text(dir, file))
}

pub(super) fn parse_pairs(text: &str) -> HashMap<String, u64> {
    text.lines().filter_map(|line| line.split_once(' ')).map(|(key, value)| (key.to_owned(), parse(value))).collect()
}

/// `io.stat`: `major:minor key=value …`, with the keys as the operations of version 1.
pub(super) fn io_stat(text: &str) -> BlkioStats {
    let mut stats = BlkioStats::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some((major, minor)) = words.next().and_then(device) else { continue };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let (op, bytes) = match key {
                "rbytes" => ("Read", true),
                "wbytes" => ("Write", true),
                "dbytes" => ("Discard", true),
                "rios" => ("Read", false),
                "wios" => ("Write", false),
                "dios" => ("Discard", false),
                _ => continue,
            };
            let entry = BlkioStatsEntry { major, minor, op: op.to_owned(), value: parse(value), ..Default::default() };
            if bytes {
                stats.io_service_bytes_recursive.push(entry);
            } else {
                stats.io_serviced_recursive.push(entry);
            }
        }
    }
    stats
}

/// Files of version 1: `major:minor operation value`, and a total.
pub(super) fn blkio(text: &str) -> Vec<BlkioStatsEntry> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (major, minor) = words.next().and_then(device)?;
            let op = words.next()?.to_owned();
            Some(BlkioStatsEntry { major, minor, op, value: parse(words.next()?), ..Default::default() })
        })
        .collect()
}

fn device(word: &str) -> Option<(u64, u64)> {
    let (major, minor) = word.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Every page size that the group's directory has files for.
fn huge(dir: &Path, usage: &str, limit: &str, most: &str) -> HashMap<String, HugetlbStats> {
    let entries = fs::read_dir(dir).map(|entries| entries.flatten().collect()).unwrap_or_else(|_| Vec::new());
    entries
        .into_iter()
        .filter_map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            let size = name.strip_prefix("hugetlb.")?.strip_suffix(usage)?.to_owned();
            if size.contains('.') {
                return None;
            }
            let file = |suffix: &str| number(dir, &format!("hugetlb.{size}{suffix}"));
            let max_usage = if most.is_empty() { file(limit) } else { file(most) };
            Some((size.clone(), HugetlbStats { usage: file(usage), max_usage, ..Default::default() }))
        })
        .collect()
}
