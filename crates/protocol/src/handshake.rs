//! The handshake of a hybrid channel: how one byte stream becomes a connection to a numbered guest port.
//!
//! The client writes `CONNECT <port>\n` (upstream's runtime writes `connect`), the server answers `OK <number>\n` and
//! everything after that line belongs to the connection. Firecracker's vsock documentation describes the exchange.
//!
//! On the virtio-serial channel our agent answers itself, so the answer is also how it announces that it is ready: the
//! host writes the request before the guest exists, and waits. Nobody polls.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The longest line either side may send; a peer that sends more is not speaking this protocol.
const MAX_LINE: usize = 64;

/// Asks the peer for `port` and waits for its answer.
///
/// # Errors
///
/// The stream's own errors, `UnexpectedEof` when the peer hangs up, `InvalidData` when it answers anything else.
pub async fn connect<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, port: u32) -> io::Result<()> {
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let line = read_line(stream).await?;
    if line == "OK" || line.starts_with("OK ") {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, format!("Expected `OK`, the peer answered `{line}`")))
}

/// Waits for a request for `port` and answers it.
///
/// Lines that are no request for the port are skipped: what a previous client left half-sent in a byte stream ends
/// with the first line break, which the next request brings.
///
/// # Errors
///
/// The stream's own errors, and `UnexpectedEof` when the peer hangs up before asking.
pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, port: u32) -> io::Result<()> {
    loop {
        match read_line(stream).await {
            Ok(line) if requested_port(&line) == Some(port) => break,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {}
            Err(error) => return Err(error),
        }
    }
    stream.write_all(format!("OK {port}\n").as_bytes()).await?;
    stream.flush().await
}

/// The port of a `CONNECT` line, whatever garbage stands before it on the line.
fn requested_port(line: &str) -> Option<u32> {
    let (_, port) = line.rsplit_once("CONNECT ").or_else(|| line.rsplit_once("connect "))?;
    port.trim_end_matches('\r').parse().ok()
}

/// Reads up to a line break, byte by byte: what follows the line must stay in the stream.
async fn read_line<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<String> {
    let mut line = Vec::with_capacity(MAX_LINE);
    loop {
        match stream.read_u8().await? {
            b'\n' => return Ok(String::from_utf8_lossy(&line).into_owned()),
            _ if line.len() == MAX_LINE => {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "Handshake line is too long"));
            }
            byte => line.push(byte),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn both_sides_agree_and_the_rest_of_the_stream_is_untouched() {
        let (mut host, mut guest) = tokio::io::duplex(256);
        let server = tokio::spawn(async move {
            accept(&mut guest, 1024).await.unwrap();
            guest.write_all(b"payload").await.unwrap();
        });
        connect(&mut host, 1024).await.unwrap();
        let mut rest = Vec::new();
        host.read_to_end(&mut rest).await.unwrap();
        server.await.unwrap();
        assert_eq!(rest, b"payload");
    }

    #[tokio::test]
    async fn a_half_sent_frame_before_the_request_is_skipped() {
        let (mut host, mut guest) = tokio::io::duplex(256);
        host.write_all(b"\x00\x00\x10garbage").await.unwrap();
        let server = tokio::spawn(async move { accept(&mut guest, 1024).await });
        connect(&mut host, 1024).await.unwrap();
        server.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn lower_case_request_of_upstream_is_understood() {
        assert_eq!(requested_port("connect 1024"), Some(1024));
        assert_eq!(requested_port("CONNECT x"), None);
        assert_eq!(requested_port("HELLO 1024"), None);
    }

    #[tokio::test]
    async fn another_answer_is_an_error_that_shows_it() {
        let (mut host, mut guest) = tokio::io::duplex(256);
        guest.write_all(b"NO\n").await.unwrap();
        let error = connect(&mut host, 1024).await.unwrap_err();
        assert!(error.to_string().contains("NO"), "{error}");
    }
}
