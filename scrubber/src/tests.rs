//! The scrubber over a mirror that is only numbers, on a simulated clock.
#![allow(clippy::unwrap_used)]

use super::*;
use mirror::control::{ScrubClass, ScrubDone, ScrubEnding, ScrubState};
use mirror::scrub_log::{Done, Finding, FoundBy, SECTORS, What};
use mirror::sim::{SimBuffer, SimHost, SimSleep, World};
use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;

const DAY: u64 = 24 * 3600;
/// When the tests take place, in seconds since 1970.
const THEN: u64 = 1_800_000_000;

/// The simulated machine with a wall clock.
struct TestHost(SimHost);

impl Host for TestHost {
    type Buffer = SimBuffer;
    type Sleep = SimSleep;

    fn now(&self) -> Duration {
        self.0.now()
    }
    fn wall_clock_secs(&self) -> u64 {
        THEN + self.0.now().as_secs()
    }
    fn sleep(&self, delay: Duration) -> SimSleep {
        self.0.sleep(delay)
    }
    fn random(&self) -> u128 {
        self.0.random()
    }
    fn spawn(&self, task: Pin<Box<dyn Future<Output = ()>>>) {
        self.0.spawn(task);
    }
    fn allocate(&self, len: usize) -> SimBuffer {
        self.0.allocate(len)
    }
}

/// What a mirror is to the scrubber.
struct Numbers {
    host: TestHost,
    extents: u32,
    members: Cell<u64>,
    idle: Cell<bool>,
    written: RefCell<BTreeSet<u32>>,
    /// Extents that are hot until then.
    hot: RefCell<BTreeMap<u32, Duration>>,
    /// Extents whose next check fails.
    failing: RefCell<BTreeSet<u32>>,
    log: RefCell<ScrubLog>,
    takes: Cell<Duration>,
    /// Extents checked, and whether they would have been repaired.
    checks: RefCell<Vec<(u32, bool)>>,
    under_way: Cell<usize>,
    most_under_way: Cell<usize>,
    pacer: RefCell<Option<Rc<RefCell<Pacer>>>>,
}

#[derive(Clone)]
struct Fake(Rc<Numbers>);

impl Subject for Fake {
    type Host = TestHost;

    fn host(&self) -> &TestHost {
        &self.0.host
    }
    fn extents(&self) -> u32 {
        self.0.extents
    }
    fn next_written(&self, from: Extent) -> Option<Extent> {
        self.0
            .written
            .borrow()
            .range(from.0..)
            .next()
            .map(|n| Extent(*n))
    }
    fn written(&self) -> u64 {
        self.0.written.borrow().len() as u64
    }
    fn look(&self, extent: Extent) -> ExtentLook {
        let hot = self.0.hot.borrow().get(&extent.0).copied();
        if hot.is_some_and(|until| self.0.host.now() < until) {
            ExtentLook::Hot
        } else if self.0.written.borrow().contains(&extent.0) {
            ExtentLook::Cool
        } else {
            ExtentLook::Unwritten
        }
    }
    async fn check(&self, extent: Extent, how: CheckOptions) -> Result<Checked, Errno> {
        let own = &self.0;
        own.under_way.set(own.under_way.get() + 1);
        own.most_under_way
            .set(own.most_under_way.get().max(own.under_way.get()));
        own.host.sleep(own.takes.get()).await;
        own.under_way.set(own.under_way.get() - 1);
        if own.failing.borrow_mut().remove(&extent.0) {
            return Err(Errno::IO);
        }
        let hot = own.hot.borrow().get(&extent.0).copied();
        if !how.hot_too && hot.is_some_and(|until| own.host.now() < until) {
            return Ok(Checked {
                skipped_hot: true,
                ..Checked::default()
            });
        }
        own.checks.borrow_mut().push((extent.0, how.repair));
        Ok(Checked {
            skipped_hot: false,
            failed: None,
            blocks: 1024,
            member_bytes: 2 * EXTENT_BYTES,
            findings: 1,
            repaired: 2,
            damaged: 3,
        })
    }
    fn log<R>(&self, lent: impl FnOnce(&mut ScrubLog) -> R) -> R {
        lent(&mut self.0.log.borrow_mut())
    }
    fn log_is_kept(&self) -> bool {
        true
    }
    fn error_budget(&self) -> String {
        "64/24".to_owned()
    }
    fn members(&self) -> u64 {
        self.0.members.get()
    }
    fn is_idle(&self) -> bool {
        self.0.idle.get()
    }
    fn sample(&self, pacer: &Rc<RefCell<Pacer>>, on: bool) {
        self.0.pacer.replace(on.then(|| pacer.clone()));
    }
}

struct Stage {
    world: Rc<World>,
    fake: Fake,
    scrubber: Rc<Scrubber<Fake>>,
}

const BY_COMMAND: Settings = Settings {
    days: Some(0),
    ceiling_mib: None,
};

impl Stage {
    /// A mirror of `extents` extents of which those in `written` are.
    fn new(
        seed: u64,
        extents: u32,
        written: impl Iterator<Item = u32>,
        settings: Settings,
    ) -> Self {
        let world = World::new(seed);
        let fake = Fake(Rc::new(Numbers {
            host: TestHost(SimHost(world.clone())),
            extents,
            members: Cell::new(1),
            idle: Cell::new(false),
            written: RefCell::new(written.collect()),
            hot: RefCell::default(),
            failing: RefCell::default(),
            log: RefCell::new(ScrubLog::new()),
            takes: Cell::new(Duration::from_millis(10)),
            checks: RefCell::default(),
            under_way: Cell::new(0),
            most_under_way: Cell::new(0),
            pacer: RefCell::default(),
        }));
        let scrubber = Scrubber::new(fake.clone(), settings);
        world.spawn_task(scrubber.clone().run());
        Self {
            world,
            fake,
            scrubber,
        }
    }

    /// The daemon dies, and another one takes what the log says on disk.
    fn restart(&mut self, settings: Settings) {
        self.world.crash();
        self.fake.0.under_way.set(0);
        let mut again = ScrubLog::new();
        for sector in 0..SECTORS {
            let mut payload = [0; dirty_map::PAYLOAD_BYTES];
            self.fake.0.log.borrow().payload(sector, &mut payload);
            again.load(sector, &payload);
        }
        self.fake.0.log.replace(again);
        self.scrubber = Scrubber::new(self.fake.clone(), settings);
        self.world.spawn_task(self.scrubber.clone().run());
    }

    fn until(&self, done: impl Fn() -> bool) {
        assert!(self.world.run(2_000_000, done), "it does not happen");
    }

    /// Runs until the pass that was begun, or is about to, is over.
    fn until_over(&self) {
        let log = &self.fake.0.log;
        let ended = log.borrow().passes().first().map_or(0, |pass| pass.number);
        self.until(|| {
            log.borrow()
                .passes()
                .first()
                .is_some_and(|pass| pass.number > ended)
        });
    }

    fn for_a_while(&self, time: Duration) {
        let until = self.now() + time;
        self.world.spawn_task(self.fake.0.host.sleep(time));
        self.until(|| self.now() >= until);
    }

    fn now(&self) -> Duration {
        self.fake.0.host.now()
    }

    fn checked(&self) -> Vec<u32> {
        let mut checked: Vec<u32> = self.fake.0.checks.borrow().iter().map(|c| c.0).collect();
        checked.sort_unstable();
        checked
    }

    fn start(&self) {
        self.scrubber.start(Start::default()).unwrap();
    }
}

#[test]
fn a_pass_checks_every_written_extent_once() {
    let (mut starts, mut starts_later) = (BTreeSet::new(), [BTreeSet::new(), BTreeSet::new()]);
    for seed in 0..8 {
        let written = (0..300).filter(|n| n % 3 == 0);
        let stage = Stage::new(seed, 310, written.clone(), BY_COMMAND);
        stage.start();
        stage.until_over();
        assert_eq!(stage.checked(), written.collect::<Vec<_>>());
        starts.insert(stage.fake.0.checks.borrow()[0].0);
        assert_eq!(stage.fake.0.most_under_way.get(), LANES);
        let repairs = stage.fake.0.checks.borrow().iter().all(|check| check.1);
        assert!(repairs);
        let status = stage.scrubber.status();
        assert_eq!(status.state, ScrubState::Idle);
        let pass = &status.passes[0];
        assert_eq!(pass.ending, Some(ScrubEnding::Complete));
        assert_eq!(
            (pass.findings, pass.repaired_blocks, pass.damaged_blocks),
            (100, 200, 300)
        );
        assert_eq!(pass.member_bytes, 200 * EXTENT_BYTES);
        assert_eq!(status.totals.checked_blocks, 100 * 1024);
        // Later ones start at the device's begin, until there is another member.
        for (members, starts) in (1..).zip(&mut starts_later) {
            stage.fake.0.members.set(members);
            stage.fake.0.checks.borrow_mut().clear();
            stage.start();
            stage.until_over();
            starts.insert(stage.fake.0.checks.borrow()[0].0 / 6);
        }
        let sampled = stage.fake.0.pacer.borrow().is_some();
        assert!(!sampled, "nothing is sampled for nothing");
    }
    assert!(starts.len() > 4, "the first starts anywhere: {starts:?}");
    assert_eq!(starts_later[0], BTreeSet::from([0]));
    assert!(starts_later[1].len() > 4, "{:?}", starts_later[1]);
}

#[test]
fn an_idle_mirror_is_scrubbed_at_full_speed_at_once() {
    let stage = Stage::new(1, 100, 0..100, BY_COMMAND);
    stage.fake.0.idle.set(true);
    let began = stage.now();
    stage.start();
    stage.until_over();
    let took = stage.now().saturating_sub(began);
    assert!(took < Duration::from_millis(400), "{took:?}");
}

#[test]
fn what_is_hot_is_visited_again_and_then_checked_as_it_is() {
    let stage = Stage::new(1, 100, 0..100, BY_COMMAND);
    let soon = stage.now() + Duration::from_secs(20);
    let hot = &stage.fake.0.hot;
    hot.borrow_mut()
        .extend([(5, soon), (6, soon), (70, Duration::MAX)]);
    stage.fake.0.failing.borrow_mut().insert(30);
    stage.start();
    stage.until_over();
    let want: Vec<u32> = (0..100).collect();
    assert_eq!(stage.checked(), want);
    assert_eq!(stage.scrubber.status().passes[0].left_out_extents, 0);
    assert!(
        stage.now() < Duration::from_secs(120),
        "it does not wait for ever"
    );
}

#[test]
fn a_restart_goes_on_where_the_pass_was() {
    for seed in 0..20 {
        let mut stage = Stage::new(seed, 1000, 0..1000, BY_COMMAND);
        let never = Duration::MAX;
        stage
            .fake
            .0
            .hot
            .borrow_mut()
            .extend([(7, never), (500, never), (900, never)]);
        stage.fake.0.takes.set(Duration::from_millis(100));
        stage.start();
        let few = 250 + stage.world.choose(|rng| rng.index(700));
        stage.until(|| stage.fake.0.checks.borrow().len() > few);
        stage.restart(BY_COMMAND);
        stage.fake.0.hot.borrow_mut().clear();
        stage.until_over();
        let checked = stage.checked();
        let each: BTreeSet<u32> = checked.iter().copied().collect();
        assert_eq!(each.len(), 1000, "seed {seed}");
        // What was noted last lies up to 5 s or 256 extents back.
        assert!(
            checked.len() <= 1000 + 257,
            "seed {seed}: {}",
            checked.len()
        );
        assert_eq!(stage.scrubber.status().passes[0].number, 1);
    }
}

#[test]
fn paused_is_paused_also_after_a_restart() {
    let mut stage = Stage::new(1, 1000, 0..1000, BY_COMMAND);
    stage.start();
    stage.until(|| stage.fake.0.checks.borrow().len() > 20);
    stage.scrubber.pause();
    stage.for_a_while(Duration::from_secs(1));
    let count = stage.fake.0.checks.borrow().len();
    assert!(count < 30, "{count}");
    assert_eq!(stage.scrubber.status().state, ScrubState::Paused);
    assert!(stage.scrubber.status().pass.is_some());
    stage.restart(BY_COMMAND);
    stage.for_a_while(Duration::from_secs(300));
    assert_eq!(stage.fake.0.checks.borrow().len(), count);
    stage.scrubber.resume();
    stage.until_over();
    let each: BTreeSet<u32> = stage.checked().into_iter().collect();
    assert_eq!(each.len(), 1000);
}

#[test]
fn a_pass_can_be_cancelled_at_any_time() {
    let stage = Stage::new(1, 1000, 0..1000, BY_COMMAND);
    assert_eq!(
        stage.scrubber.cancel().unwrap_err().kind,
        ErrorKind::NotFound
    );
    stage.start();
    stage.until(|| stage.fake.0.checks.borrow().len() > 20);
    stage.scrubber.cancel().unwrap();
    stage.until_over();
    let status = stage.scrubber.status();
    assert_eq!(status.passes[0].ending, Some(ScrubEnding::Cancelled));
    assert_eq!(status.totals.passes, 0);
    assert!(stage.fake.0.checks.borrow().len() < 30);
    // Also a paused one, and one that has not begun.
    stage.start();
    stage.until(|| stage.fake.0.log.borrow().pass().is_some());
    stage.scrubber.pause();
    stage.for_a_while(Duration::from_secs(1));
    stage.scrubber.cancel().unwrap();
    assert_eq!(stage.scrubber.status().passes.len(), 2);
    stage.start();
    stage.scrubber.cancel().unwrap();
    stage.for_a_while(Duration::from_secs(300));
    assert_eq!(stage.scrubber.status().passes.len(), 2);
}

#[test]
fn passes_begin_by_themselves_in_their_time() {
    let settings = Settings {
        days: Some(2),
        ceiling_mib: None,
    };
    let mut stage = Stage::new(1, 10, 0..0, settings);
    stage.for_a_while(Duration::from_secs(600));
    assert_eq!(
        stage.fake.0.log.borrow().totals().passes_begun,
        0,
        "nothing is written"
    );
    stage.fake.0.written.borrow_mut().extend(0..10);
    stage.until_over();
    let began = stage.scrubber.status().passes[0].began_secs;
    assert_eq!(stage.scrubber.status().next_at_secs, Some(began + 2 * DAY));
    stage.restart(settings);
    stage
        .scrubber
        .start(Start {
            check_only: true,
            ..Start::default()
        })
        .unwrap();
    let log = || stage.fake.0.log.borrow().clone();
    stage.until(|| log().totals().passes_complete == 2);
    assert!(
        stage.fake.0.checks.borrow()[10..]
            .iter()
            .all(|check| !check.1),
        "only checks"
    );
    stage.until(|| log().totals().passes_begun == 3);
    let pass = stage.scrubber.status().pass.unwrap();
    assert!(
        (0..120).contains(&(pass.began_secs - began - 2 * DAY)),
        "{pass:?}"
    );
    assert!(!pass.check_only);
    stage.until_over();
    // A command is stronger than the daemon's options, and outlives it.
    stage
        .scrubber
        .start(Start {
            once: true,
            ..Start::default()
        })
        .unwrap();
    stage.until(|| log().totals().passes_complete == 4);
    stage.restart(settings);
    assert_eq!(stage.scrubber.status().next_at_secs, None);
    stage.for_a_while(Duration::from_secs(5 * DAY));
    assert_eq!(stage.fake.0.log.borrow().totals().passes_begun, 4);
}

#[test]
fn one_pass_at_a_time() {
    let stage = Stage::new(1, 1000, 0..1000, BY_COMMAND);
    stage.start();
    stage.until(|| stage.fake.0.checks.borrow().len() > 2);
    let again = stage.scrubber.start(Start::default()).unwrap();
    assert_eq!(again, "pass 1 is under way");
    let other = Start {
        check_only: true,
        days: Some(3),
        ..Start::default()
    };
    let refused = stage.scrubber.start(other).unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Busy);
    assert!(
        refused.message.contains("scrub cancel"),
        "{}",
        refused.message
    );
    assert_eq!(stage.scrubber.status().days, 0, "nothing of it holds");
    stage.until_over();
    assert_eq!(stage.fake.0.log.borrow().totals().passes_begun, 1);
}

#[test]
fn the_ceiling_is_kept_and_the_floor_follows_from_the_time() {
    let settings = Settings {
        days: Some(0),
        ceiling_mib: Some(100),
    };
    let stage = Stage::new(1, 500, 0..500, settings);
    stage.start();
    stage.until(|| stage.fake.0.checks.borrow().len() > 10);
    // Nothing else goes on, so it is idle after a second.
    stage.for_a_while(Duration::from_secs(2));
    let before = stage.fake.0.checks.borrow().len();
    stage.for_a_while(Duration::from_secs(4));
    let speed = (stage.fake.0.checks.borrow().len() - before) * 4 / 4;
    assert!((93..=103).contains(&speed), "{speed} MiB/s");
    let status = stage.scrubber.status();
    assert_eq!(status.allowed_bytes, Some(100 << 20));
    assert_eq!(status.ceiling_mib, Some(100));
    let pass = status.pass.unwrap();
    let left = pass.written_bytes.unwrap() - pass.checked_bytes.unwrap();
    assert!(
        status.floor_bytes.abs_diff(left / (14 * DAY)) < 20,
        "{}",
        status.floor_bytes
    );
    let eta = pass.left_secs.unwrap();
    assert!(
        (left >> 20) / 130 <= eta && eta <= (left >> 20) / 20,
        "{eta} s"
    );
    stage
        .scrubber
        .start(Start {
            ceiling_mib: Some(0),
            ..Start::default()
        })
        .unwrap();
    assert_eq!(stage.scrubber.status().ceiling_mib, None);
    stage.until_over();
}

#[test]
fn the_foreground_slows_it_down() {
    let stage = Stage::new(1, 4000, 0..4000, BY_COMMAND);
    stage.fake.0.takes.set(Duration::from_millis(1));
    stage.start();
    stage.until(|| stage.fake.0.pacer.borrow().is_some());
    let fake = stage.fake.clone();
    stage.world.spawn_task(async move {
        loop {
            fake.0.host.sleep(Duration::from_millis(2)).await;
            // Twice as slow while anything is checked.
            let latency = Duration::from_micros(if fake.0.under_way.get() > 0 { 400 } else { 200 });
            if let Some(pacer) = &*fake.0.pacer.borrow() {
                pacer.borrow_mut().foreground(fake.0.host.now(), latency);
            }
        }
    });
    stage.for_a_while(Duration::from_secs(100));
    let checked = stage.fake.0.checks.borrow().len();
    // Idle, it would be through in two seconds.
    assert!((5..1000).contains(&checked), "{checked}");
    assert!(stage.scrubber.status().allowed_bytes.is_some());
}

#[test]
fn a_stop_leaves_the_pass_to_the_next_start() {
    let mut stage = Stage::new(1, 1000, 0..1000, BY_COMMAND);
    stage.start();
    stage.until(|| stage.fake.0.checks.borrow().len() > 500);
    let scrubber = stage.scrubber.clone();
    stage.world.block_on(async move { scrubber.stop().await });
    let before = stage.checked().len();
    assert!(before < 520, "{before}");
    stage.restart(BY_COMMAND);
    stage.until_over();
    assert_eq!(stage.checked().len(), 1000, "not one extent twice");
}

fn finding(extent: u64, done: Done) -> Finding {
    Finding {
        when_secs: THEN,
        slot: Some(1),
        blocks: extent * 1024 + 7..extent * 1024 + 9,
        what: What::ChecksumFailed,
        done,
        by: FoundBy::Read,
    }
}

#[test]
fn the_operator_sees_what_was_found_and_where() {
    let stage = Stage::new(1, 1001, 100..600, BY_COMMAND);
    stage.fake.0.hot.borrow_mut().insert(300, Duration::MAX);
    stage.fake.log(|log| {
        log.add(&finding(200, Done::Rewritten));
        log.add(&finding(400, Done::Damaged));
        log.add(&finding(450, Done::CheckOnly));
    });
    let report = stage.scrubber.report(|slot| Some(format!("/disk{slot}")));
    assert_eq!(report.findings.len(), 3);
    let damage = &report.findings[1];
    assert_eq!(damage.offset, 400 * EXTENT_BYTES + 7 * 4096);
    assert_eq!(damage.len, 8192);
    assert_eq!(damage.done, ScrubDone::Damaged);
    assert_eq!(damage.path.as_deref(), Some("/disk1"));
    let status = stage.scrubber.status();
    assert_eq!(status.damaged_blocks, 2);
    assert_eq!(status.totals.found_by_reads_blocks, 6);
    let scrubber = stage.scrubber.clone();
    let size = 1001 * EXTENT_BYTES - 4096;
    let map = stage
        .world
        .block_on(async move { scrubber.map(size, 100).await });
    assert_eq!(map.cell_bytes, 11 * EXTENT_BYTES);
    let cells: u32 = map.runs.iter().map(|run| run.cells).sum();
    assert_eq!(cells, 91);
    let shown: Vec<_> = map.runs.iter().map(|run| (run.class, run.cells)).collect();
    assert_eq!(
        shown,
        [
            (ScrubClass::Unwritten, 9),
            (ScrubClass::Written, 9),
            (ScrubClass::Repaired, 1),
            (ScrubClass::Written, 8),
            (ScrubClass::Hot, 1),
            (ScrubClass::Written, 8),
            (ScrubClass::Damaged, 1),
            (ScrubClass::Written, 18),
            (ScrubClass::Unwritten, 36),
        ]
    );
}
