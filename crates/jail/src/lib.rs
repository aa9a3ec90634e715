//! Starts helper processes confined: own user, namespaces, root, no capabilities, known to the journal first.
//!
//! Whatever parses what a guest says (the VMM, the file server) runs in a jail. A [`Jail`] describes it; spawning one
//! goes in two steps, so that the journal knows the process before the process can leave anything behind:
//!
//! ```text
//!   caller                              helper (a fresh, single-threaded process: never a fork of the caller)
//!   Jail::spawn ── description, fds ──▶ new pid namespace, final process
//!   Held        ◀─ its pid ──────────── waits for the release; ends if the caller goes away
//!   (journal entry: pid + start time)
//!   Held::release ── one byte ────────▶ cgroups, namespaces, root, limits, user, capabilities, seccomp
//!   Process     ◀─ closed: it runs ──── exec of the program, or return into the helper's own code
//!   Err(Step)   ◀─ step, errno, cure ── exits
//! ```
//!
//! Helpers die with the thread that spawned them (`PR_SET_PDEATHSIG`): spawn from a thread that lives as long as the
//! helper should, the main thread that is.

mod description;
mod enter;
mod error;
mod privileges;
mod process;
mod root;
mod spawn;
mod sys;
mod user;

pub use description::{Capability, Entry, Jail, Limit, Namespaces, Program, Refusal, Resource, Root, Seccomp};
pub use enter::{Attached, attach, enter, main};
pub use error::Error;
pub use process::{Process, kill_exact, start_time_of};
pub use spawn::Held;
pub use user::{VmmUser, free_user};
