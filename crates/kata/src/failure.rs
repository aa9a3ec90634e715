//! What ends the program unsuccessfully: printed once, with the whole chain of causes.

use std::error::Error;
use std::io::Write as _;

use crate::output;

/// A failed verb.
#[derive(Debug)]
pub(crate) struct Failure {
    error: Box<dyn Error + Send + Sync>,
    hint: Option<&'static str>,
    /// The exit status.
    pub(crate) status: u8,
}

impl Failure {
    /// A failure of a verb whose exit status is its own.
    pub(crate) fn new(error: impl Into<Box<dyn Error + Send + Sync>>) -> Failure {
        Failure { error: error.into(), hint: None, status: 1 }
    }

    /// The same, with this exit status.
    pub(crate) fn with_status(self, status: u8) -> Failure {
        Failure { status, ..self }
    }

    /// The same, with advice that the message itself doesn't give.
    pub(crate) fn with_hint(self, hint: Option<&'static str>) -> Failure {
        Failure { hint, ..self }
    }

    /// Prints it on standard error.
    pub(crate) fn print(&self) {
        let mut text = output::paint(&std::io::stderr(), "1;31", "error:");
        text.push_str(&format!(" {}\n", self.error));
        let mut cause = self.error.source();
        while let Some(error) = cause {
            text.push_str(&format!("  because: {error}\n"));
            cause = error.source();
        }
        if let Some(hint) = self.hint {
            text.push_str(&format!("{} {hint}\n", output::paint(&std::io::stderr(), "1;36", "hint:")));
        }
        // If nobody reads it, there is the exit status.
        drop(std::io::stderr().write_all(text.as_bytes()));
    }
}

impl From<config::ConfigError> for Failure {
    fn from(error: config::ConfigError) -> Failure {
        Failure::new(error)
    }
}
