//! Why a container or a process in it cannot be made.

use std::io;
use std::time::Duration;

/// Everything that can go wrong with a container.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The OCI configuration contradicts the specification or itself.
    #[error("The container's configuration is not valid: {0}")]
    Invalid(String),
    /// The configuration asks for something that this agent does not do.
    #[error("Not supported: {0}")]
    Unsupported(String),
    /// A step of the preparation inside the container failed.
    #[error("Cannot {what}{}", in_brackets(note))]
    Step {
        /// What the step does.
        what: String,
        /// The kernel's remark, if it made one.
        note: String,
        /// Why.
        source: io::Error,
    },
    /// The agent itself lacks something.
    #[error("Cannot {what}")]
    Agent {
        /// What it tried.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// The child ended before it had become the program.
    #[error("The process ended while it was being prepared; it was killed, or there was not enough memory")]
    Died,
    /// The child is late.
    #[error("The process was not ready within {} s", .0.as_secs())]
    Late(Duration),
    /// The container's state does not allow this.
    #[error("The container {id} is {state}: it cannot be {action}")]
    State {
        /// The container.
        id: String,
        /// Its state.
        state: &'static str,
        /// What was asked for.
        action: &'static str,
    },
    /// A hook could not be run.
    #[error("Cannot run the {kind} hook {path}")]
    HookStart {
        /// The kind, as OCI names it.
        kind: &'static str,
        /// Its program.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// A hook failed.
    #[error("The {kind} hook {path} {outcome}{}", in_brackets(output))]
    Hook {
        /// The kind, as OCI names it.
        kind: &'static str,
        /// Its program.
        path: String,
        /// How it ended.
        outcome: String,
        /// What it wrote to its error output.
        output: String,
    },
}

fn in_brackets(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(" ({text})") }
}

impl Error {
    /// A failure of the agent's own.
    pub(super) fn agent(what: impl Into<String>) -> impl FnOnce(rustix::io::Errno) -> Self {
        let what = what.into();
        move |errno| Self::Agent { what, source: errno.into() }
    }

    /// A failure of the agent's own, from the standard library.
    pub(super) fn agent_io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Agent { what, source }
    }

    /// A string with a zero byte inside cannot be handed to the kernel.
    pub(super) fn zero_byte(what: &str) -> Self {
        Self::Invalid(format!("{what} contains a zero byte"))
    }
}

/// A string for the kernel.
pub(super) fn c_string(what: &str, text: impl Into<Vec<u8>>) -> Result<std::ffi::CString, Error> {
    std::ffi::CString::new(text).map_err(|_| Error::zero_byte(what))
}
