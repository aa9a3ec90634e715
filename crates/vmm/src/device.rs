//! Devices of a machine: what a caller wants plugged in, and where the guest finds it.

use std::os::fd::OwnedFd;

/// A device to give to a machine, at its start or while it runs. Everything of the host comes by open descriptor.
#[derive(Debug)]
pub enum Device {
    /// A directory of the host, served by a virtio-fs server over vhost-user.
    Share {
        /// Unique within the machine: letters, digits, `-`, `_`, `.`, beginning with a letter.
        id: String,
        /// The name by which the guest mounts it (at most 36 bytes).
        tag: String,
        /// The connected vhost-user socket.
        socket: OwnedFd,
        /// Entries of each queue, a power of two up to 1024.
        queue_size: u32,
    },
    /// A disk, in raw format: no other format is ever guessed or followed.
    Block {
        /// Unique within the machine.
        id: String,
        /// A regular file or block device, opened for reading, and for writing unless `read_only`.
        file: OwnedFd,
        /// The guest can't write to it, whatever it does.
        read_only: bool,
        /// What the guest reads in `/sys/block/*/serial` (at most 20 bytes); empty for none.
        serial: String,
    },
    /// A network interface over the queues of a tap.
    Net {
        /// Unique within the machine.
        id: String,
        /// The tap's queues, opened with `IFF_VNET_HDR`; one for each pair of virtio queues.
        taps: Vec<OwnedFd>,
        /// As many descriptors of `/dev/vhost-net`, or none to let the VMM move the packets.
        vhosts: Vec<OwnedFd>,
        /// The hardware address the guest sees.
        mac: [u8; 6],
    },
}

impl Device {
    /// The id that the caller gave.
    #[must_use]
    pub fn id(&self) -> &str {
        match self {
            Device::Share { id, .. } | Device::Block { id, .. } | Device::Net { id, .. } => id,
        }
    }
}

/// A device that is in the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plugged {
    /// The id that the caller gave.
    pub id: String,
    /// Where the guest finds it: two hex digits for each slot from the root bus down, as in `02/00`.
    pub pci_path: String,
}
