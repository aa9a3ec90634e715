//! Streams and terminals as the protocol sees them.

use std::io;

use protocol::agent::{ReadStreamRequest, ReadStreamResponse, TtyWinResizeRequest};
use ttrpc::Code;

use super::status::{Failure, because, failure, internal};
use crate::process::Process;
use crate::process::stream::WriteError;

/// How many bytes a read asks for.
pub(super) fn length(request: &ReadStreamRequest) -> usize {
    usize::try_from(request.len).unwrap_or(usize::MAX)
}

/// The answer to a read. The protocol has no field for the end of a stream: it is an error status.
pub(super) fn read_response(data: io::Result<Option<Vec<u8>>>) -> Result<ReadStreamResponse, Failure> {
    match data.map_err(internal)? {
        Some(data) => Ok(ReadStreamResponse { data, ..Default::default() }),
        None => Err(failure(Code::OUT_OF_RANGE, "End of stream")),
    }
}

/// Why a write was refused.
pub(super) fn write_failure(error: &WriteError) -> Failure {
    let code = match error {
        WriteError::Closed => Code::FAILED_PRECONDITION,
        WriteError::Io(_) => Code::INTERNAL,
    };
    because(code, error)
}

/// Sets the size of a process's terminal.
pub(super) fn resize(process: &Process, request: &TtyWinResizeRequest) -> Result<(), Failure> {
    let cells = |number: u32| {
        u16::try_from(number)
            .map_err(|_| failure(Code::INVALID_ARGUMENT, format!("A terminal cannot have {number} rows or columns")))
    };
    process.resize(cells(request.row)?, cells(request.column)?).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOTTY) => failure(Code::FAILED_PRECONDITION, "The process has no terminal"),
        _ => internal(error),
    })
}
