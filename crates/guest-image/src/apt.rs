//! Getting packages of the distribution as an ordinary user: `apt-cache show` and `apt-get download`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::progress::{Progress, step};
use crate::{Error, Result};

/// What apt knows about the candidate version of a package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: String,
    /// What it depends on; of alternatives the first.
    pub(crate) depends: Vec<String>,
    /// What `apt-get download` will call the file.
    file: String,
    size: u64,
}

/// Asks apt for a package; `None` if it has no such name.
pub(crate) fn show(name: &str) -> Result<Option<Package>> {
    let mut command = Command::new("apt-cache");
    // The exit status says nothing: it is the same for an unknown name and for unreadable lists.
    command.args(["show", "--no-all-versions", "--", name]);
    let output = spawn(&mut command)?;
    Ok(parse(&String::from_utf8_lossy(&output.stdout)))
}

fn parse(stanza: &str) -> Option<Package> {
    let field = |key: &str| stanza.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(": "));
    let depends = [field("Pre-Depends"), field("Depends")].into_iter().flatten().flat_map(|list| list.split(','));
    let depends = depends.filter_map(|entry| entry.split('|').next()?.split_whitespace().next());
    let name = field("Package")?;
    // The colon of an epoch can't be in a file name on every system.
    let version = field("Version")?.replace(':', "%3a");
    Some(Package {
        name: name.to_owned(),
        // Architecture qualifiers don't matter here.
        depends: depends.map(|name| name.split(':').next().unwrap_or(name).to_owned()).collect(),
        file: format!("{name}_{version}_{}.deb", field("Architecture")?),
        size: field("Size")?.parse().ok()?,
    })
}

/// Downloads a package into `cache` unless it is there; returns its path.
pub(crate) fn download(package: &Package, cache: &Path, progress: &mut Progress<'_>) -> Result<PathBuf> {
    fs::create_dir_all(cache).map_err(Error::file("make", cache))?;
    let path = cache.join(&package.file);
    // apt checks the hash when it downloads, and moves the file to this name only then.
    if fs::metadata(&path).is_ok_and(|metadata| metadata.len() == package.size) {
        return Ok(path);
    }
    step(progress, format!("Downloading {} ({} MB)", package.file, package.size.div_ceil(1_000_000)));
    let mut command = Command::new("apt-get");
    // As root, apt would drop to a user that can't write here, and warn about it.
    command.args(["download", "--quiet=2", "-o", "APT::Sandbox::User=", "--", &package.name]).current_dir(cache);
    run(&mut command)?;
    fs::metadata(&path).map_err(Error::file("find the downloaded", &path))?;
    Ok(path)
}

fn run(command: &mut Command) -> Result<()> {
    let output = spawn(command)?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    Err(Error::Tool { command: command_line(command), status: output.status.to_string(), output: text })
}

fn spawn(command: &mut Command) -> Result<Output> {
    command.env("LC_ALL", "C").stdin(Stdio::null()).output().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::ToolMissing { tools: "apt".into(), packages: "apt".into() },
        _ => Error::File { action: "run", path: PathBuf::from(command.get_program()), source: error },
    })
}

fn command_line(command: &Command) -> String {
    let words = command.get_args().map(|word| word.to_string_lossy());
    std::iter::once(command.get_program().to_string_lossy()).chain(words).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_of_apt_is_read() {
        let stanza = "Package: a\nVersion: 1:6.1-2\nArchitecture: amd64\nPre-Depends: z:any\n\
                      Depends: linux-image-6.1.0 (= 6.1), kmod, dracut | initramfs-tools\nSize: 42\n";
        let package = parse(stanza).unwrap();
        assert_eq!(package.depends, ["z", "linux-image-6.1.0", "kmod", "dracut"]);
        assert_eq!((package.file.as_str(), package.size), ("a_1%3a6.1-2_amd64.deb", 42));
        assert_eq!(parse(""), None);
    }
}
