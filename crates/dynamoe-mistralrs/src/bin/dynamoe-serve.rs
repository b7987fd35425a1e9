//! `dynamoe-serve`: mistral.rs's OpenAI-compatible server with DynaMoE models in it.

use clap::Parser;
use dynamoe_mistralrs::serve::{Options, run};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    run(Options::parse()).await
}
