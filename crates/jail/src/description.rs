//! What a jail is: plain data, handed to the fresh process as JSON.

use std::ffi::OsString;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A helper process and what it may touch. Nothing is inherited that isn't named here.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Jail {
    /// What runs inside.
    pub program: Program,
    /// The whole environment.
    pub env: Vec<(OsString, OsString)>,
    /// User; 0 is for helpers that keep some capabilities.
    pub uid: u32,
    /// Group; there are no supplementary ones.
    pub gid: u32,
    /// Which namespaces are new.
    pub namespaces: Namespaces,
    /// What the process sees as `/`.
    pub root: Root,
    /// Capabilities it keeps. A program started by exec as another user than root has none whatever is said here.
    pub capabilities: Vec<Capability>,
    /// Resource limits; a hard limit is never raised, so the lower of this and the present one counts.
    pub limits: Vec<Limit>,
    /// Directories of cgroups to join, first of all.
    pub cgroups: Vec<PathBuf>,
    /// The system calls left; `None` leaves all (for programs that bring a filter of their own).
    pub seccomp: Option<Seccomp>,
}

/// What runs in a jail.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Program {
    /// Another program, started once the jail is shut. The path is as seen inside the jail.
    Exec {
        /// The program.
        path: PathBuf,
        /// Its arguments, without the program's name.
        args: Vec<OsString>,
    },
    /// A part of our own executable that calls [`crate::attach`] or [`crate::enter()`] and goes on.
    Helper {
        /// The first argument, by which `main` knows the part: `__share`.
        verb: String,
        /// What follows it.
        args: Vec<OsString>,
    },
}

/// Which namespaces are new; the others stay the caller's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespaces {
    /// Mounts. Needed by any [`Root`] but the host's.
    pub mount: bool,
    /// Processes: the helper is process 1 of it.
    pub pid: bool,
    /// Network: empty, its loopback is down.
    pub net: bool,
    /// System V IPC and POSIX message queues.
    pub ipc: bool,
    /// Host name.
    pub uts: bool,
}

impl Namespaces {
    /// Everything new.
    pub const ALL: Namespaces = Namespaces { mount: true, pid: true, net: true, ipc: true, uts: true };
    /// Nothing new.
    pub const NONE: Namespaces = Namespaces { mount: false, pid: false, net: false, ipc: false, uts: false };
}

/// What the process sees as `/`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Root {
    /// The caller's.
    Host,
    /// One directory and what is mounted below it, then or later: its propagation is received, never sent.
    Directory(PathBuf),
    /// A small tmpfs with these in it, read-only once it is filled. Sources are the caller's paths.
    Built(Vec<Entry>),
}

/// Something in a built root. Targets are relative to it; missing directories on the way are made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Entry {
    /// A file or directory of the host with everything mounted below it; no devices, no set-uid.
    Bind {
        /// On the host.
        source: PathBuf,
        /// In the jail.
        target: PathBuf,
        /// Writes reach the host.
        writable: bool,
    },
    /// A device node like the host's, owned by the jail's user.
    Device {
        /// The host's node.
        source: PathBuf,
        /// In the jail.
        target: PathBuf,
    },
    /// A symbolic link.
    Symlink {
        /// In the jail.
        target: PathBuf,
        /// What it says.
        to: PathBuf,
    },
    /// An empty writable tmpfs owned by the jail's user.
    Tmpfs {
        /// In the jail.
        target: PathBuf,
        /// Its limit, in KiB.
        size_kib: u32,
    },
}

/// A capability that some helper of ours may need; see capabilities(7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum Capability {
    Chown,
    DacOverride,
    DacReadSearch,
    Fowner,
    Fsetid,
    Setgid,
    Setuid,
    Mknod,
    Setfcap,
}

/// One resource limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// Of what.
    pub resource: Resource,
    /// Both soft and hard, in the resource's own unit; see getrlimit(2).
    pub value: u64,
}

/// What a [`Limit`] limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Resource {
    /// Size of a core dump, in bytes: 0 keeps the guest's memory out of files.
    Core,
    /// Number of open descriptors.
    OpenFiles,
    /// Size of a file it may write, in bytes.
    FileSize,
}

/// An allow-list of system calls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seccomp {
    /// Numbers (`libc::SYS_*`) of the calls allowed with any arguments.
    pub allow: Vec<i64>,
    /// What happens at any other.
    pub otherwise: Refusal,
}

/// What happens at a system call that isn't allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// The process dies of SIGSYS.
    Kill,
    /// The call fails with this errno.
    Errno(u32),
}

impl Jail {
    /// A jail with everything new and nothing kept: all namespaces, an empty root, no capabilities, no core dumps.
    #[must_use]
    pub fn new(program: Program, uid: u32, gid: u32) -> Jail {
        Jail {
            program,
            env: Vec::new(),
            uid,
            gid,
            namespaces: Namespaces::ALL,
            root: Root::Built(Vec::new()),
            capabilities: Vec::new(),
            limits: vec![Limit { resource: Resource::Core, value: 0 }],
            cgroups: Vec::new(),
            seccomp: None,
        }
    }
}
