//! QEMU's monitor protocol: JSON, one message a line, over a unix socket that carries descriptors as well.
//!
//! ```text
//!   connect: greeting ◀─  qmp_capabilities ─▶  ◀─ return
//!   execute: {"execute": …, "id": n} [+ descriptors] ─▶    ◀─ {"return"|"error": …, "id": n}
//!   events come between the answers and go to every subscriber
//!   end of stream, a line that is no JSON: every pending call fails, and so does each later one
//! ```
//!
//! <https://www.qemu.org/docs/master/interop/qmp-spec.html>

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Map, Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, oneshot};
use tokio::time::timeout;

/// The longest line QEMU may send: its longest answers (device and CPU lists) are some ten KiB.
const LONGEST_LINE: u64 = 4 * 1024 * 1024;

/// Events a slow subscriber may be behind before it loses the oldest.
const EVENT_BACKLOG: usize = 256;

/// Why a command has no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QmpError {
    /// QEMU said no.
    #[error("{description}")]
    Refused {
        /// `GenericError`, `DeviceNotFound`, …
        class: String,
        /// In QEMU's words.
        description: String,
    },
    /// The stream has ended: QEMU is gone or about to be.
    #[error("Monitor is closed")]
    Closed,
    /// What came is not the protocol.
    #[error("{0}")]
    Protocol(String),
    /// No answer in time.
    #[error("No answer within {} s", .0.as_secs_f32())]
    Timeout(Duration),
}

/// Something that QEMU told unasked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Event {
    /// `SHUTDOWN`, `DEVICE_DELETED`, …
    pub(crate) name: String,
    /// Its details; null if it has none.
    pub(crate) data: Value,
}

type Answer = Result<Value, QmpError>;

/// A connected monitor. Calls may overlap.
#[derive(Debug)]
pub(crate) struct Qmp {
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    shared: Arc<Shared>,
    next_id: AtomicU64,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    pending: HashMap<u64, oneshot::Sender<Answer>>,
    /// Dropped at the end of the stream, which ends the subscribers' receivers.
    events: Option<broadcast::Sender<Event>>,
    /// Set when the stream has ended; holds what was wrong if it ended by something that isn't the protocol.
    ended: Option<Option<String>>,
}

impl Qmp {
    /// Reads the greeting, and leaves the negotiation mode within `limit`.
    pub(crate) async fn connect(stream: UnixStream, limit: Duration) -> Result<Qmp, QmpError> {
        let (reader, writer) = stream.into_split();
        let mut reader = BufReader::new(reader);
        let greeting = timeout(limit, read_message(&mut reader)).await.map_err(|_| QmpError::Timeout(limit))??;
        if greeting.as_ref().and_then(|message| message.get("QMP")).is_none() {
            return Err(match greeting {
                None => QmpError::Closed,
                Some(_) => QmpError::Protocol("the monitor does not greet as QMP does".to_owned()),
            });
        }
        let (events, _) = broadcast::channel(EVENT_BACKLOG);
        let state = State { pending: HashMap::new(), events: Some(events), ended: None };
        let shared = Arc::new(Shared { state: Mutex::new(state) });
        tokio::spawn(read_all(reader, Arc::clone(&shared)));
        let qmp = Qmp { writer: tokio::sync::Mutex::new(writer), shared, next_id: AtomicU64::new(1) };
        qmp.execute("qmp_capabilities", json!({}), limit).await?;
        Ok(qmp)
    }

    /// Runs a command and returns its result.
    pub(crate) async fn execute(&self, command: &str, arguments: Value, limit: Duration) -> Answer {
        self.execute_with(command, arguments, &[], limit).await
    }

    /// Runs a command that takes descriptors; QEMU gets copies.
    pub(crate) async fn execute_with(
        &self,
        command: &str,
        arguments: Value,
        fds: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Answer {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let mut line = json!({ "execute": command, "id": id });
        if arguments.as_object().is_some_and(|arguments| !arguments.is_empty()) {
            line["arguments"] = arguments;
        }
        let mut line = line.to_string();
        line.push('\n');
        let (answer, answered) = oneshot::channel();
        {
            let mut state = self.shared.state();
            if let Some(why) = &state.ended {
                return Err(ended(why));
            }
            state.pending.insert(id, answer);
        }
        let outcome = timeout(limit, async {
            self.send(line.as_bytes(), fds).await.map_err(|_| QmpError::Closed)?;
            answered.await.unwrap_or(Err(QmpError::Closed))
        })
        .await;
        outcome.unwrap_or_else(|_| {
            // A late answer finds nobody and is dropped.
            self.shared.state().pending.remove(&id);
            Err(QmpError::Timeout(limit))
        })
    }

    /// Events from now on, to the end of the stream.
    pub(crate) fn events(&self) -> broadcast::Receiver<Event> {
        match &self.shared.state().events {
            Some(events) => events.subscribe(),
            None => broadcast::channel(1).1,
        }
    }

    async fn send(&self, line: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let writer = self.writer.lock().await;
        let stream: &UnixStream = writer.as_ref();
        let mut sent = 0;
        while sent < line.len() {
            stream.writable().await?;
            let rest = &line[sent..];
            // The descriptors go with the first byte: QEMU keeps them for the command that follows.
            let rights = if sent == 0 { fds } else { &[] };
            match stream.try_io(Interest::WRITABLE, || send_some(stream.as_fd(), rest, rights)) {
                Ok(count) => sent += count,
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
                Err(err) => return Err(err),
            }
        }
        Ok(())
    }
}

fn send_some(stream: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !rights.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "more than 16 descriptors for one command"));
    }
    Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut rights, SendFlags::NOSIGNAL)?)
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // The lock is held for single map operations, none of which can panic half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails what is pending and what will be asked.
    fn end(&self, why: Option<String>) {
        let mut state = self.state();
        for (_, answer) in state.pending.drain() {
            let _ = answer.send(Err(ended(&why)));
        }
        state.events = None;
        state.ended = Some(why);
    }

    fn dispatch(&self, mut message: Map<String, Value>) {
        if let Some(Value::String(name)) = message.remove("event") {
            let data = message.remove("data").unwrap_or(Value::Null);
            if let Some(events) = &self.state().events {
                // Nobody listening is fine.
                let _ = events.send(Event { name, data });
            }
            return;
        }
        let Some(id) = message.get("id").and_then(Value::as_u64) else {
            // An error without an id answers a line that QEMU couldn't parse; its caller runs into the deadline.
            tracing::warn!(?message, "The monitor said something that answers nothing");
            return;
        };
        let Some(answer) = self.state().pending.remove(&id) else { return };
        let result = match message.remove("return") {
            Some(value) => Ok(value),
            None => {
                let text = |key: &str| {
                    let text = message.get("error").and_then(|error| error.get(key)).and_then(Value::as_str);
                    text.unwrap_or("unknown error").to_owned()
                };
                Err(QmpError::Refused { class: text("class"), description: text("desc") })
            }
        };
        let _ = answer.send(result);
    }
}

fn ended(why: &Option<String>) -> QmpError {
    why.as_ref().map_or(QmpError::Closed, |why| QmpError::Protocol(why.clone()))
}

async fn read_all(mut reader: BufReader<OwnedReadHalf>, shared: Arc<Shared>) {
    let why = loop {
        match read_message(&mut reader).await {
            Ok(Some(message)) => shared.dispatch(message),
            Ok(None) | Err(QmpError::Closed) => break None,
            Err(err) => break Some(err.to_string()),
        }
    };
    shared.end(why);
}

/// The next line as an object; `None` at the end of the stream.
async fn read_message(reader: &mut BufReader<OwnedReadHalf>) -> Result<Option<Map<String, Value>>, QmpError> {
    let mut line = Vec::new();
    // An error of the socket is as good as its end.
    let length = reader.take(LONGEST_LINE).read_until(b'\n', &mut line).await.unwrap_or(0);
    if length == 0 || (line.last() != Some(&b'\n') && (line.len() as u64) < LONGEST_LINE) {
        return Ok(None);
    }
    serde_json::from_slice(&line).map(Some).map_err(|err| {
        let start: String = String::from_utf8_lossy(&line).chars().take(80).collect();
        QmpError::Protocol(format!("{start:?} is no QMP message: {err}"))
    })
}

#[cfg(test)]
#[path = "qmp_tests.rs"]
mod tests;
