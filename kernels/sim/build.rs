//! Compiles the kernels with the host's C++ compiler.

fn main() {
    for path in ["sim.h", "sim.cpp", "machine.h", "wgmma.cpp", "../cu"] {
        println!("cargo:rerun-if-changed={path}");
    }
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .define("DYNAMOE_SIM", None)
        // a fibre leaves its stack by longjmp, which fortified builds take for an overrun
        .flag_if_supported("-U_FORTIFY_SOURCE")
        .flag_if_supported("-Wno-unknown-pragmas")
        .include("../cu")
        .include(".")
        .file("sim.cpp")
        .file("wgmma.cpp")
        .compile("dynamoe_kernels_sim");
}
