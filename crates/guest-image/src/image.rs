//! A read-only root image, the alternative to an initrd: it takes no guest memory of its own and can be verified as it
//! is read. Made by `mkfs.erofs` or `mke2fs` from a staging directory, as an ordinary user.

use std::fmt::{self, Write as _};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;

use crate::kernel::Kernel;
use crate::progress::{Progress, step};
use crate::root::{self, Built, RootOptions};
use crate::tree::Tree;
use crate::{Error, Result};

/// The file system of a root image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FileSystem {
    /// Made for this: compact, read-only.
    #[default]
    Erofs,
    /// Every kernel has it.
    Ext4,
}

impl FileSystem {
    /// As the kernel and the command line call it.
    pub fn name(self) -> &'static str {
        match self {
            FileSystem::Erofs => "erofs",
            FileSystem::Ext4 => "ext4",
        }
    }
}

impl fmt::Display for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for FileSystem {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<FileSystem, String> {
        let known = [FileSystem::Erofs, FileSystem::Ext4];
        let found = known.into_iter().find(|known| known.name() == name);
        found.ok_or_else(|| format!("Unknown file system {name}; known are erofs, ext4"))
    }
}

/// How to make a root image.
#[derive(Debug, Clone)]
pub struct ImageOptions {
    /// What goes in.
    pub root: RootOptions,
    /// Its file system.
    pub file_system: FileSystem,
    /// Where it goes.
    pub output: PathBuf,
}

/// Images carry no identity: the same one lies on every machine.
const UUID: &str = "6b617461-0000-4000-8000-000000000000";

/// Makes a root image for `kernel`, to be given as a virtio-blk disk. The same input makes the same bytes.
///
/// # Errors
/// When the kernel couldn't mount it for lack of a built-in driver, and as for an initrd; when the tool is missing or
/// fails.
pub fn build_image(options: &ImageOptions, kernel: &Kernel, progress: &mut Progress<'_>) -> Result<Built> {
    let drivers = ["virtio_pci", "virtio_blk", options.file_system.name()];
    if let Some(module) = kernel.not_builtin(&drivers) {
        return Err(Error::ImageNotBootable { release: kernel.release().to_owned(), module: module.to_owned() });
    }
    step(progress, format!("Collecting agent and modules for kernel {}", kernel.release()));
    let (tree, modules) = root::tree(&options.root, kernel)?;
    let epoch = root::epoch()?;

    let work = tempfile::tempdir().map_err(Error::file("make", std::env::temp_dir()))?;
    let staging = work.path().join("root");
    let image = work.path().join("image");
    fs::create_dir(&staging).map_err(Error::file("make", &staging))?;
    tree.write_directory(&staging, epoch).map_err(Error::file("fill", &staging))?;
    step(progress, format!("Making the {} image", options.file_system));
    match options.file_system {
        FileSystem::Erofs => erofs(&staging, &image, epoch)?,
        FileSystem::Ext4 => ext4(&tree, &staging, &image, epoch)?,
    }
    let data = fs::read(&image).map_err(Error::file("read", &image))?;
    root::write_atomically(&options.output, &data)?;
    Ok(Built::new(&options.output, &data, modules))
}

fn erofs(staging: &Path, image: &Path, epoch: u32) -> Result<()> {
    let mut command = Command::new("mkfs.erofs");
    command.args(["--quiet", "--all-root", "-U", UUID, &format!("-T{epoch}")]).arg(image).arg(staging);
    run(&mut command, "erofs-utils")
}

fn ext4(tree: &Tree, staging: &Path, image: &Path, epoch: u32) -> Result<()> {
    const BLOCK: u64 = 4096;
    let mut blocks = 0;
    let mut inodes = 0;
    for path in tree.paths() {
        let path = staging.join(path);
        let metadata = path.symlink_metadata().map_err(Error::file("read", &path))?;
        blocks += metadata.len().div_ceil(BLOCK) + 1;
        inodes += 1;
    }
    // Room for the tables: 256 bytes an inode, some blocks of the file system's own, a sixteenth for extents.
    let blocks = blocks + blocks / 16 + inodes / 16 + 128;
    // E2FSPROGS_FAKE_TIME=0 would mean the time of day.
    let now = epoch.max(1).to_string();

    let mut command = Command::new("mke2fs");
    command
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-m", "0", "-U", UUID])
        .args(["-N", &(inodes + 32).to_string(), "-O", "^has_journal,^resize_inode"])
        .args(["-E", &format!("hash_seed={UUID},root_owner=0:0,lazy_itable_init=0,nodiscard")])
        .arg("-d")
        .args([staging, image])
        .arg(blocks.to_string())
        .env("E2FSPROGS_FAKE_TIME", &now);
    run(&mut command, "e2fsprogs")?;

    // mke2fs copies owner and times of change from the staging directory; both are the builder's.
    let mut script = String::new();
    for path in std::iter::once("").chain(tree.paths()) {
        for field in ["uid 0", "gid 0"]
            .map(str::to_owned)
            .into_iter()
            .chain(["atime", "ctime", "mtime", "crtime"].map(|field| format!("{field} @{epoch}")))
            .chain(["atime_extra", "ctime_extra", "mtime_extra", "crtime_extra"].map(|field| format!("{field} 0")))
        {
            let _ = writeln!(script, "set_inode_field \"/{path}\" {field}");
        }
    }
    let commands = staging.with_file_name("commands");
    fs::write(&commands, script).map_err(Error::file("write", &commands))?;
    let mut command = Command::new("debugfs");
    command.args(["-w", "-f"]).args([&commands, image]).env("E2FSPROGS_FAKE_TIME", &now);
    run(&mut command, "e2fsprogs")
}

/// Runs a tool that is silent when all is well; `package` has it.
fn run(command: &mut Command, package: &'static str) -> Result<()> {
    // The tools of file systems lie where an ordinary user's PATH doesn't lead.
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    let line: Vec<_> =
        std::iter::once(command.get_program()).chain(command.get_args()).map(|word| word.to_string_lossy()).collect();
    let line = line.join(" ");
    let tool = command.get_program().to_string_lossy().into_owned();
    let output = command.env("PATH", path).env("LC_ALL", "C").stdin(Stdio::null()).output().map_err(|error| {
        if error.kind() == io::ErrorKind::NotFound {
            Error::ToolMissing { tools: tool.clone(), packages: package.into() }
        } else {
            Error::File { action: "run", path: tool.into(), source: error }
        }
    })?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    Err(Error::Tool { command: line, status: output.status.to_string(), output: text })
}
