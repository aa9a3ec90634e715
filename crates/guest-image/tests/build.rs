//! Initrds and images as a user makes them, from kernels and programs made up here.

#![allow(clippy::unwrap_used)] // What fails here fails the test.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use guest_image::{
    Built, Compression, Error, FileSystem, ImageOptions, InitrdOptions, Kernel, KernelSource, RootOptions, build_image,
    build_initrd,
};
use tempfile::TempDir;

/// An ELF header for this machine with one program header of the given type.
fn program(segment: u32) -> Vec<u8> {
    let machine: u16 = if cfg!(target_arch = "aarch64") { 183 } else { 62 };
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    elf.extend(3_u16.to_le_bytes());
    elf.extend(machine.to_le_bytes());
    elf.extend(1_u32.to_le_bytes());
    elf.extend([0; 8]);
    elf.extend(64_u64.to_le_bytes());
    elf.extend([0; 8]);
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    elf.extend(segment.to_le_bytes());
    elf.extend([0; 52]);
    elf
}

const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;

struct Place {
    directory: TempDir,
}

impl Place {
    fn new() -> Place {
        let directory = tempfile::tempdir().unwrap();
        let place = Place { directory };
        fs::write(place.path("agent"), program(PT_LOAD)).unwrap();
        let mut image = vec![0; 1024];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        fs::write(place.path("bzImage"), image).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn root(&self) -> RootOptions {
        RootOptions { agent: self.path("agent"), busybox: None }
    }

    fn kernel(&self) -> Kernel {
        let source = KernelSource::Files { image: self.path("bzImage"), modules: None };
        Kernel::find(&source, &mut |_| {}).unwrap()
    }

    fn initrd(&self, compression: Compression, name: &str) -> Result<Built, Error> {
        let options = InitrdOptions { root: self.root(), compression, output: self.path(name) };
        build_initrd(&options, &self.kernel(), &mut |_| {})
    }

    fn image(&self, file_system: FileSystem, name: &str) -> Result<Built, Error> {
        let options = ImageOptions { root: self.root(), file_system, output: self.path(name) };
        build_image(&options, &self.kernel(), &mut |_| {})
    }
}

/// Unpacks with the tool that belongs to the format, which proves that others can read it.
fn unpacked_by(tool: &str, arguments: &[&str], path: &Path) -> Vec<u8> {
    let output = Command::new(tool).args(arguments).stdin(fs::File::open(path).unwrap()).output().unwrap();
    assert!(output.status.success(), "{tool}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

#[test]
fn an_initrd_is_the_same_each_time_and_in_every_packing() {
    let place = Place::new();
    let plain = place.initrd(Compression::None, "plain").unwrap();
    let archive = fs::read(&plain.path).unwrap();
    assert_eq!(plain.size, archive.len() as u64);
    assert_eq!(place.initrd(Compression::None, "again").unwrap().sha256, plain.sha256);
    for (compression, tool) in [(Compression::Gzip, "gzip"), (Compression::Lz4, "lz4"), (Compression::Zstd, "zstd")] {
        let built = place.initrd(compression, tool).unwrap();
        assert!(unpacked_by(tool, &["-d", "-c"], &built.path) == archive, "{tool} reads something else");
        assert_eq!(place.initrd(compression, "again").unwrap().sha256, built.sha256);
    }
}

#[test]
fn images_are_the_same_each_time() {
    let place = Place::new();
    for file_system in [FileSystem::Erofs, FileSystem::Ext4] {
        let first = place.image(file_system, "first").unwrap();
        // Times on disk have a second's resolution: what depends on the clock shows only after one.
        std::thread::sleep(std::time::Duration::from_millis(1100));
        let second = place.image(file_system, "second").unwrap();
        assert_eq!(first.sha256, second.sha256, "{file_system}");
    }
}

#[test]
fn an_ext4_image_is_sound_and_belongs_to_root() {
    let place = Place::new();
    let built = place.image(FileSystem::Ext4, "image").unwrap();
    let check = Command::new("e2fsck").args(["-f", "-n"]).arg(&built.path).output().unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    let stat = Command::new("debugfs").args(["-R", "stat /init"]).arg(&built.path).output().unwrap();
    let text = String::from_utf8_lossy(&stat.stdout).into_owned();
    assert!(text.contains("Mode:  0755") && text.contains("User:     0   Group:     0"), "{text}");
}

#[test]
fn programs_that_cannot_run_in_the_guest_are_refused() {
    let place = Place::new();
    let cases: [(Vec<u8>, &str); 3] = [
        (program(PT_INTERP), "crt-static"),
        (b"#!/bin/sh\n".to_vec(), "not a 64-bit ELF program"),
        (
            {
                let mut other = program(PT_LOAD);
                other[18] = 21;
                other
            },
            "another processor",
        ),
    ];
    for (program, why) in cases {
        fs::write(place.path("agent"), program).unwrap();
        let error = place.initrd(Compression::None, "initrd").unwrap_err().to_string();
        assert!(error.contains("agent cannot run in the guest") && error.contains(why), "{error}");
        assert!(!place.path("initrd").exists());
    }
    fs::remove_file(place.path("agent")).unwrap();
    let error = place.initrd(Compression::None, "initrd").unwrap_err();
    assert!(matches!(error, Error::File { action: "read", .. }), "{error}");
}

#[test]
fn kernels_that_are_none_are_refused() {
    let place = Place::new();
    let find = |source| Kernel::find(&source, &mut |_| {}).unwrap_err();
    fs::write(place.path("text"), vec![b'x'; 2000]).unwrap();
    assert!(matches!(find(KernelSource::Files { image: place.path("text"), modules: None }), Error::NotAKernel { .. }));
    fs::write(place.path("short"), b"\x7fELF").unwrap();
    assert!(matches!(
        find(KernelSource::Files { image: place.path("short"), modules: None }),
        Error::NotAKernel { .. }
    ));

    let root = place.path("root");
    fs::create_dir_all(root.join("boot")).unwrap();
    assert!(matches!(find(KernelSource::Directory(root.clone())), Error::NoKernel { .. }));
    for release in ["6.1.0-1", "6.1.0-2"] {
        fs::copy(place.path("bzImage"), root.join(format!("boot/vmlinuz-{release}"))).unwrap();
    }
    let error = find(KernelSource::Directory(root)).to_string();
    assert!(error.contains("6.1.0-1, 6.1.0-2"), "{error}");
}

#[test]
fn a_modular_kernel_cannot_boot_an_image() {
    let place = Place::new();
    let modules = place.path("6.1.0-modular");
    fs::create_dir(&modules).unwrap();
    fs::write(modules.join("modules.builtin"), "kernel/drivers/virtio/virtio_pci.ko\n").unwrap();
    let source = KernelSource::Files { image: place.path("bzImage"), modules: Some(modules) };
    let kernel = Kernel::find(&source, &mut |_| {}).unwrap();
    let options = ImageOptions { root: place.root(), file_system: FileSystem::Erofs, output: place.path("image") };
    let error = build_image(&options, &kernel, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("6.1.0-modular has virtio_blk as a module"), "{error}");
}

#[test]
fn a_package_without_kernel_leaves_nothing_in_the_cache() {
    let place = Place::new();
    let cache = place.path("cache");
    let file = place.path("not.deb");
    fs::write(&file, "no package").unwrap();
    let source = KernelSource::Packages { files: vec![file], cache: cache.clone() };
    assert!(matches!(Kernel::find(&source, &mut |_| {}).unwrap_err(), Error::NotADeb { .. }));
    assert_eq!(fs::read_dir(cache).unwrap().count(), 0);
}
