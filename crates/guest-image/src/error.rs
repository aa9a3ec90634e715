//! What can go wrong, with the cure in the text.

use std::io;
use std::path::PathBuf;

/// Why a kernel or an image could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or directory could not be read, written or made.
    #[error("Cannot {action} {}", path.display())]
    File {
        /// What was tried: "read", "write", ….
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },

    /// The file is not a Debian package.
    #[error("{} is not a Debian package: {why}", path.display())]
    NotADeb {
        /// The file.
        path: PathBuf,
        /// What was found instead.
        why: String,
    },

    /// Tools that this operation calls are not installed.
    #[error("{tools} not found; install with: apt-get install {packages}")]
    ToolMissing {
        /// The programs or headers, by name.
        tools: String,
        /// The packages that have them.
        packages: String,
    },

    /// A tool failed.
    #[error("{command} failed ({status}): {output}")]
    Tool {
        /// The command line.
        command: String,
        /// How it ended.
        status: String,
        /// The end of what it printed.
        output: String,
    },

    /// None of the packages that could hold a kernel is known to apt.
    #[error(
        "apt knows none of these kernel packages: {tried}; run `apt-get update` once (as root), or give a package file"
    )]
    NoKernelPackage {
        /// The names that were asked for.
        tried: String,
    },

    /// The directory or package holds no kernel.
    #[error("No kernel (boot/vmlinuz-*) under {}", path.display())]
    NoKernel {
        /// Where one was looked for.
        path: PathBuf,
    },

    /// There are several kernels, and nothing says which.
    #[error("{} kernels under {} ({}); give a directory that holds one", found.len(), path.display(), found.join(", "))]
    SeveralKernels {
        /// Where they are.
        path: PathBuf,
        /// Their releases.
        found: Vec<String>,
    },

    /// The kernel image is not one that a machine can start.
    #[error("{} is neither a bzImage nor an ELF kernel", path.display())]
    NotAKernel {
        /// The file.
        path: PathBuf,
    },

    /// The kernel has a needed driver neither built in nor as a module.
    #[error("Kernel {release} has no driver {module} (needed for {purpose}); use another kernel package")]
    ModuleMissing {
        /// The kernel.
        release: String,
        /// The module's name.
        module: String,
        /// What it is for.
        purpose: String,
    },

    /// A module names a dependency that does not exist.
    #[error("Module {module} depends on {dependency}, which kernel {release} has neither built in nor as a module")]
    DependencyMissing {
        /// The kernel.
        release: String,
        /// The module.
        module: String,
        /// What it asks for.
        dependency: String,
    },

    /// Modules that depend on each other can't be loaded in any order.
    #[error("Modules depend on each other in a circle: {}", circle.join(" -> "))]
    ModuleCircle {
        /// The modules on it.
        circle: Vec<String>,
    },

    /// A file that should be a module isn't one.
    #[error("{} is not a kernel module: {why}", path.display())]
    NotAModule {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },

    /// A program for the guest can't run there.
    #[error("{} cannot run in the guest: {why}", path.display())]
    NotRunnable {
        /// The program.
        path: PathBuf,
        /// What is wrong, and what to do.
        why: String,
    },

    /// The kernel can't mount a root image without modules that lie inside that image.
    #[error(
        "Kernel {release} has {module} as a module, so it cannot mount a root image; build an initrd, or use a kernel \
         with it built in (`kata kernel build`)"
    )]
    ImageNotBootable {
        /// The kernel.
        release: String,
        /// The driver.
        module: String,
    },

    /// A line of a kernel configuration fragment can't be used.
    #[error("{file}, line {line}: {why}")]
    Fragment {
        /// The fragment.
        file: String,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong with it.
        why: String,
    },

    /// The kernel's own configuration did not take what was asked for.
    #[error(
        "The kernel source does not accept {} of the requested options: {}; a dependency is missing or was renamed",
        lines.len(), lines.join(", ")
    )]
    ConfigNotTaken {
        /// The lines that are not in the result.
        lines: Vec<String>,
    },

    /// apt knows no package with the kernel's source.
    #[error(
        "apt knows no package {name}; run `apt-get update` once (as root) with Debian's sources, or give the package \
         file or an unpacked source tree"
    )]
    NoSourcePackage {
        /// The name that was asked for.
        name: String,
    },

    /// The package or directory has no kernel source.
    #[error("No kernel source in {}; expected usr/src/linux-source-*.tar.xz as in Debian's packages, or a tree with Kconfig", path.display())]
    NoKernelSource {
        /// Where it was looked for.
        path: PathBuf,
    },

    /// The configuration of the small kernel is for another processor.
    #[error("The small kernel is configured for x86-64 only; use the distribution's kernel")]
    NoSmallKernel,

    /// A variable of the environment is malformed.
    #[error("{name}={value} is not a number of seconds since 1970")]
    BadEpoch {
        /// The variable.
        name: &'static str,
        /// Its value.
        value: String,
    },
}

impl Error {
    /// For `map_err`: names the file and what was tried on it.
    pub(crate) fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::File { action, path, source }
    }
}
