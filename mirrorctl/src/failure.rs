//! How a command fails: a sentence for the person and an exit code for the script.
//!
//! Every command returns a [`Failure`] or nothing. The message says what is wrong and what to
//! do next; [`Exit`] is the only place where the exit codes are written down, and
//! [`EXIT_CODES`] is what `mirrorctl --help` prints about them.

use std::fmt;

use mirror::control::ErrorKind;

/// The end of `mirrorctl --help`.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed: a device, a file or the system said no
  2  usage: the command line makes no sense
  3  refused to protect data; --force may override where the command has it
  4  not found: no such mirror, member, device or file
  5  busy or timed out: something is in use, already running or did not answer in time
  10  check, repair: something is to be mended, and a good copy of it is there
  11  check, repair: a member that the mirror names in-sync was not given or cannot be used
  12  check, repair: a part of the metadata has no good copy
  13  check, repair: blocks are damaged, no copy of them is provably right
Of 10 to 13 the highest that applies; repair counts what is left.

MEMBER is a slot number, or the path of the member's device or file (write ./1 for a file
that is named 1), or the address of its export. An ADDRESS is nbd://HOST[:PORT]/EXPORT or
nbd+unix:///EXPORT?socket=PATH, and stands wherever a member's path may. Sizes take K, M, G, T, P (powers of 1024), KB, MB, ... (powers of 1000).";

/// The exit codes other than 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Exit {
    /// A device, a file or the system failed.
    Failed = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// Refused to protect data.
    Refused = 3,
    /// No such mirror, member, device or file.
    NotFound = 4,
    /// In use, already running, or no answer in time.
    Busy = 5,
    /// Something is to be mended.
    Mendable = 10,
    /// An in-sync member could not be checked.
    Incomplete = 11,
    /// Metadata without a good copy.
    MetadataDamaged = 12,
    /// Blocks without a copy that is provably right.
    BlocksDamaged = 13,
}

impl Exit {
    /// The code that the process ends with.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Refused => 3,
            Self::NotFound => 4,
            Self::Busy => 5,
            Self::Mendable => 10,
            Self::Incomplete => 11,
            Self::MetadataDamaged => 12,
            Self::BlocksDamaged => 13,
        }
    }

    /// The code for what the system said about a device or file.
    pub(crate) fn of_io(error: &std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::NotFound => Self::NotFound,
            std::io::ErrorKind::ResourceBusy
            | std::io::ErrorKind::WouldBlock
            | std::io::ErrorKind::TimedOut => Self::Busy,
            _ => Self::Failed,
        }
    }
}

impl From<ErrorKind> for Exit {
    fn from(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::Usage => Self::Usage,
            ErrorKind::Refused => Self::Refused,
            ErrorKind::NotFound => Self::NotFound,
            ErrorKind::Busy => Self::Busy,
            ErrorKind::Failed => Self::Failed,
        }
    }
}

/// Why a command did not do what it was asked to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// What the process ends with.
    pub(crate) exit: Exit,
    /// What is wrong and what to do, as sentences.
    pub(crate) message: String,
}

impl Failure {
    /// A failure with the given code.
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            message: message.into(),
        }
    }

    /// A device, a file or the system failed.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::new(Exit::Failed, message)
    }

    /// The command line makes no sense.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// Refused to protect data.
    pub(crate) fn refused(message: impl Into<String>) -> Self {
        Self::new(Exit::Refused, message)
    }

    /// No such mirror, member, device or file.
    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(Exit::NotFound, message)
    }

    /// In use, already running, or no answer in time.
    pub(crate) fn busy(message: impl Into<String>) -> Self {
        Self::new(Exit::Busy, message)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// The system's words for an error, without the number that Rust appends.
pub(crate) fn words(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.rfind(" (os error") {
        Some(end) => text[..end].to_lowercase(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_names_every_exit_code() {
        for exit in [
            Exit::Failed,
            Exit::Usage,
            Exit::Refused,
            Exit::NotFound,
            Exit::Busy,
            Exit::Mendable,
            Exit::Incomplete,
            Exit::MetadataDamaged,
            Exit::BlocksDamaged,
        ] {
            let line = format!("\n  {}  ", exit.code());
            assert!(EXIT_CODES.contains(&line), "{exit:?} is not documented");
        }
    }

    #[test]
    fn io_errors_have_words_without_numbers() {
        let error = std::io::Error::from_raw_os_error(2);
        assert_eq!(words(&error), "no such file or directory");
        assert_eq!(Exit::of_io(&error), Exit::NotFound);
        assert_eq!(
            Exit::of_io(&std::io::Error::from_raw_os_error(16)),
            Exit::Busy
        );
        assert_eq!(
            Exit::of_io(&std::io::Error::from_raw_os_error(5)),
            Exit::Failed
        );
    }
}
