//! The plan: what a child does between clone3(2) and execve(2), prepared down to the last string by the parent, because
//! the child of a process with threads may make nothing but system calls.

use std::ffi::CString;
use std::fmt;
use std::os::fd::RawFd;

use rustix::fs::{Gid, Uid};

use super::channel::Gate;
use super::mounts::Mount;

/// A device node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Node {
    /// In the container, absolute and normal.
    pub(super) path: CString,
    /// The file type and permission bits.
    pub(super) kind: rustix::fs::FileType,
    /// Permission bits.
    pub(super) mode: u32,
    /// Device number.
    pub(super) device: u64,
    /// Owner in the container.
    pub(super) uid: Uid,
    /// Group in the container.
    pub(super) gid: Gid,
    /// Bind the guest's node of the same name instead: in a user namespace mknod(2) is not allowed.
    pub(super) bind: bool,
}

/// Capability sets as bits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Capabilities {
    /// Limits what execve(2) may give.
    pub(super) bounding: u64,
    /// In force.
    pub(super) effective: u64,
    /// Kept across execve(2), if the file says so too.
    pub(super) inheritable: u64,
    /// May be put in force.
    pub(super) permitted: u64,
    /// Kept across execve(2).
    pub(super) ambient: u64,
}

/// One thing the child does.
#[derive(Debug)]
pub(super) enum Step {
    /// Default signal actions, no core dumps or ptrace, no descriptor that is not in this sorted list.
    Isolate { keep: Vec<RawFd> },
    /// Wait for the parent.
    Wait(Gate),
    /// Become the user namespace's root.
    BecomeRoot,
    /// A session, a process group and a keyring of its own.
    Session { keyring: CString },
    /// Join namespaces through a namespace's descriptor or a process' pidfd.
    Join { namespace: RawFd, flags: u32, what: &'static str },
    /// A new cgroup namespace with the present cgroup as its root.
    NewCgroupNamespace,
    /// File modes are what is asked for.
    NoUmask,
    /// Detach `/` from the guest's mount namespace: what is mounted here does not show there.
    DetachMounts { private: bool },
    /// Make the root directory a mount of its own.
    BindRoot(CString),
    /// Take the present root directory as the container's.
    PresentRoot,
    /// Mount something.
    Mount(Mount),
    /// Make a device.
    Node(Node),
    /// Make a symbolic link where there is nothing.
    Link { path: CString, target: CString },
    /// `/dev/ptmx` leads to the container's own terminals.
    Ptmx,
    /// Open a terminal and hand its master side over.
    Terminal { uid: Uid, size: Option<(u16, u16)>, console: bool },
    /// Set a kernel parameter, through the guest's /proc.
    Sysctl { path: CString, value: Vec<u8> },
    /// Name the machine.
    Hostname(Vec<u8>),
    /// Name the NIS domain.
    Domainname(Vec<u8>),
    /// Make a directory with all above it.
    Directory(CString),
    /// Hide a file or a directory.
    Mask(CString),
    /// Make a tree read-only.
    ReadOnly(CString),
    /// Make the root mount read-only.
    ReadOnlyRoot,
    /// Make the container's root `/`, and forget the guest's.
    Pivot,
    /// Set the propagation of `/`.
    RootPropagation { flag: u64, recursive: bool },
    /// Put the standard streams in place.
    Streams([RawFd; 3]),
    /// Close all but standard streams and the line to the parent.
    CloseOthers,
    /// Enter the working directory; the second attempt is the user's.
    Cwd { path: CString, last: bool },
    /// Give up capabilities for good: the bounding set.
    Bound { keep: u64, last: u32 },
    /// Change the user, keeping capabilities until the next step.
    User { uid: Uid, gid: Gid, groups: Vec<Gid> },
    /// Set the capabilities.
    Capabilities(Capabilities),
    /// Give the capability back that the seccomp filter took; nothing else, as the filter is there already.
    GiveBack(Capabilities),
    /// execve(2) gives nothing from now on.
    NoNewPrivileges,
    /// The file mode creation mask.
    Umask(u32),
    /// Look for the program; the plan's candidates, in order.
    Find,
    /// Install the filter.
    Seccomp { filter: Vec<libc::sock_filter>, flags: u64 },
    /// Run the program.
    Execute,
}

/// All of it.
pub(super) struct Plan {
    /// In order.
    pub(super) steps: Vec<Step>,
    /// Paths to look for the program at.
    pub(super) candidates: Vec<CString>,
    /// Its arguments.
    pub(super) arguments: Vec<CString>,
    /// Its environment.
    pub(super) environment: Vec<CString>,
}

impl fmt::Debug for Plan {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the environment: it may hold secrets.
        formatter.debug_struct("Plan").field("steps", &self.steps.len()).finish_non_exhaustive()
    }
}

impl Plan {
    /// What a step does, to follow "Cannot".
    pub(super) fn describe(&self, step: usize) -> String {
        match self.steps.get(step) {
            Some(Step::Find | Step::Execute) => {
                let name = self.arguments.first().map(|name| name.to_string_lossy()).unwrap_or_default();
                format!("run the command {name:?}")
            }
            Some(step) => step.to_string(),
            None => "prepare the process".to_owned(),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Isolate { .. } => write!(formatter, "isolate the new process"),
            Self::Wait(_) => write!(formatter, "wait for the agent"),
            Self::BecomeRoot => write!(formatter, "become root of the user namespace (are uid 0 and gid 0 mapped?)"),
            Self::Session { .. } => write!(formatter, "start a session"),
            Self::Join { what, .. } => write!(formatter, "join {what}"),
            Self::NewCgroupNamespace => write!(formatter, "make a cgroup namespace"),
            Self::NoUmask => write!(formatter, "clear the umask"),
            Self::DetachMounts { .. } => write!(formatter, "detach the mount namespace"),
            Self::BindRoot(path) => write!(formatter, "use the root directory {path:?}"),
            Self::PresentRoot => write!(formatter, "open the container's root directory"),
            Self::Mount(mount) => write!(formatter, "mount {mount}"),
            Self::Node(node) => write!(formatter, "make the device {:?}", node.path),
            Self::Link { path, .. } => write!(formatter, "make the link {path:?}"),
            Self::Ptmx => write!(formatter, "make the link /dev/ptmx"),
            Self::Terminal { .. } => write!(formatter, "open a terminal in the container's /dev/pts"),
            Self::Sysctl { path, .. } => write!(formatter, "set the kernel parameter {path:?}"),
            Self::Hostname(_) => write!(formatter, "set the host name"),
            Self::Domainname(_) => write!(formatter, "set the NIS domain name"),
            Self::Directory(path) => write!(formatter, "make the directory {path:?}"),
            Self::Mask(path) => write!(formatter, "hide {path:?}"),
            Self::ReadOnly(path) => write!(formatter, "make {path:?} read-only"),
            Self::ReadOnlyRoot => write!(formatter, "make the root read-only"),
            Self::Pivot => write!(formatter, "change the root directory"),
            Self::RootPropagation { .. } => write!(formatter, "set the propagation of the root"),
            Self::Streams(_) => write!(formatter, "set the standard streams up"),
            Self::CloseOthers => write!(formatter, "close the agent's descriptors"),
            Self::Cwd { path, .. } => write!(formatter, "enter the working directory {path:?}"),
            Self::Bound { .. } => write!(formatter, "limit the capabilities"),
            Self::User { uid, gid, .. } => write!(formatter, "become user {} and group {}", uid.as_raw(), gid.as_raw()),
            Self::Capabilities(_) | Self::GiveBack(_) => write!(formatter, "set the capabilities"),
            Self::NoNewPrivileges => write!(formatter, "set no_new_privs"),
            Self::Umask(_) => write!(formatter, "set the umask"),
            Self::Find | Self::Execute => write!(formatter, "run the command"),
            Self::Seccomp { .. } => write!(formatter, "install the seccomp filter"),
        }
    }
}
