//! Finding members: which devices and files carry the superblock of a mirror.
//!
//! A scan looks at block devices, at files, and at the block devices and files that lie
//! directly in directories. It follows links, sees each medium once, opens nothing exclusively
//! and leaves out what it cannot read, because a scan of a whole machine meets many things
//! that are none of its business.
//!
//! A block device that another device is built on (the disk under a dm device, LVM, multipath,
//! crypt) shows the same superblock as the upper device. The lower one cannot be opened by
//! anybody but its holder, so it is left out in favour of the upper one; when nothing else shows
//! that member, that is said.
//!
//! Exports are looked at where their address was given or last seen, or where the superblock of
//! another member says; what a network has is not searched. Of one that does not answer that is
//! said, because somebody named it.
//!
//! Where a mirror was last seen comes first: when every member is still there, nothing else is
//! looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use mirror::superblock::Superblock;
use uuid::Uuid;

use crate::failure::Failure;
use crate::medium::{self, Access, Identity, Medium, identity};
use crate::output;
use crate::run_dir::{RunDir, may_be_there};

/// A medium with a superblock.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// What it says.
    pub(crate) superblock: Superblock,
}

/// A mirror of which at least one member was found.
#[derive(Clone, Debug)]
pub(crate) struct FoundMirror {
    /// Its name, as its newest member has it.
    pub(crate) name: String,
    /// Its identity.
    pub(crate) uuid: Uuid,
    /// Its members, in order of their slots.
    pub(crate) members: Vec<Found>,
}

impl FoundMirror {
    /// The paths of its members.
    pub(crate) fn paths(&self) -> Vec<PathBuf> {
        self.members
            .iter()
            .map(|found| found.path.clone())
            .collect()
    }

    /// Whether the member of every slot was found, each once, as the newest of them has it.
    fn is_complete(&self) -> bool {
        let newest = self
            .members
            .iter()
            .max_by_key(|found| found.superblock.event_count);
        newest.is_some_and(|newest| {
            let mut wanted: Vec<Uuid> = newest
                .superblock
                .slots
                .iter()
                .filter_map(|slot| slot.member)
                .collect();
            let mut found: Vec<Uuid> = self
                .members
                .iter()
                .map(|found| found.superblock.member)
                .collect();
            wanted.sort_unstable();
            found.sort_unstable();
            wanted == found
        })
    }
}

/// Where to look when nothing was named: all block devices of the machine, except those that
/// mirrors provide (reading one that waits for its daemon would not return) and drives for
/// removable media.
pub(crate) fn all_block_devices() -> Result<Vec<PathBuf>, Failure> {
    let text = std::fs::read_to_string("/proc/partitions").map_err(|e| {
        Failure::failed(format!(
            "The list of block devices, /proc/partitions, cannot be read: {}. Name devices or \
             directories to scan.",
            crate::failure::words(&e)
        ))
    })?;
    Ok(devices_in(&text))
}

fn devices_in(partitions: &str) -> Vec<PathBuf> {
    let names = partitions.lines().filter_map(|line| {
        let mut fields = line.split_whitespace().skip(2);
        let blocks: u64 = fields.next()?.parse().ok()?;
        let name = fields.next()?;
        let skip = ["ublkb", "sr", "fd", "zram"];
        let wanted = blocks > 0 && !skip.iter().any(|prefix| name.starts_with(prefix));
        wanted.then(|| PathBuf::from("/dev").join(name))
    });
    names.collect()
}

/// The places that were named, directories replaced by what lies in them.
fn expand(places: &[PathBuf]) -> Result<Vec<PathBuf>, Failure> {
    let mut all = Vec::new();
    for place in places {
        let cannot = |e: std::io::Error| {
            Failure::new(
                crate::failure::Exit::of_io(&e),
                format!(
                    "{} cannot be scanned: {}.",
                    place.display(),
                    crate::failure::words(&e)
                ),
            )
        };
        if medium::is_address(place) {
            all.push(place.clone());
        } else if std::fs::metadata(place).map_err(cannot)?.is_dir() {
            let entries = std::fs::read_dir(place).map_err(cannot)?;
            let mut inside: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
            inside.sort_unstable();
            all.extend(inside);
        } else {
            all.push(place.clone());
        }
    }
    Ok(all)
}

/// All members found at the places.
pub(crate) fn members(places: &[PathBuf]) -> Result<Vec<Found>, Failure> {
    members_where(places, |_| true)
}

/// Those members found at the places that are wanted.
fn members_where(
    places: &[PathBuf],
    wanted: impl Fn(&Superblock) -> bool,
) -> Result<Vec<Found>, Failure> {
    let mut search = search(places, medium::holders)?;
    search.found.retain(|member| wanted(&member.superblock));
    search.held.retain(|(member, _)| wanted(&member.superblock));
    for sentence in search.left_out() {
        output::note(&sentence);
    }
    let peers = peers_of(&search.found);
    let mut found = search.found;
    found.extend(self::search(&peers, medium::holders)?.found);
    Ok(found)
}

/// The addresses of members of the same mirrors that were not found: nothing on this machine
/// would show them.
fn peers_of(found: &[Found]) -> Vec<PathBuf> {
    let here = |uuid| found.iter().any(|other| other.superblock.member == uuid);
    let records = found.iter().flat_map(|it| &it.superblock.slots);
    let absent = records.filter(|it| it.member.is_some_and(|uuid| !here(uuid)));
    let addresses: BTreeSet<PathBuf> = absent
        .map(|record| PathBuf::from(&record.address))
        .filter(|address| medium::is_address(address))
        .collect();
    addresses.into_iter().collect()
}

/// What a search saw.
#[derive(Debug, Default)]
struct Search {
    found: Vec<Found>,
    /// Members on devices that another device is built on, and those devices' names.
    held: Vec<(Found, Vec<String>)>,
}

impl Search {
    /// A sentence for each member that only a held device shows.
    fn left_out(&self) -> Vec<String> {
        let shown = |member: &Found| {
            let same = |other: &Found| other.superblock.member == member.superblock.member;
            self.found.iter().any(same)
        };
        let alone = self.held.iter().filter(|(member, _)| !shown(member));
        alone
            .map(|(member, holders)| {
                format!(
                    "{} holds a member of mirror {} but is left out: /dev/{} is built on it and \
                     does not show that member. Check that device, or take it away.",
                    member.path.display(),
                    member.superblock.name,
                    holders.join(", /dev/")
                )
            })
            .collect()
    }
}

/// Looks at the places; `holders_of` names the devices that are built on the one at a path.
fn search(
    places: &[PathBuf],
    holders_of: impl Fn(&Path) -> Vec<String>,
) -> Result<Search, Failure> {
    let mut seen: BTreeSet<Identity> = BTreeSet::new();
    let mut search = Search::default();
    for path in expand(places)? {
        let Some(id) = identity(&path) else { continue };
        if seen.insert(id)
            && let Some(superblock) = look(&path)
        {
            let path = medium::absolute(&path)?;
            let holders = holders_of(&path);
            let member = Found { path, superblock };
            if holders.is_empty() {
                search.found.push(member);
            } else {
                search.held.push((member, holders));
            }
        }
    }
    Ok(search)
}

/// The superblock at `path`, when there is a valid one that can be read.
fn look(path: &Path) -> Option<Superblock> {
    if medium::is_address(path) {
        let found = Medium::open(path, Access::Look).and_then(|medium| medium.superblock());
        return match found {
            Ok(superblock) => Some(superblock.ok()?.superblock),
            Err(failure) => {
                output::note(&failure.message);
                None
            }
        };
    }
    let meta = std::fs::metadata(path).ok()?;
    if meta.is_dir() || (meta.is_file() && meta.len() < 12 << 10) {
        return None;
    }
    let medium = Medium::open(path, Access::Look).ok()?;
    Some(medium.superblock().ok()?.ok()?.superblock)
}

/// The members sorted into mirrors, by name.
pub(crate) fn mirrors(found: Vec<Found>) -> Vec<FoundMirror> {
    let mut by_uuid: BTreeMap<Uuid, Vec<Found>> = BTreeMap::new();
    for member in found {
        by_uuid
            .entry(member.superblock.mirror)
            .or_default()
            .push(member);
    }
    let mut mirrors: Vec<FoundMirror> = by_uuid
        .into_iter()
        .filter_map(|(uuid, mut members)| {
            members.sort_by_key(|m| (m.superblock.own_slot, m.path.clone()));
            let newest = members.iter().max_by_key(|m| m.superblock.event_count)?;
            Some(FoundMirror {
                name: newest.superblock.name.clone(),
                uuid,
                members,
            })
        })
        .collect();
    mirrors.sort_by(|a, b| (&a.name, a.uuid).cmp(&(&b.name, b.uuid)));
    mirrors
}

/// The members of the mirror of that name: at the places, or when none is given, where it was
/// last seen and on the machine's block devices.
pub(crate) fn named(
    run_dir: &RunDir,
    name: &str,
    places: &[PathBuf],
) -> Result<FoundMirror, Failure> {
    let is_named = |superblock: &Superblock| superblock.name == name;
    if !places.is_empty() {
        return only_named(members_where(places, is_named)?, name);
    }
    let mut everywhere = run_dir.hints(name);
    everywhere.retain(|path| may_be_there(path));
    let hinted = search(&everywhere, medium::holders)?.found;
    if let Ok(mirror) = only_named(hinted, name)
        && mirror.is_complete()
    {
        return Ok(mirror);
    }
    everywhere.extend(all_block_devices().unwrap_or_default());
    only_named(members_where(&everywhere, is_named)?, name)
}

/// The one mirror of that name among those found.
fn only_named(found: Vec<Found>, name: &str) -> Result<FoundMirror, Failure> {
    let mut named = mirrors(found);
    named.retain(|mirror| mirror.name == name);
    let list = |named: &[FoundMirror]| {
        let each = named.iter().map(|mirror| {
            let paths: Vec<String> = mirror
                .paths()
                .iter()
                .map(|path| path.display().to_string())
                .collect();
            format!("uuid {} on {}", mirror.uuid, paths.join(" "))
        });
        each.collect::<Vec<_>>().join("; ")
    };
    match named.len() {
        1 => Ok(named.remove(0)),
        0 => Err(Failure::not_found(format!(
            "No member of a mirror named {name} was found. Name the members' paths, or where to \
             look with --scan; 'mirrorctl examine PATH' says what a path holds."
        ))),
        count => Err(Failure::refused(format!(
            "{count} mirrors are named {name}: {}. Name the paths of the members of the one that \
             you mean.",
            list(&named)
        ))),
    }
}

#[cfg(test)]
#[path = "scan_tests.rs"]
mod tests;
