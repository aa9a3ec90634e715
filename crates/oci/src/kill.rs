//! `kata kill`: a signal for a container's command.

use crate::Error;
use crate::find::find;
use crate::task::Task;

/// Sends a signal to a container's command, or to all of its processes.
///
/// # Errors
///
/// There is no such container, its shim cannot be reached, or its command has ended.
pub async fn kill(container: &str, signal: u32, all: bool) -> Result<(), Error> {
    let found = find(container)?;
    Task::of_sandbox(&found.sandbox, &found.container).await?.kill("", signal, all).await
}

/// Names of signals by number, beginning with 1; see signal(7).
const SIGNALS: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM",
    "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO",
    "PWR", "SYS",
];

/// A signal by name, with or without `SIG`, in any case, or by number.
///
/// # Errors
///
/// [`Error::Signal`] for anything else.
pub fn parse_signal(text: &str) -> Result<u32, Error> {
    if let Ok(number) = text.parse::<u32>()
        && (1..=64).contains(&number)
    {
        return Ok(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    (1..)
        .zip(SIGNALS)
        .find(|(_, known)| *known == name)
        .map(|(number, _)| number)
        .ok_or_else(|| Error::Signal(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_by_any_of_their_names() {
        for text in ["TERM", "SIGTERM", "sigterm", "15"] {
            assert_eq!(parse_signal(text).unwrap(), 15);
        }
        assert_eq!(parse_signal("KILL").unwrap(), 9);
        assert_eq!(parse_signal("SYS").unwrap(), 31);
        for text in ["0", "65", "-9", "NOPE", ""] {
            assert!(parse_signal(text).is_err(), "{text}");
        }
    }
}
