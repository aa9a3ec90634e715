//! Mounts: from OCI's words to what the mount system calls take.
//!
//! Every mount is made detached, gets its attributes, and only then appears in the container: there is no moment at
//! which a read-only mount is writable.

use std::ffi::CString;
use std::fmt;
use std::path::{Component, Path, PathBuf};

use protocol::oci;

use super::call::MountAttr;
use super::error::{Error, c_string};

const RDONLY: u64 = 0x1;
const NOSUID: u64 = 0x2;
const NODEV: u64 = 0x4;
const NOEXEC: u64 = 0x8;
const ATIME_MASK: u64 = 0x70;
const NOATIME: u64 = 0x10;
const STRICTATIME: u64 = 0x20;
const NODIRATIME: u64 = 0x80;
const NOSYMFOLLOW: u64 = 0x20_0000;

/// Files of /proc that may be covered by a bind mount: they only inform.
const COVERABLE: [&str; 11] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/net/dev",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
];

/// File systems that live in memory: `ro` concerns the mount, not a device.
const VIRTUAL: [&str; 8] = ["proc", "sysfs", "cgroup", "cgroup2", "mqueue", "devpts", "tmpfs", "securityfs"];

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Source {
    /// A part of the guest's tree.
    Bind {
        /// In the guest.
        path: CString,
        /// With the mounts below it.
        recursive: bool,
    },
    /// A new file system.
    Filesystem {
        /// Its type.
        kind: CString,
        /// Its device, or a name.
        source: Option<CString>,
        /// Options without a value.
        flags: Vec<CString>,
        /// Options with one.
        values: Vec<(CString, CString)>,
    },
}

/// One mount, ready for the child.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    /// In the container, absolute and normal.
    pub(super) destination: CString,
    /// What.
    pub(super) source: Source,
    /// Attributes of the mount itself.
    pub(super) attributes: MountAttr,
    /// Attributes of it and all below it.
    pub(super) recursive: MountAttr,
    /// Propagation changes, in order: flag and whether for all below too.
    pub(super) propagation: Vec<(u64, bool)>,
    /// The destination must be no link: for file systems that the agent or the kernel trusts by their path.
    pub(super) exact: bool,
    /// The destination is /proc: nothing but a proc file system may answer there.
    pub(super) at_proc: bool,
    /// May lie over a file of /proc.
    pub(super) over_proc: bool,
}

impl fmt::Display for Mount {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Source::Bind { path, .. } => write!(formatter, "{path:?} at {:?}", self.destination),
            Source::Filesystem { kind, .. } => write!(formatter, "{kind:?} at {:?}", self.destination),
        }
    }
}

/// Makes a path absolute and free of `.` and `..` by its text alone.
pub(super) fn normal(path: &str) -> PathBuf {
    let mut result = PathBuf::from("/");
    for component in Path::new(path).components() {
        match component {
            Component::Normal(name) => result.push(name),
            Component::ParentDir => {
                result.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    result
}

/// Whether the mount is one of a cgroup hierarchy, which the plan's maker spells out.
pub(super) fn is_cgroup(mount: &oci::Mount) -> bool {
    matches!(mount.type_.as_str(), "cgroup" | "cgroup2")
}

/// Whether the mount is a bind mount.
pub(super) fn is_bind(mount: &oci::Mount) -> bool {
    mount.type_ == "bind" || mount.options.iter().any(|option| option == "bind" || option == "rbind")
}

/// Turns an OCI mount into what the child makes.
///
/// # Errors
///
/// An option that does not exist or is not supported, a destination that is missing.
pub(super) fn prepare(mount: &oci::Mount, bundle: &Path) -> Result<Mount, Error> {
    if mount.destination.is_empty() {
        return Err(Error::Invalid("A mount has no destination".to_owned()));
    }
    let destination = normal(&mount.destination);
    if destination == Path::new("/") {
        return Err(Error::Invalid("A mount has the destination /: that is what root is for".to_owned()));
    }
    let mut options = Options::default();
    for option in mount.options.iter().filter(|option| !option.is_empty()) {
        options.add(option, &mount.destination)?;
    }
    let bind = is_bind(mount);
    let source = if bind {
        if mount.source.is_empty() {
            return Err(Error::Invalid(format!("The bind mount at {} has no source", mount.destination)));
        }
        // A relative source is relative to the bundle, never to wherever the agent happens to be.
        let path = bundle.join(&mount.source);
        if let Some(option) = options.data.first() {
            return Err(unknown(option, &mount.destination));
        }
        Source::Bind {
            path: c_string("A mount's source", path.into_os_string().into_encoded_bytes())?,
            recursive: options.rbind || !options.bind,
        }
    } else {
        filesystem(mount, &options)?
    };
    let exact = matches!(mount.type_.as_str(), "proc" | "sysfs") && !bind;
    let over_proc = bind && COVERABLE.iter().any(|path| Path::new(path) == destination);
    let at_proc = destination == Path::new("/proc");
    Ok(Mount {
        destination: c_string("A mount's destination", destination.into_os_string().into_encoded_bytes())?,
        source,
        attributes: options.attributes,
        recursive: options.recursive,
        propagation: options.propagation,
        exact,
        at_proc,
        over_proc,
    })
}

fn filesystem(mount: &oci::Mount, options: &Options) -> Result<Source, Error> {
    let what = "A mount's option";
    if mount.type_.is_empty() {
        return Err(Error::Invalid(format!("The mount at {} has no type", mount.destination)));
    }
    let mut flags = Vec::new();
    let mut values = Vec::new();
    for flag in &options.superblock {
        flags.push(c_string(what, *flag)?);
    }
    if options.attributes.set & RDONLY != 0 && !VIRTUAL.contains(&mount.type_.as_str()) {
        flags.push(c_string(what, "ro")?);
    }
    for option in &options.data {
        match option.split_once('=') {
            Some((key, value)) => values.push((c_string(what, key)?, c_string(what, value)?)),
            None => flags.push(c_string(what, option.as_str())?),
        }
    }
    let source = Some(&mount.source).filter(|source| !source.is_empty());
    Ok(Source::Filesystem {
        kind: c_string("A mount's type", mount.type_.as_str())?,
        source: source.map(|source| c_string("A mount's source", source.as_str())).transpose()?,
        flags,
        values,
    })
}

fn unknown(option: &str, destination: &str) -> Error {
    Error::Invalid(format!("The mount at {destination} has the unknown option {option:?}"))
}

#[derive(Debug, Default)]
struct Options {
    attributes: MountAttr,
    recursive: MountAttr,
    propagation: Vec<(u64, bool)>,
    superblock: Vec<&'static str>,
    data: Vec<String>,
    bind: bool,
    rbind: bool,
}

impl Options {
    fn add(&mut self, option: &str, destination: &str) -> Result<(), Error> {
        match option {
            "defaults" | "silent" | "loud" | "auto" | "noauto" | "nofail" => return Ok(()),
            "bind" => self.bind = true,
            "rbind" => self.rbind = true,
            "remount" | "tmpcopyup" | "idmap" | "ridmap" => {
                return Err(Error::Unsupported(format!("The option {option:?} of the mount at {destination}")));
            }
            _ => {
                if let Some((flag, recursive)) = propagation_flag(option) {
                    self.propagation.push((flag, recursive));
                } else if let Some((set, clear)) = attribute(option) {
                    change(&mut self.attributes, set, clear);
                } else if let Some((set, clear)) = option.strip_prefix('r').and_then(attribute) {
                    change(&mut self.recursive, set, clear);
                } else if let Some(flag) = superblock_flag(option) {
                    self.superblock.push(flag);
                } else {
                    self.data.push(option.to_owned());
                }
            }
        }
        Ok(())
    }
}

/// A later option wins over an earlier one.
fn change(attributes: &mut MountAttr, set: u64, clear: u64) {
    attributes.set = (attributes.set & !clear) | set;
    // The access time is one value of several bits, which the kernel wants cleared as a whole when it is set.
    attributes.clear = (attributes.clear & !(set & !ATIME_MASK)) | clear;
}

fn attribute(option: &str) -> Option<(u64, u64)> {
    Some(match option {
        "ro" => (RDONLY, 0),
        "rw" => (0, RDONLY),
        "nosuid" => (NOSUID, 0),
        "suid" => (0, NOSUID),
        "nodev" => (NODEV, 0),
        "dev" => (0, NODEV),
        "noexec" => (NOEXEC, 0),
        "exec" => (0, NOEXEC),
        "relatime" | "atime" | "norelatime" | "nostrictatime" => (0, ATIME_MASK),
        "noatime" => (NOATIME, ATIME_MASK),
        "strictatime" => (STRICTATIME, ATIME_MASK),
        "nodiratime" => (NODIRATIME, 0),
        "diratime" => (0, NODIRATIME),
        "nosymfollow" => (NOSYMFOLLOW, 0),
        "symfollow" => (0, NOSYMFOLLOW),
        _ => return None,
    })
}

/// The flag that a word for propagation stands for, and whether it reaches the mounts below.
pub(super) fn propagation_flag(option: &str) -> Option<(u64, bool)> {
    let flag = match option.strip_prefix('r').unwrap_or(option) {
        "shared" => libc::MS_SHARED,
        "slave" => libc::MS_SLAVE,
        "private" => libc::MS_PRIVATE,
        "unbindable" => libc::MS_UNBINDABLE,
        _ => return None,
    };
    Some((flag, option.starts_with('r')))
}

fn superblock_flag(option: &str) -> Option<&'static str> {
    ["sync", "async", "dirsync", "mand", "nomand", "lazytime", "nolazytime", "iversion"]
        .into_iter()
        .find(|flag| *flag == option)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, options: &[&str]) -> oci::Mount {
        oci::Mount {
            destination: "/a/../b".to_owned(),
            source: "src".to_owned(),
            type_: kind.to_owned(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn options_become_attributes() {
        let made =
            prepare(&mount("bind", &["rbind", "rro", "nosuid", "rw", "ro", "rprivate"]), Path::new("/x")).unwrap();
        assert_eq!(made.destination.to_bytes(), b"/b");
        assert_eq!(made.source, Source::Bind { path: c"/x/src".into(), recursive: true });
        assert_eq!((made.attributes.set, made.attributes.clear), (RDONLY | NOSUID, 0));
        assert_eq!(made.recursive.set, RDONLY);
        assert_eq!(made.propagation, [(libc::MS_PRIVATE, true)]);
    }

    #[test]
    fn file_system_options_are_passed_on() {
        let made =
            prepare(&mount("tmpfs", &["size=4k", "noatime", "sync", "ro", "relatime", "rw"]), Path::new("/")).unwrap();
        let Source::Filesystem { flags, values, .. } = made.source else { panic!("no file system") };
        assert_eq!(flags, [CString::from(c"sync")]);
        assert_eq!(values, [(c"size".into(), c"4k".into())]);
        assert_eq!((made.attributes.set, made.attributes.clear), (0, ATIME_MASK | RDONLY));
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for option in ["tmpcopyup", "remount", "idmap"] {
            let error = prepare(&mount("tmpfs", &[option]), Path::new("/")).unwrap_err();
            assert!(error.to_string().contains(option), "{error}");
        }
        let error = prepare(&mount("bind", &["bogus"]), Path::new("/")).unwrap_err();
        assert!(error.to_string().contains("bogus"), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn normal_paths_have_no_dots(path in "[a./]{0,20}") {
            let made = normal(&path);
            proptest::prop_assert!(made.is_absolute());
            proptest::prop_assert!(made.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_))));
        }
    }
}
