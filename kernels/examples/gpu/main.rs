//! Checks every kernel on a GPU against references in f64, then times them beside cuBLAS.
//!
//! ```sh
//! cargo run --release -p dynamoe-kernels --features cuda --example gpu -- [check] [bench] [--json FILE]
//! ```
//!
//! Both by default. The times are of CUDA graphs, so that they hold no launches by the host; weights are those of
//! several layers in turn, so that no cache keeps them from one to the next.

mod bench;
mod check;
mod weights;

use candle_core::cuda_backend::WrapErr;
use candle_core::{Device, Result, bail};

fn main() {
    if let Err(error) = run() {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn run() -> Result<()> {
    let mut json = None;
    let mut steps = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "check" | "bench" => steps.push(argument),
            "--json" => json = arguments.next(),
            other => bail!("expected check, bench or --json FILE, found {other:?}"),
        }
    }
    // a stream of its own, because the default one cannot be captured
    let device = Device::new_cuda_with_stream(0).map_err(|e| e.context("no CUDA device 0"))?;
    let Device::Cuda(cuda) = &device else { bail!("expected a CUDA device") };
    // SAFETY: one stream does all the work, so there is nothing to order by events
    unsafe { cuda.disable_event_tracking() };
    println!("device: {}", cuda.cuda_stream().context().name().w()?);
    let wants = |step: &str| steps.is_empty() || steps.iter().any(|s| s == step);
    if wants("check") {
        check::run(&device)?;
    }
    if wants("bench") {
        let lines = bench::run(&device)?;
        if let Some(path) = json {
            std::fs::write(&path, lines.join("\n") + "\n")?;
        }
    }
    Ok(())
}
