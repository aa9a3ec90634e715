//! The wire between host and guest: messages, services, ports and the paths both sides must agree on.
//!
//! The messages are those that every Kata host and guest speak (ttrpc, port 1024); fields numbered from 1000 up are
//! extensions of ours, optional on both sides. No logic lives here beyond the handshake of a hybrid channel.

pub mod handshake;

/// The port of the agent's ttrpc services, on vsock and in the hybrid handshake.
pub const AGENT_PORT: u32 = 1024;

/// The name of the virtio-serial port that carries the agent's services where there is no vsock.
///
/// The guest finds the device under `/sys/class/virtio-ports/*/name`.
pub const AGENT_SERIAL_PORT: &str = "org.katacontainers.agent.0";

/// The virtio-fs tag of the directory the host shares with the sandbox.
pub const SHARE_TAG: &str = "kataShared";

/// Where the guest mounts the shared directory; a container's rootfs is `<SHARE_GUEST_DIR>/<container id>/rootfs`.
pub const SHARE_GUEST_DIR: &str = "/run/kata-containers/shared/containers/";

/// Where the agent keeps what belongs to the sandbox: shared namespaces, shm, resolv.conf.
pub const SANDBOX_GUEST_DIR: &str = "/run/kata-containers/sandbox";

/// A kernel module list inside an initrd, one path a line, in load order. Written by `guest-image`, read by the agent.
pub const MODULE_LIST: &str = "/lib/modules/kata.list";

mod generated {
    // Not ours to style: what the generators write.
    #![allow(warnings, unsafe_code, missing_docs, unreachable_pub, missing_debug_implementations)]
    #![allow(clippy::all, clippy::restriction, clippy::pedantic)]

    pub mod agent {
        include!(concat!(env!("OUT_DIR"), "/agent.rs"));
    }
    pub mod agent_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
    }
    pub mod csi {
        include!(concat!(env!("OUT_DIR"), "/csi.rs"));
    }
    pub mod health {
        include!(concat!(env!("OUT_DIR"), "/health.rs"));
    }
    pub mod health_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/health_ttrpc.rs"));
    }
    pub mod oci {
        include!(concat!(env!("OUT_DIR"), "/oci.rs"));
    }
    pub mod runtimeoptions {
        include!(concat!(env!("OUT_DIR"), "/runtimeoptions.rs"));
    }
    pub mod types {
        include!(concat!(env!("OUT_DIR"), "/types.rs"));
    }
    // The generated services name the well-known type by this path.
    pub use protobuf::well_known_types::empty;
}

pub use generated::{agent, agent_ttrpc, csi, empty, health, health_ttrpc, oci, runtimeoptions, types};
