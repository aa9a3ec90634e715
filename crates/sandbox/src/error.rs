//! What can go wrong with a pod.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use ttrpc::Code;

use crate::record::ContainerState;
use crate::wire::WireError;

/// Why a sandbox did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A name that cannot be one.
    #[error("`{0}` is no name: use letters, digits, `_`, `.` and `-`, beginning with a letter or digit, at most 128")]
    Id(String),
    /// A container of this name exists.
    #[error("Container `{0}` exists already")]
    ContainerExists(String),
    /// No container has this name.
    #[error("No container `{0}` in this sandbox")]
    NoContainer(String),
    /// The container is elsewhere in its life.
    #[error("Cannot {verb} container `{id}`: it is {state}")]
    ContainerState {
        /// The container.
        id: String,
        /// What was asked for.
        verb: &'static str,
        /// Where it is.
        state: ContainerState,
    },
    /// The sandbox has ended.
    #[error("The sandbox has been stopped")]
    Stopped,
    /// The host's state directory could not be written or removed.
    #[error("Cannot keep state in `{}`", path.display())]
    State {
        /// The directory.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// Something in the journal could not be taken back.
    #[error("Cannot take back everything: {failures}")]
    Undo {
        /// Each failure.
        failures: String,
    },
    /// A control group could not be made.
    #[error("Cannot make the control group `{}`", path.display())]
    Cgroup {
        /// Its directory.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// No user for the VMM, or a helper that could not be confined.
    #[error("Cannot confine the virtual machine")]
    Jail(#[from] jail::Error),
    /// The share could not be set up or changed.
    #[error("Cannot share files with the virtual machine")]
    Share(#[from] share::Error),
    /// The machine could not be started.
    #[error("Cannot start the virtual machine")]
    Launch(#[from] vmm::Error),
    /// The control channel could not be set up.
    #[error("Cannot set up the control channel `{}`", path.display())]
    Channel {
        /// Its socket.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The machine ended.
    #[error("The virtual machine ended: {0}")]
    Vmm(vmm::Exit),
    /// The agent did not answer in time.
    #[error("The guest's agent did not answer within {} s of the start; the console's last lines:\n{console}", limit.as_secs())]
    Boot {
        /// The configured limit.
        limit: Duration,
        /// What the console shows.
        console: String,
    },
    /// A control channel that this release cannot drive.
    #[error("The control channel `{0}` is not available: {1}")]
    NoChannel(String, String),
    /// The agent refused.
    #[error("{message}")]
    Agent {
        /// Its status.
        code: Code,
        /// Its reason.
        message: String,
    },
    /// The connection to the agent broke.
    #[error("The guest's agent hung up")]
    AgentLost(#[source] ttrpc::Error),
    /// The container's configuration cannot be carried to a guest.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The configuration could not be read as JSON.
    #[error("Cannot read the container's configuration")]
    Json(#[source] serde_json::Error),
    /// A device of the host that means nothing in a guest.
    #[error(
        "Device {0} of the host cannot be given to a virtual machine; only null, zero, full, random, urandom, tty, fuse and net/tun can"
    )]
    Device(String),
    /// A hook failed.
    #[error("Hook `{}` failed: {reason}", path.display())]
    Hook {
        /// The hook's program.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}
