//! A container image made on the spot: busybox and what the tests look for, as an OCI image layout in a tar file.
//!
//! No registry is needed. See the OCI image specification, image-layout.md.

use std::fs;
use std::path::Path;

use serde_json::json;
use sha2::{Digest, Sha256};

/// The name that the image is imported under.
pub const NAME: &str = "kata.test/busybox:latest";

/// The applets the tests use; each is a link to the one binary.
const APPLETS: &[&str] = &[
    "sh",
    "cat",
    "echo",
    "ls",
    "sleep",
    "true",
    "false",
    "id",
    "env",
    "pwd",
    "hostname",
    "uname",
    "mount",
    "stat",
    "dd",
    "head",
    "tail",
    "tr",
    "wc",
    "grep",
    "sed",
    "cut",
    "sort",
    "touch",
    "mkdir",
    "rm",
    "kill",
    "ps",
    "tty",
    "stty",
    "sha256sum",
    "test",
    "printf",
    "seq",
    "yes",
    "sync",
    "ln",
    "mknod",
    "chmod",
    "chown",
    "awk",
    "readlink",
    "dirname",
    "nproc",
    "free",
    "umask",
    "sysctl",
    "ip",
    "date",
    "mkfifo",
    "basename",
    "xargs",
    "find",
    "timeout",
    "unshare",
    "cp",
    "mv",
    "df",
];

/// Writes the image to `path`.
///
/// # Panics
///
/// When busybox is not installed or the file cannot be written.
pub fn write(path: &Path) {
    let layer = layer();
    let diff_id = digest(&layer);
    let config = json!({
        "architecture": architecture(), "os": "linux",
        "config": { "Env": ["PATH=/bin:/usr/bin"], "Cmd": ["/bin/sh"], "WorkingDir": "/" },
        "rootfs": { "type": "layers", "diff_ids": [diff_id] },
    })
    .to_string()
    .into_bytes();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(&config), "size": config.len() },
        "layers": [{ "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest(&layer), "size": layer.len() }],
    })
    .to_string()
    .into_bytes();
    let index = json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest(&manifest), "size": manifest.len(),
            "annotations": { "io.containerd.image.name": NAME, "org.opencontainers.image.ref.name": "latest" },
        }],
    })
    .to_string()
    .into_bytes();

    let mut tar = tar::Builder::new(fs::File::create(path).unwrap());
    file(&mut tar, "oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#);
    file(&mut tar, "index.json", 0o644, &index);
    for blob in [&layer, &config, &manifest] {
        file(&mut tar, &format!("blobs/sha256/{}", &digest(blob)["sha256:".len()..]), 0o644, blob);
    }
    tar.finish().unwrap();
}

/// Unpacks the image's root file system into a directory.
///
/// # Panics
///
/// When it cannot be written.
pub fn unpack(dir: &Path) {
    tar::Archive::new(layer().as_slice()).unpack(dir).unwrap();
}

fn layer() -> Vec<u8> {
    let busybox = fs::read("/bin/busybox").expect("busybox-static is not installed; run `make deps`");
    let mut tar = tar::Builder::new(Vec::new());
    for dir in ["bin", "dev", "etc", "home", "proc", "root", "run", "sys", "tmp", "usr", "usr/bin", "var", "data"] {
        entry(&mut tar, tar::EntryType::Directory, dir, if dir == "tmp" { 0o1777 } else { 0o755 }, "");
    }
    file(&mut tar, "bin/busybox", 0o755, &busybox);
    for applet in APPLETS {
        entry(&mut tar, tar::EntryType::Symlink, &format!("bin/{applet}"), 0o777, "busybox");
    }
    let passwd = b"root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000:Alice:/home:/bin/sh\n";
    file(&mut tar, "etc/passwd", 0o644, passwd);
    file(&mut tar, "etc/group", 0o644, b"root:x:0:\nalice:x:1000:\nextra:x:2000:alice\n");
    file(&mut tar, "data/hello", 0o644, b"hello from the image\n");
    // A file that is not a program, to be refused with its own error.
    file(&mut tar, "bin/not-executable", 0o644, b"#!/bin/sh\n");
    tar.into_inner().unwrap()
}

fn entry(tar: &mut tar::Builder<Vec<u8>>, kind: tar::EntryType, name: &str, mode: u32, link: &str) {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(0);
    if !link.is_empty() {
        header.set_link_name(link).unwrap();
    }
    tar.append_data(&mut header, name, std::io::empty()).unwrap();
}

fn file<W: std::io::Write>(tar: &mut tar::Builder<W>, name: &str, mode: u32, content: &[u8]) {
    let mut header = tar::Header::new_ustar();
    header.set_mode(mode);
    header.set_size(content.len() as u64);
    tar.append_data(&mut header, name, content).unwrap();
}

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// The machine's architecture as Go names it, which is what image configurations use.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
