//! The agent's ttrpc services: thin methods that check, translate, and hand over to the rooms that do the work.

mod containers;
mod copy_file;
mod core;
mod guest;
mod id;
mod io;
mod service;
pub mod status;
mod user;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{mpsc, watch};
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

use crate::process::children::Children;
use crate::sandbox::Sandbox;
use crate::storage::Storages;
use containers::Entry;

/// Out-of-memory events that wait for somebody to ask for them; more than that tell nothing new.
const OOM_BACKLOG: usize = 64;

/// The state behind the services.
#[derive(Debug)]
pub struct Agent {
    children: Arc<Children>,
    storages: Storages,
    sandbox: Mutex<SandboxState>,
    containers: Mutex<HashMap<String, Arc<Entry>>>,
    oom: mpsc::Sender<String>,
    oom_events: tokio::sync::Mutex<mpsc::Receiver<String>>,
    ready: watch::Receiver<bool>,
}

/// Whether there is a sandbox.
///
/// ```text
///   None ──CreateSandbox──▶ Changing ──▶ Some ──DestroySandbox──▶ Changing ──▶ None
/// ```
#[derive(Debug)]
enum SandboxState {
    None,
    Changing,
    Some(Sandbox),
}

/// A lock whose critical sections do not panic halfway through a change.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Agent {
    /// An agent without sandbox and containers. What touches containers waits until `ready` is true.
    pub fn new(children: Arc<Children>, ready: watch::Receiver<bool>) -> Arc<Self> {
        let (oom, oom_events) = mpsc::channel(OOM_BACKLOG);
        Arc::new(Self {
            children,
            storages: Storages::default(),
            sandbox: Mutex::new(SandboxState::None),
            containers: Mutex::default(),
            oom,
            oom_events: tokio::sync::Mutex::new(oom_events),
            ready,
        })
    }

    /// Serves the connections of a listener.
    ///
    /// # Errors
    ///
    /// When the server cannot be started.
    pub async fn serve(self: &Arc<Self>, listener: Listener) -> ttrpc::Result<Server> {
        let service = Arc::new(service::Service::new(self.clone()));
        let mut server = Server::new()
            .register_service(protocol::agent_ttrpc::create_agent_service(service.clone()))
            .register_service(protocol::health_ttrpc::create_health(service))
            .add_listener(listener);
        server.start().await?;
        Ok(server)
    }

    /// Waits until the guest is set up.
    async fn ready(&self) {
        // The sender is gone only when the agent ends.
        let _ = self.ready.clone().wait_for(|ready| *ready).await;
    }
}
