//! What the guest is told of a container's configuration.
//!
//! The configuration was written for a container on this host. In a virtual machine some of it means the guest
//! (namespaces, capabilities, seccomp), some is done by the host beforehand (the root file system, bind mounts, most
//! hooks), and some means nothing there (the host's device numbers, its security labels). What would be lost without
//! a trace is an error.

use std::path::Path;

use oci_spec::runtime::Spec;
use protocol::{SANDBOX_GUEST_DIR, oci};
use serde_json::{Value, json};
use share::Share;

use crate::Error;
use crate::wire;

/// Character devices that every Linux kernel has under the same numbers, and that reach nothing of the guest's own:
/// `None` stands for all minors. See Documentation/admin-guide/devices.txt of the kernel.
const PORTABLE: &[(i64, Option<i64>)] = &[
    (1, Some(3)),    // null
    (1, Some(5)),    // zero
    (1, Some(7)),    // full
    (1, Some(8)),    // random
    (1, Some(9)),    // urandom
    (5, Some(0)),    // tty
    (5, Some(1)),    // console
    (5, Some(2)),    // ptmx
    (136, None),     // pts
    (10, Some(200)), // net/tun
    (10, Some(229)), // fuse
];

/// A configuration for the guest, and what goes with it.
#[derive(Debug)]
pub(crate) struct Translated {
    pub(crate) spec: oci::Spec,
    /// The container joins the process namespace of the pod.
    pub(crate) sandbox_pidns: bool,
}

/// Translates a container's configuration, read in `bundle`; `rootfs` is its path in the guest.
pub(crate) fn translate(
    id: &str,
    spec: &Spec,
    bundle: &Path,
    rootfs: &str,
    share: &Share,
    seccomp: bool,
) -> Result<Translated, Error> {
    let mut value = serde_json::to_value(spec).map_err(Error::Json)?;
    value["root"]["path"] = json!(rootfs);
    keep_only(&mut value["hooks"], &["startContainer"]);
    for label in ["apparmorProfile", "selinuxLabel"] {
        remove(&mut value["process"], label);
    }
    let linux = &mut value["linux"];
    remove(linux, "mountLabel");
    if !seccomp {
        remove(linux, "seccomp");
    }
    if linux["personality"]["domain"] == "LINUX" {
        remove(linux, "personality");
    }
    linux["cgroupsPath"] = json!(format!("/kata/{id}"));
    let sandbox_pidns = namespaces(linux);
    devices(linux)?;
    // Throttling of the host's devices and tagging of the host's packets.
    for host_only in ["blockIO", "network", "rdma"] {
        remove(&mut linux["resources"], host_only);
    }
    // Numbers of the host's processors and memory nodes: the guest has its own.
    for host_only in ["cpus", "mems"] {
        remove(&mut linux["resources"]["cpu"], host_only);
    }
    if let Some(mounts) = value["mounts"].as_array_mut() {
        for mount in mounts {
            translate_mount(id, mount, bundle, share)?;
        }
    }
    Ok(Translated { spec: wire::message(&value, "")?, sandbox_pidns })
}

/// Resources of a running container, as `update` sends them.
pub(crate) fn resources(resources: &oci_spec::runtime::LinuxResources) -> Result<oci::LinuxResources, Error> {
    let mut value = serde_json::to_value(resources).map_err(Error::Json)?;
    for host_only in ["devices", "blockIO", "network", "rdma"] {
        remove(&mut value, host_only);
    }
    for host_only in ["cpus", "mems"] {
        remove(&mut value["cpu"], host_only);
    }
    Ok(wire::message(&value, "linux.resources")?)
}

/// A process to be added.
pub(crate) fn process(process: &oci_spec::runtime::Process) -> Result<oci::Process, Error> {
    let mut value = serde_json::to_value(process).map_err(Error::Json)?;
    for label in ["apparmorProfile", "selinuxLabel"] {
        remove(&mut value, label);
    }
    Ok(wire::message(&value, "process")?)
}

/// The guest's own network is the pod's; paths of the host's namespaces mean nothing in the guest. Returns whether
/// the container shares the pod's process namespace, which is what a path there says.
fn namespaces(linux: &mut Value) -> bool {
    let Some(namespaces) = linux["namespaces"].as_array_mut() else { return false };
    namespaces.retain(|namespace| namespace["type"] != "network" && namespace["type"] != "time");
    let mut shared = false;
    namespaces.retain_mut(|namespace| {
        let joins = remove(namespace, "path").is_some_and(|path| path != "");
        let pid = namespace["type"] == "pid";
        shared |= joins && pid;
        !(joins && pid)
    });
    shared
}

/// Keeps the devices that mean the same in any kernel and refuses the others, unless the container is given all
/// devices of the host: then it gets all that there are in the guest for a container, which never includes a disk.
fn devices(linux: &mut Value) -> Result<(), Error> {
    let rules = linux["resources"]["devices"].as_array().cloned().unwrap_or_default();
    let all = rules.iter().any(|rule| {
        rule["allow"] == true
            && matches!(rule["type"].as_str(), None | Some("a"))
            && rule["major"].as_i64().unwrap_or(-1) < 0
    });
    if let Some(devices) = linux["devices"].as_array_mut() {
        let stranger = devices.iter().find(|device| !is_portable(device)).map(|device| device["path"].to_string());
        match stranger {
            Some(path) if !all => return Err(Error::Device(path)),
            _ => devices.retain(is_portable),
        }
    }
    // Nodes may be made, as in any container; what can be opened is the list.
    let mut allowed = vec![
        json!({ "allow": false, "access": "rwm" }),
        json!({ "allow": true, "type": "c", "access": "m" }),
        json!({ "allow": true, "type": "b", "access": "m" }),
    ];
    let asked = |major: i64, minor: Option<i64>| {
        all || rules.iter().any(|rule| {
            rule["allow"] == true
                && rule["major"].as_i64() == Some(major)
                && (minor.is_none() || rule["minor"].as_i64() == minor)
        })
    };
    for (major, minor) in PORTABLE {
        let always = !matches!((major, minor), (10, _));
        if always || asked(*major, *minor) {
            let mut rule = json!({ "allow": true, "type": "c", "major": major, "access": "rwm" });
            if let Some(minor) = minor {
                rule["minor"] = json!(minor);
            } else {
                rule["minor"] = json!(-1);
            }
            allowed.push(rule);
        }
    }
    for rule in &mut allowed {
        for number in ["major", "minor"] {
            if rule[number].is_null() {
                rule[number] = json!(-1);
            }
        }
        if rule["type"].is_null() {
            rule["type"] = json!("a");
        }
    }
    linux["resources"]["devices"] = json!(allowed);
    Ok(())
}

fn is_portable(device: &Value) -> bool {
    let (major, minor) = (device["major"].as_i64(), device["minor"].as_i64());
    matches!(device["type"].as_str(), Some("c" | "u"))
        && PORTABLE.iter().any(|(known, any)| major == Some(*known) && (any.is_none() || minor == *any))
        || device["type"] == "p"
}

/// Bind mounts are placed in the share; every other kind is the guest's own business.
fn translate_mount(id: &str, mount: &mut Value, bundle: &Path, share: &Share) -> Result<(), Error> {
    let options: Vec<&str> =
        mount["options"].as_array().map_or_else(Vec::new, |options| options.iter().filter_map(Value::as_str).collect());
    let bind = mount["type"] == "bind" || options.iter().any(|option| matches!(*option, "bind" | "rbind"));
    if !bind {
        return Ok(());
    }
    let source = mount["source"].as_str().unwrap_or_default().to_owned();
    let read_only = options.iter().any(|option| matches!(*option, "ro" | "rro"));
    mount["source"] = if mount["destination"] == "/dev/shm" {
        // Memory that the pod's containers share: it cannot cross to the host, and lives in the guest.
        json!(format!("{SANDBOX_GUEST_DIR}/shm"))
    } else if ["/proc", "/sys"].iter().any(|top| Path::new(&source).starts_with(top)) {
        // The kernel's own files: the guest has its own.
        json!(source)
    } else {
        // The specification has relative sources begin at the bundle, not where this process happens to be.
        json!(share.add_bind(id, &bundle.join(&source), read_only)?)
    };
    mount["type"] = json!("bind");
    Ok(())
}

fn remove(value: &mut Value, key: &str) -> Option<Value> {
    value.as_object_mut().and_then(|object| object.remove(key))
}

fn keep_only(value: &mut Value, keys: &[&str]) {
    if let Some(object) = value.as_object_mut() {
        object.retain(|key, _| keys.contains(&key.as_str()));
    }
}
