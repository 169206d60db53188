//! The commands, one file each.

mod add;
mod assemble;
mod check;
mod clear_flush_error;
mod create;
mod demote;
mod destroy;
mod examine;
mod export;
mod fail;
mod inspection;
mod promote;
mod re_add;
mod remove;
mod repair;
mod resolve;
mod scrub;
mod start;
mod status;
mod stop;
mod wait;

use std::path::Path;

use clap::Subcommand;
use mirror::control::MemberRef;
use mirror::superblock::{ADDRESS_BYTES_MAX, SlotState};
use rustix::rand::{GetRandomFlags, getrandom};

use crate::Context;
use crate::failure::Failure;
use crate::medium;

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a new mirror out of two to eight devices, image files or exports
    Create(create::Args),
    /// Start a mirror whose members were created before
    Start(start::Args),
    /// Find mirrors and start each
    Assemble(assemble::Args),
    /// Stop a running mirror
    Stop(stop::Args),
    /// Stop a running mirror, so that the host of a peer member can go on with it
    Demote(demote::Args),
    /// Start a mirror that another host has served
    Promote(promote::Args),
    /// After two hosts have gone on without each other: show both sides, and keep one
    Resolve(Box<resolve::Args>),
    /// Show the state of one running mirror, or of all
    Status(status::Args),
    /// Show what a member's superblock says
    Examine(examine::Args),
    /// Verify the members of a stopped mirror without changing them
    Check(check::Args),
    /// Mend the members of a stopped mirror where a good copy is there
    Repair(repair::Args),
    /// Take a member out of service as faulty
    Fail(fail::Args),
    /// Let go of a member's device
    Remove(remove::Args),
    /// Bring a former member back, copying only what it missed where that is possible
    ReAdd(re_add::Args),
    /// Put a new disk into an empty slot
    Add(add::Args),
    /// Wait until every member is in-sync
    Wait(wait::Args),
    /// Look for bad blocks and mend them: begin, pause, report
    Scrub(scrub::Args),
    /// Let FLUSH work again after flushes failed on every member
    ClearFlushError(clear_flush_error::Args),
    /// Export a disk of this machine as a peer member, until SIGTERM
    Export(export::Args),
    /// Wipe the superblocks of a stopped mirror's members
    Destroy(destroy::Args),
    /// Begin a session and become the daemon (used by start)
    #[command(hide = true, name = crate::daemon::DETACHED_VERB)]
    Detached(crate::daemon::DetachedArgs),
}

impl Command {
    /// Does it.
    pub(crate) fn run(self, context: &Context) -> Result<(), Failure> {
        match self {
            Self::Create(args) => create::run(&args, context),
            Self::Start(args) => start::run(&args, context),
            Self::Assemble(args) => assemble::run(&args, context),
            Self::Stop(args) => stop::run(&args, context),
            Self::Demote(args) => demote::run(&args, context),
            Self::Promote(args) => promote::run(&args, context),
            Self::Resolve(args) => resolve::run(&args, context),
            Self::Status(args) => status::run(&args, context),
            Self::Examine(args) => examine::run(&args, context),
            Self::Check(args) => check::run(&args, context),
            Self::Repair(args) => repair::run(&args, context),
            Self::Fail(args) => fail::run(&args, context),
            Self::Remove(args) => remove::run(&args, context),
            Self::ReAdd(args) => re_add::run(&args, context),
            Self::Add(args) => add::run(&args, context),
            Self::Wait(args) => wait::run(&args, context),
            Self::Scrub(args) => scrub::run(&args, context),
            Self::ClearFlushError(args) => clear_flush_error::run(&args, context),
            Self::Export(args) => export::run(&args, context),
            Self::Destroy(args) => destroy::run(&args, context),
            Self::Detached(args) => crate::daemon::become_daemon(&args),
        }
    }
}

/// Reads MEMBER: a number is a slot, anything else a path.
fn member_ref(text: &str) -> Result<MemberRef, Failure> {
    if text.is_empty() {
        return Err(Failure::usage(
            "An empty text names no member: give a slot number or a path.",
        ));
    }
    if text.bytes().all(|b| b.is_ascii_digit()) {
        return text.parse().map(MemberRef::Slot).map_err(|_| {
            Failure::usage(format!(
                "'{text}' is no slot number: slots go from 0 to 8. For a file of that name \
                 write ./{text}."
            ))
        });
    }
    Ok(MemberRef::Path(path_text(Path::new(text))?))
}

/// A slot's state as documents and tables name it.
fn slot_state(state: SlotState) -> &'static str {
    match state {
        SlotState::Empty => "empty",
        SlotState::InSync => "in-sync",
        SlotState::Resyncing => "resyncing",
        SlotState::Stale => "stale",
        SlotState::Faulty => "faulty",
        SlotState::Missing => "missing",
    }
}

/// Refuses an address that a slot record has no room for: a peer is found by nothing else.
fn refuse_long_address(path: &str) -> Result<(), Failure> {
    if peer::is_address(path) && path.len() > ADDRESS_BYTES_MAX {
        return Err(Failure::usage(format!(
            "The address {path} has {} bytes and a superblock has room for {ADDRESS_BYTES_MAX}: \
             use a shorter name for the host, the export or the socket.",
            path.len()
        )));
    }
    Ok(())
}

/// Random bits for an identity.
pub(crate) fn random() -> Result<u128, Failure> {
    let mut bytes = [0_u8; 16];
    let drawn = getrandom(&mut bytes, GetRandomFlags::empty());
    match drawn {
        Ok(16) => Ok(u128::from_le_bytes(bytes)),
        _ => Err(Failure::failed(
            "The system gives no random numbers, which identities are made of.",
        )),
    }
}

/// An absolute path, or an address, as the control protocol carries it.
fn path_text(path: &Path) -> Result<String, Failure> {
    let absolute = medium::absolute(path)?;
    absolute.into_os_string().into_string().map_err(|path| {
        Failure::usage(format!(
            "The path {} is not UTF-8 and cannot be sent to the daemon: use a link with another \
             name.",
            path.display()
        ))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn members_are_slots_or_paths() {
        assert_eq!(member_ref("0").unwrap(), MemberRef::Slot(0));
        assert_eq!(member_ref("07").unwrap(), MemberRef::Slot(7));
        assert_eq!(
            member_ref("/dev/sda").unwrap(),
            MemberRef::Path("/dev/sda".into())
        );
        assert_eq!(
            member_ref("nbd://Host:10809/m").unwrap(),
            MemberRef::Path("nbd://host/m".into())
        );
        assert!(matches!(member_ref("./1").unwrap(), MemberRef::Path(p) if p.ends_with("/1")));
        assert!(member_ref("256").unwrap_err().message.contains("'256'"));
        assert!(member_ref("").is_err());
        assert_eq!(
            member_ref("nbds://Host/m").unwrap(),
            MemberRef::Path("nbds://host/m".into())
        );
        let refused = member_ref("nbds+unix:///m?socket=/s").unwrap_err();
        assert!(refused.message.contains("TLS"));
    }

    #[test]
    fn addresses_have_to_fit_into_a_superblock() {
        let of = |len: usize| format!("nbd://h/{}", "e".repeat(len - 8));
        assert_eq!(refuse_long_address(&of(ADDRESS_BYTES_MAX)), Ok(()));
        assert!(refuse_long_address(&of(ADDRESS_BYTES_MAX + 1)).is_err());
        assert_eq!(
            refuse_long_address(&format!("/{}", "d".repeat(300))),
            Ok(())
        );
    }
}
