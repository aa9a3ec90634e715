//! Reading a Debian package: an `ar` archive of `debian-binary`, `control.tar.*` and `data.tar.*`; see deb(5).

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::compress::{Packing, reader};
use crate::{Error, Result};

const MAGIC: &[u8; 8] = b"!<arch>\n";
const HEADER: usize = 60;

/// The data part of a package, ready to be read as a tar stream.
pub(crate) fn data(path: &Path) -> Result<tar::Archive<Box<dyn Read>>> {
    let not_a_deb = |why: String| Error::NotADeb { path: path.to_owned(), why };
    let mut file = File::open(path).map_err(Error::file("open", path))?;
    let length = file.metadata().map_err(Error::file("read", path))?.len();

    let mut magic = [0; 8];
    match file.read_exact(&mut magic) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(not_a_deb("it is too short".into())),
        other => other.map_err(Error::file("read", path))?,
    }
    if &magic != MAGIC {
        return Err(not_a_deb("it does not begin as an ar archive".into()));
    }

    let mut position = MAGIC.len() as u64;
    let mut first = true;
    while position < length {
        if length - position < HEADER as u64 {
            return Err(not_a_deb("it ends inside a member's header".into()));
        }
        file.seek(SeekFrom::Start(position)).map_err(Error::file("read", path))?;
        let mut header = [0; HEADER];
        file.read_exact(&mut header).map_err(Error::file("read", path))?;
        let member = Member::parse(&header).ok_or_else(|| not_a_deb("a member's header is damaged".into()))?;
        position += HEADER as u64;
        if member.size > length - position {
            return Err(not_a_deb(format!("it is cut off inside {}", member.name)));
        }
        if first && member.name != "debian-binary" {
            return Err(not_a_deb(format!("its first member is {}, not debian-binary", member.name)));
        }
        first = false;
        if let Some(suffix) = member.name.strip_prefix("data.tar") {
            let packing = Packing::by_suffix(suffix)
                .ok_or_else(|| not_a_deb(format!("its data is packed in an unknown way ({})", member.name)))?;
            let stream = BufReader::with_capacity(1 << 16, file).take(member.size);
            let stream = reader(packing, stream).map_err(Error::file("unpack", path))?;
            return Ok(tar::Archive::new(stream));
        }
        // Members start at even offsets.
        position += member.size + member.size % 2;
    }
    Err(not_a_deb("it has no data.tar".into()))
}

struct Member {
    name: String,
    size: u64,
}

impl Member {
    fn parse(header: &[u8; HEADER]) -> Option<Member> {
        let field = |range: std::ops::Range<usize>| std::str::from_utf8(&header[range]).ok().map(str::trim_end);
        if &header[58..60] != b"`\n" {
            return None;
        }
        Some(Member { name: field(0..16)?.trim_end_matches('/').to_owned(), size: field(48..58)?.parse().ok()? })
    }
}

/// Unpacks those files of a package that `wanted` chooses below `into`, which appears complete or not at all.
pub(crate) fn unpack(path: &Path, into: &Path, wanted: impl Fn(&Path) -> bool) -> Result<()> {
    let parent = into.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(Error::file("make", parent))?;
    let staging = tempfile::Builder::new()
        .prefix(".unpack-")
        .tempdir_in(parent)
        .map_err(Error::file("make a directory in", parent))?;
    let mut archive = data(path)?;
    let failed = Error::file("unpack", path);
    let result = (|| {
        for entry in archive.entries()? {
            let mut entry = entry?;
            let name = strip(&entry.path()?);
            if wanted(&name) {
                // unpack_in refuses paths and links that lead out of the directory.
                entry.unpack_in(staging.path())?;
            }
        }
        Ok(())
    })();
    result.map_err(failed)?;
    match fs::rename(staging.path(), into) {
        Ok(()) => drop(staging.keep()),
        // Someone else was quicker: what is there is the same.
        Err(_) if into.is_dir() => {}
        Err(error) => return Err(Error::file("make", into)(error)),
    }
    Ok(())
}

/// Debian's entries begin with `./`.
pub(crate) fn strip(path: &Path) -> PathBuf {
    path.strip_prefix("./").unwrap_or(path).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tar(entries: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, data) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, *data).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn xz(data: &[u8]) -> Vec<u8> {
        // One block as XZ Utils writes it would need an encoder; the tool is part of every Debian.
        use std::io::Write as _;
        let mut child = std::process::Command::new("xz")
            .arg("-c")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(data).unwrap();
        child.wait_with_output().unwrap().stdout
    }

    fn ar(members: &[(&str, &[u8])]) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        for (name, data) in members {
            out.extend(format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, 0, "100644", data.len()).as_bytes());
            out.extend_from_slice(data);
            if data.len() % 2 == 1 {
                out.push(b'\n');
            }
        }
        out
    }

    fn unpacked(deb: &[u8]) -> Result<Vec<(String, Vec<u8>)>> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.deb");
        fs::write(&path, deb).unwrap();
        let into = directory.path().join("out");
        unpack(&path, &into, |path| path.starts_with("boot"))?;
        let mut found = Vec::new();
        for entry in fs::read_dir(into.join("boot")).unwrap() {
            let entry = entry.unwrap();
            found.push((entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()));
        }
        found.sort();
        Ok(found)
    }

    #[test]
    fn packages_of_every_packing_are_read() {
        let data = tar(&[("./boot/vmlinuz-1", b"kernel"), ("./usr/share/doc", b"no"), ("./boot/config", b"c")]);
        let packed = [
            ("data.tar", data.clone()),
            ("data.tar.gz/", {
                use std::io::Write as _;
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(&data).unwrap();
                encoder.finish().unwrap()
            }),
            ("data.tar.xz", xz(&data)),
            ("data.tar.zst", ruzstd::encoding::compress_to_vec(&data[..], ruzstd::encoding::CompressionLevel::Fastest)),
        ];
        for (name, data) in packed {
            // The control part has an odd length, so that padding matters.
            let deb = ar(&[("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), (name, &data)]);
            let found = unpacked(&deb).unwrap();
            let expected = [("config".to_owned(), b"c".to_vec()), ("vmlinuz-1".to_owned(), b"kernel".to_vec())];
            assert_eq!(found, expected, "{name}");
        }
    }

    #[test]
    fn what_is_no_package_says_why() {
        let data = tar(&[("./boot/a", b"a")]);
        let whole = ar(&[("debian-binary", b"2.0\n"), ("data.tar", &data)]);
        let cases: [(&[u8], &str); 7] = [
            (b"", "too short"),
            (b"#!/bin/sh and more", "does not begin as an ar archive"),
            (&whole[..80], "inside a member's header"),
            (&whole[..whole.len() - 600], "cut off inside data.tar"),
            (&ar(&[("other", b"")]), "its first member is other"),
            (&ar(&[("debian-binary", b"2.0\n")]), "no data.tar"),
            (&ar(&[("debian-binary", b"2.0\n"), ("data.tar.lzma", b"")]), "data.tar.lzma"),
        ];
        for (deb, why) in cases {
            let text = unpacked(deb).unwrap_err().to_string();
            assert!(text.contains("a.deb is not a Debian package") && text.contains(why), "{text}");
        }
    }

    #[test]
    fn nothing_leaves_the_directory() {
        let mut header = tar::Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..17].copy_from_slice(b"boot/../../escape");
        header.set_size(1);
        header.set_mode(0o644);
        header.set_cksum();
        let mut builder = tar::Builder::new(Vec::new());
        builder.append(&header, &b"x"[..]).unwrap();
        let data = builder.into_inner().unwrap();

        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.deb");
        fs::write(&path, ar(&[("debian-binary", b"2.0\n"), ("data.tar", &data)])).unwrap();
        unpack(&path, &directory.path().join("deep/out"), |_| true).unwrap();
        assert!(!directory.path().join("escape").exists() && !directory.path().join("deep/escape").exists());
    }

    proptest::proptest! {
        #[test]
        fn no_input_makes_it_panic(noise in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400), at in 0_usize..300) {
            let mut deb = ar(&[("debian-binary", b"2.0\n"), ("data.tar", &tar(&[("./boot/a", b"a")]))]);
            let end = (at + noise.len()).min(deb.len());
            deb.splice(at..end, noise);
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("a.deb");
            fs::write(&path, &deb).unwrap();
            let _ = unpack(&path, &directory.path().join("out"), |_| true);
        }
    }
}
