//! `kata delete`: a container and what it held.

use sandbox::ContainerState;

use crate::find::{Found, find};
use crate::run::{END, check_name, clean_up, ended, sigkill};
use crate::server::{self, Server};
use crate::task::Task;
use crate::{Error, bundle};

/// Deletes a container; with `force`, kills it first, and cleans up even when its shim is gone.
///
/// # Errors
///
/// There is no such container, it runs and `force` was not given, or something of it could not be removed.
pub async fn delete(container: &str, force: bool) -> Result<(), Error> {
    let found = match find(container) {
        Err(Error::Unknown(name)) if force => return leftovers(&name),
        found => found?,
    };
    if force { delete_by_force(&found).await } else { delete_ended(&found).await }
}

async fn delete_ended(found: &Found) -> Result<(), Error> {
    let task = Task::of_sandbox(&found.sandbox, &found.container).await?;
    if matches!(found.state, ContainerState::Running | ContainerState::Paused) {
        return Err(Error::Running(found.container.clone()));
    }
    let server = Server::find(&found.sandbox);
    task.delete("").await?;
    // It goes on for the other containers of its pod, if there are any.
    task.shutdown(false).await;
    if found.sandbox == found.container
        && let Some(server) = server
    {
        server.wait(END);
    }
    bundle::remove(&found.container)
}

async fn delete_by_force(found: &Found) -> Result<(), Error> {
    let gone = || clean_up(&found.sandbox, &found.bundle);
    let Some(server) = Server::find(&found.sandbox) else { return gone() };
    let Ok(task) = Task::of_sandbox(&found.sandbox, &found.container).await else { return gone() };
    // One that has ended already cannot be killed, and need not be.
    drop(task.kill("", sigkill(), true).await);
    if !ended(&task, END).await || task.delete("").await.is_err() {
        return gone();
    }
    // A pod's first container is the pod.
    let whole = found.sandbox == found.container;
    task.shutdown(whole).await;
    if whole && (!server.wait(END) || server::dir(&found.sandbox).exists()) {
        return gone();
    }
    bundle::remove(&found.container)
}

/// Removes what is left under a name that no sandbox shows any more: a journal, a bundle, or both.
fn leftovers(name: &str) -> Result<(), Error> {
    check_name(name)?;
    let bundle = bundle::dir(name);
    if !server::dir(name).exists() && !bundle.exists() {
        return Err(Error::Unknown(name.to_owned()));
    }
    clean_up(name, &bundle)
}
