use proptest::prelude::*;

use super::*;

fn created(table: &mut Table, id: &str, kind: Kind) {
    table.begin_create(id, "/b".into(), kind, Paths::default()).unwrap();
    table.finish_create(id, opened()).unwrap();
}

fn opened() -> Opened {
    Opened::open(&Paths::default()).unwrap()
}

fn in_pod() -> Kind {
    Kind::Container { sandbox: "pod".into() }
}

#[test]
fn a_pod_begins_with_its_sandbox() {
    let mut table = Table::default();
    let begin = |table: &mut Table, id: &str, kind| table.begin_create(id, "/b".into(), kind, Paths::default());
    assert_eq!(begin(&mut table, "c1", in_pod()).unwrap_err().code, ttrpc::Code::FAILED_PRECONDITION);
    begin(&mut table, "pod", Kind::Sandbox).unwrap();
    assert_eq!(begin(&mut table, "c1", in_pod()).unwrap_err().code, ttrpc::Code::FAILED_PRECONDITION);
    table.finish_create("pod", opened()).unwrap();
    begin(&mut table, "c1", in_pod()).unwrap();
    assert_eq!(begin(&mut table, "c1", in_pod()).unwrap_err().code, ttrpc::Code::ALREADY_EXISTS);
    assert_eq!(begin(&mut table, "other", Kind::Single).unwrap_err().code, ttrpc::Code::FAILED_PRECONDITION);
    table.abort_create("c1");
    begin(&mut table, "c1", in_pod()).unwrap();
}

#[test]
fn an_end_before_the_start_is_finished_stays_an_end() {
    let mut table = Table::default();
    created(&mut table, "pod", Kind::Single);
    table.begin_start("pod", "").unwrap();
    assert!(table.exited("pod", "", Exit::now(3)));
    assert!(!table.exited("pod", "", Exit::now(4)));
    table.fail_start("pod", "");
    let view = table.view("pod", "").unwrap();
    assert_eq!((view.status, view.exit.map(|e| e.status)), (Status::STOPPED, Some(3)));
}

#[test]
fn a_delete_that_fails_can_be_repeated() {
    let mut table = Table::default();
    created(&mut table, "pod", Kind::Single);
    assert_eq!(table.begin_delete("pod", "").unwrap(), None);
    assert_eq!(table.begin_delete("pod", "").unwrap_err().code, ttrpc::Code::FAILED_PRECONDITION);
    // Its process ends meanwhile.
    assert!(table.exited("pod", "", Exit::now(137)));
    table.abort_delete("pod", "");
    assert_eq!(table.view("pod", "").unwrap().status, Status::STOPPED);
    assert_eq!(table.begin_delete("pod", "").unwrap().map(|e| e.status), Some(137));
    table.finish_delete("pod", "");
    assert!(table.is_empty());
    assert!(table.begin_delete("pod", "").unwrap_err().is_not_found());
}

#[derive(Debug, Clone)]
enum Step {
    Create,
    Start,
    Exit,
    Pause(bool),
    Delete(bool),
}

proptest! {
    /// Whatever the order of requests: a container starts once, is never deleted while it runs, ends once.
    #[test]
    fn any_order_of_requests_is_safe(steps in prop::collection::vec(
        prop_oneof![
            Just(Step::Create), Just(Step::Start), Just(Step::Exit),
            any::<bool>().prop_map(Step::Pause), any::<bool>().prop_map(Step::Delete),
        ], 0..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _in_runtime = runtime.enter();
        let mut table = Table::default();
        let (mut exists, mut started, mut ended) = (false, false, false);
        for step in steps {
            match step {
                Step::Create => {
                    let begun = table.begin_create("c", "/b".into(), Kind::Single, Paths::default());
                    prop_assert_eq!(begun.is_ok(), !exists);
                    if begun.is_ok() {
                        table.finish_create("c", opened()).unwrap();
                        (exists, started, ended) = (true, false, false);
                    }
                }
                Step::Start => {
                    let begun = table.begin_start("c", "");
                    prop_assert_eq!(begun.is_ok(), exists && !started && !ended);
                    if let Ok(plan) = begun {
                        let pod: Arc<dyn crate::pod::Pod> = Arc::new(crate::fake::FakePod::default());
                        let streams = Streams::start(plan.opened, &pod, "c", "");
                        table.finish_start("c", "", streams);
                        started = true;
                    }
                }
                Step::Exit => {
                    prop_assert_eq!(table.exited("c", "", Exit::now(0)), exists && !ended);
                    ended |= exists;
                }
                Step::Pause(pause) => {
                    let may = table.check_pause("c", pause).is_ok();
                    prop_assert!(!may || started && !ended);
                    if may {
                        table.set_paused("c", pause);
                        prop_assert_eq!(table.view("c", "").unwrap().status == Status::PAUSED, pause);
                    }
                }
                Step::Delete(works) => {
                    let begun = table.begin_delete("c", "");
                    prop_assert_eq!(begun.is_ok(), exists && (ended || !started));
                    if begun.is_ok() && works {
                        table.finish_delete("c", "");
                        exists = false;
                    } else if begun.is_ok() {
                        table.abort_delete("c", "");
                    }
                }
            }
            prop_assert_eq!(table.is_empty(), !exists);
        }
    }
}
