//! The data path allocates nothing: reads and writes of hot extents, with every allocation
//! counted, on disks in memory that answer at once. And a control request has its limit.
#![allow(clippy::unwrap_used)]

use mirror::control::{MAX_REQUEST_BYTES, Request, decoded_bytes_max, from_line};
use mirror::create::{CreateRequest, NewMember, plan};
use mirror::host::{Buffer, Disk, DiskRequest, Geometry};
use mirror::{Candidate, Errno, Host, Mirror, Span, StartOptions};
use std::cell::{Cell, RefCell};
use std::future::{Future, Pending, Ready, pending, ready};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

#[derive(Clone)]
struct Memory(Rc<RefCell<Vec<u8>>>);

impl Memory {
    fn new(len: usize) -> Self {
        Self(Rc::new(RefCell::new(vec![0; len])))
    }
}

impl Buffer for Memory {
    fn len(&self) -> usize {
        self.0.borrow().len()
    }

    fn read<R>(&self, f: impl FnOnce(&[u8]) -> R) -> R {
        f(&self.0.borrow())
    }

    fn fill<R>(&self, f: impl FnOnce(&mut [u8]) -> R) -> R {
        f(&mut self.0.borrow_mut())
    }

    fn in_use(&self) -> bool {
        false
    }
}

struct MemoryDisk(Memory);

fn place(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

impl Disk for MemoryDisk {
    type Buffer = Memory;
    type Op = Ready<Result<(), Errno>>;

    fn submit(&self, request: DiskRequest<Memory>) -> Self::Op {
        self.0.fill(|disk| match request {
            DiskRequest::Read { offset, span } => {
                span.fill(|out| out.copy_from_slice(&disk[place(offset)..][..span.len]));
            }
            DiskRequest::Write { offset, span, .. } => {
                span.read(|data| disk[place(offset)..][..span.len].copy_from_slice(data));
            }
            DiskRequest::WriteZeroes { offset, len } => {
                disk[place(offset)..][..place(len)].fill(0);
            }
            DiskRequest::Flush | DiskRequest::Discard { .. } => {}
        });
        ready(Ok(()))
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            behind_network: false,
            server_instance: None,
            keeps_order: false,
            size_bytes: self.0.len() as u64,
            logical_block_bytes: 512,
            cheap_zeroes: true,
            discard: true,
        }
    }
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

#[derive(Default)]
struct Machine {
    tasks: RefCell<Vec<Task>>,
    drawn: Cell<u128>,
}

/// A [`Host`] whose clock stands still.
struct Still(Rc<Machine>);

impl Host for Still {
    type Buffer = Memory;
    type Sleep = Pending<()>;

    fn now(&self) -> Duration {
        Duration::from_secs(1)
    }

    fn wall_clock_secs(&self) -> u64 {
        0
    }

    fn sleep(&self, _: Duration) -> Pending<()> {
        pending()
    }

    fn random(&self) -> u128 {
        self.0.drawn.set(self.0.drawn.get() + 1);
        self.0.drawn.get()
    }

    fn spawn(&self, task: Task) {
        self.0.tasks.borrow_mut().push(task);
    }

    fn allocate(&self, len: usize) -> Memory {
        Memory::new(len)
    }
}

/// Polls `future` and the background tasks in turn until it has ended.
fn drive<T>(machine: &Machine, future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    for _ in 0..1000 {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
        let mut tasks = machine.tasks.take();
        tasks.retain_mut(|task| task.as_mut().poll(&mut context).is_pending());
        machine.tasks.borrow_mut().append(&mut tasks);
    }
    panic!("nothing moves");
}

fn started(machine: &Rc<Machine>) -> Rc<Mirror<Still, MemoryDisk>> {
    let paths = ["a", "b"].map(str::to_owned);
    let member = |path: &String| NewMember {
        path: path.clone(),
        size_bytes: 1 << 30,
        logical_block_bytes: 512,
        zeroed: true,
    };
    let plan = plan(&CreateRequest {
        name: "m".into(),
        members: paths.iter().map(member).collect(),
        size_bytes: Some(16 << 20),
        logical_block_bytes: None,
        checksums: true,
        random: (1..=20).collect(),
        now_secs: 0,
    })
    .unwrap();
    let candidates = paths.into_iter().zip(&plan.members).map(|(path, member)| {
        let disk = MemoryDisk(Memory::new(place(plan.member_bytes)));
        for (offset, bytes) in member.maps.iter().chain(&member.superblocks) {
            disk.0
                .fill(|disk| disk[place(*offset)..][..bytes.len()].copy_from_slice(bytes));
        }
        Candidate { path, disk }
    });
    let options = StartOptions {
        name: "m".into(),
        force: false,
        reason: String::new(),
        promote: false,
        write_intent: true,
        deadline: Duration::from_secs(5),
        hot_budget: None,
        hot_memory_bytes: mirror::engine::HOT_CAP_BYTES,
        check_reads: true,
        sum_cache_bytes: 1 << 20,
        resync_limits: mirror::pace::Limits::RESYNC,
        error_budget: mirror::budget::ErrorBudget::default(),
    };
    let host = Rc::new(Still(Rc::clone(machine)));
    drive(machine, Mirror::start(host, candidates.collect(), options)).unwrap()
}

#[test]
fn reads_and_writes_of_hot_extents_allocate_nothing() {
    let machine = Rc::new(Machine::default());
    let mirror = started(&machine);
    let span = Span::whole(Memory::new(65536));
    let round = |offset| {
        drive(&machine, mirror.write(offset, span.clone(), false)).unwrap();
        drive(&machine, mirror.read(offset, span.clone())).unwrap();
    };
    let offsets = || (0..240_u64).map(|block| block * 65536);
    offsets().for_each(round);
    let counted = allocation_counter::measure(|| offsets().for_each(round));
    assert_eq!(counted.count_total, 0, "{counted:?}");
    // The counter counts: what is not the data path does allocate.
    let other = allocation_counter::measure(|| drop(mirror.status()));
    assert!(other.count_total > 0);
}

#[test]
fn a_control_request_of_brackets_takes_bounded_memory() {
    // The worst there is: two bytes of the line are a vector.
    let nested = format!("{}0{},", "[".repeat(120), "]".repeat(120));
    let mut line = r#"{"request":"status","unknown":["#.to_owned();
    while line.len() + nested.len() < MAX_REQUEST_BYTES {
        line += &nested;
    }
    line += "0]}";
    let counted = allocation_counter::measure(|| {
        assert_eq!(
            from_line::<Request>(line.as_bytes()).unwrap(),
            Request::Status
        );
    });
    let limit = decoded_bytes_max(line.len()) as u64;
    assert!(counted.bytes_max <= limit, "{counted:?}");
    assert!(limit <= 8 << 20, "the limit is {limit} bytes");
}
