//! What can go wrong with a jail.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why a helper could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A step inside the jail failed; the helper is gone.
    #[error("Cannot {step}{}", hint(.cure))]
    Step {
        /// What was tried.
        step: String,
        /// What to do about it; may be empty.
        cure: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },

    /// The helper's executable could not be started.
    #[error("Cannot start the helper {}", .0.display())]
    Spawn(PathBuf, #[source] io::Error),

    /// Talking to the helper failed.
    #[error("Cannot {0} the helper process")]
    Talk(&'static str, #[source] io::Error),

    /// The helper went away without a word.
    #[error("Helper process ended before it was {0}; its standard error may say why")]
    Gone(&'static str),

    /// The helper didn't come so far in time.
    #[error("Helper process was not {what} within {} s", after.as_secs())]
    Timeout {
        /// The point it should have reached.
        what: &'static str,
        /// How long it had.
        after: Duration,
    },

    /// No user id is free.
    #[error("No free user id among the {count} from {base} on; {} holds a lock file for each sandbox", dir.display())]
    NoUser {
        /// First of the range.
        base: u32,
        /// Length of the range.
        count: u32,
        /// Where the lock files are.
        dir: PathBuf,
    },

    /// The lock file of a user id can't be made.
    #[error("Cannot lock a user id with {}", .0.display())]
    UserLock(PathBuf, #[source] io::Error),
}

fn hint(cure: &str) -> String {
    if cure.is_empty() { String::new() } else { format!(" ({cure})") }
}
