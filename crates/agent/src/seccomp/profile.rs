//! Reads the OCI form of a profile into checked values.

use protocol::oci;

use super::Error;
use super::architecture::{Architecture, Family, NAMES};

/// The most that a filter's errno can be (`MAX_ERRNO` of the kernel).
const MAX_ERRNO: u32 = 4095;
/// Bits of an action's value.
const MAX_DATA: u32 = 0xffff;

/// How an argument is compared, as unsigned numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Operator {
    NotEqual,
    Less,
    LessOrEqual,
    Equal,
    GreaterOrEqual,
    Greater,
    /// The argument and this mask.
    MaskedEqual(u64),
}

/// One comparison.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Condition {
    /// 0 to 5.
    pub(super) index: u32,
    pub(super) operator: Operator,
    /// What the argument is compared with.
    pub(super) value: u64,
}

/// One entry of the profile.
#[derive(Debug)]
pub(super) struct Rule {
    pub(super) names: Vec<String>,
    /// It applies where all conditions of one of these hold.
    pub(super) alternatives: Vec<Vec<Condition>>,
    /// `SECCOMP_RET_*` with its value.
    pub(super) action: u32,
}

/// A whole profile.
#[derive(Debug)]
pub(super) struct Profile {
    /// The kernel's own architecture and those listed.
    pub(super) architectures: Vec<&'static Architecture>,
    pub(super) rules: Vec<Rule>,
    /// What happens where no rule applies.
    pub(super) default: u32,
    /// Flags of seccomp(2).
    pub(super) flags: u64,
}

impl Profile {
    /// What happens to numbers newer than all that the profile names, if not the default.
    pub(super) fn beyond_newest(&self) -> Option<u32> {
        let is_errno = self.default & libc::SECCOMP_RET_ACTION_FULL == libc::SECCOMP_RET_ERRNO;
        is_errno.then_some(libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned())
    }
}

/// Checks everything, and translates names into numbers.
pub(super) fn read(family: Family, seccomp: &oci::LinuxSeccomp) -> Result<Profile, Error> {
    let known = family.architectures();
    if let Some(name) = seccomp.Architectures.iter().find(|name| !NAMES.contains(&name.as_str())) {
        return Err(Error::Architecture(name.clone()));
    }
    let is_wanted = |index: usize, name: &str| index == 0 || seccomp.Architectures.iter().any(|listed| listed == name);
    let architectures = known
        .iter()
        .enumerate()
        .filter(|(index, architecture)| is_wanted(*index, architecture.name))
        .map(|(_, architecture)| architecture)
        .collect();
    let mut rules = Vec::with_capacity(seccomp.Syscalls.len());
    for call in &seccomp.Syscalls {
        let errno = match call.ErrnoRet {
            Some(oci::linux_syscall::ErrnoRet::Errnoret(value)) => Some(value),
            _ => None,
        };
        rules.push(Rule {
            names: call.Names.clone(),
            alternatives: alternatives(&call.Args)?,
            action: action(&call.Action, errno)?,
        });
    }
    Ok(Profile {
        architectures,
        rules,
        default: action(&seccomp.DefaultAction, seccomp.DefaultErrnoRet)?,
        flags: flags(&seccomp.Flags)?,
    })
}

fn action(name: &str, data: Option<u32>) -> Result<u32, Error> {
    let data = data.unwrap_or(libc::EPERM.cast_unsigned());
    let limited = |most: u32| {
        if data > most { Err(Error::Errno { action: name.to_owned(), value: data, most }) } else { Ok(data) }
    };
    Ok(match name {
        "SCMP_ACT_ALLOW" => libc::SECCOMP_RET_ALLOW,
        "SCMP_ACT_LOG" => libc::SECCOMP_RET_LOG,
        "SCMP_ACT_TRACE" => libc::SECCOMP_RET_TRACE | limited(MAX_DATA)?,
        "SCMP_ACT_ERRNO" => libc::SECCOMP_RET_ERRNO | limited(MAX_ERRNO)?,
        "SCMP_ACT_TRAP" => libc::SECCOMP_RET_TRAP,
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => libc::SECCOMP_RET_KILL_THREAD,
        "SCMP_ACT_KILL_PROCESS" => libc::SECCOMP_RET_KILL_PROCESS,
        "SCMP_ACT_NOTIFY" => return Err(Error::Notify),
        _ => return Err(Error::Action(name.to_owned())),
    })
}

/// All conditions of a rule must hold; but several on the same argument are alternatives, each by itself. That is how
/// profiles have been read since before there was a specification.
fn alternatives(arguments: &[oci::LinuxSeccompArg]) -> Result<Vec<Vec<Condition>>, Error> {
    let conditions = arguments.iter().map(condition).collect::<Result<Vec<_>, _>>()?;
    let repeated = conditions
        .iter()
        .enumerate()
        .any(|(position, condition)| conditions[..position].iter().any(|earlier| earlier.index == condition.index));
    Ok(if repeated { conditions.into_iter().map(|condition| vec![condition]).collect() } else { vec![conditions] })
}

fn condition(argument: &oci::LinuxSeccompArg) -> Result<Condition, Error> {
    let index = u32::try_from(argument.Index).ok().filter(|index| *index < 6).ok_or(Error::Argument(argument.Index))?;
    let operator = match argument.Op.as_str() {
        "SCMP_CMP_NE" => Operator::NotEqual,
        "SCMP_CMP_LT" => Operator::Less,
        "SCMP_CMP_LE" => Operator::LessOrEqual,
        "SCMP_CMP_EQ" => Operator::Equal,
        "SCMP_CMP_GE" => Operator::GreaterOrEqual,
        "SCMP_CMP_GT" => Operator::Greater,
        "SCMP_CMP_MASKED_EQ" => {
            return Ok(Condition { index, operator: Operator::MaskedEqual(argument.Value), value: argument.ValueTwo });
        }
        other => return Err(Error::Operator(other.to_owned())),
    };
    Ok(Condition { index, operator, value: argument.Value })
}

fn flags(names: &[String]) -> Result<u64, Error> {
    let mut flags = 0;
    for name in names {
        flags |= match name.as_str() {
            "SECCOMP_FILTER_FLAG_LOG" => libc::SECCOMP_FILTER_FLAG_LOG,
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            // One thread has nothing to synchronise; without notification there is no wait to make killable.
            "SECCOMP_FILTER_FLAG_TSYNC" | "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" => 0,
            _ => return Err(Error::Flag(name.clone())),
        };
    }
    Ok(flags)
}
