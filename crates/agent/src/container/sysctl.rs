//! Kernel parameters: only those that belong to a namespace of the container.

use protocol::oci;

use super::error::{Error, c_string};
use super::namespaces::Namespaces;
use super::plan::Step;

const IPC: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// The steps that set the container's kernel parameters.
///
/// The network ones are always the pod's: without a namespace of its own the container uses the guest's network, which
/// no other pod shares.
///
/// # Errors
///
/// A parameter of the whole guest, or of a namespace that the container does not have; it is named.
pub(super) fn steps(linux: &oci::Linux, namespaces: &Namespaces) -> Result<Vec<Step>, Error> {
    let mut names: Vec<_> = linux.Sysctl.iter().collect();
    names.sort();
    names.into_iter().map(|(name, value)| step(name, value, namespaces)).collect()
}

fn step(name: &str, value: &str, namespaces: &Namespaces) -> Result<Step, Error> {
    // Both spellings are in use; with slashes a dot is part of a name (net/ipv4/conf/eth0.1/…).
    let (dotted, path) = if name.contains('/') {
        (name.replace('/', "."), name.to_owned())
    } else {
        (name.to_owned(), name.replace('.', "/"))
    };
    if path.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        return Err(Error::Invalid(format!("The kernel parameter {name:?} is no name of one")));
    }
    let namespace = if dotted.starts_with("net.") {
        None
    } else if IPC.contains(&dotted.as_str()) || dotted.starts_with("fs.mqueue.") {
        Some(("ipc", namespaces.has("ipc")))
    } else if dotted == "kernel.domainname" || dotted == "kernel.hostname" {
        Some(("uts", namespaces.has("uts")))
    } else {
        return Err(Error::Invalid(format!(
            "The kernel parameter {name} belongs to no namespace: set it for the whole guest, by its kernel command line"
        )));
    };
    if let Some((namespace, false)) = namespace {
        return Err(Error::Invalid(format!(
            "The kernel parameter {name} needs an {namespace} namespace, which the container does not have"
        )));
    }
    Ok(Step::Sysctl {
        path: c_string("A kernel parameter's name", format!("/proc/sys/{path}"))?,
        value: value.as_bytes().to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, with: &[&'static str]) -> Result<Vec<Step>, Error> {
        let linux = oci::Linux { Sysctl: [(name.to_owned(), "1".to_owned())].into(), ..Default::default() };
        steps(&linux, &Namespaces::only(with))
    }

    #[test]
    fn only_what_belongs_to_a_namespace_of_the_container_is_set() {
        assert!(check("net.ipv4.ip_forward", &[]).is_ok());
        assert!(check("net/ipv4/conf/eth0.1/rp_filter", &[]).is_ok());
        assert!(check("kernel.shmmax", &["ipc"]).is_ok());
        for (name, with) in [
            ("kernel.shmmax", &[][..]),
            ("kernel.domainname", &["ipc"]),
            ("kernel.core_pattern", &["ipc", "uts"]),
            ("vm.swappiness", &["ipc"]),
            ("net/../kernel/core_pattern", &[]),
            ("net..x", &[]),
        ] {
            assert!(check(name, with).unwrap_err().to_string().contains(name), "{name}");
        }
    }
}
