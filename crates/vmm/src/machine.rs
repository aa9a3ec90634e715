//! What a machine is made of.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use crate::Device;

/// Everything a driver needs to launch a machine.
#[derive(Debug)]
pub struct MachineSpec {
    /// The sandbox's id: names the process in messages, nothing else.
    pub id: String,
    /// The VMM's program.
    pub binary: PathBuf,
    /// The VMM's name for the board, `q35` for example.
    pub machine_type: String,
    /// What runs the guest's instructions.
    pub accelerator: Accelerator,
    /// Virtual CPUs at the start, at least 1.
    pub vcpus: u32,
    /// How many it may grow to; equal to `vcpus` when hot-plug isn't wanted.
    pub max_vcpus: u32,
    /// Memory at the start, in MiB, at least 64.
    pub memory_mib: u32,
    /// How much it may grow to, in MiB; equal to `memory_mib` when hot-plug isn't wanted. What the host has is the limit
    /// in any case.
    pub max_memory_mib: u32,
    /// Features to add to or remove from the CPU model, as the VMM writes them (`pmu=off`).
    pub cpu_features: Vec<String>,
    /// Kernel, root and command line.
    pub boot: Boot,
    /// The firmware file; `None` takes the quickest that the driver knows to work.
    pub firmware: Option<PathBuf>,
    /// Devices present from the start.
    pub devices: Vec<Device>,
    /// How many devices may be plugged in later, at the same time (at most 15 under QEMU).
    pub hotplug_ports: u8,
    /// How the host reaches the agent.
    pub control: Control,
    /// What the VMM's process may touch.
    pub confinement: Confinement,
    /// Whether the VMM's own seccomp filter is on.
    pub seccomp_sandbox: bool,
    /// A talkative kernel: its whole log goes to the console file.
    pub debug: bool,
}

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Accelerator {
    /// KVM where it works, else TCG with one warning.
    #[default]
    Auto,
    /// The host's processor, through `/dev/kvm`; an error where that doesn't work.
    Kvm,
    /// Translation in software: slow, works everywhere, isolates from the host kernel as well.
    Tcg,
}

impl std::fmt::Display for Accelerator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Accelerator::Auto => "auto",
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg",
        })
    }
}

/// What the guest boots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boot {
    /// A bzImage, or an ELF vmlinux with a PVH note.
    pub kernel: PathBuf,
    /// Where process 1 comes from.
    pub payload: Payload,
    /// Added to the driver's own kernel command line, after it, in order.
    pub params: Vec<String>,
}

/// Where the guest's process 1 comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// A compressed cpio archive.
    Initrd(PathBuf),
    /// A read-only image of a file system, the guest's first virtio-blk disk.
    Image {
        /// The raw image file.
        path: PathBuf,
        /// The file system inside (`erofs`, `ext4`).
        fstype: String,
    },
}

/// How the host reaches the agent.
#[derive(Debug)]
pub enum Control {
    /// A virtio-serial port named [`protocol::AGENT_SERIAL_PORT`] behind a unix socket.
    Serial {
        /// The bound and listening socket; whoever connects to it talks to the port.
        listener: OwnedFd,
    },
    /// The host kernel's vhost-vsock.
    VhostVsock {
        /// The guest's context id, set on `vhost` already.
        cid: u32,
        /// An open `/dev/vhost-vsock`.
        vhost: OwnedFd,
    },
    /// A vsock device in a daemon of its own.
    VhostUserVsock {
        /// The connected vhost-user socket.
        socket: OwnedFd,
    },
}

/// What the VMM's process may touch.
#[derive(Clone, Debug)]
pub struct Confinement {
    /// The numeric user it runs as; see [`jail::VmmUser`].
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Directories of cgroups that it joins before it does anything.
    pub cgroups: Vec<PathBuf>,
    /// The sandbox's directory on the host, for `console.log`. The VMM itself never sees it.
    pub runtime_dir: PathBuf,
}
