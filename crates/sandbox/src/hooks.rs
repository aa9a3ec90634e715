//! The hooks of a container that run on the host; see the OCI runtime specification, config.md, "POSIX-platform Hooks".

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use oci_spec::runtime::{Hook, Spec};
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::Error;

/// How long a hook may take that names no time-out of its own: none may hold a container for ever.
const LIMIT: Duration = Duration::from_secs(60);

/// A point of a container's life at which hooks run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Point {
    /// After the sandbox is there and before the container is: `prestart`, `createRuntime` and `createContainer`.
    Create,
    /// After the command was started.
    Started,
    /// After the container was deleted.
    Stopped,
}

/// Runs the hooks of a point, in their order.
///
/// # Errors
///
/// The first hook that fails. At [`Point::Started`] and [`Point::Stopped`] the caller goes on all the same, as the
/// specification has it.
pub(crate) async fn run(point: Point, spec: &Spec, id: &str, bundle: &Path, pid: u32) -> Result<(), Error> {
    let Some(hooks) = spec.hooks() else { return Ok(()) };
    #[allow(deprecated)]
    let (status, lists) = match point {
        Point::Create => ("creating", vec![hooks.prestart(), hooks.create_runtime(), hooks.create_container()]),
        Point::Started => ("running", vec![hooks.poststart()]),
        Point::Stopped => ("stopped", vec![hooks.poststop()]),
    };
    let state = json!({
        "ociVersion": spec.version(),
        "id": id,
        "status": status,
        "pid": pid,
        "bundle": bundle,
        "annotations": spec.annotations(),
    })
    .to_string();
    for hook in lists.into_iter().flatten().flatten() {
        one(hook, &state).await?;
    }
    Ok(())
}

async fn one(hook: &Hook, state: &str) -> Result<(), Error> {
    let path = hook.path();
    let failed = |reason: String| Error::Hook { path: path.clone(), reason };
    let mut command = Command::new(path);
    if let Some((name, args)) = hook.args().as_ref().and_then(|args| args.split_first()) {
        command.arg0(name).args(args);
    }
    command.env_clear();
    for entry in hook.env().iter().flatten() {
        let (key, value) = entry.split_once('=').unwrap_or((entry, ""));
        command.env(key, value);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| failed(error.to_string()))?;
    let limit = hook.timeout().and_then(|secs| u64::try_from(secs).ok()).map_or(LIMIT, Duration::from_secs);
    let end = async {
        let stdin = child.stdin.take();
        // A hook need not read its input, and may write before it does.
        let say = async {
            if let Some(mut stdin) = stdin {
                drop(stdin.write_all(state.as_bytes()).await);
            }
        };
        tokio::join!(say, child.wait_with_output()).1
    };
    let output = tokio::time::timeout(limit, end)
        .await
        .map_err(|_| failed(format!("it took longer than {} s", limit.as_secs())))?
        .map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(failed(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(script: &str, timeout: i64) -> Hook {
        serde_json::from_value(json!({ "path": "/bin/sh", "args": ["sh", "-c", script], "timeout": timeout })).unwrap()
    }

    #[tokio::test]
    async fn a_hook_reads_the_state_and_its_failure_is_told() {
        one(&hook("read line; test \"$line\" = the-state", 10), "the-state\n").await.unwrap();
        let error = one(&hook("echo why >&2; exit 3", 10), "{}").await.unwrap_err();
        assert!(error.to_string().contains("why") && error.to_string().contains('3'), "{error}");
    }

    #[tokio::test]
    async fn a_hook_that_reads_nothing_holds_nobody_beyond_its_time() {
        let large = "x".repeat(1 << 20);
        one(&hook("exit 0", 10), &large).await.unwrap();
        let error = one(&hook("exec sleep 100", 1), &large).await.unwrap_err();
        assert!(error.to_string().contains("longer than 1 s"), "{error}");
    }
}
