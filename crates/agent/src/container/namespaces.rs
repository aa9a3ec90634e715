//! Namespaces: which are made, which are joined, and when.
//!
//! A thread of the agent joins what exists already and then clones, so that the child starts inside: joining the pod's
//! namespaces needs the agent's privileges, which a child in a user namespace of its own no longer has.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use protocol::oci;
use rustix::fs::{Mode, OFlags};

use super::error::Error;

const NEWTIME: u32 = 0x80;

/// Namespaces that the containers of a pod share.
#[derive(Debug, Clone, Copy, Default)]
pub struct SharedNamespaces<'a> {
    /// System V and POSIX message queues, shared memory.
    pub ipc: Option<BorrowedFd<'a>>,
    /// Host and NIS domain name.
    pub uts: Option<BorrowedFd<'a>>,
    /// Process numbers.
    pub pid: Option<BorrowedFd<'a>>,
}

/// A namespace to be in before the clone.
#[derive(Debug)]
pub(super) struct Joined {
    /// Its descriptor; owned if it was opened from a path.
    pub(super) number: RawFd,
    /// `CLONE_NEW*`.
    pub(super) flag: u32,
    /// Its name.
    pub(super) name: &'static str,
    _owned: Option<OwnedFd>,
}

/// The namespaces of a container.
#[derive(Debug, Default)]
pub(super) struct Namespaces {
    /// `CLONE_NEW*` for clone3(2).
    pub(super) created: u32,
    /// Joined by the thread that clones.
    pub(super) joined: Vec<Joined>,
    /// Joined by the child, alone in its process: the time namespace.
    pub(super) joined_alone: Vec<Joined>,
    /// Made by the child, once it is in its cgroup.
    pub(super) new_cgroup: bool,
    present: Vec<&'static str>,
}

fn flag(kind: &str) -> Option<(&'static str, u32)> {
    let (name, flag) = match kind {
        "pid" => ("pid", libc::CLONE_NEWPID),
        "network" => ("network", libc::CLONE_NEWNET),
        "mount" => ("mount", libc::CLONE_NEWNS),
        "ipc" => ("ipc", libc::CLONE_NEWIPC),
        "uts" => ("uts", libc::CLONE_NEWUTS),
        "user" => ("user", libc::CLONE_NEWUSER),
        "cgroup" => ("cgroup", libc::CLONE_NEWCGROUP),
        "time" => return Some(("time", NEWTIME)),
        _ => return None,
    };
    Some((name, flag.cast_unsigned()))
}

impl Namespaces {
    /// Sorts the configuration's namespaces; opens those that are given by a path.
    ///
    /// # Errors
    ///
    /// An unknown kind or a kind twice, a path that cannot be opened, no mount namespace.
    pub(super) fn prepare(linux: &oci::Linux, shared: &SharedNamespaces<'_>) -> Result<Self, Error> {
        let mut namespaces = Self::default();
        for (name, descriptor) in [("ipc", shared.ipc), ("uts", shared.uts), ("pid", shared.pid)] {
            if let (Some(descriptor), Some((name, flag))) = (descriptor, flag(name)) {
                namespaces.joined.push(Joined { number: descriptor.as_raw_fd(), flag, name, _owned: None });
                namespaces.present.push(name);
            }
        }
        let mut seen = Vec::new();
        for namespace in &linux.Namespaces {
            let (name, flag) = flag(&namespace.Type)
                .ok_or_else(|| Error::Invalid(format!("There is no namespace of the type {:?}", namespace.Type)))?;
            if seen.contains(&name) {
                return Err(Error::Invalid(format!("The {name} namespace is listed twice")));
            }
            seen.push(name);
            if !namespaces.present.contains(&name) {
                namespaces.add(name, flag, &namespace.Path)?;
            }
        }
        if namespaces.created & libc::CLONE_NEWNS.cast_unsigned() == 0 {
            return Err(Error::Unsupported("a container without a mount namespace of its own".to_owned()));
        }
        Ok(namespaces)
    }

    fn add(&mut self, name: &'static str, flag: u32, path: &str) -> Result<(), Error> {
        self.present.push(name);
        if path.is_empty() {
            if name == "cgroup" {
                self.new_cgroup = true;
            } else {
                self.created |= flag;
            }
            return Ok(());
        }
        if name == "mount" || name == "user" {
            return Err(Error::Unsupported(format!("joining the {name} namespace {path}: it has to be a new one")));
        }
        let descriptor = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(Error::agent(format!("open the {name} namespace {path}")))?;
        let joined = Joined { number: descriptor.as_fd().as_raw_fd(), flag, name, _owned: Some(descriptor) };
        if name == "time" {
            self.joined_alone.push(joined)
        } else {
            self.joined.push(joined)
        }
        Ok(())
    }

    /// Whether the container has a namespace of this kind that is not simply the guest's.
    pub(super) fn has(&self, name: &str) -> bool {
        self.present.contains(&name)
    }

    /// Whether root in the container is not root in the guest.
    pub(super) fn maps_users(&self) -> bool {
        self.created & libc::CLONE_NEWUSER.cast_unsigned() != 0
    }

    /// What another process has to join to be in the container, its PID namespace aside.
    pub(super) fn to_enter(&self) -> u32 {
        self.present
            .iter()
            .filter(|name| **name != "pid")
            .filter_map(|name| flag(name))
            .fold(0, |all, (_, flag)| all | flag)
    }

    #[cfg(test)]
    pub(super) fn only(names: &[&'static str]) -> Self {
        Self { present: names.to_vec(), ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linux(namespaces: &[(&str, &str)]) -> oci::Linux {
        let namespaces = namespaces
            .iter()
            .map(|(kind, path)| oci::LinuxNamespace {
                Type: (*kind).to_owned(),
                Path: (*path).to_owned(),
                ..Default::default()
            })
            .collect();
        oci::Linux { Namespaces: namespaces, ..Default::default() }
    }

    #[test]
    fn the_pods_namespaces_win_over_new_ones() {
        let own = rustix::fs::open("/proc/self/ns/ipc", OFlags::RDONLY, Mode::empty()).unwrap();
        let shared = SharedNamespaces { ipc: Some(own.as_fd()), ..Default::default() };
        let made = Namespaces::prepare(&linux(&[("mount", ""), ("ipc", ""), ("cgroup", "")]), &shared).unwrap();
        assert_eq!(made.created, libc::CLONE_NEWNS.cast_unsigned());
        assert_eq!(made.joined.len(), 1);
        assert!(made.new_cgroup && made.has("ipc") && !made.has("uts"));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (namespaces, word) in [
            (&[("ipc", "")][..], "mount namespace"),
            (&[("mount", ""), ("mount", "")], "twice"),
            (&[("mount", ""), ("bogus", "")], "bogus"),
            (&[("mount", "/proc/1/ns/mnt")], "/proc/1/ns/mnt"),
            (&[("mount", ""), ("network", "/nowhere")], "/nowhere"),
        ] {
            let error = Namespaces::prepare(&linux(namespaces), &SharedNamespaces::default()).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
    }
}
