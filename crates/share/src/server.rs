//! The virtio-fs server: a process of ours, confined to the export of one sandbox.
//!
//! It parses what the guest sends, so it runs in a jail ([`jail`]): the export is its whole file system, it has no
//! network, only the capabilities that acting for the guest's users takes, and the system calls listed below. The VMM
//! reaches it through one socket that is connected before either of them runs. It ends when the VMM hangs up.

use std::fs::{self, File};
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use jail::{Capability, Jail, Limit, Namespaces, Program, Refusal, Resource, Root, Seccomp};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Rlimit, getrlimit, setrlimit};
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use virtiofsd::passthrough::{self, CachePolicy, PassthroughFs};
use virtiofsd::vhost_user::VhostUserFsBackendBuilder;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::{Error, Share};

/// The verb by which `main` knows this process.
pub const VERB: &str = "__share";

/// The number of the listening socket in the server.
const LISTENER: RawFd = 3;

/// Descriptors the server needs for itself; the rest of its limit is the guest's.
const OWN_DESCRIPTORS: u64 = 64;

/// How the server treats the guest.
#[derive(Debug)]
pub struct ServerOptions {
    /// What the guest may cache: `auto`, `always`, `metadata` or `never`.
    pub cache: String,
    /// The directories of the cgroups it joins.
    pub cgroups: Vec<PathBuf>,
    /// Where its standard error goes; nowhere when absent.
    pub log: Option<OwnedFd>,
}

impl Share {
    /// Starts the server and returns it with the socket that the VMM's vhost-user device takes.
    ///
    /// Must be called on a thread that lives as long as the server should: it dies with that thread.
    ///
    /// # Errors
    ///
    /// The socket could not be made, the journal could not be written, or the jail could not be shut.
    pub fn start_server(
        &mut self,
        options: ServerOptions,
        recorder: &dyn vmm::Recorder,
    ) -> Result<(jail::Process, OwnedFd), Error> {
        let (listener, socket) = connected_pair(&self.base.join("server.sock")).map_err(Error::Server)?;
        let mut fds = vec![(LISTENER, OwnedFd::from(listener))];
        fds.extend(options.log.map(|log| (2, log)));
        let program = Program::Helper { verb: VERB.to_owned(), args: vec![options.cache.into()] };
        let limit = getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(1 << 20);
        let jail = Jail {
            namespaces: Namespaces::ALL,
            root: Root::Directory(self.export()),
            // What acting for any user of the guest takes. Not CAP_DAC_READ_SEARCH: no handles, no search.
            capabilities: vec![
                Capability::Chown,
                Capability::DacOverride,
                Capability::Fowner,
                Capability::Fsetid,
                Capability::Setgid,
                Capability::Setuid,
                Capability::Mknod,
                Capability::Setfcap,
            ],
            limits: vec![
                Limit { resource: Resource::Core, value: 0 },
                Limit { resource: Resource::OpenFiles, value: limit },
            ],
            cgroups: options.cgroups,
            seccomp: Some(Seccomp { allow: SYSTEM_CALLS.to_vec(), otherwise: Refusal::Kill }),
            ..Jail::new(program, 0, 0)
        };
        let held = jail.spawn(fds).map_err(|error| Error::Server(io::Error::other(error)))?;
        recorder.process("share", held.pid(), held.start_time()).map_err(Error::Server)?;
        let process = held.release().map_err(|error| Error::Server(io::Error::other(error)))?;
        Ok((process, socket))
    }
}

/// A listening socket with one connection waiting in it, and the other end of that connection.
///
/// The protocol's library wants to accept; the path exists only for the moment between bind and connect.
fn connected_pair(path: &std::path::Path) -> io::Result<(UnixListener, OwnedFd)> {
    let listener = UnixListener::bind(path)?;
    let stream = UnixStream::connect(path);
    fs::remove_file(path)?;
    Ok((listener, stream?.into()))
}

/// `kata __share`: the server process, from its first instruction to its end.
#[must_use]
pub fn server_main(args: impl IntoIterator<Item = std::ffi::OsString>) -> ExitCode {
    let cache = args.into_iter().next().and_then(|cache| cache.into_string().ok()).unwrap_or_default();
    match serve(&cache) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("virtio-fs server: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(cache: &str) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut attached = jail::attach()?;
    let listener = attached.take_fd(LISTENER).ok_or("No socket was handed over")?;
    let config = config(cache)?;
    log_to_stderr();
    attached.confine()?;

    let file_system = PassthroughFs::new(config)?;
    let backend = VhostUserFsBackendBuilder::default().set_thread_pool_size(0).build(file_system)?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("virtio-fs".to_owned(), Arc::new(backend), memory)
        .map_err(|error| format!("Cannot set up the device: {error}"))?;
    let mut listener = listener_from(listener);
    daemon.start(&mut listener).map_err(|error| format!("Cannot talk to the VMM: {error}"))?;
    // The VMM hangs up when it ends, however it ends: there is nobody left to serve, and nothing to report.
    drop(daemon.wait());
    Ok(())
}

#[allow(unsafe_code)]
fn listener_from(socket: OwnedFd) -> Listener {
    // SAFETY: the descriptor is a listening socket that nothing else owns any more.
    unsafe { Listener::from_raw_fd(socket.into_raw_fd()) }
}

/// The file system as the guest sees it. Reads what of `/proc` is needed before the jail takes it away.
fn config(cache: &str) -> Result<passthrough::Config, Box<dyn std::error::Error + Send + Sync>> {
    let (cache_policy, timeout) = match cache {
        "auto" => (CachePolicy::Auto, Duration::from_secs(1)),
        "always" => (CachePolicy::Always, Duration::from_secs(86_400)),
        "metadata" => (CachePolicy::Metadata, Duration::from_secs(86_400)),
        "never" => (CachePolicy::Never, Duration::ZERO),
        other => return Err(format!("Unknown cache policy `{other}`").into()),
    };
    let own = rustix::fs::open("/proc/self/fd", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mounts = File::open("/proc/self/mountinfo")?;
    // Each inode the guest knows costs a descriptor here.
    let limit = getrlimit(rustix::process::Resource::Nofile);
    setrlimit(rustix::process::Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    Ok(passthrough::Config {
        entry_timeout: timeout,
        attr_timeout: timeout,
        cache_policy,
        root_dir: "/".to_owned(),
        xattr: true,
        proc_sfd_rawfd: Some(File::from(own)),
        proc_mountinfo_rawfd: Some(mounts),
        announce_submounts: true,
        readdirplus: !timeout.is_zero(),
        guest_fd_limit: limit.maximum.unwrap_or(1 << 20).saturating_sub(OWN_DESCRIPTORS),
        ..Default::default()
    })
}

/// Warnings of the libraries go where the jail's caller put standard error.
fn log_to_stderr() {
    struct Stderr;
    impl log::Log for Stderr {
        fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
            metadata.level() <= log::Level::Warn
        }
        fn log(&self, record: &log::Record<'_>) {
            if self.enabled(record.metadata()) {
                eprintln!("virtio-fs server: {}", record.args());
            }
        }
        fn flush(&self) {}
    }
    static LOGGER: Stderr = Stderr;
    // Fails only if there is a logger already, which would do as well.
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(log::LevelFilter::Warn);
    }
}

/// What serving files takes, and nothing that starts programs, makes sockets, mounts, traces or signals others.
const SYSTEM_CALLS: &[i64] = &[
    // The device: its socket, its queues, the guest's memory.
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    // Files, by descriptor.
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_copy_file_range,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_syncfs,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_getdents64,
    libc::SYS_readlinkat,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_symlinkat,
    libc::SYS_linkat,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_umask,
    libc::SYS_fchdir,
    libc::SYS_name_to_handle_at,
    // Extended attributes; by name only relative to the working directory, after fchdir.
    libc::SYS_fgetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_flistxattr,
    libc::SYS_fremovexattr,
    libc::SYS_getxattr,
    libc::SYS_setxattr,
    libc::SYS_listxattr,
    libc::SYS_removexattr,
    // Acting for a user of the guest.
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_geteuid,
    libc::SYS_getegid,
    // Threads of its own, and what the C library does behind one's back.
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_unshare,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_prctl,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_tgkill,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_exit,
    libc::SYS_exit_group,
];
