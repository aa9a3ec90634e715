//! Mount options as text: which are flags of mount(2), which belong to the file system.

use std::ffi::CString;

use rustix::mount::{MountFlags, MountPropagationFlags};

/// A list of options, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Options {
    /// Flags of mount(2).
    pub(super) flags: MountFlags,
    /// A bind mount, and whether of the whole tree.
    pub(super) bind: Option<bool>,
    /// The propagation to set afterwards.
    pub(super) propagation: Option<MountPropagationFlags>,
    /// What the file system itself is told.
    pub(super) data: Vec<String>,
}

/// Takes the options apart; the later of two that contradict each other wins.
pub(super) fn parse<'a>(options: impl IntoIterator<Item = &'a str>) -> Options {
    let mut parsed = Options { flags: MountFlags::empty(), bind: None, propagation: None, data: Vec::new() };
    for option in options.into_iter().flat_map(|option| option.split(',')).filter(|option| !option.is_empty()) {
        let (flag, on) = match option {
            "ro" => (MountFlags::RDONLY, true),
            "rw" => (MountFlags::RDONLY, false),
            "nosuid" => (MountFlags::NOSUID, true),
            "suid" => (MountFlags::NOSUID, false),
            "nodev" => (MountFlags::NODEV, true),
            "dev" => (MountFlags::NODEV, false),
            "noexec" => (MountFlags::NOEXEC, true),
            "exec" => (MountFlags::NOEXEC, false),
            "sync" => (MountFlags::SYNCHRONOUS, true),
            "async" => (MountFlags::SYNCHRONOUS, false),
            "dirsync" => (MountFlags::DIRSYNC, true),
            "noatime" => (MountFlags::NOATIME, true),
            "atime" => (MountFlags::NOATIME, false),
            "nodiratime" => (MountFlags::NODIRATIME, true),
            "diratime" => (MountFlags::NODIRATIME, false),
            "relatime" => (MountFlags::RELATIME, true),
            "norelatime" => (MountFlags::RELATIME, false),
            "strictatime" => (MountFlags::STRICTATIME, true),
            "nostrictatime" => (MountFlags::STRICTATIME, false),
            "defaults" => continue,
            "bind" | "rbind" => {
                parsed.bind = Some(option == "rbind");
                continue;
            }
            other => {
                match propagation(other) {
                    Some(propagation) => parsed.propagation = Some(propagation),
                    None => parsed.data.push(other.to_owned()),
                }
                continue;
            }
        };
        parsed.flags.set(flag, on);
    }
    parsed
}

fn propagation(option: &str) -> Option<MountPropagationFlags> {
    let recursive = MountPropagationFlags::REC;
    Some(match option {
        "private" => MountPropagationFlags::PRIVATE,
        "rprivate" => MountPropagationFlags::PRIVATE | recursive,
        "slave" => MountPropagationFlags::DOWNSTREAM,
        "rslave" => MountPropagationFlags::DOWNSTREAM | recursive,
        "shared" => MountPropagationFlags::SHARED,
        "rshared" => MountPropagationFlags::SHARED | recursive,
        "unbindable" => MountPropagationFlags::UNBINDABLE,
        "runbindable" => MountPropagationFlags::UNBINDABLE | recursive,
        _ => return None,
    })
}

impl Options {
    /// The file system's options as mount(2) takes them; `None` if one contains a zero byte.
    pub(super) fn data(&self) -> Option<CString> {
        CString::new(self.data.join(",")).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_and_data_are_told_apart_and_the_later_wins() {
        let parsed = parse(["ro,nosuid", "rw", "size=64m", "mode=0755", "rbind", "rslave"]);
        assert_eq!(parsed.flags, MountFlags::NOSUID);
        assert_eq!(parsed.bind, Some(true));
        assert_eq!(parsed.propagation, Some(MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC));
        assert_eq!(parsed.data().unwrap().to_str().unwrap(), "size=64m,mode=0755");
    }

    #[test]
    fn a_zero_byte_is_refused() {
        assert_eq!(parse(["a\0b"]).data(), None);
    }
}
