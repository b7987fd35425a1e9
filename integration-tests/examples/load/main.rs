//! Load on a running `dynamoe-serve`: what holds, and what it costs.
//!
//! ```sh
//! cargo run --release -p dynamoe-integration-tests --example load -- soak --url URL --pid PID
//! cargo run --release -p dynamoe-integration-tests --example load -- bursts --url URL
//! ```
//!
//! `soak` asks for answers that are known from when the server was alone, at mixed dials, cancels some, and sends requests
//! that must be refused. `bursts` asks with 1 to 32 clients at a time, and tells inter-token latency and mean width.

mod bursts;
mod client;
mod soak;

use anyhow::Result;
use clap::Parser;

#[derive(Debug, Parser)]
enum Command {
    /// Wrong, cut and lost answers under mixed load, and the server's memory and file descriptors over time
    Soak(soak::Options),
    /// Inter-token latency and mean width in bursts of clients
    Bursts(bursts::Options),
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Soak(options) => soak::soak(&options),
        Command::Bursts(options) => bursts::bursts(&options),
    }
}
