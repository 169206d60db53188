//! start and assemble with a script in the daemon's place: what is passed on, what is waited
//! for, and what is said when it refuses or dies.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use common::Dir;

const READY: &str = r#"{"ready":true,"device":"/dev/ublkb7","message":"Up."}"#;

/// A mirror named m, and a mirrorctl whose daemon is `script`.
fn ready(script: &str) -> (Dir, PathBuf) {
    let dir = Dir::new();
    let (a, b) = (dir.arg("m.a"), dir.arg("m.b"));
    dir.run(&[
        "create", "m", "--member", &a, "--member", &b, "--size", "16M",
    ])
    .ok();
    let program = dir.with_daemon(script);
    (dir, program)
}

/// A script that says `line` and goes on running would be a daemon; this one ends.
fn say(line: &str) -> String {
    format!("echo '{line}' >&$FD")
}

#[test]
fn the_daemon_gets_absolute_paths_and_its_sentence_is_shown() {
    let (dir, program) = ready(&say(READY));
    let (a, b) = (dir.arg("m.a"), dir.arg("m.b"));
    let args = [
        "start",
        "m",
        &a,
        &b,
        "--front",
        "nbd",
        "--deadline",
        "3",
        "--force",
    ];
    let ran = dir.run_program(&program, &args).ok();
    assert_eq!(ran.stdout, "Up.\n");
    let arguments = fs::read_to_string(dir.path("arguments")).unwrap();
    let run = dir.arg("run");
    let want = format!("--name m --run-dir {run} --front nbd --deadline 3 --force -- {a} {b}\n");
    assert!(arguments.starts_with("--ready-fd "), "{arguments}");
    assert!(arguments.ends_with(&want), "{arguments}");
}

#[test]
fn members_are_found_where_they_were_last_seen_or_by_a_scan() {
    let (dir, program) = ready(&say(READY));
    let here = dir.arg("");
    let (a, b) = (dir.arg("m.a"), dir.arg("m.b"));
    for more in [&[][..], &["--scan", &here]] {
        let args = [&["start", "m", "--front", "nbd"][..], more].concat();
        dir.run_program(&program, &args).ok();
        let arguments = fs::read_to_string(dir.path("arguments")).unwrap();
        assert!(arguments.ends_with(&format!("-- {a} {b}\n")), "{arguments}");
        fs::remove_file(dir.path("arguments")).unwrap();
    }
    let args = ["assemble", "--scan", &here, "--front", "nbd"];
    dir.run_program(&program, &args).ok();
    let arguments = fs::read_to_string(dir.path("arguments")).unwrap();
    assert!(arguments.ends_with(&format!("-- {a} {b}\n")), "{arguments}");
}

#[test]
fn a_refusal_is_passed_on_with_its_code() {
    for (kind, code) in [("refused", 3), ("not-found", 4), ("busy", 5), ("failed", 1)] {
        let line = format!(r#"{{"ready":false,"message":"Slot 1 may be newer.","kind":"{kind}"}}"#);
        let (dir, program) = ready(&say(&line));
        for args in [
            &["start", "m", "--front", "nbd"][..],
            &["assemble", "--front", "nbd", "--scan", &dir.arg("")],
        ] {
            dir.run_program(&program, args)
                .fails(code, "Slot 1 may be newer.");
        }
    }
}

#[test]
fn a_daemon_that_dies_leaves_its_last_words() {
    let (dir, program) = ready("echo 'out of luck' >&2; exit 9");
    let args = ["start", "m", "--front", "nbd"];
    let ran = dir.run_program(&program, &args).fails(1, "out of luck");
    assert!(ran.stderr.contains("exit status: 9"), "{ran:?}");
    assert!(ran.stderr.contains(&dir.arg("run/m.log")), "{ran:?}");
}

#[test]
fn a_daemon_that_is_still_dying_is_waited_for() {
    for verb in [&["start", "m"][..], &["assemble", "--scan", "HERE"]] {
        let (dir, program) = ready(&say(READY));
        fs::create_dir_all(dir.path("run")).unwrap();
        let listener = UnixListener::bind(dir.path("run/m.sock")).unwrap();
        let dying = std::thread::spawn(move || {
            // A question and a look whether it is there still, twice; then it is gone.
            for _ in 0..4 {
                drop(listener.accept().unwrap());
            }
        });
        let here = dir.arg("");
        let mut args: Vec<&str> = [verb, &["--front", "nbd"]].concat();
        for arg in &mut args {
            if *arg == "HERE" {
                *arg = &here;
            }
        }
        let ran = dir.run_program(&program, &args).ok();
        assert_eq!(ran.stdout, "Up.\n");
        dying.join().unwrap();
        assert!(dir.path("arguments").exists());
    }
}

#[test]
fn a_socket_whose_daemon_died_is_said_to_be_stale() {
    let (dir, program) = ready(&say(READY));
    fs::create_dir_all(dir.path("run")).unwrap();
    drop(UnixListener::bind(dir.path("run/m.sock")).unwrap());
    dir.run(&["status", "m"]).fails(4, "has died");
    dir.run(&["status"]).fails(4, "has died");
    dir.run_program(&program, &["start", "m", "--front", "nbd"])
        .ok();
}

#[test]
fn a_missing_daemon_program_is_named() {
    let (dir, program) = ready("");
    fs::remove_file(dir.path("bin/ublk-mirror")).unwrap();
    dir.run_program(&program, &["start", "m", "--front", "nbd"])
        .fails(4, "ublk-mirror");
}

#[test]
fn two_mirrors_of_one_name_are_not_guessed_between() {
    let (dir, program) = ready("exit 9");
    let (c, d) = (dir.arg("other.a"), dir.arg("other.b"));
    dir.run(&[
        "create", "m", "--member", &c, "--member", &d, "--size", "16M",
    ])
    .ok();
    let here = dir.arg("");
    dir.run_program(&program, &["start", "m", "--scan", &here, "--front", "nbd"])
        .fails(3, "2 mirrors are named m");
    let args = ["assemble", "--scan", &here, "--front", "nbd"];
    dir.run_program(&program, &args).fails(3, "PATH...");
    assert!(!dir.path("arguments").exists());
}
