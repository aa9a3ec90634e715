//! Keys that upstream Kata Containers has and this release doesn't serve yet.
//!
//! A file written for upstream should work as far as it asks for nothing we lack: each key is accepted with the values
//! that change nothing here (upstream's default, usually), and is an error with any other. Silence would leave an
//! operator believing that a limit or a protection holds.

use crate::value::Value;

/// One key.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Upstream {
    /// Its full name.
    pub(crate) path: &'static str,
    /// The values that ask for nothing, as TOML; `*` for any, where another key decides.
    pub(crate) nothing: &'static [&'static str],
    /// What to use instead, or nothing.
    pub(crate) hint: &'static str,
}

impl Upstream {
    /// Whether the value asks for nothing. Empty strings and arrays never do.
    pub(crate) fn asks_nothing(&self, value: &Value) -> bool {
        let empty = match value {
            Value::Text(text) => text.is_empty(),
            Value::List(list) => list.is_empty(),
            _ => false,
        };
        let written = value.to_string();
        empty || self.nothing.iter().any(|nothing| *nothing == "*" || *nothing == written)
    }

    /// The values that ask for nothing, for an error.
    pub(crate) fn accepted(&self) -> String {
        if self.nothing.is_empty() { "\"\"".to_owned() } else { self.nothing.join(" or ") }
    }
}

/// The key of this full name.
pub(crate) fn find(path: &str) -> Option<&'static Upstream> {
    ALL.iter().find(|key| key.path == path)
}

/// VMMs that upstream drives, by the name of their section.
pub(crate) const HYPERVISORS: &[&str] =
    &["clh", "cloud-hypervisor", "dragonball", "firecracker", "remote", "stratovirt", "openvmm", "acrn"];

const fn key(path: &'static str, nothing: &'static [&'static str], hint: &'static str) -> Upstream {
    Upstream { path, nothing, hint }
}

const OFF: &[&str] = &["false"];
const ON: &[&str] = &["true"];
const ZERO: &[&str] = &["0"];
const EMPTY: &[&str] = &[];
const ANY: &[&str] = &["*"];

/// Every one of them. A list that only allows something to pods asks for nothing by itself, nor does the setting of a
/// feature that another key turns on.
pub(crate) const ALL: &[Upstream] = &[
    key("hypervisor.qemu.block_device_aio", &["\"io_uring\"", "\"threads\"", "\"native\""], ""),
    key("hypervisor.qemu.block_device_cache_direct", OFF, ""),
    key("hypervisor.qemu.block_device_cache_noflush", OFF, ""),
    key("hypervisor.qemu.block_device_cache_set", OFF, ""),
    key("hypervisor.qemu.block_device_driver", &["\"virtio-scsi\"", "\"virtio-blk-pci\"", "\"virtio-blk\""], ""),
    key("hypervisor.qemu.block_device_logical_sector_size", ZERO, ""),
    key("hypervisor.qemu.block_device_physical_sector_size", ZERO, ""),
    key("hypervisor.qemu.boot_from_template", OFF, ""),
    key("hypervisor.qemu.boot_to_be_template", OFF, ""),
    key("hypervisor.qemu.cold_plug_vfio", &["\"no-port\""], ""),
    key("hypervisor.qemu.confidential_guest", OFF, ""),
    key("hypervisor.qemu.ctlpath", EMPTY, ""),
    key("hypervisor.qemu.default_bridges", &["0", "1"], "; devices go to PCI Express ports, see `pcie_root_port`"),
    key("hypervisor.qemu.device_state_path", EMPTY, ""),
    key("hypervisor.qemu.disable_block_device_use", &["true", "false"], ""),
    key("hypervisor.qemu.disable_guest_selinux", ON, ""),
    key("hypervisor.qemu.disable_image_nvdimm", &["true", "false"], ""),
    key("hypervisor.qemu.disable_nesting_checks", &["true", "false"], ""),
    key("hypervisor.qemu.disable_nested_virtualization", OFF, ""),
    key("hypervisor.qemu.disable_selinux", OFF, ""),
    key("hypervisor.qemu.disable_vhost_net", &["true", "false"], ""),
    key("hypervisor.qemu.disk_rate_limiter_bw_max_rate", ZERO, ""),
    key("hypervisor.qemu.disk_rate_limiter_bw_one_time_burst", ZERO, ""),
    key("hypervisor.qemu.disk_rate_limiter_ops_max_rate", ZERO, ""),
    key("hypervisor.qemu.disk_rate_limiter_ops_one_time_burst", ZERO, ""),
    key("hypervisor.qemu.enable_guest_swap", OFF, ""),
    key("hypervisor.qemu.enable_hugepages", OFF, ""),
    key("hypervisor.qemu.enable_iommu", OFF, ""),
    key("hypervisor.qemu.enable_iommu_platform", OFF, ""),
    key("hypervisor.qemu.enable_iothreads", OFF, ""),
    key("hypervisor.qemu.enable_mem_prealloc", OFF, ""),
    key("hypervisor.qemu.enable_numa", OFF, ""),
    key("hypervisor.qemu.enable_vhost_user_store", OFF, ""),
    key("hypervisor.qemu.enable_virtio_mem", OFF, ""),
    key("hypervisor.qemu.entropy_source", &["\"/dev/urandom\""], ""),
    key("hypervisor.qemu.extra_monitor_socket", EMPTY, ""),
    key("hypervisor.qemu.factory.enable_template", OFF, ""),
    key("hypervisor.qemu.factory.template_path", ANY, ""),
    key("hypervisor.qemu.file_mem_backend", EMPTY, ""),
    key("hypervisor.qemu.firmware_volume", EMPTY, ""),
    key("hypervisor.qemu.guest_extension_images", EMPTY, ""),
    key("hypervisor.qemu.guest_hook_path", EMPTY, ""),
    key("hypervisor.qemu.guest_memory_dump_paging", OFF, ""),
    key("hypervisor.qemu.guest_memory_dump_path", EMPTY, ""),
    key("hypervisor.qemu.guest_swap_create_threshold_secs", ANY, ""),
    key("hypervisor.qemu.guest_swap_path", ANY, ""),
    key("hypervisor.qemu.guest_swap_size_percent", ANY, ""),
    key("hypervisor.qemu.hot_plug_vfio", &["\"no-port\""], ""),
    key("hypervisor.qemu.hugepage_type", ANY, ""),
    key("hypervisor.qemu.indep_iothreads", ZERO, ""),
    key("hypervisor.qemu.initdata", EMPTY, ""),
    key("hypervisor.qemu.jailer_path", EMPTY, "; every VMM is jailed, by this program itself"),
    key(
        "hypervisor.qemu.kernel_verity_params",
        &["\"root_hash=,salt=,data_blocks=,data_block_size=,hash_block_size=\""],
        "",
    ),
    key("hypervisor.qemu.log_level", &["\"info\"", "3"], "; use `enable_debug`"),
    key("hypervisor.qemu.machine_accelerators", EMPTY, "; use `accelerator`"),
    key("hypervisor.qemu.measurement_algo", ANY, ""),
    key("hypervisor.qemu.memory_offset", ZERO, ""),
    key("hypervisor.qemu.memory_path", EMPTY, ""),
    key("hypervisor.qemu.memory_slots", &["10"], ""),
    key("hypervisor.qemu.msize_9p", ANY, ""),
    key("hypervisor.qemu.network_queues", &["1"], ""),
    key("hypervisor.qemu.net_rate_limiter_bw_max_rate", ZERO, ""),
    key("hypervisor.qemu.net_rate_limiter_bw_one_time_burst", ZERO, ""),
    key("hypervisor.qemu.net_rate_limiter_ops_max_rate", ZERO, ""),
    key("hypervisor.qemu.net_rate_limiter_ops_one_time_burst", ZERO, ""),
    key("hypervisor.qemu.num_queues", &["1"], ""),
    key("hypervisor.qemu.numa_mapping", EMPTY, ""),
    key("hypervisor.qemu.overhead_memory", &["0", "32"], ""),
    key("hypervisor.qemu.overhead_vcpus", &["0", "0.0", "0.2"], ""),
    key("hypervisor.qemu.pcie_switch_port", ZERO, ""),
    key("hypervisor.qemu.pflashes", EMPTY, ""),
    key("hypervisor.qemu.prefetch_list_path", EMPTY, ""),
    key("hypervisor.qemu.queue_size", &["128"], ""),
    key("hypervisor.qemu.reclaim_guest_freed_memory", OFF, ""),
    key("hypervisor.qemu.rootless", &["false", "true"], ""),
    key("hypervisor.qemu.rx_rate_limiter_max_rate", ZERO, ""),
    key(
        "hypervisor.qemu.seccomp_sandbox",
        &["\"on,obsolete=deny,spawn=deny,resourcecontrol=deny\""],
        "; QEMU's filter is always on, see `disable_seccomp`",
    ),
    key("hypervisor.qemu.selinux_label", EMPTY, ""),
    key("hypervisor.qemu.sev_snp_guest", OFF, ""),
    key("hypervisor.qemu.snp_guest_policy", ANY, ""),
    key("hypervisor.qemu.snp_id_auth", EMPTY, ""),
    key("hypervisor.qemu.snp_id_block", EMPTY, ""),
    key("hypervisor.qemu.tdx_quote_generation_service_socket_port", &["0", "4050"], ""),
    key("hypervisor.qemu.tx_rate_limiter_max_rate", ZERO, ""),
    key("hypervisor.qemu.use_legacy_serial", &["true", "false"], ""),
    key("hypervisor.qemu.valid_ctlpaths", ANY, ""),
    key("hypervisor.qemu.valid_entropy_sources", ANY, ""),
    key("hypervisor.qemu.valid_file_mem_backends", ANY, ""),
    key("hypervisor.qemu.valid_jailer_paths", ANY, ""),
    key("hypervisor.qemu.valid_vhost_user_store_paths", ANY, ""),
    key("hypervisor.qemu.valid_virtio_fs_daemon_paths", ANY, ""),
    key("hypervisor.qemu.vhost_user_reconnect_timeout_sec", ZERO, ""),
    key("hypervisor.qemu.vhost_user_store_path", ANY, ""),
    key("hypervisor.qemu.virtio_fs_cache_size", ZERO, ""),
    key("hypervisor.qemu.virtio_fs_daemon", ANY, ""),
    key(
        "hypervisor.qemu.virtio_fs_extra_args",
        &[
            "[\"--thread-pool-size=1\", \"-o\", \"announce_submounts\"]",
            "[\"--thread-pool-size=1\", \"--announce-submounts\"]",
        ],
        "; the file server is part of this program and takes no arguments",
    ),
    key("hypervisor.qemu.vm_rootfs_driver", &["\"virtio-blk-pci\"", "\"virtio-pmem\""], ""),
    key("agent.kata.cdh_api_timeout_ms", ANY, ""),
    key("agent.kata.container_pipe_size", ZERO, ""),
    key("agent.kata.debug_console_enabled", OFF, ""),
    key("agent.kata.dial_timeout", &["45", "60"], "; use `boot_timeout`"),
    key("agent.kata.dial_timeout_ms", &["10", "45"], "; use `boot_timeout`"),
    key("agent.kata.enable_tracing", OFF, ""),
    key("agent.kata.health_check_request_timeout_ms", &["90000"], "; use `request_timeout`"),
    key("agent.kata.launch_process_timeout", &["6"], ""),
    key("agent.kata.log_port", &["1025"], ""),
    key("agent.kata.mem_agent.compact_disable", ANY, ""),
    key("agent.kata.mem_agent.compact_force_times", ANY, ""),
    key("agent.kata.mem_agent.compact_order", ANY, ""),
    key("agent.kata.mem_agent.compact_period_psi_percent_limit", ANY, ""),
    key("agent.kata.mem_agent.compact_period_secs", ANY, ""),
    key("agent.kata.mem_agent.compact_psi_percent_limit", ANY, ""),
    key("agent.kata.mem_agent.compact_sec_max", ANY, ""),
    key("agent.kata.mem_agent.compact_threshold", ANY, ""),
    key("agent.kata.mem_agent.enable", OFF, ""),
    key("agent.kata.mem_agent.mem_agent_enable", OFF, ""),
    key("agent.kata.mem_agent.memcg_disable", ANY, ""),
    key("agent.kata.mem_agent.memcg_eviction_psi_percent_limit", ANY, ""),
    key("agent.kata.mem_agent.memcg_eviction_run_aging_count_min", ANY, ""),
    key("agent.kata.mem_agent.memcg_period_psi_percent_limit", ANY, ""),
    key("agent.kata.mem_agent.memcg_period_secs", ANY, ""),
    key("agent.kata.mem_agent.memcg_swap", ANY, ""),
    key("agent.kata.mem_agent.memcg_swappiness_max", ANY, ""),
    key("agent.kata.passfd_listener_port", &["1027"], ""),
    key("agent.kata.policy", EMPTY, ""),
    key("agent.kata.reconnect_timeout_ms", &["3000"], "; use `boot_timeout`"),
    key("agent.kata.server_port", &["1024"], ""),
    key("agent.kata.visible_cdi_devices", EMPTY, ""),
    key("runtime.create_container_timeout", &["30", "60"], "; use `create_container_timeout` in [agent.kata]"),
    key("factory.enable_template", OFF, ""),
    key("factory.template_path", ANY, ""),
    key("factory.vm_cache_endpoint", ANY, ""),
    key("factory.vm_cache_number", ZERO, ""),
    key("runtime.dan_conf", &["\"/run/kata-containers/dans\""], ""),
    key("runtime.disable_new_netns", OFF, ""),
    key("runtime.emptydir_mode", &["\"shared-fs\""], ""),
    key("runtime.enable_pprof", OFF, ""),
    key("runtime.enable_tracing", OFF, ""),
    key("runtime.enable_vcpus_pinning", OFF, ""),
    key("runtime.experimental", EMPTY, ""),
    key("runtime.experimental_force_guest_pull", OFF, ""),
    key("runtime.guest_selinux_label", EMPTY, ""),
    key("runtime.internetworking_model", &["\"tcfilter\"", "\"none\""], ""),
    key("runtime.jaeger_endpoint", EMPTY, ""),
    key("runtime.jaeger_password", EMPTY, ""),
    key("runtime.jaeger_user", EMPTY, ""),
    key("runtime.keep_abnormal", OFF, ""),
    key("runtime.kubelet_root_dir", ANY, ""),
    key("runtime.name", &["\"virt_container\""], ""),
    key("runtime.passfd_listener_port", &["1027"], ""),
    key("runtime.pod_resource_api_sock", EMPTY, ""),
    key("runtime.sandbox_bind_mounts", EMPTY, ""),
    key("runtime.sandbox_cgroup_only", ON, ""),
    key("runtime.shared_mounts", EMPTY, ""),
    key("runtime.static_sandbox_resource_mgmt", &["true", "false"], ""),
    key("runtime.use_passfd_io", OFF, ""),
    key("runtime.vfio_mode", &["\"guest-kernel\""], ""),
];
