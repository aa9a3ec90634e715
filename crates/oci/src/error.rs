//! What a verb can fail with, and the exit status that says so.

use std::io;
use std::path::PathBuf;

/// Why a verb failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A name that cannot be a container's.
    #[error(
        "`{0}` is no name for a container: use letters, digits, `_`, `.` and `-`, beginning with a letter or digit, at most 64"
    )]
    Name(String),
    /// The name is taken.
    #[error("A container named `{0}` exists already; choose another name, or remove it with `kata delete --force {0}`")]
    Taken(String),
    /// No container has this name.
    #[error("No container named `{0}`; `kata list` shows those there are")]
    Unknown(String),
    /// Several containers' names begin like this.
    #[error("`{prefix}` may mean {}; write more of it", candidates.join(" or "))]
    Ambiguous {
        /// What was given.
        prefix: String,
        /// The names that begin with it.
        candidates: Vec<String>,
    },
    /// The container still runs.
    #[error("Container `{0}` is running; stop it with `kata kill {0}` first, or delete it with `--force`")]
    Running(String),
    /// A root file system that is no directory.
    #[error("The root file system `{}` is no directory that can be read", .0.display())]
    Rootfs(PathBuf, #[source] io::Error),
    /// The built-in root file system is not installed.
    #[error("The built-in root file system needs `{}`; install Kata, or give a root file system with --rootfs", .0.display())]
    NoBusybox(PathBuf, #[source] io::Error),
    /// A terminal was asked for where there is none.
    #[error("-t needs a terminal on standard input; leave it out for pipes")]
    NoTerminal,
    /// A signal that does not exist.
    #[error("`{0}` is no signal; use a name such as TERM, or a number from 1 to 64")]
    Signal(String),
    /// Something of the bundle could not be written or removed.
    #[error("Cannot {what} `{}`", path.display())]
    File {
        /// What was being done.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The shim did not come up.
    #[error("Cannot start the sandbox: {0}")]
    Shim(String),
    /// The shim cannot be reached.
    #[error("Cannot reach the shim of `{name}`; if it is gone, `kata delete --force {name}` cleans up")]
    Unreachable {
        /// The container.
        name: String,
        /// The reason.
        #[source]
        source: ttrpc::Error,
    },
    /// The shim refused a request.
    #[error("{0}")]
    Refused(String),
    /// The shim went away during a request.
    #[error("The shim ended in the middle of a request")]
    Lost(#[source] ttrpc::Error),
    /// What is left of a dead sandbox could not be removed.
    #[error("Cannot clean up after `{0}`: {1}")]
    Leftovers(String, String),
    /// A signal came before the command ran.
    #[error("Stopped by signal {0} before the command ran")]
    Interrupted(u32),
    /// Something of this process' own failed.
    #[error("Cannot {0}")]
    Own(&'static str, #[source] io::Error),
}

impl Error {
    /// The exit status of `kata run` and `kata exec` for this error, as engines and shells have it: 127 for a command
    /// that is not there, 126 for one that cannot be run, 125 for everything else.
    #[must_use]
    pub fn exit_status(&self, command: &str) -> u8 {
        let text = match self {
            Error::Refused(text) => text,
            Error::Interrupted(signal) => return u8::try_from(128 + signal).unwrap_or(125),
            _ => return 125,
        };
        let text = text.to_lowercase();
        if !text.contains(&command.to_lowercase()) {
            125
        } else if text.contains("permission denied") {
            126
        } else if text.contains("no such file") || text.contains("not found") {
            127
        } else {
            125
        }
    }

    /// What the shim answered, told apart from its silence.
    pub(crate) fn from_reply(error: ttrpc::Error) -> Error {
        match error {
            ttrpc::Error::RpcStatus(status) => Error::Refused(status.message().to_owned()),
            other => Error::Lost(other),
        }
    }

    pub(crate) fn file(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::File { what, path, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_statuses_are_those_of_shells() {
        let status = |text: &str| Error::Refused(text.to_owned()).exit_status("srv");
        assert_eq!(status("Cannot run `srv`: No such file or directory"), 127);
        assert_eq!(status("Cannot run `srv`: Permission denied"), 126);
        assert_eq!(status("No such file or directory: something else"), 125);
        assert_eq!(Error::NoTerminal.exit_status("srv"), 125);
        assert_eq!(Error::Interrupted(2).exit_status("srv"), 130);
    }
}
