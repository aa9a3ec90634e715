//! `kata run`, `list`, `exec`, `kill` and `delete`.

use std::future::Future;
use std::io::IsTerminal as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use config::Config;
use oci::{ExecOptions, Listed, RunOptions};

use crate::cli::{ExecArgs, Format, RunArgs};
use crate::failure::Failure;
use crate::output;

/// The exit status when it is us who failed, and not the command.
const OWN_FAILURE: u8 = 125;

/// `kata run`.
pub(crate) fn run(args: RunArgs) -> Result<u8, Failure> {
    // Before anything is made: a configuration that's wrong is reported whole, by us, and not by a shim.
    let config = Config::load(None).map_err(|error| Failure::new(error).with_status(OWN_FAILURE))?;
    let program = args.command.first().cloned().unwrap_or_default();
    let options = RunOptions {
        name: args.name,
        remove: args.rm,
        terminal: args.tty,
        interactive: args.interactive || !std::io::stdin().is_terminal(),
        rootfs: args.rootfs,
        busybox: config.prefix().join("share/kata/busybox"),
        env: environment(args.env),
        workdir: args.workdir,
        cpus: args.cpus,
        memory: args.memory,
        command: args.command,
    };
    attended(&program, oci::run(&options))
}

/// `kata exec`.
pub(crate) fn exec(args: ExecArgs) -> Result<u8, Failure> {
    let program = args.command.first().cloned().unwrap_or_default();
    let options = ExecOptions {
        container: args.container,
        terminal: args.tty,
        interactive: args.interactive || !std::io::stdin().is_terminal(),
        env: environment(args.env),
        workdir: args.workdir,
        command: args.command,
    };
    attended(&program, oci::exec(&options))
}

/// `kata kill`.
pub(crate) fn kill(container: &str, signal: &str, all: bool) -> Result<(), Failure> {
    let signal = oci::parse_signal(signal).map_err(failed)?;
    wait_for(oci::kill(container, signal, all))?.map_err(failed)
}

/// `kata delete`.
pub(crate) fn delete(containers: &[String], force: bool) -> Result<(), Failure> {
    let mut last = Ok(());
    for container in containers {
        // Each of several is tried; the errors of all are printed.
        if let Err(failure) = std::mem::replace(&mut last, Ok(())) {
            Failure::print(&failure);
        }
        let deleted = wait_for(oci::delete(container, force))?.map_err(failed);
        last = match (last, deleted) {
            (Err(first), Ok(())) => Err(first),
            (_, deleted) => deleted,
        };
    }
    last
}

/// `kata list`.
pub(crate) fn list(format: Format) -> Result<(), Failure> {
    let sandboxes = oci::list();
    match format {
        Format::Json => output::json(&sandboxes),
        Format::Table => {
            let rows: Vec<_> = sandboxes.iter().flat_map(rows).collect();
            let heading = ["CONTAINER", "SANDBOX", "STATE", "AGE", "VCPUS", "MEMORY", "VMM PID"];
            output::print(&output::table(&heading, &rows))
        }
    }
}

/// A line for each container of a sandbox.
fn rows(listed: &Listed) -> Vec<Vec<String>> {
    let sandbox = &listed.summary;
    let line = |name: &str, state: String, created: u64| {
        vec![
            name.to_owned(),
            sandbox.id.clone(),
            state,
            age(created),
            sandbox.vcpus.to_string(),
            format!("{} MiB", sandbox.memory_mib),
            sandbox.vmm_pid.to_string(),
        ]
    };
    if sandbox.containers.is_empty() {
        // One that is being made, or whose containers are all gone.
        let state = if listed.alive { "empty" } else { "dead" };
        return vec![line("-", state.to_owned(), sandbox.created)];
    }
    let state = |state: sandbox::ContainerState| if listed.alive { state.to_string() } else { "dead".to_owned() };
    sandbox.containers.iter().map(|container| line(&container.id, state(container.state), container.created)).collect()
}

/// The time since then, in the largest unit that it fills.
fn age(created: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    let seconds = now.saturating_sub(created);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// `KEY=VALUE` as it is; `KEY` with the value it has here, if any.
fn environment(entries: Vec<String>) -> Vec<String> {
    let complete = |entry: String| match entry.contains('=') {
        true => Some(entry),
        false => std::env::var(&entry).ok().map(|value| format!("{entry}={value}")),
    };
    entries.into_iter().filter_map(complete).collect()
}

/// Runs a verb that ends with a command's exit status.
fn attended(program: &str, verb: impl Future<Output = Result<u32, oci::Error>>) -> Result<u8, Failure> {
    let ended = wait_for(verb).map_err(|failure| failure.with_status(OWN_FAILURE))?;
    let status = ended.map_err(|error| {
        let status = error.exit_status(program);
        failed(error).with_status(status)
    })?;
    Ok(u8::try_from(status).unwrap_or(u8::MAX))
}

fn failed(error: oci::Error) -> Failure {
    let hint = (!rustix::process::geteuid().is_root())
        .then_some("kata makes mounts, namespaces and devices; run it as root, with sudo for example");
    Failure::new(error).with_hint(hint)
}

/// Runs a future to its end on this thread.
fn wait_for<T>(future: impl Future<Output = T>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::new)?;
    let result = runtime.block_on(future);
    // A stream may still wait for somebody who won't come; it ends with this process.
    runtime.shutdown_background();
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_short() {
        let ago = |seconds: u64| age(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() - seconds);
        assert_eq!(ago(3 * 3600), "3h");
        assert_eq!(ago(50 * 86_400), "50d");
        assert_eq!(age(u64::MAX), "0s");
    }

    #[test]
    fn variables_without_a_value_take_ours() {
        let path = std::env::var("PATH").unwrap();
        let env = environment(vec!["A=b=c".into(), "PATH".into(), "NO_SUCH_VARIABLE_HERE".into()]);
        assert_eq!(env, ["A=b=c".to_owned(), format!("PATH={path}")]);
    }
}
