//! Identifiers that the host gives: they become parts of paths, so only what cannot lead anywhere is taken.

use ttrpc::Code;

use super::status::{Failure, failure};

/// The longest identifier that is a file name everywhere (NAME_MAX).
const LONGEST: usize = 255;

/// Checks a container's or exec's identifier: `[A-Za-z0-9][A-Za-z0-9_.-]+`.
///
/// # Errors
///
/// INVALID_ARGUMENT, showing the identifier.
pub(super) fn check(what: &str, id: &str) -> Result<(), Failure> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    let sound =
        (2..=LONGEST).contains(&id.len()) && id.as_bytes()[0].is_ascii_alphanumeric() && id.bytes().all(allowed);
    if sound {
        return Ok(());
    }
    Err(failure(
        Code::INVALID_ARGUMENT,
        format!("The {what} id {id:?} is not of the form [A-Za-z0-9][A-Za-z0-9_.-]+ (at most {LONGEST} characters)"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_identifiers_are_taken() {
        for id in ["0123456789abcdef", "my_container-1.2", "aa"] {
            assert!(check("container", id).is_ok(), "{id}");
        }
    }

    #[test]
    fn what_could_be_a_path_is_refused() {
        for id in ["", "a", "..", ".a", "-a", "a/b", "a\0b", "a b", "../a", "ä1", &"x".repeat(256)] {
            assert!(check("container", id).is_err(), "{id:?}");
        }
    }
}
