//! Starts real jails and looks at them from both sides. Needs root and a static busybox; without either, every test
//! here is listed as ignored.
#![allow(clippy::unwrap_used, clippy::expect_used)] // A test with a main of its own is a test all the same.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, PipeWriter, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use jail::{Capability, Entry, Error, Jail, Limit, Process, Program, Refusal, Resource, Root, Seccomp};
use libtest_mimic::{Arguments, Failed, Trial};

const LIMIT: Duration = Duration::from_secs(20);
const BUSYBOX: &str = "/bin/busybox";
const USER: u32 = 1_900_099_999;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    match args.get(1).and_then(|verb| verb.to_str()) {
        Some("__jail") => return jail::main(args.into_iter().skip(2)),
        Some("__helper") => return helper(),
        Some("__caller") => return caller(),
        Some("__propagation") => return propagation(Path::new(&args[2])),
        _ => {}
    }
    let unable = !Path::new(BUSYBOX).exists() || fs::metadata("/proc/self").map_or(0, |me| me.uid()) != 0;
    let tests: [(&str, fn()); 11] = [
        ("a_program_sees_its_root_and_nothing_else", root),
        ("a_program_has_no_rights", rights),
        ("devices_belong_to_the_user", devices),
        ("only_the_descriptors_given_are_open", descriptors),
        ("nothing_runs_before_the_release", held),
        ("a_failed_step_is_named", failures),
        ("helpers_die_with_their_caller", death),
        ("helpers_keep_what_they_are_given", keeps),
        ("a_shared_directory_receives_later_mounts", receives),
        ("a_cgroup_is_joined_first", cgroup),
        ("by_hand_it_explains_itself", by_hand),
    ];
    let trials = tests.map(|(name, test)| {
        Trial::test(name, move || -> Result<(), Failed> {
            test();
            Ok(())
        })
        .with_ignored_flag(unable)
    });
    libtest_mimic::run(&Arguments { test_threads: Some(1), ..Arguments::from_args() }, trials.into()).exit_code()
}

/// A jail around busybox's shell.
fn shell(script: &str) -> Jail {
    let program = Program::Exec { path: "/bin/busybox".into(), args: ["sh", "-c", script].map(OsString::from).into() };
    let mut jail = Jail::new(program, USER, USER);
    jail.env.push(("PATH".into(), "/bin".into()));
    let busybox = Entry::Bind { source: BUSYBOX.into(), target: "/bin/busybox".into(), writable: false };
    let links = ["ls", "id", "cat", "sleep", "stat", "hostname", "touch", "head"]
        .map(|name| Entry::Symlink { target: format!("/bin/{name}").into(), to: "busybox".into() });
    jail.root = Root::Built([busybox].into_iter().chain(links).collect());
    jail
}

fn add(jail: &mut Jail, entry: Entry) {
    let Root::Built(entries) = &mut jail.root else { panic!("not a built root") };
    entries.push(entry);
}

/// Runs a jail to its end and returns what it wrote to standard output and error.
fn output(jail: &Jail) -> String {
    let (mut reader, writer) = io::pipe().unwrap();
    let writer = OwnedFd::from(writer);
    let process = jail.spawn(vec![(1, writer.try_clone().unwrap()), (2, writer)]).unwrap().release().unwrap();
    let mut said = String::new();
    reader.read_to_string(&mut said).unwrap();
    process.wait_for(LIMIT).unwrap().expect("it ends");
    said.trim_end().to_owned()
}

fn status(pid: u32, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.split(':').next() == Some(name)).unwrap();
    line.split_once(':').unwrap().1.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Starts a jail that goes on until it is killed.
fn running(jail: &Jail, fds: Vec<(i32, OwnedFd)>) -> Process {
    jail.spawn(fds).unwrap().release().unwrap()
}

/// A jail whose shell waits until the pipe is dropped. Returned once it does: just after the release, exec may be
/// half done.
fn waiting() -> (Process, PipeWriter) {
    let (reader, writer) = io::pipe().unwrap();
    let (stdin, hold) = io::pipe().unwrap();
    let process = running(&shell("echo ready; read x"), vec![(1, writer.into()), (0, stdin.into())]);
    BufReader::new(reader).read_line(&mut String::new()).unwrap();
    (process, hold)
}

fn end(process: &Process) {
    process.kill().unwrap();
    assert_eq!(process.try_wait().unwrap().unwrap().signal(), Some(9));
}

fn root() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "content").unwrap();
    let mut jail = shell("ls /; cat /data/dir/file; echo; hostname; echo $$; touch /data/dir/x /x /tmp/y; ls /tmp");
    add(&mut jail, Entry::Bind { source: dir.path().into(), target: "/data/dir".into(), writable: false });
    add(&mut jail, Entry::Tmpfs { target: "/tmp".into(), size_kib: 16 });
    let said = output(&jail);
    assert_eq!(
        said,
        "bin\ndata\ntmp\ncontent\nkata\n1\ntouch: /data/dir/x: Read-only file system\n\
         touch: /x: Read-only file system\ny"
    );
    assert!(!dir.path().join("x").exists());
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(dir.path().to_str().unwrap()), "nothing comes back to the caller");
}

fn rights() {
    let (process, _hold) = waiting();
    let pid = process.pid();
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(pid, set), "0000000000000000", "{set}");
    }
    assert_eq!(status(pid, "Uid"), [USER.to_string().as_str(); 4].join(" "));
    assert_eq!(status(pid, "Gid"), [USER.to_string().as_str(); 4].join(" "));
    assert_eq!(status(pid, "Groups"), "");
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    assert_eq!(status(pid, "PPid"), std::process::id().to_string());
    for namespace in ["mnt", "pid", "net", "ipc", "uts"] {
        let link = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(link(pid), link(std::process::id()), "{namespace}");
    }
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"]);
    assert_eq!(fs::read(format!("/proc/{pid}/environ")).unwrap(), b"PATH=/bin\0");
    end(&process);
}

fn devices() {
    let mut jail = shell("stat -c '%F %t:%T %u %a' /dev/null; echo >/dev/null && head -c 3 /dev/zero | cat >/dev/null");
    for name in ["/dev/null", "/dev/zero"] {
        add(&mut jail, Entry::Device { source: name.into(), target: name.into() });
    }
    assert_eq!(output(&jail), format!("character special file 1:3 {USER} 600"));
    if Path::new("/dev/kvm").exists() {
        let mut jail = shell(": <>/dev/kvm && echo open");
        add(&mut jail, Entry::Device { source: "/dev/kvm".into(), target: "/dev/kvm".into() });
        assert_eq!(output(&jail), "open", "whatever the host's rights for it are");
    }
    let mut jail = shell("");
    add(&mut jail, Entry::Device { source: "/etc/passwd".into(), target: "/dev/x".into() });
    let err = jail.spawn(vec![]).unwrap().release().unwrap_err();
    assert!(err.to_string().contains("use /etc/passwd as a device"), "{err}");
}

fn descriptors() {
    // An inheritable one that nobody asked for.
    let mut caller = Command::new("/bin/sh")
        .args(["-c", "exec 7</etc/passwd; exec \"$0\" __caller"])
        .arg(exe())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(caller.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let open = open_descriptors(line.trim().parse().unwrap());
    caller.kill().unwrap();
    caller.wait().unwrap();
    assert_eq!(open.len(), 3, "{open:?}");

    let file = |content: &str| -> OwnedFd {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content.as_bytes()).unwrap();
        file.rewind().unwrap();
        file.into()
    };
    // Numbers that collide with each other's on the way.
    let (stdin, mut go) = io::pipe().unwrap();
    let fds = vec![(5, file("five")), (3, file("three")), (4, file("four")), (0, stdin.into())];
    let (reader, writer) = io::pipe().unwrap();
    let fds = fds.into_iter().chain([(1, writer.into())]).collect();
    let process = running(&shell("cat <&3; cat <&4; cat <&5; read x; echo $x; read x"), fds);
    go.write_all(b"zero\n").unwrap();
    let mut said = String::new();
    BufReader::new(reader).read_line(&mut said).unwrap();
    assert_eq!(said, "threefourfivezero\n");
    let open = open_descriptors(process.pid());
    assert_eq!(open.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5], "{open:?}");
    end(&process);
}

fn open_descriptors(pid: u32) -> Vec<(i32, PathBuf)> {
    let mut open: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().to_str().unwrap().parse().unwrap(), fs::read_link(entry.path()).unwrap()))
        .collect();
    open.sort();
    open
}

fn held() {
    let dir = tempfile::tempdir().unwrap();
    let mut jail = shell("touch /data/ran; sleep 100");
    add(&mut jail, Entry::Bind { source: dir.path().into(), target: "/data".into(), writable: true });
    std::os::unix::fs::chown(dir.path(), Some(USER), None).unwrap();
    let start = Instant::now();
    let held = jail.spawn(vec![]).unwrap();
    let spawned = start.elapsed();
    let (pid, start_time) = (held.pid(), held.start_time());
    assert_eq!(jail::start_time_of(pid).unwrap(), start_time);
    assert_eq!(fs::read_link(format!("/proc/{pid}/exe")).unwrap(), exe());
    drop(held);
    assert!(jail::start_time_of(pid).is_err(), "dropped, it is gone");

    let held = jail.spawn(vec![]).unwrap();
    let pid = held.pid();
    let start = Instant::now();
    let process = held.release().unwrap();
    eprintln!("held after {spawned:?}, confined {:?} later", start.elapsed());
    assert_eq!((process.pid(), process.try_wait().unwrap()), (pid, None));
    assert_eq!(fs::read_link(format!("/proc/{pid}/exe")).unwrap(), Path::new(BUSYBOX));
    jail::kill_exact(pid, process.start_time()).unwrap();
    assert_eq!(process.wait_for(LIMIT).unwrap().unwrap().signal(), Some(9));
}

fn failures() {
    let told = |jail: &Jail| -> (String, Option<i32>) {
        let err = jail.spawn(vec![]).and_then(jail::Held::release).unwrap_err();
        let Error::Step { ref source, .. } = err else { panic!("{err}") };
        (err.to_string(), source.raw_os_error())
    };
    let mut jail = shell("");
    jail.program = Program::Exec { path: "/no/such".into(), args: vec![] };
    assert_eq!(told(&jail), ("Cannot start /no/such inside the jail (is it installed?)".into(), Some(libc::ENOENT)));
    let mut jail = shell("");
    jail.cgroups.push("/no/cgroup".into());
    assert!(told(&jail).0.starts_with("Cannot join the cgroup /no/cgroup"));
    let mut jail = shell("");
    add(&mut jail, Entry::Bind { source: "/no/file".into(), target: "/x".into(), writable: false });
    assert!(told(&jail).0.starts_with("Cannot open /no/file for the jail"));
    let mut jail = shell("");
    add(&mut jail, Entry::Symlink { target: "/../x".into(), to: "y".into() });
    assert!(told(&jail).0.contains("has no .."));
    let err = shell("").spawn_from(Path::new("/no/kata"), vec![]).unwrap_err();
    assert!(err.to_string().contains("/no/kata"), "{err}");
    // An executable that knows nothing of jails.
    let err = shell("").spawn_from(Path::new("/bin/true"), vec![]).unwrap_err();
    assert!(matches!(err, Error::Gone(_)) || matches!(err, Error::Talk(..)), "{err}");
}

/// `__caller`: starts a jail, says its pid, waits to be killed.
fn caller() -> ExitCode {
    let (process, _hold) = waiting();
    println!("{}", process.pid());
    let _ = io::stdin().read(&mut [0]);
    ExitCode::SUCCESS
}

fn death() {
    let mut caller = Command::new(exe()).arg("__caller").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(caller.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let pid: u32 = line.trim().parse().unwrap();
    let start = jail::start_time_of(pid).unwrap();
    caller.kill().unwrap();
    caller.wait().unwrap();
    let end = Instant::now() + LIMIT;
    while jail::start_time_of(pid).is_ok_and(|found| found == start) && !status(pid, "State").starts_with('Z') {
        assert!(Instant::now() < end, "it lives on");
        std::thread::yield_now();
    }
}

/// `__helper`: confines itself and does what it shouldn't, answering at descriptor 3.
fn helper() -> ExitCode {
    let mut attached = jail::attach().unwrap();
    let mut answer = File::from(attached.take_fd(3).unwrap());
    let mut wait = File::from(attached.take_fd(4).unwrap());
    assert!(attached.take_fd(4).is_none());
    attached.confine().unwrap();
    let refused = std::os::unix::fs::symlink("a", "/link").unwrap_err();
    let mut names: Vec<_> = fs::read_dir("/").unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    writeln!(answer, "{names:?} {:?}", refused.raw_os_error()).unwrap();
    let _ = wait.read(&mut [0]);
    writeln!(answer, "{:?}", fs::read_to_string("/sub/later").ok()).unwrap();
    let _ = wait.read(&mut [0]);
    ExitCode::SUCCESS
}

fn helper_jail(dir: &Path) -> Jail {
    let mut jail = Jail::new(Program::Helper { verb: "__helper".into(), args: vec![] }, 0, 0);
    jail.root = Root::Directory(dir.into());
    jail.capabilities = vec![Capability::Chown, Capability::Mknod, Capability::Setfcap];
    jail.limits.push(Limit { resource: Resource::OpenFiles, value: 64 });
    let allow = [
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_close,
        libc::SYS_openat,
        libc::SYS_getdents64,
        libc::SYS_fstat,
        libc::SYS_statx,
        libc::SYS_lseek,
        libc::SYS_mmap,
        libc::SYS_munmap,
        libc::SYS_brk,
        libc::SYS_mremap,
        libc::SYS_exit_group,
        libc::SYS_sigaltstack,
        libc::SYS_newfstatat,
        libc::SYS_fcntl,
        libc::SYS_futex,
        libc::SYS_rt_sigprocmask,
        libc::SYS_madvise,
    ];
    jail.seccomp = Some(Seccomp { allow: allow.into(), otherwise: Refusal::Errno(libc::EUCLEAN.unsigned_abs()) });
    jail
}

fn keeps() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("inside"), "").unwrap();
    let (reader, answer) = io::pipe().unwrap();
    let (wait, mut go) = io::pipe().unwrap();
    let process = running(&helper_jail(dir.path()), vec![(3, answer.into()), (4, wait.into())]);
    let mut line = String::new();
    BufReader::new(reader).read_line(&mut line).unwrap();
    assert_eq!(line, format!("[\"inside\"] Some({})\n", libc::EUCLEAN));
    let kept = format!("{:016x}", 1_u64 | 1 << 27 | 1 << 31);
    let pid = process.pid();
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(status(pid, set), kept, "{set}");
    }
    assert_eq!(status(pid, "CapInh"), "0000000000000000");
    assert_eq!((status(pid, "Seccomp").as_str(), status(pid, "NoNewPrivs").as_str()), ("2", "1"));
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    assert!(limits.lines().any(|line| line.split_whitespace().take(5).eq(["Max", "open", "files", "64", "64"])));
    go.write_all(b"12").unwrap();
    assert!(process.wait_for(LIMIT).unwrap().unwrap().signal().is_none());
}

fn receives() {
    let dir = tempfile::tempdir().unwrap();
    let done = Command::new("unshare")
        .args(["--mount", "--propagation", "private"])
        .arg(exe())
        .arg("__propagation")
        .arg(dir.path())
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// `__propagation`: in a mount namespace of its own, mounts below a directory that a helper has as its root.
fn propagation(dir: &Path) -> ExitCode {
    let mount = |args: &[&str]| {
        assert!(Command::new("mount").args(args).arg(dir).status().unwrap().success(), "{args:?}");
    };
    mount(&["-t", "tmpfs", "share"]);
    mount(&["--make-shared"]);
    fs::create_dir(dir.join("sub")).unwrap();
    let (reader, answer) = io::pipe().unwrap();
    let (wait, mut go) = io::pipe().unwrap();
    let process = running(&helper_jail(dir), vec![(3, answer.into()), (4, wait.into())]);
    let mut reader = BufReader::new(reader);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let sub = dir.join("sub");
    assert!(Command::new("mount").args(["-t", "tmpfs", "later"]).arg(&sub).status().unwrap().success());
    fs::write(sub.join("later"), "content").unwrap();
    go.write_all(b"1").unwrap();
    line.clear();
    reader.read_line(&mut line).unwrap();
    assert_eq!(line, "Some(\"content\")\n");
    go.write_all(b"2").unwrap();
    process.wait_for(LIMIT).unwrap().unwrap();
    ExitCode::SUCCESS
}

fn cgroup() {
    // Whichever hierarchy this host lets us change: version 2, hybrid, or one controller of version 1.
    let parents = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup/pids", "/sys/fs/cgroup"];
    let name = format!("kata-jail-test-{}", std::process::id());
    let Some(dir) = parents.iter().map(|parent| Path::new(parent).join(&name)).find(|dir| fs::create_dir(dir).is_ok())
    else {
        eprintln!("no cgroup can be made here: not tested");
        return;
    };
    if !dir.join("cgroup.procs").exists() {
        fs::remove_dir(&dir).unwrap();
        eprintln!("no cgroup can be made here: not tested");
        return;
    }
    let mut jail = shell("sleep 100");
    jail.cgroups.push(dir.clone());
    let process = running(&jail, vec![]);
    let members = fs::read_to_string(dir.join("cgroup.procs")).unwrap();
    end(&process);
    fs::remove_dir(&dir).unwrap();
    assert!(members.lines().any(|member| member == process.pid().to_string()), "{members}");
}

fn by_hand() {
    let done = Command::new(exe()).arg("__jail").stdin(Stdio::null()).output().unwrap();
    assert!(!done.status.success());
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(said.contains("not for use by hand"), "{said}");
}

fn exe() -> PathBuf {
    std::env::current_exe().unwrap()
}
