//! `delete`: after a crash, or a start that failed, makes sure that nothing is left of a container.
//!
//! The server may be dead, alive and useless, or alive and serving others of its pod. What belongs to the pod is undone
//! from its journal only when the pod cannot live any more: its server is gone, or it is this container's own.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use containerd_shim_protos::api::DeleteResponse;
use protobuf::Message as _;
use rustix::mount::UnmountFlags;

use crate::bundle::{self, Kind};
use crate::flags::Flags;
use crate::rundir::RunDir;
use crate::socket;
use crate::time::timestamp;

/// What a process that was not seen to end is said to have ended with: SIGKILL.
const EXIT: u32 = 137;

/// Why something may be left.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeleteError {
    /// The id.
    #[error(transparent)]
    Bundle(#[from] bundle::BundleError),
    /// The server would not die.
    #[error("Cannot end the shim's server, process {pid}")]
    Kill {
        /// Its pid.
        pid: u32,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The journal could not be undone.
    #[error("Cannot undo what sandbox {sandbox} made")]
    Cleanup {
        /// Which.
        sandbox: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The answer.
    #[error("Cannot encode the answer to the engine")]
    Encode(#[source] protobuf::Error),
}

/// Runs `delete`; returns the bytes for stdout. `cleanup` undoes a sandbox's journal.
pub(crate) fn delete<E>(flags: &Flags, cleanup: impl FnOnce(&str) -> Result<(), E>) -> Result<Vec<u8>, DeleteError>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    bundle::check_id(&flags.id)?;
    let dir = flags.bundle.clone().or_else(|| std::env::current_dir().ok()).unwrap_or_else(|| PathBuf::from("."));
    // A bundle that cannot be read is one that was never complete: then the container is its own pod, if any.
    let kind = bundle::read_kind(&dir).unwrap_or(Kind::Single);
    let sandbox = kind.sandbox_id(&flags.id).to_owned();
    let rundir = RunDir::new(&sandbox);

    if let Fate::Undo = settle_server(&kind, &dir, &rundir)? {
        let address = rundir.address().ok().flatten();
        cleanup(&sandbox).map_err(|e| DeleteError::Cleanup { sandbox: sandbox.clone(), source: e.into() })?;
        if let Some(path) = address.as_deref().and_then(socket::path_of)
            && !socket::is_live(path)
        {
            // Already gone is as good.
            let _ = std::fs::remove_file(path);
        }
        rundir.remove();
    }
    unmount(&dir.join("rootfs"));

    let response = DeleteResponse { exit_status: EXIT, exited_at: timestamp(SystemTime::now()), ..Default::default() };
    response.write_to_bytes().map_err(DeleteError::Encode)
}

enum Fate {
    /// The pod is dead: undo what it made.
    Undo,
    /// The pod lives, and is not this container's.
    Keep,
}

/// Looks at the server of the pod, and ends it if it is this container's own.
fn settle_server(kind: &Kind, dir: &Path, rundir: &RunDir) -> Result<Fate, DeleteError> {
    let Some((pid, start_time)) = rundir.process() else { return Ok(Fate::Undo) };
    if jail::start_time_of(pid).ok() != Some(start_time) {
        return Ok(Fate::Undo);
    }
    if !kind.owns_sandbox() {
        return Ok(Fate::Keep);
    }
    // Another engine's pod of the same name works in another bundle.
    let works_in = std::fs::read_link(format!("/proc/{pid}/cwd")).ok();
    let here = dir.canonicalize().ok();
    if here.is_some() && works_in.as_ref().is_some_and(|there| there.exists()) && works_in != here {
        return Ok(Fate::Keep);
    }
    jail::kill_exact(pid, start_time).map_err(|source| DeleteError::Kill { pid, source })?;
    Ok(Fate::Undo)
}

/// Takes away what is mounted on `target`, however often; nothing there is fine.
fn unmount(target: &Path) {
    while rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok() {}
}
