//! Which kernel modules the guest needs, and the order in which they can be loaded.
//!
//! Dependencies are read from the modules themselves (`depends=` in `.modinfo`), as packages come without a
//! `modules.dep`. Each module costs start-up time, so the list is short, and the drivers of the control channel come
//! first.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::compress::{Packing, reader};
use crate::{Error, Result, elf};

/// A module that the guest should have unless the kernel has it built in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) name: &'static str,
    pub(crate) purpose: &'static str,
    /// Its absence is an error; else the feature is simply not there (virtio_mem in an old kernel).
    pub(crate) required: bool,
}

const fn need(name: &'static str, purpose: &'static str) -> Wanted {
    Wanted { name, purpose, required: true }
}

const fn like(name: &'static str, purpose: &'static str) -> Wanted {
    Wanted { name, purpose, required: false }
}

/// In the order of loading: the control channel, then what a container's start waits for, then the rest.
pub(crate) const WANTED: &[Wanted] = &[
    need("virtio_pci", "every device"),
    need("virtio_console", "the control channel"),
    need("virtiofs", "the shared directory"),
    need("overlay", "writable layers over images"),
    like("vmw_vsock_virtio_transport", "the control channel by vsock"),
    need("virtio_blk", "volumes"),
    need("virtio_net", "the network"),
    like("virtio_rng", "randomness of the host"),
    like("virtio_balloon", "returning memory"),
    like("virtio_mem", "memory in fine steps"),
    like("ext4", "volumes"),
];

/// One module, unpacked, ready to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Module {
    /// With underscores, as the kernel calls it.
    pub(crate) name: String,
    pub(crate) data: Vec<u8>,
}

/// The modules below one `lib/modules/<release>`.
#[derive(Debug)]
pub(crate) struct Index {
    release: String,
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl Index {
    /// Reads the directory; nothing is opened yet but the list of built-in ones.
    pub(crate) fn read(release: &str, directory: &Path) -> Result<Index> {
        let mut files = BTreeMap::new();
        walk(directory, &mut files)?;
        let list = directory.join("modules.builtin");
        let text = fs::read_to_string(&list).map_err(Error::file("read", &list))?;
        let builtin = text.lines().filter_map(|line| module_name(Path::new(line))).collect();
        Ok(Index { release: release.to_owned(), files, builtin })
    }

    /// Whether the driver is part of the kernel image.
    pub(crate) fn is_builtin(&self, name: &str) -> bool {
        self.builtin.contains(&canonical(name))
    }

    /// The wanted modules and what they depend on, each after its dependencies.
    pub(crate) fn resolve(&self, wanted: &[Wanted]) -> Result<Vec<Module>> {
        let mut roots = Vec::new();
        for want in wanted {
            let name = canonical(want.name);
            if self.is_builtin(&name) {
                continue;
            }
            if self.files.contains_key(&name) {
                roots.push(name);
            } else if want.required {
                return Err(Error::ModuleMissing {
                    release: self.release.clone(),
                    module: want.name.to_owned(),
                    purpose: want.purpose.to_owned(),
                });
            }
        }
        let mut data = BTreeMap::new();
        let order = load_order(&roots, |name| {
            let path = &self.files[name];
            let bytes = read_module(path)?;
            let depends = depends(elf::modinfo(path, &bytes)?);
            data.insert(name.to_owned(), bytes);
            let mut missing = depends.iter().filter(|name| !self.is_builtin(name) && !self.files.contains_key(*name));
            if let Some(dependency) = missing.next() {
                return Err(Error::DependencyMissing {
                    release: self.release.clone(),
                    module: name.to_owned(),
                    dependency: dependency.clone(),
                });
            }
            Ok(depends.into_iter().filter(|name| !self.is_builtin(name)).collect())
        })?;
        Ok(order
            .into_iter()
            .filter_map(|name| data.remove_entry(&name))
            .map(|(name, data)| Module { name, data })
            .collect())
    }
}

/// Depth first from each root in turn, so that what an early root does not need comes later.
///
/// `dependencies` is asked once for each module.
fn load_order(roots: &[String], mut dependencies: impl FnMut(&str) -> Result<Vec<String>>) -> Result<Vec<String>> {
    let mut order = Vec::new();
    let mut done = BTreeSet::new();
    for root in roots {
        // Of each module on the way down from the root: what it still waits for, last first.
        let mut way: Vec<(String, Vec<String>)> = Vec::new();
        let mut next = Some(root.clone());
        loop {
            if let Some(name) = next.take() {
                if let Some(start) = way.iter().position(|(on_way, _)| *on_way == name) {
                    let mut circle: Vec<String> = way.drain(start..).map(|(name, _)| name).collect();
                    circle.push(name);
                    return Err(Error::ModuleCircle { circle });
                }
                if !done.contains(&name) {
                    let mut waits = dependencies(&name)?;
                    waits.reverse();
                    way.push((name, waits));
                }
            }
            let Some((_, waits)) = way.last_mut() else { break };
            next = waits.pop();
            if next.is_none()
                && let Some((name, _)) = way.pop()
            {
                done.insert(name.clone());
                order.push(name);
            }
        }
    }
    Ok(order)
}

/// The names in `depends=a,b` of a module's `.modinfo`.
fn depends(modinfo: &[u8]) -> Vec<String> {
    modinfo
        .split(|byte| *byte == 0)
        .filter_map(|entry| entry.strip_prefix(b"depends="))
        .flat_map(|list| list.split(|byte| *byte == b','))
        .filter(|name| !name.is_empty())
        .map(|name| canonical(&String::from_utf8_lossy(name)))
        .collect()
}

/// File names may have `-` where the kernel has `_`.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// The name of the module in a file, if the file's name is a module's.
fn module_name(path: &Path) -> Option<String> {
    let (name, suffix) = path.file_name()?.to_str()?.split_once(".ko")?;
    Packing::by_suffix(suffix).map(|_| canonical(name))
}

fn walk(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let list = fs::read_dir(directory).map_err(Error::file("list", directory))?;
    for entry in list {
        let entry = entry.map_err(Error::file("list", directory))?;
        let path = entry.path();
        // Links are not followed: `build` and `source` lead to whole kernel trees.
        if entry.file_type().map_err(Error::file("read", &path))?.is_dir() {
            walk(&path, files)?;
        } else if let Some(name) = module_name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// The bytes of a module, unpacked and without the signature at its end.
///
/// The guest's kernel checks no signatures unless told to, yet would hash each signed module to say so in its log.
fn read_module(path: &Path) -> Result<Vec<u8>> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let suffix = name.split_once(".ko").map_or("", |(_, suffix)| suffix);
    let packing = Packing::by_suffix(suffix).unwrap_or(Packing::None);
    let file = File::open(path).map_err(Error::file("open", path))?;
    let mut data = Vec::new();
    reader(packing, file).and_then(|mut stream| stream.read_to_end(&mut data)).map_err(Error::file("unpack", path))?;
    strip_signature(&mut data);
    Ok(data)
}

/// Removes what `sign-file` of the kernel appends: the signature, a trailer of 12 bytes that ends with the signature's
/// length (big endian), and a marker.
fn strip_signature(data: &mut Vec<u8>) {
    const MARKER: &[u8] = b"~Module signature appended~\n";
    const TRAILER: usize = 12;
    let Some(rest) = data.strip_suffix(MARKER) else { return };
    let Some((_, length)) = rest.split_last_chunk::<4>() else { return };
    let signature = u32::from_be_bytes(*length) as usize;
    if let Some(end) = rest.len().checked_sub(TRAILER).and_then(|end| end.checked_sub(signature)) {
        data.truncate(end);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Edges lead from a number to smaller ones only, so that there are no circles.
    fn graph() -> impl Strategy<Value = Vec<Vec<usize>>> {
        (1_usize..30).prop_flat_map(|size| {
            (0..size)
                .map(
                    |node| {
                        if node == 0 { Just(Vec::new()).boxed() } else { prop::collection::vec(0..node, 0..4).boxed() }
                    },
                )
                .collect::<Vec<_>>()
        })
    }

    fn order_of(graph: &[Vec<usize>], roots: &[usize]) -> Result<Vec<usize>> {
        let roots: Vec<String> = roots.iter().map(usize::to_string).collect();
        let order = load_order(&roots, |name| {
            Ok(graph[name.parse::<usize>().unwrap()].iter().map(usize::to_string).collect())
        })?;
        Ok(order.iter().map(|name| name.parse().unwrap()).collect())
    }

    proptest! {
        #[test]
        fn each_module_once_and_after_its_dependencies(graph in graph(), picks in prop::collection::vec(any::<prop::sample::Index>(), 1..6)) {
            let roots: Vec<usize> = picks.iter().map(|pick| pick.index(graph.len())).collect();
            let order = order_of(&graph, &roots).unwrap();
            for (place, node) in order.iter().enumerate() {
                prop_assert!(!order[..place].contains(node));
                prop_assert!(graph[*node].iter().all(|dependency| order[..place].contains(dependency)));
            }
            prop_assert!(roots.iter().all(|root| order.contains(root)));
            // Nothing before the first root that it does not need.
            let alone = order_of(&graph, &roots[..1]).unwrap();
            prop_assert_eq!(&order[..alone.len()], &alone[..]);
        }

        #[test]
        fn a_circle_is_named(size in 1_usize..10) {
            let graph: Vec<Vec<usize>> = (0..size).map(|node| vec![(node + 1) % size]).collect();
            let Err(Error::ModuleCircle { circle }) = order_of(&graph, &[0]) else { panic!("no circle found") };
            prop_assert_eq!(circle.len(), size + 1);
            prop_assert_eq!(circle.first(), circle.last());
        }

        #[test]
        fn signatures_are_removed_and_nothing_else(body in prop::collection::vec(any::<u8>(), 0..200), signature in prop::collection::vec(any::<u8>(), 0..100)) {
            let mut data = body.clone();
            data.extend(&signature);
            data.extend([0, 0, 2, 0, 0, 0, 0, 0]);
            data.extend((signature.len() as u32).to_be_bytes());
            data.extend(b"~Module signature appended~\n");
            strip_signature(&mut data);
            prop_assert_eq!(&data, &body);
            let mut unsigned = body.clone();
            strip_signature(&mut unsigned);
            prop_assert_eq!(unsigned, body);
        }
    }

    #[test]
    fn names_of_modules() {
        let name = |path: &str| module_name(Path::new(path));
        assert_eq!(name("kernel/drivers/char/hw_random/virtio-rng.ko").as_deref(), Some("virtio_rng"));
        assert_eq!(name("fs/fuse/virtiofs.ko.xz").as_deref(), Some("virtiofs"));
        assert_eq!(name("virtiofs.ko.zst").as_deref(), Some("virtiofs"));
        assert_eq!(name("modules.order"), None);
        assert_eq!(name("a.ko.tmp"), None);
    }

    #[test]
    fn dependencies_are_read_from_modinfo() {
        assert_eq!(depends(b"license=GPL\0depends=virtio,nd-virtio\0name=x\0"), ["virtio", "nd_virtio"]);
        assert_eq!(depends(b"depends=\0license=GPL\0"), Vec::<String>::new());
    }

    #[test]
    fn a_missing_module_is_named_with_its_purpose() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("modules.builtin"), "kernel/drivers/virtio/virtio_pci.ko\n").unwrap();
        let index = Index::read("6.1.0-test", directory.path()).unwrap();
        let error = index.resolve(&[need("virtio_pci", "every device"), need("virtiofs", "the shared directory")]);
        let text = error.unwrap_err().to_string();
        assert!(
            text.contains("virtiofs") && text.contains("6.1.0-test") && text.contains("the shared directory"),
            "{text}"
        );
        assert_eq!(index.resolve(&[need("virtio-pci", ""), like("9p", "")]).unwrap(), []);
    }

    #[test]
    fn a_file_that_is_no_module_is_named() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("modules.builtin"), "").unwrap();
        fs::write(directory.path().join("fuse.ko"), "#!/bin/sh\n").unwrap();
        let error = Index::read("6.1", directory.path()).unwrap().resolve(&[need("fuse", "x")]).unwrap_err();
        assert!(error.to_string().contains("fuse.ko is not a kernel module"), "{error}");
    }
}
