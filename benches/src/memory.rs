//! What the processes of one pod cost in memory, each page divided among those that share it.

use std::fs;

/// The proportional set size of each process of the only pod that runs, in MiB.
pub(crate) fn of_pod() -> Vec<(&'static str, f64)> {
    [
        ("shim", "containerd-shim-kata-v2"),
        ("virtio-fs server", "__share"),
        ("VMM, the guest's memory included", "qemu-system"),
    ]
    .into_iter()
    .map(|(what, sign)| (what, pss(sign)))
    .collect()
}

fn pss(sign: &str) -> f64 {
    let kib: u32 = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_name().to_str().is_some_and(|name| name.parse::<u32>().is_ok()))
        .filter(|entry| {
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&command).contains(sign)
        })
        .filter_map(|entry| {
            let rollup = fs::read_to_string(entry.path().join("smaps_rollup")).ok()?;
            let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
            line.trim().trim_end_matches(" kB").parse::<u32>().ok()
        })
        .sum();
    f64::from(kib) / 1024.0
}
