//! Gives up what the helper doesn't need: limits, capabilities, user, system calls.

use std::collections::BTreeMap;
use std::io;

use rustix::io::Errno;
use rustix::process::{Gid, Rlimit, Uid, getrlimit, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_keep_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

use crate::enter::{NEED_ROOT, step};
use crate::{Capability, Error, Jail, Limit, Refusal, Resource, Seccomp};

/// Lowers resource limits. A present hard limit below the wanted one stays: raising needs CAP_SYS_RESOURCE, which
/// even root may lack.
pub(crate) fn limit(limits: &[Limit]) -> Result<(), Error> {
    for limit in limits {
        let (resource, name) = match limit.resource {
            Resource::Core => (rustix::process::Resource::Core, "core dumps"),
            Resource::OpenFiles => (rustix::process::Resource::Nofile, "open files"),
            Resource::FileSize => (rustix::process::Resource::Fsize, "file sizes"),
        };
        let value = getrlimit(resource).maximum.map_or(limit.value, |hard| hard.min(limit.value));
        setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) })
            .map_err(|err| step(format!("limit {name} to {value}"), "", err))?;
    }
    Ok(())
}

/// Becomes the jail's user with the jail's capabilities, for good.
pub(crate) fn give_up(jail: &Jail) -> Result<(), Error> {
    let kept = jail.capabilities.iter().fold(CapabilitySet::empty(), |set, capability| set | bit(*capability));
    set_no_new_privs(true).map_err(|err| step("renounce new privileges", "", err))?;
    bound(kept)?;
    clear_ambient_capability_set().map_err(|err| step("clear ambient capabilities", "", err))?;
    if !kept.is_empty() && jail.uid != 0 {
        set_keep_capabilities(true).map_err(|err| step("keep capabilities across the change of user", "", err))?;
    }
    let (uid, gid) = (Uid::from_raw(jail.uid), Gid::from_raw(jail.gid));
    set_thread_groups(&[]).map_err(|err| step("leave supplementary groups", NEED_ROOT, err))?;
    set_thread_res_gid(gid, gid, gid).map_err(|err| step(format!("become group {}", jail.gid), NEED_ROOT, err))?;
    set_thread_res_uid(uid, uid, uid).map_err(|err| step(format!("become user {}", jail.uid), NEED_ROOT, err))?;
    // What the caller itself lacks can't be kept; the helper then gets EPERM where it would need it.
    let present = capabilities(None).map_err(|err| step("read its capabilities", "", err))?.permitted;
    let left = kept & present;
    set_capabilities(None, CapabilitySets { effective: left, permitted: left, inheritable: CapabilitySet::empty() })
        .map_err(|err| step("drop capabilities", "", err))
}

/// Takes everything but `kept` out of the bounding set, so that no exec can bring it back.
fn bound(kept: CapabilitySet) -> Result<(), Error> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match capability_is_in_bounding_set(capability) {
            Ok(true) if !kept.contains(capability) => remove_capability_from_bounding_set(capability)
                .map_err(|err| step(format!("drop capability {number} for good"), NEED_ROOT, err))?,
            Ok(_) => {}
            // One past the last that this kernel knows.
            Err(Errno::INVAL) => break,
            Err(err) => return Err(step("read the capability bounding set", "", err)),
        }
    }
    Ok(())
}

fn bit(capability: Capability) -> CapabilitySet {
    match capability {
        Capability::Chown => CapabilitySet::CHOWN,
        Capability::DacOverride => CapabilitySet::DAC_OVERRIDE,
        Capability::DacReadSearch => CapabilitySet::DAC_READ_SEARCH,
        Capability::Fowner => CapabilitySet::FOWNER,
        Capability::Fsetid => CapabilitySet::FSETID,
        Capability::Setgid => CapabilitySet::SETGID,
        Capability::Setuid => CapabilitySet::SETUID,
        Capability::Mknod => CapabilitySet::MKNOD,
        Capability::Setfcap => CapabilitySet::SETFCAP,
    }
}

/// Installs the filter of system calls, if there is one.
pub(crate) fn filter(seccomp: Option<&Seccomp>) -> Result<(), Error> {
    let Some(seccomp) = seccomp else { return Ok(()) };
    let program = compile(seccomp).map_err(|err| step("compile the system call filter", "", err))?;
    seccompiler::apply_filter(&program)
        .map_err(|err| step("install the system call filter", "needs CONFIG_SECCOMP_FILTER", io::Error::other(err)))
}

fn compile(seccomp: &Seccomp) -> io::Result<BpfProgram> {
    let otherwise = match seccomp.otherwise {
        Refusal::Kill => SeccompAction::KillProcess,
        Refusal::Errno(errno) => SeccompAction::Errno(errno),
    };
    let allowed: BTreeMap<i64, Vec<seccompiler::SeccompRule>> =
        seccomp.allow.iter().map(|number| (*number, Vec::new())).collect();
    let architecture = std::env::consts::ARCH.try_into().map_err(io::Error::other)?;
    let filter =
        SeccompFilter::new(allowed, otherwise, SeccompAction::Allow, architecture).map_err(io::Error::other)?;
    filter.try_into().map_err(io::Error::other)
}
