//! What the containers of a pod have in common: namespaces, name, resolver, storages.

mod namespaces;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use protocol::agent::CreateSandboxRequest;

use crate::init::modules;
use crate::process::children::Children;
use crate::storage::{self, Storages};
pub use namespaces::{Namespaces, Shared};

/// Why a sandbox cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A kernel module is missing.
    #[error(transparent)]
    Module(#[from] modules::Error),
    /// A storage is missing.
    #[error(transparent)]
    Storage(#[from] storage::Error),
    /// A namespace cannot be made.
    #[error("Cannot make the {kind} namespace of the sandbox")]
    Namespace {
        /// Which.
        kind: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A file of the sandbox cannot be written.
    #[error("Cannot write {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A pod's common part, while there is one.
#[derive(Debug)]
pub struct Sandbox {
    id: String,
    namespaces: Namespaces,
}

impl Sandbox {
    /// Sets the common part up. Blocks.
    ///
    /// # Errors
    ///
    /// The first step that fails; what was done before it is undone.
    pub fn set_up(
        request: &CreateSandboxRequest,
        storages: &Storages,
        children: &std::sync::Arc<Children>,
    ) -> Result<Self, Error> {
        for module in &request.kernel_modules {
            modules::load_by_name(&module.name, &module.parameters)?;
        }
        storages.acquire(&request.storages)?;
        Self::finish(request, children).inspect_err(|_| storages.release_all())
    }

    fn finish(request: &CreateSandboxRequest, children: &std::sync::Arc<Children>) -> Result<Self, Error> {
        let directory = Path::new(protocol::SANDBOX_GUEST_DIR);
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::File { path, source }
        };
        fs::create_dir_all(directory).map_err(at(directory))?;
        if !request.dns.is_empty() {
            let path = directory.join("resolv.conf");
            let mut text = request.dns.join("\n");
            text.push('\n');
            fs::write(&path, text).map_err(at(&path))?;
        }
        let namespaces = Namespaces::make(&request.hostname, request.sandbox_pidns, directory, children)?;
        Ok(Self { id: request.sandbox_id.clone(), namespaces })
    }

    /// The identifier that the host gave.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The namespaces for a container to join; with the process numbers, if `pids` asks for them.
    ///
    /// # Errors
    ///
    /// When the sandbox has no shared process numbers.
    pub fn share(&self, pids: bool) -> io::Result<Shared> {
        self.namespaces.share(pids)
    }

    /// Removes the files of the sandbox and ends its pause process.
    pub fn tear_down(self) {
        self.namespaces.end();
        let _ = fs::remove_file(Path::new(protocol::SANDBOX_GUEST_DIR).join("resolv.conf"));
    }
}
