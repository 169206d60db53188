//! A client of a simulated mirror, which tells the oracle what it does.

use crate::invariants::Rules;
use crate::machine::SimMirror;
use crate::oracle::{Oracle, Version, fill};
use mirror::sim::{SimBuffer, SimHost, World};
use mirror::{Errno, Host as _, Span};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// Issues requests and tells the oracle.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) mirror: Rc<SimMirror>,
    pub(crate) world: Rc<World>,
    pub(crate) oracle: Rc<RefCell<Oracle>>,
    pub(crate) next_version: Rc<Cell<Version>>,
    /// Where a member's data begins.
    pub(crate) data_offset: u64,
    pub(crate) rules: Option<Rc<Rules>>,
    /// Whether a silent change of a copy is told.
    pub(crate) tells_rot: bool,
}

impl Client {
    fn buffer(&self, len: usize) -> Span<SimBuffer> {
        let buffer = SimHost(self.world.clone()).allocate(len.next_multiple_of(4096));
        Span {
            buffer,
            start: 0,
            len,
        }
    }

    pub(crate) async fn write(&self, offset: u64, len: usize, fua: bool) -> Result<(), Errno> {
        let version = self.next_version.get();
        self.next_version.set(version + 1);
        let span = self.buffer(len);
        let first = offset / 512;
        span.fill(|bytes| {
            for (sector, chunk) in (first..).zip(bytes.chunks_mut(512)) {
                fill(chunk, sector, version);
            }
        });
        let issued = self
            .oracle
            .borrow_mut()
            .issue(first..first + len as u64 / 512, version);
        tracing::trace!("write {version} at sector {first} of {len} bytes, fua {fua}");
        let result = self.mirror.write(offset, span, fua).await;
        tracing::trace!("write {version} answered {result:?}");
        if result.is_ok() {
            self.oracle.borrow_mut().acknowledge(&issued, fua);
            if let Some(rules) = &self.rules {
                rules.r2_loss_before_answer(first, version);
                rules.r2_loss_before_answer(first + len as u64 / 512 - 1, version);
            }
        }
        result
    }

    pub(crate) async fn write_zeroes(&self, offset: u64, len: u64, fua: bool) -> Result<(), Errno> {
        let issued = self
            .oracle
            .borrow_mut()
            .issue(offset / 512..(offset + len) / 512, 0);
        let result = self.mirror.write_zeroes(offset, len, fua).await;
        if result.is_ok() {
            self.oracle.borrow_mut().acknowledge(&issued, fua);
        }
        result
    }

    /// Discards a whole extent (parts are ignored), or what the device has of the last one.
    pub(crate) async fn discard_extent(&self, extent: u64) -> Result<(), Errno> {
        let offset = extent << 22;
        let len = (1 << 22).min(self.mirror.size_bytes() - offset);
        let issued = self
            .oracle
            .borrow_mut()
            .issue(offset / 512..(offset + len) / 512, 0);
        let result = self.mirror.discard(offset, len).await;
        if result.is_ok() {
            self.oracle.borrow_mut().acknowledge(&issued, true);
        }
        result
    }

    pub(crate) async fn flush(&self) -> Result<(), Errno> {
        let begun = self.oracle.borrow_mut().begin_flush();
        let before = self.rules.as_ref().map(|rules| rules.before_flush());
        let result = self.mirror.flush().await;
        if result.is_ok() {
            self.oracle.borrow_mut().flushed(begun);
            if let (Some(rules), Some(before)) = (&self.rules, before) {
                rules.r7_flushed(&before);
            }
        }
        result
    }

    /// The operator accepts what a failed flush may have lost.
    pub(crate) async fn clear_flush_error(&self) {
        let failed = self.mirror.status().flush_error;
        if self.mirror.clear_flush_error().await.is_ok() && failed {
            self.oracle.borrow_mut().accept_loss();
        }
    }

    /// Reads and checks.
    pub(crate) async fn read(&self, offset: u64, len: usize) -> Result<(), Errno> {
        let begun = self.oracle.borrow_mut().begin_read();
        tracing::trace!("read sector {} of {len} bytes", offset / 512);
        let read = self.read_raw(offset, len).await;
        self.oracle.borrow_mut().end_read(begun);
        let bytes = read?;
        for (sector, bytes) in (offset / 512..).zip(bytes.chunks(512)) {
            let checked = self.oracle.borrow_mut().check(sector, bytes, begun);
            assert!(checked.is_ok(), "{}", checked.unwrap_err());
        }
        Ok(())
    }

    pub(crate) async fn read_raw(&self, offset: u64, len: usize) -> Result<Vec<u8>, Errno> {
        let span = self.mirror.read(offset, self.buffer(len)).await?;
        Ok(span.read(<[u8]>::to_vec))
    }
}
