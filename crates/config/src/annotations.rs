//! What a pod may change, by annotations `io.katacontainers.config.*`.
//!
//! Whoever may create a pod may write them, so they are the attacker's words: nothing is taken that the operator didn't
//! list, no annotation names a configuration file, a program or a file outside what the operator allows, and there is no
//! way to put words of one's own into another program's arguments or into the agent's part of the kernel command line.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use crate::error::{ConfigError, Fault, Origin, Problem};
use crate::keys::{self, Annotation, Key};
use crate::value::Value;
use crate::{Config, nearest, upstream};

/// What annotations about the configuration begin with.
const PREFIX: &str = "io.katacontainers.config.";

/// The annotation with which upstream once let pods name a configuration file.
const CONFIG_PATH: &str = "io.katacontainers.config_path";

/// Kernel parameters that a pod may set: how its own guest schedules and accounts. None reaches the agent, chooses what
/// runs, opens a console or turns a protection off.
const KERNEL_PARAMS: &[&str] = &[
    "cgroup_disable",
    "cgroup_enable",
    "cgroup_no_v1",
    "default_hugepagesz",
    "hugepages",
    "hugepagesz",
    "ipv6.disable",
    "isolcpus",
    "loglevel",
    "nohz_full",
    "psi",
    "quiet",
    "rcu_nocbs",
    "swapaccount",
    "systemd.unified_cgroup_hierarchy",
    "transparent_hugepage",
];

impl Config {
    /// This configuration with what a pod's annotations ask for. Annotations about other things are left alone.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Problems`] with every annotation that isn't known, allowed or valid; nothing is applied then.
    pub fn with_annotations(&self, annotations: &HashMap<String, String>) -> Result<Config, ConfigError> {
        let mut config = self.clone();
        let mut problems = Vec::new();
        // In the order of their names, so that errors come out the same each time.
        for (name, text) in annotations.iter().collect::<BTreeMap<_, _>>() {
            let origin = Origin::Annotation(name.clone());
            if let Err(fault) = config.annotate(self, name, text, &origin) {
                problems.push(Problem { origin, key: String::new(), fault });
            }
        }
        config.check(&mut problems);
        if problems.is_empty() { Ok(config) } else { Err(ConfigError::Problems(problems)) }
    }

    /// Applies one annotation. `host` is the configuration without any: what it allows is not for pods to change.
    fn annotate(&mut self, host: &Config, name: &str, text: &str, origin: &Origin) -> Result<(), Fault> {
        if name == CONFIG_PATH {
            return Err(Fault::Never("KATA_CONF_FILE".to_owned()));
        }
        let Some(rest) = name.strip_prefix(PREFIX) else { return Ok(()) };
        let path = key_path(rest);
        let Some(key) = keys::find(&path) else {
            return match upstream::find(&path) {
                Some(upstream) if upstream.asks_nothing(&plain(text)) => Ok(()),
                Some(upstream) => {
                    Err(Fault::Unsupported { accepted: upstream.accepted(), hint: upstream.hint.to_owned() })
                }
                None => Err(Fault::Unknown { nearest: nearest(&path) }),
            };
        };
        if key.annotation == Annotation::Never {
            return Err(Fault::Never(key.path.to_owned()));
        }
        if !host.enables(key) {
            return Err(Fault::NotEnabled(key.name().to_owned()));
        }
        let value = (key.parse)(text);
        match key.annotation {
            Annotation::Path(list) => host.allows(list, text)?,
            Annotation::KernelParams => kernel_params(text)?,
            Annotation::Allowed | Annotation::Never => {}
        }
        // The operator's words stay; the pod's come after them.
        let value = match (key.annotation, (key.get)(host)) {
            (Annotation::KernelParams, Value::Text(ours)) if !ours.is_empty() => Value::Text(format!("{ours} {text}")),
            _ => value,
        };
        self.apply(key, &value, origin.clone())
    }

    /// Whether the operator lets pods set this key.
    fn enables(&self, key: &Key) -> bool {
        self.hypervisor.enable_annotations.iter().any(|pattern| {
            // Validated when the file was read.
            whole(pattern).is_ok_and(|pattern| pattern.is_match(key.name()) || pattern.is_match(annotation_name(key)))
        })
    }

    /// Whether a path is among the globs, as it is written and as it resolves.
    fn allows(&self, list: &'static str, text: &str) -> Result<(), Fault> {
        let globs = match list {
            "valid_hypervisor_paths" => &self.hypervisor.valid_hypervisor_paths,
            _ => &self.hypervisor.valid_boot_paths,
        };
        let options = glob::MatchOptions { require_literal_separator: true, ..Default::default() };
        let allowed = |path: &Path| {
            path.is_absolute()
                && path.components().all(|part| part != std::path::Component::ParentDir)
                && globs
                    .iter()
                    .filter_map(|glob| glob::Pattern::new(glob).ok())
                    .any(|glob| glob.matches_path_with(path, options))
        };
        let path = Path::new(text);
        // A symlink inside must not lead outside. One that doesn't exist fails when it is opened.
        let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        if allowed(path) && allowed(&real) { Ok(()) } else { Err(Fault::Outside { path: text.to_owned(), list }) }
    }
}

/// A pattern of `enable_annotations`, which must match a whole name.
pub(crate) fn whole(pattern: &str) -> Result<regex_lite::Regex, regex_lite::Error> {
    regex_lite::Regex::new(&format!("^(?:{pattern})$"))
}

/// The full name of the key that an annotation is about: upstream spells a few otherwise.
fn key_path(rest: &str) -> String {
    match rest.split_once('.') {
        Some(("hypervisor", "default_max_vcpus")) => "hypervisor.qemu.default_maxvcpus".to_owned(),
        Some(("hypervisor", name)) => format!("hypervisor.qemu.{name}"),
        Some(("runtime", "create_container_timeout")) => "agent.kata.create_container_timeout".to_owned(),
        Some(("agent", name)) => format!("agent.kata.{name}"),
        _ => rest.to_owned(),
    }
}

/// The last part of a key's annotation, where it isn't the key's own name.
fn annotation_name(key: &Key) -> &'static str {
    if key.name() == "default_maxvcpus" { "default_max_vcpus" } else { key.name() }
}

/// A text as the value it looks like, to compare with what upstream's keys take.
fn plain(text: &str) -> Value {
    text.parse()
        .map(Value::Bool)
        .or_else(|_| text.parse().map(Value::Int))
        .or_else(|_| text.parse().map(Value::Float))
        .unwrap_or_else(|_| Value::Text(text.to_owned()))
}

fn kernel_params(text: &str) -> Result<(), Fault> {
    for word in text.split_whitespace() {
        let name = word.split_once('=').map_or(word, |(name, _)| name);
        // Quotes let a value contain spaces, and so a word be another one than it looks.
        let clean = word.chars().all(|c| c.is_ascii_graphic() && c != '"' && c != '\'');
        if !clean || !KERNEL_PARAMS.contains(&name) {
            return Err(Fault::KernelParameter(word.to_owned()));
        }
    }
    Ok(())
}
