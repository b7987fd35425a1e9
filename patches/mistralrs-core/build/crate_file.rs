//! Finds upstream's `.crate` file, as published, and proves that it is the one the patches are for.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use sha2::{Digest, Sha256};

/// The crate that the patches are for.
pub const NAME: &str = "mistralrs-core";
/// Its version, and this package's.
pub const VERSION: &str = "0.8.1";
/// SHA-256 of its `.crate` file, as in the registry's index.
pub const SHA256: &str = "a2b8b9e5c94491d9ceeded3a30291cb6af6ae74810a5776dd55e3bbb8b3429d4";
/// The environment variable that may name the `.crate` file.
pub const OVERRIDE: &str = "DYNAMOE_MISTRALRS_CORE_CRATE";

/// Errors are shown to whoever runs cargo, and nobody matches on them.
pub type Result<T> = std::result::Result<T, String>;

/// Returns the bytes of the `.crate` file: `given` if there is one (the override), else from cargo's cache below
/// `cargo_home`, else from there after `download`.
///
/// # Errors
/// A file `given` that is not the crate; a crate that is nowhere to be found. The message says what was tried.
pub fn load(
    given: Option<&Path>,
    cargo_home: &Path,
    download: impl FnOnce() -> Result<()>,
) -> Result<Vec<u8>> {
    if let Some(path) = given {
        let bytes = fs::read(path).map_err(|e| format!("{OVERRIDE}: cannot read {}: {e}", path.display()))?;
        return verify(bytes).map_err(|e| format!("{OVERRIDE}: {} {e}", path.display()));
    }
    let mut rejected = Vec::new();
    if let Some(bytes) = cached(cargo_home, &mut rejected) {
        return Ok(bytes);
    }
    let downloaded = download();
    rejected.clear();
    if let Some(bytes) = cached(cargo_home, &mut rejected) {
        return Ok(bytes);
    }
    Err(not_found(cargo_home, &rejected, downloaded))
}

/// Passes the bytes on if they are the crate's.
fn verify(bytes: Vec<u8>) -> Result<Vec<u8>> {
    let found: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    if found == SHA256 {
        return Ok(bytes);
    }
    Err(format!("is not {NAME} {VERSION} as published: its sha256 is {found}, expected {SHA256}"))
}

/// The crate from `registry/cache/<any registry>`; files of its name that are not the crate go to `rejected`.
fn cached(cargo_home: &Path, rejected: &mut Vec<String>) -> Option<Vec<u8>> {
    let file = format!("{NAME}-{VERSION}.crate");
    let registries = fs::read_dir(cargo_home.join("registry/cache")).ok()?;
    for path in registries.flatten().map(|registry| registry.path().join(&file)) {
        let Ok(bytes) = fs::read(&path) else { continue };
        match verify(bytes) {
            Ok(bytes) => return Some(bytes),
            Err(reason) => rejected.push(format!("{} {reason}", path.display())),
        }
    }
    None
}

fn not_found(cargo_home: &Path, rejected: &[String], downloaded: Result<()>) -> String {
    let cache = cargo_home.join("registry/cache/*").join(format!("{NAME}-{VERSION}.crate"));
    let in_cache = if rejected.is_empty() { "no such file".into() } else { rejected.join("; ") };
    let download = downloaded.err().unwrap_or_else(|| "succeeded, but left no file there".into());
    format!(
        "cannot find the source of {NAME} {VERSION}, which this package patches but does not hold. Tried:\n\
         - the file that {OVERRIDE} names: not set\n\
         - {}: {in_cache}\n\
         - cargo info {NAME}@{VERSION} --registry crates-io: {download}\n\
         With a network, run that command once and build again. Without, copy the .crate file from a machine that \
         has it and set {OVERRIDE} to its path.",
        cache.display()
    )
}

/// `$CARGO_HOME`, or where cargo puts it without.
///
/// # Errors
/// Neither `CARGO_HOME` nor a home directory is known.
pub fn cargo_home() -> Result<PathBuf> {
    let default = || env::home_dir().map(|home| home.join(".cargo"));
    env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(default)
        .ok_or_else(|| "CARGO_HOME must be set".into())
}

/// Has cargo put the crate into its cache: `cargo info` fetches that one crate and none of its dependencies.
///
/// It runs in a package of its own below `scratch`, so that it sees neither the workspace that is being built nor
/// that workspace's `[patch]`, which would answer with this very package.
///
/// # Errors
/// Cargo's own last words.
pub fn download(cargo: &Path, scratch: &Path) -> Result<()> {
    let package = scratch.join("download");
    let manifest = "[package]\nname = \"download\"\nversion = \"0.0.0\"\nedition = \"2021\"\n\n[workspace]\n";
    fs::create_dir_all(package.join("src"))
        .and_then(|()| fs::write(package.join("Cargo.toml"), manifest))
        .and_then(|()| fs::write(package.join("src/lib.rs"), ""))
        .map_err(|e| format!("cannot write {}: {e}", package.display()))?;

    let mut command = Command::new(cargo);
    command.args(["info", &format!("{NAME}@{VERSION}"), "--registry", "crates-io"]).current_dir(&package);
    for (key, _) in env::vars_os() {
        if key.to_str().is_some_and(is_of_the_outer_build) {
            command.env_remove(key);
        }
    }
    let output = command.output().map_err(|e| format!("cannot run {}: {e}", cargo.display()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()))
}

/// Whether cargo set the variable for the build that this script is part of. What the user set to reach a
/// registry stays.
fn is_of_the_outer_build(key: &str) -> bool {
    const KEPT: [&str; 5] = ["CARGO_HOME", "CARGO_NET_", "CARGO_HTTP_", "CARGO_REGISTRIES_", "CARGO_SOURCE_"];
    key.starts_with("CARGO_") && !KEPT.iter().any(|kept| key.starts_with(kept))
}
