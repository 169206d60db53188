//! What the fuzz targets share: a limit on memory, and checksums that fit.
//!
//! Each target says in its first lines what an input is and what has to hold. A checksum keeps
//! a fuzzer out as well as it keeps damage out, so the targets try the bytes as they came and
//! once more with the checksum put right.

/// Bytes of a map sector.
const SECTOR_BYTES: usize = dirty_map::SECTOR_BYTES;

/// Runs `decode` and returns its value.
///
/// # Panics
///
/// When it holds more than `limit_bytes` of memory at some moment (R17).
pub fn within<T>(limit_bytes: usize, decode: impl FnOnce() -> T) -> T {
    let mut value = None;
    let used = allocation_counter::measure(|| value = Some(decode()));
    assert!(
        used.bytes_max <= limit_bytes as u64,
        "decoding took {} bytes of memory, the limit is {limit_bytes}",
        used.bytes_max
    );
    match value {
        Some(value) => value,
        None => unreachable!("the closure has run"),
    }
}

/// Puts a superblock copy's checksum right: bytes 12 to 15, over all with these as zeroes.
pub fn seal_superblock(copy: &mut [u8]) {
    copy[12..16].fill(0);
    let crc = crc32fast::hash(copy);
    copy[12..16].copy_from_slice(&crc.to_le_bytes());
}

/// Puts a map sector's checksum right: bytes 0 to 3, over the rest.
pub fn seal_sector(sector: &mut [u8]) {
    let crc = crc32fast::hash(&sector[4..SECTOR_BYTES]);
    sector[..4].copy_from_slice(&crc.to_le_bytes());
}

/// The first `len` bytes of `bytes`, with zeroes where it is shorter: small inputs stay small.
#[must_use]
pub fn padded(bytes: &[u8], len: usize) -> Vec<u8> {
    let mut out = bytes[..bytes.len().min(len)].to_vec();
    out.resize(len, 0);
    out
}

/// Takes an input apart from its front; what is missing reads as zeroes.
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    /// The next `N` bytes.
    pub fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let here = self.0.len().min(N);
        out[..here].copy_from_slice(&self.0[..here]);
        self.0 = &self.0[here..];
        out
    }

    /// Whether nothing is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
