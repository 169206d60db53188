//! What was found, one finding a line, and how to find the file of a damaged block.

use mirror::control::{Reply, Request, ScrubBy, ScrubDone, ScrubFinding, ScrubReport, ScrubWhat};

use crate::failure::Failure;
use crate::size::human;
use crate::when::moment;
use crate::{Context, client, output};

pub(super) fn run(name: &str, context: &Context) -> Result<(), Failure> {
    let request = Request::ScrubReport;
    let reply = client::ask(&context.run_dir, name, &request, client::QUICK)?;
    let Reply::ScrubReport(report) = reply else {
        return Err(client::odd_reply(name));
    };
    if context.json {
        return output::json(&report);
    }
    output::raw(&text(name, &report));
    Ok(())
}

pub(super) fn text(name: &str, report: &ScrubReport) -> String {
    if report.findings.is_empty() {
        return format!("mirror {name}: nothing was found\n");
    }
    let device = report.device.as_deref().unwrap_or("the device");
    let mut text = format!(
        "mirror {name}: {}, the newest last; offsets are bytes in {device}\n",
        super::counted(report.findings.len() as u64, "finding")
    );
    let head = ["when", "member", "offset", "length", "found", "done", "by"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    rows.extend(report.findings.iter().map(row));
    text.push_str(&output::table(&rows));
    if report.forgotten_blocks > 0 {
        text.push_str(&format!(
            "  {} damaged blocks are not listed any more, for lack of room: 'mirrorctl scrub \
             start {name}' finds them again\n",
            report.forgotten_blocks
        ));
    }
    let damaged = |finding: &&ScrubFinding| finding.done == ScrubDone::Damaged;
    if let Some(first) = report.findings.iter().rev().find(damaged) {
        text.push_str(&hint(device, first.offset));
    }
    text
}

fn row(finding: &ScrubFinding) -> Vec<String> {
    let member = match (finding.slot, &finding.path) {
        (None, _) => "all".to_owned(),
        (Some(slot), None) => format!("slot {slot}"),
        (Some(slot), Some(path)) => format!("slot {slot} ({path})"),
    };
    vec![
        moment(finding.when_secs),
        member,
        finding.offset.to_string(),
        human(finding.len),
        what(finding.what).to_owned(),
        done(finding.done).to_owned(),
        by(finding.by).to_owned(),
    ]
}

/// How to get from a damaged block to its file.
fn hint(device: &str, offset: u64) -> String {
    let (block, sector) = (offset / 4096, offset / 512);
    let is_block_device = device.starts_with('/');
    let (attach, device) = if is_block_device {
        ("", device)
    } else {
        (
            "    first: attach it as a block device, here /dev/nbd0 (nbd-client)\n",
            "/dev/nbd0",
        )
    };
    format!(
        "  Damaged blocks read as errors (without checksums: as one of the copies) until they are \
         written again.\n  To find the file of the last one (what begins elsewhere, in a partition \
         or a volume: subtract where):\n{attach}    \
         ext4 with 4 KiB blocks: debugfs -R \"icheck {block}\" {device}, then debugfs -R \
         \"ncheck INODE\" {device}\n    \
         XFS, not mounted: xfs_db -r -c \"blockget -n\" -c \"daddr {sector}\" -c \"blockuse -n\" \
         {device}\n"
    )
}

fn what(what: ScrubWhat) -> &'static str {
    match what {
        ScrubWhat::Unreadable => "unreadable",
        ScrubWhat::ChecksumFailed => "checksum failed",
        ScrubWhat::CopiesDiffer => "copies differ",
        ScrubWhat::ChecksumStale => "checksum stale",
        ScrubWhat::PageUnreadable => "checksums unreadable",
    }
}

fn done(done: ScrubDone) -> &'static str {
    match done {
        ScrubDone::Rewritten => "rewritten",
        ScrubDone::ChecksumMended => "checksum mended",
        ScrubDone::Damaged => "nothing: DAMAGED",
        ScrubDone::CheckOnly => "nothing: check only",
        ScrubDone::MemberFailed => "member failed",
        ScrubDone::WrittenAgain => "was damaged, written again since",
    }
}

fn by(by: ScrubBy) -> &'static str {
    match by {
        ScrubBy::Scrub => "scrub",
        ScrubBy::Read => "read",
        ScrubBy::Resync => "resync",
    }
}
