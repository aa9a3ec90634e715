//! The directory a sandbox shares with its guest, and the confined virtio-fs server behind it.
//!
//! ```text
//! /run/kata-containers/shared/sandboxes/<sandbox>/
//!   rw/                      a small tmpfs, shared propagation: the host places things here
//!     <container>/rootfs     the container's root: an overlay or a bind mount
//!     <container>/mounts/N   a file or directory of the host, bound
//!   ro/                      the same tree, its top read-only: what the server exports to the guest
//! ```
//!
//! All of these are mounts of the calling process' own mount namespace, which must not be the host's: when the last
//! process of the pod is gone they are gone with it, however it died. The server ([`server`]) holds a copy of that
//! namespace which later mounts propagate into.
//!
//! The guest mounts the export as one file system (tag [`protocol::SHARE_TAG`]); everything mounted below is announced
//! to it as a submount, so that inode numbers stay unique and an unmount in the guest lets go of the host's files.

mod mounts;
pub mod server;

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use server::ServerOptions;

/// Where the shared directories of all sandboxes live, as upstream's tools expect them.
pub const SHARED_DIR: &str = "/run/kata-containers/shared/sandboxes";

/// Why a share could not be set up, changed or taken down.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A directory or placeholder file could not be made or removed.
    #[error("Cannot prepare `{}` for the guest", path.display())]
    Place {
        /// What was to be made or removed.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A mount could not be made, changed or taken away.
    #[error("Cannot mount `{what}` at `{}`{}", at.display(), hint(.source))]
    Mount {
        /// The source, or the kind, of the mount.
        what: String,
        /// Where.
        at: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A mount option that is not understood, so that its effect would be lost.
    #[error("Mount option `{option}` of `{fs_type}` mount `{what}` is not supported")]
    Option {
        /// The option as given.
        option: String,
        /// The file system type of the mount.
        fs_type: String,
        /// The source of the mount.
        what: String,
    },
    /// A host path that cannot be shared because of what it is.
    #[error(
        "Cannot share `{}` with the guest: it is a {kind}, which means nothing to another kernel; share a file or a directory",
        path.display()
    )]
    Kind {
        /// The host path.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// The server could not be started.
    #[error("Cannot start the virtio-fs server")]
    Server(#[source] io::Error),
    /// The calling process shares its mount namespace with the host.
    #[error("The share must be prepared in a mount namespace of its own")]
    HostNamespace,
}

/// What usually cures a mount that fails this way.
fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => "; root with CAP_SYS_ADMIN is needed",
        Some(libc::ENODEV) => "; the host's kernel lacks this file system: load its module",
        Some(libc::ENOENT) => "; the source, or a layer of it, does not exist",
        _ => "",
    }
}

/// One mount of a container's root file system, as an engine asks for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RootfsMount {
    /// The file system type: `overlay`, `bind`, `ext4`, …
    pub fs_type: String,
    /// The device or directory.
    pub source: String,
    /// Mount options, flags and data mixed, as in fstab(5).
    pub options: Vec<String>,
    /// A path below the root file system, empty for the root itself.
    pub target: String,
}

/// The shared directory of one sandbox.
///
/// Dropping it leaves the mounts to the namespace; [`Share::stop`] takes them down and removes the directories.
#[derive(Debug)]
pub struct Share {
    base: PathBuf,
    /// What was placed for each container, in order.
    placed: Mutex<HashMap<String, Vec<Placed>>>,
}

/// Something of ours below `rw/`, taken away again when the container goes.
#[derive(Debug)]
enum Placed {
    Directory(PathBuf),
    File(PathBuf),
    Mount(PathBuf),
}

impl Share {
    /// Makes the directories and the two mounts of a sandbox's share in the caller's mount namespace.
    ///
    /// # Errors
    ///
    /// [`Error::HostNamespace`] when the caller still lives in the mount namespace of process 1, otherwise what the
    /// kernel refused.
    pub fn prepare(sandbox_id: &str, recorder: &dyn vmm::Recorder) -> Result<Share, Error> {
        if mounts::in_host_namespace() {
            return Err(Error::HostNamespace);
        }
        let base = Path::new(SHARED_DIR).join(sandbox_id);
        recorder.path("share", &base).map_err(|source| Error::Place { path: base.clone(), source })?;
        Share::prepare_at(base)
    }

    fn prepare_at(base: PathBuf) -> Result<Share, Error> {
        let share = Share { base, placed: Mutex::default() };
        for dir in [share.host_side(), share.export()] {
            make_dir(&dir)?;
        }
        let rw = share.host_side();
        mounts::tmpfs(&rw)?;
        mounts::make_shared(&rw)?;
        mounts::bind_read_only_top(&rw, &share.export())?;
        Ok(share)
    }

    /// The directory the server exports.
    pub fn export(&self) -> PathBuf {
        self.base.join("ro")
    }

    fn host_side(&self) -> PathBuf {
        self.base.join("rw")
    }

    /// Mounts a container's root file system and returns its path in the guest.
    ///
    /// Without mounts, `bundle_rootfs` is what the engine has mounted or unpacked itself, and is bound.
    ///
    /// # Errors
    ///
    /// What the kernel refused, and [`Error::Option`]; whatever was mounted before is taken down again.
    pub fn add_rootfs(&self, container: &str, mounts: &[RootfsMount], bundle_rootfs: &Path) -> Result<String, Error> {
        let target = self.host_side().join(container).join("rootfs");
        let result = self.place_rootfs(container, &target, mounts, bundle_rootfs);
        if result.is_err() {
            // The first error is the one to report; what is left goes with the namespace at the latest.
            let _ = self.remove_container(container);
        }
        result.map(|()| format!("{}{container}/rootfs", protocol::SHARE_GUEST_DIR))
    }

    fn place_rootfs(
        &self,
        container: &str,
        target: &Path,
        mounts: &[RootfsMount],
        bundle_rootfs: &Path,
    ) -> Result<(), Error> {
        self.place_dir(container, target)?;
        if mounts.is_empty() {
            mounts::bind(bundle_rootfs, target, false)?;
            self.note(container, Placed::Mount(target.to_owned()));
            return Ok(());
        }
        for mount in mounts {
            let at = mounts::below(target, &mount.target)?;
            mounts::mount(mount, &at)?;
            self.note(container, Placed::Mount(at));
        }
        Ok(())
    }

    /// Binds a file or directory of the host for a container and returns its path in the guest.
    ///
    /// Read-only holds on the host's side too: the guest's root cannot write through such a bind.
    ///
    /// # Errors
    ///
    /// [`Error::Kind`] for sockets, FIFOs and devices, otherwise what the kernel refused.
    pub fn add_bind(&self, container: &str, source: &Path, read_only: bool) -> Result<String, Error> {
        let kind = mounts::kind(source)?;
        let dir = self.host_side().join(container).join("mounts");
        self.place_dir(container, &dir)?;
        // The count grows with every bind and never shrinks before the container goes, so names are not used twice.
        let name = self.placed().get(container).map_or(0, Vec::len).to_string();
        let target = dir.join(&name);
        match kind {
            mounts::Kind::Directory => self.place_dir(container, &target)?,
            mounts::Kind::File => {
                File::create_new(&target).map_err(|source| Error::Place { path: target.clone(), source })?;
                self.note(container, Placed::File(target.clone()));
            }
        }
        mounts::bind(source, &target, read_only)?;
        self.note(container, Placed::Mount(target));
        Ok(format!("{}{container}/mounts/{name}", protocol::SHARE_GUEST_DIR))
    }

    /// Takes away everything that was placed for a container. A container that has nothing is no error.
    ///
    /// # Errors
    ///
    /// The first thing that could not be taken away; the rest is tried all the same.
    pub fn remove_container(&self, container: &str) -> Result<(), Error> {
        let placed = self.placed().remove(container).unwrap_or_default();
        let mut result = Ok(());
        for item in placed.iter().rev() {
            // Directories go by rmdir and files only where we made them: were a mount still there, nothing below it
            // could be lost.
            let removed = match item {
                Placed::Mount(path) => mounts::unmount(path),
                Placed::File(path) => fs::remove_file(path).map_err(|source| place_error(path, source)),
                Placed::Directory(path) => fs::remove_dir(path).map_err(|source| place_error(path, source)),
            };
            result = result.and(removed);
        }
        result
    }

    /// Takes down the whole share and removes its directories.
    ///
    /// # Errors
    ///
    /// The first thing that could not be taken away; the rest is tried all the same.
    pub fn stop(&mut self) -> Result<(), Error> {
        let containers: Vec<String> = self.placed().keys().cloned().collect();
        let mut result = Ok(());
        for container in containers {
            result = result.and(self.remove_container(&container));
        }
        for dir in [self.export(), self.host_side()] {
            result =
                result.and(mounts::unmount(&dir)).and(fs::remove_dir(&dir).map_err(|source| place_error(&dir, source)));
        }
        result.and(fs::remove_dir(&self.base).map_err(|source| place_error(&self.base, source)))
    }

    /// Makes a directory below `rw/` with its parents, and remembers those that were not there.
    fn place_dir(&self, container: &str, dir: &Path) -> Result<(), Error> {
        let top = self.host_side();
        let missing: Vec<&Path> = dir.ancestors().take_while(|path| *path != top && !path.exists()).collect();
        for path in missing.into_iter().rev() {
            // The guest's root maps to the host's root here; other users of the guest need to pass through.
            DirBuilder::new().mode(0o755).create(path).map_err(|source| place_error(path, source))?;
            self.note(container, Placed::Directory(path.to_owned()));
        }
        Ok(())
    }

    fn note(&self, container: &str, item: Placed) {
        self.placed().entry(container.to_owned()).or_default().push(item);
    }

    fn placed(&self) -> MutexGuard<'_, HashMap<String, Vec<Placed>>> {
        // The map is never left half-changed, so a panic elsewhere does not spoil it.
        self.placed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn make_dir(path: &Path) -> Result<(), Error> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| place_error(path, source))
}

fn place_error(path: &Path, source: io::Error) -> Error {
    Error::Place { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests;
