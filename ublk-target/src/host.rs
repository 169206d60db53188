//! The engine's surroundings on a real machine: memory, time, randomness and tasks.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mirror::host::Host;

use crate::ring::{self, Ring, Sleep};
use crate::sys::IoBuffer;

/// The engine's [`Host`] over one thread's ring.
pub(crate) struct RingHost {
    ring: Rc<Ring>,
}

impl RingHost {
    /// A host whose tasks and timers live on `ring`.
    pub(crate) fn new(ring: &Rc<Ring>) -> Self {
        Self {
            ring: Rc::clone(ring),
        }
    }
}

/// Unpredictable bytes from the kernel.
pub(crate) fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    // Up to 256 bytes are never cut short, and the call exists since Linux 3.17.
    assert_eq!(
        filled,
        Ok(bytes.len()),
        "the kernel gives no random numbers"
    );
    bytes
}

impl Host for RingHost {
    type Buffer = IoBuffer;
    type Sleep = Sleep;

    fn now(&self) -> Duration {
        ring::now()
    }

    fn wall_clock_secs(&self) -> u64 {
        // A clock before 1970 is only shown, never used.
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |elapsed| elapsed.as_secs())
    }

    fn sleep(&self, delay: Duration) -> Sleep {
        self.ring.sleep_until(ring::now().saturating_add(delay))
    }

    fn random(&self) -> u128 {
        u128::from_ne_bytes(random_bytes())
    }

    fn spawn(&self, task: Pin<Box<dyn Future<Output = ()>>>) {
        self.ring.spawn(task);
    }

    fn allocate(&self, len: usize) -> IoBuffer {
        IoBuffer::zeroed(len)
    }

    fn allocate_unzeroed(&self, len: usize) -> IoBuffer {
        IoBuffer::recycled(len)
    }
}
