//! Makes a guest out of the distribution's kernel: `build --agent PATH --out DIR [--busybox PATH] [--compression C]
//! [--kernel IMAGE [--modules DIR]] [--deb FILE]… [--image erofs|ext4]`.

use std::path::PathBuf;

use guest_image::{
    Compression, Event, FileSystem, ImageOptions, InitrdOptions, Kernel, KernelSource, RootOptions, build_image,
    build_initrd,
};

fn main() {
    if let Err(message) = run() {
        eprintln!("{message}");
        std::process::exit(1);
    }
}

fn run() -> Result<(), String> {
    let mut arguments = std::env::args().skip(1);
    let (mut agent, mut out, mut busybox, mut image, mut modules) = (None, None, None, None, None);
    let mut debs = Vec::new();
    let mut compression = Compression::default();
    let mut file_system = None;
    while let Some(key) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{key} needs a value"))?;
        match key.as_str() {
            "--agent" => agent = Some(PathBuf::from(value)),
            "--out" => out = Some(PathBuf::from(value)),
            "--busybox" => busybox = Some(PathBuf::from(value)),
            "--kernel" => image = Some(PathBuf::from(value)),
            "--modules" => modules = Some(PathBuf::from(value)),
            "--deb" => debs.push(PathBuf::from(value)),
            "--compression" => compression = value.parse()?,
            "--image" => file_system = Some(value.parse::<FileSystem>()?),
            other => return Err(format!("Unknown option {other}")),
        }
    }
    let agent = agent.ok_or("--agent is missing")?;
    let out = out.ok_or("--out is missing")?;
    let cache = out.join("cache");
    let source = match image {
        Some(image) => KernelSource::Files { image, modules },
        None if debs.is_empty() => KernelSource::Distribution { package: None, cache },
        None => KernelSource::Packages { files: debs, cache },
    };

    let mut show = |event| {
        if let Event::Step(what) = event {
            eprintln!("{what}");
        }
    };
    let fail = |error: guest_image::Error| match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    };
    let kernel = Kernel::find(&source, &mut show).map_err(fail)?;
    kernel.install(&out.join("vmlinuz")).map_err(fail)?;
    let root = RootOptions { agent, busybox };
    let built = match file_system {
        None => {
            let options = InitrdOptions { root, compression, output: out.join("initrd.img") };
            build_initrd(&options, &kernel, &mut show)
        }
        Some(file_system) => {
            let options = ImageOptions { root, file_system, output: out.join(format!("root.{file_system}")) };
            build_image(&options, &kernel, &mut show)
        }
    };
    let built = built.map_err(fail)?;
    println!("kernel {} -> {}", kernel.release(), out.join("vmlinuz").display());
    println!("{} {} bytes sha256 {}", built.path.display(), built.size, built.sha256);
    println!("modules: {}", built.modules.join(" "));
    Ok(())
}
