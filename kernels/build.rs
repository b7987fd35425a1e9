//! With the feature `cuda`: compiles the kernels for sm_80 and sm_90a into one fatbin, with PTX of sm_80 for others.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=cu");
    println!("cargo:rerun-if-env-changed=NVCC");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("dynamoe.fatbin");
    let nvcc = nvcc();
    let status = Command::new(&nvcc)
        .args(["--fatbin", "-O3", "-std=c++17"])
        .args(["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"])
        .arg("-gencode=arch=compute_80,code=compute_80")
        .arg("-o")
        .arg(&out)
        .arg(Path::new("cu").join("dynamoe.cu"))
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{} failed on kernels/cu/dynamoe.cu: {status}", nvcc.display()),
        Err(error) => panic!(
            "the feature `cuda` of dynamoe-kernels needs nvcc 12.0 or newer: {} could not be run ({error}). Set \
             CUDA_HOME to a toolkit or NVCC to the compiler, or build without the feature; kernels/check-cuda.sh \
             makes a toolkit.",
            nvcc.display()
        ),
    }
}

/// $NVCC, else that of $CUDA_HOME, else the one on the path.
fn nvcc() -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("NVCC").or_else(|| Some(set("CUDA_HOME")?.join("bin/nvcc"))).unwrap_or_else(|| "nvcc".into())
}
