//! The journal: what of the host a sandbox holds, written down before it is made.
//!
//! `/run/kata/<sandbox>/journal` holds one JSON object a line. Undoing goes from the last line to the first and needs
//! nothing but the file, so it does the same after a `kill -9` as at a proper end. Entries are appended with one write
//! each; a line that a crash cut short describes something that was not made yet.
//!
//! Undoing never trusts a name alone: a process is killed only if its start time matches, directories are removed only
//! below the roots that are ours, and links are removed, not followed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};

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

/// The journal of one sandbox, open for more.
#[derive(Debug)]
pub(crate) struct Journal {
    dir: PathBuf,
    file: Mutex<File>,
}

impl Journal {
    /// Opens the journal of a new sandbox, whose directory is made if the shim has not done so.
    pub(crate) fn create(id: &str) -> Result<Journal, Error> {
        Journal::create_in(&Path::new(RUN_DIR).join(id))
    }

    fn create_in(dir: &Path) -> Result<Journal, Error> {
        let error = |source| Error::State { path: dir.to_owned(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(error)?;
        let file =
            OpenOptions::new().append(true).create_new(true).mode(0o600).open(dir.join("journal")).map_err(error)?;
        Ok(Journal { dir: dir.to_owned(), file: Mutex::new(file) })
    }

    /// Writes down what is about to be made.
    pub(crate) fn note(&self, entry: &Entry) -> io::Result<()> {
        let mut line = serde_json::to_vec(entry)?;
        line.push(b'\n');
        self.file.lock().unwrap_or_else(PoisonError::into_inner).write_all(&line)
    }

    /// Undoes everything, and removes the sandbox's directory.
    pub(crate) fn undo(&self) -> Result<(), Error> {
        undo_in(&self.dir)
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
    undo_in(&Path::new(RUN_DIR).join(id))
}

fn undo_in(dir: &Path) -> Result<(), Error> {
    let entries = read(&dir.join("journal")).map_err(|source| Error::State { path: dir.to_owned(), source })?;
    let mut failures = Vec::new();
    for entry in entries.iter().rev() {
        if let Err(error) = take_back(entry) {
            failures.push(format!("{entry:?}: {error}"));
        }
    }
    if !failures.is_empty() {
        // The journal stays: the next attempt goes on from it.
        return Err(Error::Undo { failures: failures.join("; ") });
    }
    match fs::remove_dir_all(dir) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::State { path: dir.to_owned(), source }),
        _ => Ok(()),
    }
}

/// The entries of a journal; no file is no entries.
fn read(path: &Path) -> io::Result<Vec<Entry>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut entries = Vec::new();
    for line in BufReader::new(file).split(b'\n') {
        // A line that a crash cut short is not an entry: what it was to announce was not made.
        if let Ok(entry) = serde_json::from_slice(&line?) {
            entries.push(entry);
        }
    }
    Ok(entries)
}

fn take_back(entry: &Entry) -> io::Result<()> {
    match entry {
        Entry::Process { pid, start_time, .. } => jail::kill_exact(*pid, *start_time),
        Entry::User { path } if is_ours(path) => jail::free_user(path),
        Entry::Path { path, .. } if is_ours(path) => remove(path),
        Entry::Cgroup { path } if path.starts_with("/sys/fs/cgroup") && is_plain(path) => crate::cgroup::remove(path),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "not below a directory of ours; left alone")),
    }
}

/// Whether a path lies below a directory that holds nothing but our state.
fn is_ours(path: &Path) -> bool {
    let roots = [Path::new(RUN_DIR), Path::new("/run/kata-containers"), Path::new("/run/containerd/s")];
    let tests = cfg!(test) && path.starts_with(std::env::temp_dir());
    is_plain(path) && (tests || roots.iter().any(|root| path.starts_with(root) && path != *root))
}

fn is_plain(path: &Path) -> bool {
    path.is_absolute() && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
}

fn remove(path: &Path) -> io::Result<()> {
    let result = match fs::symlink_metadata(path) {
        // Directories of the standard library are walked by descriptor, without following links.
        Ok(data) if data.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;

    fn entry(path: &Path) -> Entry {
        Entry::Path { what: "test".to_owned(), path: path.to_owned() }
    }

    #[test]
    fn everything_noted_is_taken_back_and_nothing_else() {
        let top = TempDir::new().unwrap();
        let dir = top.path().join("sandbox");
        let journal = Journal::create_in(&dir).unwrap();
        let (ours, theirs) = (top.path().join("ours"), top.path().join("theirs"));
        journal.note(&entry(&ours)).unwrap();
        fs::create_dir_all(ours.join("deep/er")).unwrap();
        fs::write(&theirs, "x").unwrap();
        std::os::unix::fs::symlink(&theirs, ours.join("link")).unwrap();
        journal.undo().unwrap();
        assert!(!ours.exists() && !dir.exists());
        assert!(theirs.exists(), "a link is removed, not followed");
    }

    #[test]
    fn a_process_is_killed_only_when_it_is_the_one() {
        let top = TempDir::new().unwrap();
        let journal = Journal::create_in(&top.path().join("sandbox")).unwrap();
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let start_time = jail::start_time_of(child.id()).unwrap();
        let pid = child.id();
        let process = |start_time| Entry::Process { what: "test".to_owned(), pid, start_time };
        take_back(&process(start_time + 1)).unwrap();
        assert!(child.try_wait().unwrap().is_none());
        journal.note(&process(start_time)).unwrap();
        journal.undo().unwrap();
        assert!(!child.wait().unwrap().success());
    }

    #[test]
    fn paths_of_others_are_left_alone() {
        for path in ["/etc/passwd", "/run/kata", "/run/kata/../systemd", "relative", "/run/kata-containersx/a"] {
            assert!(take_back(&entry(Path::new(path))).is_err(), "{path}");
        }
    }

    #[test]
    fn undoing_twice_is_undoing_once() {
        let top = TempDir::new().unwrap();
        let dir = top.path().join("sandbox");
        let journal = Journal::create_in(&dir).unwrap();
        journal.undo().unwrap();
        undo_in(&dir).unwrap();
    }

    proptest! {
        /// Whatever is left of a journal after a crash at any byte can be read, and holds nothing that was not noted.
        #[test]
        fn any_prefix_of_a_journal_is_a_journal(count in 0usize..6, cut in 0usize..400) {
            let top = TempDir::new().unwrap();
            let dir = top.path().join("sandbox");
            let journal = Journal::create_in(&dir).unwrap();
            let entries: Vec<Entry> = (0..count).map(|n| entry(&top.path().join(n.to_string()))).collect();
            for entry in &entries {
                journal.note(entry).unwrap();
            }
            let path = dir.join("journal");
            let bytes = fs::read(&path).unwrap();
            fs::write(&path, &bytes[..cut.min(bytes.len())]).unwrap();
            let read = read(&path).unwrap();
            prop_assert!(entries.starts_with(&read));
        }
    }
}
