//! The share as the host sees it. Each test runs in a mount namespace of its own, on a thread of its own.

use std::fs;
use std::path::Path;

use rustix::mount::{MountPropagationFlags, mount_change};
use tempfile::TempDir;

use super::*;

/// Runs `test` in a fresh mount namespace with an empty share.
fn with_share(test: impl FnOnce(&mut Share, &Path) + Send + 'static) {
    std::thread::spawn(|| {
        let scratch = TempDir::new().unwrap();
        enter_namespace();
        let mut share = Share::prepare_at(scratch.path().join("share")).unwrap();
        test(&mut share, scratch.path());
    })
    .join()
    .unwrap();
}

#[allow(unsafe_code)]
fn enter_namespace() {
    // SAFETY: only this thread's view of mounts changes; no memory is involved.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.unwrap();
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC).unwrap();
}

#[test]
fn what_is_placed_shows_in_the_export_and_goes_again() {
    with_share(|share, scratch| {
        let rootfs = scratch.join("rootfs");
        fs::create_dir(&rootfs).unwrap();
        fs::write(rootfs.join("hello"), "world").unwrap();

        let guest = share.add_rootfs("c1", &[], &rootfs).unwrap();
        assert_eq!(guest, "/run/kata-containers/shared/containers/c1/rootfs");
        assert_eq!(fs::read_to_string(share.export().join("c1/rootfs/hello")).unwrap(), "world");
        fs::write(share.export().join("c1/rootfs/new"), "x").unwrap();

        share.remove_container("c1").unwrap();
        assert!(!share.export().join("c1").exists());
        assert_eq!(fs::read_to_string(rootfs.join("new")).unwrap(), "x", "the engine's files stay");
        share.stop().unwrap();
        assert!(!scratch.join("share").exists());
    });
}

#[test]
fn the_top_of_the_export_cannot_be_written() {
    with_share(|share, _| {
        let error = fs::write(share.export().join("file"), "x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    });
}

#[test]
fn read_only_binds_are_read_only_for_directories_and_files() {
    with_share(|share, scratch| {
        let dir = scratch.join("dir");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("file"), "kept").unwrap();

        share.add_bind("c1", &dir, true).unwrap();
        share.add_bind("c1", &dir.join("file"), true).unwrap();
        let writable = share.add_bind("c1", &dir, false).unwrap();

        let mut refused = 0;
        for entry in fs::read_dir(share.export().join("c1/mounts")).unwrap() {
            let path = entry.unwrap().path();
            let target = if path.is_dir() { path.join("file") } else { path.clone() };
            match fs::write(&target, "changed") {
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
                    refused += 1;
                }
                Ok(()) => assert!(writable.ends_with(path.file_name().unwrap().to_str().unwrap())),
            }
        }
        assert_eq!(refused, 2);
        share.stop().unwrap();
    });
}

#[test]
fn an_overlay_with_more_layers_than_a_page_holds_is_mounted() {
    with_share(|share, scratch| {
        // A long common path and many layers: more than 4096 bytes of options.
        let base = scratch.join("a-directory-name-that-is-rather-long-like-those-of-real-snapshotters/snapshots");
        let layers: Vec<String> = (0..60)
            .map(|n| {
                let layer = base.join(format!("{n}/fs"));
                fs::create_dir_all(&layer).unwrap();
                fs::write(layer.join(format!("file{n}")), "x").unwrap();
                layer.display().to_string()
            })
            .collect();
        let options = vec![format!("lowerdir={}", layers.join(":"))];
        assert!(options[0].len() > 4096);
        let mount = RootfsMount { fs_type: "overlay".into(), source: "overlay".into(), options, ..Default::default() };
        share.add_rootfs("c1", &[mount], Path::new("/nonexistent")).unwrap();
        assert!(share.export().join("c1/rootfs/file59").exists());
        share.stop().unwrap();
    });
}

#[test]
fn a_rootfs_that_fails_leaves_nothing() {
    with_share(|share, scratch| {
        let error = share.add_rootfs("c1", &[], &scratch.join("missing")).unwrap_err();
        assert!(error.to_string().contains("missing"), "{error}");
        assert!(!share.export().join("c1").exists());
        share.stop().unwrap();
    });
}

#[test]
fn a_mount_target_cannot_leave_the_rootfs_by_a_link() {
    with_share(|share, scratch| {
        let rootfs = scratch.join("rootfs");
        fs::create_dir(&rootfs).unwrap();
        let outside = scratch.join("outside");
        fs::create_dir(&outside).unwrap();
        std::os::unix::fs::symlink(&outside, rootfs.join("link")).unwrap();
        let mounts = [
            RootfsMount { fs_type: "bind".into(), source: rootfs.display().to_string(), ..Default::default() },
            RootfsMount {
                fs_type: "tmpfs".into(),
                source: "tmpfs".into(),
                target: "/link".into(),
                ..Default::default()
            },
        ];
        // The link's absolute target is looked for inside the rootfs, where it does not exist.
        assert!(share.add_rootfs("c1", &mounts, Path::new("/nonexistent")).is_err());
    });
}
