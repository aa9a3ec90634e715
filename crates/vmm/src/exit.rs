//! How a VMM ended.

use std::fmt;
use std::process::ExitStatus;

/// How a VMM ended, and what it and its guest said last.
#[derive(Clone, Debug)]
pub struct Exit {
    /// The process's status; `None` if someone else reaped it.
    pub status: Option<ExitStatus>,
    /// What ended the guest, in words, where the VMM said so ("the guest's kernel panicked").
    pub cause: Option<String>,
    /// The last lines of the guest's console, then those of the VMM's own standard error. May be empty.
    pub last_words: String,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.status, &self.cause) {
            (Some(status), Some(cause)) => write!(f, "{status}: {cause}")?,
            (Some(status), None) => write!(f, "{status}")?,
            (None, Some(cause)) => write!(f, "{cause}")?,
            (None, None) => write!(f, "status unknown")?,
        }
        if !self.last_words.is_empty() {
            write!(f, "; its last words:\n{}", self.last_words.trim_end())?;
        }
        Ok(())
    }
}
