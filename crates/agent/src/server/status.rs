//! How a failure is told to the host: a gRPC code that programs can act on, and one sentence with all its causes.

use std::error::Error;
use std::fmt::Write as _;

use ttrpc::Code;

/// What an RPC fails with.
pub type Failure = ttrpc::Error;

/// A failure with a code and a message.
pub fn failure(code: Code, message: impl Into<String>) -> Failure {
    Failure::RpcStatus(ttrpc::get_status(code, message.into()))
}

/// A failure whose message is the error and all its sources.
pub fn because(code: Code, error: &dyn Error) -> Failure {
    failure(code, chain(error))
}

/// Something that should not go wrong did: the error and all its sources, code INTERNAL.
pub fn internal(error: impl Error) -> Failure {
    because(Code::INTERNAL, &error)
}

/// An error and its sources in one line, each once.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut last = text.clone();
    let mut source = error.source();
    while let Some(error) = source {
        let next = error.to_string();
        if next != last {
            // Writing to a string cannot fail.
            let _ = write!(text, ": {next}");
        }
        last = next;
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("Outer")]
    struct Outer(#[source] Transparent);

    #[derive(Debug, thiserror::Error)]
    #[error(transparent)]
    struct Transparent(std::io::Error);

    #[test]
    fn each_cause_is_told_once() {
        let error = Outer(Transparent(std::io::Error::other("inner")));
        assert_eq!(chain(&error), "Outer: inner");
    }
}
