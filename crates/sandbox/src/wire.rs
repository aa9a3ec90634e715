//! The OCI configuration as the agent takes it: JSON into the wire's messages, field by field, by their names.
//!
//! The names of the wire's fields are those of the JSON but for case, so the messages' own descriptors say what goes
//! where. A field that the wire does not have would be lost on the way; it is an error that names it instead.

use protobuf::reflect::{FieldDescriptor, ReflectValueBox, RuntimeFieldType, RuntimeType};
use protobuf::{MessageDyn, MessageFull};
use serde_json::Value;

/// Why a configuration cannot be sent to a guest.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WireError {
    /// The guest's agent has no such field.
    #[error("`{0}` is not supported in a virtual machine; remove it from the container's configuration")]
    Unsupported(String),
    /// The value is not what the specification has there.
    #[error("`{field}` must be {wanted}, and is `{found}`")]
    Type {
        /// The field, from the top of the configuration.
        field: String,
        /// What it must be.
        wanted: &'static str,
        /// What it is.
        found: String,
    },
}

/// Fields that ask for nothing of the guest: read by whoever manages the container.
const OF_NO_CONCERN: &[&str] = &["checkBeforeUpdate", "useHierarchy"];

/// Turns JSON into a message.
///
/// # Errors
///
/// A field that the message lacks, unless it is empty, or a value of another type.
pub(crate) fn message<M: MessageFull>(value: &Value, at: &str) -> Result<M, WireError> {
    let mut message = M::new();
    fill(&mut message, value, at)?;
    Ok(message)
}

fn fill(message: &mut dyn MessageDyn, value: &Value, at: &str) -> Result<(), WireError> {
    let Value::Object(object) = value else { return Err(wrong(at, "an object", value)) };
    for (name, value) in object {
        let path = if at.is_empty() { name.clone() } else { format!("{at}.{name}") };
        // The one name that is more than a matter of case.
        let wanted = if name == "ociVersion" { "version" } else { name };
        let field = message.descriptor_dyn().fields().find(|field| field.name().eq_ignore_ascii_case(wanted));
        match field {
            Some(field) => set(message, &field, value, &path)?,
            None if is_empty(value) || OF_NO_CONCERN.contains(&name.as_str()) => {}
            None => return Err(WireError::Unsupported(path)),
        }
    }
    Ok(())
}

fn set(message: &mut dyn MessageDyn, field: &FieldDescriptor, value: &Value, at: &str) -> Result<(), WireError> {
    if value.is_null() {
        return Ok(());
    }
    match field.runtime_field_type() {
        RuntimeFieldType::Singular(kind) => {
            let boxed = convert(&kind, value, at)?;
            field.set_singular_field(message, boxed);
        }
        RuntimeFieldType::Repeated(kind) => {
            let Value::Array(items) = value else { return Err(wrong(at, "a list", value)) };
            for (index, item) in items.iter().enumerate() {
                let boxed = convert(&kind, item, &format!("{at}[{index}]"))?;
                field.mut_repeated(message).push(boxed);
            }
        }
        RuntimeFieldType::Map(_, kind) => {
            let Value::Object(entries) = value else { return Err(wrong(at, "an object", value)) };
            for (key, item) in entries {
                let boxed = convert(&kind, item, &format!("{at}.{key}"))?;
                field.mut_map(message).insert(ReflectValueBox::String(key.clone()), boxed);
            }
        }
    }
    Ok(())
}

fn convert(kind: &RuntimeType, value: &Value, at: &str) -> Result<ReflectValueBox, WireError> {
    let number = |wanted| value.as_i64().ok_or_else(|| wrong(at, wanted, value));
    let converted = match kind {
        RuntimeType::I32 => number("an integer of 32 bits")?.try_into().ok().map(ReflectValueBox::I32),
        RuntimeType::I64 => Some(ReflectValueBox::I64(number("an integer of 64 bits")?)),
        RuntimeType::U32 => number("an integer of 32 bits, not negative")?.try_into().ok().map(ReflectValueBox::U32),
        RuntimeType::U64 => value.as_u64().map(ReflectValueBox::U64),
        RuntimeType::Bool => value.as_bool().map(ReflectValueBox::Bool),
        RuntimeType::String => value.as_str().map(|text| ReflectValueBox::String(text.to_owned())),
        RuntimeType::Message(descriptor) => {
            let mut message = descriptor.new_instance();
            fill(message.as_mut(), value, at)?;
            Some(ReflectValueBox::Message(message))
        }
        // The configuration has no fields of these types.
        RuntimeType::F32 | RuntimeType::F64 | RuntimeType::VecU8 | RuntimeType::Enum(_) => None,
    };
    converted.ok_or_else(|| {
        let wanted = match kind {
            RuntimeType::Bool => "true or false",
            RuntimeType::String => "text",
            _ => "an integer in its range",
        };
        wrong(at, wanted, value)
    })
}

/// A value that asks for nothing.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

fn wrong(at: &str, wanted: &'static str, found: &Value) -> WireError {
    WireError::Type { field: at.to_owned(), wanted, found: found.to_string() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use protocol::oci;
    use serde_json::json;

    use super::*;

    #[test]
    fn every_part_of_a_configuration_arrives() {
        let spec: oci::Spec = message(
            &json!({
                "ociVersion": "1.0.2",
                "hostname": "h",
                "process": {
                    "user": { "uid": 1, "gid": 2, "additionalGids": [3], "umask": 63 },
                    "args": ["a"], "cwd": "/", "oomScoreAdj": -5, "noNewPrivileges": true,
                    "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": 1, "hard": 18_446_744_073_709_551_615u64 }],
                },
                "annotations": { "k": "v" },
                "linux": {
                    "uidMappings": [{ "hostID": 1, "containerID": 0, "size": 10 }],
                    "sysctl": { "kernel.msgmax": "1" },
                    "resources": { "blockIO": { "weight": 10 }, "memory": { "limit": -1, "disableOOMKiller": true },
                                   "unified": { "memory.high": "1" } },
                    "seccomp": { "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
                        "syscalls": [{ "names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5,
                                       "args": [{ "index": 0, "value": 1, "valueTwo": 2, "op": "SCMP_CMP_MASKED_EQ" }] }] },
                },
            }),
            "",
        )
        .unwrap();
        assert_eq!(spec.Version, "1.0.2");
        assert_eq!(spec.Process.User.Umask, Some(63));
        assert_eq!(spec.Process.OOMScoreAdj, -5);
        assert_eq!(spec.Process.Rlimits[0].Hard, u64::MAX);
        assert_eq!(spec.Annotations["k"], "v");
        assert_eq!(spec.Linux.UIDMappings[0].HostID, 1);
        assert_eq!(spec.Linux.Resources.BlockIO.Weight, 10);
        assert_eq!(spec.Linux.Resources.Memory.Limit, -1);
        assert!(spec.Linux.Resources.Memory.DisableOOMKiller);
        assert_eq!(spec.Linux.Resources.Unified["memory.high"], "1");
        assert_eq!(spec.Linux.Seccomp.DefaultErrnoRet, Some(38));
        assert_eq!(spec.Linux.Seccomp.Syscalls[0].Args[0].ValueTwo, 2);
        assert!(spec.Linux.Seccomp.Syscalls[0].has_errnoret());
    }

    #[test]
    fn what_the_wire_lacks_is_named() {
        let error =
            message::<oci::Spec>(&json!({ "linux": { "memoryPolicy": { "mode": "MPOL_BIND" } } }), "").unwrap_err();
        assert_eq!(error, WireError::Unsupported("linux.memoryPolicy".to_owned()));
        let error = message::<oci::Spec>(&json!({ "process": { "user": { "uid": -1 } } }), "").unwrap_err();
        assert!(error.to_string().contains("process.user.uid"), "{error}");
    }

    #[test]
    fn what_asks_for_nothing_is_no_error() {
        message::<oci::Spec>(&json!({ "linux": { "netDevices": {}, "intelRdt": null } }), "").unwrap();
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[a-z]{0,6}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 64, 6, |inner| {
            let keys = prop_oneof![
                Just("process"),
                Just("linux"),
                Just("user"),
                Just("args"),
                Just("mounts"),
                Just("resources"),
                Just("seccomp"),
                Just("syscalls"),
                Just("annotations"),
                Just("hooks"),
                Just("x")
            ];
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec((keys, inner), 0..4)
                    .prop_map(|entries| Value::Object(entries.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_configuration_is_survived(value in any_json()) {
            let _ = message::<oci::Spec>(&value, "");
        }
    }
}
