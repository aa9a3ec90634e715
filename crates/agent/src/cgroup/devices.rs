//! Which devices a group may open or make: a list in version 1, a program that the kernel asks in version 2.
//!
//! The rules of the OCI configuration apply in their order, the last that fits decides. The devices that every
//! container has (null, zero, full, random, urandom, tty, console, ptmx, pts) are allowed at the end.

// bpf(2) has no safe wrapper in the libraries in use.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use protocol::oci::{LinuxDeviceCgroup, LinuxResources};

use super::{Cgroup, Error, Version};

/// See the OCI runtime specification, config-linux.md, "Default Devices": kind, major, minor; -1 for all.
const ALWAYS: &[(&str, i64, i64, &str)] = &[
    ("c", -1, -1, "m"),
    ("b", -1, -1, "m"),
    ("c", 1, 3, "rwm"),
    ("c", 1, 5, "rwm"),
    ("c", 1, 7, "rwm"),
    ("c", 1, 8, "rwm"),
    ("c", 1, 9, "rwm"),
    ("c", 5, 0, "rwm"),
    ("c", 5, 1, "rwm"),
    ("c", 5, 2, "rwm"),
    ("c", 136, -1, "rwm"),
];

/// Access as the kernel numbers it: BPF_DEVCG_ACC_MKNOD, _READ, _WRITE.
const ACCESS: [(char, u32); 3] = [('m', 1), ('r', 2), ('w', 4)];
const ALL_ACCESS: u32 = 7;

/// A rule, understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    /// BPF_DEVCG_DEV_BLOCK or _CHAR; nothing for both.
    kind: Option<u32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: u32,
}

/// Restricts a group, unless the configuration says nothing of devices.
pub(super) fn apply(group: &Cgroup, resources: &LinuxResources) -> Result<(), Error> {
    if resources.Devices.is_empty() {
        return Ok(());
    }
    let rules = rules(&resources.Devices)?;
    match group.version() {
        Version::V1 => {
            check_v1(&rules)?;
            for rule in &rules {
                let file = if rule.allow { "devices.allow" } else { "devices.deny" };
                for line in lines(*rule) {
                    group.write("devices", file, &line)?;
                }
            }
            Ok(())
        }
        Version::V2 => {
            let dir = group.main();
            attach(&program(&rules), dir).map_err(|source| Error::Devices { path: dir.to_owned(), source })
        }
    }
}

fn rules(asked: &[LinuxDeviceCgroup]) -> Result<Vec<Rule>, Error> {
    let always = ALWAYS.iter().map(|(kind, major, minor, access)| (true, *kind, *major, *minor, *access));
    asked
        .iter()
        .map(|rule| (rule.Allow, rule.Type.as_str(), rule.Major, rule.Minor, rule.Access.as_str()))
        .chain(always)
        .map(|(allow, kind, major, minor, access)| {
            let kind = match kind {
                "b" => Some(1),
                "c" | "u" => Some(2),
                "a" | "" => None,
                other => return Err(unsupported("type", other)),
            };
            // A rule for every kind is for every number; on the wire these are then zero or -1.
            let any = |number: i64| if kind.is_none() || number < 0 { None } else { i32::try_from(number).ok() };
            Ok(Rule { allow, kind, major: any(major), minor: any(minor), access: bits(access)? })
        })
        .collect()
}

fn bits(access: &str) -> Result<u32, Error> {
    if access.is_empty() {
        return Ok(ALL_ACCESS);
    }
    access.chars().try_fold(0, |bits, letter| {
        let found = ACCESS.iter().find(|(known, _)| *known == letter);
        found.map(|(_, bit)| bits | bit).ok_or_else(|| unsupported("access", access))
    })
}

fn unsupported(field: &str, value: &str) -> Error {
    Error::Unsupported(format!("linux.resources.devices: {field} {value}"), 2)
}

impl Rule {
    /// Nothing is left for another rule to decide.
    fn is_total(&self) -> bool {
        self.kind.is_none() && self.access == ALL_ACCESS
    }

    /// Some access is spoken of by both.
    fn overlaps(&self, other: &Rule) -> bool {
        fn meet<T: PartialEq>(one: Option<T>, other: Option<T>) -> bool {
            one.is_none() || other.is_none() || one == other
        }
        self.access & other.access != 0
            && meet(self.kind, other.kind)
            && meet(self.major, other.major)
            && meet(self.minor, other.minor)
    }

    /// Both speak of the same devices.
    fn is_about_the_same(&self, other: &Rule) -> bool {
        (self.kind, self.major, self.minor) == (other.kind, other.major, other.minor)
    }
}

/// Version 1 keeps a list of exceptions, and takes an allowed device back only in the words it was allowed with; other
/// words it accepts, and changes nothing. What it would not enforce is an error here.
fn check_v1(rules: &[Rule]) -> Result<(), Error> {
    let mut denied_by_default = false;
    let mut allowed: Vec<Rule> = Vec::new();
    for rule in rules {
        if rule.is_total() {
            denied_by_default = !rule.allow;
            allowed.clear();
        } else if rule.allow {
            allowed.push(*rule);
        } else if denied_by_default {
            if allowed.iter().any(|earlier| earlier.overlaps(rule) && !earlier.is_about_the_same(rule)) {
                let what = format!("linux.resources.devices: to deny {:?}, a part of what is allowed", lines(*rule));
                return Err(Error::Unsupported(what, 1));
            }
            for earlier in allowed.iter_mut().filter(|earlier| earlier.is_about_the_same(rule)) {
                earlier.access &= !rule.access;
            }
        }
    }
    Ok(())
}

/// A rule in the words of version 1, for which "all kinds" always means all access too.
fn lines(rule: Rule) -> Vec<String> {
    let kinds = match rule.kind {
        None if rule.is_total() => return vec!["a".to_owned()],
        None => "bc",
        Some(1) => "b",
        Some(_) => "c",
    };
    let number = |number: Option<i32>| number.map_or_else(|| "*".to_owned(), |number| number.to_string());
    let access: String = ACCESS.iter().filter(|(_, bit)| rule.access & bit != 0).map(|(letter, _)| *letter).collect();
    kinds.chars().map(|kind| format!("{kind} {}:{} {access}", number(rule.major), number(rule.minor))).collect()
}

/// One instruction; see the kernel's Documentation/bpf/standardization/instruction-set.rst.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Instruction {
    code: u8,
    /// Source in the high half, destination in the low.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// Loads 32 bits from `[source + offset]`.
const LOAD: u8 = 0x61;
/// 32-bit arithmetic with an immediate operand.
const AND: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
/// Moves: 32 bits from a register, 64 bits from an immediate operand.
const MOVE: u8 = 0xbc;
const MOVE_IMMEDIATE: u8 = 0xb7;
/// Jumps: if unequal to an immediate operand, if unequal to a register, if equal to an immediate operand.
const JUMP_NE: u8 = 0x55;
const JUMP_NE_REGISTER: u8 = 0x5d;
const JUMP_EQ: u8 = 0x15;
const EXIT: u8 = 0x95;

/// The program: device's kind in r2, access in r3, numbers in r4 and r5; rules from the last to the first.
fn program(rules: &[Rule]) -> Vec<Instruction> {
    let op = |code, destination: u8, source: u8, offset, immediate| Instruction {
        code,
        registers: source << 4 | destination,
        offset,
        immediate,
    };
    let mut program = vec![
        op(LOAD, 2, 1, 0, 0),
        op(AND, 2, 0, 0, 0xffff),
        op(LOAD, 3, 1, 0, 0),
        op(SHIFT_RIGHT, 3, 0, 0, 16),
        op(LOAD, 4, 1, 4, 0),
        op(LOAD, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        // Each test jumps past the rule's end when it does not fit; how far is known once the rule is complete.
        let mut tests = Vec::new();
        if let Some(kind) = rule.kind {
            tests.push(vec![op(JUMP_NE, 2, 0, 0, kind.cast_signed())]);
        }
        if rule.access != ALL_ACCESS {
            // Allowed is what asks for nothing more, denied what asks for any of it.
            let masked = vec![op(MOVE, 6, 3, 0, 0), op(AND, 6, 0, 0, rule.access.cast_signed())];
            let test = if rule.allow { op(JUMP_NE_REGISTER, 6, 3, 0, 0) } else { op(JUMP_EQ, 6, 0, 0, 0) };
            tests.push([masked, vec![test]].concat());
        }
        for (register, number) in [(4, rule.major), (5, rule.minor)] {
            if let Some(number) = number {
                tests.push(vec![op(JUMP_NE, register, 0, 0, number)]);
            }
        }
        let mut body: Vec<Instruction> = tests.into_iter().flatten().collect();
        body.push(op(MOVE_IMMEDIATE, 0, 0, 0, i32::from(rule.allow)));
        body.push(op(EXIT, 0, 0, 0, 0));
        let length = body.len();
        for (index, instruction) in body.iter_mut().enumerate() {
            if matches!(instruction.code, JUMP_NE | JUMP_NE_REGISTER | JUMP_EQ) {
                // A rule has at most a dozen instructions.
                instruction.offset = i16::try_from(length - index - 1).unwrap_or(i16::MAX);
            }
        }
        program.append(&mut body);
        if rule.is_total() {
            // The kernel refuses a program with instructions that cannot be reached.
            return program;
        }
    }
    // What no rule speaks of is as in a group without rules.
    program.push(op(MOVE_IMMEDIATE, 0, 0, 0, 1));
    program.push(op(EXIT, 0, 0, 0, 0));
    program
}

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
/// Groups below may have programs of their own, and all are asked: a container may run containers.
const BPF_F_ALLOW_MULTI: u32 = 2;

/// The beginning of `union bpf_attr` for BPF_PROG_LOAD, and its usual size.
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    rest: [u64; 13],
}

/// `union bpf_attr` for BPF_PROG_ATTACH.
#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
    replaced: u32,
}

/// Loads the program and has the kernel ask it, for as long as the group exists.
fn attach(program: &[Instruction], dir: &Path) -> io::Result<()> {
    let count = u32::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let load = Load {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        count,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        rest: [0; 13],
    };
    // SAFETY: the structure and what it points to live until the call returns; its size is passed with it.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<Load>()) };
    let fd = i32::try_from(fd).map_err(|_| io::ErrorKind::InvalidData)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just handed out this descriptor, and nothing else knows it.
    let loaded = unsafe { OwnedFd::from_raw_fd(fd) };
    let dir = File::open(dir)?;
    let attach = Attach {
        target: dir.as_raw_fd().cast_unsigned(),
        program: loaded.as_raw_fd().cast_unsigned(),
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
        replaced: 0,
    };
    // SAFETY: as above.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attach, size_of::<Attach>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn asked(allow: bool, kind: &str, major: i64, minor: i64, access: &str) -> LinuxDeviceCgroup {
        LinuxDeviceCgroup {
            Allow: allow,
            Type: kind.into(),
            Major: major,
            Minor: minor,
            Access: access.into(),
            ..Default::default()
        }
    }

    /// Runs the program as the kernel would.
    fn decide(program: &[Instruction], kind: u32, access: u32, major: i32, minor: i32) -> bool {
        let context = [access << 16 | kind, major.cast_unsigned(), minor.cast_unsigned()];
        let mut registers = [0u64; 8];
        let mut at = 0;
        loop {
            let Instruction { code, registers: names, offset, immediate } = program[at];
            let (destination, source) = (usize::from(names & 15), usize::from(names >> 4));
            let jump = |taken: bool| if taken { usize::try_from(offset).unwrap() } else { 0 };
            let wide = i64::from(immediate).cast_unsigned();
            at += 1;
            match code {
                LOAD => registers[destination] = context[usize::try_from(offset / 4).unwrap()].into(),
                AND => registers[destination] &= u64::from(immediate.cast_unsigned()),
                SHIFT_RIGHT => registers[destination] >>= immediate,
                MOVE => registers[destination] = registers[source],
                MOVE_IMMEDIATE => registers[destination] = wide,
                JUMP_NE => at += jump(registers[destination] != wide),
                JUMP_NE_REGISTER => at += jump(registers[destination] != registers[source]),
                JUMP_EQ => at += jump(registers[destination] == wide),
                EXIT => return registers[0] == 1,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn what_is_denied_is_denied_and_the_usual_devices_are_not() {
        let program = program(&rules(&[asked(false, "a", -1, -1, "rwm"), asked(true, "c", 10, 200, "rw")]).unwrap());
        assert!(decide(&program, 2, 6, 1, 3), "null");
        assert!(decide(&program, 2, 6, 136, 5), "a pts");
        assert!(decide(&program, 2, 6, 10, 200), "tun");
        assert!(decide(&program, 1, 1, 8, 0), "a node may be made");
        assert!(!decide(&program, 1, 2, 8, 0), "and not be read");
        assert!(!decide(&program, 2, 2, 1, 1), "mem");
    }

    #[test]
    fn words_of_version_1() {
        let rules = rules(&[asked(false, "a", 0, 0, "rwm"), asked(true, "b", 8, -1, "rw")]).unwrap();
        assert_eq!(lines(rules[0]), ["a"]);
        assert_eq!(lines(rules[1]), ["b 8:* rw"]);
        // "a" would be all access, whatever follows it.
        let reading = super::rules(&[asked(true, "a", 0, 0, "r")]).unwrap();
        assert_eq!(lines(reading[0]), ["b *:* r", "c *:* r"]);
    }

    #[test]
    fn a_denial_that_version_1_would_not_enforce_is_refused() {
        let nothing = asked(false, "a", -1, -1, "rwm");
        let check = |rules: &[LinuxDeviceCgroup]| check_v1(&super::rules(rules).unwrap());
        let all_tty = asked(true, "c", 4, -1, "rwm");
        assert!(check(&[nothing.clone(), all_tty.clone(), asked(false, "c", 4, 64, "w")]).is_err());
        assert!(check(&[nothing, all_tty.clone(), asked(false, "c", 4, -1, "w")]).is_ok());
        let everything = asked(true, "a", -1, -1, "rwm");
        assert!(check(&[everything, all_tty, asked(false, "c", 4, 64, "w")]).is_ok());
    }

    #[test]
    fn the_kernel_takes_the_program_and_asks_it() {
        // Device programs work in a version 2 hierarchy without controllers too.
        let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
        let Some(root) = roots.into_iter().find(|root| root.join("cgroup.controllers").exists()) else {
            eprintln!("NOT RUN: the_kernel_takes_the_program_and_asks_it: version 2 is not mounted");
            return;
        };
        let dir = root.join(format!("kata-test-devices-{}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        let asked = [asked(false, "a", -1, -1, "rwm"), asked(true, "c", 10, 200, "rw")];
        let attached = attach(&program(&rules(&asked).unwrap()), &dir);
        let node = std::env::temp_dir().join(format!("kata-test-mem-{}", std::process::id()));
        let (dir_text, node_text) = (dir.display(), node.display());
        let script = format!(
            "echo $$ > {dir_text}/cgroup.procs && : < /dev/null && mknod {node_text} c 1 1 && echo made && : < {node_text}"
        );
        let output = std::process::Command::new("sh").arg("-c").arg(script).output().unwrap();
        let _ = std::fs::remove_file(&node);
        std::fs::remove_dir(&dir).unwrap();
        attached.unwrap();
        assert_eq!(output.stdout, b"made\n", "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("not permitted"), "{output:?}");
    }

    #[test]
    fn what_is_not_understood_is_an_error() {
        assert!(rules(&[asked(true, "x", 0, 0, "r")]).is_err());
        assert!(rules(&[asked(true, "c", 0, 0, "rx")]).is_err());
    }

    fn any_rule() -> impl Strategy<Value = LinuxDeviceCgroup> {
        (any::<bool>(), prop_oneof!["a", "b", "c"], -1i64..4, -1i64..4, prop_oneof!["r", "w", "m", "rw", "rwm", ""])
            .prop_map(|(allow, kind, major, minor, access)| asked(allow, &kind, major, minor, &access))
    }

    proptest! {
        /// The program and the sentence "the last rule that fits decides" agree on every request.
        #[test]
        fn the_program_does_what_the_rules_say(
            asked in prop::collection::vec(any_rule(), 0..6),
            kind in 1u32..3, access in 1u32..8, major in 0i32..4, minor in 0i32..4,
        ) {
            let rules = rules(&asked).unwrap();
            let fits = |rule: &&Rule| {
                let access = if rule.allow { access & !rule.access == 0 } else { access & rule.access != 0 };
                access && rule.kind.is_none_or(|wanted| wanted == kind)
                    && rule.major.is_none_or(|wanted| wanted == major)
                    && rule.minor.is_none_or(|wanted| wanted == minor)
            };
            let expected = rules.iter().rev().find(fits).is_none_or(|rule| rule.allow);
            prop_assert_eq!(decide(&program(&rules), kind, access, major, minor), expected);
        }
    }
}
