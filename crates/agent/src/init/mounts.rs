//! The file systems of a guest, and a root that containers can pivot away from.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags};

/// `statfs.f_type` of the initial ramfs (linux/magic.h).
const RAMFS_MAGIC: u64 = 0x8584_58f6;
/// `statfs.f_type` of tmpfs, which the initial root file system may be too.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// A mount that failed.
#[derive(Debug, thiserror::Error)]
#[error("Cannot mount {kind} on {target}")]
pub struct Error {
    kind: &'static str,
    target: &'static str,
    source: io::Error,
}

/// One file system that every guest has.
struct Basic {
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    options: &'static std::ffi::CStr,
}

const NOSUID_NOEXEC: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC);

const BASIC: [Basic; 6] = [
    Basic { kind: "devtmpfs", target: "/dev", flags: MountFlags::NOSUID, options: c"mode=0755" },
    Basic { kind: "sysfs", target: "/sys", flags: NOSUID_NOEXEC.union(MountFlags::NODEV), options: c"" },
    Basic { kind: "proc", target: "/proc", flags: NOSUID_NOEXEC.union(MountFlags::NODEV), options: c"" },
    Basic { kind: "tmpfs", target: "/run", flags: MountFlags::NOSUID.union(MountFlags::NODEV), options: c"mode=0755" },
    Basic { kind: "tmpfs", target: "/dev/shm", flags: NOSUID_NOEXEC.union(MountFlags::NODEV), options: c"mode=1777" },
    Basic {
        kind: "devpts",
        target: "/dev/pts",
        flags: NOSUID_NOEXEC,
        options: c"newinstance,ptmxmode=0666,mode=0620,gid=5",
    },
];

/// Makes the root a mount that pivot_root(2) accepts as an old root.
///
/// The kernel's initial root file system has no parent mount and can never be pivoted away from. So the same files are
/// mounted once more on top of it, and the process goes to live there. A root from a disk is left as it is.
///
/// # Errors
///
/// Those of mount(2), chroot(2).
pub fn make_root_pivotable() -> io::Result<()> {
    let kind = rustix::fs::statfs("/")?.f_type.cast_unsigned();
    if kind != RAMFS_MAGIC && kind != TMPFS_MAGIC {
        return Ok(());
    }
    let staging = "/.root";
    fs::create_dir_all(staging)?;
    rustix::mount::mount_bind("/", staging)?;
    rustix::process::chdir(staging)?;
    rustix::mount::mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")?;
    fs::remove_dir(staging)
}

/// Mounts what is not mounted yet: the kernel or an image may have done some of it.
///
/// # Errors
///
/// The first mount that fails.
pub fn mount_basics() -> Result<(), Error> {
    for basic in &BASIC {
        let failed = |source: io::Error| Error { kind: basic.kind, target: basic.target, source };
        fs::create_dir_all(basic.target).map_err(failed)?;
        match rustix::mount::mount(basic.kind, basic.target, basic.kind, basic.flags, basic.options) {
            // The same file system is there already (CONFIG_DEVTMPFS_MOUNT, for one).
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(error) => return Err(failed(error.into())),
        }
    }
    Ok(())
}

/// The links that programs expect in `/dev`.
pub fn link_devices() {
    let links = [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
        ("pts/ptmx", "/dev/ptmx"),
    ];
    for (target, link) in links {
        // devtmpfs makes /dev/ptmx as a node of the first instance; ours is a new instance.
        if Path::new(link).symlink_metadata().is_ok_and(|metadata| !metadata.is_symlink()) {
            let _ = fs::remove_file(link);
        }
        match symlink(target, link) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => tracing::warn!(link, %error, "Cannot link a device"),
        }
    }
}

/// Unmounts a tree's mount, detached if it is busy, so that nothing can keep a sandbox from ending.
///
/// # Errors
///
/// Those of umount(2), except that nothing is mounted there.
pub fn unmount(target: &Path) -> io::Result<()> {
    let flags = UnmountFlags::NOFOLLOW;
    match rustix::mount::unmount(target, flags) {
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Ok(()),
        Err(rustix::io::Errno::BUSY) => Ok(rustix::mount::unmount(target, flags | UnmountFlags::DETACH)?),
        Err(error) => Err(error.into()),
    }
}
