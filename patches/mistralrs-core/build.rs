//! Makes the source of this package: the published crate of the same name and version, with the patches in
//! patches/. All of it lands in `OUT_DIR`; docs/engine.md tells the story.

#[path = "build/crate_file.rs"]
mod crate_file;
#[cfg(feature = "cuda")]
#[path = "build/cuda.rs"]
mod cuda;
#[path = "build/source.rs"]
mod source;

use std::{
    env,
    path::{Path, PathBuf},
    process::ExitCode,
};

use crate_file::Result;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=build");
    println!("cargo:rerun-if-changed=patches");
    println!("cargo:rerun-if-env-changed={}", crate_file::OVERRIDE);

    let out = variable("OUT_DIR")?;
    let given = env::var_os(crate_file::OVERRIDE).map(PathBuf::from);
    if let Some(path) = &given {
        println!("cargo:rerun-if-changed={}", path.display());
    }
    let cargo = variable("CARGO")?;
    let bytes = crate_file::load(given.as_deref(), &crate_file::cargo_home()?, || {
        crate_file::download(&cargo, &out)
    })?;

    let root = source::unpack(&bytes, &out)?;
    for patch in source::patches(Path::new("patches"))? {
        source::apply(&root, &patch)?;
    }
    source::make_includable(&root)?;
    // what upstream's build script says outside of a git checkout
    println!("cargo:rustc-env=MISTRALRS_GIT_REVISION=unknown");
    #[cfg(feature = "cuda")]
    cuda::build(&root, &out)?;
    Ok(())
}

fn variable(name: &str) -> Result<PathBuf> {
    env::var_os(name).map(PathBuf::from).ok_or_else(|| format!("{name} is not set: run this through cargo"))
}
