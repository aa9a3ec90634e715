//! A machine: the contract, its devices, the kernel command line, and one folder per driver.
//!
//! The crate knows machines and nothing else: no containers, no pods, no OCI. A caller describes a machine
//! ([`MachineSpec`]), a driver launches it ([`qemu::launch`]) and hands back a [`Vmm`]:
//!
//! ```text
//!   MachineSpec --launch--> Running <--pause/resume--> Paused
//!                              |  add/remove device, resize
//!                              v
//!          stop(grace), guest reset or panic, VMM death
//!                              v
//!                        Exited(Exit)        every wait() and every pending call returns
//! ```
//!
//! Resources of the host are named to a [`Recorder`] before they matter, so that whoever keeps the journal can undo
//! them after a crash.

mod check;
mod device;
mod error;
mod exit;
pub mod kernel_params;
mod machine;
pub mod qemu;

use std::io;
use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;

pub use device::{Device, Plugged};
pub use error::Error;
pub use exit::Exit;
pub use machine::{Accelerator, Boot, Confinement, Control, MachineSpec, Payload};

/// The journal's hook: called before a resource of the host matters, so that a crash leaves nothing unknown behind.
///
/// An error stops the operation: what can't be recorded isn't made.
pub trait Recorder: Send + Sync {
    /// A process exists and waits for its release. `start_time` is field 22 of `/proc/<pid>/stat`.
    ///
    /// # Errors
    /// The entry could not be written.
    fn process(&self, what: &str, pid: u32, start_time: u64) -> io::Result<()>;

    /// A path is about to be made (a file, a directory, a mount point).
    ///
    /// # Errors
    /// The entry could not be written.
    fn path(&self, what: &str, path: &Path) -> io::Result<()>;
}

/// A running machine, whatever drives it.
///
/// Every method that waits has a deadline of its own. Once the VMM is gone each of them returns [`Error::Exited`],
/// calls already under way included, and [`Vmm::wait`] returns at once.
#[async_trait]
pub trait Vmm: Send + Sync + std::fmt::Debug {
    /// The VMM's process, as the host numbers it.
    fn pid(&self) -> u32;

    /// What runs the guest's instructions: [`Accelerator::Kvm`] or [`Accelerator::Tcg`], never `Auto`.
    fn accelerator(&self) -> Accelerator;

    /// The devices present, those of the start included, with the places where the guest finds them.
    fn devices(&self) -> Vec<Plugged>;

    /// Stops the virtual CPUs. The guest keeps its memory and devices and notices nothing but the clock.
    ///
    /// # Errors
    /// The VMM is gone or refuses.
    async fn pause(&self) -> Result<(), Error>;

    /// Lets the virtual CPUs go on after [`Vmm::pause`].
    ///
    /// # Errors
    /// The VMM is gone or refuses.
    async fn resume(&self) -> Result<(), Error>;

    /// Plugs a device into the running machine. The guest sees it some moments after the return.
    ///
    /// # Errors
    /// No port is free, the id is taken, or the VMM is gone or refuses. Nothing stays plugged after an error.
    async fn add_device(&self, device: Device) -> Result<Plugged, Error>;

    /// Unplugs a device that [`Vmm::add_device`] plugged, and returns when the guest has let go of it.
    ///
    /// # Errors
    /// There is no such device, it was there from the start, the guest doesn't let go in time, or the VMM is gone.
    async fn remove_device(&self, id: &str) -> Result<(), Error>;

    /// Grows the machine to `vcpus` virtual CPUs and returns how many there are now. The guest must online them.
    ///
    /// Asking for fewer than there are changes nothing: the guest's agent offlines what isn't wanted.
    ///
    /// # Errors
    /// More than the machine's maximum, or the VMM is gone or refuses.
    async fn resize_vcpus(&self, vcpus: u32) -> Result<u32, Error>;

    /// Grows the memory to at least `mib` MiB, in blocks of 128 MiB, and returns the new size in MiB. The guest must
    /// online the blocks. Asking for less than there is changes nothing.
    ///
    /// # Errors
    /// More than the machine's maximum, no slot is left, or the VMM is gone or refuses.
    async fn resize_memory(&self, mib: u32) -> Result<u32, Error>;

    /// Ends the VMM: asks it, and kills it when it hasn't gone within `grace`. Succeeds if it is gone already.
    ///
    /// # Errors
    /// The process could not be killed.
    async fn stop(&self, grace: Duration) -> Result<(), Error>;

    /// Returns when the VMM is gone, with its status and last words. Any number of callers may wait.
    async fn wait(&self) -> Exit;
}
