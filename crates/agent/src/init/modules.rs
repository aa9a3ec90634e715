//! Loads kernel modules: those listed in the guest image, in its order, and those a sandbox asks for.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

/// Why a module could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The list is there but cannot be read.
    #[error("Cannot read the module list {path}")]
    List {
        /// The list.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A module file cannot be opened.
    #[error("Cannot open the kernel module {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel refuses the module.
    #[error("The kernel refuses the module {path}; is it built for this kernel?")]
    Load {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No module of that name is in the guest image.
    #[error("The guest image has no kernel module named {name}; add it to the image's module list")]
    Unknown {
        /// The name asked for.
        name: String,
    },
    /// A parameter contains a zero byte.
    #[error("The parameters of the kernel module {name} contain a zero byte")]
    Parameters {
        /// The module.
        name: String,
    },
}

/// Loads every module of the list; a missing list means that the kernel has everything built in.
///
/// One module that fails does not keep the others out: all failures are returned.
pub fn load_list(list: &Path) -> Vec<Error> {
    let text = match fs::read_to_string(list) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(source) => return vec![Error::List { path: list.to_owned(), source }],
    };
    entries(&text).filter_map(|path| load(Path::new(path), c"").err()).collect()
}

/// The paths of a list: one a line, `#` begins a comment.
fn entries(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// Loads a module by name, with parameters, out of the modules that the image lists or has under `/lib/modules`.
///
/// # Errors
///
/// [`Error::Unknown`] when the image has no such module.
pub fn load_by_name(name: &str, parameters: &[String]) -> Result<(), Error> {
    let normal = |name: &str| name.replace('-', "_");
    if Path::new("/sys/module").join(normal(name)).exists() {
        return Ok(());
    }
    let parameters = CString::new(parameters.join(" ")).map_err(|_| Error::Parameters { name: name.to_owned() })?;
    let wanted = normal(name);
    let path = find(Path::new("/lib/modules"), &|path| {
        let file = path.file_name().and_then(|file| file.to_str()).unwrap_or_default();
        file.strip_suffix(".ko").is_some_and(|stem| normal(stem) == wanted)
    })
    .ok_or_else(|| Error::Unknown { name: name.to_owned() })?;
    load(&path, &parameters)
}

/// The first file below `root` that `wanted` accepts.
fn find(root: &Path, wanted: &dyn Fn(&Path) -> bool) -> Option<PathBuf> {
    for entry in fs::read_dir(root).ok()?.flatten() {
        let path = entry.path();
        let found = match entry.file_type() {
            Ok(kind) if kind.is_dir() => find(&path, wanted),
            Ok(kind) if kind.is_file() && wanted(&path) => Some(path),
            _ => None,
        };
        if found.is_some() {
            return found;
        }
    }
    None
}

fn load(path: &Path, parameters: &std::ffi::CStr) -> Result<(), Error> {
    let file = File::open(path).map_err(|source| Error::Open { path: path.to_owned(), source })?;
    match rustix::system::finit_module(&file, parameters, 0) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(Error::Load { path: path.to_owned(), source: error.into() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_list_is_a_kernel_with_everything_built_in() {
        assert!(load_list(Path::new("/nonexistent/kata.list")).is_empty());
    }

    #[test]
    fn comments_and_blank_lines_are_no_modules() {
        assert_eq!(entries("# head\n\n /a.ko \n/b.ko\n").collect::<Vec<_>>(), ["/a.ko", "/b.ko"]);
    }

    #[test]
    fn each_module_that_fails_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let list = directory.path().join("list");
        fs::write(&list, "/nonexistent/a.ko\n/nonexistent/b.ko\n").unwrap();
        let failures: Vec<String> = load_list(&list).iter().map(ToString::to_string).collect();
        assert_eq!(failures.len(), 2);
        assert!(failures[1].contains("/nonexistent/b.ko"), "{failures:?}");
    }
}
