//! Starts in the model: what they must decide, and what they do.

use super::model::{
    ACKNOWLEDGED, HOLDS, HOT, Image, MISSED, Running, Slots, Violation, World, one, slots_of,
};
use crate::assemble::{AssembleOptions, Plan, Refusal, Seen, Verdict, assemble};
use crate::records;
use crate::superblock::{LastStop, Superblock};
use std::rc::Rc;

const PLAIN: AssembleOptions = AssembleOptions {
    force: false,
    promote: false,
};
const PROMOTED: AssembleOptions = AssembleOptions {
    force: false,
    promote: true,
};
const FORCED: AssembleOptions = AssembleOptions {
    force: true,
    promote: false,
};

/// A start that is allowed.
pub(crate) struct Decision {
    seen: Vec<Seen>,
    pub(crate) plan: Plan,
    pub(crate) in_sync: Slots,
    /// Only by force.
    pub(crate) forced: bool,
    /// Only because the mirror was handed over.
    pub(crate) promoted: bool,
}

impl World {
    /// How the mirror starts with these disks, if it does.
    pub(crate) fn decide(&self, present: Slots) -> Result<Option<Decision>, Violation> {
        if self.running.is_some() {
            return Ok(None);
        }
        let seen: Vec<Seen> = slots_of(present).filter_map(|s| self.seen(s)).collect();
        let plain = assemble(&seen, PLAIN);
        let handed_over = assemble(&seen, PROMOTED);
        let by_force = assemble(&seen, FORCED);
        order_decides_nothing(&seen, &plain)?;
        let promoted = plain.is_err() && handed_over.is_ok();
        let (plan, forced) = match (plain, by_force) {
            (Ok(plan), by_force) => {
                if by_force.as_ref() != Ok(&plan) || handed_over.as_ref() != Ok(&plan) {
                    return Err("force changes a start that needs none".into());
                }
                (plan, false)
            }
            (Err(_), by_force) if promoted => {
                if by_force != handed_over {
                    return Err("force changes a promotion that needs none".into());
                }
                (by_force.unwrap(), false)
            }
            (Err(refusal), by_force) => {
                self.judge_refusal(&refusal, present)?;
                match by_force {
                    Ok(plan) => (plan, true),
                    Err(refusal) => return explains_or_empty(&refusal).map(|()| None),
                }
            }
        };
        let mut in_sync = 0;
        for (member, verdict) in seen.iter().zip(&plan.verdicts) {
            if *verdict == Verdict::InSync {
                in_sync |= one(usize::from(member.superblock.own_slot));
            }
            self.judge_words(verdict, self.untouched && !forced)?;
        }
        self.judge_data(&plan, in_sync, present, forced)?;
        if !forced {
            self.judge_replaced(&seen, &plan)?;
        }
        Ok(Some(Decision {
            seen,
            plan,
            in_sync,
            forced,
            promoted,
        }))
    }

    /// What is said when these disks do not start.
    pub(crate) fn refusal(&self, present: Slots) -> Option<String> {
        let seen: Vec<Seen> = slots_of(present).filter_map(|s| self.seen(s)).collect();
        assemble(&seen, PLAIN)
            .err()
            .map(|refusal| refusal.to_string())
    }

    /// The only good member is never refused.
    fn judge_refusal(&self, refusal: &Refusal, present: Slots) -> Result<(), Violation> {
        explains_or_empty(refusal)?;
        let superblock = |slot: usize| self.disks[slot].superblock.as_deref();
        let good = slots_of(self.good & !self.reverted).next();
        let Some(good) = good.and_then(superblock).filter(|_| self.honest) else {
            return Ok(());
        };
        // A disk that was replaced and put back is not the one that is needed.
        let here = |slot: usize| {
            present & one(slot) != 0
                && superblock(slot).map(|s| s.member) == good.slots[slot].member
        };
        if slots_of(self.needed).all(here) {
            return Err(format!("refused for no reason: {refusal}"));
        }
        Ok(())
    }

    /// Members that were neither put back nor passed over by force return by delta; of others
    /// it is said why they do not.
    pub(crate) fn judge_words(&self, verdict: &Verdict, by_delta: bool) -> Result<(), Violation> {
        match verdict.refusal() {
            Some(words) if by_delta => Err(format!("no delta: {words}")),
            Some(words) => explains(&words),
            None => Ok(()),
        }
    }

    /// Nothing stale or divergent serves.
    fn judge_data(
        &self,
        plan: &Plan,
        in_sync: Slots,
        present: Slots,
        force: bool,
    ) -> Result<(), Violation> {
        let (hot, all) = (self.bits(in_sync, HOT), self.bits(in_sync, HOLDS));
        for write in &self.writes {
            let held = write & all;
            if held != 0 && held != all && write & hot == 0 {
                return Err(format!("slots {in_sync:b} differ"));
            }
        }
        if self.has_all(in_sync) {
            return Ok(());
        }
        // Force gives up what only absent members hold. Without it nobody can tell when one of
        // those in-sync has been put back: before that it may have gone on without the others,
        // and the disks that are here would look the same. Mostly it has not, so that this must
        // not stop a good mirror (an older image of one member gets a full resync, R16).
        let lost = plan.lost.iter().map(|(slot, _)| 1 << slot);
        let in_sync = lost.fold(in_sync, |set, slot| set | slot);
        let put_back = in_sync & present & self.reverted != 0;
        if !force && (self.has_all(present) || self.honest && !put_back) {
            return Err(format!("a stale member serves: {in_sync:b}"));
        }
        Ok(())
    }

    /// A disk that was replaced, found beside its successor, changes nothing.
    fn judge_replaced(&self, seen: &[Seen], plan: &Plan) -> Result<(), Violation> {
        let own = |s: &Seen| usize::from(s.superblock.own_slot);
        let before = seen.iter().filter_map(|s| self.seen(own(s) + self.members));
        let stays = |s: &Seen| {
            seen.iter()
                .any(|o| o.superblock.member == s.superblock.member)
        };
        let config = &seen[plan.newest].superblock;
        let known = |s: &Seen| config.slots[own(s)].member != Some(s.superblock.member);
        for old in before.filter(|old| !stays(old) && known(old)) {
            if !self.honest || self.reverted != 0 {
                continue;
            }
            let path = old.path.clone();
            let mut more = seen.to_vec();
            more.push(old);
            let other = assemble(&more, PROMOTED).map_err(|refusal| refusal.to_string())?;
            let same = other.verdicts[..seen.len()] == plan.verdicts;
            if !same || !matches!(other.verdicts.last(), Some(Verdict::Refused { .. })) {
                return Err(format!("the old disk of {path} changes the start"));
            }
        }
        Ok(())
    }

    /// Whether one of these holds all that was acknowledged.
    fn has_all(&self, slots: Slots) -> bool {
        slots_of(slots).any(|slot| {
            let bit = self.bit(slot, HOLDS);
            let lacks = |write: &u64| write & ACKNOWLEDGED != 0 && write & bit == 0;
            !self.writes.iter().any(lacks)
        })
    }

    /// The member whose maps are the newest.
    fn newest(&self, in_sync: Slots) -> usize {
        let sequence = |slot: &usize| self.disks[*slot].position.sequence;
        slots_of(in_sync).max_by_key(sequence).unwrap()
    }

    /// A start takes the permission to go on alone before anything else.
    fn revoke(&mut self, seen: &mut [Seen], plan: &Plan) {
        for at in records::to_revoke(seen, plan) {
            records::revoke(&mut seen[at].superblock);
            let superblock = seen[at].superblock.clone();
            let slot = usize::from(superblock.own_slot);
            self.disks[slot].superblock = Some(Rc::new(superblock));
        }
    }

    /// The rest is given up: by the operator, or because nobody here knows of it. Also when a crash
    /// cuts the start off, since the next one goes on from it.
    fn give_up_all_but(&mut self, holds: u64) {
        let given_up = |write: &&mut u64| **write & holds == 0;
        let lost = self.writes.iter_mut().filter(given_up);
        lost.for_each(|write| *write &= !ACKNOWLEDGED);
    }

    /// Starts, or is cut off in the middle by a crash.
    pub(crate) fn begin(&mut self, decision: &Decision, cut: Option<Cut>) -> bool {
        let (plan, forced) = (&decision.plan, decision.forced);
        let mut seen = decision.seen.clone();
        let in_sync = decision.in_sync;
        // By force somebody who is not here may go on alone, not knowing of this. The same
        // holds when all who serve have been put back to what they were.
        let put_back = in_sync & !self.reverted == 0 || !self.has_all(in_sync);
        let gives_up = forced || put_back;
        let some = |reached: Slots| reached & !in_sync == 0 && reached != in_sync;
        if let Some(Cut::Round(reached) | Cut::Commit(reached)) = cut
            && !some(reached)
        {
            return false;
        }
        let nothing_said = matches!(cut, Some(Cut::Commit(_) | Cut::Round(0)));
        self.honest &= !gives_up || nothing_said;
        self.untouched &= !forced || nothing_said;
        self.keep_images(Image::Begun);
        self.keep_images(Image::Changed);
        let holds = self.bits(in_sync, HOLDS);
        if gives_up && !nothing_said {
            self.give_up_all_but(holds);
        }
        self.revoke(&mut seen, plan);
        let seen = seen.as_slice();
        let named = slots_of(in_sync).map(|slot| self.disks[slot].completed);
        let newest = self.newest(in_sync);
        self.running = Some(Running {
            in_sync,
            sequence: self.disks[newest].position.sequence,
            completed: named.max().unwrap(),
        });
        let mut config = Superblock {
            handed_over: false,
            last_stop: LastStop::Unclean,
            ..seen[plan.newest].superblock.clone()
        };
        let reached = match cut {
            Some(Cut::Commit(reached)) => reached,
            _ => in_sync,
        };
        self.load_maps(plan, in_sync, reached);
        let effective = self.disks[newest].effective;
        self.commit(reached, 0, (config.epoch.ordinal, effective));
        if matches!(cut, Some(Cut::Commit(_))) {
            self.stop();
            return true;
        }
        for (_, older) in records::disown(seen, plan) {
            let slot = usize::from(older.own_slot);
            self.disks[slot].superblock = Some(Rc::new(older));
        }
        let epoch = self.fresh();
        records::start(&mut config, seen, plan, forced, epoch);
        config.event_count += 1;
        if let Some(Cut::Round(reached)) = cut {
            self.round(&config, reached);
            self.stop();
            return true;
        }
        self.round(&config, in_sync);
        for s in seen {
            self.reverted &= !one(usize::from(s.superblock.own_slot));
        }
        let highest = seen.iter().map(|s| s.position.sequence).max();
        let run = self.running.as_mut().unwrap();
        run.sequence = run.sequence.max(highest.unwrap());
        self.go_on(in_sync, in_sync);
        true
    }

    /// Maps and data of a start, whose commit reaches some of those in-sync.
    fn load_maps(&mut self, plan: &Plan, in_sync: Slots, reached: Slots) {
        let (memory, newest) = (self.memory(), self.newest(in_sync));
        let (hot, holds) = (self.bits(in_sync, HOT), self.bits(in_sync, HOLDS));
        // Of each map sector the newest counts; a hot write that anyone has survives (R5).
        self.mark(hot, self.bits(reached, HOT));
        let equal = if reached == in_sync { holds } else { 0 };
        self.mark(holds, equal | self.bit(memory, HOLDS));
        for slot in slots_of(self.all() & !in_sync) {
            let missed = self.bit(memory, MISSED + slot);
            let lost = plan.lost.iter().any(|(lost, _)| usize::from(*lost) == slot);
            if !lost {
                self.mark(self.bit(newest, MISSED + slot), missed);
            }
            self.mark(hot, missed);
        }
        for slot in 0..self.members {
            self.store_missed(reached, slot);
        }
    }
}

/// Where a start is cut off by a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// These hold its commit.
    Commit(Slots),
    /// All do, and these hold its superblock.
    Round(Slots),
}

/// Nothing was found: there is no member to be named.
fn explains_or_empty(refusal: &Refusal) -> Result<(), Violation> {
    match refusal {
        Refusal::NoMembers => Ok(()),
        _ => explains(&refusal.to_string()),
    }
}

/// The order in which members are found decides nothing (so slots may change places, too).
fn order_decides_nothing(seen: &[Seen], plain: &Result<Plan, Refusal>) -> Result<(), Violation> {
    let reversed: Vec<Seen> = seen.iter().rev().cloned().collect();
    let same = match (plain, assemble(&reversed, PLAIN)) {
        (Ok(plan), Ok(other)) => plan.verdicts.iter().rev().eq(&other.verdicts),
        (Err(one), Err(other)) => std::mem::discriminant(one) == std::mem::discriminant(&other),
        _ => false,
    };
    if same {
        Ok(())
    } else {
        Err("the order of the members decides".into())
    }
}

/// Words that name a member and what to do.
fn explains(words: &str) -> Result<(), Violation> {
    let advice = [
        "attach",
        "--force",
        "--full",
        "`add`",
        "detach",
        "`mirrorctl",
    ];
    if words.contains("/dev/") && advice.iter().any(|word| words.contains(word)) {
        Ok(())
    } else {
        Err(format!("says too little: {words}"))
    }
}
