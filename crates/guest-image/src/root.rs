//! What is in the guest's root file system, whatever form it takes.

use std::env;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::kernel::Kernel;
use crate::tree::{Node, Tree};
use crate::{Error, Result, elf};

/// What goes in.
#[derive(Debug, Clone)]
pub struct RootOptions {
    /// The agent, linked statically; it becomes `/init`.
    pub agent: PathBuf,
    /// A static busybox: `/bin/busybox` and `/bin/sh`, for looking around in a guest.
    pub busybox: Option<PathBuf>,
}

/// What came out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Built {
    /// The file.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    /// Its SHA-256 in hexadecimal: the same for the same input.
    pub sha256: String,
    /// The modules inside, in loading order.
    pub modules: Vec<String>,
}

/// Directories that the agent mounts on or writes to.
const DIRECTORIES: &[(&str, u32)] = &[
    ("bin", 0o755),
    ("dev", 0o755),
    ("etc", 0o755),
    ("mnt", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sbin", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("var", 0o755),
];

/// Puts the tree together and names the modules in it.
pub(crate) fn tree(options: &RootOptions, kernel: &Kernel) -> Result<(Tree, Vec<String>)> {
    let mut tree = Tree::default();
    for (path, mode) in DIRECTORIES {
        tree.add(path, Node::Directory { mode: *mode });
    }
    // The kernel opens the console for its first process before anything is mounted.
    tree.add("dev/console", Node::Character { mode: 0o600, major: 5, minor: 1 });
    tree.add("dev/null", Node::Character { mode: 0o666, major: 1, minor: 3 });

    tree.add("init", Node::File { mode: 0o755, data: program(&options.agent)? });
    // The kernel looks for /init in an initrd and for this name in an image.
    tree.add("sbin/init", Node::Link { target: "/init".into() });
    if let Some(busybox) = &options.busybox {
        tree.add("bin/busybox", Node::File { mode: 0o755, data: program(busybox)? });
        tree.add("bin/sh", Node::Link { target: "busybox".into() });
    }

    let mut list = String::new();
    let mut names = Vec::new();
    for module in kernel.modules()? {
        let path = format!("/lib/modules/{}.ko", module.name);
        list.push_str(&path);
        list.push('\n');
        tree.add(&path, Node::File { mode: 0o644, data: module.data });
        names.push(module.name);
    }
    tree.add(protocol::MODULE_LIST, Node::File { mode: 0o644, data: list.into_bytes() });
    Ok((tree, names))
}

fn program(path: &Path) -> Result<Vec<u8>> {
    let data = fs::read(path).map_err(Error::file("read", path))?;
    elf::check_static(path, &data)?;
    Ok(data)
}

/// The time of every file: `SOURCE_DATE_EPOCH` if set (reproducible-builds.org), else 1970.
pub(crate) fn epoch() -> Result<u32> {
    const NAME: &str = "SOURCE_DATE_EPOCH";
    match env::var_os(NAME) {
        None => Ok(0),
        Some(value) => {
            let value = value.to_string_lossy().into_owned();
            value.parse().map_err(|_| Error::BadEpoch { name: NAME, value })
        }
    }
}

/// Writes a file that appears complete or not at all, readable by all.
pub(crate) fn write_atomically(path: &Path, data: &[u8]) -> Result<()> {
    let parent = path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(Error::file("make", parent))?;
    let failed = Error::file("write", path);
    let write = || {
        let mut file = tempfile::NamedTempFile::new_in(parent)?;
        file.write_all(data)?;
        file.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    };
    write().map_err(failed)
}

impl Built {
    pub(crate) fn new(path: &Path, data: &[u8], modules: Vec<String>) -> Built {
        Built { path: path.to_owned(), size: data.len() as u64, sha256: sha256(data), modules }
    }
}

/// In hexadecimal.
pub(crate) fn sha256(data: &[u8]) -> String {
    let digest = <sha2::Sha256 as sha2::Digest>::digest(data);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
