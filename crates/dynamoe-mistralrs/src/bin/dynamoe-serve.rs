//! `dynamoe-serve`: an OpenAI-compatible server for DynaMoE models, on mistral.rs.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    dynamoe_mistralrs::serve::main().await
}
