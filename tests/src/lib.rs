//! What the end-to-end tests share: a private containerd, an image made on the spot, and a look at what a test leaves
//! behind on the host.
//!
//! The tests need root and an installation of Kata under the directory named by `KATA_PREFIX`; `make test` provides
//! both. They run one at a time: each compares the host before and after.

// A test that cannot set itself up must stop loudly, where the cause is.
#![allow(clippy::unwrap_used, clippy::expect_used)]

pub mod engine;
pub mod image;
pub mod residue;
pub mod spec;

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The installation under test.
pub fn prefix() -> PathBuf {
    std::env::var_os("KATA_PREFIX").map(PathBuf::from).expect("KATA_PREFIX names no installation; run `make test`")
}

/// The `kata` command of the installation under test.
pub fn kata() -> Command {
    Command::new(prefix().join("bin/kata"))
}

/// What a finished command said.
#[derive(Clone, Debug)]
pub struct Said {
    /// The exit code; 128 plus the signal if one ended it.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Said {
        use std::os::unix::process::ExitStatusExt;
        Said {
            code: output.status.code().unwrap_or_else(|| 128 + output.status.signal().unwrap_or(0)),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Said {
    /// Standard output of a command that must have succeeded.
    ///
    /// # Panics
    ///
    /// With all that the command said, when it failed.
    #[track_caller]
    pub fn ok(&self) -> &str {
        assert_eq!(self.code, 0, "{self:?}");
        self.out.trim_end()
    }

    /// Both streams of a command that must have failed.
    ///
    /// # Panics
    ///
    /// With all that the command said, when it succeeded.
    #[track_caller]
    pub fn failed(&self) -> String {
        assert_ne!(self.code, 0, "{self:?}");
        format!("{}{}", self.out, self.err)
    }
}

/// Runs a command to its end, which must come within `deadline`.
///
/// # Panics
///
/// When the command cannot be started or outlives its deadline (it is killed then).
#[track_caller]
pub fn run(command: &mut Command, deadline: Duration) -> Said {
    run_with_input(command, b"", deadline)
}

/// As [`run`], with bytes for standard input.
///
/// # Panics
///
/// As [`run`].
#[track_caller]
pub fn run_with_input(command: &mut Command, input: &[u8], deadline: Duration) -> Said {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // A command that does not read all of its input breaks the pipe, which is its right.
    let writer = std::thread::spawn(move || drop(std::io::Write::write_all(&mut stdin, &input)));
    let pid = child.id();
    let (done, finished) = std::sync::mpsc::channel::<()>();
    let guard = std::thread::spawn(move || {
        if finished.recv_timeout(deadline) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            drop(Command::new("kill").args(["-KILL", &pid.to_string()]).status());
            return true;
        }
        false
    });
    let said = Said::from(child.wait_with_output().unwrap());
    drop(done);
    assert!(!guard.join().unwrap(), "{command:?} ran longer than {deadline:?}: {said:?}");
    writer.join().unwrap();
    said
}

/// Waits until `condition` holds; the end-to-end tests look at a host from outside, where there is nothing to be
/// told by.
///
/// # Panics
///
/// When it does not hold within `deadline`.
#[track_caller]
pub fn eventually(what: &str, deadline: Duration, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + deadline;
    while !condition() {
        assert!(Instant::now() < end, "Not within {deadline:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Says in the summary that a test could not run here, and why.
///
/// `make test` repeats these lines at its end, so that nothing is left out silently.
pub fn not_run(test: &str, why: &str) {
    eprintln!("NOT RUN: {test}: {why}");
    if let Some(file) = std::env::var_os("KATA_NOT_RUN") {
        use std::io::Write;
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(file).unwrap();
        writeln!(file, "NOT RUN: {test}: {why}").unwrap();
    }
}
