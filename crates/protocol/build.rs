//! Generates the messages and services from `proto/` in pure Rust: no protoc is needed.

use std::path::Path;
use std::{env, fs, io};

const PROTOS: [&str; 6] = ["agent", "csi", "health", "oci", "runtimeoptions", "types"];

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=proto");
    let out = env::var_os("OUT_DIR").ok_or_else(|| io::Error::other("OUT_DIR is not set; run this through cargo"))?;
    let out = Path::new(&out);

    ttrpc_codegen::Codegen::new()
        .out_dir(out)
        .inputs(PROTOS.map(|name| format!("proto/{name}.proto")))
        .include("proto")
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize { async_all: true, ..Default::default() })
        .run()?;

    // `include!` rejects the inner attributes that the generators write at the head of each file.
    for name in PROTOS.iter().map(|name| (*name).to_owned()).chain(["agent_ttrpc".into(), "health_ttrpc".into()]) {
        let path = out.join(format!("{name}.rs"));
        let text = fs::read_to_string(&path)?;
        let kept: String = text.lines().filter(|line| !line.starts_with("#![") && !line.starts_with("//!")).fold(
            String::with_capacity(text.len()),
            |mut kept, line| {
                kept.push_str(line);
                kept.push('\n');
                kept
            },
        );
        fs::write(&path, kept)?;
    }
    Ok(())
}
