use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proptest::prelude::*;

use super::*;

const PREFIX: &str = "/opt/kata";

fn load(text: &str) -> Result<Config, ConfigError> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("configuration.toml");
    fs::write(&file, text).unwrap();
    Config::load_from(Some(file), dir.path(), Path::new(PREFIX))
}

fn problems(result: Result<Config, ConfigError>) -> Vec<Problem> {
    match result.unwrap_err() {
        ConfigError::Problems(problems) => problems,
        other => panic!("{other}"),
    }
}

fn annotated(config: &Config, name: &str, text: &str) -> Result<Config, ConfigError> {
    config.with_annotations(&HashMap::from([(format!("io.katacontainers.config.{name}"), text.to_owned())]))
}

#[test]
fn with_no_file_everything_has_a_value() {
    let root = tempfile::tempdir().unwrap();
    let config = Config::load_from(None, root.path(), Path::new(PREFIX)).unwrap();
    assert_eq!(config, Config::defaults(Path::new(PREFIX)));
    assert_eq!(config.hypervisor.root(), Root::Initrd("/opt/kata/share/kata/initrd.img".into()));
    assert_eq!(config.hypervisor.vcpus(), 1);
    assert!(config.hypervisor.max_memory_mib() >= 256);
    assert!(config.show().iter().all(|shown| shown.origin == Origin::Default));
    assert!(!config.runtime.disable_guest_seccomp);
}

#[test]
fn every_default_is_a_value_its_key_takes() {
    let defaults = Config::defaults(Path::new(PREFIX));
    let mut config = defaults.clone();
    for key in keys::all() {
        let value = (key.get)(&defaults);
        assert!((key.set)(&mut config, &value, key.rule), "{} = {value}", key.path);
        assert!(upstream::find(key.path).is_none(), "{} is in both tables", key.path);
    }
    assert_eq!(config, defaults);
    let mut nothing = Vec::new();
    config.check(&mut nothing);
    assert_eq!(nothing, []);
}

#[test]
fn what_is_shown_can_be_loaded_again() {
    let config = Config::defaults(Path::new(PREFIX));
    let text: String = config.show().iter().map(|shown| format!("{} = {}\n", shown.key, shown.value)).collect();
    let again = load(&text).unwrap();
    assert_eq!(again.hypervisor, config.hypervisor);
    assert_eq!(again.agent, config.agent);
    assert_eq!(again.runtime, config.runtime);
}

#[test]
fn drop_ins_win_key_by_key_in_the_order_of_their_names() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("etc/kata-containers");
    fs::create_dir_all(dir.join("config.d")).unwrap();
    let main = dir.join("configuration.toml");
    fs::write(&main, "[hypervisor.qemu]\ndefault_memory = 512\ndefault_vcpus = 2\nenable_debug = true\n").unwrap();
    fs::write(dir.join("config.d/20-b.toml"), "# nothing\n[hypervisor.qemu]\ndefault_memory = 1024\n").unwrap();
    fs::write(dir.join("config.d/10-a.toml"), "[hypervisor]\nqemu.default_memory = 768\nqemu.default_vcpus = 3.5\n")
        .unwrap();
    fs::write(dir.join("config.d/README"), "not read").unwrap();
    let config = Config::load_from(None, root.path(), Path::new(PREFIX)).unwrap();
    assert_eq!(config.hypervisor.default_memory, 1024);
    assert_eq!(config.hypervisor.vcpus(), 4);
    assert_eq!(config.origin("hypervisor.qemu.enable_debug"), Origin::File { path: main, line: 4 });
    let drop_in = Origin::DropIn { path: dir.join("config.d/20-b.toml"), line: 3 };
    assert_eq!(config.origin("hypervisor.qemu.default_memory"), drop_in);
    assert_eq!(config.sources().len(), 3);
}

#[test]
fn drop_ins_alone_are_enough() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("etc/kata-containers/config.d");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("a.toml"), "runtime.enable_debug = true").unwrap();
    assert!(Config::load_from(None, root.path(), Path::new(PREFIX)).unwrap().runtime.enable_debug);
}

#[test]
fn a_file_that_was_named_must_be_there() {
    let missing = PathBuf::from("/nonexistent/configuration.toml");
    let error = Config::load_from(Some(missing), Path::new("/nonexistent"), Path::new(PREFIX)).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/configuration.toml"), "{error}");
}

#[test]
fn one_run_reports_every_problem() {
    let text = "[hypervisor.qemu]\nkernal = \"/k\"\ndefault_vcpus = \"two\"\nenable_hugepages = true\n\
                [agent.kata]\nserver_port = 1\n[hypervisor.clh]\npath = \"/x\"\nkernel = \"/y\"\n[runtime]\nhypervisor_name = \"clh\"\n";
    let result = load(text);
    let message = result.as_ref().unwrap_err().to_string();
    let problems = problems(result);
    assert_eq!(problems.len(), 6, "{message}");
    assert!(message.contains("configuration.toml:2: hypervisor.qemu.kernal: unknown key; the nearest known one is `hypervisor.qemu.kernel`"), "{message}");
    assert!(
        message.contains(":3: hypervisor.qemu.default_vcpus: \"two\" (a string) is not a number from -1 to 1024"),
        "{message}"
    );
    assert!(message.contains("hypervisor.qemu.enable_hugepages: known upstream, not supported yet"), "{message}");
    assert!(message.contains("is not \"qemu\""), "{message}");
}

#[test]
fn what_asks_for_nothing_is_accepted() {
    load(
        "[hypervisor.qemu]\nenable_iommu = false\nfile_mem_backend = \"\"\npflashes = []\nblock_device_aio = \"threads\"\n\
         machine_accelerators = \"\"\nfirmware = \"\"\n[hypervisor.qemu.factory]\nenable_template = false\n\
         [agent.kata.mem_agent]\nmem_agent_enable = false\nmemcg_swap = false\n\
         [runtime]\ninternetworking_model = \"tcfilter\"\nsandbox_cgroup_only = true\nvfio_mode = \"guest-kernel\"\n",
    )
    .unwrap();
}

#[test]
fn enums_list_their_values() {
    let text = load("hypervisor.qemu.accelerator = \"hvf\"").unwrap_err().to_string();
    assert!(text.contains("one of \"auto\", \"kvm\", \"tcg\""), "{text}");
}

#[test]
fn times_have_units() {
    let time = |text: &str| load(&format!("agent.kata.boot_timeout = {text}")).map(|config| config.agent.boot_timeout);
    assert_eq!(time("\"30s\"").unwrap(), Duration::from_secs(30));
    assert_eq!(time("\"2m\"").unwrap(), Duration::from_secs(120));
    assert_eq!(time("\"1500ms\"").unwrap(), Duration::from_millis(1500));
    assert_eq!(time("45").unwrap(), Duration::from_secs(45));
    for bad in ["\"30\"", "\"s\"", "\"1h\"", "-1", "0", "\"99999999999999999999s\"", "1.5"] {
        assert!(time(bad).is_err(), "{bad}");
    }
}

#[test]
fn keys_are_checked_against_each_other() {
    let image = load("hypervisor.qemu.image = \"/i\"\nhypervisor.qemu.rootfs_type = \"erofs\"").unwrap();
    assert_eq!(image.hypervisor.root(), Root::Image("/i".into(), RootfsType::Erofs));
    for bad in [
        "hypervisor.qemu.image = \"/i\"\nhypervisor.qemu.initrd = \"/j\"",
        "hypervisor.qemu.initrd = \"\"",
        "hypervisor.qemu.default_vcpus = 5\nhypervisor.qemu.default_maxvcpus = 4",
        "hypervisor.qemu.default_memory = 512\nhypervisor.qemu.default_maxmemory = 300",
        "hypervisor.qemu.control_channel = \"vhost-user-vsock\"",
        "hypervisor.qemu.virtio_fs_queue_size = 1000",
        "hypervisor.qemu.enable_annotations = [\"(\"]",
        "hypervisor.qemu.kernel = \"relative\"",
        "hypervisor.qemu.kernel = \"/a/../b\"",
    ] {
        assert_eq!(problems(load(bad)).len(), 1, "{bad}");
    }
}

#[test]
fn a_file_that_is_not_toml_says_where() {
    let text = load("[runtime]\nenable_debug = \n").unwrap_err().to_string();
    assert!(text.contains("configuration.toml:2: not TOML"), "{text}");
}

#[test]
fn explain_knows_every_key_and_suggests() {
    let config = Config::defaults(Path::new(PREFIX));
    for key in keys::all() {
        let explained = config.explain(key.path).unwrap();
        assert!(!explained[0].doc.is_empty(), "{}", key.path);
    }
    assert_eq!(config.explain("enable_debug").unwrap().len(), 3);
    let error = config.explain("defalt_memory").unwrap_err().to_string();
    assert!(error.contains("hypervisor.qemu.default_memory"), "{error}");
}

#[test]
fn by_default_pods_may_set_their_size_and_nothing_else() {
    let config = Config::defaults(Path::new(PREFIX));
    for key in keys::all() {
        let Some(name) = annotation(key) else { continue };
        let name = name.strip_prefix("io.katacontainers.config.").unwrap();
        let text = (key.get)(&config).to_string();
        let safe = ["default_vcpus", "default_memory"].contains(&key.name());
        assert_eq!(annotated(&config, name, text.trim_matches('"')).is_ok(), safe, "{name}");
    }
    let big = annotated(&config, "hypervisor.default_memory", "1024").unwrap();
    assert_eq!(big.hypervisor.default_memory, 1024);
    assert!(matches!(big.origin("hypervisor.qemu.default_memory"), Origin::Annotation(_)));
    assert!(annotated(&config, "hypervisor.default_memory", "1").is_err());
    assert!(annotated(&config, "hypervisor.default_vcpus", "NaN").is_err());
}

#[test]
fn unknown_annotations_are_errors_and_foreign_ones_are_not_ours() {
    let config = Config::defaults(Path::new(PREFIX));
    let error = annotated(&config, "hypervisor.default_memery", "1024").unwrap_err().to_string();
    assert!(error.contains("default_memory"), "{error}");
    assert!(annotated(&config, "hypervisor.enable_hugepages", "true").is_err());
    assert!(annotated(&config, "hypervisor.enable_hugepages", "false").is_ok());
    let foreign = HashMap::from([("io.kubernetes.cri.sandbox-id".to_owned(), "x".to_owned())]);
    assert_eq!(config.with_annotations(&foreign).unwrap(), config);
}

#[test]
fn no_annotation_chooses_a_file_or_what_runs_even_if_all_are_allowed() {
    let config = load("hypervisor.qemu.enable_annotations = [\".*\"]").unwrap();
    let named = HashMap::from([("io.katacontainers.config_path".to_owned(), "/tmp/evil.toml".to_owned())]);
    assert!(config.with_annotations(&named).is_err());
    for (name, text) in [
        ("hypervisor.path", "/usr/bin/qemu-system-x86_64"),
        ("hypervisor.kernel", "/tmp/k"),
        ("hypervisor.image", "/etc/shadow"),
        ("hypervisor.initrd", "/tmp/i"),
        ("hypervisor.firmware", "/tmp/f"),
        ("hypervisor.virtio_fs_daemon", "/tmp/d"),
        ("hypervisor.virtio_fs_extra_args", "-o sandbox=none"),
        ("hypervisor.jailer_path", "/tmp/j"),
        ("hypervisor.vhost_user_vsock_daemon", "/tmp/d"),
        ("hypervisor.enable_annotations", ".*"),
        ("hypervisor.valid_boot_paths", "/"),
        ("hypervisor.kernel_params", "agent.debug_console"),
        ("hypervisor.kernel_params", "quiet init=/bin/sh"),
        ("hypervisor.kernel_params", "loglevel=\"1 agent.log=debug"),
        ("hypervisor.kernel_params", "sysctl.kernel.core_pattern=|/x"),
        ("hypervisor.cpu_features", "x -device foo"),
        ("hypervisor.disable_seccomp", "true"),
        ("runtime.vmm_uid_base", "0"),
        ("runtime.disable_guest_seccomp", "true"),
        ("agent.debug_console_enabled", "true"),
    ] {
        let accepted = annotated(&config, name, text);
        // A daemon's path asks for nothing here: there is no such daemon.
        let nothing = name.ends_with("virtio_fs_daemon");
        assert_eq!(accepted.is_ok_and(|accepted| accepted == config), nothing, "{name}={text}");
    }
    let quiet = annotated(&config, "hypervisor.kernel_params", "quiet cgroup_no_v1=all").unwrap();
    assert_eq!(quiet.hypervisor.kernel_words(), ["quiet", "cgroup_no_v1=all"]);
}

#[test]
fn paths_of_annotations_stay_inside_what_the_operator_allows() {
    let dir = tempfile::tempdir().unwrap();
    let allowed = dir.path().canonicalize().unwrap().join("kernels");
    fs::create_dir(&allowed).unwrap();
    fs::write(allowed.join("good"), "").unwrap();
    fs::write(dir.path().join("secret"), "").unwrap();
    std::os::unix::fs::symlink(dir.path().join("secret"), allowed.join("link")).unwrap();
    let text = format!(
        "[hypervisor.qemu]\nenable_annotations = [\"kernel\"]\nvalid_boot_paths = [\"{}/*\"]\n",
        allowed.display()
    );
    let config = load(&text).unwrap();
    let kernel = |name: String| annotated(&config, "hypervisor.kernel", &name);
    assert!(kernel(format!("{}/good", allowed.display())).is_ok());
    for bad in ["link", "../secret", "sub/dir", "../kernels/good"] {
        assert!(kernel(format!("{}/{bad}", allowed.display())).is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn arbitrary_text_never_panics(text in "\\PC{0,200}") {
        drop(load(&text));
    }

    #[test]
    fn arbitrary_values_of_real_keys_never_panic(
        index in 0..keys::all().count(),
        value in prop_oneof![
            Just("true".to_owned()), any::<i64>().prop_map(|n| n.to_string()), any::<f64>().prop_map(|n| format!("{n:?}")),
            "\"[a-z/.]{0,12}\"", Just("[]".to_owned()), Just("[[1]]".to_owned()), Just("{ a = 1 }".to_owned()),
            Just("1979-05-27".to_owned()),
        ],
    ) {
        let key = keys::all().nth(index).unwrap();
        if let Ok(config) = load(&format!("{} = {value}", key.path)) {
            prop_assert!(config.hypervisor.vcpus() >= 1);
            prop_assert!(config.hypervisor.vcpus() <= config.hypervisor.max_vcpus());
        }
    }

    #[test]
    fn a_slip_of_the_finger_finds_the_key(index in 0..keys::all().count(), at in 0..64_usize) {
        let key = keys::all().nth(index).unwrap();
        let mut name = key.name().to_owned();
        name.insert(at % (name.len() + 1), 'q');
        let path = format!("{}.{name}", key.section());
        prop_assert_eq!(nearest(&path), key.path);
    }

    #[test]
    fn annotations_never_widen_what_the_operator_allows(name in "[a-z_.]{0,40}", text in "\\PC{0,40}") {
        let config = load("hypervisor.qemu.enable_annotations = [\".*\"]").unwrap();
        if let Ok(config) = annotated(&config, &name, &text) {
            let before = Config::defaults(Path::new(PREFIX)).hypervisor;
            let after = config.hypervisor;
            prop_assert_eq!((after.path, after.kernel, after.initrd, after.image, after.firmware),
                (before.path, before.kernel, before.initrd, before.image, before.firmware));
            prop_assert_eq!(after.valid_boot_paths, before.valid_boot_paths);
        }
    }

    #[test]
    fn annotations_of_real_keys_keep_the_rules(index in 0..keys::all().count(), text in "\\PC{0,40}|[0-9.-]{1,12}") {
        let config = load("hypervisor.qemu.enable_annotations = [\".*\"]").unwrap();
        let key = keys::all().nth(index).unwrap();
        let Some(name) = annotation(key) else { return Ok(()) };
        let name = name.strip_prefix("io.katacontainers.config.").unwrap();
        if let Ok(config) = annotated(&config, name, &text) {
            let mut again = config.clone();
            prop_assert!((key.set)(&mut again, &(key.get)(&config), key.rule));
            prop_assert!(config.hypervisor.kernel_words().iter().all(|word| !word.starts_with("agent.")));
        }
    }
}
