//! Names git's log of checked-out commits for `--version`, in `GIT_LOG`: an empty file where the crate is in no repository.

use std::path::{Path, PathBuf, absolute};
use std::process::Command;

fn main() {
    // the log itself is watched by the program that includes it
    println!("cargo::rerun-if-changed=build.rs");
    // an archive of the crate that lies in somebody else's repository is none of its files
    let tracked = git(&["ls-files", "--error-unmatch", "Cargo.toml"]);
    let of_git = |name: &str| {
        let path = git(&["rev-parse", "--git-path", name])?;
        absolute(path).ok().filter(|path| path.is_file())
    };
    let log = tracked.as_ref().and_then(|_| of_git("logs/HEAD"));
    // a repository that goes, as a worktree does, takes its log along
    if let Some(head) = log.as_ref().and_then(|_| of_git("HEAD")) {
        println!("cargo::rerun-if-changed={}", head.display());
    }
    let log = log.unwrap_or_else(no_log);
    println!("cargo::rustc-env=GIT_LOG={}", log.display());
}

fn no_log() -> PathBuf {
    let path = Path::new(&std::env::var_os("OUT_DIR").expect("Cargo sets OUT_DIR")).join("no-log");
    std::fs::write(&path, "").expect("Cargo's output folder can be written");
    path
}

fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}
