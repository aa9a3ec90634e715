//! Control groups of the guest, version 1 and 2, behind one type.
//!
//! Version 2 is one directory per group, version 1 one per controller. The agent makes a group before a container's
//! first process exists, so that the process is born in it ([`Join`]), and removes it when the last one is gone. See
//! cgroups(7) and Documentation/admin-guide/cgroup-v2.rst of the kernel.

mod devices;
mod limits;
mod mount;
mod oom;
mod stats;

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use protocol::agent::CgroupStats;
use protocol::oci::LinuxResources;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};

pub use mount::mount_hierarchies;
pub use oom::OomWatch;

/// Where control groups are mounted.
pub const ROOT: &str = "/sys/fs/cgroup";

/// How long a group may take to freeze, thaw, or become empty after its processes were killed.
const DEADLINE: Duration = Duration::from_secs(10);

/// How long to wait between two looks where version 1 offers no event to wait for.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// What can go wrong with a group.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A directory of the group could not be made, read or removed.
    #[error("Cannot {what} the control group `{}`", path.display())]
    Group {
        /// What was being done.
        what: &'static str,
        /// The directory.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The kernel refused a value.
    #[error("Cannot set `{}` to `{value}`", path.display())]
    Set {
        /// The file.
        path: PathBuf,
        /// What was to be written.
        value: String,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A value that means nothing in this version of control groups.
    #[error("`{0}` is not supported in control groups version {1}")]
    Unsupported(String, u8),
    /// The group did not do in time what it was told.
    #[error("The control group `{}` did not {what} within {} s", path.display(), DEADLINE.as_secs())]
    Late {
        /// What it was told.
        what: &'static str,
        /// The directory.
        path: PathBuf,
    },
    /// The device rules could not be loaded.
    #[error("Cannot restrict the devices of the control group `{}`", path.display())]
    Devices {
        /// The directory.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
}

/// The two interfaces of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// One hierarchy for each controller.
    V1,
    /// One hierarchy for all.
    V2,
}

impl Version {
    /// Which version is mounted at `root`. A hybrid, where version 2 lies beside the controllers, counts as 1.
    #[must_use]
    pub fn detect(root: &Path) -> Version {
        if root.join("cgroup.controllers").exists() { Version::V2 } else { Version::V1 }
    }

    /// The version's number.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Version::V1 => 1,
            Version::V2 => 2,
        }
    }
}

/// How a process gets into a group.
#[derive(Debug)]
pub struct Join {
    /// The directory, for `CLONE_INTO_CGROUP` (version 2).
    pub v2_fd: Option<OwnedFd>,
    /// The files that take the process' number before it does anything (version 1).
    pub procs_files: Vec<PathBuf>,
}

/// One container's group.
#[derive(Debug)]
pub struct Cgroup {
    version: Version,
    /// Version 2: one, its controller's name empty. Version 1: one for each controller.
    dirs: Vec<(String, PathBuf)>,
    /// Directories that were not there before, those above the group's own included; from the top.
    made: Vec<PathBuf>,
}

/// Held while directories above groups are made or removed, which groups of several containers have in common.
static TREE: Mutex<()> = Mutex::new(());

impl Cgroup {
    /// Makes the group of a container and limits it.
    ///
    /// `path` is `linux.cgroupsPath`: absolute or not, it ends up below the root; systemd's form `slice:prefix:name`
    /// becomes `/slice/prefix-name`; empty means `/kata/<id>`.
    ///
    /// # Errors
    ///
    /// The group cannot be made, or the kernel refuses a limit; nothing is left of it then.
    pub fn create(path: &str, id: &str, resources: &LinuxResources) -> Result<Cgroup, Error> {
        Cgroup::create_in(Path::new(ROOT), path, id, resources)
    }

    fn create_in(root: &Path, path: &str, id: &str, resources: &LinuxResources) -> Result<Cgroup, Error> {
        let version = Version::detect(root);
        let relative = relative(path, id);
        let dirs = match version {
            Version::V2 => vec![(String::new(), root.join(&relative))],
            Version::V1 => hierarchies(root).into_iter().map(|(name, dir)| (name, dir.join(&relative))).collect(),
        };
        let mut group = Cgroup { version, dirs, made: Vec::new() };
        let made =
            group.make(root).and_then(|()| group.apply(resources)).and_then(|()| devices::apply(&group, resources));
        if let Err(error) = made {
            group.remove_made();
            return Err(error);
        }
        Ok(group)
    }

    fn make(&mut self, root: &Path) -> Result<(), Error> {
        let _tree = TREE.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, dir) in &self.dirs {
            // Version 1 has its hierarchies one below the root.
            let top = if self.version == Version::V2 { 0 } else { 1 };
            let parts: Vec<_> = dir.strip_prefix(root).unwrap_or(dir).components().collect();
            let mut parent = root.to_owned();
            for (depth, part) in parts.iter().enumerate() {
                if self.version == Version::V2 {
                    enable_controllers(&parent)?;
                }
                parent.push(part);
                if depth >= top && make_dir(&parent)? {
                    self.made.push(parent.clone());
                }
            }
            if self.version == Version::V1 {
                limits::inherit_cpuset(dir)?;
            }
        }
        // A group with processes is somebody's: limits and signals would be for both.
        if !self.pids()?.is_empty() {
            let path = self.main().to_owned();
            let source = io::Error::new(io::ErrorKind::AlreadyExists, "there are processes in it already");
            return Err(Error::Group { what: "make", path, source });
        }
        Ok(())
    }

    /// Removes what was made and is empty, the directories above the group too if nobody else uses them.
    fn remove_made(&self) {
        let _tree = TREE.lock().unwrap_or_else(PoisonError::into_inner);
        for dir in self.made.iter().rev() {
            // It stays if there is something in it.
            let _ = fs::remove_dir(dir);
        }
    }

    /// The version of control groups it is made of.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// How a process gets into it, as things are now.
    ///
    /// A container that manages groups itself (an init system, another runtime) moves its processes into groups below,
    /// and version 2 takes none beside those then: a new process joins the group of the oldest one.
    ///
    /// # Errors
    ///
    /// The group is gone.
    pub fn join(&self) -> Result<Join, Error> {
        match self.version {
            Version::V2 => {
                let dir = self.inhabited();
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let fd = rustix::fs::open(&dir, flags, Mode::empty()).map_err(|errno| Error::Group {
                    what: "open",
                    path: dir,
                    source: errno.into(),
                })?;
                Ok(Join { v2_fd: Some(fd), procs_files: Vec::new() })
            }
            Version::V1 => {
                let procs_files = self.dirs.iter().map(|(_, dir)| dir.join("cgroup.procs")).collect();
                Ok(Join { v2_fd: None, procs_files })
            }
        }
    }

    /// Changes the limits that `resources` sets and leaves the others alone.
    ///
    /// # Errors
    ///
    /// The kernel refuses a value, or it means nothing in this version.
    pub fn apply(&self, resources: &LinuxResources) -> Result<(), Error> {
        limits::apply(self, resources)
    }

    /// The processes in it and in groups below it.
    ///
    /// # Errors
    ///
    /// The group cannot be read.
    pub fn pids(&self) -> Result<Vec<i32>, Error> {
        let mut pids = Vec::new();
        for dir in tree(self.main()) {
            let text = read(&dir, "cgroup.procs")?;
            pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
        }
        Ok(pids)
    }

    /// Holds every process of the group.
    ///
    /// # Errors
    ///
    /// The kernel refuses, or some process does not stop in time.
    pub fn freeze(&self) -> Result<(), Error> {
        match self.version {
            Version::V2 => {
                self.write("", "cgroup.freeze", "1")?;
                self.wait_for_event("frozen 1", "freeze")
            }
            Version::V1 => self.set_freezer("FROZEN", "freeze"),
        }
    }

    /// Lets the processes of the group go on.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn thaw(&self) -> Result<(), Error> {
        match self.version {
            Version::V2 => {
                self.write("", "cgroup.freeze", "0")?;
                self.wait_for_event("frozen 0", "thaw")
            }
            Version::V1 => self.set_freezer("THAWED", "thaw"),
        }
    }

    /// Kills every process of the group and of groups below it. They end some moments later: [`Cgroup::wait_empty`].
    ///
    /// # Errors
    ///
    /// The group cannot be read.
    pub fn kill_all(&self) -> Result<(), Error> {
        if self.version == Version::V2 && self.main().join("cgroup.kill").exists() {
            return self.write("", "cgroup.kill", "1");
        }
        for pid in self.pids()? {
            if let Some(pid) = Pid::from_raw(pid) {
                // One that has ended meanwhile needs no signal.
                drop(kill_process(pid, Signal::KILL).map_err(io::Error::from));
            }
        }
        // A frozen process takes no signal before it is thawed.
        if self.version == Version::V1 && self.dir("freezer").is_some() {
            self.set_freezer("THAWED", "thaw")?;
        }
        Ok(())
    }

    /// Waits until no process is left in the group.
    ///
    /// # Errors
    ///
    /// There is still one after the deadline.
    pub fn wait_empty(&self) -> Result<(), Error> {
        match self.version {
            Version::V2 => self.wait_for_event("populated 0", "become empty"),
            Version::V1 => {
                let end = Instant::now() + DEADLINE;
                while !self.pids()?.is_empty() {
                    if Instant::now() > end {
                        return Err(Error::Late { what: "become empty", path: self.main().to_owned() });
                    }
                    // Processes that fork while they are killed are met by killing again.
                    self.kill_all()?;
                    std::thread::sleep(LOOK_AGAIN);
                }
                Ok(())
            }
        }
    }

    /// What the group uses.
    ///
    /// # Errors
    ///
    /// The group cannot be read.
    pub fn stats(&self) -> Result<CgroupStats, Error> {
        stats::stats(self)
    }

    /// Watches for processes killed for want of memory.
    ///
    /// # Errors
    ///
    /// The kernel has no memory controller, or refuses.
    pub fn oom_events(&self) -> Result<OomWatch, Error> {
        oom::watch(self)
    }

    /// Removes the group, those below it, and those above that were made for it and are empty. One that is gone already
    /// is no error.
    ///
    /// # Errors
    ///
    /// A process is left in it.
    pub fn delete(&self) -> Result<(), Error> {
        for (_, dir) in &self.dirs {
            let mut dirs = tree(dir);
            // Deepest first.
            dirs.reverse();
            for dir in dirs {
                remove(&dir)?;
            }
        }
        self.remove_made();
        Ok(())
    }

    /// The group itself, or the one below it that its oldest process was moved to.
    fn inhabited(&self) -> PathBuf {
        let own = self.main().to_owned();
        let hands_down = |dir: &Path| read(dir, "cgroup.subtree_control").is_ok_and(|text| !text.trim().is_empty());
        if !hands_down(&own) {
            return own;
        }
        let oldest = |dir: &PathBuf| {
            let text = read(dir, "cgroup.procs").ok()?;
            text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0).min()
        };
        let below = tree(&own).into_iter().filter_map(|dir| oldest(&dir).map(|pid| (pid, dir)));
        below.min().map_or(own, |(_, dir)| dir)
    }

    /// The directory that knows the group's processes.
    fn main(&self) -> &Path {
        let freezer = self.dirs.iter().find(|(name, _)| name == "freezer");
        freezer.or(self.dirs.first()).map_or(Path::new(ROOT), |(_, dir)| dir)
    }

    /// The directory of a controller; in version 2 there is but one.
    fn dir(&self, controller: &str) -> Option<&Path> {
        match self.version {
            Version::V2 => Some(self.main()),
            Version::V1 => {
                let found = self.dirs.iter().find(|(name, _)| name.split(',').any(|part| part == controller));
                found.map(|(_, dir)| dir.as_path())
            }
        }
    }

    fn write(&self, controller: &str, file: &str, value: &str) -> Result<(), Error> {
        let dir = self.dir(controller).ok_or_else(|| {
            Error::Unsupported(format!("{controller} (the guest's kernel lacks it)"), self.version.number())
        })?;
        set(&dir.join(file), value)
    }

    fn set_freezer(&self, state: &'static str, what: &'static str) -> Result<(), Error> {
        self.write("freezer", "freezer.state", state)?;
        let dir = self.main();
        let end = Instant::now() + DEADLINE;
        while read(dir, "freezer.state")?.trim() != state {
            if Instant::now() > end {
                return Err(Error::Late { what, path: dir.to_owned() });
            }
            // A group that takes long to freeze has to be told again; see the kernel's freezer-subsystem.rst.
            self.write("freezer", "freezer.state", state)?;
            std::thread::sleep(LOOK_AGAIN);
        }
        Ok(())
    }

    /// Waits for a line of `cgroup.events`, whose changes the kernel announces.
    fn wait_for_event(&self, line: &str, what: &'static str) -> Result<(), Error> {
        let dir = self.main();
        let path = dir.join("cgroup.events");
        let error = |source| Error::Group { what: "watch", path: dir.to_owned(), source };
        let file = File::open(&path).map_err(error)?;
        let end = Instant::now() + DEADLINE;
        loop {
            // Reading afresh also takes note of what has been announced so far.
            let text = io::read_to_string(&file).map_err(error)?;
            if text.lines().any(|found| found == line) {
                return Ok(());
            }
            io::Seek::rewind(&mut &file).map_err(error)?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Late { what, path: dir.to_owned() });
            }
            let timeout = Timespec::try_from(left).map_err(|_| error(io::ErrorKind::InvalidInput.into()))?;
            match poll(&mut [PollFd::from_borrowed_fd(file.as_fd(), PollFlags::PRI)], Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(error(errno.into())),
            }
        }
    }
}

/// A path below the root of the hierarchy, out of whatever an engine calls one.
fn relative(path: &str, id: &str) -> PathBuf {
    let parts: Vec<&str> = path.split(':').collect();
    let flat = match parts[..] {
        [slice, prefix, name] => format!("{slice}/{prefix}-{name}"),
        _ => path.to_owned(),
    };
    let clean: PathBuf = Path::new(&flat).components().filter(|part| matches!(part, Component::Normal(_))).collect();
    if clean.as_os_str().is_empty() { Path::new("kata").join(id) } else { clean }
}

/// The hierarchies of version 1 with the names of their controllers.
fn hierarchies(root: &Path) -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(root).map(|entries| entries.flatten().collect()).unwrap_or_else(|_| Vec::new());
    let mut found: Vec<(String, PathBuf)> = entries
        .into_iter()
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path()))
        // Links are second names; the empty version 2 of a hybrid limits nothing.
        .filter(|(_, path)| !path.is_symlink() && path.join("tasks").exists())
        .collect();
    found.sort_unstable();
    found
}

/// Hands every controller that a group has down to the groups below it.
fn enable_controllers(dir: &Path) -> Result<(), Error> {
    let controllers = read(dir, "cgroup.controllers")?;
    let file = dir.join("cgroup.subtree_control");
    for controller in controllers.split_whitespace() {
        // One at a time: a controller that cannot be handed down (threaded, in use) keeps none of the others back.
        if let Err(error) = set(&file, &format!("+{controller}")) {
            tracing::debug!("{error}");
        }
    }
    Ok(())
}

/// Whether it was not there yet.
fn make_dir(dir: &Path) -> Result<bool, Error> {
    match fs::create_dir(dir) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(source) => Err(Error::Group { what: "make", path: dir.to_owned(), source }),
    }
}

/// A group and those below it, from the top. What is gone meanwhile is left out.
fn tree(dir: &Path) -> Vec<PathBuf> {
    if !dir.exists() {
        return Vec::new();
    }
    let mut found = vec![dir.to_owned()];
    let mut index = 0;
    while index < found.len() {
        if let Ok(entries) = fs::read_dir(&found[index]) {
            found.extend(entries.flatten().filter(|entry| entry.path().is_dir()).map(|entry| entry.path()));
        }
        index += 1;
    }
    found
}

fn remove(dir: &Path) -> Result<(), Error> {
    let end = Instant::now() + DEADLINE;
    loop {
        match fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            // A process that has ended leaves its group some moments later, when it is reaped.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < end => {
                std::thread::sleep(LOOK_AGAIN);
            }
            Err(source) => return Err(Error::Group { what: "remove", path: dir.to_owned(), source }),
        }
    }
}

fn read(dir: &Path, file: &str) -> Result<String, Error> {
    fs::read_to_string(dir.join(file)).map_err(|source| Error::Group { what: "read", path: dir.join(file), source })
}

/// Writes a file that is there; the kernel would call an attempt to make one a lack of permission.
fn set(path: &Path, value: &str) -> Result<(), Error> {
    let written = File::options().write(true).truncate(true).open(path).and_then(|mut file| {
        // In one piece: each write is a value of its own.
        file.write_all(value.as_bytes())
    });
    written.map_err(|source| Error::Set { path: path.to_owned(), value: value.to_owned(), source })
}

#[cfg(test)]
mod tests;
