//! What an RPC answers when it fails: a status code the engine acts on, and a sentence for the person.

use std::error::Error;

use ttrpc::Code;

use crate::chain::Chain;

/// A failed request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Fault {
    /// The code; engines look at it alone.
    pub(crate) code: Code,
    /// What, where, why.
    pub(crate) message: String,
}

impl Fault {
    /// A fault of any code.
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Fault {
        Fault { code, message: message.into() }
    }

    /// Nothing of that name, or no longer.
    pub(crate) fn not_found(message: impl Into<String>) -> Fault {
        Fault::new(Code::NOT_FOUND, message)
    }

    /// There is one of that name.
    pub(crate) fn exists(message: impl Into<String>) -> Fault {
        Fault::new(Code::ALREADY_EXISTS, message)
    }

    /// Not in this state.
    pub(crate) fn precondition(message: impl Into<String>) -> Fault {
        Fault::new(Code::FAILED_PRECONDITION, message)
    }

    /// The request makes no sense.
    pub(crate) fn invalid(message: impl Into<String>) -> Fault {
        Fault::new(Code::INVALID_ARGUMENT, message)
    }

    /// Not a feature.
    pub(crate) fn unimplemented(message: impl Into<String>) -> Fault {
        Fault::new(Code::UNIMPLEMENTED, message)
    }

    /// Something failed below: `error` and its causes.
    pub(crate) fn internal(error: &dyn Error) -> Fault {
        Fault::new(Code::UNKNOWN, Chain(error).to_string())
    }

    /// Whether the thing asked for is not there.
    pub(crate) fn is_not_found(&self) -> bool {
        self.code == Code::NOT_FOUND
    }
}

impl From<Fault> for ttrpc::Error {
    fn from(fault: Fault) -> ttrpc::Error {
        ttrpc::error::get_rpc_status(fault.code, fault.message)
    }
}
