//! One member: its superblock's copies and how far its maps have come.

use std::path::Path;

use dirty_map::{Address, Kind as SectorKind, SECTOR_BYTES, SectorError, Stamp, decode};
use mirror::assemble::Seen;
use mirror::layout::{PAGE_BYTES, Region, RegionKind};
use mirror::superblock::{COPY_A_OFFSET, COPY_B_OFFSET, COPY_BYTES, Superblock, SuperblockError};

use super::device::{BLOCK, Buffer, Device};
use super::report::{Class, Finding, Kind, Outcome};
use crate::failure::{Failure, words};
use crate::medium::Access;
use crate::probe;

/// Pages of a map that are read at once.
pub(crate) const CHUNK_PAGES: u64 = 256;
/// Bytes of a sector's payload that name an epoch and a sequence in a position sector.
const POSITION_FIELDS: (usize, usize) = (16, 24);

/// A given member.
#[derive(Debug)]
pub(super) struct Member {
    /// Its path, as it was given.
    pub(super) path: String,
    /// The open device or file.
    pub(super) device: Device,
    /// Its superblock, from the newer valid copy; `None` when it cannot be used.
    pub(super) superblock: Option<Superblock>,
    /// Its slot, as far as it is known.
    slot: Option<u8>,
    /// What was found about its superblock and its size.
    pub(super) findings: Vec<Finding>,
}

/// A copy of a sector.
pub(super) type Sector<'a> = Result<(Stamp, &'a [u8; dirty_map::PAYLOAD_BYTES]), SectorError>;

impl Member {
    /// Opens what is at `path` and reads its superblock.
    ///
    /// Fails when it is in use, no member of any mirror, or of a newer version.
    pub(super) fn open(path: &Path, access: Access) -> Result<Self, Failure> {
        let device = Device::open(path, access)?;
        let shown = path.display().to_string();
        let copies = [COPY_A_OFFSET, COPY_B_OFFSET].map(|offset| read_copy(&device, offset));
        let [copy_a, copy_b] = copies;
        let (copy_a, copy_b) = (copy_a?, copy_b?);
        let bytes = |copy: &Option<Vec<u8>>| copy.clone().unwrap_or_else(|| vec![0; COPY_BYTES]);
        let mut member = Self {
            path: shown,
            device,
            superblock: None,
            slot: None,
            findings: Vec::new(),
        };
        match Superblock::load(&bytes(&copy_a), &bytes(&copy_b)) {
            Ok(loaded) => member.accept(loaded.superblock, [copy_a, copy_b]),
            Err(SuperblockError::TooNew(why)) => {
                return Err(Failure::failed(format!(
                    "{} needs a newer mirrorctl: {why}.",
                    member.path
                )));
            }
            Err(SuperblockError::NotAMember) if copy_a.is_some() && copy_b.is_some() => {
                let found = probe::describe(&member.device.medium().signatures()?);
                return Err(Failure::not_found(format!(
                    "{} is not a member of a mirror; it holds {found}.",
                    member.path
                )));
            }
            Err(_) => member.find(
                Class::Metadata,
                Kind::Superblock,
                "both copies of its superblock are damaged or cannot be read; when the mirror is \
                 running again, add it as a new disk",
                Outcome::Found,
            ),
        }
        Ok(member)
    }

    fn accept(&mut self, superblock: Superblock, copies: [Option<Vec<u8>>; 2]) {
        self.slot = Some(superblock.own_slot);
        for (name, copy) in ["A", "B"].iter().zip(&copies) {
            let (class, what) = match copy.as_deref().map(Superblock::decode) {
                Some(Ok(same)) if same == superblock => continue,
                // An update was cut off between the two.
                Some(Ok(_)) => (Class::Expected, "is older than the other"),
                Some(Err(_)) => (Class::Mendable, "is damaged"),
                None => (Class::Mendable, "cannot be read"),
            };
            let what = format!("copy {name} of its superblock {what}");
            self.find(class, Kind::Superblock, &what, Outcome::Found);
        }
        let have = self.device.medium().size_bytes();
        let need = superblock.layout.member_bytes();
        if have < need {
            let what =
                format!("it has {have} bytes and its superblock needs {need}: it has been cut off");
            self.find(Class::Incomplete, Kind::Truncated, &what, Outcome::Found);
            return;
        }
        self.superblock = Some(superblock);
    }

    /// Path and slot.
    pub(super) fn name(&self) -> (String, Option<u8>) {
        (self.path.clone(), self.slot)
    }

    fn find(&mut self, class: Class, kind: Kind, what: &str, outcome: Outcome) {
        self.findings.push(Finding {
            class,
            kind,
            member: Some(self.name()),
            bytes: None,
            what: what.to_owned(),
            outcome,
        });
    }

    /// Says which copies [`Member::mend_superblock`] would write.
    pub(super) fn would_mend_superblock(&mut self) {
        let usable = self.superblock.is_some();
        for finding in &mut self.findings {
            let copy = usable && finding.kind == Kind::Superblock;
            finding.outcome = if copy {
                Outcome::WouldMend
            } else {
                left_alone()
            };
        }
    }

    /// Writes the superblock over a copy that is not like it. The other copy is whole, so a cut
    /// in the middle costs nothing.
    pub(super) fn mend_superblock(&mut self) {
        let bytes = self.superblock.as_ref().map(Superblock::encode);
        for finding in &mut self.findings {
            let offset = if finding.what.starts_with("copy A") {
                COPY_A_OFFSET
            } else {
                COPY_B_OFFSET
            };
            let Some(bytes) = bytes.as_ref().filter(|_| finding.kind == Kind::Superblock) else {
                finding.outcome = left_alone();
                continue;
            };
            let written = self.device.write(offset, bytes);
            finding.outcome = match written.and_then(|()| self.device.sync()) {
                Ok(()) => Outcome::Mended,
                Err(e) => Outcome::Left(format!("it could not be written ({})", words(&e))),
            };
        }
    }

    /// What assembly needs to know of it; `None` when it cannot be used.
    pub(super) fn seen(&self) -> Result<Option<Seen>, Failure> {
        let Some(superblock) = &self.superblock else {
            return Ok(None);
        };
        let mut newest = Stamp {
            ordinal: 0,
            sequence: 0,
        };
        let mut position = None;
        for kind in [RegionKind::State, RegionKind::Position] {
            let Some(region) = superblock.layout.find(kind, 0) else {
                continue;
            };
            for pages in chunks(region) {
                let copies = self.read_pages(superblock, region, pages)?;
                for sector in copies.iter().flat_map(Pages::sectors) {
                    let Ok((stamp, payload)) = sector else {
                        continue;
                    };
                    newest = newest.max(stamp);
                    if kind == RegionKind::Position
                        && position.is_none_or(|(before, _)| stamp > before)
                    {
                        position = Some((stamp, *payload));
                    }
                }
            }
        }
        let (epoch_end, sequence_end) = POSITION_FIELDS;
        let fields = position.map(|(_, payload)| payload);
        let number = |range: std::ops::Range<usize>| {
            let bytes = fields
                .iter()
                .flat_map(|payload| payload[range.clone()].iter().rev());
            bytes.fold(0_u128, |number, &byte| number << 8 | u128::from(byte))
        };
        Ok(Some(Seen {
            path: self.path.clone(),
            superblock: superblock.clone(),
            position: newest,
            damaged: position.is_none(),
            effective: number(0..epoch_end),
            completed: u64::try_from(number(epoch_end..sequence_end)).unwrap_or(0),
        }))
    }

    /// Reads pages of both copies of a map.
    pub(super) fn read_pages(
        &self,
        superblock: &Superblock,
        region: &Region,
        pages: std::ops::Range<u64>,
    ) -> Result<[Pages; 2], Failure> {
        let read = |copy: u64| {
            let len = (pages.end - pages.start) * PAGE_BYTES;
            let mut buffer = Buffer::new(usize::try_from(len).unwrap_or(0));
            let offset = copy + pages.start * PAGE_BYTES;
            let bad = self.device.read(offset, buffer.get_mut())?;
            Ok(Pages {
                buffer,
                bad,
                address: Address {
                    kind: sector_kind(region.kind),
                    slot: region.slot,
                    index: narrow(pages.start * (PAGE_BYTES / SECTOR_BYTES as u64)),
                },
                tag: superblock.tag(),
            })
        };
        Ok([read(region.copy_a)?, read(region.copy_b)?])
    }
}

fn left_alone() -> Outcome {
    Outcome::Left("the member is left as it is".to_owned())
}

fn read_copy(device: &Device, offset: u64) -> Result<Option<Vec<u8>>, Failure> {
    if device.medium().size_bytes() < offset + COPY_BYTES as u64 {
        return Ok(Some(vec![0; COPY_BYTES]));
    }
    let mut buffer = Buffer::new(COPY_BYTES);
    let bad = device.read(offset, buffer.get_mut())?;
    Ok(bad.is_empty().then(|| buffer.get().to_vec()))
}

/// Some pages of one copy of a map.
pub(super) struct Pages {
    buffer: Buffer,
    bad: Vec<std::ops::Range<usize>>,
    /// Where the first sector belongs.
    address: Address,
    tag: u32,
}

impl Pages {
    /// The bytes of a page; `None` when it cannot be read.
    pub(super) fn page(&self, page: usize) -> Option<&[u8]> {
        let range = page * BLOCK..(page + 1) * BLOCK;
        let unreadable = self.bad.iter().any(|bad| bad.contains(&range.start));
        (!unreadable).then(|| &self.buffer.get()[range])
    }

    /// Every sector, in order; those that cannot be read are damaged.
    pub(super) fn sectors(&self) -> impl Iterator<Item = Sector<'_>> {
        let (sectors, _) = self.buffer.get().as_chunks::<SECTOR_BYTES>();
        (0..).zip(sectors).map(|(at, bytes): (u32, _)| {
            let start = usize::try_from(at).unwrap_or(0) * SECTOR_BYTES;
            if self.bad.iter().any(|bad| bad.contains(&start)) {
                return Err(SectorError::Damaged);
            }
            let index = self.address.index + at;
            decode(
                bytes,
                Address {
                    index,
                    ..self.address
                },
                self.tag,
            )
        })
    }
}

/// The parts of a map that are read at once, in pages.
pub(crate) fn chunks(region: &Region) -> impl Iterator<Item = std::ops::Range<u64>> + use<> {
    let pages = region.len / PAGE_BYTES;
    (0..pages.div_ceil(CHUNK_PAGES))
        .map(move |chunk| chunk * CHUNK_PAGES..((chunk + 1) * CHUNK_PAGES).min(pages))
}

pub(crate) fn sector_kind(kind: RegionKind) -> SectorKind {
    match kind {
        RegionKind::State => SectorKind::State,
        RegionKind::Summary => SectorKind::Summary,
        RegionKind::Missed => SectorKind::Missed,
        RegionKind::Scrub => SectorKind::Scrub,
        RegionKind::Position | RegionKind::Checksums => SectorKind::Position,
    }
}

/// Page and sector numbers fit 32 bits for every size that a superblock may name.
pub(crate) fn narrow(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
