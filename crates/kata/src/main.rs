//! The command line: parses arguments, dispatches, prints.
//!
//! One program plays several parts, told apart before anything else runs, since some of them must be single-threaded:
//!
//! | called as                        | is                                        |
//! |----------------------------------|-------------------------------------------|
//! | `containerd-shim-kata-v2 …`      | containerd's shim                         |
//! | `kata __jail`                    | a helper on its way into its confinement  |
//! | `kata __share …`                 | the server of the shared directory        |
//! | `kata …`                         | what a person types: see `cli`            |

mod check;
mod cli;
mod configuration;
mod containers;
mod failure;
mod guest;
mod output;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser as _;

use crate::cli::{Cli, Command, ConfigVerb, ImageVerb, KernelVerb};
use crate::failure::Failure;

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let program = args.next().unwrap_or_default();
    if Path::new(&program).file_name().is_some_and(|name| name == shim::PROGRAM) {
        return shim::main(args.collect());
    }
    let args: Vec<OsString> = args.collect();
    match args.split_first() {
        Some((verb, rest)) if verb == "__jail" => return jail::main(rest.iter().cloned()),
        Some((verb, rest)) if verb == share::server::VERB => return share::server::server_main(rest.iter().cloned()),
        _ => {}
    }
    let cli = Cli::parse();
    match dispatch(cli) {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            failure.print();
            ExitCode::from(failure.status)
        }
    }
}

fn dispatch(cli: Cli) -> Result<u8, Failure> {
    match cli.command {
        Command::Run(args) => containers::run(args),
        Command::List { format } => containers::list(format).map(|()| 0),
        Command::Exec(args) => containers::exec(args),
        Command::Kill { container, signal, all } => containers::kill(&container, &signal, all).map(|()| 0),
        Command::Delete { force, containers } => containers::delete(&containers, force).map(|()| 0),
        Command::Config { file, verb } => match verb {
            ConfigVerb::Show { format } => configuration::show(file.as_deref(), format).map(|()| 0),
            ConfigVerb::Check => configuration::check(file.as_deref()).map(|()| 0),
            ConfigVerb::Explain { key, format } => {
                configuration::explain(file.as_deref(), key.as_deref(), format).map(|()| 0)
            }
        },
        Command::Image { verb: ImageVerb::Build(args) } => guest::image(&args).map(|()| 0),
        Command::Kernel { verb: KernelVerb::Build(args) } => guest::kernel(args).map(|()| 0),
        Command::Check { format } => check::check(format),
        Command::Version { format } => output::version(format).map(|()| 0),
    }
}
