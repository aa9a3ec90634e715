//! An assembler for classic BPF: labels, and jumps of any length.
//!
//! A conditional jump reaches 255 instructions. Where the distance is greater, an unconditional jump (or, if all that
//! happens there is a return, the return itself) is put behind it. Putting one there moves what follows, so distances are
//! taken again until nothing changes; it ends because jumps only ever get longer.

/// A place in the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Label(usize);

/// How the accumulator is compared with a constant, unsigned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Test {
    Equal,
    Greater,
    GreaterOrEqual,
}

#[derive(Debug)]
enum Operation {
    Load(u32),
    And(u32),
    Test { test: Test, value: u32, yes: Label, no: Label, yes_is_far: bool, no_is_far: bool },
    Goto(Label),
    Return(u32),
}

/// Collects operations. Jumps lead forward only: the kernel takes no others.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    operations: Vec<Operation>,
    /// By label: the operation that it stands before.
    places: Vec<usize>,
}

impl Assembler {
    pub(super) fn label(&mut self) -> Label {
        self.places.push(usize::MAX);
        Label(self.places.len() - 1)
    }

    /// Puts a label here.
    pub(super) fn mark(&mut self, label: Label) {
        self.places[label.0] = self.operations.len();
    }

    /// Loads a word of struct seccomp_data into the accumulator.
    pub(super) fn load(&mut self, offset: u32) {
        self.operations.push(Operation::Load(offset));
    }

    pub(super) fn and(&mut self, mask: u32) {
        if mask != u32::MAX {
            self.operations.push(Operation::And(mask));
        }
    }

    pub(super) fn test(&mut self, test: Test, value: u32, yes: Label, no: Label) {
        self.operations.push(Operation::Test { test, value, yes, no, yes_is_far: false, no_is_far: false });
    }

    pub(super) fn goto(&mut self, label: Label) {
        self.operations.push(Operation::Goto(label));
    }

    pub(super) fn ret(&mut self, action: u32) {
        self.operations.push(Operation::Return(action));
    }

    /// Where each operation's instructions start, and where the program ends.
    fn layout(&self) -> Vec<usize> {
        let mut starts = Vec::with_capacity(self.operations.len() + 1);
        let mut at = 0;
        for operation in &self.operations {
            starts.push(at);
            at += match operation {
                Operation::Test { yes_is_far, no_is_far, .. } => 1 + usize::from(*yes_is_far) + usize::from(*no_is_far),
                _ => 1,
            };
        }
        starts.push(at);
        starts
    }

    /// The finished program.
    pub(super) fn finish(mut self) -> Vec<libc::sock_filter> {
        let mut starts = self.layout();
        loop {
            let mut changed = false;
            for (index, operation) in self.operations.iter_mut().enumerate() {
                if let Operation::Test { yes, no, yes_is_far, no_is_far, .. } = operation {
                    for (label, is_far) in [(yes, yes_is_far), (no, no_is_far)] {
                        let distance = starts[self.places[label.0]].saturating_sub(starts[index] + 1);
                        if !*is_far && distance > usize::from(u8::MAX) {
                            *is_far = true;
                            changed = true;
                        }
                    }
                }
            }
            if !changed {
                break;
            }
            starts = self.layout();
        }
        self.emit(&starts)
    }

    fn emit(&self, starts: &[usize]) -> Vec<libc::sock_filter> {
        let mut program = Vec::with_capacity(starts.last().copied().unwrap_or_default());
        for operation in &self.operations {
            // Distances count from the next instruction.
            let near = |label: &Label, from: usize| {
                u8::try_from(starts[self.places[label.0]].saturating_sub(from)).unwrap_or(u8::MAX)
            };
            match operation {
                Operation::Load(offset) => program.push(plain(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, *offset)),
                Operation::And(mask) => program.push(plain(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, *mask)),
                Operation::Return(action) => program.push(plain(libc::BPF_RET | libc::BPF_K, *action)),
                Operation::Goto(label) => program.push(self.far(*label, program.len() + 1, starts)),
                Operation::Test { test, value, yes, no, yes_is_far, no_is_far } => {
                    let next = program.len() + 1;
                    let code = match test {
                        Test::Equal => libc::BPF_JEQ,
                        Test::Greater => libc::BPF_JGT,
                        Test::GreaterOrEqual => libc::BPF_JGE,
                    };
                    program.push(libc::sock_filter {
                        jt: if *yes_is_far { 0 } else { near(yes, next) },
                        jf: if *no_is_far { u8::from(*yes_is_far) } else { near(no, next) },
                        ..plain(libc::BPF_JMP | libc::BPF_K | code, *value)
                    });
                    for label in [yes_is_far.then_some(yes), no_is_far.then_some(no)].into_iter().flatten() {
                        program.push(self.far(*label, program.len() + 1, starts));
                    }
                }
            }
        }
        program
    }

    /// A jump of any length, or what it would lead to.
    fn far(&self, label: Label, from: usize, starts: &[usize]) -> libc::sock_filter {
        let place = self.places[label.0];
        match self.operations.get(place) {
            Some(Operation::Return(action)) => plain(libc::BPF_RET | libc::BPF_K, *action),
            _ => {
                let distance = u32::try_from(starts[place].saturating_sub(from)).unwrap_or(u32::MAX);
                plain(libc::BPF_JMP | libc::BPF_JA, distance)
            }
        }
    }
}

/// An instruction that does not branch.
fn plain(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: u16::try_from(code).unwrap_or_default(), jt: 0, jf: 0, k }
}
