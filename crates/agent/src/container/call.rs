//! System calls that no library wraps without allocating, locking or reading libc's state: what the child may use.
//!
//! Unsafe code is allowed here because these calls take pointers. Each wrapper is safe to call with any argument.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use rustix::io::Errno;

/// What `mount_setattr(2)` changes: `struct mount_attr`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct MountAttr {
    /// `MOUNT_ATTR_*` to set.
    pub(super) set: u64,
    /// `MOUNT_ATTR_*` to clear.
    pub(super) clear: u64,
    /// One of `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE`, `MS_UNBINDABLE`, or 0.
    pub(super) propagation: u64,
    /// Only for id-mapped mounts.
    pub(super) userns_fd: u64,
}

impl MountAttr {
    /// Whether nothing would be changed.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

fn check(result: libc::c_long) -> Result<libc::c_long, Errno> {
    if result >= 0 {
        return Ok(result);
    }
    // SAFETY: errno of the calling thread; in the child it is the copy that this thread's TLS register points to.
    Err(Errno::from_raw_os_error(unsafe { *libc::__errno_location() }))
}

/// Changes the attributes of the mount that `mount` refers to, and of those below it if `recursive`.
pub(super) fn mount_setattr(mount: BorrowedFd<'_>, attributes: &MountAttr, recursive: bool) -> Result<(), Errno> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the string and the structure outlive the call, and the size given is the structure's.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            ptr::from_ref(attributes),
            size_of::<MountAttr>(),
        )
    })?;
    Ok(())
}

/// Gives every signal its default action: an ignored one would stay ignored after execve(2).
pub(super) fn default_signal_actions() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: no handler is installed. The two signals that libc keeps for itself are refused, and never ignored.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// A signal mask to go back to.
pub(super) struct SignalMask(libc::sigset_t);

/// Blocks every signal for this thread.
pub(super) fn block_signals() -> SignalMask {
    // SAFETY: both sets are plain data that the calls fill in.
    unsafe {
        let mut all = MaybeUninit::zeroed();
        let mut old = MaybeUninit::zeroed();
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), old.as_mut_ptr());
        SignalMask(old.assume_init())
    }
}

impl SignalMask {
    /// Goes back to this mask.
    pub(super) fn restore(&self) {
        // SAFETY: the set was filled by the kernel.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, ptr::null_mut()) };
    }
}

/// Lets every signal through, as a new program expects.
pub(super) fn unblock_signals() {
    // SAFETY: plain data.
    unsafe {
        let mut none = MaybeUninit::zeroed();
        libc::sigemptyset(none.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, none.as_ptr(), ptr::null_mut());
    }
}

/// Joins a fresh session keyring, so that containers do not see each other's keys.
pub(super) fn join_session_keyring(name: &CStr) -> Result<(), Errno> {
    // SAFETY: the string outlives the call.
    check(unsafe { libc::syscall(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr(), 0, 0, 0) })?;
    Ok(())
}

/// Makes a cgroup namespace whose root is the present cgroup.
pub(super) fn unshare_cgroup() -> Result<(), Errno> {
    // SAFETY: numbers only; descriptors and memory are not touched by this flag.
    check(unsafe { libc::unshare(libc::CLONE_NEWCGROUP) }.into())?;
    Ok(())
}

/// Installs a seccomp filter for this (only) thread.
pub(super) fn seccomp(instructions: &[libc::sock_filter], flags: u64) -> Result<(), Errno> {
    let length = u16::try_from(instructions.len()).map_err(|_| Errno::TOOBIG)?;
    let program = libc::sock_fprog { len: length, filter: instructions.as_ptr().cast_mut() };
    // SAFETY: the kernel only reads the program, which outlives the call.
    check(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) })?;
    Ok(())
}

/// Makes the terminal the controlling one of this session.
pub(super) fn set_controlling_terminal(terminal: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: the argument is a number.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) }.into())?;
    Ok(())
}

/// Puts `from` at the number `to`, inherited by the next program.
pub(super) fn duplicate(from: BorrowedFd<'_>, to: RawFd) -> Result<(), Errno> {
    // SAFETY: numbers only; `to` is 0, 1 or 2, which nothing in this process owns.
    check(unsafe { libc::dup2(from.as_raw_fd(), to) }.into())?;
    Ok(())
}

/// Closes descriptors `first..=last`.
pub(super) fn close_range(first: RawFd, last: RawFd) -> Result<(), Errno> {
    if first > last {
        return Ok(());
    }
    // SAFETY: the caller is the child right before it forgets about all of these.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) })?;
    Ok(())
}

/// Whether the current directory can be named from the current root, and so lies inside it.
pub(super) fn inside_root() -> Result<bool, Errno> {
    let mut buffer = [0_u8; libc::PATH_MAX as usize + 16];
    // SAFETY: the kernel writes at most the length given.
    check(unsafe { libc::syscall(libc::SYS_getcwd, buffer.as_mut_ptr(), buffer.len()) })?;
    // From outside the root the kernel says "(unreachable)/…".
    Ok(buffer.first() == Some(&b'/'))
}

/// Borrows a descriptor by its number, which the plan keeps open.
pub(super) fn borrow(number: RawFd) -> BorrowedFd<'static> {
    // SAFETY: the plan's owner keeps the descriptor open while there is a child, whose copy lives until execve(2).
    unsafe { BorrowedFd::borrow_raw(number) }
}

/// Runs a program; returns only to say why it cannot.
pub(super) fn execve(path: &CStr, arguments: &Pointers, environment: &Pointers) -> Errno {
    // SAFETY: both lists end with a null pointer, and their strings live as long as the plan.
    unsafe { libc::execve(path.as_ptr(), arguments.0.as_ptr(), environment.0.as_ptr()) };
    // SAFETY: errno of this thread.
    Errno::from_raw_os_error(unsafe { *libc::__errno_location() })
}

/// Ends the child without running anything of the parent's.
pub(super) fn exit(code: i32) -> ! {
    // SAFETY: never returns, runs no handlers.
    unsafe { libc::_exit(code) }
}

/// Strings as execve(2) takes them.
pub(super) struct Pointers(Vec<*const libc::c_char>);

impl Pointers {
    /// Valid for as long as the strings are neither moved nor dropped.
    pub(super) fn new(strings: &[std::ffi::CString]) -> Self {
        Self(strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect())
    }
}

/// What clone3(2) returned.
pub(super) enum Cloned {
    /// Now there are two.
    Parent {
        /// The child's number here.
        pid: i32,
        /// The child, whatever its number.
        pidfd: OwnedFd,
    },
    /// This is the copy; it may only make system calls.
    Child,
}

/// Makes a child with a copy of the memory, in the new namespaces of `flags` and in the version 2 cgroup, if given.
pub(super) fn clone3(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> Result<Cloned, Errno> {
    const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;
    const CLONE_INTO_CGROUP: u64 = 1 << 33;
    let mut pidfd: RawFd = -1;
    // SAFETY: plain data, for which zeroes are valid.
    let mut arguments: libc::clone_args = unsafe { MaybeUninit::zeroed().assume_init() };
    arguments.flags = flags | CLONE_CLEAR_SIGHAND | u64::from(libc::CLONE_PIDFD.cast_unsigned());
    arguments.pidfd = (&raw mut pidfd).addr() as u64;
    arguments.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    }
    // SAFETY: without CLONE_VM the child has a copy of the memory and goes on with a copy of this stack. The caller
    // sees to it that it makes system calls only, so no lock or allocator state of other threads matters.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) })?;
    if pid == 0 {
        return Ok(Cloned::Child);
    }
    let pid = i32::try_from(pid).map_err(|_| Errno::OVERFLOW)?;
    // SAFETY: the kernel has just stored a new descriptor there, which nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Cloned::Parent { pid, pidfd })
}
