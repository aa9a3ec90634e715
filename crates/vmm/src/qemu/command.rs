//! QEMU's argument vector, out of a layout in which every descriptor has its number.
//!
//! Whatever can be is written as JSON, the same objects that go over the monitor at run time: nothing in them needs
//! escaping, and a device is described once for both ways. Host paths don't occur at all: files are at fixed places
//! in the jail, everything else is a descriptor.

use std::os::fd::RawFd;

use serde_json::{Value, json};

use crate::Accelerator;

/// Where the jail shows the kernel.
pub(crate) const KERNEL: &str = "/boot/kernel";
/// Where the jail shows the initrd.
pub(crate) const INITRD: &str = "/boot/initrd";
/// Where the jail shows the firmware.
pub(crate) const FIRMWARE: &str = "/boot/firmware";

/// The slot of the control device on the root bus; the machine's devices follow it.
pub(crate) const CONTROL_SLOT: u8 = 0x01;
/// The slot of the first root port for hot-plug; the devices of the start lie below it.
pub(crate) const FIRST_PORT_SLOT: u8 = 0x10;
/// How many root ports there is room for: slot 0x1f is the chipset's.
pub(crate) const MOST_PORTS: u8 = 0x1f - FIRST_PORT_SLOT;
/// Slots of memory modules: each growth takes one.
pub(crate) const MEMORY_SLOTS: u8 = 16;

/// Memory for translated code under TCG, in MiB. QEMU's own default, a gigabyte of address space, is filled as the
/// guest runs and never given back; 32 hold a booted kernel and a busy container without being flushed all the time.
const TCG_CACHE_MIB: u32 = 32;

/// A device whose descriptors are known to QEMU, by number on the command line or by name at run time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wired {
    /// The chardev is named [`chardev_of`] the key.
    Share { tag: String, queue_size: u32 },
    /// The block node has the key's name.
    Block { serial: String },
    /// The netdev is named [`netdev_of`] the key.
    Net { mac: [u8; 6], queues: usize },
}

/// What stands behind a [`Wired`] device when it's there from the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    /// A connected vhost-user socket.
    Socket(RawFd),
    /// A raw file or block device.
    File { fd: RawFd, kind: FileKind, read_only: bool },
    /// A tap's queues, with as many vhost descriptors or none.
    Tap { taps: Vec<RawFd>, vhosts: Vec<RawFd> },
}

/// What a disk's descriptor is; QEMU has a block driver for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileKind {
    /// A regular file.
    File,
    /// A block device.
    Device,
}

/// A device of the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    /// QEMU's name for it.
    pub(crate) key: String,
    /// Its slot on the root bus.
    pub(crate) slot: u8,
    pub(crate) device: Wired,
    pub(crate) backend: Backend,
}

/// The control channel, its descriptor numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WiredControl {
    Serial { listener: RawFd },
    VhostVsock { cid: u32, vhost: RawFd },
    VhostUserVsock { socket: RawFd },
}

/// A machine as QEMU is told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) name: String,
    pub(crate) machine_type: String,
    /// Never `Auto`.
    pub(crate) accelerator: Accelerator,
    pub(crate) cpu_features: Vec<String>,
    pub(crate) vcpus: u32,
    pub(crate) max_vcpus: u32,
    pub(crate) memory_mib: u32,
    pub(crate) max_memory_mib: u32,
    pub(crate) firmware: bool,
    pub(crate) initrd: bool,
    pub(crate) kernel_params: String,
    pub(crate) monitor: RawFd,
    pub(crate) console: RawFd,
    pub(crate) control: WiredControl,
    pub(crate) devices: Vec<Placed>,
    pub(crate) ports: u8,
    pub(crate) seccomp: bool,
}

impl Layout {
    /// The arguments, without the program's name.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let mut args = Arguments(Vec::new());
        args.option("-name", &format!("guest=kata-{}", escape(&self.name)));
        // Nothing that isn't asked for here: no configuration files, default devices, displays.
        for flag in ["-no-user-config", "-nodefaults", "-nographic", "-no-reboot"] {
            args.0.push(flag.to_owned());
        }
        args.option("-vga", "none");
        if self.seccomp {
            args.option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
        }
        self.processor_and_memory(&mut args);
        self.boot(&mut args);
        args.option("-chardev", &format!("socket,id=monitor,fd={}", self.monitor));
        args.option("-mon", "chardev=monitor,mode=control");
        args.option("-chardev", &format!("socket,id=console,fd={}", self.console));
        args.option("-serial", "chardev:console");
        self.control(&mut args);
        for placed in &self.devices {
            placed.arguments(&mut args);
        }
        for port in 0..self.ports {
            args.json("-device", &root_port(port));
        }
        args.0
    }

    fn processor_and_memory(&self, args: &mut Arguments) {
        // dump-guest-core: the guest's memory is the pod's secret, not a crash report's. sata, smbus, usb, vmport:
        // devices of a desktop that cost the guest probing time and the host attack surface.
        let machine = format!(
            "{},memory-backend=ram,dump-guest-core=off,sata=off,smbus=off,usb=off,vmport=off",
            self.machine_type
        );
        args.option("-machine", &machine);
        let (accelerator, model) = match self.accelerator {
            Accelerator::Kvm => ("kvm".to_owned(), "host"),
            Accelerator::Tcg | Accelerator::Auto => (format!("tcg,thread=multi,tb-size={TCG_CACHE_MIB}"), "max"),
        };
        args.option("-accel", &accelerator);
        // No comma can be in a feature, nor in the machine type: they were checked.
        let features: String = self.cpu_features.iter().map(|feature| format!(",{feature}")).collect();
        args.option("-cpu", &format!("{model}{features}"));
        // One socket: the cores come and go by their number in it.
        args.option(
            "-smp",
            &format!("cpus={},maxcpus={max},sockets=1,cores={max},threads=1", self.vcpus, max = self.max_vcpus),
        );
        let mut memory = format!("size={}M", self.memory_mib);
        if self.max_memory_mib > self.memory_mib {
            memory += &format!(",slots={MEMORY_SLOTS},maxmem={}M", self.max_memory_mib);
        }
        args.option("-m", &memory);
        args.json("-object", &memory_backend("ram", self.memory_mib));
    }

    fn boot(&self, args: &mut Arguments) {
        if self.firmware {
            args.option("-bios", FIRMWARE);
        }
        args.option("-kernel", KERNEL);
        if self.initrd {
            args.option("-initrd", INITRD);
        }
        args.option("-append", &self.kernel_params);
    }

    fn control(&self, args: &mut Arguments) {
        let place = |mut device: Value| {
            device["bus"] = json!("pcie.0");
            device["addr"] = json!(format!("{CONTROL_SLOT:x}"));
            device
        };
        match self.control {
            WiredControl::Serial { listener } => {
                args.option("-chardev", &format!("socket,id=agent,fd={listener},server=on,wait=off"));
                // Two ports: the first is for consoles only. QEMU would offer 31, each with its queues.
                args.json(
                    "-device",
                    &place(json!({ "driver": "virtio-serial-pci", "id": "serial", "max_ports": 2, "disable-legacy": "on" })),
                );
                args.json(
                    "-device",
                    &json!({ "driver": "virtserialport", "bus": "serial.0", "chardev": "agent",
                             "name": protocol::AGENT_SERIAL_PORT }),
                );
            }
            WiredControl::VhostVsock { cid, vhost } => args.json(
                "-device",
                &place(json!({ "driver": "vhost-vsock-pci", "guest-cid": cid, "vhostfd": vhost.to_string(),
                               "disable-legacy": "on" })),
            ),
            WiredControl::VhostUserVsock { socket } => {
                args.option("-chardev", &format!("socket,id=agent,fd={socket}"));
                args.json("-device", &place(json!({ "driver": "vhost-user-vsock-pci", "chardev": "agent" })));
            }
        }
    }
}

impl Placed {
    fn arguments(&self, args: &mut Arguments) {
        let key = &self.key;
        match &self.backend {
            Backend::Socket(fd) => args.option("-chardev", &format!("socket,id={},fd={fd}", chardev_of(key))),
            Backend::File { fd, kind, read_only } => {
                // The set's number is the descriptor's: unique, and never met by those of run time.
                args.option("-add-fd", &format!("fd={fd},set={fd}"));
                args.json("-blockdev", &block_node(key, i64::from(*fd), *kind, *read_only));
            }
            Backend::Tap { taps, vhosts } => {
                let list = |fds: &[RawFd]| fds.iter().map(RawFd::to_string).collect::<Vec<_>>().join(":");
                let mut netdev = format!("tap,id={},fds={}", netdev_of(key), list(taps));
                if !vhosts.is_empty() {
                    netdev += &format!(",vhost=on,vhostfds={}", list(vhosts));
                }
                args.option("-netdev", &netdev);
            }
        }
        args.json("-device", &device(key, &self.device, "pcie.0", self.slot));
    }
}

/// The `device_add` object of a device.
pub(crate) fn device(key: &str, device: &Wired, bus: &str, slot: u8) -> Value {
    let mut value = match device {
        Wired::Share { tag, queue_size } => {
            json!({ "driver": "vhost-user-fs-pci", "chardev": chardev_of(key), "tag": tag, "queue-size": queue_size })
        }
        Wired::Block { serial } => {
            let mut value = json!({ "driver": "virtio-blk-pci", "drive": key, "disable-legacy": "on" });
            if !serial.is_empty() {
                value["serial"] = json!(serial);
            }
            value
        }
        Wired::Net { mac, queues } => {
            let mac: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
            // Without romfile QEMU loads firmware to boot from the network.
            let mut value = json!({ "driver": "virtio-net-pci", "netdev": netdev_of(key), "mac": mac.join(":"),
                                    "romfile": "", "disable-legacy": "on" });
            if *queues > 1 {
                value["mq"] = json!(true);
                // One for each direction of each pair, one for control, one for changes of configuration.
                value["vectors"] = json!(2 * queues + 2);
            }
            value
        }
    };
    value["id"] = json!(key);
    value["bus"] = json!(bus);
    value["addr"] = json!(format!("{slot:x}"));
    value
}

/// The `blockdev-add` object of a raw disk behind a set of descriptors.
pub(crate) fn block_node(key: &str, set: i64, kind: FileKind, read_only: bool) -> Value {
    // The protocol driver alone, without a format on top: raw, and no header the guest writes is ever looked at.
    json!({
        "driver": match kind { FileKind::File => "file", FileKind::Device => "host_device" },
        "node-name": key,
        "filename": format!("/dev/fdset/{set}"),
        "read-only": read_only,
        "auto-read-only": false,
        "discard": if read_only { "ignore" } else { "unmap" },
    })
}

/// The `object-add` object of a block of memory. Shared, as vhost-user servers map it.
pub(crate) fn memory_backend(id: &str, mib: u32) -> Value {
    json!({ "qom-type": "memory-backend-memfd", "id": id, "size": u64::from(mib) << 20, "share": true })
}

/// The name of a device's chardev.
pub(crate) fn chardev_of(key: &str) -> String {
    format!("{key}-socket")
}

/// The name of a device's netdev.
pub(crate) fn netdev_of(key: &str) -> String {
    format!("{key}-tap")
}

/// The name of a root port, which is also that of the bus behind it.
pub(crate) fn port_name(port: u8) -> String {
    format!("port{port}")
}

/// Where the guest finds what is behind a port.
pub(crate) fn port_path(port: u8) -> String {
    format!("{:02x}/00", FIRST_PORT_SLOT + port)
}

fn root_port(port: u8) -> Value {
    json!({
        "driver": "pcie-root-port",
        "id": port_name(port),
        "bus": "pcie.0",
        "addr": format!("{:x}", FIRST_PORT_SLOT + port),
        "chassis": port + 1,
        "slot": port + 1,
        // Room for the devices' registers only: none of ours has any in I/O ports.
        "io-reserve": 0,
    })
}

/// In QEMU's `key=value` options a comma is written twice.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

struct Arguments(Vec<String>);

impl Arguments {
    fn option(&mut self, name: &str, value: &str) {
        self.0.extend([name.to_owned(), value.to_owned()]);
    }

    fn json(&mut self, name: &str, value: &Value) {
        self.option(name, &value.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layout() -> Layout {
        Layout {
            name: "pod1".into(),
            machine_type: "q35".into(),
            accelerator: Accelerator::Tcg,
            cpu_features: Vec::new(),
            vcpus: 1,
            max_vcpus: 2,
            memory_mib: 256,
            max_memory_mib: 256,
            firmware: true,
            initrd: true,
            kernel_params: "console=ttyS0 quiet".into(),
            monitor: 3,
            console: 4,
            control: WiredControl::Serial { listener: 5 },
            devices: Vec::new(),
            ports: 0,
            seccomp: true,
        }
    }

    /// One line for each option and its value.
    fn lines(layout: &Layout) -> Vec<String> {
        let mut lines: Vec<String> = Vec::new();
        for arg in layout.arguments() {
            match lines.last_mut() {
                Some(line) if !arg.starts_with('-') => *line += &format!(" {arg}"),
                _ => lines.push(arg),
            }
        }
        lines
    }

    #[test]
    fn the_smallest_machine() {
        let expected = r#"
-name guest=kata-pod1
-no-user-config
-nodefaults
-nographic
-no-reboot
-vga none
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-machine q35,memory-backend=ram,dump-guest-core=off,sata=off,smbus=off,usb=off,vmport=off
-accel tcg,thread=multi,tb-size=32
-cpu max
-smp cpus=1,maxcpus=2,sockets=1,cores=2,threads=1
-m size=256M
-object {"id":"ram","qom-type":"memory-backend-memfd","share":true,"size":268435456}
-bios /boot/firmware
-kernel /boot/kernel
-initrd /boot/initrd
-append console=ttyS0 quiet
-chardev socket,id=monitor,fd=3
-mon chardev=monitor,mode=control
-chardev socket,id=console,fd=4
-serial chardev:console
-chardev socket,id=agent,fd=5,server=on,wait=off
-device {"addr":"1","bus":"pcie.0","disable-legacy":"on","driver":"virtio-serial-pci","id":"serial","max_ports":2}
-device {"bus":"serial.0","chardev":"agent","driver":"virtserialport","name":"org.katacontainers.agent.0"}
"#;
        assert_eq!(lines(&layout()), expected.trim().lines().collect::<Vec<_>>());
    }

    #[test]
    fn a_machine_with_everything() {
        let device = |key: &str, slot, device, backend| Placed { key: key.into(), slot, device, backend };
        let disk = Wired::Block { serial: "s,1".into() };
        let layout = Layout {
            accelerator: Accelerator::Kvm,
            cpu_features: vec!["pmu=off".into()],
            max_memory_mib: 1024,
            firmware: false,
            initrd: false,
            seccomp: false,
            ports: 2,
            control: WiredControl::VhostVsock { cid: 77, vhost: 6 },
            devices: vec![
                device("d2", 2, disk, Backend::File { fd: 7, kind: FileKind::Device, read_only: true }),
                device("d3", 3, Wired::Share { tag: "kataShared".into(), queue_size: 128 }, Backend::Socket(8)),
                device(
                    "d4",
                    4,
                    Wired::Net { mac: [2, 0, 0, 0, 0, 0xab], queues: 2 },
                    Backend::Tap { taps: vec![9, 10], vhosts: vec![11, 12] },
                ),
            ],
            ..layout()
        };
        let expected = r#"
-machine q35,memory-backend=ram,dump-guest-core=off,sata=off,smbus=off,usb=off,vmport=off
-accel kvm
-cpu host,pmu=off
-smp cpus=1,maxcpus=2,sockets=1,cores=2,threads=1
-m size=256M,slots=16,maxmem=1024M
-object {"id":"ram","qom-type":"memory-backend-memfd","share":true,"size":268435456}
-kernel /boot/kernel
-append console=ttyS0 quiet
-chardev socket,id=monitor,fd=3
-mon chardev=monitor,mode=control
-chardev socket,id=console,fd=4
-serial chardev:console
-device {"addr":"1","bus":"pcie.0","disable-legacy":"on","driver":"vhost-vsock-pci","guest-cid":77,"vhostfd":"6"}
-add-fd fd=7,set=7
-blockdev {"auto-read-only":false,"discard":"ignore","driver":"host_device","filename":"/dev/fdset/7","node-name":"d2","read-only":true}
-device {"addr":"2","bus":"pcie.0","disable-legacy":"on","drive":"d2","driver":"virtio-blk-pci","id":"d2","serial":"s,1"}
-chardev socket,id=d3-socket,fd=8
-device {"addr":"3","bus":"pcie.0","chardev":"d3-socket","driver":"vhost-user-fs-pci","id":"d3","queue-size":128,"tag":"kataShared"}
-netdev tap,id=d4-tap,fds=9:10,vhost=on,vhostfds=11:12
-device {"addr":"4","bus":"pcie.0","disable-legacy":"on","driver":"virtio-net-pci","id":"d4","mac":"02:00:00:00:00:ab","mq":true,"netdev":"d4-tap","romfile":"","vectors":6}
-device {"addr":"10","bus":"pcie.0","chassis":1,"driver":"pcie-root-port","id":"port0","io-reserve":0,"slot":1}
-device {"addr":"11","bus":"pcie.0","chassis":2,"driver":"pcie-root-port","id":"port1","io-reserve":0,"slot":2}
"#;
        assert_eq!(lines(&layout)[6..], expected.trim().lines().collect::<Vec<_>>());
    }

    #[test]
    fn a_vsock_daemon_is_reached_by_its_socket() {
        let lines = lines(&Layout { control: WiredControl::VhostUserVsock { socket: 9 }, ..layout() });
        assert_eq!(
            lines[lines.len() - 2..],
            [
                "-chardev socket,id=agent,fd=9",
                r#"-device {"addr":"1","bus":"pcie.0","chardev":"agent","driver":"vhost-user-vsock-pci"}"#
            ]
        );
    }

    #[test]
    fn the_last_port_leaves_the_chipset_its_slot() {
        assert_eq!(port_path(MOST_PORTS - 1), "1e/00");
    }

    /// How QEMU takes an option apart.
    fn split(option: &str) -> Vec<String> {
        let mut parts = vec![String::new()];
        let mut characters = option.chars().peekable();
        while let Some(character) = characters.next() {
            if character != ',' || characters.next_if_eq(&',').is_some() {
                parts.last_mut().unwrap().push(character);
            } else {
                parts.push(String::new());
            }
        }
        parts
    }

    proptest! {
        #[test]
        fn no_name_becomes_two_options(name in "\\PC{0,30}") {
            let arguments = Layout { name: name.clone(), ..layout() }.arguments();
            let at = arguments.iter().position(|argument| argument == "-name").unwrap();
            prop_assert_eq!(split(&arguments[at + 1]), [format!("guest=kata-{name}")]);
        }
    }
}
