//! `kata check`: can this host run containers in virtual machines? Each finding has a cause and a cure.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use config::{Accelerator, Config, ControlChannel, Root};
use serde::Serialize;

use crate::cli::Format;
use crate::failure::Failure;
use crate::output;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    /// As it should be.
    Ok,
    /// It works, with less.
    Warning,
    /// It can't work.
    Error,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    level: Level,
    /// What was found.
    found: String,
    /// What to do about it; empty where nothing is to be done.
    cure: String,
}

fn good(what: &'static str, found: impl Into<String>) -> Finding {
    Finding { what, level: Level::Ok, found: found.into(), cure: String::new() }
}

fn bad(what: &'static str, level: Level, found: impl Into<String>, cure: impl Into<String>) -> Finding {
    Finding { what, level, found: found.into(), cure: cure.into() }
}

/// `kata check`: exit status 0 when nothing keeps containers from running.
pub(crate) fn check(format: Format) -> Result<u8, Failure> {
    let mut findings = vec![user()];
    match Config::load(None) {
        Ok(config) => {
            let files = config.sources().len();
            findings.push(good("configuration", if files == 0 { "defaults".into() } else { format!("{files} files") }));
            findings.extend(with(&config));
        }
        Err(error) => findings.push(bad("configuration", Level::Error, error.to_string(), "see `kata config check`")),
    }
    let failed = findings.iter().any(|finding| finding.level == Level::Error);
    match format {
        Format::Json => output::json(&findings)?,
        Format::Table => output::print(&text(&findings))?,
    }
    Ok(u8::from(failed))
}

fn text(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let (mark, colour) = match finding.level {
            Level::Ok => ("ok     ", "32"),
            Level::Warning => ("warning", "33"),
            Level::Error => ("error  ", "31"),
        };
        let mark = output::paint(&std::io::stdout(), colour, mark);
        text.push_str(&format!("{mark}  {:<14} {}\n", finding.what, finding.found));
        if !finding.cure.is_empty() {
            text.push_str(&format!("{:24} {}\n", "", finding.cure));
        }
    }
    text
}

fn with(config: &Config) -> Vec<Finding> {
    let hypervisor = &config.hypervisor;
    let make = "install Kata with `make install`, or make it with `kata image build`";
    let mut findings = vec![vmm(&hypervisor.path), file("kernel", &hypervisor.kernel, make)];
    findings.push(match hypervisor.root() {
        Root::Initrd(path) => file("initrd", &path, make),
        Root::Image(path, _) => file("image", &path, make),
    });
    let busybox = config.prefix().join("share/kata/busybox");
    findings.push(match busybox.is_file() {
        true => good("built-in root", busybox.display().to_string()),
        false => bad(
            "built-in root",
            Level::Warning,
            format!("{} is missing", busybox.display()),
            "`kata run` needs --rootfs; install Kata with `make install` to have the built-in one",
        ),
    });
    findings.push(kvm(hypervisor.accelerator));
    findings.push(device(
        "network",
        "/dev/net/tun",
        Level::Warning,
        "pods have no network; load the module: modprobe tun",
    ));
    if hypervisor.control_channel == ControlChannel::VhostVsock {
        let cure = "load the module: modprobe vhost_vsock; or set control_channel = \"virtio-serial\"";
        findings.push(device("control channel", "/dev/vhost-vsock", Level::Error, cure));
    }
    findings.push(memory(hypervisor.default_memory));
    findings
}

fn user() -> Finding {
    if rustix::process::geteuid().is_root() {
        good("user", "root")
    } else {
        bad("user", Level::Error, "not root", "kata makes mounts, namespaces and devices; run it with sudo")
    }
}

fn vmm(path: &Path) -> Finding {
    let cure = "install QEMU (Debian, Ubuntu: apt-get install qemu-system-x86), or set `path` in [hypervisor.qemu]";
    match fs::metadata(path) {
        Ok(file) if file.permissions().mode() & 0o111 != 0 => {}
        Ok(_) => return bad("hypervisor", Level::Error, format!("{} is not executable", path.display()), cure),
        Err(error) => return bad("hypervisor", Level::Error, format!("{}: {error}", path.display()), cure),
    }
    let said = Command::new(path).arg("--version").stdin(Stdio::null()).output();
    match said {
        Ok(said) if said.status.success() => {
            let text = String::from_utf8_lossy(&said.stdout);
            good("hypervisor", text.lines().next().unwrap_or("QEMU").to_owned())
        }
        Ok(said) => bad("hypervisor", Level::Error, format!("{} --version: {}", path.display(), said.status), cure),
        Err(error) => bad("hypervisor", Level::Error, format!("{}: {error}", path.display()), cure),
    }
}

fn file(what: &'static str, path: &Path, cure: &str) -> Finding {
    match File::open(path).and_then(|file| file.metadata()) {
        Ok(file) if file.is_file() => good(what, format!("{}, {} KiB", path.display(), file.len() / 1024)),
        Ok(_) => bad(what, Level::Error, format!("{} is not a file", path.display()), cure),
        Err(error) => bad(what, Level::Error, format!("{}: {error}", path.display()), cure),
    }
}

/// The processor's virtualisation, as the kernel lists it: a `/dev/kvm` without it can't run a stock kernel.
fn kvm(accelerator: Accelerator) -> Finding {
    if accelerator == Accelerator::Tcg {
        return good("acceleration", "none, as configured (accelerator = \"tcg\")");
    }
    let level = if accelerator == Accelerator::Kvm { Level::Error } else { Level::Warning };
    let slow = "virtual machines run, slowly, in software (TCG)";
    let node = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let capable = !cfg!(target_arch = "x86_64")
        || flags
            .lines()
            .filter(|line| line.starts_with("flags"))
            .any(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"));
    match (node, capable) {
        (Ok(_), true) => good("acceleration", "KVM"),
        (Ok(_), false) => bad(
            "acceleration",
            level,
            "/dev/kvm is there, but the processor shows neither vmx nor svm",
            format!("{slow}; on a virtual host, turn on nested virtualisation"),
        ),
        (Err(error), true) => {
            let cure = format!("{slow}; load the module: modprobe kvm_intel or kvm_amd, and be root or in group kvm");
            bad("acceleration", level, format!("/dev/kvm: {error}"), cure)
        }
        (Err(error), false) => {
            let cure = format!("{slow}; turn on virtualisation in the firmware, or nested virtualisation on the host");
            bad("acceleration", level, format!("/dev/kvm: {error}; the processor shows neither vmx nor svm"), cure)
        }
    }
}

fn device(what: &'static str, path: &str, level: Level, cure: &str) -> Finding {
    match fs::metadata(path) {
        Ok(_) => good(what, path),
        Err(error) => bad(what, level, format!("{path}: {error}"), cure),
    }
}

fn memory(default_mib: u32) -> Finding {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next()?.parse::<u64>().ok())
        .map(|kib| kib / 1024);
    match available {
        Some(mib) if mib < u64::from(default_mib) => bad(
            "memory",
            Level::Warning,
            format!("{mib} MiB available, a sandbox has {default_mib} MiB (default_memory)"),
            "free some, or set a smaller default_memory in [hypervisor.qemu]",
        ),
        Some(mib) => good("memory", format!("{mib} MiB available, a sandbox has {default_mib} MiB")),
        None => bad("memory", Level::Warning, "/proc/meminfo doesn't say", "mount /proc"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_its_cure() {
        let prefix = tempdir();
        let config = Config::defaults(&prefix);
        let findings = with(&config);
        let initrd = findings.iter().find(|finding| finding.what == "initrd").unwrap();
        assert_eq!(initrd.level, Level::Error);
        assert!(initrd.found.contains("initrd.img"), "{initrd:?}");
        assert!(findings.iter().all(|finding| (finding.level == Level::Ok) == finding.cure.is_empty()), "{findings:?}");
    }

    fn tempdir() -> std::path::PathBuf {
        std::path::PathBuf::from("/nonexistent/prefix")
    }
}
