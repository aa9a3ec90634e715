//! Containers by name, or by as much of it as is unique.

use std::path::PathBuf;

use sandbox::{ContainerState, Summary};
use serde::Serialize;

use crate::Error;
use crate::server::Server;

/// A sandbox of this host.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Listed {
    /// What it says of itself.
    #[serde(flatten)]
    pub summary: Summary,
    /// Whether its shim still serves it. One whose shim is gone is removed by `kata delete --force`.
    pub alive: bool,
}

/// The sandboxes of this host, whoever started them.
#[must_use]
pub fn list() -> Vec<Listed> {
    let alive = |summary: &Summary| Server::find(&summary.id).is_some();
    sandbox::list().into_iter().map(|summary| Listed { alive: alive(&summary), summary }).collect()
}

/// A container that was found.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) sandbox: String,
    pub(crate) container: String,
    pub(crate) bundle: PathBuf,
    pub(crate) state: ContainerState,
}

/// Finds the one container whose name is, or else begins with, `name`.
pub(crate) fn find(name: &str) -> Result<Found, Error> {
    pick(name, sandbox::list())
}

fn pick(name: &str, sandboxes: Vec<Summary>) -> Result<Found, Error> {
    let mut candidates: Vec<Found> = sandboxes
        .into_iter()
        .flat_map(|sandbox| {
            let id = sandbox.id;
            sandbox.containers.into_iter().map(move |container| Found {
                sandbox: id.clone(),
                container: container.id,
                bundle: container.bundle,
                state: container.state,
            })
        })
        .filter(|found| found.container.starts_with(name))
        .collect();
    if let Some(exact) = candidates.iter().position(|found| found.container == name) {
        return Ok(candidates.swap_remove(exact));
    }
    match candidates.len() {
        1 => Ok(candidates.remove(0)),
        0 => Err(Error::Unknown(name.to_owned())),
        _ => Err(Error::Ambiguous {
            prefix: name.to_owned(),
            candidates: candidates.into_iter().map(|found| found.container).collect(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use sandbox::ContainerSummary;

    use super::*;

    fn pod(id: &str, containers: &[&str]) -> Summary {
        let container = |id: &&str| ContainerSummary {
            id: (*id).to_owned(),
            bundle: "/b".into(),
            state: ContainerState::Running,
            created: 0,
        };
        Summary {
            id: id.to_owned(),
            created: 0,
            vmm_pid: 1,
            shim_pid: 1,
            vcpus: 1,
            memory_mib: 256,
            containers: containers.iter().map(container).collect(),
        }
    }

    #[test]
    fn a_name_or_a_beginning_that_only_one_has() {
        let pods = || vec![pod("p1", &["p1", "web"]), pod("we", &["we"])];
        assert_eq!(pick("we", pods()).unwrap().sandbox, "we");
        assert_eq!(pick("web", pods()).unwrap().sandbox, "p1");
        assert_eq!(pick("p", pods()).unwrap().container, "p1");
        assert!(matches!(pick("w", pods()), Err(Error::Ambiguous { candidates, .. }) if candidates == ["web", "we"]));
        assert!(matches!(pick("x", pods()), Err(Error::Unknown(_))));
    }
}
