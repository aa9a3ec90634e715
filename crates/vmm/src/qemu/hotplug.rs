//! Changes of a running machine: devices behind root ports, vCPUs, memory.
//!
//! ```text
//!   add:     descriptors ─▶ backend (chardev, blockdev, netdev) ─▶ device_add        undone in reverse on failure
//!   remove:  device_del ─▶ guest lets go ─▶ DEVICE_DELETED ─▶ backend ─▶ descriptors
//! ```

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::broadcast;
use tokio::time::{Instant, timeout_at};

use super::Monitor;
use super::command::{
    self, FileKind, MEMORY_SLOTS, Wired, block_node, chardev_of, memory_backend, netdev_of, port_name, port_path,
};
use crate::{Device, Error, Plugged};

/// How long the guest may take to let go of a device. A tenth of a second in software on an idle host.
const UNPLUG_LIMIT: Duration = Duration::from_secs(30);

/// The guest's kernel onlines memory in blocks of this size (x86, below 64 GiB).
const MEMORY_BLOCK_MIB: u32 = 128;

/// What is plugged where. One change at a time: whoever changes holds the lock around this.
#[derive(Debug)]
pub(crate) struct Slots {
    present: Vec<Present>,
    ports: u8,
    next_key: u32,
    memory_mib: u32,
    max_memory_mib: u32,
    modules: u8,
    max_vcpus: u32,
}

#[derive(Debug)]
struct Present {
    plugged: Plugged,
    /// QEMU's name, and what stands behind the device; `None` for those of the start, which stay.
    later: Option<Later>,
}

#[derive(Debug)]
struct Later {
    key: String,
    port: u8,
    backend: Backend,
}

#[derive(Clone, Copy, Debug)]
enum Backend {
    Chardev,
    Block { set: i64 },
    Netdev,
}

impl Slots {
    pub(crate) fn new(start: Vec<Plugged>, ports: u8, memory_mib: u32, max_memory_mib: u32, max_vcpus: u32) -> Slots {
        let present = start.into_iter().map(|plugged| Present { plugged, later: None }).collect();
        Slots { present, ports, next_key: 0, memory_mib, max_memory_mib, modules: 0, max_vcpus }
    }

    pub(crate) fn devices(&self) -> Vec<Plugged> {
        self.present.iter().map(|present| present.plugged.clone()).collect()
    }

    fn free_port(&self) -> Option<u8> {
        (0..self.ports).find(|port| !self.present.iter().flat_map(|present| &present.later).any(|l| l.port == *port))
    }

    pub(crate) async fn add(&mut self, monitor: &Monitor, device: Device) -> Result<Plugged, Error> {
        crate::check::device(&device)?;
        let id = device.id().to_owned();
        if self.present.iter().any(|present| present.plugged.id == id) {
            return Err(Error::Device(format!("Device {id:?} is plugged in already")));
        }
        let Some(port) = self.free_port() else {
            return Err(Error::Device(format!(
                "Device {id:?} finds no free port: all {} for hot-plug are taken; raise their number in the configuration",
                self.ports
            )));
        };
        // Keys of the start begin otherwise. Never reused: a late event of a former device can't be mistaken.
        let key = format!("h{}", self.next_key);
        self.next_key += 1;
        let (wired, backend) = monitor.make_backend(&key, device).await?;
        let device = command::device(&key, &wired, &port_name(port), 0);
        if let Err(err) = monitor.call("device_add", device).await {
            monitor.drop_backend(&key, backend).await;
            return Err(err);
        }
        let plugged = Plugged { id, pci_path: port_path(port) };
        self.present.push(Present { plugged: plugged.clone(), later: Some(Later { key, port, backend }) });
        Ok(plugged)
    }

    pub(crate) async fn remove(&mut self, monitor: &Monitor, id: &str) -> Result<(), Error> {
        let Some(index) = self.present.iter().position(|present| present.plugged.id == id) else {
            return Err(Error::Device(format!("Device {id:?} is not plugged in")));
        };
        let Some(Later { key, backend, .. }) = &self.present[index].later else {
            return Err(Error::Device(format!("Device {id:?} was there from the start and stays")));
        };
        let events = monitor.qmp.events();
        monitor.call("device_del", json!({ "id": key })).await?;
        monitor.deleted(events, key, id).await?;
        monitor.drop_backend(key, *backend).await;
        self.present.remove(index);
        Ok(())
    }

    pub(crate) async fn resize_vcpus(&mut self, monitor: &Monitor, wanted: u32) -> Result<u32, Error> {
        if wanted > self.max_vcpus {
            return Err(Error::Spec(format!("{wanted} vCPUs are more than its maximum of {}", self.max_vcpus)));
        }
        let answer = monitor.call("query-hotpluggable-cpus", json!({})).await?;
        let (mut present, absent) = sort_cpus(&answer)?;
        for cpu in absent.into_iter().take(wanted.saturating_sub(present) as usize) {
            let mut device = cpu.props;
            device["driver"] = json!(cpu.model);
            device["id"] = json!(format!("cpu-{present}"));
            monitor.call("device_add", device).await?;
            present += 1;
        }
        Ok(present)
    }

    pub(crate) async fn resize_memory(&mut self, monitor: &Monitor, wanted: u32) -> Result<u32, Error> {
        if wanted <= self.memory_mib {
            return Ok(self.memory_mib);
        }
        let size = (wanted - self.memory_mib).next_multiple_of(MEMORY_BLOCK_MIB);
        let total = self.memory_mib.saturating_add(size);
        if total > self.max_memory_mib {
            return Err(Error::Spec(format!(
                "{total} MiB of memory are more than its maximum of {}",
                self.max_memory_mib
            )));
        }
        if self.modules == MEMORY_SLOTS {
            return Err(Error::Spec(format!("its memory was grown {MEMORY_SLOTS} times, and no slot is left")));
        }
        let backend = format!("ram{}", self.modules);
        monitor.call("object-add", memory_backend(&backend, size)).await?;
        let module = json!({ "driver": "pc-dimm", "id": format!("dimm{}", self.modules), "memdev": backend });
        if let Err(err) = monitor.call("device_add", module).await {
            monitor.undo("object-del", json!({ "id": backend })).await;
            return Err(err);
        }
        self.modules += 1;
        self.memory_mib = total;
        Ok(total)
    }
}

/// A place for a vCPU.
#[derive(Debug)]
struct CpuPlace {
    model: String,
    props: Value,
}

/// How many vCPUs there are, and the free places in ascending order.
///
/// QEMU lists them the other way round. A guest stalls for seconds when a core arrives before those below it.
fn sort_cpus(answer: &Value) -> Result<(u32, Vec<CpuPlace>), Error> {
    let broken = || Error::Protocol("query-hotpluggable-cpus gave no list of CPUs".to_owned());
    let mut present = 0;
    let mut absent = Vec::new();
    for cpu in answer.as_array().ok_or_else(broken)? {
        if cpu.get("qom-path").is_some() {
            present += 1;
            continue;
        }
        let model = cpu.get("type").and_then(Value::as_str).ok_or_else(broken)?.to_owned();
        let props = cpu.get("props").filter(|props| props.is_object()).ok_or_else(broken)?.clone();
        absent.push(CpuPlace { model, props });
    }
    absent.sort_by_key(|place| {
        ["socket-id", "die-id", "core-id", "thread-id"].map(|key| place.props.get(key).and_then(Value::as_u64))
    });
    Ok((present, absent))
}

impl Monitor {
    /// Makes what stands behind a device, out of its descriptors. Leaves nothing after an error.
    async fn make_backend(&self, key: &str, device: Device) -> Result<(Wired, Backend), Error> {
        match device {
            Device::Share { tag, socket, queue_size, .. } => {
                self.give(key, &socket).await?;
                let backend = json!({ "type": "socket", "data": { "server": false,
                    "addr": { "type": "fd", "data": { "str": key } } } });
                let made = self.call("chardev-add", json!({ "id": chardev_of(key), "backend": backend })).await;
                self.made(made, key).await?;
                Ok((Wired::Share { tag, queue_size }, Backend::Chardev))
            }
            Device::Block { file, read_only, serial, .. } => {
                let (file, kind) = disk(file, read_only)?;
                let added = self.call_with("add-fd", json!({}), &[file.as_fd()]).await?;
                let set = added.get("fdset-id").and_then(Value::as_i64);
                let set = set.ok_or_else(|| Error::Protocol("add-fd gave no set".to_owned()))?;
                if let Err(err) = self.call("blockdev-add", block_node(key, set, kind, read_only)).await {
                    self.undo("remove-fd", json!({ "fdset-id": set })).await;
                    return Err(err);
                }
                Ok((Wired::Block { serial }, Backend::Block { set }))
            }
            Device::Net { taps, vhosts, mac, .. } => {
                let queues = taps.len();
                let mut names = Vec::new();
                let mut lists = Vec::new();
                for (kind, fds) in [("tap", &taps), ("vhost", &vhosts)] {
                    let from = names.len();
                    for (number, fd) in fds.iter().enumerate() {
                        let name = format!("{key}-{kind}{number}");
                        if let Err(err) = self.give(&name, fd).await {
                            self.take_back(&names).await;
                            return Err(err);
                        }
                        names.push(name);
                    }
                    lists.push(names[from..].join(":"));
                }
                let mut netdev = json!({ "type": "tap", "id": netdev_of(key), "fds": lists[0] });
                if !vhosts.is_empty() {
                    netdev["vhost"] = json!(true);
                    netdev["vhostfds"] = json!(lists[1]);
                }
                if let Err(err) = self.call("netdev_add", netdev).await {
                    self.take_back(&names).await;
                    return Err(err);
                }
                Ok((Wired::Net { mac, queues }, Backend::Netdev))
            }
        }
    }

    /// Removes what stood behind a device that is gone or never came. Failures leave a descriptor open in the VMM
    /// until it ends, and are logged.
    async fn drop_backend(&self, key: &str, backend: Backend) {
        match backend {
            Backend::Chardev => self.undo("chardev-remove", json!({ "id": chardev_of(key) })).await,
            Backend::Block { set } => {
                self.undo("blockdev-del", json!({ "node-name": key })).await;
                self.undo("remove-fd", json!({ "fdset-id": set })).await;
            }
            Backend::Netdev => self.undo("netdev_del", json!({ "id": netdev_of(key) })).await,
        }
    }

    /// Hands a descriptor over under a name.
    async fn give(&self, name: &str, fd: &OwnedFd) -> Result<(), Error> {
        self.call_with("getfd", json!({ "fdname": name }), &[fd.as_fd()]).await.map(drop)
    }

    /// A command that was to use the descriptor of this name failed or not: if it did, the descriptor is closed.
    async fn made(&self, outcome: Result<Value, Error>, name: &str) -> Result<(), Error> {
        if outcome.is_err() {
            self.take_back(&[name.to_owned()]).await;
        }
        outcome.map(drop)
    }

    async fn take_back(&self, names: &[String]) {
        for name in names {
            self.undo("closefd", json!({ "fdname": name })).await;
        }
    }

    /// Runs a command whose failure changes nothing for the caller.
    async fn undo(&self, command: &str, arguments: Value) {
        if let Err(err) = self.call(command, arguments).await {
            tracing::debug!("Tidying up with {command}: {err}");
        }
    }

    /// Waits until the guest has let go of a device.
    async fn deleted(
        &self,
        mut events: broadcast::Receiver<super::qmp::Event>,
        key: &str,
        id: &str,
    ) -> Result<(), Error> {
        let end = Instant::now() + UNPLUG_LIMIT;
        loop {
            match timeout_at(end, events.recv()).await {
                Err(_) => {
                    return Err(Error::Timeout {
                        what: format!("Unplugging {id:?} from the guest"),
                        after: UNPLUG_LIMIT,
                    });
                }
                Ok(Ok(event)) if event.data.get("device").and_then(Value::as_str) == Some(key) => {
                    match event.name.as_str() {
                        "DEVICE_DELETED" => return Ok(()),
                        "DEVICE_UNPLUG_GUEST_ERROR" => {
                            return Err(Error::Device(format!(
                                "The guest refuses to let go of device {id:?}; is it in use?"
                            )));
                        }
                        _ => {}
                    }
                }
                Ok(Ok(_) | Err(broadcast::error::RecvError::Lagged(_))) => {}
                Ok(Err(broadcast::error::RecvError::Closed)) => return Err(self.gone().await),
            }
        }
    }
}

/// A disk's descriptor as QEMU wants it: of the right kind, and with exactly the rights that the node has.
pub(crate) fn disk(file: OwnedFd, read_only: bool) -> Result<(OwnedFd, FileKind), Error> {
    let failed = |err| Error::Host("look at a disk's file", err);
    let file = File::from(file);
    let kind = file.metadata().map_err(failed)?.file_type();
    let kind = if kind.is_block_device() {
        FileKind::Device
    } else if kind.is_file() {
        FileKind::File
    } else {
        return Err(Error::Device("A disk is neither a regular file nor a block device".to_owned()));
    };
    let mode = rustix::fs::fcntl_getfl(&file).map_err(|err| failed(err.into()))? & rustix::fs::OFlags::RWMODE;
    if read_only && mode != rustix::fs::OFlags::RDONLY {
        // A second description of the same file: the guest must not be a bug away from writing.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let file = File::options().read(true).open(path).map_err(failed)?;
        return Ok((file.into(), kind));
    }
    if !read_only && mode != rustix::fs::OFlags::RDWR {
        return Err(Error::Device("A writable disk's file is not open for reading and writing".to_owned()));
    }
    Ok((file.into(), kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_come_in_ascending_order() {
        let cpu = |core: u32, present: bool| {
            let mut cpu = json!({ "type": "max-x86_64-cpu", "vcpus-count": 1,
                                  "props": { "socket-id": 0, "core-id": core, "thread-id": 0 } });
            if present {
                cpu["qom-path"] = json!("/machine/unattached/device[0]");
            }
            cpu
        };
        let answer = json!([cpu(10, false), cpu(9, false), cpu(2, false), cpu(1, true), cpu(0, true)]);
        let (present, absent) = sort_cpus(&answer).unwrap();
        assert_eq!(present, 2);
        let cores: Vec<_> = absent.iter().map(|place| place.props["core-id"].as_u64().unwrap()).collect();
        assert_eq!(cores, [2, 9, 10]);
        assert!(sort_cpus(&json!({})).is_err());
        assert!(sort_cpus(&json!([{ "props": {} }])).is_err());
    }

    #[test]
    fn a_read_only_disk_can_never_be_written() {
        let file = tempfile::tempfile().unwrap();
        let (file, kind) = disk(file.into(), true).unwrap();
        assert_eq!(kind, FileKind::File);
        assert_eq!(rustix::fs::fcntl_getfl(&file).unwrap() & rustix::fs::OFlags::RWMODE, rustix::fs::OFlags::RDONLY);
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let err = disk(File::open("/dev/null").unwrap().into(), true).unwrap_err();
        assert!(err.to_string().contains("neither a regular file"), "{err}");
        let err = disk(File::open("/proc/self/exe").unwrap().into(), false).unwrap_err();
        assert!(err.to_string().contains("not open for reading and writing"), "{err}");
    }

    #[test]
    fn ports_are_taken_lowest_first() {
        let plugged = |port: u8| Present {
            plugged: Plugged { id: port.to_string(), pci_path: port_path(port) },
            later: Some(Later { key: String::new(), port, backend: Backend::Netdev }),
        };
        let mut slots = Slots::new(vec![Plugged { id: "root".into(), pci_path: "02".into() }], 3, 1, 1, 1);
        assert_eq!(slots.free_port(), Some(0));
        slots.present.extend([plugged(0), plugged(2)]);
        assert_eq!(slots.free_port(), Some(1));
        slots.present.push(plugged(1));
        assert_eq!(slots.free_port(), None);
        assert_eq!(slots.devices().len(), 4);
    }
}
