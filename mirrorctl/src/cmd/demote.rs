//! `mirrorctl demote NAME`: stops a mirror here, so that the host of a peer member can go on with it.
//!
//! The clean stop comes first, and the permission to go on without this host last, in that one
//! member's superblock (`mirror::engine`, `stop.rs`): no two hosts ever have it at once. There,
//! `mirrorctl promote` makes use of it.

use mirror::control::{MemberRef, MemberState, MemberStatus};

use super::{member_ref, stop};
use crate::failure::Failure;
use crate::{Context, client, output};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The mirror
    name: String,
    /// Who goes on: a slot number, or a member's path [default: the only in-sync peer]
    #[arg(long, value_name = "MEMBER")]
    to: Option<String>,
    /// Stop even while the device is open
    #[arg(long)]
    force: bool,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    let status = client::status(&context.run_dir, &args.name)?;
    let to = match &args.to {
        Some(text) => member_ref(text)?,
        None => MemberRef::Slot(only_peer(&args.name, &status.members)?),
    };
    let done = stop::stop(context, &args.name, args.force, Some(to))?;
    output::done(context.json, &done)?;
    if !context.json {
        output::line(&format!(
            "on its host: end the export, then 'mirrorctl promote {} DEVICE'",
            args.name
        ));
    }
    Ok(())
}

fn only_peer(name: &str, members: &[MemberStatus]) -> Result<u8, Failure> {
    let in_sync = |m: &&MemberStatus| m.state == MemberState::InSync && peer::is_address(&m.path);
    let mut peers = members.iter().filter(in_sync);
    match (peers.next(), peers.next()) {
        (Some(only), None) => Ok(only.slot),
        (None, _) => Err(Failure::refused(format!(
            "No peer member of mirror {name} is in-sync, so nobody else can go on with it: wait \
             until one is ('mirrorctl wait {name}'), or name a member of this machine with --to. \
             'mirrorctl stop' stops the mirror without handing it over."
        ))),
        (Some(_), Some(_)) => Err(Failure::usage(format!(
            "Mirror {name} has several peer members that are in-sync: say with --to who goes on."
        ))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::failure::Exit;

    fn member(slot: u8, path: &str, state: MemberState) -> MemberStatus {
        MemberStatus {
            slot,
            path: path.to_owned(),
            uuid: None,
            state,
            reason: None,
            missed_bytes: 0,
            attached: true,
            orphans: 0,
            read_errors: 0,
            repaired_blocks: 0,
            unfenced: false,
            scrub_reads_all: false,
        }
    }

    #[test]
    fn only_an_in_sync_peer_goes_on_unasked() {
        use MemberState::{Faulty, InSync};
        let here = member(0, "/dev/sda", InSync);
        let there = |slot, state| member(slot, "nbd://b/m", state);
        let only = |members: &[MemberStatus]| only_peer("m", members);
        assert_eq!(only(&[here.clone(), there(1, InSync)]).unwrap(), 1);
        assert_eq!(
            only(&[there(0, Faulty), here.clone(), there(2, InSync)]).unwrap(),
            2
        );
        let nobody = only(&[here, there(1, Faulty)]).unwrap_err();
        assert_eq!(nobody.exit, Exit::Refused);
        let several = only(&[there(1, InSync), there(2, InSync)]).unwrap_err();
        assert_eq!(several.exit, Exit::Usage);
    }
}
