//! Devices: those that every container has, those that its configuration adds, and the links in `/dev`.

use std::ffi::{CStr, CString};

use protocol::oci;
use rustix::fs::{FileType, Gid, Uid};

use super::error::{Error, c_string};
use super::mounts::normal;
use super::plan::{Node, Step};

const DEFAULT: [(&CStr, u32, u32); 6] = [
    (c"/dev/null", 1, 3),
    (c"/dev/zero", 1, 5),
    (c"/dev/full", 1, 7),
    (c"/dev/random", 1, 8),
    (c"/dev/urandom", 1, 9),
    (c"/dev/tty", 5, 0),
];

const LINKS: [(&CStr, &CStr); 5] = [
    (c"/dev/fd", c"/proc/self/fd"),
    (c"/dev/stdin", c"/proc/self/fd/0"),
    (c"/dev/stdout", c"/proc/self/fd/1"),
    (c"/dev/stderr", c"/proc/self/fd/2"),
    (c"/dev/core", c"/proc/kcore"),
];

/// Permission bits of a device that has none in its configuration.
const MODE: u32 = 0o666;

/// The steps that fill `/dev`.
///
/// # Errors
///
/// A device of an unknown type, or with numbers out of range.
pub(super) fn steps(devices: &[oci::LinuxDevice], bind: bool) -> Result<Vec<Step>, Error> {
    let mut nodes: Vec<Node> = DEFAULT
        .iter()
        .map(|(path, major, minor)| Node {
            path: CString::from(*path),
            kind: FileType::CharacterDevice,
            mode: MODE,
            device: rustix::fs::makedev(*major, *minor),
            uid: Uid::ROOT,
            gid: Gid::ROOT,
            bind,
        })
        .collect();
    for device in devices {
        let node = node(device, bind)?;
        // The configuration's word counts, also for one of the default devices.
        nodes.retain(|other| other.path != node.path);
        nodes.push(node);
    }
    let links = LINKS.iter().map(|(path, target)| Step::Link { path: (*path).into(), target: (*target).into() });
    Ok(nodes.into_iter().map(Step::Node).chain(links).chain([Step::Ptmx]).collect())
}

fn node(device: &oci::LinuxDevice, bind: bool) -> Result<Node, Error> {
    let kind = match device.Type.as_str() {
        "c" | "u" => FileType::CharacterDevice,
        "b" => FileType::BlockDevice,
        "p" => FileType::Fifo,
        other => return Err(Error::Invalid(format!("The device {} has the unknown type {other:?}", device.Path))),
    };
    let number = |number: i64| {
        u32::try_from(number).map_err(|_| Error::Invalid(format!("The device {} has the number {number}", device.Path)))
    };
    let device_number =
        if kind == FileType::Fifo { 0 } else { rustix::fs::makedev(number(device.Major)?, number(device.Minor)?) };
    let path = normal(&device.Path);
    Ok(Node {
        path: c_string("A device's path", path.into_os_string().into_encoded_bytes())?,
        kind,
        mode: if device.FileMode == 0 { MODE } else { device.FileMode & 0o7777 },
        device: device_number,
        uid: super::user::uid(device.UID)?,
        gid: super::user::gid(device.GID)?,
        bind: bind && kind != FileType::Fifo,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_replaces_a_default_device() {
        let null = oci::LinuxDevice {
            Path: "/dev/null".into(),
            Type: "c".into(),
            Major: 1,
            Minor: 3,
            FileMode: 0o100_600,
            ..Default::default()
        };
        let steps = steps(&[null], false).unwrap();
        let nulls: Vec<_> = steps
            .iter()
            .filter_map(|step| match step {
                Step::Node(node) if node.path.as_c_str() == c"/dev/null" => Some(node.mode),
                _ => None,
            })
            .collect();
        assert_eq!(nulls, [0o600]);
    }

    #[test]
    fn a_device_of_an_unknown_type_is_refused() {
        let device = oci::LinuxDevice { Path: "/dev/x".into(), Type: "z".into(), ..Default::default() };
        assert!(steps(&[device], false).unwrap_err().to_string().contains("/dev/x"));
    }
}
