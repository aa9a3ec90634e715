//! Command-line verbs over sandboxes, with no engine in between.
//!
//! `kata run` does what containerd does: it writes a bundle, starts the same shim, and speaks the same Task service to
//! it. So a sandbox started by hand is not special, and `list`, `exec`, `kill` and `delete` work on those of engines
//! too.
//!
//! ```text
//!   run ── bundle ──▶ containerd-shim-kata-v2 start ──▶ its socket
//!    └── Create, Start, Wait, Delete, Shutdown ─────────────▲
//!    └── FIFOs for the standard streams, or one terminal
//! ```

mod bundle;
mod delete;
mod error;
mod exec;
mod find;
mod kill;
mod run;
mod server;
mod stdio;
mod task;

pub use delete::delete;
pub use error::Error;
pub use exec::{ExecOptions, exec};
pub use find::{Listed, list};
pub use kill::{kill, parse_signal};
pub use run::{RunOptions, run};
