//! A root file system in memory: paths and what lies there, in one order only, with no owner and no time.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use cpio::newc;

/// What lies at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Node {
    Directory { mode: u32 },
    File { mode: u32, data: Vec<u8> },
    Link { target: String },
    Character { mode: u32, major: u32, minor: u32 },
}

/// Paths relative to the root, without a leading slash. A `BTreeMap` puts a directory before what is in it.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Tree {
    nodes: BTreeMap<String, Node>,
}

impl Tree {
    /// Adds a node, and the directories above it (0755) that are not there yet.
    pub(crate) fn add(&mut self, path: &str, node: Node) {
        let path = path.trim_matches('/');
        for (slash, _) in path.match_indices('/') {
            self.nodes.entry(path[..slash].to_owned()).or_insert(Node::Directory { mode: 0o755 });
        }
        self.nodes.insert(path.to_owned(), node);
    }

    /// Writes the tree as a "newc" archive, the form of an initrd (the kernel's buffer-format.rst).
    ///
    /// Inode numbers count from 1, everything belongs to root and has the time `epoch` (seconds since 1970).
    pub(crate) fn write_cpio(&self, epoch: u32) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        for ((path, node), inode) in self.nodes.iter().zip(1..) {
            let builder = newc::Builder::new(path).ino(inode).uid(0).gid(0).mtime(epoch);
            let (builder, data) = match node {
                Node::Directory { mode } => (builder.nlink(2).mode(0o040_000 | mode), &[][..]),
                Node::File { mode, data } => (builder.nlink(1).mode(0o100_000 | mode), &data[..]),
                Node::Link { target } => (builder.nlink(1).mode(0o120_777), target.as_bytes()),
                Node::Character { mode, major, minor } => {
                    (builder.nlink(1).mode(0o020_000 | mode).rdev_major(*major).rdev_minor(*minor), &[][..])
                }
            };
            let size = u32::try_from(data.len()).map_err(|_| {
                io::Error::new(io::ErrorKind::FileTooLarge, format!("{path} is larger than an initrd can hold"))
            })?;
            let mut writer = builder.write(&mut out, size);
            writer.write_all(data)?;
            writer.finish()?;
        }
        newc::trailer(&mut out)?;
        Ok(out)
    }

    /// Writes the tree below a directory, for the tools that make file systems. Device nodes are left out: making them
    /// needs root, and the guest mounts devtmpfs over /dev.
    pub(crate) fn write_directory(&self, root: &Path, epoch: u32) -> io::Result<()> {
        for (path, node) in &self.nodes {
            let path = root.join(path);
            match node {
                Node::Directory { .. } => fs::create_dir(&path)?,
                Node::File { mode, data } => {
                    let mut file = File::create_new(&path)?;
                    file.write_all(data)?;
                    file.set_permissions(fs::Permissions::from_mode(*mode))?;
                }
                Node::Link { target } => symlink(target, &path)?,
                Node::Character { .. } => {}
            }
        }
        // Times and modes of directories last, from the leaves up: making an entry changes its directory.
        for (path, node) in self.nodes.iter().rev() {
            if !matches!(node, Node::Character { .. }) {
                set_time(&root.join(path), epoch)?;
            }
            if let Node::Directory { mode } = node {
                fs::set_permissions(root.join(path), fs::Permissions::from_mode(*mode))?;
            }
        }
        fs::set_permissions(root, fs::Permissions::from_mode(0o755))?;
        set_time(root, epoch)
    }

    /// Paths of everything but device nodes, in order.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &str> {
        self.nodes.iter().filter(|(_, node)| !matches!(node, Node::Character { .. })).map(|(path, _)| path.as_str())
    }
}

fn set_time(path: &Path, epoch: u32) -> io::Result<()> {
    let time = rustix::fs::Timespec { tv_sec: i64::from(epoch), tv_nsec: 0 };
    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use proptest::prelude::*;

    use super::*;

    fn node() -> impl Strategy<Value = Node> {
        prop_oneof![
            (0_u32..0o7777).prop_map(|mode| Node::Directory { mode }),
            (0_u32..0o7777, prop::collection::vec(any::<u8>(), 0..300))
                .prop_map(|(mode, data)| Node::File { mode, data }),
            "[a-z/]{1,20}".prop_map(|target| Node::Link { target }),
            (0_u32..0o777, 0_u32..255, 0_u32..255).prop_map(|(mode, major, minor)| Node::Character {
                mode,
                major,
                minor
            }),
        ]
    }

    /// Reads an archive back, checking what all entries have in common.
    fn read_back(mut archive: &[u8], epoch: u32) -> Tree {
        let mut tree = Tree::default();
        for inode in 1.. {
            let mut reader = newc::Reader::new(archive).unwrap();
            let entry = reader.entry().clone();
            if entry.is_trailer() {
                break;
            }
            assert_eq!((entry.ino(), entry.uid(), entry.gid(), entry.mtime()), (inode, 0, 0, epoch));
            let mut data = Vec::new();
            reader.read_to_end(&mut data).unwrap();
            let mode = entry.mode() & 0o7777;
            let node = match entry.mode() & 0o170_000 {
                0o040_000 => Node::Directory { mode },
                0o100_000 => Node::File { mode, data },
                0o120_000 => Node::Link { target: String::from_utf8(data).unwrap() },
                _ => Node::Character { mode, major: entry.rdev_major(), minor: entry.rdev_minor() },
            };
            tree.nodes.insert(entry.name().to_owned(), node);
            archive = reader.finish().unwrap();
        }
        tree
    }

    proptest! {
        #[test]
        fn an_archive_reads_back_the_same(nodes in prop::collection::vec(("[a-z]{1,8}(/[a-z]{1,8}){0,2}", node()), 0..12), epoch in any::<u32>()) {
            let mut tree = Tree::default();
            for (path, node) in &nodes {
                tree.add(path, node.clone());
            }
            prop_assert_eq!(read_back(&tree.write_cpio(epoch).unwrap(), epoch), tree.clone());
            // The order in which the tree grew leaves no trace.
            let mut again = Tree::default();
            let mut last: BTreeMap<&String, &Node> = BTreeMap::new();
            for (path, node) in &nodes {
                last.insert(path, node);
            }
            for (path, node) in last.iter().rev() {
                again.add(path, (*node).clone());
            }
            for path in tree.nodes.keys() {
                if let Some(node) = last.get(path) {
                    again.add(path, (*node).clone());
                }
            }
            prop_assert_eq!(again.write_cpio(epoch).unwrap(), tree.write_cpio(epoch).unwrap());
        }
    }

    #[test]
    fn the_cpio_tool_lists_it() {
        let mut tree = Tree::default();
        tree.add("/dev/null", Node::Character { mode: 0o666, major: 1, minor: 3 });
        tree.add("init", Node::File { mode: 0o755, data: b"#!".to_vec() });
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), tree.write_cpio(0).unwrap()).unwrap();
        let output = std::process::Command::new("cpio")
            .args(["-t", "-v", "--quiet", "--numeric-uid-gid"])
            .stdin(File::open(file.path()).unwrap())
            .env("LC_ALL", "C")
            .env("TZ", "UTC")
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["drwxr-xr-x", "2", "0", "0", "0", "Jan", "1", "1970", "dev"]);
        assert_eq!(lines[1], ["crw-rw-rw-", "1", "0", "0", "1,", "3", "Jan", "1", "1970", "dev/null"]);
        assert_eq!(lines[2], ["-rwxr-xr-x", "1", "0", "0", "2", "Jan", "1", "1970", "init"]);
    }
}
