//! A kernel to boot: out of a distribution's package, an unpacked directory, or two files.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::apt::{self, Package};
use crate::modules::{Index, Module, WANTED};
use crate::progress::{Progress, step};
use crate::{Error, Result, deb, elf};

/// Where the kernel comes from.
#[derive(Debug, Clone)]
pub enum KernelSource {
    /// The distribution's kernel for virtual machines, by apt. Needs apt's package lists, but neither root nor that the
    /// package is installed.
    Distribution {
        /// A package, or `None` for the first known of the usual names.
        package: Option<String>,
        /// Where packages are kept, so that a second run is quick.
        cache: PathBuf,
    },
    /// Package files: the kernel's, and if that is another the modules'.
    Packages {
        /// `*.deb`.
        files: Vec<PathBuf>,
        /// Where they are unpacked.
        cache: PathBuf,
    },
    /// A directory with `boot/vmlinuz-<release>` and `lib/modules/<release>` (or `usr/lib/modules`), such as `/`.
    Directory(PathBuf),
    /// A kernel image by itself.
    Files {
        /// bzImage or ELF file.
        image: PathBuf,
        /// Its `lib/modules/<release>`; `None` if everything is built in.
        modules: Option<PathBuf>,
    },
}

/// A kernel and the modules that go with it.
#[derive(Debug)]
pub struct Kernel {
    image: PathBuf,
    release: String,
    modules: Option<Index>,
}

/// The packages of Debian and Ubuntu that hold a kernel for virtual machines, best first.
#[cfg(target_arch = "aarch64")]
const PACKAGES: &[&str] = &["linux-image-cloud-arm64", "linux-image-virtual", "linux-image-arm64"];
/// The packages of Debian and Ubuntu that hold a kernel for virtual machines, best first.
#[cfg(not(target_arch = "aarch64"))]
const PACKAGES: &[&str] = &["linux-image-cloud-amd64", "linux-image-virtual", "linux-image-kvm", "linux-image-amd64"];

impl Kernel {
    /// Gets the kernel, downloading and unpacking what is not in the cache.
    ///
    /// # Errors
    /// When there is none, or several and nothing says which; when a package can't be had or isn't one.
    pub fn find(source: &KernelSource, progress: &mut Progress<'_>) -> Result<Kernel> {
        match source {
            KernelSource::Distribution { package, cache } => {
                let names = package.as_deref().map_or(PACKAGES.to_vec(), |name| vec![name]);
                let mut files = Vec::new();
                for package in real_packages(first_known(&names)?)? {
                    files.push(apt::download(&package, cache, progress)?);
                }
                Kernel::unpack(&files, cache, progress)
            }
            KernelSource::Packages { files, cache } => Kernel::unpack(files, cache, progress),
            KernelSource::Directory(root) => Kernel::in_directory(root),
            KernelSource::Files { image, modules } => Kernel::from_files(image, modules.as_deref()),
        }
    }

    /// The image: bzImage, ELF file or what the architecture has.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// What `uname -r` will say, where it is known; else the image's file name.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Copies the kernel image to `path`, atomically.
    ///
    /// # Errors
    /// When it can't be read, is no kernel, or the target can't be written.
    pub fn install(&self, path: &Path) -> Result<()> {
        let data = fs::read(&self.image).map_err(Error::file("read", &self.image))?;
        crate::root::write_atomically(path, &data)
    }

    /// The modules for the guest in loading order; none for a kernel with everything built in.
    pub(crate) fn modules(&self) -> Result<Vec<Module>> {
        self.modules.as_ref().map_or(Ok(Vec::new()), |index| index.resolve(WANTED))
    }

    /// The first of `drivers` that is not part of the image itself.
    pub(crate) fn not_builtin(&self, drivers: &[&'static str]) -> Option<&'static str> {
        let index = self.modules.as_ref()?;
        drivers.iter().copied().find(|driver| !index.is_builtin(driver))
    }

    fn unpack(files: &[PathBuf], cache: &Path, progress: &mut Progress<'_>) -> Result<Kernel> {
        // All packages of one kernel share a directory, named by the first.
        let Some(name) = files.first().and_then(|file| file.file_stem()) else {
            return Err(Error::NoKernel { path: cache.to_owned() });
        };
        let root = cache.join(name);
        if !root.is_dir() {
            fs::create_dir_all(cache).map_err(Error::file("make", cache))?;
            let parts = tempfile::Builder::new()
                .prefix(".parts-")
                .tempdir_in(cache)
                .map_err(Error::file("make a directory in", cache))?;
            let whole = parts.path().join("0");
            for (number, file) in files.iter().enumerate() {
                step(progress, format!("Unpacking {}", file.file_name().unwrap_or_default().to_string_lossy()));
                let part = parts.path().join(number.to_string());
                deb::unpack(file, &part, |path| {
                    ["boot", "lib/modules", "usr/lib/modules"].iter().any(|prefix| path.starts_with(prefix))
                })?;
                if number > 0 {
                    merge(&part, &whole)?;
                }
            }
            Kernel::in_directory(&whole)?;
            if let Err(error) = fs::rename(&whole, &root)
                && !root.is_dir()
            {
                return Err(Error::file("make", root)(error));
            }
        }
        Kernel::in_directory(&root)
    }

    fn in_directory(root: &Path) -> Result<Kernel> {
        let mut releases = BTreeSet::new();
        let boot = root.join("boot");
        match fs::read_dir(&boot) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            list => {
                for entry in list.map_err(Error::file("list", &boot))? {
                    let name = entry.map_err(Error::file("list", &boot))?.file_name();
                    if let Some(release) = name.to_string_lossy().strip_prefix("vmlinuz-") {
                        releases.insert(release.to_owned());
                    }
                }
            }
        }
        let mut found: Vec<String> = releases.into_iter().collect();
        let Some(release) = found.pop() else { return Err(Error::NoKernel { path: root.to_owned() }) };
        if !found.is_empty() {
            found.push(release);
            return Err(Error::SeveralKernels { path: root.to_owned(), found });
        }
        let modules = ["lib/modules", "usr/lib/modules"].map(|place| root.join(place).join(&release));
        let modules = modules.into_iter().find(|place| place.is_dir());
        let modules = modules.map(|place| Index::read(&release, &place)).transpose()?;
        let image = boot.join(format!("vmlinuz-{release}"));
        check_image(&image)?;
        Ok(Kernel { image, release, modules })
    }

    fn from_files(image: &Path, modules: Option<&Path>) -> Result<Kernel> {
        check_image(image)?;
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let release = name(modules.unwrap_or(image));
        let modules = modules.map(|place| Index::read(&release, place)).transpose()?;
        Ok(Kernel { image: image.to_owned(), release, modules })
    }
}

fn first_known(names: &[&str]) -> Result<Package> {
    for name in names {
        if let Some(package) = apt::show(name)? {
            return Ok(package);
        }
    }
    Err(Error::NoKernelPackage { tried: names.join(", ") })
}

/// Follows a meta package to the one with the image, and that to the one with the modules.
fn real_packages(first: Package) -> Result<Vec<Package>> {
    let mut packages = vec![first];
    let mut place = 0;
    while let Some(package) = packages.get(place).cloned() {
        for name in package.depends {
            let part = name.starts_with("linux-image-")
                || (name.starts_with("linux-modules-") && !name.starts_with("linux-modules-extra-"));
            if part && !packages.iter().any(|package| package.name == name) {
                packages.push(first_known(&[&name])?);
            }
        }
        place += 1;
    }
    // A meta package has nothing in it but the name of another kernel's.
    if packages.iter().skip(1).any(|package| package.name.starts_with("linux-image-")) {
        packages.remove(0);
    }
    Ok(packages)
}

/// Moves what is under `from` into `to`, where directories of the same name are merged.
fn merge(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from).map_err(Error::file("list", from))? {
        let entry = entry.map_err(Error::file("list", from))?;
        let target = to.join(entry.file_name());
        if target.is_dir() {
            merge(&entry.path(), &target)?;
        } else {
            fs::rename(entry.path(), &target).map_err(Error::file("move", entry.path()))?;
        }
    }
    Ok(())
}

/// Kernels of x86 carry "HdrS" at 0x202 (the boot protocol), those of other architectures "ARM\x64" at 0x38 or a
/// compressed form of it; an ELF file may be one for direct boot.
fn check_image(path: &Path) -> Result<()> {
    let mut start = [0; 0x206];
    let mut file = fs::File::open(path).map_err(Error::file("open", path))?;
    std::io::Read::read_exact(&mut file, &mut start).map_err(|_| Error::NotAKernel { path: path.to_owned() })?;
    let known = elf::is_elf(&start)
        || &start[0x202..0x206] == b"HdrS"
        || &start[0x38..0x3c] == b"ARM\x64"
        || start.starts_with(&[0x1f, 0x8b]);
    if known { Ok(()) } else { Err(Error::NotAKernel { path: path.to_owned() }) }
}
