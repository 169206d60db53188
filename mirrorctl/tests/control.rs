//! The commands for running mirrors, with a thread in the daemon's place: what is asked of it,
//! and what becomes of its answers.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread::JoinHandle;

use common::Dir;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// A daemon of mirror m that gives each of `answers` once and then closes its socket. The
/// requests are what its thread returns.
fn daemon(dir: &Dir, answers: Vec<Value>) -> JoinHandle<Vec<Value>> {
    daemon_with(dir, answers, |_| {})
}

fn daemon_with(
    dir: &Dir,
    answers: Vec<Value>,
    on_request: impl Fn(&Value) + Send + 'static,
) -> JoinHandle<Vec<Value>> {
    fs::create_dir_all(dir.path("run")).unwrap();
    let socket = dir.path("run/m.sock");
    drop(fs::remove_file(&socket));
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || {
        let serve = |answer: Value| {
            let (stream, _) = listener.accept().unwrap();
            let mut line = String::new();
            BufReader::new(&stream).read_line(&mut line).unwrap();
            let request = serde_json::from_str(&line).unwrap();
            on_request(&request);
            writeln!(&stream, "{answer}").unwrap();
            request
        };
        answers.into_iter().map(serve).collect()
    })
}

fn done(message: &str) -> Value {
    json!({ "reply": "done", "message": message })
}

/// A status in which slot 1 is in `state`.
fn status(state: &str, resync: Value, last_resync: Value) -> Value {
    let whole = if state == "in-sync" {
        "in-sync"
    } else {
        "degraded"
    };
    let whole = if state == "resyncing" { state } else { whole };
    let member = |slot: u8, state: &str| {
        json!({
            "slot": slot, "path": format!("/images/{slot}"), "uuid": format!("u{slot}"),
            "state": state, "reason": null, "missed-bytes": 0, "attached": true, "orphans": 0,
            "read-errors": 0, "repaired-blocks": 0,
        })
    };
    json!({
        "reply": "status", "name": "m", "uuid": "0192", "state": whole,
        "size-bytes": 1_u64 << 30, "logical-block-bytes": 512, "device": "/dev/ublkb0",
        "daemon-pid": u32::MAX, "event-count": 3, "epoch": "00", "write-intent": true,
        "flush-error": false, "members": [member(0, "in-sync"), member(1, state)],
        "extents": {"unwritten": 1, "cool": 1, "hot": 0, "discarded": 0, "hot-budget": 64,
                    "unequalised-blocks": 0},
        "resync": resync, "last-resync": last_resync,
        "io": {"reads": 0, "read-bytes": 0, "writes": 0, "written-bytes": 0, "flushes": 0,
               "discards": 0, "errors": 0, "map-commits": 0, "extents-zeroed": 0},
    })
}

fn resync(copied: u64, remaining: u64) -> Value {
    json!({
        "slot": 1, "kind": "delta", "reason": "Its position is known.",
        "finished": remaining == 0, "copied-bytes": copied, "zeroed-bytes": 0,
        "remaining-bytes": remaining, "elapsed-ms": 230, "stalled": null,
    })
}

#[test]
fn each_command_asks_for_what_was_typed() {
    let dir = Dir::new();
    let rows = [
        (
            vec!["fail", "m", "1"],
            json!({"request": "fail", "member": {"slot": 1}}),
        ),
        (
            vec!["fail", "m", "/dev/sdb"],
            json!({"request": "fail", "member": {"path": "/dev/sdb"}}),
        ),
        (
            vec!["remove", "m", "0"],
            json!({"request": "remove", "member": {"slot": 0}, "force": false}),
        ),
        (
            vec!["remove", "m", "0", "--force"],
            json!({"request": "remove", "member": {"slot": 0}, "force": true}),
        ),
        (
            vec!["clear-flush-error", "m"],
            json!({"request": "clear-flush-error"}),
        ),
        (
            vec!["scrub", "start", "m"],
            json!({"request": "scrub-start", "check_only": false, "once": false, "days": null,
                   "ceiling_mib": null}),
        ),
        (
            vec![
                "scrub",
                "start",
                "m",
                "--check-only",
                "--days",
                "7",
                "--ceiling",
                "90",
            ],
            json!({"request": "scrub-start", "check_only": true, "once": false, "days": 7,
                   "ceiling_mib": 90}),
        ),
        (
            vec!["scrub", "start", "m", "--once"],
            json!({"request": "scrub-start", "check_only": false, "once": true, "days": null,
                   "ceiling_mib": null}),
        ),
        (
            vec!["scrub", "pause", "m"],
            json!({"request": "scrub-pause"}),
        ),
        (
            vec!["scrub", "resume", "m"],
            json!({"request": "scrub-resume"}),
        ),
        (
            vec!["scrub", "cancel", "m"],
            json!({"request": "scrub-cancel"}),
        ),
    ];
    for (args, want) in rows {
        let requests = daemon(&dir, vec![done("It was done.")]);
        assert_eq!(dir.run(&args).ok().stdout, "It was done.\n");
        assert_eq!(requests.join().unwrap(), [want]);
        let requests = daemon(&dir, vec![done("It was done.")]);
        let ran = dir.run(&[&args[..], &["--json"]].concat()).ok();
        assert_eq!(ran.json(), json!({"message": "It was done."}));
        requests.join().unwrap();
    }
}

#[test]
fn members_come_back_and_are_remembered() {
    let dir = Dir::new();
    let disk = dir.image("disk", 32 * MIB, 0, b"");
    let answers = || {
        vec![
            status("faulty", Value::Null, Value::Null),
            done("Slot 1 is back."),
        ]
    };
    for (verb, more, want) in [
        (
            "re-add",
            &["--full", "--dry-run"][..],
            json!({"request": "re-add", "path": disk, "full": true, "discard_changes": false, "dry_run": true}),
        ),
        (
            "re-add",
            &[],
            json!({"request": "re-add", "path": disk, "full": false, "discard_changes": false, "dry_run": false}),
        ),
        (
            "add",
            &["--force"],
            json!({"request": "add", "path": disk, "force": true, "dry_run": false}),
        ),
    ] {
        let requests = daemon(&dir, answers());
        let ran = dir.run(&[&[verb, "m", &disk][..], more].concat()).ok();
        assert_eq!(ran.stdout, "Slot 1 is back.\n");
        assert_eq!(requests.join().unwrap()[1], want);
        let hints = fs::read_to_string(dir.path("run/m.members")).unwrap_or_default();
        let dry = more.contains(&"--dry-run");
        assert_eq!(
            hints,
            if dry {
                String::new()
            } else {
                format!("{disk}\n")
            }
        );
    }
}

#[test]
fn a_disk_with_something_on_it_is_not_added_unasked() {
    let dir = Dir::new();
    let disk = dir.image("disk", 32 * MIB, 0, b"XFSB");
    let requests = daemon(&dir, vec![status("missing", Value::Null, Value::Null)]);
    dir.run(&["add", "m", &disk]).fails(3, "an XFS filesystem");
    assert_eq!(requests.join().unwrap(), [json!({"request": "status"})]);
}

#[test]
fn a_member_of_another_mirror_is_not_re_added() {
    let dir = Dir::new();
    let (a, b) = (dir.arg("a"), dir.arg("b"));
    dir.run(&[
        "create", "other", "--member", &a, "--member", &b, "--size", "16M",
    ])
    .ok();
    let requests = daemon(&dir, vec![status("missing", Value::Null, Value::Null)]);
    dir.run(&["re-add", "m", &a])
        .fails(3, "another mirror, other");
    assert_eq!(requests.join().unwrap(), [json!({"request": "status"})]);
}

#[test]
fn error_replies_keep_their_sentence_and_get_their_code() {
    let dir = Dir::new();
    for (kind, code) in [
        ("failed", 1),
        ("usage", 2),
        ("refused", 3),
        ("not-found", 4),
        ("busy", 5),
    ] {
        let answer = json!({"reply": "error", "message": "Slot 7 is empty.", "kind": kind});
        let requests = daemon(&dir, vec![answer]);
        dir.run(&["fail", "m", "7"]).fails(code, "Slot 7 is empty.");
        requests.join().unwrap();
    }
}

#[test]
fn status_prints_one_document_or_a_list() {
    let dir = Dir::new();
    let state = || status("in-sync", Value::Null, resync(4_096_000, 0));
    let requests = daemon(&dir, vec![state(), state(), state()]);
    let one = dir.run(&["status", "m", "--json"]).ok().json();
    assert_eq!(one["members"][1]["path"], "/images/1");
    assert_eq!(dir.run(&["status", "--json"]).ok().json(), json!([one]));
    let text = dir.run(&["status"]).ok().stdout;
    assert!(
        text.starts_with("mirror m: in-sync, 1.0 GiB on /dev/ublkb0\n"),
        "{text}"
    );
    assert!(
        text.contains("copied 3.9 MiB (zeroed 0 B) of 1.0 GiB in 0.2 s"),
        "{text}"
    );
    requests.join().unwrap();
}

#[test]
fn watching_goes_on_until_the_daemon_is_gone() {
    let dir = Dir::new();
    let state = || status("in-sync", Value::Null, Value::Null);
    let requests = daemon(&dir, vec![state(), state()]);
    let ran = dir
        .run(&["status", "m", "--json", "--watch"])
        .fails(4, "has died");
    let lines: Vec<Value> = ran
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 2, "{ran:?}");
    requests.join().unwrap();
}

#[test]
fn waiting_ends_with_what_was_copied() {
    let dir = Dir::new();
    let requests = daemon(
        &dir,
        vec![
            status("stale", Value::Null, Value::Null),
            status("resyncing", resync(1_024_000, 3_072_000), Value::Null),
            status("in-sync", Value::Null, resync(4_096_000, 0)),
        ],
    );
    let ran = dir.run(&["wait", "m", "--timeout", "60"]).ok();
    assert_eq!(
        ran.stdout,
        "delta resync of slot 1: 25.0 %, 2.9 MiB left, about 0.6 s to go\n\
         copied 3.9 MiB (zeroed 0 B) of 1.0 GiB in 0.2 s (delta resync of slot 1)\n"
    );
    assert_eq!(requests.join().unwrap().len(), 3);
}

#[test]
fn waiting_has_an_end_of_patience() {
    let dir = Dir::new();
    let busy = status("resyncing", resync(0, 4096), Value::Null);
    let requests = daemon(&dir, vec![busy]);
    dir.run(&["wait", "m", "--timeout", "0"])
        .fails(5, "slot 1 is resyncing");
    requests.join().unwrap();
}

#[test]
fn waiting_for_nothing_gives_up_and_says_what_to_do() {
    let dir = Dir::new();
    let degraded = status("faulty", Value::Null, Value::Null);
    let requests = daemon(&dir, vec![degraded; 100]);
    let ran = dir.run(&["wait", "m"]).fails(1, "slot 1 is faulty");
    assert!(ran.stderr.contains("mirrorctl re-add m PATH"), "{ran:?}");
    // The thread still waits for requests that do not come.
    drop(requests);
}

#[test]
fn stop_returns_when_the_daemon_has_ended() {
    let dir = Dir::new();
    let starting = common::programs();
    let mut process = Command::new("cat")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    drop(starting);
    let mut state = status("in-sync", Value::Null, Value::Null);
    state["daemon-pid"] = json!(process.id());
    let stdin = process.stdin.take();
    let input = Mutex::new(stdin);
    let requests = daemon_with(
        &dir,
        vec![state, done("Mirror m has stopped.")],
        move |request| {
            if request["request"] == "stop" {
                drop(input.lock().unwrap().take());
            }
        },
    );
    let ran = dir.run(&["stop", "m", "--force"]).ok();
    assert_eq!(ran.stdout, "Mirror m has stopped.\n");
    assert!(
        process.try_wait().unwrap().is_some(),
        "it returned before the daemon had ended"
    );
    assert_eq!(
        requests.join().unwrap()[1],
        json!({"request": "stop", "force": true, "hand_over": null})
    );
}

#[test]
fn a_running_mirror_is_not_started_again() {
    let dir = Dir::new();
    let (a, b) = (dir.arg("m.a"), dir.arg("m.b"));
    dir.run(&[
        "create", "m", "--member", &a, "--member", &b, "--size", "16M",
    ])
    .ok();
    let program = dir.with_daemon("exit 9");
    let answer = || vec![status("in-sync", Value::Null, Value::Null)];
    let thread = daemon(&dir, answer());
    dir.run_program(&program, &["start", "m", "--front", "nbd"])
        .fails(5, "already running on /dev/ublkb0");
    thread.join().unwrap();
    let thread = daemon(&dir, answer());
    let here = dir.arg("");
    let args = ["assemble", "--scan", &here, "--front", "nbd"];
    let ran = dir.run_program(&program, &args).ok();
    assert!(ran.stderr.contains("already running"), "{ran:?}");
    thread.join().unwrap();
    assert!(!dir.path("arguments").exists());
}
