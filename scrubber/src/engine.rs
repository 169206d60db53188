//! The engine's mirror as a [`Subject`].

use crate::Subject;
use dirty_map::Extent;
use mirror::engine::{CheckOptions, Checked, ExtentLook};
use mirror::pace::Pacer;
use mirror::scrub_log::ScrubLog;
use mirror::{Disk, Errno, Host, Mirror};
use std::cell::RefCell;
use std::rc::Rc;

impl<H: Host, D: Disk<Buffer = H::Buffer>> Subject for Rc<Mirror<H, D>> {
    type Host = H;

    fn host(&self) -> &H {
        Mirror::host(self)
    }

    fn extents(&self) -> u32 {
        Mirror::extents(self)
    }

    fn next_written(&self, from: Extent) -> Option<Extent> {
        // Past the end there is nothing.
        (from.0 < Mirror::extents(self))
            .then(|| Mirror::next_written(self, from))
            .flatten()
    }

    fn written(&self) -> u64 {
        Mirror::written(self)
    }

    fn look(&self, extent: Extent) -> ExtentLook {
        Mirror::look(self, extent)
    }

    async fn check(&self, extent: Extent, how: CheckOptions) -> Result<Checked, Errno> {
        self.check_extent(extent, how).await
    }

    fn log<R>(&self, lent: impl FnOnce(&mut ScrubLog) -> R) -> R {
        self.with_scrub_log(lent)
    }

    fn log_is_kept(&self) -> bool {
        self.keeps_scrub_log()
    }

    fn error_budget(&self) -> String {
        Mirror::error_budget(self).to_string()
    }

    fn members(&self) -> u64 {
        self.members_as_number()
    }

    fn is_idle(&self) -> bool {
        Mirror::is_idle(self)
    }

    fn sample(&self, pacer: &Rc<RefCell<Pacer>>, on: bool) {
        if on {
            Mirror::sample(self, pacer);
        } else {
            self.end_sampling(pacer);
        }
    }
}
