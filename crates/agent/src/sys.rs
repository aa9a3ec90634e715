//! The few system calls that no safe wrapper offers: one function each, with the invariants beside the call.

// Raw system calls are the purpose of this module.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::thread::UnshareFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `_IOW('R', 0x03, int[2])` of linux/random.h.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
/// `_IO('R', 0x07)` of linux/random.h.
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

/// The outcome of a system call that answers -1 and `errno`.
fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// The process id of a child that has ended and was not collected yet; it stays uncollected (waitid(2), `WNOWAIT`).
///
/// # Errors
///
/// `ECHILD` when there is no child at all.
pub fn peek_ended_child() -> io::Result<Option<i32>> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    // SAFETY: `info` is a writable siginfo_t; the call keeps no pointer.
    let result =
        unsafe { libc::waitid(libc::P_ALL, 0, info.as_mut_ptr(), libc::WEXITED | libc::WNOHANG | libc::WNOWAIT) };
    check(result.into())?;
    // SAFETY: zeroed is a valid siginfo_t, and the kernel filled it in when it found a child; si_pid stays 0 if not.
    let pid = unsafe { info.assume_init().si_pid() };
    Ok((pid != 0).then_some(pid))
}

/// Sends any signal number, real-time ones too, to exactly the process behind a pidfd (pidfd_send_signal(2)).
///
/// # Errors
///
/// `ESRCH` when the process is gone, `EINVAL` for a number that is no signal.
pub fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: no pointer is passed but a null siginfo, which the call allows.
    let result = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0)
    };
    check(result).map(drop)
}

/// Mixes `data` into the kernel's random pool, credits it, and makes the generator use it now (random(4)).
///
/// # Errors
///
/// `EPERM` without CAP_SYS_ADMIN.
pub fn add_entropy(random: impl AsFd, data: &[u8]) -> io::Result<()> {
    // struct rand_pool_info: entropy count in bits, buffer size in bytes, the buffer as words.
    let too_long = |_| io::Error::new(io::ErrorKind::InvalidInput, "Too much entropy at once");
    let size = i32::try_from(data.len()).map_err(too_long)?;
    let bits = size.checked_mul(8).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "Too much entropy"))?;
    let mut pool = vec![0_i32; 2 + data.len().div_ceil(size_of::<i32>())];
    pool[0] = bits;
    pool[1] = size;
    for (word, bytes) in pool[2..].iter_mut().zip(data.chunks(size_of::<i32>())) {
        let mut whole = [0; size_of::<i32>()];
        whole[..bytes.len()].copy_from_slice(bytes);
        *word = i32::from_ne_bytes(whole);
    }
    let fd = random.as_fd().as_raw_fd();
    // SAFETY: `pool` is laid out as rand_pool_info with `size` bytes after the two words.
    check(unsafe { libc::ioctl(fd, RNDADDENTROPY, pool.as_ptr()) }.into())?;
    // SAFETY: this request takes no argument.
    check(unsafe { libc::ioctl(fd, RNDRESEEDCRNG) }.into()).map(drop)
}

/// Sets a network interface up (netdevice(7), `SIOCSIFFLAGS`).
///
/// # Errors
///
/// `ENODEV` when there is no such interface.
pub fn link_up(name: &str) -> io::Result<()> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    // SAFETY: ifreq is plain old data; all zeroes is valid.
    let mut request: libc::ifreq = unsafe { MaybeUninit::zeroed().assume_init() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: the request is an ifreq whose name ends with a zero.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) }.into())?;
    // SAFETY: the kernel has just filled in the flags.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    let up = i16::try_from(libc::IFF_UP).unwrap_or_default();
    request.ifr_ifru.ifru_flags = flags | up;
    // SAFETY: as above.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) }.into()).map(drop)
}

/// Lets the runtime wait for a descriptor that it owns from now on.
///
/// # Errors
///
/// `EPERM` for what cannot be waited for, a regular file for one.
pub fn wait_for(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor for as long as it lives.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
}

/// Moves the calling thread into new IPC and UTS namespaces.
///
/// # Errors
///
/// Those of unshare(2).
pub fn unshare_ipc_and_uts() -> io::Result<()> {
    // SAFETY: the descriptor table, whose unsharing is what makes the call unsafe, is not unshared.
    Ok(unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWIPC | UnshareFlags::NEWUTS) }?)
}

/// Makes the command's process the leader of a new session with its standard input as controlling terminal.
pub fn lead_session(command: &mut Command) {
    // SAFETY: between fork and exec the closure makes two system calls and touches no memory of the parent's.
    unsafe {
        command.pre_exec(|| {
            check(libc::setsid().into())?;
            check(libc::ioctl(0, libc::TIOCSCTTY, 1).into()).map(drop)
        });
    }
}

/// The process that is process 1 of the pod's shared PID namespace.
#[derive(Debug)]
pub struct PauseProcess {
    /// Its number in the agent's PID namespace.
    pub pid: i32,
    /// Refers to it, and to nothing else ever.
    pub pidfd: OwnedFd,
    /// It ends when this is closed, as it is at the latest with the agent. The parent-death signal would not do: it
    /// follows the thread that cloned.
    pub leash: OwnedFd,
}

/// Starts the process that is process 1 of the pod's shared PID namespace.
///
/// It has nothing: no descriptor but its leash, an empty root at `empty_root`, no dump, so that a container that shares
/// its PID namespace finds nothing through `/proc/1`. The kernel collects its children, because it ignores SIGCHLD.
///
/// # Errors
///
/// Those of clone3(2).
pub fn spawn_pause(empty_root: &str) -> io::Result<PauseProcess> {
    let (end, leash) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let root = CString::new(empty_root).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut pidfd: libc::c_int = -1;
    // SAFETY: clone_args is plain old data; all zeroes is valid.
    let mut arguments: libc::clone_args = unsafe { MaybeUninit::zeroed().assume_init() };
    arguments.flags = u64::from((libc::CLONE_NEWPID | libc::CLONE_PIDFD).cast_unsigned());
    arguments.pidfd = (&raw mut pidfd).addr() as u64;
    arguments.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    // SAFETY: without CLONE_VM the child has a copy of the memory and continues on a copy of this stack; it makes
    // nothing but system calls below, so no lock or allocator state of another thread can matter.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) })?;
    if pid == 0 {
        pause_until_end(&root, end.as_raw_fd());
    }
    // SAFETY: the kernel has stored a new descriptor there, which nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(PauseProcess { pid: i32::try_from(pid).unwrap_or_default(), pidfd, leash })
}

/// What the pause process does; only system calls, because it runs in the copy of a process with threads.
fn pause_until_end(root: &CString, leash: RawFd) -> ! {
    // SAFETY: plain system calls with constants and one string that outlives them. What fails here leaves the process
    // as harmless as before: it still does nothing but wait.
    unsafe {
        libc::prctl(libc::PR_SET_DUMPABLE, 0);
        libc::prctl(libc::PR_SET_NAME, c"pause".as_ptr());
        libc::setsid();
        if libc::chroot(root.as_ptr()) != 0 || libc::chdir(c"/".as_ptr()) != 0 || libc::dup2(leash, 0) != 0 {
            libc::_exit(1);
        }
        libc::syscall(libc::SYS_close_range, 1_u32, u32::MAX, 0_u32);
        let mut none = MaybeUninit::<libc::sigset_t>::zeroed();
        libc::sigemptyset(none.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut());
        libc::signal(libc::SIGCHLD, libc::SIG_IGN);
        let mut byte = 0_u8;
        while libc::read(0, (&raw mut byte).cast(), 1) < 0 && *libc::__errno_location() == libc::EINTR {}
        libc::_exit(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_process_ends_with_its_leash() {
        let root = tempfile::tempdir().unwrap();
        let pause = spawn_pause(root.path().to_str().unwrap()).unwrap();
        drop(pause.leash);
        let status = rustix::process::waitid(
            rustix::process::WaitId::PidFd(pause.pidfd.as_fd()),
            rustix::process::WaitIdOptions::EXITED,
        )
        .unwrap();
        assert_eq!(status.unwrap().exit_status(), Some(0));
    }

    #[test]
    fn loopback_can_be_set_up_again_and_a_missing_link_is_an_error() {
        link_up("lo").unwrap();
        assert_eq!(link_up("nosuchlink").unwrap_err().raw_os_error(), Some(libc::ENODEV));
    }

    #[test]
    fn entropy_of_any_length_is_taken() {
        let random = std::fs::File::open("/dev/urandom").unwrap();
        add_entropy(&random, b"12345").unwrap();
        add_entropy(&random, &[7; 32]).unwrap();
    }
}
