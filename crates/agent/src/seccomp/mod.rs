//! Compiles an OCI seccomp profile into a classic BPF program.
//!
//! ```text
//! LinuxSeccomp ──profile::read──▶ rules ──tables──▶ per architecture: number → verdict ──assemble──▶ sock_filter[]
//! ```
//!
//! The program looks at the architecture first (an unlisted one kills the thread), then finds the system call's number by
//! binary search over ranges with equal outcome, then compares arguments where a rule asks for it:
//!
//! ```text
//! arch == x86_64? ──▶ nr >= a? ──▶ nr >= b? ──▶ … ──▶ return
//!   │ no                                        └───▶ arguments of rule 1 ──▶ of rule 2 ──▶ … ──▶ return
//! arch == i386?   ──▶ …
//!   │ no
//! kill
//! ```
//!
//! Which rule holds, where several name one system call: those with arguments come first, in the profile's order; then
//! those without. Two without arguments and with different actions are resolved as the kernel resolves several filters
//! (seccomp(2)): the more restrictive one. A number beyond the newest that the profile names answers ENOSYS if the
//! default is an errno, so that a C library newer than the profile falls back instead of failing.

mod architecture;
mod assemble;
mod profile;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};

use architecture::{Architecture, Family};
use assemble::{Assembler, Label, Test};
use profile::{Condition, Operator, Profile};
use protocol::oci;

/// The most instructions that the kernel takes in one filter (`BPF_MAXINSNS`, linux/bpf_common.h).
const MAX_INSTRUCTIONS: usize = 4096;
/// Offset of `arch` in struct seccomp_data (linux/seccomp.h).
const ARCH_OFFSET: u32 = 4;
/// Offset of `args[0]` there.
const ARGUMENTS_OFFSET: u32 = 16;

/// A profile that cannot be enforced.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The action's name is not known.
    #[error("Unknown seccomp action {0:?}: use a SCMP_ACT_ name of the OCI runtime specification")]
    Action(String),
    /// Notification needs a listener on the host's side, which a guest cannot reach.
    #[error("Seccomp action SCMP_ACT_NOTIFY is not supported: there is no listener in the guest; use another action")]
    Notify,
    /// The errno does not fit.
    #[error("Seccomp errnoRet {value} of {action} is out of range: the most is {most}")]
    Errno {
        /// The action's name.
        action: String,
        /// What was asked for.
        value: u32,
        /// The most that the action carries.
        most: u32,
    },
    /// The operator's name is not known.
    #[error("Unknown seccomp operator {0:?}: use a SCMP_CMP_ name of the OCI runtime specification")]
    Operator(String),
    /// System calls have six arguments.
    #[error("Seccomp argument index {0} is out of range: system calls have the arguments 0 to 5")]
    Argument(u64),
    /// The flag's name is not known.
    #[error("Unknown seccomp flag {0:?}: use a SECCOMP_FILTER_FLAG_ name of the OCI runtime specification")]
    Flag(String),
    /// The architecture's name is not known at all.
    #[error("Unknown seccomp architecture {0:?}: use a SCMP_ARCH_ name of the OCI runtime specification")]
    Architecture(String),
    /// The kernel would not take it.
    #[error("The seccomp profile compiles to {0} instructions, the kernel takes 4096: use fewer rules with arguments")]
    TooLong(usize),
}

/// A filter ready for seccomp(2) with `SECCOMP_SET_MODE_FILTER`.
#[derive(Clone)]
pub struct Program {
    /// What goes into `struct sock_fprog`; 1 to 4096 instructions.
    pub instructions: Vec<libc::sock_filter>,
    /// The `flags` argument: `SECCOMP_FILTER_FLAG_LOG`, `_SPEC_ALLOW` as the profile says. Not `_TSYNC`: the process that
    /// installs the filter has one thread.
    pub flags: u64,
}

impl std::fmt::Debug for Program {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Program")
            .field("instructions", &self.instructions.len())
            .field("flags", &self.flags)
            .finish()
    }
}

/// Compiles a profile for this machine. Names of system calls that no listed architecture has are skipped, as are
/// architectures of other machines.
///
/// # Errors
///
/// What the profile asks for and cannot be had; nothing is weakened in silence.
pub fn compile(seccomp: &oci::LinuxSeccomp) -> Result<Program, Error> {
    compile_for(Family::NATIVE, seccomp)
}

fn compile_for(family: Family, seccomp: &oci::LinuxSeccomp) -> Result<Program, Error> {
    let profile = profile::read(family, seccomp)?;
    let mut builder = Builder::default();
    builder.program(&profile);
    let instructions = builder.assembler.finish();
    if instructions.len() > MAX_INSTRUCTIONS {
        return Err(Error::TooLong(instructions.len()));
    }
    Ok(Program { instructions, flags: profile.flags })
}

/// What is decided for one system call number.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct Verdict {
    /// The first of these whose conditions all hold.
    conditional: Vec<(Vec<Condition>, u32)>,
    /// Else this, or the profile's default.
    otherwise: Option<u32>,
}

impl Verdict {
    fn add(&mut self, conditions: &[Condition], action: u32) {
        if conditions.is_empty() {
            self.otherwise = Some(match self.otherwise {
                // The kernel compares the upper half as a signed number; the smaller one wins.
                Some(present) if rank(present) <= rank(action) => present,
                _ => action,
            });
        } else {
            self.conditional.push((conditions.to_vec(), action));
        }
    }

    /// Drops comparisons that cannot change the outcome.
    fn simplify(&mut self, default: u32) {
        let otherwise = self.otherwise.unwrap_or(default);
        while self.conditional.last().is_some_and(|(_, action)| *action == otherwise) {
            self.conditional.pop();
        }
    }
}

/// The kernel's order of precedence: the smallest wins.
fn rank(action: u32) -> i32 {
    (action & libc::SECCOMP_RET_ACTION_FULL).cast_signed()
}

/// What the profile says of each number that it names, and the newest number it names.
fn table(profile: &Profile, architecture: &Architecture) -> (BTreeMap<u32, Verdict>, Option<u32>) {
    let mut verdicts: BTreeMap<u32, Verdict> = BTreeMap::new();
    let mut newest = None;
    for rule in &profile.rules {
        for name in &rule.names {
            let number = architecture.number(name);
            if let Some(number) = number {
                if architecture.is_ordinary(number) {
                    newest = newest.max(Some(number));
                }
                for conditions in &rule.alternatives {
                    verdicts.entry(number).or_default().add(conditions, rule.action);
                }
            }
            // A multiplexer's call is recognised by its number, its arguments lie in memory that no filter can read.
            if let Some((carrier, condition)) = architecture.carried(name)
                && rule.alternatives.iter().any(Vec::is_empty)
            {
                verdicts.entry(carrier).or_default().add(&[condition], rule.action);
            } else if number.is_none() {
                tracing::debug!(name, architecture = architecture.name, "Seccomp rule for an unknown system call");
            }
        }
    }
    for verdict in verdicts.values_mut() {
        verdict.simplify(profile.default);
    }
    (verdicts, newest)
}

#[derive(Default)]
struct Builder {
    assembler: Assembler,
    /// Where each action is returned.
    returns: HashMap<u32, Label>,
    /// Argument comparisons that are still to be written: they follow the searches that lead there.
    chains: HashMap<(Verdict, bool), Label>,
    /// The same in order, for a program that does not depend on hashing.
    pending: Vec<(Verdict, bool, Label)>,
}

impl Builder {
    fn program(&mut self, profile: &Profile) {
        let bad_architecture = self.returning(libc::SECCOMP_RET_KILL_THREAD);
        self.assembler.load(ARCH_OFFSET);
        let mut tokens: Vec<u32> = Vec::new();
        for architecture in &profile.architectures {
            if !tokens.contains(&architecture.token) {
                tokens.push(architecture.token);
            }
        }
        let searches: Vec<Label> = tokens.iter().map(|_| self.assembler.label()).collect();
        for (token, search) in tokens.iter().zip(&searches) {
            let next = self.assembler.label();
            self.assembler.test(Test::Equal, *token, *search, next);
            self.assembler.mark(next);
        }
        self.assembler.goto(bad_architecture);
        for (token, search) in tokens.iter().zip(&searches) {
            self.assembler.mark(*search);
            let ranges = self.ranges(profile, *token);
            // The number is at offset 0 of struct seccomp_data.
            self.assembler.load(0);
            self.search(&ranges);
        }
        for (verdict, wide, label) in std::mem::take(&mut self.pending) {
            self.assembler.mark(label);
            self.chain(&verdict, wide, profile.default);
        }
        let mut returns: Vec<(u32, Label)> = self.returns.iter().map(|(action, label)| (*action, *label)).collect();
        returns.sort_unstable();
        for (action, label) in returns {
            self.assembler.mark(label);
            self.assembler.ret(action);
        }
    }

    /// The whole space of numbers under one audit token as ranges with one target each: first number, target.
    fn ranges(&mut self, profile: &Profile, token: u32) -> Vec<(u32, Label)> {
        let default = self.returning(profile.default);
        let beyond = match profile.beyond_newest() {
            Some(action) => self.returning(action),
            None => default,
        };
        let mut ranges: Vec<(u32, Label)> = Vec::new();
        let mut push = |start: u32, target: Label| match ranges.last_mut() {
            Some(last) if last.0 == start => last.1 = target,
            Some(last) if last.1 == target => {}
            _ => ranges.push((start, target)),
        };
        let mut covers_all = false;
        for architecture in profile.architectures.iter().filter(|architecture| architecture.token == token) {
            let (verdicts, newest) = table(profile, architecture);
            let old = |number: u32| newest.is_none_or(|newest| number <= newest);
            push(architecture.first, default);
            for (number, verdict) in verdicts {
                let target = self.verdict(verdict, architecture.wide, profile.default);
                push(number, target);
                push(number + 1, if old(number + 1) { default } else { beyond });
            }
            covers_all |= architecture.last == u32::MAX;
        }
        if !covers_all {
            // Numbers of the x32 flavour, which was not listed. All ones is what a tracer leaves to skip a call.
            push(architecture::X32_BIT, self.returning(libc::SECCOMP_RET_KILL_THREAD));
            push(u32::MAX, default);
        }
        ranges.dedup_by_key(|range| range.1);
        ranges
    }

    /// Where a verdict is carried out.
    fn verdict(&mut self, verdict: Verdict, wide: bool, default: u32) -> Label {
        if verdict.conditional.is_empty() {
            return self.returning(verdict.otherwise.unwrap_or(default));
        }
        let key = (verdict, wide);
        if let Some(label) = self.chains.get(&key) {
            return *label;
        }
        let label = self.assembler.label();
        self.pending.push((key.0.clone(), wide, label));
        self.chains.insert(key, label);
        label
    }

    fn returning(&mut self, action: u32) -> Label {
        *self.returns.entry(action).or_insert_with(|| self.assembler.label())
    }

    /// A binary search, with the number in the accumulator.
    fn search(&mut self, ranges: &[(u32, Label)]) {
        match ranges {
            [] => {}
            [(_, target)] => self.assembler.goto(*target),
            _ => {
                let (left, right) = ranges.split_at(ranges.len() / 2);
                let [left_label, right_label] = [left, right].map(|half| match half {
                    [(_, target)] => *target,
                    _ => self.assembler.label(),
                });
                self.assembler.test(Test::GreaterOrEqual, right[0].0, right_label, left_label);
                for (half, label) in [(left, left_label), (right, right_label)] {
                    if half.len() > 1 {
                        self.assembler.mark(label);
                        self.search(half);
                    }
                }
            }
        }
    }

    fn chain(&mut self, verdict: &Verdict, wide: bool, default: u32) {
        for (conditions, action) in &verdict.conditional {
            let matched = self.returning(*action);
            let next = self.assembler.label();
            for (index, condition) in conditions.iter().enumerate() {
                let holds = if index + 1 == conditions.len() { matched } else { self.assembler.label() };
                self.compare(condition, wide, holds, next);
                if holds != matched {
                    self.assembler.mark(holds);
                }
            }
            self.assembler.mark(next);
        }
        let otherwise = self.returning(verdict.otherwise.unwrap_or(default));
        self.assembler.goto(otherwise);
    }

    /// Compares one argument: the upper half first where registers have 64 bits, then the lower.
    fn compare(&mut self, condition: &Condition, wide: bool, holds: Label, fails: Label) {
        let low_at = ARGUMENTS_OFFSET + 8 * condition.index + if cfg!(target_endian = "big") { 4 } else { 0 };
        let high_at = low_at ^ 4;
        let (high, low) = halves(condition.value);
        // What is left are equality and "greater"; the others are their opposites.
        let (test, yes, no) = match condition.operator {
            Operator::Equal | Operator::MaskedEqual(_) => (Test::Equal, holds, fails),
            Operator::NotEqual => (Test::Equal, fails, holds),
            Operator::Greater => (Test::Greater, holds, fails),
            Operator::LessOrEqual => (Test::Greater, fails, holds),
            Operator::GreaterOrEqual => (Test::GreaterOrEqual, holds, fails),
            Operator::Less => (Test::GreaterOrEqual, fails, holds),
        };
        let (mask_high, mask_low) = match condition.operator {
            Operator::MaskedEqual(mask) => halves(mask),
            _ => (u32::MAX, u32::MAX),
        };
        if wide {
            let lower = self.assembler.label();
            self.assembler.load(high_at);
            self.assembler.and(mask_high);
            if test != Test::Equal {
                let not_greater = self.assembler.label();
                self.assembler.test(Test::Greater, high, yes, not_greater);
                self.assembler.mark(not_greater);
            }
            self.assembler.test(Test::Equal, high, lower, no);
            self.assembler.mark(lower);
        }
        self.assembler.load(low_at);
        self.assembler.and(mask_low);
        self.assembler.test(test, low, yes, no);
    }
}

/// The upper and the lower half.
fn halves(value: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = value.to_be_bytes();
    (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]))
}
