use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::fake::{FakePod, FakeProcess};
use crate::pod::Pod;

fn fifo(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
    path
}

fn start(paths: &Paths) -> (Arc<Streams>, Arc<FakeProcess>) {
    start_opened(Opened::open(paths).unwrap())
}

fn start_opened(opened: Opened) -> (Arc<Streams>, Arc<FakeProcess>) {
    let pod = Arc::new(FakePod::default());
    let process = pod.add("c1", "");
    let pod: Arc<dyn Pod> = pod;
    (Streams::start(opened, &pod, "c1", ""), process)
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// Bytes that show when one is missing, doubled, or out of its place.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|n| u8::try_from((n ^ (n >> 8) ^ (n >> 16)) & 0xff).unwrap()).collect()
}

#[tokio::test]
async fn output_is_exact_with_a_slow_reader() {
    let dir = tempfile::tempdir().unwrap();
    let stdout = fifo(dir.path(), "stdout");
    let (streams, process) = start(&Paths { stdout: text(&stdout), ..Paths::default() });
    let sent = pattern(8 << 20);

    let reader = std::thread::spawn(move || {
        let mut fifo = std::fs::File::open(stdout).unwrap();
        let (mut all, mut chunk) = (Vec::new(), vec![0; 30_000]);
        loop {
            let count = fifo.read(&mut chunk).unwrap();
            if count == 0 {
                return all;
            }
            all.extend_from_slice(&chunk[..count]);
            std::thread::sleep(Duration::from_micros(500));
        }
    });
    for chunk in sent.chunks(60_001) {
        process.say(chunk).await;
    }
    process.exit(0);
    tokio::time::timeout(Duration::from_secs(60), streams.drained()).await.unwrap();
    let got = tokio::task::spawn_blocking(|| reader.join().unwrap()).await.unwrap();
    assert!(got == sent, "{} bytes of {} came, or others", got.len(), sent.len());
}

#[tokio::test]
async fn a_process_waits_for_its_reader() {
    let dir = tempfile::tempdir().unwrap();
    let stdout = fifo(dir.path(), "stdout");
    let (_streams, process) = start(&Paths { stdout: text(&stdout), ..Paths::default() });
    // A FIFO, a chunk in the pump, one in the guest's pipe: no more may be taken while nobody reads.
    let mut taken = 0;
    let chunk = pattern(64 << 10);
    while tokio::time::timeout(Duration::from_millis(300), process.say(&chunk)).await.is_ok() {
        taken += 1;
        assert!(taken < 8, "the pump hoards");
    }
    assert!(taken >= 1);
}

#[tokio::test]
async fn a_reader_may_come_late() {
    let dir = tempfile::tempdir().unwrap();
    let stdout = fifo(dir.path(), "stdout");
    let (streams, process) = start(&Paths { stdout: text(&stdout), ..Paths::default() });
    process.say(b"early").await;
    process.say(b" bird").await;
    // Opening does not wait: the writer is there.
    let mut reader = std::fs::File::open(stdout).unwrap();
    process.say(b"\n").await;
    process.exit(0);
    streams.drained().await;
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "early bird\n");
}

#[tokio::test]
async fn output_nobody_wants_stops_nobody() {
    let (streams, process) = start(&Paths::default());
    for _ in 0..100 {
        process.say(&pattern(60_000)).await;
    }
    process.exit(0);
    streams.drained().await;
}

#[tokio::test]
async fn output_goes_to_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("new/log");
    let (streams, process) = start(&Paths { stdout: format!("file://{}", log.display()), ..Paths::default() });
    process.say(b"one\n").await;
    process.exit(0);
    streams.drained().await;
    assert_eq!(std::fs::read_to_string(log).unwrap(), "one\n");
}

#[tokio::test(start_paused = true)]
async fn what_a_process_leaves_running_does_not_hold_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let stdout = fifo(dir.path(), "stdout");
    let _reader = std::fs::File::options().read(true).write(true).open(&stdout).unwrap();
    let (streams, process) = start(&Paths { stdout: text(&stdout), ..Paths::default() });
    process.say(b"x").await;
    process.exit_leaving_output(0);
    streams.drained().await;
    streams.abort();
}

#[tokio::test]
async fn input_is_exact_and_ends_when_the_engine_says() {
    let dir = tempfile::tempdir().unwrap();
    let stdin = fifo(dir.path(), "stdin");
    let opened = Opened::open(&Paths { stdin: text(&stdin), ..Paths::default() }).unwrap();
    let close = opened.closer();
    let (_streams, process) = start_opened(opened);
    let sent = pattern(3 << 20);
    let (data, path) = (sent.clone(), stdin.clone());
    tokio::task::spawn_blocking(move || {
        // Two clients, one after the other: the first one's leaving is not the end.
        let (first, second) = data.split_at(1 << 20);
        std::fs::File::options().write(true).open(&path).unwrap().write_all(first).unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().write_all(second).unwrap();
    })
    .await
    .unwrap();
    assert!(!*process.input_closed.borrow());
    // What is still in the FIFO comes before the end.
    close.send_replace(true);
    assert!(process.whole_input().await == sent);
}

#[tokio::test]
async fn input_closed_before_the_start_is_still_delivered() {
    let dir = tempfile::tempdir().unwrap();
    let stdin = fifo(dir.path(), "stdin");
    let opened = Opened::open(&Paths { stdin: text(&stdin), ..Paths::default() }).unwrap();
    std::fs::File::options().write(true).open(&stdin).unwrap().write_all(b"hello").unwrap();
    opened.closer().send_replace(true);
    let (_streams, process) = start_opened(opened);
    assert_eq!(process.whole_input().await, b"hello");
}

#[tokio::test]
async fn no_input_ends_at_once() {
    let (_streams, process) = start(&Paths::default());
    assert_eq!(process.whole_input().await, b"");
}

#[tokio::test]
async fn a_client_that_still_reads_ends_the_input_by_closing_it() {
    let dir = tempfile::tempdir().unwrap();
    let (stdin, stdout) = (fifo(dir.path(), "stdin"), fifo(dir.path(), "stdout"));
    let paths = Paths { stdin: text(&stdin), stdout: text(&stdout), ..Paths::default() };
    let (streams, process) = start(&paths);
    let mut reader = std::fs::File::open(&stdout).unwrap();
    std::fs::write(&stdin, "hello").unwrap();
    assert_eq!(process.whole_input().await, b"hello");
    // The test for readers left the output as it was.
    process.say(b"bye").await;
    process.exit(0);
    streams.drained().await;
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "bye");
}

#[tokio::test]
async fn a_client_that_left_ends_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (stdin, stdout) = (fifo(dir.path(), "stdin"), fifo(dir.path(), "stdout"));
    let paths = Paths { stdin: text(&stdin), stdout: text(&stdout), ..Paths::default() };
    let opened = Opened::open(&paths).unwrap();
    let close = opened.closer();
    let (_streams, process) = start_opened(opened);
    for part in ["one ", "two "] {
        let reader = std::fs::File::open(&stdout).unwrap();
        let mut writer = std::fs::File::options().write(true).open(&stdin).unwrap();
        writer.write_all(part.as_bytes()).unwrap();
        drop((writer, reader));
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(!*process.input_closed.borrow());
    }
    std::fs::write(&stdin, "three").unwrap();
    close.send_replace(true);
    assert_eq!(process.whole_input().await, b"one two three");
}
