//! The agent's entry point: process 1 of a guest, or a server started by hand for tests.

use std::env;
use std::fs;
use std::process::ExitCode;
use std::sync::Arc;

use agent::init::cmdline::CommandLine;
use agent::process::children::Children;
use agent::server::Agent;
use agent::server::status::chain;
use agent::transport::{self, ADDRESS_VARIABLE};
use agent::{init, log};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

const HELP: &str = "\
The guest side of Kata: process 1 of the virtual machine, creates the containers there.

Usage: kata-agent [--version] [--help]

As process 1 it sets the guest up and takes no arguments. Otherwise it serves on the addresses it finds: a
virtio-serial port and vsock, or on the one in KATA_AGENT_SERVER_ADDR (unix://path, unix://@name, vsock://cid:port).
";

fn main() -> ExitCode {
    // Process 1 gets whatever words of the kernel's command line nobody knew: they are not for us.
    if !init::is_init() {
        match env::args().nth(1).as_deref() {
            None => {}
            Some("--version" | "-V") => {
                println!("kata-agent {}", env!("CARGO_PKG_VERSION"));
                return ExitCode::SUCCESS;
            }
            Some("--help" | "-h") => {
                print!("{HELP}");
                return ExitCode::SUCCESS;
            }
            Some(unknown) => {
                eprintln!("Unknown argument {unknown}\n\n{HELP}");
                return ExitCode::from(2);
            }
        }
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kata-agent: {}", chain(error.as_ref()));
            if init::is_init() {
                init::power_off();
            }
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    init::set_panic_hook();
    let first = init::is_init();
    if first {
        init::early()?;
    } else {
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    }
    init::raise_limits();
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    // Outside a guest the command line is another kernel's and says nothing about us.
    let line = if first { CommandLine::parse(&line) } else { CommandLine::default() };
    log::start(line.log);
    for word in &line.misunderstood {
        tracing::warn!(word, "Cannot understand a word of the kernel command line");
    }

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(first, line))
}

async fn serve(first: bool, line: CommandLine) -> Result<(), Box<dyn std::error::Error>> {
    let children = Arc::new(Children::default());
    children.collect_orphans()?;
    let (set_ready, ready) = watch::channel(!first);
    let (door, listener) = transport::queue();
    let agent = Agent::new(children, ready);
    let _server = agent.serve(listener).await?;

    for address in line.server_address.into_iter().chain(env::var(ADDRESS_VARIABLE).ok()) {
        door.serve_address(&address).map_err(|source| Unservable { address, source })?;
    }
    if first {
        let vsock = door.clone();
        tokio::task::spawn_blocking(move || {
            init::later(line.unified_cgroups);
            // Its device may have come with a module.
            if let Err(error) = vsock.serve_vsock() {
                tracing::warn!(%error, "Cannot serve on vsock");
            }
            if line.debug_console {
                init::debug_console();
            }
            set_ready.send_replace(true);
        });
        door.serve_serial().await?;
        return Ok(());
    }
    if env::var_os(ADDRESS_VARIABLE).is_none() {
        door.serve_vsock().map_err(|source| Unservable { address: "vsock".to_owned(), source })?;
        tokio::spawn(async move {
            if let Err(error) = door.serve_serial().await {
                tracing::error!(%error, "Cannot serve on the control channel");
            }
        });
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// An address that was asked for and cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("Cannot serve on {address}")]
struct Unservable {
    address: String,
    source: std::io::Error,
}
