//! `make bench`: how fast and how large, next to runc, interleaved in one run on one machine.
//!
//! Absolute figures say something about the machine; the ratios are what to compare. Each time is the median of
//! several rounds with its spread.

// A benchmark that cannot set itself up must stop loudly, where the cause is.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod boot;
mod memory;

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use e2e::engine::{Containerd, KATA, RUNC, fresh_name};
use e2e::residue::Bystanders;
use e2e::{image, prefix};

/// Rounds of each measurement; `ROUNDS` overrides it.
const ROUNDS: usize = 7;

fn main() {
    let rounds = std::env::var("ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(ROUNDS);
    let containerd = Containerd::start();

    println!("{:<34} {:>22} {:>22} {:>8}", "seconds, median (min-max)", "kata", "runc", "ratio");
    let mut first_output = (Vec::new(), Vec::new());
    let mut whole = (Vec::new(), Vec::new());
    // One of each beforehand, so that no round pays for cold caches.
    run_once(&containerd, KATA);
    run_once(&containerd, RUNC);
    for _ in 0..rounds {
        let (first, all) = run_once(&containerd, KATA);
        first_output.0.push(first);
        whole.0.push(all);
        let (first, all) = run_once(&containerd, RUNC);
        first_output.1.push(first);
        whole.1.push(all);
    }
    row("ctr run to first output", first_output.0.clone(), first_output.1);
    row("ctr run --rm, whole", whole.0, whole.1);

    let others = Bystanders::take();
    let kata = containerd.sleeper(KATA, &[]);
    let runc = containerd.sleeper(RUNC, &[]);
    let mut exec = (Vec::new(), Vec::new());
    for _ in 0..rounds * 3 {
        exec.0.push(exec_once(&containerd, &kata));
        exec.1.push(exec_once(&containerd, &runc));
    }
    row("exec to its end", exec.0, exec.1);
    let memory = memory::of_pod(&others);
    containerd.remove(&kata);
    containerd.remove(&runc);

    let mut teardown = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        teardown.0.push(teardown_once(&containerd, KATA));
        teardown.1.push(teardown_once(&containerd, RUNC));
    }
    row("kill -9 and delete", teardown.0, teardown.1);

    let bare: Vec<Duration> = (0..rounds).map(|_| boot::once()).collect();
    let (bare, cold) = (median(bare), median(first_output.0));
    println!("\nbare boot of the same kernel to process 1: {bare:.2} s");
    println!("cold start beyond 1.25 times the bare boot: {:.2} s (aim: at most 0.3 s)", cold - 1.25 * bare);

    println!("\n{:<34} {:>10}", "memory, MiB (PSS)", "");
    for (what, mib) in memory {
        println!("{what:<34} {mib:>10.1}");
    }
    println!("\n{:<34} {:>10}", "size on disk, MiB", "");
    for file in
        ["bin/kata", "libexec/kata-agent", "share/kata/vmlinuz", "share/kata/vmlinux-small", "share/kata/initrd.img"]
    {
        if let Ok(data) = std::fs::metadata(prefix().join(file)) {
            println!("{file:<34} {:>10.1}", mebibytes(data.len()));
        }
    }
}

fn mebibytes(bytes: u64) -> f64 {
    // Far below the 52 bits that a float holds exactly.
    #[allow(clippy::cast_precision_loss)]
    let bytes = bytes as f64;
    bytes / f64::from(1 << 20)
}

/// One `ctr run`: the time to its first byte, and to its end.
fn run_once(containerd: &Containerd, runtime: &str) -> (Duration, Duration) {
    let start = Instant::now();
    let mut child =
        containerd.run_command(runtime, &[], &fresh_name(), &["echo", "x"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut byte = [0];
    child.stdout.take().unwrap().read_exact(&mut byte).expect("the container printed nothing");
    let first = start.elapsed();
    assert!(child.wait().unwrap().success());
    (first, start.elapsed())
}

fn exec_once(containerd: &Containerd, name: &str) -> Duration {
    let start = Instant::now();
    containerd.exec(name, &["true"]).ok();
    start.elapsed()
}

fn teardown_once(containerd: &Containerd, runtime: &str) -> Duration {
    let name = fresh_name();
    containerd.ctr(&["run", "-d", "--runtime", runtime, image::NAME, &name, "sleep", "1000"]).ok();
    let start = Instant::now();
    let mut command: Command = containerd.command();
    command.args(["task", "delete", "-f", &name]).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().unwrap();
    let elapsed = start.elapsed();
    containerd.ctr(&["container", "delete", &name]).ok();
    elapsed
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64()
}

fn row(what: &str, kata: Vec<Duration>, runc: Vec<Duration>) {
    let show = |times: &[Duration]| {
        let (low, high) = (times.iter().min().unwrap().as_secs_f64(), times.iter().max().unwrap().as_secs_f64());
        format!("{:.3} ({low:.3}-{high:.3})", median(times.to_vec()))
    };
    let ratio = median(kata.clone()) / median(runc.clone());
    println!("{what:<34} {:>22} {:>22} {ratio:>8.1}", show(&kata), show(&runc));
}
