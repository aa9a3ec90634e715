//! What the helper sees as `/`.
//!
//! A built root is a tmpfs that is filled by descriptors, not by paths: every source is opened before anything is
//! covered, and every target is found from the tmpfs's own descriptor.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, chownat, mkdirat, mknodat, openat, symlinkat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_bind_recursive, mount_change, move_mount, open_tree,
    unmount,
};
use rustix::process::{chdir, fchdir, pivot_root};

use crate::enter::{NEED_ROOT, step};
use crate::{Entry, Error, Jail, Root, sys};

/// Where the new root is mounted until it becomes `/`: a directory that every host has, and that holds no source any
/// more once all are open.
const STAGE: &str = "/dev";

/// Makes the jail's root the process's own and puts its working directory there.
pub(crate) fn enter(jail: &Jail) -> Result<(), Error> {
    if !jail.namespaces.mount {
        return match jail.root {
            Root::Host => Ok(()),
            _ => Err(step("change the root", "a root of its own needs a mount namespace of its own", Errno::INVAL)),
        };
    }
    match &jail.root {
        Root::Host => receive_only(),
        Root::Directory(directory) => {
            receive_only()?;
            let what = || format!("make {} the root", directory.display());
            mount_bind_recursive(directory, directory).map_err(|err| step(what(), NEED_ROOT, err))?;
            chdir(directory).map_err(|err| step(what(), "", err))?;
            pivot(&what())
        }
        Root::Built(entries) => {
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
                .map_err(|err| step("make mounts private", NEED_ROOT, err))?;
            build(entries, jail)?;
            pivot("make the built directory the root")
        }
    }
}

/// Mounts of the caller keep arriving here; none goes back.
fn receive_only() -> Result<(), Error> {
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .map_err(|err| step("make mounts one-way", NEED_ROOT, err))
}

/// Makes the working directory, a mount point, the root; nothing of the old one is left.
fn pivot(what: &str) -> Result<(), Error> {
    pivot_root(".", ".").map_err(|err| step(what, "does the host run from its initramfs?", err))?;
    // The old root lies on top of the new one at the same place.
    unmount(".", UnmountFlags::DETACH).map_err(|err| step("let go of the old root", "", err))?;
    chdir("/").map_err(|err| step("enter the new root", "", err))
}

/// An entry with its source open.
enum Opened<'a> {
    Tree { tree: OwnedFd, is_dir: bool, target: &'a Path, writable: bool },
    Node { tree: OwnedFd, device: u64, target: &'a Path },
    Link { target: &'a Path, to: &'a Path },
    Scratch { target: &'a Path, size_kib: u32 },
}

fn build(entries: &[Entry], jail: &Jail) -> Result<(), Error> {
    let opened: Vec<Opened<'_>> = entries.iter().map(open).collect::<Result<_, _>>()?;
    let root = tmpfs("the root", 64, MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC, None)?;
    attach(&root, CWD, Path::new(STAGE))?;
    for entry in &opened {
        make(entry, root.as_fd(), jail)?;
    }
    sys::set_mount_attributes(root.as_fd(), libc::MOUNT_ATTR_RDONLY, false)
        .map_err(|err| step("make the root read-only", "needs Linux 5.12", err))?;
    fchdir(&root).map_err(|err| step("enter the built root", "", err))
}

fn open(entry: &Entry) -> Result<Opened<'_>, Error> {
    let clone = |source: &Path| {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
        open_tree(CWD, source, flags)
            .map_err(|err| step(format!("open {} for the jail", source.display()), "does it exist?", err))
    };
    Ok(match entry {
        Entry::Bind { source, target, writable } => {
            let tree = clone(source)?;
            let is_dir =
                fs::metadata(source).map_err(|err| step(format!("look at {}", source.display()), "", err))?.is_dir();
            Opened::Tree { tree, is_dir, target, writable: *writable }
        }
        Entry::Device { source, target } => {
            let found = fs::metadata(source)
                .map_err(|err| step(format!("look at the device {}", source.display()), "does it exist?", err))?;
            if !found.file_type().is_char_device() {
                return Err(step(format!("use {} as a device", source.display()), "", Errno::NODEV));
            }
            Opened::Node { tree: clone(source)?, device: found.rdev(), target }
        }
        Entry::Symlink { target, to } => Opened::Link { target, to },
        Entry::Tmpfs { target, size_kib } => Opened::Scratch { target, size_kib: *size_kib },
    })
}

fn make(entry: &Opened<'_>, root: BorrowedFd<'_>, jail: &Jail) -> Result<(), Error> {
    match entry {
        Opened::Tree { tree, is_dir, target, writable } => {
            let place = if *is_dir { directory(root, target)? } else { file(root, target)? };
            let mut attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
            if !writable {
                attributes |= libc::MOUNT_ATTR_RDONLY;
            }
            sys::set_mount_attributes(tree.as_fd(), attributes, true)
                .map_err(|err| step(format!("restrict the mount of {}", target.display()), "needs Linux 5.12", err))?;
            attach(tree, root, &place)
        }
        Opened::Node { tree, device, target } => {
            let place = inside(root, target)?;
            let what = || format!("make the device {}", target.display());
            match mknodat(root, &place, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, *device) {
                Ok(()) => chownat(
                    root,
                    &place,
                    Some(Uid::from_raw(jail.uid)),
                    Some(Gid::from_raw(jail.gid)),
                    AtFlags::SYMLINK_NOFOLLOW,
                )
                .map_err(|err| step(what(), NEED_ROOT, err)),
                // No CAP_MKNOD: the host's own node, with whatever rights it grants.
                Err(Errno::PERM) => attach(tree, root, &file(root, target)?),
                Err(err) => Err(step(what(), NEED_ROOT, err)),
            }
        }
        Opened::Link { target, to } => {
            let place = inside(root, target)?;
            symlinkat(*to, root, &place).map_err(|err| step(format!("make the link {}", target.display()), "", err))
        }
        Opened::Scratch { target, size_kib } => {
            let place = directory(root, target)?;
            let flags = MountAttrFlags::MOUNT_ATTR_NOSUID
                | MountAttrFlags::MOUNT_ATTR_NODEV
                | MountAttrFlags::MOUNT_ATTR_NOEXEC;
            let mount = tmpfs(&target.to_string_lossy(), *size_kib, flags, Some(jail))?;
            attach(&mount, root, &place)
        }
    }
}

/// A new tmpfs that isn't attached anywhere yet.
fn tmpfs(what: &str, size_kib: u32, flags: MountAttrFlags, owner: Option<&Jail>) -> Result<OwnedFd, Error> {
    let make = || -> Result<OwnedFd, Errno> {
        let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(context.as_fd(), "size", format!("{size_kib}k"))?;
        fsconfig_set_string(context.as_fd(), "mode", if owner.is_some() { "0700" } else { "0755" })?;
        if let Some(jail) = owner {
            fsconfig_set_string(context.as_fd(), "uid", jail.uid.to_string())?;
            fsconfig_set_string(context.as_fd(), "gid", jail.gid.to_string())?;
        }
        fsconfig_create(context.as_fd())?;
        fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, flags)
    };
    make().map_err(|err| step(format!("make a tmpfs for {what}"), "needs Linux 5.2 and root", err))
}

fn attach(mount: &OwnedFd, at: BorrowedFd<'_>, path: &Path) -> Result<(), Error> {
    move_mount(mount, "", at, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|err| step(format!("mount {}", path.display()), NEED_ROOT, err))
}

/// The path relative to the root, its parents made.
fn inside(root: BorrowedFd<'_>, target: &Path) -> Result<PathBuf, Error> {
    let mut clean = PathBuf::new();
    for part in target.components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(step(format!("place {}", target.display()), "a target has no ..", Errno::INVAL));
            }
        }
    }
    if let Some(parent) = clean.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        directory(root, parent)?;
    }
    Ok(clean)
}

fn directory(root: BorrowedFd<'_>, target: &Path) -> Result<PathBuf, Error> {
    let place = inside(root, target)?;
    match mkdirat(root, &place, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(place),
        Err(err) => Err(step(format!("make the directory {}", target.display()), "", err)),
    }
}

fn file(root: BorrowedFd<'_>, target: &Path) -> Result<PathBuf, Error> {
    let place = inside(root, target)?;
    openat(root, &place, OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::from_raw_mode(0o444))
        .map(|_| place)
        .map_err(|err| step(format!("make the file {}", target.display()), "", err))
}
