//! The standard streams of a container's process, as the host reads and writes them: straight out of and into the pipe.
//!
//! Nothing is buffered here, so a host that does not read makes the container wait, and memory stays bounded.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The most one read returns, whatever the host asks for: a ttrpc message holds 4 MiB.
const READ_MAX: usize = 1 << 20;

/// An output of a process, or the master side of its terminal.
#[derive(Debug)]
pub struct Output {
    fd: AsyncFd<OwnedFd>,
}

impl Output {
    /// Takes a pipe's or terminal's descriptor and makes it non-blocking.
    ///
    /// # Errors
    ///
    /// When it cannot be waited for.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self { fd: crate::sys::wait_for(fd, Interest::READABLE)? })
    }

    /// Waits for data and returns up to `length` bytes of it; `None` at the end.
    ///
    /// Cancelling loses nothing: bytes are taken only when they are returned.
    ///
    /// # Errors
    ///
    /// Those of read(2).
    pub async fn read(&self, length: usize) -> io::Result<Option<Vec<u8>>> {
        loop {
            let mut ready = self.fd.readable().await?;
            match self.take(length) {
                Ok(data) => return Ok(data),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                Err(error) => return Err(error),
            }
        }
    }

    fn take(&self, length: usize) -> io::Result<Option<Vec<u8>>> {
        let mut data = Vec::with_capacity(self.size_hint(length));
        loop {
            match rustix::io::read(&self.fd, rustix::buffer::spare_capacity(&mut data)) {
                // The other side of a terminal is closed: what a terminal has for an end.
                Ok(0) | Err(Errno::IO) => return Ok(None),
                Ok(_) => return Ok(Some(data)),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// As much room as there are bytes to read, so that a small write does not cost a large buffer.
    fn size_hint(&self, length: usize) -> usize {
        let waiting = rustix::io::ioctl_fionread(&self.fd).unwrap_or(0);
        usize::try_from(waiting).unwrap_or(READ_MAX).max(4096).min(length.clamp(1, READ_MAX))
    }

    /// The descriptor, for what is asked of a terminal.
    pub fn as_terminal(&self) -> impl AsFd + '_ {
        self.fd.get_ref()
    }
}

/// The input of a process.
#[derive(Debug)]
pub struct Input {
    /// Writers one after the other, so that the bytes of two requests do not mix.
    turn: tokio::sync::Mutex<()>,
    fd: Mutex<Option<std::sync::Arc<AsyncFd<OwnedFd>>>>,
}

/// Why bytes could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The input was closed by the host, or the process has closed its side.
    #[error("The input of the process is closed")]
    Closed,
    /// Anything else.
    #[error("Cannot write to the process")]
    Io(#[source] io::Error),
}

impl Input {
    /// Takes a pipe's or terminal's descriptor and makes it non-blocking; without one the input is closed.
    ///
    /// # Errors
    ///
    /// When it cannot be waited for.
    pub fn new(fd: Option<OwnedFd>) -> io::Result<Self> {
        let fd = match fd {
            Some(fd) => {
                rustix::io::ioctl_fionbio(&fd, true)?;
                Some(std::sync::Arc::new(crate::sys::wait_for(fd, Interest::WRITABLE)?))
            }
            None => None,
        };
        Ok(Self { turn: tokio::sync::Mutex::new(()), fd: Mutex::new(fd) })
    }

    /// Writes all of `data`, waiting while the pipe is full; returns how many bytes were taken, fewer than all only if
    /// the process closed its side meanwhile.
    ///
    /// # Errors
    ///
    /// [`WriteError::Closed`] when nothing can be taken any more.
    pub async fn write(&self, data: &[u8]) -> Result<usize, WriteError> {
        let _turn = self.turn.lock().await;
        let Some(fd) = self.fd.lock().unwrap_or_else(PoisonError::into_inner).clone() else {
            return Err(WriteError::Closed);
        };
        let mut taken = 0;
        while taken < data.len() {
            let mut ready = fd.writable().await.map_err(WriteError::Io)?;
            match rustix::io::write(&*fd, &data[taken..]) {
                Ok(length) => taken += length,
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                Err(_) if taken > 0 => break,
                Err(Errno::PIPE | Errno::IO) => return Err(WriteError::Closed),
                Err(error) => return Err(WriteError::Io(error.into())),
            }
        }
        Ok(taken)
    }

    /// Closes the input after the writes that came before, so that the process reads its end. Closing twice is fine.
    pub async fn close(&self) {
        let _turn = self.turn.lock().await;
        self.fd.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn pipe() -> (OwnedFd, OwnedFd) {
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
    }

    #[tokio::test]
    async fn what_was_written_before_the_end_is_read_after_it() {
        let (read, write) = pipe();
        rustix::io::write(&write, b"last words").unwrap();
        drop(write);
        let output = Output::new(read).unwrap();
        assert_eq!(output.read(4).await.unwrap().unwrap(), b"last");
        assert_eq!(output.read(64).await.unwrap().unwrap(), b" words");
        assert_eq!(output.read(64).await.unwrap(), None);
        assert_eq!(output.read(64).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_full_pipe_is_waited_for_and_no_byte_is_lost() {
        let (read, write) = pipe();
        let input = Arc::new(Input::new(Some(write)).unwrap());
        let data: Vec<u8> = (0..1_000_000_u32).map(|number| number.to_le_bytes()[0]).collect();
        let expected = data.clone();
        let writer = tokio::spawn(async move {
            let taken = input.write(&data).await.unwrap();
            input.close().await;
            taken
        });
        let output = Output::new(read).unwrap();
        let mut got = Vec::new();
        while let Some(piece) = output.read(100_000).await.unwrap() {
            got.extend_from_slice(&piece);
        }
        assert_eq!(writer.await.unwrap(), expected.len());
        assert_eq!(got, expected);
    }

    #[tokio::test]
    async fn a_closed_reader_is_an_error_and_so_is_a_closed_input() {
        let (read, write) = pipe();
        let input = Input::new(Some(write)).unwrap();
        drop(read);
        assert!(matches!(input.write(b"x").await, Err(WriteError::Closed)));
        input.close().await;
        assert!(matches!(input.write(b"x").await, Err(WriteError::Closed)));
    }
}
