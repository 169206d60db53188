//! Histories drawn up from a seed before they are played, so that one that fails can be cut
//! down to what it needs.

use mirror::sim::Rng;
use std::fmt;

/// Size of the simulated mirrors, in bytes: three extents and a part of one.
pub(crate) const SIZE: u64 = (12 << 20) + 640 * 512;
const EXTENTS: u64 = SIZE.div_ceil(4 << 20);
/// A history goes on until so many requests and actions have been issued.
pub(crate) const OPERATIONS_MIN: u64 = 500;

/// What a client asks for, in sectors of 512 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Read(u64, u64),
    Write(u64, u64),
    Fua(u64, u64),
    Zeroes(u64, u64),
    /// A whole extent.
    Discard(u64),
    Flush,
}

/// What a disk does wrong for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Reads,
    Writes,
    Flushes,
    Hang,
    Gone,
}

/// What the operator or the world does to a slot's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Fail(u8),
    Remove(u8),
    /// For so many seconds.
    Faulty(u8, Fault, u64),
    /// The same on all disks.
    AllFaulty(Fault, u64),
    /// One sector of the data cannot be read until it is rewritten.
    Spoil(u8, u64),
    /// A block of a disk changes silently.
    Rot(u8, u64),
    /// Its power goes and comes back.
    PowerOf(u8),
    PowerOfAll,
    /// A new disk in its place.
    Replace(u8),
    /// An image taken so many seconds ago in its place.
    OlderImage(u8, u64),
    /// All that are not in service are brought back.
    ReturnAll,
    ClearFlushError,
    Seconds(u64),
    /// Between this machine and the one that has the last slot's disk, for so many seconds.
    Network(Trouble, u64),
}

/// What goes wrong between two machines, or at the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// All connections break, and everybody learns of it.
    Cut,
    /// Nothing arrives, in both directions or one, and nobody learns of it.
    Silence,
    NothingThere,
    NothingBack,
    /// The server is killed, and started again.
    Killed,
    /// Another host takes the export over.
    TakenOver,
}

/// How a life ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    PowerCut,
    KillDaemon,
    Stop,
}

/// From a start of the mirror to its end.
#[derive(Clone, Debug)]
pub(crate) struct Life {
    /// Tried first without this slot's disk, which may be refused.
    pub(crate) without: Option<u8>,
    pub(crate) clients: Vec<Vec<Request>>,
    pub(crate) operator: Vec<Action>,
    /// A scrubber runs beside them.
    pub(crate) scrub: bool,
    /// It ends after so many steps of the machine, wherever the clients are.
    pub(crate) steps: Option<u64>,
    pub(crate) end: End,
}

/// A history.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    /// Decides every interleaving.
    pub(crate) schedule: u64,
    pub(crate) members: usize,
    /// Slots whose first disk cannot write zeroes by itself.
    pub(crate) plain: Vec<u8>,
    /// So many ways lead to the machine that has the last slot's first disk; with none it is here.
    pub(crate) paths: usize,
    pub(crate) lives: Vec<Life>,
}

/// Draws a history, one life after the other.
pub(crate) struct Author(Rng, usize, bool);

impl Author {
    /// The author of `seed`, and its history without any life yet.
    pub(crate) fn new(seed: u64) -> (Self, Script) {
        let mut rng = Rng::new(seed ^ 0x5eed);
        let members = [2, 3, 2, 3, 2, 4][rng.index(6)];
        // Zeroing by writing is slow to simulate; it goes through other code.
        let plain = match rng.below(8) {
            0 => (0..members as u8).collect(),
            1 => vec![rng.below(members as u64) as u8],
            _ => Vec::new(),
        };
        // In one history of twelve: they are several times slower than the others.
        let paths = match seed % 24 {
            5 => 1,
            14 => 1 + rng.index(2),
            _ => 0,
        };
        let script = Script {
            schedule: seed,
            members,
            plain,
            paths,
            lives: Vec::new(),
        };
        (Self(rng, members, paths > 0), script)
    }

    fn slot(&mut self) -> u8 {
        self.0.below(self.1 as u64) as u8
    }

    pub(crate) fn life(&mut self) -> Life {
        let clients = (0..2 + self.0.below(3))
            .map(|_| (0..10 + self.0.below(50)).map(|_| self.request()).collect())
            .collect();
        // In the beginning most of it is cool, and in-sync.
        let first = (self.0.one_in(2)).then(|| self.rot());
        let others = (0..self.0.below(6)).map(|_| self.action());
        let operator = first.into_iter().chain(others).collect();
        let steps = (self.0.one_in(2)).then(|| 200 + self.0.below(8000));
        let end = match self.0.below(4) {
            0 | 1 => End::PowerCut,
            2 => End::KillDaemon,
            _ => End::Stop,
        };
        let without = (self.0.one_in(6)).then(|| self.slot());
        Life {
            without,
            clients,
            operator,
            scrub: self.0.one_in(3),
            steps,
            end,
        }
    }

    fn request(&mut self) -> Request {
        let rng = &mut self.0;
        let extent = rng.below(EXTENTS);
        let first = (extent << 13) + rng.below(64) * 8 + rng.below(2) * rng.below(8);
        let sectors = match rng.below(64) {
            0 => 2048,
            1..16 => 1 + rng.below(7),
            16..24 => 8 * (1 + rng.below(64)),
            _ => 8 * (1 + rng.below(4)),
        };
        let first = first.min((SIZE >> 9) - sectors);
        match rng.below(20) {
            0 => Request::Flush,
            1 => Request::Discard(extent),
            2 => Request::Zeroes(first, sectors),
            3..=7 => Request::Read(first, sectors),
            8 => Request::Fua(first, sectors),
            _ => Request::Write(first, sectors),
        }
    }

    fn fault(&mut self) -> Fault {
        match self.0.below(5) {
            0 => Fault::Reads,
            1 => Fault::Writes,
            2 => Fault::Flushes,
            3 => Fault::Hang,
            _ => Fault::Gone,
        }
    }

    fn rot(&mut self) -> Action {
        let (slot, extent) = (self.slot(), self.0.below(EXTENTS));
        Action::Rot(slot, (extent << 10) + self.0.below(70))
    }

    fn trouble(&mut self) -> Trouble {
        match self.0.below(8) {
            0..=2 => Trouble::Cut,
            3 => Trouble::Silence,
            4 => Trouble::NothingThere,
            5 => Trouble::NothingBack,
            6 => Trouble::Killed,
            _ => Trouble::TakenOver,
        }
    }

    fn action(&mut self) -> Action {
        if self.2 && self.0.one_in(2) {
            return match self.0.below(4) {
                0 => Action::ReturnAll,
                _ => Action::Network(self.trouble(), self.0.below(10)),
            };
        }
        let (slot, seconds) = (self.slot(), self.0.below(12));
        match self.0.below(16) {
            0 => Action::Fail(slot),
            1 => Action::Remove(slot),
            2..=5 => Action::Faulty(slot, self.fault(), seconds),
            6 => Action::AllFaulty(self.fault(), seconds),
            7 => Action::Spoil(slot, self.0.below(SIZE >> 9)),
            8 => Action::PowerOf(slot),
            9 if self.0.one_in(3) => Action::PowerOfAll,
            10 => Action::Replace(slot),
            11 => Action::OlderImage(slot, 3 + seconds),
            12 => Action::Seconds(seconds),
            14 => self.rot(),
            13 => Action::ClearFlushError,
            _ => Action::ReturnAll,
        }
    }
}

impl Script {
    /// Requests and actions in it.
    pub(crate) fn len(&self) -> usize {
        let of =
            |life: &Life| life.operator.len() + life.clients.iter().map(Vec::len).sum::<usize>();
        self.lives.iter().map(of).sum()
    }

    /// Every script with one thing less: large things first.
    pub(crate) fn smaller(&self) -> Vec<Self> {
        let with = |change: &dyn Fn(&mut Self)| {
            let mut script = self.clone();
            change(&mut script);
            script
        };
        let mut all = Vec::new();
        for life in (0..self.lives.len()).rev() {
            all.push(with(&|s| drop(s.lives.remove(life))));
        }
        for life in 0..self.lives.len() {
            for client in 0..self.lives[life].clients.len() {
                all.push(with(&|s| drop(s.lives[life].clients.remove(client))));
            }
        }
        let longest = |life: &Life| life.clients.iter().map(Vec::len).max().unwrap_or(0);
        let mut chunk = self.lives.iter().map(longest).max().unwrap_or(0) / 2;
        while chunk > 0 {
            for life in 0..self.lives.len() {
                for client in 0..self.lives[life].clients.len() {
                    for at in (0..self.lives[life].clients[client].len()).step_by(chunk) {
                        all.push(with(&|s| {
                            let requests = &mut s.lives[life].clients[client];
                            let end = (at + chunk).min(requests.len());
                            requests.drain(at..end);
                        }));
                    }
                }
            }
            chunk /= 2;
        }
        for life in 0..self.lives.len() {
            for action in 0..self.lives[life].operator.len() {
                all.push(with(&|s| _ = s.lives[life].operator.remove(action)));
            }
            if self.lives[life].scrub {
                all.push(with(&|s| s.lives[life].scrub = false));
            }
            if self.lives[life].without.is_some() {
                all.push(with(&|s| s.lives[life].without = None));
            }
        }
        if !self.plain.is_empty() {
            all.push(with(&|s| s.plain.clear()));
        }
        if self.paths > 0 {
            all.push(with(&|s| s.paths -= 1));
        }
        all
    }
}

impl fmt::Display for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} members, schedule {}", self.members, self.schedule)?;
        if !self.plain.is_empty() {
            write!(f, ", no cheap zeroes in slots {:?}", self.plain)?;
        }
        if self.paths > 0 {
            let paths = self.paths;
            write!(f, ", {paths} ways to the last one's disk")?;
        }
        writeln!(f)?;
        for (number, life) in self.lives.iter().enumerate() {
            write!(f, "life {number}")?;
            if let Some(slot) = life.without {
                write!(f, ", started without slot {slot} if that is allowed")?;
            }
            writeln!(f)?;
            for (number, requests) in life.clients.iter().enumerate() {
                writeln!(f, "  client {number}: {requests:?}")?;
            }
            if !life.operator.is_empty() {
                writeln!(f, "  operator: {:?}", life.operator)?;
            }
            if life.scrub {
                writeln!(f, "  a scrubber")?;
            }
            match life.steps {
                Some(steps) => writeln!(f, "  {:?} after {steps} steps", life.end)?,
                None => writeln!(f, "  {:?}", life.end)?,
            }
        }
        Ok(())
    }
}
