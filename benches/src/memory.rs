//! What the processes of one pod cost in memory, each page divided among those that share it.

use std::fs;

use e2e::residue::Bystanders;

/// The proportional set size of each process of the pod that was started since `others`, in MiB.
pub(crate) fn of_pod(others: &Bystanders) -> Vec<(&'static str, f64)> {
    [
        ("shim", "containerd-shim-kata-v2"),
        ("virtio-fs server", "__share"),
        ("VMM, the guest's memory included", "qemu-system"),
    ]
    .into_iter()
    .map(|(what, sign)| (what, pss(&others.newcomers(sign))))
    .collect()
}

fn pss(pids: &[u32]) -> f64 {
    let kib: u32 = pids
        .iter()
        .filter_map(|pid| {
            let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
            let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
            line.trim().trim_end_matches(" kB").parse::<u32>().ok()
        })
        .sum();
    f64::from(kib) / 1024.0
}
