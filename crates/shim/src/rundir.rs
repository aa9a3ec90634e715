//! The shim's files in the sandbox's directory, `/run/kata/<sandbox>/`.
//!
//! | file           | holds                                                          |
//! |----------------|----------------------------------------------------------------|
//! | `shim.address` | the socket of the pod's server                                  |
//! | `shim.process` | its pid and start time, so that no other process is taken for it |
//! | `shim.log`     | its log, where the engine opened none                           |

use std::io::{ErrorKind, Result, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// Where sandboxes keep what they need while they live.
const RUN_DIR: &str = "/run/kata";

/// A sandbox's directory.
#[derive(Debug, Clone)]
pub(crate) struct RunDir(PathBuf);

impl RunDir {
    /// The directory of `sandbox`, whose id was checked by [`crate::bundle::check_id`].
    pub(crate) fn new(sandbox: &str) -> RunDir {
        RunDir(Path::new(RUN_DIR).join(sandbox))
    }

    #[cfg(test)]
    fn at(path: &Path) -> RunDir {
        RunDir(path.to_owned())
    }

    /// Makes the directory, for root alone.
    pub(crate) fn create(&self) -> Result<()> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.0)
    }

    /// The path of the server's log.
    pub(crate) fn log(&self) -> PathBuf {
        self.0.join("shim.log")
    }

    /// Notes where the server listens.
    pub(crate) fn set_address(&self, address: &str) -> Result<()> {
        write_atomically(&self.0.join("shim.address"), address.as_bytes())
    }

    /// Where the server listens, if there is one.
    pub(crate) fn address(&self) -> Result<Option<String>> {
        match std::fs::read_to_string(self.0.join("shim.address")) {
            Ok(address) => Ok(Some(address.trim().to_owned())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Notes which process the server is.
    pub(crate) fn set_process(&self, pid: u32, start_time: u64) -> Result<()> {
        write_atomically(&self.0.join("shim.process"), format!("{pid} {start_time}\n").as_bytes())
    }

    /// The server's pid and start time, if they were noted.
    pub(crate) fn process(&self) -> Option<(u32, u64)> {
        let text = std::fs::read_to_string(self.0.join("shim.process")).ok()?;
        let (pid, start_time) = text.trim().split_once(' ')?;
        Some((pid.parse().ok()?, start_time.parse().ok()?))
    }

    /// Removes the shim's files, and the directory if nothing else is in it.
    pub(crate) fn remove(&self) {
        for name in ["shim.address", "shim.process", "shim.log"] {
            // What is not there needs no removing; what cannot be removed keeps the directory, and shows.
            let _ = std::fs::remove_file(self.0.join(name));
        }
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// Writes a file that is either there whole or not at all.
pub(crate) fn write_atomically(path: &Path, content: &[u8]) -> Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let new = PathBuf::from(name);
    let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(content)?;
    std::fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_read_back_and_removed() {
        let top = tempfile::tempdir().unwrap();
        let dir = RunDir::at(&top.path().join("pod"));
        assert_eq!(dir.address().unwrap(), None);
        assert_eq!(dir.process(), None);
        dir.create().unwrap();
        dir.set_address("unix:///s/x").unwrap();
        dir.set_process(42, 1234567).unwrap();
        assert_eq!(dir.address().unwrap().as_deref(), Some("unix:///s/x"));
        assert_eq!(dir.process(), Some((42, 1234567)));
        dir.remove();
        assert!(!top.path().join("pod").exists());
    }

    #[test]
    fn what_others_put_there_stays() {
        let top = tempfile::tempdir().unwrap();
        let dir = RunDir::at(&top.path().join("pod"));
        dir.create().unwrap();
        dir.set_address("unix:///s/x").unwrap();
        std::fs::write(top.path().join("pod/journal"), "{}").unwrap();
        dir.remove();
        assert!(top.path().join("pod/journal").exists());
        assert!(!top.path().join("pod/shim.address").exists());
    }
}
