//! Where the frames of a ttrpc connection begin: enough to notice that a new client's request stands there instead.
//!
//! ```text
//!   head (10 bytes: length, stream, type, flags) ─▶ body (length bytes) ─▶ head …
//!     └─ reads `CONNECT ` or `connect `: no length can look like that (it would be over a gigabyte)
//! ```

use std::mem;

use tokio::io::ReadBuf;

/// The length of a frame's header.
pub(super) const HEADER: usize = 10;

/// The position within the current frame.
#[derive(Debug, Default)]
pub(super) struct Frames {
    /// Header bytes read so far.
    head: Vec<u8>,
    /// A complete header that was not handed on yet.
    ready: Vec<u8>,
    /// Bytes of the body still to come.
    body: usize,
}

/// What a header turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Head {
    /// A frame's, or not complete yet.
    Frame,
    /// The first bytes of a request for a new connection.
    Request(Vec<u8>),
}

impl Frames {
    /// Hands on what it may of a complete header; whether there was any.
    pub(super) fn take_head(&mut self, buffer: &mut ReadBuf<'_>) -> bool {
        let length = self.ready.len().min(buffer.remaining());
        buffer.put_slice(&self.ready[..length]);
        self.ready.drain(..length);
        length > 0
    }

    /// Bytes of the body still to come; zero within a header.
    pub(super) fn body_left(&self) -> usize {
        self.body
    }

    /// Notes bytes of the body.
    pub(super) fn body_read(&mut self, length: usize) {
        self.body = self.body.saturating_sub(length);
    }

    /// How many bytes the header still lacks.
    pub(super) fn head_missing(&self) -> usize {
        HEADER - self.head.len()
    }

    /// Notes bytes of the header.
    pub(super) fn head_read(&mut self, bytes: &[u8]) -> Head {
        self.head.extend_from_slice(bytes);
        if self.head.len() < HEADER {
            return Head::Frame;
        }
        let head = mem::take(&mut self.head);
        if head[..8].eq_ignore_ascii_case(b"connect ") {
            return Head::Request(head);
        }
        let length = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
        self.body = usize::try_from(length).unwrap_or(usize::MAX);
        self.ready = head;
        Head::Frame
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Feeds a stream in pieces and returns what came out, and the request that ended it.
    fn run(stream: &[u8], piece: usize) -> (Vec<u8>, Option<Vec<u8>>) {
        let mut frames = Frames::default();
        let mut out = Vec::new();
        let mut rest = stream;
        loop {
            let mut space = vec![0; piece];
            let mut buffer = ReadBuf::new(&mut space);
            if frames.take_head(&mut buffer) {
                out.extend_from_slice(buffer.filled());
                continue;
            }
            let wanted = if frames.body_left() > 0 { frames.body_left() } else { frames.head_missing() };
            let length = wanted.min(piece).min(rest.len());
            if length == 0 {
                return (out, None);
            }
            let (now, later) = rest.split_at(length);
            rest = later;
            if frames.body_left() > 0 {
                frames.body_read(length);
                out.extend_from_slice(now);
            } else if let Head::Request(mut request) = frames.head_read(now) {
                request.extend_from_slice(rest);
                return (out, Some(request));
            }
        }
    }

    fn frame(body: &[u8]) -> Vec<u8> {
        let mut frame = u32::try_from(body.len()).unwrap().to_be_bytes().to_vec();
        frame.extend_from_slice(&[0, 0, 0, 1, 1, 0]);
        frame.extend_from_slice(body);
        frame
    }

    proptest! {
        #[test]
        fn frames_pass_unchanged_and_a_request_after_them_is_found(
            bodies in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 0..5),
            piece in 1_usize..40,
        ) {
            let frames: Vec<u8> = bodies.iter().flat_map(|body| frame(body)).collect();
            prop_assert_eq!(run(&frames, piece), (frames.clone(), None));
            let mut stream = frames.clone();
            stream.extend_from_slice(b"CONNECT 1024\n");
            prop_assert_eq!(run(&stream, piece), (frames, Some(b"CONNECT 1024\n".to_vec())));
        }
    }

    #[test]
    fn a_request_inside_a_body_is_a_body() {
        let stream = frame(b"CONNECT 1024\n");
        assert_eq!(run(&stream, 7), (stream.clone(), None));
    }
}
