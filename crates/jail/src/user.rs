//! A numeric user for each machine: out of a range, held by a lock that the kernel frees when its holder dies.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::Error;

/// A user and group id that no other machine on this host has. Freed when dropped, or when the process dies.
#[derive(Debug)]
pub struct VmmUser {
    id: u32,
    path: PathBuf,
    _lock: File,
}

impl VmmUser {
    /// Takes a free id out of `base..base + count`, with a lock file in `dir` (made if it is missing).
    ///
    /// # Errors
    /// All are taken, or the directory or a file in it can't be made.
    pub fn allocate(base: u32, count: u32, dir: &Path) -> Result<VmmUser, Error> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|err| Error::UserLock(dir.to_path_buf(), err))?;
        // Each caller begins elsewhere: neighbours that start at once don't queue at the same files.
        let offset = std::process::id();
        for index in 0..count {
            let Some(id) = base.checked_add(index.wrapping_add(offset) % count) else { break };
            // 0 is root and all ones mean "unchanged" to setresuid.
            if id == 0 || id == u32::MAX {
                continue;
            }
            let path = dir.join(id.to_string());
            match lock(&path) {
                Ok(Some(lock)) => return Ok(VmmUser { id, path, _lock: lock }),
                Ok(None) => {}
                Err(err) => return Err(Error::UserLock(path, err)),
            }
        }
        Err(Error::NoUser { base, count, dir: dir.to_path_buf() })
    }

    /// The user id, and the group id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The lock file, for the journal; [`free_user`] removes it after a crash.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for VmmUser {
    fn drop(&mut self) {
        // Under the lock: whoever opens it from now on sees that it has no name any more and tries again.
        let _ = fs::remove_file(&self.path);
    }
}

/// Removes the lock file of a user whose holder is dead. One that is held, by whomever, is left alone.
///
/// # Errors
/// The file is there and can't be opened or removed.
pub fn free_user(path: &Path) -> io::Result<()> {
    if !path.try_exists()? {
        return Ok(());
    }
    match lock(path)? {
        Some(_lock) => fs::remove_file(path),
        None => Ok(()),
    }
}

/// Locks the file, made if need be; `None` if someone holds it.
fn lock(path: &Path) -> io::Result<Option<File>> {
    // A few tries, as the file may lose its name between open and lock; losing that race over and over means that
    // others are busy with this id, and there are more.
    for _ in 0..4 {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(err)) => return Err(err),
        }
        if file.metadata()?.nlink() > 0 {
            return Ok(Some(file));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_gets_another_until_none_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let first = VmmUser::allocate(1000, 2, dir.path()).unwrap();
        let second = VmmUser::allocate(1000, 2, dir.path()).unwrap();
        assert_ne!(first.id(), second.id());
        let err = VmmUser::allocate(1000, 2, dir.path()).unwrap_err();
        assert!(matches!(err, Error::NoUser { .. }), "{err}");
        let freed = first.id();
        drop(first);
        assert_eq!(VmmUser::allocate(1000, 2, dir.path()).unwrap().id(), freed);
    }

    #[test]
    fn a_dead_holders_file_is_freed_and_a_live_ones_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let held = VmmUser::allocate(1000, 10, dir.path()).unwrap();
        free_user(held.path()).unwrap();
        assert!(held.path().exists());
        let stale = dir.path().join("5");
        fs::write(&stale, "").unwrap();
        free_user(&stale).unwrap();
        assert!(!stale.exists());
        free_user(&stale).unwrap();
    }

    #[test]
    fn root_is_never_given_away() {
        let dir = tempfile::tempdir().unwrap();
        assert!(VmmUser::allocate(0, 1, dir.path()).is_err());
    }
}
