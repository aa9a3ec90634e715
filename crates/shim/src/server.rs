//! The server: one process per pod, from the socket `start` opened until the engine says `Shutdown`.
//!
//! Everything runs on the main thread: the requests of one pod are few, and helpers that must die with the server
//! (`PR_SET_PDEATHSIG`) die with the thread that started them.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info, warn};
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

use crate::bootstrap::TTRPC_ADDRESS;
use crate::bundle;
use crate::chain::Chain;
use crate::engine::Engine;
use crate::events::Events;
use crate::flags::Flags;
use crate::pod::Host;
use crate::rundir::RunDir;
use crate::start::READY;
use crate::{log, service, sys};

/// How long the last events may take when the server ends.
const LAST_EVENTS: Duration = Duration::from_secs(3);

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    /// The id.
    #[error(transparent)]
    Bundle(#[from] bundle::BundleError),
    /// It was not `start` that called.
    #[error("Standard input is no listening socket; the engine runs `start`, which runs the server")]
    NoSocket,
    /// A step of setting up.
    #[error("Cannot {what}")]
    Setup {
        /// Which.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The server.
    #[error("Cannot serve")]
    Serve(#[source] ttrpc::Error),
}

fn setup<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> ServeError {
    move |source| ServeError::Setup { what, source: source.into() }
}

/// Serves until the end. The first error goes to the pipe that `start` listens to, which is standard output.
pub(crate) fn serve(flags: &Flags, host: Box<dyn Host>) -> Result<(), ServeError> {
    bundle::check_id(&flags.id)?;
    let (listener, pipe) = take_stdio()?;
    let mut pipe = Some(File::from(pipe));
    let served = set_up_and_run(flags, host, listener, &mut pipe);
    if let Err(error) = &served
        && let Some(mut pipe) = pipe
    {
        // `start` still listens; if it does not, there is nobody to tell.
        let _ = write!(pipe, "{}", Chain(error));
    }
    served
}

fn set_up_and_run(
    flags: &Flags,
    host: Box<dyn Host>,
    listener: std::os::unix::net::UnixListener,
    pipe: &mut Option<File>,
) -> Result<(), ServeError> {
    // Not a group leader when `start` runs it; if somebody else does and it is one, that is their terminal.
    let _ = rustix::process::setsid();
    sys::own_mounts().map_err(setup("make a mount namespace"))?;
    let rundir = RunDir::new(&flags.id);
    rundir.create().map_err(setup("create the sandbox's directory"))?;
    let file = log::open(&rundir.log()).map_err(setup("open the log"))?;
    log::init(file, &flags.id, flags.debug);
    abort_on_panic();

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .thread_keep_alive(Duration::from_millis(500))
        .build()
        .map_err(setup("start the runtime"))?;
    let served = runtime.block_on(run(flags, host, listener, pipe));
    if let Err(error) = &served {
        error!(error = %Chain(error), "The server ends");
    }
    rundir.remove();
    // Nothing that still waits shall keep the process.
    runtime.shutdown_background();
    served
}

/// Takes the socket and the pipe out of standard input and output, and puts `/dev/null` in their place.
fn take_stdio() -> Result<(std::os::unix::net::UnixListener, OwnedFd), ServeError> {
    let stdin = std::io::stdin();
    if !rustix::net::sockopt::socket_acceptconn(&stdin).unwrap_or(false) {
        return Err(ServeError::NoSocket);
    }
    let listener = stdin.as_fd().try_clone_to_owned().map_err(setup("take the socket"))?;
    let pipe = std::io::stdout().as_fd().try_clone_to_owned().map_err(setup("take the pipe"))?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(setup("open /dev/null"))?;
    rustix::stdio::dup2_stdin(&null).map_err(setup("replace standard input"))?;
    rustix::stdio::dup2_stdout(&null).map_err(setup("replace standard output"))?;
    rustix::stdio::dup2_stderr(&null).map_err(setup("replace standard error"))?;
    Ok((std::os::unix::net::UnixListener::from(listener), pipe))
}

async fn run(
    flags: &Flags,
    host: Box<dyn Host>,
    listener: std::os::unix::net::UnixListener,
    pipe: &mut Option<File>,
) -> Result<(), ServeError> {
    let path = listener.local_addr().ok().and_then(|a| a.as_pathname().map(Path::to_owned));
    let address = std::env::var(TTRPC_ADDRESS).unwrap_or_default();
    let (events, sender) = Events::new(&address, &flags.namespace);
    let engine = Engine::new(&flags.id, host, events);

    listener.set_nonblocking(true).map_err(setup("use the socket"))?;
    let listener = UnixListener::from_std(listener).map_err(setup("use the socket"))?;
    let mut server = Server::new().add_listener(Listener::from(listener)).register_service(service::services(&engine));
    server.start().await.map_err(ServeError::Serve)?;
    ignore_signals().map_err(setup("handle signals"))?;
    info!(pid = std::process::id(), version = env!("CARGO_PKG_VERSION"), "Serving");
    if let Some(mut pipe) = pipe.take() {
        pipe.write_all(READY).map_err(setup("tell that the server is ready"))?;
    }

    engine.finished().await;
    info!("Shutting down");
    engine.close().await;
    // No new calls; those that run get their answers.
    if let Err(error) = server.shutdown().await {
        warn!(error = %Chain(&error), "Connections did not end in order");
    }
    drop(server);
    if let Some(path) = path {
        // `delete` may have been quicker.
        let _ = std::fs::remove_file(path);
    }
    engine.end_events();
    if let Some(sender) = sender
        && tokio::time::timeout(LAST_EVENTS, sender).await.is_err()
    {
        warn!("The engine did not take the last events");
    }
    Ok(())
}

/// A pod ends when its engine says so, not when the host's service manager passes by.
fn ignore_signals() -> std::io::Result<()> {
    for (kind, name) in [(SignalKind::terminate(), "SIGTERM"), (SignalKind::interrupt(), "SIGINT")] {
        let mut signals = signal(kind)?;
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                warn!(signal = name, "Ignored: the engine ends this pod");
            }
        });
    }
    Ok(())
}

/// A panic is a bug; half a server would be worse. What the pod made is undone by `delete`.
fn abort_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        error!(panic = %panic, "The server panicked");
        std::process::abort();
    }));
}
