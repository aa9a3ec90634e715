//! What everybody may know of a sandbox: `/run/kata/<sandbox>/sandbox.json`, replaced as a whole at each change.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::journal::RUN_DIR;

/// A sandbox, as `kata list` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Its name.
    pub id: String,
    /// When it was made, in seconds since 1970 (UTC).
    pub created: u64,
    /// The process of its VMM; 0 before there is one.
    pub vmm_pid: u32,
    /// The process that drives it.
    pub shim_pid: u32,
    /// Processors it has now.
    pub vcpus: u32,
    /// Memory it has now, in MiB.
    pub memory_mib: u32,
    /// Its containers, in the order of their making.
    pub containers: Vec<ContainerSummary>,
}

/// A container, as `kata list` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerSummary {
    /// Its name.
    pub id: String,
    /// Where its configuration is.
    pub bundle: PathBuf,
    /// Where it is in its life.
    pub state: ContainerState,
    /// When it was made, in seconds since 1970 (UTC).
    pub created: u64,
}

/// Where a container is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ContainerState {
    /// Made, its command not started.
    Created,
    /// Its command runs.
    Running,
    /// All of its processes are held.
    Paused,
    /// Its command has ended.
    Stopped,
}

impl std::fmt::Display for ContainerState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ContainerState::Created => "created",
            ContainerState::Running => "running",
            ContainerState::Paused => "paused",
            ContainerState::Stopped => "stopped",
        })
    }
}

impl Summary {
    /// Writes it for others to see.
    pub(crate) fn write(&self) -> io::Result<()> {
        let dir = Path::new(RUN_DIR).join(&self.id);
        let new = dir.join("sandbox.json.new");
        fs::write(&new, serde_json::to_vec(self)?)?;
        fs::rename(new, dir.join("sandbox.json"))
    }
}

/// The sandboxes of this host, by name. What cannot be read is on its way to being made or removed.
#[must_use]
pub fn list() -> Vec<Summary> {
    let entries = fs::read_dir(RUN_DIR).map(|entries| entries.flatten().collect()).unwrap_or_else(|_| Vec::new());
    let mut found: Vec<Summary> = entries
        .into_iter()
        .filter_map(|entry| fs::read(entry.path().join("sandbox.json")).ok())
        .filter_map(|text| serde_json::from_slice(&text).ok())
        .collect();
    found.sort_by(|a, b| a.id.cmp(&b.id));
    found
}

/// Seconds since 1970 (UTC).
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
