//! Links on the ring of the device's thread: sockets, TLS, and threads for what may block.

use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use peer::blocking::CONNECT_PATIENCE;
use peer::claim::Fence;
use peer::link::net::{self, Net, Trouble};
use peer::link::{Opened, Reopened};
use peer::{Address, Client};
use rustix::net::{Shutdown, sockopt};

use super::opened::OpenedPeer;
use crate::batch::Batch;
use crate::ring::{self, Ring};
use crate::stream::{Inbox, StreamError, Wire};
use crate::sys::{IoBuffer, Lend};

impl From<StreamError> for Trouble {
    fn from(error: StreamError) -> Self {
        match error {
            // Who tampers with a connection can end it: another one is as safe.
            StreamError::Closed | StreamError::Socket(_) | StreamError::Tls(_) => {
                Self::Broken(error.to_string())
            }
            StreamError::Protocol(_) => Self::Nonsense(error.to_string()),
        }
    }
}

impl net::Lend for Lend {
    fn again(&self) -> Self {
        Lend::again(self)
    }
}

impl net::Batch<Lend> for Batch {
    fn has_room(&self) -> bool {
        Batch::has_room(self)
    }

    fn is_empty(&self) -> bool {
        self.bytes() == 0
    }

    fn push_bytes(&mut self, bytes: &[u8]) {
        Batch::push_bytes(self, bytes);
    }

    fn push_lend(&mut self, lend: Lend) {
        Batch::push_lend(self, lend);
    }
}

impl net::Inbox<Lend> for Inbox {
    async fn array_or_end<const N: usize>(&mut self) -> Result<Option<[u8; N]>, Trouble> {
        Ok(Inbox::array_or_end(self).await?)
    }

    async fn fill_lent(&mut self, target: &Lend) -> Result<(), Trouble> {
        Ok(Inbox::fill_lent(self, target).await?)
    }
}

/// A way to the server of a connection. Both may block.
pub(crate) struct Way {
    /// Whether the server answers on it.
    pub(super) answers: Arc<dyn Fn() -> bool + Send + Sync>,
    /// Goes on where a connection broke.
    pub(super) reopen: Arc<dyn Fn() -> Reopened<OpenedPeer> + Send + Sync>,
}

impl Way {
    /// Through this address, in the name of the same owner; connecting may take `patience`.
    pub(super) fn through(
        address: &Address,
        owner: u128,
        wanted: Fence,
        patience: Duration,
    ) -> Self {
        let (asked, address) = (address.clone(), address.clone());
        Self {
            answers: Arc::new(move || {
                let met = Client::ask(&asked, patience).map(|asked| asked.fence());
                Reopened::<OpenedPeer>::is_met(met, wanted)
            }),
            reopen: Arc::new(move || {
                let ask = async || Client::ask(&address, patience).map(|asked| asked.fence());
                let resume = async || {
                    // It decides when its disk has answered.
                    let resumed = Client::resume(&address, owner, wanted.turn, CONNECT_PATIENCE);
                    // What lies on the disk is known, and reading it might take long.
                    resumed.and_then(|client| OpenedPeer::of(client, None))
                };
                at_once(Reopened::through(wanted, ask, resume, OpenedPeer::fence))
            }),
        }
    }
}

/// The result of what waits for nothing, because it blocks instead.
fn at_once<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match future.as_mut().poll(&mut context) {
        std::task::Poll::Ready(result) => result,
        std::task::Poll::Pending => unreachable!("it blocks where it would wait"),
    }
}

/// The network of the ring.
pub(crate) struct RingNet(pub(super) Rc<Ring>);

impl RingNet {
    /// A connection that does its I/O on the ring.
    pub(super) fn bind(opened: OpenedPeer) -> Opened<Wire> {
        Opened {
            wire: Wire::new(opened.fd, opened.tls),
            export: opened.export,
            address: opened.address,
            fence: opened.fence,
        }
    }
}

impl Net for RingNet {
    type Buffer = IoBuffer;
    type Lend = Lend;
    type Batch = Batch;
    type Inbox = Inbox;
    type Wire = Wire;
    type Way = Way;

    fn now(&self) -> Duration {
        ring::now()
    }

    fn sleep_until(&self, at: Duration) -> impl Future<Output = ()> {
        self.0.sleep_until(at)
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.0.spawn(task);
    }

    fn lend_to_writer(buffer: &IoBuffer, start: usize, len: usize) -> Lend {
        buffer.lend_to_writer(start, len)
    }

    fn lend_to_reader(buffer: &IoBuffer, start: usize, len: usize) -> Lend {
        buffer.lend_to_reader(start, len)
    }

    fn begin(&self, wire: &Wire, silent: Duration) {
        let silent = u32::try_from(silent.as_millis()).unwrap_or(u32::MAX);
        // Unix sockets have no such thing; a TCP connection is as good without, only slower to
        // be given up.
        let _ = sockopt::set_tcp_user_timeout(wire.as_fd(), silent);
    }

    fn inbox(&self, wire: &Wire, capacity: usize) -> Inbox {
        wire.inbox(&self.0, capacity)
    }

    async fn send(&self, wire: &Wire, batch: Batch) -> Result<(), Trouble> {
        Ok(wire.send(&self.0, batch).await?)
    }

    fn say_last(&self, wire: &Wire, farewell: &[u8]) {
        wire.say_last(farewell);
    }

    fn shut_down(&self, wire: &Wire) {
        let _ = rustix::net::shutdown(wire.as_fd(), Shutdown::Both);
    }

    async fn answers(&self, way: &Way) -> bool {
        let answers = Arc::clone(&way.answers);
        match self.0.try_blocking(move || answers()) {
            Ok(asking) => asking.await,
            // Then nobody was asked.
            Err(_) => true,
        }
    }

    async fn reopen(&self, way: &Way) -> Reopened<Opened<Wire>> {
        let reopen = Arc::clone(&way.reopen);
        match self.0.try_blocking(move || reopen()) {
            Ok(reopening) => reopening.await.map(Self::bind),
            Err(error) => Reopened::NotNow(format!("no thread is to be had: {error}")),
        }
    }
}
