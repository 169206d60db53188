//! What the export server runs on in the simulator: time, tasks, its disk and its connections; and a
//! witness of what no server may do.

use export::{Memory, Step, Store, Stream, Tasks};
use mirror::host::{Disk as _, DiskRequest, Errno, Host as _, Span};
use mirror::sim::net::SimStream;
use mirror::sim::{SimBuffer, SimDisk, SimHost, World};
use peer::server::admission::SessionId;
use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

/// What no server may do with a disk.
pub(crate) struct Exported {
    disk: SimDisk,
    writer: Cell<Option<SessionId>>,
}

impl Exported {
    /// Of a server that has not let anybody in.
    pub(crate) fn new(disk: SimDisk) -> Rc<Self> {
        Rc::new(Self {
            disk,
            writer: Cell::new(None),
        })
    }

    fn witness(&self, step: Step) {
        match step {
            Step::Granted(session) => {
                let all = self.disk.geometry().size_bytes;
                assert!(
                    !self.disk.is_under_way(0, all),
                    "R13: session {session} may write while requests of an older one are under way"
                );
                self.writer.set(Some(session));
            }
            Step::Begins(session) => assert_eq!(
                self.writer.get(),
                Some(session),
                "R13: a request of session {session} begins, and another one has the right to write"
            ),
        }
    }
}

/// The server's time and tasks.
pub(crate) struct ServerTasks(pub(crate) Rc<World>, pub(crate) Rc<Exported>);

impl Tasks for ServerTasks {
    fn now(&self) -> Duration {
        SimHost(self.0.clone()).now()
    }

    fn sleep(&self, delay: Duration) -> impl Future<Output = ()> {
        SimHost(self.0.clone()).sleep(delay)
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.0.spawn_task(task);
    }

    fn witness(&self, step: Step) {
        self.1.witness(step);
    }
}

/// The server's disk.
pub(crate) struct ServerDisk(pub(crate) Rc<World>, pub(crate) Rc<Exported>);

impl ServerDisk {
    fn span(&self, len: usize) -> Span<SimBuffer> {
        let host = SimHost(self.0.clone());
        let buffer = host.allocate_unzeroed(len.next_multiple_of(4096));
        Span::whole(buffer).slice(0, len)
    }

    async fn change(&self, request: DiskRequest<SimBuffer>) -> Result<(), Errno> {
        assert!(
            self.1.writer.get().is_some(),
            "R13: nobody has the right to write, and somebody does"
        );
        self.1.disk.submit(request).await
    }
}

impl Store for ServerDisk {
    async fn read(&self, offset: u64, mut memory: Memory) -> (Result<(), Errno>, Memory) {
        let span = self.span(memory.data().len());
        let request = DiskRequest::Read {
            offset,
            span: span.clone(),
        };
        let read = self.1.disk.submit(request).await;
        if read.is_ok() {
            span.read(|bytes| memory.data_mut().copy_from_slice(bytes));
        }
        (read, memory)
    }

    async fn write(&self, offset: u64, memory: Memory) -> Result<(), Errno> {
        let span = self.span(memory.data().len());
        span.fill(|bytes| bytes.copy_from_slice(memory.data()));
        let fua = false;
        self.change(DiskRequest::Write { offset, span, fua }).await
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.1.disk.submit(DiskRequest::Flush).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.change(DiskRequest::WriteZeroes { offset, len }).await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.change(DiskRequest::Discard { offset, len }).await
    }
}

/// The server's end of a connection.
pub(crate) struct ServerStream(pub(crate) SimStream);

impl Stream for ServerStream {
    async fn receive(&self, mut memory: Memory, from: usize) -> (io::Result<usize>, Memory) {
        let into = &mut memory.data_mut()[from..];
        let received = poll_fn(|context| {
            self.0.poll_receive(context, |bytes| {
                let taken = bytes.len().min(into.len());
                into[..taken].copy_from_slice(&bytes[..taken]);
                taken
            })
        });
        (Ok(received.await), memory)
    }

    async fn send(&self, bytes: Vec<u8>, part: Range<usize>) -> (io::Result<usize>, Vec<u8>) {
        let sent = poll_fn(|context| self.0.poll_send(context, &bytes[part.clone()])).await;
        let gone = || io::ErrorKind::BrokenPipe.into();
        (sent.ok_or_else(gone), bytes)
    }

    fn secure(&self, _: peer::tls::Tls) {
        unreachable!("nobody here has certificates")
    }

    fn is_secured(&self) -> bool {
        false
    }

    fn shutdown(&self, how: std::net::Shutdown) {
        use std::net::Shutdown::{Read, Write};
        self.0.shut_down(how != Read, how != Write);
    }
}
