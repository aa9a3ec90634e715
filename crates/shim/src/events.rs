//! Events for the engine: queued in order, sent again after the engine was away, lost only when the queue is full.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::EventsClient;
use protobuf::well_known_types::any::Any;
use protobuf::{MessageField, MessageFull};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::{debug, error, warn};
use ttrpc::asynchronous::Client;

use crate::chain::Chain;
use crate::time::timestamp;

/// Events waiting at most; a pod that makes more than this while its engine is away is not watched anyway.
const QUEUE: usize = 4096;

/// How long the engine may take for one event.
const FORWARD_WITHIN: Duration = Duration::from_secs(10);

/// The first and the longest pause before the next try, while the engine is away.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(3));

/// A message with the name engines know it by: bare, without the `type.googleapis.com/` that containerd 1.6 refuses.
pub(crate) fn pack<M: MessageFull>(message: &M) -> Result<Any, protobuf::Error> {
    Ok(Any { type_url: M::descriptor().full_name().to_owned(), value: message.write_to_bytes()?, ..Default::default() })
}

/// Where events go.
#[derive(Debug)]
pub(crate) struct Events {
    namespace: String,
    queue: Mutex<Option<mpsc::Sender<Envelope>>>,
}

impl Events {
    /// Sends to `address` from a task of its own; with no address (CRI-O) events are logged and go nowhere.
    pub(crate) fn new(address: &str, namespace: &str) -> (Events, Option<JoinHandle<()>>) {
        let namespace = namespace.to_owned();
        if address.is_empty() {
            return (Events { namespace, queue: Mutex::new(None) }, None);
        }
        let address = if address.contains("://") { address.to_owned() } else { format!("unix://{address}") };
        let (queue, waiting) = mpsc::channel(QUEUE);
        let sender = tokio::spawn(send_all(address, waiting));
        (Events { namespace, queue: Mutex::new(Some(queue)) }, Some(sender))
    }

    /// Queues an event, stamped with this moment.
    pub(crate) fn publish<M: MessageFull>(&self, topic: &str, event: &M) {
        debug!(topic, event = %event, "Event");
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(queue) = &*queue else { return };
        let packed = match pack(event) {
            Ok(any) => any,
            Err(error) => {
                error!(topic, error = %Chain(&error), "Cannot encode an event");
                return;
            }
        };
        let envelope = Envelope {
            timestamp: timestamp(SystemTime::now()),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(packed),
            ..Default::default()
        };
        if queue.try_send(envelope).is_err() {
            error!(topic, "Event lost: the engine has not taken {QUEUE} others yet");
        }
    }
}

impl Events {
    /// Takes no more events: the sender ends when the queue is empty.
    pub(crate) fn end(&self) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// Sends one event after the other; the next only when the engine has taken the one before.
async fn send_all(address: String, mut waiting: mpsc::Receiver<Envelope>) {
    let mut client: Option<EventsClient> = None;
    while let Some(envelope) = waiting.recv().await {
        let request = ForwardRequest { envelope: MessageField::some(envelope), ..Default::default() };
        let mut pause = RETRY.0;
        loop {
            match forward(&address, &mut client, &request).await {
                Ok(()) => break,
                Err(ttrpc::Error::RpcStatus(status)) if status.code() != ttrpc::Code::DEADLINE_EXCEEDED => {
                    // It was heard and refused; it will not be welcome later.
                    error!(topic = request.envelope.topic, reason = status.message(), "The engine refused an event");
                    break;
                }
                Err(error) => {
                    if pause == RETRY.0 {
                        warn!(error = %Chain(&error), "The engine does not take events; trying again");
                    }
                    client = None;
                    // Nothing tells when the engine is back: its socket is removed and made anew.
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(RETRY.1);
                }
            }
        }
    }
}

async fn forward(address: &str, client: &mut Option<EventsClient>, request: &ForwardRequest) -> ttrpc::Result<()> {
    let events = match client {
        Some(events) => events,
        None => client.insert(EventsClient::new(Client::connect(address).await?)),
    };
    events.forward(ttrpc::context::with_duration(FORWARD_WITHIN), request).await.map(drop)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use containerd_shim_protos::events::task::TaskOOM;
    use protobuf::Message as _;

    use super::*;
    use crate::fake::FakeEngine;

    fn oom(number: usize) -> TaskOOM {
        TaskOOM { container_id: number.to_string(), ..Default::default() }
    }

    #[tokio::test]
    async fn events_keep_their_order_while_the_engine_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("engine.ttrpc");
        let engine = Arc::new(FakeEngine::default());
        let (events, sender) = Events::new(socket.to_str().unwrap(), "k8s.io");

        // The engine is not there yet.
        (0..3).for_each(|n| events.publish("/tasks/oom", &oom(n)));
        let mut server = engine.serve(&socket).await;
        engine.wait_for(3).await;
        // It goes away and comes back.
        server.shutdown().await.unwrap();
        (3..200).for_each(|n| events.publish("/tasks/oom", &oom(n)));
        let mut server = engine.serve(&socket).await;

        for (number, request) in engine.wait_for(200).await.iter().enumerate() {
            let envelope = &request.envelope;
            assert_eq!((envelope.namespace.as_str(), envelope.topic.as_str()), ("k8s.io", "/tasks/oom"));
            assert!(envelope.timestamp.seconds > 1_600_000_000);
            assert_eq!(envelope.event.type_url, "containerd.events.TaskOOM");
            let event = TaskOOM::parse_from_bytes(&envelope.event.value).unwrap();
            assert_eq!(event.container_id, number.to_string());
        }
        events.end();
        tokio::time::timeout(Duration::from_secs(10), sender.unwrap()).await.unwrap().unwrap();
        server.shutdown().await.unwrap();
    }

    #[tokio::test]
    async fn no_address_is_no_error() {
        let (events, sender) = Events::new("", "default");
        events.publish("/tasks/oom", &oom(1));
        assert!(sender.is_none());
    }

    #[tokio::test]
    async fn a_full_queue_does_not_stop_the_pod() {
        let (events, sender) = Events::new("/nowhere/engine.ttrpc", "default");
        (0..QUEUE + 10).for_each(|n| events.publish("/tasks/oom", &oom(n)));
        sender.unwrap().abort();
    }
}
