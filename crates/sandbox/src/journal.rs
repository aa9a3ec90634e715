//! The journal: what of the host a sandbox holds, written down before it is made.
//!
//! `/run/kata/<sandbox>/journal` holds one JSON object a line. Undoing goes from the last line to the first and needs
//! nothing but the file, so it does the same after a `kill -9` as at a proper end. Entries are appended with one write
//! each; a line that a crash cut short describes something that was not made yet.
//!
//! Undoing never trusts a name alone: a process is killed only if its start time matches, directories are removed only
//! where this sandbox has its own, links are removed and not followed, and what is mounted below is detached, never
//! entered: the files of a volume are not ours.

use std::ffi::{CStr, CString, OsStr};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, ResolveFlags, openat2, unlinkat};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use serde::{Deserialize, Serialize};

use crate::Error;

/// Where the state of all sandboxes is.
pub(crate) const RUN_DIR: &str = "/run/kata";

/// One thing of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub(crate) enum Entry {
    /// A process, named so that its successor under the same number is never meant.
    Process { what: String, pid: u32, start_time: u64 },
    /// A file, or a directory with all below it.
    Path { what: String, path: PathBuf },
    /// The lock of a VMM's user.
    User { path: PathBuf },
    /// A directory of a control group hierarchy.
    Cgroup { path: PathBuf },
}

/// The places where one sandbox may have something.
#[derive(Clone, Debug)]
struct Places {
    /// Its state, the journal in it.
    dir: PathBuf,
    /// The locks of the VMMs' users: files directly in here, one of them for this sandbox.
    users: PathBuf,
    /// Its share.
    share: PathBuf,
}

impl Places {
    fn of(id: &str) -> Places {
        Places::below(Path::new(RUN_DIR), Path::new(share::SHARED_DIR), id)
    }

    fn below(run: &Path, shared: &Path, id: &str) -> Places {
        Places { dir: run.join(id), users: run.join("uids"), share: shared.join(id) }
    }

    fn journal(&self) -> PathBuf {
        self.dir.join("journal")
    }
}

/// The journal of one sandbox, open for more.
#[derive(Debug)]
pub(crate) struct Journal {
    places: Places,
    file: Mutex<File>,
}

impl Journal {
    /// Opens the journal of a new sandbox, whose directory is made if the shim has not done so.
    pub(crate) fn create(id: &str) -> Result<Journal, Error> {
        Journal::create_in(Places::of(id))
    }

    fn create_in(places: Places) -> Result<Journal, Error> {
        let error = |source| Error::State { path: places.dir.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&places.dir).map_err(error)?;
        let file =
            OpenOptions::new().append(true).create_new(true).mode(0o600).open(places.journal()).map_err(error)?;
        Ok(Journal { places, file: Mutex::new(file) })
    }

    /// Writes down what is about to be made. On an error it must not be made.
    pub(crate) fn note(&self, entry: &Entry) -> io::Result<()> {
        let mut line = serde_json::to_vec(entry)?;
        line.push(b'\n');
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let length = file.metadata()?.len();
        file.write_all(&line).inspect_err(|_| {
            // Half a line, on a full disk, would spoil the next one.
            drop(file.set_len(length));
        })
    }

    /// Undoes everything, and removes the sandbox's directory.
    pub(crate) fn undo(&self) -> Result<(), Error> {
        undo_in(&self.places)
    }
}

impl vmm::Recorder for Journal {
    fn process(&self, what: &str, pid: u32, start_time: u64) -> io::Result<()> {
        self.note(&Entry::Process { what: what.to_owned(), pid, start_time })
    }

    fn path(&self, what: &str, path: &Path) -> io::Result<()> {
        self.note(&Entry::Path { what: what.to_owned(), path: path.to_owned() })
    }
}

/// Undoes what the journal of a sandbox holds, whoever wrote it and however that one ended.
pub(crate) fn undo(id: &str) -> Result<(), Error> {
    undo_in(&Places::of(id))
}

fn undo_in(places: &Places) -> Result<(), Error> {
    let (entries, mut failures) =
        read(&places.journal()).map_err(|source| Error::State { path: places.dir.clone(), source })?;
    for entry in entries.iter().rev() {
        if let Err(error) = take_back(entry, places) {
            failures.push(format!("{entry:?}: {error}"));
        }
    }
    if !failures.is_empty() {
        // The journal stays: the next attempt goes on from it.
        return Err(Error::Undo { failures: failures.join("; ") });
    }
    remove(&places.dir).map_err(|source| Error::State { path: places.dir.clone(), source })
}

/// The entries of a journal, and what of it cannot be understood; no file is no entries.
fn read(path: &Path) -> io::Result<(Vec<Entry>, Vec<String>)> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), Vec::new())),
        Err(error) => return Err(error),
    };
    let (mut entries, mut strange) = (Vec::new(), Vec::new());
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        match serde_json::from_slice(line) {
            // A line that a crash cut short is not an entry: what it was to announce was not made.
            _ if !line.ends_with(b"\n") => {}
            Ok(entry) => entries.push(entry),
            Err(_) => strange.push(format!("entry of another release: {}", String::from_utf8_lossy(line).trim())),
        }
    }
    Ok((entries, strange))
}

fn take_back(entry: &Entry, places: &Places) -> io::Result<()> {
    match entry {
        Entry::Process { pid, start_time, .. } => jail::kill_exact(*pid, *start_time),
        Entry::User { path } if is_plain(path) && path.parent() == Some(&places.users) => jail::free_user(path),
        Entry::Path { path, .. } if is_plain(path) && path.starts_with(&places.share) => remove(path),
        // The journal itself goes last, with its directory.
        Entry::Path { path, .. }
            if is_plain(path) && path.starts_with(&places.dir) && !places.journal().starts_with(path) =>
        {
            remove(path)
        }
        Entry::Cgroup { path } if path.starts_with("/sys/fs/cgroup") && is_plain(path) => crate::cgroup::remove(path),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "not in a place of this sandbox; left alone")),
    }
}

fn is_plain(path: &Path) -> bool {
    path.is_absolute() && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
}

/// Removes a file, or a directory with all below it. Nothing there is success.
fn remove(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match openat2(CWD, parent, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS) {
        Ok(parent) => remove_at(parent.as_fd(), &CString::new(name.as_bytes())?),
        Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn remove_at(parent: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        // A file that something is mounted on; a directory would have said so above.
        Err(Errno::BUSY) => {
            detach(parent, name)?;
            return remove_at(parent, name);
        }
        Err(errno) => return Err(errno.into()),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let dir = loop {
        match openat2(parent, name, flags, Mode::empty(), resolve) {
            Ok(dir) => break dir,
            // Each turn takes one mount away; there are as many as were made.
            Err(Errno::XDEV) => detach(parent, name)?,
            Err(Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    };
    let mut result = Ok(());
    for entry in Dir::read_from(&dir)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            result = result.and(remove_at(dir.as_fd(), entry.file_name()));
        }
    }
    result?;
    match unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Detaches the topmost mount on a name.
fn detach(parent: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    let path = Path::new("/proc/self/fd").join(parent.as_raw_fd().to_string()).join(OsStr::from_bytes(name.to_bytes()));
    Ok(rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustix::mount::{MountFlags, mount};
    use tempfile::TempDir;

    use super::*;

    fn entry(path: &Path) -> Entry {
        Entry::Path { what: "test".to_owned(), path: path.to_owned() }
    }

    /// A host of its own, and the journal of sandbox `s` on it.
    fn host() -> (TempDir, Places, Journal) {
        let top = TempDir::new().unwrap();
        let places = Places::below(&top.path().join("run"), &top.path().join("shared"), "s");
        let journal = Journal::create_in(places.clone()).unwrap();
        (top, places, journal)
    }

    #[test]
    fn everything_noted_is_taken_back_and_nothing_else() {
        let (top, places, journal) = host();
        let theirs = top.path().join("theirs");
        journal.note(&entry(&places.share)).unwrap();
        journal.note(&entry(&places.dir.join("agent.sock"))).unwrap();
        fs::create_dir_all(places.share.join("deep/er")).unwrap();
        fs::write(places.share.join("deep/file"), "x").unwrap();
        fs::write(&theirs, "x").unwrap();
        std::os::unix::fs::symlink(&theirs, places.share.join("link")).unwrap();
        std::os::unix::fs::symlink(top.path(), places.share.join("deep/up")).unwrap();
        fs::create_dir_all(top.path().join("run/other")).unwrap();
        journal.undo().unwrap();
        assert!(!places.share.exists() && !places.dir.exists());
        assert!(theirs.exists(), "a link is removed, not followed");
        assert!(top.path().join("run/other").exists());
    }

    #[test]
    fn a_volume_still_mounted_is_detached_and_not_emptied() {
        let (top, places, journal) = host();
        let (volume, file) = (top.path().join("volume"), top.path().join("file"));
        fs::create_dir_all(volume.join("data")).unwrap();
        fs::write(&file, "precious").unwrap();
        journal.note(&entry(&places.share)).unwrap();
        fs::create_dir_all(places.share.join("c/mounts/1")).unwrap();
        fs::write(places.share.join("c/mounts/2"), "").unwrap();
        let bind = |source: &Path, target: &str| {
            mount(source, places.share.join(target), "", MountFlags::BIND, None).unwrap();
        };
        bind(&volume, "c/mounts/1");
        bind(&volume, "c/mounts/1");
        bind(&file, "c/mounts/2");
        journal.undo().unwrap();
        assert!(volume.join("data").exists(), "the volume was entered");
        assert_eq!(fs::read_to_string(file).unwrap(), "precious");
        assert!(!places.share.exists());
    }

    #[test]
    fn a_process_is_killed_only_when_it_is_the_one() {
        let (_top, places, journal) = host();
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let start_time = jail::start_time_of(child.id()).unwrap();
        let pid = child.id();
        let process = |start_time| Entry::Process { what: "test".to_owned(), pid, start_time };
        take_back(&process(start_time + 1), &places).unwrap();
        assert!(child.try_wait().unwrap().is_none());
        journal.note(&process(start_time)).unwrap();
        journal.undo().unwrap();
        assert!(!child.wait().unwrap().success());
    }

    #[test]
    fn paths_of_others_are_left_alone() {
        let places = Places::of("s");
        for path in [
            "/etc/passwd",
            "/run/kata",
            "/run/kata/other",
            "/run/kata/s2",
            "/run/kata/s/../other",
            "/run/kata/s/journal",
            "/run/kata-containers/shared/sandboxes",
            "/run/kata-containers/shared/sandboxes/other",
            "run/kata/s/x",
        ] {
            assert!(take_back(&entry(Path::new(path)), &places).is_err(), "{path}");
        }
        for path in ["/run/kata/uids", "/run/kata/uids/../s/journal", "/run/kata/other/1"] {
            assert!(take_back(&Entry::User { path: path.into() }, &places).is_err(), "{path}");
        }
        for path in ["/sys/fs/cgroup/../x", "/etc"] {
            assert!(take_back(&Entry::Cgroup { path: path.into() }, &places).is_err(), "{path}");
        }
    }

    #[test]
    fn undoing_twice_is_undoing_once() {
        let (_top, places, journal) = host();
        journal.undo().unwrap();
        undo_in(&places).unwrap();
    }

    #[test]
    fn one_failure_stops_nothing_and_keeps_the_journal() {
        let (_top, places, journal) = host();
        let ours = places.dir.join("ours");
        fs::write(&ours, "").unwrap();
        journal.note(&entry(&ours)).unwrap();
        journal.note(&entry(Path::new("/etc/hostname"))).unwrap();
        let error = journal.undo().unwrap_err();
        assert!(error.to_string().contains("/etc/hostname"), "{error}");
        assert!(!ours.exists() && places.journal().exists());
    }

    #[test]
    fn an_entry_that_is_not_understood_is_reported_and_not_forgotten() {
        let (_top, places, journal) = host();
        fs::write(places.journal(), "{\"kind\":\"tap\",\"name\":\"t0\"}\n").unwrap();
        assert!(journal.undo().unwrap_err().to_string().contains("tap"));
        assert!(places.journal().exists());
    }

    proptest! {
        /// Whatever is left of a journal after a crash at any byte undoes what was noted in it, and nothing else.
        #[test]
        fn any_prefix_of_a_journal_undoes_that_much(count in 0usize..6, cut in 0usize..600) {
            let (_top, places, journal) = host();
            let paths: Vec<PathBuf> = (0..count).map(|n| places.share.join(n.to_string())).collect();
            let mut ends = Vec::new();
            for path in &paths {
                fs::create_dir_all(path.join("below")).unwrap();
                journal.note(&entry(path)).unwrap();
                ends.push(usize::try_from(fs::metadata(places.journal()).unwrap().len()).unwrap());
            }
            let bytes = fs::read(places.journal()).unwrap();
            fs::write(places.journal(), &bytes[..cut.min(bytes.len())]).unwrap();
            journal.undo().unwrap();
            for (path, end) in paths.iter().zip(ends) {
                prop_assert_eq!(path.exists(), end > cut);
            }
        }
    }
}
