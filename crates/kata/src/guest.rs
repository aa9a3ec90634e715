//! `kata image build` and `kata kernel build`.

use std::io::{IsTerminal as _, Write as _};
use std::num::NonZero;

use guest_image::{
    Event, FileSystem, ImageOptions, InitrdOptions, Kernel, KernelSource, RootOptions, build_image, build_initrd, small,
};

use crate::cli::{ImageArgs, KernelArgs};
use crate::failure::Failure;
use crate::output;

/// `kata image build`.
pub(crate) fn image(args: &ImageArgs) -> Result<(), Failure> {
    let cache = args.out.join("cache");
    let source = match &args.kernel {
        Some(image) => KernelSource::Files { image: image.clone(), modules: args.modules.clone() },
        None if args.deb.is_empty() => KernelSource::Distribution { package: None, cache },
        None => KernelSource::Packages { files: args.deb.clone(), cache },
    };
    let agent = match &args.agent {
        Some(agent) => agent.clone(),
        None => config::installed_prefix()?.join("libexec/kata-agent"),
    };
    let file_system = args.image.as_deref().map(str::parse::<FileSystem>).transpose().map_err(Failure::new)?;
    let compression = args.compression.as_deref().map(str::parse).transpose().map_err(Failure::new)?;

    let mut progress = Progress::default();
    let mut show = |event| progress.show(event);
    let kernel = Kernel::find(&source, &mut show).map_err(Failure::new)?;
    let installed = args.out.join("vmlinuz");
    kernel.install(&installed).map_err(Failure::new)?;
    let root = RootOptions { agent, busybox: args.busybox.clone() };
    let built = match file_system {
        None => {
            let output = args.out.join("initrd.img");
            build_initrd(
                &InitrdOptions { root, compression: compression.unwrap_or_default(), output },
                &kernel,
                &mut show,
            )
        }
        Some(file_system) => {
            let output = args.out.join(format!("root.{file_system}"));
            build_image(&ImageOptions { root, file_system, output }, &kernel, &mut show)
        }
    };
    let built = built.map_err(Failure::new)?;
    output::print(&format!(
        "{}: kernel {}\n{}: {} KiB, {} modules, sha256 {}\n",
        installed.display(),
        kernel.release(),
        built.path.display(),
        built.size.div_ceil(1024),
        built.modules.len(),
        built.sha256
    ))
}

/// `kata kernel build`.
pub(crate) fn kernel(args: KernelArgs) -> Result<(), Failure> {
    let source = match (args.deb, args.source) {
        (Some(package), _) => small::Source::Package(package),
        (None, Some(tree)) => small::Source::Directory(tree),
        (None, None) => small::Source::Distribution(None),
    };
    let options = small::BuildOptions {
        source,
        work: args.work.unwrap_or_else(|| args.out.join("kernel")),
        jobs: args.jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, NonZero::get)),
        fragments: args.fragment,
        output: args.out,
    };
    let mut progress = Progress::default();
    let kernels = small::build(&options, &mut |event| progress.show(event)).map_err(Failure::new)?;
    output::print(&format!("{}\n{}\n", kernels.vmlinux.display(), kernels.bzimage.display()))
}

/// Progress on standard error: a line for each step, and on a terminal how far it is.
#[derive(Debug, Default)]
struct Progress {
    percent: Option<u64>,
}

impl Progress {
    fn show(&mut self, event: Event) {
        let mut stderr = std::io::stderr();
        // It's only a courtesy: a reader that has gone doesn't stop the work.
        match event {
            Event::Step(what) => {
                let end = if self.percent.take().is_some() { "\r\x1b[K" } else { "" };
                drop(writeln!(stderr, "{end}{what}"));
            }
            Event::Advance { done, total } => {
                // The total is an estimate, so the last percent is left for the end.
                let now = (done.saturating_mul(100) / total.max(1)).min(99);
                if self.percent != Some(now) && stderr.is_terminal() {
                    self.percent = Some(now);
                    drop(write!(stderr, "\r  {now} %"));
                }
            }
        }
    }
}
