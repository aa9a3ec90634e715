//! The initrd: the root file system as an archive that the kernel unpacks into memory.

use std::path::{Path, PathBuf};

use crate::compress::Compression;
use crate::kernel::Kernel;
use crate::progress::{Progress, step};
use crate::root::{self, Built, RootOptions};
use crate::{Error, Result};

/// How to make an initrd.
#[derive(Debug, Clone)]
pub struct InitrdOptions {
    /// What goes in.
    pub root: RootOptions,
    /// How it is packed.
    pub compression: Compression,
    /// Where it goes.
    pub output: PathBuf,
}

/// Makes the initrd for `kernel`. The same input makes the same bytes.
///
/// # Errors
/// When a program can't be read or would not run in the guest, a needed module is missing, or the file can't be written.
pub fn build_initrd(options: &InitrdOptions, kernel: &Kernel, progress: &mut Progress<'_>) -> Result<Built> {
    step(progress, format!("Collecting agent and modules for kernel {}", kernel.release()));
    let (tree, modules) = root::tree(&options.root, kernel)?;
    let output: &Path = &options.output;
    let data = tree.write_cpio(root::epoch()?).map_err(Error::file("write", output))?;
    if options.compression != Compression::None {
        step(progress, format!("Packing with {}", options.compression));
    }
    let data = options.compression.pack(data).map_err(Error::file("write", output))?;
    root::write_atomically(output, &data)?;
    Ok(Built::new(output, &data, modules))
}
