//! The marks by which filesystems, volume managers and image formats are known.
//!
//! A signature is found when all its marks are. Offsets are in bytes. Those of the end of the
//! device are given the way the format's owner computes them.

/// Where a mark lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum At {
    /// From the start of the device.
    Start(u64),
    /// That many bytes before its end.
    End(u64),
    /// `offset` bytes after the place that lies `back` bytes before the end rounded down to a
    /// multiple of `align`.
    EndAligned {
        /// Bytes back from the rounded end.
        back: u64,
        /// What the end is rounded down to.
        align: u64,
        /// Bytes forward from there.
        offset: u64,
    },
}

/// Bytes at a place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark {
    pub(crate) at: At,
    pub(crate) bytes: &'static [u8],
}

/// A kind of content.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Signature {
    /// What it is, with its article.
    pub(crate) what: &'static str,
    /// All of these.
    pub(crate) marks: &'static [Mark],
}

const fn at(offset: u64, bytes: &'static [u8]) -> Mark {
    Mark {
        at: At::Start(offset),
        bytes,
    }
}

const fn before_end(back: u64, bytes: &'static [u8]) -> Mark {
    Mark {
        at: At::End(back),
        bytes,
    }
}

const MD_MAGIC_LE: &[u8] = &[0xfc, 0x4e, 0x2b, 0xa9];
const MD_MAGIC_BE: &[u8] = &[0xa9, 0x2b, 0x4e, 0xfc];
const EXT: &str = "an ext2, ext3 or ext4 filesystem";
const BTRFS: &str = "a btrfs filesystem";
const SWAP: &str = "a swap area";
const LUKS: &str = "a LUKS encrypted volume";
const LVM: &str = "an LVM physical volume";
const MD: &str = "a member of an md RAID array";
const DRBD: &str = "DRBD metadata";
const GPT: &str = "a GPT partition table";
const FAT: &str = "a FAT filesystem";

macro_rules! signature {
    ($what:expr, $($mark:expr),+) => {
        Signature { what: $what, marks: &[$($mark),+] }
    };
}

/// md's superblock version 1.0 lies 8 KiB before the end, rounded down to 4 KiB.
const MD_1_0: At = At::EndAligned {
    back: 8 << 10,
    align: 4 << 10,
    offset: 0,
};
/// md's superblock version 0.90 lies 64 KiB before the end, rounded down to 64 KiB.
const MD_0_90: At = At::EndAligned {
    back: 64 << 10,
    align: 64 << 10,
    offset: 0,
};
/// DRBD's internal metadata ends the device; the magic number follows 60 bytes.
const DRBD_MAGIC: At = At::EndAligned {
    back: 4 << 10,
    align: 4 << 10,
    offset: 60,
};

/// What is known.
pub(crate) const SIGNATURES: &[Signature] = &[
    signature!(EXT, at(0x438, &[0x53, 0xef])),
    signature!("an XFS filesystem", at(0, b"XFSB")),
    signature!("an XFS log", at(0, &[0xfe, 0xed, 0xba, 0xbe])),
    signature!(BTRFS, at(0x1_0040, b"_BHRfS_M")),
    signature!(
        "a bcachefs filesystem",
        at(
            0x1018,
            &[
                0xc6, 0x85, 0x73, 0xf6, 0x66, 0xce, 0x90, 0xa9, 0xd9, 0x6a, 0x60, 0xcf, 0x80, 0x3d,
                0xf7, 0xef,
            ]
        )
    ),
    signature!(
        "a bcache device",
        at(
            0x1018,
            &[
                0xc6, 0x85, 0x73, 0xf6, 0x4e, 0x1a, 0x45, 0xca, 0x82, 0x65, 0xf5, 0x7f, 0x48, 0xba,
                0x6d, 0x81,
            ]
        )
    ),
    signature!("an F2FS filesystem", at(0x400, &[0x10, 0x20, 0xf5, 0xf2])),
    signature!("a NILFS2 filesystem", at(0x406, &[0x34, 0x34])),
    signature!("a JFS filesystem", at(0x8000, b"JFS1")),
    signature!("a ReiserFS filesystem", at(0x1_0034, b"ReIsEr")),
    signature!("an EROFS filesystem", at(0x400, &[0xe2, 0xe1, 0xf5, 0xe0])),
    signature!("a SquashFS filesystem", at(0, b"hsqs")),
    signature!("an ISO 9660 filesystem", at(0x8001, b"CD001")),
    signature!("an NTFS filesystem", at(3, b"NTFS    ")),
    signature!("an exFAT filesystem", at(3, b"EXFAT   ")),
    signature!(FAT, at(82, b"FAT32   ")),
    signature!(FAT, at(54, b"FAT16   ")),
    signature!(FAT, at(54, b"FAT12   ")),
    signature!(SWAP, at(4086, b"SWAPSPACE2")),
    signature!(SWAP, at(4086, b"SWAP-SPACE")),
    signature!(SWAP, at(65_526, b"SWAPSPACE2")),
    signature!("a hibernated system", at(4086, b"S1SUSPEND\0")),
    signature!(LUKS, at(0, b"LUKS\xba\xbe")),
    signature!(LUKS, at(0x4000, b"SKUL\xba\xbe")),
    signature!("a BitLocker volume", at(3, b"-FVE-FS-")),
    signature!(LVM, at(0, b"LABELONE"), at(24, b"LVM2 001")),
    signature!(LVM, at(512, b"LABELONE"), at(536, b"LVM2 001")),
    signature!(LVM, at(1024, b"LABELONE"), at(1048, b"LVM2 001")),
    signature!(LVM, at(1536, b"LABELONE"), at(1560, b"LVM2 001")),
    signature!(MD, at(0, MD_MAGIC_LE)),
    signature!(MD, at(4096, MD_MAGIC_LE)),
    signature!(
        MD,
        Mark {
            at: MD_1_0,
            bytes: MD_MAGIC_LE
        }
    ),
    signature!(
        MD,
        Mark {
            at: MD_0_90,
            bytes: MD_MAGIC_LE
        }
    ),
    signature!(
        MD,
        Mark {
            at: MD_0_90,
            bytes: MD_MAGIC_BE
        }
    ),
    signature!(
        DRBD,
        Mark {
            at: DRBD_MAGIC,
            bytes: &[0x83, 0x74, 0x02, 0x6b]
        }
    ),
    signature!(
        DRBD,
        Mark {
            at: DRBD_MAGIC,
            bytes: &[0x83, 0x74, 0x02, 0x6c]
        }
    ),
    signature!(
        DRBD,
        Mark {
            at: DRBD_MAGIC,
            bytes: &[0x83, 0x74, 0x02, 0x6d]
        }
    ),
    signature!("a dm-integrity volume", at(0, b"integrt\0")),
    signature!("a dm-verity volume", at(0, b"verity\0\0")),
    signature!(
        "a Ceph BlueStore device",
        at(0, b"bluestore block device\n")
    ),
    signature!(GPT, at(512, b"EFI PART")),
    signature!(GPT, at(4096, b"EFI PART")),
    signature!(GPT, before_end(512, b"EFI PART")),
    signature!(GPT, before_end(4096, b"EFI PART")),
    signature!("a qcow2 disk image", at(0, b"QFI\xfb")),
    signature!("a VMDK disk image", at(0, b"KDMV")),
    signature!("a VHDX disk image", at(0, b"vhdxfile")),
    signature!("a VHD disk image", at(0, b"conectix")),
];
