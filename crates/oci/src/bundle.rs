//! The bundle of a container started by hand: `/run/kata/bundles/<name>/`, made and removed with it.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::{Error, RunOptions};

/// Where the bundles are.
const BUNDLES: &str = "/run/kata/bundles";

/// What a container may do that asks for nothing: the set that engines agree on.
const CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// The applets of the built-in root file system.
const APPLETS: &[&str] = &[
    "awk", "basename", "cat", "chmod", "chown", "cp", "cut", "date", "dd", "df", "dirname", "dmesg", "echo", "env",
    "false", "find", "free", "grep", "head", "hostname", "id", "ip", "kill", "ln", "ls", "mkdir", "mktemp", "mount",
    "mv", "nproc", "ping", "printf", "ps", "pwd", "readlink", "rm", "rmdir", "sed", "seq", "sh", "sleep", "sort",
    "stat", "stty", "sync", "tail", "tar", "test", "time", "top", "touch", "tr", "true", "tty", "uname", "uniq",
    "uptime", "vi", "wc", "wget", "which", "xargs", "yes",
];

/// What `make run` prints: the two kernels side by side. Given the host's kernel, name and processors.
const GLANCE: &str = r#"printf '%-12s %-28s %s\n' '' host 'this container'
printf '%-12s %-28s %s\n' kernel "$1" "$(uname -r)" name "$2" "$(hostname)" processors "$3" "$(nproc)"
printf '%-12s %-28s %s\n' memory '' "$(awk '/MemTotal/ { print int($2 / 1024) " MiB" }' /proc/meminfo)"
printf '%-12s %-28s %s\n' processes '' "$(ls -d /proc/[0-9]* | wc -l), of which the first is $(cat /proc/1/comm)"
echo
echo 'This ran in a virtual machine of its own, under a kernel that no other pod shares.'
"#;

/// A bundle on disk. Removed when dropped, unless [`Bundle::keep`] was called.
#[derive(Debug)]
pub(crate) struct Bundle {
    dir: PathBuf,
    kept: bool,
}

impl Bundle {
    /// Makes the directory of a new container.
    pub(crate) fn create(name: &str) -> Result<Bundle, Error> {
        let top = Path::new(BUNDLES);
        DirBuilder::new().recursive(true).mode(0o700).create(top).map_err(Error::file("create", top))?;
        let dir = dir(name);
        match DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => Ok(Bundle { dir, kept: false }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(Error::Taken(name.to_owned())),
            Err(error) => Err(Error::file("create", dir)(error)),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.dir
    }

    /// Leaves the bundle on disk, for a container that stays after its command.
    pub(crate) fn keep(mut self) {
        self.kept = true;
    }

    /// Writes `config.json`, and the built-in root file system when the options name none.
    pub(crate) fn write(&self, name: &str, options: &RunOptions) -> Result<(), Error> {
        let rootfs = match &options.rootfs {
            Some(dir) => {
                let dir = dir.canonicalize().map_err(|error| Error::Rootfs(dir.clone(), error))?;
                fs::read_dir(&dir).map_err(|error| Error::Rootfs(dir.clone(), error))?;
                dir
            }
            None => self.built_in_rootfs(&options.busybox)?,
        };
        let path = self.dir.join("config.json");
        fs::write(&path, config(name, options, &rootfs).to_string()).map_err(Error::file("write", path))
    }

    fn built_in_rootfs(&self, busybox: &Path) -> Result<PathBuf, Error> {
        let rootfs = self.dir.join("rootfs");
        let error = |source| Error::File { what: "fill", path: rootfs.clone(), source };
        for dir in ["bin", "dev", "etc", "proc", "root", "run", "sys", "tmp"] {
            fs::create_dir_all(rootfs.join(dir)).map_err(error)?;
        }
        fs::set_permissions(&rootfs, fs::Permissions::from_mode(0o755)).map_err(error)?;
        fs::set_permissions(rootfs.join("tmp"), fs::Permissions::from_mode(0o1777)).map_err(error)?;
        fs::copy(busybox, rootfs.join("bin/busybox")).map_err(|source| Error::NoBusybox(busybox.to_owned(), source))?;
        for applet in APPLETS {
            symlink("busybox", rootfs.join("bin").join(applet)).map_err(error)?;
        }
        fs::write(rootfs.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").map_err(error)?;
        fs::write(rootfs.join("etc/group"), "root:x:0:\n").map_err(error)?;
        fs::write(rootfs.join("etc/glance"), GLANCE).map_err(error)?;
        Ok(rootfs)
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        if !self.kept {
            // Nothing is mounted below it here: the pod's mounts are in the shim's own namespace.
            drop(fs::remove_dir_all(&self.dir));
        }
    }
}

/// The bundle's directory of a container that was started by hand.
pub(crate) fn dir(name: &str) -> PathBuf {
    Path::new(BUNDLES).join(name)
}

/// Removes the bundle of a container that was started by hand; engines remove their own.
pub(crate) fn remove(name: &str) -> Result<(), Error> {
    let dir = dir(name);
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::file("remove", dir)(error)),
        _ => Ok(()),
    }
}

/// The OCI runtime configuration, as an engine would write it for a container that asks for nothing more.
fn config(name: &str, options: &RunOptions, rootfs: &Path) -> Value {
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": source, "options": options });
    let mut env =
        vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(), "HOME=/root".to_owned()];
    if options.terminal {
        env.push(format!("TERM={}", std::env::var("TERM").unwrap_or_else(|_| "xterm".to_owned())));
    }
    env.extend(options.env.iter().cloned());
    let mut resources = json!({ "devices": [{ "allow": false, "access": "rwm" }] });
    if let Some(bytes) = options.memory {
        resources["memory"] = json!({ "limit": bytes });
    }
    if let Some(cpus) = options.cpus {
        // The quota in microseconds of a period of 100 ms, as engines write a number of processors.
        #[allow(clippy::cast_possible_truncation)]
        let quota = (cpus * 100_000.0) as i64;
        resources["cpu"] = json!({ "quota": quota, "period": 100_000 });
    }
    json!({
        "ociVersion": "1.0.2",
        "root": { "path": rootfs },
        "hostname": name,
        "process": {
            "terminal": options.terminal,
            "user": { "uid": 0, "gid": 0 },
            "args": options.command,
            "env": env,
            "cwd": options.workdir,
            "capabilities": { "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES },
            "noNewPrivileges": true,
        },
        "mounts": [
            mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
        ],
        "linux": {
            "cgroupsPath": format!("/kata/{name}"),
            "namespaces": [{ "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }],
            "resources": resources,
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug",
                "/proc/scsi", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}

/// The process of an `exec`: as the container's own, with another command.
pub(crate) fn exec_process(
    bundle: &Path,
    command: &[String],
    env: &[String],
    workdir: Option<&str>,
    terminal: bool,
) -> Result<Value, Error> {
    let path = bundle.join("config.json");
    let text = fs::read(&path).map_err(Error::file("read", &path))?;
    let config: Value = serde_json::from_slice(&text).map_err(|error| Error::File {
        what: "understand",
        path: path.clone(),
        source: error.into(),
    })?;
    let mut process = config["process"].clone();
    process["args"] = json!(command);
    process["terminal"] = json!(terminal);
    if let Some(workdir) = workdir {
        process["cwd"] = json!(workdir);
    }
    if let Some(list) = process["env"].as_array_mut() {
        list.extend(env.iter().map(|entry| json!(entry)));
    }
    Ok(process)
}
