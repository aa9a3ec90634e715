//! Mounts by the kernel's detached-tree interface (open_tree(2), mount_setattr(2), move_mount(2)).
//!
//! A read-only bind gets its flag before it is attached: a remount afterwards would not reach the copy that the
//! virtio-fs server has of this namespace.

// mount_setattr(2) has no safe wrapper in the libraries in use.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

use crate::{Error, RootfsMount};

/// The page that mount(2) takes its data in, less the terminating byte.
const MAX_MOUNT_DATA: usize = 4095;

/// What of a host path matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    File,
}

/// Tells a file from a directory, and refuses everything else.
pub(crate) fn kind(path: &Path) -> Result<Kind, Error> {
    let file_type = fs::metadata(path)
        .map_err(|source| Error::Mount { what: path.display().to_string(), at: "the share".into(), source })?
        .file_type();
    let kind = if file_type.is_dir() {
        return Ok(Kind::Directory);
    } else if file_type.is_file() {
        return Ok(Kind::File);
    } else if file_type.is_socket() {
        "socket"
    } else if file_type.is_fifo() {
        "FIFO"
    } else if file_type.is_block_device() {
        "block device"
    } else {
        "character device"
    };
    Err(Error::Kind { path: path.to_owned(), kind })
}

/// Whether this process lives in the mount namespace of process 1.
///
/// Where that cannot be told (a `/proc` that hides process 1) the answer is no.
pub(crate) fn in_host_namespace() -> bool {
    matches!((fs::read_link("/proc/1/ns/mnt"), fs::read_link("/proc/thread-self/ns/mnt")), (Ok(one), Ok(own)) if one == own)
}

/// The small tmpfs that holds nothing but mount points: a guest that could write there could not fill the host.
pub(crate) fn tmpfs(at: &Path) -> Result<(), Error> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("kata-share", at, "tmpfs", flags, c"size=1m,nr_inodes=64k,mode=755")
        .map_err(|errno| mount_error("tmpfs", at, errno.into()))
}

/// Lets mounts below `at` propagate to the copies of this namespace.
pub(crate) fn make_shared(at: &Path) -> Result<(), Error> {
    rustix::mount::mount_change(at, MountPropagationFlags::SHARED)
        .map_err(|errno| mount_error("shared propagation", at, errno.into()))
}

/// Binds `source` at `at` in the same peer group, its top read-only, what comes below as it is.
pub(crate) fn bind_read_only_top(source: &Path, at: &Path) -> Result<(), Error> {
    let tree = open_tree(source)?;
    set_read_only(&tree, false).map_err(|error| mount_error(&source.display().to_string(), at, error))?;
    attach(&tree, source, at)
}

/// Binds a host path with everything below it, all of it read-only if asked.
pub(crate) fn bind(source: &Path, at: &Path, read_only: bool) -> Result<(), Error> {
    let tree = open_tree(source)?;
    if read_only {
        set_read_only(&tree, true).map_err(|error| mount_error(&source.display().to_string(), at, error))?;
    }
    attach(&tree, source, at)
}

fn open_tree(source: &Path) -> Result<OwnedFd, Error> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    rustix::mount::open_tree(CWD, source, flags)
        .map_err(|errno| mount_error(&source.display().to_string(), Path::new("the share"), errno.into()))
}

fn attach(tree: &OwnedFd, source: &Path, at: &Path) -> Result<(), Error> {
    rustix::mount::move_mount(tree, c"", CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|errno| mount_error(&source.display().to_string(), at, errno.into()))
}

/// Sets the read-only attribute on a detached tree.
fn set_read_only(tree: &OwnedFd, recursive: bool) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a static C string, the attributes outlive the call and their size is passed with them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Mounts one of an engine's root file system mounts.
pub(crate) fn mount(mount: &RootfsMount, at: &Path) -> Result<(), Error> {
    let options = Options::parse(mount)?;
    if mount.fs_type == "bind" || options.bind {
        return bind(Path::new(&mount.source), at, options.flags.contains(MountFlags::RDONLY));
    }
    let error = |source| mount_error(&format!("{} ({})", mount.source, mount.fs_type), at, source);
    // Many layers can exceed the one page that mount(2) takes: their common directory is then named by a descriptor.
    let mut data = options.data.join(",");
    let mut common = None;
    if data.len() > MAX_MOUNT_DATA
        && let Some((dir, shorter)) = shorten(&data).map_err(error)?
    {
        common = Some(dir);
        data = shorter;
    }
    let data = CString::new(data).map_err(|_| error(io::ErrorKind::InvalidInput.into()))?;
    let result =
        rustix::mount::mount(mount.source.as_str(), at, mount.fs_type.as_str(), options.flags, data.as_c_str());
    drop(common);
    result.map_err(|errno| error(errno.into()))
}

/// Rewrites the layers of an overlay relative to their common directory, kept open by the returned descriptor.
fn shorten(data: &str) -> io::Result<Option<(OwnedFd, String)>> {
    let Some(layers) = data.split(',').find_map(|option| option.strip_prefix("lowerdir=")) else { return Ok(None) };
    let Some(common) = common_dir(layers.split(':')) else { return Ok(None) };
    let dir = rustix::fs::open(&common, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let short = format!("/proc/self/fd/{}", dir.as_fd().as_raw_fd());
    let rewritten: Vec<String> = layers
        .split(':')
        .map(|layer| match Path::new(layer).strip_prefix(&common) {
            Ok(rest) => format!("{short}/{}", rest.display()),
            Err(_) => layer.to_owned(),
        })
        .collect();
    Ok(Some((dir, data.replace(layers, &rewritten.join(":")))))
}

/// The longest directory that all paths lie in; nothing when they are not absolute or have only `/` in common.
fn common_dir<'a>(mut paths: impl Iterator<Item = &'a str>) -> Option<PathBuf> {
    let mut common = Path::new(paths.next()?).parent()?.to_owned();
    for path in paths {
        while !Path::new(path).starts_with(&common) {
            common = common.parent()?.to_owned();
        }
    }
    (common.is_absolute() && common.parent().is_some()).then_some(common)
}

/// The options of a mount, sorted into what mount(2) takes them as.
#[derive(Debug)]
struct Options {
    flags: MountFlags,
    bind: bool,
    data: Vec<String>,
}

impl Options {
    fn parse(mount: &RootfsMount) -> Result<Options, Error> {
        let mut options = Options { flags: MountFlags::empty(), bind: false, data: Vec::new() };
        for option in &mount.options {
            let (flag, on) = match option.as_str() {
                "defaults" | "async" | "rw" | "" => continue,
                "ro" => (MountFlags::RDONLY, true),
                "nosuid" => (MountFlags::NOSUID, true),
                "suid" => (MountFlags::NOSUID, false),
                "nodev" => (MountFlags::NODEV, true),
                "dev" => (MountFlags::NODEV, false),
                "noexec" => (MountFlags::NOEXEC, true),
                "exec" => (MountFlags::NOEXEC, false),
                "noatime" => (MountFlags::NOATIME, true),
                "nodiratime" => (MountFlags::NODIRATIME, true),
                "relatime" => (MountFlags::RELATIME, true),
                "strictatime" => (MountFlags::STRICTATIME, true),
                "sync" => (MountFlags::SYNCHRONOUS, true),
                "dirsync" => (MountFlags::DIRSYNC, true),
                "bind" | "rbind" => {
                    options.bind = true;
                    continue;
                }
                // Propagation of a root file system ends at the virtual machine's border.
                "private" | "rprivate" | "slave" | "rslave" | "shared" | "rshared" => continue,
                option if option.starts_with("X-") || option.starts_with("x-") => {
                    return Err(Error::Option {
                        option: option.to_owned(),
                        fs_type: mount.fs_type.clone(),
                        what: mount.source.clone(),
                    });
                }
                data => {
                    options.data.push(data.to_owned());
                    continue;
                }
            };
            options.flags.set(flag, on);
        }
        Ok(options)
    }
}

/// Where a mount with a target of its own goes: below the root file system, never out of it by a link.
pub(crate) fn below(root: &Path, target: &str) -> Result<PathBuf, Error> {
    let relative: PathBuf =
        Path::new(target).components().filter(|part| matches!(part, Component::Normal(_))).collect();
    if relative.as_os_str().is_empty() {
        return Ok(root.to_owned());
    }
    let error = |errno: rustix::io::Errno| mount_error(target, root, errno.into());
    let root_fd =
        rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(error)?;
    let fd = rustix::fs::openat2(
        &root_fd,
        &relative,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )
    .map_err(error)?;
    fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).map_err(|source| mount_error(target, root, source))
}

/// Detaches what is mounted at `at` with everything below it, however often something is mounted there.
pub(crate) fn unmount(at: &Path) -> Result<(), Error> {
    // The guest may hold files open through the server, so only a detach is certain to succeed. A path that is no
    // mount point (any more) answers EINVAL.
    loop {
        match rustix::mount::unmount(at, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(mount_error("nothing", at, errno.into())),
        }
    }
}

fn mount_error(what: &str, at: &Path, source: io::Error) -> Error {
    Error::Mount { what: what.to_owned(), at: at.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rootfs(options: &[&str]) -> RootfsMount {
        RootfsMount {
            fs_type: "overlay".into(),
            source: "overlay".into(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            target: String::new(),
        }
    }

    #[test]
    fn flags_and_data_are_told_apart() {
        let options = Options::parse(&rootfs(&["ro", "nodev", "lowerdir=/a:/b", "index=off"])).unwrap();
        assert_eq!(options.flags, MountFlags::RDONLY | MountFlags::NODEV);
        assert_eq!(options.data, ["lowerdir=/a:/b", "index=off"]);
    }

    #[test]
    fn an_option_for_somebody_else_is_refused_by_name() {
        let error = Options::parse(&rootfs(&["X-kata.layer=1"])).unwrap_err();
        assert!(error.to_string().contains("X-kata.layer=1"), "{error}");
    }

    #[test]
    fn layers_share_their_common_directory() {
        let common = common_dir(["/var/lib/c/1/fs", "/var/lib/c/22/fs"].into_iter());
        assert_eq!(common.as_deref(), Some(Path::new("/var/lib/c")));
        assert_eq!(common_dir(["/a/fs", "/b/fs"].into_iter()), None);
    }

    #[test]
    fn a_kind_that_cannot_cross_is_refused_by_name() {
        let error = kind(Path::new("/dev/null")).unwrap_err();
        assert!(error.to_string().contains("character device"), "{error}");
        assert_eq!(kind(Path::new("/")).unwrap(), Kind::Directory);
    }
}
