//! What an operator may set: one typed, documented, validated value with the origin of each key.
//!
//! ```text
//!   built-in defaults ──▶ configuration.toml ──▶ config.d/*.toml ──▶ a pod's annotations
//!   (from the prefix)     (first place that       (alphabetical)      (those that the
//!                          has one)                                    operator lists)
//! ```
//!
//! With no file at all everything works. A key that isn't known, or can't be served, is an error: all of them at once.
//! One table (`keys`) drives the types, parsing, documentation and what is shown.

mod annotations;
mod error;
mod keys;
mod load;
mod setting;
mod upstream;
mod value;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub use error::{ConfigError, Fault, Origin, Problem};
pub use keys::{
    Accelerator, Agent, AgentName, ControlChannel, Hypervisor, HypervisorName, LogLevel, MachineType, RootfsType,
    Runtime, SharedFs, VirtioFsCache,
};
pub use value::Value;

/// The configuration of one sandbox.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The machine and its VMM.
    pub hypervisor: Hypervisor,
    /// The agent in the guest.
    pub agent: Agent,
    /// The host side.
    pub runtime: Runtime,
    prefix: PathBuf,
    sources: Vec<PathBuf>,
    origins: BTreeMap<&'static str, Origin>,
}

/// One key as `kata config show` has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Shown {
    /// The full name: `hypervisor.qemu.kernel`.
    pub key: &'static str,
    /// Its value.
    pub value: Value,
    /// Where the value comes from.
    pub origin: Origin,
}

/// One key as `kata config explain` has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Explanation {
    /// The full name: `hypervisor.qemu.kernel`.
    pub key: &'static str,
    /// What it is for.
    pub doc: String,
    /// What values it takes.
    pub values: String,
    /// The value when nothing is asked.
    pub default: Value,
    /// The value now, and where it comes from.
    pub current: Shown,
    /// The annotation by which a pod may set it once `enable_annotations` lists it, if any.
    pub annotation: Option<String>,
}

/// What the guest boots its first process from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Root {
    /// An initial RAM file system.
    Initrd(PathBuf),
    /// A read-only image of a file system.
    Image(PathBuf, RootfsType),
}

impl Config {
    /// Loads the configuration of this host: the file that `KATA_CONF_FILE` names, else `explicit`, else the first of
    /// the usual places, else none; with the drop-ins beside it.
    ///
    /// # Errors
    ///
    /// A file that was named is missing, one can't be read, or something in them is wrong.
    pub fn load(explicit: Option<&Path>) -> Result<Config, ConfigError> {
        let named = std::env::var_os(load::ENVIRONMENT)
            .filter(|name| !name.is_empty())
            .map(PathBuf::from)
            .or_else(|| explicit.map(Path::to_owned));
        Config::load_from(named, Path::new("/"), &installed_prefix()?)
    }

    /// Loads `named`, or the first file in the usual places below `root`, for a program installed under `prefix`.
    ///
    /// # Errors
    ///
    /// As [`Config::load`].
    pub fn load_from(named: Option<PathBuf>, root: &Path, prefix: &Path) -> Result<Config, ConfigError> {
        let mut config = Config::defaults(prefix);
        let must_exist = named.is_some();
        let Some(file) = load::place(named, root) else { return Ok(config) };
        let mut problems = Vec::new();
        let (entries, sources) = load::read(&file, must_exist, &mut problems)?;
        config.sources = sources;
        for (key, value, origin) in load::sort(entries, &mut problems) {
            if let Err(fault) = config.apply(key, &value, origin.clone()) {
                problems.push(Problem { origin, key: key.path.to_owned(), fault });
            }
        }
        config.check(&mut problems);
        if problems.is_empty() {
            return Ok(config);
        }
        problems.sort_by(|a, b| a.origin.cmp(&b.origin));
        Err(ConfigError::Problems(problems))
    }

    /// The configuration when nothing was asked, for a program installed under `prefix`.
    #[must_use]
    pub fn defaults(prefix: &Path) -> Config {
        Config {
            hypervisor: Hypervisor::defaults(prefix),
            agent: Agent::defaults(prefix),
            runtime: Runtime::defaults(prefix),
            prefix: prefix.to_owned(),
            sources: Vec::new(),
            origins: BTreeMap::new(),
        }
    }

    /// The directory that the program is installed under.
    #[must_use]
    pub fn prefix(&self) -> &Path {
        &self.prefix
    }

    /// The files that were read, in order.
    #[must_use]
    pub fn sources(&self) -> &[PathBuf] {
        &self.sources
    }

    /// Where the value of a key comes from.
    #[must_use]
    pub fn origin(&self, key: &str) -> Origin {
        self.origins.get(key).cloned().unwrap_or(Origin::Default)
    }

    /// Every key with its value and where it comes from, section by section.
    #[must_use]
    pub fn show(&self) -> Vec<Shown> {
        keys::all().map(|key| self.shown(key)).collect()
    }

    fn shown(&self, key: &'static keys::Key) -> Shown {
        Shown { key: key.path, value: (key.get)(self), origin: self.origin(key.path) }
    }

    /// All about the keys of this name: a full one, or the last part of it, which two sections may share.
    ///
    /// # Errors
    ///
    /// [`ConfigError::NoSuchKey`] with the nearest name.
    pub fn explain(&self, name: &str) -> Result<Vec<Explanation>, ConfigError> {
        let defaults = Config::defaults(&self.prefix);
        let found: Vec<_> = keys::all()
            .filter(|key| key.path == name || key.name() == name)
            .map(|key| Explanation {
                key: key.path,
                doc: key.doc.iter().map(|line| line.trim()).collect::<Vec<_>>().join("\n"),
                values: (key.wanted)(key.rule),
                default: (key.get)(&defaults),
                current: self.shown(key),
                annotation: annotation(key),
            })
            .collect();
        if found.is_empty() {
            let nearest = nearest_of(name, keys::all().map(|key| key.path));
            return Err(ConfigError::NoSuchKey { key: name.to_owned(), nearest });
        }
        Ok(found)
    }

    /// Sets one key, or says why not.
    fn apply(&mut self, key: &'static keys::Key, value: &Value, origin: Origin) -> Result<(), Fault> {
        if !(key.set)(self, value, key.rule) {
            let value = match value {
                Value::Other(kind) => (*kind).to_owned(),
                value => format!("{value} ({})", value.kind()),
            };
            return Err(Fault::Value { value, wanted: (key.wanted)(key.rule) });
        }
        self.origins.insert(key.path, origin);
        Ok(())
    }

    /// Checks keys against each other.
    fn check(&mut self, problems: &mut Vec<Problem>) {
        let asked = |config: &Config, key: &str| config.origins.contains_key(key);
        // Whoever asks for an image doesn't mean our initrd too.
        if self.hypervisor.image.is_some() && !asked(self, "hypervisor.qemu.initrd") {
            self.hypervisor.initrd = None;
        }
        let hypervisor = &self.hypervisor;
        let mut conflict = |key: &'static str, text: String| {
            let problem = Problem { origin: self.origin(key), key: key.to_owned(), fault: Fault::Conflict(text) };
            problems.push(problem);
        };
        match (&hypervisor.initrd, &hypervisor.image) {
            (Some(_), Some(_)) => {
                conflict("hypervisor.qemu.image", "`initrd` is set too; a guest boots one of them".to_owned());
            }
            (None, None) => {
                conflict("hypervisor.qemu.initrd", "neither `initrd` nor `image` is set; a guest needs one".to_owned());
            }
            _ => {}
        }
        if hypervisor.vcpus() > hypervisor.max_vcpus() {
            let text = format!("{} are more than `default_maxvcpus`, {}", hypervisor.vcpus(), hypervisor.max_vcpus());
            conflict("hypervisor.qemu.default_vcpus", text);
        }
        let (memory, most) = (hypervisor.default_memory, hypervisor.default_maxmemory);
        if most != 0 && memory > most {
            let text = format!("{memory} MiB are more than `default_maxmemory`, {most} MiB");
            conflict("hypervisor.qemu.default_memory", text);
        }
        if !hypervisor.virtio_fs_queue_size.is_power_of_two() {
            let text = format!("{} is not a power of two", hypervisor.virtio_fs_queue_size);
            conflict("hypervisor.qemu.virtio_fs_queue_size", text);
        }
        if hypervisor.control_channel == ControlChannel::VhostUserVsock && hypervisor.vhost_user_vsock_daemon.is_none()
        {
            let text = "\"vhost-user-vsock\" needs `vhost_user_vsock_daemon`".to_owned();
            conflict("hypervisor.qemu.control_channel", text);
        }
        for pattern in &hypervisor.enable_annotations {
            if let Err(error) = annotations::whole(pattern) {
                conflict(
                    "hypervisor.qemu.enable_annotations",
                    format!("\"{pattern}\" is no regular expression: {error}"),
                );
            }
        }
        let globs = [
            ("hypervisor.qemu.valid_hypervisor_paths", &hypervisor.valid_hypervisor_paths),
            ("hypervisor.qemu.valid_boot_paths", &hypervisor.valid_boot_paths),
        ];
        for (key, list) in globs {
            for pattern in list {
                if let Err(error) = glob::Pattern::new(pattern) {
                    conflict(key, format!("\"{pattern}\" is no glob: {error}"));
                }
            }
        }
    }
}

impl Hypervisor {
    /// Virtual CPUs at the start, at least 1.
    #[must_use]
    pub fn vcpus(&self) -> u32 {
        match self.default_vcpus {
            all if all < 0.0 => host_cpus(),
            // Between 0 and 1024 by the key's rule.
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            some => (some.ceil() as u32).max(1),
        }
    }

    /// How many virtual CPUs the machine may grow to.
    #[must_use]
    pub fn max_vcpus(&self) -> u32 {
        match self.default_maxvcpus {
            // The host may have fewer than are asked for at the start, which is slow but works.
            0 => host_cpus().max(self.vcpus()),
            most => most,
        }
    }

    /// How far the machine's memory may grow, in MiB: what the host has, where nothing was asked.
    #[must_use]
    pub fn max_memory_mib(&self) -> u32 {
        match self.default_maxmemory {
            0 => host_memory_mib().max(self.default_memory),
            most => most,
        }
    }

    /// What the guest boots from.
    #[must_use]
    pub fn root(&self) -> Root {
        match (&self.image, &self.initrd) {
            (Some(image), _) => Root::Image(image.clone(), self.rootfs_type),
            // One of them is set: that was checked. An empty path can't be opened, should that change.
            (None, initrd) => Root::Initrd(initrd.clone().unwrap_or_default()),
        }
    }

    /// The words for the guest kernel's command line.
    #[must_use]
    pub fn kernel_words(&self) -> Vec<String> {
        self.kernel_params.split_whitespace().map(str::to_owned).collect()
    }

    /// The CPU's features, one by one.
    #[must_use]
    pub fn cpu_feature_list(&self) -> Vec<String> {
        self.cpu_features.split(',').map(str::trim).filter(|word| !word.is_empty()).map(str::to_owned).collect()
    }
}

/// The directory the running program is installed under: two above its file, as in `<prefix>/bin/kata`.
///
/// # Errors
///
/// `/proc/self/exe` can't be read.
pub fn installed_prefix() -> Result<PathBuf, ConfigError> {
    let program = std::env::current_exe().map_err(ConfigError::Prefix)?;
    Ok(program.ancestors().nth(2).map_or_else(|| PathBuf::from("/"), Path::to_owned))
}

fn annotation(key: &keys::Key) -> Option<String> {
    if key.annotation == keys::Annotation::Never {
        return None;
    }
    let section = key.section().split('.').next().unwrap_or_default();
    let name = if key.name() == "default_maxvcpus" { "default_max_vcpus" } else { key.name() };
    Some(format!("io.katacontainers.config.{section}.{name}"))
}

/// The known key that looks most like `path`.
fn nearest(path: &str) -> String {
    nearest_of(path, keys::all().map(|key| key.path).chain(upstream::ALL.iter().map(|key| key.path)))
}

/// The name that looks most like `path`: by its last part, and where that is equal by its section.
fn nearest_of(path: &str, names: impl Iterator<Item = &'static str>) -> String {
    let (section, name) = path.rsplit_once('.').unwrap_or(("", path));
    names
        .min_by_key(|known| {
            let (known_section, known_name) = known.rsplit_once('.').unwrap_or(("", known));
            let other_section = usize::from(section != known_section && !section.is_empty());
            (2 * strsim::damerau_levenshtein(name, known_name) + other_section, *known)
        })
        .unwrap_or_default()
        .to_owned()
}

fn host_cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX))
}

fn host_memory_mib() -> u32 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib =
        text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse::<u64>().ok());
    kib.map_or(0, |kib| u32::try_from(kib / 1024).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests;
