//! The guest kernel's command line, each token with its reason.
//!
//! `mitigations=off` is not among them, though it boots a little faster: the guest's kernel guards the containers of
//! one pod from each other, and a pod may mix trusted and untrusted ones. Whoever knows better adds it to
//! [`crate::Boot::params`].

use crate::{Accelerator, Boot, Error, Payload};

/// What an x86 kernel takes (`COMMAND_LINE_SIZE`), less the final NUL. More is cut off silently by the kernel.
const LONGEST: usize = 2047;

/// Tokens for every machine, with their reasons.
const ALWAYS: &[(&str, &str)] = &[
    ("console=ttyS0", "the serial port is what the host captures; a dying guest's last words come from there"),
    ("panic=-1", "a panic resets at once, which ends the VMM: the host learns of it without a timeout"),
    ("tsc=reliable", "no watchdog compares clocks: the hypervisor keeps the TSC in step"),
    ("random.trust_cpu=on", "the first random bytes come from RDRAND instead of waiting for interrupts"),
    ("8250.nr_uarts=1", "there is one serial port; the kernel would probe for three more"),
    ("cryptomgr.notests", "self-tests of every cipher at boot are the distribution's business"),
    ("rcupdate.rcu_expedited=1", "grace periods of microseconds instead of milliseconds while few CPUs run"),
    ("noreplace-smp", "no patching of lock prefixes when the second CPU is plugged in"),
];

/// Tokens where instructions are translated in software.
const UNDER_TCG: &[(&str, &str)] =
    &[("no_timer_check", "the check counts timer ticks against a busy loop, which a loaded host fails by chance")];

/// Where the quiet of a normal boot is wanted: only errors and worse reach the serial port, which is slow.
const QUIET: &[(&str, &str)] = &[("quiet", "each byte on the serial port is an exit to the VMM")];

/// Builds the command line: the driver's own tokens, the root, then what the caller adds, so that theirs win.
///
/// # Errors
/// A parameter holds a control character, or all together are longer than a kernel takes.
pub fn command_line(boot: &Boot, accelerator: Accelerator, debug: bool) -> Result<String, Error> {
    let mut tokens: Vec<String> = Vec::new();
    let mut add = |list: &[(&str, &str)]| tokens.extend(list.iter().map(|(token, _reason)| (*token).to_owned()));
    add(ALWAYS);
    if accelerator == Accelerator::Tcg {
        add(UNDER_TCG);
    }
    if !debug {
        add(QUIET);
    }
    if let Payload::Image { fstype, .. } = &boot.payload {
        // The first virtio-blk disk; the kernel mounts it itself, so the file system must be built in.
        tokens.extend(["root=/dev/vda".to_owned(), format!("rootfstype={fstype}"), "ro".to_owned()]);
    }
    tokens.extend(boot.params.iter().cloned());
    if let Some(token) = tokens.iter().find(|token| token.chars().any(char::is_control)) {
        return Err(Error::Spec(format!("the kernel parameter {token:?} holds a control character")));
    }
    let line = tokens.join(" ");
    if line.len() > LONGEST {
        return Err(Error::Spec(format!(
            "the kernel command line has {} bytes, and a kernel takes {LONGEST}: shorten kernel_params",
            line.len()
        )));
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::PathBuf;

    fn boot(params: &[&str]) -> Boot {
        Boot {
            kernel: PathBuf::from("/k"),
            payload: Payload::Initrd(PathBuf::from("/i")),
            params: params.iter().map(|param| (*param).to_owned()).collect(),
        }
    }

    #[test]
    fn the_callers_parameters_come_last() {
        let line = command_line(&boot(&["agent.log=debug", "quiet"]), Accelerator::Kvm, true).unwrap();
        assert!(line.ends_with("agent.log=debug quiet"), "{line}");
        assert!(!line.contains("no_timer_check"), "{line}");
    }

    #[test]
    fn mitigations_stay_on() {
        for accelerator in [Accelerator::Kvm, Accelerator::Tcg] {
            assert!(!command_line(&boot(&[]), accelerator, false).unwrap().contains("mitigations"));
        }
    }

    #[test]
    fn an_image_is_the_root() {
        let mut boot = boot(&[]);
        boot.payload = Payload::Image { path: PathBuf::from("/x"), fstype: "erofs".into() };
        let line = command_line(&boot, Accelerator::Tcg, false).unwrap();
        assert!(line.contains("root=/dev/vda rootfstype=erofs ro"), "{line}");
    }

    #[test]
    fn too_long_is_an_error_and_not_cut() {
        let long = "x".repeat(LONGEST);
        let err = command_line(&boot(&[&long]), Accelerator::Tcg, false).unwrap_err();
        assert!(err.to_string().contains("takes 2047"), "{err}");
    }

    proptest! {
        #[test]
        fn no_control_character_reaches_the_kernel(param in "\\PC{0,8}[\\x00-\\x1f]\\PC{0,8}") {
            prop_assert!(command_line(&boot(&[&param]), Accelerator::Tcg, false).is_err());
        }
    }
}
