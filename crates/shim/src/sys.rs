//! The system calls that need `unsafe`, each behind a function that does not.
#![allow(unsafe_code)] // unshare(2) has no safe wrapper.

use rustix::mount::MountPropagationFlags;
use rustix::thread::UnshareFlags;

/// Gives the calling process a mount namespace of its own.
///
/// Mounts of the host still arrive (they are the engine's to make and remove); ours stay here and end with us, which is
/// what makes a killed shim leave none behind.
pub(crate) fn own_mounts() -> rustix::io::Result<()> {
    // SAFETY: only the mount namespace and the working directory's structure are unshared; no descriptor table or
    // address space that other code relies on sharing. The caller has no other thread yet.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
    rustix::mount::mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
}
