//! The pumps, and knowing when output is delivered.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tracing::{debug, warn};

use super::paths::{Opened, Readers, Sink, Source, fresh_reader, writing_end};
use crate::fault::Fault;
use crate::pod::Pod;

/// How much is moved at once: a pipe's worth.
const CHUNK: usize = 64 << 10;

/// After a process has ended: how long its output may be silent before it is taken for complete. Something it left
/// running may hold the stream open for ever.
const SILENCE: Duration = Duration::from_secs(2);

/// After a process has ended: how long one chunk may wait for a reader.
const STUCK: Duration = Duration::from_secs(10);

/// How long a client that is killed takes to close all its descriptors.
const LEAVING: Duration = Duration::from_millis(100);

/// Which output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Output {
    Stdout,
    Stderr,
}

/// What the output pumps are doing.
#[derive(Debug, Clone, Copy, Default)]
struct Flow {
    /// Pumps that have not seen the end.
    open: u32,
    /// Pumps that wait for a reader.
    waiting: u32,
}

/// The flowing streams of a started process.
#[derive(Debug)]
pub(crate) struct Streams {
    flow: watch::Sender<Flow>,
    input: Option<AbortHandle>,
    outputs: Vec<AbortHandle>,
}

impl Streams {
    /// Starts the pumps of a process.
    pub(crate) fn start(opened: Opened, pod: &Arc<dyn Pod>, id: &str, exec: &str) -> Arc<Streams> {
        let flow = watch::Sender::new(Flow::default());
        let guest = |pod| Guest { pod: Arc::clone(pod), id: id.to_owned(), exec: exec.to_owned() };

        let client = opened.client();
        let stdin = guest(pod).write_all_of(opened.stdin, opened.terminal, opened.close.subscribe(), client);
        let input = Some(tokio::spawn(stdin).abort_handle());
        let mut outputs = Vec::new();
        // A terminal has one output.
        let wanted = if opened.terminal { 1 } else { 2 };
        for (output, sink) in
            [(Output::Stdout, opened.stdout), (Output::Stderr, opened.stderr)].into_iter().take(wanted)
        {
            flow.send_modify(|flow| flow.open += 1);
            let pump = guest(pod).read_all_of(output, sink, flow.clone());
            outputs.push(tokio::spawn(pump).abort_handle());
        }
        Arc::new(Streams { flow, input, outputs })
    }

    /// Waits, after the process has ended, until its output is delivered, or nothing has come for a while.
    pub(crate) async fn drained(&self) {
        if let Some(input) = &self.input {
            input.abort();
        }
        let mut flow = self.flow.subscribe();
        loop {
            let Flow { open, waiting } = *flow.borrow_and_update();
            if open == 0 {
                return;
            }
            let patience = if waiting > 0 { STUCK } else { SILENCE };
            if tokio::time::timeout(patience, flow.changed()).await.is_err() {
                return;
            }
        }
    }

    /// Stops all pumps: nothing is to come any more.
    pub(crate) fn abort(&self) {
        self.input.iter().chain(&self.outputs).for_each(AbortHandle::abort);
    }
}

/// The process at the other side.
struct Guest {
    pod: Arc<dyn Pod>,
    id: String,
    exec: String,
}

impl Guest {
    async fn read_all_of(self, output: Output, mut sink: Sink, flow: watch::Sender<Flow>) {
        loop {
            let read = match output {
                Output::Stdout => self.pod.read_stdout(&self.id, &self.exec, CHUNK as u32).await,
                Output::Stderr => self.pod.read_stderr(&self.id, &self.exec, CHUNK as u32).await,
            };
            let data = match read {
                Ok(Some(data)) => data,
                Ok(None) => break,
                Err(fault) => {
                    debug!(container = self.id, exec = self.exec, ?output, error = fault.message, "Output ended");
                    break;
                }
            };
            flow.send_modify(|flow| flow.waiting += 1);
            let written = sink.write_all(&data).await;
            flow.send_modify(|flow| flow.waiting -= 1);
            if let Err(error) = written {
                // A full disk behind file://, say. The process must not hang for it, nor go on unseen.
                warn!(container = self.id, exec = self.exec, ?output, %error, "Output is lost from here on");
                sink.close();
            }
        }
        // The reader sees the end when our descriptors close; only then is the output delivered.
        sink.close();
        flow.send_modify(|flow| flow.open -= 1);
    }

    async fn write_all_of(self, source: Source, terminal: bool, close: watch::Receiver<bool>, client: Option<Readers>) {
        let ended = match source {
            Source::None => Ok(()),
            Source::Fifo(reader) => self.copy_fifo(reader, close, client).await,
            Source::File(file) => self.copy_file(file).await,
        };
        if let Err(fault) = ended {
            debug!(container = self.id, exec = self.exec, error = fault.message, "Input is not taken any more");
            return;
        }
        // A terminal has no end of input of its own: what ends it is a character its user types.
        if terminal {
            return;
        }
        if let Err(fault) = self.pod.close_stdin(&self.id, &self.exec).await {
            debug!(container = self.id, exec = self.exec, error = fault.message, "Cannot close the input");
        }
    }

    /// Copies until the engine closes the input (`close`) and the FIFO is empty, or the client ends it.
    ///
    /// All writers gone may mean two things. The client has come to the end of its own input: it still reads the
    /// output, and then this is the end. Or it has left, to come back or to be followed by another: then the input
    /// stays open, as engines expect of a shim.
    async fn copy_fifo(
        &self,
        mut reader: pipe::Receiver,
        mut close: watch::Receiver<bool>,
        client: Option<Readers>,
    ) -> Result<(), Fault> {
        let mut buffer = vec![0; CHUNK];
        let mut keep = None;
        loop {
            let ready = tokio::select! {
                biased;
                ready = reader.readable() => ready,
                _ = close.wait_for(|close| *close) => break,
            };
            ready.map_err(io)?;
            match reader.try_read(&mut buffer) {
                Ok(0) => {
                    // One that is killed closes its descriptors one after the other.
                    if tokio::time::timeout(LEAVING, close.wait_for(|close| *close)).await.is_ok() {
                        break;
                    }
                    if client.as_ref().and_then(Readers::any) == Some(true) {
                        return Ok(());
                    }
                    // Our own writing end until the next client writes: without it the FIFO stays at its end.
                    keep = Some(writing_end(reader.as_fd()).map_err(io)?);
                    reader = fresh_reader(reader.as_fd()).map_err(io)?;
                }
                Ok(count) => {
                    keep = None;
                    self.write(&buffer[..count]).await?;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(io(error)),
            }
        }
        // Whoever asked to close has written all it had. What is there is read past the runtime's idea of readiness,
        // which may be older than the request.
        drop(keep);
        loop {
            match rustix::io::read(&reader, &mut buffer) {
                Ok(0) | Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Ok(count) => self.write(&buffer[..count]).await?,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Fault::internal(&error)),
            }
        }
    }

    async fn copy_file(&self, mut file: File) -> Result<(), Fault> {
        let mut buffer = vec![0; CHUNK];
        loop {
            match file.read(&mut buffer).map_err(io)? {
                0 => return Ok(()),
                count => self.write(&buffer[..count]).await?,
            }
        }
    }

    async fn write(&self, mut data: &[u8]) -> Result<(), Fault> {
        while !data.is_empty() {
            let taken = self.pod.write_stdin(&self.id, &self.exec, data.to_vec()).await?;
            let taken = usize::try_from(taken).unwrap_or(usize::MAX);
            if taken == 0 || taken > data.len() {
                // The guest's word is not to be followed out of the buffer.
                return Err(Fault::invalid(format!("The guest says it took {taken} of {} bytes", data.len())));
            }
            data = &data[taken..];
        }
        Ok(())
    }
}

fn io(error: std::io::Error) -> Fault {
    Fault::internal(&error)
}

impl Sink {
    async fn write_all(&mut self, data: &[u8]) -> std::io::Result<()> {
        match self {
            Sink::Nowhere => Ok(()),
            Sink::Fifo(fifo, _) => fifo.write_all(data).await,
            Sink::File(file) => std::io::Write::write_all(file, data),
        }
    }

    /// Closes every descriptor of it, so that its reader finds the end.
    fn close(&mut self) {
        if let Sink::Fifo(_, readers) = self {
            readers.close();
        }
        *self = Sink::Nowhere;
    }
}
