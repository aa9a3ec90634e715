//! Composes plans: the order of steps that makes a container, or a process in one.

use std::ffi::CString;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::path::{Path, PathBuf};

use protocol::oci;

use super::channel::Gate;
use super::error::{Error, c_string};
use super::mounts::{self, Mount, Source};
use super::namespaces::Namespaces;
use super::plan::{Capabilities, Plan, Step};
use super::user::{self, SYS_ADMIN};
use super::{CgroupEntry, Filter, devices, sysctl};

/// Where a process without `PATH` has its program looked for.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Beyond any sane mask.
const UMASK_MAX: u32 = 0o777;

/// What a plan is made of, beyond the process.
#[derive(Debug)]
pub(super) struct Surroundings<'a> {
    pub(super) id: &'a str,
    pub(super) filter: Option<&'a Filter>,
    pub(super) streams: [RawFd; 3],
    /// In the container.
    pub(super) home: String,
    pub(super) maps_users: bool,
}

/// The plan of a container's first process.
pub(super) fn container(
    spec: &oci::Spec,
    process: &oci::Process,
    bundle: &Path,
    root: &Path,
    namespaces: &Namespaces,
    cgroup: &CgroupEntry<'_>,
    around: &Surroundings<'_>,
) -> Result<Plan, Error> {
    let linux = spec.Linux.get_or_default();
    if !linux.MountLabel.is_empty() {
        return Err(Error::Unsupported(format!(
            "the mount label {:?}: the guest kernel enforces none",
            linux.MountLabel
        )));
    }
    if linux.IntelRdt.is_some() {
        return Err(Error::Unsupported("Intel RDT: a guest has no cache allocation of its own".to_owned()));
    }
    let mut steps = vec![isolate(around, namespaces.joined_alone.iter().map(|joined| joined.number))];
    steps.push(Step::Wait(Gate::Cloned));
    if namespaces.maps_users() {
        steps.push(Step::BecomeRoot);
    }
    steps.push(session(around.id)?);
    for joined in &namespaces.joined_alone {
        steps.push(Step::Join { namespace: joined.number, flags: joined.flag, what: "the time namespace" });
    }
    if namespaces.new_cgroup {
        steps.push(Step::NewCgroupNamespace);
    }
    steps.push(Step::NoUmask);
    let propagation = root_propagation(&linux.RootfsPropagation)?;
    let private = propagation.is_some_and(|(flag, _)| flag == libc::MS_PRIVATE);
    steps.push(Step::DetachMounts { private });
    steps.push(Step::BindRoot(c_string("The root's path", root.as_os_str().as_encoded_bytes())?));
    steps.extend(mount_steps(spec, bundle, cgroup)?);
    let own_dev = !spec
        .Mounts
        .iter()
        .any(|mount| mounts::is_bind(mount) && mounts::normal(&mount.destination) == Path::new("/dev"));
    if own_dev {
        steps.extend(devices::steps(&linux.Devices, namespaces.maps_users())?);
    }
    if process.Terminal {
        steps.push(terminal(process, own_dev)?);
    }
    steps.extend(sysctl::steps(linux, namespaces)?);
    steps.extend(names(spec, namespaces)?);
    steps.push(Step::Directory(path("The working directory", &process.Cwd)?));
    steps.push(Step::Wait(Gate::Prepared));
    for hidden in &linux.MaskedPaths {
        steps.push(Step::Mask(path("A masked path", hidden)?));
    }
    for kept in &linux.ReadonlyPaths {
        steps.push(Step::ReadOnly(path("A read-only path", kept)?));
    }
    if spec.Root.Readonly {
        steps.push(Step::ReadOnlyRoot);
    }
    steps.push(Step::Pivot);
    if let Some((flag, recursive)) = propagation {
        steps.push(Step::RootPropagation { flag, recursive });
    }
    steps.extend(becoming(process, around)?);
    finish(process, steps, around)
}

/// The plan of a further process in a container.
pub(super) fn further(
    process: &oci::Process,
    init: BorrowedFd<'_>,
    flags: u32,
    around: &Surroundings<'_>,
) -> Result<Plan, Error> {
    let mut steps = vec![
        isolate(around, [init.as_raw_fd()]),
        Step::Wait(Gate::Cloned),
        session(around.id)?,
        Step::Join { namespace: init.as_raw_fd(), flags, what: "the container's namespaces" },
    ];
    if around.maps_users {
        steps.push(Step::BecomeRoot);
    }
    steps.push(Step::NoUmask);
    if process.Terminal {
        steps.push(Step::PresentRoot);
        steps.push(terminal(process, false)?);
    }
    steps.extend(becoming(process, around)?);
    finish(process, steps, around)
}

fn isolate(around: &Surroundings<'_>, more: impl IntoIterator<Item = RawFd>) -> Step {
    Step::Isolate { keep: around.streams.into_iter().chain(more).collect() }
}

fn session(id: &str) -> Result<Step, Error> {
    Ok(Step::Session { keyring: c_string("The container's id", format!("_ses.{id}"))? })
}

fn path(what: &str, text: &str) -> Result<CString, Error> {
    if !text.starts_with('/') {
        return Err(Error::Invalid(format!("{what} is not absolute: {text:?}")));
    }
    c_string(what, mounts::normal(text).into_os_string().into_encoded_bytes())
}

fn root_propagation(text: &str) -> Result<Option<(u64, bool)>, Error> {
    if text.is_empty() {
        return Ok(None);
    }
    mounts::propagation_flag(text)
        .map(Some)
        .ok_or_else(|| Error::Invalid(format!("There is no root propagation {text:?}")))
}

fn mount_steps(spec: &oci::Spec, bundle: &Path, cgroup: &CgroupEntry<'_>) -> Result<Vec<Step>, Error> {
    let mut steps = Vec::new();
    for mount in &spec.Mounts {
        if mounts::is_cgroup(mount) && !mounts::is_bind(mount) {
            steps.extend(cgroup_mounts(mount, cgroup)?);
        } else {
            steps.push(Step::Mount(mounts::prepare(mount, bundle)?));
        }
    }
    Ok(steps)
}

/// The container's own cgroups, as a bind mount (version 2) or one for each hierarchy on a small tmpfs (version 1).
fn cgroup_mounts(mount: &oci::Mount, cgroup: &CgroupEntry<'_>) -> Result<Vec<Step>, Error> {
    let mut wanted = mount.clone();
    wanted.type_ = "bind".to_owned();
    // Options of the file system itself are the guest's affair: its hierarchies exist already.
    wanted.options.retain(|option| {
        matches!(option.as_str(), "ro" | "rw" | "nosuid" | "nodev" | "noexec" | "relatime" | "noatime")
            || mounts::propagation_flag(option).is_some()
    });
    let bind = |source: &Path, destination: &str| -> Result<Step, Error> {
        let mut wanted = wanted.clone();
        wanted.source = source.to_string_lossy().into_owned();
        wanted.destination = destination.to_owned();
        let mut made: Mount = mounts::prepare(&wanted, Path::new("/"))?;
        if let Source::Bind { recursive, .. } = &mut made.source {
            *recursive = false;
        }
        Ok(Step::Mount(made))
    };
    if let (Some(v2), []) = (cgroup.v2, cgroup.procs_files) {
        let source = std::fs::read_link(format!("/proc/self/fd/{}", v2.as_raw_fd()))
            .map_err(Error::agent_io("tell the path of the container's cgroup"))?;
        return Ok(vec![bind(&source, &mount.destination)?]);
    }
    if cgroup.procs_files.is_empty() {
        return Err(Error::Unsupported(format!("the cgroup mount at {} without a cgroup", mount.destination)));
    }
    let tmpfs = oci::Mount {
        destination: mount.destination.clone(),
        source: "tmpfs".to_owned(),
        type_: "tmpfs".to_owned(),
        options: ["mode=755", "nosuid", "nodev", "noexec"].map(str::to_owned).to_vec(),
        ..Default::default()
    };
    let mut steps = vec![Step::Mount(mounts::prepare(&tmpfs, Path::new("/"))?)];
    for file in cgroup.procs_files {
        let directory = file.parent().unwrap_or(file);
        let hierarchy = hierarchy(directory)?;
        steps.push(bind(directory, &format!("{}/{hierarchy}", mount.destination))?);
        // Controllers that are mounted together are looked for apart.
        for controller in hierarchy.split(',').filter(|controller| *controller != hierarchy) {
            steps.push(Step::Link {
                path: path("A cgroup mount", &format!("{}/{controller}", mount.destination))?,
                target: c_string("A cgroup hierarchy", hierarchy.as_str())?,
            });
        }
    }
    if mount.options.iter().any(|option| option == "ro") {
        steps.push(Step::ReadOnly(path("A cgroup mount", &mount.destination)?));
    }
    Ok(steps)
}

fn hierarchy(directory: &Path) -> Result<String, Error> {
    let below = directory.strip_prefix("/sys/fs/cgroup").ok();
    let name = below.and_then(|below| below.components().next()).map(|name| PathBuf::from(name.as_os_str()));
    name.map(|name| name.to_string_lossy().into_owned()).ok_or_else(|| {
        Error::Unsupported(format!("the cgroup directory {} outside /sys/fs/cgroup", directory.display()))
    })
}

fn terminal(process: &oci::Process, console: bool) -> Result<Step, Error> {
    let side = |cells: u32| u16::try_from(cells).ok();
    let size = process.ConsoleSize.as_ref().and_then(|size| Some((side(size.Height)?, side(size.Width)?)));
    // Only the owner: the group is the one that devpts was mounted with, tty's.
    let user = process.User.get_or_default();
    Ok(Step::Terminal { uid: user::uid(user.UID)?, size, console })
}

fn names(spec: &oci::Spec, namespaces: &Namespaces) -> Result<Vec<Step>, Error> {
    let mut steps = Vec::new();
    for (what, name, step) in [
        ("host name", &spec.Hostname, Step::Hostname as fn(Vec<u8>) -> Step),
        ("NIS domain name", &spec.Domainname, Step::Domainname),
    ] {
        if name.is_empty() {
            continue;
        }
        if !namespaces.has("uts") {
            return Err(Error::Invalid(format!("The {what} {name:?} needs a uts namespace, which is not there")));
        }
        steps.push(step(name.as_bytes().to_vec()));
    }
    Ok(steps)
}

/// From the agent's privileges to the process': the same for the first and for further ones.
fn becoming(process: &oci::Process, around: &Surroundings<'_>) -> Result<Vec<Step>, Error> {
    for (what, label) in [("AppArmor profile", &process.ApparmorProfile), ("SELinux label", &process.SelinuxLabel)] {
        if !label.is_empty() {
            return Err(Error::Unsupported(format!("the {what} {label:?}: the guest kernel enforces none")));
        }
    }
    let user = process.User.get_or_default();
    let (uid, gid) = (user::uid(user.UID)?, user::gid(user.GID)?);
    let groups = user.AdditionalGids.iter().map(|number| user::gid(*number)).collect::<Result<_, _>>()?;
    let umask = user.Umask.unwrap_or(0o022);
    if umask > UMASK_MAX {
        return Err(Error::Invalid(format!("The umask {umask:#o} is none")));
    }
    let wanted = user::capabilities(process.Capabilities.as_ref())?;
    let cwd = path("The working directory", &process.Cwd)?;
    let mut steps = vec![
        Step::Streams(around.streams),
        Step::CloseOthers,
        Step::Cwd { path: cwd.clone(), last: false },
        Step::Bound { keep: wanted.bounding, last: user::last_capability() },
        Step::User { uid, gid, groups },
        Step::Cwd { path: cwd, last: true },
        Step::Umask(umask),
    ];
    if process.NoNewPrivileges {
        steps.push(Step::NoNewPrivileges);
    }
    // Without no_new_privs a filter takes CAP_SYS_ADMIN, kept until the filter is there.
    let borrowed = if around.filter.is_some() && !process.NoNewPrivileges { SYS_ADMIN } else { 0 };
    steps.push(Step::Capabilities(Capabilities {
        effective: wanted.effective | borrowed,
        permitted: wanted.permitted | borrowed,
        ..wanted
    }));
    steps.push(Step::Find);
    steps.push(Step::Wait(Gate::Ready));
    if let Some(filter) = around.filter {
        steps.push(Step::Seccomp { filter: filter.instructions.clone(), flags: filter.flags });
    }
    if borrowed & !(wanted.effective & wanted.permitted) != 0 {
        steps.push(Step::GiveBack(wanted));
    }
    steps.push(Step::Execute);
    Ok(steps)
}

fn finish(process: &oci::Process, steps: Vec<Step>, around: &Surroundings<'_>) -> Result<Plan, Error> {
    let what = "An argument";
    let arguments = process.Args.iter().map(|text| c_string(what, text.as_str())).collect::<Result<Vec<_>, _>>()?;
    let name = process.Args.first().filter(|name| !name.is_empty());
    let name = name.ok_or_else(|| Error::Invalid("The process has no command".to_owned()))?;
    let mut environment = process
        .Env
        .iter()
        .map(|text| c_string("An environment variable", text.as_str()))
        .collect::<Result<Vec<_>, _>>()?;
    if !process.Env.iter().any(|entry| entry.starts_with("HOME=")) {
        environment.push(c_string("The home directory", format!("HOME={}", around.home))?);
    }
    Ok(Plan { steps, candidates: candidates(name, &process.Env)?, arguments, environment })
}

/// Where the program may be: as execvp(3) looks for it, with the process' own `PATH`.
fn candidates(name: &str, environment: &[String]) -> Result<Vec<CString>, Error> {
    let what = "The command";
    if name.contains('/') {
        return Ok(vec![c_string(what, name)?]);
    }
    let path = environment.iter().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or(PATH);
    // Relative ones would make the program a matter of the working directory.
    path.split(':')
        .filter(|directory| directory.starts_with('/'))
        .map(|directory| c_string(what, format!("{directory}/{name}")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_looked_for_in_the_processs_own_path() {
        let found = candidates("sh", &["PATH=/a::rel:/b".to_owned()]).unwrap();
        assert_eq!(found, [c"/a/sh".to_owned(), c"/b/sh".to_owned()]);
        assert_eq!(candidates("./x", &[]).unwrap(), [c"./x".to_owned()]);
        assert_eq!(candidates("sh", &[]).unwrap().len(), 6);
    }

    #[test]
    fn version_one_hierarchies_are_named_by_their_directory() {
        assert_eq!(hierarchy(Path::new("/sys/fs/cgroup/cpu,cpuacct/a/b")).unwrap(), "cpu,cpuacct");
        assert!(hierarchy(Path::new("/elsewhere/a")).is_err());
    }
}
