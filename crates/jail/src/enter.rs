//! The helper's side: from the first instruction of the fresh process to the confined program.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode;
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recv, recvmsg, send};
use rustix::process::{Signal, set_parent_process_death_signal, setsid, umask};
use rustix::thread::UnshareFlags;

use crate::spawn::{MAX_MESSAGE, Order, Report};
use crate::sys::{self, Forked};
use crate::{Error, Jail, Program, privileges, root};

/// Above the numbers that a caller may give to descriptors: below the soft limit that every process has (1024).
const MOST_FDS: RawFd = 512;

/// What to do when the kernel says no.
pub(crate) const NEED_ROOT: &str = "run as root, with CAP_SYS_ADMIN; inside a container, a privileged one";

/// A step of the way that failed.
pub(crate) fn step(what: impl Into<String>, cure: &str, source: impl Into<io::Error>) -> Error {
    Error::Step { step: what.into(), cure: cure.to_owned(), source: source.into() }
}

/// A helper that has been released and may still prepare something with the caller's rights before it confines itself.
#[derive(Debug)]
pub struct Attached {
    jail: Jail,
    control: OwnedFd,
    fds: Vec<RawFd>,
}

/// Takes the description that the caller of [`Jail::spawn`] sent, and waits for the release.
///
/// For a [`Program::Helper`]: the first thing its `main` does, before it has threads or open files. When a pid
/// namespace was asked for, the process that returns is process 1 of it. If the caller goes away before the release,
/// the process ends here.
///
/// # Errors
/// The step that failed; the caller has been told.
pub fn attach() -> Result<Attached, Error> {
    // Nothing but the standard descriptors comes in by inheritance, whatever an ancestor left open.
    sys::close_between(3, RawFd::MAX).map_err(|err| step("close inherited descriptors", "needs Linux 5.9", err))?;
    die_with_parent()?;
    let (control, order, received) = receive_order()?;
    tell(&control, place_descriptors(&order.fds, received))?;
    tell(&control, report_final_process(&control, &order.jail))?;
    let mut byte = [0_u8; 1];
    match recv(&control, &mut byte, RecvFlags::empty()) {
        Ok((1, _)) => Ok(Attached { jail: order.jail, control, fds: order.fds }),
        // The caller is gone or doesn't want us any more: there is nobody left to tell.
        _ => sys::exit_now(0),
    }
}

/// [`attach`] and [`Attached::confine`] in one, for helpers that prepare nothing in between. Returns the descriptors
/// that the caller sent, in its order.
///
/// # Errors
/// The step that failed; the caller has been told.
pub fn enter() -> Result<Vec<OwnedFd>, Error> {
    let attached = attach()?;
    let fds = attached.fds.clone();
    attached.confine()?;
    Ok(fds.into_iter().map(sys::adopt).collect())
}

/// `kata __jail`: confines itself and becomes the program that the caller described.
#[must_use]
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    if args.into_iter().next().is_some() {
        eprintln!("__jail takes no arguments: kata starts it, nobody else");
        return ExitCode::FAILURE;
    }
    match attach().and_then(Attached::exec) {
        Ok(never) => match never {},
        // The caller was told through its socket; standard error is for someone who tries this by hand.
        Err(err) => {
            eprintln!("{err}");
            ExitCode::FAILURE
        }
    }
}

/// No value: what a successful exec returns.
#[derive(Debug)]
enum Never {}

impl Attached {
    /// The description.
    #[must_use]
    pub fn jail(&self) -> &Jail {
        &self.jail
    }

    /// Takes a descriptor that the caller sent, by the number it gave it; `None` if it sent none, or it was taken.
    pub fn take_fd(&mut self, number: RawFd) -> Option<OwnedFd> {
        let index = self.fds.iter().position(|fd| *fd == number)?;
        self.fds.swap_remove(index);
        // A program started by exec would inherit it; a helper's own children shall not.
        Some(sys::adopt(number))
    }

    /// Shuts the jail around this process and tells the caller that it runs.
    ///
    /// The seccomp filter comes last: it must allow `close`, and what the helper goes on to do.
    ///
    /// # Errors
    /// The step that failed; the caller has been told.
    pub fn confine(self) -> Result<(), Error> {
        tell(&self.control, self.shut())
    }

    fn exec(self) -> Result<Never, Error> {
        let started = self.shut().and_then(|()| {
            let Program::Exec { path, args } = &self.jail.program else {
                return Err(step("start a program", "", Errno::INVAL));
            };
            // Returns only on failure. It puts SIGPIPE back to its default, which Rust's runtime had changed.
            let err = Command::new(path).args(args).env_clear().envs(self.jail.env.iter().cloned()).exec();
            Err(step(format!("start {} inside the jail", path.display()), "is it installed?", err))
        });
        tell(&self.control, started)
    }

    fn shut(&self) -> Result<(), Error> {
        for cgroup in &self.jail.cgroups {
            join_cgroup(cgroup)?;
        }
        let wanted = self.jail.namespaces;
        for (wanted, flag, name) in [
            (wanted.mount, UnshareFlags::NEWNS, "mount"),
            (wanted.ipc, UnshareFlags::NEWIPC, "IPC"),
            (wanted.uts, UnshareFlags::NEWUTS, "host name"),
            (wanted.net, UnshareFlags::NEWNET, "network"),
        ] {
            if wanted {
                enter_namespace(flag, name)?;
            }
        }
        if wanted.uts {
            rustix::system::sethostname(b"kata").map_err(|err| step("set the jail's host name", NEED_ROOT, err))?;
        }
        // Out of the caller's session: the keys of its terminal are for the caller.
        let _ = setsid();
        root::enter(&self.jail)?;
        privileges::limit(&self.jail.limits)?;
        privileges::give_up(&self.jail)?;
        // A change of user has cleared it.
        die_with_parent()?;
        if self.caller_is_gone() {
            sys::exit_now(0);
        }
        privileges::filter(self.jail.seccomp.as_ref())
    }

    fn caller_is_gone(&self) -> bool {
        let mut control = [PollFd::new(&self.control, PollFlags::empty())];
        poll(&mut control, Some(&Timespec::default())).is_ok() && control[0].revents().contains(PollFlags::HUP)
    }
}

fn die_with_parent() -> Result<(), Error> {
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(|err| step("bind its life to the caller's", "", err))
}

fn receive_order() -> Result<(OwnedFd, Order, Vec<OwnedFd>), Error> {
    let not_ours = "kata starts this helper itself; it is not for use by hand";
    let control = fcntl_dupfd_cloexec(std::io::stdin(), 3)
        .map_err(|err| step("find the caller's socket on standard input", not_ours, err))?;
    let mut text = vec![0_u8; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(&control, &mut [IoSliceMut::new(&mut text)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        .map_err(|err| step("read the jail's description", not_ours, err))?;
    let truncated = ReturnFlags::TRUNC | ReturnFlags::CTRUNC;
    if message.bytes == 0 || message.flags.intersects(truncated) {
        return Err(step("read the jail's description", not_ours, Errno::MSGSIZE));
    }
    let order: Order = serde_json::from_slice(&text[..message.bytes])
        .map_err(|err| step("understand the jail's description", "are two versions of kata installed?", err))?;
    let received = ancillary
        .drain()
        .filter_map(|message| if let RecvAncillaryMessage::ScmRights(fds) = message { Some(fds) } else { None })
        .flatten()
        .collect();
    // Out of the way of the numbers that are about to be given out; the first copy is closed before that.
    let control =
        fcntl_dupfd_cloexec(&control, above(&order.fds)).map_err(|err| step("move the caller's socket", "", err))?;
    Ok((control, order, received))
}

/// The lowest number that no descriptor is to have.
fn above(numbers: &[RawFd]) -> RawFd {
    numbers.iter().copied().max().unwrap_or(0).max(2) + 1
}

/// Gives each received descriptor the number it is to have; the standard ones that aren't among them become `/dev/null`.
fn place_descriptors(numbers: &[RawFd], received: Vec<OwnedFd>) -> Result<(), Error> {
    let wrong = |err: io::Error| step("place the descriptors", "", err);
    if numbers.len() != received.len() || numbers.iter().any(|number| !(0..MOST_FDS).contains(number)) {
        return Err(wrong(Errno::BADF.into()));
    }
    // First all go above the highest number wanted, so that none is closed by the placing of another.
    let above = above(numbers);
    let mut moved = Vec::with_capacity(received.len());
    for fd in &received {
        moved.push(fcntl_dupfd_cloexec(fd, above).map_err(|err| wrong(err.into()))?);
    }
    drop(received);
    let null = OpenOptions::new().read(true).write(true).open("/dev/null");
    let null = null.map_err(|err| step("open /dev/null", "", err))?;
    let null = fcntl_dupfd_cloexec(null, above).map_err(|err| wrong(err.into()))?;
    for number in (0..=2).filter(|number| !numbers.contains(number)) {
        sys::place(null.as_fd(), number).map_err(wrong)?;
    }
    for (number, fd) in numbers.iter().zip(&moved) {
        sys::place(fd.as_fd(), *number).map_err(wrong)?;
    }
    Ok(())
}

/// Makes the process that will be the program, which is this one unless it is to have a pid namespace of its own, and
/// tells the caller its pid.
fn report_final_process(control: &OwnedFd, jail: &Jail) -> Result<(), Error> {
    umask(Mode::from_raw_mode(0o022));
    let pid = if jail.namespaces.pid {
        only_thread()?;
        enter_namespace(UnshareFlags::NEWPID, "pid")?;
        match sys::fork_sibling().map_err(|err| step("start the first process of the pid namespace", "", err))? {
            Forked::Old(pid) => pid,
            Forked::New => return die_with_parent(),
        }
    } else {
        std::process::id()
    };
    let report = serde_json::to_vec(&Report::Held { pid }).map_err(|err| step("report its pid", "", err))?;
    send(control, &report, SendFlags::NOSIGNAL).map_err(|err| step("report its pid", "", err))?;
    if jail.namespaces.pid { sys::exit_now(0) } else { Ok(()) }
}

/// A second thread would not exist in the final process, and its locks never be released there.
fn only_thread() -> Result<(), Error> {
    let count = std::fs::read_dir("/proc/self/task").map(Iterator::count);
    match count.map_err(|err| step("count its threads", "is /proc mounted?", err))? {
        1 => Ok(()),
        _ => Err(step("be the only thread of its process", "a helper attaches before it starts threads", Errno::BUSY)),
    }
}

fn join_cgroup(directory: &std::path::Path) -> Result<(), Error> {
    let procs = directory.join("cgroup.procs");
    // 0 means the writer, whatever its number is in the reader's pid namespace.
    OpenOptions::new().write(true).open(&procs).and_then(|mut file| file.write_all(b"0")).map_err(|err| {
        step(format!("join the cgroup {}", directory.display()), "does it exist, and may root change it?", err)
    })
}

fn enter_namespace(flag: UnshareFlags, name: &str) -> Result<(), Error> {
    sys::unshare(flag).map_err(|err| step(format!("enter a new {name} namespace"), NEED_ROOT, err))
}

/// Passes a failure on to the caller.
fn tell<T>(control: &OwnedFd, outcome: Result<T, Error>) -> Result<T, Error> {
    if let Err(Error::Step { step, cure, source }) = &outcome {
        let report = Report::Failed {
            step: step.clone(),
            cure: cure.clone(),
            errno: source.raw_os_error().unwrap_or(libc::EINVAL),
        };
        if let Ok(report) = serde_json::to_vec(&report) {
            // If the caller has gone there is nobody to tell.
            let _ = send(control, &report, SendFlags::NOSIGNAL);
        }
    }
    outcome
}
