//! Paths inside a container's root, which its processes and its image choose: every step is resolved by the kernel with
//! that root as `/` (openat2(2)), so no link leads out. System calls only: this runs in the child.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

const PATH_MAX: usize = libc::PATH_MAX as usize;

/// How many dangling links may hang on one another.
const MAX_LINKS: usize = 8;

/// What a mount point has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// For anything that is mounted as a tree.
    Directory,
    /// For a bind mount of a single file, device, socket.
    File,
}

fn open_with(root: BorrowedFd<'_>, path: &CStr, flags: OFlags, resolve: ResolveFlags) -> Result<OwnedFd, Errno> {
    let resolve = resolve | ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    loop {
        // EAGAIN: somebody renamed something meanwhile, so that `..` could not be trusted.
        match rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            result => return result,
        }
    }
}

/// Opens what is there.
pub(super) fn open(root: BorrowedFd<'_>, path: &CStr, flags: OFlags) -> Result<OwnedFd, Errno> {
    open_with(root, path, flags, ResolveFlags::empty())
}

/// Opens a directory that is reached without any link.
pub(super) fn open_exact(root: BorrowedFd<'_>, path: &CStr) -> Result<OwnedFd, Errno> {
    open_with(root, path, OFlags::PATH | OFlags::DIRECTORY, ResolveFlags::NO_SYMLINKS)
}

/// Opens a mount point, made if it is missing.
pub(super) fn mount_point(root: BorrowedFd<'_>, path: &CStr, kind: Kind) -> Result<OwnedFd, Errno> {
    match open(root, path, OFlags::PATH) {
        Err(Errno::NOENT) => {}
        result => return result,
    }
    if kind == Kind::Directory {
        return directory(root, path.to_bytes());
    }
    let (parent, name) = parent(root, path)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(&parent, name, flags, Mode::from_raw_mode(0o644)) {
        // Somebody else made it, or it is a link to nowhere: what is there now decides.
        Ok(_) | Err(Errno::EXIST) => open(root, path, OFlags::PATH),
        Err(error) => Err(error),
    }
}

/// Opens the directory that a path is in, made if it is missing, and returns the last name too.
pub(super) fn parent<'a>(root: BorrowedFd<'_>, path: &'a CStr) -> Result<(OwnedFd, &'a CStr), Errno> {
    let bytes = path.to_bytes_with_nul();
    let slash = bytes.iter().rposition(|byte| *byte == b'/').ok_or(Errno::INVAL)?;
    let (above, name) = bytes.split_at_checked(slash + 1).ok_or(Errno::INVAL)?;
    let name = CStr::from_bytes_with_nul(name).map_err(|_| Errno::INVAL)?;
    Ok((directory(root, above)?, name))
}

/// Opens a directory, made with all above it if it is missing.
pub(super) fn directory(root: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd, Errno> {
    make(root, path, 0)
}

fn make(root: BorrowedFd<'_>, path: &[u8], links: usize) -> Result<OwnedFd, Errno> {
    if links > MAX_LINKS {
        return Err(Errno::LOOP);
    }
    let mut prefix = Joined::new();
    let mut current = open(root, c"/", OFlags::PATH | OFlags::DIRECTORY)?;
    for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
        let above = prefix.length;
        prefix.push(name)?;
        current = match open(root, prefix.whole()?, OFlags::PATH | OFlags::DIRECTORY) {
            Err(Errno::NOENT) => match rustix::fs::mkdirat(&current, prefix.from(above + 1)?, Mode::from(0o755)) {
                Ok(()) => open(root, prefix.whole()?, OFlags::PATH | OFlags::DIRECTORY)?,
                Err(Errno::EXIST) => behind_link(root, current.as_fd(), &prefix, above, links)?,
                Err(error) => return Err(error),
            },
            result => result?,
        };
    }
    Ok(current)
}

/// The name exists and yet leads nowhere: a link, whose target is made.
fn behind_link(
    root: BorrowedFd<'_>,
    current: BorrowedFd<'_>,
    prefix: &Joined,
    above: usize,
    links: usize,
) -> Result<OwnedFd, Errno> {
    let mut buffer = [0_u8; PATH_MAX];
    let length = match rustix::fs::readlinkat_raw(current, prefix.from(above + 1)?, &mut buffer[..]) {
        Ok(length) => length,
        // Not a link: another container's creation was faster.
        Err(Errno::INVAL) => return open(root, prefix.whole()?, OFlags::PATH | OFlags::DIRECTORY),
        Err(error) => return Err(error),
    };
    let target = buffer.get(..length).ok_or(Errno::NAMETOOLONG)?;
    let mut joined = Joined::new();
    if target.first() != Some(&b'/') {
        joined.push(prefix.bytes.get(1..above).unwrap_or_default())?;
    }
    joined.push(target)?;
    make(root, joined.whole()?.to_bytes(), links + 1)
}

/// A path under construction, on the stack.
struct Joined {
    bytes: [u8; PATH_MAX],
    length: usize,
}

impl Joined {
    fn new() -> Self {
        Self { bytes: [0; PATH_MAX], length: 0 }
    }

    fn push(&mut self, name: &[u8]) -> Result<(), Errno> {
        let end = self.length + 1 + name.len();
        // One byte stays 0: the string's end.
        let room = self.bytes.get_mut(self.length..end).filter(|_| end < PATH_MAX).ok_or(Errno::NAMETOOLONG)?;
        let (slash, rest) = room.split_first_mut().ok_or(Errno::NAMETOOLONG)?;
        *slash = b'/';
        rest.copy_from_slice(name);
        self.length = end;
        Ok(())
    }

    fn from(&self, start: usize) -> Result<&CStr, Errno> {
        let bytes = self.bytes.get(start..).ok_or(Errno::NAMETOOLONG)?;
        CStr::from_bytes_until_nul(bytes).map_err(|_| Errno::NAMETOOLONG)
    }

    fn whole(&self) -> Result<&CStr, Errno> {
        self.from(0)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn root() -> (tempfile::TempDir, OwnedFd) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("root")).unwrap();
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let fd = rustix::fs::open(dir.path().join("root"), flags, Mode::empty()).unwrap();
        (dir, fd)
    }

    #[test]
    fn missing_directories_are_made() {
        let (dir, fd) = root();
        directory(fd.as_fd(), b"/a/b//c").unwrap();
        assert!(dir.path().join("root/a/b/c").is_dir());
        mount_point(fd.as_fd(), c"/a/d/file", Kind::File).unwrap();
        assert!(dir.path().join("root/a/d/file").is_file());
    }

    #[test]
    fn links_stay_inside() {
        let (dir, fd) = root();
        let inside = dir.path().join("root");
        symlink("/../../..", inside.join("up")).unwrap();
        symlink(dir.path(), inside.join("host")).unwrap();
        symlink("../run", inside.join("relative")).unwrap();
        directory(fd.as_fd(), b"/up/made").unwrap();
        assert!(inside.join("made").is_dir());
        directory(fd.as_fd(), b"/host/evil").unwrap();
        assert!(!dir.path().join("evil").exists());
        assert!(inside.join(dir.path().strip_prefix("/").unwrap()).join("evil").is_dir());
        directory(fd.as_fd(), b"/relative/lock").unwrap();
        assert!(inside.join("run/lock").is_dir());
        assert!(!dir.path().join("run").exists());
    }

    #[test]
    fn link_circles_end() {
        let (dir, fd) = root();
        symlink("/b/x", dir.path().join("root/a")).unwrap();
        symlink("/a/x", dir.path().join("root/b")).unwrap();
        assert_eq!(directory(fd.as_fd(), b"/a/c").unwrap_err(), Errno::LOOP);
        symlink("/nowhere", dir.path().join("root/file")).unwrap();
        assert_eq!(mount_point(fd.as_fd(), c"/file", Kind::File).unwrap_err(), Errno::NOENT);
    }

    #[test]
    fn exact_means_no_link() {
        let (dir, fd) = root();
        fs::create_dir(dir.path().join("root/real")).unwrap();
        symlink("real", dir.path().join("root/proc")).unwrap();
        open_exact(fd.as_fd(), c"/real").unwrap();
        assert_eq!(open_exact(fd.as_fd(), c"/proc").unwrap_err(), Errno::LOOP);
    }
}
