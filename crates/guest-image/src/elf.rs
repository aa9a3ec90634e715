//! The few things that are asked of ELF files: can this program start with no libraries, and what does this kernel
//! module say about itself. See elf(5).

use std::path::Path;

use object::elf::{EM_AARCH64, EM_X86_64, ET_DYN, ET_EXEC, FileHeader64, PT_INTERP};
use object::read::elf::{FileHeader as _, ProgramHeader as _, SectionHeader as _};
use object::{Endianness, ReadRef};

use crate::{Error, Result};

/// The ELF machine of the guest: the host's own.
const MACHINE: u16 = if cfg!(target_arch = "aarch64") { EM_AARCH64.0 } else { EM_X86_64.0 };

/// Checks that `data` is a program for the guest that asks for no dynamic loader.
pub(crate) fn check_static(path: &Path, data: &[u8]) -> Result<()> {
    let bad = |why: &str| Error::NotRunnable { path: path.to_owned(), why: why.to_owned() };
    let header = FileHeader64::<Endianness>::parse(data).map_err(|_| bad("it is not a 64-bit ELF program"))?;
    let endian = header.endian().map_err(|_| bad("it is not a 64-bit ELF program"))?;
    if header.e_machine(endian).0 != MACHINE {
        return Err(bad("it is for another processor"));
    }
    if ![ET_EXEC, ET_DYN].contains(&header.e_type(endian)) {
        return Err(bad("it is an ELF file but no program"));
    }
    let segments = header.program_headers(endian, data).map_err(|_| bad("its program headers are damaged"))?;
    if segments.iter().any(|segment| segment.p_type(endian) == PT_INTERP) {
        return Err(bad("it is linked dynamically and the guest has no libraries; build it static \
             (RUSTFLAGS=\"-C target-feature=+crt-static\")"));
    }
    if segments.is_empty() {
        return Err(bad("it has nothing to load"));
    }
    Ok(())
}

/// The section `.modinfo` of a module: strings `key=value`, each ended by a zero byte.
pub(crate) fn modinfo<'data>(path: &Path, data: &'data [u8]) -> Result<&'data [u8]> {
    section(data).map_err(|why| Error::NotAModule { path: path.to_owned(), why })
}

fn section(data: &[u8]) -> std::result::Result<&[u8], String> {
    let header = FileHeader64::<Endianness>::parse(data).map_err(|error| error.to_string())?;
    let endian = header.endian().map_err(|error| error.to_string())?;
    let sections = header.sections(endian, data).map_err(|error| error.to_string())?;
    let (_, section) = sections.section_by_name(endian, b".modinfo").ok_or("it has no section .modinfo")?;
    section.data(endian, data).map_err(|error| error.to_string())
}

/// Whether `data` starts as an ELF file does.
pub(crate) fn is_elf(data: &[u8]) -> bool {
    data.read_bytes_at(0, 4) == Ok(b"\x7fELF")
}
