//! Packing and unpacking: what packages, modules and initrds are wrapped in. All of it pure Rust.

use std::fmt;
use std::io::{self, Read, Write};
use std::str::FromStr;

use ruzstd::encoding::{CompressionLevel, compress_to_vec};

/// How an initrd is packed. What is quickest to boot is in the crate's README.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Not at all: the quickest start.
    #[default]
    None,
    /// gzip: small, every kernel reads it.
    Gzip,
    /// LZ4: larger, cheap to unpack.
    Lz4,
    /// Zstandard: small, cheap to unpack; the kernel needs CONFIG_RD_ZSTD.
    Zstd,
}

impl Compression {
    /// All of them, for help texts and tests.
    pub const ALL: [Compression; 4] = [Compression::None, Compression::Gzip, Compression::Lz4, Compression::Zstd];

    /// Packs `data`; the result depends on nothing else.
    pub(crate) fn pack(self, data: Vec<u8>) -> io::Result<Vec<u8>> {
        match self {
            Compression::None => Ok(data),
            Compression::Gzip => {
                // No name and no time in the header.
                let mut encoder = flate2::GzBuilder::new().mtime(0).write(Vec::new(), flate2::Compression::best());
                encoder.write_all(&data)?;
                encoder.finish()
            }
            Compression::Lz4 => Ok(lz4_legacy(&data)),
            Compression::Zstd => Ok(compress_to_vec(&data[..], CompressionLevel::Fastest)),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Compression::None => "none",
            Compression::Gzip => "gzip",
            Compression::Lz4 => "lz4",
            Compression::Zstd => "zstd",
        })
    }
}

impl FromStr for Compression {
    type Err = String;

    fn from_str(name: &str) -> Result<Compression, String> {
        Compression::ALL
            .into_iter()
            .find(|compression| compression.to_string() == name)
            .ok_or_else(|| format!("Unknown compression {name}; known are none, gzip, lz4, zstd"))
    }
}

/// The "legacy" LZ4 format, the only one that the kernel unpacks: a magic number, then blocks of 8 MiB, each with its
/// packed length before it.
fn lz4_legacy(data: &[u8]) -> Vec<u8> {
    let mut out = 0x184c_2102_u32.to_le_bytes().to_vec();
    for block in data.chunks(8 << 20) {
        let packed = lz4_flex::block::compress(block);
        // A block of 8 MiB can't grow beyond 32 bits.
        out.extend_from_slice(&u32::try_from(packed.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend_from_slice(&packed);
    }
    out
}

/// What a file is packed in, told by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    None,
    Gzip,
    Xz,
    Zstd,
}

impl Packing {
    /// `suffix` is what follows `.tar` or `.ko`: empty, `.gz`, `.xz`, `.zst`.
    pub(crate) fn by_suffix(suffix: &str) -> Option<Packing> {
        match suffix {
            "" => Some(Packing::None),
            ".gz" => Some(Packing::Gzip),
            ".xz" => Some(Packing::Xz),
            ".zst" => Some(Packing::Zstd),
            _ => None,
        }
    }
}

/// Unpacks a stream.
pub(crate) fn reader<'a>(packing: Packing, input: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match packing {
        Packing::None => Box::new(input),
        Packing::Gzip => Box::new(flate2::read::MultiGzDecoder::new(input)),
        Packing::Xz => Box::new(lzma_rust2::XzReader::new(input, true)),
        Packing::Zstd => Box::new(
            ruzstd::decoding::StreamingDecoder::new(input)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?,
        ),
    })
}
