//! The QEMU process: the jail it runs in, and what happens when it ends.
#![allow(unsafe_code)] // Tokio's registration of a descriptor has no safe interface any more.

use std::fs;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jail::{Entry, Jail, Process, Program, Root};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{broadcast, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::command::{FIRMWARE, INITRD, KERNEL};
use super::console::Tail;
use super::qmp::Event;
use crate::{Accelerator, Confinement, Error, Exit};

/// How long the pipes of a dead process may take to run dry. They are local; only a descriptor leaked into another
/// process could hold them open.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(1);

/// Directories of the host that hold programs, their libraries and their data, read-only in the jail.
const SYSTEM: [&str; 7] = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store"];

/// The files that the jail shows at fixed places.
#[derive(Debug)]
pub(crate) struct Files<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) initrd: Option<&'a Path>,
    pub(crate) firmware: Option<&'a Path>,
}

/// Describes QEMU's jail. `binary` is an absolute path without symbolic links.
pub(crate) fn jail(
    binary: &Path,
    args: Vec<String>,
    confinement: &Confinement,
    accelerator: Accelerator,
    files: &Files<'_>,
) -> Jail {
    let program = Program::Exec { path: binary.to_path_buf(), args: args.into_iter().map(Into::into).collect() };
    let mut entries = system(binary);
    let mut show = |source: &Path, target: &str| {
        entries.push(Entry::Bind { source: source.to_path_buf(), target: PathBuf::from(target), writable: false });
    };
    show(files.kernel, KERNEL);
    if let Some(initrd) = files.initrd {
        show(initrd, INITRD);
    }
    if let Some(firmware) = files.firmware {
        show(firmware, FIRMWARE);
    }
    let mut devices = vec!["/dev/null", "/dev/zero", "/dev/urandom"];
    if accelerator == Accelerator::Kvm {
        devices.push("/dev/kvm");
    }
    entries.extend(devices.into_iter().map(|path| Entry::Device { source: path.into(), target: path.into() }));
    let mut jail = Jail::new(program, confinement.uid, confinement.gid);
    jail.root = Root::Built(entries);
    jail.cgroups.clone_from(&confinement.cgroups);
    jail
}

/// What a program of the host needs to run: the system's directories, and its own prefix if that is elsewhere.
fn system(binary: &Path) -> Vec<Entry> {
    let mut entries = Vec::new();
    let bind = |path: &Path| Entry::Bind { source: path.to_path_buf(), target: path.to_path_buf(), writable: false };
    for path in SYSTEM.map(Path::new) {
        // On most hosts /bin, /lib and so on are links into /usr.
        if let Ok(to) = fs::read_link(path) {
            entries.push(Entry::Symlink { target: path.to_path_buf(), to });
        } else if path.is_dir() {
            entries.push(bind(path));
        }
    }
    let cache = Path::new("/etc/ld.so.cache");
    if cache.is_file() {
        entries.push(bind(cache));
    }
    if !SYSTEM.iter().any(|system| binary.starts_with(system)) {
        // /opt/qemu/bin/qemu-system-x86_64 needs /opt/qemu/lib and /opt/qemu/share.
        let own = binary.parent().unwrap_or(binary);
        let prefix = if own.ends_with("bin") { own.parent().unwrap_or(own) } else { own };
        entries.push(bind(if prefix == Path::new("/") { binary } else { prefix }));
    }
    entries
}

/// Descriptors for a process to be, numbered from 3 on in the order of their coming.
#[derive(Debug, Default)]
pub(crate) struct Descriptors(Vec<(RawFd, OwnedFd)>);

impl Descriptors {
    /// Takes a descriptor and says which number it will have.
    pub(crate) fn add(&mut self, fd: OwnedFd) -> RawFd {
        let number = RawFd::try_from(self.0.len()).unwrap_or(RawFd::MAX - 3) + 3;
        self.0.push((number, fd));
        number
    }

    /// Everything, with standard output and error.
    pub(crate) fn with_output(mut self, output: OwnedFd) -> io::Result<Vec<(RawFd, OwnedFd)>> {
        self.0.push((1, output.try_clone()?));
        self.0.push((2, output));
        Ok(self.0)
    }
}

/// What a machine leaves behind, collected while it runs.
#[derive(Debug)]
pub(crate) struct Remains {
    pub(crate) console: Tail,
    pub(crate) output: Tail,
    /// Ended when the streams are.
    pub(crate) readers: Vec<JoinHandle<()>>,
}

/// Watches the process and tells everyone, once, how it ended.
#[derive(Debug)]
pub(crate) struct Watch {
    exit: watch::Receiver<Option<Exit>>,
    cause: Arc<Mutex<Cause>>,
}

/// Why the machine ends, as its monitor tells it.
#[derive(Debug, Default)]
struct Cause {
    words: Option<String>,
    /// Ends with the monitor's stream.
    listener: Option<JoinHandle<()>>,
}

impl Watch {
    /// Begins to watch. The process is reaped here.
    pub(crate) fn start(process: Arc<Process>, remains: Remains) -> Result<Watch, Error> {
        let pidfd = process.pidfd().try_clone_to_owned().map_err(|err| Error::Host("watch the VMM", err))?;
        // SAFETY: an OwnedFd is open, and stays the same descriptor until the AsyncFd that owns it is dropped.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) };
        let pidfd = pidfd.map_err(|err| Error::Host("watch the VMM", err.into()))?;
        let (sender, exit) = watch::channel(None);
        let cause = Arc::new(Mutex::new(Cause::default()));
        let told = Arc::clone(&cause);
        tokio::spawn(async move {
            // An error could only mean that the runtime is going down; the status is asked for all the same.
            let _ = pidfd.readable().await;
            let status = process.try_wait().ok().flatten();
            let listener = lock(&told).listener.take();
            for reader in remains.readers.into_iter().chain(listener) {
                let _ = timeout(LAST_WORDS_LIMIT, reader).await;
            }
            let cause = lock(&told).words.take();
            let last_words = remains.console.text() + &remains.output.text();
            sender.send_replace(Some(Exit { status, cause, last_words }));
        });
        Ok(Watch { exit, cause })
    }

    /// Listens to the monitor for the reason of an end that comes later.
    pub(crate) fn listen(&self, mut events: broadcast::Receiver<Event>) {
        let cause = Arc::clone(&self.cause);
        let listener = tokio::spawn(async move {
            loop {
                match events.recv().await {
                    Ok(event) => {
                        if let Some(words) = cause_of(&event) {
                            lock(&cause).words = Some(words);
                        }
                    }
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return,
                }
            }
        });
        lock(&self.cause).listener = Some(listener);
    }

    /// Returns when the process is gone.
    pub(crate) async fn wait(&self) -> Exit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await.map(|exit| exit.clone()) {
            Ok(Some(exit)) => exit,
            // The watching task ends only with its word said, or with the runtime.
            Ok(None) | Err(_) => Exit { status: None, cause: None, last_words: String::new() },
        }
    }

    /// The end, if it has come already.
    pub(crate) fn ended(&self) -> Option<Exit> {
        self.exit.borrow().clone()
    }
}

fn lock(cause: &Mutex<Cause>) -> MutexGuard<'_, Cause> {
    // Held for single assignments, which don't panic.
    cause.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What an event says about why the machine ends.
fn cause_of(event: &Event) -> Option<String> {
    let reason = event.data.get("reason").and_then(|reason| reason.as_str()).unwrap_or_default();
    let words = match (event.name.as_str(), reason) {
        ("SHUTDOWN", "guest-shutdown") => "the guest switched itself off",
        ("SHUTDOWN", "guest-reset") => "the guest's kernel panicked or restarted the machine",
        ("SHUTDOWN", "guest-panic") | ("GUEST_PANICKED", _) => "the guest's kernel panicked",
        ("SHUTDOWN", "host-qmp-quit") => "it was told to quit",
        ("SHUTDOWN", "host-signal") => "it got a signal to end",
        ("SHUTDOWN", "host-error") => "the VMM met an error",
        ("SHUTDOWN", other) => return Some(format!("shutdown, reason {other}")),
        _ => return None,
    };
    Some(words.to_owned())
}
