//! Decides what runs the guest's instructions, and says why.
#![allow(unsafe_code)] // The one ioctl(2) has no safe interface.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::{Accelerator, Error};

/// The one version of the KVM interface there has been since Linux 2.6.22.
const KVM_API_VERSION: i32 = 12;

/// What there is to know about KVM on this host.
#[derive(Debug)]
pub(crate) struct Host {
    /// What opening `/dev/kvm` and asking its version gave.
    pub(crate) kvm_api: io::Result<i32>,
    /// Whether the processor shows virtualization; `None` where it has no flag for that.
    pub(crate) cpu_virtualizes: Option<bool>,
}

impl Host {
    /// Looks at this host.
    pub(crate) fn probe() -> Host {
        Host { kvm_api: kvm_api(Path::new("/dev/kvm")), cpu_virtualizes: cpu_virtualizes() }
    }

    /// Why KVM can't be used here and what to do about it; `None` if it can.
    fn trouble(&self) -> Option<String> {
        match &self.kvm_api {
            Err(err) if err.kind() == io::ErrorKind::NotFound => {
                return Some(
                    "there is no /dev/kvm; enable virtualization in the firmware (or nested virtualization for this \
                     virtual machine) and load kvm_intel or kvm_amd"
                        .to_owned(),
                );
            }
            Err(err) if err.kind() == io::ErrorKind::PermissionDenied => {
                return Some(
                    "/dev/kvm can't be opened (permission denied); run as root, or allow the device in the container"
                        .to_owned(),
                );
            }
            Err(err) => return Some(format!("/dev/kvm can't be opened ({err}); see dmesg for what kvm says")),
            Ok(KVM_API_VERSION) => {}
            Ok(other) => {
                return Some(format!("/dev/kvm speaks version {other} and not {KVM_API_VERSION}; update the kernel"));
            }
        }
        if self.cpu_virtualizes == Some(false) {
            return Some(
                "the processor shows neither vmx nor svm, so /dev/kvm cannot run an ordinary kernel; enable nested \
                 virtualization for this virtual machine, or use another host"
                    .to_owned(),
            );
        }
        None
    }
}

/// What to use, with a warning for the operator where it isn't what is best.
///
/// # Errors
/// KVM was asked for by name and can't be used.
pub(crate) fn decide(wanted: Accelerator, host: impl FnOnce() -> Host) -> Result<(Accelerator, Option<String>), Error> {
    match wanted {
        Accelerator::Tcg => Ok((Accelerator::Tcg, None)),
        Accelerator::Kvm => match host().trouble() {
            None => Ok((Accelerator::Kvm, None)),
            Some(why) => Err(Error::Kvm(format!("{why}; or set accelerator = \"auto\" to run slower without it"))),
        },
        Accelerator::Auto => match host().trouble() {
            None => Ok((Accelerator::Kvm, None)),
            Some(why) => Ok((Accelerator::Tcg, Some(format!("Machines run slowly, in software: {why}")))),
        },
    }
}

fn kvm_api(path: &Path) -> io::Result<i32> {
    // _IO(0xAE, 0x00) of linux/kvm.h.
    const KVM_GET_API_VERSION: libc::Ioctl = 0xAE00;
    let device = OpenOptions::new().read(true).write(true).open(path)?;
    // SAFETY: the call takes no argument and touches no memory of ours; the descriptor is open.
    let version = unsafe { libc::ioctl(device.as_raw_fd(), KVM_GET_API_VERSION, 0) };
    if version < 0 { Err(io::Error::last_os_error()) } else { Ok(version) }
}

/// Only x86 tells by a CPU flag; elsewhere `/dev/kvm` is all there is to go by.
fn cpu_virtualizes() -> Option<bool> {
    if !cfg!(target_arch = "x86_64") {
        return None;
    }
    fs::read_to_string("/proc/cpuinfo").ok().map(|text| shows_virtualization(&text))
}

fn shows_virtualization(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("flags")?.trim_start().strip_prefix(':'))
        .is_some_and(|flags| flags.split_ascii_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(kvm_api: Result<i32, io::ErrorKind>, cpu_virtualizes: Option<bool>) -> Host {
        Host { kvm_api: kvm_api.map_err(io::Error::from), cpu_virtualizes }
    }

    #[test]
    fn every_kind_of_host_gets_what_it_can_run() {
        use io::ErrorKind::{NotFound, Other, PermissionDenied};
        let (yes, no) = (Some(true), Some(false));
        // What the host has, and a word of the reason if KVM can't be used.
        let table = [
            (Ok(12), yes, None),
            (Ok(12), None, None),
            (Ok(12), no, Some("neither vmx nor svm")),
            (Ok(11), yes, Some("version 11")),
            (Err(NotFound), yes, Some("no /dev/kvm")),
            (Err(PermissionDenied), yes, Some("permission denied")),
            (Err(Other), yes, Some("dmesg")),
        ];
        for (api, cpu, reason) in table {
            let auto = decide(Accelerator::Auto, || host(api, cpu)).unwrap();
            let kvm = decide(Accelerator::Kvm, || host(api, cpu));
            match reason {
                None => {
                    assert_eq!(auto, (Accelerator::Kvm, None));
                    assert_eq!(kvm.unwrap(), (Accelerator::Kvm, None));
                }
                Some(reason) => {
                    assert_eq!(auto.0, Accelerator::Tcg);
                    assert!(auto.1.unwrap().contains(reason), "{reason}");
                    let err = kvm.unwrap_err().to_string();
                    assert!(err.contains(reason) && err.contains("auto"), "{err}");
                }
            }
        }
    }

    #[test]
    fn software_asks_nothing_of_the_host() {
        let tcg = decide(Accelerator::Tcg, || panic!("the host is not looked at")).unwrap();
        assert_eq!(tcg, (Accelerator::Tcg, None));
    }

    #[test]
    fn flags_are_whole_words() {
        assert!(shows_virtualization("processor : 0\nflags\t\t: fpu vmx sse\n"));
        assert!(shows_virtualization("flags : svm"));
        assert!(!shows_virtualization("flags : fpu vmx_x svmx\nvmx flags : vnmi\n"));
        assert!(!shows_virtualization(""));
    }
}
