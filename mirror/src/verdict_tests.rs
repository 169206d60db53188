#![allow(clippy::unwrap_used)]
use super::*;

const BLOCK: Block = Block(70_000);
/// What copies may hold in these tests; nobody holds the last one.
const CONTENTS: [&[u8]; 4] = [&[1; 4096], &[2; 4096], &[3; 4096], &[4; 4096]];

/// A member in two letters: its copy (`P`, `Q`, `R`, or `!` when it cannot be read) and its
/// checksum (that of `p`, `q`, `r`, of `x`, which nobody holds, or `-` when none is known).
fn held(text: &str) -> Held<'static> {
    let (copy, sum) = text.split_at(1);
    let content = |letter: &str| "PQRX".find(letter).map(|at| CONTENTS[at]);
    Held {
        content: content(copy),
        sum: content(&sum.to_uppercase()).map(|content| Sum::of(BLOCK, content)),
    }
}

/// A verdict in words: `P checksum, rewrite 1, stale 1, unknown 2`.
fn words(members: &[Held<'_>], verdict: BlockVerdict) -> String {
    let mend = match verdict {
        BlockVerdict::Fine => return "fine".into(),
        BlockVerdict::Damaged => return "damaged".into(),
        BlockVerdict::Undecidable => return "undecidable".into(),
        BlockVerdict::Mend(mend) => mend,
    };
    let content = members[mend.source].content.unwrap();
    assert_eq!(mend.sum, Sum::of(BLOCK, content));
    let letter = CONTENTS.iter().position(|c| *c == content).unwrap();
    let mut text = format!("{} {:?}", &"PQRX"[letter..=letter], mend.proof).replace('C', "c");
    text = text.replace("Equal", "equal").replace("Maj", "maj");
    for (what, which) in [
        ("rewrite", mend.rewrite),
        ("stale", mend.stale),
        ("unknown", mend.unknown),
    ] {
        if !which.is_empty() {
            let list: Vec<String> = which.iter().map(|member| member.to_string()).collect();
            text.push_str(&format!(", {what} {}", list.join("+")));
        }
    }
    text
}

/// Judges members written as in [`held`], in their order and in every other.
fn judged(text: &str) -> String {
    let members: Vec<Held<'_>> = text.split(' ').map(held).collect();
    let verdict = judge(BLOCK, &members);
    for order in orders(members.len()) {
        let turned: Vec<Held<'_>> = order.iter().map(|&member| members[member]).collect();
        let back = |which: Members| {
            Members::which(members.len(), |member| {
                which.iter().any(|at| order[at] == member)
            })
        };
        let same = match (verdict, judge(BLOCK, &turned)) {
            (BlockVerdict::Mend(a), BlockVerdict::Mend(b)) => {
                let sets = |m: Mend| (m.sum, m.proof, m.rewrite, m.stale, m.unknown);
                let b = Mend {
                    rewrite: back(b.rewrite),
                    stale: back(b.stale),
                    unknown: back(b.unknown),
                    ..b
                };
                sets(a) == sets(b)
            }
            (a, b) => a == b,
        };
        assert!(same, "{text} in the order {order:?}");
    }
    words(&members, verdict)
}

fn orders(count: usize) -> Vec<Vec<usize>> {
    if count == 0 {
        return vec![vec![]];
    }
    let mut all = Vec::new();
    for order in orders(count - 1) {
        for at in 0..count {
            let mut order = order.clone();
            order.insert(at, count - 1);
            all.push(order);
        }
    }
    all
}

fn check(rows: &[(&str, &str)]) {
    for (members, want) in rows {
        assert_eq!(judged(members), *want, "{members}");
    }
}

#[test]
fn one_member() {
    check(&[
        ("Pp", "fine"),
        ("P-", "P equal, unknown 0"),
        ("Pq", "damaged"),
        ("!p", "damaged"),
        ("!-", "damaged"),
    ]);
}

#[test]
fn two_members_with_one_proven_content() {
    check(&[
        ("Pp Pp", "fine"),
        // Bytes changed on one side; a lost write; a misdirected one.
        ("Pp Qp", "P checksum, rewrite 1"),
        ("Pp Qx", "P checksum, rewrite 1, stale 1"),
        ("Pp Q-", "P checksum, rewrite 1, unknown 1"),
        // Only the other side's checksum knows.
        ("P- Qp", "P checksum, rewrite 1, unknown 0"),
        ("Px Qp", "P checksum, rewrite 1, stale 0"),
        // Unreadable.
        ("Pp !p", "P checksum, rewrite 1"),
        ("Pp !-", "P checksum, rewrite 1, unknown 1"),
        ("P- !p", "P checksum, rewrite 1, unknown 0"),
        ("Pp !x", "P checksum, rewrite 1, stale 1"),
        ("Px !p", "P checksum, rewrite 1, stale 0"),
        // Only a checksum is wrong or lacking.
        ("Pp Px", "P checksum, stale 1"),
        ("Pp P-", "P checksum, unknown 1"),
    ]);
}

#[test]
fn two_members_of_which_nobody_or_both_are_proven() {
    check(&[
        ("Px Px", "P equal, stale 0+1"),
        ("Px P-", "P equal, stale 0, unknown 1"),
        ("Px Pq", "P equal, stale 0+1"),
        ("Px Qx", "damaged"),
        ("P- Qx", "damaged"),
        ("Px !x", "damaged"),
        ("P- !x", "damaged"),
        ("Px !-", "damaged"),
        ("!x !x", "damaged"),
        ("!x !-", "damaged"),
        // Two proven contents, and neither is held by most.
        ("Pp Qq", "damaged"),
        ("Pq Qp", "damaged"),
    ]);
}

#[test]
fn two_members_without_checksums() {
    check(&[
        ("P- P-", "P equal, unknown 0+1"),
        ("P- !-", "P equal, rewrite 1, unknown 0+1"),
        ("P- Q-", "undecidable"),
        ("!- !-", "damaged"),
    ]);
}

#[test]
fn three_members_with_one_proven_content() {
    check(&[
        ("Pp Pp Pp", "fine"),
        ("Pp Pp Qp", "P checksum, rewrite 2"),
        ("Pp Qp Rp", "P checksum, rewrite 1+2"),
        // A proven copy is right against any number of others.
        ("Pp Qx Qx", "P checksum, rewrite 1+2, stale 1+2"),
        ("Pp Q- Q-", "P checksum, rewrite 1+2, unknown 1+2"),
        ("P- Q- Qp", "P checksum, rewrite 1+2, unknown 0+1"),
        ("Pp !p !p", "P checksum, rewrite 1+2"),
        ("P- !p Qp", "P checksum, rewrite 1+2, unknown 0"),
        ("Pp Px P-", "P checksum, stale 1, unknown 2"),
        ("Pp !x Q-", "P checksum, rewrite 1+2, stale 1, unknown 2"),
    ]);
}

#[test]
fn three_members_of_which_nobody_is_proven() {
    check(&[
        ("Px Px Px", "P equal, stale 0+1+2"),
        ("Px P- P-", "P equal, stale 0, unknown 1+2"),
        ("Px Px Qx", "damaged"),
        ("P- P- Qx", "damaged"),
        ("Px Px !x", "damaged"),
        ("P- P- !x", "damaged"),
        ("Px !x !x", "damaged"),
        ("!x !x !x", "damaged"),
    ]);
}

#[test]
fn three_members_with_several_proven_contents() {
    check(&[
        ("Pp Pp Qq", "P majority, rewrite 2, stale 2"),
        ("Pp P- Qq", "P majority, rewrite 2, stale 2, unknown 1"),
        ("Pq P- Qp", "P majority, rewrite 2, stale 0, unknown 1"),
        ("Px Pq Qp", "P majority, rewrite 2, stale 0+1"),
        ("Pp Qq Rr", "damaged"),
        ("Pp Qq R-", "damaged"),
        ("Pp Qq !-", "damaged"),
        ("Pp Qq !p", "damaged"),
        // Most hold one that is not proven itself.
        ("Pp Qq Rp", "damaged"),
    ]);
}

#[test]
fn three_members_without_checksums() {
    check(&[
        ("P- P- P-", "P equal, unknown 0+1+2"),
        ("P- P- !-", "P equal, rewrite 2, unknown 0+1+2"),
        ("P- !- !-", "P equal, rewrite 1+2, unknown 0+1+2"),
        ("P- P- Q-", "P majority, rewrite 2, unknown 0+1+2"),
        ("P- Q- R-", "undecidable"),
        ("P- Q- !-", "undecidable"),
        ("!- !- !-", "damaged"),
    ]);
}

#[test]
fn a_majority_is_more_than_half() {
    check(&[
        ("P- P- Q- Q-", "undecidable"),
        ("P- P- Q- !-", "undecidable"),
        ("P- P- P- Q-", "P majority, rewrite 3, unknown 0+1+2+3"),
        ("Pp Pp Qq Qq", "damaged"),
        ("Pp Pp Pp Qq", "P majority, rewrite 3, stale 3"),
        // Of a content that is not proven it is worth nothing beside two that are.
        ("Pp Qq R- R- R-", "damaged"),
    ]);
}

/// Everything that two or three members can hold: what is mended is fine afterwards, at every
/// step of a repair that goes by the rule of sums after data nothing else becomes right, and
/// with a checksum known nothing is overwritten on less than that or on equality.
#[test]
fn whatever_is_held_a_mended_block_is_fine_and_stays_decided() {
    let one: Vec<String> = ["P", "Q", "R", "!"]
        .iter()
        .flat_map(|copy| ["p", "q", "x", "-"].map(|sum| format!("{copy}{sum}")))
        .collect();
    let mut worlds: Vec<Vec<&str>> = vec![vec![]];
    let mut seen = 0;
    for _ in 0..3 {
        let longer = worlds.iter().flat_map(|world| {
            let longer = one
                .iter()
                .map(|member| [&world[..], &[member.as_str()]].concat());
            longer.collect::<Vec<_>>()
        });
        worlds = longer.collect();
        for world in &worlds {
            let members: Vec<Held<'_>> = world.iter().map(|text| held(text)).collect();
            mended_stepwise(world, members);
            seen += 1;
        }
    }
    assert_eq!(seen, 16 + 16 * 16 + 16 * 16 * 16);
}

fn mended_stepwise(world: &[&str], mut members: Vec<Held<'_>>) {
    let BlockVerdict::Mend(mend) = judge(BLOCK, &members) else {
        return;
    };
    let right = members[mend.source].content;
    let holders: Vec<usize> = (0..members.len())
        .filter(|&member| members[member].content == right)
        .collect();
    let known = members.iter().any(|member| member.sum.is_some());
    let proven = members.iter().any(|member| member.sum == Some(mend.sum));
    let all_hold = holders.len() == members.len();
    assert!(!known || proven || all_hold, "{world:?}");
    // Checksums of those who hold it, then copies, then the other checksums; a cut after each.
    for &holder in &holders {
        members[holder].sum = Some(mend.sum);
        still_decided(world, &members, right);
    }
    for member in mend.rewrite.iter() {
        for torn in [Some(&[9; 4096][..]), None, right] {
            members[member].content = torn;
            still_decided(world, &members, right);
        }
    }
    for member in mend.rewrite.iter() {
        members[member].sum = Some(mend.sum);
        still_decided(world, &members, right);
    }
    assert_eq!(judge(BLOCK, &members), BlockVerdict::Fine, "{world:?}");
}

fn still_decided(world: &[&str], members: &[Held<'_>], right: Option<&[u8]>) {
    match judge(BLOCK, members) {
        BlockVerdict::Fine => {}
        BlockVerdict::Mend(mend) => assert_eq!(members[mend.source].content, right, "{world:?}"),
        other => panic!("{world:?}: {other:?} in the middle of a repair"),
    }
}
