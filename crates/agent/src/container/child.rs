//! The child: walks the plan. It is the copy of one thread of a process with many, so whatever lock, allocator or log
//! another thread was using is frozen in the middle: nothing here allocates, locks or logs. Every called function is a
//! thin wrapper around a system call that takes prepared strings and numbers.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Access, AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, OpenTreeFlags, UnmountFlags};
use rustix::process::DumpableBehavior;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use rustix::thread::{CapabilitySet, CapabilitySets, ThreadNameSpaceType};

use super::attach;
use super::call::{self, MountAttr, Pointers};
use super::channel::{self, NOTE_MAX};
use super::path::{self, Kind};
use super::plan::{Capabilities, Node, Plan, Step};
use super::user::capability;

/// The magic number of devpts, statfs(2).
const DEVPTS: u64 = 0x1cd1;
const RDONLY: u64 = 1;

/// What the kernel had to say about a failure.
pub(super) struct Note {
    bytes: [u8; NOTE_MAX],
    length: usize,
}

impl Note {
    /// Replaces the remark.
    pub(super) fn set(&mut self, text: &[u8]) {
        self.length = 0;
        for (place, byte) in self.bytes.iter_mut().zip(text) {
            *place = *byte;
            self.length += 1;
        }
    }

    fn text(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

/// What the steps leave for one another.
struct Child<'a> {
    plan: &'a Plan,
    arguments: &'a Pointers,
    environment: &'a Pointers,
    socket: BorrowedFd<'a>,
    root: Option<OwnedFd>,
    slave: Option<OwnedFd>,
    in_cwd: bool,
    found: usize,
    note: Note,
}

/// Walks the plan; never returns.
pub(super) fn run(plan: &Plan, arguments: &Pointers, environment: &Pointers, socket: BorrowedFd<'_>) -> ! {
    let note = Note { bytes: [0; NOTE_MAX], length: 0 };
    let mut child =
        Child { plan, arguments, environment, socket, root: None, slave: None, in_cwd: false, found: 0, note };
    for (number, step) in plan.steps.iter().enumerate() {
        if let Err(errno) = child.take(step) {
            channel::fail(socket, number, errno, child.note.text());
            break;
        }
    }
    call::exit(1)
}

impl Child<'_> {
    fn root(&self) -> Result<BorrowedFd<'_>, Errno> {
        self.root.as_ref().map(AsFd::as_fd).ok_or(Errno::BADF)
    }

    fn take(&mut self, step: &Step) -> Result<(), Errno> {
        match step {
            Step::Isolate { keep } => self.isolate(keep),
            Step::Wait(gate) => {
                if !channel::wait_at(self.socket, *gate) {
                    call::exit(1);
                }
                Ok(())
            }
            Step::BecomeRoot => become_user(Uid::ROOT, Gid::ROOT, &[]),
            Step::Session { keyring } => session(keyring),
            Step::Join { namespace, flags, .. } => {
                let kinds = ThreadNameSpaceType::from_bits_retain(*flags);
                rustix::thread::move_into_thread_name_spaces(call::borrow(*namespace), kinds)
            }
            Step::NewCgroupNamespace => call::unshare_cgroup(),
            Step::NoUmask => {
                rustix::process::umask(Mode::empty());
                Ok(())
            }
            Step::DetachMounts { private } => detach_mounts(*private),
            Step::BindRoot(path) => self.bind_root(path),
            Step::PresentRoot => {
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                self.root = Some(rustix::fs::openat(CWD, c"/", flags, Mode::empty())?);
                Ok(())
            }
            Step::Mount(mount) => {
                let root = self.root.as_ref().ok_or(Errno::BADF)?;
                attach::mount(root.as_fd(), mount, &mut self.note)
            }
            Step::Node(node) => make_node(self.root()?, node),
            Step::Link { path, target } => make_link(self.root()?, path, target),
            Step::Ptmx => make_ptmx(self.root()?),
            Step::Terminal { uid, size, console } => self.open_terminal(*uid, *size, *console),
            Step::Sysctl { path, value } => write_file(path, value),
            Step::Hostname(name) => rustix::system::sethostname(name),
            Step::Domainname(name) => rustix::system::setdomainname(name),
            Step::Directory(path) => path::directory(self.root()?, path.to_bytes()).map(drop),
            Step::Mask(path) => attach::mask(self.root()?, path),
            Step::ReadOnly(path) => attach::read_only(self.root()?, path),
            Step::ReadOnlyRoot => {
                let attributes = MountAttr { set: RDONLY, ..MountAttr::default() };
                call::mount_setattr(self.root()?, &attributes, false)
            }
            Step::Pivot => self.pivot(),
            Step::RootPropagation { flag, recursive } => {
                let attributes = MountAttr { propagation: *flag, ..MountAttr::default() };
                call::mount_setattr(self.root()?, &attributes, *recursive)
            }
            Step::Streams(numbers) => self.streams(*numbers),
            Step::CloseOthers => self.close_others(),
            Step::Cwd { path, last } => self.enter(path, *last),
            Step::Bound { keep, last } => bound(*keep, *last),
            Step::User { uid, gid, groups } => become_user(*uid, *gid, groups),
            Step::Capabilities(sets) => set_capabilities(sets),
            Step::GiveBack(sets) => capset(sets),
            Step::NoNewPrivileges => rustix::thread::set_no_new_privs(true),
            Step::Umask(mask) => {
                rustix::process::umask(Mode::from_bits_retain(*mask));
                Ok(())
            }
            Step::Find => self.find(),
            Step::Seccomp { filter, flags } => call::seccomp(filter, *flags),
            Step::Execute => self.execute(),
        }
    }

    fn isolate(&self, keep: &[i32]) -> Result<(), Errno> {
        // Not attachable, and /proc/<pid>/exe (the agent) not to be opened by a process of the container.
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
        call::default_signal_actions();
        // Ends of other containers' lines and pipes, in the middle of being made: kept open here, they would never
        // come to their end.
        let socket = self.socket.as_raw_fd();
        let mut next = 3;
        loop {
            let kept = keep.iter().copied().chain([socket]).filter(|number| *number >= next).min();
            let Some(kept) = kept else { break };
            call::close_range(next, kept - 1)?;
            next = kept + 1;
        }
        call::close_range(next, i32::MAX)
    }

    fn bind_root(&mut self, path: &CStr) -> Result<(), Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let place = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
        let tree = attach::clone_tree(place.as_fd(), true)?;
        attach::attach(tree.as_fd(), place.as_fd())?;
        self.root = Some(tree);
        Ok(())
    }

    fn open_terminal(&mut self, uid: Uid, size: Option<(u16, u16)>, console: bool) -> Result<(), Errno> {
        let root = self.root()?;
        let master = path::open(root, c"/dev/pts/ptmx", OFlags::RDWR | OFlags::NOCTTY)?;
        // Anything may lie at that path; only devpts' own is a terminal of this container.
        if rustix::fs::fstatfs(&master)?.f_type.cast_unsigned() != DEVPTS {
            return Err(Errno::NOTTY);
        }
        rustix::pty::unlockpt(&master)?;
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
        rustix::fs::fchown(&slave, Some(uid), None)?;
        if let Some((rows, columns)) = size {
            let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
            rustix::termios::tcsetwinsize(&master, size)?;
        }
        if console {
            let place = path::mount_point(root, c"/dev/console", Kind::File)?;
            let tree = attach::clone_tree(slave.as_fd(), false)?;
            attach::attach(tree.as_fd(), place.as_fd())?;
        }
        channel::send_terminal(self.socket, master.as_fd())?;
        self.slave = Some(slave);
        Ok(())
    }

    fn pivot(&mut self) -> Result<(), Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let old = rustix::fs::openat(CWD, c"/", flags, Mode::empty())?;
        rustix::process::fchdir(self.root()?)?;
        // Both in one place: the old root comes to lie over the new one, and no directory is needed for it.
        rustix::process::pivot_root(c".", c".")?;
        rustix::process::fchdir(&old)?;
        let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        rustix::mount::mount_change(c".", slave)?;
        rustix::mount::unmount(c".", UnmountFlags::DETACH)?;
        rustix::process::chdir(c"/")
    }

    fn streams(&mut self, numbers: [i32; 3]) -> Result<(), Errno> {
        if let Some(slave) = self.slave.take() {
            call::set_controlling_terminal(slave.as_fd())?;
            return (0..3).try_for_each(|number| call::duplicate(slave.as_fd(), number));
        }
        numbers.iter().zip(0..).try_for_each(|(from, to)| call::duplicate(call::borrow(*from), to))
    }

    fn close_others(&mut self) -> Result<(), Errno> {
        self.root = None;
        let socket = self.socket.as_raw_fd();
        call::close_range(3, socket - 1)?;
        call::close_range(socket + 1, i32::MAX)
    }

    fn enter(&mut self, path: &CStr, last: bool) -> Result<(), Errno> {
        if self.in_cwd {
            return Ok(());
        }
        match rustix::process::chdir(path) {
            // Root of a user namespace may see less than the user.
            Err(Errno::ACCESS | Errno::PERM) if !last => return Ok(()),
            result => result?,
        }
        if !call::inside_root()? {
            self.note.set(b"it lies outside the container");
            return Err(Errno::PERM);
        }
        self.in_cwd = true;
        Ok(())
    }

    fn find(&mut self) -> Result<(), Errno> {
        let mut reason = Errno::NOENT;
        for (number, candidate) in self.plan.candidates.iter().enumerate() {
            match executable(candidate) {
                Ok(()) => {
                    self.found = number;
                    return Ok(());
                }
                Err(Errno::ACCESS) => reason = Errno::ACCESS,
                Err(Errno::NOENT | Errno::NOTDIR) => {}
                Err(error) if reason == Errno::NOENT => reason = error,
                Err(_) => {}
            }
        }
        Err(reason)
    }

    fn execute(&self) -> Result<(), Errno> {
        let program = self.plan.candidates.get(self.found).ok_or(Errno::NOENT)?;
        call::unblock_signals();
        Err(call::execve(program, self.arguments, self.environment))
    }
}

fn executable(path: &CStr) -> Result<(), Errno> {
    let stat = rustix::fs::statat(CWD, path, AtFlags::empty())?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Errno::ACCESS);
    }
    rustix::fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS)
}

fn session(keyring: &CStr) -> Result<(), Errno> {
    rustix::process::setsid()?;
    match call::join_session_keyring(keyring) {
        // A kernel without keyrings, or an agent that may not use them: then there are no keys to be seen either.
        Err(Errno::NOSYS | Errno::PERM) => Ok(()),
        result => result,
    }
}

fn detach_mounts(private: bool) -> Result<(), Errno> {
    let flag = if private { MountPropagationFlags::PRIVATE } else { MountPropagationFlags::DOWNSTREAM };
    rustix::mount::mount_change(c"/", flag | MountPropagationFlags::REC)
}

fn make_node(root: BorrowedFd<'_>, node: &Node) -> Result<(), Errno> {
    if node.bind {
        let place = path::mount_point(root, &node.path, Kind::File)?;
        let tree = rustix::mount::open_tree(
            CWD,
            node.path.as_c_str(),
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
        )?;
        return attach::attach(tree.as_fd(), place.as_fd());
    }
    let (parent, name) = path::parent(root, &node.path)?;
    let mode = Mode::from_bits_retain(node.mode);
    match rustix::fs::mknodat(&parent, name, node.kind, mode, node.device) {
        Err(Errno::EXIST) => {
            let stat = rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
            let same = FileType::from_raw_mode(stat.st_mode) == node.kind && stat.st_rdev == node.device;
            if !same {
                return Err(Errno::EXIST);
            }
        }
        result => result?,
    }
    rustix::fs::chownat(&parent, name, Some(node.uid), Some(node.gid), AtFlags::SYMLINK_NOFOLLOW)
}

fn make_link(root: BorrowedFd<'_>, path: &CStr, target: &CStr) -> Result<(), Errno> {
    let (parent, name) = path::parent(root, path)?;
    match rustix::fs::symlinkat(target, &parent, name) {
        Err(Errno::EXIST) => Ok(()),
        result => result,
    }
}

fn make_ptmx(root: BorrowedFd<'_>) -> Result<(), Errno> {
    let (parent, name) = path::parent(root, c"/dev/ptmx")?;
    match rustix::fs::unlinkat(&parent, name, AtFlags::empty()) {
        Err(Errno::NOENT) => {}
        result => result?,
    }
    rustix::fs::symlinkat(c"pts/ptmx", &parent, name)
}

fn write_file(path: &CStr, value: &[u8]) -> Result<(), Errno> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
    // A parameter is set by one write or not at all.
    if rustix::io::write(&file, value)? == value.len() { Ok(()) } else { Err(Errno::IO) }
}

fn bound(keep: u64, last: u32) -> Result<(), Errno> {
    (0..=last)
        .filter(|number| keep & (1 << number) == 0)
        .try_for_each(|number| rustix::thread::remove_capability_from_bounding_set(capability(number)))
}

fn become_user(uid: Uid, gid: Gid, groups: &[Gid]) -> Result<(), Errno> {
    rustix::thread::set_keep_capabilities(true)?;
    rustix::thread::set_thread_groups(groups)?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    // Leaving user 0 has cleared the effective set, and changing the user has made the process dumpable again.
    let mut sets = rustix::thread::capabilities(None)?;
    sets.effective = sets.permitted;
    rustix::thread::set_capabilities(None, sets)?;
    rustix::thread::set_keep_capabilities(false)?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
}

fn capset(wanted: &Capabilities) -> Result<(), Errno> {
    let set = CapabilitySet::from_bits_retain;
    let sets = CapabilitySets {
        effective: set(wanted.effective),
        permitted: set(wanted.permitted),
        inheritable: set(wanted.inheritable),
    };
    rustix::thread::set_capabilities(None, sets)
}

fn set_capabilities(wanted: &Capabilities) -> Result<(), Errno> {
    capset(wanted)?;
    rustix::thread::clear_ambient_capability_set()?;
    (0..u64::BITS)
        .filter(|number| wanted.ambient & (1 << number) != 0)
        .try_for_each(|number| rustix::thread::configure_capability_in_ambient_set(capability(number), true))
}
