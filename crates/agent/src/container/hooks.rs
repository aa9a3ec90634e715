//! OCI hooks: programs run at points of a container's life, with its state on their standard input.
//!
//! Unsafe code is allowed here for `pre_exec`: a hook of the container's namespaces joins them right before its execve.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use protocol::oci;
use rustix::fs::MemfdFlags;
use rustix::process::{Pid, PidfdFlags};
use rustix::thread::ThreadNameSpaceType;

use super::call;
use super::channel::wait_readable;
use super::error::Error;

/// How long a hook may run that names no timeout: longer than a sane one takes, shorter than the host's patience.
const TIMEOUT: Duration = Duration::from_secs(60);

/// How much of a failed hook's error output is reported, in bytes.
const OUTPUT_MAX: u64 = 2048;

/// What a hook is told about the container.
#[derive(Debug)]
pub(super) struct State<'a> {
    pub(super) id: &'a str,
    pub(super) status: &'static str,
    pub(super) pid: i32,
    pub(super) bundle: &'a Path,
    pub(super) annotations: &'a std::collections::HashMap<String, String>,
}

impl State<'_> {
    fn json(&self) -> String {
        let annotations: std::collections::BTreeMap<_, _> = self.annotations.iter().collect();
        serde_json::json!({
            "ociVersion": "1.2.0",
            "id": self.id,
            "status": self.status,
            "pid": self.pid,
            "bundle": self.bundle.to_string_lossy(),
            "annotations": annotations,
        })
        .to_string()
    }
}

/// The namespaces a hook runs in.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place<'a> {
    /// The agent's.
    Guest,
    /// Those of the container's first process.
    Container {
        /// That process.
        pidfd: BorrowedFd<'a>,
        /// `CLONE_NEW*`, the PID namespace aside.
        flags: u32,
        /// Whether the PID namespace is the container's too.
        pid: bool,
    },
}

/// Runs hooks in order, up to the first failure.
///
/// # Errors
///
/// A hook that cannot be started, fails, or takes too long.
pub(super) fn run(kind: &'static str, hooks: &[oci::Hook], state: &State<'_>, place: Place<'_>) -> Result<(), Error> {
    hooks.iter().try_for_each(|hook| run_one(kind, hook, state, place))
}

/// Runs all hooks; failures are logged, as the specification asks for those after the fact.
pub(super) fn run_all(kind: &'static str, hooks: &[oci::Hook], state: &State<'_>) {
    for hook in hooks {
        if let Err(error) = run_one(kind, hook, state, Place::Guest) {
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            tracing::warn!(id = state.id, cause, "{error}");
        }
    }
}

fn run_one(kind: &'static str, hook: &oci::Hook, state: &State<'_>, place: Place<'_>) -> Result<(), Error> {
    let start = |source| Error::HookStart { kind, path: hook.Path.clone(), source };
    if !hook.Path.starts_with('/') {
        return Err(Error::Invalid(format!("The {kind} hook {:?} is no absolute path", hook.Path)));
    }
    // Files, not pipes: a hook that neither reads nor stops writing blocks nobody.
    let mut input = memory_file("hook-state").map_err(start)?;
    input.write_all(state.json().as_bytes()).and_then(|()| input.rewind()).map_err(start)?;
    let mut output = memory_file("hook-output").map_err(start)?;
    let mut command = Command::new(&hook.Path);
    if let Some((name, arguments)) = hook.Args.split_first() {
        command.arg0(name).args(arguments);
    }
    command.env_clear().envs(hook.Env.iter().filter_map(|entry| entry.split_once('=')));
    command.stdin(input).stdout(Stdio::null()).stderr(output.try_clone().map_err(start)?);
    let mut child = match place {
        Place::Guest => command.current_dir(state.bundle).spawn().map_err(start)?,
        Place::Container { pidfd, flags, pid } => spawn_inside(command, pidfd, flags, pid).map_err(start)?,
    };
    let timeout = u64::try_from(hook.Timeout).ok().filter(|seconds| *seconds > 0).map_or(TIMEOUT, Duration::from_secs);
    let outcome = wait(&mut child, timeout).map_err(start)?;
    let Some(outcome) = outcome else { return Ok(()) };
    let mut text = Vec::new();
    let _ = output.rewind().and_then(|()| Read::take(&mut output, OUTPUT_MAX).read_to_end(&mut text));
    let output = String::from_utf8_lossy(&text).trim().to_owned();
    Err(Error::Hook { kind, path: hook.Path.clone(), outcome, output })
}

fn memory_file(name: &str) -> std::io::Result<File> {
    Ok(File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?))
}

fn spawn_inside(mut command: Command, pidfd: BorrowedFd<'_>, flags: u32, pid: bool) -> std::io::Result<Child> {
    let number = pidfd.as_raw_fd();
    let join = move |flags: u32| -> std::io::Result<()> {
        let kinds = ThreadNameSpaceType::from_bits_retain(flags);
        Ok(rustix::thread::move_into_thread_name_spaces(call::borrow(number), kinds)?)
    };
    // SAFETY: the closure makes one system call, with numbers; the pidfd outlives the spawn.
    unsafe { command.pre_exec(move || join(flags)) };
    if !pid {
        return command.spawn();
    }
    // Whose children are in which PID namespace is a matter of the thread that makes them.
    thread::scope(|scope| {
        let work = || {
            join(libc::CLONE_NEWPID.cast_unsigned())?;
            command.spawn()
        };
        let thread = thread::Builder::new().name("hook".to_owned()).spawn_scoped(scope, work)?;
        thread.join().unwrap_or_else(|_| Err(std::io::Error::other("The thread that starts it has panicked")))
    })
}

/// How the hook failed; nothing if it did not.
fn wait(child: &mut Child, timeout: Duration) -> std::io::Result<Option<String>> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(rustix::io::Errno::SRCH)?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    let waited = wait_readable(pidfd.as_fd(), Instant::now() + timeout);
    if waited.is_err() {
        child.kill()?;
    }
    let status = child.wait()?;
    Ok(match (waited, status.code(), status.signal()) {
        (Err(_), ..) => Some(format!("took longer than {} s and was killed", timeout.as_secs())),
        (Ok(()), Some(0), _) => None,
        (Ok(()), Some(code), _) => Some(format!("failed with status {code}")),
        (Ok(()), None, signal) => Some(format!("was killed by signal {}", signal.unwrap_or_default())),
    })
}
