//! Process 1: what a guest needs before anything can run in it.
//!
//! ```text
//!   early (one thread)                       later (beside the control channel)
//!   root ─▶ /dev /sys /proc /run ─▶ channel  kernel modules ─▶ cgroups ─▶ lo, links, limits ─▶ ready
//! ```
//!
//! The channel answers as soon as its own device is there; what touches containers waits until the guest is ready.

pub mod cmdline;
pub mod modules;
pub mod mounts;

use std::fs;
use std::io;
use std::panic;
use std::path::Path;
use std::process;
use std::thread;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, Rlimit};
use rustix::system::RebootCommand;

/// Where programs are looked for by those that do not say.
const PATH: &str = "/bin:/sbin:/usr/bin:/usr/sbin";

/// Shells that a guest image may have.
const SHELLS: [&[&str]; 2] = [&["/bin/sh", "-l"], &["/bin/busybox", "sh", "-l"]];

/// Open files that containers may ask for; the kernel's own ceiling.
const OPEN_FILES: u64 = 1_048_576;

/// A guest that cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The root file system stays one that containers cannot leave.
    #[error("Cannot set the root file system up for containers")]
    Root(#[source] io::Error),
    /// A file system is missing.
    #[error(transparent)]
    Mount(#[from] mounts::Error),
}

/// Whether this process is process 1, and so has to be the guest's init.
pub fn is_init() -> bool {
    process::id() == 1
}

/// What has to be there before the control channel: run while the process has one thread.
///
/// # Errors
///
/// Any step that fails; a guest without it is of no use.
pub fn early() -> Result<(), Error> {
    mounts::make_root_pivotable().map_err(Error::Root)?;
    mounts::mount_basics()?;
    open_console();
    Ok(())
}

/// The kernel starts process 1 without standard streams when the image has no `/dev/console`.
fn open_console() {
    // Fails for a session leader, which is what matters.
    let _ = rustix::process::setsid();
    for number in 0..3 {
        if fs::metadata(format!("/proc/self/fd/{number}")).is_ok_and(|_| !is_null(number)) {
            continue;
        }
        let flags = OFlags::RDWR | OFlags::NOCTTY;
        let Ok(console) = rustix::fs::open("/dev/console", flags, Mode::empty()) else { continue };
        let _ = match number {
            0 => rustix::stdio::dup2_stdin(&console),
            1 => rustix::stdio::dup2_stdout(&console),
            _ => rustix::stdio::dup2_stderr(&console),
        };
    }
}

fn is_null(descriptor: u32) -> bool {
    fs::read_link(format!("/proc/self/fd/{descriptor}")).is_ok_and(|target| target == Path::new("/dev/null"))
}

/// The rest: runs beside the control channel. Failures are named in the log; the guest goes on without what failed.
pub fn later(unified_cgroups: bool) {
    for failure in modules::load_list(Path::new(protocol::MODULE_LIST)) {
        tracing::error!("{}", crate::server::status::chain(&failure));
    }
    if let Err(error) = crate::cgroup::mount_hierarchies(Path::new(crate::cgroup::ROOT), unified_cgroups) {
        tracing::error!(%error, "Cannot mount the control groups");
    }
    mounts::link_devices();
    if let Err(error) = crate::sys::link_up("lo") {
        tracing::warn!(%error, "Cannot set the loopback interface up");
    }
    if let Ok(name) = fs::read_to_string("/etc/hostname")
        && let Err(error) = rustix::system::sethostname(name.trim().as_bytes())
    {
        tracing::warn!(%error, "Cannot set the host name");
    }
}

/// Raises the limits that containers inherit, as far as this process may.
pub fn raise_limits() {
    let everything = Rlimit { current: None, maximum: None };
    let files = Rlimit { current: Some(OPEN_FILES), maximum: Some(OPEN_FILES) };
    for (resource, limit) in [
        (Resource::Nofile, files),
        (Resource::Nproc, everything),
        (Resource::Core, Rlimit { current: Some(0), maximum: None }),
    ] {
        if rustix::process::setrlimit(resource, limit).is_err() {
            // Not process 1 and not privileged: the limits stay the caller's.
            let allowed = rustix::process::getrlimit(resource);
            let _ = rustix::process::setrlimit(resource, Rlimit { current: allowed.maximum, ..allowed });
        }
    }
}

/// Gives a shell on the console to whoever has it, again and again. Only for guests started to be looked into.
pub fn debug_console() {
    let Some(shell) = SHELLS.iter().find(|shell| Path::new(shell[0]).exists()) else {
        tracing::warn!("There is no shell in the guest image for agent.debug_console");
        return;
    };
    let spawned = thread::Builder::new().name("console".to_owned()).spawn(move || {
        while let Ok(console) = fs::File::options().read(true).write(true).open("/dev/console") {
            let (Ok(output), Ok(errors)) = (console.try_clone(), console.try_clone()) else { return };
            let mut command = process::Command::new(shell[0]);
            command.args(&shell[1..]).env_clear().env("PATH", PATH).env("TERM", "linux");
            command.stdin(console).stdout(output).stderr(errors);
            crate::sys::lead_session(&mut command);
            let Ok(mut child) = command.spawn() else { return };
            // Whoever collects it, it has ended.
            let _ = child.wait();
        }
    });
    if let Err(error) = spawned {
        tracing::warn!(%error, "Cannot start the debug console");
    }
}

/// Makes a panic say what happened and, in process 1, end the machine instead of leaving a dead guest behind.
pub fn set_panic_hook() {
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |information| {
        report(information);
        if is_init() {
            power_off();
        }
    }));
}

/// Ends the machine, at once, with what is written on disk.
pub fn power_off() -> ! {
    rustix::fs::sync();
    if is_init() {
        // Without ACPI there is no power to switch off; a restart ends the machine then (the VMM does not reboot).
        for command in [RebootCommand::PowerOff, RebootCommand::Restart] {
            let _ = rustix::system::reboot(command);
        }
    }
    process::exit(1)
}
