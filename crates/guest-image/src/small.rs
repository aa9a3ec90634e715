//! The small kernel: Debian's kernel source with a configuration of our own, everything built in.
//!
//! ```text
//!   linux-source package -> source tree -> allnoconfig + fragments -> checked .config -> make -> vmlinux, bzImage
//! ```
//!
//! Each line of the fragments (`kernel/*.config` of this crate) gives its reason; a line that the source does not take
//! is an error. The same source and compiler make the same bytes: time, user, host and number of the build are fixed.

use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::compress::{Packing, reader};
use crate::fragment::Options;
use crate::progress::{Event, Progress, step};
use crate::root::{sha256, write_atomically};
use crate::{Error, Result, apt, deb};

/// Where the kernel's source comes from.
#[derive(Debug, Clone)]
pub enum Source {
    /// Debian's `linux-source` package, or another by name, by apt.
    Distribution(Option<String>),
    /// A `linux-source-*.deb`.
    Package(PathBuf),
    /// An unpacked tree, which is configured and built in place.
    Directory(PathBuf),
}

/// How to build the small kernel.
#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// What is compiled.
    pub source: Source,
    /// Where the source is kept, unpacked and compiled (about 2 GB), so that a second run is quick.
    pub work: PathBuf,
    /// Where the results go.
    pub output: PathBuf,
    /// Processes at once.
    pub jobs: usize,
    /// More fragments in the same form, which may change what ours ask for.
    pub fragments: Vec<PathBuf>,
}

/// The results.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernels {
    /// The stripped ELF file, entered by PVH: the quickest start under QEMU.
    pub vmlinux: PathBuf,
    /// The compressed image that any loader takes.
    pub bzimage: PathBuf,
    /// The configuration they were built with.
    pub config: PathBuf,
}

/// The fragments, in the order they are read.
const FRAGMENTS: &[(&str, &str)] = &[
    ("base.config", include_str!("../kernel/base.config")),
    ("machine.config", include_str!("../kernel/machine.config")),
    ("virtio.config", include_str!("../kernel/virtio.config")),
    ("containers.config", include_str!("../kernel/containers.config")),
    ("storage.config", include_str!("../kernel/storage.config")),
    ("network.config", include_str!("../kernel/network.config")),
    ("hardening.config", include_str!("../kernel/hardening.config")),
];

/// What the kernel's makefiles call, and the package of each.
const TOOLS: &[(&str, &str)] = &[
    ("make", "make"),
    ("gcc", "gcc"),
    ("ld", "binutils"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("perl", "perl"),
    ("lz4", "lz4"),
];

/// objtool is compiled with it.
const HEADER: (&str, &str) = ("/usr/include/gelf.h", "libelf-dev");

/// Lines that make prints for this configuration: an estimate to show progress by.
const STEPS: u64 = 2_600;

/// Builds the small kernel, unless the results of the same source and configuration are there already.
///
/// Takes about 17 minutes of processor time.
///
/// # Errors
/// When the source can't be had, a tool is missing (all of them are named), the source doesn't take a requested option
/// (all of them are named), or make fails.
pub fn build(options: &BuildOptions, progress: &mut Progress<'_>) -> Result<Kernels> {
    if !cfg!(target_arch = "x86_64") {
        return Err(Error::NoSmallKernel);
    }
    let wanted = wanted(&options.fragments)?;
    let results = Kernels {
        vmlinux: options.output.join("vmlinux-small"),
        bzimage: options.output.join("bzImage-small"),
        config: options.output.join("config-small"),
    };
    check_tools()?;
    fs::create_dir_all(&options.work).map_err(Error::file("make", &options.work))?;
    let (tree, name) = source_tree(options, progress)?;
    let stamp = options.work.join("built");
    // A tree given by the user may change at any time; only make knows what is out of date there.
    if let Some(name) = &name
        && fs::read_to_string(&stamp).is_ok_and(|text| Some(text) == fingerprint(name, &wanted, &results))
    {
        step(progress, "The small kernel is up to date");
        return Ok(results);
    }

    step(progress, "Configuring the kernel");
    let request = options.work.join("requested.config");
    fs::write(&request, wanted.kconfig()).map_err(Error::file("write", &request))?;
    let request = fs::canonicalize(&request).map_err(Error::file("find", &request))?;
    make(&tree, &["allnoconfig"], &[("KCONFIG_ALLCONFIG", &request)], &mut |_| {})?;
    let config = tree.join(".config");
    let resolved = fs::read_to_string(&config).map_err(Error::file("read", &config))?;
    wanted.check(&resolved)?;

    step(progress, format!("Compiling the kernel with {} processes", options.jobs));
    let jobs = format!("-j{}", options.jobs.max(1));
    let mut done = 0;
    make(&tree, &[&jobs, "vmlinux", "bzImage"], &[], &mut |_| {
        done += 1;
        progress(Event::Advance { done, total: STEPS });
    })?;

    step(progress, "Stripping the kernel");
    let stripped = tree.join("vmlinux.stripped");
    let mut command = Command::new("strip");
    command.arg("-s").arg("-o").args([&stripped, &tree.join("vmlinux")]);
    run(command, &mut |_| {})?;
    let copy = |from: PathBuf, to: &Path| {
        let data = fs::read(&from).map_err(Error::file("read", &from))?;
        write_atomically(to, &data)
    };
    copy(stripped, &results.vmlinux)?;
    copy(tree.join("arch/x86/boot/bzImage"), &results.bzimage)?;
    copy(config, &results.config)?;
    if let Some(text) = name.and_then(|name| fingerprint(&name, &wanted, &results)) {
        write_atomically(&stamp, text.as_bytes())?;
    }
    Ok(results)
}

fn wanted(extra: &[PathBuf]) -> Result<Options> {
    let mut options = Options::default();
    for (name, text) in FRAGMENTS {
        options.add(name, text)?;
    }
    for path in extra {
        let text = fs::read_to_string(path).map_err(Error::file("read", path))?;
        options.add(&path.display().to_string(), &text)?;
    }
    Ok(options)
}

/// Says what the results were made from and what they are; `None` if one of them isn't there.
fn fingerprint(source: &str, wanted: &Options, results: &Kernels) -> Option<String> {
    let mut text = format!("source {source}\nrequest {}\n", sha256(wanted.kconfig().as_bytes()));
    for path in [&results.vmlinux, &results.bzimage, &results.config] {
        text += &format!("result {}\n", sha256(&fs::read(path).ok()?));
    }
    Some(text)
}

fn check_tools() -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = |tool: &str| std::env::split_paths(&path).any(|directory| directory.join(tool).is_file());
    let mut missing: Vec<(&str, &str)> = TOOLS.iter().copied().filter(|(tool, _)| !found(tool)).collect();
    if !Path::new(HEADER.0).is_file() {
        missing.push(HEADER);
    }
    if missing.is_empty() {
        return Ok(());
    }
    let (tools, packages): (Vec<&str>, Vec<&str>) = missing.into_iter().unzip();
    Err(Error::ToolMissing { tools: tools.join(", "), packages: packages.join(" ") })
}

/// The unpacked source and, if it came from a package, that package's name and version.
fn source_tree(options: &BuildOptions, progress: &mut Progress<'_>) -> Result<(PathBuf, Option<String>)> {
    let file = match &options.source {
        Source::Directory(tree) => {
            return if tree.join("Kconfig").is_file() {
                Ok((tree.clone(), None))
            } else {
                Err(Error::NoKernelSource { path: tree.clone() })
            };
        }
        Source::Package(file) => file.clone(),
        Source::Distribution(name) => {
            let package = source_package(name.as_deref().unwrap_or("linux-source"))?;
            apt::download(&package, &options.work, progress)?
        }
    };
    let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let tree = options.work.join(&name);
    if !tree.is_dir() {
        step(progress, format!("Unpacking {name}"));
        unpack(&file, &options.work, &tree, progress)?;
    }
    Ok((tree, Some(name)))
}

/// `linux-source` depends on the package of the current version.
fn source_package(name: &str) -> Result<apt::Package> {
    let package = apt::show(name)?.ok_or_else(|| Error::NoSourcePackage { name: name.to_owned() })?;
    match package.depends.iter().find(|name| name.starts_with("linux-source-")) {
        Some(real) => apt::show(real)?.ok_or_else(|| Error::NoSourcePackage { name: real.clone() }),
        None => Ok(package),
    }
}

/// Unpacks `usr/src/linux-source-*.tar.xz` out of the package, without its outermost directory.
fn unpack(package: &Path, work: &Path, tree: &Path, progress: &mut Progress<'_>) -> Result<()> {
    let parts = tempfile::Builder::new()
        .prefix(".unpack-")
        .tempdir_in(work)
        .map_err(Error::file("make a directory in", work))?;
    let mut archive = deb::data(package)?;
    let mut unpack = || -> io::Result<bool> {
        for entry in archive.entries()? {
            let entry = entry?;
            let name = deb::strip(&entry.path()?);
            let Some((_, suffix)) = name.to_str().and_then(|name| name.split_once(".tar")) else { continue };
            let Some(packing) = Packing::by_suffix(suffix).filter(|_| name.starts_with("usr/src")) else { continue };
            let total = entry.size();
            let counting = Counting { inner: entry, done: 0, total, shown: 0, progress };
            tar::Archive::new(reader(packing, counting)?).unpack(parts.path())?;
            return Ok(true);
        }
        Ok(false)
    };
    let found = unpack().map_err(Error::file("unpack", package))?;
    let mut inner = fs::read_dir(parts.path()).map_err(Error::file("list", parts.path()))?;
    let Some(Ok(inner)) = inner.next().filter(|_| found) else {
        return Err(Error::NoKernelSource { path: package.to_owned() });
    };
    fs::rename(inner.path(), tree).map_err(Error::file("make", tree))
}

/// Tells how much of a stream has been read.
struct Counting<'a, 'b, R> {
    inner: R,
    done: u64,
    total: u64,
    shown: u64,
    progress: &'a mut Progress<'b>,
}

impl<R: Read> Read for Counting<'_, '_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.done += length as u64;
        // A hundred times in all.
        if self.done - self.shown > self.total / 100 {
            self.shown = self.done;
            (self.progress)(Event::Advance { done: self.done, total: self.total });
        }
        Ok(length)
    }
}

fn make(tree: &Path, goals: &[&str], variables: &[(&str, &Path)], line: &mut dyn FnMut(&str)) -> Result<()> {
    let mut command = Command::new("make");
    // What the builder has set for other makes doesn't belong here.
    for name in ["MAKEFLAGS", "MFLAGS", "MAKELEVEL", "KCFLAGS", "KCPPFLAGS", "KBUILD_OUTPUT", "ARCH", "CROSS_COMPILE"] {
        command.env_remove(name);
    }
    command.current_dir(tree).args(goals).envs(variables.iter().copied()).env("LC_ALL", "C").envs([
        ("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970"),
        ("KBUILD_BUILD_USER", "kata"),
        ("KBUILD_BUILD_HOST", "kata"),
        ("KBUILD_BUILD_VERSION", "1"),
    ]);
    run(command, line)
}

/// Runs a tool and hands over each line it prints; the last ones are in the error.
fn run(mut command: Command, line: &mut dyn FnMut(&str)) -> Result<()> {
    const KEPT: usize = 12;
    let program = PathBuf::from(command.get_program());
    let words = std::iter::once(command.get_program()).chain(command.get_args()).map(|word| word.to_string_lossy());
    let shown = words.collect::<Vec<_>>().join(" ");
    let failed = |source| Error::File { action: "run", path: program.clone(), source };

    let (output, input) = io::pipe().map_err(failed)?;
    command.stdin(Stdio::null()).stdout(input.try_clone().map_err(failed)?).stderr(input);
    let mut child = command.spawn().map_err(failed)?;
    // Closes our copies of the pipe's end, so that the output ends with the child.
    drop(command);
    let mut last = std::collections::VecDeque::new();
    for text in BufReader::new(output).split(b'\n') {
        let text = String::from_utf8_lossy(&text.map_err(failed)?).into_owned();
        line(&text);
        if last.len() == KEPT {
            last.pop_front();
        }
        last.push_back(text);
    }
    let status = child.wait().map_err(failed)?;
    if status.success() {
        return Ok(());
    }
    Err(Error::Tool { command: shown, status: status.to_string(), output: last.make_contiguous().join("\n") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_of_our_fragments_has_its_reason_and_stands_once() {
        let mut seen = std::collections::BTreeSet::new();
        for (name, text) in FRAGMENTS {
            Options::default().add(name, text).unwrap();
            for line in text.lines().filter(|line| line.starts_with("CONFIG_")) {
                let option = line.split('=').next().unwrap();
                assert!(seen.insert(option), "{option} stands in two fragments");
            }
        }
        assert!(seen.len() > 300);
    }

    #[test]
    fn what_is_no_source_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let options = BuildOptions {
            source: Source::Directory(directory.path().to_owned()),
            work: directory.path().join("work"),
            output: directory.path().join("out"),
            jobs: 1,
            fragments: vec![],
        };
        fs::create_dir(&options.work).unwrap();
        let error = source_tree(&options, &mut |_| {}).unwrap_err();
        assert!(matches!(error, Error::NoKernelSource { .. }), "{error}");
    }

    #[test]
    fn a_failing_tool_shows_its_last_words() {
        let mut lines = Vec::new();
        let mut command = Command::new("sh");
        command.args(["-c", "echo one; echo two >&2; exit 3"]);
        let error = run(command, &mut |line| lines.push(line.to_owned())).unwrap_err().to_string();
        assert_eq!(lines, ["one", "two"]);
        assert!(error.contains("exit status: 3") && error.contains("two"), "{error}");
    }
}
