//! Upstream's CUDA kernels, built as upstream's build script builds them but from the unpacked source.

use std::{
    env,
    path::{Path, PathBuf},
};

use crate::crate_file::Result;

/// What upstream passes to nvcc.
const NVCC_ARGUMENTS: [&str; 12] = [
    "-std=c++17",
    "-O3",
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_HALF2_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "--expt-relaxed-constexpr",
    "--expt-extended-lambda",
    "--use_fast_math",
    "--verbose",
    "--compiler-options",
    "-fPIC",
];

/// Compiles `src/cuda/*.cu` of the source in `root` into a static library in `out` and links it.
///
/// # Errors
/// nvcc's.
pub fn build(root: &Path, out: &Path) -> Result<()> {
    println!("cargo:rerun-if-env-changed=CUDA_NVCC_FLAGS");
    let sources = root.join("src/cuda/*.cu");
    let sources = sources.to_str().ok_or("the path of the build folder must be UTF-8")?;
    let mut builder = cudaforge::KernelBuilder::new().source_glob(sources).out_dir(out);
    for argument in NVCC_ARGUMENTS {
        builder = builder.arg(argument);
    }
    // bf16 tensor cores and some bf16 intrinsics came with compute capability 8.0
    if builder.get_compute_cap().is_some_and(|capability| capability < 80) {
        builder = builder.arg("-DNO_BF16_KERNEL");
    }
    if let Ok(flags) = env::var("CUDA_NVCC_FLAGS") {
        builder = builder.arg("--compiler-options").arg(&flags);
    }
    let target = env::var("TARGET").map_err(|e| format!("TARGET: {e}"))?;
    builder.build_lib(library(&target, out)).map_err(|e| format!("cannot build the CUDA kernels: {e}"))?;
    println!("cargo:rustc-link-search={}", out.display());
    println!("cargo:rustc-link-lib=mistralrscuda");
    println!("cargo:rustc-link-lib=dylib=cudart");
    if let Some(runtime) = cpp_runtime(&target) {
        println!("cargo:rustc-link-lib=dylib={runtime}");
    }
    Ok(())
}

fn library(target: &str, out: &Path) -> PathBuf {
    out.join(if target.contains("msvc") { "mistralrscuda.lib" } else { "libmistralrscuda.a" })
}

/// The C++ runtime of a target; MSVC links its own.
fn cpp_runtime(target: &str) -> Option<&'static str> {
    if target.contains("msvc") {
        None
    } else if ["apple", "freebsd", "openbsd"].iter().any(|system| target.contains(system)) {
        Some("c++")
    } else if target.contains("android") {
        Some("c++_shared")
    } else {
        Some("stdc++")
    }
}
