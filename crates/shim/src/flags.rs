//! The command line that containerd calls a shim with: Go's `flag` style, one dash, value apart or after `=`.

use std::ffi::OsString;
use std::path::PathBuf;

/// What a shim is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Action {
    /// Serve the Task service on a socket that `start` opened.
    #[default]
    Serve,
    /// Leave a server behind and print where it listens.
    Start,
    /// Remove what a dead server left.
    Delete,
    /// Describe the runtime.
    Info,
    /// Print the version.
    Version,
    /// Print the flags.
    Help,
}

/// The parsed command line.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Flags {
    /// What to do.
    pub(crate) action: Action,
    /// The engine's namespace of the container (`-namespace`).
    pub(crate) namespace: String,
    /// The container's id (`-id`).
    pub(crate) id: String,
    /// The engine's gRPC address (`-address`).
    pub(crate) address: String,
    /// The engine's binary (`-publish-binary`); events go over ttrpc, so it is only handed on.
    pub(crate) publish_binary: String,
    /// The bundle (`-bundle`); the working directory where it is not given.
    pub(crate) bundle: Option<PathBuf>,
    /// Log at level debug (`-debug`).
    pub(crate) debug: bool,
}

/// Why a command line was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum FlagError {
    /// No such flag.
    #[error("Flag -{0} is not known; see -help")]
    Unknown(String),
    /// A flag without its value.
    #[error("Flag -{0} needs a value")]
    NoValue(String),
    /// A switch with a value that is no boolean.
    #[error("Flag -{name}={value} must be true or false")]
    NotBoolean {
        /// The flag.
        name: String,
        /// What was given.
        value: String,
    },
    /// No such action.
    #[error("Action {0:?} is not known; it is start, delete, or none to serve")]
    UnknownAction(String),
    /// Text that is not UTF-8 where an identifier or a path is expected.
    #[error("Argument {0:?} is not UTF-8")]
    NotUtf8(OsString),
}

/// The text of `-help`.
pub(crate) const USAGE: &str = "\
containerd-shim-kata-v2: containerd's shim for containers in virtual machines

containerd calls this program; runtime type io.containerd.kata.v2.

  containerd-shim-kata-v2 [flags] start     leave a server behind, print its address
  containerd-shim-kata-v2 [flags] delete    remove what a dead server left
  containerd-shim-kata-v2 -info             describe the runtime (options on stdin)

  -namespace NAME        the engine's namespace of the container
  -id ID                 the container's id
  -address PATH          the engine's gRPC socket
  -publish-binary PATH   the engine's binary
  -bundle DIR            the bundle, where it is not the working directory
  -debug                 log at level debug
  -v, -version           print the version
  -h, -help              print this
";

/// Parses `args`, the program's name left out.
pub(crate) fn parse(args: &[OsString]) -> Result<Flags, FlagError> {
    let mut flags = Flags::default();
    let mut wanted = None;
    let mut words = args.iter();
    let mut rest = Vec::new();
    while let Some(word) = words.next() {
        let word = word.to_str().ok_or_else(|| FlagError::NotUtf8(word.clone()))?;
        let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')).filter(|f| !f.is_empty()) else {
            if word != "--" {
                rest.push(word);
            }
            // Go's parser ends at the first word that is no flag.
            for word in words.by_ref() {
                rest.push(word.to_str().ok_or_else(|| FlagError::NotUtf8(word.clone()))?);
            }
            break;
        };
        let (name, inline) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (flag, None),
        };
        let switch = || match inline {
            None => Ok(true),
            Some("true" | "1" | "t" | "T" | "TRUE" | "True") => Ok(true),
            Some("false" | "0" | "f" | "F" | "FALSE" | "False") => Ok(false),
            Some(value) => Err(FlagError::NotBoolean { name: name.into(), value: value.into() }),
        };
        let mut value = || match inline {
            Some(value) => Ok(value.to_owned()),
            None => {
                let word = words.next().ok_or_else(|| FlagError::NoValue(name.into()))?;
                word.to_str().map(str::to_owned).ok_or_else(|| FlagError::NotUtf8(word.clone()))
            }
        };
        match name {
            "namespace" => flags.namespace = value()?,
            "id" => flags.id = value()?,
            "address" => flags.address = value()?,
            "publish-binary" => flags.publish_binary = value()?,
            "bundle" => flags.bundle = Some(value()?).filter(|b| !b.is_empty()).map(PathBuf::from),
            // Where `start` would listen: it is derived from the other flags, and served from an open descriptor.
            "socket" | "debug-socket" => drop(value()?),
            "debug" => flags.debug = switch()?,
            "info" if switch()? => wanted = Some(Action::Info),
            "v" | "version" if switch()? => wanted = Some(Action::Version),
            "h" | "help" if switch()? => wanted = Some(Action::Help),
            "info" | "v" | "version" | "h" | "help" => {}
            other => return Err(FlagError::Unknown(other.into())),
        }
    }
    flags.action = match (wanted, rest.first().copied()) {
        (Some(action), _) => action,
        (None, None | Some("")) => Action::Serve,
        (None, Some("start")) => Action::Start,
        (None, Some("delete")) => Action::Delete,
        (None, Some(other)) => return Err(FlagError::UnknownAction(other.into())),
    };
    Ok(flags)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse_words(words: &[&str]) -> Result<Flags, FlagError> {
        parse(&words.iter().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn containerd_1_6_start() {
        let flags = parse_words(&[
            "-namespace",
            "k8s.io",
            "-address",
            "/run/containerd/containerd.sock",
            "-publish-binary",
            "/usr/bin/containerd",
            "-id",
            "abc",
            "-debug",
            "start",
        ])
        .unwrap();
        assert_eq!(flags.action, Action::Start);
        assert_eq!(flags.namespace, "k8s.io");
        assert_eq!(flags.address, "/run/containerd/containerd.sock");
        assert_eq!(flags.publish_binary, "/usr/bin/containerd");
        assert_eq!(flags.id, "abc");
        assert!(flags.debug);
        assert_eq!(flags.bundle, None);
    }

    #[test]
    fn delete_with_a_bundle_and_the_other_spellings() {
        let flags = parse_words(&["--id=x", "-bundle=/b", "-debug=false", "delete"]).unwrap();
        assert_eq!((flags.action, flags.id.as_str(), flags.debug), (Action::Delete, "x", false));
        assert_eq!(flags.bundle, Some(PathBuf::from("/b")));
    }

    #[test]
    fn questions() {
        assert_eq!(parse_words(&["-info"]).unwrap().action, Action::Info);
        assert_eq!(parse_words(&["-v"]).unwrap().action, Action::Version);
        assert_eq!(parse_words(&["--version"]).unwrap().action, Action::Version);
        assert_eq!(parse_words(&["-h"]).unwrap().action, Action::Help);
        assert_eq!(parse_words(&[]).unwrap().action, Action::Serve);
        assert_eq!(parse_words(&["-id", "x"]).unwrap().action, Action::Serve);
    }

    #[test]
    fn mistakes_are_named() {
        assert_eq!(parse_words(&["-nope"]), Err(FlagError::Unknown("nope".into())));
        assert_eq!(parse_words(&["-id"]), Err(FlagError::NoValue("id".into())));
        assert_eq!(parse_words(&["stop"]), Err(FlagError::UnknownAction("stop".into())));
        assert!(matches!(parse_words(&["-debug=maybe"]), Err(FlagError::NotBoolean { .. })));
    }

    proptest! {
        #[test]
        fn never_panics(words in prop::collection::vec("[-=a-z/ ]{0,8}", 0..8)) {
            let _ = parse(&words.iter().map(OsString::from).collect::<Vec<_>>());
        }
    }
}
