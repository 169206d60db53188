//! Every bad input ends with a code that is documented and a sentence that names the culprit,
//! and writes nothing.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs;

use common::Dir;

const MIB: u64 = 1 << 20;

#[test]
fn command_lines_that_make_no_sense() {
    let dir = Dir::new();
    let a = dir.image("a", 32 * MIB, 0, b"");
    let b = dir.image("b", 32 * MIB, 0, b"");
    let both = ["--member", &a, "--member", &b];
    let create = |more: &[&'static str]| [&["create", "m"][..], &both, more].concat();
    let rows: Vec<(Vec<&str>, &str)> = vec![
        (vec![], "Usage"),
        (vec!["repair"], "repair"),
        (vec!["create", "m"], "--member"),
        (vec!["create", "m", "--member", &a], "2 to 8 members, not 1"),
        ([&["create", "a/b"][..], &both].concat(), "'a/b'"),
        ([&["create", ""][..], &both].concat(), "''"),
        ([&["create", "."][..], &both].concat(), "'.'"),
        (create(&["--size", "ten"]), "'ten'"),
        (create(&["--size", "0"]), "0 bytes"),
        (create(&["--size", "1000"]), "1000 bytes"),
        (create(&["--size", "2E"]), "1 PiB"),
        (create(&["--size", "1G"]), "use a larger device"),
        (create(&["--logical-block", "1024"]), "'1024'"),
        (
            vec!["create", "m", "--member", &a, "--member", &a],
            "one and the same",
        ),
        (
            vec!["create", "m", "--member", &a, "--member", "/dev/null"],
            "/dev/null",
        ),
        (
            vec!["create", "m", "--member", &a, "--member", "/tmp"],
            "/tmp",
        ),
        (vec!["start"], "NAME"),
        (vec!["start", "../x"], "'../x'"),
        (vec!["start", "m", "--front", "scsi"], "scsi"),
        (vec!["start", "m", "--queue-depth", "0"], "0"),
        (vec!["start", "m", "--deadline", "soon"], "soon"),
        (vec!["start", "m", "--nbd-tcp", "anywhere"], "anywhere"),
        (vec!["assemble", "/tmp"], "--scan"),
        (vec!["fail", "m"], "MEMBER"),
        (vec!["fail", "m", "300"], "'300'"),
        (vec!["fail", "m", ""], "empty"),
        (vec!["status", "a b"], "'a b'"),
        (vec!["wait", "m", "--timeout", "-1"], "-1"),
        (vec!["destroy"], "NAME|PATH"),
    ];
    for (args, words) in rows {
        dir.run(&args).fails(2, words);
    }
    for image in [a, b] {
        assert!(fs::read(image).unwrap().iter().all(|byte| *byte == 0));
    }
}

#[test]
fn two_names_of_one_file_are_one_member() {
    let dir = Dir::new();
    let a = dir.image("a", 32 * MIB, 0, b"");
    std::os::unix::fs::symlink(&a, dir.path("link")).unwrap();
    let link = dir.arg("link");
    dir.run(&["create", "m", "--member", &a, "--member", &link])
        .fails(2, "one and the same");
}

#[test]
fn what_is_not_there_is_named() {
    let dir = Dir::new();
    let a = dir.image("a", 32 * MIB, 0, b"");
    let gone = dir.arg("gone");
    for args in [
        &["examine", &gone][..],
        &["start", "m", &gone],
        &["start", "m", "--scan", &gone],
        &["destroy", &gone],
        &["assemble", "--scan", &gone],
        &[
            "create",
            "m",
            "--member",
            &a,
            "--member",
            "/dev/no-such-disk",
            "--size",
            "20M",
        ],
        &[
            "create",
            "m",
            "--member",
            &a,
            "--member",
            "/no/such/dir/x",
            "--size",
            "20M",
        ],
    ] {
        let culprit = args.iter().rev().find(|arg| arg.starts_with('/')).unwrap();
        dir.run(args).fails(4, culprit);
    }
    dir.run(&["create", "m", "--member", &a, "--member", &gone])
        .fails(2, "--size");
    assert!(!dir.path("gone").exists());
    dir.run(&["examine", &a]).fails(4, "is not a member");
    dir.run(&["destroy", &a]).fails(4, "Nothing was wiped");
    dir.run(&["assemble", "--scan", &dir.arg("")])
        .fails(4, "No member of any mirror");
}

#[test]
fn mirrors_that_do_not_run_are_named() {
    let dir = Dir::new();
    let a = dir.image("a", 32 * MIB, 0, b"");
    for args in [
        &["status", "ghost"][..],
        &["stop", "ghost"],
        &["fail", "ghost", "0"],
        &["remove", "ghost", "0"],
        &["re-add", "ghost", &a],
        &["add", "ghost", &a],
        &["wait", "ghost"],
        &["clear-flush-error", "ghost"],
    ] {
        dir.run(args).fails(4, "No mirror named ghost runs");
    }
    dir.run(&["start", "ghost", "--scan", &dir.arg("")])
        .fails(4, "mirror named ghost was found");
    let none = dir.run(&["status"]).ok();
    assert!(none.stdout.contains("no mirror is running"), "{none:?}");
    assert_eq!(
        dir.run(&["status", "--json"]).ok().json(),
        serde_json::json!([])
    );
}

#[test]
fn members_too_small_are_named_with_what_they_need() {
    let dir = Dir::new();
    let a = dir.image("a", 32 * MIB, 0, b"");
    let small = dir.image("small", 15 * MIB, 0, b"");
    let ran = dir.run(&["create", "m", "--member", &a, "--member", &small]);
    let ran = ran.fails(2, &small);
    assert!(ran.stderr.contains("15728640"), "{ran:?}");
    let empty = dir.image("empty", 0, 0, b"");
    dir.run(&["create", "m", "--member", &a, "--member", &empty])
        .fails(2, &empty);
}

#[test]
fn a_member_that_cannot_be_written_is_named() {
    let dir = Dir::new();
    let a = dir.image("a", 32 * MIB, 0, b"");
    // A program that runs refuses writers, root included, which a mode does not.
    let own = std::env::current_exe().unwrap();
    let own = own.to_str().unwrap();
    let args = ["create", "m", "--member", &a, "--member", own];
    let ran = dir.run(&args);
    let ran = ran.fails(1, "cannot be opened");
    assert!(ran.stderr.contains(own), "{ran:?}");
}

#[test]
fn help_documents_exit_codes_and_every_command() {
    let dir = Dir::new();
    let help = dir.run(&["--help"]).ok().stdout;
    for word in [
        "Exit codes:",
        "create",
        "start",
        "assemble",
        "stop",
        "status",
        "examine",
        "fail",
        "remove",
        "re-add",
        "add",
        "wait",
        "destroy",
        "--run-dir",
        "--json",
    ] {
        assert!(help.contains(word), "{word} is not in the help");
    }
    assert!(!help.contains("detached"), "an internal command shows");
}
