//! The child's mount work: a tree is made detached, gets its attributes, and is attached to a descriptor of a place that
//! was resolved inside the container's root. No path is ever resolved twice. System calls only.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, FileType, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags};

use super::call::{self, MountAttr};
use super::child::Note;
use super::mounts::{Mount, Source};
use super::path::{self, Kind};

/// The magic number of procfs, statfs(2).
const PROC: u64 = 0x9fa0;
const RDONLY: u64 = 1;

/// `AT_RECURSIVE` and `AT_EMPTY_PATH` of open_tree(2), which the library's type leaves out.
const RECURSIVE: OpenTreeFlags = OpenTreeFlags::from_bits_retain(libc::AT_RECURSIVE.cast_unsigned());
const EMPTY_PATH: OpenTreeFlags = OpenTreeFlags::from_bits_retain(libc::AT_EMPTY_PATH.cast_unsigned());
const CLONE: OpenTreeFlags = OpenTreeFlags::OPEN_TREE_CLONE.union(OpenTreeFlags::OPEN_TREE_CLOEXEC);

/// A detached copy of what `place` refers to.
pub(super) fn clone_tree(place: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd, Errno> {
    let flags = CLONE | EMPTY_PATH | if recursive { RECURSIVE } else { OpenTreeFlags::empty() };
    rustix::mount::open_tree(place, c"", flags)
}

/// Attaches a detached mount.
pub(super) fn attach(tree: BorrowedFd<'_>, place: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(tree, c"", place, c"", flags)
}

/// Makes a mount of the plan.
pub(super) fn mount(root: BorrowedFd<'_>, mount: &Mount, note: &mut Note) -> Result<(), Errno> {
    let tree = match &mount.source {
        Source::Bind { path, recursive } => {
            let flags = CLONE | if *recursive { RECURSIVE } else { OpenTreeFlags::empty() };
            rustix::mount::open_tree(CWD, path.as_c_str(), flags).inspect_err(|_| note.set(b"its source"))?
        }
        Source::Filesystem { .. } => new_filesystem(&mount.source, note)?,
    };
    for (attributes, recursive) in [(&mount.recursive, true), (&mount.attributes, false)] {
        if !attributes.is_empty() {
            call::mount_setattr(tree.as_fd(), attributes, recursive)?;
        }
    }
    let place = if mount.exact {
        path::directory(root, mount.destination.to_bytes())?;
        path::open_exact(root, &mount.destination).inspect_err(|_| note.set(b"it has to be a directory, not a link"))?
    } else {
        path::mount_point(root, &mount.destination, kind_of(tree.as_fd())?)?
    };
    if mount.at_proc && !is_proc(tree.as_fd())? {
        note.set(b"only a proc file system may be mounted at /proc");
        return Err(Errno::PERM);
    }
    // Something else where /proc is expected would let the container answer for the kernel.
    if !mount.over_proc && is_proc(place.as_fd())? {
        note.set(b"nothing may be mounted over /proc");
        return Err(Errno::PERM);
    }
    attach(tree.as_fd(), place.as_fd())?;
    for (flag, recursive) in &mount.propagation {
        let attributes = MountAttr { propagation: *flag, ..MountAttr::default() };
        call::mount_setattr(tree.as_fd(), &attributes, *recursive)?;
    }
    Ok(())
}

fn is_proc(place: BorrowedFd<'_>) -> Result<bool, Errno> {
    Ok(rustix::fs::fstatfs(place)?.f_type.cast_unsigned() == PROC)
}

fn kind_of(tree: BorrowedFd<'_>) -> Result<Kind, Errno> {
    let stat = rustix::fs::statat(tree, c"", AtFlags::EMPTY_PATH)?;
    let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    Ok(if directory { Kind::Directory } else { Kind::File })
}

fn new_filesystem(source: &Source, note: &mut Note) -> Result<OwnedFd, Errno> {
    let Source::Filesystem { kind, source, flags, values } = source else { return Err(Errno::INVAL) };
    let context = rustix::mount::fsopen(kind.as_c_str(), FsOpenFlags::FSOPEN_CLOEXEC)
        .inspect_err(|_| note.set(b"does this kernel know the file system?"))?;
    let configured = (|| {
        if let Some(source) = source {
            rustix::mount::fsconfig_set_string(&context, c"source", source.as_c_str())?;
        }
        for flag in flags {
            rustix::mount::fsconfig_set_flag(&context, flag.as_c_str())?;
        }
        for (key, value) in values {
            rustix::mount::fsconfig_set_string(&context, key.as_c_str(), value.as_c_str())?;
        }
        rustix::mount::fsconfig_create(&context)?;
        rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
    })();
    if configured.is_err() {
        // The context holds the file system's own words, such as which option it does not know.
        let mut words = [0_u8; super::channel::NOTE_MAX];
        if let Ok(length) = rustix::io::read(&context, &mut words[..]) {
            note.set(words.get(..length).unwrap_or_default());
        }
    }
    configured
}

/// Hides a path: a directory under an empty read-only one, anything else under /dev/null.
pub(super) fn mask(root: BorrowedFd<'_>, hidden: &CStr) -> Result<(), Errno> {
    let Some(place) = open_present(root, hidden)? else { return Ok(()) };
    let tree = match kind_of(place.as_fd())? {
        Kind::Directory => {
            let context = rustix::mount::fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
            rustix::mount::fsconfig_create(&context)?;
            let tree = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
            call::mount_setattr(tree.as_fd(), &MountAttr { set: RDONLY, ..MountAttr::default() }, false)?;
            tree
        }
        // The guest's, before the change of root: the container's may be anything.
        Kind::File => rustix::mount::open_tree(CWD, c"/dev/null", CLONE)?,
    };
    attach(tree.as_fd(), place.as_fd())
}

/// Puts a read-only copy of a tree over itself.
pub(super) fn read_only(root: BorrowedFd<'_>, path: &CStr) -> Result<(), Errno> {
    let Some(place) = open_present(root, path)? else { return Ok(()) };
    let tree = clone_tree(place.as_fd(), true)?;
    call::mount_setattr(tree.as_fd(), &MountAttr { set: RDONLY, ..MountAttr::default() }, true)?;
    attach(tree.as_fd(), place.as_fd())
}

/// Paths to protect are those of many kernels: what is not there needs no protection.
fn open_present(root: BorrowedFd<'_>, path: &CStr) -> Result<Option<OwnedFd>, Errno> {
    match path::open(root, path, OFlags::PATH) {
        Ok(place) => Ok(Some(place)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(error) => Err(error),
    }
}
