//! What the shim reads from a bundle's `config.json`: which pod the container belongs to, and how large the pod is.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde::Deserialize;

/// Who made the container, as annotations tell: keys of the container's type and of its sandbox's id.
const ENGINES: [(&str, &str); 3] = [
    ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"),
    ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"),
    ("io.kubernetes.docker.type", "io.kubernetes.sandbox.id"),
];

/// The place of a container in a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A container alone: it brings its own VM, and takes it away.
    Single,
    /// The pod's first container, which keeps the sandbox.
    Sandbox,
    /// A container in an existing pod.
    Container {
        /// The id of the pod's sandbox container.
        sandbox: String,
    },
}

impl Kind {
    /// The id of the sandbox that a container `id` of this kind lives in.
    pub(crate) fn sandbox_id<'a>(&'a self, id: &'a str) -> &'a str {
        match self {
            Kind::Single | Kind::Sandbox => id,
            Kind::Container { sandbox } => sandbox,
        }
    }

    /// Whether this container owns the VM.
    pub(crate) fn owns_sandbox(&self) -> bool {
        !matches!(self, Kind::Container { .. })
    }
}

/// Why a bundle could not be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BundleError {
    /// `config.json` is not there or not readable.
    #[error("Cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// `config.json` is not what the OCI runtime specification asks for.
    #[error("Cannot parse {path}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// An annotation that says what no engine says.
    #[error("Annotation {key} is {value:?}; known are sandbox, podsandbox, pod_sandbox, container, pod_container")]
    UnknownType {
        /// The annotation.
        key: String,
        /// Its value.
        value: String,
    },
    /// A container of a pod that does not say which.
    #[error("Annotation {key} is missing: it must name the sandbox of this container")]
    NoSandboxId {
        /// The annotation.
        key: String,
    },
    /// A number that is none.
    #[error("Annotation {key} is {value:?}, not a number")]
    NotANumber {
        /// The annotation.
        key: String,
        /// Its value.
        value: String,
    },
    /// An id that could leave its directory.
    #[error("Id {0:?} is not valid: 1 to 128 letters, digits, '-', '_' and '.', beginning with a letter or digit")]
    BadId(String),
}

/// Refuses an id that would be unsafe as a file name; ids become directories under `/run`.
pub(crate) fn check_id(id: &str) -> Result<(), BundleError> {
    let good = id.len() <= 128
        && id.starts_with(|c: char| c.is_ascii_alphanumeric())
        && id.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
    if good { Ok(()) } else { Err(BundleError::BadId(id.to_owned())) }
}

/// Tells the kind of a container from its annotations.
pub(crate) fn kind(annotations: &HashMap<String, String>) -> Result<Kind, BundleError> {
    for (type_key, id_key) in ENGINES {
        let Some(value) = annotations.get(type_key) else { continue };
        return match value.as_str() {
            "sandbox" | "podsandbox" | "pod_sandbox" => Ok(Kind::Sandbox),
            "container" | "pod_container" => {
                let sandbox =
                    annotations.get(id_key).ok_or_else(|| BundleError::NoSandboxId { key: id_key.to_owned() })?;
                check_id(sandbox)?;
                Ok(Kind::Container { sandbox: sandbox.clone() })
            }
            "single_container" => Ok(Kind::Single),
            other => Err(BundleError::UnknownType { key: type_key.to_owned(), value: other.to_owned() }),
        };
    }
    Ok(Kind::Single)
}

/// Reads only the annotations of the bundle: `start` must be quick, and need not understand the rest.
pub(crate) fn read_kind(bundle: &Path) -> Result<Kind, BundleError> {
    #[derive(Deserialize)]
    struct Annotated {
        #[serde(default)]
        annotations: Option<HashMap<String, String>>,
    }
    let annotated: Annotated = read_config(bundle)?;
    kind(&annotated.annotations.unwrap_or_default())
}

/// Reads the whole specification of the bundle.
pub(crate) fn read_spec(bundle: &Path) -> Result<Spec, BundleError> {
    read_config(bundle)
}

fn read_config<T: for<'a> Deserialize<'a>>(bundle: &Path) -> Result<T, BundleError> {
    let path = bundle.join("config.json");
    let text = std::fs::read(&path).map_err(|source| BundleError::Read { path: path.clone(), source })?;
    serde_json::from_slice(&text).map_err(|source| BundleError::Parse { path, source })
}

/// What a pod's sandbox must be like, as its first container says.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Shape {
    /// The host name of the pod.
    pub(crate) hostname: String,
    /// The pod's network namespace on the host.
    pub(crate) netns: Option<PathBuf>,
    /// Whether the pod's containers share one PID namespace.
    pub(crate) shared_pidns: bool,
    /// CPUs the pod may use at most, where limited.
    pub(crate) vcpus: Option<f64>,
    /// Memory the pod may use at most in MiB, where limited.
    pub(crate) memory_mib: Option<u32>,
    /// The control group the engine wants the pod in.
    pub(crate) cgroups_path: Option<PathBuf>,
}

/// Derives the sandbox's shape from the first container's specification.
///
/// Sizes come from the CRI's sandbox annotations where there are any (they sum up the pod), else from the container's
/// own limits (a container alone).
pub(crate) fn shape(spec: &Spec) -> Result<Shape, BundleError> {
    let annotations = spec.annotations().as_ref();
    let number = |key: &str| -> Result<Option<i64>, BundleError> {
        match annotations.and_then(|a| a.get(key)) {
            None => Ok(None),
            Some(value) => value
                .parse()
                .map(Some)
                .map_err(|_| BundleError::NotANumber { key: key.to_owned(), value: value.clone() }),
        }
    };
    let mut quota = number("io.kubernetes.cri.sandbox-cpu-quota")?;
    let mut period = number("io.kubernetes.cri.sandbox-cpu-period")?;
    let mut memory = number("io.kubernetes.cri.sandbox-memory")?;
    // Shares weigh pods against each other; they are no limit, so they size nothing. They must still be a number.
    number("io.kubernetes.cri.sandbox-cpu-shares")?;

    let linux = spec.linux().as_ref();
    if quota.is_none() && memory.is_none() {
        let resources = linux.and_then(|l| l.resources().as_ref());
        if let Some(cpu) = resources.and_then(|r| r.cpu().as_ref()) {
            quota = cpu.quota();
            period = cpu.period().and_then(|p| i64::try_from(p).ok());
        }
        memory = resources.and_then(|r| r.memory().as_ref()).and_then(|m| m.limit());
    }
    let vcpus = match (quota, period) {
        (Some(quota), Some(period)) if quota > 0 && period > 0 => Some(quota as f64 / period as f64),
        _ => None,
    };
    let memory_mib = memory.filter(|m| *m > 0).map(|m| u32::try_from(m.div_ceil_mib()).unwrap_or(u32::MAX));

    let namespaces = linux.and_then(|l| l.namespaces().as_ref());
    let namespace = |kind| namespaces.and_then(|all| all.iter().find(|ns| ns.typ() == kind));
    Ok(Shape {
        hostname: spec.hostname().clone().unwrap_or_default(),
        netns: namespace(LinuxNamespaceType::Network).and_then(|ns| ns.path().clone()),
        shared_pidns: namespace(LinuxNamespaceType::Pid).is_some_and(|ns| ns.path().is_some()),
        vcpus,
        memory_mib,
        cgroups_path: linux.and_then(|linux| linux.cgroups_path().clone()),
    })
}

/// Bytes in whole MiB, rounded up.
trait CeilMib {
    fn div_ceil_mib(self) -> u64;
}

impl CeilMib for i64 {
    fn div_ceil_mib(self) -> u64 {
        u64::try_from(self).unwrap_or(0).div_ceil(1 << 20)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn annotations(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn no_annotation_is_a_container_alone() {
        assert_eq!(kind(&HashMap::new()).unwrap(), Kind::Single);
    }

    #[test]
    fn each_engine_is_understood() {
        for (type_key, id_key, sandbox, container) in [
            ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id", "sandbox", "container"),
            ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID", "sandbox", "container"),
            ("io.kubernetes.docker.type", "io.kubernetes.sandbox.id", "podsandbox", "container"),
        ] {
            assert_eq!(kind(&annotations(&[(type_key, sandbox)])).unwrap(), Kind::Sandbox);
            assert_eq!(
                kind(&annotations(&[(type_key, container), (id_key, "pod1")])).unwrap(),
                Kind::Container { sandbox: "pod1".into() }
            );
            assert!(matches!(kind(&annotations(&[(type_key, container)])), Err(BundleError::NoSandboxId { .. })));
        }
    }

    #[test]
    fn what_no_engine_says_is_refused() {
        let odd = annotations(&[("io.kubernetes.cri.container-type", "pod")]);
        assert!(matches!(kind(&odd), Err(BundleError::UnknownType { .. })));
        let escaping = annotations(&[
            ("io.kubernetes.cri.container-type", "container"),
            ("io.kubernetes.cri.sandbox-id", "../../etc"),
        ]);
        assert!(matches!(kind(&escaping), Err(BundleError::BadId(_))));
    }

    fn spec(json: serde_json::Value) -> Spec {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn a_pod_is_sized_by_its_annotations() {
        let shape = shape(&spec(serde_json::json!({
            "ociVersion": "1.0.2",
            "hostname": "web-0",
            "annotations": {
                "io.kubernetes.cri.sandbox-cpu-quota": "150000",
                "io.kubernetes.cri.sandbox-cpu-period": "100000",
                "io.kubernetes.cri.sandbox-cpu-shares": "512",
                "io.kubernetes.cri.sandbox-memory": "134217729"
            },
            "linux": {"namespaces": [{"type": "network", "path": "/var/run/netns/x"}, {"type": "pid"}],
                      "cgroupsPath": "/kubepods/x"}
        })))
        .unwrap();
        assert_eq!(
            shape,
            Shape {
                hostname: "web-0".into(),
                netns: Some("/var/run/netns/x".into()),
                shared_pidns: false,
                vcpus: Some(1.5),
                memory_mib: Some(129),
                cgroups_path: Some("/kubepods/x".into()),
            }
        );
    }

    #[test]
    fn a_container_alone_is_sized_by_its_limits() {
        let shape = shape(&spec(serde_json::json!({
            "ociVersion": "1.0.2",
            "linux": {
                "namespaces": [{"type": "network"}],
                "resources": {"cpu": {"quota": 200000, "period": 100000}, "memory": {"limit": 268435456}}
            }
        })))
        .unwrap();
        assert_eq!((shape.vcpus, shape.memory_mib, shape.netns), (Some(2.0), Some(256), None));
    }

    #[test]
    fn no_limit_is_no_size() {
        let shape = shape(&spec(serde_json::json!({
            "ociVersion": "1.0.2",
            "annotations": {"io.kubernetes.cri.sandbox-cpu-quota": "0", "io.kubernetes.cri.sandbox-memory": "0",
                            "io.kubernetes.cri.sandbox-cpu-period": "100000"},
            "linux": {"resources": {"cpu": {"quota": -1}, "memory": {"limit": -1}}}
        })))
        .unwrap();
        assert_eq!((shape.vcpus, shape.memory_mib), (None, None));
        let bad = spec(serde_json::json!({"ociVersion": "1.0.2",
            "annotations": {"io.kubernetes.cri.sandbox-memory": "lots"}}));
        assert!(matches!(super::shape(&bad), Err(BundleError::NotANumber { .. })));
    }

    proptest! {
        #[test]
        fn a_valid_id_is_one_path_component(id in "\\PC{0,140}") {
            if check_id(&id).is_ok() {
                let path = Path::new("/run/kata").join(&id);
                prop_assert_eq!(path.parent(), Some(Path::new("/run/kata")));
                prop_assert_eq!(path.file_name().and_then(|n| n.to_str()), Some(id.as_str()));
            }
        }
    }
}
