//! Mounting the hierarchies, for the first process of a guest.

use std::fs;
use std::io;
use std::path::Path;

use rustix::mount::{MountFlags, mount};

/// Mounts control groups at `root`: version 2 as a whole, or every controller of version 1 in a directory of its own.
///
/// # Errors
///
/// The kernel refuses. A controller of version 1 that it lacks is left out.
pub fn mount_hierarchies(root: &Path, unified: bool) -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RELATIME;
    if unified {
        mount("cgroup2", root, "cgroup2", flags, c"nsdelegate")?;
        return Ok(());
    }
    mount("cgroup", root, "tmpfs", flags, c"mode=755,size=64k")?;
    for controller in controllers(&fs::read_to_string("/proc/cgroups")?) {
        let dir = root.join(&controller);
        fs::create_dir(&dir)?;
        let data = std::ffi::CString::new(controller).map_err(io::Error::other)?;
        if let Err(errno) = mount("cgroup", &dir, "cgroup", flags, data.as_c_str()) {
            // Listed, but built without version 1: what needs it says so.
            tracing::debug!(dir = %dir.display(), error = %io::Error::from(errno), "Cannot mount a controller");
            fs::remove_dir(&dir)?;
        }
    }
    Ok(())
}

/// The names of the enabled controllers in `/proc/cgroups`.
fn controllers(text: &str) -> Vec<String> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                [name, _, _, "1"] => Some(name.to_owned()),
                _ => None,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    // A thread of its own mount namespace.
    #![allow(unsafe_code)]

    use rustix::mount::{MountPropagationFlags, mount_change};
    use rustix::thread::UnshareFlags;

    use super::*;
    use crate::cgroup::Version;

    #[test]
    fn either_version_is_mounted_and_told_from_the_other() {
        let mounting = std::thread::spawn(|| {
            // SAFETY: the descriptor table, whose unsharing is what makes the call unsafe, is not unshared.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
            for (unified, version) in [(true, Version::V2), (false, Version::V1)] {
                let root = tempfile::tempdir().unwrap();
                mount_hierarchies(root.path(), unified).unwrap();
                assert_eq!(Version::detect(root.path()), version);
                // On a machine that lives in version 2, the controllers of version 1 are all taken.
                let pids = root.path().join("pids/tasks").exists();
                assert!(unified || pids || Path::new("/sys/fs/cgroup/cgroup.controllers").exists());
                let detached = rustix::mount::UnmountFlags::DETACH;
                rustix::mount::unmount(root.path(), detached).unwrap();
            }
        });
        mounting.join().unwrap();
    }

    #[test]
    fn only_what_is_enabled_is_mounted() {
        let text = "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t0\t1\t1\nmemory\t0\t1\t0\npids\t0\t1\t1\n";
        assert_eq!(controllers(text), ["cpu", "pids"]);
    }
}
