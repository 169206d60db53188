//! Tells whoever started the daemon how the start went, as one line of JSON.

use std::cell::RefCell;
use std::fs::File;
use std::io::Write as _;

use mirror::control::ErrorKind;
use serde::Serialize;

use crate::sys;

/// Why the daemon did not start, or ended badly.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    /// Class of the failure.
    pub(crate) kind: ErrorKind,
    /// A sentence.
    pub(crate) message: String,
}

impl Failure {
    /// A failure of the device or the system.
    pub(crate) fn failed(message: impl std::fmt::Display) -> Self {
        Self {
            kind: ErrorKind::Failed,
            message: message.to_string(),
        }
    }

    /// A failure of another class.
    pub(crate) fn new(kind: ErrorKind, message: impl std::fmt::Display) -> Self {
        Self {
            kind,
            message: message.to_string(),
        }
    }
}

#[derive(Serialize)]
struct Report<'a> {
    ready: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<&'a str>,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<ErrorKind>,
}

/// The descriptor that waits for the report. It is closed after the first one.
pub(crate) struct Ready(RefCell<Option<File>>);

impl Ready {
    /// Takes over the descriptor that was passed by number, if one was.
    pub(crate) fn inherit(number: Option<i32>) -> anyhow::Result<Self> {
        let file = match number {
            None => None,
            Some(number) => Some(File::from(sys::inherited_fd(number).map_err(|error| {
                anyhow::anyhow!("--ready-fd {number} is not an open descriptor above 2 ({error})")
            })?)),
        };
        Ok(Self(RefCell::new(file)))
    }

    /// The mirror is up.
    pub(crate) fn up(&self, device: &str, message: &str) {
        self.report(&Report {
            ready: true,
            device: Some(device),
            message,
            kind: None,
        });
    }

    /// The mirror is not up. Nothing happens when it was before.
    pub(crate) fn failed(&self, failure: &Failure) {
        let kind = Some(failure.kind);
        self.report(&Report {
            ready: false,
            device: None,
            message: &failure.message,
            kind,
        });
    }

    fn report(&self, report: &Report<'_>) {
        let Some(mut file) = self.0.take() else {
            return;
        };
        let Ok(mut line) = serde_json::to_string(report) else {
            return;
        };
        line.push('\n');
        if let Err(error) = file.write_all(line.as_bytes()) {
            tracing::warn!("nobody listens to the start report any more ({error})");
        }
    }
}
