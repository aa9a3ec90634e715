//! From a description to a machine whose agent answers: the way into `Running`.
//!
//! The order is that of dependencies; what the guest needs is prepared while nothing waits for it, and the longest
//! part, the guest's boot, begins as early as it can.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use config::{ControlChannel, Hypervisor, Root};
use jail::VmmUser;
use protocol::agent::{CreateSandboxRequest, KernelModule, Storage};
use share::{ServerOptions, Share};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::unix::pipe::Receiver;
use vmm::{Accelerator, Boot, Confinement, Control, Device, MachineSpec, Payload, Vmm};

use crate::agent::Agent;
use crate::journal::{Entry, Journal, RUN_DIR};
use crate::record::{self, Summary};
use crate::{Error, SandboxSpec, cgroup};

/// How many numeric users there are for VMMs, from the configured base on.
const USERS: u32 = 65_536;

/// How far the guest's clock may be off before it is set: more than the round trip of the question.
const DAY: Duration = Duration::from_secs(86_400);

/// How far apart the ends of the machine and of its file server may be.
const GOODBYE: Duration = Duration::from_millis(500);

/// How long the VMM's end may take to become known after the connection to the agent broke.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// A machine that is up, and all that belongs to it.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) share: Share,
    pub(crate) vmm: Arc<dyn Vmm>,
    pub(crate) agent: Agent,
    pub(crate) summary: Summary,
    pub(crate) seccomp: bool,
    pub(crate) user: VmmUser,
    pub(crate) server: jail::Process,
}

/// Launches the machine of a sandbox and waits for its agent.
pub(crate) async fn launch(spec: &SandboxSpec, journal: &Arc<Journal>) -> Result<Launched, Error> {
    let dir = Path::new(RUN_DIR).join(&spec.id);
    let hypervisor = &spec.config.hypervisor;
    let (vcpus, memory_mib) = size(spec);

    let user = user(spec, journal)?;
    let cgroups = cgroups(spec, journal)?;
    let mut share = Share::prepare(&spec.id, journal.as_ref())?;
    let (words, says) = pipe().map_err(|source| Error::State { path: dir.clone(), source })?;
    let options = ServerOptions {
        cache: hypervisor.virtio_fs_cache.as_str().to_owned(),
        cgroups: cgroups.clone(),
        log: Some(says),
    };
    let (server, share_socket) = share.start_server(options, journal.as_ref())?;
    let socket = dir.join("agent.sock");
    let control = control(hypervisor, &socket)?;

    let machine = MachineSpec {
        id: spec.id.clone(),
        binary: hypervisor.path.clone(),
        machine_type: hypervisor.machine_type.as_str().to_owned(),
        accelerator: match hypervisor.accelerator {
            config::Accelerator::Auto => Accelerator::Auto,
            config::Accelerator::Kvm => Accelerator::Kvm,
            config::Accelerator::Tcg => Accelerator::Tcg,
        },
        vcpus,
        max_vcpus: hypervisor.max_vcpus().max(vcpus),
        memory_mib,
        max_memory_mib: hypervisor.max_memory_mib().max(memory_mib),
        cpu_features: hypervisor.cpu_feature_list(),
        boot: boot(spec),
        firmware: hypervisor.firmware.clone(),
        devices: vec![Device::Share {
            id: "share".to_owned(),
            tag: protocol::SHARE_TAG.to_owned(),
            socket: share_socket,
            queue_size: hypervisor.virtio_fs_queue_size,
        }],
        hotplug_ports: u8::try_from(hypervisor.pcie_root_port).unwrap_or(u8::MAX),
        control,
        confinement: Confinement { uid: user.id(), gid: user.id(), cgroups, runtime_dir: dir.clone() },
        seccomp_sandbox: !hypervisor.disable_seccomp,
        debug: hypervisor.enable_debug,
    };
    let vmm = vmm::qemu::launch(machine, journal.as_ref()).await?;
    tokio::spawn(attend(words, Arc::clone(&vmm)));
    let agent = answer(spec, &vmm, &socket, &dir).await?;
    if let Err(error) = tell(spec, &agent).await {
        // When it is the machine that ended, its end says more than the broken connection.
        if !matches!(error, Error::AgentLost(_)) {
            return Err(error);
        }
        return Err(tokio::time::timeout(LAST_WORDS, vmm.wait()).await.map_or(error, Error::Vmm));
    }

    let summary = Summary {
        id: spec.id.clone(),
        created: record::now(),
        vmm_pid: vmm.pid(),
        shim_pid: std::process::id(),
        vcpus,
        memory_mib,
        containers: Vec::new(),
    };
    summary.write().map_err(|source| Error::State { path: dir, source })?;
    Ok(Launched { share, vmm, agent, summary, seccomp: !spec.config.runtime.disable_guest_seccomp, user, server })
}

/// A user that no other VMM of this host has, in the journal before its lock is ours alone.
fn user(spec: &SandboxSpec, journal: &Journal) -> Result<VmmUser, Error> {
    let locks = Path::new(RUN_DIR).join("uids");
    let user = VmmUser::allocate(spec.config.runtime.vmm_uid_base, USERS, &locks)?;
    let entry = Entry::User { path: user.path().to_owned() };
    journal.note(&entry).map_err(|source| Error::State { path: locks, source })?;
    Ok(user)
}

fn cgroups(spec: &SandboxSpec, journal: &Journal) -> Result<Vec<PathBuf>, Error> {
    let dirs = cgroup::directories(spec.cgroups_path.as_deref(), &spec.id);
    for dir in &dirs {
        let entry = Entry::Cgroup { path: dir.clone() };
        journal.note(&entry).map_err(|source| Error::Cgroup { path: dir.clone(), source })?;
        cgroup::create(dir)?;
    }
    Ok(dirs)
}

/// The channel's end for the VMM. The socket listens before the VMM exists, so the host's request waits in it.
fn control(hypervisor: &Hypervisor, socket: &Path) -> Result<Control, Error> {
    match hypervisor.control_channel {
        ControlChannel::VirtioSerial => {
            let listener =
                UnixListener::bind(socket).map_err(|source| Error::Channel { path: socket.to_owned(), source })?;
            Ok(Control::Serial { listener: OwnedFd::from(listener) })
        }
        other => Err(Error::NoChannel(
            other.as_str().to_owned(),
            "this release drives virtio-serial only; set control_channel = \"virtio-serial\"".to_owned(),
        )),
    }
}

/// Processors and memory (MiB) of the machine: the defaults, and what was asked for beside them.
fn size(spec: &SandboxSpec) -> (u32, u32) {
    let hypervisor = &spec.config.hypervisor;
    // Limits of containers are for them alone, so the guest's own share comes on top of memory, and a whole processor
    // serves both.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let vcpus = spec.vcpus.map_or_else(|| hypervisor.vcpus(), |wanted| wanted.ceil().clamp(1.0, 1024.0) as u32);
    let memory = spec.memory_mib.map_or(hypervisor.default_memory, |mib| mib.max(hypervisor.default_memory));
    (vcpus, memory)
}

fn boot(spec: &SandboxSpec) -> Boot {
    let hypervisor = &spec.config.hypervisor;
    let payload = match hypervisor.root() {
        Root::Image(path, fstype) => Payload::Image { path, fstype: fstype.as_str().to_owned() },
        Root::Initrd(path) => Payload::Initrd(path),
    };
    let level = if spec.config.agent.enable_debug { "debug" } else { spec.config.agent.log_level.as_str() };
    let mut params = vec![format!("agent.log={level}")];
    params.extend(hypervisor.kernel_words());
    Boot { kernel: hypervisor.kernel.clone(), payload, params }
}

/// A pipe that the virtio-fs server writes its words to, and that breaks when it ends.
fn pipe() -> io::Result<(Receiver, OwnedFd)> {
    let (sender, receiver) = tokio::net::unix::pipe::pipe()?;
    Ok((receiver, sender.into_blocking_fd()?))
}

/// Logs what the virtio-fs server says, and ends the machine when the server is gone: a guest whose files have gone
/// hangs at the next one it touches, and everybody who asks it anything hangs with it.
async fn attend(words: Receiver, vmm: Arc<dyn Vmm>) {
    let mut lines = BufReader::new(words).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        tracing::warn!("{line}");
    }
    // At a proper end the machine goes first.
    if tokio::time::timeout(GOODBYE, vmm.wait()).await.is_err() {
        tracing::error!("the virtio-fs server ended, and with it the virtual machine");
        drop(vmm.stop(Duration::ZERO).await);
    }
}

/// Waits for the agent's answer, the machine's end or the limit, whichever comes first.
async fn answer(spec: &SandboxSpec, vmm: &Arc<dyn Vmm>, socket: &Path, dir: &Path) -> Result<Agent, Error> {
    let limit = spec.config.agent.boot_timeout;
    tokio::select! {
        agent = Agent::connect(socket, spec.config.agent.request_timeout) => match agent {
            Ok(agent) => Ok(agent),
            // The channel closes when the VMM ends; its end says more.
            Err(source) => match tokio::time::timeout(LAST_WORDS, vmm.wait()).await {
                Ok(exit) => Err(Error::Vmm(exit)),
                Err(_) => Err(Error::Channel { path: socket.to_owned(), source }),
            },
        },
        exit = vmm.wait() => Err(Error::Vmm(exit)),
        () = tokio::time::sleep(limit) => {
            let console = fs::read(dir.join("console.log")).unwrap_or_default();
            // The guest may write anything there.
            let console = String::from_utf8_lossy(&console);
            let lines: Vec<&str> = console.lines().rev().take(15).collect();
            let console = lines.into_iter().rev().collect::<Vec<_>>().join("\n");
            // A machine whose agent is silent is of no use to anybody.
            drop(vmm.stop(Duration::from_secs(1)).await);
            Err(Error::Boot { limit, console })
        }
    }
}

/// Tells the agent what it is for.
async fn tell(spec: &SandboxSpec, agent: &Agent) -> Result<(), Error> {
    let storage = |driver: &str, source: &str, fstype: &str, mount_point: &str, options: &[&str]| Storage {
        driver: driver.to_owned(),
        source: source.to_owned(),
        fstype: fstype.to_owned(),
        mount_point: mount_point.to_owned(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..Default::default()
    };
    let shm = format!("{}/shm", protocol::SANDBOX_GUEST_DIR);
    let request = CreateSandboxRequest {
        hostname: spec.hostname.clone(),
        sandbox_id: spec.id.clone(),
        sandbox_pidns: spec.sandbox_pidns,
        storages: vec![
            storage("virtio-fs", protocol::SHARE_TAG, "virtiofs", protocol::SHARE_GUEST_DIR, &["nodev"]),
            storage("ephemeral", "shm", "tmpfs", &shm, &["noexec", "nosuid", "nodev", "mode=1777", "size=67108864"]),
        ],
        kernel_modules: spec.config.agent.kernel_modules.iter().filter_map(|line| module(line)).collect(),
        ..Default::default()
    };
    agent.create_sandbox(&request).await?;
    // The machine's own clock is read at boot with a second's resolution, if there is one at all.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(DAY);
    match agent.set_time(now).await {
        // An agent that does not do that keeps the time it booted with.
        Ok(()) | Err(Error::Agent { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

fn module(line: &str) -> Option<KernelModule> {
    let mut words = line.split_whitespace().map(str::to_owned);
    Some(KernelModule { name: words.next()?, parameters: words.collect(), ..Default::default() })
}
