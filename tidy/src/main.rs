//! Style as a test: what reviews would otherwise say again and again.
//!
//! Reads the files that git tracks; writes nothing. Each finding is a line with its place, and
//! the exit status says whether there were any.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::{env, fs};

/// Columns of a line, in any file that people edit.
const COLUMNS_MAX: usize = 100;
/// Lines of a function, signature and closing brace included.
const FUNCTION_LINES_MAX: usize = 70;
/// Lines of a file.
const FILE_LINES_MAX: usize = 800;
/// Where `unsafe` may be said: the machine, and the calls into dom0's Xen devices.
const UNSAFE_FOLDERS: [&str; 2] = ["arch/", "ninepfsd/src/os/"];

fn main() -> ExitCode {
    let root = root();
    let mut findings = Vec::new();
    let files = tracked(&root);
    for path in &files {
        let Ok(text) = fs::read_to_string(root.join(path)) else { continue };
        check_text(path, &text, &mut findings);
        if path.ends_with(".rs") {
            check_rust(path, &text, &mut findings);
        }
        if path.ends_with("Cargo.toml") {
            check_manifest(&root, path, &text, &mut findings);
        }
    }
    for finding in &findings {
        println!("{finding}");
    }
    println!("tidy: {} files, {} findings", files.len(), findings.len());
    if findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The checkout's top: where this crate's folder lies.
fn root() -> PathBuf {
    let here = env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| ".".into());
    Path::new(&here).parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

fn tracked(root: &Path) -> Vec<String> {
    let output = Command::new("git").arg("-C").arg(root).args(["ls-files", "-z"]).output();
    let output = output.expect("git lists the files to look at");
    String::from_utf8_lossy(&output.stdout)
        .split('\0')
        .filter(|path| !path.is_empty())
        .map(str::to_string)
        .collect()
}

fn check_text(path: &str, text: &str, findings: &mut Vec<String>) {
    let edited = [".rs", ".sh", ".ld", ".toml", ".cfg", "Makefile"];
    if !edited.iter().any(|end| path.ends_with(end)) {
        return;
    }
    let reminder = ["TO", "DO"].concat();
    for (index, line) in text.lines().enumerate() {
        let place = format!("{path}:{}", index + 1);
        if line.chars().count() > COLUMNS_MAX {
            findings.push(format!("{place}: longer than {COLUMNS_MAX} columns"));
        }
        if line.contains(&reminder) || line.contains(&["FIX", "ME"].concat()) {
            findings.push(format!("{place}: a forgotten reminder"));
        }
    }
}

fn check_rust(path: &str, text: &str, findings: &mut Vec<String>) {
    let count = text.lines().count();
    if count > FILE_LINES_MAX {
        findings.push(format!("{path}: {count} lines, the limit is {FILE_LINES_MAX}"));
    }
    let is_test = path.contains("tests/") || path.ends_with("_tests.rs") || path.contains("fuzz/");
    if !text.starts_with("//!")
        && !path.ends_with("build.rs")
        && !text.starts_with("// ")
        && !is_test
    {
        findings.push(format!("{path}: its head does not say what it is"));
    }
    check_functions(path, text, findings);
    if UNSAFE_FOLDERS.iter().any(|folder| path.starts_with(folder)) {
        return;
    }
    for (index, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap_or("");
        let word = code.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == "unsafe");
        if word && !code.contains('"') && !code.contains("#[unsafe(") {
            findings.push(format!("{path}:{}: unsafe where it may not be", index + 1));
        }
    }
}

/// Functions by indentation, which rustfmt guarantees: from `fn` to the brace at its own depth.
fn check_functions(path: &str, text: &str, findings: &mut Vec<String>) {
    let mut open: Option<(usize, usize)> = None;
    for (index, line) in text.lines().enumerate() {
        let depth = line.len() - line.trim_start().len();
        let code = line.trim_start();
        if open.is_none() && is_function(code) && !code.ends_with(';') && !code.ends_with('}') {
            open = Some((index, depth));
        }
        if let Some((from, at)) = open
            && depth == at
            && (code == "}" || code == "};" || code.ends_with(");") && index == from)
        {
            let lines = index - from + 1;
            if lines > FUNCTION_LINES_MAX {
                let place = format!("{path}:{}", from + 1);
                findings.push(format!("{place}: {lines} lines, the limit is {FUNCTION_LINES_MAX}"));
            }
            open = None;
        }
    }
}

fn is_function(code: &str) -> bool {
    let words = ["pub ", "pub(crate) ", "pub(super) ", "const ", "unsafe ", "extern \"C\" "];
    let mut rest = code;
    while let Some(word) = words.iter().find(|word| rest.starts_with(**word)) {
        rest = &rest[word.len()..];
    }
    rest.starts_with("fn ")
}

/// Every dependency has its line in DESIGN.md; formats and stores never name each other.
fn check_manifest(root: &Path, path: &str, text: &str, findings: &mut Vec<String>) {
    let design = fs::read_to_string(root.join("DESIGN.md")).unwrap_or_default();
    let mut inside = false;
    for line in text.lines() {
        if line.starts_with('[') {
            inside = line.contains("dependencies");
            continue;
        }
        let name = line.split(['=', '.', ' ']).next().unwrap_or("").trim();
        if !inside || name.is_empty() || name.starts_with('#') {
            continue;
        }
        if !name.starts_with("platter-") && !design.contains(&format!("`{name}`")) {
            findings.push(format!("{path}: `{name}` has no line in DESIGN.md"));
        }
        let (image, storage) = ("platter-image", "platter-storage");
        let edge = path.starts_with("image/") && name == storage
            || path.starts_with("storage/") && name == image;
        if edge {
            findings.push(format!("{path}: image and storage never name each other"));
        }
    }
}
