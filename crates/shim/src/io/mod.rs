//! The streams of a process: from the engine's FIFOs and files to the guest and back.
//!
//! ```text
//!   engine's FIFO ──► stdin pump ──► WriteStdin ─┐
//!                                                ├─ process in the guest
//!   engine's FIFO ◄── pump ◄── ReadStdout ───────┘
//! ```
//!
//! A pump holds one buffer and asks for more only when that is delivered: a slow reader slows the process down, and
//! memory does not grow. Opening never waits for the other end and a FIFO is not given up while nobody reads it, so
//! that a client can come late, leave and come back.

mod paths;
mod pump;

pub(crate) use paths::{Opened, Paths};
pub(crate) use pump::Streams;

#[cfg(test)]
mod tests;
