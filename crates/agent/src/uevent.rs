//! The kernel's announcements of devices (netlink(7), `NETLINK_KOBJECT_UEVENT`): what is waited for instead of polling.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, netlink};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The multicast group of the kernel's own messages, as opposed to udev's.
const KERNEL_GROUP: u32 = 1;

/// One announcement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uevent {
    /// What happened: `add`, `change`, `remove`, `online`, …
    pub action: String,
    /// The device below `/sys`, with a leading slash.
    pub device: String,
    /// The `KEY=value` pairs that came with it.
    pub variables: HashMap<String, String>,
}

impl Uevent {
    /// Parses a message: `action@device`, then pairs, each ended by a zero byte. `None` for what is not of that form.
    fn parse(message: &[u8]) -> Option<Self> {
        let mut parts = message.split(|byte| *byte == 0);
        let head = std::str::from_utf8(parts.next()?).ok()?;
        let (action, device) = head.split_once('@')?;
        let variables = parts
            .filter_map(|pair| std::str::from_utf8(pair).ok()?.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        Some(Self { action: action.to_owned(), device: device.to_owned(), variables })
    }

    /// The kernel subsystem that the device belongs to.
    pub fn subsystem(&self) -> &str {
        self.variables.get("SUBSYSTEM").map_or("", String::as_str)
    }
}

/// A subscription. Make it before looking at sysfs, so that nothing falls between looking and waiting.
#[derive(Debug)]
pub struct Uevents {
    socket: AsyncFd<OwnedFd>,
}

impl Uevents {
    /// Subscribes.
    ///
    /// # Errors
    ///
    /// Those of socket(2) and bind(2).
    pub fn subscribe() -> io::Result<Self> {
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            Some(netlink::KOBJECT_UEVENT),
        )?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, KERNEL_GROUP))?;
        Ok(Self { socket: crate::sys::wait_for(socket, Interest::READABLE)? })
    }

    /// The next announcement; `None` when some were lost because the socket's buffer was full: look again at sysfs.
    ///
    /// # Errors
    ///
    /// Those of recv(2).
    pub async fn next(&self) -> io::Result<Option<Uevent>> {
        let mut buffer = vec![0; 8192];
        loop {
            let mut ready = self.socket.readable().await?;
            let read = ready
                .try_io(|socket| Ok(rustix::net::recv(socket.get_ref(), buffer.as_mut_slice(), RecvFlags::empty())?.0));
            match read {
                Ok(Ok(length)) => {
                    if let Some(uevent) = Uevent::parse(&buffer[..length]) {
                        return Ok(Some(uevent));
                    }
                }
                Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => return Ok(None),
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announcement_is_taken_apart() {
        let message = b"add@/devices/virtual/x\0ACTION=add\0SUBSYSTEM=virtio-ports\0DEVNAME=vport0p1\0";
        let uevent = Uevent::parse(message).unwrap();
        assert_eq!(uevent.action, "add");
        assert_eq!(uevent.device, "/devices/virtual/x");
        assert_eq!(uevent.subsystem(), "virtio-ports");
        assert_eq!(uevent.variables["DEVNAME"], "vport0p1");
    }

    #[test]
    fn udevs_own_messages_are_not_taken_for_the_kernels() {
        assert_eq!(Uevent::parse(b"libudev\0\xfe\xed\xca\xfe"), None);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived(bytes: Vec<u8>) {
            let _ = Uevent::parse(&bytes);
        }
    }
}
