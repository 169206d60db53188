//! Style as a test: what a reader of this repository may rely on without looking.
//!
//! Lengths are a ratchet: a file or function that is longer than the limit stands in a list with
//! its length, may shrink and may not grow, and leaves the list when it fits. The checks read
//! text and know Rust only as rustfmt prints it. They do not replace clippy.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// Most lines of a source file.
const FILE_LINES_MAX: usize = 600;
/// Most lines of a function, from its signature to its closing brace.
const FUNCTION_LINES_MAX: usize = 70;

/// Files that are longer, with their lengths.
const LONG_FILES: &[(&str, usize)] = &[];
/// Functions that are longer, as `file::function`, with their lengths.
const LONG_FUNCTIONS: &[(&str, usize)] = &[("mirror/src/create.rs::plan", 87)];

/// The only file that may contain unsafe code.
const UNSAFE_FILE: &str = "ublk-target/src/sys.rs";

/// What each crate may depend on among the crates of this workspace.
const DEPENDENCIES: &[(&str, &[&str])] = &[
    ("dirty-map", &[]),
    ("mirror", &["dirty-map"]),
    ("scrubber", &["dirty-map", "mirror"]),
    ("peer", &["dirty-map", "mirror"]),
    ("export", &["dirty-map", "mirror", "peer"]),
    ("ublk-target", &["dirty-map", "mirror", "peer", "scrubber"]),
    ("mirrorctl", &["dirty-map", "export", "mirror", "peer"]),
];

/// External crates that only one crate may use.
const PRIVATE: &[(&str, &str)] = &[
    ("libublk", "ublk-target"),
    ("io-uring", "ublk-target"),
    ("tokio", "export"),
    ("tokio-uring", "export"),
];

struct Source {
    /// Path from the root, with slashes.
    path: String,
    text: String,
}

impl Source {
    fn is(&self, extension: &str) -> bool {
        Path::new(&self.path)
            .extension()
            .is_some_and(|e| e == extension)
    }

    fn is_test(&self) -> bool {
        self.path.starts_with("tests/")
            || self.path.contains("/tests/")
            || self.path.ends_with("tests.rs")
    }

    /// Lines with their numbers, as far as they belong to tests.
    fn test_lines(&self) -> Vec<(usize, &str)> {
        let mut inside = self.is_test();
        let mut found = Vec::new();
        for (index, line) in self.text.lines().enumerate() {
            inside |= line.starts_with("mod tests {");
            if inside {
                found.push((index + 1, line));
            }
        }
        found
    }
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every text file of the repository that a person wrote.
fn sources() -> Vec<Source> {
    let mut found = Vec::new();
    collect(&root(), &mut found);
    assert!(found.len() > 50, "the walk found {} files", found.len());
    found
}

fn collect(folder: &Path, found: &mut Vec<Source>) {
    let mut entries: Vec<_> = fs::read_dir(folder).unwrap().map(Result::unwrap).collect();
    entries.sort_by_key(fs::DirEntry::path);
    for entry in entries {
        let path = entry.path();
        let name = entry.file_name().into_string().unwrap();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            let generated = ["target", ".git", ".cache", "out", "__pycache__"];
            if !generated.contains(&name.as_str()) {
                collect(&path, found);
            }
        } else if kind.is_file() && name != "Cargo.lock" && name != ".git" {
            let shown = path.strip_prefix(root()).unwrap().to_str().unwrap();
            if let Ok(text) = fs::read_to_string(&path) {
                found.push(Source {
                    path: shown.to_owned(),
                    text,
                });
            }
        }
    }
}

fn rust() -> Vec<Source> {
    let mut found = sources();
    found.retain(|source| source.is("rs"));
    found
}

/// Fails with all findings at once.
fn expect_none(findings: &[String], rule: &str) {
    assert!(findings.is_empty(), "{rule}:\n{}", findings.join("\n"));
}

/// Compares measured lengths with the limit and the list of those that may exceed it.
fn ratchet(lengths: &BTreeMap<String, usize>, limit: usize, list: &[(&str, usize)]) -> Vec<String> {
    let listed: BTreeMap<&str, usize> = list.iter().copied().collect();
    let mut findings = Vec::new();
    for (name, &lines) in lengths {
        let allowed = listed.get(name.as_str()).copied().unwrap_or(limit);
        if lines > allowed {
            findings.push(format!("{name} has {lines} lines, allowed are {allowed}"));
        }
    }
    for (name, _) in list {
        let lines = lengths.get(*name).copied().unwrap_or(0);
        if lines <= limit {
            findings.push(format!(
                "{name} fits now ({lines} lines): take it off the list"
            ));
        }
    }
    findings
}

#[test]
fn files_are_short() {
    let lengths = sources()
        .iter()
        .filter(|s| s.is("rs") || s.is("sh") || s.is("py"))
        .map(|s| (s.path.clone(), s.text.lines().count()))
        .collect();
    expect_none(
        &ratchet(&lengths, FILE_LINES_MAX, LONG_FILES),
        "files that are too long",
    );
}

/// The name in a line that begins a function with a body.
fn function_name(line: &str) -> Option<&str> {
    let mut rest = line.trim_start();
    loop {
        let before = rest;
        for word in ["pub ", "async ", "const ", "unsafe ", "extern \"C\" "] {
            rest = rest.strip_prefix(word).unwrap_or(rest);
        }
        if let Some(scoped) = rest.strip_prefix("pub(") {
            rest = scoped.split_once(") ")?.1;
        }
        if rest == before {
            break;
        }
    }
    let name = rest.strip_prefix("fn ")?;
    name.split(['(', '<']).next()
}

/// Lengths of the functions of a file, by name.
fn function_lengths(text: &str) -> Vec<(String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (begin, line) in lines.iter().enumerate() {
        let Some(name) = function_name(line) else {
            continue;
        };
        let indent = &line[..line.len() - line.trim_start().len()];
        let closing = format!("{indent}}}");
        for (end, last) in lines.iter().enumerate().skip(begin) {
            let one_line = end == begin && last.ends_with('}');
            if one_line || *last == closing {
                found.push((name.to_owned(), end - begin + 1));
                break;
            }
            // A signature without a body, as in a trait.
            if last.starts_with(indent) && last.ends_with(';') && !body_began(&lines[begin..=end]) {
                break;
            }
        }
    }
    found
}

fn body_began(lines: &[&str]) -> bool {
    lines.iter().any(|line| line.ends_with('{'))
}

#[test]
fn functions_are_short() {
    let mut lengths = BTreeMap::new();
    for source in rust() {
        for (name, lines) in function_lengths(&source.text) {
            let longest: &mut usize = lengths
                .entry(format!("{}::{name}", source.path))
                .or_default();
            *longest = lines.max(*longest);
        }
    }
    assert!(lengths.len() > 300, "found {} functions", lengths.len());
    expect_none(
        &ratchet(&lengths, FUNCTION_LINES_MAX, LONG_FUNCTIONS),
        "functions that are too long",
    );
}

#[test]
fn function_lengths_are_measured() {
    let text = "trait T {\n    fn none(&self);\n    fn two(\n        &self,\n    ) -> u8 {\n        1\n    }\n}\npub(crate) async fn one() {}\n";
    let found = function_lengths(text);
    assert_eq!(found, [("two".to_owned(), 5), ("one".to_owned(), 1)]);
    let long = BTreeMap::from([("a".to_owned(), 71), ("b".to_owned(), 80)]);
    assert_eq!(ratchet(&long, 70, &[("b", 80)]).len(), 1);
    assert_eq!(ratchet(&long, 70, &[("a", 71), ("b", 79)]).len(), 1);
    assert_eq!(ratchet(&long, 80, &[("b", 80)]).len(), 1);
}

#[test]
fn every_file_says_what_it_is_for() {
    let mut findings = Vec::new();
    for source in sources() {
        let mut lines = source.text.lines();
        let said = if source.path.ends_with("_tests.rs") {
            true // a part of the module beside it, which has its own words
        } else if source.is("rs") {
            lines.next().is_some_and(|line| line.starts_with("//! "))
        } else if source.is("py") {
            lines
                .find(|line| !line.starts_with("#!"))
                .is_some_and(|line| line.starts_with("\"\"\"") && line.len() > 10)
        } else if source.is("sh") {
            lines
                .find(|line| !line.starts_with("#!") && !line.starts_with("# shellcheck"))
                .is_some_and(|line| line.starts_with("# "))
        } else {
            true
        };
        if !said {
            findings.push(source.path);
        }
    }
    expect_none(&findings, "files that do not begin with what they are for");
}

/// The keys of a manifest's `[dependencies]`.
fn dependencies(manifest: &str) -> Vec<String> {
    let mut inside = false;
    let mut found = Vec::new();
    for line in manifest.lines() {
        if line.starts_with('[') {
            inside = line == "[dependencies]";
        } else if inside && let Some((key, _)) = line.split_once(['.', ' ', '=']) {
            found.push(key.to_owned());
        }
    }
    found
}

#[test]
fn crates_depend_in_one_direction() {
    let mut findings = Vec::new();
    for (name, allowed) in DEPENDENCIES {
        let manifest = fs::read_to_string(root().join(name).join("Cargo.toml")).unwrap();
        let found = dependencies(&manifest);
        assert!(found.len() > 1, "{name}: the manifest was not understood");
        for dependency in found {
            let ours = DEPENDENCIES.iter().any(|(other, _)| *other == dependency);
            let private = PRIVATE
                .iter()
                .any(|(external, owner)| *external == dependency && owner != name);
            if private || ours && !allowed.contains(&dependency.as_str()) {
                findings.push(format!("{name} must not depend on {dependency}"));
            }
        }
    }
    expect_none(&findings, "dependencies against the direction");
}

/// Lines of the files chosen that contain one of the needles.
fn lines_with(chosen: impl Fn(&Source) -> bool, needles: &[String]) -> Vec<String> {
    let mut findings = Vec::new();
    for source in sources().into_iter().filter(chosen) {
        for (index, line) in source.text.lines().enumerate() {
            if let Some(needle) = needles.iter().find(|needle| line.contains(*needle)) {
                findings.push(format!("{}:{}: {needle}", source.path, index + 1));
            }
        }
    }
    findings
}

fn strings(parts: &[&str]) -> Vec<String> {
    parts.iter().map(|part| (*part).to_owned()).collect()
}

#[test]
fn the_engine_takes_time_chance_and_io_from_its_traits() {
    let findings = lines_with(
        |s| {
            s.is("rs")
                && !s.is_test()
                && (["mirror/src", "dirty-map/src", "scrubber/src"]
                    .iter()
                    .any(|f| s.path.starts_with(f)))
        },
        &strings(&[
            "Instant::now",
            "SystemTime",
            "getrandom",
            "std::net",
            "std::os::unix::net",
            "std::fs",
            "std::thread",
        ]),
    );
    expect_none(&findings, "the engine reaches past its traits");
}

#[test]
fn unsafe_code_is_in_one_file() {
    let mut findings = lines_with(
        |s| s.is("rs") && s.path != UNSAFE_FILE && s.path != "tests/tidy.rs",
        &strings(&["unsafe {", "unsafe fn", "unsafe impl", "allow(unsafe_code"]),
    );
    findings.retain(|finding| {
        // The module is declared with the exception that its file is.
        !(finding.contains("allow(unsafe_code") && finding.starts_with("ublk-target/src/main.rs"))
    });
    expect_none(&findings, "unsafe code outside its file");
    let text = fs::read_to_string(root().join(UNSAFE_FILE)).unwrap();
    assert!(text.contains("unsafe {"), "{UNSAFE_FILE} is not the file");
}

#[test]
fn tests_do_not_sleep() {
    let mut findings = Vec::new();
    for source in rust().iter().filter(|s| s.path != "tests/tidy.rs") {
        for (number, line) in source.test_lines() {
            if line.contains("thread::sleep") {
                findings.push(format!("{}:{number}", source.path));
            }
        }
    }
    let python = lines_with(
        |s| s.path.starts_with("tests/native/t_"),
        &strings(&["time.sleep"]),
    );
    findings.extend(python);
    expect_none(
        &findings,
        "tests that sleep instead of waiting for something",
    );
}

#[test]
fn nothing_is_left_to_be_done_in_comments() {
    // Put together here, so that this file does not find itself.
    let needles = [("TO", "DO"), ("FIX", "ME"), ("HA", "CK")];
    let needles = needles.map(|(first, second)| format!("{first}{second}"));
    expect_none(&lines_with(|_| true, &needles), "notes of things to do");
}

#[test]
fn no_machine_and_no_archive_is_named() {
    let hosts = [
        ("debian", ".org"),
        ("pypi", ".org"),
        ("pythonhosted", ".org"),
        ("ubuntu", ".com"),
        ("/work", "/"),
        ("/tmp/target", "-"),
    ];
    let needles = hosts.map(|(first, second)| format!("{first}{second}"));
    let findings = lines_with(|_| true, &needles);
    expect_none(&findings, "names of archives, or paths of one machine");
}

#[test]
fn what_the_readme_names_exists() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let makefile = fs::read_to_string(root().join("Makefile")).unwrap();
    let words: Vec<&str> = readme
        .split(|c: char| c.is_whitespace() || "`(),;".contains(c))
        .collect();
    let mut findings = String::new();
    let mut targets = 0;
    for pair in words.windows(2) {
        // `make X` in backticks or as a command, not the verb.
        let is_command = readme.contains(&format!("`make {}`", pair[1]))
            || readme.contains(&format!("\nmake {}\n", pair[1]));
        if pair[0] == "make" && is_command {
            targets += 1;
            if !makefile.contains(&format!("\n{}:", pair[1])) {
                writeln!(findings, "make {}", pair[1]).unwrap();
            }
        }
    }
    let folders = [
        "scripts/",
        "tests/",
        "benches/",
        "mirror/src/",
        "dirty-map/src/",
    ];
    for word in words {
        let path = word.trim_end_matches(['.', ':']);
        let named = folders.iter().any(|folder| path.starts_with(folder));
        if named && !path.starts_with("benches/out") && !root().join(path).exists() {
            writeln!(findings, "{path}").unwrap();
        }
    }
    assert!(targets >= 3, "the README names {targets} make targets");
    assert!(
        findings.is_empty(),
        "named in README.md, not there:\n{findings}"
    );
}
