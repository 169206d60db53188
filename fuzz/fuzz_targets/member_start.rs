//! Starting a mirror from members whose superblocks and maps say anything (R17, R9).
//!
//! Two or three simulated members have been in use: extents in every state, one member lost and
//! behind. An input changes their metadata and starts the mirror on what is left. Its first byte
//! is a set of choices (bit 0: by force, bit 1: with the third member, bit 2: without the first,
//! bit 3: without the second). Changes of six bytes follow: the member (with bit 7 set the
//! checksum stays wrong), the 512-byte sector (two bytes), the place in it (two bytes), the new
//! value.
//!
//! The start may be refused. When it is not, the mirror has to answer reads, a write, a flush
//! and a stop, with an error or without, but without a panic and within a limit of memory.
#![no_main]

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use mirror::control::MemberRef;
use mirror::create::{CreateRequest, NewMember, plan};
use mirror::sim::{SimDisk, SimHost, World};
use mirror::{Candidate, Host, Mirror, Span, StartOptions};
use ublk_mirror_fuzz::{Input, seal_sector, seal_superblock, within};

type SimMirror = Mirror<SimHost, SimDisk>;

/// Size of the device in bytes: one extent of it is partial.
const SIZE_BYTES: u64 = (30 << 20) + 4096;
/// The 512-byte sectors of both superblock copies.
const SUPERBLOCK_SECTORS: std::ops::Range<u64> = 8..24;
/// Memory for the copies of what the members hold, the maps and what the engine keeps.
const MEMORY_MAX: usize = 64 << 20;

thread_local! {
    static MEMBERS: Vec<SimDisk> = members_in_use();
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let [choices] = input.take();
    let count = if choices & 2 == 0 { 2 } else { 3 };
    MEMBERS.with(|members| {
        within(MEMORY_MAX, || {
            let disks: Vec<SimDisk> = members[..count].iter().map(SimDisk::image).collect();
            change(&disks, input);
            let present = disks.into_iter().enumerate();
            let present = present.filter(|(slot, _)| choices >> (slot + 2) & 1 == 0 || *slot == 2);
            start_and_use(present.collect(), choices & 1 != 0);
        });
    });
});

fn options(force: bool) -> StartOptions {
    StartOptions {
        name: "m".to_owned(),
        force,
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
    }
}

/// Changes bytes and puts the checksums of what was changed right.
fn change(disks: &[SimDisk], mut input: Input<'_>) {
    let metadata_sectors = 2 << 11;
    let mut touched = BTreeSet::new();
    while !input.is_empty() {
        let [member, sector, sector_high, at, at_high, value] = input.take();
        let disk = usize::from(member & 0x7f) % disks.len();
        let sector = u64::from(u16::from_le_bytes([sector, sector_high])) % metadata_sectors;
        let at = usize::from(u16::from_le_bytes([at, at_high])) % 512;
        let mut bytes = [0; 512];
        disks[disk].read_now(sector * 512, &mut bytes);
        bytes[at] = value;
        disks[disk].write_now(sector * 512, &bytes);
        if member & 0x80 == 0 {
            touched.insert((disk, sector));
        }
    }
    for (disk, sector) in touched {
        if SUPERBLOCK_SECTORS.contains(&sector) {
            let start = sector / 8 * 4096;
            let mut copy = [0; 4096];
            disks[disk].read_now(start, &mut copy);
            seal_superblock(&mut copy);
            disks[disk].write_now(start, &copy);
        } else {
            let mut bytes = [0; 512];
            disks[disk].read_now(sector * 512, &mut bytes);
            seal_sector(&mut bytes);
            disks[disk].write_now(sector * 512, &bytes);
        }
    }
}

fn start_and_use(disks: Vec<(usize, SimDisk)>, force: bool) {
    let world = World::new(1);
    let candidates = candidates(&world, disks);
    let host = Rc::new(SimHost(world.clone()));
    let started = world.block_on(SimMirror::start(host, candidates, options(force)));
    if let Ok(mirror) = started {
        let size = mirror.size_bytes();
        let host = SimHost(world.clone());
        world.block_on(async move {
            let buffer = host.allocate(8192);
            let span = |len| Span::whole(buffer.clone()).slice(0, len);
            let last = (size - 1) / 4096 * 4096;
            let end = usize::try_from(size - last).unwrap_or(4096);
            for offset in (0..size).step_by(4 << 20).take(16) {
                let _ = mirror.read(offset, span(end.min(512))).await;
            }
            let _ = mirror.read(last, span(end)).await;
            let _ = mirror.write(last, span(end), true).await;
            let _ = mirror.discard(0, size).await;
            let _ = mirror.flush().await;
            let _ = mirror.status();
            let _ = mirror.stop().await;
        });
    }
    // Tasks hold the machine, and it them.
    world.crash();
}

fn candidates(world: &Rc<World>, disks: Vec<(usize, SimDisk)>) -> Vec<Candidate<SimDisk>> {
    let candidate = |(slot, disk): (usize, SimDisk)| {
        world.connect(&disk);
        Candidate {
            path: format!("disk{slot}"),
            disk,
        }
    };
    disks.into_iter().map(candidate).collect()
}

/// Three members: the first two in-sync and not stopped cleanly, the third lost and behind.
fn members_in_use() -> Vec<SimDisk> {
    let disks = created();
    let world = World::new(1);
    let candidates = candidates(&world, disks.iter().cloned().enumerate().collect());
    let host = Rc::new(SimHost(world.clone()));
    let mirror = world
        .block_on(SimMirror::start(host, candidates, options(false)))
        .expect("new members start");
    let host = SimHost(world.clone());
    world.block_on(async move {
        let buffer = host.allocate(4096);
        let write = |offset| mirror.write(offset, Span::whole(buffer.clone()), true);
        for extent in 0..4 {
            write(extent << 22).await.expect("disks are well");
        }
        mirror
            .discard(4 << 20, 4 << 20)
            .await
            .expect("disks are well");
        // Long enough for extents to cool.
        host.sleep(Duration::from_secs(30)).await;
        mirror
            .fail(&MemberRef::Slot(2))
            .await
            .expect("there are two others");
        // Few are hot at the end: making the copies of one equal takes most of a start.
        for extent in [3, 5] {
            write((extent << 22) + 4096).await.expect("disks are well");
        }
    });
    world.crash();
    disks.iter().map(SimDisk::image).collect()
}

fn created() -> Vec<SimDisk> {
    let request = CreateRequest {
        name: "m".to_owned(),
        members: (0..3)
            .map(|slot| NewMember {
                path: format!("disk{slot}"),
                size_bytes: 64 << 20,
                logical_block_bytes: 512,
                zeroed: slot == 0,
            })
            .collect(),
        size_bytes: Some(SIZE_BYTES),
        logical_block_bytes: None,
        checksums: true,
        random: (1..=20).collect(),
        now_secs: 0,
    };
    let plan = plan(&request).expect("a plain request");
    let create = |member: &mirror::create::MemberPlan| {
        let disk = SimDisk::new(plan.member_bytes.max(16 << 20) + (16 << 20), 0xa7);
        for (offset, bytes) in member.maps.iter().chain(&member.superblocks) {
            disk.write_now(*offset, bytes);
        }
        disk
    };
    plan.members.iter().map(create).collect()
}
