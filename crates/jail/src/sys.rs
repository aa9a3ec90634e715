//! The raw system calls that no safe wrapper offers.
#![allow(unsafe_code)] // clone, dup2 to a chosen number, close_range and mount_setattr have no safe interface.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::thread::UnshareFlags;

/// Who returns from [`fork_sibling`].
#[derive(Debug)]
pub(crate) enum Forked {
    /// The old process; the new one has this pid in the old pid namespace.
    Old(u32),
    /// The new process, a child of the old one's parent.
    New,
}

/// Forks into a child of the caller's parent. After `unshare(CLONE_NEWPID)` it is process 1 of the new namespace.
///
/// The caller must have one thread: the new process has a copy of that one only.
pub(crate) fn fork_sibling() -> io::Result<Forked> {
    // SAFETY: without CLONE_VM and with a null stack this is fork(2) into another parent; the only thread's whole
    // state is copied, so no lock can be left held by a thread that doesn't exist in the copy.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_PARENT | libc::SIGCHLD, 0, 0, 0, 0) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::New),
        pid => u32::try_from(pid).map(Forked::Old).map_err(io::Error::other),
    }
}

/// Moves this process, of one thread, into new namespaces.
pub(crate) fn unshare(what: UnshareFlags) -> io::Result<()> {
    // SAFETY: the one flag that is unsafe, FILES, is never asked for by this crate.
    Ok(unsafe { rustix::thread::unshare_unsafe(what) }?)
}

/// Ends the process at once: no destructors, no buffers.
pub(crate) fn exit_now(status: i32) -> ! {
    // SAFETY: _exit(2) takes any value and doesn't return.
    unsafe { libc::_exit(status) }
}

/// Makes `fd` known as `number` too, to be inherited across exec; whatever had that number is closed.
pub(crate) fn place(fd: BorrowedFd<'_>, number: RawFd) -> io::Result<()> {
    // SAFETY: dup2 takes any numbers. The callers run before anything else in this process owns a descriptor that
    // could have `number`.
    if unsafe { libc::dup2(fd.as_raw_fd(), number) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Takes ownership of a descriptor that was placed for this process.
pub(crate) fn adopt(number: RawFd) -> OwnedFd {
    // SAFETY: the caller hands out each placed number once, and nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// Closes the descriptors from `first` to `last`, both included.
pub(crate) fn close_between(first: RawFd, last: RawFd) -> io::Result<()> {
    // SAFETY: nothing in this fresh process owns descriptors in the range; the callers made sure.
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets attributes (`MOUNT_ATTR_*`) of a mount, and of all below it if `recursive`.
pub(crate) fn set_mount_attributes(mount: BorrowedFd<'_>, attributes: u64, recursive: bool) -> io::Result<()> {
    const EMPTY: &CStr = c"";
    let wanted = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: the path is NUL-terminated, the struct lives through the call and its true size is given.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            EMPTY.as_ptr(),
            flags,
            &raw const wanted,
            size_of::<libc::mount_attr>(),
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
