//! System call numbers by architecture.

use std::str::FromStr;

use super::profile::{Condition, Operator};

/// Set in the numbers of the x32 flavour of x86-64 (asm/unistd.h).
pub(super) const X32_BIT: u32 = 0x4000_0000;
/// Where arm's private calls start (`__ARM_NR_BASE`).
const ARM_PRIVATE: u32 = 0x0f_0000;

/// Machines whose processes one kernel can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    X86,
    Arm,
}

impl Family {
    /// This machine's.
    pub(super) const NATIVE: Self = if cfg!(target_arch = "aarch64") { Self::Arm } else { Self::X86 };

    /// Its architectures; the first is the kernel's own.
    pub(super) fn architectures(self) -> &'static [Architecture] {
        match self {
            Self::X86 => &X86_FAMILY,
            Self::Arm => &ARM_FAMILY,
        }
    }
}

/// One way of making system calls.
#[derive(Debug)]
pub(super) struct Architecture {
    /// The specification's name for it.
    pub(super) name: &'static str,
    /// `AUDIT_ARCH_*` (linux/audit.h).
    pub(super) token: u32,
    /// Its first number.
    pub(super) first: u32,
    /// Its last one.
    pub(super) last: u32,
    /// Arguments have 64 bits.
    pub(super) wide: bool,
    lookup: fn(&str) -> Option<u32>,
}

static X86_FAMILY: [Architecture; 3] = [
    Architecture {
        name: "SCMP_ARCH_X86_64",
        token: 0xc000_003e,
        first: 0,
        last: X32_BIT - 1,
        wide: true,
        lookup: x86_64,
    },
    Architecture { name: "SCMP_ARCH_X86", token: 0x4000_0003, first: 0, last: u32::MAX, wide: false, lookup: x86 },
    Architecture { name: "SCMP_ARCH_X32", token: 0xc000_003e, first: X32_BIT, last: u32::MAX, wide: true, lookup: x32 },
];

static ARM_FAMILY: [Architecture; 2] = [
    Architecture {
        name: "SCMP_ARCH_AARCH64",
        token: 0xc000_00b7,
        first: 0,
        last: u32::MAX,
        wide: true,
        lookup: aarch64,
    },
    Architecture { name: "SCMP_ARCH_ARM", token: 0x4000_0028, first: 0, last: u32::MAX, wide: false, lookup: arm },
];

/// All names of the specification, so that a misspelt one is told from one of another machine.
pub(super) const NAMES: [&str; 22] = [
    "SCMP_ARCH_X86",
    "SCMP_ARCH_X86_64",
    "SCMP_ARCH_X32",
    "SCMP_ARCH_ARM",
    "SCMP_ARCH_AARCH64",
    "SCMP_ARCH_MIPS",
    "SCMP_ARCH_MIPS64",
    "SCMP_ARCH_MIPS64N32",
    "SCMP_ARCH_MIPSEL",
    "SCMP_ARCH_MIPSEL64",
    "SCMP_ARCH_MIPSEL64N32",
    "SCMP_ARCH_PPC",
    "SCMP_ARCH_PPC64",
    "SCMP_ARCH_PPC64LE",
    "SCMP_ARCH_S390",
    "SCMP_ARCH_S390X",
    "SCMP_ARCH_PARISC",
    "SCMP_ARCH_PARISC64",
    "SCMP_ARCH_RISCV64",
    "SCMP_ARCH_LOONGARCH64",
    "SCMP_ARCH_M68K",
    "SCMP_ARCH_SH",
];

impl Architecture {
    /// The number of a system call.
    pub(super) fn number(&self, name: &str) -> Option<u32> {
        (self.lookup)(name)
    }

    /// Whether newer calls get numbers above this one.
    pub(super) fn is_ordinary(&self, number: u32) -> bool {
        self.first == X32_BIT || number < ARM_PRIVATE
    }

    /// On i386, calls of sockets and of System V IPC can also be made through one call for all: its number, and what its
    /// arguments are then.
    pub(super) fn carried(&self, name: &str) -> Option<(u32, Condition)> {
        if self.name != "SCMP_ARCH_X86" {
            return None;
        }
        let number = |table: &[(&str, u64)]| table.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
        let equal = |operator, value| Condition { index: 0, operator, value };
        if let Some(call) = number(&SOCKETCALL) {
            return Some((self.number("socketcall")?, equal(Operator::Equal, call)));
        }
        // The upper half of ipc's first argument is a version.
        let call = number(&IPC)?;
        Some((self.number("ipc")?, equal(Operator::MaskedEqual(0xffff), call)))
    }
}

fn x86_64(name: &str) -> Option<u32> {
    syscalls::x86_64::Sysno::from_str(name).ok().and_then(|call| u32::try_from(call.id()).ok())
}

fn x86(name: &str) -> Option<u32> {
    syscalls::x86::Sysno::from_str(name).ok().and_then(|call| u32::try_from(call.id()).ok())
}

fn aarch64(name: &str) -> Option<u32> {
    syscalls::aarch64::Sysno::from_str(name).ok().and_then(|call| u32::try_from(call.id()).ok())
}

fn arm(name: &str) -> Option<u32> {
    let private = ["breakpoint", "cacheflush", "usr26", "usr32", "set_tls"];
    if let Some(position) = private.iter().position(|known| *known == name) {
        return u32::try_from(position).ok().map(|position| ARM_PRIVATE + 1 + position);
    }
    syscalls::arm::Sysno::from_str(name).ok().and_then(|call| u32::try_from(call.id()).ok())
}

/// x32 has x86-64's numbers, except where a structure with pointers in it is passed.
fn x32(name: &str) -> Option<u32> {
    let number = match X32_OWN.iter().position(|known| *known == name) {
        Some(position) => u32::try_from(position).ok()? + 512,
        None => x86_64(name)?,
    };
    Some(number | X32_BIT)
}

/// x32's own calls, from number 512 (asm/unistd_x32.h).
const X32_OWN: [&str; 36] = [
    "rt_sigaction",
    "rt_sigreturn",
    "ioctl",
    "readv",
    "writev",
    "recvfrom",
    "sendmsg",
    "recvmsg",
    "execve",
    "ptrace",
    "rt_sigpending",
    "rt_sigtimedwait",
    "rt_sigqueueinfo",
    "sigaltstack",
    "timer_create",
    "mq_notify",
    "kexec_load",
    "waitid",
    "set_robust_list",
    "get_robust_list",
    "vmsplice",
    "move_pages",
    "preadv",
    "pwritev",
    "rt_tgsigqueueinfo",
    "recvmmsg",
    "sendmmsg",
    "process_vm_readv",
    "process_vm_writev",
    "setsockopt",
    "getsockopt",
    "io_setup",
    "io_submit",
    "execveat",
    "preadv2",
    "pwritev2",
];

/// `SYS_*` of linux/net.h.
const SOCKETCALL: [(&str, u64); 20] = [
    ("socket", 1),
    ("bind", 2),
    ("connect", 3),
    ("listen", 4),
    ("accept", 5),
    ("getsockname", 6),
    ("getpeername", 7),
    ("socketpair", 8),
    ("send", 9),
    ("recv", 10),
    ("sendto", 11),
    ("recvfrom", 12),
    ("shutdown", 13),
    ("setsockopt", 14),
    ("getsockopt", 15),
    ("sendmsg", 16),
    ("recvmsg", 17),
    ("accept4", 18),
    ("recvmmsg", 19),
    ("sendmmsg", 20),
];

/// linux/ipc.h.
const IPC: [(&str, u64); 12] = [
    ("semop", 1),
    ("semget", 2),
    ("semctl", 3),
    ("semtimedop", 4),
    ("msgsnd", 11),
    ("msgrcv", 12),
    ("msgget", 13),
    ("msgctl", 14),
    ("shmat", 21),
    ("shmdt", 22),
    ("shmget", 23),
    ("shmctl", 24),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_c_library() {
        let native = &Family::NATIVE.architectures()[0];
        for (name, number) in [
            ("read", libc::SYS_read),
            ("execve", libc::SYS_execve),
            ("newfstatat", libc::SYS_newfstatat),
            ("openat2", libc::SYS_openat2),
            ("clone3", libc::SYS_clone3),
        ] {
            assert_eq!(native.number(name).map(i64::from), Some(number), "{name}");
        }
        assert_eq!(native.number("no_such_call"), None);
    }

    #[test]
    fn each_flavour_has_numbers_of_its_own() {
        let [_, x86, x32] = Family::X86.architectures() else { panic!("three flavours") };
        assert_eq!(x86.number("socketcall"), Some(102));
        assert_eq!(x86.number("execve"), Some(11));
        assert_eq!(x32.number("read"), Some(0x4000_0000));
        assert_eq!(x32.number("execve"), Some(0x4000_0000 + 520));
        assert_eq!(x32.number("pwritev2"), Some(0x4000_0000 + 547));
        let [aarch64, arm] = Family::Arm.architectures() else { panic!("two flavours") };
        assert_eq!(aarch64.number("execve"), Some(221));
        assert_eq!(arm.number("execve"), Some(11));
        assert_eq!(arm.number("set_tls"), Some(0x0f_0005));
        assert!(!arm.is_ordinary(0x0f_0005));
    }
}
