//! Random histories: clients, faults, an operator, crashes; the oracle judges every read.

use crate::runner::run;

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
