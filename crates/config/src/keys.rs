//! The one table of keys: names, types, defaults, limits and documentation.
//!
//! Everything else is made from it: the structs that callers read, parsing, `kata config show` and `explain`, and which
//! annotations exist. A key of upstream Kata Containers keeps its name and meaning here; one that this release cannot
//! serve is in [`crate::upstream`] instead.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::Config;
use crate::setting::{Rule, Setting, choice};
use crate::value::Value;

/// Whether and how a pod's annotation may set a key, once `enable_annotations` lists it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Annotation {
    /// Never, whatever the operator lists.
    Never,
    /// As any value.
    Allowed,
    /// A host path, matched against the globs of this key.
    Path(&'static str),
    /// Kernel parameters, each out of a list.
    KernelParams,
}

/// One key.
pub(crate) struct Key {
    /// Its full name: `hypervisor.qemu.kernel`.
    pub(crate) path: &'static str,
    /// Its documentation, line by line.
    pub(crate) doc: &'static [&'static str],
    pub(crate) rule: Rule,
    pub(crate) annotation: Annotation,
    pub(crate) wanted: fn(Rule) -> String,
    pub(crate) parse: fn(&str) -> Value,
    /// Sets it; false when the value is none that the key takes.
    pub(crate) set: fn(&mut Config, &Value, Rule) -> bool,
    pub(crate) get: fn(&Config) -> Value,
}

impl Key {
    /// The name without the section.
    pub(crate) fn name(&self) -> &'static str {
        self.path.rsplit_once('.').map_or(self.path, |(_, name)| name)
    }

    /// The section: `hypervisor.qemu`.
    pub(crate) fn section(&self) -> &'static str {
        self.path.rsplit_once('.').map_or("", |(section, _)| section)
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Every key, section by section.
pub(crate) fn all() -> impl Iterator<Item = &'static Key> {
    HYPERVISOR.iter().chain(AGENT).chain(RUNTIME)
}

/// The key of this full name.
pub(crate) fn find(path: &str) -> Option<&'static Key> {
    all().find(|key| key.path == path)
}

choice! {
    /// What runs the guest's instructions.
    Accelerator {
        /// KVM where it works, else TCG with one warning.
        Auto = "auto",
        /// KVM, or an error.
        Kvm = "kvm",
        /// Translation in software.
        Tcg = "tcg",
    }
}

choice! {
    /// The board of the machine.
    MachineType {
        /// PCI Express, ACPI, hot-plug.
        Q35 = "q35",
    }
}

choice! {
    /// The way between shim and agent.
    ControlChannel {
        /// A virtio-serial port behind a unix socket: needs nothing of the host.
        VirtioSerial = "virtio-serial",
        /// The host kernel's vhost-vsock.
        VhostVsock = "vhost-vsock",
        /// A vsock device in a daemon.
        VhostUserVsock = "vhost-user-vsock",
    }
}

choice! {
    /// The file system in a root image.
    RootfsType {
        /// ext4.
        Ext4 = "ext4",
        /// XFS.
        Xfs = "xfs",
        /// EROFS.
        Erofs = "erofs",
    }
}

choice! {
    /// How the guest sees the containers' files.
    SharedFs {
        /// virtio-fs, from a confined helper process of ours.
        VirtioFs = "virtio-fs",
    }
}

choice! {
    /// What the guest caches of the shared files.
    VirtioFsCache {
        /// Nothing.
        Never = "never",
        /// Names and attributes, no contents.
        Metadata = "metadata",
        /// Contents too, checked at each open.
        Auto = "auto",
        /// Everything, for as long as it likes.
        Always = "always",
    }
}

choice! {
    /// The VMM.
    HypervisorName {
        /// QEMU.
        Qemu = "qemu",
    }
}

choice! {
    /// The agent.
    AgentName {
        /// Ours.
        Kata = "kata",
    }
}

choice! {
    /// How much is logged.
    LogLevel {
        /// Everything.
        Trace = "trace",
        /// For finding faults.
        Debug = "debug",
        /// Infrequent and meaningful in production.
        Info = "info",
        /// Abnormal but harmless.
        Warn = "warn",
        /// What could not be carried out.
        Error = "error",
    }
}

macro_rules! section {
    (
        $(#[doc = $about:literal])+
        $name:ident, $field:ident, $table:literal, $keys:ident;
        $($(#[doc = $doc:literal])+ $key:ident: $type:ty = $default:expr, $rule:expr, $annotation:expr;)+
    ) => {
        $(#[doc = $about])+
        #[derive(Debug, Clone, PartialEq)]
        pub struct $name {
            $($(#[doc = $doc])+ pub $key: $type,)+
        }

        impl $name {
            /// What holds when nothing was asked, for a program installed under `prefix`.
            pub(crate) fn defaults(prefix: &Path) -> Self {
                $(let $key: fn(&Path) -> $type = $default;)+
                $name { $($key: $key(prefix),)+ }
            }
        }

        const $keys: &[Key] = &[$(Key {
            path: concat!($table, ".", stringify!($key)),
            doc: &[$($doc),+],
            rule: $rule,
            annotation: $annotation,
            wanted: <$type as Setting>::wanted,
            parse: <$type as Setting>::parse,
            set: |config, value, rule| match <$type as Setting>::read(value, rule) {
                Some(value) => {
                    config.$field.$key = value;
                    true
                }
                None => false,
            },
            get: |config| config.$field.$key.write(),
        },)+];
    };
}

/// The directory of installed data below the prefix.
fn data(prefix: &Path, file: &str) -> PathBuf {
    prefix.join("share/kata").join(file)
}

/// The kernel we build boots about three times faster than a distribution's, so it goes first where it was built.
fn kernel(prefix: &Path) -> PathBuf {
    let small = data(prefix, "vmlinux-small");
    if small.exists() { small } else { data(prefix, "vmlinuz") }
}

section! {
    /// The machine and its VMM: `[hypervisor.qemu]`.
    Hypervisor, hypervisor, "hypervisor.qemu", HYPERVISOR;

    /// The QEMU program.
    path: PathBuf = |_| PathBuf::from("/usr/bin/qemu-system-x86_64"), Rule::Any, Annotation::Path("valid_hypervisor_paths");
    /// Globs for the program that a pod's `path` annotation may name. None: no program.
    valid_hypervisor_paths: Vec<String> = |_| Vec::new(), Rule::Printable, Annotation::Never;
    /// The guest's kernel: a bzImage, or an ELF vmlinux with a PVH note.
    /// By default `share/kata/vmlinux-small` below the prefix, if `kata kernel build` made one, else `vmlinuz`.
    kernel: PathBuf = kernel, Rule::Any, Annotation::Path("valid_boot_paths");
    /// The guest's initial RAM file system. "" when an image is used.
    initrd: Option<PathBuf> = |prefix| Some(data(prefix, "initrd.img")), Rule::Any, Annotation::Path("valid_boot_paths");
    /// A read-only image of the guest's root file system, instead of the initrd.
    image: Option<PathBuf> = |_| None, Rule::Any, Annotation::Path("valid_boot_paths");
    /// The file system in the image.
    rootfs_type: RootfsType = |_| RootfsType::Ext4, Rule::Any, Annotation::Never;
    /// The firmware file. "" lets the driver take the quickest it knows.
    firmware: Option<PathBuf> = |_| None, Rule::Any, Annotation::Path("valid_boot_paths");
    /// Globs for the kernels, initrds, images and firmware that a pod's annotations may name. None: none.
    valid_boot_paths: Vec<String> = |_| Vec::new(), Rule::Printable, Annotation::Never;
    /// Words added to the guest kernel's command line, after our own. An annotation may only use a few.
    kernel_params: String = |_| String::new(), Rule::Printable, Annotation::KernelParams;
    /// The board of the machine.
    machine_type: MachineType = |_| MachineType::Q35, Rule::Any, Annotation::Allowed;
    /// What runs the guest's instructions: `auto` takes KVM where it works, else TCG, which is slow and needs nothing.
    accelerator: Accelerator = |_| Accelerator::Auto, Rule::Any, Annotation::Never;
    /// Features to add to or remove from the CPU, as QEMU writes them: "pmu=off,-avx512f".
    cpu_features: String = |_| String::new(), Rule::Plain, Annotation::Allowed;
    /// Virtual CPUs at the start. A fraction is rounded up; 0 means 1; negative means all of the host's.
    /// What the containers' limits ask for is added.
    default_vcpus: f64 = |_| 1.0, Rule::Between(-1.0, 1024.0), Annotation::Allowed;
    /// How many virtual CPUs a machine may grow to. 0 means as many as the host has.
    default_maxvcpus: u32 = |_| 0, Rule::Between(0.0, 1024.0), Annotation::Allowed;
    /// Memory at the start, in MiB. What the containers' limits ask for is added.
    /// 256 and not upstream's 2048: it boots any kernel and agent of ours with room to spare, a guest pays for the
    /// bookkeeping of memory it never uses, and most pods say what they need.
    default_memory: u32 = |_| 256, Rule::Between(64.0, 16_777_216.0), Annotation::Allowed;
    /// How far memory may grow, in MiB. 0 means as much as the host has.
    default_maxmemory: u32 = |_| 0, Rule::Between(0.0, 16_777_216.0), Annotation::Allowed;
    /// PCI Express ports kept free for devices plugged in later.
    pcie_root_port: u32 = |_| 4, Rule::Between(0.0, 16.0), Annotation::Allowed;
    /// How the guest sees the containers' files.
    shared_fs: SharedFs = |_| SharedFs::VirtioFs, Rule::Any, Annotation::Never;
    /// What the guest caches of them. `never` when several pods write the same files, `always` when nobody else does.
    virtio_fs_cache: VirtioFsCache = |_| VirtioFsCache::Auto, Rule::Any, Annotation::Allowed;
    /// Requests that may wait in the virtio-fs queue; a power of two.
    virtio_fs_queue_size: u32 = |_| 1024, Rule::Between(2.0, 1024.0), Annotation::Never;
    /// The way between shim and agent. An agent that knows only vsock needs one of the other two.
    control_channel: ControlChannel = |_| ControlChannel::VirtioSerial, Rule::Any, Annotation::Never;
    /// The daemon of the control channel `vhost-user-vsock`.
    vhost_user_vsock_daemon: Option<PathBuf> = |_| None, Rule::Any, Annotation::Never;
    /// Turns off QEMU's own system call filter. Only to find out whether the filter is what breaks a new QEMU.
    disable_seccomp: bool = |_| false, Rule::Any, Annotation::Never;
    /// The guest kernel writes its whole log to the console file.
    enable_debug: bool = |_| false, Rule::Any, Annotation::Never;
    /// What pods may set by annotation: regular expressions for whole key names, ".*" for all that can be allowed.
    enable_annotations: Vec<String> = |_| vec!["default_vcpus".into(), "default_memory".into()], Rule::Printable, Annotation::Never;
}

section! {
    /// The agent in the guest: `[agent.kata]`.
    Agent, agent, "agent.kata", AGENT;

    /// The agent logs at level debug.
    enable_debug: bool = |_| false, Rule::Any, Annotation::Never;
    /// How much the agent logs.
    log_level: LogLevel = |_| LogLevel::Info, Rule::Any, Annotation::Never;
    /// Kernel modules to load in the guest, each with its parameters: "e1000e InterruptThrottleRate=3000".
    kernel_modules: Vec<String> = |_| Vec::new(), Rule::Printable, Annotation::Allowed;
    /// From the VMM's start until the agent must have answered. A loaded host without KVM needs tens of seconds.
    boot_timeout: Duration = |_| Duration::from_secs(60), Rule::Between(1.0, 3600.0), Annotation::Never;
    /// How long the agent may take to create a container.
    create_container_timeout: Duration = |_| Duration::from_secs(60), Rule::Between(1.0, 3600.0), Annotation::Allowed;
    /// How long the agent may take for any other request that doesn't wait for a process.
    request_timeout: Duration = |_| Duration::from_secs(30), Rule::Between(1.0, 3600.0), Annotation::Never;
}

section! {
    /// The host side: `[runtime]`.
    Runtime, runtime, "runtime", RUNTIME;

    /// The VMM.
    hypervisor_name: HypervisorName = |_| HypervisorName::Qemu, Rule::Any, Annotation::Never;
    /// The agent.
    agent_name: AgentName = |_| AgentName::Kata, Rule::Any, Annotation::Never;
    /// The shim logs at level debug.
    enable_debug: bool = |_| false, Rule::Any, Annotation::Never;
    /// How much the shim logs.
    log_level: LogLevel = |_| LogLevel::Info, Rule::Any, Annotation::Never;
    /// Leaves out the containers' seccomp profiles in the guest. Upstream's default is true; ours keeps what the engine
    /// asks for.
    disable_guest_seccomp: bool = |_| false, Rule::Any, Annotation::Never;
    /// The first of 65536 numeric users, one of which each sandbox's VMM runs as. Nobody else may use them.
    vmm_uid_base: u32 = |_| 1_900_000_000, Rule::Between(100_000.0, 4_294_900_000.0), Annotation::Never;
}
