//! Kernel and root image of the guest, built without root or shell scripts, the same bytes each time.
//!
//! ```text
//!   package on disk or from apt           the agent, busybox
//!        |  deb, apt                              |
//!        v                                        v
//!   unpacked tree --- modules (order) ---> Tree (paths -> nodes)
//!        |  kernel                           |            |
//!        v                                   v            v
//!     vmlinuz                        initrd (cpio)   image (EROFS, ext4)
//! ```
//!
//! [`build_initrd`] and [`build_image`] make the root file system, [`Kernel::find`] gets a distribution's kernel for it,
//! and [`small::build`] compiles a smaller kernel that boots about three times faster. All of them work as an ordinary
//! user. Nothing here knows a hypervisor.

mod apt;
mod compress;
mod deb;
mod elf;
mod error;
mod fragment;
mod image;
mod initrd;
mod kernel;
mod modules;
mod progress;
mod root;
pub mod small;
mod tree;

pub use compress::Compression;
pub use error::Error;
pub use image::{FileSystem, ImageOptions, build_image};
pub use initrd::{InitrdOptions, build_initrd};
pub use kernel::{Kernel, KernelSource};
pub use progress::{Event, Progress};
pub use root::{Built, RootOptions};

/// What operations of this crate return.
pub type Result<T> = std::result::Result<T, Error>;
