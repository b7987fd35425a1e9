// Upstream's source as published, patched by build.rs.

// Unlike a crate of the registry, a path or git package gets no lint cap.
#![allow(warnings)]

include!(concat!(
    env!("OUT_DIR"),
    "/",
    env!("CARGO_PKG_NAME"),
    "-",
    env!("CARGO_PKG_VERSION"),
    "/src/lib.rs"
));
