//! Races and double faults that a hostile reading of the engine found, each from many
//! interleavings. Every one of them failed once.

use crate::machine::{Machine, path};
use mirror::control::MemberState;
use mirror::sim::{Faults, SimDisk};
use std::cell::RefCell;
use std::rc::Rc;

const SIZE: u64 = 64 << 20;
pub(crate) fn none() -> Faults {
    Faults::default()
}

/// The disk is not there.
pub(crate) fn gone() -> Faults {
    Faults {
        gone: true,
        ..none()
    }
}

/// No flush succeeds.
pub(crate) fn flushes() -> Faults {
    Faults {
        flushes: true,
        ..none()
    }
}
pub(crate) fn wr(m: &Machine, o: u64, l: usize) {
    let c = m.client();
    m.world
        .block_on(async move { c.write(o, l, false).await.unwrap() });
}
pub(crate) fn fl(m: &Machine) {
    let c = m.client();
    m.world.block_on(async move { c.flush().await.unwrap() });
}
fn st(m: &Machine, s: usize) -> MemberState {
    m.mirror().status().members[s].state
}
pub(crate) fn seeds(n: u64) -> std::ops::Range<u64> {
    0..n
}

/// Last extent partial, hot at a crash.
#[test]
fn partial_last_extent() {
    let mut m = Machine::new(1, 2, (8 << 20) + 8192);
    m.start();
    wr(&m, 8 << 20, 4096);
    m.kill_daemon();
    m.start();
    let mirror = m.mirror();
    let ok = m.world.run(1_000_000, || {
        mirror.status().extents.unequalised_blocks == 0
    });
    assert!(ok, "never equal");
}

/// Lost by a failing map commit: must come back by delta.
#[test]
fn lost_in_a_commit_comes_back_by_delta() {
    let mut bad = vec![];
    for seed in seeds(20) {
        let mut m = Machine::new(seed, 2, SIZE);
        m.start();
        wr(&m, 0, 4096);
        wr(&m, 20 << 20, 4096);
        m.stop().unwrap();
        m.start();
        wr(&m, 0, 4096);
        fl(&m);
        m.disks[1].set_faults(gone());
        wr(&m, 20 << 20, 4096);
        m.disks[1].set_faults(none());
        let mirror = m.mirror();
        m.world
            .run(100_000, || !mirror.status().members[1].attached);
        if let Err(e) = m.re_add(1) {
            bad.push((seed, e.message));
        }
    }
    assert!(bad.is_empty(), "{} of 20: {:?}", bad.len(), bad[0]);
}

/// A flush waiting behind one that fails everywhere.
#[test]
fn second_flush_after_failed_one() {
    let mut bad = vec![];
    for seed in seeds(20) {
        let mut m = Machine::new(seed, 2, SIZE);
        m.start();
        wr(&m, 0, 8192);
        for d in &m.disks {
            d.set_faults(flushes());
        }
        let results = Rc::new(RefCell::new(vec![]));
        for _ in 0..2 {
            let (c, r) = (m.client(), results.clone());
            m.world.spawn_task(async move {
                let x = c.mirror.flush().await;
                r.borrow_mut().push(x);
            });
        }
        let mirror = m.mirror();
        assert!(m.world.run(1_000_000, || mirror.status().flush_error));
        for d in &m.disks {
            d.set_faults(none());
        }
        let r = results.clone();
        assert!(m.world.run(1_000_000, || r.borrow().len() == 2));
        if results.borrow().iter().any(Result::is_ok) {
            bad.push((seed, results.borrow().clone()));
        }
    }
    assert!(bad.is_empty(), "{} of 20: {:?}", bad.len(), bad[0]);
}

/// A fails W2, B (losing because of W1) had W2: acked?
#[test]
fn two_faults_judged_on_a_stale_set() {
    let mut bad = vec![];
    for seed in seeds(150) {
        let mut m = Machine::new(seed, 2, SIZE);
        m.start();
        wr(&m, 0, 65536);
        fl(&m);
        let oks = Rc::new(RefCell::new(vec![]));
        for i in 0..4u64 {
            let (c, o) = (m.client(), oks.clone());
            m.world.spawn_task(async move {
                let r = c.write(i * 4096, 4096, false).await;
                o.borrow_mut().push((i, r));
            });
        }
        let (k, l) = m.world.choose(|r| (6 + r.below(10), 1 + r.below(12)));
        m.world.run(k, || false);
        m.disks[1].set_faults(Faults {
            writes: true,
            ..none()
        });
        let mirror = m.mirror();
        m.world.run(200, || {
            mirror.status().members[1].state == MemberState::Faulty
        });
        m.disks[0].set_faults(Faults {
            writes: true,
            ..none()
        });
        m.world.run(l, || false);
        m.disks[0].set_faults(none());
        m.disks[1].set_faults(none());
        let o = oks.clone();
        if !m.world.run(1_000_000, || o.borrow().len() == 4) {
            bad.push((seed, "stands still".to_string()));
            continue;
        }
        let c = m.client();
        let r = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            m.world.block_on(async move {
                for i in 0..4u64 {
                    let _ = c.read(i * 4096, 4096).await;
                }
            });
        }));
        if r.is_err() {
            bad.push((seed, "wrong data after an acked write".to_string()));
        }
    }
    assert!(bad.is_empty(), "{} of 150: {:?}", bad.len(), bad[0]);
}

/// Mixed read, orphan ends with an error before the second member answers.
#[test]
fn mixed_read_and_orphan() {
    let mut bad = vec![];
    for seed in seeds(40) {
        let mut m = Machine::new(seed, 2, SIZE);
        m.start();
        wr(&m, (4 << 20) - 4096, 4096);
        fl(&m);
        m.disks[0].set_faults(Faults {
            hang: true,
            ..none()
        });
        let got = Rc::new(RefCell::new(None));
        let (c, g) = (m.client(), got.clone());
        m.world.spawn_task(async move {
            let r = c.read_raw((4 << 20) - 4096, 8192).await;
            *g.borrow_mut() = Some(r);
        });
        let mirror = m.mirror();
        m.world.run(1_000_000, || {
            mirror.status().members[0].state == MemberState::Faulty
        });
        m.disks[0].set_faults(gone());
        let g = got.clone();
        assert!(m.world.run(1_000_000, || g.borrow().is_some()));
        let r = got.borrow_mut().take().unwrap();
        if let Ok(bytes) = r
            && bytes[..4096].iter().all(|&b| b == 0)
        {
            bad.push(seed);
        }
    }
    assert!(
        bad.is_empty(),
        "{} of 40 read an unfilled buffer with Ok: seeds {bad:?}",
        bad.len()
    );
}

/// Two adds at once choose one slot.
#[test]
fn two_adds_at_once() {
    let mut bad = vec![];
    for seed in seeds(60) {
        let mut m = Machine::new(seed, 2, SIZE);
        m.start();
        for e in 0..6 {
            wr(&m, e << 22, 1 << 20);
        }
        fl(&m);
        m.fail(1).unwrap();
        let done = Rc::new(RefCell::new(vec![]));
        let (d1, d2) = (SimDisk::new(128 << 20, 0x33), SimDisk::new(128 << 20, 0x44));
        for (i, d) in [&d1, &d2].into_iter().enumerate() {
            m.world.connect(d);
            let (mirror, d, o) = (m.mirror(), d.clone(), done.clone());
            m.world.spawn_task(async move {
                let r = mirror.add(format!("new{i}"), d, false, false).await;
                o.borrow_mut().push(r);
            });
        }
        let o = done.clone();
        assert!(m.world.run(5_000_000, || o.borrow().len() == 2));
        let both = done.borrow().iter().all(Result::is_ok);
        let mirror = m.mirror();
        let ok = m.world.run(5_000_000, || {
            mirror
                .status()
                .members
                .iter()
                .all(|x| x.state == MemberState::InSync)
        });
        let p = mirror.status().members[1].path.clone();
        m.disks[1] = if p == "new0" { d1 } else { d2 };
        let r = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| m.compare_members()));
        if both || !ok || r.is_err() {
            bad.push((seed, both, ok, r.is_err()));
        }
    }
    let wrong = bad.iter().filter(|b| b.3).count();
    assert!(
        bad.is_empty(),
        "{} of 60 (seed, both accepted, in-sync, differ); differ {wrong}: {:?}",
        bad.len(),
        &bad[..bad.len().min(5)]
    );
}

/// Flush fails on the only in-sync member while another one resyncs.
#[test]
fn flush_failure_during_resync() {
    let mut bad = vec![];
    for seed in seeds(12) {
        let mut m = Machine::new(seed, 2, SIZE);
        m.start();
        for e in 0..6 {
            wr(&m, e << 22, 1 << 20);
        }
        fl(&m);
        m.fail(1).unwrap();
        for e in 0..6 {
            for q in 0..4 {
                wr(&m, (e << 22) + (q << 20), 1 << 20);
            }
        }
        fl(&m);
        m.re_add(1).unwrap();
        // not missed any more, or not at all: blocks beyond
        wr(&m, 60 << 20, 65536);
        assert_eq!(st(&m, 1), MemberState::Resyncing);
        m.disks[0].set_faults(flushes());
        let c = m.client();
        let _ = m.world.block_on(async move { c.mirror.flush().await });
        m.disks[0].set_faults(none());
        m.disks[1].set_faults(Faults {
            hang: true,
            ..none()
        });
        let w = m.world.clone();
        m.world.block_on(async move {
            mirror::Host::sleep(
                &mirror::sim::SimHost(w),
                std::time::Duration::from_millis(2500),
            )
            .await
        });
        m.disks[1].set_faults(none());
        let mirror = m.mirror();
        let ok = m.world.run(300_000, || {
            let s = mirror.status();
            s.extents.unequalised_blocks == 0
                && s.members.iter().all(|x| x.state != MemberState::Resyncing)
        });
        let r = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| m.compare_members()));
        if !ok || r.is_err() {
            bad.push((seed, ok));
        }
    }
    assert!(
        bad.is_empty(),
        "{} of 12 (seed, in-sync reached) differ: {:?}",
        bad.len(),
        &bad[..bad.len().min(5)]
    );
}

/// A write fails on the source after its block was copied, before the bits are cleared.
#[test]
fn write_failure_on_source_during_resync() {
    let mut bad = vec![];
    for seed in seeds(40) {
        let mut m = Machine::new(seed, 2, SIZE);
        m.start();
        for e in 0..6 {
            wr(&m, e << 22, 1 << 20);
        }
        fl(&m);
        m.fail(1).unwrap();
        for e in 0..6 {
            wr(&m, e << 22, 1 << 20);
        }
        fl(&m);
        m.re_add(1).unwrap();
        let k = m.world.choose(|r| r.below(120));
        m.world.run(k, || false);
        m.disks[0].set_faults(Faults {
            writes: true,
            ..none()
        });
        let c = m.client();
        m.world.block_on(async move {
            for e in 0..6u64 {
                let _ = c.write(e << 22, 65536, false).await;
            }
        });
        m.disks[0].set_faults(none());
        m.disks[1].set_faults(Faults {
            hang: true,
            ..none()
        });
        let w = m.world.clone();
        m.world.block_on(async move {
            mirror::Host::sleep(
                &mirror::sim::SimHost(w),
                std::time::Duration::from_millis(2500),
            )
            .await
        });
        m.disks[1].set_faults(none());
        let mirror = m.mirror();
        let ok = m.world.run(300_000, || {
            let s = mirror.status();
            s.extents.unequalised_blocks == 0
                && s.members.iter().all(|x| x.state != MemberState::Resyncing)
        });
        let r = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| m.compare_members()));
        if !ok || r.is_err() {
            bad.push((
                seed,
                ok,
                r.is_err(),
                mirror.status().members[1].state,
                mirror.status().members[1].reason.clone(),
                mirror.status().members[1].missed_bytes,
            ));
        }
    }
    assert!(
        bad.is_empty(),
        "{} of 40 {} differ though in-sync: {:?}",
        bad.len(),
        bad.iter().filter(|b| b.1 && b.2).count(),
        &bad[..bad.len().min(4)]
    );
}

/// The last member is slow beyond the deadline while an extent is zeroed: the request waits, and
/// nothing of it strikes later.
#[test]
fn the_last_member_is_waited_for() {
    for seed in seeds(40) {
        let m = {
            let mut m = Machine::new(seed, 2, SIZE);
            m.start();
            m
        };
        m.fail(1).unwrap();
        m.disks[0].set_faults(Faults {
            hang: true,
            ..none()
        });
        let (c, done) = (m.client(), Rc::new(RefCell::new(None)));
        let d = done.clone();
        m.world.spawn_task(async move {
            let result = c.write(8 << 20, 4096, false).await;
            *d.borrow_mut() = Some(result);
        });
        m.world.run(2000, || false);
        assert!(
            done.borrow().is_none(),
            "seed {seed}: answered without the last member"
        );
        m.disks[0].set_faults(none());
        let d = done.clone();
        assert!(
            m.world.run(1_000_000, || d.borrow().is_some()),
            "seed {seed} stands still"
        );
        assert_eq!(*done.borrow(), Some(Ok(())), "seed {seed}");
        m.world.run(2000, || false);
        let c = m.client();
        m.world
            .block_on(async move { c.read(8 << 20, 4096).await.unwrap() });
    }
}

/// Power cut while a loss is pending: is the lost member called an old backup?
#[test]
fn loss_pending_at_power_cut() {
    let mut bad = vec![];
    for seed in seeds(60) {
        let mut m = Machine::new(seed, 2, SIZE);
        m.start();
        for e in 0..16u64 {
            wr(&m, e << 22, 4096);
        }
        m.stop().unwrap();
        m.start();
        wr(&m, 0, 4096);
        m.disks[1].set_faults(gone());
        for e in 1..16u64 {
            let c = m.client();
            m.world.spawn_task(async move {
                for _ in 0..e {
                    let _ = c.read_raw(0, 512).await;
                }
                let _ = c.write(e << 22, 512, false).await;
            });
        }
        let mirror = m.mirror();
        m.world.run(100_000, || {
            mirror.status().members[1].state == MemberState::Faulty
        });
        let k = m.world.choose(|r| r.below(200));
        m.world.run(k, || false);
        let event = mirror.status().event_count;
        m.disks[1].set_faults(none());
        m.cut_power();
        m.start();
        let s = m.mirror().status();
        if let Some(r) = &s.members[1].reason
            && r.contains("commits behind")
        {
            bad.push((seed, event, r.clone()));
        }
    }
    assert!(bad.is_empty(), "{} of 60: {:?}", bad.len(), bad[0]);
}

/// A new disk's resync survives a restart.
#[test]
fn new_disk_resync_survives_restart() {
    let mut m = Machine::new(3, 2, SIZE);
    m.start();
    for e in 0..6 {
        wr(&m, e << 22, 1 << 20);
    }
    m.fail(1).unwrap();
    let fresh = SimDisk::new(128 << 20, 0x33);
    m.world.connect(&fresh);
    m.disks[1] = fresh.clone();
    let mirror = m.mirror();
    m.world
        .block_on(async move { mirror.add(path(1), fresh, false, false).await })
        .unwrap();
    drop(m.stop());
    m.start();
    let mirror = m.mirror();
    let ok = m.world.run(2_000_000, || {
        mirror.status().members[1].state == MemberState::InSync
    });
    assert!(
        ok,
        "{:?}: {:?}",
        st(&m, 1),
        mirror.status().members[1].reason
    );
}

/// Write-zeroes of a part while a discard of the whole is under way.
#[test]
fn zeroes_skipped_under_a_discard() {
    let mut bad = vec![];
    for seed in seeds(300) {
        let mut m = Machine::new(seed, 2, SIZE);
        m.start();
        wr(&m, 4 << 20, 65536);
        fl(&m);
        let (c1, c2) = (m.client(), m.client());
        let ok = Rc::new(RefCell::new(None));
        let o = ok.clone();
        m.world.spawn_task(async move {
            let _ = c1.mirror.discard(4 << 20, 4 << 20).await;
        });
        let k = m.world.choose(|r| 1 + r.below(12));
        m.world.run(k, || false);
        m.world.spawn_task(async move {
            *o.borrow_mut() = Some(c2.write_zeroes(4 << 20, 4096, true).await);
        });
        let o = ok.clone();
        m.world.run(10_000, || o.borrow().is_some());
        m.cut_power();
        m.start();
        let c = m.client();
        let bytes = m
            .world
            .block_on(async move { c.read_raw(4 << 20, 4096).await.unwrap() });
        if bytes.iter().any(|&b| b != 0) {
            bad.push(seed);
        }
    }
    assert!(
        bad.is_empty(),
        "{} of 300: acked FUA zeroes are gone: {:?}",
        bad.len(),
        &bad[..bad.len().min(5)]
    );
}

/// Read, discard and equalising after an unclean stop.
#[test]
fn read_discard_equalise_deadlock() {
    let mut bad = vec![];
    for seed in seeds(100) {
        let mut m = Machine::new(seed, 2, SIZE);
        m.start();
        wr(&m, 4 << 20, 1 << 20);
        m.kill_daemon();
        m.start();
        let done = Rc::new(RefCell::new(0));
        let (c1, c2, c3) = (m.client(), m.client(), m.client());
        let (o1, o2, o3) = (done.clone(), done.clone(), done.clone());
        m.world.spawn_task(async move {
            let _ = c1.mirror.write_zeroes(4 << 20, 4096, false).await;
            *o1.borrow_mut() += 1;
        });
        m.world.spawn_task(async move {
            let _ = c2.mirror.discard(4 << 20, 4 << 20).await;
            *o2.borrow_mut() += 1;
        });
        m.world.spawn_task(async move {
            let _ = c3.read_raw((4 << 20) + 8192, 4096).await;
            *o3.borrow_mut() += 1;
        });
        let d = done.clone();
        if !m.world.run(200_000, || *d.borrow() == 3) {
            bad.push((seed, *done.borrow()));
        }
    }
    assert!(
        bad.is_empty(),
        "{} of 100 stand still (seed, ended): {:?}",
        bad.len(),
        &bad[..bad.len().min(5)]
    );
}
