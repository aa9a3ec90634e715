//! Users given by name: looked up in the container's own `/etc/passwd` and `/etc/group`.
//!
//! Those files are the container's, so they are opened with openat2(2) as seen from its root, whatever links lie in the
//! way, and only so much of them is read as a sane file has.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use protocol::agent::StringUser;
use protocol::oci::User;
use rustix::fs::{Mode, OFlags, ResolveFlags};

/// The most that is read of a user or group file, in bytes.
const LARGEST: u64 = 4 << 20;

/// Why a user cannot be told.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// The root directory cannot be opened.
    #[error("Cannot open the container's root {path}")]
    Root {
        /// The root.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// A file cannot be read.
    #[error("Cannot read {path} of the container")]
    File {
        /// Within the container.
        path: &'static str,
        /// Why.
        source: io::Error,
    },
    /// There is no such user or group.
    #[error("The container's {path} has no entry {name}")]
    Unknown {
        /// Within the container.
        path: &'static str,
        /// The name.
        name: String,
    },
}

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";

/// Replaces the numbers in `user` by those that the names stand for.
pub(super) fn resolve(root: &Path, names: &StringUser, user: &mut User) -> Result<(), Error> {
    if names.uid.is_empty() && names.gid.is_empty() && names.additionalGids.is_empty() {
        return Ok(());
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(root, flags, Mode::empty())
        .map_err(|error| Error::Root { path: root.display().to_string(), source: error.into() })?;
    if !names.uid.is_empty() {
        if let Ok(uid) = names.uid.parse() {
            user.UID = uid;
        } else {
            let passwd = read(&root, PASSWD)?;
            let fields = entry(&passwd, &names.uid)
                .filter(|fields| fields.len() >= 4)
                .ok_or_else(|| unknown(PASSWD, &names.uid))?;
            user.UID = fields[2].parse().map_err(|_| unknown(PASSWD, &names.uid))?;
            user.GID = fields[3].parse().map_err(|_| unknown(PASSWD, &names.uid))?;
        }
    }
    if !names.gid.is_empty() {
        user.GID = group(&root, &names.gid)?;
    }
    for name in &names.additionalGids {
        let gid = group(&root, name)?;
        if !user.AdditionalGids.contains(&gid) {
            user.AdditionalGids.push(gid);
        }
    }
    Ok(())
}

fn unknown(path: &'static str, name: &str) -> Error {
    Error::Unknown { path, name: name.to_owned() }
}

fn group(root: &OwnedFd, name: &str) -> Result<u32, Error> {
    if let Ok(gid) = name.parse() {
        return Ok(gid);
    }
    let text = read(root, GROUP)?;
    entry(&text, name).and_then(|fields| fields.get(2)?.parse().ok()).ok_or_else(|| unknown(GROUP, name))
}

/// The fields of the first line that begins with the name (passwd(5), group(5)).
fn entry<'a>(text: &'a str, name: &str) -> Option<Vec<&'a str>> {
    text.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| fields[0] == name)
}

fn read(root: &OwnedFd, path: &'static str) -> Result<String, Error> {
    let failed = |source| Error::File { path, source };
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = rustix::fs::openat2(root, path, flags, Mode::empty(), resolve).map_err(|error| failed(error.into()))?;
    let mut bytes = Vec::new();
    let file = File::from(file);
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(failed(io::Error::other("It is not a regular file")));
    }
    file.take(LARGEST).read_to_end(&mut bytes).map_err(failed)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn names(uid: &str, gid: &str, more: &[&str]) -> StringUser {
        StringUser {
            uid: uid.to_owned(),
            gid: gid.to_owned(),
            additionalGids: more.iter().map(|name| (*name).to_owned()).collect(),
            ..Default::default()
        }
    }

    fn root() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        fs::write(root.path().join("etc/passwd"), "root:x:0:0::/:/bin/sh\nweb:x:33:44::/:/bin/sh\nbad:x\n").unwrap();
        fs::write(root.path().join("etc/group"), "root:x:0:\nlog:x:55:web\n").unwrap();
        root
    }

    #[test]
    fn names_become_the_numbers_of_the_containers_files() {
        let root = root();
        let mut user = User::new();
        resolve(root.path(), &names("web", "", &["log", "77"]), &mut user).unwrap();
        assert_eq!((user.UID, user.GID, user.AdditionalGids.clone()), (33, 44, vec![55, 77]));
        resolve(root.path(), &names("web", "log", &[]), &mut user).unwrap();
        assert_eq!(user.GID, 55);
    }

    #[test]
    fn who_is_not_there_is_named() {
        let root = root();
        for name in ["nobody", "bad"] {
            let error = resolve(root.path(), &names(name, "", &[]), &mut User::new()).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
    }

    #[test]
    fn a_link_leads_into_the_container_and_not_into_the_guest() {
        let root = root();
        fs::rename(root.path().join("etc/passwd"), root.path().join("users")).unwrap();
        symlink("/users", root.path().join("etc/passwd")).unwrap();
        let mut user = User::new();
        resolve(root.path(), &names("web", "", &[]), &mut user).unwrap();
        assert_eq!(user.UID, 33);
        fs::remove_file(root.path().join("etc/passwd")).unwrap();
        symlink("../../../../../../etc/passwd", root.path().join("etc/passwd")).unwrap();
        assert!(resolve(root.path(), &names("daemon", "", &[]), &mut user).is_err());
    }
}
