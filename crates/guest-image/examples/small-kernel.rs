//! Builds the small kernel: `small-kernel WORK OUT [PACKAGE.deb|SOURCE-TREE]`.

use std::path::PathBuf;

use guest_image::Event;
use guest_image::small::{BuildOptions, Source, build};

fn main() {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let (work, output, source) = match arguments.as_slice() {
        [work, output] => (work, output, Source::Distribution(None)),
        [work, output, tree] if tree.is_dir() => (work, output, Source::Directory(tree.clone())),
        [work, output, package] => (work, output, Source::Package(package.clone())),
        _ => {
            eprintln!("Usage: small-kernel WORK OUT [PACKAGE.deb|SOURCE-TREE]");
            std::process::exit(2);
        }
    };
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let options = BuildOptions { source, work: work.clone(), output: output.clone(), jobs, fragments: vec![] };
    let mut percent = 0;
    let result = build(&options, &mut |event| match event {
        Event::Step(what) => eprintln!("{what}"),
        Event::Advance { done, total } => {
            let now = (done * 100 / total.max(1)).min(99);
            if now / 10 != percent / 10 {
                eprintln!("  {now} %");
            }
            percent = now;
        }
    });
    match result {
        Ok(kernels) => println!("{}\n{}", kernels.vmlinux.display(), kernels.bzimage.display()),
        Err(error) => {
            let cause = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
            eprintln!("{error}{cause}");
            std::process::exit(1);
        }
    }
}
