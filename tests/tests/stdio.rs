//! Standard streams carry every byte, both ways, in bounded memory.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::{Read, Write};
use std::process::Stdio;
use std::time::Duration;

use e2e::engine::{Containerd, KATA, fresh_name};
use sha2::{Digest, Sha256};

/// How much goes through each way.
const SIZE: u64 = 256 << 20;

/// The resident memory of every process of ours, in bytes.
fn shim_memory() -> u64 {
    let mut largest = 0;
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if !String::from_utf8_lossy(&command).contains("containerd-shim-kata") {
            continue;
        }
        let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let kib: u64 = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok())
            .unwrap_or(0);
        largest = largest.max(kib << 10);
    }
    largest
}

#[test]
fn a_quarter_gibibyte_out_is_exact() {
    let containerd = Containerd::start();
    let name = fresh_name();
    let copy = format!("yes 'some text that is not all zeroes' | head -c {SIZE}");
    let mut child =
        containerd.run_command(KATA, &[], &name, &["sh", "-c", &copy]).stdout(Stdio::piped()).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut hash = Sha256::new();
    let mut total = 0u64;
    let mut memory = 0;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = out.read(&mut buffer).unwrap();
        if read == 0 {
            break;
        }
        if total == 0 || total % (64 << 20) < read as u64 {
            memory = memory.max(shim_memory());
        }
        total += read as u64;
        hash.update(&buffer[..read]);
    }
    assert!(child.wait().unwrap().success());
    assert_eq!(total, SIZE);
    let line = b"some text that is not all zeroes\n";
    let mut expected = Sha256::new();
    let mut left = usize::try_from(SIZE).unwrap();
    let chunk = line.repeat(4096);
    while left > 0 {
        let take = left.min(chunk.len());
        expected.update(&chunk[..take]);
        left -= take;
    }
    assert_eq!(hash.finalize(), expected.finalize());
    assert!(memory > 0 && memory < 64 << 20, "the shim grew to {memory} bytes");
}

#[test]
fn a_quarter_gibibyte_in_is_exact() {
    let containerd = Containerd::start();
    let name = fresh_name();
    let mut child = containerd
        .run_command(KATA, &[], &name, &["sha256sum"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let chunk: Vec<u8> = (0..1u32 << 18).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let mut hash = Sha256::new();
    for _ in 0..SIZE / chunk.len() as u64 {
        input.write_all(&chunk).unwrap();
        hash.update(&chunk);
    }
    drop(input);
    let output = child.wait_with_output().unwrap();
    let expected: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(String::from_utf8_lossy(&output.stdout).split_whitespace().next(), Some(expected.as_str()));
}

#[test]
fn nothing_written_before_the_exit_is_lost() {
    let containerd = Containerd::start();
    let name = containerd.sleeper(KATA, &[]);
    for round in 0..20 {
        let said = containerd.exec(&name, &["sh", "-c", "seq 1 2000; echo done >&2"]);
        assert_eq!(said.ok().lines().count(), 2000, "round {round}");
        assert_eq!(said.err.trim(), "done", "round {round}");
    }
    containerd.remove(&name);
}

#[test]
fn a_reader_that_comes_late_still_gets_everything() {
    let containerd = Containerd::start();
    let name = fresh_name();
    let mut child =
        containerd.run_command(KATA, &[], &name, &["sh", "-c", "seq 1 200000"]).stdout(Stdio::piped()).spawn().unwrap();
    // Longer than the command takes to fill every buffer on the way.
    std::thread::sleep(Duration::from_secs(8));
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(text.lines().count(), 200_000);
}
