//! What can go wrong with a machine.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::Exit;

/// Why a machine could not be launched, changed or stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value of the [`crate::MachineSpec`] can't be.
    #[error("Machine cannot be built: {0}")]
    Spec(String),

    /// A file that the machine needs can't be used.
    #[error("Cannot read {what} {}; {cure}", path.display())]
    File {
        /// What the file is for.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// What to do.
        cure: String,
        /// Why.
        #[source]
        source: io::Error,
    },

    /// KVM was asked for and doesn't work here.
    #[error("KVM cannot run the machine: {0}")]
    Kvm(String),

    /// The VMM's process could not be started in its confinement.
    #[error("Cannot start the VMM")]
    Jail(#[from] jail::Error),

    /// The journal refused an entry.
    #[error("Cannot record {0} in the journal")]
    Record(&'static str, #[source] io::Error),

    /// Something of the host around the VMM failed.
    #[error("Cannot {0}")]
    Host(&'static str, #[source] io::Error),

    /// The VMM is gone.
    #[error("VMM ended ({0})")]
    Exited(Exit),

    /// The VMM refused a command.
    #[error("VMM refused {command}: {description}")]
    Refused {
        /// The command's name.
        command: String,
        /// The VMM's own words.
        description: String,
    },

    /// The VMM or the guest didn't answer in time.
    #[error("{what} took longer than {} s", after.as_secs_f32())]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        after: Duration,
    },

    /// The VMM said something that its protocol doesn't allow.
    #[error("VMM broke the control protocol: {0}")]
    Protocol(String),

    /// No such device, a name taken, no port free.
    #[error("{0}")]
    Device(String),
}
