//! A simulated machine: executor, clock, randomness and disks, all driven by one seed.
//!
//! The production engine runs on it unchanged. At each step the seed decides which ready task
//! is polled, which pending disk operation completes, or that time passes; so a seed and a
//! build reproduce a run bit for bit.
//!
//! [`World`] is the machine: dropping its tasks is the crash of the daemon, and
//! [`SimDisk::cut_power`] adds what a power cut does to a disk. The content of the disks
//! survives both.
//!
//! Other processes, on this machine or another, are groups of tasks: a task belongs to the group of
//! the one that started it, and [`World::end_group`] is the end of one process. Between them there
//! are byte streams ([`net`]).

mod content;
mod disk;
mod faults;
mod lend;
pub mod net;
mod op;
mod order;
mod sums;

pub use disk::SimDisk;
pub use faults::{Faults, Observer, WriteFault};
pub use lend::SimLend;
pub use op::{OnItsWay, Remote, RemoteOp, SimOp};

use crate::host::{Buffer, Host};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

/// The unit that a disk writes whole or not at all.
const SECTOR: u64 = 512;

/// A small, fast, seeded generator (SplitMix64).
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The generator of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.bits() % bound.max(1)
    }

    /// An index into something of length `len`.
    pub fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap_or(0)
    }

    /// True once in `n` times on average.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// Memory shared by reference count, with the checks that [`Buffer`] asks for.
#[derive(Clone)]
pub struct SimBuffer(Rc<BufferInner>);

struct BufferInner {
    bytes: RefCell<Vec<u8>>,
    home: Weak<World>,
    /// Device operations that read from it.
    lent: Cell<usize>,
    /// Device operations that write into it.
    filled: Cell<usize>,
}

impl Drop for BufferInner {
    fn drop(&mut self) {
        if let Some(world) = self.home.upgrade() {
            world.keep(self.bytes.take());
        }
    }
}

impl SimBuffer {
    pub(super) fn begin(&self, device_writes: bool) {
        let count = if device_writes {
            &self.0.filled
        } else {
            &self.0.lent
        };
        count.set(count.get() + 1);
    }

    pub(super) fn end(&self, device_writes: bool) {
        let count = if device_writes {
            &self.0.filled
        } else {
            &self.0.lent
        };
        count.set(count.get() - 1);
    }

    pub(super) fn device_read<R>(&self, range: Range<usize>, f: impl FnOnce(&[u8]) -> R) -> R {
        f(&self.0.bytes.borrow()[range])
    }

    pub(super) fn device_fill(&self, range: Range<usize>, f: impl FnOnce(&mut [u8])) {
        f(&mut self.0.bytes.borrow_mut()[range]);
    }
}

impl Buffer for SimBuffer {
    fn len(&self) -> usize {
        self.0.bytes.borrow().len()
    }

    fn read<R>(&self, f: impl FnOnce(&[u8]) -> R) -> R {
        assert_eq!(
            self.0.filled.get(),
            0,
            "the device is writing into this buffer"
        );
        f(&self.0.bytes.borrow())
    }

    fn fill<R>(&self, f: impl FnOnce(&mut [u8]) -> R) -> R {
        assert!(!self.in_use(), "a device operation uses this buffer");
        f(&mut self.0.bytes.borrow_mut())
    }

    fn in_use(&self) -> bool {
        self.0.filled.get() + self.0.lent.get() > 0
    }
}

/// Ready tasks; the only thing shared with wakers, which must be `Send` for the language.
type ReadyQueue = Arc<Mutex<Vec<usize>>>;

struct TaskWaker {
    id: usize,
    ready: ReadyQueue,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        if !ready.contains(&self.id) {
            ready.push(self.id);
        }
    }
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// Who waits for a timer.
type Sleeper = Rc<RefCell<Waker>>;

/// Tasks that end together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group(u32);

impl Group {
    /// The daemon, and whatever was started from outside of any task.
    pub const DAEMON: Self = Self(0);
    /// What belongs to no process.
    pub const NOBODY: Self = Self(1);
}

/// The simulated machine.
pub struct World {
    rng: RefCell<Rng>,
    now: Cell<Duration>,
    tasks: RefCell<Vec<Option<(Group, Task)>>>,
    /// That of the task that is being polled.
    group: Cell<Group>,
    next_group: Cell<u32>,
    ready: ReadyQueue,
    timers: RefCell<BTreeMap<(Duration, u64), Sleeper>>,
    next_timer: Cell<u64>,
    disks: RefCell<Vec<SimDisk>>,
    steps: Cell<u64>,
    /// Memory of buffers that are gone, as they left it.
    spare: RefCell<Vec<Vec<u8>>>,
}

/// So much memory waits for the next buffer.
const SPARE_MAX: usize = 16;

impl World {
    /// A machine whose every choice comes from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Rc<Self> {
        Rc::new(Self {
            rng: RefCell::new(Rng::new(seed)),
            now: Cell::new(Duration::from_secs(1)),
            tasks: RefCell::new(Vec::new()),
            group: Cell::new(Group::DAEMON),
            next_group: Cell::new(2),
            ready: ReadyQueue::default(),
            timers: RefCell::new(BTreeMap::new()),
            next_timer: Cell::new(0),
            disks: RefCell::new(Vec::new()),
            steps: Cell::new(0),
            spare: RefCell::new(Vec::new()),
        })
    }

    /// Steps taken so far.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps.get()
    }

    /// A choice made by the seed.
    pub fn choose<R>(&self, choice: impl FnOnce(&mut Rng) -> R) -> R {
        choice(&mut self.rng.borrow_mut())
    }

    /// Takes back the memory of a buffer.
    fn keep(&self, bytes: Vec<u8>) {
        let mut spare = self.spare.borrow_mut();
        if spare.len() == SPARE_MAX {
            spare.remove(0);
        }
        spare.push(bytes);
    }

    /// Memory of `len` bytes, with what the last user left there if one of this length is spare.
    fn memory(&self, len: usize) -> Vec<u8> {
        let mut spare = self.spare.borrow_mut();
        let fits = spare.iter().rposition(|bytes| bytes.len() == len);
        fits.map_or_else(|| vec![0xa5; len], |at| spare.remove(at))
    }

    /// Connects a disk, whose operations this machine then completes.
    pub fn connect(&self, disk: &SimDisk) {
        self.disks.borrow_mut().push(disk.clone());
    }

    /// Starts a task of the group that the caller belongs to.
    pub fn spawn_task(&self, task: impl Future<Output = ()> + 'static) {
        self.spawn_in(self.group.get(), task);
    }

    /// A group that has no task yet.
    pub fn new_group(&self) -> Group {
        let number = self.next_group.get();
        self.next_group.set(number + 1);
        Group(number)
    }

    /// Starts a task of this group.
    pub fn spawn_in(&self, group: Group, task: impl Future<Output = ()> + 'static) {
        let mut tasks = self.tasks.borrow_mut();
        tasks.push(Some((group, Box::pin(task))));
        let id = tasks.len() - 1;
        self.ready
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(id);
    }

    /// Ends every task where it stands: the daemon is gone. Operations that disks have taken
    /// stay with the disks.
    pub fn crash(&self) {
        let tasks = self.tasks.take();
        drop(tasks);
        self.ready
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        self.timers.borrow_mut().clear();
    }

    /// Ends every task of a group where it stands, but for the caller. Operations that disks have taken
    /// stay with the disks.
    pub fn end_group(&self, group: Group) {
        let of_group = |task: &mut Option<(Group, Task)>| {
            let ends = task.as_ref().is_some_and(|(of, _)| *of == group);
            ends.then(|| task.take()).flatten()
        };
        let ended: Vec<_> = self
            .tasks
            .borrow_mut()
            .iter_mut()
            .filter_map(of_group)
            .collect();
        drop(ended);
    }

    /// Runs until `done` or until `limit` steps have been taken; true when `done`.
    pub fn run(&self, limit: u64, mut done: impl FnMut() -> bool) -> bool {
        for _ in 0..limit {
            if done() {
                return true;
            }
            if !self.step() {
                return done();
            }
        }
        done()
    }

    /// Runs `future` to its end.
    ///
    /// # Panics
    ///
    /// When nothing can move any more, or after very many steps: a deadlock.
    pub fn block_on<T: 'static>(self: &Rc<Self>, future: impl Future<Output = T> + 'static) -> T {
        let result = Rc::new(RefCell::new(None));
        let slot = result.clone();
        self.spawn_task(async move {
            let value = future.await;
            *slot.borrow_mut() = Some(value);
        });
        let finished = self.run(20_000_000, || result.borrow().is_some());
        assert!(finished, "the simulated machine stands still");
        match result.take() {
            Some(value) => value,
            None => unreachable!("the future has ended"),
        }
    }

    /// One step: polls a task, completes a disk operation, or lets time pass. False when
    /// nothing can ever happen again.
    pub fn step(&self) -> bool {
        self.steps.set(self.steps.get() + 1);
        let ready = self
            .ready
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len();
        let pending: usize = self.disks.borrow().iter().map(SimDisk::completable).sum();
        if ready > 0 && (pending == 0 || !self.choose(|rng| rng.one_in(4))) {
            self.poll_one();
            return true;
        }
        if pending > 0 {
            let chosen = self.choose(|rng| rng.index(pending));
            self.complete_one(chosen);
            self.now.set(self.now.get() + Duration::from_micros(20));
            return true;
        }
        self.pass_time()
    }

    fn poll_one(&self) {
        let id = {
            let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
            let chosen = self.choose(|rng| rng.index(ready.len()));
            ready.swap_remove(chosen)
        };
        let task = self.tasks.borrow_mut().get_mut(id).and_then(Option::take);
        let Some((group, mut task)) = task else {
            return;
        };
        let before = self.group.replace(group);
        let waker = Waker::from(Arc::new(TaskWaker {
            id,
            ready: self.ready.clone(),
        }));
        let polled = task.as_mut().poll(&mut Context::from_waker(&waker));
        self.group.set(before);
        if polled.is_pending()
            && let Some(place) = self.tasks.borrow_mut().get_mut(id)
        {
            *place = Some((group, task));
        }
    }

    fn complete_one(&self, chosen: usize) {
        let mut left = chosen;
        let disk = self.disks.borrow().iter().find_map(|disk| {
            let own = disk.completable();
            if left < own {
                Some(disk.clone())
            } else {
                left -= own;
                None
            }
        });
        if let Some(disk) = disk {
            disk.complete(left, &mut self.rng.borrow_mut());
        }
    }

    fn pass_time(&self) -> bool {
        let Some(((at, _), waker)) = self.timers.borrow_mut().pop_first() else {
            return false;
        };
        self.now.set(self.now.get().max(at));
        waker.borrow().wake_by_ref();
        true
    }
}

/// Lets others go first, so many times.
async fn turns(mut left: u64) {
    std::future::poll_fn(|context| {
        if left == 0 {
            return Poll::Ready(());
        }
        left -= 1;
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// A delay on the simulated clock.
pub struct SimSleep {
    world: Rc<World>,
    at: Duration,
    /// Who waits, once anybody does: one timer, however often it is polled.
    waker: Option<Sleeper>,
}

impl Future for SimSleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.world.now.get() >= self.at {
            return Poll::Ready(());
        }
        if let Some(waker) = &self.waker {
            waker.borrow_mut().clone_from(context.waker());
            return Poll::Pending;
        }
        let waker = Rc::new(RefCell::new(context.waker().clone()));
        self.waker = Some(waker.clone());
        let number = self.world.next_timer.get();
        self.world.next_timer.set(number + 1);
        self.world
            .timers
            .borrow_mut()
            .insert((self.at, number), waker);
        Poll::Pending
    }
}

/// The engine's surroundings on a [`World`].
pub struct SimHost(pub Rc<World>);

impl Host for SimHost {
    type Buffer = SimBuffer;
    type Sleep = SimSleep;

    fn now(&self) -> Duration {
        self.0.now.get()
    }

    fn wall_clock_secs(&self) -> u64 {
        0
    }

    fn sleep(&self, delay: Duration) -> SimSleep {
        SimSleep {
            world: self.0.clone(),
            at: self.0.now.get() + delay,
            waker: None,
        }
    }

    fn random(&self) -> u128 {
        self.0
            .choose(|rng| u128::from(rng.bits()) << 64 | u128::from(rng.bits()))
    }

    fn spawn(&self, task: Pin<Box<dyn Future<Output = ()>>>) {
        self.0.spawn_task(task);
    }

    fn allocate(&self, len: usize) -> SimBuffer {
        let buffer = self.allocate_unzeroed(len);
        buffer.0.bytes.borrow_mut().fill(0);
        buffer
    }

    /// What lay there before, which nobody may take for anything.
    fn allocate_unzeroed(&self, len: usize) -> SimBuffer {
        SimBuffer(Rc::new(BufferInner {
            bytes: RefCell::new(self.0.memory(len)),
            home: Rc::downgrade(&self.0),
            lent: Cell::new(0),
            filled: Cell::new(0),
        }))
    }
}
