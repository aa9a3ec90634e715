//! Finding, reading and merging the files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use crate::error::{ConfigError, Fault, Origin, Problem};
use crate::value::Value;
use crate::{keys, nearest, upstream};

/// The environment variable that names a file; first of all places.
pub(crate) const ENVIRONMENT: &str = "KATA_CONF_FILE";

/// Where files are looked for, in order, below the root directory.
const PLACES: &[&str] = &[
    "etc/kata-containers/configuration.toml",
    "etc/kata-containers/runtime-rs/configuration.toml",
    "usr/share/defaults/kata-containers/configuration.toml",
    "usr/share/defaults/kata-containers/runtime-rs/configuration.toml",
    "opt/kata/share/defaults/kata-containers/configuration.toml",
    "opt/kata/share/defaults/kata-containers/runtime-rs/configuration.toml",
];

/// The directory of drop-ins beside a file.
const DROP_INS: &str = "config.d";

/// A file larger than this is no configuration.
const LARGEST: u64 = 1 << 20;

/// What the files say: full key names, each with the last value and where it stands.
pub(crate) type Entries = BTreeMap<String, (Value, Origin)>;

/// The file to read, if there is any: its drop-ins are beside it. It may be missing where only drop-ins are.
pub(crate) fn place(named: Option<PathBuf>, root: &Path) -> Option<PathBuf> {
    named.or_else(|| {
        PLACES
            .iter()
            .map(|place| root.join(place))
            .find(|file| file.exists() || file.parent().is_some_and(|dir| dir.join(DROP_INS).is_dir()))
    })
}

/// Reads a file and its drop-ins.
///
/// `must_exist` is for a file that somebody named.
pub(crate) fn read(
    file: &Path,
    must_exist: bool,
    problems: &mut Vec<Problem>,
) -> Result<(Entries, Vec<PathBuf>), ConfigError> {
    let mut entries = Entries::new();
    let mut sources = Vec::new();
    match text(file) {
        Ok(text) => {
            let at = |line| Origin::File { path: file.to_owned(), line };
            parse(&text, at, &mut entries, problems);
            sources.push(file.to_owned());
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound && !must_exist => {}
        Err(error) => return Err(ConfigError::read(file, error)),
    }
    for drop_in in drop_ins(file)? {
        let text = text(&drop_in).map_err(|error| ConfigError::read(&drop_in, error))?;
        let at = |line| Origin::DropIn { path: drop_in.clone(), line };
        parse(&text, at, &mut entries, problems);
        sources.push(drop_in);
    }
    Ok((entries, sources))
}

fn text(path: &Path) -> io::Result<String> {
    let size = fs::metadata(path)?.len();
    if size > LARGEST {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("{size} bytes are no configuration")));
    }
    fs::read_to_string(path)
}

/// The drop-ins beside a file, in the order of their names.
fn drop_ins(file: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let Some(dir) = file.parent().map(|dir| dir.join(DROP_INS)) else { return Ok(Vec::new()) };
    let list = match fs::read_dir(&dir) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(ConfigError::read(&dir, error)),
    };
    let mut files = BTreeSet::new();
    for entry in list {
        let path = entry.map_err(|error| ConfigError::read(&dir, error))?.path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            files.insert(path);
        }
    }
    Ok(files.into_iter().collect())
}

/// Adds a file's keys to the entries; a later file's value replaces an earlier one's.
pub(crate) fn parse(text: &str, at: impl Fn(usize) -> Origin, entries: &mut Entries, problems: &mut Vec<Problem>) {
    let line = |offset: usize| 1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count();
    let (table, errors) = DeTable::parse_recoverable(text);
    for error in &errors {
        let origin = at(line(error.span().map_or(0, |span| span.start)));
        let fault = Fault::Syntax(error.message().to_owned());
        problems.push(Problem { origin, key: String::new(), fault });
    }
    // A file that is no TOML has no keys to speak of.
    if errors.is_empty() {
        flatten("", table.get_ref(), &mut |key, value, offset| {
            entries.insert(key, (value, at(line(offset))));
        });
    }
}

/// Walks the tables; what is no table, or is a table where a key wants a value, is an entry.
fn flatten(section: &str, table: &DeTable<'_>, add: &mut impl FnMut(String, Value, usize)) {
    for (name, value) in table {
        let name_text = name.get_ref();
        let path = if section.is_empty() { name_text.to_string() } else { format!("{section}.{name_text}") };
        match value.get_ref() {
            DeValue::Table(inner) if keys::find(&path).is_none() => flatten(&path, inner, add),
            other => add(path, Value::from(other), name.span().start),
        }
    }
}

/// Sorts out the entries: those of ours by key, a problem for each that cannot be served.
pub(crate) fn sort(entries: Entries, problems: &mut Vec<Problem>) -> Vec<(&'static keys::Key, Value, Origin)> {
    let mut ours = Vec::new();
    let mut foreign = BTreeSet::new();
    for (path, (value, origin)) in entries {
        if let Some(key) = keys::find(&path) {
            ours.push((key, value, origin));
        } else if let Some(key) = upstream::find(&path) {
            if !key.asks_nothing(&value) {
                let fault = Fault::Unsupported { accepted: key.accepted(), hint: key.hint.to_owned() };
                problems.push(Problem { origin, key: path, fault });
            }
        } else if let Some(section) = other_hypervisor(&path) {
            // Once for the section, and not for each of its keys.
            if foreign.insert(section.to_owned()) {
                let hint = "; use [hypervisor.qemu]".to_owned();
                let fault = Fault::Unsupported { accepted: "no such section".to_owned(), hint };
                problems.push(Problem { origin, key: section.to_owned(), fault });
            }
        } else {
            let fault = Fault::Unknown { nearest: nearest(&path) };
            problems.push(Problem { origin, key: path, fault });
        }
    }
    ours
}

/// The section of a VMM that upstream drives and we don't.
fn other_hypervisor(path: &str) -> Option<&str> {
    let rest = path.strip_prefix("hypervisor.")?;
    let (name, _) = rest.split_once('.')?;
    upstream::HYPERVISORS.contains(&name).then(|| &path[.."hypervisor.".len() + name.len()])
}
