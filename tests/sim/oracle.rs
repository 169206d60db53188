//! Which contents a reader may see.
//!
//! The unit is a 512-byte sector. Each sector near the beginning of an extent is watched, where
//! the workload's writes meet, and one in 509 of the others, which only large requests touch.
//! Every change has a number, the time it was issued, the time
//! it was acknowledged, and the time a flush (or FUA) made it durable. A change is
//! *superseded* for a reader when another change was acknowledged before the read began and
//! issued after this one was acknowledged. After a crash the same holds with *durable* for
//! *acknowledged*; what the first read after the crash finds is what it stays, also after the next
//! one (R5).

use std::collections::{BTreeMap, BTreeSet};

/// Number of the change that made a sector what it is; 0 is "reads as zeroes".
pub(crate) type Version = u64;

#[derive(Clone, Copy, Debug)]
struct Change {
    version: Version,
    issued: u64,
    acknowledged: Option<u64>,
    durable: Option<u64>,
    /// The operator has accepted that a failed flush may have lost it: no later one promises it.
    given_up: bool,
}

/// What a crash did to the disks' caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Caches {
    /// Only the daemon died: what was acknowledged is there, and no more durable than before.
    Kept,
    /// Those of some disks or all were emptied: what was acknowledged and not durable may be gone.
    Lost,
}

/// Handle of a change under way.
pub(crate) struct Issued {
    sectors: std::ops::Range<u64>,
    issued: u64,
}

/// The oracle of a device.
#[derive(Clone, Default)]
pub(crate) struct Oracle {
    time: u64,
    /// When the reads under way began.
    reading: Vec<u64>,
    sectors: BTreeMap<u64, Vec<Change>>,
    /// Those with more than one change, or one that is not durable.
    open: BTreeSet<u64>,
}

/// Sectors of an extent.
const EXTENT: u64 = 8192;
/// Of these every one is watched that lies in the first so many of an extent.
const DENSE: u64 = 640;

fn is_watched(sector: u64) -> bool {
    sector % EXTENT < DENSE || (sector % EXTENT).is_multiple_of(509)
}

/// Fills a sector with content `version`.
pub(crate) fn fill(bytes: &mut [u8], sector: u64, version: Version) {
    for pair in bytes.as_chunks_mut::<16>().0 {
        pair[..8].copy_from_slice(&version.to_le_bytes());
        pair[8..].copy_from_slice(&sector.to_le_bytes());
    }
}

/// Which version of `sector` these bytes are, if they are one.
pub(crate) fn version_of(sector: u64, bytes: &[u8]) -> Option<Version> {
    let pairs = bytes.as_chunks::<16>().0;
    let (first, rest) = pairs.split_first()?;
    if rest.iter().any(|pair| pair != first) {
        return None;
    }
    let (version, of) = first.split_at(8);
    match (version.iter().all(|b| *b == 0), of) {
        (true, of) if of.iter().all(|b| *b == 0) => Some(0),
        (false, of) if of == sector.to_le_bytes() => {
            version.try_into().ok().map(u64::from_le_bytes)
        }
        _ => None,
    }
}

impl Oracle {
    fn tick(&mut self) -> u64 {
        self.time += 1;
        self.time
    }

    fn changes(&mut self, sector: u64) -> &mut Vec<Change> {
        self.sectors.entry(sector).or_insert_with(|| {
            vec![Change {
                version: 0,
                issued: 0,
                acknowledged: Some(0),
                durable: Some(0),
                given_up: false,
            }]
        })
    }

    /// A change of `sectors` to `version` begins.
    pub(crate) fn issue(&mut self, sectors: std::ops::Range<u64>, version: Version) -> Issued {
        let issued = self.tick();
        for sector in sectors.clone().filter(|sector| is_watched(*sector)) {
            let change = Change {
                version,
                issued,
                acknowledged: None,
                durable: None,
                given_up: false,
            };
            self.changes(sector).push(change);
            self.open.insert(sector);
        }
        Issued { sectors, issued }
    }

    /// The change was acknowledged; with `durable`, as durable.
    pub(crate) fn acknowledge(&mut self, issued: &Issued, durable: bool) {
        let (now, settled) = (self.tick(), self.settled_before());
        let sectors = issued.sectors.clone();
        for sector in sectors.filter(|sector| is_watched(*sector)) {
            let changes = self.changes(sector);
            for change in changes.iter_mut().filter(|c| c.issued == issued.issued) {
                change.acknowledged = Some(now);
                change.durable = durable.then_some(now);
            }
            prune(changes, settled);
        }
    }

    /// A flush begins.
    pub(crate) fn begin_flush(&mut self) -> u64 {
        self.tick()
    }

    /// The flush that began at `begun` was acknowledged.
    pub(crate) fn flushed(&mut self, begun: u64) {
        let (now, settled) = (self.tick(), self.settled_before());
        let sectors = &mut self.sectors;
        self.open.retain(|sector| {
            let changes = sectors.entry(*sector).or_default();
            for change in changes.iter_mut() {
                let promised = change.acknowledged.is_some_and(|at| at < begun);
                if promised && change.durable.is_none() && !change.given_up {
                    change.durable = Some(now);
                }
            }
            prune(changes, settled);
            changes.len() > 1 || changes[0].durable.is_none()
        });
    }

    /// The operator accepts the loss of what a flush that failed has covered.
    pub(crate) fn accept_loss(&mut self) {
        for sector in &self.open {
            let changes = self.sectors.entry(*sector).or_default();
            for change in changes.iter_mut() {
                change.given_up |= change.acknowledged.is_some() && change.durable.is_none();
            }
        }
    }

    /// A read begins.
    pub(crate) fn begin_read(&mut self) -> u64 {
        let begun = self.tick();
        self.reading.push(begun);
        begun
    }

    /// The read that began at `begun` has ended and been checked.
    pub(crate) fn end_read(&mut self, begun: u64) {
        self.reading.retain(|&other| other != begun);
    }

    /// Changes durable before this time are seen by every read still to be checked.
    fn settled_before(&self) -> u64 {
        self.reading.iter().copied().min().unwrap_or(u64::MAX)
    }

    /// Whether a read that began at `begun` may find `bytes` in `sector`.
    ///
    /// # Errors
    ///
    /// What was found and what would have been legal.
    pub(crate) fn check(&mut self, sector: u64, bytes: &[u8], begun: u64) -> Result<(), String> {
        if !is_watched(sector) {
            return Ok(());
        }
        let found = version_of(sector, bytes);
        let changes = self.changes(sector);
        let legal = |change: &Change| {
            let Some(acknowledged) = change.acknowledged else {
                return true;
            };
            !changes.iter().any(|other| {
                other.issued > acknowledged && other.acknowledged.is_some_and(|at| at < begun)
            })
        };
        let mut allowed = changes.iter().filter(|c| legal(c)).map(|c| c.version);
        if found.is_some() && allowed.any(|version| Some(version) == found) {
            return Ok(());
        }
        let allowed: Vec<Version> = changes
            .iter()
            .filter(|c| legal(c))
            .map(|c| c.version)
            .collect();
        Err(format!(
            "sector {sector} holds version {found:?} (legal: {allowed:?}; all: {changes:?}; it begins with {:?})",
            &bytes[..16]
        ))
    }

    /// The machine stopped without a word: what was under way may or may not have happened.
    pub(crate) fn crash(&mut self, caches: Caches) {
        self.reading.clear();
        if caches == Caches::Kept {
            return;
        }
        for sector in &self.open {
            let changes = self.sectors.entry(*sector).or_default();
            let all = changes.clone();
            let gone = |change: &Change| {
                let Some(acknowledged) = change.acknowledged else {
                    return false;
                };
                all.iter()
                    .any(|other| other.issued > acknowledged && other.durable.is_some())
            };
            changes.retain(|change| !gone(change));
            for change in changes.iter_mut() {
                // From now on they are all candidates of one moment.
                change.acknowledged = None;
            }
        }
    }

    /// After a crash: the first read decides which candidate it was.
    pub(crate) fn settle(&mut self, sector: u64, bytes: &[u8]) -> Result<(), String> {
        let begun = self.begin_read();
        self.end_read(begun);
        self.check(sector, bytes, begun)?;
        if !is_watched(sector) {
            return Ok(());
        }
        let version = version_of(sector, bytes);
        let (before, now) = (self.tick(), self.tick());
        let changes = self.changes(sector);
        // R5: caches were flushed before the copies were compared, so nothing brings back what
        // was not chosen.
        changes.retain(|change| Some(change.version) == version);
        changes.truncate(1);
        for found in changes.iter_mut() {
            (found.issued, found.acknowledged) = (before, Some(now));
            found.durable = Some(now);
        }
        self.open.remove(&sector);
        Ok(())
    }

    /// Sectors that were ever changed.
    pub(crate) fn touched(&self) -> Vec<u64> {
        self.sectors.keys().copied().collect()
    }
}

/// Drops what no reader can see any more, now or after a crash: what was superseded by a change
/// that became durable before every read under way.
fn prune(changes: &mut Vec<Change>, settled: u64) {
    let all = changes.clone();
    changes.retain(|change| {
        let Some(acknowledged) = change.acknowledged else {
            return true;
        };
        !all.iter().any(|other| {
            other.issued > acknowledged && other.durable.is_some_and(|at| at < settled)
        })
    });
}
