//! A containerd of the tests' own: private root, state and socket, with the shim under test on its path.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tempfile::TempDir;

use crate::{Said, eventually, image, prefix, run};

/// How long one container may take from start to end, on a slow machine without KVM.
pub const CONTAINER: Duration = Duration::from_secs(90);

/// Kata's runtime type.
pub const KATA: &str = "io.containerd.kata.v2";
/// The peer that proves the tests.
pub const RUNC: &str = "io.containerd.runc.v2";

/// A running containerd; dropped, it is stopped and its files removed.
#[derive(Debug)]
pub struct Containerd {
    dir: TempDir,
    child: Option<Child>,
}

impl Containerd {
    /// Starts one and imports the test image.
    ///
    /// # Panics
    ///
    /// When containerd is not installed or does not come up.
    pub fn start() -> Containerd {
        let dir = TempDir::with_prefix("kata-e2e-").unwrap();
        let path = dir.path().display();
        let config = format!(
            "version = 2\nroot = \"{path}/root\"\nstate = \"{path}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = \"{path}/containerd.sock\"\n"
        );
        fs::write(dir.path().join("config.toml"), config).unwrap();
        let mut containerd = Containerd { dir, child: None };
        containerd.launch();
        let archive = containerd.dir.path().join("image.tar");
        image::write(&archive);
        containerd.ctr(&["image", "import", archive.to_str().unwrap()]).ok();
        containerd
    }

    /// Starts the daemon (again).
    ///
    /// # Panics
    ///
    /// When it does not come up.
    pub fn launch(&mut self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.dir.path().join("log")).unwrap();
        let path = format!("{}:{}", prefix().join("bin").display(), std::env::var("PATH").unwrap_or_default());
        let child = Command::new("containerd")
            .arg("--config")
            .arg(self.dir.path().join("config.toml"))
            .env("PATH", path)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("containerd is not installed; run `make deps`");
        self.child = Some(child);
        eventually("containerd answers", Duration::from_secs(30), || self.ctr(&["version"]).code == 0);
    }

    /// Stops the daemon with SIGKILL, as a crash would.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// The daemon's log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// A file in the daemon's own directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The command line client, aimed at this daemon.
    pub fn command(&self) -> Command {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(self.dir.path().join("containerd.sock"));
        command
    }

    /// Runs the client to its end.
    pub fn ctr(&self, args: &[&str]) -> Said {
        run(self.command().args(args), CONTAINER)
    }

    /// `ctr run --rm` with a fresh name: the command's output and status.
    pub fn run(&self, runtime: &str, options: &[&str], command: &[&str]) -> Said {
        let name = fresh_name();
        run(&mut self.run_command(runtime, options, &name, command), CONTAINER)
    }

    /// The `ctr run --rm` command itself, for tests that talk to it.
    pub fn run_command(&self, runtime: &str, options: &[&str], name: &str, args: &[&str]) -> Command {
        let mut command = self.command();
        command.args(["run", "--rm", "--runtime", runtime]).args(options).args([image::NAME, name]).args(args);
        command
    }

    /// Starts a detached container that sleeps, and hands out its name.
    pub fn sleeper(&self, runtime: &str, options: &[&str]) -> String {
        let name = fresh_name();
        let mut args = vec!["run", "-d", "--runtime", runtime];
        args.extend(options);
        args.extend([image::NAME, &name, "sleep", "1000"]);
        self.ctr(&args).ok();
        name
    }

    /// Runs a command in a container: its output and status.
    pub fn exec(&self, name: &str, command: &[&str]) -> Said {
        let id = fresh_name();
        let mut args = vec!["task", "exec", "--exec-id", &id, name];
        args.extend(command);
        self.ctr(&args)
    }

    /// Kills and removes a container, whatever state it is in.
    pub fn remove(&self, name: &str) {
        self.ctr(&["task", "kill", "-s", "SIGKILL", name]);
        self.ctr(&["task", "delete", "-f", name]);
        self.ctr(&["container", "delete", name]);
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(30).collect();
            eprintln!("the end of containerd's log:\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
        let left = self.ctr(&["container", "list", "-q"]).out;
        for name in left.split_whitespace() {
            self.remove(name);
        }
        self.kill();
    }
}

/// A container name that no other test of this machine uses.
pub fn fresh_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("e2e-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}
