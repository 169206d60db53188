//! Scrubs of extents that are written all the time.

use crate::checksums::{COOL, all_known, check, check_so, machine, rd, rot};
use crate::machine::Machine;
use crate::older_images::seconds;
use crate::races::{seeds, wr};
use crate::rot::repairing;
use mirror::engine::{CheckOptions, Checked};

/// Whether it is hot or not.
fn check_hot_too(machine: &Machine, extent: u32) -> Checked {
    let how = CheckOptions {
        hot_too: true,
        ..repairing(false)
    };
    check_so(machine, extent, how)
}

/// An extent that is written all the time holds blocks that are not: what rots of them is found and
/// healed while it is hot.
#[test]
fn rot_in_a_hot_extent_is_healed() {
    for seed in seeds(20) {
        let mut machine = machine(seed, 2 + (seed % 2) as usize);
        machine.start();
        wr(&machine, 0, 65536);
        seconds(&machine, COOL);
        let victim = (seed % 2) as usize;
        rot(&machine, victim, 3);
        wr(&machine, 10 * 4096, 4096);
        assert!(check(&machine, 0, true).skipped_hot, "seed {seed}");
        let checked = check_hot_too(&machine, 0);
        assert_eq!((checked.findings, checked.repaired), (1, 1), "seed {seed}");
        assert_eq!(check_hot_too(&machine, 0).findings, 0, "seed {seed}");
        machine.compare_members();
    }
}

/// Blocks that are overwritten all the time, scrubbed for an hour: nothing is ever found.
#[test]
fn writes_are_never_taken_for_damage() {
    for seed in seeds(4) {
        let mut machine = machine(seed, 2);
        machine.start();
        wr(&machine, 0, 1 << 20);
        for round in 0..240 {
            // Every other time long enough for the extent to cool.
            seconds(&machine, if round % 2 == 0 { 18 } else { 12 });
            for block in 0..6_u64 {
                let client = machine.client();
                machine.world.spawn_task(async move {
                    client.write(block * 40 * 4096, 8192, false).await.unwrap();
                });
            }
            machine.world.run(round % 60, || false);
            let checked = check(&machine, 0, true);
            assert_eq!(checked.findings, 0, "seed {seed}");
            let checked = check_hot_too(&machine, 0);
            assert_eq!((checked.findings, checked.blocks), (0, 1024), "seed {seed}");
            for block in 0..3_u64 {
                rd(&machine, block * 80 * 4096, 16384).unwrap();
            }
        }
        assert!(machine.mirror().scrub_log().findings().is_empty());
        machine.world.run(50_000, || false);
        all_known(&mut machine, 1, &format!("seed {seed}"));
    }
}
