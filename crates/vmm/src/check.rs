//! Looks at a machine's description before anything is made: what can't work is refused with its cure.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::{Device, Error, MachineSpec, Payload};

/// Less, and no kernel unpacks itself and an initrd.
const LEAST_MEMORY_MIB: u32 = 64;

/// The most that q35 takes without interrupt remapping.
const MOST_VCPUS: u32 = 255;

/// What the host has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostLimits {
    pub(crate) memory_mib: u64,
    pub(crate) cpus: u32,
}

impl HostLimits {
    pub(crate) fn probe() -> HostLimits {
        let info = rustix::system::sysinfo();
        let memory_mib = (info.totalram as u64).saturating_mul(u64::from(info.mem_unit)) >> 20;
        let cpus =
            std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX));
        HostLimits { memory_mib, cpus }
    }
}

/// Checks sizes, names and options against each other and the host.
pub(crate) fn numbers(spec: &MachineSpec, host: HostLimits, most_ports: u8) -> Result<(), Error> {
    let wrong = |text: String| Err(Error::Spec(text));
    if spec.vcpus == 0 {
        return wrong("it has no vCPU; ask for 1 at least".into());
    }
    if spec.max_vcpus < spec.vcpus {
        return wrong(format!("{} vCPUs are more than the maximum of {}", spec.vcpus, spec.max_vcpus));
    }
    if spec.max_vcpus > MOST_VCPUS {
        return wrong(format!("{} vCPUs are more than the {MOST_VCPUS} that the board takes", spec.max_vcpus));
    }
    if spec.vcpus > host.cpus {
        tracing::warn!(
            "The machine has {} vCPUs on {} CPUs of the host: they will wait for each other",
            spec.vcpus,
            host.cpus
        );
    }
    if spec.memory_mib < LEAST_MEMORY_MIB {
        return wrong(format!(
            "{} MiB of memory are too few to boot; {LEAST_MEMORY_MIB} are the least",
            spec.memory_mib
        ));
    }
    if u64::from(spec.memory_mib) > host.memory_mib {
        return wrong(format!(
            "{} MiB of memory are more than the {} MiB of the host; ask for less",
            spec.memory_mib, host.memory_mib
        ));
    }
    if spec.max_memory_mib < spec.memory_mib {
        return wrong(format!(
            "{} MiB of memory are more than the maximum of {}",
            spec.memory_mib, spec.max_memory_mib
        ));
    }
    if spec.hotplug_ports > most_ports {
        return wrong(format!(
            "{} ports for hot-plug are more than the {most_ports} there is room for",
            spec.hotplug_ports
        ));
    }
    let feature =
        |text: &String| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "+-._=".contains(c));
    if let Some(bad) = spec.cpu_features.iter().find(|text| !feature(text)) {
        return wrong(format!("{bad:?} is no CPU feature; write name=on or name=off"));
    }
    let word = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
    if !word(&spec.machine_type) {
        return wrong(format!("{:?} is no machine type", spec.machine_type));
    }
    if let Payload::Image { fstype, .. } = &spec.boot.payload
        && !word(fstype)
    {
        return wrong(format!("{fstype:?} is no file system type"));
    }
    spec.devices.iter().try_for_each(device)
}

/// Checks what the caller says of a device.
pub(crate) fn device(device: &Device) -> Result<(), Error> {
    let wrong = |text: &str| Err(Error::Device(format!("Device {:?} {text}", device.id())));
    if device.id().is_empty() {
        return wrong("has no id");
    }
    match device {
        // The tag's field in the device's configuration (virtio 1.2, section 5.11.4).
        Device::Share { tag, .. } if tag.is_empty() || tag.len() > 36 => wrong("needs a tag of 1 to 36 bytes"),
        Device::Share { queue_size, .. } if !queue_size.is_power_of_two() || *queue_size > 1024 => {
            wrong("needs a queue size that is a power of two up to 1024")
        }
        // VIRTIO_BLK_ID_BYTES.
        Device::Block { serial, .. } if serial.len() > 20 => wrong("has a serial longer than 20 bytes"),
        Device::Net { taps, vhosts, .. } if taps.is_empty() || (!vhosts.is_empty() && vhosts.len() != taps.len()) => {
            wrong("needs a tap for each queue, and as many vhost descriptors or none")
        }
        Device::Net { taps, .. } if taps.len() > 8 => wrong("has more than 8 queues"),
        Device::Net { mac, .. } if mac[0] & 1 != 0 => wrong("has a multicast hardware address"),
        _ => Ok(()),
    }
}

/// Finds the VMM's program: an absolute path without links.
pub(crate) fn binary(path: &Path) -> Result<PathBuf, Error> {
    let failed = |source| Error::File {
        what: "the VMM's program",
        path: path.to_path_buf(),
        cure: "install QEMU (package qemu-system-x86 on Debian and Ubuntu), or set path in [hypervisor.qemu]".into(),
        source,
    };
    let found = fs::canonicalize(path).map_err(failed)?;
    let metadata = fs::metadata(&found).map_err(failed)?;
    if !metadata.is_file() || metadata.mode() & 0o001 == 0 {
        return Err(failed(io::Error::new(io::ErrorKind::PermissionDenied, "not a program that every user may run")));
    }
    Ok(found)
}

/// Checks that the unprivileged VMM will be able to read a file.
pub(crate) fn readable(what: &'static str, path: &Path, cure: &str) -> Result<File, Error> {
    let failed = |source, cure: &str| Error::File { what, path: path.to_path_buf(), cure: cure.into(), source };
    let file = File::open(path).map_err(|err| failed(err, cure))?;
    let metadata = file.metadata().map_err(|err| failed(err, cure))?;
    if !metadata.is_file() {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"), cure));
    }
    if metadata.len() == 0 {
        return Err(failed(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is empty"), cure));
    }
    if metadata.mode() & 0o004 == 0 {
        let err = io::Error::new(io::ErrorKind::PermissionDenied, "the VMM runs as a user of its own");
        return Err(failed(err, "let every user read it (chmod a+r)"));
    }
    Ok(file)
}

/// Checks that a file is a kernel of a kind that the VMM boots.
pub(crate) fn kernel(path: &Path) -> Result<(), Error> {
    let cure = "build the guest (kata image build), or set kernel in the configuration";
    let file = readable("the guest's kernel", path, cure)?;
    let mut start = [0_u8; 4];
    let mut bzimage = [0_u8; 4];
    let known = (&file).read_exact(&mut start).is_ok() && start == *b"\x7fELF"
        // Boot protocol, Documentation/arch/x86/boot.rst: the magic at 0x202.
        || file.read_exact_at(&mut bzimage, 0x202).is_ok() && bzimage == *b"HdrS"
        || !cfg!(target_arch = "x86_64");
    if known {
        return Ok(());
    }
    Err(Error::File {
        what: "the guest's kernel",
        path: path.to_path_buf(),
        cure: "give a bzImage (vmlinuz) or an ELF vmlinux with a PVH note".into(),
        source: io::Error::new(io::ErrorKind::InvalidData, "neither a bzImage nor an ELF file"),
    })
}

/// Checks that a file can be an initrd.
pub(crate) fn initrd(path: &Path) -> Result<(), Error> {
    let cure = "build the guest (kata image build), or set initrd in the configuration";
    let mut start = [0_u8; 6];
    let file = readable("the guest's initrd", path, cure)?;
    let read = (&file).read_exact(&mut start);
    // What the kernel's unpacker takes: newc archives, and gzip, bzip2, lzma, xz, lzo, lz4, zstd around them.
    const MAGICS: [&[u8]; 9] = [
        b"070701",
        b"070702",
        b"\x1f\x8b",
        b"BZh",
        b"\x5d\x00\x00",
        b"\xfd7zXZ\0",
        b"\x89LZO",
        b"\x02\x21\x4c\x18",
        b"\x28\xb5\x2f\xfd",
    ];
    if read.is_ok() && MAGICS.iter().any(|magic| start.starts_with(magic)) {
        return Ok(());
    }
    Err(Error::File {
        what: "the guest's initrd",
        path: path.to_path_buf(),
        cure: "it is damaged; build it again (kata image build)".into(),
        source: io::Error::new(io::ErrorKind::InvalidData, "not a cpio archive, compressed or not"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Accelerator, Boot, Confinement, Control};
    use std::fs::Permissions;
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::PermissionsExt;

    type Spoil = fn(&mut MachineSpec);

    const HOST: HostLimits = HostLimits { memory_mib: 4096, cpus: 2 };

    fn null() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    fn spec() -> MachineSpec {
        MachineSpec {
            id: "x".into(),
            binary: "/usr/bin/qemu".into(),
            machine_type: "q35".into(),
            accelerator: Accelerator::Tcg,
            vcpus: 1,
            max_vcpus: 2,
            memory_mib: 256,
            max_memory_mib: 512,
            cpu_features: vec!["pmu=off".into(), "+x2apic".into()],
            boot: Boot { kernel: "/k".into(), payload: Payload::Initrd("/i".into()), params: Vec::new() },
            firmware: None,
            devices: Vec::new(),
            hotplug_ports: 8,
            control: Control::Serial { listener: null() },
            confinement: Confinement { uid: 1, gid: 1, cgroups: Vec::new(), runtime_dir: "/run".into() },
            seccomp_sandbox: true,
            debug: false,
        }
    }

    #[test]
    fn each_impossible_number_is_named() {
        numbers(&spec(), HOST, 15).unwrap();
        let table: [(Spoil, &str); 11] = [
            (|spec| spec.vcpus = 0, "no vCPU"),
            (|spec| spec.vcpus = 3, "more than the maximum of 2"),
            (|spec| spec.max_vcpus = 256, "the 255 that the board takes"),
            (|spec| spec.memory_mib = 32, "too few"),
            (|spec| spec.memory_mib = 4097, "more than the 4096 MiB of the host"),
            (|spec| spec.max_memory_mib = 128, "more than the maximum of 128"),
            (|spec| spec.hotplug_ports = 16, "more than the 15"),
            (|spec| spec.cpu_features = vec!["a,b".into()], "no CPU feature"),
            (|spec| spec.machine_type = "q35,x=y".into(), "no machine type"),
            (
                |spec| spec.boot.payload = Payload::Image { path: "/i".into(), fstype: "ext4 init=/x".into() },
                "no file system type",
            ),
            (
                |spec| {
                    let tag = "x".repeat(37);
                    spec.devices = vec![Device::Share { id: "s".into(), tag, socket: null(), queue_size: 128 }];
                },
                "tag of 1 to 36 bytes",
            ),
        ];
        for (spoil, words) in table {
            let mut spec = spec();
            spoil(&mut spec);
            let err = numbers(&spec, HOST, 15).unwrap_err().to_string();
            assert!(err.contains(words), "{err}");
        }
    }

    #[test]
    fn devices_that_cannot_be_are_named() {
        let net = |taps: usize, vhosts: usize, first: u8| Device::Net {
            id: "n".into(),
            taps: (0..taps).map(|_| null()).collect(),
            vhosts: (0..vhosts).map(|_| null()).collect(),
            mac: [first, 0, 0, 0, 0, 1],
        };
        device(&net(2, 2, 2)).unwrap();
        device(&net(1, 0, 2)).unwrap();
        for (bad, words) in [
            (net(0, 0, 2), "a tap for each queue"),
            (net(2, 1, 2), "a tap for each queue"),
            (net(9, 0, 2), "more than 8"),
            (net(1, 0, 1), "multicast"),
            (Device::Share { id: "s".into(), tag: "t".into(), socket: null(), queue_size: 100 }, "power of two"),
            (Device::Block { id: String::new(), file: null(), read_only: true, serial: String::new() }, "no id"),
            (Device::Block { id: "b".into(), file: null(), read_only: true, serial: "x".repeat(21) }, "20 bytes"),
        ] {
            let err = device(&bad).unwrap_err().to_string();
            assert!(err.contains(words), "{err}");
        }
    }

    #[test]
    fn bad_files_are_named_with_a_cure() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let chain = |err: Error| format!("{err}: {}", std::error::Error::source(&err).unwrap());

        let missing = chain(kernel(&path).unwrap_err());
        assert!(missing.contains("kata image build") && missing.contains("No such file"), "{missing}");
        fs::write(&path, "").unwrap();
        assert!(chain(initrd(&path).unwrap_err()).contains("empty"));
        fs::write(&path, "not an archive").unwrap();
        assert!(chain(initrd(&path).unwrap_err()).contains("damaged"));
        assert!(chain(kernel(&path).unwrap_err()).contains("neither a bzImage nor an ELF"));
        fs::write(&path, b"\x7fELF...").unwrap();
        kernel(&path).unwrap();
        fs::write(&path, b"\x1f\x8b\x08\0\0\0").unwrap();
        initrd(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        assert!(chain(initrd(&path).unwrap_err()).contains("chmod a+r"));
        assert!(chain(binary(&path).unwrap_err()).contains("qemu-system-x86"));
        assert!(chain(kernel(dir.path()).unwrap_err()).contains("not a regular file"));
    }
}
