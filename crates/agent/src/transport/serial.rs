//! The agent's virtio-serial port: found by its name, opened once, and used for one connection after the other.
//!
//! The port is a single byte stream without connections, so they are made here:
//!
//! ```text
//!            ┌───────────── hang-up, or a new request ◀──────────┐
//!            ▼                                                   │
//!   wait for the port ─▶ wait for the host ─▶ handshake ─▶ connection
//! ```
//!
//! A host that leaves and comes back quickly may be seen as neither (the two events collapse into one state), so the
//! connection also watches for the next request where a ttrpc frame would begin.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use rustix::event::epoll;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::sync::Notify;

use super::frames::{self, Frames, Head};
use crate::uevent::Uevents;

/// Where the kernel lists the ports.
const PORTS: &str = "/sys/class/virtio-ports";

/// Waits until the port named `name` exists, and returns its device node.
///
/// # Errors
///
/// Those of the subscription to the kernel's announcements.
pub async fn find(name: &str) -> io::Result<PathBuf> {
    let uevents = Uevents::subscribe()?;
    loop {
        if let Some(device) = look(Path::new(PORTS), name) {
            return Ok(device);
        }
        // The port is announced when it appears (`add`) and once more when the host has told its name (`change`).
        while uevents.next().await?.is_some_and(|uevent| uevent.subsystem() != "virtio-ports") {}
    }
}

/// The device node of the port with that name, if the kernel lists it already.
fn look(ports: &Path, name: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir(ports).ok()?;
    entries.flatten().find_map(|entry| {
        let named = std::fs::read_to_string(entry.path().join("name")).ok()?;
        (named.trim_end() == name).then(|| Path::new("/dev").join(entry.file_name()))
    })
}

/// One direction's view of the port: tells when its state may have changed.
///
/// Tokio takes a hang-up for the end of a descriptor and reports it for ever after; here the host comes back. So the
/// port sits in an epoll instance of its own, edge-triggered, and tokio watches that instance, which never hangs up.
#[derive(Debug)]
struct Edges {
    epoll: AsyncFd<OwnedFd>,
}

impl Edges {
    fn new(port: &OwnedFd, interest: epoll::EventFlags) -> io::Result<Self> {
        let instance = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&instance, port, epoll::EventData::new_u64(0), interest | epoll::EventFlags::ET)?;
        Ok(Self { epoll: crate::sys::wait_for(instance, Interest::READABLE)? })
    }

    /// Ready when something happened since the last time it was ready; says whether the host is away now.
    fn poll(&self, context: &mut Context<'_>) -> Poll<io::Result<bool>> {
        loop {
            let mut guard = ready!(self.epoll.poll_read_ready(context))?;
            let mut events = Vec::<epoll::Event>::with_capacity(1);
            let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            match epoll::wait(self.epoll.get_ref(), rustix::buffer::spare_capacity(&mut events), Some(&now)) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Poll::Ready(Err(error.into())),
            }
            if let Some(event) = events.first() {
                // A packed struct: copy the field before using it.
                let flags = event.flags;
                return Poll::Ready(Ok(flags.contains(epoll::EventFlags::HUP)));
            }
            guard.clear_ready();
        }
    }
}

/// The opened port.
#[derive(Debug)]
pub struct Port {
    port: OwnedFd,
    readable: Edges,
    writable: Edges,
}

impl Port {
    /// Opens the port.
    ///
    /// # Errors
    ///
    /// Those of open(2); `EBUSY` when another process has it.
    pub fn open(device: &Path) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Self::new(rustix::fs::open(device, flags, Mode::empty())?)
    }

    fn new(port: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            readable: Edges::new(&port, epoll::EventFlags::IN)?,
            writable: Edges::new(&port, epoll::EventFlags::OUT)?,
            port,
        })
    }

    /// Reads what is there; waits for more, or for a host, when there is nothing.
    ///
    /// A port without a host reads as its end; `hang_up_ends` says whether that ends the stream or is waited out.
    fn poll_read(
        &self,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
        hang_up_ends: bool,
    ) -> Poll<io::Result<()>> {
        loop {
            match rustix::io::read(&self.port, buffer.initialize_unfilled()) {
                Ok(0) if hang_up_ends => return Poll::Ready(Ok(())),
                Ok(0) | Err(Errno::AGAIN) => {
                    ready!(self.readable.poll(context))?;
                }
                Ok(length) => {
                    buffer.advance(length);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    fn poll_write(&self, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            match rustix::io::write(&self.port, data) {
                Ok(length) => return Poll::Ready(Ok(length)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if ready!(self.writable.poll(context))? {
                        return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
                    }
                }
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }
}

/// What the connection read of the next one's request before it ended.
type Carried = Arc<Mutex<Vec<u8>>>;

/// The stream between connections, for the handshake: it outlasts the host's absence.
#[derive(Debug)]
pub struct Idle {
    port: Arc<Port>,
    carried: Carried,
}

impl Idle {
    /// Begins with a freshly opened port.
    pub fn new(port: Port) -> Self {
        Self { port: Arc::new(port), carried: Carried::default() }
    }

    /// Turns the stream into a connection, once the handshake is done. `ended` is notified when it is over.
    pub fn connect(&self, ended: Arc<Notify>) -> Connection {
        Connection {
            port: self.port.clone(),
            carried: self.carried.clone(),
            frames: Frames::default(),
            over: AtomicBool::new(false),
            ended,
        }
    }
}

impl AsyncRead for Idle {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut carried = self.carried.lock().unwrap_or_else(PoisonError::into_inner);
        if !carried.is_empty() {
            let length = carried.len().min(buffer.remaining());
            buffer.put_slice(&carried[..length]);
            carried.drain(..length);
            return Poll::Ready(Ok(()));
        }
        drop(carried);
        self.port.poll_read(context, buffer, false)
    }
}

impl AsyncWrite for Idle {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.port.poll_write(context, data)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// One connection over the port: ends with the host's hang-up or with its next request, and stays ended, so that a
/// writer of an old connection never writes into a new one.
#[derive(Debug)]
pub struct Connection {
    port: Arc<Port>,
    carried: Carried,
    frames: Frames,
    over: AtomicBool,
    ended: Arc<Notify>,
}

impl Connection {
    fn end(&self) {
        if !self.over.swap(true, Ordering::AcqRel) {
            self.ended.notify_one();
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            if buffer.remaining() == 0 || self.frames.take_head(buffer) {
                return Poll::Ready(Ok(()));
            }
            if self.over.load(Ordering::Acquire) {
                return Poll::Ready(Ok(()));
            }
            let body = self.frames.body_left().min(buffer.remaining());
            if body > 0 {
                let mut chunk = ReadBuf::new(buffer.initialize_unfilled_to(body));
                let result = ready!(self.port.poll_read(context, &mut chunk, true));
                let length = chunk.filled().len();
                buffer.advance(length);
                self.frames.body_read(length);
                if result.is_err() || length == 0 {
                    self.end();
                }
                return Poll::Ready(result);
            }
            let mut space = [0; frames::HEADER];
            let mut chunk = ReadBuf::new(&mut space[..self.frames.head_missing()]);
            let result = ready!(self.port.poll_read(context, &mut chunk, true));
            if result.is_err() || chunk.filled().is_empty() {
                self.end();
                return Poll::Ready(result);
            }
            if let Head::Request(bytes) = self.frames.head_read(chunk.filled()) {
                self.carried.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&bytes);
                self.end();
            }
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if self.over.load(Ordering::Acquire) {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let result = ready!(self.port.poll_write(context, data));
        if result.is_err() {
            self.end();
        }
        Poll::Ready(result)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.end();
        Poll::Ready(Ok(()))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use rustix::fs::{CWD, FileType};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn the_hosts_absence_is_waited_out() {
        // A FIFO does to its reader what the port does: an end and a hang-up without a writer, life with the next one.
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let fifo = rustix::fs::open(&path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let mut idle = Idle::new(Port::new(fifo).unwrap());
        for _ in 0..3 {
            let mut host = std::fs::File::options().write(true).open(&path).unwrap();
            host.write_all(b"hello").unwrap();
            drop(host);
            let mut read = [0; 5];
            idle.read_exact(&mut read).await.unwrap();
            assert_eq!(&read, b"hello");
            let early = tokio::time::timeout(Duration::from_millis(20), idle.read_u8()).await;
            assert!(early.is_err(), "Nobody is there, and still: {early:?}");
        }
    }

    #[tokio::test]
    async fn a_new_request_ends_the_connection_and_is_not_lost() {
        let (mut host, port) = UnixStream::pair().unwrap();
        port.set_nonblocking(true).unwrap();
        let mut idle = Idle::new(Port::new(port.into()).unwrap());
        let frame = b"\0\0\0\x03\0\0\0\x01\x01\0abc";
        for _ in 0..3 {
            host.write_all(b"CONNECT 1024\n").unwrap();
            host.write_all(frame).unwrap();
            protocol::handshake::accept(&mut idle, 1024).await.unwrap();
            let ended = Arc::new(Notify::new());
            let mut connection = idle.connect(ended.clone());
            let mut read = vec![0; frame.len()];
            connection.read_exact(&mut read).await.unwrap();
            assert_eq!(read, frame);
            host.write_all(b"CONNECT 1024\n").unwrap();
            assert_eq!(connection.read(&mut [0; 8]).await.unwrap(), 0);
            ended.notified().await;
            let late = connection.write_all(b"late").await.unwrap_err();
            assert_eq!(late.kind(), io::ErrorKind::BrokenPipe);
            protocol::handshake::accept(&mut idle, 1024).await.unwrap();
        }
    }

    #[test]
    fn the_port_is_found_by_its_name() {
        let ports = tempfile::tempdir().unwrap();
        for (node, name) in [("vport0p1", "other"), ("vport0p2", "wanted")] {
            std::fs::create_dir(ports.path().join(node)).unwrap();
            std::fs::write(ports.path().join(node).join("name"), format!("{name}\n")).unwrap();
        }
        std::fs::create_dir(ports.path().join("vport0p3")).unwrap();
        assert_eq!(look(ports.path(), "wanted"), Some(PathBuf::from("/dev/vport0p2")));
        assert_eq!(look(ports.path(), "absent"), None);
    }
}
