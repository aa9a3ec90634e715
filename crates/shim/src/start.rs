//! `start`: leaves the pod's server behind, or finds the one that is there, and says where it listens.
//!
//! ```text
//!  engine          start                                 server (the same program, no action)
//!    │ exec ───────►│ bind the socket                        ·
//!    │              │ exec: stdin = socket, stdout = pipe ──►│ own session, own mounts, log, runtime
//!    │              │ wait on the pipe                       │ serves
//!    │              │◄────────────────────────────── "ready" │ stdout, stdin = /dev/null
//!    │◄── address ──│                                        │
//! ```
//!
//! The socket listens before the server runs, so an early caller waits instead of failing. What the server writes
//! instead of `ready` is its error.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use crate::bootstrap::{self, BootstrapError, Request, TTRPC_ADDRESS};
use crate::bundle::{self, BundleError};
use crate::flags::Flags;
use crate::rundir::{RunDir, write_atomically};
use crate::socket::{self, SocketError};

/// What a server says when it serves.
pub(crate) const READY: &[u8] = b"ready";

/// How long a server may take until then; it does no more than set itself up.
const READY_WITHIN: Duration = Duration::from_secs(20);

/// The name a server is called by, which is how the program knows its part.
pub(crate) const SHIM: &str = "containerd-shim-kata-v2";

/// Why no server was left behind.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// What the engine sent.
    #[error(transparent)]
    Bootstrap(#[from] BootstrapError),
    /// What the bundle holds.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The pod's server is not there.
    #[error("Sandbox {0} of this container has no server; the pod must be started first")]
    NoSandbox(String),
    /// A sandbox of this name lives, in another namespace of the engine or with another engine.
    #[error("Sandbox {sandbox} runs already, for {address}; names must be unique on a host")]
    Taken {
        /// Its id.
        sandbox: String,
        /// Its socket.
        address: String,
    },
    /// A file, a pipe or a process.
    #[error("Cannot {what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The server ended, or said why it cannot serve.
    #[error("The shim's server did not come up: {0}")]
    Server(String),
}

fn io(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> StartError {
    let path = path.to_owned();
    move |source| StartError::Io { what, path, source }
}

/// Runs `start` in the working directory, which is the bundle; returns the bytes for stdout.
pub(crate) fn start(flags: &Flags) -> Result<Vec<u8>, StartError> {
    let input = bootstrap::read_stdin()?;
    let request = bootstrap::understand(&input, flags, |key| std::env::var(key).ok())?;
    bundle::check_id(&flags.id)?;
    let bundle = flags.bundle.clone().unwrap_or_else(|| PathBuf::from("."));
    let kind = bundle::read_kind(&bundle)?;
    let sandbox = kind.sandbox_id(&flags.id);
    let rundir = RunDir::new(sandbox);
    let address = if kind.owns_sandbox() {
        start_server(flags, &request, &bundle, &rundir)?
    } else {
        let address = rundir.address().map_err(io("read the address of sandbox", Path::new(sandbox)))?;
        let live = address.filter(|address| socket::path_of(address).is_some_and(socket::is_live));
        live.ok_or_else(|| StartError::NoSandbox(sandbox.to_owned()))?
    };
    // Engines up to 1.7 find the server again by this file after a restart of their own.
    let file = bundle.join("address");
    write_atomically(&file, address.as_bytes()).map_err(io("write", &file))?;
    Ok(bootstrap::answer(request.form, &address)?)
}

/// Starts the server of the sandbox `flags.id` and waits until it serves. Leaves nothing when it does not.
fn start_server(flags: &Flags, request: &Request, bundle: &Path, rundir: &RunDir) -> Result<String, StartError> {
    if let Ok(Some(address)) = rundir.address()
        && socket::path_of(&address).is_some_and(socket::is_live)
    {
        return Err(StartError::Taken { sandbox: flags.id.clone(), address });
    }
    let dir = request.socket_dir.as_deref().unwrap_or(socket::SOCKET_DIR);
    let path = socket::path(dir, &request.grpc_address, &flags.namespace, &flags.id);
    let listener = socket::listen(&path)?;
    let address = socket::address(&path);

    let up = spawn(flags, request, bundle, listener.into()).and_then(|mut server| {
        let noted = note(&server, bundle, rundir, &address);
        noted.and_then(|()| wait_until_ready(&mut server)).inspect_err(|_| {
            // Whatever it is doing, nobody will ever call it.
            let _ = server.process.kill();
            let _ = server.process.wait();
        })
    });
    if let Err(error) = up {
        let _ = std::fs::remove_file(&path);
        rundir.remove();
        return Err(error);
    }
    Ok(address)
}

struct Server {
    process: Child,
    words: File,
}

fn spawn(flags: &Flags, request: &Request, bundle: &Path, listener: OwnedFd) -> Result<Server, StartError> {
    let program = Path::new("/proc/self/exe");
    let failed = || io("run", program);
    let (words, says) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(|e| io("make a pipe to the server of", Path::new(&flags.id))(e.into()))?;
    let mut command = Command::new(program);
    command
        .arg0(SHIM)
        .args(["-namespace", &flags.namespace, "-id", &flags.id])
        .args(["-address", &request.grpc_address, "-publish-binary", &flags.publish_binary])
        .current_dir(bundle)
        .env(TTRPC_ADDRESS, &request.ttrpc_address)
        .stdin(Stdio::from(listener))
        .stdout(Stdio::from(says))
        .stderr(Stdio::null());
    if request.debug {
        command.arg("-debug");
    }
    let process = command.spawn().map_err(failed())?;
    Ok(Server { process, words: File::from(words) })
}

/// Notes who the server is, for the engine and for `delete`.
fn note(server: &Server, bundle: &Path, rundir: &RunDir, address: &str) -> Result<(), StartError> {
    let pid = server.process.id();
    let file = bundle.join("shim.pid");
    write_atomically(&file, pid.to_string().as_bytes()).map_err(io("write", &file))?;
    let log = rundir.log();
    let dir = log.parent().unwrap_or(&log);
    rundir.create().map_err(io("create", dir))?;
    let start_time = jail::start_time_of(pid).map_err(io("read the start time of the server of", bundle))?;
    rundir.set_process(pid, start_time).map_err(io("write to", dir))?;
    rundir.set_address(address).map_err(io("write to", dir))?;
    prefer_for_oom(pid).map_err(io("set the OOM score of the server of", bundle))
}

/// When memory runs out, the kernel shall take a pod before it takes the engine: one above our own score.
fn prefer_for_oom(pid: u32) -> std::io::Result<()> {
    let own = std::fs::read_to_string("/proc/self/oom_score_adj")?.trim().parse::<i32>().unwrap_or(0);
    let mut file = std::fs::OpenOptions::new().write(true).open(format!("/proc/{pid}/oom_score_adj"))?;
    file.write_all((own + 1).min(1000).to_string().as_bytes())
}

/// Waits for the server's word. It ends with the server, so this needs no second look.
fn wait_until_ready(server: &mut Server) -> Result<(), StartError> {
    let deadline = Instant::now() + READY_WITHIN;
    let mut said = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
        let mut fds = [PollFd::new(&server.words, PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(0) => {
                return Err(StartError::Server(format!("it said nothing within {} s", READY_WITHIN.as_secs())));
            }
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(io("wait for the server", Path::new("pipe"))(error.into())),
        }
        let mut buffer = [0; 4096];
        let count = server.words.read(&mut buffer).map_err(io("listen to the server", Path::new("pipe")))?;
        said.extend_from_slice(&buffer[..count]);
        if said == READY {
            return Ok(());
        }
        if count == 0 {
            let said = String::from_utf8_lossy(&said).trim().to_owned();
            return Err(StartError::Server(if said.is_empty() { "it ended without a word".to_owned() } else { said }));
        }
    }
}
