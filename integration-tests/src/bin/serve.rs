//! The server under test: exactly `dynamoe-serve`.

use clap::Parser;
use dynamoe_mistralrs::serve::{Options, run};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    run(Options::parse()).await
}
