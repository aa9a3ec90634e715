//! Who the process is and what it may do: user and groups, capabilities, limits, the home directory.

use std::fs::File;
use std::io::Read;
use std::os::fd::BorrowedFd;
use std::sync::OnceLock;

use protocol::oci;
use rustix::fs::{Gid, OFlags, Uid};
use rustix::process::{Resource, Rlimit};

use super::error::Error;
use super::path;
use super::plan::Capabilities;

const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// `CAP_SYS_ADMIN`, which installing a seccomp filter without no_new_privs takes.
pub(super) const SYS_ADMIN: u64 = 1 << 21;

/// The most that is read of a container's passwd file, in bytes.
const PASSWD_MAX: u64 = 1 << 20;

/// The last capability of this kernel, asked once in the agent's own name: a container can cover the file in /proc.
pub(super) fn last_capability() -> u32 {
    static LAST: OnceLock<u32> = OnceLock::new();
    *LAST.get_or_init(|| {
        (0..63)
            .take_while(|number| rustix::thread::capability_is_in_bounding_set(capability(*number)).is_ok())
            .last()
            .unwrap_or(40)
    })
}

/// The set of one capability.
pub(super) fn capability(number: u32) -> rustix::thread::CapabilitySet {
    rustix::thread::CapabilitySet::from_bits_retain(1 << number)
}

/// The bits of the configuration's capabilities. Without a configuration the process has none.
///
/// # Errors
///
/// A name that no kernel knows.
pub(super) fn capabilities(wanted: Option<&oci::LinuxCapabilities>) -> Result<Capabilities, Error> {
    let Some(wanted) = wanted else { return Ok(Capabilities::default()) };
    Ok(Capabilities {
        bounding: bits(&wanted.Bounding)?,
        effective: bits(&wanted.Effective)?,
        inheritable: bits(&wanted.Inheritable)?,
        permitted: bits(&wanted.Permitted)?,
        ambient: bits(&wanted.Ambient)?,
    })
}

fn bits(names: &[String]) -> Result<u64, Error> {
    names.iter().try_fold(0, |all, name| {
        let plain = name.strip_prefix("CAP_").unwrap_or(name);
        let number = NAMES
            .iter()
            .position(|known| *known == plain)
            .ok_or_else(|| Error::Invalid(format!("There is no capability {name}")))?;
        // An older kernel simply cannot give it.
        Ok(if number <= last_capability() as usize { all | 1 << number } else { all })
    })
}

/// The limits of the configuration.
///
/// # Errors
///
/// An unknown limit, or one that is given twice.
pub(super) fn limits(wanted: &[oci::POSIXRlimit]) -> Result<Vec<(Resource, Rlimit, String)>, Error> {
    let mut limits: Vec<(Resource, Rlimit, String)> = Vec::new();
    for limit in wanted {
        let resource = resource(&limit.Type)
            .ok_or_else(|| Error::Invalid(format!("There is no resource limit {:?}", limit.Type)))?;
        if limits.iter().any(|(other, ..)| *other == resource) {
            return Err(Error::Invalid(format!("The resource limit {} is given twice", limit.Type)));
        }
        let value = |value: u64| (value != u64::MAX).then_some(value);
        let value = Rlimit { current: value(limit.Soft), maximum: value(limit.Hard) };
        limits.push((resource, value, limit.Type.clone()));
    }
    Ok(limits)
}

fn resource(name: &str) -> Option<Resource> {
    Some(match name.strip_prefix("RLIMIT_").unwrap_or(name) {
        "AS" => Resource::As,
        "CORE" => Resource::Core,
        "CPU" => Resource::Cpu,
        "DATA" => Resource::Data,
        "FSIZE" => Resource::Fsize,
        "LOCKS" => Resource::Locks,
        "MEMLOCK" => Resource::Memlock,
        "MSGQUEUE" => Resource::Msgqueue,
        "NICE" => Resource::Nice,
        "NOFILE" => Resource::Nofile,
        "NPROC" => Resource::Nproc,
        "RSS" => Resource::Rss,
        "RTPRIO" => Resource::Rtprio,
        "RTTIME" => Resource::Rttime,
        "SIGPENDING" => Resource::Sigpending,
        "STACK" => Resource::Stack,
        _ => return None,
    })
}

/// The home directory that the container's own `/etc/passwd` gives the user; `/` when it does not.
pub(super) fn home(root: BorrowedFd<'_>, uid: u32) -> String {
    read_passwd(root)
        .and_then(|passwd| {
            let lines = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
            lines
                .filter(|fields| fields.get(2).and_then(|field| field.parse().ok()) == Some(uid))
                .find_map(|fields| fields.get(5).filter(|home| home.starts_with('/')).map(|home| (*home).to_owned()))
        })
        .unwrap_or_else(|| "/".to_owned())
}

fn read_passwd(root: BorrowedFd<'_>) -> Option<String> {
    let file = File::from(path::open(root, c"/etc/passwd", OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY).ok()?);
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    file.take(PASSWD_MAX).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// A user's number.
///
/// # Errors
///
/// 4294967295, which means no user to the kernel.
pub(super) fn uid(number: u32) -> Result<Uid, Error> {
    if number == u32::MAX { Err(Error::Invalid(format!("{number} is no user"))) } else { Ok(Uid::from_raw(number)) }
}

/// A group's number.
///
/// # Errors
///
/// 4294967295, which means no group to the kernel.
pub(super) fn gid(number: u32) -> Result<Gid, Error> {
    if number == u32::MAX { Err(Error::Invalid(format!("{number} is no group"))) } else { Ok(Gid::from_raw(number)) }
}

/// The number in the guest of a number in the container; the same without a user namespace.
pub(super) fn in_guest(mappings: &[oci::LinuxIDMapping], id: u32) -> Option<u32> {
    if mappings.is_empty() {
        return Some(id);
    }
    mappings.iter().find_map(|mapping| {
        let offset = id.checked_sub(mapping.ContainerID).filter(|offset| *offset < mapping.Size)?;
        mapping.HostID.checked_add(offset)
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsFd;

    use rustix::fs::Mode;

    use super::*;

    #[test]
    fn capability_names_are_bits() {
        assert!(last_capability() >= 37);
        assert_eq!(bits(&["CAP_CHOWN".into(), "CAP_SYS_ADMIN".into()]).unwrap(), 1 | SYS_ADMIN);
        assert!(bits(&["CAP_BOGUS".into()]).unwrap_err().to_string().contains("CAP_BOGUS"));
        assert_eq!(capabilities(None).unwrap(), Capabilities::default());
    }

    #[test]
    fn limits_are_checked() {
        let limit = |kind: &str| oci::POSIXRlimit { Type: kind.into(), Hard: u64::MAX, Soft: 3, ..Default::default() };
        let made = limits(&[limit("RLIMIT_NOFILE")]).unwrap();
        assert_eq!(made[0].1, Rlimit { current: Some(3), maximum: None });
        assert!(limits(&[limit("RLIMIT_X")]).is_err());
        assert!(limits(&[limit("RLIMIT_CPU"), limit("RLIMIT_CPU")]).is_err());
    }

    #[test]
    fn home_is_what_the_containers_passwd_says() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        fs::write(dir.path().join("etc/passwd"), "bad\nroot:x:0:0:r:/root:/bin/sh\nx:x:5:5::rel:/bin/sh\n").unwrap();
        let root = rustix::fs::open(dir.path(), OFlags::PATH, Mode::empty()).unwrap();
        assert_eq!(home(root.as_fd(), 0), "/root");
        assert_eq!(home(root.as_fd(), 5), "/");
        assert_eq!(home(root.as_fd(), 99), "/");
    }

    #[test]
    fn ids_are_mapped() {
        let mapping = oci::LinuxIDMapping { HostID: 1000, ContainerID: 10, Size: 5, ..Default::default() };
        assert_eq!(in_guest(&[], 7), Some(7));
        assert_eq!(in_guest(std::slice::from_ref(&mapping), 14), Some(1004));
        assert_eq!(in_guest(std::slice::from_ref(&mapping), 15), None);
        assert_eq!(in_guest(&[mapping], 9), None);
    }
}
