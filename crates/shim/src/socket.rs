//! The socket a pod's server listens on: its path, and telling a live one from what a crash left.

use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

/// Where shims of every runtime keep their sockets: short, since a socket's path ends at 107 bytes.
pub(crate) const SOCKET_DIR: &str = "/run/containerd/s";

/// Why there is no listener.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketError {
    /// A server is already there.
    #[error("Another shim serves {0} already: this container runs, or one of the same name does; delete it first")]
    Live(PathBuf),
    /// Something else lies at the path.
    #[error("{0} exists and is no socket; remove it")]
    NotASocket(PathBuf),
    /// The directory, the socket, or what was left of it.
    #[error("Cannot {what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// The socket of a sandbox: a digest, so that neither a long id nor an odd namespace makes the path too long.
pub(crate) fn path(dir: &str, engine: &str, namespace: &str, sandbox: &str) -> PathBuf {
    let digest = Sha256::digest(format!("{engine}/{namespace}/{sandbox}"));
    let name: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    Path::new(dir).join(name)
}

/// The address of a socket, as engines write it.
pub(crate) fn address(path: &Path) -> String {
    format!("unix://{}", path.display())
}

/// The path in an address, if it is a unix one (`unix://` or a bare path).
pub(crate) fn path_of(address: &str) -> Option<&Path> {
    let path = address.trim().strip_prefix("unix://").unwrap_or(address.trim());
    path.starts_with('/').then(|| Path::new(path))
}

/// Listens at `path`. A socket that nobody accepts on is replaced; one that somebody does is an error.
pub(crate) fn listen(path: &Path) -> Result<UnixListener, SocketError> {
    let io = |what| move |source| SocketError::Io { what, path: path.to_owned(), source };
    if let Some(dir) = path.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o711).create(dir).map_err(io("create the directory of"))?;
    }
    match UnixListener::bind(path) {
        Ok(listener) => return Ok(listener),
        Err(error) if error.kind() != ErrorKind::AddrInUse => return Err(io("listen on")(error)),
        Err(_) => {}
    }
    let there = std::fs::symlink_metadata(path).map_err(io("look at"))?;
    if !there.file_type().is_socket() {
        return Err(SocketError::NotASocket(path.to_owned()));
    }
    if is_live(path) {
        return Err(SocketError::Live(path.to_owned()));
    }
    std::fs::remove_file(path).map_err(io("remove the left-over socket"))?;
    UnixListener::bind(path).map_err(io("listen on"))
}

/// Whether somebody accepts on `path`.
pub(crate) fn is_live(path: &Path) -> bool {
    UnixStream::connect(path).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_is_short_and_tells_pods_apart() {
        let one = path(SOCKET_DIR, "/run/containerd/containerd.sock", "k8s.io", &"x".repeat(128));
        assert_eq!(one.parent(), Some(Path::new(SOCKET_DIR)));
        assert_eq!(one.file_name().map(|n| n.len()), Some(64));
        assert!(one.as_os_str().len() < 107);
        assert_ne!(one, path(SOCKET_DIR, "/run/containerd/containerd.sock", "default", &"x".repeat(128)));
        // A known value: engines find the server again by it after an upgrade.
        assert_eq!(
            path("/s", "/run/containerd/containerd.sock", "default", "abc"),
            Path::new("/s/8cb244a719603fe00870d5ce1d8e1f1db43a654cb993d107df1f1ae23ddffa59")
        );
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/socket");
        let first = listen(&path).unwrap();
        assert!(matches!(listen(&path), Err(SocketError::Live(_))));
        drop(first);
        let second = listen(&path).unwrap();
        assert!(is_live(&path));
        drop(second);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "").unwrap();
        assert!(matches!(listen(&path), Err(SocketError::NotASocket(_))));
    }

    #[test]
    fn addresses_both_ways() {
        assert_eq!(path_of(&address(Path::new("/s/x"))), Some(Path::new("/s/x")));
        assert_eq!(path_of("/run/c.sock\n"), Some(Path::new("/run/c.sock")));
        assert_eq!(path_of("tcp://1.2.3.4:5"), None);
    }
}
