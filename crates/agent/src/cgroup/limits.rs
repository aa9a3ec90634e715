//! Limits: the resources of the OCI configuration as values of control group files.
//!
//! What to write is worked out first, as data, and then written: so the whole of it can be tested without a kernel.

use std::fs;
use std::path::Path;

use protocol::oci::{LinuxBlockIO, LinuxCPU, LinuxHugepageLimit, LinuxMemory, LinuxResources};

use super::{Cgroup, Error, Version, set};

/// One value: controller (version 1), file, text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Write {
    pub(super) controller: &'static str,
    pub(super) file: String,
    pub(super) value: String,
    /// What is asked for holds without the file too: it lifts or forbids what the kernel does not have.
    pub(super) optional: bool,
}

fn write(controller: &'static str, file: impl Into<String>, value: impl ToString) -> Write {
    Write { controller, file: file.into(), value: value.to_string(), optional: false }
}

/// Writes what the resources set.
pub(super) fn apply(group: &Cgroup, resources: &LinuxResources) -> Result<(), Error> {
    let current = |file: &str| fs::read_to_string(group.main().join(file)).ok();
    let writes = match group.version() {
        Version::V1 => v1(resources)?,
        Version::V2 => v2(resources, &current)?,
    };
    let mut refused = None;
    for write in &writes {
        match write_one(group, write) {
            Ok(()) => {}
            // Memory below swap, or swap below memory, may be refused before the other has been changed.
            Err(error) if write.file.starts_with("memory.") => refused = Some(error),
            Err(error) => return Err(error),
        }
    }
    if refused.is_some() {
        for write in writes.iter().filter(|write| write.file.starts_with("memory.")) {
            write_one(group, write)?;
        }
    }
    Ok(())
}

fn write_one(group: &Cgroup, write: &Write) -> Result<(), Error> {
    if write.optional && !group.dir(write.controller).is_some_and(|dir| dir.join(&write.file).exists()) {
        return Ok(());
    }
    group.write(write.controller, &write.file, &write.value)
}

/// Version 2. Zero means that the wire's field was not set; `current` reads a file of the group, if it is there.
pub(super) fn v2(resources: &LinuxResources, current: &dyn Fn(&str) -> Option<String>) -> Result<Vec<Write>, Error> {
    let mut writes = Vec::new();
    if let Some(cpu) = resources.CPU.as_ref() {
        cpu_v2(cpu, current, &mut writes)?;
    }
    if let Some(memory) = resources.Memory.as_ref() {
        memory_v2(memory, &mut writes)?;
    }
    if let Some(pids) = resources.Pids.as_ref() {
        writes.push(write("pids", "pids.max", limit(pids.Limit)));
    }
    if let Some(io) = resources.BlockIO.as_ref() {
        block_v2(io, current, &mut writes);
    }
    for huge in &resources.HugepageLimits {
        for kind in ["", ".rsvd"] {
            writes.push(huge_page(huge, kind, "max", 2)?);
        }
    }
    if resources.Network.as_ref().is_some_and(|network| network.ClassID != 0 || !network.Priorities.is_empty()) {
        return Err(Error::Unsupported("linux.resources.network".to_owned(), 2));
    }
    let mut unified: Vec<(&String, &String)> = resources.Unified.iter().collect();
    unified.sort();
    for (file, value) in unified {
        if file.contains('/') || !file.contains('.') {
            return Err(Error::Unsupported(format!("linux.resources.unified.{file}"), 2));
        }
        writes.push(write("", file, value));
    }
    Ok(writes)
}

fn cpu_v2(cpu: &LinuxCPU, current: &dyn Fn(&str) -> Option<String>, writes: &mut Vec<Write>) -> Result<(), Error> {
    if cpu.RealtimeRuntime != 0 || cpu.RealtimePeriod != 0 {
        return Err(Error::Unsupported("linux.resources.cpu.realtimeRuntime".to_owned(), 2));
    }
    if cpu.Shares != 0 {
        writes.push(write("cpu", "cpu.weight", weight(cpu.Shares)));
    }
    if cpu.Quota != 0 || cpu.Period != 0 {
        // The one that is not set stays what it is.
        let present = current("cpu.max").unwrap_or_default();
        let (quota, period) = present.trim().split_once(' ').unwrap_or(("max", "100000"));
        let quota = if cpu.Quota == 0 { quota.to_owned() } else { limit(cpu.Quota) };
        let period = if cpu.Period == 0 { period.to_owned() } else { cpu.Period.to_string() };
        writes.push(write("cpu", "cpu.max", format!("{quota} {period}")));
    }
    for (file, value) in [("cpuset.cpus", &cpu.Cpus), ("cpuset.mems", &cpu.Mems)] {
        if !value.is_empty() {
            writes.push(write("cpuset", file, value));
        }
    }
    Ok(())
}

fn memory_v2(memory: &LinuxMemory, writes: &mut Vec<Write>) -> Result<(), Error> {
    // `kernel` is deprecated in the specification and unknown to version 2; it asks for less than `limit` does.
    // The configuration means memory and swap together, the file swap alone.
    let swap = match (memory.Swap, memory.Limit) {
        (0, -1) | (-1, _) => Some(limit_from_zero(-1)),
        (0, _) => None,
        (swap, limit) if limit > 0 && swap >= limit => Some(limit_from_zero(swap - limit)),
        _ => {
            let what = "linux.resources.memory.swap without a limit that it includes";
            return Err(Error::Unsupported(what.to_owned(), 2));
        }
    };
    if let Some(swap) = swap {
        // A kernel without swap uses none.
        let harmless = matches!(swap.as_str(), "0" | "max");
        writes.push(Write { optional: harmless, ..write("memory", "memory.swap.max", swap) });
    }
    if memory.Limit != 0 {
        writes.push(write("memory", "memory.max", limit(memory.Limit)));
    }
    if memory.Reservation != 0 {
        writes.push(write("memory", "memory.low", limit(memory.Reservation)));
    }
    Ok(())
}

fn block_v2(io: &LinuxBlockIO, current: &dyn Fn(&str) -> Option<String>, writes: &mut Vec<Write>) {
    // The BFQ scheduler takes the configuration's scale (10 to 1000), the cost model its own (1 to 10000).
    let bfq = current("io.bfq.weight").is_some();
    let file = if bfq { "io.bfq.weight" } else { "io.weight" };
    let scaled = |weight: u32| if bfq { weight } else { 1 + (weight.clamp(10, 1000) - 10) * 9999 / 990 };
    if io.Weight != 0 {
        writes.push(write("io", file, format!("default {}", scaled(io.Weight))));
    }
    for device in &io.WeightDevice {
        writes.push(write("io", file, format!("{}:{} {}", device.Major, device.Minor, scaled(device.Weight))));
    }
    for (list, key) in [
        (&io.ThrottleReadBpsDevice, "rbps"),
        (&io.ThrottleWriteBpsDevice, "wbps"),
        (&io.ThrottleReadIOPSDevice, "riops"),
        (&io.ThrottleWriteIOPSDevice, "wiops"),
    ] {
        for device in list {
            writes.push(write("io", "io.max", format!("{}:{} {key}={}", device.Major, device.Minor, device.Rate)));
        }
    }
}

/// Version 1.
pub(super) fn v1(resources: &LinuxResources) -> Result<Vec<Write>, Error> {
    let mut writes = Vec::new();
    if let Some(cpu) = resources.CPU.as_ref() {
        for (file, value) in [
            ("cpu.shares", i128::from(cpu.Shares)),
            ("cpu.cfs_period_us", i128::from(cpu.Period)),
            ("cpu.cfs_quota_us", i128::from(cpu.Quota)),
            ("cpu.rt_period_us", i128::from(cpu.RealtimePeriod)),
            ("cpu.rt_runtime_us", i128::from(cpu.RealtimeRuntime)),
        ] {
            if value != 0 {
                writes.push(write("cpu", file, value));
            }
        }
        for (file, value) in [("cpuset.cpus", &cpu.Cpus), ("cpuset.mems", &cpu.Mems)] {
            if !value.is_empty() {
                writes.push(write("cpuset", file, value));
            }
        }
    }
    if let Some(memory) = resources.Memory.as_ref() {
        for (file, value) in [
            ("memory.limit_in_bytes", memory.Limit),
            ("memory.soft_limit_in_bytes", memory.Reservation),
            // Not `kernel`: it is deprecated in the specification, and kernels since 5.16 refuse it.
            ("memory.kmem.tcp.limit_in_bytes", memory.KernelTCP),
        ] {
            if value != 0 {
                writes.push(write("memory", file, value));
            }
        }
        let swap = if (memory.Swap, memory.Limit) == (0, -1) { -1 } else { memory.Swap };
        if swap != 0 {
            // A kernel without swap uses none.
            let harmless = swap == -1 || swap == memory.Limit;
            writes.push(Write { optional: harmless, ..write("memory", "memory.memsw.limit_in_bytes", swap) });
        }
        if memory.Swappiness != 0 {
            writes.push(write("memory", "memory.swappiness", memory.Swappiness));
        }
        if memory.DisableOOMKiller {
            writes.push(write("memory", "memory.oom_control", 1));
        }
    }
    if let Some(pids) = resources.Pids.as_ref() {
        writes.push(write("pids", "pids.max", limit(pids.Limit)));
    }
    if let Some(io) = resources.BlockIO.as_ref() {
        if io.Weight != 0 {
            writes.push(write("blkio", "blkio.bfq.weight", io.Weight));
        }
        for device in &io.WeightDevice {
            let value = format!("{}:{} {}", device.Major, device.Minor, device.Weight);
            writes.push(write("blkio", "blkio.bfq.weight_device", value));
        }
        for (list, file) in [
            (&io.ThrottleReadBpsDevice, "blkio.throttle.read_bps_device"),
            (&io.ThrottleWriteBpsDevice, "blkio.throttle.write_bps_device"),
            (&io.ThrottleReadIOPSDevice, "blkio.throttle.read_iops_device"),
            (&io.ThrottleWriteIOPSDevice, "blkio.throttle.write_iops_device"),
        ] {
            for device in list {
                writes.push(write("blkio", file, format!("{}:{} {}", device.Major, device.Minor, device.Rate)));
            }
        }
    }
    for huge in &resources.HugepageLimits {
        for kind in ["", ".rsvd"] {
            writes.push(huge_page(huge, kind, "limit_in_bytes", 1)?);
        }
    }
    if let Some(network) = resources.Network.as_ref() {
        if network.ClassID != 0 {
            writes.push(write("net_cls", "net_cls.classid", network.ClassID));
        }
        for priority in &network.Priorities {
            writes.push(write("net_prio", "net_prio.ifpriomap", format!("{} {}", priority.Name, priority.Priority)));
        }
    }
    if let Some(file) = resources.Unified.keys().next() {
        return Err(Error::Unsupported(format!("linux.resources.unified.{file}"), 1));
    }
    Ok(writes)
}

/// One file of a page size. Engines limit every size of the host to nothing: a size that the guest lacks is no error then.
fn huge_page(huge: &LinuxHugepageLimit, kind: &str, file: &str, version: u8) -> Result<Write, Error> {
    let size = &huge.Pagesize;
    if size.is_empty() || !size.chars().all(|letter| letter.is_ascii_alphanumeric()) {
        return Err(Error::Unsupported(format!("linux.resources.hugepageLimits.pageSize {size:?}"), version));
    }
    let made = write("hugetlb", format!("hugetlb.{size}{kind}.{file}"), huge.Limit);
    // Kernels before 5.7 do not limit reservations.
    Ok(Write { optional: huge.Limit == 0 || !kind.is_empty(), ..made })
}

/// cpu.shares (2 to 262144, 1024 by default) on the scale of cpu.weight (1 to 10000, 100 by default): the curve through
/// both ends and both defaults that runc and crun agreed on, 10^((l² + 125 l) / 612 - 7 / 34) with l = log2(shares).
fn weight(shares: u64) -> u64 {
    let log = f64::from(u32::try_from(shares.clamp(2, 262_144)).unwrap_or(1024)).log2();
    let curve = 10_f64.powf((log * log + 125.0 * log) / 612.0 - 7.0 / 34.0);
    // The curve meets whole numbers at both ends and the default, give or take the last bit.
    (curve - 1e-6).ceil() as u64
}

/// A limit that -1 lifts and zero does not set.
fn limit(value: i64) -> String {
    if value > 0 { value.to_string() } else { "max".to_owned() }
}

/// A limit that -1 lifts and zero means.
fn limit_from_zero(value: i64) -> String {
    if value >= 0 { value.to_string() } else { "max".to_owned() }
}

/// In version 1 a new cpuset is empty and takes no process: it gets what the group above has.
pub(super) fn inherit_cpuset(dir: &Path) -> Result<(), Error> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let path = dir.join(file);
        match fs::read_to_string(&path) {
            Ok(text) if text.trim().is_empty() => {}
            // Set already, or not a cpuset at all.
            _ => continue,
        }
        let Some(parent) = dir.parent() else { continue };
        inherit_cpuset(parent)?;
        let text = fs::read_to_string(parent.join(file)).unwrap_or_default();
        set(&path, text.trim())?;
    }
    Ok(())
}
