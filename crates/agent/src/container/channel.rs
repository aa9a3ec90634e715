//! The line between the agent and a child that is becoming a container: packets on a close-on-exec socket pair, whose
//! end of file says that execve(2) has succeeded (or that the child is gone).

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType,
};

/// Where the child waits for the parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Gate {
    /// Just cloned: cgroups, id maps, the out-of-memory score.
    Cloned = 1,
    /// Mounts and devices are there, the old root too: hooks.
    Prepared = 2,
    /// All but the program itself: limits, the wait for the start.
    Ready = 3,
}

/// What the child says.
#[derive(Debug)]
pub(super) enum Message {
    /// It waits.
    At(u8),
    /// It gave up in this step of the plan.
    Failed {
        /// Index of the step.
        step: usize,
        /// Why.
        errno: Errno,
        /// What the kernel had to say beyond the number; often empty.
        note: String,
    },
    /// The master side of its terminal.
    Terminal(OwnedFd),
    /// The socket was closed: the program runs, or the child is dead.
    End,
}

const AT: u8 = 1;
const FAILED: u8 = 2;
const TERMINAL: u8 = 3;

/// The longest remark that goes with a failure.
pub(super) const NOTE_MAX: usize = 240;
const PACKET_MAX: usize = 9 + NOTE_MAX;

/// Makes the two ends.
pub(super) fn pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

/// Child: says where it is and waits to be let through. False when the parent is gone.
pub(super) fn wait_at(socket: BorrowedFd<'_>, gate: Gate) -> bool {
    if rustix::net::send(socket, &[AT, gate as u8], SendFlags::NOSIGNAL).is_err() {
        return false;
    }
    let mut answer = [0_u8; 1];
    loop {
        match rustix::net::recv(socket, &mut answer[..], RecvFlags::empty()) {
            Err(Errno::INTR) => {}
            Ok((1, _)) => return true,
            _ => return false,
        }
    }
}

/// Child: says why it ends.
pub(super) fn fail(socket: BorrowedFd<'_>, step: usize, errno: Errno, note: &[u8]) {
    let mut packet = [0_u8; PACKET_MAX];
    let step = u32::try_from(step).unwrap_or(u32::MAX).to_le_bytes();
    let errno = errno.raw_os_error().to_le_bytes();
    let bytes = [FAILED].into_iter().chain(step).chain(errno).chain(note.iter().copied());
    let mut length = 0;
    for (place, byte) in packet.iter_mut().zip(bytes) {
        *place = byte;
        length += 1;
    }
    let _ = rustix::net::send(socket, packet.get(..length).unwrap_or_default(), SendFlags::NOSIGNAL);
}

/// Child: hands the master side of its terminal over.
pub(super) fn send_terminal(socket: BorrowedFd<'_>, master: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let masters = [master];
    control.push(SendAncillaryMessage::ScmRights(&masters));
    rustix::net::sendmsg(socket, &[IoSlice::new(&[TERMINAL])], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Parent: lets the child through its gate.
pub(super) fn go(socket: BorrowedFd<'_>) -> Result<(), Errno> {
    rustix::net::send(socket, &[1], SendFlags::NOSIGNAL).map(drop)
}

/// Parent: waits for what the child says next.
///
/// # Errors
///
/// `ETIMEDOUT` when it has said nothing until the deadline.
pub(super) fn receive(socket: BorrowedFd<'_>, deadline: Instant) -> Result<Message, Errno> {
    wait_readable(socket, deadline)?;
    let mut packet = [0_u8; PACKET_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = match rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut packet)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    ) {
        // Closed with an answer of ours unread.
        Err(Errno::CONNRESET) => return Ok(Message::End),
        result => result?,
    };
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    let packet = packet.get(..received.bytes).unwrap_or_default();
    match (packet, descriptor) {
        ([], _) => Ok(Message::End),
        ([AT, gate], _) => Ok(Message::At(*gate)),
        ([TERMINAL], Some(master)) => Ok(Message::Terminal(master)),
        ([FAILED, s0, s1, s2, s3, e0, e1, e2, e3, note @ ..], _) => Ok(Message::Failed {
            step: u32::from_le_bytes([*s0, *s1, *s2, *s3]) as usize,
            errno: Errno::from_raw_os_error(i32::from_le_bytes([*e0, *e1, *e2, *e3]).clamp(1, 4095)),
            note: String::from_utf8_lossy(note).trim().to_owned(),
        }),
        _ => Err(Errno::PROTO),
    }
}

/// Waits until something can be read, or its end be seen.
pub(super) fn wait_readable(descriptor: BorrowedFd<'_>, deadline: Instant) -> Result<(), Errno> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
        let mut polled = [PollFd::from_borrowed_fd(descriptor.as_fd(), PollFlags::IN)];
        match rustix::event::poll(&mut polled, Some(&timeout)) {
            Ok(0) => return Err(Errno::TIMEDOUT),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}
