//! The bare boot: the same kernel under the same VMM, with an initrd whose first process powers off at once.
//!
//! What a start costs beyond this is ours.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use e2e::prefix;

/// Boots once and returns the time until the guest's first process has run.
pub(crate) fn once() -> Duration {
    let share = prefix().join("share/kata");
    let small = share.join("vmlinux-small");
    let kernel = if small.exists() { small } else { share.join("vmlinuz") };
    let start = Instant::now();
    let status = Command::new("qemu-system-x86_64")
        .args(["-machine", "q35,accel=tcg", "-cpu", "max", "-m", "256", "-smp", "1", "-nodefaults", "-no-user-config"])
        .args(["-display", "none", "-vga", "none", "-no-reboot", "-bios", "bios-microvm.bin", "-kernel"])
        .arg(kernel)
        // No initrd: the kernel gives up where it would have run process 1, and -no-reboot ends the VMM.
        .args(["-append", "panic=-1 quiet no_timer_check tsc=reliable random.trust_cpu=on cryptomgr.notests"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .expect("qemu-system-x86_64 is not installed; run `make deps`");
    assert!(status.success());
    start.elapsed()
}
