//! The namespaces that a pod's containers share, held by descriptor: they exist as long as the sandbox, whoever ends.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use super::Error;
use crate::container::SharedNamespaces;
use crate::process::children::Children;
use crate::sys;

/// The shared namespaces of a sandbox.
#[derive(Debug)]
pub struct Namespaces {
    ipc: File,
    uts: File,
    pid: Option<Pause>,
}

/// Descriptors of a sandbox's namespaces, for one container.
#[derive(Debug)]
pub struct Shared {
    ipc: File,
    uts: File,
    pid: Option<File>,
}

impl Shared {
    /// As the container core takes them.
    pub fn borrow(&self) -> SharedNamespaces<'_> {
        SharedNamespaces {
            ipc: Some(self.ipc.as_fd()),
            uts: Some(self.uts.as_fd()),
            pid: self.pid.as_ref().map(AsFd::as_fd),
        }
    }
}

/// Process 1 of the shared PID namespace.
#[derive(Debug)]
struct Pause {
    process: sys::PauseProcess,
    namespace: File,
}

impl Namespaces {
    /// Makes them.
    pub(super) fn make(
        host_name: &str,
        shared_pids: bool,
        directory: &Path,
        children: &Arc<Children>,
    ) -> Result<Self, Error> {
        let name = host_name.to_owned();
        let failed = |source| Error::Namespace { kind: "IPC or UTS", source };
        // Only the calling thread moves, so a thread of its own does it and ends.
        let (ipc, uts) = thread::Builder::new()
            .name("namespaces".to_owned())
            .spawn(move || -> io::Result<(File, File)> {
                sys::unshare_ipc_and_uts()?;
                if !name.is_empty() {
                    rustix::system::sethostname(name.as_bytes())?;
                }
                Ok((File::open("/proc/thread-self/ns/ipc")?, File::open("/proc/thread-self/ns/uts")?))
            })
            .map_err(failed)?
            .join()
            .map_err(|_| failed(io::Error::other("The thread panicked")))?
            .map_err(failed)?;
        let pid = if shared_pids { Some(Pause::start(directory, children)?) } else { None };
        Ok(Self { ipc, uts, pid })
    }

    /// The namespaces for a container of the pod to join, with the process numbers if it shares them.
    pub(super) fn share(&self, pids: bool) -> io::Result<Shared> {
        let pid = match (&self.pid, pids) {
            (Some(pause), true) => Some(pause.namespace.try_clone()?),
            (None, true) => {
                return Err(io::Error::other("The sandbox was created without a shared PID namespace"));
            }
            (_, false) => None,
        };
        Ok(Shared { ipc: self.ipc.try_clone()?, uts: self.uts.try_clone()?, pid })
    }

    pub(super) fn end(self) {
        if let Some(pause) = self.pid {
            // With it ends whatever is left in its namespace.
            let _ = sys::send_signal(pause.process.pidfd.as_fd(), libc::SIGKILL);
        }
    }
}

impl Pause {
    fn start(directory: &Path, children: &Arc<Children>) -> Result<Self, Error> {
        let failed = |source| Error::Namespace { kind: "PID", source };
        let root = directory.join("empty");
        fs::create_dir_all(&root).map_err(failed)?;
        let root = root.to_str().ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
        // Nobody asks for its status; it is watched so that it is collected when it ends. An error ends it by its leash.
        let starting = children.starting();
        let process = sys::spawn_pause(root).map_err(failed)?;
        process.pidfd.try_clone().and_then(|pidfd| children.watch(process.pid, pidfd)).map_err(failed)?;
        drop(starting);
        let namespace = File::open(format!("/proc/{}/ns/pid", process.pid)).map_err(failed)?;
        Ok(Self { process, namespace })
    }
}
