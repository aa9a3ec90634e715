//! containerd's shim: `containerd-shim-kata-v2`, one server per pod, over a [sandbox](../sandbox/index.html).
//!
//! | module      | does                                                              |
//! |-------------|-------------------------------------------------------------------|
//! | `flags`     | the command line                                                  |
//! | `bootstrap` | the three forms in which engines and `start` talk                 |
//! | `start`     | leaves a server behind                                            |
//! | `delete`    | removes what a dead server left                                   |
//! | `server`    | the process that serves a pod                                     |
//! | `service`   | the Task service, versions 2 and 3                                |
//! | `engine`    | what each request does                                            |
//! | `table`     | the state machine of containers and processes                     |
//! | `io`        | the streams                                                       |
//! | `events`    | the queue of events for the engine                                |
//! | `pod`       | the seam to the `sandbox` crate                                   |

use std::ffi::OsString;
use std::io::Write as _;
use std::process::ExitCode;

mod bootstrap;
mod bundle;
mod chain;
mod delete;
mod engine;
mod events;
#[cfg(test)]
mod fake;
mod fault;
mod flags;
mod info;
mod io;
mod log;
mod metrics;
mod options;
mod pod;
mod real;
mod rundir;
mod server;
mod service;
mod socket;
mod start;
mod sys;
mod table;
mod time;

use chain::Chain;
use flags::Action;

/// The name of the program that this crate is: the last part of `argv[0]`.
pub const PROGRAM: &str = start::SHIM;

/// Runs the shim with its arguments, the program's name left out.
///
/// What an engine reads goes to standard output; what went wrong to standard error, in one line.
#[must_use]
pub fn main(args: Vec<OsString>) -> ExitCode {
    match run(&args) {
        Ok(answer) => match std::io::stdout().write_all(&answer) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&format!("Cannot write the answer: {error}")),
        },
        Err(message) => fail(&message),
    }
}

fn fail(message: &str) -> ExitCode {
    // The last resort: if nobody reads this either, there is the exit status.
    let _ = writeln!(std::io::stderr(), "{PROGRAM}: {message}");
    ExitCode::FAILURE
}

fn run(args: &[OsString]) -> Result<Vec<u8>, String> {
    let flags = flags::parse(args).map_err(|e| Chain(&e).to_string())?;
    match flags.action {
        Action::Help => Ok(flags::USAGE.as_bytes().to_vec()),
        Action::Version => Ok(format!("{PROGRAM} {}\n", env!("CARGO_PKG_VERSION")).into_bytes()),
        Action::Info => {
            let input = bootstrap::read_stdin().map_err(|e| Chain(&e).to_string())?;
            info::describe(&input)
        }
        Action::Start => start::start(&flags).map_err(|e| Chain(&e).to_string()),
        Action::Delete => delete::delete(&flags, real::cleanup).map_err(|e| Chain(&e).to_string()),
        Action::Serve => {
            let served = server::serve(&flags, real::host()).map_err(|e| Chain(&e).to_string());
            // Nothing is to be printed: standard output is the pipe to `start` until the server is ready.
            served.map(|()| Vec::new())
        }
    }
}
