//! The control groups of the host that a pod's processes live in: version 1, version 2, or both.
//!
//! Only membership for now: the limits of the containers are the guest's, those of the machine are its size.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{XattrFlags, getxattr, setxattr};

use crate::Error;

/// How long the kernel may take to let go of a group whose last process was killed.
const EMPTY_WITHIN: Duration = Duration::from_secs(2);

const ROOT: &str = "/sys/fs/cgroup";

/// The directories of the pod's groups, one for each hierarchy that this host has. None of them exists yet.
///
/// `path` is the configuration's `linux.cgroupsPath`; systemd's form `slice:prefix:name` becomes
/// `/slice/prefix-name.scope`, the place systemd would have made. Without one it is `/kata/<sandbox>`.
pub(crate) fn directories(path: Option<&Path>, sandbox: &str) -> Vec<PathBuf> {
    let relative = relative(path, sandbox);
    hierarchies(Path::new(ROOT)).into_iter().map(|hierarchy| hierarchy.join(&relative)).collect()
}

fn relative(path: Option<&Path>, sandbox: &str) -> PathBuf {
    let text = path.map(|path| path.display().to_string()).unwrap_or_default();
    let parts: Vec<&str> = text.split(':').collect();
    let text = match parts[..] {
        [slice, prefix, name] => {
            let slice = if slice.is_empty() { "system.slice" } else { slice };
            format!("{slice}/{prefix}-{name}.scope")
        }
        _ => text,
    };
    let mut clean: PathBuf =
        Path::new(&text).components().filter(|part| matches!(part, Component::Normal(_))).collect();
    if clean.as_os_str().is_empty() {
        clean = Path::new("kata").join(sandbox);
    }
    // A group of our own below the engine's: what the engine removes is empty, what we remove is ours.
    clean.join("kata")
}

/// The mounted hierarchies: the one of version 2, or every controller of version 1.
fn hierarchies(root: &Path) -> Vec<PathBuf> {
    if root.join("cgroup.controllers").exists() {
        return vec![root.to_owned()];
    }
    let mut found: Vec<PathBuf> =
        fs::read_dir(root).map(|entries| entries.flatten().map(|entry| entry.path()).collect()).unwrap_or_default();
    // Links are second names (cpu,cpuacct); in a hierarchy without tasks or procs there is nothing to join.
    found.retain(|path| !path.is_symlink() && path.join("cgroup.procs").exists());
    found.sort_unstable();
    found
}

/// The mark on groups that a sandbox of ours made, so that whichever of them is the last removes it.
const MARK: &str = "trusted.kata";

/// Makes a group, with its parents where they are missing.
pub(crate) fn create(dir: &Path) -> Result<(), Error> {
    let error = |source| Error::Cgroup { path: dir.to_owned(), source };
    let missing: Vec<&Path> = dir.ancestors().take_while(|path| !path.exists()).collect();
    for path in missing.into_iter().rev() {
        match fs::create_dir(path) {
            // A hierarchy that takes no marks keeps the parents, empty.
            Ok(()) => drop(setxattr(path, MARK, b"1", XattrFlags::empty()).map_err(io::Error::from)),
            // Made by a neighbour that starts at the same moment.
            Err(other) if other.kind() == io::ErrorKind::AlreadyExists => {}
            Err(other) => return Err(error(other)),
        }
    }
    // In version 1 a new cpuset is empty and takes no process before it has processors and memory: those of its parent.
    for file in ["cpuset.cpus", "cpuset.mems"] {
        inherit(dir, file).map_err(error)?;
    }
    Ok(())
}

fn inherit(dir: &Path, file: &str) -> io::Result<()> {
    let path = dir.join(file);
    if dir.join("cgroup.controllers").exists() || !path.exists() || !fs::read_to_string(&path)?.trim().is_empty() {
        return Ok(());
    }
    let Some(parent) = dir.parent() else { return Ok(()) };
    inherit(parent, file)?;
    fs::write(&path, fs::read_to_string(parent.join(file))?.trim())
}

/// Removes a group of ours, and those above it that a sandbox of ours made and that nobody uses any more.
pub(crate) fn remove(dir: &Path) -> io::Result<()> {
    let end = Instant::now() + EMPTY_WITHIN;
    loop {
        match fs::remove_dir(dir) {
            Ok(()) => break,
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            // Processes leave their group some moments after their death; there is no event to wait for in version 1.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(error),
        }
    }
    for parent in dir.ancestors().skip(1) {
        if getxattr(parent, MARK, &mut [0u8; 1]).is_err() || fs::remove_dir(parent).is_err() {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_paths_become_groups() {
        let path = |text: &str| relative(Some(Path::new(text)), "s").display().to_string();
        assert_eq!(path("/default/c1"), "default/c1/kata");
        assert_eq!(path("system.slice:cri:abc"), "system.slice/cri-abc.scope/kata");
        assert_eq!(path("../../etc"), "etc/kata");
        assert_eq!(path(""), "kata/s/kata");
    }

    #[test]
    fn a_group_is_made_and_removed_in_every_hierarchy_of_this_host() {
        let name = format!("kata-test-{}", std::process::id());
        let dirs = directories(Some(Path::new(&name)), "s");
        assert!(!dirs.is_empty(), "no control groups on this host");
        for dir in &dirs {
            create(dir).unwrap();
            assert!(dir.join("cgroup.procs").exists());
            remove(dir).unwrap();
            assert!(!dir.parent().unwrap().exists(), "what was made for it goes too");
        }
        for dir in &dirs {
            let theirs = dir.parent().unwrap();
            fs::create_dir(theirs).unwrap();
            create(dir).unwrap();
            remove(dir).unwrap();
            assert!(theirs.exists(), "what was there before stays");
            fs::remove_dir(theirs).unwrap();
        }
    }
}
