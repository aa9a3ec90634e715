//! What concerns the machine and not a container: clock, randomness, processors, memory.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use protocol::agent::{GuestDetailsRequest, GuestDetailsResponse, NetworkStats, OnlineCPUMemRequest};
use protocol::agent::{ReseedRandomDevRequest, SetGuestDateTimeRequest};
use rustix::time::{ClockId, Timespec};
use ttrpc::Code;

use super::status::{Failure, failure, internal};
use crate::uevent::Uevents;

/// How long a plugged processor may take to appear.
const PLUG_TIMEOUT: Duration = Duration::from_secs(20);

const PROCESSORS: &str = "/sys/devices/system/cpu";
const MEMORY: &str = "/sys/devices/system/memory";

/// A step on a file of the kernel that failed.
#[derive(Debug, thiserror::Error)]
#[error("Cannot {step} {path}")]
struct Error {
    step: &'static str,
    path: PathBuf,
    source: io::Error,
}

fn on(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Failure {
    let path = path.to_owned();
    move |source| internal(Error { step, path, source })
}

/// Sets the clock.
pub(super) fn set_time(request: &SetGuestDateTimeRequest) -> Result<(), Failure> {
    let range = 0..1_000_000;
    if request.Sec < 0 || !range.contains(&request.Usec) {
        return Err(failure(
            Code::INVALID_ARGUMENT,
            "The time is before 1970 or has more than a second of microseconds",
        ));
    }
    let time = Timespec { tv_sec: request.Sec, tv_nsec: request.Usec * 1000 };
    rustix::time::clock_settime(ClockId::Realtime, time)
        .map_err(|error| internal(Error { step: "set", path: "the clock".into(), source: error.into() }))
}

/// Feeds the kernel's random generator and makes it use that at once: clones of a machine must not draw alike.
pub(super) fn reseed(request: &ReseedRandomDevRequest) -> Result<(), Failure> {
    if request.data.is_empty() {
        return Err(failure(Code::INVALID_ARGUMENT, "There is no data to reseed with"));
    }
    let path = Path::new("/dev/urandom");
    let random = fs::File::open(path).map_err(on("open", path))?;
    crate::sys::add_entropy(random, &request.data).map_err(on("reseed", path))
}

/// Tells what the guest and its agent can do.
pub(super) fn details(request: &GuestDetailsRequest) -> GuestDetailsResponse {
    let mut response = GuestDetailsResponse::new();
    let agent = response.agent_details.mut_or_insert_default();
    agent.version = env!("CARGO_PKG_VERSION").to_owned();
    agent.init_daemon = crate::init::is_init();
    agent.storage_handlers = crate::storage::DRIVERS.map(str::to_owned).to_vec();
    agent.supports_seccomp = true;
    if request.mem_block_size {
        // Without memory hot-plug there are no blocks: zero, as the field's absence.
        response.mem_block_size_bytes = fs::read_to_string(Path::new(MEMORY).join("block_size_bytes"))
            .ok()
            .and_then(|text| u64::from_str_radix(text.trim(), 16).ok())
            .unwrap_or(0);
    }
    if request.mem_hotplug_probe {
        response.support_mem_hotplug_probe = Path::new(MEMORY).join("probe").exists();
    }
    response
}

/// Takes plugged processors and memory into use.
pub(super) async fn online(request: OnlineCPUMemRequest) -> Result<(), Failure> {
    let uevents = Uevents::subscribe().map_err(on("listen to", Path::new("the kernel's announcements")))?;
    let wanted = usize::try_from(request.nb_cpus).unwrap_or(usize::MAX);
    if wanted > 0 {
        let work = online_processors(&uevents, wanted, request.wait);
        match tokio::time::timeout(PLUG_TIMEOUT, work).await {
            Ok(result) => result?,
            Err(_elapsed) => {
                let found = list(Path::new(PROCESSORS), "cpu").len();
                return Err(failure(
                    Code::DEADLINE_EXCEEDED,
                    format!("{wanted} processors were announced, {found} came within {} s", PLUG_TIMEOUT.as_secs()),
                ));
            }
        }
    }
    if !request.cpu_only {
        tokio::task::spawn_blocking(online_memory).await.map_err(internal)??;
    }
    Ok(())
}

/// Brings processors online until `wanted` are; waits for those that are not there yet, if asked to.
async fn online_processors(uevents: &Uevents, wanted: usize, wait: bool) -> Result<(), Failure> {
    loop {
        let online = tokio::task::spawn_blocking(move || bring_online(Path::new(PROCESSORS), wanted))
            .await
            .map_err(internal)??;
        if online >= wanted || !wait {
            return Ok(());
        }
        let lost = |error| on("listen to", Path::new("the kernel's announcements"))(error);
        while uevents.next().await.map_err(lost)?.is_some_and(|uevent| uevent.subsystem() != "cpu") {}
    }
}

/// Brings processors online, in the order of their numbers, and returns how many of them are.
fn bring_online(directory: &Path, wanted: usize) -> Result<usize, Failure> {
    let mut online = 0;
    for (_, path) in list(directory, "cpu") {
        if online == wanted {
            break;
        }
        let switch = path.join("online");
        // The first processor has no switch: it cannot go.
        if switch.exists() && fs::read_to_string(&switch).map_err(on("read", &switch))?.trim() != "1" {
            fs::write(&switch, "1").map_err(on("write", &switch))?;
        }
        online += 1;
    }
    Ok(online)
}

fn online_memory() -> Result<(), Failure> {
    for (_, path) in list(Path::new(MEMORY), "memory") {
        let state = path.join("state");
        if fs::read_to_string(&state).map_err(on("read", &state))?.trim() == "offline" {
            fs::write(&state, "online").map_err(on("write", &state))?;
        }
    }
    Ok(())
}

/// The entries named `prefix` and a number, by number.
fn list(directory: &Path, prefix: &str) -> Vec<(u32, PathBuf)> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut found: Vec<(u32, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok()?;
            Some((number, entry.path()))
        })
        .collect();
    found.sort_unstable_by_key(|(number, _)| *number);
    found
}

/// The counters of the guest's interfaces, which all containers of a pod share.
pub(super) fn network_stats() -> Vec<NetworkStats> {
    fs::read_to_string("/proc/net/dev").map(|text| parse_net_dev(&text)).unwrap_or_default()
}

/// Parses `/proc/net/dev` (proc_net(5)).
fn parse_net_dev(text: &str) -> Vec<NetworkStats> {
    text.lines()
        .filter_map(|line| {
            let (name, counters) = line.split_once(':')?;
            let counters: Vec<u64> = counters.split_ascii_whitespace().map_while(|word| word.parse().ok()).collect();
            let [
                rx_bytes,
                rx_packets,
                rx_errors,
                rx_dropped,
                _,
                _,
                _,
                _,
                tx_bytes,
                tx_packets,
                tx_errors,
                tx_dropped,
                ..,
            ] = counters[..]
            else {
                return None;
            };
            Some(NetworkStats {
                name: name.trim().to_owned(),
                rx_bytes,
                rx_packets,
                rx_errors,
                rx_dropped,
                tx_bytes,
                tx_packets,
                tx_errors,
                tx_dropped,
                ..Default::default()
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_counters_are_read_in_their_order() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
                    face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo\n  \
                    eth0:     1       2    3    4    5     6          7         8        9      10   11   12    0     0 0 0\n";
        let stats = parse_net_dev(text);
        assert_eq!(stats.len(), 1);
        assert_eq!(stats[0].name, "eth0");
        assert_eq!((stats[0].rx_bytes, stats[0].rx_dropped), (1, 4));
        assert_eq!((stats[0].tx_bytes, stats[0].tx_dropped), (9, 12));
    }

    #[test]
    fn processors_are_brought_online_by_number_and_no_more_than_wanted() {
        let directory = tempfile::tempdir().unwrap();
        for number in [10, 2, 1] {
            let path = directory.path().join(format!("cpu{number}"));
            fs::create_dir(&path).unwrap();
            fs::write(path.join("online"), "0\n").unwrap();
        }
        fs::create_dir(directory.path().join("cpu0")).unwrap();
        fs::create_dir(directory.path().join("cpufreq")).unwrap();
        assert_eq!(bring_online(directory.path(), 3).unwrap(), 3);
        assert_eq!(fs::read_to_string(directory.path().join("cpu2/online")).unwrap(), "1");
        assert_eq!(fs::read_to_string(directory.path().join("cpu10/online")).unwrap(), "0\n");
        assert_eq!(bring_online(directory.path(), 9).unwrap(), 4);
    }

    #[test]
    fn a_time_that_makes_no_sense_is_refused() {
        let request = SetGuestDateTimeRequest { Sec: -1, ..Default::default() };
        assert!(set_time(&request).is_err());
        let request = SetGuestDateTimeRequest { Usec: 1_000_000, ..Default::default() };
        assert!(set_time(&request).is_err());
    }
}
