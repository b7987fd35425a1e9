//! What a program brings for the people who install it: its version, completions and manual.

use std::fs;

use crate::lab::Lab;

#[test]
fn the_version_names_the_commit_and_the_features() {
    let told = Lab::new().ok(&["--version"]);
    let version = told.strip_prefix(concat!("moefy-train ", env!("CARGO_PKG_VERSION"), " (")).expect(&told);
    let (commit, features) = match version.strip_prefix("commit ").and_then(|rest| rest.split_once(", ")) {
        Some((commit, features)) => (Some(commit), features),
        None => (None, version),
    };
    let head = std::process::Command::new("git").args(["rev-parse", "HEAD"]).output();
    let head = head.ok().and_then(|output| String::from_utf8(output.stdout).ok());
    if let (Some(head), Some(commit)) = (head.filter(|head| !head.is_empty()), commit) {
        assert_eq!(&head[..12], commit);
    }
    let expected = match (cfg!(feature = "cuda"), cfg!(feature = "mpi")) {
        (false, false) => "no features)",
        (false, true) => "features mpi)",
        (true, false) => "features cuda)",
        (true, true) => "features cuda, mpi)",
    };
    assert_eq!(features.trim_end(), expected);
}

#[test]
fn shells_and_manuals_know_every_command() {
    let lab = Lab::new();
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = lab.ok(&["completions", shell]);
        for word in ["moefy-train", "finetune", "sequence-length"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
    lab.fails(&["completions", "cmd"], &["bash", "zsh"]);
    let page = lab.ok(&["man"]);
    assert!(page.starts_with(".ie") || page.contains(".TH moefy-train 1"), "{page}");
    assert!(page.contains("moefy\\-train\\-run(1)") || page.contains("moefy-train-run(1)"), "{page}");
    lab.ok(&["man", "--out", "man/man1"]);
    let page = |name: &str| fs::read_to_string(lab.path(&format!("man/man1/{name}.1"))).unwrap();
    assert!(page("moefy-train-run").contains("sequence\\-length"));
    assert!(page("moefy-train").contains("finetune"));
    fs::write(lab.path("file"), "").unwrap();
    lab.fails(&["man", "--out", "file"], &["--out file"]);
}
