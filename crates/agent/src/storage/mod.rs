//! Storages: what the host shares or plugs, mounted where a container's configuration expects it.
//!
//! A mount point may be used by several containers; it is mounted for the first and unmounted after the last.

mod options;

use std::collections::HashMap;
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use protocol::agent::{FSGroup, Storage};
use protocol::types::FSGroupChangePolicy;
use rustix::mount::MountFlags;

use crate::init::mounts::unmount;

/// The drivers that can be used, as [`protocol::agent::AgentDetails`] tells the host.
pub const DRIVERS: [&str; 5] = ["virtio-fs", "overlayfs", "ephemeral", "local", "bind"];

/// The driver option that names a directory to make before an overlay is mounted.
const OVERLAY_DIRECTORY: &str = "io.katacontainers.volume.overlayfs.create_directory=";

/// Why a storage cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This agent has no such driver.
    #[error("The storage driver {driver} is not implemented")]
    Driver {
        /// Its name.
        driver: String,
    },
    /// The mount point leads somewhere else, or nowhere.
    #[error("The mount point {path} is not an absolute path without `..`")]
    MountPoint {
        /// As requested.
        path: String,
    },
    /// Something else is mounted there for somebody else.
    #[error("The mount point {path} is already used for another storage")]
    Taken {
        /// The mount point.
        path: String,
    },
    /// An option cannot be understood.
    #[error("The option {option} of the storage at {path} makes no sense")]
    Option {
        /// The option.
        option: String,
        /// The mount point.
        path: String,
    },
    /// A directory cannot be made or changed.
    #[error("Cannot prepare the directory {path}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel refuses the mount.
    #[error("Cannot mount {origin} of type {kind} on {path}")]
    Mount {
        /// What was to be mounted.
        origin: String,
        /// The file system.
        kind: String,
        /// The mount point.
        path: String,
        /// Why.
        source: io::Error,
    },
}

/// What is mounted, and for how many.
#[derive(Debug, Default)]
pub struct Storages {
    used: Mutex<HashMap<String, Used>>,
}

#[derive(Debug)]
struct Used {
    driver: String,
    source: String,
    kind: String,
    users: usize,
    /// In which order it came, to be undone in the reverse.
    number: usize,
}

impl Storages {
    /// Mounts the storages for one more user, all or none. Returns the mount points, for [`Storages::release`].
    ///
    /// # Errors
    ///
    /// The first storage that cannot be had.
    pub fn acquire(&self, storages: &[Storage]) -> Result<Vec<String>, Error> {
        let mut acquired = Vec::with_capacity(storages.len());
        for storage in storages {
            if let Err(error) = self.acquire_one(storage) {
                self.release(&acquired);
                return Err(error);
            }
            acquired.push(storage.mount_point.clone());
        }
        Ok(acquired)
    }

    fn acquire_one(&self, storage: &Storage) -> Result<(), Error> {
        check_mount_point(&storage.mount_point)?;
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(there) = used.get_mut(&storage.mount_point) {
            let same = there.driver == storage.driver && there.source == storage.source && there.kind == storage.fstype;
            if !same {
                return Err(Error::Taken { path: storage.mount_point.clone() });
            }
            there.users += 1;
            return Ok(());
        }
        mount(storage)?;
        let number = used.values().map(|used| used.number + 1).max().unwrap_or(0);
        used.insert(
            storage.mount_point.clone(),
            Used {
                driver: storage.driver.clone(),
                source: storage.source.clone(),
                kind: storage.fstype.clone(),
                users: 1,
                number,
            },
        );
        Ok(())
    }

    /// Gives storages up, the last first; what nobody else uses is unmounted.
    pub fn release(&self, mount_points: &[String]) {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        for mount_point in mount_points.iter().rev() {
            let Some(there) = used.get_mut(mount_point) else { continue };
            there.users -= 1;
            if there.users == 0
                && let Some(last) = used.remove(mount_point)
            {
                unmount_last(mount_point, &last.driver);
            }
        }
    }

    /// Unmounts everything, the last first.
    pub fn release_all(&self) {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = used.drain().collect();
        all.sort_by_key(|(_, used)| std::cmp::Reverse(used.number));
        for (mount_point, last) in all {
            unmount_last(&mount_point, &last.driver);
        }
    }
}

fn unmount_last(mount_point: &str, driver: &str) {
    let path = Path::new(mount_point);
    if driver == "local" {
        if let Err(error) = fs::remove_dir_all(path) {
            tracing::warn!(mount_point, %error, "Cannot remove a local storage");
        }
        return;
    }
    match unmount(path) {
        // The directory may be somebody else's and not empty; then it stays.
        Ok(()) => drop(fs::remove_dir(path)),
        Err(error) => tracing::warn!(mount_point, %error, "Cannot unmount a storage"),
    }
}

fn check_mount_point(path: &str) -> Result<(), Error> {
    let sound = path.starts_with('/')
        && path != "/"
        && !path.contains('\0')
        && Path::new(path).components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if sound { Ok(()) } else { Err(Error::MountPoint { path: path.to_owned() }) }
}

fn mount(storage: &Storage) -> Result<(), Error> {
    match storage.driver.as_str() {
        "virtio-fs" => mount_as(storage, "virtiofs"),
        "overlayfs" => {
            for option in &storage.driver_options {
                if let Some(directory) = option.strip_prefix(OVERLAY_DIRECTORY) {
                    check_mount_point(directory)?;
                    make_directory(Path::new(directory))?;
                }
            }
            mount_as(storage, "overlay")
        }
        "ephemeral" => {
            mount_as(storage, "tmpfs")?;
            set_group(storage).inspect_err(|_| unmount_last(&storage.mount_point, "ephemeral"))
        }
        "local" => make_local(storage),
        "bind" => mount_bind(storage),
        driver => Err(Error::Driver { driver: driver.to_owned() }),
    }
}

fn make_directory(path: &Path) -> Result<(), Error> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .map_err(|source| Error::Directory { path: path.to_owned(), source })
}

fn mount_as(storage: &Storage, default_kind: &str) -> Result<(), Error> {
    let kind = if storage.fstype.is_empty() { default_kind } else { &storage.fstype };
    let path = &storage.mount_point;
    let options = options::parse(storage.options.iter().map(String::as_str));
    let data = options.data().ok_or_else(|| Error::Option { option: options.data.join(","), path: path.clone() })?;
    make_directory(Path::new(path))?;
    let failed = |error: rustix::io::Errno| Error::Mount {
        origin: storage.source.clone(),
        kind: kind.to_owned(),
        path: path.clone(),
        source: error.into(),
    };
    rustix::mount::mount(storage.source.as_str(), path.as_str(), kind, options.flags, data.as_c_str())
        .map_err(failed)?;
    if let Some(propagation) = options.propagation {
        rustix::mount::mount_change(path.as_str(), propagation).map_err(failed)?;
    }
    Ok(())
}

fn mount_bind(storage: &Storage) -> Result<(), Error> {
    let path = &storage.mount_point;
    let options = options::parse(storage.options.iter().map(String::as_str));
    let failed = |source: io::Error| Error::Mount {
        origin: storage.source.clone(),
        kind: "bind".to_owned(),
        path: path.clone(),
        source,
    };
    check_mount_point(&storage.source)?;
    if fs::metadata(&storage.source).map_err(failed)?.is_dir() {
        make_directory(Path::new(path))?;
    } else {
        if let Some(parent) = Path::new(path).parent() {
            make_directory(parent)?;
        }
        fs::OpenOptions::new().create(true).append(true).open(path).map_err(failed)?;
    }
    let bind = if options.bind == Some(false) {
        rustix::mount::mount_bind(storage.source.as_str(), path.as_str())
    } else {
        rustix::mount::mount_bind_recursive(storage.source.as_str(), path.as_str())
    };
    bind.map_err(|error| failed(error.into()))?;
    if !options.flags.is_empty() {
        // The flags of a bind mount count only in a remount of their own.
        let flags = options.flags | MountFlags::BIND;
        if let Err(error) = rustix::mount::mount_remount(path.as_str(), flags, "") {
            let _ = unmount(Path::new(path));
            return Err(failed(error.into()));
        }
    }
    if let Some(propagation) = options.propagation {
        rustix::mount::mount_change(path.as_str(), propagation).map_err(|error| failed(error.into()))?;
    }
    Ok(())
}

/// A directory of the guest itself, for what containers of a pod share.
fn make_local(storage: &Storage) -> Result<(), Error> {
    let path = Path::new(&storage.mount_point);
    let mut mode = 0o755;
    for option in &storage.options {
        if let Some(text) = option.strip_prefix("mode=") {
            mode = u32::from_str_radix(text, 8)
                .ok()
                .filter(|mode| *mode <= 0o7777)
                .ok_or_else(|| Error::Option { option: option.clone(), path: storage.mount_point.clone() })?;
        }
    }
    make_directory(path)?;
    fs::set_permissions(path, Permissions::from_mode(mode))
        .map_err(|source| Error::Directory { path: path.to_owned(), source })?;
    set_group(storage)
}

/// Gives a new directory to the pod's group: writable for it, and inherited by what is made inside.
fn set_group(storage: &Storage) -> Result<(), Error> {
    let Some(FSGroup { group_id, group_change_policy, .. }) = storage.fs_group.as_ref() else { return Ok(()) };
    let path = Path::new(&storage.mount_point);
    let failed = |source: io::Error| Error::Directory { path: path.to_owned(), source };
    let metadata = fs::metadata(path).map_err(failed)?;
    let matches = std::os::unix::fs::MetadataExt::gid(&metadata) == *group_id;
    if matches && group_change_policy.enum_value() == Ok(FSGroupChangePolicy::OnRootMismatch) {
        return Ok(());
    }
    std::os::unix::fs::chown(path, None, Some(*group_id)).map_err(failed)?;
    let mode = metadata.permissions().mode() | 0o2070;
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage(driver: &str, source: &str, mount_point: &Path, options: &[&str]) -> Storage {
        Storage {
            driver: driver.to_owned(),
            source: source.to_owned(),
            mount_point: mount_point.to_str().unwrap().to_owned(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Default::default()
        }
    }

    fn is_mounted(path: &Path) -> bool {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        table.lines().any(|line| line.split(' ').nth(4) == path.to_str())
    }

    #[test]
    fn a_shared_mount_lives_until_its_last_user_leaves() {
        let directory = tempfile::tempdir().unwrap();
        let point = directory.path().join("shm");
        let storages = Storages::default();
        let wanted = [storage("ephemeral", "shm", &point, &["size=1m", "mode=1777"])];
        let first = storages.acquire(&wanted).unwrap();
        let second = storages.acquire(&wanted).unwrap();
        storages.release(&first);
        assert!(is_mounted(&point));
        storages.release(&second);
        assert!(!is_mounted(&point));
        assert!(!point.exists());
    }

    #[test]
    fn when_one_storage_fails_the_others_are_undone() {
        let directory = tempfile::tempdir().unwrap();
        let point = directory.path().join("tmp");
        let storages = Storages::default();
        let error = storages
            .acquire(&[storage("ephemeral", "tmp", &point, &[]), storage("blk", "02/00", &point, &[])])
            .unwrap_err();
        assert!(matches!(error, Error::Taken { .. }), "{error}");
        assert!(!is_mounted(&point));
        let error = storages.acquire(&[storage("blk", "02/00", &point, &[])]).unwrap_err();
        assert_eq!(error.to_string(), "The storage driver blk is not implemented");
    }

    #[test]
    fn a_read_only_bind_is_read_only() {
        let directory = tempfile::tempdir().unwrap();
        let (source, point) = (directory.path().join("source"), directory.path().join("point"));
        fs::create_dir(&source).unwrap();
        let storages = Storages::default();
        let acquired = storages.acquire(&[storage("bind", source.to_str().unwrap(), &point, &["bind", "ro"])]).unwrap();
        let error = fs::write(point.join("file"), "x").unwrap_err();
        storages.release(&acquired);
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    }

    #[test]
    fn mount_points_that_lead_elsewhere_are_refused() {
        for path in ["", "/", "relative", "/a/../etc", "/a\0b"] {
            assert!(check_mount_point(path).is_err(), "{path:?}");
        }
    }
}
