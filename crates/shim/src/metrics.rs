//! A container's statistics, from the guest's words to containerd's: cgroup v1 or v2, as the guest has it.

use std::collections::HashMap;

use containerd_shim_protos::cgroups::metrics as v1;
use containerd_shim_protos::cgroups_v2::metrics as v2;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use protocol::agent::{BlkioStats, BlkioStatsEntry, CgroupStats, MemoryData, NetworkStats, StatsContainerResponse};

use crate::events::pack;

/// Statistics as an engine expects them.
pub(crate) fn metrics(stats: &StatsContainerResponse) -> Result<Any, protobuf::Error> {
    let cgroup = stats.cgroup_stats.as_ref().cloned().unwrap_or_default();
    // An agent that does not say speaks of v1, as all did when this was designed.
    if stats.cgroup_version == 2 {
        pack(&metrics_v2(&cgroup, &stats.network_stats))
    } else {
        pack(&metrics_v1(&cgroup, &stats.network_stats))
    }
}

/// A named counter, 0 where the guest has none of that name.
fn of(map: &HashMap<String, u64>, key: &str) -> u64 {
    map.get(key).copied().unwrap_or(0)
}

fn metrics_v1(stats: &CgroupStats, network: &[NetworkStats]) -> v1::Metrics {
    let usage = &stats.cpu_stats.cpu_usage;
    let throttling = &stats.cpu_stats.throttling_data;
    v1::Metrics {
        cpu: MessageField::some(v1::CPUStat {
            usage: MessageField::some(v1::CPUUsage {
                total: usage.total_usage,
                kernel: usage.usage_in_kernelmode,
                user: usage.usage_in_usermode,
                per_cpu: usage.percpu_usage.clone(),
                ..Default::default()
            }),
            throttling: MessageField::some(v1::Throttle {
                periods: throttling.periods,
                throttled_periods: throttling.throttled_periods,
                throttled_time: throttling.throttled_time,
                ..Default::default()
            }),
            ..Default::default()
        }),
        memory: MessageField::some(memory_v1(stats)),
        memory_oom_control: MessageField::some(v1::MemoryOomControl {
            oom_kill: of(&stats.memory_stats.events, "oom_kill"),
            ..Default::default()
        }),
        pids: MessageField::some(v1::PidsStat {
            current: stats.pids_stats.current,
            limit: stats.pids_stats.limit,
            ..Default::default()
        }),
        blkio: MessageField::some(blkio_v1(&stats.blkio_stats)),
        hugetlb: sorted(&stats.hugetlb_stats)
            .into_iter()
            .map(|(size, huge)| v1::HugetlbStat {
                usage: huge.usage,
                max: huge.max_usage,
                failcnt: huge.failcnt,
                pagesize: size.clone(),
                ..Default::default()
            })
            .collect(),
        network: network
            .iter()
            .map(|net| v1::NetworkStat {
                name: net.name.clone(),
                rx_bytes: net.rx_bytes,
                rx_packets: net.rx_packets,
                rx_errors: net.rx_errors,
                rx_dropped: net.rx_dropped,
                tx_bytes: net.tx_bytes,
                tx_packets: net.tx_packets,
                tx_errors: net.tx_errors,
                tx_dropped: net.tx_dropped,
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    }
}

fn memory_v1(stats: &CgroupStats) -> v1::MemoryStat {
    let memory = &stats.memory_stats;
    let stat = |key: &str| of(&memory.stats, key);
    let entry = |data: &MemoryData| {
        MessageField::some(v1::MemoryEntry {
            limit: data.limit,
            usage: data.usage,
            max: data.max_usage,
            failcnt: data.failcnt,
            ..Default::default()
        })
    };
    v1::MemoryStat {
        cache: memory.cache,
        rss: stat("rss"),
        rss_huge: stat("rss_huge"),
        mapped_file: stat("mapped_file"),
        dirty: stat("dirty"),
        writeback: stat("writeback"),
        pg_pg_in: stat("pgpgin"),
        pg_pg_out: stat("pgpgout"),
        pg_fault: stat("pgfault"),
        pg_maj_fault: stat("pgmajfault"),
        inactive_anon: stat("inactive_anon"),
        active_anon: stat("active_anon"),
        inactive_file: stat("inactive_file"),
        active_file: stat("active_file"),
        unevictable: stat("unevictable"),
        hierarchical_memory_limit: stat("hierarchical_memory_limit"),
        hierarchical_swap_limit: stat("hierarchical_memsw_limit"),
        total_cache: stat("total_cache"),
        total_rss: stat("total_rss"),
        total_rss_huge: stat("total_rss_huge"),
        total_mapped_file: stat("total_mapped_file"),
        total_dirty: stat("total_dirty"),
        total_writeback: stat("total_writeback"),
        total_pg_pg_in: stat("total_pgpgin"),
        total_pg_pg_out: stat("total_pgpgout"),
        total_pg_fault: stat("total_pgfault"),
        total_pg_maj_fault: stat("total_pgmajfault"),
        total_inactive_anon: stat("total_inactive_anon"),
        total_active_anon: stat("total_active_anon"),
        total_inactive_file: stat("total_inactive_file"),
        total_active_file: stat("total_active_file"),
        total_unevictable: stat("total_unevictable"),
        usage: entry(&memory.usage),
        swap: entry(&memory.swap_usage),
        kernel: entry(&memory.kernel_usage),
        ..Default::default()
    }
}

fn blkio_v1(blkio: &BlkioStats) -> v1::BlkIOStat {
    let entries = |list: &[BlkioStatsEntry]| {
        list.iter()
            .map(|entry| v1::BlkIOEntry {
                op: entry.op.clone(),
                major: entry.major,
                minor: entry.minor,
                value: entry.value,
                ..Default::default()
            })
            .collect()
    };
    v1::BlkIOStat {
        io_service_bytes_recursive: entries(&blkio.io_service_bytes_recursive),
        io_serviced_recursive: entries(&blkio.io_serviced_recursive),
        io_queued_recursive: entries(&blkio.io_queued_recursive),
        io_service_time_recursive: entries(&blkio.io_service_time_recursive),
        io_wait_time_recursive: entries(&blkio.io_wait_time_recursive),
        io_merged_recursive: entries(&blkio.io_merged_recursive),
        io_time_recursive: entries(&blkio.io_time_recursive),
        sectors_recursive: entries(&blkio.sectors_recursive),
        ..Default::default()
    }
}

fn metrics_v2(stats: &CgroupStats, network: &[NetworkStats]) -> v2::Metrics {
    let usage = &stats.cpu_stats.cpu_usage;
    let throttling = &stats.cpu_stats.throttling_data;
    let events = &stats.memory_stats.events;
    v2::Metrics {
        pids: MessageField::some(v2::PidsStat {
            current: stats.pids_stats.current,
            limit: stats.pids_stats.limit,
            ..Default::default()
        }),
        // The guest counts nanoseconds, cgroup v2 microseconds.
        cpu: MessageField::some(v2::CPUStat {
            usage_usec: usage.total_usage / 1000,
            user_usec: usage.usage_in_usermode / 1000,
            system_usec: usage.usage_in_kernelmode / 1000,
            nr_periods: throttling.periods,
            nr_throttled: throttling.throttled_periods,
            throttled_usec: throttling.throttled_time / 1000,
            ..Default::default()
        }),
        memory: MessageField::some(memory_v2(stats)),
        memory_events: MessageField::some(v2::MemoryEvents {
            low: of(events, "low"),
            high: of(events, "high"),
            max: of(events, "max"),
            oom: of(events, "oom"),
            oom_kill: of(events, "oom_kill"),
            oom_group_kill: of(events, "oom_group_kill"),
            ..Default::default()
        }),
        io: MessageField::some(v2::IOStat { usage: io_v2(&stats.blkio_stats), ..Default::default() }),
        hugetlb: sorted(&stats.hugetlb_stats)
            .into_iter()
            .map(|(size, huge)| v2::HugeTlbStat {
                current: huge.usage,
                max: huge.max_usage,
                failcnt: huge.failcnt,
                pagesize: size.clone(),
                ..Default::default()
            })
            .collect(),
        network: network
            .iter()
            .map(|net| v2::NetworkStat {
                name: net.name.clone(),
                rx_bytes: net.rx_bytes,
                rx_packets: net.rx_packets,
                rx_errors: net.rx_errors,
                rx_dropped: net.rx_dropped,
                tx_bytes: net.tx_bytes,
                tx_packets: net.tx_packets,
                tx_errors: net.tx_errors,
                tx_dropped: net.tx_dropped,
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    }
}

fn memory_v2(stats: &CgroupStats) -> v2::MemoryStat {
    let memory = &stats.memory_stats;
    let stat = |key: &str| of(&memory.stats, key);
    v2::MemoryStat {
        anon: stat("anon"),
        file: stat("file"),
        kernel_stack: stat("kernel_stack"),
        slab: stat("slab"),
        sock: stat("sock"),
        shmem: stat("shmem"),
        file_mapped: stat("file_mapped"),
        file_dirty: stat("file_dirty"),
        file_writeback: stat("file_writeback"),
        anon_thp: stat("anon_thp"),
        inactive_anon: stat("inactive_anon"),
        active_anon: stat("active_anon"),
        inactive_file: stat("inactive_file"),
        active_file: stat("active_file"),
        unevictable: stat("unevictable"),
        slab_reclaimable: stat("slab_reclaimable"),
        slab_unreclaimable: stat("slab_unreclaimable"),
        pgfault: stat("pgfault"),
        pgmajfault: stat("pgmajfault"),
        // Linux 5.9 split these in two.
        workingset_refault: either(&memory.stats, "workingset_refault"),
        workingset_activate: either(&memory.stats, "workingset_activate"),
        workingset_nodereclaim: stat("workingset_nodereclaim"),
        pgrefill: stat("pgrefill"),
        pgscan: stat("pgscan"),
        pgsteal: stat("pgsteal"),
        pgactivate: stat("pgactivate"),
        pgdeactivate: stat("pgdeactivate"),
        pglazyfree: stat("pglazyfree"),
        pglazyfreed: stat("pglazyfreed"),
        thp_fault_alloc: stat("thp_fault_alloc"),
        thp_collapse_alloc: stat("thp_collapse_alloc"),
        usage: memory.usage.usage,
        usage_limit: memory.usage.limit,
        max_usage: memory.usage.max_usage,
        swap_usage: memory.swap_usage.usage,
        swap_limit: memory.swap_usage.limit,
        swap_max_usage: memory.swap_usage.max_usage,
        ..Default::default()
    }
}

/// A counter, or the sum of the two it became.
fn either(stats: &HashMap<String, u64>, key: &str) -> u64 {
    match of(stats, key) {
        0 => of(stats, &format!("{key}_anon")) + of(stats, &format!("{key}_file")),
        whole => whole,
    }
}

/// One entry per device out of the guest's entries per device and operation.
fn io_v2(blkio: &BlkioStats) -> Vec<v2::IOEntry> {
    let mut devices: Vec<v2::IOEntry> = Vec::new();
    let mut add = |list: &[BlkioStatsEntry], set: fn(&mut v2::IOEntry, bool, u64)| {
        for entry in list {
            let write = match entry.op.to_ascii_lowercase().as_str() {
                "read" | "rbytes" | "rios" => false,
                "write" | "wbytes" | "wios" => true,
                _ => continue,
            };
            let same = |d: &v2::IOEntry| (d.major, d.minor) == (entry.major, entry.minor);
            let at = devices.iter().position(same).unwrap_or_else(|| {
                devices.push(v2::IOEntry { major: entry.major, minor: entry.minor, ..Default::default() });
                devices.len() - 1
            });
            set(&mut devices[at], write, entry.value);
        }
    };
    add(&blkio.io_service_bytes_recursive, |device, write, value| {
        *(if write { &mut device.wbytes } else { &mut device.rbytes }) += value;
    });
    add(&blkio.io_serviced_recursive, |device, write, value| {
        *(if write { &mut device.wios } else { &mut device.rios }) += value;
    });
    devices
}

/// A map's entries in the order of their keys: the same message each time.
fn sorted<V>(map: &HashMap<String, V>) -> Vec<(&String, &V)> {
    let mut entries: Vec<_> = map.iter().collect();
    entries.sort_by_key(|(key, _)| *key);
    entries
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::Message as _;
    use protocol::agent::{CpuStats, CpuUsage, HugetlbStats, MemoryStats, PidsStats, ThrottlingData};

    fn guest(version: u32) -> StatsContainerResponse {
        let entry = |op: &str, value| BlkioStatsEntry { major: 254, op: op.into(), value, ..Default::default() };
        let counters = [("anon", 11), ("file", 12), ("rss", 13), ("pgpgin", 14), ("workingset_refault_file", 15)];
        StatsContainerResponse {
            cgroup_version: version,
            cgroup_stats: MessageField::some(CgroupStats {
                cpu_stats: MessageField::some(CpuStats {
                    cpu_usage: MessageField::some(CpuUsage {
                        total_usage: 5_000_000,
                        usage_in_usermode: 3_000_000,
                        usage_in_kernelmode: 2_000_000,
                        percpu_usage: vec![5_000_000],
                        ..Default::default()
                    }),
                    throttling_data: MessageField::some(ThrottlingData {
                        periods: 7,
                        throttled_periods: 6,
                        throttled_time: 9_000,
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                memory_stats: MessageField::some(MemoryStats {
                    cache: 99,
                    usage: MessageField::some(MemoryData {
                        usage: 1000,
                        max_usage: 2000,
                        limit: 4000,
                        failcnt: 1,
                        ..Default::default()
                    }),
                    swap_usage: MessageField::some(MemoryData { usage: 10, limit: 40, ..Default::default() }),
                    stats: counters.map(|(k, v)| (k.to_owned(), v)).into(),
                    events: [("oom_kill".to_owned(), 2), ("max".to_owned(), 3)].into(),
                    ..Default::default()
                }),
                pids_stats: MessageField::some(PidsStats { current: 4, limit: 64, ..Default::default() }),
                blkio_stats: MessageField::some(BlkioStats {
                    io_service_bytes_recursive: vec![entry("read", 512), entry("write", 1024), entry("total", 1536)],
                    io_serviced_recursive: vec![entry("Read", 1), entry("Write", 2)],
                    ..Default::default()
                }),
                hugetlb_stats: [("2MB".to_owned(), HugetlbStats { usage: 1, max_usage: 2, ..Default::default() })]
                    .into(),
                ..Default::default()
            }),
            network_stats: vec![NetworkStats {
                name: "eth0".into(),
                rx_bytes: 77,
                tx_dropped: 78,
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn a_cgroup_v1_guest() {
        for version in [0, 1] {
            let any = metrics(&guest(version)).unwrap();
            assert_eq!(any.type_url, "io.containerd.cgroups.v1.Metrics");
            let seen = v1::Metrics::parse_from_bytes(&any.value).unwrap();
            assert_eq!(seen.cpu.usage.total, 5_000_000);
            assert_eq!(seen.cpu.usage.per_cpu, [5_000_000]);
            assert_eq!((seen.cpu.throttling.periods, seen.cpu.throttling.throttled_time), (7, 9000));
            assert_eq!((seen.memory.usage.usage, seen.memory.usage.limit, seen.memory.usage.max), (1000, 4000, 2000));
            assert_eq!((seen.memory.swap.usage, seen.memory.cache, seen.memory.rss), (10, 99, 13));
            assert_eq!(seen.memory.pg_pg_in, 14);
            assert_eq!(seen.memory_oom_control.oom_kill, 2);
            assert_eq!((seen.pids.current, seen.pids.limit), (4, 64));
            assert_eq!(seen.blkio.io_service_bytes_recursive.len(), 3);
            assert_eq!((seen.hugetlb[0].pagesize.as_str(), seen.hugetlb[0].max), ("2MB", 2));
            assert_eq!((seen.network[0].name.as_str(), seen.network[0].rx_bytes), ("eth0", 77));
        }
    }

    #[test]
    fn a_cgroup_v2_guest() {
        let any = metrics(&guest(2)).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let seen = v2::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((seen.cpu.usage_usec, seen.cpu.user_usec, seen.cpu.system_usec), (5000, 3000, 2000));
        assert_eq!((seen.cpu.nr_throttled, seen.cpu.throttled_usec), (6, 9));
        assert_eq!((seen.memory.anon, seen.memory.file, seen.memory.workingset_refault), (11, 12, 15));
        assert_eq!((seen.memory.usage, seen.memory.usage_limit, seen.memory.max_usage), (1000, 4000, 2000));
        assert_eq!((seen.memory.swap_usage, seen.memory.swap_limit), (10, 40));
        assert_eq!((seen.memory_events.oom_kill, seen.memory_events.max), (2, 3));
        assert_eq!(seen.io.usage.len(), 1);
        let device = &seen.io.usage[0];
        assert_eq!((device.major, device.rbytes, device.wbytes, device.rios, device.wios), (254, 512, 1024, 1, 2));
        assert_eq!((seen.pids.current, seen.hugetlb[0].current, seen.network[0].tx_dropped), (4, 1, 78));
    }

    #[test]
    fn a_guest_that_says_nothing_is_no_error() {
        let any = metrics(&StatsContainerResponse { cgroup_version: 2, ..Default::default() }).unwrap();
        assert_eq!(v2::Metrics::parse_from_bytes(&any.value).unwrap().memory.usage, 0);
    }
}
