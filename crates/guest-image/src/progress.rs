//! How long operations tell what they are doing: a callback, so that the command line decides how it looks.

/// One thing worth showing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A new step begins; the text starts with a verb, with no full stop.
    Step(String),
    /// How far the step is, in units of its own; `total` is an estimate and may be exceeded.
    Advance {
        /// Units done.
        done: u64,
        /// Units expected.
        total: u64,
    },
}

/// Receives the events of one operation.
pub type Progress<'a> = dyn FnMut(Event) + 'a;

/// Reports a step.
pub(crate) fn step(progress: &mut Progress<'_>, what: impl Into<String>) {
    progress(Event::Step(what.into()));
}
