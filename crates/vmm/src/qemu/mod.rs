//! The QEMU driver: a jailed QEMU child, driven over its monitor.
//!
//! | module | |
//! |---|---|
//! | `accelerator` | KVM or translation in software, and why |
//! | `command` | the argument vector |
//! | `process` | the jail, the end of the process |
//! | `console` | what guest and VMM say |
//! | `qmp` | the monitor's protocol |
//! | `hotplug` | changes while it runs |

mod accelerator;
mod command;
mod console;
mod hotplug;
mod process;
mod qmp;

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use jail::Process;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::time::timeout;

use self::accelerator::Host;
use self::command::{Backend, CONTROL_SLOT, FIRST_PORT_SLOT, Layout, MOST_PORTS, Placed, Wired, WiredControl};
use self::console::{Log, Tail, drain};
use self::hotplug::Slots;
use self::process::{Descriptors, Files, Remains, Watch};
use self::qmp::{Qmp, QmpError};
use crate::check::{self, HostLimits};
use crate::{Accelerator, Control, Device, Error, Exit, MachineSpec, Payload, Plugged, Recorder, Vmm, kernel_params};

/// How long a command may take. Milliseconds, but the host may be swapping.
const COMMAND_LIMIT: Duration = Duration::from_secs(20);

/// How long QEMU may take until its monitor greets: linking and memory, a tenth of a second.
const START_LIMIT: Duration = Duration::from_secs(30);

/// How long a process whose monitor is closed may take to be gone.
const END_LIMIT: Duration = Duration::from_secs(5);

/// The log of the guest's console, in the sandbox's runtime directory.
const CONSOLE_LOG: &str = "console.log";

/// Small firmware that does nothing but load the kernel; the names under which distributions ship it with QEMU.
const QUICK_FIRMWARE: [&str; 2] = ["bios-microvm.bin", "qboot.rom"];

/// Launches a machine under QEMU and returns once its monitor answers; the guest boots meanwhile.
///
/// Call it from the runtime's main thread: QEMU dies with the thread that started it.
///
/// # Errors
/// The machine can't be built, the journal refuses, or QEMU doesn't start. Nothing is left running.
pub async fn launch(spec: MachineSpec, recorder: &dyn Recorder) -> Result<Arc<dyn Vmm>, Error> {
    launch_with(spec, recorder, None).await
}

/// As [`launch`], with another executable than our own to start the jail from (see [`jail::Jail::spawn_from`]).
///
/// # Errors
/// As [`launch`].
pub async fn launch_with(
    spec: MachineSpec,
    recorder: &dyn Recorder,
    helper: Option<&Path>,
) -> Result<Arc<dyn Vmm>, Error> {
    let host = HostLimits::probe();
    check::numbers(&spec, host, MOST_PORTS)?;
    let binary = check::binary(&spec.binary)?;
    check::kernel(&spec.boot.kernel)?;
    let (accelerator, warning) = accelerator::decide(spec.accelerator, Host::probe)?;
    if let Some(warning) = warning {
        tracing::warn!("{warning}");
    }
    let firmware = firmware(spec.firmware.clone(), &binary)?;
    let kernel_params = kernel_params::command_line(&spec.boot, accelerator, spec.debug)?;
    let boot = spec.boot;
    let image = match &boot.payload {
        Payload::Initrd(path) => {
            check::initrd(path)?;
            None
        }
        Payload::Image { path, .. } => {
            let cure = "build the guest (kata image build), or set image in the configuration";
            Some(check::readable("the guest's image", path, cure)?)
        }
    };
    let initrd = if let Payload::Initrd(path) = &boot.payload { Some(path.as_path()) } else { None };

    let mut fds = Descriptors::default();
    let host_failed = |what| move |err| Error::Host(what, err);
    let (monitor, theirs) = StdUnixStream::pair().map_err(host_failed("make the monitor's socket"))?;
    let monitor_fd = fds.add(theirs.into());
    let (console, theirs) = StdUnixStream::pair().map_err(host_failed("make the console's socket"))?;
    let console_fd = fds.add(theirs.into());
    let control = match spec.control {
        Control::Serial { listener } => WiredControl::Serial { listener: fds.add(listener) },
        Control::VhostVsock { cid, vhost } => WiredControl::VhostVsock { cid, vhost: fds.add(vhost) },
        Control::VhostUserVsock { socket } => WiredControl::VhostUserVsock { socket: fds.add(socket) },
    };
    let (placed, plugged) = place(image, spec.devices, &mut fds)?;
    // Nothing to grow into where the host has no more: QEMU would reserve addresses and the guest tables for it.
    let host_memory = u32::try_from(host.memory_mib).unwrap_or(u32::MAX);
    let max_memory_mib = spec.max_memory_mib.min(host_memory).max(spec.memory_mib);
    let layout = Layout {
        name: spec.id,
        machine_type: spec.machine_type,
        accelerator,
        cpu_features: spec.cpu_features,
        vcpus: spec.vcpus,
        max_vcpus: spec.max_vcpus,
        memory_mib: spec.memory_mib,
        max_memory_mib,
        firmware: firmware.is_some(),
        initrd: initrd.is_some(),
        kernel_params,
        monitor: monitor_fd,
        console: console_fd,
        control,
        devices: placed,
        ports: spec.hotplug_ports,
        seccomp: spec.seccomp_sandbox,
    };
    let files = Files { kernel: &boot.kernel, initrd, firmware: firmware.as_deref() };
    let jail = process::jail(&binary, layout.arguments(), &spec.confinement, accelerator, &files);

    let log = spec.confinement.runtime_dir.join(CONSOLE_LOG);
    recorder.path("console", &log).map_err(|err| Error::Record("the console's log", err))?;
    let log = Log::create(log).map_err(host_failed("make the console's log"))?;
    let (output, theirs) = StdUnixStream::pair().map_err(host_failed("make the output's socket"))?;
    let fds = fds.with_output(theirs.into()).map_err(host_failed("make the output's socket"))?;
    let held = match helper {
        Some(helper) => jail.spawn_from(helper, fds)?,
        None => jail.spawn(fds)?,
    };
    recorder.process("vmm", held.pid(), held.start_time()).map_err(|err| Error::Record("the VMM's process", err))?;
    let process = Arc::new(held.release()?);

    // From here on the guard kills the process if anything fails.
    let tails = (Tail::default(), Tail::default());
    let ours = |stream: StdUnixStream| -> io::Result<UnixStream> {
        stream.set_nonblocking(true)?;
        UnixStream::from_std(stream)
    };
    let mut guard = Guard(Some(Arc::clone(&process)));
    let console = ours(console).map_err(host_failed("read the console"))?;
    let output = ours(output).map_err(host_failed("read the VMM's output"))?;
    let readers = vec![
        tokio::spawn(drain(console, tails.0.clone(), Some(log))),
        tokio::spawn(drain(output, tails.1.clone(), None)),
    ];
    let watch = Watch::start(Arc::clone(&process), Remains { console: tails.0, output: tails.1, readers })?;
    let stream = ours(monitor).map_err(host_failed("talk to the monitor"))?;
    let qmp = match Qmp::connect(stream, START_LIMIT).await {
        Ok(qmp) => qmp,
        Err(err) => return Err(translate("qmp_capabilities", err, &watch).await),
    };
    watch.listen(qmp.events());
    guard.0 = None;
    let slots = Slots::new(plugged.clone(), spec.hotplug_ports, spec.memory_mib, max_memory_mib, spec.max_vcpus);
    Ok(Arc::new(Qemu {
        process,
        accelerator,
        monitor: Monitor { qmp, watch },
        devices: Mutex::new(plugged),
        slots: tokio::sync::Mutex::new(slots),
    }))
}

/// Kills a process unless it was told not to.
struct Guard(Option<Arc<Process>>);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(process) = self.0.take() {
            let _ = process.kill();
        }
    }
}

/// The firmware to use: the caller's, or the quickest there is beside this QEMU, or QEMU's own default.
fn firmware(wanted: Option<PathBuf>, binary: &Path) -> Result<Option<PathBuf>, Error> {
    if let Some(path) = wanted {
        check::readable("the firmware", &path, "set firmware in the configuration to a file that exists, or to none")?;
        return Ok(Some(path));
    }
    if !cfg!(target_arch = "x86_64") {
        return Ok(None);
    }
    let prefix = binary.parent().and_then(Path::parent).unwrap_or(Path::new("/usr"));
    Ok(QUICK_FIRMWARE.map(|name| prefix.join("share/qemu").join(name)).into_iter().find(|path| path.is_file()))
}

/// Gives the devices of the start their slots and numbers their descriptors.
fn place(
    image: Option<File>,
    devices: Vec<Device>,
    fds: &mut Descriptors,
) -> Result<(Vec<Placed>, Vec<Plugged>), Error> {
    // The image comes first: it is to be the guest's first disk.
    let root = image.map(|file| Device::Block {
        id: "image".to_owned(),
        file: file.into(),
        read_only: true,
        serial: String::new(),
    });
    let mut placed = Vec::new();
    let mut plugged: Vec<Plugged> = Vec::new();
    for (device, slot) in root.into_iter().chain(devices).zip(CONTROL_SLOT + 1..) {
        if slot >= FIRST_PORT_SLOT {
            let room = FIRST_PORT_SLOT - CONTROL_SLOT - 1;
            return Err(Error::Spec(format!(
                "it has more than the {room} devices there is room for; plug the rest later"
            )));
        }
        let id = device.id().to_owned();
        if plugged.iter().any(|other| other.id == id) {
            return Err(Error::Device(format!("Device {id:?} is there twice")));
        }
        let number = |list: Vec<OwnedFd>, fds: &mut Descriptors| list.into_iter().map(|fd| fds.add(fd)).collect();
        let (device, backend) = match device {
            Device::Share { tag, socket, queue_size, .. } => {
                (Wired::Share { tag, queue_size }, Backend::Socket(fds.add(socket)))
            }
            Device::Block { file, read_only, serial, .. } => {
                let (file, kind) = hotplug::disk(file, read_only)?;
                (Wired::Block { serial }, Backend::File { fd: fds.add(file), kind, read_only })
            }
            Device::Net { taps, vhosts, mac, .. } => {
                let queues = taps.len();
                let backend = Backend::Tap { taps: number(taps, fds), vhosts: number(vhosts, fds) };
                (Wired::Net { mac, queues }, backend)
            }
        };
        plugged.push(Plugged { id, pci_path: format!("{slot:02x}") });
        placed.push(Placed { key: format!("d{slot}"), slot, device, backend });
    }
    Ok((placed, plugged))
}

/// The monitor of a process whose end is known.
#[derive(Debug)]
pub(crate) struct Monitor {
    qmp: Qmp,
    watch: Watch,
}

impl Monitor {
    async fn call(&self, command: &str, arguments: Value) -> Result<Value, Error> {
        self.call_with(command, arguments, &[]).await
    }

    async fn call_with(&self, command: &str, arguments: Value, fds: &[BorrowedFd<'_>]) -> Result<Value, Error> {
        match self.qmp.execute_with(command, arguments, fds, COMMAND_LIMIT).await {
            Ok(value) => Ok(value),
            Err(err) => Err(translate(command, err, &self.watch).await),
        }
    }

    /// The error for a call that found the monitor closed.
    async fn gone(&self) -> Error {
        translate("the monitor", QmpError::Closed, &self.watch).await
    }
}

/// A closed monitor means that the process is gone, or will be in a moment: its end is the better error.
async fn translate(command: &str, err: QmpError, watch: &Watch) -> Error {
    match err {
        QmpError::Refused { description, .. } => Error::Refused { command: command.to_owned(), description },
        QmpError::Timeout(after) => Error::Timeout { what: format!("The VMM's answer to {command}"), after },
        QmpError::Protocol(text) => Error::Protocol(text),
        QmpError::Closed => match timeout(END_LIMIT, watch.wait()).await {
            Ok(exit) => Error::Exited(exit),
            Err(_) => Error::Protocol("the monitor is closed, but the process runs".to_owned()),
        },
    }
}

/// A running QEMU. Dropped, it is killed.
#[derive(Debug)]
struct Qemu {
    process: Arc<Process>,
    accelerator: Accelerator,
    monitor: Monitor,
    /// What `slots` has, readable while a change is under way.
    devices: Mutex<Vec<Plugged>>,
    slots: tokio::sync::Mutex<Slots>,
}

impl Qemu {
    fn publish(&self, slots: &Slots) {
        *self.devices.lock().unwrap_or_else(PoisonError::into_inner) = slots.devices();
    }
}

#[async_trait]
impl Vmm for Qemu {
    fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn accelerator(&self) -> Accelerator {
        self.accelerator
    }

    fn devices(&self) -> Vec<Plugged> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn pause(&self) -> Result<(), Error> {
        self.monitor.call("stop", json!({})).await.map(drop)
    }

    async fn resume(&self) -> Result<(), Error> {
        self.monitor.call("cont", json!({})).await.map(drop)
    }

    async fn add_device(&self, device: Device) -> Result<Plugged, Error> {
        let mut slots = self.slots.lock().await;
        let plugged = slots.add(&self.monitor, device).await?;
        self.publish(&slots);
        Ok(plugged)
    }

    async fn remove_device(&self, id: &str) -> Result<(), Error> {
        let mut slots = self.slots.lock().await;
        slots.remove(&self.monitor, id).await?;
        self.publish(&slots);
        Ok(())
    }

    async fn resize_vcpus(&self, vcpus: u32) -> Result<u32, Error> {
        self.slots.lock().await.resize_vcpus(&self.monitor, vcpus).await
    }

    async fn resize_memory(&self, mib: u32) -> Result<u32, Error> {
        self.slots.lock().await.resize_memory(&self.monitor, mib).await
    }

    async fn stop(&self, grace: Duration) -> Result<(), Error> {
        let asked = timeout(grace, async {
            // Whatever it answers, what counts is that it goes.
            let _ = self.monitor.qmp.execute("quit", json!({}), grace).await;
            self.monitor.watch.wait().await
        });
        if asked.await.is_err() {
            self.process.kill().map_err(|err| Error::Host("kill the VMM", err))?;
            self.monitor.watch.wait().await;
        }
        Ok(())
    }

    async fn wait(&self) -> Exit {
        self.monitor.watch.wait().await
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        if self.monitor.watch.ended().is_none() {
            let _ = self.process.kill();
        }
    }
}
