//! Copies files of the host into the guest, piece by piece, and never outside the shared directory.
//!
//! Containers can write below it. So nothing is looked up by a whole path: each directory is opened below the one before
//! it, without following links (openat2(2): `RESOLVE_BENEATH`, `RESOLVE_NO_SYMLINKS`), and what is made is made relative
//! to that descriptor.

use std::ffi::{OsStr, OsString};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use protocol::agent::CopyFileRequest;
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;

/// Why a file cannot be copied.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// The path is not below the shared directory.
    #[error("The path {path} is not below {root}")]
    Outside {
        /// As requested.
        path: String,
        /// The only place where files are copied to.
        root: String,
    },
    /// The mode says that it is neither file nor directory nor link.
    #[error("The mode {mode:#o} of {path} is of no file, directory or symbolic link")]
    Kind {
        /// As requested.
        path: String,
        /// As requested.
        mode: u32,
    },
    /// A number is negative.
    #[error("Offset, size or owner of {path} makes no sense")]
    Number {
        /// As requested.
        path: String,
    },
    /// A step of the copy.
    #[error("Cannot {step} {path}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// As requested.
        path: String,
        /// Why.
        source: io::Error,
    },
}

const RESOLVE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS);

/// Does what the request says, below `root`.
///
/// # Errors
///
/// [`Error`], and nothing outside `root` was touched.
pub(super) fn copy(root: &Path, request: &CopyFileRequest) -> Result<(), Error> {
    let step = |step: &'static str| {
        let path = request.path.clone();
        move |error: Errno| Error::Step { step, path: path.clone(), source: error.into() }
    };
    let (parents, name) = split(root, &request.path)?;
    let number = || Error::Number { path: request.path.clone() };
    let offset = u64::try_from(request.offset).map_err(|_| number())?;
    let size = u64::try_from(request.file_size).map_err(|_| number())?;
    let owner = (u32::try_from(request.uid).map_err(|_| number())?, u32::try_from(request.gid).map_err(|_| number())?);

    let top = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(step("open the shared directory for"))?;
    let mut directory = top;
    for parent in &parents {
        directory = enter(&directory, parent, request.dir_mode).map_err(step("make the directories above"))?;
    }

    // A mode without a file type is a regular file's.
    let kind = match request.file_mode & libc::S_IFMT {
        0 => FileType::RegularFile,
        kind => FileType::from_raw_mode(kind),
    };
    let mode = Mode::from_raw_mode(request.file_mode & 0o7777);
    match kind {
        FileType::Directory => {
            let made = enter(&directory, &name, request.file_mode & 0o7777).map_err(step("make the directory"))?;
            let opened = reopen(&made).map_err(step("open the directory"))?;
            set_owner_and_mode(&opened, owner, mode).map_err(step("set owner and mode of"))
        }
        FileType::Symlink => {
            let target = OsStr::from_bytes(&request.data);
            match rustix::fs::unlinkat(&directory, &name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(step("replace")(error)),
            }
            rustix::fs::symlinkat(target, &directory, &name).map_err(step("make the link"))?;
            let (uid, gid) = ids(owner);
            rustix::fs::chownat(&directory, &name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(step("set the owner of"))
        }
        FileType::RegularFile => {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let private = Mode::RUSR | Mode::WUSR;
            let file = rustix::fs::openat2(&directory, &name, flags, private, RESOLVE).map_err(step("open"))?;
            let is_file = rustix::fs::fstat(&file)
                .map(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile)
                .map_err(step("look at"))?;
            if !is_file {
                return Err(step("write, because it is no regular file,")(Errno::INVAL));
            }
            if offset == 0 {
                rustix::fs::ftruncate(&file, 0).map_err(step("empty"))?;
            }
            let file = write_at(file, offset, &request.data).map_err(|source| Error::Step {
                step: "write",
                path: request.path.clone(),
                source,
            })?;
            let written = offset.saturating_add(u64::try_from(request.data.len()).unwrap_or(u64::MAX));
            if written >= size {
                set_owner_and_mode(&file, owner, mode).map_err(step("set owner and mode of"))?;
            }
            Ok(())
        }
        _ => Err(Error::Kind { path: request.path.clone(), mode: request.file_mode }),
    }
}

/// The directories between `root` and the last part, and the last part.
fn split(root: &Path, path: &str) -> Result<(Vec<OsString>, OsString), Error> {
    let outside = || Error::Outside { path: path.to_owned(), root: root.display().to_string() };
    let below = Path::new(path).strip_prefix(root).map_err(|_| outside())?;
    let mut parts = Vec::new();
    for part in below.components() {
        match part {
            Component::Normal(part) if !part.as_bytes().contains(&0) => parts.push(part.to_owned()),
            _ => return Err(outside()),
        }
    }
    let name = parts.pop().ok_or_else(outside)?;
    Ok((parts, name))
}

/// Opens a directory below another, making it if it is not there.
fn enter(directory: &OwnedFd, name: &OsStr, mode: u32) -> rustix::io::Result<OwnedFd> {
    let mode = if mode & 0o7777 == 0 { 0o750 } else { mode & 0o7777 };
    match rustix::fs::mkdirat(directory, name, Mode::from_raw_mode(mode)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error),
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat2(directory, name, flags, Mode::empty(), RESOLVE)
}

/// A descriptor for changing a directory's owner and mode, which `O_PATH` does not allow.
fn reopen(directory: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat2(directory, ".", flags, Mode::empty(), RESOLVE)
}

fn write_at(file: OwnedFd, offset: u64, data: &[u8]) -> io::Result<OwnedFd> {
    let mut file = std::fs::File::from(file);
    file.seek(SeekFrom::Start(offset))?;
    file.write_all(data)?;
    Ok(file.into())
}

fn ids((uid, gid): (u32, u32)) -> (Option<Uid>, Option<Gid>) {
    (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
}

/// The mode last: changing the owner clears the set-user-ID bit.
fn set_owner_and_mode(file: impl AsFd, owner: (u32, u32), mode: Mode) -> rustix::io::Result<()> {
    let (uid, gid) = ids(owner);
    rustix::fs::fchown(&file, uid, gid)?;
    rustix::fs::fchmod(&file, mode)
}

/// Makes the shared directory itself, for a guest that has no share mounted there.
///
/// # Errors
///
/// Those of mkdir(2).
pub(super) fn make_root(root: &Path) -> io::Result<()> {
    if rustix::fs::accessat(CWD, root, rustix::fs::Access::EXISTS, AtFlags::empty()).is_ok() {
        return Ok(());
    }
    std::fs::create_dir_all(root)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn request(root: &Path, path: &str, data: &[u8]) -> CopyFileRequest {
        CopyFileRequest {
            path: format!("{}/{path}", root.display()),
            file_size: i64::try_from(data.len()).unwrap(),
            file_mode: libc::S_IFREG | 0o640,
            dir_mode: 0o755,
            data: data.to_vec(),
            ..Default::default()
        }
    }

    #[test]
    fn a_file_arrives_in_pieces_with_mode_and_owner() {
        let root = tempfile::tempdir().unwrap();
        let mut piece = request(root.path(), "a/b/file", b"hello ");
        piece.file_size = 11;
        piece.uid = 12;
        piece.gid = 34;
        copy(root.path(), &piece).unwrap();
        piece.offset = 6;
        piece.data = b"world".to_vec();
        copy(root.path(), &piece).unwrap();
        let path = root.path().join("a/b/file");
        assert_eq!(fs::read(&path).unwrap(), b"hello world");
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!((metadata.uid(), metadata.gid(), metadata.permissions().mode() & 0o7777), (12, 34, 0o640));
    }

    #[test]
    fn a_shorter_file_replaces_a_longer_one() {
        let root = tempfile::tempdir().unwrap();
        copy(root.path(), &request(root.path(), "file", b"long content")).unwrap();
        copy(root.path(), &request(root.path(), "file", b"short")).unwrap();
        assert_eq!(fs::read(root.path().join("file")).unwrap(), b"short");
    }

    #[test]
    fn directories_and_links_arrive() {
        let root = tempfile::tempdir().unwrap();
        let mut directory = request(root.path(), "dir", b"");
        directory.file_mode = libc::S_IFDIR | 0o711;
        copy(root.path(), &directory).unwrap();
        assert_eq!(fs::metadata(root.path().join("dir")).unwrap().permissions().mode() & 0o7777, 0o711);
        let mut link = request(root.path(), "link", b"/etc/passwd");
        link.file_mode = libc::S_IFLNK | 0o777;
        copy(root.path(), &link).unwrap();
        copy(root.path(), &link).unwrap();
        assert_eq!(fs::read_link(root.path().join("link")).unwrap(), Path::new("/etc/passwd"));
    }

    #[test]
    fn paths_that_lead_outside_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let inside = root.path().join("inside");
        fs::create_dir(&inside).unwrap();
        for path in ["../out", "a/../../out", "..", "", "."] {
            assert!(copy(&inside, &request(&inside, path, b"x")).is_err(), "{path:?}");
        }
        let mut elsewhere = request(&inside, "x", b"x");
        elsewhere.path = root.path().join("out").display().to_string();
        assert!(matches!(copy(&inside, &elsewhere), Err(Error::Outside { .. })));
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }

    #[test]
    fn links_are_never_followed() {
        let root = tempfile::tempdir().unwrap();
        let (inside, outside) = (root.path().join("inside"), root.path().join("outside"));
        fs::create_dir(&inside).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("victim"), "untouched").unwrap();
        symlink(&outside, inside.join("dir")).unwrap();
        symlink(outside.join("victim"), inside.join("file")).unwrap();
        symlink("dir", inside.join("chain")).unwrap();
        symlink(outside.join("new"), inside.join("dangling")).unwrap();
        for path in ["dir/victim", "dir/new", "file", "chain/victim", "dangling", "dir/made/deep"] {
            assert!(copy(&inside, &request(&inside, path, b"x")).is_err(), "{path}");
        }
        let mut directory = request(&inside, "dir", b"");
        directory.file_mode = libc::S_IFDIR | 0o777;
        assert!(copy(&inside, &directory).is_err());
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
        assert_eq!(fs::read(outside.join("victim")).unwrap(), b"untouched");
    }

    #[test]
    fn a_fifo_in_the_way_does_not_hang_the_agent() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("fifo");
        rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        assert!(copy(root.path(), &request(root.path(), "fifo", b"x")).is_err());
    }
}
