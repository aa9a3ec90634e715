//! Messages inside messages: the runtime's options, and OCI structures as JSON.

use std::path::PathBuf;

use protobuf::Message as _;
use protobuf::well_known_types::any::Any;
use protocol::runtimeoptions::Options;
use serde::Deserialize;

use crate::chain::Chain;
use crate::fault::Fault;

/// The names engines send the options of a generic runtime by, oldest last.
const OPTIONS: [&str; 3] = ["runtimeoptions.v1.Options", "cri.runtimeoptions.v1.Options", "containerd.runtime.options"];

/// The name of a message, without the host some put before it.
fn name(any: &Any) -> &str {
    any.type_url.rsplit('/').next().unwrap_or_default()
}

/// The configuration file that the engine's own configuration names (`ConfigPath`).
///
/// This is the only way to name one: an annotation would let whoever may make a pod choose a file of the host.
pub(crate) fn config_path(options: Option<&Any>) -> Result<Option<PathBuf>, Fault> {
    let Some(any) = options.filter(|any| !any.type_url.is_empty()) else { return Ok(None) };
    if !OPTIONS.contains(&name(any)) {
        return Err(Fault::invalid(format!(
            "Runtime options {} are for another runtime; Kata takes {} with a ConfigPath",
            any.type_url, OPTIONS[0]
        )));
    }
    let options = Options::parse_from_bytes(&any.value)
        .map_err(|e| Fault::invalid(format!("Cannot parse the runtime options: {}", Chain(&e))))?;
    if options.config_path.is_empty() {
        if options.config_body.is_empty() {
            return Ok(None);
        }
        let body = String::from_utf8_lossy(&options.config_body);
        let message = format!("Runtime options have no ConfigPath, only {:?}; name a file instead", body.trim());
        return Err(Fault::invalid(message));
    }
    let path = PathBuf::from(options.config_path);
    if !path.is_absolute() {
        return Err(Fault::invalid(format!("ConfigPath {} is no absolute path", path.display())));
    }
    Ok(Some(path))
}

/// An OCI structure sent as JSON; `what` it is, for the error.
pub(crate) fn json<T: for<'a> Deserialize<'a>>(any: Option<&Any>, what: &str) -> Result<T, Fault> {
    let any = any.ok_or_else(|| Fault::invalid(format!("The request has no {what}")))?;
    serde_json::from_slice(&any.value)
        .map_err(|e| Fault::invalid(format!("Cannot parse the {what} ({}): {e}", any.type_url)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::{LinuxResources, Process};

    fn options(type_url: &str, options: &Options) -> Any {
        Any { type_url: type_url.into(), value: options.write_to_bytes().unwrap(), ..Default::default() }
    }

    #[test]
    fn the_engine_may_name_a_file() {
        let named = Options { config_path: "/etc/kata/x.toml".into(), ..Default::default() };
        for url in ["runtimeoptions.v1.Options", "type.googleapis.com/runtimeoptions.v1.Options"] {
            assert_eq!(config_path(Some(&options(url, &named))).unwrap(), Some("/etc/kata/x.toml".into()));
        }
        assert_eq!(config_path(None).unwrap(), None);
        assert_eq!(config_path(Some(&Any::default())).unwrap(), None);
        assert_eq!(config_path(Some(&options("runtimeoptions.v1.Options", &Options::default()))).unwrap(), None);
    }

    #[test]
    fn what_would_be_ignored_is_refused() {
        let relative = Options { config_path: "x.toml".into(), ..Default::default() };
        assert!(config_path(Some(&options("runtimeoptions.v1.Options", &relative))).is_err());
        let body = Options { config_body: b"SystemdCgroup = true".to_vec(), ..Default::default() };
        let fault = config_path(Some(&options("runtimeoptions.v1.Options", &body))).unwrap_err();
        assert!(fault.message.contains("SystemdCgroup"), "{}", fault.message);
        let other = config_path(Some(&options("containerd.runc.v1.Options", &Options::default()))).unwrap_err();
        assert!(other.message.contains("containerd.runc.v1.Options"), "{}", other.message);
    }

    #[test]
    fn oci_structures_come_as_json() {
        let any = |value: &str| Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: value.as_bytes().to_vec(),
            ..Default::default()
        };
        let process: Process =
            json(Some(&any(r#"{"user":{"uid":1,"gid":2},"args":["ls"],"cwd":"/"}"#)), "process").unwrap();
        assert_eq!(process.args().as_deref(), Some(&["ls".to_owned()][..]));
        assert!(json::<Process>(Some(&any("{")), "process").unwrap_err().message.contains("process"));
        assert!(json::<LinuxResources>(None, "resources").is_err());
    }
}
