//! Random histories: clients, faults, an operator, crashes; the oracle judges every read.

use crate::play::play_script;
use crate::runner::run;
use crate::script::{Action, End, Fault, Life, Request, Script};

/// `SIM_SEEDS` histories, 100 unless it says otherwise; `cargo sim` runs more, says what it
/// does, and cuts down a history that fails.
#[test]
fn from_seeds() {
    let text = std::env::var("SIM_SEEDS").ok();
    let seeds = text.and_then(|text| text.parse().ok()).unwrap_or(100);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (totals, failure) = run(0..seeds, threads, None, |_| {});
    eprintln!("{totals:?}");
    if let Some(failure) = failure {
        panic!(
            "FAILED: seed {}: {}\ncargo sim --seed {} shows it",
            failure.seed, failure.message, failure.seed
        );
    }
}

/// Seed 20024, cut down: an only member refuses writes, and what it has of them is read and scrubbed
/// without being made equal. No checksum is about it, and nothing of it is damage.
#[test]
fn what_an_only_member_could_not_make_equal_is_not_damage() {
    let lost = Life {
        without: None,
        clients: vec![vec![Request::Write(8637, 32)]],
        operator: vec![Action::Faulty(1, Fault::Gone, 9)],
        scrub: false,
        steps: Some(967),
        end: End::KillDaemon,
    };
    let refused = Life {
        without: Some(0),
        clients: vec![vec![
            Request::Write(184, 232),
            Request::Write(8568, 224),
            Request::Discard(1),
            Request::Write(8419, 224),
        ]],
        operator: vec![Action::AllFaulty(Fault::Writes, 7)],
        scrub: true,
        steps: Some(8186),
        end: End::PowerCut,
    };
    for schedule in 0..60 {
        play_script(&Script {
            schedule,
            members: 2,
            plain: Vec::new(),
            paths: 0,
            lives: vec![lost.clone(), refused.clone()],
        });
    }
}
