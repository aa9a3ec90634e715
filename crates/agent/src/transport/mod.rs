//! The ways to reach the agent's services: a virtio-serial port, vsock, and an address given for tests.
//!
//! All of them deliver connections into one queue, which the ttrpc server takes for its listener; so every transport
//! serves the same services at the same time.

mod frames;
pub mod serial;

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_core::Stream;
use tokio::sync::{Notify, mpsc};
use ttrpc::r#async::transport::{Listener, Socket};

/// The environment variable with an address to serve on: `unix://path`, `unix://@abstract` or `vsock://cid:port`.
pub const ADDRESS_VARIABLE: &str = "KATA_AGENT_SERVER_ADDR";

/// Connections that may wait until the server takes them.
const BACKLOG: usize = 16;

/// The queue's end where the transports put connections.
#[derive(Debug, Clone)]
pub struct Door {
    queue: mpsc::Sender<io::Result<Socket>>,
}

/// The queue's end that the server listens to.
#[derive(Debug)]
struct Queue(mpsc::Receiver<io::Result<Socket>>);

impl Stream for Queue {
    type Item = io::Result<Socket>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context)
    }
}

/// Makes the queue: the transports' end, and the listener for `Server::add_listener` of ttrpc.
pub fn queue() -> (Door, Listener) {
    let (queue, receiver) = mpsc::channel(BACKLOG);
    (Door { queue }, Listener::new(Queue(receiver)))
}

impl Door {
    /// Serves on the address for as long as the agent lives.
    ///
    /// # Errors
    ///
    /// Those of binding: the address is not understood or not free.
    pub fn serve_address(&self, address: &str) -> io::Result<()> {
        let mut listener = Listener::bind(address)?;
        let queue = self.queue.clone();
        tokio::spawn(async move {
            while let Some(connection) =
                std::future::poll_fn(|context| Pin::new(&mut listener).poll_next(context)).await
            {
                if queue.send(connection).await.is_err() {
                    return;
                }
            }
        });
        Ok(())
    }

    /// Serves on every vsock context of this machine, if it has vsock.
    ///
    /// # Errors
    ///
    /// Those of binding.
    pub fn serve_vsock(&self) -> io::Result<()> {
        if !Path::new("/dev/vsock").exists() {
            return Ok(());
        }
        self.serve_address(&format!("vsock://-1:{}", protocol::AGENT_PORT))
    }

    /// Serves on the virtio-serial port, one connection after the other. Returns only when the port fails.
    ///
    /// # Errors
    ///
    /// Those of finding, opening and reading the port.
    pub async fn serve_serial(&self) -> io::Result<()> {
        let device = serial::find(protocol::AGENT_SERIAL_PORT).await?;
        let mut idle = serial::Idle::new(serial::Port::open(&device)?);
        tracing::info!(device = %device.display(), "Serving on the control channel");
        loop {
            match protocol::handshake::accept(&mut idle, protocol::AGENT_PORT).await {
                Ok(()) => {}
                // The host left between its request and our answer.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => continue,
                Err(error) => return Err(error),
            }
            let ended = Arc::new(Notify::new());
            let connection = idle.connect(ended.clone());
            if self.queue.send(Ok(Socket::new(connection))).await.is_err() {
                return Ok(());
            }
            ended.notified().await;
            tracing::info!("The host left the control channel");
        }
    }
}
