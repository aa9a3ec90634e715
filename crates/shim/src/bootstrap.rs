//! How the engine and `start` talk: three generations, told apart by what the engine sends.
//!
//! | engine             | asks by                                         | is answered with                         |
//! |--------------------|-------------------------------------------------|------------------------------------------|
//! | containerd 1.6-2.2 | flags; `MAX_SHIM_VERSION` below 3 or unset      | the bare address: Task version 2          |
//! | one that says so   | flags; `MAX_SHIM_VERSION` of 3 or more          | JSON `{"version":3,…}`                    |
//! | containerd 2.3     | flags and a `BootstrapParams` message on stdin  | a `BootstrapResult` message: version 3    |
//!
//! The bare address is right for every engine of the first row: 1.6 knows nothing else, 1.7 refuses a version above 2,
//! 2.0-2.2 take it for a version 2 shim, and both versions of the service are served on the same socket.

use std::io::{IsTerminal as _, Read as _};

use containerd_shim_protos::TASK_API_VERSION;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, LogLevel};
use protobuf::{Message as _, SpecialFields};

use crate::flags::Flags;

/// What the engine may send on stdin at most; more is no parameter.
const MAX_INPUT: u64 = 10 << 20;

/// The environment variable with the engine's event socket.
pub(crate) const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";

/// The environment variable with the highest version of the Task service the engine takes.
pub(crate) const MAX_SHIM_VERSION: &str = "MAX_SHIM_VERSION";

/// The form of the answer to `start`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// The address and nothing else.
    Address,
    /// JSON with version, address and protocol.
    Json,
    /// A `BootstrapResult` message.
    Message,
}

/// What `start` needs to know from the engine, whatever way it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    /// How to answer.
    pub(crate) form: Form,
    /// Where events go; empty where the engine wants none.
    pub(crate) ttrpc_address: String,
    /// The engine's gRPC address.
    pub(crate) grpc_address: String,
    /// Log at level debug.
    pub(crate) debug: bool,
    /// The directory for the socket, where the engine names one.
    pub(crate) socket_dir: Option<String>,
}

/// Why `start` could not be understood.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootstrapError {
    /// stdin could not be read.
    #[error("Cannot read the engine's parameters from stdin")]
    Read(#[source] std::io::Error),
    /// The message is meant for somebody else.
    #[error("The engine's parameters are for {found}, but the flags name {expected}")]
    OtherContainer {
        /// What the message says, `namespace/id`.
        found: String,
        /// What the flags say.
        expected: String,
    },
    /// The answer could not be put together.
    #[error("Cannot encode the answer to the engine")]
    Encode(#[source] protobuf::Error),
}

/// Reads all of stdin, unless a person sits there.
pub(crate) fn read_stdin() -> Result<Vec<u8>, BootstrapError> {
    let stdin = std::io::stdin();
    let mut input = Vec::new();
    if !stdin.is_terminal() {
        stdin.lock().take(MAX_INPUT).read_to_end(&mut input).map_err(BootstrapError::Read)?;
    }
    Ok(input)
}

/// Understands `start` from what came on stdin, the flags and the environment (looked up through `env`).
pub(crate) fn understand(
    input: &[u8],
    flags: &Flags,
    env: impl Fn(&str) -> Option<String>,
) -> Result<Request, BootstrapError> {
    if let Some(params) = params_from(input, flags)? {
        let debug = flags.debug || params.log_level.value() <= LogLevel::LOG_LEVEL_DEBUG as i32;
        return Ok(Request {
            form: Form::Message,
            ttrpc_address: params.containerd_ttrpc_address,
            grpc_address: params.containerd_grpc_address,
            debug,
            socket_dir: params.socket_dir.filter(|dir| !dir.is_empty()),
        });
    }
    let newest = env(MAX_SHIM_VERSION).and_then(|v| v.parse::<i32>().ok()).unwrap_or(2);
    Ok(Request {
        form: if newest >= TASK_API_VERSION { Form::Json } else { Form::Address },
        ttrpc_address: env(TTRPC_ADDRESS).unwrap_or_default(),
        grpc_address: flags.address.clone(),
        debug: flags.debug,
        socket_dir: None,
    })
}

/// The `BootstrapParams` in `input`, or none where the engine sent the options of the runtime, or nothing.
fn params_from(input: &[u8], flags: &Flags) -> Result<Option<BootstrapParams>, BootstrapError> {
    if input.is_empty() {
        return Ok(None);
    }
    // Options of older engines (an `Any`: two strings) parse as parameters with an id and a namespace alone.
    let Ok(params) = BootstrapParams::parse_from_bytes(input) else { return Ok(None) };
    if params.instance_id == flags.id && params.namespace == flags.namespace {
        return Ok(Some(params));
    }
    let bare = BootstrapParams {
        instance_id: params.instance_id.clone(),
        namespace: params.namespace.clone(),
        special_fields: SpecialFields::clone(&params.special_fields),
        ..Default::default()
    };
    if params == bare {
        return Ok(None);
    }
    Err(BootstrapError::OtherContainer {
        found: format!("{}/{}", params.namespace, params.instance_id),
        expected: format!("{}/{}", flags.namespace, flags.id),
    })
}

/// The answer to `start`, as bytes for stdout.
pub(crate) fn answer(form: Form, address: &str) -> Result<Vec<u8>, BootstrapError> {
    match form {
        Form::Address => Ok(address.as_bytes().to_vec()),
        Form::Json => {
            let answer = serde_json::json!({"version": TASK_API_VERSION, "address": address, "protocol": "ttrpc"});
            Ok(answer.to_string().into_bytes())
        }
        Form::Message => BootstrapResult {
            version: TASK_API_VERSION,
            address: address.to_owned(),
            protocol: "ttrpc".to_owned(),
            ..Default::default()
        }
        .write_to_bytes()
        .map_err(BootstrapError::Encode),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::well_known_types::any::Any;

    fn flags() -> Flags {
        Flags { id: "abc".into(), namespace: "k8s.io".into(), address: "/run/c.sock".into(), ..Flags::default() }
    }

    fn env(pairs: &'static [(&'static str, &'static str)]) -> impl Fn(&str) -> Option<String> {
        move |key| pairs.iter().find(|(k, _)| *k == key).map(|(_, v)| (*v).to_owned())
    }

    #[test]
    fn containerd_1_6_gets_a_bare_address() {
        let request = understand(b"", &flags(), env(&[(TTRPC_ADDRESS, "/run/c.sock.ttrpc")])).unwrap();
        assert_eq!(request.form, Form::Address);
        assert_eq!(request.ttrpc_address, "/run/c.sock.ttrpc");
        assert_eq!(request.grpc_address, "/run/c.sock");
        assert_eq!(answer(request.form, "unix:///s/x").unwrap(), b"unix:///s/x");
    }

    #[test]
    fn runtime_options_on_stdin_are_no_parameters() {
        let any =
            Any { type_url: "runtimeoptions.v1.Options".into(), value: b"\x12\x04/etc".to_vec(), ..Default::default() };
        let request = understand(&any.write_to_bytes().unwrap(), &flags(), env(&[(MAX_SHIM_VERSION, "2")])).unwrap();
        assert_eq!(request.form, Form::Address);
        assert_eq!(request.ttrpc_address, "");
    }

    #[test]
    fn an_engine_that_asks_for_version_3_gets_json() {
        let request = understand(b"", &flags(), env(&[(MAX_SHIM_VERSION, "3")])).unwrap();
        let answer: serde_json::Value = serde_json::from_slice(&answer(request.form, "unix:///s/x").unwrap()).unwrap();
        assert_eq!(answer, serde_json::json!({"version": 3, "address": "unix:///s/x", "protocol": "ttrpc"}));
    }

    #[test]
    fn containerd_2_3_sends_and_gets_messages() {
        let params = BootstrapParams {
            instance_id: "abc".into(),
            namespace: "k8s.io".into(),
            log_level: LogLevel::LOG_LEVEL_DEBUG.into(),
            containerd_ttrpc_address: "unix:///run/c.sock.ttrpc".into(),
            containerd_grpc_address: "unix:///run/c.sock".into(),
            socket_dir: Some("/run/other".into()),
            ..Default::default()
        };
        let request = understand(&params.write_to_bytes().unwrap(), &flags(), env(&[])).unwrap();
        assert_eq!(
            request,
            Request {
                form: Form::Message,
                ttrpc_address: "unix:///run/c.sock.ttrpc".into(),
                grpc_address: "unix:///run/c.sock".into(),
                debug: true,
                socket_dir: Some("/run/other".into()),
            }
        );
        let result = BootstrapResult::parse_from_bytes(&answer(request.form, "unix:///s/x").unwrap()).unwrap();
        assert_eq!((result.version, result.address.as_str()), (3, "unix:///s/x"));
        assert_eq!(result.protocol, "ttrpc");
    }

    #[test]
    fn parameters_of_another_container_are_refused() {
        let params = BootstrapParams {
            instance_id: "other".into(),
            namespace: "k8s.io".into(),
            containerd_binary: "/usr/bin/containerd".into(),
            ..Default::default()
        };
        let error = understand(&params.write_to_bytes().unwrap(), &flags(), env(&[])).unwrap_err();
        assert!(error.to_string().contains("k8s.io/other"), "{error}");
    }
}
