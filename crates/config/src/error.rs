//! What can be wrong with a configuration, and where.

use std::fmt;
use std::path::{Path, PathBuf};

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// Nothing was asked: the built-in value.
    Default,
    /// The configuration file.
    File {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// A file in `config.d/` beside the configuration file.
    DropIn {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// An annotation of the pod, by its full name.
    Annotation(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File { path, line } => write!(f, "{}:{line}", path.display()),
            Origin::DropIn { path, line } => write!(f, "drop-in {}:{line}", path.display()),
            Origin::Annotation(name) => write!(f, "annotation {name}"),
        }
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    /// Where it stands.
    pub origin: Origin,
    /// The key it is about, empty where the file cannot be read as TOML.
    pub key: String,
    /// What is wrong.
    pub fault: Fault,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.origin, self.key.as_str()) {
            (Origin::Annotation(name), _) => write!(f, "{name}: {}", self.fault),
            (Origin::Default, key) => write!(f, "{key}: {}", self.fault),
            (origin, "") => write!(f, "{origin}: {}", self.fault),
            (origin, key) => write!(f, "{origin}: {key}: {}", self.fault),
        }
    }
}

/// What is wrong with a key or its value.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Fault {
    /// Nobody knows this key.
    #[error("unknown key; the nearest known one is `{nearest}`")]
    Unknown {
        /// The known key that looks most like it.
        nearest: String,
    },
    /// Upstream Kata Containers has this key; this release can't do what the value asks for.
    #[error("known upstream, not supported yet by this release; remove it or write {accepted}{hint}")]
    Unsupported {
        /// The values that ask for nothing.
        accepted: String,
        /// What to use instead, with a leading `; `, or nothing.
        hint: String,
    },
    /// The value has the wrong type or is out of range.
    #[error("{value} is not {wanted}")]
    Value {
        /// The value as written.
        value: String,
        /// What the key takes.
        wanted: String,
    },
    /// The value doesn't go with another key's.
    #[error("{0}")]
    Conflict(String),
    /// The file is not TOML.
    #[error("not TOML: {0}")]
    Syntax(String),
    /// The operator doesn't let pods set this.
    #[error(
        "pods may not set this: `enable_annotations` in the host's configuration lists what they may, and \"{0}\" is not in it"
    )]
    NotEnabled(String),
    /// No pod can be let set this.
    #[error("pods can never set this; set `{0}` in the host's configuration file")]
    Never(String),
    /// The annotation names a host path outside what the operator allows.
    #[error("{path} is outside the paths that `{list}` in the host's configuration allows")]
    Outside {
        /// The path asked for.
        path: String,
        /// The key that lists what is allowed.
        list: &'static str,
    },
    /// A kernel parameter that a pod could misuse.
    #[error("the kernel parameter `{0}` is not one that a pod may set")]
    KernelParameter(String),
}

/// The configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file that was named, or found, can't be read.
    #[error("Cannot read the configuration file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Where the program is installed cannot be told.
    #[error("Cannot find the directory this program is installed in")]
    Prefix(#[source] std::io::Error),
    /// Keys or values are wrong: all of them, not the first.
    #[error("{}", listed(.0))]
    Problems(Vec<Problem>),
    /// `kata config explain` was asked for a key nobody knows.
    #[error("No key is called `{key}`; the nearest is `{nearest}`")]
    NoSuchKey {
        /// What was asked for.
        key: String,
        /// What was perhaps meant.
        nearest: String,
    },
}

impl ConfigError {
    pub(crate) fn read(path: &Path, source: std::io::Error) -> Self {
        ConfigError::Read { path: path.to_owned(), source }
    }
}

fn listed(problems: &[Problem]) -> String {
    match problems {
        [one] => format!("The configuration has a problem: {one}"),
        many => many.iter().fold(format!("The configuration has {} problems:", many.len()), |text, problem| {
            format!("{text}\n  {problem}")
        }),
    }
}
