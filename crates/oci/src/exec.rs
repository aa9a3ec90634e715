//! `kata exec`: another process in a container.

use crate::find::find;
use crate::run::{Signals, attended};
use crate::stdio::{Streams, exec_dir};
use crate::task::Task;
use crate::{Error, bundle};

/// What `kata exec` is asked for.
#[derive(Clone, Debug)]
pub struct ExecOptions {
    /// The container's name, or the beginning of it.
    pub container: String,
    /// Give the process a terminal.
    pub terminal: bool,
    /// Forward standard input.
    pub interactive: bool,
    /// `KEY=value` additions to the container's environment.
    pub env: Vec<String>,
    /// The working directory; the container's own when absent.
    pub workdir: Option<String>,
    /// The command with its arguments.
    pub command: Vec<String>,
}

/// Runs a process in a container and returns its exit status.
///
/// # Errors
///
/// There is no such container, its shim cannot be reached, or it refuses.
pub async fn exec(options: &ExecOptions) -> Result<u32, Error> {
    let found = find(&options.container)?;
    let task = Task::of_sandbox(&found.sandbox, &found.container).await?;
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| Error::Own("make up a name", errno.into()))?;
    let exec = format!("{:016x}", u64::from_ne_bytes(bytes));
    let process = bundle::exec_process(
        &found.bundle,
        &options.command,
        &options.env,
        options.workdir.as_deref(),
        options.terminal,
    )?;
    let streams = Streams::create(exec_dir(&found.sandbox, &exec), options.terminal, options.interactive)?;
    let copying = streams.copy()?;
    let signals = Signals::listen()?;
    task.add(&exec, process.to_string(), &streams).await?;
    let result = attended(&task, &exec, &streams, copying, signals).await;
    // It has ended, or never started: either way the shim can forget it.
    drop(task.delete(&exec).await);
    result
}
