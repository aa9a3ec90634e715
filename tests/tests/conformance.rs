//! The fields of the OCI runtime specification (config.md, config-linux.md), each seen from inside the container.
//!
//! Every case runs against runc first: a case that runc fails proves nothing about us.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::Path;

use e2e::engine::{CONTAINER, Containerd, KATA, RUNC, fresh_name};
use e2e::residue::Residue;
use e2e::spec::{base, mount};
use e2e::{Said, image, run};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A field under test: how the configuration differs, what runs inside, what must come out.
struct Case {
    field: &'static str,
    script: &'static str,
    change: fn(&mut Value, &Path),
    expect: fn(&Said) -> bool,
}

fn says(said: &Said, text: &str) -> bool {
    said.code == 0 && said.out.trim() == text
}

fn unchanged(_: &mut Value, _: &Path) {}

const CASES: &[Case] = &[
    Case { field: "process.args, exit status", script: "exit 42", change: unchanged, expect: |said| said.code == 42 },
    Case {
        field: "process.env",
        script: "echo $GREETING",
        change: |spec, _| spec["process"]["env"] = json!(["PATH=/bin", "GREETING=hello world"]),
        expect: |said| says(said, "hello world"),
    },
    Case {
        field: "process.cwd, made when missing",
        script: "pwd",
        change: |spec, _| spec["process"]["cwd"] = json!("/run/deep/er"),
        expect: |said| says(said, "/run/deep/er"),
    },
    Case {
        field: "process.user with additionalGids",
        script: "id -u; id -g; id -G",
        change: |spec, _| spec["process"]["user"] = json!({ "uid": 1000, "gid": 1000, "additionalGids": [2000, 2001] }),
        expect: |said| says(said, "1000\n1000\n1000 2000 2001"),
    },
    Case {
        field: "process.user.umask",
        script: "umask",
        change: |spec, _| spec["process"]["user"]["umask"] = json!(0o77),
        expect: |said| says(said, "0077"),
    },
    Case {
        field: "process.capabilities",
        script: "grep -E '^Cap(Prm|Eff|Bnd)' /proc/self/status | tr -d '[:alpha:]:\\t'",
        change: |spec, _| {
            let set = json!(["CAP_CHOWN", "CAP_NET_BIND_SERVICE"]);
            spec["process"]["capabilities"] = json!({ "bounding": set, "effective": set, "permitted": set });
        },
        expect: |said| says(said, "0000000000000401\n0000000000000401\n0000000000000401"),
    },
    Case {
        field: "process.capabilities.ambient for a user",
        script: "grep -E '^Cap(Eff|Amb)' /proc/self/status | tr -d '[:alpha:]:\\t'",
        change: |spec, _| {
            let set = json!(["CAP_NET_BIND_SERVICE"]);
            spec["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
            spec["process"]["capabilities"] =
                json!({ "bounding": set, "effective": set, "permitted": set, "inheritable": set, "ambient": set });
        },
        expect: |said| says(said, "0000000000000400\n0000000000000400"),
    },
    Case {
        field: "process.noNewPrivileges",
        script: "grep NoNewPrivs /proc/self/status | tr -dc 0-9",
        change: unchanged,
        expect: |said| says(said, "1"),
    },
    Case {
        field: "process.rlimits",
        script: "ulimit -S -n; ulimit -H -n; ulimit -c",
        change: |spec, _| {
            spec["process"]["rlimits"] = json!([
                { "type": "RLIMIT_NOFILE", "soft": 100, "hard": 200 },
                { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
            ]);
        },
        expect: |said| says(said, "100\n200\n0"),
    },
    Case {
        field: "process.oomScoreAdj",
        script: "cat /proc/self/oom_score_adj",
        change: |spec, _| spec["process"]["oomScoreAdj"] = json!(500),
        expect: |said| says(said, "500"),
    },
    Case {
        field: "root.readonly",
        script: "touch /file; echo $?; touch /run/file && echo writable",
        change: |spec, _| spec["root"]["readonly"] = json!(true),
        expect: |said| says(said, "1\nwritable"),
    },
    Case { field: "hostname", script: "hostname", change: unchanged, expect: |said| says(said, "e2e") },
    Case {
        field: "mounts: bind, and what is written shows on the host",
        script: "cat /mnt/dir/in; echo out > /mnt/dir/out",
        change: |spec, scratch| {
            fs::create_dir_all(scratch.join("bind")).unwrap();
            fs::write(scratch.join("bind/in"), "from the host").unwrap();
            let mounts = spec["mounts"].as_array_mut().unwrap();
            mounts.push(mount("/mnt/dir", "bind", scratch.join("bind").to_str().unwrap(), &["rbind", "rw"]));
        },
        expect: |said| says(said, "from the host"),
    },
    Case {
        field: "mounts: a read-only bind of a file",
        script: "cat /etc/config; echo x > /etc/config; echo $?",
        change: |spec, scratch| {
            fs::write(scratch.join("config"), "key=value\n").unwrap();
            let mounts = spec["mounts"].as_array_mut().unwrap();
            mounts.push(mount("/etc/config", "bind", scratch.join("config").to_str().unwrap(), &["bind", "ro"]));
        },
        expect: |said| says(said, "key=value\n1"),
    },
    Case {
        field: "mounts: tmpfs with size, mode and flags",
        script: "df -k /mnt/t | tail -n 1 | awk '{print $2}'; stat -c %a /mnt/t; grep ' /mnt/t ' /proc/mounts | grep -o noexec",
        change: |spec, _| {
            let options = ["nosuid", "noexec", "size=1024k", "mode=1770"];
            spec["mounts"].as_array_mut().unwrap().push(mount("/mnt/t", "tmpfs", "tmpfs", &options));
        },
        expect: |said| says(said, "1024\n1770\nnoexec"),
    },
    Case {
        field: "mounts: a destination behind a link stays inside",
        script: "ls /outside 2>/dev/null; ls /run/inside; readlink /link",
        change: |spec, _| {
            let rootfs = spec["root"]["path"].as_str().unwrap().to_owned();
            let _ = std::os::unix::fs::symlink("/../../../../../../run/inside", format!("{rootfs}/link"));
            let mounts = spec["mounts"].as_array_mut().unwrap();
            mounts.push(mount("/link/deeper", "tmpfs", "tmpfs", &[]));
        },
        expect: |said| said.code == 0 && said.out.contains("deeper"),
    },
    Case {
        field: "default devices and links",
        script: "for d in null zero full random urandom tty; do test -c /dev/$d || echo no $d; done; \
                 readlink /dev/stdin; readlink /dev/fd; readlink /dev/ptmx; echo x > /dev/null",
        change: unchanged,
        expect: |said| {
            said.code == 0 && !said.out.contains("no ") && said.out.starts_with("/proc/self/fd/0\n/proc/self/fd\n")
        },
    },
    Case {
        field: "linux.devices",
        script: "stat -c '%t:%T %a %u %F' /dev/mine; head -c 4 /dev/mine | wc -c",
        change: |spec, _| {
            spec["linux"]["devices"] = json!([
                { "path": "/dev/mine", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 7, "gid": 0 }
            ]);
            spec["linux"]["resources"]["devices"] = json!([{ "allow": false, "access": "rwm" }, { "allow": true, "type": "c", "major": 1, "minor": 5, "access": "rwm" }]);
        },
        expect: |said| says(said, "1:5 640 7 character special file\n4"),
    },
    Case {
        field: "linux.resources.devices: what is not allowed cannot be opened",
        script: "mknod /run/mem c 1 1 && cat /run/mem; echo $?",
        change: unchanged,
        expect: |said| said.out.trim() == "1",
    },
    Case {
        field: "linux.maskedPaths",
        script: "wc -c < /proc/timer_list; ls -A /sys/firmware | wc -l",
        change: |spec, _| {
            spec["linux"]["maskedPaths"].as_array_mut().unwrap().push(json!("/sys/firmware"));
        },
        expect: |said| says(said, "0\n0"),
    },
    Case {
        field: "linux.readonlyPaths",
        script: "echo 1 > /proc/sys/kernel/panic; echo $?",
        change: unchanged,
        expect: |said| said.out.trim() == "1",
    },
    Case {
        field: "linux.sysctl of a namespace",
        script: "cat /proc/sys/kernel/msgmax /proc/sys/net/ipv4/ip_unprivileged_port_start",
        change: |spec, _| {
            spec["linux"]["sysctl"] = json!({ "kernel.msgmax": "4096", "net.ipv4.ip_unprivileged_port_start": "80" });
        },
        expect: |said| says(said, "4096\n80"),
    },
    Case {
        field: "linux.namespaces: pid",
        script: "echo $$; ls -d /proc/[0-9]* | wc -l",
        change: unchanged,
        // The shell, ls and wc.
        expect: |said| said.code == 0 && said.out.starts_with("1\n") && said.out.trim().ends_with('3'),
    },
    Case {
        field: "linux.seccomp",
        script: "mkdir /run/d; echo $?; mkdir /run/e 2>&1 | grep -o 'not permitted'; echo still here",
        change: |spec, _| {
            spec["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
                "syscalls": [{ "names": ["mkdir", "mkdirat", "no_such_syscall"], "action": "SCMP_ACT_ERRNO" }],
            });
        },
        expect: |said| says(said, "1\nnot permitted\nstill here"),
    },
    Case {
        field: "linux.seccomp with an argument",
        script: "kill -0 1 && echo allowed; kill -10 1 2>/dev/null || echo denied",
        change: |spec, _| {
            spec["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [{
                    "names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
                    "args": [{ "index": 1, "value": 10, "op": "SCMP_CMP_EQ" }],
                }],
            });
        },
        expect: |said| says(said, "allowed\ndenied"),
    },
    Case {
        field: "linux.resources.pids",
        script: "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 2 & done 2>/dev/null; echo done",
        change: |spec, _| spec["linux"]["resources"]["pids"] = json!({ "limit": 6 }),
        expect: |said| !says(said, "done") || said.err.contains("fork"),
    },
    Case {
        field: "linux.resources.memory: the out-of-memory killer ends the container",
        script: "x=a; while true; do x=$x$x; done",
        change: |spec, _| spec["linux"]["resources"]["memory"] = json!({ "limit": 16 << 20, "swap": 16 << 20 }),
        expect: |said| said.code == 137,
    },
    Case {
        field: "linux.rootfsPropagation and mount propagation",
        script: "grep ' /mnt/shared ' /proc/self/mountinfo | grep -o 'shared:' | head -n 1",
        change: |spec, scratch| {
            fs::create_dir_all(scratch.join("shared")).unwrap();
            spec["linux"]["rootfsPropagation"] = json!("slave");
            let mounts = spec["mounts"].as_array_mut().unwrap();
            mounts.push(mount("/mnt/shared", "tmpfs", "tmpfs", &["shared"]));
        },
        expect: |said| says(said, "shared:"),
    },
    Case {
        field: "a command that does not exist",
        script: "",
        change: |spec, _| spec["process"]["args"] = json!(["/bin/no-such-command"]),
        expect: |said| said.code != 0 && said.err.contains("no-such-command"),
    },
    Case {
        field: "a command that is no program",
        script: "",
        change: |spec, _| spec["process"]["args"] = json!(["/bin/not-executable"]),
        expect: |said| said.code != 0 && said.err.to_lowercase().contains("permission denied"),
    },
    Case {
        field: "process.args[0] is looked up in PATH",
        script: "",
        change: |spec, _| spec["process"]["args"] = json!(["echo", "found"]),
        expect: |said| says(said, "found"),
    },
];

#[test]
fn fields_of_the_specification() {
    let before = Residue::take();
    let containerd = Containerd::start();
    let scratch = TempDir::with_prefix("kata-conformance-").unwrap();
    let only = std::env::var("CASE").unwrap_or_default();
    let mut failed = Vec::new();
    for (number, case) in CASES.iter().enumerate().filter(|(_, case)| case.field.contains(&only)) {
        for runtime in [RUNC, KATA] {
            let dir = scratch.path().join(format!("{number}-{runtime}"));
            fs::create_dir_all(dir.join("rootfs")).unwrap();
            image::unpack(&dir.join("rootfs"));
            let mut spec = base(&dir.join("rootfs"), case.script);
            (case.change)(&mut spec, &dir);
            fs::write(dir.join("config.json"), spec.to_string()).unwrap();
            let name = fresh_name();
            let config = dir.join("config.json");
            let args = ["run", "--rm", "--runtime", runtime, "--config", config.to_str().unwrap(), &name];
            let said = run(containerd.command().args(args), CONTAINER);
            let passed = (case.expect)(&said);
            eprintln!("{} {runtime}: {}", if passed { "ok    " } else { "FAILED" }, case.field);
            if !passed {
                failed.push(format!("{runtime}: {}: {said:?}", case.field));
                containerd.remove(&name);
            }
        }
    }
    drop(containerd);
    assert!(failed.is_empty(), "{} failed:\n{}", failed.len(), failed.join("\n"));
    before.assert_unchanged();
}

#[test]
fn hooks_run_where_the_specification_puts_them() {
    let containerd = Containerd::start();
    for runtime in [RUNC, KATA] {
        let scratch = TempDir::with_prefix("kata-hooks-").unwrap();
        let rootfs = scratch.path().join("rootfs");
        fs::create_dir_all(&rootfs).unwrap();
        image::unpack(&rootfs);
        let log = scratch.path().join("log");
        let hook = |name: &str| {
            let script = format!("cat > /dev/null; echo {name} >> {}", log.display());
            json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }])
        };
        let mut spec = base(&rootfs, "cat /run/hook");
        spec["hooks"] = json!({
            "createRuntime": hook("createRuntime"),
            "poststart": hook("poststart"),
            "poststop": hook("poststop"),
            "startContainer": [{ "path": "/bin/sh", "args": ["sh", "-c", "echo inside > /run/hook"] }],
        });
        let config = scratch.path().join("config.json");
        fs::write(&config, spec.to_string()).unwrap();
        let name = fresh_name();
        let args = ["run", "--rm", "--runtime", runtime, "--config", config.to_str().unwrap(), &name];
        let said = run(containerd.command().args(args), CONTAINER);
        assert_eq!(said.ok(), "inside", "{runtime}");
        assert_eq!(fs::read_to_string(&log).unwrap(), "createRuntime\npoststart\npoststop\n", "{runtime}");
    }
}
