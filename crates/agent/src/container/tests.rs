//! Containers as a user meets them, on whatever machine runs the tests (as root).

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::time::Duration;

use rustix::process::{WaitId, WaitIdOptions};

use super::*;

/// A bundle with a busybox root, gone when dropped.
struct Bundle {
    dir: tempfile::TempDir,
    spec: oci::Spec,
}

const PROC_ONLY: &[(&str, &str, &str, &[&str])] = &[
    ("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
    ("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
    ("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
    ("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=64m"]),
    ("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
    ("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
];

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> oci::Mount {
    oci::Mount {
        destination: destination.to_owned(),
        type_: kind.to_owned(),
        source: source.to_owned(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..Default::default()
    }
}

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn process(script: &str) -> oci::Process {
    oci::Process {
        Args: strings(&["sh", "-c", script]),
        Env: strings(&["PATH=/bin"]),
        Cwd: "/".to_owned(),
        User: protobuf::MessageField::some(oci::User::default()),
        Capabilities: protobuf::MessageField::some(capabilities(&["CAP_CHOWN", "CAP_KILL", "CAP_SETUID"])),
        NoNewPrivileges: true,
        ..Default::default()
    }
}

fn capabilities(names: &[&str]) -> oci::LinuxCapabilities {
    oci::LinuxCapabilities {
        Bounding: strings(names),
        Effective: strings(names),
        Permitted: strings(names),
        ..Default::default()
    }
}

impl Bundle {
    fn new(script: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let bin = dir.path().join("rootfs/bin");
        fs::create_dir_all(&bin).unwrap();
        fs::copy("/bin/busybox", bin.join("busybox")).unwrap();
        for name in
            ["sh", "cat", "id", "ls", "sleep", "stat", "touch", "mkdir", "hostname", "ulimit", "tty", "readlink"]
        {
            symlink("busybox", bin.join(name)).unwrap();
        }
        for name in ["grep", "echo", "stty", "test", "env", "mount", "kill", "wc", "mknod", "unlink", "head"] {
            symlink("busybox", bin.join(name)).unwrap();
        }
        for name in ["proc", "sys", "dev", "tmp", "etc"] {
            fs::create_dir(dir.path().join("rootfs").join(name)).unwrap();
        }
        let namespaces = ["mount", "pid", "ipc", "uts", "network"]
            .map(|kind| oci::LinuxNamespace { Type: kind.to_owned(), ..Default::default() });
        let spec = oci::Spec {
            Process: protobuf::MessageField::some(process(script)),
            Root: protobuf::MessageField::some(oci::Root { Path: "rootfs".to_owned(), ..Default::default() }),
            Mounts: PROC_ONLY.iter().map(|(to, kind, source, options)| mount(to, kind, source, options)).collect(),
            Linux: protobuf::MessageField::some(oci::Linux { Namespaces: namespaces.to_vec(), ..Default::default() }),
            ..Default::default()
        };
        Self { dir, spec }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("rootfs")
    }

    fn process(&mut self) -> &mut oci::Process {
        self.spec.Process.as_mut().unwrap()
    }

    fn linux(&mut self) -> &mut oci::Linux {
        self.spec.Linux.as_mut().unwrap()
    }

    fn create(&self) -> Result<Running, Error> {
        self.create_with(None)
    }

    fn create_with(&self, seccomp: Option<Filter>) -> Result<Running, Error> {
        let (container, process) = Container::create(CreateArgs {
            id: "test",
            spec: &self.spec,
            bundle_dir: self.dir.path(),
            cgroup: CgroupEntry::default(),
            shared: SharedNamespaces::default(),
            seccomp,
            pipe_capacity: None,
        })?;
        Ok(Running { container, process: Some(process) })
    }

    /// Runs to the end: status, output and error output.
    fn run(&self) -> (i32, String, String) {
        let mut running = self.create().unwrap();
        running.container.start().unwrap();
        finish(running.process.take().unwrap())
    }

    /// Runs to the end and wants success.
    fn output(&self) -> String {
        let (status, output, errors) = self.run();
        assert_eq!((status, errors.as_str()), (0, ""), "{output}");
        output
    }

    /// The whole error text of a creation that fails.
    fn refusal(&self) -> String {
        match self.create() {
            Ok(_) => panic!("it was created"),
            Err(error) => chain(&error),
        }
    }
}

/// A container that is killed when dropped.
struct Running {
    container: Container,
    process: Option<Process>,
}

impl Drop for Running {
    fn drop(&mut self) {
        spawn::kill_and_collect(self.container.pidfd.as_fd());
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let _ = write!(text, ": {error}");
        next = error.source();
    }
    text
}

fn wait(pidfd: &OwnedFd) -> i32 {
    channel::wait_readable(pidfd.as_fd(), Instant::now() + Duration::from_secs(60)).unwrap();
    let status = rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED).unwrap().unwrap();
    status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal)).unwrap()
}

fn finish(process: Process) -> (i32, String, String) {
    drop(process.io.stdin);
    let (mut output, mut errors) = (String::new(), String::new());
    File::from(process.io.stdout.unwrap()).read_to_string(&mut output).unwrap();
    File::from(process.io.stderr.unwrap()).read_to_string(&mut errors).unwrap();
    (wait(&process.pidfd), output, errors)
}

#[test]
fn a_container_waits_for_its_start_runs_and_tells_its_status() {
    let bundle = Bundle::new("echo $$; cat; echo oops >&2; exit 7");
    let mut running = bundle.create().unwrap();
    assert_eq!(running.container.state(), State::Created);
    running.container.start().unwrap();
    assert_eq!(running.container.state(), State::Running);
    assert!(chain(&running.container.start().unwrap_err()).contains("running"));
    let mut process = running.process.take().unwrap();
    File::from(process.io.stdin.take().unwrap()).write_all(b"hello\n").unwrap();
    assert_eq!(finish(process), (7, "1\nhello\n".to_owned(), "oops\n".to_owned()));
    assert_eq!(running.container.state(), State::Stopped);
}

#[test]
fn the_guests_mounts_descriptors_and_processes_are_not_there() {
    let out = Bundle::new("ls /; ls /proc/self/fd | wc -l; ls /proc | grep -c '^[0-9]'; wc -l < /proc/mounts").output();
    assert!(out.starts_with("bin\ndev\netc\nproc\nsys\ntmp\n"), "{out}");
    let numbers: Vec<u32> = out.lines().skip(6).map(|line| line.trim().parse().unwrap()).collect();
    // ls has its own descriptor for the directory; sh, ls and grep; the root and six mounts.
    assert_eq!(numbers[0], 4);
    assert!(numbers[1] <= 3, "{numbers:?}");
    assert_eq!(numbers[2], 7);
}

#[test]
fn devices_and_links_are_there() {
    let out = Bundle::new("echo x > /dev/null; head -c 4 /dev/zero | wc -c; stat -c %t:%T:%a /dev/null /dev/tty; readlink /dev/fd; readlink /dev/ptmx").output();
    assert_eq!(out, "4\n1:3:666\n5:0:666\n/proc/self/fd\npts/ptmx\n");
}

#[test]
fn environment_home_and_working_directory() {
    let mut bundle = Bundle::new("echo $FOO $HOME; pwd");
    fs::write(bundle.root().join("etc/passwd"), "u:x:5:6::/home/u:/bin/sh\n").unwrap();
    bundle.process().Env.push("FOO=bar".to_owned());
    bundle.process().User.as_mut().unwrap().UID = 5;
    bundle.process().Cwd = "/made/for/it".to_owned();
    assert_eq!(bundle.output(), "bar /home/u\n/made/for/it\n");
}

#[test]
fn users_groups_umask_and_reopened_streams() {
    let mut bundle = Bundle::new("id; umask; echo again > /dev/stdout; grep Cap /proc/self/status");
    let user = bundle.process().User.as_mut().unwrap();
    (user.UID, user.GID, user.AdditionalGids, user.Umask) = (1000, 1001, vec![7, 8], Some(0o27));
    let out = bundle.output();
    assert!(out.starts_with("uid=1000 gid=1001 groups=7,8"), "{out}");
    assert!(out.contains("\n0027\nagain\n"), "{out}");
    assert!(out.contains("CapEff:\t0000000000000000"), "{out}");
}

#[test]
fn capabilities_are_exactly_those_asked_for() {
    let mut bundle = Bundle::new("grep -E 'Cap|NoNew' /proc/self/status");
    let set = bundle.process().Capabilities.as_mut().unwrap();
    set.Inheritable = strings(&["CAP_CHOWN"]);
    set.Ambient = strings(&["CAP_CHOWN"]);
    bundle.process().User.as_mut().unwrap().UID = 1;
    let out = bundle.output();
    for line in ["CapInh:\t0000000000000001", "CapPrm:\t0000000000000001", "CapBnd:\t00000000000000a1"] {
        assert!(out.contains(line), "{out}");
    }
    assert!(out.contains("CapAmb:\t0000000000000001") && out.contains("NoNewPrivs:\t1"), "{out}");
    bundle.process().Capabilities = protobuf::MessageField::none();
    bundle.process().User.as_mut().unwrap().UID = 0;
    let out = bundle.output();
    assert!(out.contains("CapEff:\t0000000000000000") && out.contains("CapBnd:\t0000000000000000"), "{out}");
}

#[test]
fn limits_and_the_out_of_memory_score_are_set() {
    let mut bundle = Bundle::new("ulimit -n; ulimit -H -n; cat /proc/self/oom_score_adj");
    bundle.process().Rlimits =
        vec![oci::POSIXRlimit { Type: "RLIMIT_NOFILE".into(), Soft: 50, Hard: 60, ..Default::default() }];
    bundle.process().OOMScoreAdj = 500;
    assert_eq!(bundle.output(), "50\n60\n500\n");
}

#[test]
fn paths_are_masked_and_read_only() {
    let mut bundle = Bundle::new(
        "wc -c < /etc/secret; ls /etc/dir | wc -l; touch /etc/dir/x; touch /tmp/fine; touch /etc/ro/x; cat /proc/kcore | wc -c",
    );
    for dir in ["dir", "ro"] {
        fs::create_dir(bundle.root().join("etc").join(dir)).unwrap();
    }
    fs::write(bundle.root().join("etc/dir/file"), "x").unwrap();
    fs::write(bundle.root().join("etc/secret"), "x").unwrap();
    bundle.linux().MaskedPaths = strings(&["/etc/secret", "/etc/dir", "/proc/kcore", "/not/there"]);
    bundle.linux().ReadonlyPaths = strings(&["/etc/ro", "/proc/sys", "/not/there"]);
    let (_, out, errors) = bundle.run();
    assert_eq!(out, "0\n0\n0\n");
    assert_eq!(errors.matches("Read-only file system").count(), 2, "{errors}");
}

#[test]
fn the_root_can_be_read_only_and_mounts_in_it_writable() {
    let mut bundle = Bundle::new("touch /x; touch /tmp/y && touch /data/z; touch /ro/z; cat /file");
    fs::create_dir(bundle.dir.path().join("data")).unwrap();
    fs::write(bundle.dir.path().join("file"), "content\n").unwrap();
    bundle.spec.Root.as_mut().unwrap().Readonly = true;
    bundle.spec.Mounts.extend([
        mount("/tmp", "tmpfs", "tmpfs", &["size=1m"]),
        mount("/data", "bind", "data", &["rbind", "rprivate"]),
        mount("/ro", "bind", "data", &["bind", "ro"]),
        mount("/file", "bind", "file", &["bind", "rro"]),
    ]);
    let (_, out, errors) = bundle.run();
    assert_eq!(out, "content\n");
    assert_eq!(errors.matches("Read-only file system").count(), 2, "{errors}");
    assert!(bundle.dir.path().join("data/z").exists());
    assert!(!bundle.root().join("tmp/y").exists());
}

#[test]
fn a_mount_point_that_is_a_link_stays_inside() {
    let mut bundle = Bundle::new("ls /a /b/c");
    let outside = bundle.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    symlink(&outside, bundle.root().join("a")).unwrap();
    symlink("../../../../../../../outside", bundle.root().join("b")).unwrap();
    fs::write(bundle.dir.path().join("file"), "").unwrap();
    bundle.spec.Mounts.extend([mount("/a/file", "bind", "file", &["bind"]), mount("/b/c", "tmpfs", "tmpfs", &[])]);
    assert!(bundle.output().contains("file"));
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    assert!(bundle.root().join(outside.strip_prefix("/").unwrap()).join("file").exists());
}

#[test]
fn proc_is_neither_a_link_nor_covered() {
    let mut bundle = Bundle::new("true");
    fs::remove_dir(bundle.root().join("proc")).unwrap();
    fs::create_dir(bundle.root().join("fake")).unwrap();
    symlink("fake", bundle.root().join("proc")).unwrap();
    assert!(bundle.refusal().contains("not a link"), "{}", bundle.refusal());
    fs::remove_file(bundle.root().join("proc")).unwrap();
    symlink("/proc/self", bundle.root().join("innocent")).unwrap();
    fs::create_dir(bundle.dir.path().join("evil")).unwrap();
    bundle.spec.Mounts.push(mount("/innocent/attr", "bind", "evil", &["bind"]));
    assert!(bundle.refusal().contains("over /proc"), "{}", bundle.refusal());
    bundle.spec.Mounts.pop();
    bundle.spec.Mounts[0] = mount("/proc", "bind", "evil", &["bind"]);
    assert!(bundle.refusal().contains("only a proc file system"), "{}", bundle.refusal());
}

#[test]
fn the_working_directory_cannot_be_outside() {
    for number in 3..12 {
        let mut bundle = Bundle::new("echo reached");
        bundle.process().Cwd = format!("/proc/self/fd/{number}");
        match bundle.create() {
            Err(error) => assert!(chain(&error).contains("/proc/self/fd"), "{error}"),
            Ok(_) => panic!("descriptor {number} is a directory"),
        }
    }
}

#[test]
fn a_missing_command_is_named_at_creation() {
    let mut bundle = Bundle::new("");
    bundle.process().Args = strings(&["nosuch"]);
    let text = bundle.refusal();
    assert!(text.contains("nosuch") && text.contains("No such file"), "{text}");
    bundle.process().Args = strings(&["/etc"]);
    assert!(bundle.refusal().contains("Permission denied"));
    fs::write(bundle.root().join("bin/text"), "no program").unwrap();
    fs::set_permissions(bundle.root().join("bin/text"), fs::Permissions::from_mode(0o755)).unwrap();
    bundle.process().Args = strings(&["text"]);
    let mut running = bundle.create().unwrap();
    let text = chain(&running.container.start().unwrap_err());
    assert!(text.contains("text") && text.contains("Exec format error"), "{text}");
}

#[test]
fn names_and_kernel_parameters_are_the_containers() {
    let mut bundle =
        Bundle::new("hostname; cat /proc/sys/kernel/domainname /proc/sys/kernel/shmmax /proc/sys/net/ipv4/ip_forward");
    bundle.spec.Hostname = "box".to_owned();
    bundle.spec.Domainname = "nis".to_owned();
    bundle.linux().Sysctl =
        [("kernel.shmmax".to_owned(), "4096".to_owned()), ("net.ipv4.ip_forward".to_owned(), "1".to_owned())].into();
    assert_eq!(bundle.output(), "box\nnis\n4096\n1\n");
    bundle.linux().Sysctl = [("vm.swappiness".to_owned(), "1".to_owned())].into();
    assert!(bundle.refusal().contains("vm.swappiness"));
}

#[test]
fn a_terminal_is_the_containers_own() {
    let mut bundle = Bundle::new("tty; stty size; test -c /dev/console && echo console; read line; echo got $line");
    bundle.process().Terminal = true;
    bundle.process().ConsoleSize =
        protobuf::MessageField::some(oci::Box { Height: 33, Width: 99, ..Default::default() });
    let mut running = bundle.create().unwrap();
    running.container.start().unwrap();
    let process = running.process.take().unwrap();
    assert!(process.io.stdin.is_none() && process.io.stdout.is_none());
    let mut terminal = File::from(process.io.terminal.as_ref().unwrap().try_clone().unwrap());
    terminal.write_all(b"word\n").unwrap();
    let mut out = Vec::new();
    // The end of a terminal is an error.
    let _ = terminal.read_to_end(&mut out);
    let out = String::from_utf8_lossy(&out);
    assert!(out.contains("/dev/pts/0") || out.contains("/dev/console"), "{out}");
    assert!(out.contains("33 99") && out.contains("console") && out.contains("got word"), "{out}");
    process.resize(10, 20).unwrap();
    assert_eq!(wait(&process.pidfd), 0);
}

#[test]
fn further_processes_are_in_the_container() {
    let mut bundle = Bundle::new("sleep 1000");
    bundle.spec.Hostname = "inside".to_owned();
    let mut running = bundle.create().unwrap();
    let early = running.container.exec(&process("true"), ExecArgs::default()).unwrap_err();
    assert!(chain(&early).contains("created"));
    running.container.start().unwrap();
    let mut further = process("hostname; ls /; pwd; id -u; grep CapBnd /proc/self/status; test -d /proc/1 && exit 3");
    further.User.as_mut().unwrap().UID = 9;
    further.Cwd = "/tmp".to_owned();
    let started = running.container.exec(&further, ExecArgs::default()).unwrap();
    let (status, out, errors) = finish(started);
    assert_eq!((status, errors.as_str()), (3, ""));
    assert_eq!(out, "inside\nbin\ndev\netc\nproc\nsys\ntmp\n/tmp\n9\nCapBnd:\t00000000000000a1\n");

    let mut terminal = process("tty; exit 4");
    terminal.Terminal = true;
    let started = running.container.exec(&terminal, ExecArgs::default()).unwrap();
    let mut out = Vec::new();
    let _ = File::from(started.io.terminal.unwrap()).read_to_end(&mut out);
    assert!(String::from_utf8_lossy(&out).contains("/dev/pts/"));
    assert_eq!(wait(&started.pidfd), 4);

    let mut missing = process("");
    missing.Args = strings(&["nosuch"]);
    let error = running.container.exec(&missing, ExecArgs::default()).unwrap_err();
    assert!(chain(&error).contains("nosuch"));
    let mut escape = process("true");
    escape.Cwd = "/proc/self/fd/8".to_owned();
    assert!(running.container.exec(&escape, ExecArgs::default()).is_err());
}

#[test]
fn a_user_namespace_maps_root() {
    let mut bundle =
        Bundle::new("id -u; stat -c %u /proc/self/; cat /proc/self/uid_map; echo x > /dev/null && touch /tmp/mine");
    let mapping = oci::LinuxIDMapping { HostID: 100_000, ContainerID: 0, Size: 65_536, ..Default::default() };
    bundle.linux().UIDMappings = vec![mapping.clone()];
    bundle.linux().GIDMappings = vec![mapping];
    bundle.linux().Namespaces.push(oci::LinuxNamespace { Type: "user".to_owned(), ..Default::default() });
    for name in ["", "tmp", "dev", "proc", "sys", "etc"] {
        rustix::fs::chown(
            bundle.root().join(name),
            Some(rustix::fs::Uid::from_raw(100_000)),
            Some(rustix::fs::Gid::from_raw(100_000)),
        )
        .unwrap();
    }
    let out = bundle.output();
    assert!(out.starts_with("0\n0\n"), "{out}");
    assert!(out.contains("100000"), "{out}");
    assert_eq!(fs::metadata(bundle.root().join("tmp/mine")).unwrap().uid(), 100_000);
    bundle.process().Args = strings(&["sleep", "1000"]);
    let mut running = bundle.create().unwrap();
    running.container.start().unwrap();
    let started = running.container.exec(&process("id -u; cat /proc/1/comm"), ExecArgs::default()).unwrap();
    assert_eq!(finish(started), (0, "0\nsleep\n".to_owned(), String::new()));
}

#[test]
fn hooks_run_in_order_and_place() {
    let mut bundle = Bundle::new("echo run >> /log");
    let log = bundle.root().join("log");
    let hook = |name: &str, log: &str| oci::Hook {
        Path: "/bin/sh".to_owned(),
        Args: strings(&[
            "sh",
            "-c",
            &format!("read -r state; echo {name} $MARK >> {log}; echo \"$state\" >> {log}.state"),
        ]),
        Env: strings(&["MARK=m", "PATH=/bin:/usr/bin"]),
        ..Default::default()
    };
    let outside = log.to_str().unwrap();
    bundle.spec.Hooks = protobuf::MessageField::some(oci::Hooks {
        Prestart: vec![hook("prestart", outside)],
        CreateRuntime: vec![hook("createRuntime", outside)],
        CreateContainer: vec![hook("createContainer", outside)],
        StartContainer: vec![hook("startContainer", "/log")],
        Poststart: vec![hook("poststart", &format!("{outside}.after"))],
        Poststop: vec![hook("poststop", &format!("{outside}.after"))],
        ..Default::default()
    });
    let mut running = bundle.create().unwrap();
    running.container.start().unwrap();
    assert_eq!(finish(running.process.take().unwrap()).0, 0);
    running.container.run_poststop_hooks();
    let lines = fs::read_to_string(&log).unwrap();
    assert_eq!(lines, "prestart m\ncreateRuntime m\ncreateContainer m\nstartContainer m\nrun\n");
    assert_eq!(fs::read_to_string(format!("{outside}.after")).unwrap(), "poststart m\npoststop m\n");
    let states = fs::read_to_string(format!("{outside}.state")).unwrap();
    assert!(states.contains("\"id\":\"test\"") && states.contains("\"status\":\"creating\""), "{states}");
}

#[test]
fn a_hook_that_fails_or_hangs_ends_the_creation() {
    let mut bundle = Bundle::new("true");
    let hook = |script: &str, timeout| oci::Hook {
        Path: "/bin/sh".to_owned(),
        Args: strings(&["sh", "-c", script]),
        Timeout: timeout,
        ..Default::default()
    };
    let hooks = |hook| protobuf::MessageField::some(oci::Hooks { CreateRuntime: vec![hook], ..Default::default() });
    bundle.spec.Hooks = hooks(hook("echo because >&2; exit 5", 0));
    let text = bundle.refusal();
    assert!(text.contains("status 5") && text.contains("because"), "{text}");
    bundle.spec.Hooks = hooks(hook("exec /bin/busybox sleep 1000", 1));
    assert!(bundle.refusal().contains("longer than 1 s"));
}

#[test]
fn labels_and_namespaces_that_cannot_be_are_refused_by_name() {
    let mut bundle = Bundle::new("true");
    bundle.process().ApparmorProfile = "strict".to_owned();
    assert!(bundle.refusal().contains("strict"));
    bundle.process().ApparmorProfile.clear();
    bundle.spec.Mounts.push(mount("/x", "tmpfs", "tmpfs", &["bogus=1"]));
    let text = bundle.refusal();
    assert!(text.contains("bogus") && text.contains("/x"), "{text}");
}

#[test]
fn a_filter_is_in_force_with_and_without_new_privileges() {
    // mkdir and mkdirat fail with EXDEV, all else goes.
    let numbers = [libc::SYS_mkdirat, libc::SYS_mkdir];
    let load = libc::sock_filter { code: 0x20, jt: 0, jf: 0, k: 0 };
    let equal = |number: i64, jt| libc::sock_filter { code: 0x15, jt, jf: 0, k: u32::try_from(number).unwrap() };
    let answer = |k| libc::sock_filter { code: 0x06, jt: 0, jf: 0, k };
    let filter = Filter {
        instructions: vec![
            load,
            equal(numbers[0], 2),
            equal(numbers[1], 1),
            answer(libc::SECCOMP_RET_ALLOW),
            answer(libc::SECCOMP_RET_ERRNO | libc::EXDEV.cast_unsigned()),
        ],
        flags: 0,
    };
    for no_new_privileges in [true, false] {
        let mut bundle = Bundle::new("mkdir /x; grep -E 'CapEff|CapPrm|Seccomp:' /proc/self/status");
        bundle.process().NoNewPrivileges = no_new_privileges;
        let mut running = bundle.create_with(Some(filter.clone())).unwrap();
        running.container.start().unwrap();
        let (_, out, errors) = finish(running.process.take().unwrap());
        assert!(errors.contains("Invalid cross-device link"), "{errors}");
        assert_eq!(out, "CapPrm:\t00000000000000a1\nCapEff:\t00000000000000a1\nSeccomp:\t2\n");
    }
}

#[test]
fn the_pods_namespaces_are_shared() {
    let mut first = Bundle::new("sleep 1000");
    first.spec.Hostname = "pod".to_owned();
    let mut first = first.create().unwrap();
    first.container.start().unwrap();
    let open = |kind: &str| File::open(format!("/proc/{}/ns/{kind}", first.container.pid())).unwrap();
    let (ipc, uts, pid) = (open("ipc"), open("uts"), open("pid"));
    let second = Bundle::new("hostname; cat /proc/1/comm; sleep 1000");
    let (mut container, started) = Container::create(CreateArgs {
        id: "second",
        spec: &second.spec,
        bundle_dir: second.dir.path(),
        cgroup: CgroupEntry::default(),
        shared: SharedNamespaces { ipc: Some(ipc.as_fd()), uts: Some(uts.as_fd()), pid: Some(pid.as_fd()) },
        seccomp: None,
        pipe_capacity: Some(8192),
    })
    .unwrap();
    container.start().unwrap();
    let stdout = started.io.stdout.as_ref().unwrap();
    assert_eq!(rustix::pipe::fcntl_getpipe_size(stdout).unwrap(), 8192);
    let mut out = vec![0; "pod\nsleep\n".len()];
    File::from(stdout.try_clone().unwrap()).read_exact(&mut out).unwrap();
    assert_eq!(out, b"pod\nsleep\n");
    let exec = container.exec(&process("cat /proc/1/comm"), ExecArgs::default()).unwrap();
    assert_eq!(finish(exec).1, "sleep\n");
    spawn::kill_and_collect(container.pidfd.as_fd());
}

#[test]
fn a_dropped_container_that_never_started_goes_away() {
    let bundle = Bundle::new("true");
    let mut running = bundle.create().unwrap();
    running.container.line = None;
    assert_eq!(wait(&running.process.take().unwrap().pidfd), 1);
}

#[test]
fn who_waits_for_its_start_does_not_show_the_agents_binary() {
    let script =
        "for exe in /proc/[0-9]*/exe; do readlink $exe || echo hidden; cat $exe > /dev/null || echo closed; done";
    let running = Bundle::new("sleep 1000");
    let mut first = running.create().unwrap();
    first.container.start().unwrap();
    let pid = File::open(format!("/proc/{}/ns/pid", first.container.pid())).unwrap();
    let waiting = Bundle::new("true");
    let (second, started) = Container::create(CreateArgs {
        id: "waiting",
        spec: &waiting.spec,
        bundle_dir: waiting.dir.path(),
        cgroup: CgroupEntry::default(),
        shared: SharedNamespaces { pid: Some(pid.as_fd()), ..Default::default() },
        seccomp: None,
        pipe_capacity: None,
    })
    .unwrap();
    let (_, out, _) = finish(first.container.exec(&process(script), ExecArgs::default()).unwrap());
    assert!(out.contains("hidden") && out.contains("closed") && out.contains("/bin/busybox"), "{out}");
    assert!(!out.contains("agent"), "{out}");
    drop(started);
    // A PID namespace ends when all in it have been collected.
    spawn::kill_and_collect(second.pidfd.as_fd());
}

/// A cgroup directory, gone when dropped.
struct Group(PathBuf);

impl Group {
    fn new(hierarchy: &str, name: &str) -> Option<Self> {
        let path = Path::new("/sys/fs/cgroup").join(hierarchy).join(format!("{name}-{}", std::process::id()));
        fs::create_dir(&path).ok().map(|()| Self(path))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        fs::remove_dir(&self.0).unwrap();
    }
}

fn with_cgroup(bundle: &Bundle, cgroup: CgroupEntry<'_>) -> (i32, String, String) {
    let (mut container, process) = Container::create(CreateArgs {
        id: "grouped",
        spec: &bundle.spec,
        bundle_dir: bundle.dir.path(),
        cgroup,
        shared: SharedNamespaces::default(),
        seccomp: None,
        pipe_capacity: None,
    })
    .unwrap();
    container.start().unwrap();
    finish(process)
}

fn cgroup_bundle() -> Bundle {
    let mut bundle = Bundle::new("cat /proc/self/cgroup; ls -R /sys/fs/cgroup; touch /sys/fs/cgroup/x");
    bundle.spec.Mounts.push(mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "relatime", "ro"]));
    for kind in ["cgroup", "time"] {
        bundle.linux().Namespaces.push(oci::LinuxNamespace { Type: kind.to_owned(), ..Default::default() });
    }
    bundle
}

#[test]
fn a_container_is_in_its_version_one_cgroups_from_the_beginning() {
    let (Some(memory), Some(pids)) = (Group::new("memory", "one"), Group::new("pids", "one")) else { return };
    let files = [memory.0.join("cgroup.procs"), pids.0.join("cgroup.procs")];
    let bundle = cgroup_bundle();
    let (status, out, errors) = with_cgroup(&bundle, CgroupEntry { v2: None, procs_files: &files });
    assert!(out.contains(":memory:/\n") && out.contains(":pids:/\n"), "{out}");
    assert!(out.contains("/sys/fs/cgroup/memory:\n") && out.contains("pids.max"), "{out}");
    assert!(status != 0 && errors.contains("Read-only"), "{errors}");
}

#[test]
fn a_container_is_made_in_its_version_two_cgroup() {
    let Some(group) = Group::new("unified", "two").or_else(|| Group::new("", "two")) else { return };
    let directory = File::open(&group.0).unwrap();
    if rustix::fs::fstatfs(&directory).unwrap().f_type.cast_unsigned() != 0x6367_7270 {
        return;
    }
    let bundle = cgroup_bundle();
    let (status, out, errors) = with_cgroup(&bundle, CgroupEntry { v2: Some(directory.as_fd()), procs_files: &[] });
    assert!(out.contains("0::/\n") && out.contains("cgroup.procs"), "{out}");
    assert!(status != 0 && errors.contains("Read-only"), "{errors}");
}

#[test]
fn many_at_once_do_not_wait_for_one_another() {
    let work = || {
        for _ in 0..5 {
            assert_eq!(Bundle::new("exit 3").run().0, 3);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(work);
        }
    });
}
