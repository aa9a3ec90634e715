//! Boots a real kernel under a real, jailed QEMU and changes the machine while it runs.
//!
//! Needs root, QEMU, a static busybox, and in the environment:
//! - `KATA_TEST_KERNEL`: a bzImage or vmlinux;
//! - `KATA_TEST_MODULES`: its directory of modules (`…/lib/modules/<version>`), if virtio isn't built in.
//!
//! Without a kernel every test here is listed as ignored.
#![allow(clippy::unwrap_used, clippy::expect_used)] // A test with a main of its own is a test all the same.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;
use vmm::{Accelerator, Boot, Confinement, Control, Device, Error, MachineSpec, Payload, Recorder, Vmm};

const LIMIT: Duration = Duration::from_secs(120);

/// In the order of loading; one that isn't there is built in.
const MODULES: [&str; 10] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
];

type Test = fn() -> Result<(), Failed>;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    if args.get(1).is_some_and(|verb| verb == "__jail") {
        return jail::main(args.into_iter().skip(2));
    }
    let unable = std::env::var_os("KATA_TEST_KERNEL").is_none();
    let tests: [(&str, Test); 6] = [
        ("boots_confined_and_tells_how_it_ended", boots_confined),
        ("devices_cpus_and_memory_come_and_go", hot_plug),
        ("network_interfaces_come_and_go", network),
        ("a_panic_is_reported_with_its_words", panic),
        ("a_killed_vmm_fails_what_is_pending", killed),
        ("a_refusal_of_qemu_is_an_error_at_once", refused),
    ];
    let trials = tests.map(|(name, test)| Trial::test(name, test).with_ignored_flag(unable)).into();
    // One machine at a time: they are slow without KVM, and the limits are for an idle host.
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    libtest_mimic::run(&arguments, trials).exit_code()
}

#[derive(Default)]
struct Journal(Mutex<Vec<String>>);

impl Recorder for Journal {
    fn process(&self, what: &str, pid: u32, start_time: u64) -> io::Result<()> {
        assert_eq!(jail::start_time_of(pid)?, start_time);
        self.0.lock().unwrap().push(format!("process {what}"));
        Ok(())
    }

    fn path(&self, what: &str, path: &Path) -> io::Result<()> {
        assert!(!path.exists(), "recorded after it was made");
        self.0.lock().unwrap().push(format!("path {what}"));
        Ok(())
    }
}

struct Rig {
    dir: tempfile::TempDir,
    user: jail::VmmUser,
}

impl Rig {
    fn new() -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let user = jail::VmmUser::allocate(1_900_000_000, 65536, &dir.path().join("uids")).unwrap();
        Rig { dir, user }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn spec(&self, init: &str) -> MachineSpec {
        let initrd = self.path("initrd");
        fs::write(&initrd, initrd_with(init)).unwrap();
        MachineSpec {
            id: "test,id=1".into(),
            binary: std::env::var_os("KATA_TEST_QEMU").unwrap_or("/usr/bin/qemu-system-x86_64".into()).into(),
            machine_type: "q35".into(),
            accelerator: Accelerator::Auto,
            vcpus: 1,
            max_vcpus: 4,
            memory_mib: 256,
            max_memory_mib: 1024,
            cpu_features: Vec::new(),
            boot: Boot {
                kernel: std::env::var_os("KATA_TEST_KERNEL").unwrap().into(),
                payload: Payload::Initrd(initrd),
                params: std::env::var("KATA_TEST_PARAMS").iter().map(String::clone).collect(),
            },
            firmware: std::env::var_os("KATA_TEST_FIRMWARE").map(Into::into),
            devices: Vec::new(),
            hotplug_ports: 4,
            control: Control::Serial { listener: UnixListener::bind(self.path("agent.sock")).unwrap().into() },
            confinement: Confinement {
                uid: self.user.id(),
                gid: self.user.id(),
                cgroups: Vec::new(),
                runtime_dir: self.dir.path().to_path_buf(),
            },
            seccomp_sandbox: true,
            debug: std::env::var_os("KATA_TEST_DEBUG").is_some(),
        }
    }

    async fn launch(&self, spec: MachineSpec) -> Result<Arc<dyn Vmm>, Error> {
        vmm::qemu::launch(spec, &Journal::default()).await
    }

    async fn shell(&self) -> Shell {
        Shell(BufReader::new(UnixStream::connect(self.path("agent.sock")).await.unwrap()))
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = fs::read_to_string(self.path("console.log")).unwrap_or_default();
            eprintln!("The guest's console:\n{log}");
        }
    }
}

/// A shell in the guest, at the control channel's port.
struct Shell(BufReader<UnixStream>);

impl Shell {
    /// What a command says, up to its end.
    async fn run(&mut self, command: &str) -> String {
        self.0.write_all(format!("{command}; echo __end\n").as_bytes()).await.unwrap();
        let mut said = String::new();
        loop {
            let mut line = String::new();
            let read = timeout(LIMIT, self.0.read_line(&mut line)).await.expect("guest is silent").unwrap();
            assert_ne!(read, 0, "the channel closed after {said:?}");
            if line == "__end\n" {
                return said.trim().to_owned();
            }
            said += &line;
        }
    }
}

// A port can be opened once only.
const SERVE: &str = "exec sh 0<>/dev/vport0p1 1>&0 2>&0";

fn run(test: impl AsyncFnOnce(Rig)) -> Result<(), Failed> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(test(Rig::new()));
    Ok(())
}

fn boots_confined() -> Result<(), Failed> {
    run(async |rig| {
        let spec = rig.spec(SERVE);
        let journal = Journal::default();
        let start = Instant::now();
        let machine = vmm::qemu::launch(spec, &journal).await.unwrap();
        let launched = start.elapsed();
        let mut shell = rig.shell().await;
        assert_eq!(shell.run("echo hello").await, "hello");
        eprintln!("launch {launched:?}, answer {:?}, {}", start.elapsed(), machine.accelerator());
        assert_eq!(*journal.0.lock().unwrap(), ["path console", "process vmm"]);

        let pid = machine.pid();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.split(':').next() == Some(name)).unwrap();
            line.split_once(':').unwrap().1.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        let uid = rig.user.id();
        assert_eq!(field("Uid"), format!("{uid} {uid} {uid} {uid}"));
        assert_eq!(field("Gid"), format!("{uid} {uid} {uid} {uid}"));
        assert_eq!(field("Groups"), "");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(field(set), "0000000000000000", "{set}");
        }
        assert_eq!(field("NoNewPrivs"), "1");
        assert_eq!(field("Seccomp"), "2");
        assert_eq!(field("PPid"), std::process::id().to_string());
        assert!(field("NSpid").ends_with(" 1"), "process 1 of its own pid namespace");
        for namespace in ["mnt", "pid", "net", "ipc", "uts"] {
            let link = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
            assert_ne!(link(&pid.to_string()), link("self"), "{namespace}");
        }
        let root: Vec<_> = fs::read_dir(format!("/proc/{pid}/root"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        assert!(
            root.iter().all(|name| ["usr", "bin", "sbin", "lib", "lib32", "lib64", "etc", "boot", "dev", "nix"]
                .contains(&name.as_str())),
            "{root:?}"
        );
        eprintln!(
            "{}",
            status.lines().filter(|line| line.contains("Rss") || line.contains("Threads")).collect::<String>()
        );

        machine.pause().await.unwrap();
        machine.resume().await.unwrap();
        assert_eq!(shell.run("echo again").await, "again");
        let waiter = tokio::spawn({
            let machine = Arc::clone(&machine);
            async move { machine.wait().await }
        });
        machine.stop(Duration::from_secs(10)).await.unwrap();
        machine.stop(Duration::from_secs(10)).await.unwrap();
        let exit = waiter.await.unwrap();
        assert!(exit.status.unwrap().success(), "{exit}");
        assert!(matches!(machine.pause().await, Err(Error::Exited(_))));
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "reaped");
    })
}

fn hot_plug() -> Result<(), Failed> {
    run(async |rig| {
        let disk = |name: &str| {
            let file = File::options().read(true).write(true).create(true).truncate(true).open(rig.path(name)).unwrap();
            file.set_len(1 << 20).unwrap();
            file.write_all_at(name.as_bytes(), 0).unwrap();
            file
        };
        let mut spec = rig.spec(SERVE);
        spec.devices.push(Device::Block {
            id: "first".into(),
            file: disk("first").into(),
            read_only: true,
            serial: "a,b=c".into(),
        });
        let machine = rig.launch(spec).await.unwrap();
        let mut shell = rig.shell().await;
        let seen = shell.run(
            "cat /sys/block/vda/serial; echo; cat /sys/block/vda/ro; basename $(readlink -f /sys/block/vda/device/..)",
        );
        assert_eq!(seen.await, "a,b=c\n1\n0000:00:02.0");
        assert_eq!(machine.devices()[0].pci_path, "02");

        for round in 0..3 {
            let start = Instant::now();
            let device = Device::Block {
                id: "later".into(),
                file: disk("later").into(),
                read_only: round == 1,
                serial: String::new(),
            };
            let plugged = machine.add_device(device).await.unwrap();
            assert_eq!(plugged.pci_path, "10/00");
            let seen = shell
                .run("while ! [ -b /dev/vdb ]; do usleep 5000; done; head -c 5 /dev/vdb; cat /sys/block/vdb/ro")
                .await;
            assert_eq!(seen, format!("later{}", u8::from(round == 1)));
            let added = start.elapsed();
            machine.remove_device("later").await.unwrap();
            eprintln!("disk: visible after {added:?}, unplugged {:?} later", start.elapsed() - added);
        }
        let err = machine.remove_device("first").await.unwrap_err();
        assert!(err.to_string().contains("stays"), "{err}");
        let err = machine.remove_device("none").await.unwrap_err();
        assert!(err.to_string().contains("not plugged in"), "{err}");

        for number in 0..5 {
            let file = disk(&format!("d{number}")).into();
            let device = Device::Block { id: format!("disk {number}"), file, read_only: false, serial: String::new() };
            match machine.add_device(device).await {
                Ok(_) => assert!(number < 4),
                Err(err) => assert!(number == 4 && err.to_string().contains("no free port"), "{err}"),
            }
        }
        for number in 0..4 {
            machine.remove_device(&format!("disk {number}")).await.unwrap();
        }

        // A server that has gone: refused, twice the same way, and the machine goes on.
        for _ in 0..2 {
            let (socket, server) = std::os::unix::net::UnixStream::pair().unwrap();
            drop(server);
            let device = Device::Share { id: "share".into(), tag: "t".into(), socket: socket.into(), queue_size: 128 };
            let err = machine.add_device(device).await.unwrap_err();
            assert!(matches!(&err, Error::Refused { command, .. } if command == "device_add"), "{err}");
        }

        let start = Instant::now();
        assert_eq!(machine.resize_vcpus(3).await.unwrap(), 3);
        shell.run("while ! [ -e /sys/devices/system/cpu/cpu2/online ]; do usleep 5000; done").await;
        let present = start.elapsed();
        shell.run("for c in 1 2; do echo 1 >/sys/devices/system/cpu/cpu$c/online; done").await;
        assert_eq!(shell.run("grep -c ^processor /proc/cpuinfo").await, "3");
        eprintln!("2 vCPUs: present after {present:?}, online after {:?}", start.elapsed());
        assert_eq!(machine.resize_vcpus(1).await.unwrap(), 3);
        assert!(machine.resize_vcpus(5).await.is_err());

        let before: u64 =
            shell.run("grep -c . /sys/devices/system/memory/memory*/state | wc -l").await.parse().unwrap();
        assert_eq!(machine.resize_memory(300).await.unwrap(), 384);
        let count =
            format!("while [ $(ls -d /sys/devices/system/memory/memory* | wc -l) -le {before} ]; do usleep 5000; done");
        shell.run(&count).await;
        assert_eq!(machine.resize_memory(1000).await.unwrap(), 1024);
        assert_eq!(machine.resize_memory(100).await.unwrap(), 1024);
        let err = machine.resize_memory(2000).await.unwrap_err();
        assert!(err.to_string().contains("maximum"), "{err}");
        machine.stop(Duration::from_secs(10)).await.unwrap();
    })
}

/// Queues of a new tap, which goes away with them.
#[allow(unsafe_code)] // There is no safe way to make a tap.
fn tap(queues: usize) -> Vec<OwnedFd> {
    // struct ifreq of netdevice(7): 16 bytes of name, then the flags. The kernel fills in the number.
    let mut request = [0_u8; 40];
    request[..6].copy_from_slice(b"kvmt%d");
    let multi = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | multi).to_ne_bytes();
    request[16..18].copy_from_slice(&flags[..2]);
    let queue = |_| {
        let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
        // SAFETY: the request is as long as struct ifreq and lives through the call.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
        file.into()
    };
    (0..queues).map(queue).collect()
}

fn network() -> Result<(), Failed> {
    run(async |rig| {
        let net = |id: &str, queues: usize, last: u8| Device::Net {
            id: id.into(),
            taps: tap(queues),
            vhosts: Vec::new(),
            mac: [2, 0, 0, 0, 0, last],
        };
        let mut spec = rig.spec(SERVE);
        spec.devices.push(net("one", 1, 1));
        spec.vcpus = 2;
        let machine = rig.launch(spec).await.unwrap();
        let mut shell = rig.shell().await;
        assert_eq!(shell.run("cat /sys/class/net/eth0/address").await, "02:00:00:00:00:01");
        for _ in 0..2 {
            let start = Instant::now();
            let plugged = machine.add_device(net("two", 2, 2)).await.unwrap();
            let path = format!("0000:00:{}.0", &plugged.pci_path[..2]);
            let seen =
                shell.run("while ! [ -e /sys/class/net/eth1 ]; do usleep 5000; done; cat /sys/class/net/eth1/address");
            assert_eq!(seen.await, "02:00:00:00:00:02");
            let added = start.elapsed();
            assert_eq!(shell.run("ls -d /sys/class/net/eth1/queues/rx-* | wc -l").await, "2");
            assert!(shell.run("readlink -f /sys/class/net/eth1").await.contains(&path), "{path}");
            machine.remove_device("two").await.unwrap();
            eprintln!("network: visible after {added:?}, unplugged {:?} later", start.elapsed() - added);
        }
        machine.stop(Duration::from_secs(10)).await.unwrap();
    })
}

fn panic() -> Result<(), Failed> {
    run(async |rig| {
        let machine = rig.launch(rig.spec("echo I am about to fail; exit 3")).await.unwrap();
        let exit = timeout(LIMIT, machine.wait()).await.unwrap();
        assert!(exit.last_words.contains("I am about to fail"), "{exit}");
        assert!(exit.last_words.contains("Attempted to kill init"), "{exit}");
        assert!(exit.to_string().contains("panicked"), "{exit}");
        let log = fs::read_to_string(rig.path("console.log")).unwrap();
        assert!(log.contains("I am about to fail"));
        assert_eq!(rig.path("console.log").metadata().unwrap().mode() & 0o777, 0o600);
    })
}

fn killed() -> Result<(), Failed> {
    run(async |rig| {
        let machine = rig.launch(rig.spec(SERVE)).await.unwrap();
        let mut shell = rig.shell().await;
        shell.run("true").await;
        // The removal can't end: the guest's shell holds the CPU's only task that matters. It must fail with the VMM.
        machine.pause().await.unwrap();
        let file = File::create_new(rig.path("disk")).unwrap();
        file.set_len(1 << 20).unwrap();
        let file = File::options().read(true).write(true).open(rig.path("disk")).unwrap();
        let device = Device::Block { id: "d".into(), file: file.into(), read_only: false, serial: String::new() };
        machine.add_device(device).await.unwrap();
        let pending = tokio::spawn({
            let machine = Arc::clone(&machine);
            async move { machine.remove_device("d").await }
        });
        tokio::task::yield_now().await;
        jail::kill_exact(machine.pid(), jail::start_time_of(machine.pid()).unwrap()).unwrap();
        let err = timeout(Duration::from_secs(20), pending).await.unwrap().unwrap().unwrap_err();
        let Error::Exited(exit) = err else { panic!("{err}") };
        assert!(exit.to_string().contains("signal: 9"), "{exit}");
    })
}

fn refused() -> Result<(), Failed> {
    run(async |rig| {
        let mut spec = rig.spec(SERVE);
        spec.machine_type = "q36".into();
        let err = rig.launch(spec).await.unwrap_err();
        let Error::Exited(exit) = err else { panic!("{err}") };
        assert!(exit.last_words.contains("unsupported machine type"), "{exit}");
    })
}

/// An initrd of busybox, the modules and this `init`, as a cpio archive in the newc format.
fn initrd_with(init: &str) -> Vec<u8> {
    let busybox = std::env::var_os("KATA_TEST_BUSYBOX").unwrap_or("/bin/busybox".into());
    let mut archive = Vec::new();
    for dir in ["bin", "dev", "proc", "sys", "m"] {
        entry(&mut archive, dir, 0o040_755, b"");
    }
    entry(&mut archive, "bin/busybox", 0o100_755, &fs::read(busybox).unwrap());
    let mut script = "#!/bin/busybox sh\n/bin/busybox --install -s /bin\nexport PATH=/bin\n".to_owned();
    script += "mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev\n";
    if let Some(modules) = std::env::var_os("KATA_TEST_MODULES") {
        for name in MODULES {
            if let Some(path) = find(Path::new(&modules), &format!("{name}.ko")) {
                entry(&mut archive, &format!("m/{name}.ko"), 0o100_644, &fs::read(path).unwrap());
                script += &format!("insmod /m/{name}.ko\n");
            }
        }
    }
    script += init;
    entry(&mut archive, "init", 0o100_755, script.as_bytes());
    entry(&mut archive, "TRAILER!!!", 0, b"");
    archive
}

fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    let number = archive.len();
    // ino, mode, uid, gid, nlink, mtime, size, device (4), length of the name with its NUL, checksum
    let fields = [number, mode as usize, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
    archive.extend(b"070701");
    archive.extend(fields.iter().flat_map(|field| format!("{field:08x}").into_bytes()));
    archive.extend(name.bytes().chain([0]));
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

fn find(dir: &Path, name: &str) -> Option<PathBuf> {
    fs::read_dir(dir).ok()?.flatten().find_map(|entry| {
        let path = entry.path();
        if entry.file_type().ok()?.is_dir() { find(&path, name) } else { (entry.file_name() == name).then_some(path) }
    })
}
