//! The ublk front end: `/dev/ublkbN`. The only module that knows libublk's devices and queues.
//!
//! # What it promises
//!
//! - Every request is answered exactly once with the engine's error (R9). Reads and writes are
//!   answered with their length, all others with 0.
//! - A request that is answered while a device still uses its buffer (a lost member's orphan)
//!   leaves the buffer to that orphan; the tag goes on with a fresh one (R6).
//! - The device is made with user recovery and reissue, so that a daemon that dies leaves it
//!   in place with its requests kept. It is deleted by a clean stop, and by the next start.
//!
//! It does not take over the device that a dead daemon left: that device is deleted, its
//! unanswered requests fail, and the mirror appears on a new one.
//!
//! # Threads
//!
//! ```text
//! another thread                         the mirror's thread (the ring)
//! ADD_DEV ───────────────── device ────► queue, one task a tag, FETCH
//! START_DEV (reads partitions) ────────► serves those reads
//! STOP_DEV (waits for requests) ───────► serves them, tags end
//! DEL_DEV (waits for the queue's end) ─► has let go of the queue
//! ```
//!
//! Control commands wait for I/O that the mirror's thread has to do, so each runs on a thread
//! of its own, with a control ring of its own, because libublk's is thread-local. They inherit
//! the I/O flusher's mark from the mirror's thread.
//!
//! # A tag's life
//!
//! ```text
//! FETCH ──► request ──► engine ──► COMMIT_AND_FETCH ──► request ──► …  until the queue aborts
//! ```
//!
//! While a command is with the kernel the tag's buffer is lent to it: for a write the kernel
//! fills it before the command completes, for a read it empties it after the commit.

pub(crate) mod users;

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::path::Path;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use io_uring::{IoUring, squeue};
use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::io::{BufDesc, UblkDev, UblkQueue};
use libublk::uring_async::ublk_reap_io_events_with_update_queue;
use libublk::{UblkError, UblkFlags, sys as abi, ublk_init_ctrl_task_ring};
use mirror::host::{Buffer as _, Errno, Span};

use crate::daemon::Engine;
use crate::executor::Executor;
use crate::host;
use crate::ready::Failure;
use crate::ring::{self, Ring};
use crate::sys::{IoBuffer, KernelLend};
use peer::signal::Signal;

/// Longest read or write: what one tag's buffer holds.
const MAX_REQUEST_BYTES: u32 = 512 << 10;
/// Longest discard and write-zeroes, 1 GiB: far above an extent, because whole extents are
/// what a discard is good for, and below 4 GiB, where kernels before 6.11 lose the upper bits
/// of write-zeroes.
const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// The kernel's unit in requests and parameters.
const SECTOR_SHIFT: u32 = 9;
/// A control command that takes longer has met a kernel that lost it.
const CONTROL_LIMIT: Duration = Duration::from_secs(20);
/// Stopping waits for requests under way; each of them ends within the engine's deadline, or with
/// the stall if all members share one.
const STOP_LIMIT: Duration = Duration::from_secs(600);
const CONTROL_HINT: &str = "kernels 6.18.4, 6.18.5 and some of Ubuntu's 6.17 have a defect \
    there: update the kernel, or use --front nbd";
const DEL_DEV: &str = "DEL_DEV";
const DELETE_HINT: &str = "another process still has the device open or mounted";
/// A deleted device goes when the last process closes it; the daemon does not wait for that.
const DELETE_LIMIT: Duration = Duration::from_secs(3);

/// The block device, as the daemon's other tasks see it.
pub(crate) struct UblkFront {
    path: String,
}

impl UblkFront {
    /// The block device's path.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }
}

/// What the device looks like to the kernel.
#[derive(Clone, Copy)]
struct Shape {
    size_bytes: u64,
    block_bytes: u32,
    depth: u16,
    /// Random; the kernel keeps it with the device, which can thus be told from others that
    /// have had its number.
    cookie: u64,
}

/// Which device a daemon made, as its successor reads it: number and cookie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Note {
    number: u32,
    cookie: u64,
}

impl Note {
    fn read(path: &Path) -> Option<Self> {
        let text = std::fs::read_to_string(path).ok()?;
        let (number, cookie) = text.trim().split_once(' ')?;
        let cookie = u64::from_str_radix(cookie, 16).ok()?;
        Some(Self {
            number: number.parse().ok()?,
            cookie,
        })
    }

    fn write(self, path: &Path) {
        let text = format!("{} {:016x}\n", self.number, self.cookie);
        if let Err(error) = std::fs::write(path, text) {
            tracing::warn!(
                "cannot note the device's number in {} ({error})",
                path.display()
            );
        }
    }
}

/// Serves `engine` as a block device until `stop_asked`; calls `up` when it can be opened.
/// `note` is the file in which the device's number outlives the daemon.
pub(crate) fn serve(
    ring: &Rc<Ring>,
    engine: &Rc<Engine>,
    depth: u16,
    note: &Path,
    stop_asked: &Rc<Signal>,
    up: impl FnOnce(Rc<UblkFront>),
) -> Result<(), Failure> {
    if !Path::new("/dev/ublk-control").exists() {
        return Err(Failure::failed(
            "the kernel has no /dev/ublk-control; load the module with `modprobe ublk_drv`, or \
             use --front nbd",
        ));
    }
    let shape = Shape {
        size_bytes: engine.size_bytes(),
        block_bytes: engine.logical_block_bytes(),
        depth,
        cookie: random_cookie(),
    };
    delete_left_over(ring, note)?;
    let adding = command(Rc::clone(ring), "ADD_DEV", CONTROL_LIMIT, move || {
        add_device(shape)
    });
    let (control, device) = ring.block_on(adding).map_err(lost_ring)??;
    let path = format!("/dev/ublkb{}", device.dev_info.dev_id);
    Note {
        number: device.dev_info.dev_id,
        cookie: shape.cookie,
    }
    .write(note);
    let served = match UblkQueue::new(0, &device) {
        Ok(queue) => {
            // The buffers are ours and locked already; libublk waits for this to be said.
            device.notify_buffer_registration_complete(false);
            let front = Front {
                ring,
                engine,
                queue: &queue,
                control: &control,
                device: &device,
            };
            front.run(stop_asked, || up(Rc::new(UblkFront { path: path.clone() })))
        }
        Err(error) => Err(Failure::failed(format!(
            "cannot set up the ublk queue ({error})"
        ))),
    };
    // The kernel lets the device go when the queue (dropped above) and its file are closed.
    drop(device);
    let deleting = command(Rc::clone(ring), DEL_DEV, DELETE_LIMIT, move || {
        control.del_dev()
    });
    if let Err(failure) = ring.block_on(deleting).map_err(lost_ring)? {
        tracing::warn!(
            "{path} goes when the last process closes it ({})",
            failure.message
        );
    }
    let _ = std::fs::remove_file(note);
    served
}

/// Deletes the device of a daemon that died: without one its users would wait for ever.
fn delete_left_over(ring: &Rc<Ring>, note: &Path) -> Result<(), Failure> {
    let Some(left) = Note::read(note) else {
        return Ok(());
    };
    if !Path::new(&format!("/sys/class/ublk-char/ublkc{}", left.number)).exists() {
        return Ok(());
    }
    let Ok(number) = i32::try_from(left.number) else {
        return Ok(());
    };
    let deleting = command(Rc::clone(ring), DEL_DEV, DELETE_LIMIT, move || {
        let control = UblkCtrl::new_simple(number)?;
        if control.dev_info().ublksrv_flags == left.cookie {
            tracing::warn!(
                "/dev/ublkb{number} lost its daemon; it is deleted and its unanswered requests fail"
            );
            control.del_dev()?;
        }
        Ok(())
    });
    if let Err(failure) = ring.block_on(deleting).map_err(lost_ring)? {
        tracing::warn!("/dev/ublkb{number} is not gone yet ({})", failure.message);
    }
    Ok(())
}

/// Never zero, which is what other programs' devices carry.
fn random_cookie() -> u64 {
    u64::from_ne_bytes(host::random_bytes()) | 1
}

fn lost_ring(error: std::io::Error) -> Failure {
    Failure::failed(format!("io_uring failed ({error})"))
}

/// Runs a control command on a thread of its own; gives up on it after `limit`.
async fn command<T: Send + 'static>(
    ring: Rc<Ring>,
    name: &'static str,
    limit: Duration,
    work: impl FnOnce() -> Result<T, UblkError> + Send + 'static,
) -> Result<T, Failure> {
    let mut work = pin!(ring.blocking(move || {
        let made = ublk_init_ctrl_task_ring(|cell| {
            if cell.is_none() {
                *cell = Some(IoUring::<squeue::Entry128>::builder().build(16)?);
            }
            Ok(())
        });
        made.and_then(|()| work())
    }));
    let mut late = pin!(ring.sleep_until(ring::now() + limit));
    let result = poll_fn(|cx| match work.as_mut().poll(cx) {
        Poll::Ready(result) => Poll::Ready(Some(result)),
        Poll::Pending => late.as_mut().poll(cx).map(|()| None),
    })
    .await;
    match result {
        Some(Ok(value)) => Ok(value),
        Some(Err(error)) => Err(Failure::failed(format!(
            "the ublk command {name} failed ({}); see the kernel's log",
            describe(&error)
        ))),
        None => Err(Failure::failed(format!(
            "the kernel has not answered the ublk command {name} for {} seconds; {}",
            limit.as_secs(),
            if name == DEL_DEV {
                DELETE_HINT
            } else {
                CONTROL_HINT
            }
        ))),
    }
}

fn describe(error: &UblkError) -> String {
    match error {
        UblkError::OtherError(errno) | UblkError::UringIOError(errno) => {
            std::io::Error::from_raw_os_error(errno.abs()).to_string()
        }
        other => other.to_string(),
    }
}

fn add_device(shape: Shape) -> Result<(Arc<UblkCtrl>, Arc<UblkDev>), UblkError> {
    let flags = abi::UBLK_F_USER_RECOVERY | abi::UBLK_F_USER_RECOVERY_REISSUE;
    let control = UblkCtrlBuilder::default()
        .name("ublk-mirror")
        .id(-1)
        .nr_queues(1)
        .depth(shape.depth)
        .io_buf_bytes(MAX_REQUEST_BYTES)
        .ctrl_flags(u64::from(flags))
        .ctrl_target_flags(shape.cookie)
        .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV)
        .build()?;
    let set_up = |device: &mut UblkDev| {
        device.tgt.dev_size = shape.size_bytes;
        device.tgt.params = parameters(shape);
        Ok(())
    };
    let device = UblkDev::new("ublk-mirror".to_owned(), set_up, &control)?;
    // From here on the device is deleted by order only: a daemon that dies must leave it for
    // its successor. Until here an early return deletes it.
    control.disown();
    Ok((Arc::new(control), Arc::new(device)))
}

/// The queue limits. They cannot change while the device lives.
fn parameters(shape: Shape) -> abi::ublk_params {
    let block_shift = u8::try_from(shape.block_bytes.trailing_zeros()).unwrap_or(12);
    abi::ublk_params {
        types: abi::UBLK_PARAM_TYPE_BASIC | abi::UBLK_PARAM_TYPE_DISCARD,
        basic: abi::ublk_param_basic {
            attrs: abi::UBLK_ATTR_VOLATILE_CACHE | abi::UBLK_ATTR_FUA,
            logical_bs_shift: block_shift,
            physical_bs_shift: 12,
            io_opt_shift: 12,
            io_min_shift: 12,
            max_sectors: MAX_REQUEST_BYTES >> SECTOR_SHIFT,
            dev_sectors: shape.size_bytes >> SECTOR_SHIFT,
            ..Default::default()
        },
        discard: abi::ublk_param_discard {
            discard_granularity: 4096,
            max_discard_sectors: MAX_RANGE_SECTORS,
            max_write_zeroes_sectors: MAX_RANGE_SECTORS,
            max_discard_segments: 1,
            ..Default::default()
        },
        ..Default::default()
    }
}

/// The parts of a device that is being served.
struct Front<'a> {
    ring: &'a Rc<Ring>,
    engine: &'a Rc<Engine>,
    queue: &'a UblkQueue<'a>,
    control: &'a Arc<UblkCtrl>,
    device: &'a Arc<UblkDev>,
}

/// A control command that a task waits for.
#[derive(Default)]
struct Pending {
    begun: Cell<bool>,
    result: RefCell<Option<Result<(), Failure>>>,
}

impl Pending {
    fn is_over(&self) -> bool {
        self.result.borrow().is_some()
    }

    /// Neither waited for nor running.
    fn is_idle(&self) -> bool {
        !self.begun.get() || self.is_over()
    }
}

impl Front<'_> {
    /// Runs the tags' tasks until the kernel has aborted them all.
    fn run(&self, stop_asked: &Rc<Signal>, up: impl FnOnce()) -> Result<(), Failure> {
        let tags_left = Cell::new(self.queue.nr_tags());
        let executor = Executor::default();
        let buffer = |_| IoBuffer::recycled(MAX_REQUEST_BYTES as usize);
        let buffers: Vec<IoBuffer> = self.queue.tags().map(buffer).collect();
        if let Err(error) = self.ring.register_buffers(&buffers) {
            tracing::info!("goes on without registered buffers ({error}): a little slower");
        }
        for (tag, buffer) in self.queue.tags().zip(buffers) {
            let (engine, queue, tags_left) = (self.engine, self.queue, &tags_left);
            let task = async move {
                serve_tag(engine, queue, tag, buffer).await;
                tags_left.set(tags_left.get() - 1);
            };
            executor.spawn(task);
        }
        let started = self.start();
        self.turn(&executor, || started.is_over())?;
        if let Some(Err(failure)) = started.result.take() {
            // What has been fetched has to be aborted before the device can go.
            let stopped = self.stop_when(None);
            self.turn(&executor, || stopped.is_over())?;
            return Err(failure);
        }
        up();
        let stopped = self.stop_when(Some(Rc::clone(stop_asked)));
        self.turn(&executor, || tags_left.get() == 0 && stopped.is_idle())?;
        if !stopped.begun.get() {
            tracing::warn!("somebody else deleted the block device; the mirror stops");
        }
        stopped.result.take().unwrap_or(Ok(()))
    }

    fn turn(&self, executor: &Executor<'_>, done: impl Fn() -> bool) -> Result<(), Failure> {
        let reap = |dispatch: &mut dyn FnMut(&io_uring::cqueue::Entry)| {
            // The library counts its commands and notices the queue's end here. It only fails
            // where the closure does, and this one does not.
            let _ = ublk_reap_io_events_with_update_queue(self.queue, false, None, dispatch);
        };
        self.ring
            .run(|limit| executor.run(limit), reap, done)
            .map_err(lost_ring)
    }

    fn start(&self) -> Rc<Pending> {
        let pending = Rc::new(Pending::default());
        let (ring, start) = (Rc::clone(self.ring), Rc::clone(&pending));
        let (control, device) = (Arc::clone(self.control), Arc::clone(self.device));
        self.ring.spawn(async move {
            let work = move || control.start_dev(&device).map(drop);
            let result = command(ring, "START_DEV", CONTROL_LIMIT, work).await;
            start.result.replace(Some(result));
        });
        pending
    }

    /// Stops the device when `asked`, or at once. The kernel then waits for the requests under
    /// way, which the engine answers within its deadline.
    fn stop_when(&self, asked: Option<Rc<Signal>>) -> Rc<Pending> {
        let pending = Rc::new(Pending::default());
        let (ring, stop) = (Rc::clone(self.ring), Rc::clone(&pending));
        let control = Arc::clone(self.control);
        self.ring.spawn(async move {
            if let Some(asked) = asked {
                asked.wait().await;
            }
            stop.begun.set(true);
            let work = move || control.kill_dev().map(drop);
            let result = command(ring, "STOP_DEV", STOP_LIMIT, work).await;
            stop.result.replace(Some(result));
        });
        pending
    }
}

/// Serves one tag until the queue ends.
async fn serve_tag(engine: &Rc<Engine>, queue: &UblkQueue<'_>, tag: u16, mut buffer: IoBuffer) {
    // None until the first request has come.
    let mut answer: Option<i32> = None;
    loop {
        // The library drops commands of a queue that is ending without ever answering them.
        if queue.is_stopping() {
            return;
        }
        let lend = KernelLend::new(&buffer);
        let memory = BufDesc::RawAddress(lend.address());
        let fetched = match answer {
            None => queue.submit_io_prep_cmd(tag, memory, -1, None).await,
            Some(result) => queue.submit_io_commit_cmd(tag, memory, result).await,
        };
        lend.returned();
        match fetched {
            Ok(0) => {}
            Ok(errno) => {
                let error = std::io::Error::from_raw_os_error(errno.abs());
                tracing::error!("the kernel refused to serve tag {tag} of the device ({error})");
                return;
            }
            // The queue ends.
            Err(_) => return,
        }
        let (next, result) = answer_request(engine, queue, tag, buffer).await;
        buffer = next;
        answer = Some(result);
    }
}

/// Performs the request that `tag` holds. Returns the buffer to go on with and the answer.
async fn answer_request(
    engine: &Rc<Engine>,
    queue: &UblkQueue<'_>,
    tag: u16,
    buffer: IoBuffer,
) -> (IoBuffer, i32) {
    let request = *queue.get_iod(tag);
    let fua = request.op_flags & abi::UBLK_IO_F_FUA != 0;
    let offset = request.start_sector << SECTOR_SHIFT;
    let len = u64::from(request.nr_sectors) << SECTOR_SHIFT;
    let span = || {
        let len = usize::try_from(len).ok().filter(|len| *len <= buffer.len());
        len.map(|len| Span {
            buffer: buffer.clone(),
            start: 0,
            len,
        })
        .ok_or(Errno::INVALID)
    };
    let mut data = None;
    let (result, length) = match request.op_flags & 0xff {
        abi::UBLK_IO_OP_READ => match span() {
            Ok(span) => (
                engine
                    .read(offset, span)
                    .await
                    .map(|read| data = Some(read)),
                len,
            ),
            Err(error) => (Err(error), 0),
        },
        abi::UBLK_IO_OP_WRITE => match span() {
            Ok(span) => (engine.write(offset, span, fua).await, len),
            Err(error) => (Err(error), 0),
        },
        abi::UBLK_IO_OP_FLUSH => (engine.flush().await, 0),
        abi::UBLK_IO_OP_DISCARD => (engine.discard(offset, len).await, 0),
        abi::UBLK_IO_OP_WRITE_ZEROES => (engine.write_zeroes(offset, len, fua).await, 0),
        _ => (Err(Errno::NOT_SUPPORTED), 0),
    };
    let answer = match result {
        Ok(()) => i32::try_from(length).unwrap_or(-Errno::INVALID.0),
        Err(errno) => -errno.0.abs(),
    };
    let elsewhere = data.filter(|span| !span.buffer.is_same(&buffer));
    if buffer.in_use() || elsewhere.is_some() {
        leave_to_orphan(&buffer, elsewhere, answer)
    } else {
        (buffer, answer)
    }
}

/// A device still uses the buffer: it goes with that orphan, and the tag gets another that
/// holds the same answer (R6). `elsewhere` is where the engine put what it read, when that is
/// not the tag's buffer.
fn leave_to_orphan(
    buffer: &IoBuffer,
    elsewhere: Option<Span<IoBuffer>>,
    answer: i32,
) -> (IoBuffer, i32) {
    let spare = IoBuffer::recycled(buffer.len());
    let data = match elsewhere {
        Some(span) => span,
        // Nothing that is still being written was answered with.
        None if buffer.being_written() => return (spare, answer),
        None => Span::whole(buffer.clone()),
    };
    let len = usize::try_from(answer).unwrap_or(0).min(data.len);
    spare.fill(|to| data.read(|from| to[..len].copy_from_slice(&from[..len])));
    (spare, answer)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::{Note, Shape, parameters};

    #[test]
    fn a_note_is_read_as_it_was_written() {
        let path = std::env::temp_dir().join(format!("ublk-note-{}", std::process::id()));
        let note = Note {
            number: 7,
            cookie: 0x8000_0000_0000_00ab,
        };
        note.write(&path);
        assert_eq!(Note::read(&path), Some(note));
        std::fs::write(&path, "7 not-a-number\n").unwrap();
        assert_eq!(Note::read(&path), None);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(Note::read(&path), None);
    }

    #[test]
    fn the_limits_hold_what_the_kernel_asks_for() {
        let shape = Shape {
            size_bytes: 1 << 40,
            block_bytes: 4096,
            depth: 128,
            cookie: 1,
        };
        let limits = parameters(shape);
        assert_eq!(limits.basic.logical_bs_shift, 12);
        assert_eq!(limits.basic.dev_sectors, 1 << 31);
        assert_eq!(limits.discard.max_discard_segments, 1);
        assert!(u64::from(limits.discard.max_write_zeroes_sectors) << 9 < 1 << 32);
        assert!(
            limits.discard.max_write_zeroes_sectors.is_multiple_of(8192),
            "whole extents"
        );
    }
}
