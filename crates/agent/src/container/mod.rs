//! Creates and runs containers: an OCI process turned into a plan of system calls.
//!
//! ```text
//!   create ──▶ Created ──start──▶ Running ──▶ Stopped
//!     │           └───────────(killed)───────────▲
//!     └─ error: nothing is left
//! ```
//!
//! `compose` writes the plan, `spawn` makes the child and follows it, `child` walks the plan. All of it blocks:
//! call it where that is allowed, and while nobody else collects children of the agent.

mod attach;
mod call;
mod channel;
mod child;
mod compose;
mod devices;
mod error;
mod hooks;
mod mounts;
mod namespaces;
mod path;
mod plan;
mod spawn;
mod stdio;
mod sysctl;
#[cfg(test)]
mod tests;
mod user;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Instant;

use protocol::oci;
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Resource, Rlimit};
use rustix::termios::Winsize;

use channel::Gate;
use compose::Surroundings;
use hooks::Place;
use namespaces::Namespaces;
use spawn::{Join, Launch, Line};

pub use crate::seccomp::Program as Filter;
pub use error::Error;
pub use namespaces::SharedNamespaces;
pub use stdio::ProcessIo;

/// How a process gets into its cgroups.
#[derive(Debug, Clone, Copy, Default)]
pub struct CgroupEntry<'a> {
    /// The version 2 directory: the process is made in it.
    pub v2: Option<BorrowedFd<'a>>,
    /// The version 1 `cgroup.procs` files: the process is written there before it does anything.
    pub procs_files: &'a [PathBuf],
}

/// What a container is made of.
#[derive(Debug)]
pub struct CreateArgs<'a> {
    /// Its name, unique in the sandbox.
    pub id: &'a str,
    /// Its configuration.
    pub spec: &'a oci::Spec,
    /// What relative paths of the configuration are relative to.
    pub bundle_dir: &'a Path,
    /// The cgroups of the container; none to stay in the agent's.
    pub cgroup: CgroupEntry<'a>,
    /// Namespaces of the pod.
    pub shared: SharedNamespaces<'a>,
    /// The filter for it and what is executed in it.
    pub seccomp: Option<Filter>,
    /// Bytes that each of its pipes holds; the kernel's default when absent.
    pub pipe_capacity: Option<usize>,
}

/// What a further process of a container is made of, beyond the process.
#[derive(Debug, Clone, Copy, Default)]
pub struct ExecArgs<'a> {
    /// The cgroups of the container.
    pub cgroup: CgroupEntry<'a>,
    /// Bytes that each of its pipes holds; the kernel's default when absent.
    pub pipe_capacity: Option<usize>,
}

/// A container's state, in OCI's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Waits for its start.
    Created,
    /// Runs.
    Running,
    /// Its first process has ended.
    Stopped,
}

impl State {
    /// OCI's word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Stopped => "stopped",
        }
    }
}

/// A process and the agent's ends of its streams.
#[derive(Debug)]
pub struct Process {
    /// Its number in the agent's PID namespace.
    pub pid: i32,
    /// The process, whatever becomes of its number.
    pub pidfd: OwnedFd,
    /// Its streams.
    pub io: ProcessIo,
}

impl Process {
    /// Tells the terminal its size, in character cells.
    ///
    /// # Errors
    ///
    /// `ENOTTY` for a process without a terminal.
    pub fn resize(&self, rows: u16, columns: u16) -> std::io::Result<()> {
        let terminal = self.io.terminal.as_ref().ok_or(rustix::io::Errno::NOTTY)?;
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(rustix::termios::tcsetwinsize(terminal, size)?)
    }
}

/// A container: its first process, and what further ones need.
#[derive(Debug)]
pub struct Container {
    id: String,
    bundle: PathBuf,
    annotations: HashMap<String, String>,
    hooks: oci::Hooks,
    root: OwnedFd,
    root_path: PathBuf,
    pid: i32,
    pidfd: OwnedFd,
    /// `CLONE_NEW*` that a further process joins, the PID namespace aside.
    flags: u32,
    own_pids: bool,
    ids: IdMaps,
    seccomp: Option<Filter>,
    /// Until the start.
    line: Option<Line>,
}

/// The maps of a user namespace; empty without one.
#[derive(Debug, Clone, Default)]
struct IdMaps {
    users: Vec<oci::LinuxIDMapping>,
    groups: Vec<oci::LinuxIDMapping>,
}

impl IdMaps {
    fn in_use(&self) -> bool {
        !self.users.is_empty()
    }

    /// The numbers in the guest of the user of a process.
    fn in_guest(&self, process: &oci::Process) -> Result<(u32, u32), Error> {
        let user = process.User.get_or_default();
        let unmapped =
            |what: &str, id: u32| Error::Invalid(format!("The {what} {id} is not mapped in the user namespace"));
        let uid = user::in_guest(&self.users, user.UID).ok_or_else(|| unmapped("user", user.UID))?;
        let gid = user::in_guest(&self.groups, user.GID).ok_or_else(|| unmapped("group", user.GID))?;
        Ok((user::uid(uid)?.as_raw(), user::gid(gid)?.as_raw()))
    }
}

impl Container {
    /// Makes a container whose process waits for [`Container::start`].
    ///
    /// # Errors
    ///
    /// A configuration that is not valid or not supported, a step that fails, a hook that fails. Nothing is left then.
    pub fn create(args: CreateArgs<'_>) -> Result<(Self, Process), Error> {
        let spec = args.spec;
        let missing = |what: &str| Error::Invalid(format!("It has no {what}"));
        let process = spec.Process.as_ref().ok_or_else(|| missing("process"))?;
        let linux = spec.Linux.as_ref().ok_or_else(|| missing("linux section"))?;
        if spec.Root.Path.is_empty() {
            return Err(missing("root path"));
        }
        let root_path = args.bundle_dir.join(&spec.Root.Path);
        let namespaces = Namespaces::prepare(linux, &args.shared)?;
        let ids = id_maps(linux, &namespaces)?;
        let limits = user::limits(&process.Rlimits)?;
        let root = open_root(&root_path)?;

        let (uid, gid) = ids.in_guest(process)?;
        let (ends, io) = streams(process, uid, gid, args.pipe_capacity)?;
        let plan = compose::container(
            spec,
            process,
            args.bundle_dir,
            &root_path,
            &namespaces,
            &args.cgroup,
            &Surroundings {
                id: args.id,
                filter: args.seccomp.as_ref(),
                streams: ends.numbers(),
                home: user::home(root.as_fd(), process.User.UID),
                maps_users: ids.in_use(),
            },
        )?;
        let joins: Vec<_> = namespaces
            .joined
            .iter()
            .map(|joined| Join { number: joined.number, flags: joined.flag, name: joined.name })
            .collect();
        let mut launch = spawn::launch(&plan, namespaces.created, args.cgroup.v2, &joins)?;
        drop(ends);

        let mut container = Self {
            id: args.id.to_owned(),
            bundle: args.bundle_dir.to_owned(),
            annotations: spec.Annotations.clone(),
            hooks: spec.Hooks.as_ref().cloned().unwrap_or_default(),
            root,
            root_path,
            pid: launch.pid,
            pidfd: duplicate(launch.pidfd()?)?,
            flags: namespaces.to_enter(),
            own_pids: namespaces.has("pid"),
            ids,
            seccomp: args.seccomp,
            line: None,
        };
        welcome(&mut launch, &args.cgroup, process, Some(&container.ids))?;
        launch.line().wait_for(Gate::Prepared)?;
        container.run_create_hooks()?;
        launch.line().go()?;
        launch.line().wait_for(Gate::Ready)?;
        set_limits(launch.pid, &limits)?;
        let (process, line) = hand_over(launch, io)?;
        container.line = Some(line);
        Ok((container, process))
    }

    /// Runs the container's program.
    ///
    /// # Errors
    ///
    /// A container that is not just created, a `startContainer` hook that fails, a program that cannot be executed.
    pub fn start(&mut self) -> Result<(), Error> {
        let state = self.state();
        let line = match (state, self.line.take()) {
            (State::Created, Some(line)) => line,
            _ => return Err(Error::State { id: self.id.clone(), state: state.name(), action: "started" }),
        };
        let place = Place::Container { pidfd: self.pidfd.as_fd(), flags: self.flags, pid: self.own_pids };
        hooks::run("startContainer", &self.hooks.StartContainer, &self.told("created"), place)?;
        line.execute()?;
        hooks::run_all("poststart", &self.hooks.Poststart, &self.told("running"));
        Ok(())
    }

    /// Runs a further process in the container; it runs when this returns.
    ///
    /// # Errors
    ///
    /// A container that does not run, a process that is not valid, a step that fails.
    pub fn exec(&self, process: &oci::Process, args: ExecArgs<'_>) -> Result<Process, Error> {
        let state = self.state();
        if state != State::Running {
            return Err(Error::State { id: self.id.clone(), state: state.name(), action: "entered" });
        }
        let limits = user::limits(&process.Rlimits)?;
        let (uid, gid) = self.ids.in_guest(process)?;
        let (ends, io) = streams(process, uid, gid, args.pipe_capacity)?;
        let plan = compose::further(
            process,
            self.pidfd.as_fd(),
            self.flags,
            &Surroundings {
                id: &self.id,
                filter: self.seccomp.as_ref(),
                streams: ends.numbers(),
                home: user::home(self.root.as_fd(), process.User.UID),
                maps_users: self.ids.in_use(),
            },
        )?;
        let pids =
            Join { number: self.pidfd.as_raw_fd(), flags: libc::CLONE_NEWPID.cast_unsigned(), name: "container's pid" };
        let joins = if self.own_pids { std::slice::from_ref(&pids) } else { &[] };
        let mut launch = spawn::launch(&plan, 0, args.cgroup.v2, joins)?;
        drop(ends);
        welcome(&mut launch, &args.cgroup, process, None)?;
        launch.line().wait_for(Gate::Ready)?;
        set_limits(launch.pid, &limits)?;
        let pidfd = duplicate(launch.pidfd()?)?;
        let (process, line) = hand_over(launch, io)?;
        // From here on only execve(2) itself can fail.
        line.execute().inspect_err(|_| spawn::kill_and_collect(pidfd.as_fd()))?;
        Ok(process)
    }

    /// Runs the `poststop` hooks: for a container whose processes are gone. What fails is logged.
    pub fn run_poststop_hooks(&self) {
        hooks::run_all("poststop", &self.hooks.Poststop, &self.told("stopped"));
    }

    /// Its state now.
    pub fn state(&self) -> State {
        if channel::wait_readable(self.pidfd.as_fd(), Instant::now()).is_ok() {
            State::Stopped
        } else if self.line.is_some() {
            State::Created
        } else {
            State::Running
        }
    }

    /// The number of its first process, in the agent's PID namespace.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Its root directory, as the agent sees it: without the container's own mounts.
    pub fn root(&self) -> &Path {
        &self.root_path
    }

    fn told(&self, status: &'static str) -> hooks::State<'_> {
        hooks::State {
            id: &self.id,
            status,
            pid: if status == "stopped" { 0 } else { self.pid },
            bundle: &self.bundle,
            annotations: &self.annotations,
        }
    }

    fn run_create_hooks(&self) -> Result<(), Error> {
        let state = self.told("creating");
        hooks::run("prestart", &self.hooks.Prestart, &state, Place::Guest)?;
        hooks::run("createRuntime", &self.hooks.CreateRuntime, &state, Place::Guest)?;
        let place = Place::Container { pidfd: self.pidfd.as_fd(), flags: self.flags, pid: self.own_pids };
        hooks::run("createContainer", &self.hooks.CreateContainer, &state, place)
    }
}

fn duplicate(descriptor: BorrowedFd<'_>) -> Result<OwnedFd, Error> {
    descriptor.try_clone_to_owned().map_err(Error::agent_io("duplicate a descriptor"))
}

fn open_root(path: &Path) -> Result<OwnedFd, Error> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
        .map_err(Error::agent(format!("open the container's root {}", path.display())))
}

fn streams(
    process: &oci::Process,
    uid: u32,
    gid: u32,
    capacity: Option<usize>,
) -> Result<(stdio::Ends, ProcessIo), Error> {
    if process.Terminal { Ok((stdio::nothing()?, ProcessIo::default())) } else { stdio::pipes(uid, gid, capacity) }
}

fn id_maps(linux: &oci::Linux, namespaces: &Namespaces) -> Result<IdMaps, Error> {
    let maps = IdMaps { users: linux.UIDMappings.clone(), groups: linux.GIDMappings.clone() };
    match (namespaces.maps_users(), maps.users.is_empty(), maps.groups.is_empty()) {
        (true, false, false) | (false, true, true) => Ok(maps),
        (true, ..) => Err(Error::Invalid("The user namespace has no uid or no gid mappings".to_owned())),
        (false, ..) => Err(Error::Invalid("There are id mappings and no user namespace".to_owned())),
    }
}

/// What the parent does for a child that was just cloned.
fn welcome(
    launch: &mut Launch,
    cgroup: &CgroupEntry<'_>,
    process: &oci::Process,
    ids: Option<&IdMaps>,
) -> Result<(), Error> {
    launch.line().wait_for(Gate::Cloned)?;
    let pid = launch.pid;
    for file in cgroup.procs_files {
        fs::write(file, pid.to_string())
            .map_err(Error::agent_io(format!("put the process into the cgroup of {}", file.display())))?;
    }
    // Written always: the agent's own score, which protects it, must not be inherited.
    fs::write(format!("/proc/{pid}/oom_score_adj"), process.OOMScoreAdj.to_string())
        .map_err(Error::agent_io(format!("set the out-of-memory score to {}", process.OOMScoreAdj)))?;
    if let Some(ids) = ids.filter(|ids| ids.in_use()) {
        for (file, mappings) in [("uid_map", &ids.users), ("gid_map", &ids.groups)] {
            fs::write(format!("/proc/{pid}/{file}"), id_map(mappings))
                .map_err(Error::agent_io(format!("write the {file} of the user namespace")))?;
        }
    }
    launch.line().go()
}

fn id_map(mappings: &[oci::LinuxIDMapping]) -> String {
    mappings.iter().fold(String::new(), |mut text, mapping| {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{} {} {}", mapping.ContainerID, mapping.HostID, mapping.Size);
        text
    })
}

fn set_limits(pid: i32, limits: &[(Resource, Rlimit, String)]) -> Result<(), Error> {
    for (resource, limit, name) in limits {
        rustix::process::prlimit(Pid::from_raw(pid), *resource, *limit)
            .map_err(Error::agent(format!("set the resource limit {name}")))?;
    }
    Ok(())
}

fn hand_over(launch: Launch, mut io: ProcessIo) -> Result<(Process, Line), Error> {
    let (pid, pidfd, mut line) = launch.keep()?;
    io.terminal = line.take_terminal();
    Ok((Process { pid, pidfd, io }, line))
}
