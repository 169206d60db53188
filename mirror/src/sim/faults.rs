//! What can go wrong with a simulated disk, and who watches it.

use super::{SimBuffer, SimDisk};
use crate::host::DiskRequest;

/// What goes wrong from now on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Every write fails, leaving arbitrary parts written.
    pub writes: bool,
    /// Every read fails.
    pub reads: bool,
    /// Every flush fails, and what was cached may be lost.
    pub flushes: bool,
    /// Nothing is answered.
    pub hang: bool,
    /// The device is gone: everything fails with ENODEV.
    pub gone: bool,
}

/// Sees every operation of a disk.
pub trait Observer {
    /// The disk has been given `request`.
    fn submitted(&self, disk: &SimDisk, request: &DiskRequest<SimBuffer>);
    /// The disk has completed `request` well.
    fn completed(&self, disk: &SimDisk, request: &DiskRequest<SimBuffer>);
}

/// What goes wrong with writes to a part of the disk, while everything else goes well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteFault {
    /// Where the part begins, in bytes of the disk.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
    /// They get no answer; otherwise they fail, leaving arbitrary parts written.
    pub hangs: bool,
}

impl WriteFault {
    /// Whether it is about `request`.
    pub(super) fn strikes(&self, request: &DiskRequest<SimBuffer>) -> bool {
        match request {
            DiskRequest::Write { offset, span, .. } => {
                let (end, own_end) = (offset + span.len as u64, self.offset + self.len);
                *offset < own_end && self.offset < end
            }
            _ => false,
        }
    }
}
