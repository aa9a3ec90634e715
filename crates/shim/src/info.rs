//! `-info`: what containerd 2.x wants to know of a runtime before it runs anything with it.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::{Message as _, MessageField};

use crate::chain::Chain;

/// The runtime's name for containerd.
pub(crate) const RUNTIME: &str = "io.containerd.kata.v2";

/// Answers a `RuntimeRequest`'s options with a `RuntimeInfo` message.
pub(crate) fn describe(input: &[u8]) -> Result<Vec<u8>, String> {
    let options = match input {
        [] => None,
        input => {
            Some(Any::parse_from_bytes(input).map_err(|e| format!("Options on stdin are no message: {}", Chain(&e)))?)
        }
    };
    let info = RuntimeInfo {
        name: RUNTIME.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        }),
        options: options.into(),
        ..Default::default()
    };
    info.write_to_bytes().map_err(|e| format!("Cannot encode the answer: {}", Chain(&e)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtime_names_itself() {
        let info = RuntimeInfo::parse_from_bytes(&describe(b"").unwrap()).unwrap();
        assert_eq!(info.name, "io.containerd.kata.v2");
        assert_eq!(info.version.version, env!("CARGO_PKG_VERSION"));
        assert!(info.options.is_none());
    }

    #[test]
    fn options_come_back_and_garbage_does_not_pass() {
        let any = Any { type_url: "runtimeoptions.v1.Options".into(), ..Default::default() };
        let answer = describe(&any.write_to_bytes().unwrap()).unwrap();
        assert_eq!(RuntimeInfo::parse_from_bytes(&answer).unwrap().options.type_url, "runtimeoptions.v1.Options");
        assert!(describe(&[0xff, 0xff]).is_err());
    }
}
