//! Disks that refuse writes, all of them for a while: what they may have in their caches all the
//! same, and what must still be known of the blocks afterwards. Each failed once.

use crate::checksums::{COOL, machine, rd, rot};
use crate::double_faults::faults;
use crate::machine::Machine;
use crate::older_images::seconds;
use crate::races::{none, seeds, wr};
use mirror::Errno;
use mirror::control::MemberRef;
use mirror::sim::Faults;

fn refuse_writes(machine: &Machine) {
    let writes = Faults {
        writes: true,
        ..none()
    };
    faults(machine, writes);
}

fn write(machine: &Machine, offset: u64) -> Result<(), Errno> {
    let client = machine.client();
    machine
        .world
        .block_on(async move { client.write(offset, 4096, false).await })
}

/// An extent that could not be recorded as hot, and was called hot by a later commit: its
/// checksums are believed after a clean stop. With one member left nothing else tells rot.
#[test]
fn a_write_that_was_refused_takes_no_checksums_along() {
    for seed in seeds(24) {
        let mut machine = machine(seed, 2);
        machine.start();
        wr(&machine, 0, 65536);
        seconds(&machine, COOL);
        refuse_writes(&machine);
        assert!(write(&machine, 8 * 4096).is_err(), "seed {seed}");
        faults(&machine, none());
        if seed % 3 == 1 {
            write(&machine, 8 * 4096).unwrap();
        }
        if seed % 2 == 0 {
            seconds(&machine, COOL);
        }
        machine.fail(1).unwrap();
        machine.stop().unwrap();
        rot(&machine, 0, 3);
        machine.start();
        let read = rd(&machine, 3 * 4096, 4096);
        assert_eq!(read, Err(Errno::IO), "seed {seed}");
        rd(&machine, 4 * 4096, 4096).unwrap();
    }
}

/// Equalising is refused, and some caches have what was to be written: it is durable before the
/// extent is cool (R3, which the rules of the machine watch).
#[test]
fn what_equalising_left_in_caches_is_flushed() {
    for seed in seeds(200) {
        let mut machine = machine(seed, 3);
        machine.start();
        wr(&machine, 0, 65536);
        machine.cut_power();
        machine.start();
        refuse_writes(&machine);
        // The source of a copy goes while it is copied: then nobody else has it for certain.
        let mirror = machine.mirror();
        machine
            .world
            .spawn_task(async move { drop(mirror.fail(&MemberRef::Slot(0)).await) });
        seconds(&machine, 10);
        faults(&machine, none());
        seconds(&machine, 2 * COOL);
        rd(&machine, 0, 65536).unwrap();
    }
}
