//! Programs are run by an interpreter and compared with a plain reading of the profile; one is given to the kernel.

// The test that installs a filter does so between fork and exec.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::os::unix::process::CommandExt;
use std::process::Command;

use proptest::prelude::*;

use super::*;

const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;
const EPERM: u32 = libc::SECCOMP_RET_ERRNO | 1;
const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | 38;

/// One system call as a filter sees it.
#[derive(Debug, Clone, Copy)]
struct Call {
    arch: u32,
    number: u32,
    arguments: [u64; 6],
}

/// Runs a program as the kernel would; panics on what the kernel refuses.
fn run(program: &[libc::sock_filter], call: Call) -> u32 {
    let mut data = [0_u8; 64];
    data[0..4].copy_from_slice(&call.number.to_ne_bytes());
    data[4..8].copy_from_slice(&call.arch.to_ne_bytes());
    for (index, argument) in call.arguments.iter().enumerate() {
        data[16 + 8 * index..24 + 8 * index].copy_from_slice(&argument.to_ne_bytes());
    }
    let mut accumulator = 0_u32;
    let mut at = 0;
    loop {
        let instruction = &program[at];
        at += 1;
        let jump = |holds: bool| usize::from(if holds { instruction.jt } else { instruction.jf });
        match u32::from(instruction.code) {
            code if code == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS => {
                let offset = instruction.k as usize;
                assert_eq!(offset % 4, 0);
                accumulator = u32::from_ne_bytes(data[offset..offset + 4].try_into().unwrap());
            }
            code if code == libc::BPF_ALU | libc::BPF_AND | libc::BPF_K => accumulator &= instruction.k,
            code if code == libc::BPF_RET | libc::BPF_K => return instruction.k,
            code if code == libc::BPF_JMP | libc::BPF_JA => at += instruction.k as usize,
            code if code == libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K => at += jump(accumulator == instruction.k),
            code if code == libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K => at += jump(accumulator > instruction.k),
            code if code == libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K => at += jump(accumulator >= instruction.k),
            code => panic!("unknown instruction {code:#x}"),
        }
    }
}

fn rule(names: &[&str], action: &str, arguments: &[(u64, &str, u64, u64)]) -> oci::LinuxSyscall {
    oci::LinuxSyscall {
        Names: names.iter().map(|name| (*name).to_owned()).collect(),
        Action: action.to_owned(),
        Args: arguments
            .iter()
            .map(|(index, operator, value, second)| oci::LinuxSeccompArg {
                Index: *index,
                Op: (*operator).to_owned(),
                Value: *value,
                ValueTwo: *second,
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    }
}

fn profile(default: &str, architectures: &[&str], rules: Vec<oci::LinuxSyscall>) -> oci::LinuxSeccomp {
    oci::LinuxSeccomp {
        DefaultAction: default.to_owned(),
        Architectures: architectures.iter().map(|name| (*name).to_owned()).collect(),
        Syscalls: rules,
        ..Default::default()
    }
}

fn x86(profile: &oci::LinuxSeccomp) -> Vec<libc::sock_filter> {
    compile_for(Family::X86, profile).unwrap().instructions
}

fn outcome(program: &[libc::sock_filter], arch: u32, number: u32, arguments: &[u64]) -> u32 {
    let mut all = [0; 6];
    all[..arguments.len()].copy_from_slice(arguments);
    run(program, Call { arch, number, arguments: all })
}

#[test]
fn an_allow_list_allows_what_it_names_and_calls_newer_than_it_do_not_exist() {
    let program =
        x86(&profile("SCMP_ACT_ERRNO", &[], vec![rule(&["read", "write", "no_such"], "SCMP_ACT_ALLOW", &[])]));
    assert_eq!(outcome(&program, X86_64, 0, &[]), libc::SECCOMP_RET_ALLOW);
    assert_eq!(outcome(&program, X86_64, 1, &[]), libc::SECCOMP_RET_ALLOW);
    assert_eq!(outcome(&program, X86_64, 2, &[]), ENOSYS);
    let program = x86(&profile("SCMP_ACT_ERRNO", &[], vec![rule(&["read", "clone3"], "SCMP_ACT_ALLOW", &[])]));
    assert_eq!(outcome(&program, X86_64, 2, &[]), EPERM);
    assert_eq!(outcome(&program, X86_64, 436, &[]), ENOSYS);
    assert_eq!(outcome(&program, X86_64, u32::MAX, &[]), EPERM);
}

#[test]
fn architectures_that_are_not_listed_are_killed() {
    let only_native = x86(&profile("SCMP_ACT_ALLOW", &["SCMP_ARCH_X86_64", "SCMP_ARCH_S390X"], vec![]));
    assert_eq!(outcome(&only_native, X86_64, 5, &[]), libc::SECCOMP_RET_ALLOW);
    assert_eq!(outcome(&only_native, I386, 5, &[]), libc::SECCOMP_RET_KILL_THREAD);
    assert_eq!(outcome(&only_native, X86_64, 0x4000_0005, &[]), libc::SECCOMP_RET_KILL_THREAD);
    assert_eq!(outcome(&only_native, 0xc000_00b7, 5, &[]), libc::SECCOMP_RET_KILL_THREAD);
    let all = x86(&profile(
        "SCMP_ACT_ALLOW",
        &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        vec![rule(&["execve"], "SCMP_ACT_KILL_PROCESS", &[])],
    ));
    for (arch, number) in [(X86_64, 59), (I386, 11), (X86_64, 0x4000_0000 + 520)] {
        assert_eq!(outcome(&all, arch, number, &[]), libc::SECCOMP_RET_KILL_PROCESS);
        assert_eq!(outcome(&all, arch, number + 1, &[]), libc::SECCOMP_RET_ALLOW);
    }
}

#[test]
fn every_action_becomes_the_kernels() {
    for (name, errno, value) in [
        ("SCMP_ACT_ALLOW", None, libc::SECCOMP_RET_ALLOW),
        ("SCMP_ACT_LOG", None, libc::SECCOMP_RET_LOG),
        ("SCMP_ACT_TRAP", None, libc::SECCOMP_RET_TRAP),
        ("SCMP_ACT_KILL", None, libc::SECCOMP_RET_KILL_THREAD),
        ("SCMP_ACT_KILL_THREAD", None, libc::SECCOMP_RET_KILL_THREAD),
        ("SCMP_ACT_KILL_PROCESS", None, libc::SECCOMP_RET_KILL_PROCESS),
        ("SCMP_ACT_ERRNO", None, EPERM),
        ("SCMP_ACT_ERRNO", Some(0), libc::SECCOMP_RET_ERRNO),
        ("SCMP_ACT_ERRNO", Some(38), ENOSYS),
        ("SCMP_ACT_TRACE", Some(7), libc::SECCOMP_RET_TRACE | 7),
    ] {
        let mut wanted = rule(&["mkdir"], name, &[]);
        wanted.ErrnoRet = errno.map(oci::linux_syscall::ErrnoRet::Errnoret);
        let program = x86(&profile("SCMP_ACT_LOG", &[], vec![wanted]));
        assert_eq!(outcome(&program, X86_64, 83, &[]), value, "{name}");
    }
}

#[test]
fn what_cannot_be_enforced_is_refused_by_name() {
    let refused = |profile: &oci::LinuxSeccomp| compile(profile).unwrap_err();
    assert_eq!(refused(&profile("SCMP_ACT_NOTIFY", &[], vec![])), Error::Notify);
    assert_eq!(refused(&profile("ALLOW", &[], vec![])), Error::Action("ALLOW".to_owned()));
    let strange = profile("SCMP_ACT_ALLOW", &["amd64"], vec![]);
    assert_eq!(refused(&strange), Error::Architecture("amd64".to_owned()));
    let sixth = profile("SCMP_ACT_ALLOW", &[], vec![rule(&["read"], "SCMP_ACT_KILL", &[(6, "SCMP_CMP_EQ", 0, 0)])]);
    assert_eq!(refused(&sixth), Error::Argument(6));
    let about = profile("SCMP_ACT_ALLOW", &[], vec![rule(&["read"], "SCMP_ACT_KILL", &[(0, "~", 0, 0)])]);
    assert_eq!(refused(&about), Error::Operator("~".to_owned()));
    let mut flagged = profile("SCMP_ACT_ALLOW", &[], vec![]);
    flagged.Flags = vec!["SECCOMP_FILTER_FLAG_LOG".to_owned(), "SECCOMP_FILTER_FLAG_TSYNC".to_owned()];
    assert_eq!(compile(&flagged).unwrap().flags, libc::SECCOMP_FILTER_FLAG_LOG);
    flagged.Flags.push("FAST".to_owned());
    assert_eq!(refused(&flagged), Error::Flag("FAST".to_owned()));
    let mut large = profile("SCMP_ACT_ERRNO", &[], vec![]);
    large.DefaultErrnoRet = Some(5000);
    assert!(matches!(refused(&large), Error::Errno { value: 5000, .. }));
}

#[test]
fn conditions_on_different_arguments_must_all_hold_and_on_the_same_are_alternatives() {
    let both = x86(&profile(
        "SCMP_ACT_ALLOW",
        &[],
        vec![rule(&["socket"], "SCMP_ACT_ERRNO", &[(0, "SCMP_CMP_EQ", 16, 0), (2, "SCMP_CMP_EQ", 9, 0)])],
    ));
    assert_eq!(outcome(&both, X86_64, 41, &[16, 3, 9]), EPERM);
    assert_eq!(outcome(&both, X86_64, 41, &[16, 3, 8]), libc::SECCOMP_RET_ALLOW);
    assert_eq!(outcome(&both, X86_64, 41, &[2, 3, 9]), libc::SECCOMP_RET_ALLOW);
    let either = x86(&profile(
        "SCMP_ACT_ERRNO",
        &[],
        vec![rule(&["personality"], "SCMP_ACT_ALLOW", &[(0, "SCMP_CMP_EQ", 0, 0), (0, "SCMP_CMP_EQ", 8, 0)])],
    ));
    for (argument, expected) in [(0, libc::SECCOMP_RET_ALLOW), (8, libc::SECCOMP_RET_ALLOW), (1, EPERM)] {
        assert_eq!(outcome(&either, X86_64, 135, &[argument]), expected);
    }
}

#[test]
fn arguments_are_compared_in_64_bits_where_they_have_them() {
    let minus_100 = (-100_i64).cast_unsigned();
    let program = x86(&profile(
        "SCMP_ACT_ALLOW",
        &["SCMP_ARCH_X86"],
        vec![rule(&["openat"], "SCMP_ACT_ERRNO", &[(0, "SCMP_CMP_EQ", minus_100, 0)])],
    ));
    assert_eq!(outcome(&program, X86_64, 257, &[minus_100]), EPERM);
    assert_eq!(outcome(&program, X86_64, 257, &[minus_100 & 0xffff_ffff]), libc::SECCOMP_RET_ALLOW);
    assert_eq!(outcome(&program, I386, 295, &[minus_100 & 0xffff_ffff]), EPERM);
}

#[test]
fn on_i386_a_socket_call_through_the_multiplexer_is_the_same_call() {
    let program =
        x86(&profile("SCMP_ACT_ALLOW", &["SCMP_ARCH_X86"], vec![rule(&["bind", "shmat"], "SCMP_ACT_ERRNO", &[])]));
    assert_eq!(outcome(&program, I386, 361, &[]), EPERM);
    assert_eq!(outcome(&program, I386, 102, &[2]), EPERM);
    assert_eq!(outcome(&program, I386, 102, &[3]), libc::SECCOMP_RET_ALLOW);
    assert_eq!(outcome(&program, I386, 117, &[0x1_0015]), EPERM);
}

#[test]
fn the_more_restrictive_of_two_actions_holds_and_the_specific_one_before_both() {
    let program = x86(&profile(
        "SCMP_ACT_ERRNO",
        &[],
        vec![
            rule(&["mkdir"], "SCMP_ACT_ALLOW", &[]),
            rule(&["mkdir"], "SCMP_ACT_KILL_PROCESS", &[]),
            rule(&["mkdir"], "SCMP_ACT_LOG", &[(1, "SCMP_CMP_EQ", 0o700, 0)]),
        ],
    ));
    assert_eq!(outcome(&program, X86_64, 83, &[0, 0o755]), libc::SECCOMP_RET_KILL_PROCESS);
    assert_eq!(outcome(&program, X86_64, 83, &[0, 0o700]), libc::SECCOMP_RET_LOG);
}

#[test]
fn a_dense_profile_fits_and_one_beyond_the_limit_is_refused() {
    // Every other call, which is the worst case for ranges.
    let names: Vec<String> = syscalls::x86_64::Sysno::iter().step_by(2).map(|call| call.name().to_owned()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let all = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"];
    let program = x86(&profile("SCMP_ACT_ERRNO", &all, vec![rule(&names, "SCMP_ACT_ALLOW", &[])]));
    assert!(program.len() < 2048, "{} instructions", program.len());
    let rules = (0..1000).map(|value| rule(&["ioctl"], "SCMP_ACT_ALLOW", &[(1, "SCMP_CMP_EQ", value, 0)])).collect();
    let error = compile(&profile("SCMP_ACT_ERRNO", &[], rules)).unwrap_err();
    assert!(matches!(error, Error::TooLong(length) if length > 4096));
}

const CALLS: [&str; 12] =
    ["read", "write", "open", "socket", "bind", "clone", "personality", "ioctl", "execve", "shmat", "futex", "openat2"];
const ACTIONS: [&str; 7] = [
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_TRAP",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_LOG",
    "SCMP_ACT_KILL",
];
const OPERATORS: [&str; 7] =
    ["SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE", "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_MASKED_EQ"];

/// Values near each other in either half, so that comparisons meet all their edges.
fn value() -> impl Strategy<Value = u64> {
    (0_u64..3, 0_u64..3, any::<bool>()).prop_map(|(high, low, negative)| {
        let value = (high << 32) | low;
        if negative { value.wrapping_neg() } else { value }
    })
}

fn syscall_rule() -> impl Strategy<Value = oci::LinuxSyscall> {
    let argument = (0_u64..3, 0..OPERATORS.len(), value(), value());
    let names = proptest::collection::vec(0..CALLS.len(), 1..4);
    (names, 0..ACTIONS.len(), proptest::collection::vec(argument, 0..3)).prop_map(|(names, action, arguments)| {
        let names: Vec<&str> = names.into_iter().map(|name| CALLS[name]).collect();
        let arguments: Vec<_> =
            arguments.into_iter().map(|(index, operator, a, b)| (index, OPERATORS[operator], a, b)).collect();
        rule(&names, ACTIONS[action], &arguments)
    })
}

fn holds(argument: &oci::LinuxSeccompArg, arguments: &[u64; 6], wide: bool) -> bool {
    let cut = |value: u64| if wide { value } else { value & 0xffff_ffff };
    let actual = cut(arguments[usize::try_from(argument.Index).unwrap()]);
    let value = cut(argument.Value);
    match argument.Op.as_str() {
        "SCMP_CMP_NE" => actual != value,
        "SCMP_CMP_LT" => actual < value,
        "SCMP_CMP_LE" => actual <= value,
        "SCMP_CMP_EQ" => actual == value,
        "SCMP_CMP_GE" => actual >= value,
        "SCMP_CMP_GT" => actual > value,
        _ => actual & value == cut(argument.ValueTwo),
    }
}

/// What the profile says, read rule by rule.
fn reference(profile: &oci::LinuxSeccomp, architecture: &Architecture, call: Call) -> u32 {
    let actions: HashMap<&str, u32> = HashMap::from([
        ("SCMP_ACT_ALLOW", libc::SECCOMP_RET_ALLOW),
        ("SCMP_ACT_ERRNO", EPERM),
        ("SCMP_ACT_KILL_PROCESS", libc::SECCOMP_RET_KILL_PROCESS),
        ("SCMP_ACT_TRAP", libc::SECCOMP_RET_TRAP),
        ("SCMP_ACT_TRACE", libc::SECCOMP_RET_TRACE | 1),
        ("SCMP_ACT_LOG", libc::SECCOMP_RET_LOG),
        ("SCMP_ACT_KILL", libc::SECCOMP_RET_KILL_THREAD),
    ]);
    let named =
        |rule: &&oci::LinuxSyscall| rule.Names.iter().any(|name| architecture.number(name) == Some(call.number));
    for rule in profile.Syscalls.iter().filter(named).filter(|rule| !rule.Args.is_empty()) {
        let mut indexes: Vec<u64> = rule.Args.iter().map(|argument| argument.Index).collect();
        indexes.sort_unstable();
        indexes.dedup();
        let mut each = rule.Args.iter().map(|argument| holds(argument, &call.arguments, architecture.wide));
        let applies = if indexes.len() == rule.Args.len() { each.all(|holds| holds) } else { each.any(|holds| holds) };
        if applies {
            return actions[rule.Action.as_str()];
        }
    }
    let unconditional = profile.Syscalls.iter().filter(named).filter(|rule| rule.Args.is_empty());
    // Kill process is the highest number but the most restrictive; the others order by themselves.
    let strictest = unconditional.map(|rule| actions[rule.Action.as_str()]).min_by_key(|action| action.cast_signed());
    let newest =
        profile.Syscalls.iter().flat_map(|rule| &rule.Names).filter_map(|name| architecture.number(name)).max();
    match strictest {
        Some(action) => action,
        None if profile.DefaultAction == "SCMP_ACT_ERRNO" && newest.is_some_and(|newest| call.number > newest) => {
            ENOSYS
        }
        None => actions[profile.DefaultAction.as_str()],
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_program_decides_as_the_profile_says(
        rules in proptest::collection::vec(syscall_rule(), 0..40),
        default in 0..ACTIONS.len(),
        arguments in proptest::collection::vec([value(), value(), value()], 8),
        other in 0_u32..500,
    ) {
        let all = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"];
        let profile = profile(ACTIONS[default], &all, rules);
        let program = x86(&profile);
        for architecture in Family::X86.architectures() {
            let numbers = CALLS.iter().filter_map(|name| architecture.number(name));
            for number in numbers.chain([architecture.first + other]) {
                // The multiplexers of i386 have a test of their own.
                if architecture.token == I386 && [102, 117].contains(&number) {
                    continue;
                }
                for arguments in &arguments {
                    let [a, b, c] = arguments.map(|value| if architecture.wide { value } else { value & 0xffff_ffff });
                    let call = Call { arch: architecture.token, number, arguments: [a, b, c, 0, 0, 0] };
                    prop_assert_eq!(
                        run(&program, call), reference(&profile, architecture, call),
                        "{:?} on {}", call, architecture.name
                    );
                }
            }
        }
    }
}

#[test]
fn the_kernel_takes_a_program_and_a_denied_call_fails() {
    let rules = vec![
        rule(&["mkdir", "mkdirat"], "SCMP_ACT_ERRNO", &[]),
        // Makes the program long enough for far jumps.
        rule(&["ioctl"], "SCMP_ACT_ERRNO", &[(1, "SCMP_CMP_EQ", 0xdead, 0)]),
    ];
    let mut long = profile("SCMP_ACT_ALLOW", &["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_AARCH64"], rules);
    long.Syscalls
        .extend((0..200).map(|value| rule(&["prctl"], "SCMP_ACT_ERRNO", &[(0, "SCMP_CMP_EQ", 1 << 33 | value, 0)])));
    let program = compile(&long).unwrap();
    assert!(program.instructions.len() > 600);
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new("/bin/mkdir");
    command.arg(directory.path().join("denied")).env("LC_ALL", "C");
    // SAFETY: the closure makes two system calls with memory that was prepared before the fork.
    unsafe {
        command.pre_exec(move || {
            let filter = libc::sock_fprog {
                len: u16::try_from(program.instructions.len()).unwrap_or_default(),
                filter: program.instructions.as_ptr().cast_mut(),
            };
            if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
                || libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, program.flags, &raw const filter)
                    != 0
            {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let output = command.output().unwrap();
    assert!(!output.status.success());
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("Operation not permitted"), "{message}");
    assert!(!directory.path().join("denied").exists());
}
