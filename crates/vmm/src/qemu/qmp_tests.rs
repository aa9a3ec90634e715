//! The monitor's client against a fake QEMU.

use std::fs::File;
use std::io::{IoSliceMut, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use proptest::prelude::*;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::AsyncWriteExt;

use super::*;

const LIMIT: Duration = Duration::from_secs(10);
const GREETING: &str =
    r#"{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}}, "capabilities": ["oob"]}}"#;

/// The other end: reads commands, says what the test wants.
struct Fake {
    stream: UnixStream,
    unread: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Fake {
    async fn say(&mut self, line: &str) {
        self.stream.write_all(format!("{line}\r\n").as_bytes()).await.unwrap();
    }

    /// The next command.
    async fn hear(&mut self) -> Value {
        loop {
            if let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                return serde_json::from_slice(&line).unwrap();
            }
            self.stream.readable().await.unwrap();
            let mut buffer = [0; 4096];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let got = self.stream.try_io(Interest::READABLE, || {
                let mut slices = [IoSliceMut::new(&mut buffer)];
                Ok(recvmsg(self.stream.as_fd(), &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?.bytes)
            });
            if let Ok(count) = got {
                assert_ne!(count, 0, "the client hung up");
                self.unread.extend(&buffer[..count]);
                for message in ancillary.drain() {
                    if let RecvAncillaryMessage::ScmRights(fds) = message {
                        self.fds.extend(fds);
                    }
                }
            }
        }
    }

    async fn answer(&mut self, command: &Value, result: Value) {
        self.say(&json!({ "return": result, "id": command["id"] }).to_string()).await;
    }
}

async fn connected() -> (Arc<Qmp>, Fake) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut fake = Fake { stream: theirs, unread: Vec::new(), fds: Vec::new() };
    fake.say(GREETING).await;
    let client = tokio::spawn(Qmp::connect(ours, LIMIT));
    let command = fake.hear().await;
    assert_eq!(command["execute"], "qmp_capabilities");
    fake.answer(&command, json!({})).await;
    (Arc::new(client.await.unwrap().unwrap()), fake)
}

fn call(qmp: &Arc<Qmp>, command: &'static str) -> tokio::task::JoinHandle<Answer> {
    let qmp = Arc::clone(qmp);
    tokio::spawn(async move { qmp.execute(command, json!({ "a": 1 }), LIMIT).await })
}

#[tokio::test]
async fn answers_find_their_callers_in_any_order() {
    let (qmp, mut fake) = connected().await;
    let (first, second) = (call(&qmp, "first"), call(&qmp, "second"));
    let (one, two) = (fake.hear().await, fake.hear().await);
    assert_eq!(one["arguments"], json!({ "a": 1 }));
    fake.answer(&two, two["execute"].clone()).await;
    fake.say(r#"{"event": "RTC_CHANGE", "data": {"offset": 1}, "timestamp": {"seconds": 1}}"#).await;
    fake.answer(&json!({ "id": 12345 }), json!("nobody asked")).await;
    fake.answer(&one, one["execute"].clone()).await;
    assert_eq!(first.await.unwrap().unwrap(), "first");
    assert_eq!(second.await.unwrap().unwrap(), "second");
}

#[tokio::test]
async fn a_refusal_has_qemus_words() {
    let (qmp, mut fake) = connected().await;
    let pending = call(&qmp, "device_add");
    let command = fake.hear().await;
    let error = json!({ "error": { "class": "GenericError", "desc": "Bus 'x' not found" }, "id": command["id"] });
    fake.say(&error.to_string()).await;
    match pending.await.unwrap() {
        Err(QmpError::Refused { class, description }) => {
            assert_eq!((class.as_str(), description.as_str()), ("GenericError", "Bus 'x' not found"));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn descriptors_arrive_with_their_command() {
    let (qmp, mut fake) = connected().await;
    let mut files = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
    for (number, file) in files.iter_mut().enumerate() {
        write!(file, "file {number}").unwrap();
    }
    let pending = {
        let qmp = Arc::clone(&qmp);
        tokio::spawn(async move {
            let fds = [files[0].as_fd(), files[1].as_fd()];
            qmp.execute_with("getfd", json!({ "fdname": "x" }), &fds, LIMIT).await
        })
    };
    let command = fake.hear().await;
    let contents: Vec<String> = fake.fds.drain(..).map(content).collect();
    assert_eq!(contents, ["file 0", "file 1"]);
    fake.answer(&command, json!({})).await;
    pending.await.unwrap().unwrap();
}

fn content(fd: OwnedFd) -> String {
    let mut file = File::from(fd);
    file.rewind().unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    text
}

#[tokio::test]
async fn events_reach_every_subscriber_until_the_end() {
    let (qmp, mut fake) = connected().await;
    let mut subscribers = [qmp.events(), qmp.events()];
    fake.say(r#"{"event": "STOP"}"#).await;
    fake.say(r#"{"event": "SHUTDOWN", "data": {"reason": "guest-reset"}}"#).await;
    drop(fake);
    for events in &mut subscribers {
        assert_eq!(events.recv().await.unwrap(), Event { name: "STOP".into(), data: Value::Null });
        assert_eq!(events.recv().await.unwrap().data["reason"], "guest-reset");
        assert!(matches!(events.recv().await, Err(broadcast::error::RecvError::Closed)));
    }
    assert!(matches!(qmp.events().recv().await, Err(broadcast::error::RecvError::Closed)));
}

#[tokio::test]
async fn the_end_fails_what_is_pending_and_what_follows() {
    let (qmp, mut fake) = connected().await;
    let pending = call(&qmp, "query-status");
    fake.hear().await;
    // In the middle of an answer.
    fake.stream.write_all(b"{\"return\": {").await.unwrap();
    drop(fake);
    assert!(matches!(pending.await.unwrap(), Err(QmpError::Closed)));
    assert!(matches!(qmp.execute("stop", json!({}), LIMIT).await, Err(QmpError::Closed)));
}

#[tokio::test]
async fn garbage_ends_the_conversation() {
    let (qmp, mut fake) = connected().await;
    let pending = call(&qmp, "query-status");
    fake.hear().await;
    fake.say("Segmentation fault").await;
    let err = pending.await.unwrap().unwrap_err();
    assert!(err.to_string().contains("Segmentation fault"), "{err}");
}

#[tokio::test(start_paused = true)]
async fn silence_has_an_end() {
    let (qmp, mut fake) = connected().await;
    let pending = call(&qmp, "query-status");
    let command = fake.hear().await;
    assert!(matches!(pending.await.unwrap(), Err(QmpError::Timeout(LIMIT))));
    // A late answer disturbs nobody.
    fake.answer(&command, json!("late")).await;
    let next = call(&qmp, "stop");
    let command = fake.hear().await;
    fake.answer(&command, json!("right")).await;
    assert_eq!(next.await.unwrap().unwrap(), "right");
}

#[tokio::test]
async fn a_greeting_that_is_none_is_refused() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(b"{\"hello\": 1}\n").await.unwrap();
    assert!(matches!(Qmp::connect(ours, LIMIT).await, Err(QmpError::Protocol(_))));
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    assert!(matches!(Qmp::connect(ours, LIMIT).await, Err(QmpError::Closed)));
}

proptest! {
    #[test]
    fn any_stream_ends_without_harm(bytes: Vec<u8>, json in "\\{(\"(id|event|return|error)\": ?(1|\"x\"|\\{\\}|null),?){0,3}\\}") {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (qmp, mut fake) = connected().await;
            fake.say(&json).await;
            fake.stream.write_all(&bytes).await.unwrap();
            drop(fake);
            let answer = qmp.execute("stop", json!({}), LIMIT).await;
            prop_assert!(answer.is_err());
            Ok(())
        })?;
    }
}
